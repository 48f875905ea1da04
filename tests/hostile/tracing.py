"""strace around a process that runs already: which system calls it makes, and some of them made to fail."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

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


@contextlib.contextmanager
def traced(pids: Sequence[int], written: Path, *options: str, forks: bool = False) -> Iterator[None]:
    """Trace processes for the length of the block; what they do is in `written` afterwards.

    `forks`: and what they fork meanwhile.
    """
    named = [word for pid in pids for word in ("-p", str(pid))]
    command = [strace(), *(["-f"] if forks else []), "-s", "0", "-o", str(written), *options, *named]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        try:
            # It says so when it has stopped a process. It is its tracer before that, and sees nothing.
            said = b""
            while said.count(b" attached") < len(pids) and (more := os.read(process.stderr.fileno(), 4096)):
                said += more
            # What a process waits in may be the call that fails: then it ends at once, and strace with it.
            lost = said.count(b" attached") < len(pids) and all(
                os.path.exists(f"/proc/{pid}") for pid in pids
            )
            assert not lost, said
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
