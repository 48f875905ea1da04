"""inotify(7), as far as tests need it."""

from __future__ import annotations

import contextlib
import ctypes
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# linux/inotify.h
IN_ATTRIB = 0x04
IN_OPEN = 0x20
_IN_DONT_FOLLOW = 0x02000000

_LIBC = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def watched(path: Path, events: int) -> Iterator[int]:
    """Watch `path`, or what is in it, for the length of the block; give a descriptor that does not block."""
    watch = _LIBC.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    if watch < 0:
        raise OSError(ctypes.get_errno(), "inotify_init1")
    try:
        if _LIBC.inotify_add_watch(watch, bytes(path), events | _IN_DONT_FOLLOW) < 0:
            raise OSError(ctypes.get_errno(), "inotify_add_watch", str(path))
        yield watch
    finally:
        os.close(watch)


def has_news(watch: int) -> bool:
    """Return whether something was seen since it was asked last."""
    try:
        return bool(os.read(watch, 65536))
    except BlockingIOError:
        return False
