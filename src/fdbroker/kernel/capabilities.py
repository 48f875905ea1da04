"""Capabilities of this process. Sets are integers: bit N is capability N. capabilities(7)."""

from __future__ import annotations

import ctypes
import struct
from typing import NamedTuple

from fdbroker.kernel.libc import SYS_CAPGET, SYS_CAPSET, syscall

# linux/capability.h: those that fdbroker speaks of, besides the one in process_state.py.
CAP_SETGID = 6
CAP_SETUID = 7
CAP_SETPCAP = 8
CAP_SYS_ADMIN = 21

_VERSION_3 = 0x20080522


class Capabilities(NamedTuple):
    """The three sets of a thread that capset(2) changes."""

    effective: int
    permitted: int
    inheritable: int


def last_capability() -> int:
    """Return the highest capability of this kernel; /proc/sys/kernel/cap_last_cap, Linux 3.2."""
    with open("/proc/sys/kernel/cap_last_cap", "rb") as file:
        return int(file.read())


def capget() -> Capabilities:
    """Return the capability sets of the calling thread (capget, section 2)."""
    data = ctypes.create_string_buffer(24)
    syscall("capget", SYS_CAPGET, _header(), data)
    # Two halves of 32 bits, each with all three sets.
    low, high = struct.iter_unpack("=III", data.raw)
    return Capabilities._make(lower | upper << 32 for lower, upper in zip(low, high, strict=True))


def capset(wanted: Capabilities) -> None:
    """Set the capability sets of the calling thread (capset, section 2).

    Hazard: of this thread alone. Bits above the kernel's last capability are ignored.

    Raises:
        SyscallError: EPERM: more than is permitted now.

    """
    data = struct.pack("=6I", *(bits & 0xFFFFFFFF for bits in wanted), *(bits >> 32 for bits in wanted))
    syscall(
        "capset",
        SYS_CAPSET,
        _header(),
        ctypes.create_string_buffer(data, len(data)),
        **{name: hex(bits) for name, bits in wanted._asdict().items()},
    )


def _header() -> ctypes.Array[ctypes.c_char]:
    # A buffer, not bytes: the kernel may write its own version into it. Pid 0 is the calling thread.
    return ctypes.create_string_buffer(struct.pack("=Ii", _VERSION_3, 0), 8)
