"""What was made for a broker that does not come to serve is taken away again, by a process that still can.

From the moment it gives up root, whoever is to become the broker can't remove
a socket or empty the pidfile; and after execve it knows neither. So somebody
stays beside it until it is ready: in the background the caller, who waits in
any case, in the foreground a process that ends then.
"""

from __future__ import annotations

import contextlib
import os
import signal
from typing import TYPE_CHECKING, NamedTuple

from fdbroker.kernel import process

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fdbroker.launcher.listening import MadeSockets
    from fdbroker.launcher.locking import PidFile

READY = b"ready\n"
# By which a person or a terminal ends who waits.
INTERRUPTING = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT})


class Made(NamedTuple):
    """What has to go if the broker does not come to serve."""

    sockets: MadeSockets
    pidfile: PidFile | None

    def remove(self) -> None:
        """Remove the sockets, and empty the pidfile. Only when the broker has ended."""
        self.sockets.remove()
        if self.pidfile is not None:
            self.pidfile.empty()

    def descriptors(self) -> list[int]:
        """Return what `remove` needs."""
        pidfile = [] if self.pidfile is None else [self.pidfile.descriptor]
        return [*self.sockets.descriptors(), *pidfile]


class Watcher(NamedTuple):
    """A process that sees to what was made. `word`: where the broker tells it that it is ready."""

    word: int
    done: int

    def wait(self) -> None:
        """Say that the start has failed, and return when all is removed."""
        os.close(self.word)
        os.read(self.done, 1)  # nothing: the end of the pipe
        os.close(self.done)


def start_watcher(made: Made, ready: int | None) -> Watcher:
    """Fork a process that removes what was made unless the broker says that it is ready.

    It tells `ready` then, which is the caller's, and ends. Nobody's child, so
    that the broker has no zombie; in the background in that a terminal's signals
    do not end it.
    """
    word, word_end = os.pipe()
    done, done_end = os.pipe()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, INTERRUPTING)
    try:
        child = os.fork()
        if not child:
            _watch(made, ready, word, done_end)
        os.waitpid(child, 0)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    os.close(word)
    os.close(done_end)
    return Watcher(word_end, done)


def _watch(made: Made, ready: int | None, word: int, done_end: int) -> None:
    """Be the watcher; never returns."""
    try:
        if os.fork():
            return
        _keep_only([word, done_end, *made.descriptors(), *([] if ready is None else [ready])])
        if os.read(word, len(READY)) == READY:
            os.read(word, 1)  # until the broker has closed it: who is told finds it as it stays
            tell(ready)
        else:
            made.remove()
    finally:
        os._exit(0)


def tell(ready: int | None) -> None:
    """Say to who waits that the broker serves. Whether anybody still does is of no consequence."""
    if ready is not None:
        with contextlib.suppress(OSError):
            os.write(ready, READY)


def _keep_only(descriptors: Sequence[int]) -> None:
    free = 0
    for number in sorted(descriptors):
        if free < number:
            process.close_range(free, number - 1)
        free = number + 1
    process.close_range(free)
