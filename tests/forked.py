"""Our programs in forked children of the tests: all that they do, but for an interpreter's start and imports.

Those take longer than what the program does, and hundreds of tests start one.
That it is started by a command line has its own tests.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import traceback
from subprocess import DEVNULL, TimeoutExpired
from typing import TYPE_CHECKING

from fdbroker.launcher.until_ready import _keep_only

if TYPE_CHECKING:
    from collections.abc import Callable, Collection


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
    main: Callable[[], int], name: str, *, stdout: int, stderr: int, pass_fds: Collection[int] = ()
) -> ForkedProcess:
    """Run a program's main function in a child with these outputs, nothing to read, and `pass_fds`."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return ForkedProcess(pid, name)
    status = 1
    try:
        sys.settrace(None)  # what measures coverage here would only slow it down: nothing is written there
        nothing = os.open(os.devnull, os.O_RDWR)
        os.dup2(nothing, 0)
        os.dup2(nothing if stdout == DEVNULL else stdout, 1)
        os.dup2(stderr, 2)
        _keep_only([0, 1, 2, *pass_fds])
        sys.stdin, sys.stdout, sys.stderr = (
            open(number, mode, buffering=1, closefd=False)  # noqa: SIM115 - as long as it lives
            for number, mode in enumerate("rww")
        )
        status = main()
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 1
    except BaseException:  # noqa: BLE001 - as an interpreter would show it
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
