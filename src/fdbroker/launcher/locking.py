"""The pidfile: one broker at a time, by a lock that lasts exactly as long as its process.

flock(2) belongs to the open file description, so it goes through fork and
execve with the descriptor, and ends with the last process that has it. It asks
for no right to write, so nobody but root may be able to open the file: who can
read it could hold the lock for ever. The broker keeps the descriptor and can't
remove the file: what the file says counts only while that process has the lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import stat
from typing import NamedTuple

from fdbroker.launcher.directories import open_directory_of_root
from fdbroker.launcher.errors import AlreadyRunningError, LaunchError

# Not for writing: the broker has this descriptor, and root may kill what the file says.
_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
_OTHERS = stat.S_IRWXG | stat.S_IRWXO
_MOST_BYTES = 32  # of the file are looked at; a pid has at most seven digits
_PATIENCE = 10.0  # seconds for a broker to end after SIGTERM; it promises one


class PidFile:
    """A locked pidfile.

    `descriptor` is the caller's; the lock ends when its last copy, in whatever process, is closed.
    """

    def __init__(self, path: str) -> None:
        """Open and lock it.

        Raises:
            AlreadyRunningError: another process holds the lock.
            LaunchError: it can't be made, or is not root's alone.

        """
        self.descriptor = _open(path, os.O_CREAT)
        try:
            if not _locked(self.descriptor):
                raise _already_running(self.descriptor, path)
            _check(self.descriptor, path)  # again: until now somebody could have removed it
        except BaseException:
            os.close(self.descriptor)
            raise

    def write(self) -> None:
        """Write the pid of this process into it."""
        self._replace(f"{os.getpid()}\n")

    def empty(self) -> None:
        """Take it out again: the start has failed."""
        self._replace("")

    def _replace(self, text: str) -> None:
        with open(f"/proc/self/fd/{self.descriptor}", "w", encoding="ascii") as file:
            file.write(text)


def stop_holder(path: str) -> bool:
    """End the broker that holds the lock of the pidfile `path`; return whether there was one.

    Returns when it is gone. Nobody gets a signal who does not hold the lock,
    whatever the file says.

    Raises:
        LaunchError: somebody holds the lock who is not named there, or does not end.

    """
    if not os.path.lexists(path):
        return False
    descriptor = _open(path)
    try:
        if _locked(descriptor):
            return False
        holder = _holder(descriptor)
        if holder is None:
            raise LaunchError(_somebody(path))
    finally:
        os.close(descriptor)
    try:
        signal.pidfd_send_signal(holder.process, signal.SIGTERM)
        if not _has_ended(holder.process, _PATIENCE):
            raise LaunchError(
                f"process {holder.pid}, which holds the lock of {path!r}, has not ended {_PATIENCE:.0f} s"
                f" after SIGTERM; see what holds it, or end it by kill -KILL {holder.pid}"
            )
    except ProcessLookupError:
        pass  # it ended by itself
    finally:
        os.close(holder.process)
    return True


def _open(path: str, more_flags: int = 0) -> int:
    """Return a descriptor of the file; with O_CREAT its directory is made as well."""
    make = bool(more_flags & os.O_CREAT)
    directory = open_directory_of_root(os.path.dirname(path), make=make)
    before = os.umask(0o077)
    try:
        descriptor = os.open(os.path.basename(path), _FLAGS | more_flags, 0o600, dir_fd=directory)
    except OSError as error:
        raise LaunchError(
            f"pidfile {path!r} can't be opened: {error.strerror}; do it as root, or remove what is there"
        ) from error
    finally:
        os.umask(before)
        os.close(directory)
    try:
        _check(descriptor, path)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _check(descriptor: int, path: str) -> None:
    facts = os.fstat(descriptor)
    if not stat.S_ISREG(facts.st_mode) or facts.st_uid != 0 or facts.st_nlink != 1 or facts.st_mode & _OTHERS:
        raise LaunchError(
            f"pidfile {path!r} is not a regular file of root's with one name that nobody else can open;"
            " remove it"
        )


def _locked(descriptor: int) -> bool:
    """Lock it, and return whether that could be done."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _already_running(descriptor: int, path: str) -> AlreadyRunningError:
    holder = _holder(descriptor)
    if holder is None:
        return AlreadyRunningError(f"{_somebody(path)}, or use another --pidfile")
    os.close(holder.process)
    return AlreadyRunningError(
        f"a broker runs already: process {holder.pid} holds the lock of {path!r}; stop it first"
        f" (fdbrokerd --stop --pidfile {path}), or use another --pidfile"
    )


def _somebody(path: str) -> str:
    return (
        f"somebody holds the lock of {path!r} who is not named there: a broker that is being started, or"
        f" another program; wait, or look who it is (fuser {path})"
    )


class _Holder(NamedTuple):
    """Who holds the lock. `process` is a pidfd, the caller's to close."""

    pid: int
    process: int


def _holder(descriptor: int) -> _Holder | None:
    """Return the process that the file names, if it has the lock."""
    text = os.pread(descriptor, _MOST_BYTES, 0).strip()
    try:
        pid = int(text) if text.isdigit() else 0
        process = os.pidfd_open(pid)
    except (OSError, OverflowError):
        return None
    # It still lives after the look, so it was the one that was looked at: its number was not free.
    if _has_lock(pid, os.fstat(descriptor)) and not _has_ended(process, 0):
        return _Holder(pid, process)
    os.close(process)
    return None


def _has_lock(pid: int, file: os.stat_result) -> bool:
    """Return whether a descriptor of the process is one of this file with its lock; proc_pid_fdinfo(5)."""
    try:
        names = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return False  # it is gone, or nothing of it can be seen
    for name in names:
        with contextlib.suppress(OSError):  # closed meanwhile
            if os.path.samestat(os.stat(f"/proc/{pid}/fd/{name}"), file):
                with open(f"/proc/{pid}/fdinfo/{name}", encoding="ascii") as info:
                    if any(line.startswith("lock:") and " FLOCK " in line for line in info):
                        return True
    return False


def _has_ended(process: int, seconds: float) -> bool:
    return bool(select.select([process], [], [], seconds)[0])
