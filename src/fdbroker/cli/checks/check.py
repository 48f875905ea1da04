"""What every check gives, and how something is tried that can't be undone."""

from __future__ import annotations

import os
import subprocess
import time
from typing import TYPE_CHECKING, NamedTuple

from fdbroker.config.names import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

OK, WEAKER, BROKEN, MISSING = "ok", "weaker", "broken", "missing"


class Check(NamedTuple):
    """One answer. `cure` is empty if OK.

    `state` WEAKER: it works, with less protection or convenience. BROKEN: it is there, and wrong.
    """

    name: str
    state: str
    found: str
    meaning: str
    cure: str = ""


class Places(NamedTuple):
    """Where to look. `control` None: nobody said which is that of this broker."""

    socket: str
    control: str | None
    policy: str


class Running(NamedTuple):
    """A broker that answered: its number as a process, and its whole status. For root and administrators."""

    pid: int
    status: Mapping[str, object]

    def proc(self, name: str) -> str:
        """Return the path of one of its files below /proc."""
        return f"/proc/{self.pid}/{name}"

    def age(self) -> float:
        """Return for how many seconds its process has been there, by a clock that nobody sets.

        Raises:
            OSError: it has ended, or is not to be seen.

        """
        with open(self.proc("stat"), encoding="ascii", errors="replace") as file:
            ticks = int(file.read().rpartition(")")[2].split()[19])  # starttime; proc_pid_stat(5)
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def in_child(probe: Callable[[], str]) -> str:
    """Run something that can't be undone in a child, and return what it returns or what went wrong."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if not pid:  # pragma: no cover - the child writes no report
        try:
            os.write(write_end, probe().encode(errors="backslashreplace"))
        except Exception as error:  # noqa: BLE001 - told by the parent
            os.write(write_end, str(error).encode(errors="backslashreplace"))
        finally:
            os._exit(0)
    os.close(write_end)
    with open(read_end, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(pid, 0)
    if status and not answer:
        return f"the process that tried it ended with {os.waitstatus_to_exitcode(status)}"
    return printable(answer)


def output_of(*command: str) -> str | None:
    """Return what a fixed command writes; None: it is not there, or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, timeout=10, check=False)  # noqa: S603 - a fixed command
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode(errors="replace")
