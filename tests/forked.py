"""Our programs in forked children of the tests: all that they do, but for an interpreter's start and imports.

Those take longer than what the program does, and hundreds of tests start one.
That it is started by a command line has its own tests.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import select
import signal
import sys
import tempfile
import traceback
from subprocess import DEVNULL, CompletedProcess, TimeoutExpired
from typing import TYPE_CHECKING, Any, TextIO

from fdbroker.launcher.until_ready import _keep_only

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

# For a stream that who starts a program has closed.
CLOSED = -100
# The status of an interpreter that could not write all that it had to.
_NOT_FLUSHED = 120


class ForkedProcess:
    """A child, with what a `subprocess.Popen` has for it."""

    def __init__(self, pid: int, name: str) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._name = name

    def poll(self) -> int | None:
        """Return its exit status, negative for the signal that ended it; None while it runs."""
        if self.returncode is None and os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Return its exit status when it has ended.

        Raises:
            TimeoutExpired: it runs after `timeout` seconds.

        """
        if self.returncode is None and timeout is not None:
            descriptor = os.pidfd_open(self.pid)
            try:
                if not select.select([descriptor], [], [], timeout)[0]:
                    raise TimeoutExpired(self._name, timeout)
            finally:
                os.close(descriptor)
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it is known to have ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it."""
        self.send_signal(signal.SIGKILL)


def fork_program(
    main: Callable[[], int],
    name: str,
    *,
    stdin: int = DEVNULL,
    stdout: int,
    stderr: int,
    pass_fds: Collection[int] = (),
) -> ForkedProcess:
    """Run a program's main function in a child with these streams, and `pass_fds`.

    A stream is a descriptor, or DEVNULL; or it is `CLOSED`, and None in `sys`, as an interpreter has it.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return ForkedProcess(pid, name)
    status = 1
    try:
        sys.settrace(None)  # what measures coverage here would only slow it down: nothing is written there
        _have_streams(stdin, stdout, stderr, pass_fds)
        status = main()
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 1
    except BaseException:  # noqa: BLE001 - as an interpreter would show it
        traceback.print_exc()
    finally:
        try:
            for stream in (sys.stdout, sys.stderr):
                if stream is not None:
                    stream.flush()
        except OSError:
            status = _NOT_FLUSHED
        os._exit(status)


def run_forked(main: Callable[[], int], name: str, **streams: Any) -> CompletedProcess[bytes]:  # noqa: ANN401
    """Run it as `fork_program` does, to its end; return what it wrote where no stream is given for it.

    Raises:
        TimeoutExpired: it does not end within a minute. It is killed then.

    """
    with contextlib.ExitStack() as stack:
        files = {each: stack.enter_context(tempfile.TemporaryFile()) for each in ("stdout", "stderr")}
        outputs = {each: file.fileno() for each, file in files.items()}
        process = fork_program(main, name, **(outputs | streams))
        try:
            status = process.wait(timeout=60)
        finally:
            process.kill()
        written = []
        for file in files.values():
            file.seek(0)
            written.append(file.read())
        return CompletedProcess(name, status, *written)


def _have_streams(stdin: int, stdout: int, stderr: int, pass_fds: Collection[int]) -> None:
    """Have these descriptors and no others, and the streams that an interpreter makes of them."""
    nothing = os.open(os.devnull, os.O_RDWR)
    wanted = [nothing if stream == DEVNULL else stream for stream in (stdin, stdout, stderr)]
    copies = [CLOSED if stream == CLOSED else fcntl.fcntl(stream, fcntl.F_DUPFD, 3) for stream in wanted]
    for number, copy in enumerate(copies):
        if copy == CLOSED:
            os.close(number)
        else:
            os.dup2(copy, number)
    there = [number for number, copy in enumerate(copies) if copy != CLOSED]
    _keep_only([*there, *pass_fds])
    for number in pass_fds:
        os.set_inheritable(number, True)
    sys.stdin, sys.stdout, sys.stderr = (
        _stream(number, mode) if number in there else None for number, mode in enumerate("rww")
    )


def _stream(number: int, mode: str) -> TextIO:
    raw = open(number, f"{mode}b", closefd=False)  # noqa: SIM115 - as long as it lives
    of_errors = number == 2
    errors = "backslashreplace" if of_errors else "strict"
    return io.TextIOWrapper(raw, "utf-8", errors, line_buffering=of_errors or raw.isatty())
