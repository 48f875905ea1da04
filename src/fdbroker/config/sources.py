"""Opens the policy file, and believes it only if nobody but root can have written it.

Every directory on the way is looked at, and the next one is opened relative to
it (`directories`); symbolic links are refused on the whole way.
"""

from __future__ import annotations

import os
import stat
from typing import NoReturn

from fdbroker.config.directories import Kind, Sticky, UnsafeDirectoryError, is_link, open_directory
from fdbroker.config.errors import ConfigError, Problem

MAX_BYTES = 1024 * 1024
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


class _Source:
    """One reading of one file. What is wrong is collected, as far as looking on is safe."""

    def __init__(self, path: str, most_bytes: int, *, dev: bool) -> None:
        self._given = path
        self._most_bytes = most_bytes
        self._dev = dev
        self._owners = {0, os.geteuid()} if dev else {0}
        self._problems: list[Problem] = []

    def read(self) -> bytes:
        # Lexically: a symbolic link before a `..` would be refused in any case.
        path = os.path.abspath(self._given) if self._given and "\0" not in self._given else "/"
        if path == "/":
            self._refuse(self._given, "is not the name of a file", "name the policy file")
        directory = self._open_directory(os.path.dirname(path))
        try:
            descriptor = self._open_file(os.path.basename(path), directory)
        finally:
            os.close(directory)
        try:
            return self._read_file(descriptor)
        finally:
            os.close(descriptor)

    def _open_directory(self, path: str) -> int:
        try:
            return open_directory(
                path, sticky=Sticky.ANYWHERE if self._dev else Sticky.NOWHERE, owners=self._owners
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
