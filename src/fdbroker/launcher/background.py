"""--daemon: into the background by python-daemon, while the caller waits to hear how it went.

Three processes: the caller, a middle one that leads the new session, and the
daemon. The middle one stays for as long as the caller waits: it is the daemon's
parent, so it knows how it ended and can end it without mistaking another
process for it. The caller shows what comes on the daemon's standard error
until it serves; later nobody reads that, and the audit has what matters.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
from typing import TYPE_CHECKING, NamedTuple

from fdbroker.kernel import children, process
from fdbroker.launcher.errors import EXIT_NOT_STARTED, LaunchError
from fdbroker.launcher.until_ready import INTERRUPTING, READY

if TYPE_CHECKING:
    from collections.abc import Sequence

_PART = 4096
_BY_SIGNAL = 128  # as shells count: a status above it is the number of a signal


class Waiting(NamedTuple):
    """The caller's side, which owns all: the word of the broker, its errors, and the child `middle`."""

    word: int
    errors: int
    middle: int


class Detached(NamedTuple):
    """The daemon's side. `word`: where the broker says that it is ready."""

    word: int


def go_into_background(keep: Sequence[int]) -> Waiting | Detached:
    """Fork, and return in both: as the caller's process, and as a daemon that keeps only these descriptors.

    The caller has its interrupting signals blocked then, until `wait_until_it_serves`.

    Raises:
        LaunchError: python-daemon is not installed. Nothing was forked.

    """
    try:
        import daemon  # noqa: PLC0415 - in the foreground it is not needed
    except ImportError as error:
        raise LaunchError(
            "--daemon needs the Python package python-daemon; install fdbroker[daemon]"
        ) from error
    word, word_end = os.pipe()
    errors, errors_end = os.pipe()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, INTERRUPTING)
    caller = os.getpid()
    middle = os.fork()
    if middle:
        os.close(word_end)
        os.close(errors_end)
        return Waiting(word, errors, middle)
    os.setsid()
    child = os.fork()
    if child:
        _stay_beside(child, caller)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    with open(errors_end, "w", buffering=1) as stream:
        context = daemon.DaemonContext(
            detach_process=False,  # that is done
            working_directory="/",
            umask=0o077,
            # The broker shall start as it does in the foreground: nothing ignored, nothing handled.
            signal_map={},
            files_preserve=[*keep, word_end],
            stderr=stream,
        )
        try:
            context.open()
        except daemon.daemon.DaemonError as error:
            stream.write(f"fdbroker: it can't go into the background: {error}; start it with --foreground\n")
            stream.flush()
            os._exit(EXIT_NOT_STARTED)
    return Detached(word_end)


def _stay_beside(child: int, caller: int) -> None:
    """Be the middle one: pass SIGTERM on, at the second time as SIGKILL, and end as the child does.

    Never returns.
    """
    status = EXIT_NOT_STARTED
    try:
        children.set_parent_death_signal(signal.SIGKILL)  # without a caller there is nothing to stay for
        if os.getppid() != caller:
            return  # by os._exit below
        process.close_range(0)  # or the caller would wait for the ends of pipes that are here
        numbers = [int(signal.SIGTERM)]

        def pass_on(_number: int, _frame: object) -> None:
            os.kill(child, numbers[-1])
            numbers.append(signal.SIGKILL)

        signal.signal(signal.SIGTERM, pass_on)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        status = _BY_SIGNAL - code if code < 0 else code
    finally:
        os._exit(status)


def wait_until_it_serves(waiting: Waiting) -> int:
    """Show what the daemon says until it serves or has ended; return the caller's exit status.

    If it is not 0, the daemon has ended. Whoever interrupts the caller ends the daemon.
    """
    interrupts, interrupt_end = os.pipe()
    os.set_blocking(interrupt_end, False)
    signal.set_wakeup_fd(interrupt_end, warn_on_full_buffer=False)
    for number in INTERRUPTING:
        signal.signal(number, lambda _number, _frame: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, INTERRUPTING)
    said = b""
    interrupted = False
    poll = select.poll()
    for descriptor in (waiting.word, waiting.errors, interrupts):
        poll.register(descriptor, select.POLLIN)
    talking = True
    while talking:
        for descriptor, _ in poll.poll():
            part = os.read(descriptor, _PART)
            if descriptor == interrupts:
                interrupted = True
                os.kill(waiting.middle, signal.SIGTERM)
            elif descriptor == waiting.errors:
                _show(part)
                if not part:
                    poll.unregister(descriptor)
            elif part:
                said += part
            else:
                talking = False
    if said == READY and not interrupted:
        os.set_blocking(waiting.errors, False)
        _show_rest(waiting.errors)
        os.kill(waiting.middle, signal.SIGKILL)
        os.waitpid(waiting.middle, 0)
        return 0
    _show_rest(waiting.errors)  # to its end: the process is ending
    code = os.waitstatus_to_exitcode(os.waitpid(waiting.middle, 0)[1])
    if interrupted:
        _show(b"fdbroker: interrupted before it served, so it was ended\n")
    elif code > _BY_SIGNAL:
        _show(f"fdbroker: it was ended by signal {code - _BY_SIGNAL} before it served\n".encode())
    return code if 0 < code < _BY_SIGNAL and not interrupted else EXIT_NOT_STARTED


def _show_rest(errors: int) -> None:
    with contextlib.suppress(BlockingIOError):
        while part := os.read(errors, _PART):
            _show(part)


def _show(part: bytes) -> None:
    with contextlib.suppress(OSError):  # nobody reads it, which is no reason to give up the daemon
        sys.stderr.write(part.decode(errors="backslashreplace"))
        sys.stderr.flush()
