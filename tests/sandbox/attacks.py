"""What a compromised worker would try, by bare system calls, and what came of each."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import signal
import socket
import struct
from collections.abc import Callable

from fdbroker.kernel.libc import MACHINE
from fdbroker.kernel.syscall_table import SYSCALLS

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.syscall.restype = ctypes.c_long
_NUMBERS = SYSCALLS[MACHINE]

AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000
_MFD_CLOEXEC = 1
_LOCK_EX = 2
_MAP_PRIVATE = 2
_MAP_ANONYMOUS = 0x20
_READ = mmap.PROT_READ
_WRITE = mmap.PROT_WRITE
_EXEC = mmap.PROT_EXEC
_PR_SET_DUMPABLE = 4
_PTRACE_TRACEME = 0
_PTRACE_PEEKDATA = 2
_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_PR_SET_PTRACER = 0x59616D61
_RLIMIT_NOFILE = 7
_FS_IOC_GETFLAGS = 0x80086601
_SIOCGIFCONF = 0x8912
_AF_VSOCK = 40
_KEYCTL_GET_KEYRING_ID = 0
_SESSION_KEYRING = -3
_F_SETLK = 6
_F_SETOWN = 8
_F_OFD_SETLK = 37
_F_SETLEASE = 1024
_F_NOTIFY = 1026
_CLONE_NEWUSER = 0x10000000
_CLONE_NEWPID = 0x20000000
_SECCOMP_GET_ACTION_AVAIL = 2
_SECCOMP_GET_NOTIF_SIZES = 3

_room = ctypes.create_string_buffer(512)
_how = ctypes.create_string_buffer(struct.pack("=QQQ", os.O_RDONLY, 0, 0), 24)
_iovec = struct.pack("=QQ", ctypes.addressof(_room), 8)
_vector = ctypes.create_string_buffer(_iovec, 16)
_lock = ctypes.create_string_buffer(struct.pack("=hhqqi", 0, 0, 0, 0, 0), 32)
_argv = (ctypes.c_char_p * 2)(b"no-such-program", None)
_handle = ctypes.create_string_buffer(struct.pack("=Ii", 128, 0), 8 + 128)
_clone_arguments = ctypes.create_string_buffer(struct.pack("=QQQQQQQQ", 0, 0, 0, 0, 17, 0, 0, 0), 64)
_limits = ctypes.create_string_buffer(struct.pack("=QQ", 64, 64), 16)
_abstract = struct.pack("=H", socket.AF_UNIX) + b"\0fdbroker-test-nobody-listens"
_no_address = struct.pack("=H", socket.AF_UNIX)
_mount_id = ctypes.create_string_buffer(4)


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
    return lambda descriptor, _parent: call("openat", AT_FDCWD, b"/proc/self/fd/%d" % descriptor, flags, 0)


def _lease(descriptor: int) -> int:
    """Take a read lease, and give it back: whoever opens the file for writing would wait for that."""
    number = call("fcntl", descriptor, _F_SETLEASE, fcntl.F_RDLCK)
    call("fcntl", descriptor, _F_SETLEASE, fcntl.F_UNLCK)
    return number


def listening_places(pid: int) -> tuple[bytes, bytes]:
    """Return the abstract and the pathname address at which a process listens, for being attacked."""
    return b"\0fdbroker-test-%d" % pid, b"/tmp/fdbroker-test-listens-%d" % pid


def _connected(place: bytes) -> int:
    """Make a socket and connect it."""
    descriptor = value("socket", socket.AF_UNIX, socket.SOCK_STREAM, 0)
    if descriptor < 0:
        return -descriptor
    address = struct.pack("=H", socket.AF_UNIX) + place
    number = call("connect", descriptor, address, len(address))
    os.close(descriptor)
    return number


def _tcp() -> int:
    descriptor = value("socket", socket.AF_INET, socket.SOCK_STREAM, 0)
    if descriptor < 0:
        return -descriptor
    number = call("connect", descriptor, struct.pack("=HHI", socket.AF_INET, 0x0100, 0x0100007F), 16)
    os.close(descriptor)
    return 0 if number == errno.ECONNREFUSED else number


def _fork_by_clone3() -> int:
    child = value("clone3", _clone_arguments, 64)
    if child == 0:
        os._exit(0)
    if child > 0:
        os.waitpid(child, 0)
    return 0 if child > 0 else -child


def _make_executable() -> int:
    """Make memory executable that was writable."""
    address = value("mmap", 0, 4096, _READ | _WRITE, _MAP_PRIVATE | _MAP_ANONYMOUS, -1, 0)
    return call("mprotect", address, 4096, _READ | _EXEC)


def _execute_a_memfd() -> int:
    """Execute a file in memory; no program, so ENOEXEC means that it would have been executed."""
    descriptor = value("memfd_create", b"x", _MFD_CLOEXEC)
    if descriptor < 0:
        return -descriptor
    number = call("execveat", descriptor, b"", _argv, None, _AT_EMPTY_PATH)
    os.close(descriptor)
    return 0 if number in {errno.ENOEXEC, errno.EACCES} else number


_Attack = Callable[[int, int], int]


def _plain(name: str, *arguments: object) -> _Attack:
    """Return the attack that is one system call, which needs no descriptor and no pid."""
    return lambda _descriptor, _parent: call(name, *arguments)


def _on_it(name: str, *arguments: object) -> _Attack:
    """Return the attack that is one system call, whose first argument is the descriptor that was passed."""
    return lambda descriptor, _parent: call(name, descriptor, *arguments)


def _on_parent(name: str, *arguments: object) -> _Attack:
    """Return the attack that is one system call, whose first argument is the parent's pid."""
    return lambda _descriptor, parent: call(name, parent, *arguments)


