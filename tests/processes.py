"""Running a function in a child process of another uid, and waiting for things without sleeping."""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import signal
import socket
import time
import traceback
from typing import TYPE_CHECKING, Any, TypeVar

from fdbroker.kernel.dumpable import set_dumpable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_T = TypeVar("_T")


class ChildError(AssertionError):
    """The function raised in the child, or the child died; the text has its traceback."""


def become(uid: int, gid: int | None = None, groups: tuple[int, ...] = ()) -> None:
    """Give up root for good, in this process."""
    os.setgroups(groups)
    os.setresgid(*[uid if gid is None else gid] * 3)
    os.setresuid(uid, uid, uid)


def become_started(uid: int) -> None:
    """Become another user without groups, who may look at this process in /proc as after execve(2)."""
    become(uid)
    set_dumpable(True)


def in_child(function: Callable[[], _T], *, uid: int | None = None, groups: tuple[int, ...] = ()) -> _T:
    """Run `function` in a forked child, as `uid` if given, and return what it returns.

    Raises:
        ChildError: it raised, or the child ended otherwise; the text says how.

    """
    read_end, write_end = os.pipe()
    pid = os.fork()
    if not pid:
        status = 1
        try:
            os.close(read_end)
            if uid is not None:
                become(uid, groups=groups)
            answer: tuple[bool, object] = (True, function())
            status = 0
        except BaseException:  # noqa: BLE001 - whatever it was is reported
            answer = (False, traceback.format_exc())
        try:
            with open(write_end, "wb") as pipe:
                pickle.dump(answer, pipe)
        finally:
            os._exit(status)
    os.close(write_end)
    with open(read_end, "rb") as pipe:
        data = pipe.read()
    _, status = os.waitpid(pid, 0)
    if not data:
        raise ChildError(f"the child ended without an answer, status {os.waitstatus_to_exitcode(status)}")
    good, value = pickle.loads(data)  # noqa: S301 - our own child wrote it
    if not good:
        raise ChildError(value)
    return value


@contextlib.contextmanager
def background(function: Callable[[], Any], *, uid: int | None = None) -> Iterator[int]:
    """Run `function` in a forked child for the length of the block; give its pid, kill it at the end."""
    pid = os.fork()
    if not pid:
        try:
            if uid is not None:
                become(uid)
            function()
        except BaseException:  # noqa: BLE001 - shown, then ended
            traceback.print_exc()
        finally:
            os._exit(0)
    try:
        yield pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def whose_command_line_names(path: Path) -> list[int]:
    """Return the processes that were started with `path` in an argument, as launchers are."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        gone = contextlib.suppress(FileNotFoundError, ProcessLookupError)
        with gone, open(f"/proc/{name}/cmdline", "rb") as file:
            if bytes(path) in file.read():
                found.append(int(name))
    return found


def children_of(pid: int) -> list[int]:
    """Return the processes that a process with one thread has forked.

    Raises:
        FileNotFoundError: it has ended.

    """
    with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
        return [int(child) for child in file.read().split()]


def has_ended(pid: int) -> bool:
    """Return whether a process has ended, be it that nobody has waited for it: an init may take its time."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] in b"ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def listens(path: Path) -> bool:
    """Return whether a stream socket of this name can be connected to; its file is there before that."""
    with socket.socket(socket.AF_UNIX) as sock:
        try:
            sock.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        return True


def wait_until(condition: Callable[[], Any], what: str, seconds: float = 20.0) -> None:
    """Ask again and again until `condition` holds; fail after `seconds`, naming `what`.

    For states of other processes that give no event. It gives way between two
    questions, so that on one CPU the other process can get there, and the longer
    it takes the longer: a question may cost more than what is waited for.
    """
    end = time.monotonic() + seconds
    pause = 0.001
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"after {seconds} s still not: {what}")
        select.select([], [], [], pause)
        pause = min(1.2 * pause, 0.02)
