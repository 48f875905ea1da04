"""What every check gives, and how something is tried that can't be undone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from fdbroker.config.names import printable
from fdbroker.sandbox.waiting import is_readable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_LONGEST_LOOK = 20.0  # seconds
_SECONDS_TO_DIE = 1.0
_OF_THE_CHILD = 1 << 16  # bytes of one read

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


def output_of(*command: str) -> str | None:
    """Return what a fixed command writes; None: it is not there, or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, timeout=10, check=False)  # noqa: S603 - a fixed command
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode(errors="replace")


class NotSeenError(Exception):
    """What was to be looked at could not be, to the end; the text says why."""


def in_time(look: Callable[[], object], seconds: float | None = None) -> object:
    """Return what `look` gives, which must be made of what JSON has; it runs in a child, for so long at most.

    A file system may never answer, and who asks it can't be interrupted. `seconds`: None for the usual.

    Raises:
        NotSeenError: it took longer, or raised something.

    """
    deadline = time.monotonic() + (_LONGEST_LOOK if seconds is None else seconds)
    read_end, write_end = os.pipe()
    pid = os.fork()
    if not pid:  # pragma: no cover - the child writes no report
        _tell(look, write_end)
    os.close(write_end)
    told = b""
    with open(read_end, "rb", buffering=0) as pipe:
        while is_readable(read_end, deadline - time.monotonic()):
            more = pipe.read(_OF_THE_CHILD)
            if not more:
                _, status = os.waitpid(pid, 0)
                return _understood(told, status)
            told += more
    _end(pid)
    raise NotSeenError("something does not answer, perhaps a file system")


def in_child(probe: Callable[[], str]) -> str:
    """Run something that can't be undone in a child, and return what it returns or what went wrong."""
    try:
        return printable(str(in_time(probe)))
    except NotSeenError as error:
        return printable(str(error))


def _end(pid: int) -> None:
    """End a child. One that a file system holds even so ends when that lets go of it: it is left."""
    os.kill(pid, signal.SIGKILL)
    child = os.pidfd_open(pid)
    try:
        if is_readable(child, _SECONDS_TO_DIE):
            os.waitpid(pid, 0)
    finally:
        os.close(child)


def _tell(look: Callable[[], object], write_end: int) -> NoReturn:  # pragma: no cover - as above
    try:
        try:
            told = {"given": look()}
        except Exception as error:  # noqa: BLE001 - told by the parent
            told = {"error": str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"}
        with open(write_end, "wb") as pipe:
            pipe.write(json.dumps(told).encode())
    finally:
        os._exit(0)


def _understood(told: bytes, status: int) -> object:
    if not told:
        raise NotSeenError(f"the process that tried it ended with {os.waitstatus_to_exitcode(status)}")
    answer = json.loads(told)
    if "error" in answer:
        raise NotSeenError(answer["error"])
    return answer["given"]
