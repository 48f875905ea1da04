"""Mounts for tests: made in this mount namespace, passed on to brokers, gone at the end of the block."""

from __future__ import annotations

import contextlib
import ctypes
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# linux/mount.h
MS_RDONLY = 1
MS_REMOUNT = 32
MS_BIND = 4096
_MS_SHARED = 1 << 20
_MNT_FORCE = 1
_MNT_DETACH = 2

_LIBC = ctypes.CDLL(None, use_errno=True)


def mount(source: bytes, target: bytes, kind: bytes | None = None, flags: int = 0, data: bytes = b"") -> None:
    """Make a mount, or change one, as the flags say."""
    if _LIBC.mount(source, target, kind, ctypes.c_ulong(flags), data) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), target)


def unmount(target: bytes, *, force: bool = False) -> None:
    """Take the mount at `target` and those below it out of the tree, in use or not: umount2(MNT_DETACH).

    `force`: end the connection of a FUSE or network file system instead (MNT_FORCE); in use it stays mounted.
    """
    if _LIBC.umount2(target, _MNT_FORCE if force else _MNT_DETACH) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), target)


@contextlib.contextmanager
def mounted(kind: str, target: Path, *, flags: int = 0, data: str = "") -> Iterator[Path]:
    """Mount a new file system at `target`."""
    mount(b"none", bytes(target), kind.encode(), flags, data.encode())
    try:
        yield target
    finally:
        unmount(bytes(target))


@contextlib.contextmanager
def bound(source: Path, target: Path, *, read_only: bool = False) -> Iterator[Path]:
    """Show `source` at `target` as well.

    A bind mount is made writable first, then read-only by itself; what was
    passed on to other namespaces by then stays writable there.
    """
    mount(bytes(source), bytes(target), flags=MS_BIND)
    try:
        if read_only:
            mount(b"none", bytes(target), flags=MS_REMOUNT | MS_BIND | MS_RDONLY)
        yield target
    finally:
        unmount(bytes(target))


@contextlib.contextmanager
def shared_tmpfs(target: Path) -> Iterator[Path]:
    """Mount a tmpfs whose later mounts reach the brokers that are started meanwhile.

    A broker's mount namespace follows the one it was made from, but only where
    that one's mounts are shared; systemd makes them so, a bare kernel does not.
    """
    with mounted("tmpfs", target, data="mode=755"):
        mount(b"none", bytes(target), flags=_MS_SHARED)
        yield target
