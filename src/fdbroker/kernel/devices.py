"""What is behind a descriptor, without asking its file system."""

from __future__ import annotations

import ctypes
import os
import struct
from typing import NamedTuple

from fdbroker.kernel.errors import SyscallError
from fdbroker.kernel.libc import LIBC

_AT_EMPTY_PATH = 0x1000
_AT_STATX_DONT_SYNC = 0x4000
# struct statx, statx(2): of its 256 bytes, the mode, major and minor number of the device, and the mount
_SIZE = 256
_FACTS = struct.Struct("=28xH106xIIQ")
_Room = ctypes.c_char * _SIZE
_STATX_TYPE, _STATX_MNT_ID = 0x1, 0x1000


class Place(NamedTuple):
    """Where a file is, and its type: `device` and `mode` as st_dev and st_mode of fstat(2) have them.

    `mount`: of /proc/PID/mountinfo; 0 where the kernel does not say (before Linux 5.8).
    """

    device: int
    mode: int
    mount: int


def place_at_once(descriptor: int) -> Place:
    """Return where what is behind a descriptor is.

    fstat(2) asks the server of a FUSE or network file system, for as long as
    that takes. statx(2) with AT_STATX_DONT_SYNC does not; Linux 4.11.

    Raises:
        SyscallError: EACCES: a FUSE file system of another user; EBADF.

    """
    room = _Room()
    flags, wanted = _AT_EMPTY_PATH | _AT_STATX_DONT_SYNC, _STATX_TYPE | _STATX_MNT_ID
    if LIBC.statx(descriptor, b"", flags, wanted, room) != 0:
        raise SyscallError(ctypes.get_errno(), "statx", descriptor=descriptor)
    mode, major, minor, mount = _FACTS.unpack_from(room)
    return Place(os.makedev(major, minor), mode, mount)