# Name -> function of the descriptor that was passed, open for reading, and the parent's pid.
# Each returns 0 if the attack worked.
ATTACKS: dict[str, _Attack] = {
    # names
    "open a file": _plain("openat", AT_FDCWD, b"/etc/passwd", os.O_RDONLY, 0),
    "open a file by openat2": _plain("openat2", AT_FDCWD, b"/etc/passwd", _how, 24),
    "open a file by its handle": lambda fd, _pid: call("open_by_handle_at", fd, _handle, os.O_RDONLY),
    "ask for a handle": lambda fd, _pid: call(
        "name_to_handle_at", fd, b"", _handle, _mount_id, _AT_EMPTY_PATH
    ),
    "open the root directory": _plain("openat", AT_FDCWD, b"/", os.O_RDONLY, 0),
    "open the parent's environment": lambda _fd, pid: call(
        "openat", AT_FDCWD, b"/proc/%d/environ" % pid, os.O_RDONLY, 0
    ),
    "open the parent's memory": lambda _fd, pid: call(
        "openat", AT_FDCWD, b"/proc/%d/mem" % pid, os.O_RDONLY, 0
    ),
    "make a file": _plain("openat", AT_FDCWD, b"/tmp/fdbroker-test-made", os.O_WRONLY | os.O_CREAT, 0o600),
    "make a directory": _plain("mkdirat", AT_FDCWD, b"/tmp/fdbroker-test-made-too", 0o700),
    "make a symbolic link": _plain("symlinkat", b"/etc", AT_FDCWD, b"/tmp/fdbroker-test-made-link"),
    "make a FIFO": _plain("mknodat", AT_FDCWD, b"/tmp/fdbroker-test-made-fifo", 0o010600, 0),
    "give it another name": lambda fd, _pid: call(
        "linkat", AT_FDCWD, b"/proc/self/fd/%d" % fd, AT_FDCWD, b"/tmp/fdbroker-test-linked", 0x400
    ),
    "read a path's metadata": _plain("newfstatat", AT_FDCWD, b"/etc/passwd", _room, 0),
    "read a link": _plain("readlinkat", AT_FDCWD, b"/proc/self/exe", _room, 512),
    "change the mode of a path": _plain("fchmodat", AT_FDCWD, b"/tmp/fdbroker-test-nothing", 0o777),
    # the descriptor that was passed
    "reopen for reading": _reopen(os.O_RDONLY),
    "reopen for writing": _reopen(os.O_WRONLY),
    "write": _on_it("write", b"x", 1),
    "truncate": _on_it("ftruncate", 0),
    "allocate": _on_it("fallocate", 0, 0, 1),
    "change its mode": _on_it("fchmod", 0o640),
    "change its mode by fchmodat2": _on_it("fchmodat2", b"", 0o640, _AT_EMPTY_PATH),
    "change its owner": lambda fd, _pid: call("fchown", fd, os.getuid(), os.getgid()),
    "change its times": _on_it("utimensat", None, None, 0),
    "set an extended attribute": _on_it("fsetxattr", b"user.test", b"x", 1, 0),
    "list its extended attributes": _on_it("flistxattr", _room, 512),
    "lock it": _on_it("flock", _LOCK_EX),
    "lock it as POSIX does": _on_it("fcntl", _F_SETLK, _lock),
    "lock its open file description": _on_it("fcntl", _F_OFD_SETLK, _lock),
    "take a lease": lambda fd, _pid: _lease(fd),
    "have signals sent for it": lambda fd, _pid: call("fcntl", fd, _F_SETOWN, os.getpid()),
    "ask its file system": _on_it("ioctl", _FS_IOC_GETFLAGS, _room),
    "duplicate it": _on_it("dup"),
    "map it executable": lambda fd, _pid: call("mmap", 0, 4096, _READ | _EXEC, _MAP_PRIVATE, fd, 0),
    "execute it": _on_it("execveat", b"", _argv, None, _AT_EMPTY_PATH),
    # memory and code
    "map writable and executable memory": _plain(
        "mmap", 0, 4096, _READ | _WRITE | _EXEC, _MAP_PRIVATE | _MAP_ANONYMOUS, -1, 0
    ),
    "make memory executable": lambda _fd, _pid: _make_executable(),
    "make a memfd": _plain("memfd_create", b"x", _MFD_CLOEXEC),
    "execute a memfd": lambda _fd, _pid: _execute_a_memfd(),
    "execute a program": _plain("execve", b"/fdbroker-test-no-program", _argv, None),
    "lock memory": _plain("mlockall", 1),
    # sockets and pipes
    "make a Unix socket": _plain("socket", socket.AF_UNIX, socket.SOCK_STREAM, 0),
    "make an Internet socket": _plain("socket", socket.AF_INET, socket.SOCK_STREAM, 0),
    "make an IPv6 socket": _plain("socket", socket.AF_INET6, socket.SOCK_DGRAM, 0),
    "make a netlink socket": _plain("socket", socket.AF_NETLINK, socket.SOCK_RAW, 0),
    "make a packet socket": _plain("socket", socket.AF_PACKET, socket.SOCK_RAW, 0),
    "make a VM socket": _plain("socket", _AF_VSOCK, socket.SOCK_STREAM, 0),
    "make an ALG socket": _plain("socket", socket.AF_ALG, socket.SOCK_SEQPACKET, 0),
    "connect to an abstract socket": lambda _fd, pid: _connected(listening_places(pid)[0]),
    "connect to a pathname socket": lambda _fd, pid: _connected(listening_places(pid)[1]),
    "connect by TCP": lambda _fd, _pid: _tcp(),
    "connect its channel elsewhere": _plain("connect", 0, _abstract, len(_abstract)),
    "give its channel a name": _plain("bind", 0, _no_address, len(_no_address)),
    "make a pair of sockets": _plain("socketpair", socket.AF_UNIX, socket.SOCK_STREAM, 0, _room),
    "make a pipe": _plain("pipe2", _room, 0),
    "make a message queue": _plain("mq_open", b"fdbroker-test-queue", os.O_RDONLY, 0, None),
    "make shared memory": _plain("shmget", 0, 4096, 0o1600),
    # processes
    "fork": lambda _fd, _pid: _fork(),
    "fork by clone3": lambda _fd, _pid: _fork_by_clone3(),
    "ask whether the parent could be killed": _on_parent("kill", 0),
    "ask whether anybody could be killed": _plain("kill", -1, 0),
    "get a descriptor of the parent": _on_parent("pidfd_open", 0),
    "trace the parent": lambda _fd, pid: call("ptrace", _PTRACE_PEEKDATA, pid, 0, _room),
    "read the parent's memory": _on_parent("process_vm_readv", _vector, 1, _vector, 1, 0),
    "write the parent's memory": _on_parent("process_vm_writev", _vector, 1, _vector, 1, 0),
    "read the parent's limits": _on_parent("prlimit64", _RLIMIT_NOFILE, None, _room),
    "compare with the parent": lambda _fd, pid: call("kcmp", pid, pid, 0, 0, 0),
    "change the parent's priority": lambda _fd, pid: call("setpriority", 0, pid, 19),
    # what it is
    "be root": _plain("setresuid", 0, 0, 0),
    "have other groups": _plain("setgroups", 0, None),
    "raise its limits": _plain("prlimit64", 0, _RLIMIT_NOFILE, _limits, None),
    "be dumpable again": _plain("prctl", _PR_SET_DUMPABLE, 1, 0, 0, 0),
    "outlive its parent": _plain("prctl", _PR_SET_PDEATHSIG, 0, 0, 0, 0),
    "take another name": _plain("prctl", _PR_SET_NAME, b"kworker/0:0", 0, 0, 0),
    "ask for another filter": _plain("seccomp", _SECCOMP_GET_NOTIF_SIZES, 0, _room),
    "have another personality": _plain("personality", 0x0040000),
    "enter a user namespace": _plain("unshare", _CLONE_NEWUSER),
    "enter a pid namespace": _plain("unshare", _CLONE_NEWPID),
    "enter the parent's namespace": _on_it("setns", 0),
    "mount": _plain("mount", b"tmpfs", b"/", b"tmpfs", 0, None),
    "unmount": _plain("umount2", b"/", 2),
    "copy a mount": _plain("open_tree", AT_FDCWD, b"/", 1),
    "make a file system": _plain("fsopen", b"tmpfs", 0),
    "leave the root": _plain("chroot", b"."),
    # other parts of the kernel
    "set up io_uring": _plain("io_uring_setup", 1, _room),
    "watch page faults": _plain("userfaultfd", 1),
    "use a keyring": _plain("keyctl", _KEYCTL_GET_KEYRING_ID, _SESSION_KEYRING, 1),
    "load BPF": _plain("bpf", 0, _room, 64),
    "count events": _plain("perf_event_open", _room, 0, -1, -1, 0),
    "watch files": _plain("inotify_init1", 0),
    "watch files by fanotify": _plain("fanotify_init", 0, 0),
    "wait for events": _plain("epoll_create1", 0),
    "make a timer": _plain("timerfd_create", 1, 0),
    "read the kernel's log": _plain("syslog", 3, _room, 512),
    # The last one: where it works, the next signal stops the process for ever.
    "be traced": _plain("ptrace", _PTRACE_TRACEME, 0, 0, 0),
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
    return call("newfstatat", AT_FDCWD, b"/etc/passwd", _room, _AT_EMPTY_PATH)


def use_scratch(directory: bytes) -> dict[str, object]:
    """Do what a directory of its own is for; return what it gave."""
    os.mkdir(directory + b"/made")
    with open(directory + b"/made/file", "wb") as file:
        file.write(b"unpacked")
    os.rename(directory + b"/made/file", directory + b"/renamed")
    with open(directory + b"/renamed", "r+b") as file:
        file.truncate(4)
        left = file.read()
    names = sorted(map(os.fsdecode, os.listdir(directory)))
    os.chmod(directory + b"/renamed", 0o600)
    os.unlink(directory + b"/renamed")
    os.rmdir(directory + b"/made")
    return {"names": names, "left": left.decode(), "after": os.listdir(directory)}
