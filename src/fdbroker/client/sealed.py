"""Sealed copies: a file's contents in memory that nobody can change any more, not even its owner.

The copy is made in this process and counts against its memory. It is of one
moment, as far as the file's size and times can tell: whoever writes through a
shared mapping that is dirty already is not seen.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from typing import TYPE_CHECKING

from fdbroker.client.errors import changed, copying_timed_out, too_large

if TYPE_CHECKING:
    from collections.abc import Generator

SEAL_LIMIT = 1 << 30  # bytes
_PIECE = 1 << 20  # bytes; between two of them the time is looked at
_MFD_NOEXEC_SEAL = 8  # Linux 6.3: not executable, and sealed so; not in Python's os module
_CLOCK_REALTIME_COARSE = 5  # time(7): what file times are taken from; not in Python's time module
_LONGEST_TICK = 0.02  # seconds: two of the slowest clock (CONFIG_HZ=100)
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def seal(
    descriptor: int,
    max_size: int = SEAL_LIMIT,
    deadline: float | None = None,
    path: bytes | None = None,
) -> int:
    """Return a sealed memory file with the contents of a regular file; the caller owns it, and its own still.

    It stands at offset 0. It is open for writing in name only: the seals
    (fcntl(2), F_ADD_SEALS) refuse each write, change of size and other seal.

    Args:
        descriptor: the file, open for reading; its offset is not used and not moved.
        max_size: most bytes that the copy may have.
        deadline: when to give up, by time.monotonic(); None: never.
        path: what errors name.

    Raises:
        ValueError: no regular file.
        FileTooLargeError: it is larger than `max_size`.
        ChangedError: its size, mtime or ctime moved meanwhile.
        FileTimeoutError: the deadline passed.
        OSError: from sendfile(2), memfd_create(2), fcntl(2).

    """
    steps = seal_in_steps(descriptor, max_size, deadline, path)
    while True:
        try:
            time.sleep(next(steps))
        except StopIteration as end:
            copy: int = end.value
            return copy


def seal_in_steps(
    descriptor: int, max_size: int, deadline: float | None, path: bytes | None
) -> Generator[float, None, int]:
    """Do what `seal` does, and yield after each piece, for those who have something else to do as well.

    What is yielded is how long to wait before going on, in seconds.
    """
    # A change within the tick of the clock that the last one had would have the same time.
    before = os.fstat(descriptor)
    while _just_changed(before):
        yield _LONGEST_TICK / 10
        if _state(os.fstat(descriptor)) != _state(before):
            raise changed(path)  # as it may go on to, for ever
    if not stat.S_ISREG(before.st_mode):
        raise ValueError(f"descriptor {descriptor} is no regular file, so no copy can be made of it")
    if before.st_size > max_size:
        raise too_large(path, before.st_size, max_size)
    copy = memory_file()
    try:
        copied = 0
        while copied < before.st_size:
            if deadline is not None and time.monotonic() >= deadline:
                raise copying_timed_out(path, copied, before.st_size)
            # Never beyond the size that it had: a file that grows has changed, however long it grows.
            sent = os.sendfile(copy, descriptor, copied, min(_PIECE, before.st_size - copied))
            if not sent:
                raise changed(path)  # it shrank
            copied += sent
            yield 0.0
        after = os.fstat(descriptor)
        if _state(after) != _state(before):
            raise changed(path)
        seal_memory_file(copy)
    except BaseException:
        os.close(copy)
        raise
    return copy


def _just_changed(file: os.stat_result) -> bool:
    """Return whether the clock has not moved since a file was changed last."""
    now = time.clock_gettime_ns(_CLOCK_REALTIME_COARSE)
    # A time further ahead is another machine's, or was set by hand: waiting would not help.
    return now <= max(file.st_mtime_ns, file.st_ctime_ns) < now + int(_LONGEST_TICK * 1e9)


def _state(file: os.stat_result) -> tuple[int, int, int]:
    return file.st_size, file.st_mtime_ns, file.st_ctime_ns


def memory_file() -> int:
    """Return a new memory file that can be sealed; the caller owns it. Raises OSError, of memfd_create(2)."""
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        return os.memfd_create("sealed", flags | _MFD_NOEXEC_SEAL)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    return os.memfd_create("sealed", flags)


def seal_memory_file(descriptor: int) -> None:
    """Let nobody change a memory file any more; it stands at offset 0 then. Raises OSError, of fcntl(2)."""
    os.lseek(descriptor, 0, os.SEEK_SET)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
