"""The seccomp programs: which system calls a confined process may make once it reads hostile bytes.

A list of what is allowed; whatever is not listed kills it. A worker reads
descriptors that it is given, and talks on one socket. Missing on purpose:

- everything that opens, makes, names, links or removes a file (the profile `scratch` has
  its own list for that, and an empty root and Landlock around it), and execve.
- socket, connect, accept: it talks on its channel, and on nothing that it may be passed.
- fork, clone, kill, ptrace, pidfd_open, process_vm_readv: there is no process but it.
- write: what it has to say is a message on its channel.
- flock, most of fcntl, ioctl, fchmod, fchown, utimensat: a descriptor for reading can lock a file, and its
  owner can change the rest by it.
- prctl, setrlimit, setresuid, seccomp, unshare: what it is, it stays.
- mmap and mprotect with PROT_EXEC: no code but what is mapped now; not of a scanned file either.
- memfd_create, userfaultfd, io_uring, bpf, keyctl: much kernel, no use.

What a filter can't see: newfstatat has the path behind a pointer, and glibc's
fstat() is newfstatat with an empty one. Of calls with AT_EMPTY_PATH a worker
could so make a look at a path's metadata; an empty root leaves no path to look at.
"""

from __future__ import annotations

import errno
import mmap
import os
from typing import TYPE_CHECKING

from fdbroker.kernel.bpf import (
    KILL_PROCESS,
    assemble,
    either,
    equal,
    equal_int,
    errno_action,
    masked,
    one_int_of,
    without_bits,
)
from fdbroker.kernel.syscall_table import SYSCALLS
from fdbroker.sandbox.confinement import Confinement, Profile

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fdbroker.kernel.bpf import Condition

    Allowed = dict[str, Sequence[Condition] | None]

# The number of the one socket that it has.
CHANNEL = 0
# That of the program to be executed; closed by execve itself, so that it can be executed once.
PROGRAM = 3

# Descriptors that it was given.
_FILES = ("read", "pread64", "lseek", "fstat", "close", "close_range")

# On its channel. A connected SOCK_SEQPACKET socket has no use for the address of sendto.
_TALKING = ("recvmsg", "sendmsg", "recvfrom", "sendto")

# Memory, for malloc; mmap and mprotect are below.
_MEMORY = ("brk", "munmap", "mremap", "madvise")

# Locks of the interpreter, the end of a signal handler, time where the vDSO has none, the end.
_RUNTIME = (
    "futex",
    "rt_sigreturn",
    "restart_syscall",
    "sched_yield",
    "getpid",
    "gettid",
    "clock_gettime",
    "getrandom",
    "exit",
    "exit_group",
)

# Opening, looking at, reading and writing what there is.
_OPENING = (
    "open",
    "openat",
    "stat",
    "lstat",
    "access",
    "faccessat",
    "faccessat2",
    "newfstatat",
    "ftruncate",
    "write",
    "pwrite64",
    "writev",
    "readv",
    "getdents64",
    "getcwd",
    "gettimeofday",
    "rt_sigprocmask",
)

# Making, changing and removing. Of chmod those by name alone: by descriptor it would reach what was
# passed. No links.
_CHANGING = (
    "mkdir",
    "mkdirat",
    "rmdir",
    "unlink",
    "unlinkat",
    "rename",
    "renameat",
    "renameat2",
    "chmod",
    "fchmodat",
)

# What compiles while it runs handles signals on stacks of its own.
_JIT = ("sigaltstack", "rt_sigprocmask")

# For a program that knows nothing of all this, and its loader: reading, writing what it has open, itself.
# It makes, changes and removes nothing, whatever Landlock says.
_PROGRAM = (
    *_OPENING,
    *_JIT,
    "arch_prctl",
    "dup",
    "dup2",
    "dup3",
    "fadvise64",
    "getegid",
    "geteuid",
    "getgid",
    "getppid",
    "getrlimit",
    "getrusage",
    "getuid",
    "clock_nanosleep",
    "nanosleep",
    "pipe2",
    "poll",
    "ppoll",
    "pselect6",
    "pwritev",
    "readlink",
    "readlinkat",
    "rseq",
    "rt_sigaction",
    "sched_getaffinity",
    "set_robust_list",
    "set_tid_address",
    "statfs",
    "fstatfs",
    "statx",
    "sysinfo",
    "uname",
)

_AT_EMPTY_PATH = 0x1000  # linux/fcntl.h
_MAP_ANONYMOUS = 0x20
# F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC: no locks, leases, owners or signals
_FCNTL = (1, 2, 3, 1030)
_F_DUPFD, _F_SETFL = 0, 4
_OPEN_READING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def filter_for(confinement: Confinement, machine: str | None = None) -> bytes:
    """Return the program for the workers of `confinement`, on `machine` (this one by default)."""
    machine = machine or os.uname().machine
    allowed: Allowed = dict.fromkeys((*_FILES, *_MEMORY, *_RUNTIME))
    errnos: dict[str, int] = {}
    allowed["newfstatat"] = [masked(3, _AT_EMPTY_PATH, _AT_EMPTY_PATH)]
    allowed |= {name: [equal_int(0, CHANNEL)] for name in _TALKING}
    allowed["mmap"] = allowed["mprotect"] = [without_bits(2, mmap.PROT_EXEC)]
    if confinement.jit:
        allowed |= dict.fromkeys(_JIT)
        allowed["mmap"] = [either(without_bits(2, mmap.PROT_EXEC), masked(3, _MAP_ANONYMOUS, _MAP_ANONYMOUS))]
        allowed["mprotect"] = None
    if confinement.profile is Profile.SCRATCH:
        allowed |= dict.fromkeys((*_OPENING, *_CHANGING))
        allowed["fcntl"] = [one_int_of(1, _FCNTL)]
        # Who opens a file asks whether it is a terminal.
        errnos["ioctl"] = errno.ENOTTY
    if confinement.profile is Profile.PROGRAM:
        allowed |= _program_calls()
        errnos |= {"ioctl": errno.ENOTTY, "clone3": errno.ENOSYS}
    gently = confinement.gently or confinement.profile is Profile.PROGRAM
    return assemble(
        _of(machine, allowed),
        machine=machine,
        otherwise=errno_action(errno.EPERM) if gently else KILL_PROCESS,
        errnos=errnos,
    )


def _program_calls() -> Allowed:
    calls: Allowed = dict.fromkeys(_PROGRAM)
    calls["open"] = [without_bits(1, _OPEN_READING)]
    calls["openat"] = [without_bits(2, _OPEN_READING)]
    # The loader maps libraries so, and may only open what Landlock lets it.
    calls["mmap"] = calls["mprotect"] = None
    calls["fcntl"] = [one_int_of(1, (_F_DUPFD, _F_SETFL, *_FCNTL))]
    calls["execveat"] = [equal_int(0, PROGRAM), equal_int(4, _AT_EMPTY_PATH)]
    # Of itself alone: limits and names of others are theirs.
    calls["prlimit64"] = [equal_int(0, 0), equal(2, 0)]
    return calls


def _of(machine: str, allowed: Allowed) -> Mapping[str, Sequence[Condition] | None]:
    """Leave out the older names, which newer machines do not have."""
    return {name: conditions for name, conditions in allowed.items() if name in SYSCALLS[machine]}
