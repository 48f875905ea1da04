"""The pidfile: one broker at a time, by a lock that lasts exactly as long as its process.

flock(2) belongs to the open file description, so it goes through fork and
execve with the descriptor, and ends with the last process that has it. The
broker keeps the descriptor and can't remove the file: what the file says
counts only while it is locked.
"""

from __future__ import annotations

import fcntl
import os
import stat
from typing import TYPE_CHECKING

from fdbroker.launcher.directories import open_directory_of_root
from fdbroker.launcher.errors import AlreadyRunningError, StartError

if TYPE_CHECKING:
    from types import TracebackType

# Not for writing: the broker has this descriptor, and root may kill what the file says.
_FLAGS = os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
_MOST = 32


class PidFile:
    """A locked pidfile. As a context it has the pid of this process in it, as python-daemon wants it."""

    def __init__(self, path: str) -> None:
        """Open and lock it.

        Raises:
            AlreadyRunningError: another process holds the lock.
            StartError: it can't be made, or is not root's alone.

        """
        directory = open_directory_of_root(os.path.dirname(path), make=True)
        before = os.umask(0o022)
        try:
            self.descriptor = os.open(os.path.basename(path), _FLAGS, 0o644, dir_fd=directory)
        except OSError as error:
            raise StartError(
                f"pidfile {path!r} can't be opened: {error.strerror}; remove what is there"
            ) from error
        finally:
            os.umask(before)
            os.close(directory)
        try:
            self._check(path)
            self._lock(path)
        except BaseException:
            os.close(self.descriptor)
            raise

    def __enter__(self) -> None:
        """Write the pid of this process into it."""
        self.write()

    def write(self) -> None:
        """Write the pid of this process into it."""
        self._replace(f"{os.getpid()}\n")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Empty it: the start has failed."""
        self._replace("")

    def _replace(self, text: str) -> None:
        with open(f"/proc/self/fd/{self.descriptor}", "w", encoding="ascii") as file:
            file.write(text)

    def _check(self, path: str) -> None:
        facts = os.fstat(self.descriptor)
        if (
            not stat.S_ISREG(facts.st_mode)
            or facts.st_uid != 0
            or facts.st_nlink != 1
            or facts.st_mode & 0o022
        ):
            raise StartError(
                f"pidfile {path!r} is not a regular file of root's with one name that nobody else can write;"
                " remove it"
            )

    def _lock(self, path: str) -> None:
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            text = os.pread(self.descriptor, _MOST, 0).strip().decode("ascii", "replace")
            who = f"process {text} holds" if text.isdigit() else "a process that is being started holds"
            cure = f"stop it first (kill {text})" if text.isdigit() else "wait for it"
            raise AlreadyRunningError(
                f"a broker runs already: {who} the lock of {path!r}; {cure}, or use another --pidfile"
            ) from None
