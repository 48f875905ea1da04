"""What somebody may try who has a descriptor of a file for reading, to get more than reading."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from typing import TYPE_CHECKING, NamedTuple

from tests.sandbox.attacks import call

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

ATTRIBUTE = b"user.fdbroker-test"

_AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000
_AT_SYMLINK_FOLLOW = 0x400
# linux/fs.h
_FS_IOC_GETFLAGS = 0x80086601
_FS_IOC_SETFLAGS = 0x40086602
_FS_NODUMP_FL = 0x40

_READ_ONLY = frozenset({errno.EROFS})
_NOT_OPEN_FOR_WRITING = frozenset({errno.EBADF})


class Attempt(NamedTuple):
    """`make` gets the descriptor and the path of a name to be made, and returns 0 or an errno.

    `answers` are the errnos that are right for a descriptor of the broker.
    `by_owner`: only the file's owner could do it by himself.
    """

    make: Callable[[int, bytes], int]
    answers: Collection[int] = _READ_ONLY
    by_owner: bool = False


def _by_path(descriptor: int) -> bytes:
    return b"/proc/self/fd/%d" % descriptor


def _reopen(flags: int, directory: str = "/proc/self/fd") -> Attempt:
    return Attempt(
        lambda fd, _new: call("openat", _AT_FDCWD, os.fsencode(f"{directory}/{fd}"), flags | os.O_CLOEXEC, 0)
    )


def _map(descriptor: int, _new: bytes) -> int:
    return call("mmap", 0, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, descriptor, 0)


def _map_and_unprotect(descriptor: int, _new: bytes) -> int:
    """Map it for reading, as is allowed, and make that writable."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    shared = ctypes.c_long(0)
    address = libc.mmap(None, mmap.PAGESIZE, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, shared)
    return call("mprotect", int(address), mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE)


def _copy_into(descriptor: int, _new: bytes) -> int:
    source = os.memfd_create("source")
    try:
        os.write(source, b"more")
        os.lseek(source, 0, os.SEEK_SET)
        return call("sendfile", descriptor, source, None, 4)
    finally:
        os.close(source)


def _set_flags(descriptor: int, _new: bytes) -> int:
    flags = ctypes.c_int()
    got = call("ioctl", descriptor, _FS_IOC_GETFLAGS, ctypes.byref(flags))
    flags.value |= _FS_NODUMP_FL
    return got or call("ioctl", descriptor, _FS_IOC_SETFLAGS, ctypes.byref(flags))


# In an order in which none spoils a later one.
ATTEMPTS = {
    "reopen for writing": _reopen(os.O_WRONLY),
    "reopen for both": _reopen(os.O_RDWR),
    "reopen for appending": _reopen(os.O_WRONLY | os.O_APPEND),
    "reopen through /dev": _reopen(os.O_RDWR, "/dev/fd"),
    "reopen as one of its thread": _reopen(os.O_RDWR, "/proc/thread-self/fd"),
    "write": Attempt(lambda fd, _new: call("write", fd, b"more", 4), _NOT_OPEN_FOR_WRITING),
    "write at an offset": Attempt(
        lambda fd, _new: call("pwrite64", fd, b"more", 4, 0), _NOT_OPEN_FOR_WRITING
    ),
    "send another file into it": Attempt(_copy_into, _NOT_OPEN_FOR_WRITING),
    "allocate": Attempt(lambda fd, _new: call("fallocate", fd, 0, 0, 8192), _NOT_OPEN_FOR_WRITING),
    "map for writing": Attempt(_map, {errno.EACCES}),
    "map for reading and then for writing": Attempt(_map_and_unprotect, {errno.EACCES}),
    "change its mode": Attempt(lambda fd, _new: call("fchmod", fd, 0o666), by_owner=True),
    "change its mode by path": Attempt(
        lambda fd, _new: call("fchmodat", _AT_FDCWD, _by_path(fd), 0o666), by_owner=True
    ),
    "change its group": Attempt(lambda fd, _new: call("fchown", fd, -1, os.getgid()), by_owner=True),
    "change its group by path": Attempt(
        lambda fd, _new: call("fchownat", _AT_FDCWD, _by_path(fd), -1, os.getgid(), 0), by_owner=True
    ),
    "change its group by an empty path": Attempt(
        lambda fd, _new: call("fchownat", fd, b"", -1, os.getgid(), _AT_EMPTY_PATH), by_owner=True
    ),
    "change its times": Attempt(lambda fd, _new: call("utimensat", fd, None, None, 0)),
    "change its times by path": Attempt(lambda fd, _new: call("utimensat", _AT_FDCWD, _by_path(fd), None, 0)),
    "set an extended attribute": Attempt(lambda fd, _new: call("fsetxattr", fd, ATTRIBUTE, b"more", 4, 0)),
    "set an extended attribute by path": Attempt(
        lambda fd, _new: call("setxattr", _by_path(fd), ATTRIBUTE, b"more", 4, 0)
    ),
    "remove an extended attribute": Attempt(lambda fd, _new: call("fremovexattr", fd, ATTRIBUTE)),
    "set a flag of its inode": Attempt(_set_flags, by_owner=True),
    # To the kernel the broker's mounts are others than ours, even of the same file system.
    "give it one more name": Attempt(
        lambda fd, new: call("linkat", _AT_FDCWD, _by_path(fd), _AT_FDCWD, new, _AT_SYMLINK_FOLLOW),
        {errno.EXDEV},
    ),
    "give it one more name by an empty path": Attempt(
        lambda fd, new: call("linkat", fd, b"", _AT_FDCWD, new + b"-too", _AT_EMPTY_PATH),
        # ENOENT: it was opened with other credentials than one's own (Linux 6.10).
        {errno.EXDEV, errno.ENOENT},
    ),
    "shorten it": Attempt(lambda fd, _new: call("ftruncate", fd, 1), {errno.EINVAL}),
    "shorten it by path": Attempt(lambda fd, _new: call("truncate", _by_path(fd), 1)),
    "reopen and empty it": _reopen(os.O_RDONLY | os.O_TRUNC),
}


def attempt_all(descriptor: int, new: bytes) -> dict[str, int]:
    """Try everything and return what came of it: 0 or an errno."""
    return {name: attempt.make(descriptor, new) for name, attempt in ATTEMPTS.items()}
