"""The seccomp programs of the processes that open what may hang: the starter, and the helpers it forks.

Lists of what is allowed; whatever is not listed kills. A helper does what the
broker does with files, and sends: no accept, no epoll, no audit to write to.
A helper's filter is added to the starter's, which it inherits, so the starter
may do all of that too; and beyond it

- clone: as fork(2) does it, without a flag that shares memory or descriptors, or makes a namespace;
- pidfd_open, wait4, and pidfd_send_signal of SIGKILL alone, for its own children. (Landlock, where it
  has signals, holds it to them, to itself and to the broker.)
- prctl of PR_SET_PDEATHSIG alone, and seccomp to add a filter: what makes a fork a helper.

Missing in both on purpose is all that broker_seccomp.py names: exec, sockets, open_by_handle_at, ptrace,
every change of a file system.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import signal
from typing import TYPE_CHECKING

from fdbroker.kernel.bpf import KILL_PROCESS, assemble, equal, equal_int, one_int_of, without_bits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fdbroker.kernel.bpf import Condition

_FILES = (
    "openat2",
    "newfstatat",
    "fstat",
    "statx",
    "fstatfs",
    "readlinkat",
    "getdents64",
    "read",
    "lseek",
    "close",
    "close_range",
)
# On what it was given: its socket to the broker, and the client's that comes with a reply to send. What goes
# wrong is written to standard error.
_MESSAGES = ("recvmsg", "sendmsg", "getsockname", "write")
_WAITING = ("ppoll", "clock_nanosleep")
_WAITING_X86_64 = ("poll",)
_MEMORY = ("brk", "munmap", "mremap", "madvise")
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
# What glibc does in a fork, and what becomes of it; and what the broker asks for.
_STARTING = ("set_robust_list", "set_tid_address", "rseq", "getppid", "pidfd_open", "wait4", "recvfrom")

_WRITES_OR_CREATES = (
    os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_TMPFILE & ~os.O_DIRECTORY
)
_FCNTL = (fcntl.F_GETFL, fcntl.F_GETFD, fcntl.F_SETFD, fcntl.F_DUPFD_CLOEXEC)  # see broker_seccomp.py
_IOCTL = (0x5421, 0x5451, 0x5401)  # FIONBIO, FIOCLEX, TCGETS: see broker_seccomp.py
_SOL_SOCKET = 1
_PR_SET_PDEATHSIG = 1
_SECCOMP_SET_MODE_FILTER = 1
# linux/sched.h: CLONE_CHILD_SETTID | CLONE_CHILD_CLEARTID, by which glibc keeps a fork's thread id.
_FORK = 0x01000000 | 0x00200000 | signal.SIGCHLD


def helper_filter(machine: str | None = None, *, default_action: int = KILL_PROCESS) -> bytes:
    """Return the program of a helper for `machine` (this one by default). `default_action`: for tests."""
    machine = machine or os.uname().machine
    return assemble(_allowed(machine), machine=machine, otherwise=default_action)


def starter_filter(machine: str | None = None, *, default_action: int = KILL_PROCESS) -> bytes:
    """Return the program of the starter."""
    machine = machine or os.uname().machine
    allowed = _allowed(machine) | dict.fromkeys(_STARTING)
    allowed["clone"] = [equal(0, _FORK)]
    allowed["pidfd_send_signal"] = [equal_int(1, signal.SIGKILL)]
    allowed["prctl"] = [equal_int(0, _PR_SET_PDEATHSIG)]
    allowed["seccomp"] = [equal_int(0, _SECCOMP_SET_MODE_FILTER)]
    return assemble(allowed, machine=machine, otherwise=default_action)


def _allowed(machine: str) -> dict[str, Sequence[Condition] | None]:
    names = [*_FILES, *_MESSAGES, *_WAITING, *_MEMORY, *_RUNTIME]
    if machine == "x86_64":
        names += _WAITING_X86_64
    allowed: dict[str, Sequence[Condition] | None] = dict.fromkeys(names)
    allowed["openat"] = [without_bits(2, _WRITES_OR_CREATES)]
    allowed["fcntl"] = [one_int_of(1, _FCNTL)]
    allowed["ioctl"] = [one_int_of(1, _IOCTL)]
    allowed["getsockopt"] = [equal_int(1, _SOL_SOCKET)]
    allowed["mmap"] = allowed["mprotect"] = [without_bits(2, mmap.PROT_EXEC)]
    return allowed
