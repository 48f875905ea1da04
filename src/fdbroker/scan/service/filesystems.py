"""File systems that a client can have made: what they are asked, and be it by close(2), may take for ever.

A user can mount FUSE, whose server is a program of its own, and an overlay above that. With a descriptor of
a file on one that root has mounted here this process can do what it wants. What another one is a thread has
to find out, and it closes it: a socket, too, can wait for its peer then (SO_LINGER).
"""

from __future__ import annotations

import contextlib
import os
import select
import stat
from typing import TYPE_CHECKING, NamedTuple

from fdbroker.kernel.descriptors import Descriptors
from fdbroker.kernel.devices import place_at_once
from fdbroker.kernel.files import filesystem_of
from fdbroker.scan.verdict import Error, Reason

if TYPE_CHECKING:
    from collections.abc import Sequence

_OF_A_USER = (
    "its file system may be a program of a user's, which can hold up whoever asks it anything;"
    " have it scanned by its path, or copy it"
)
_FUSE, _OVERLAY = 0x65735546, 0x794C7630  # of statfs(2)


class Mounted:
    """The file systems that are mounted here, but for those whose server is a program. Owns a descriptor."""

    def __init__(self) -> None:
        self._mounts = open("/proc/self/mountinfo", "rb")  # noqa: SIM115 - closed by close
        # It tells that something was mounted or unmounted, before a number can be another file system's.
        self._changes = select.poll()
        self._changes.register(self._mounts, select.POLLERR | select.POLLPRI)
        with Descriptors([os.memfd_create("device")]) as memory:
            self._memory = place_at_once(*memory.numbers()).device
        self._read()

    def have(self, descriptor: int) -> bool:
        """Return whether it is a file or directory on one of them, or memory. Never waits."""
        try:
            device, mode, mount = place_at_once(descriptor)
        except OSError:
            return False
        if self._changes.poll(0):
            self._read()
        # A file of an overlay may have a device number that no mount has.
        here = device in self._devices or mount in self._numbers
        return here and (stat.S_ISREG(mode) or stat.S_ISDIR(mode))

    def close(self) -> None:
        """Close the descriptor."""
        self._mounts.close()

    def _read(self) -> None:
        self._mounts.seek(0)
        # By the number of the mount as well: those of other mount namespaces have other ones.
        self._devices, self._numbers = {self._memory}, set[int]()
        for line in self._mounts:
            mount, _, what = line.partition(b" - ")
            if not what.startswith((b"fuse ", b"fuse.", b"fuseblk ")):
                number, _, device, _ = mount.split(b" ", 3)
                major, minor = device.split(b":")
                self._devices.add(os.makedev(int(major), int(minor)))
                self._numbers.add(int(number))


class Sorted(NamedTuple):
    """Descriptors that may be used; and why others are of no use, which are closed."""

    kept: Descriptors
    refused: tuple[Error, ...] = ()


def sort_out(descriptors: Sequence[int]) -> Sorted:
    """Close those of descriptors that may wait for a user's program. May take for ever."""
    kept = Descriptors()
    refused = []
    for descriptor in descriptors:
        error = _objection(descriptor)
        if error is None:
            kept.add(descriptor)
            continue
        with contextlib.suppress(OSError):  # what its server says of that; it is closed
            os.close(descriptor)
        refused.append(error)
    return Sorted(kept, tuple(refused))


def _objection(descriptor: int) -> Error | None:
    try:
        if filesystem_of(descriptor).type not in {_FUSE, _OVERLAY}:
            regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
            return None if regular else Error(Reason.NOT_REGULAR, "what was handed in is no regular file")
    except OSError:
        pass  # its server is gone
    return Error(Reason.FILESYSTEM, _OF_A_USER)
