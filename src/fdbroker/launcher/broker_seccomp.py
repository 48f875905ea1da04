"""The seccomp program of the broker: which system calls it may make once it serves.

The launcher assembles it; the broker gets bytes and installs them when all
imports, sockets and roots are there. A list of what is allowed, so whatever a
kernel adds later is refused; by default whatever is not listed kills the
process, since the broker never tries. Missing on purpose, and each would matter:

- open_by_handle_at, name_to_handle_at: with CAP_DAC_READ_SEARCH they open any
  file by its number, past every path check.
- execve, execveat, fork, clone, clone3: it starts nothing.
- socket, connect, bind, listen, socketpair: it talks on what it was given.
- ptrace, process_vm_readv, pidfd_getfd, kill, tgkill: it touches no process.
- link, rename, unlink, chmod and all others that change a file system, mount,
  and everything that writes but to a descriptor that is open already.
- prctl, capset, setresuid, unshare, seccomp, landlock: what it is, it stays.
- io_uring, bpf, userfaultfd, keyctl, memfd_create: much kernel, no use.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import signal
import socket
from typing import TYPE_CHECKING

from fdbroker.kernel.bpf import (
    KILL_PROCESS,
    assemble,
    either,
    equal_int,
    masked,
    one_int_of,
    without_bits,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fdbroker.kernel.bpf import Condition

# Sockets that are open: requests come, replies with descriptors and sd_notify's datagrams go.
# The broker does not use MSG_OOB, and its sockets do not have it.
# (Python asks for both names of a socket that was not closed when it ends.)
_MESSAGES = ("accept4", "recvmsg", "sendmsg", "shutdown", "getsockname", "getpeername")

# Waiting. Python takes epoll_wait and poll where there are such, else epoll_pwait and ppoll.
_WAITING = ("epoll_ctl", "epoll_pwait", "ppoll")
_WAITING_X86_64 = ("epoll_wait", "poll")

# Looking at files and reading them. openat2 has its flags behind a pointer, where no filter sees them:
# Landlock and the read-only view hold it.
_FILES = (
    "openat2",
    "newfstatat",  # fstat() of glibc is this with AT_EMPTY_PATH
    "fstat",
    "statx",
    "fstatfs",
    "readlinkat",  # whether the name of an opened object is "(deleted)"
    "getdents64",
    "read",
    "pread64",
    "lseek",
    "close",
    "close_range",  # only closes here: no flags are asked of it
)

# Writing to what is open: the audit, pipes, stream sockets.
_WRITING = ("write",)

# Memory, for malloc; mmap and mprotect are below.
_MEMORY = ("brk", "munmap", "mremap", "madvise")

# Locks of the interpreter, signals that were set up before or end it, time, random bytes.
_RUNTIME = (
    "futex",
    "rt_sigaction",
    "rt_sigprocmask",
    "rt_sigreturn",
    "sigaltstack",
    "restart_syscall",
    "sched_yield",
    "getpid",
    "gettid",
    "clock_gettime",
    "gettimeofday",
    "getrandom",
    "exit",
    "exit_group",
)

# Opening a directory descriptor's entry again: for reading and nothing else. The access mode
# O_WRONLY|O_RDWR (3), by which devices are opened for ioctl alone, is refused with its bits.
# Of O_TMPFILE only the bit that is its own: the rest of it is O_DIRECTORY.
_WRITES_OR_CREATES = (
    os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_TMPFILE & ~os.O_DIRECTORY
)

# Flags of descriptors, those of files to look at, and a duplicate. No locks, leases, owners, signals or pipe
# sizes; and no F_SETFL, by which O_APPEND could be taken from the audit, and what is on record be written
# over. (O_NONBLOCK is set by FIONBIO.)
_FCNTL = (fcntl.F_GETFL, fcntl.F_GETFD, fcntl.F_SETFD, fcntl.F_DUPFD_CLOEXEC)

# asm-generic/ioctls.h: bytes in the send queue (TIOCOUTQ, SIOCOUTQ), O_NONBLOCK (FIONBIO), close-on-exec
# (FIOCLEX), and whether it is a terminal (TCGETS), which Python asks of the source that it quotes in a
# traceback: a bug shall leave its trace and not a killed process.
_IOCTL = (0x5411, 0x5421, 0x5451, 0x5401)
# linux/pidfd.h: PIDFD_GET_INFO is _IOWR(0xFF, 11, struct pidfd_info), a structure that grows: any size.
_PIDFD_GET_INFO = 0xC000FF0B
_ANY_SIZE = 0xC000FFFF


def broker_filter(machine: str | None = None, *, default_action: int = KILL_PROCESS) -> bytes:
    """Return the program for `machine` (this one by default).

    `default_action` is for looking what is missing: `bpf.errno_action(EPERM)` in
    tests, `bpf.LOG` on a system with an audit log.
    """
    machine = machine or os.uname().machine
    names = [*_MESSAGES, *_WAITING, *_FILES, *_WRITING, *_MEMORY, *_RUNTIME]
    if machine == "x86_64":
        names += _WAITING_X86_64
    allowed: dict[str, Sequence[Condition] | None] = dict.fromkeys(names)
    allowed["openat"] = [without_bits(2, _WRITES_OR_CREATES)]
    allowed["fcntl"] = [one_int_of(1, _FCNTL)]
    allowed["ioctl"] = [either(one_int_of(1, _IOCTL), masked(1, _ANY_SIZE, _PIDFD_GET_INFO))]
    # Of the socket itself: credentials, buffers, errors. No protocol has a say here.
    allowed["getsockopt"] = allowed["setsockopt"] = [equal_int(1, socket.SOL_SOCKET)]
    # The loop's watchdog.
    allowed["setitimer"] = [equal_int(0, signal.ITIMER_REAL)]
    # No code but what is mapped now.
    allowed["mmap"] = allowed["mprotect"] = [without_bits(2, mmap.PROT_EXEC)]
    return assemble(allowed, machine=machine, otherwise=default_action)
