"""Namespaces and mounts, for what starts the broker. The broker itself does not import this."""

from __future__ import annotations

import ctypes
import errno
import struct

from fdbroker.kernel.errors import SyscallError
from fdbroker.kernel.libc import SYS_MOUNT_SETATTR, SYS_UNSHARE, syscall

# linux/sched.h
CLONE_NEWNS = 0x00020000

# linux/mount.h of 5.12
MOUNT_ATTR_RDONLY = 0x01
MOUNT_ATTR_NOSUID = 0x02
MOUNT_ATTR_NODEV = 0x04
MS_SLAVE = 1 << 19

_AT_FDCWD = -100
_AT_SYMLINK_NOFOLLOW = 0x100
_AT_RECURSIVE = 0x8000


def unshare(flags: int) -> None:
    """Move the calling thread into new namespaces of its own (unshare, section 2).

    `os.unshare` came with Python 3.12.
    """
    syscall("unshare", SYS_UNSHARE, flags, flags=hex(flags))


def mount_setattr(path: bytes, *, attributes: int, propagation: int = 0, recursive: bool = False) -> None:
    """Set (never clear) flags of the mount at `path`, and how changes propagate.

    mount_setattr(2), Linux 5.12. With `recursive` all mounts below too: all or
    none. A symbolic link at the end is not followed.

    Raises:
        SyscallError: EPERM (no CAP_SYS_ADMIN, or a filter), EINVAL (not a mount
            point, or a NUL in the path), EBUSY (read-only is asked for and a file is open for writing).

    """
    if 0 in path:
        raise SyscallError(errno.EINVAL, "mount_setattr", path=path)
    attr = struct.pack("=QQQQ", attributes, 0, propagation, 0)  # struct mount_attr: set, clear, ...
    syscall(
        "mount_setattr",
        SYS_MOUNT_SETATTR,
        _AT_FDCWD,
        path,
        _AT_SYMLINK_NOFOLLOW | (_AT_RECURSIVE if recursive else 0),
        ctypes.create_string_buffer(attr, len(attr)),
        len(attr),
        path=path,
        attributes=hex(attributes),
        recursive=recursive,
        needs="CAP_SYS_ADMIN",
    )
