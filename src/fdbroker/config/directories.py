"""The way to a directory that nobody else can change: the same for policy files, sockets, locks, the audit.

From / down each component is opened relative to the one before, without
following links, and looked at through its descriptor: what was checked is what
is used, whatever happens to names meanwhile. A POSIX ACL that lets somebody
write shows in the group bits of the mode (its mask), so the mode is enough.
"""

from __future__ import annotations

import enum
import os
import stat
from collections.abc import Container
from typing import NamedTuple

_FLAGS = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


class Sticky(enum.Enum):
    """Where a directory that all can write will do if it is sticky, as /tmp is.

    What is root's in there nobody can take away; but anybody can make things
    that are not there yet, so not where names are looked up that may be missing.
    """

    NOWHERE = enum.auto()
    ABOVE = enum.auto()  # on the way, not at its end
    ANYWHERE = enum.auto()


class Kind(enum.Enum):
    """What is wrong with a directory, and so what the detail of its problem is."""

    FOREIGN = enum.auto()  # the uid that it belongs to
    WRITABLE = enum.auto()  # its mode, in octal
    LINK = enum.auto()  # the real path
    UNREACHABLE = enum.auto()  # why
    NOT_MADE = enum.auto()  # why


class DirectoryProblem(NamedTuple):
    """One directory on the way, and what is wrong with it."""

    path: str
    kind: Kind
    detail: str


class UnsafeDirectoryError(Exception):
    """Somebody else could change what is found there, or nothing is. `problems`: one or more, from / down."""

    def __init__(self, problems: list[DirectoryProblem]) -> None:
        super().__init__(problems)
        self.problems = problems


def open_directory(
    path: str,
    *,
    sticky: Sticky,
    owners: Container[int] = frozenset({0}),
    make: bool = False,
    group_above: bool = False,
) -> int:
    """Return a descriptor of a directory, the caller's: it and all above it are one of `owners`' alone.

    With `make` the last component is made, mode 0755, if it is missing. With
    `group_above` those above it may be writable by their group, who can put
    another directory there, but not one that passes.

    Raises:
        UnsafeDirectoryError: it is not so.

    """
    problems: list[DirectoryProblem] = []
    names = [name for name in path.split("/") if name]
    at = "/"
    descriptor = os.open(at, _FLAGS)
    try:
        for left in range(len(names), -1, -1):
            sticky_will_do = sticky is Sticky.ANYWHERE or (sticky is Sticky.ABOVE and left > 0)
            writers = stat.S_IWOTH if group_above and left > 0 else _OTHERS_WRITE
            problems += _look(at, os.fstat(descriptor), owners, writers, sticky_will_do=sticky_will_do)
            if left:
                name = names[-left]
                at = os.path.join(at, name)
                if make and left == 1 and not problems:
                    _make(name, descriptor, at)
                below = _open(name, descriptor, at, problems)
                os.close(descriptor)
                descriptor = below
        if problems:
            raise UnsafeDirectoryError(problems)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def is_link(name: str, directory: int) -> bool:
    """Return whether `name` in a held directory is a symbolic link."""
    try:
        return stat.S_ISLNK(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode)
    except OSError:
        return False


def _look(
    path: str, facts: os.stat_result, owners: Container[int], writers: int, *, sticky_will_do: bool
) -> list[DirectoryProblem]:
    found = []
    if facts.st_uid not in owners:
        found.append(DirectoryProblem(path, Kind.FOREIGN, str(facts.st_uid)))
    if facts.st_mode & writers and not (sticky_will_do and facts.st_mode & stat.S_ISVTX):
        found.append(DirectoryProblem(path, Kind.WRITABLE, f"0{stat.S_IMODE(facts.st_mode):03o}"))
    return found


def _make(name: str, parent: int, path: str) -> None:
    before = os.umask(0o022)
    try:
        os.mkdir(name, 0o755, dir_fd=parent)
    except FileExistsError:
        pass
    except OSError as error:
        problem = DirectoryProblem(path, Kind.NOT_MADE, error.strerror or str(error))
        raise UnsafeDirectoryError([problem]) from error
    finally:
        os.umask(before)


def _open(name: str, parent: int, path: str, problems: list[DirectoryProblem]) -> int:
    try:
        return os.open(name, _FLAGS, dir_fd=parent)
    except OSError as error:
        problem = DirectoryProblem(path, Kind.UNREACHABLE, error.strerror or str(error))
        if is_link(name, parent):
            problem = DirectoryProblem(path, Kind.LINK, os.path.realpath(path))
        raise UnsafeDirectoryError([*problems, problem]) from error
