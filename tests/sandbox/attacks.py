"""What a compromised worker would try, by bare system calls, and what came of each."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import socket
import struct
from typing import TYPE_CHECKING

from fdbroker.kernel.libc import MACHINE
from fdbroker.kernel.syscall_table import SYSCALLS

if TYPE_CHECKING:
    from collections.abc import Callable

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.syscall.restype = ctypes.c_long
_NUMBERS = SYSCALLS[MACHINE]

_AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000
_MFD_CLOEXEC = 1
_LOCK_EX = 2
_MAP_PRIVATE = 2
_MAP_ANONYMOUS = 0x20
_READ = mmap.PROT_READ
_WRITE = mmap.PROT_WRITE
_EXEC = mmap.PROT_EXEC
_PR_SET_DUMPABLE = 4
_PTRACE_PEEKDATA = 2
_F_SETLK = 6
_CLONE_NEWUSER = 0x10000000

_room = ctypes.create_string_buffer(512)
_how = ctypes.create_string_buffer(struct.pack("=QQQ", os.O_RDONLY, 0, 0), 24)
_iovec = struct.pack("=QQ", ctypes.addressof(_room), 8)
_vector = ctypes.create_string_buffer(_iovec, 16)
_lock = ctypes.create_string_buffer(struct.pack("=hhqqi", 0, 0, 0, 0, 0), 32)
_argv = (ctypes.c_char_p * 2)(b"no-such-program", None)
_address = struct.pack("=H", socket.AF_UNIX) + b"\0fdbroker-test-nobody-listens"


def call(name: str, *arguments: object) -> int:
    """Make a system call; return 0, or the errno it failed with."""
    result = value(name, *arguments)
    return 0 if result >= 0 else -result


def value(name: str, *arguments: object) -> int:
    """Make a system call; return its result, or minus its errno."""
    converted = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    ctypes.set_errno(0)
    result: int = _LIBC.syscall(ctypes.c_long(_NUMBERS[name]), *converted)
    return result if result >= 0 else -ctypes.get_errno()


def _fork() -> int:
    child = value("clone", int(signal.SIGCHLD), 0, 0, 0, 0)
    if child == 0:
        os._exit(0)
    if child > 0:
        os.waitpid(child, 0)
    return 0 if child > 0 else -child


def _reopen(flags: int) -> Callable[[int, int], int]:
    return lambda descriptor, _parent: call("openat", _AT_FDCWD, b"/proc/self/fd/%d" % descriptor, flags, 0)


# Name -> function of the descriptor that was passed, open for reading, and the parent's pid.
# Each returns 0 if the attack worked.
ATTACKS: dict[str, Callable[[int, int], int]] = {
    "open a file": lambda _fd, _pid: call("openat", _AT_FDCWD, b"/etc/passwd", os.O_RDONLY, 0),
    "open a file by openat2": lambda _fd, _pid: call("openat2", _AT_FDCWD, b"/etc/passwd", _how, 24),
    "open the root directory": lambda _fd, _pid: call("openat", _AT_FDCWD, b"/", os.O_RDONLY, 0),
    "make a file": lambda _fd, _pid: call(
        "openat", _AT_FDCWD, b"/tmp/fdbroker-test-made", os.O_WRONLY | os.O_CREAT, 0o600
    ),
    "make a directory": lambda _fd, _pid: call("mkdirat", _AT_FDCWD, b"/tmp/fdbroker-test-made-too", 0o700),
    "read a path's metadata": lambda _fd, _pid: call("newfstatat", _AT_FDCWD, b"/etc/passwd", _room, 0),
    "reopen for reading": _reopen(os.O_RDONLY),
    "reopen for writing": _reopen(os.O_WRONLY),
    "write": lambda fd, _pid: call("write", fd, b"x", 1),
    "truncate": lambda fd, _pid: call("ftruncate", fd, 0),
    "change its mode": lambda fd, _pid: call("fchmod", fd, 0o640),
    "change its owner": lambda fd, _pid: call("fchown", fd, os.getuid(), os.getgid()),
    "change its times": lambda fd, _pid: call("utimensat", fd, None, None, 0),
    "set an extended attribute": lambda fd, _pid: call("fsetxattr", fd, b"user.test", b"x", 1, 0),
    "lock it": lambda fd, _pid: call("flock", fd, _LOCK_EX),
    "lock it as POSIX does": lambda fd, _pid: call("fcntl", fd, _F_SETLK, _lock),
    "duplicate it": lambda fd, _pid: call("dup", fd),
    "map it executable": lambda fd, _pid: call("mmap", 0, 4096, _READ | _EXEC, _MAP_PRIVATE, fd, 0),
    "map writable and executable memory": lambda _fd, _pid: call(
        "mmap", 0, 4096, _READ | _WRITE | _EXEC, _MAP_PRIVATE | _MAP_ANONYMOUS, -1, 0
    ),
    "make a memfd": lambda _fd, _pid: call("memfd_create", b"x", _MFD_CLOEXEC),
    "make a Unix socket": lambda _fd, _pid: call("socket", socket.AF_UNIX, socket.SOCK_STREAM, 0),
    "make an Internet socket": lambda _fd, _pid: call("socket", socket.AF_INET, socket.SOCK_STREAM, 0),
    "make a pair of sockets": lambda _fd, _pid: call(
        "socketpair", socket.AF_UNIX, socket.SOCK_STREAM, 0, _room
    ),
    "make a pipe": lambda _fd, _pid: call("pipe2", _room, 0),
    "fork": lambda _fd, _pid: _fork(),
    "execute a program": lambda _fd, _pid: call("execve", b"/fdbroker-test-no-program", _argv, None),
    "ask whether the parent could be killed": lambda _fd, pid: call("kill", pid, 0),
    "get a descriptor of the parent": lambda _fd, pid: call("pidfd_open", pid, 0),
    "trace the parent": lambda _fd, pid: call("ptrace", _PTRACE_PEEKDATA, pid, 0, _room),
    "read the parent's memory": lambda _fd, pid: call("process_vm_readv", pid, _vector, 1, _vector, 1, 0),
    "enter a user namespace": lambda _fd, _pid: call("unshare", _CLONE_NEWUSER),
    "be dumpable again": lambda _fd, _pid: call("prctl", _PR_SET_DUMPABLE, 1, 0, 0, 0),
    "set up io_uring": lambda _fd, _pid: call("io_uring_setup", 1, _room),
    "be root": lambda _fd, _pid: call("setresuid", 0, 0, 0),
    "leave the root": lambda _fd, _pid: call("chroot", b"."),
}


def attempt_all(descriptor: int, parent: int) -> dict[str, int]:
    """Try everything; return errno for each attack, 0 if it worked."""
    return {name: attack(descriptor, parent) for name, attack in ATTACKS.items()}


def use_as_meant(descriptor: int) -> dict[str, int | str]:
    """Do what a worker is for with a descriptor; return what it gave."""
    address = value("mmap", 0, 4096, _READ, _MAP_PRIVATE, descriptor, 0)
    return {
        "read": os.read(descriptor, 4).decode(),
        "pread": os.pread(descriptor, 4, 4).decode(),
        "lseek": os.lseek(descriptor, 0, os.SEEK_END),
        "fstat": os.fstat(descriptor).st_size,
        "mmap": ctypes.string_at(address, 8).decode(),
        "anonymous memory": call("mmap", 0, 4096, _READ | _WRITE, _MAP_PRIVATE | _MAP_ANONYMOUS, -1, 0),
        "metadata by a descriptor": call("newfstatat", descriptor, b"", _room, _AT_EMPTY_PATH),
    }


def look_at_a_path() -> int:
    """Abuse the one hole in the filter: a path behind AT_EMPTY_PATH. Return 0 if there was one to see."""
    return call("newfstatat", _AT_FDCWD, b"/etc/passwd", _room, _AT_EMPTY_PATH)
