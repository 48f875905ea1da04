"""File systems that a client can have made: what they are asked, and be it by close(2), may take for ever.

A user can mount FUSE, whose server is a program of its own, and an overlay above that. With a descriptor
of a file system that root has mounted here this process can do what it wants. Of another one a thread has to
find out what it is, and to close it.
"""

from __future__ import annotations

import contextlib
import os
import select
from typing import TYPE_CHECKING, NamedTuple

from fdbroker.kernel.descriptors import Descriptors
from fdbroker.kernel.devices import device_at_once
from fdbroker.kernel.files import filesystem_of

if TYPE_CHECKING:
    from collections.abc import Sequence

_FUSE, _OVERLAY = 0x65735546, 0x794C7630  # of statfs(2)


class Mounted:
    """The file systems that are mounted here, but for those whose server is a program. Owns a descriptor."""

    def __init__(self) -> None:
        self._mounts = open("/proc/self/mountinfo", "rb")  # noqa: SIM115 - closed by close
        # It tells that something was mounted or unmounted, before a number can be another file system's.
        self._changes = select.poll()
        self._changes.register(self._mounts, select.POLLERR | select.POLLPRI)
        with Descriptors([os.memfd_create("device")]) as memory:
            self._memory = device_at_once(*memory.numbers())
        self._devices = self._read()

    def have(self, descriptor: int) -> bool:
        """Return whether the file system behind a descriptor is one of them, or memory. Never waits."""
        try:
            device = device_at_once(descriptor)
        except OSError:
            return False
        if self._changes.poll(0):
            self._devices = self._read()
        return device in self._devices

    def close(self) -> None:
        """Close the descriptor."""
        self._mounts.close()

    def _read(self) -> frozenset[int]:
        self._mounts.seek(0)
        devices = {self._memory}
        for line in self._mounts:
            mount, _, what = line.partition(b" - ")
            if not what.startswith((b"fuse ", b"fuse.", b"fuseblk ")):
                major, minor = mount.split(b" ", 3)[2].split(b":")
                devices.add(os.makedev(int(major), int(minor)))
        return frozenset(devices)


class Sorted(NamedTuple):
    """Descriptors that may be used, and how many were of no use and are closed."""

    kept: Descriptors
    refused: int


def sort_out(descriptors: Sequence[int]) -> Sorted:
    """Close those of descriptors whose file system may be a user's program. May take for ever."""
    kept = Descriptors()
    refused = 0
    for descriptor in descriptors:
        try:
            kind = filesystem_of(descriptor).type
        except OSError:
            kind = _FUSE  # its server is gone
        if kind in {_FUSE, _OVERLAY}:
            with contextlib.suppress(OSError):  # what its server says of that; it is closed
                os.close(descriptor)
            refused += 1
        else:
            kept.add(descriptor)
    return Sorted(kept, refused)
