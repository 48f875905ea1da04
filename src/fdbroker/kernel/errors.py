"""The one error type of this folder: it says which call failed, with what."""

from __future__ import annotations

import errno
import os


class SyscallError(OSError):
    """A system call failed.

    `errno` is the kernel's number. `call` is the name of the system call and
    `arguments` what it was given, by name, so that the message can be acted
    on without a tracer. The text is built only when somebody asks for it:
    on the hot path a missing file is an answer, not an incident.
    """

    def __init__(self, number: int, call: str, **arguments: object) -> None:
        super().__init__(number, os.strerror(number))
        self.call = call
        self.arguments = arguments

    def __str__(self) -> str:
        """Return `call(argument=value, ...): ENAME, text`."""
        inside = ", ".join(f"{name}={value!r}" for name, value in self.arguments.items())
        # OSError.errno is typed as optional; ours is always set by __init__.
        number = self.errno or 0
        name = errno.errorcode.get(number, f"errno {number}")
        return f"{self.call}({inside}): {name}, {self.strerror}"


_named: dict[type[OSError], type[SyscallError]] = {OSError: SyscallError}


def renamed(error: OSError, call: str, **arguments: object) -> SyscallError:
    """Return an error of Python's own wrappers as one that names the call; for `raise ... from None`.

    It stays what it was besides: a ConnectionResetError is still caught as one.
    """
    kind = type(error)
    if kind not in _named:
        _named[kind] = type(f"Syscall{kind.__name__}", (SyscallError, kind), {})
    return _named[kind](error.errno or errno.EIO, call, **arguments)
