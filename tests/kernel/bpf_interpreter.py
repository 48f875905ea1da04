"""What the kernel does with a seccomp program, in Python."""

from __future__ import annotations

import struct
from typing import NamedTuple

from fdbroker.kernel.syscall_table import AUDIT_ARCH


class Call(NamedTuple):
    """What the kernel shows a program: struct seccomp_data."""

    number: int
    arguments: tuple[int, ...] = (0,) * 6
    architecture: int = AUDIT_ARCH["x86_64"]


def decide(program: bytes, call: Call) -> int:
    """Interpret a program: the subset of classic BPF that the assembler emits, refused if it is wrong."""
    instructions = list(struct.iter_unpack("=HBBI", program))
    data = struct.pack(
        "=iIQ6Q", call.number - (call.number >> 31 << 32), call.architecture, 0, *call.arguments
    )
    at = accumulator = 0
    while True:
        code, yes, no, value = instructions[at]
        at += 1
        if code == 0x20:
            (accumulator,) = struct.unpack_from("=I", data, value)
        elif code == 0x54:
            accumulator &= value
        elif code == 0x05:
            at += value
        elif code == 0x15:
            at += yes if accumulator == value else no
        elif code == 0x35:
            at += yes if accumulator >= value else no
        elif code == 0x45:
            at += yes if accumulator & value else no
        elif code == 0x06:
            return value
        else:
            raise AssertionError(f"instruction {code:#x} at {at - 1}")
