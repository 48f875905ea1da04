"""The way into the kernel for calls that Python does not wrap.

ctypes with the errno of the calling thread, the numbers of the system calls
that have no function in glibc 2.36, and nothing else. Every other module of
this folder wraps its calls once, with the flags that safety needs forced
inside; nobody outside this folder imports this one.

Hazard: ctypes passes `bytes` as a C string and so cuts it at the first NUL.
Every wrapper that takes a path refuses NUL first.
"""

from __future__ import annotations

import ctypes
import os

from fdbroker.kernel.errors import SyscallError

LIBC = ctypes.CDLL(None, use_errno=True)

MACHINE = os.uname().machine
if MACHINE not in {"x86_64", "aarch64"}:  # pragma: no cover - other machines
    raise ImportError(f"fdbroker knows the system calls of x86_64 and aarch64, this machine is {MACHINE}")

# From the kernel's tables; calls newer than 5.0 have one number everywhere.
SYS_CAPGET = {"x86_64": 125, "aarch64": 90}[MACHINE]
SYS_CAPSET = {"x86_64": 126, "aarch64": 91}[MACHINE]
SYS_GETDENTS64 = {"x86_64": 217, "aarch64": 61}[MACHINE]
SYS_PRCTL = {"x86_64": 157, "aarch64": 167}[MACHINE]
SYS_MOUNT = {"x86_64": 165, "aarch64": 40}[MACHINE]
SYS_UMOUNT2 = {"x86_64": 166, "aarch64": 39}[MACHINE]
SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}[MACHINE]
SYS_UNSHARE = {"x86_64": 272, "aarch64": 97}[MACHINE]
SYS_SETNS = {"x86_64": 308, "aarch64": 268}[MACHINE]
SYS_SECCOMP = {"x86_64": 317, "aarch64": 277}[MACHINE]
SYS_EXECVEAT = {"x86_64": 322, "aarch64": 281}[MACHINE]
SYS_CLOSE_RANGE = 436
SYS_OPENAT2 = 437
SYS_MOUNT_SETATTR = 442
SYS_LANDLOCK_CREATE_RULESET = 444
SYS_LANDLOCK_ADD_RULE = 445
SYS_LANDLOCK_RESTRICT_SELF = 446

_syscall = LIBC.syscall
_syscall.restype = ctypes.c_long


def syscall(call: str, number: int, *arguments: object, **described: object) -> int:
    """Make system call `number` and return its result.

    `arguments` go to the kernel: int (as long), bytes (as C string), None or
    ctypes pointers. `call` and `described` are only for the error's text.

    Raises:
        SyscallError: the kernel answered with an error number.

    """
    converted = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    result: int = _syscall(ctypes.c_long(number), *converted)
    if result < 0:
        raise SyscallError(ctypes.get_errno(), call, **described)
    return result
