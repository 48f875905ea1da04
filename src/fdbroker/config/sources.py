"""Opens the policy file, and believes it only if nobody but root can have written it.

Every directory on the way is looked at, and the next one is opened relative to
it (`directories`); symbolic links are refused on the whole way.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from typing import NamedTuple, NoReturn

from fdbroker.config.directories import Kind, Sticky, UnsafeDirectoryError, is_link, open_directory
from fdbroker.config.errors import ConfigError, Problem

MAX_BYTES = 1024 * 1024
MAX_FILES = 256  # beside the main one
# O_NONBLOCK: a FIFO in its place must not hang root. O_NOCTTY: nor a terminal become ours.
_FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def read_policy_file(path: str, *, dev: bool = False, most_bytes: int = MAX_BYTES) -> bytes:
    """Return the bytes of a policy file of root's.

    The file must be a regular one with one link and not too long; it and all
    directories above it must belong to root and be writable by nobody else.
    With `dev` the user who runs this is as good as root, and directories like
    /tmp (sticky) are accepted.

    Raises:
        ConfigError: anything of this does not hold, or the file can't be read.

    """
    return _Source(path, most_bytes, dev=dev).read()


class PolicyFile(NamedTuple):
    """One file of a policy: by which name it was read, and what is in it."""

    name: str
    text: bytes


def read_policy_files(path: str, *, dev: bool = False) -> list[PolicyFile]:
    """Return a policy file, and behind it all `*.yaml` in the directory of its parts, in byte order of names.

    Of `X.yaml` that directory is `X.d`, if there is one. Names that begin with a dot or end otherwise are
    passed over, as those that editors and packages leave behind.

    Raises:
        ConfigError: `read_policy_file` would not read one of them, or the directory is not safe, changes, or
            has a name that looks like a part and is not taken for one.

    """
    files = [PolicyFile(path, read_policy_file(path, dev=dev))]
    directory = directory_of_parts(path)
    if directory is not None:
        before = _list_parts(directory, dev=dev)
        files += [PolicyFile(name, read_policy_file(name, dev=dev)) for name in before.parts]
        if _list_parts(directory, dev=dev) != before:
            cure = "try again when it is written"
            raise ConfigError([Problem(directory, None, None, "changed while it was read", cure)])
    return files


def parts_among(directory: str, names: Iterable[str]) -> list[str]:
    """Return the paths of those names in a directory that are parts of a policy, in their order.

    Raises:
        ConfigError: a name looks like a part and is not taken for one, or there are too many.

    """
    parts, problems = [], []
    for name in sorted(names, key=os.fsencode):
        path = os.path.join(directory, name)
        if name.startswith("."):
            continue
        if name.endswith(".yaml"):
            parts.append(path)
        elif name.lower().endswith((".yml", ".yaml")):
            cure = f"call it {os.path.splitext(name)[0]}.yaml, or take it away"
            problems.append(
                Problem(path, None, None, "is not read, since its name does not end in .yaml", cure)
            )
    if len(parts) > MAX_FILES:
        cure = "put several parts into one file"
        problems.append(Problem(directory, None, None, f"has more than {MAX_FILES} parts of a policy", cure))
    if problems:
        raise ConfigError(problems)
    return parts


def directory_of_parts(path: str) -> str | None:
    """Return where parts of a policy file may be, None if there are none of a file of this name."""
    return f"{path.removesuffix('.yaml')}.d" if path.endswith(".yaml") else None


class _Listing(NamedTuple):
    """The paths of the parts, and when their directory was last changed."""

    parts: list[str]
    changed: int


def _list_parts(directory: str, *, dev: bool) -> _Listing:
    if not os.path.lexists(directory):
        return _Listing([], 0)
    held = _Source(os.path.join(directory, "*.yaml"), 0, dev=dev).open_directory()
    try:
        changed = os.fstat(held).st_mtime_ns
        # Of an O_PATH descriptor nothing is read.
        readable = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=held)
    finally:
        os.close(held)
    try:
        return _Listing(parts_among(directory, os.listdir(readable)), changed)
    finally:
        os.close(readable)


class _Source:
    """One reading of one file. What is wrong is collected, as far as looking on is safe."""

    def __init__(self, path: str, most_bytes: int, *, dev: bool) -> None:
        self._given = path
        # Lexically: a symbolic link before a `..` would be refused in any case.
        self._path = os.path.abspath(path) if path and "\0" not in path else "/"
        self._most_bytes = most_bytes
        self._dev = dev
        self._owners = {0, os.geteuid()} if dev else {0}
        self._problems: list[Problem] = []

    def read(self) -> bytes:
        directory = self.open_directory()
        try:
            descriptor = self._open_file(os.path.basename(self._path), directory)
        finally:
            os.close(directory)
        try:
            return self._read_file(descriptor)
        finally:
            os.close(descriptor)

    def open_directory(self) -> int:
        """Return a descriptor of the directory that the file is in, the caller's, if it is safe."""
        if self._path == "/":
            self._refuse(self._given, "is not the name of a file", "name the policy file")
        try:
            return open_directory(
                os.path.dirname(self._path),
                sticky=Sticky.ANYWHERE if self._dev else Sticky.NOWHERE,
                owners=self._owners,
            )
        except UnsafeDirectoryError as error:
            for at, kind, detail in error.problems:
                self._note(at, *self._message(kind, detail))
            # A file in a directory of somebody else's is not even opened.
            raise ConfigError(self._problems) from error

    def _message(self, kind: Kind, detail: str) -> tuple[str, str]:
        """Return what is wrong with a directory, and the cure."""
        if kind is Kind.FOREIGN:
            reason = f"this directory above the policy file belongs to uid {detail}, not to root"
            return reason, "keep the file in a directory of root's"
        if kind is Kind.WRITABLE:
            reason = f"this directory above the policy file has mode {detail}, which lets others write"
            return reason, "keep the file in a directory that only root can write to"
        if kind is Kind.LINK:
            return self._link()
        return f"can't be opened: {detail}", "check the path and who runs this"

    def _link(self) -> tuple[str, str]:
        return "is a symbolic link", f"name the file by its real path, {os.path.realpath(self._given)!r}"

    def _open_file(self, name: str, directory: int) -> int:
        try:
            return os.open(name, _FILE_FLAGS, dir_fd=directory)
        except OSError as error:
            if is_link(name, directory):
                self._refuse(self._given, *self._link())
            self._refuse(
                self._given, f"can't be opened: {error.strerror}", "check the path and who runs this"
            )

    def _read_file(self, descriptor: int) -> bytes:
        before = os.fstat(descriptor)
        self._check_file(before)
        parts = []
        left = self._most_bytes + 1
        while left and (part := os.read(descriptor, left)):
            parts.append(part)
            left -= len(part)
        after = os.fstat(descriptor)
        text = b"".join(parts)
        # Half of a policy is a valid policy with fewer denials.
        if before.st_mtime_ns != after.st_mtime_ns or not before.st_size == after.st_size == len(text):
            self._refuse(self._given, "changed while it was read", "try again when it is written")
        return text

    def _check_file(self, status: os.stat_result) -> None:
        if not stat.S_ISREG(status.st_mode):
            self._refuse(self._given, "is not a regular file", "name the policy file")
        if status.st_uid not in self._owners:
            self._note(self._given, f"belongs to uid {status.st_uid}, not to root", "chown it to root")
        if status.st_mode & _OTHERS_WRITE:
            self._note(self._given, f"has mode {_octal(status)}, which lets others write", "chmod go-w it")
        if status.st_nlink != 1:
            self._note(
                self._given,
                f"has {status.st_nlink} names (hard links), which may be in places that others write to",
                "replace it by a copy",
            )
        if status.st_size > self._most_bytes:
            self._note(
                self._given, f"has more than {self._most_bytes} bytes", "a policy is smaller: use globs"
            )
        self._stop_if_any()

    def _note(self, file: str, message: str, cure: str) -> None:
        self._problems.append(Problem(file, None, None, message, cure))

    def _stop_if_any(self) -> None:
        if self._problems:
            raise ConfigError(self._problems)

    def _refuse(self, file: str, message: str, cure: str) -> NoReturn:
        self._note(file, message, cure)
        raise ConfigError(self._problems)


def _octal(status: os.stat_result) -> str:
    return f"0{stat.S_IMODE(status.st_mode):03o}"
