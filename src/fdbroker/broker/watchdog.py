"""The loop's own watchdog: a loop that is stuck is ended by the kernel.

A loop that waits in a system call for ever runs no Python, so no handler of
ours could do anything. Instead setitimer(2) is armed while the loop works, and
SIGALRM keeps its default action: it ends the process, also where it waits for
a fanotify listener or a server (such waits are killable). The service manager
starts the next one, with the sockets that it kept. systemd's watchdog, to which
notify.py talks, is another one, for what is outside of it.

It costs no system call per round: the timer is set anew twice a second at
most. While the loop waits for events it is armed only for the first second;
then it is disarmed, and an idle broker is neither woken nor ended.

Hazard: a broker that was kept from running for that long (stopped, frozen,
traced) in the middle of a request looks the same, and is ended.
"""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

STUCK_SECONDS = 3.0
_AGAIN = 500_000_000  # nanoseconds; so a loop that gets stuck is ended after 2.5 to 3 seconds
_SHORT_WAIT = 1.0
_MOMENT = 0.001  # seconds


def nothing() -> None:
    """Stand for `Watchdog.ping` where there is no watchdog."""


def _set_timer(seconds: float) -> None:
    signal.setitimer(signal.ITIMER_REAL, seconds)


def close_unread(sock: socket.socket) -> None:
    """Close a connection whose client may have sent descriptors, which end with it.

    A socket among them that lingers (SO_LINGER, socket(7)) has who closes it last wait for its peer, for as
    long as its owner likes, but no longer than to a signal. So there is one: of the timer, which is set back.
    """
    handler = signal.signal(signal.SIGALRM, lambda _number, _frame: None)
    # Again and again: the first one may come before the wait.
    timer = signal.setitimer(signal.ITIMER_REAL, _MOMENT, _MOMENT)
    try:
        sock.close()
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)


class Watchdog:
    """Ends this process when the loop does not go round for `seconds`; None: never.

    `set_timer` (seconds) and `clock` (nanoseconds) are for tests.
    """

    def __init__(
        self,
        seconds: float | None = STUCK_SECONDS,
        set_timer: Callable[[float], None] = _set_timer,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._seconds = seconds
        self._set_timer = set_timer
        self._clock = clock
        self._armed = False
        # When to set the timer; while it is off: at once. This is asked in each round.
        self._arm_again = 0
        # Called then, too: twice a second while the loop works, for what is not to be done in each round.
        self.often = nothing
        self._quiet = False  # nothing happened in the last wait
        # When the clock was last looked at after a wait or by `ping`, in nanoseconds: from then on the loop
        # has been at what it is at.
        self.now = 0

    @staticmethod
    def prepare() -> None:
        """Make sure that SIGALRM ends this process: whoever started it may have had it ignored or blocked."""
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})

    def ping(self) -> None:
        """Tell that the loop goes round: after each wait, and in the middle of long rounds."""
        self.now = now = self._clock()
        if now >= self._arm_again:
            self._arm(now)

    def before_waiting(self, timeout: float) -> float:
        """Return for how many seconds to wait (-1: for ever), of the `timeout` that is wanted."""
        if not self._armed or 0 <= timeout <= _SHORT_WAIT:
            return timeout
        if self._quiet:
            self.stop()
            return timeout
        now = self._clock()
        if now >= self._arm_again:
            self._arm(now)
        return _SHORT_WAIT

    def after_waiting(self, events: int) -> None:
        """Tell how many events there were. For each wait that `before_waiting` gave a time for."""
        self._quiet = not events
        # One that waited for long, and for nothing, waits on.
        if events or self._armed:
            self.now = now = self._clock()
            if now >= self._arm_again:
                self._arm(now)

    def stop(self) -> None:
        """Disarm it."""
        if self._armed:
            self._set_timer(0)
            self._armed = False
            self._arm_again = 0

    def _arm(self, now: int) -> None:
        if self._seconds is not None:
            self._set_timer(self._seconds)
            self._armed = True
        self._arm_again = now + _AGAIN
        self.often()
