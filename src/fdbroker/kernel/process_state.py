"""What the kernel says a process is; proc_pid_status(5).

Sets of capabilities are integers: bit N is capability N.
"""

from __future__ import annotations

from typing import NamedTuple

CAP_DAC_READ_SEARCH = 2  # linux/capability.h; the broker's one


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
