"""A fanotify permission listener that never answers: every open of a marked file waits for it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_LIBC = ctypes.CDLL(None, use_errno=True)
# linux/fanotify.h
_CLASS_CONTENT = 4
_CLOEXEC = 1
_NONBLOCK = 2
_MARK_ADD = 1
_OPEN_PERM = 0x10000
_EVENT = struct.Struct("=IBBHQii")


class Listener:
    """What was asked and not answered. The kernel lets all of them go on when it is closed."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def wait_until_asked(self) -> int:
        """Wait for the next open, and return the pid of who opens; it waits on."""
        poll = select.poll()
        poll.register(self._descriptor, select.POLLIN)
        assert poll.poll(30_000), "nobody opened anything"
        event = os.read(self._descriptor, _EVENT.size)
        _, _, _, _, _, opened, pid = _EVENT.unpack(event)
        os.close(opened)
        return int(pid)


@contextlib.contextmanager
def held_opens(file: Path) -> Iterator[Listener]:
    """Hold every open of `file` until the end of the block."""
    descriptor = _LIBC.fanotify_init(_CLASS_CONTENT | _CLOEXEC | _NONBLOCK, os.O_RDONLY)
    if descriptor < 0:
        raise OSError(ctypes.get_errno(), "fanotify_init")
    try:
        mask = ctypes.c_uint64(_OPEN_PERM)
        if _LIBC.fanotify_mark(descriptor, _MARK_ADD, mask, -100, bytes(file)) != 0:
            raise OSError(ctypes.get_errno(), "fanotify_mark")
        yield Listener(descriptor)
    finally:
        os.close(descriptor)
