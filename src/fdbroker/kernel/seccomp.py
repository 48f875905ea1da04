"""Install a seccomp program that somebody else assembled.

The broker imports this and no assembler: the bytes come from the launcher.
"""

from __future__ import annotations

import ctypes
import errno

from fdbroker.kernel.errors import SyscallError
from fdbroker.kernel.libc import SYS_SECCOMP, syscall

_SET_MODE_FILTER = 1
# Every thread of the process or none: a filter on one thread of several would be no filter.
_FILTER_FLAG_TSYNC = 1

_INSTRUCTION = 8  # sizeof(struct sock_filter), linux/filter.h
_MAX_INSTRUCTIONS = 4096  # BPF_MAXINSNS


class _SockFprog(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def install(program: bytes) -> None:
    """Put the process, with all its threads and all it will fork, under a filter, for ever.

    `program` is an array of struct sock_filter. seccomp(2),
    SECCOMP_SET_MODE_FILTER with SECCOMP_FILTER_FLAG_TSYNC; Linux 3.17.

    Raises:
        SyscallError: EINVAL (not a program: wrong length, a jump out of it),
            EACCES (no_new_privs is not set), EBUSY (a thread has a filter of
            its own). No filter was installed then.

    """
    count, rest = divmod(len(program), _INSTRUCTION)
    if rest or not 1 <= count <= _MAX_INSTRUCTIONS:
        raise SyscallError(errno.EINVAL, "seccomp", operation="SECCOMP_SET_MODE_FILTER", bytes=len(program))
    stray = syscall(
        "seccomp",
        SYS_SECCOMP,
        _SET_MODE_FILTER,
        _FILTER_FLAG_TSYNC,
        ctypes.byref(_SockFprog(count, program)),
        operation="SECCOMP_SET_MODE_FILTER",
        flags="SECCOMP_FILTER_FLAG_TSYNC",
        instructions=count,
        needs="no_new_privs",
    )
    if stray:
        # The kernel's way to say that this thread can't be brought under the filter.
        raise SyscallError(errno.EBUSY, "seccomp", operation="SECCOMP_SET_MODE_FILTER", thread=stray)
