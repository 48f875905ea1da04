"""--daemon: into the background by python-daemon, while the caller waits to hear how it went.

The caller stays until the broker serves or has ended. Until then it shows what
comes on the daemon's standard error; later nobody reads that, and the audit has
what matters.
"""

from __future__ import annotations

import os
import select
import sys
from typing import TYPE_CHECKING, NamedTuple

from fdbroker.launcher.errors import EXIT_NOT_STARTED, StartError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fdbroker.launcher.locking import PidFile

_READY = b"ready\n"
_PART = 4096


class Waiting(NamedTuple):
    """What the caller waits on: the word of the broker, its errors, and the process it forked."""

    word: int
    errors: int
    child: int


class Detached(NamedTuple):
    """The daemon's side: where the broker says that it is ready."""

    word: int


def go_into_background(pidfile: PidFile, keep: Sequence[int]) -> Waiting | Detached:
    """Fork, and return in both: as the caller's process, and as a daemon that keeps only these descriptors.

    Raises:
        StartError: python-daemon is not installed, or refuses.

    """
    try:
        import daemon  # noqa: PLC0415 - in the foreground it is not needed
    except ImportError as error:
        raise StartError(
            "--daemon needs the Python package python-daemon; install fdbroker[daemon]"
        ) from error
    word, word_end = os.pipe()
    errors, errors_end = os.pipe()
    child = os.fork()
    if child:
        os.close(word_end)
        os.close(errors_end)
        return Waiting(word, errors, child)
    with open(errors_end, "w", buffering=1) as stream:
        context = daemon.DaemonContext(
            detach_process=True,
            working_directory="/",
            umask=0o077,
            # The broker shall start as it does in the foreground: nothing ignored, nothing handled.
            signal_map={},
            files_preserve=[*keep, pidfile.descriptor, word_end],
            stderr=stream,
            pidfile=pidfile,
        )
        try:
            context.open()
        except daemon.daemon.DaemonError as error:
            raise StartError(f"it can't go into the background: {error}") from error
    return Detached(word_end)


def wait_until_it_serves(waiting: Waiting) -> int:
    """Show what the daemon says until it serves or has ended; return the caller's exit status."""
    os.waitpid(waiting.child, 0)  # it has left the rest to its grandchild
    said = b""
    poll = select.poll()
    poll.register(waiting.word, select.POLLIN)
    poll.register(waiting.errors, select.POLLIN)
    talking = True
    while talking:
        for number, _ in poll.poll():
            part = os.read(number, _PART)
            if number == waiting.errors:
                _show(part)
                if not part:
                    poll.unregister(number)
            elif part:
                said += part
            else:
                talking = False
    if said == _READY:
        os.set_blocking(waiting.errors, False)
        _show_rest(waiting.errors)
        return 0
    _show_rest(waiting.errors)  # to its end: the process is ending
    return EXIT_NOT_STARTED


def _show_rest(errors: int) -> None:
    try:
        while part := os.read(errors, _PART):
            _show(part)
    except BlockingIOError:
        pass


def _show(part: bytes) -> None:
    sys.stderr.write(part.decode(errors="backslashreplace"))
    sys.stderr.flush()
