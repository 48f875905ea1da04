"""strace around a process that runs already: which system calls it makes, and some of them made to fail."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from tests.processes import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# `name(arguments) = result`, with the pid before it where several are traced. What was interrupted by a call
# of another process is in two lines, of which the first one has the name.
_CALL = re.compile(r"^(?:\d+ +)?([a-z_0-9]+)\((?:\d+, (?=TIOCOUTQ)(\w+))?", re.MULTILINE)
INJECTED = "(INJECTED)"


def strace() -> str:
    """Return where strace is.

    Raises:
        AssertionError: it is not installed.

    """
    found = shutil.which("strace")
    assert found is not None, "these tests need strace: apt-get install strace"
    return found


def is_traced(pid: int) -> bool:
    """Return whether somebody traces a process, or it has ended."""
    try:
        return "TracerPid:\t0\n" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True


@contextlib.contextmanager
def traced(pids: Sequence[int], written: Path, *options: str, forks: bool = False) -> Iterator[None]:
    """Trace processes for the length of the block; what they do is in `written` afterwards.

    `forks`: and what they fork meanwhile.
    """
    named = [word for pid in pids for word in ("-p", str(pid))]
    command = [strace(), *(["-f"] if forks else []), "-q", "-s", "0", "-o", str(written), *options, *named]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        try:
            wait_until(
                lambda: process.poll() is not None or all(map(is_traced, pids)), "strace is attached", 30
            )
            # What a process waits in may be the call that fails: then it ends at once, and strace with it.
            lost = process.poll() is not None and all(os.path.exists(f"/proc/{pid}") for pid in pids)
            assert not lost, process.stderr.read() if process.stderr else ""
            yield
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=30)


@contextlib.contextmanager
def failing(pids: Sequence[int], written: Path, call: str, error: str, nth: int) -> Iterator[None]:
    """Have the `nth` system call of this name (from 1, of each process) fail with an errno, such as EIO.

    In its place it makes one that its seccomp program allows: of the number -1, which strace would take, the
    program says that it kills.
    """
    with traced(pids, written, f"--trace={call}", f"--inject={call}:error={error}:when={nth}:syscall=getpid"):
        yield


def calls(text: str) -> list[str]:
    """Return the names of the calls in their order; `TIOCOUTQ` is the ioctl that says what was received."""
    return [asked or call for call, asked in _CALL.findall(text)]
