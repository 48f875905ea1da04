"""The seccomp program of a worker: which system calls it may make once it reads hostile bytes.

It reads descriptors that it is given, and talks on one socket. A list of what
is allowed; whatever is not listed kills it. Missing on purpose:

- everything that opens, makes, names, links or removes a file, and execve.
- socket, connect, accept: it talks on its channel, and on nothing that it may be passed.
- fork, clone, kill, ptrace, pidfd_open, process_vm_readv: there is no process but it.
- write: what it has to say is a message on its channel.
- flock, fcntl, ioctl, fchmod, fchown, utimensat: a descriptor for reading can lock a file, and its
  owner can change the rest by it.
- prctl, setrlimit, setresuid, seccomp, unshare: what it is, it stays.
- mmap and mprotect with PROT_EXEC: no code but what is mapped now; not of a scanned file either.
- memfd_create, userfaultfd, io_uring, bpf, keyctl: much kernel, no use.

What a filter can't see: newfstatat has the path behind a pointer, and glibc's
fstat() is newfstatat with an empty one. Of calls with AT_EMPTY_PATH a worker
could so make a look at a path's metadata; an empty root leaves no path to look at.
"""

from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING

from fdbroker.kernel.bpf import KILL_PROCESS, assemble, equal_int, masked, without_bits
from fdbroker.sandbox.confine import CHANNEL

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fdbroker.kernel.bpf import Condition

# Descriptors that it was given.
_FILES = ("read", "pread64", "lseek", "fstat", "close", "close_range")

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

_AT_EMPTY_PATH = 0x1000  # linux/fcntl.h


def worker_filter(machine: str | None = None, *, default_action: int = KILL_PROCESS) -> bytes:
    """Return the program for `machine` (this one by default).

    `default_action` is for tests, which go on after a refusal: `bpf.errno_action(EPERM)`.
    """
    machine = machine or os.uname().machine
    allowed: dict[str, Sequence[Condition] | None] = dict.fromkeys((*_FILES, *_MEMORY, *_RUNTIME))
    allowed["newfstatat"] = [masked(3, _AT_EMPTY_PATH, _AT_EMPTY_PATH)]
    allowed["recvmsg"] = allowed["sendmsg"] = [equal_int(0, CHANNEL)]
    allowed["mmap"] = allowed["mprotect"] = [without_bits(2, mmap.PROT_EXEC)]
    return assemble(allowed, machine=machine, otherwise=default_action)
