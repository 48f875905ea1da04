"""Execute a program that is held by a descriptor, so that it is the one that was looked at."""

from __future__ import annotations

import ctypes
import errno
from typing import TYPE_CHECKING

from fdbroker.kernel.errors import SyscallError
from fdbroker.kernel.libc import SYS_EXECVEAT, syscall

if TYPE_CHECKING:
    from collections.abc import Sequence

_AT_EMPTY_PATH = 0x1000  # linux/fcntl.h


def execute(descriptor: int, arguments: Sequence[bytes], environment: Sequence[bytes]) -> None:
    """Replace this process by the program behind a descriptor; never returns.

    execveat(2) with AT_EMPTY_PATH, Linux 3.19. `arguments` begin with the
    program's own name; `environment` is of the form NAME=VALUE. Nothing of
    Python is cleaned up. A script fails with ENOENT where the descriptor is
    close-on-exec, as its interpreter is told a name that is gone.

    Raises:
        SyscallError: EINVAL (a NUL in a string), EACCES, ENOEXEC (no program), E2BIG.

    """
    if any(0 in text for text in (*arguments, *environment)):
        raise SyscallError(errno.EINVAL, "execveat", arguments=arguments)
    syscall(
        "execveat",
        SYS_EXECVEAT,
        descriptor,
        b"",
        _vector(arguments),
        _vector(environment),
        _AT_EMPTY_PATH,
        descriptor=descriptor,
        arguments=arguments,
    )


def _vector(texts: Sequence[bytes]) -> ctypes.Array[ctypes.c_char_p]:
    return (ctypes.c_char_p * (len(texts) + 1))(*texts, None)
