"""Capabilities of this process, and what the kernel says a process is.

Sets are integers: bit N is capability N. capabilities(7).
"""

from __future__ import annotations

import ctypes
import struct
from typing import NamedTuple

from fdbroker.kernel.libc import SYS_CAPGET, SYS_CAPSET, syscall

# linux/capability.h: those that fdbroker speaks of.
CAP_DAC_READ_SEARCH = 2
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


class ProcessState(NamedTuple):
    """Of /proc/PID/status: who a process is and what it may do."""

    uids: tuple[int, int, int, int]  # real, effective, saved, file system
    gids: tuple[int, int, int, int]
    groups: tuple[int, ...]
    inheritable: int
    permitted: int
    effective: int
    bounding: int
    ambient: int
    no_new_privs: bool
    seccomp: int  # 0 none, 1 strict, 2 filter
    threads: int


def read_process_state(pid: int | str = "self") -> ProcessState:
    """Read /proc/PID/status; `self` is the main thread of this process."""
    with open(f"/proc/{pid}/status", "rb") as file:
        return parse_process_state(file.read())


def parse_process_state(text: bytes) -> ProcessState:
    """Return what the text of /proc/PID/status says; proc_pid_status(5).

    Raises:
        ValueError: a line that must be there (Linux 4.10) is missing or strange.

    """
    lines: dict[bytes, bytes] = {}
    # Not splitlines(): of the command's name, which anybody chooses, the kernel escapes \n but not \r.
    for line in text.split(b"\n"):
        key, _, value = line.partition(b":")
        lines.setdefault(key, value)
    try:
        real, effective, saved, file_system = map(int, lines[b"Uid"].split())
        uids = (real, effective, saved, file_system)
        real, effective, saved, file_system = map(int, lines[b"Gid"].split())
        return ProcessState(
            uids=uids,
            gids=(real, effective, saved, file_system),
            groups=tuple(map(int, lines[b"Groups"].split())),
            inheritable=int(lines[b"CapInh"], 16),
            permitted=int(lines[b"CapPrm"], 16),
            effective=int(lines[b"CapEff"], 16),
            bounding=int(lines[b"CapBnd"], 16),
            ambient=int(lines[b"CapAmb"], 16),
            no_new_privs=int(lines[b"NoNewPrivs"]) == 1,
            seccomp=int(lines[b"Seccomp"]),
            threads=int(lines[b"Threads"]),
        )
    except KeyError as error:
        raise ValueError(f"/proc/PID/status has no line {error.args[0].decode()}") from None
