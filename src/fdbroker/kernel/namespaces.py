"""Namespaces and mounts, for what starts the broker and workers. The broker does not import this."""

from __future__ import annotations

import ctypes
import errno
import struct

from fdbroker.kernel.errors import SyscallError
from fdbroker.kernel.libc import (
    SYS_MOUNT,
    SYS_MOUNT_SETATTR,
    SYS_PIVOT_ROOT,
    SYS_SETNS,
    SYS_UMOUNT2,
    SYS_UNSHARE,
    syscall,
)

# linux/sched.h
CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

# linux/mount.h of 5.12
MOUNT_ATTR_RDONLY = 0x01
MOUNT_ATTR_NOSUID = 0x02
MOUNT_ATTR_NODEV = 0x04
MOUNT_ATTR_NOEXEC = 0x08
MS_PRIVATE = 1 << 18
MS_SLAVE = 1 << 19

_MS_NOSUID = 1 << 1
_MS_NODEV = 1 << 2
_MS_NOEXEC = 1 << 3
_MS_BIND = 1 << 12
_MS_REC = 1 << 14
_MNT_DETACH = 2

_AT_FDCWD = -100
_AT_SYMLINK_NOFOLLOW = 0x100
_AT_RECURSIVE = 0x8000


def unshare(flags: int) -> None:
    """Move the calling thread into new namespaces of its own (unshare, section 2).

    `os.unshare` came with Python 3.12.
    """
    syscall("unshare", SYS_UNSHARE, flags, flags=hex(flags))


def setns(descriptor: int, kind: int) -> None:
    """Enter the namespace behind a descriptor of /proc/PID/ns (setns, section 2); `kind` is a CLONE_NEW flag.

    `os.setns` came with Python 3.12.
    """
    syscall("setns", SYS_SETNS, descriptor, kind, descriptor=descriptor, kind=hex(kind))


def mount_tmpfs(path: bytes, options: bytes) -> None:
    """Mount an empty tmpfs without devices, set-user-id and programs; `options` as in tmpfs(5).

    Raises:
        SyscallError: EPERM (no CAP_SYS_ADMIN in the mount namespace), EINVAL (an option,
            or a NUL in the path), ENOENT.

    """
    _refuse_nul("mount", path)
    flags = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
    syscall("mount", SYS_MOUNT, b"tmpfs", path, b"tmpfs", flags, options, target=path, options=options)


def bind(source: bytes, target: bytes) -> None:
    """Show what is at `source`, with all mounts below it, at `target` as well; both exist, of one kind.

    The new mounts have the flags of the old ones: see `mount_setattr`.
    """
    for path in (source, target):
        _refuse_nul("mount", path)
    flags = _MS_BIND | _MS_REC
    syscall("mount", SYS_MOUNT, source, target, None, flags, None, source=source, target=target)


def pivot_to_working_directory() -> None:
    """Make the working directory, which is a mount point, the root, and let go of the old root.

    pivot_root(2), "pivot_root(".", ".")"; umount2(2) with MNT_DETACH.

    Raises:
        SyscallError: EINVAL (no mount point, or the old root is shared with other namespaces), EPERM.

    """
    syscall("pivot_root", SYS_PIVOT_ROOT, b".", b".")
    syscall("umount2", SYS_UMOUNT2, b".", _MNT_DETACH, target=b".")


def _refuse_nul(call: str, path: bytes) -> None:
    if 0 in path:
        raise SyscallError(errno.EINVAL, call, path=path)


def mount_setattr(path: bytes, *, attributes: int, propagation: int = 0, recursive: bool = False) -> None:
    """Set (never clear) flags of the mount at `path`, and how changes propagate.

    mount_setattr(2), Linux 5.12. With `recursive` all mounts below too: all or
    none. A symbolic link at the end is not followed.

    Raises:
        SyscallError: EPERM (no CAP_SYS_ADMIN, or a filter), EINVAL (not a mount
            point, or a NUL in the path), EBUSY (read-only is asked for and a file is open for writing).

    """
    _refuse_nul("mount_setattr", path)
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
