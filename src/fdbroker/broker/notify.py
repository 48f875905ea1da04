"""What the service manager is told: sd_notify(3) and the watchdog, in a few lines of our own.

libsystemd would be mapped into the process with the capability, and all it
needs is a datagram. The socket is connected by the launcher. Whatever becomes
of it, the broker goes on: what finds no room is said again later, and whether
anybody listens is not our business.
"""

from __future__ import annotations

import socket
import time

from fdbroker.kernel import sockets

_AGAIN = 0.1  # seconds until what found no room is said again


class Notifier:
    """Says things to the service manager; owns its socket. None: there is no manager, or no watchdog."""

    def __init__(self, descriptor: int | None = None, watchdog_usec: int | None = None) -> None:
        self._sock = None if descriptor is None else socket.socket(fileno=descriptor)
        # The manager kills after the whole time without a ping; half of it is what it asks for.
        self._interval = None if descriptor is None or not watchdog_usec else watchdog_usec / 3e6
        self._next_ping = 0.0
        self._unsent: dict[str, str] = {}

    def close(self) -> None:
        """Close the socket."""
        if self._sock is not None:
            self._sock.close()

    def say(self, **variables: str) -> None:
        """Tell the manager: READY, STATUS, STOPPING. Never waits and never fails."""
        if self._sock is None:
            return
        self._unsent |= variables
        text = "\n".join(f"{name}={value}" for name, value in self._unsent.items())
        try:
            sockets.send(self._sock, text.encode(), wait=False)
        except BlockingIOError:
            return
        except OSError:
            pass  # nobody is there
        self._unsent.clear()

    def ping(self) -> None:
        """Tell that the loop goes round, if it is time to. For the loop alone: a stuck one is silent."""
        if self._interval is not None and time.monotonic() >= self._next_ping:
            self._next_ping = time.monotonic() + self._interval
            self.say(WATCHDOG="1")

    def before_waiting(self) -> float:
        """Say what is due; return for how many seconds the loop may wait, -1: for ever."""
        if self._interval is None and not self._unsent:
            return -1  # as nearly always; this is asked in each round
        self.ping()
        if self._unsent:
            self.say()
        until = [] if self._interval is None else [max(0.0, self._next_ping - time.monotonic())]
        if self._unsent:
            until.append(_AGAIN)
        return min(until, default=-1)
