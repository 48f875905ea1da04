"""Directories that root alone can write, held open so that what was checked is what is used."""

from __future__ import annotations

import os
import stat

from fdbroker.launcher.errors import StartError

_LOOKING = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def open_directory_of_root(path: str, *, make: bool = False) -> int:
    """Return a descriptor of a directory in which nobody but root can make or rename anything.

    From / down each component is opened relative to the one before, without
    following links, and looked at. Above the last one a sticky directory such
    as /tmp will do: there nobody can take away what is root's. With `make` the
    last one is made, mode 0755, if it is missing.

    Raises:
        StartError: it is not so; the text names the component and the cure.

    """
    at = "/"
    descriptor = os.open(at, _LOOKING)
    try:
        names = [name for name in path.split("/") if name]
        for number, name in enumerate(names, 1):
            _check(descriptor, at, last=False)
            at = os.path.join(at, name)
            if make and number == len(names):
                _make(name, descriptor, at)
            below = _open(name, descriptor, at)
            os.close(descriptor)
            descriptor = below
        _check(descriptor, at, last=True)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _make(name: str, parent: int, path: str) -> None:
    before = os.umask(0o022)
    try:
        os.mkdir(name, 0o755, dir_fd=parent)
    except FileExistsError:
        pass
    except OSError as error:
        raise StartError(
            f"directory {path!r} can't be made: {error.strerror}; make it first, as root, mode 0755"
        ) from error
    finally:
        os.umask(before)


def _open(name: str, parent: int, path: str) -> int:
    try:
        return os.open(name, _LOOKING, dir_fd=parent)
    except OSError as error:
        reason, cure = error.strerror, "name a directory that exists"
        try:
            mode = os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode
        except OSError:
            mode = 0
        if stat.S_ISLNK(mode):
            reason, cure = "it is a symbolic link", f"use its real path, {os.path.realpath(path)!r}"
        raise StartError(f"directory {path!r} can't be used: {reason}; {cure}") from error


def _check(descriptor: int, path: str, *, last: bool) -> None:
    facts = os.fstat(descriptor)
    if facts.st_uid != 0:
        raise StartError(
            f"directory {path!r} can't be used: it belongs to uid {facts.st_uid}, who could exchange what is"
            " made there; use one of root's"
        )
    if facts.st_mode & _OTHERS_WRITE and (last or not facts.st_mode & stat.S_ISVTX):
        raise StartError(
            f"directory {path!r} can't be used: its mode is 0{stat.S_IMODE(facts.st_mode):03o}, so that"
            " others than root could make or exchange things there; chmod go-w it, or use another"
        )
