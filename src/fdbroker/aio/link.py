"""A connection whose socket an event loop watches."""

from __future__ import annotations

import asyncio
import contextlib
import math
from typing import TYPE_CHECKING

from fdbroker.client.engine import State
from fdbroker.client.errors import BrokerError, timed_out
from fdbroker.client.link import (
    ConnectionLost,
    Deadline,
    Link,
    connect_socket_at_once,
    not_accepted,
    telling_the_sender,
)

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Generator

_MOST_AT_ONCE = 16  # frames that are received before other tasks get their turn
# Seconds that releases wait for each other at most, and for which they may after a client has come: then what
# the broker said with it may hold no more, nor does another one come soon.
_HELD_BACK = 0.02
_FULL_QUEUE_PAUSE = 0.01  # seconds; nothing tells when a listener's queue has room


class WatchedLink(Link):
    """A link whose socket an event loop watches. `ended` is why it is over."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        sock.settimeout(0)
        self.loop = asyncio.get_running_loop()
        self.ended: ConnectionLost | BrokerError | None = None
        # Reads that had something: shows whether the broker is alive.
        self.heard = 0
        self._client_came_at = -math.inf
        self._releasing: asyncio.TimerHandle | None = None
        self._is_writing = False
        self._is_reading = False  # what is to be sent is sent when that is over
        self._greeted: Callable[[], None] | None = None
        self.loop.add_reader(sock, self._read)

    @classmethod
    async def greet(cls, sock: socket.socket, deadline: Deadline) -> WatchedLink:
        """Take over a connected socket and exchange hello and welcome; the socket is closed on any error.

        Raises:
            ConnectionLost: the broker closed it without a word.
            BrokerError: it was refused, took too long or broke the protocol.

        """
        link = cls(sock)
        try:
            link._queue(link._engine.hello())
            with waking(link.loop, deadline) as (came, wake):
                link._greeted = wake
                with telling_the_sender(sock):
                    link.send_queued()
                await came
                link._greeted = None
            if link.ended is not None:
                raise link.ended
            if link._engine.state is not State.READY:
                raise timed_out(deadline.seconds, "the broker did not answer")
        except BaseException:
            link.end(ConnectionLost("it was not greeted"))
            raise
        return link

    def send_queued(self) -> None:
        """Send what waits to be sent: what the socket takes now, the rest when it takes more."""
        if self.ended is not None or self._is_reading:
            return
        try:
            all_sent = self.flush()
        except ConnectionLost:
            # It may have said why before it went: that, or the end, is to be read.
            self._unsent.clear()
            all_sent = True
        except BrokerError as error:
            self.end(error)
            return
        if not all_sent and not self._is_writing:
            self.loop.add_writer(self._sock, self.send_queued)
            self._is_writing = True
        elif all_sent and self._is_writing:
            self.loop.remove_writer(self._sock)
            self._is_writing = False

    def send_afterthoughts(self) -> None:
        """Tell the broker what is not wanted any more: at once, or releases of a few clients a moment later.

        Each message wakes the broker up. So while clients come one after the other, and the broker lets
        them, releases wait for others, and go with whatever is sent next.
        """
        if self._is_reading:
            return  # it is called when that is over
        if (
            self._unsent
            or not self._engine.releases_may_wait
            or self.loop.time() > self._client_came_at + _HELD_BACK
        ):
            self.send_queued()
        elif self._releasing is None:
            self._releasing = self.loop.call_later(_HELD_BACK, self._release)

    def _release(self) -> None:
        self._releasing = None
        self.send_queued()

    def end(self, why: ConnectionLost | BrokerError) -> None:
        """Close it; everybody who waits on it is woken up. May be called again."""
        if self.ended is None:
            self.ended = why
            self.loop.remove_reader(self._sock)
            if self._is_writing:
                self.loop.remove_writer(self._sock)
            if self._releasing is not None:
                self._releasing.cancel()
            self.close()
            if self._greeted is not None:
                self._greeted()

    def let_go(self) -> None:
        """In a child after fork: close the socket alone. The loop and its epoll are the parent's."""
        if self.ended is None:
            self.ended = ConnectionLost("it belongs to the parent of this process")
            self._calls.clear()
            self.close()

    def _read(self) -> None:
        self._is_reading = True
        came_before = self._engine.clients_that_came
        try:
            for _ in range(_MOST_AT_ONCE):
                if not self.receive():
                    break
                self.heard += 1
                if not self._engine.outstanding:
                    break  # what may come all the same, a client of a listener, comes by itself
        except (ConnectionLost, BrokerError) as why:
            self.end(why)
            return
        finally:
            self._is_reading = False
        if self._engine.clients_that_came != came_before:
            self._client_came_at = self.loop.time()
        self.send_afterthoughts()  # clients that came and nobody wants are released
        if self._greeted is not None and self._engine.state is State.READY:
            self._greeted()


async def connect_socket(path: bytes, deadline: Deadline) -> socket.socket:
    """Return a connected socket; as `connect_socket`, but other tasks run meanwhile."""
    while True:
        try:
            return connect_socket_at_once(path)
        except BlockingIOError as full:
            left = deadline.left()
            if left is not None and left <= 0:
                raise not_accepted(path, deadline) from full
            await asyncio.sleep(_FULL_QUEUE_PAUSE if left is None else min(left, _FULL_QUEUE_PAUSE))


@contextlib.contextmanager
def waking(
    loop: asyncio.AbstractEventLoop, deadline: Deadline
) -> Generator[tuple[asyncio.Future[None], Callable[[], None]], None, None]:
    """Give a future, and a function that ends it; the deadline does so as well."""
    came: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not came.done():
            came.set_result(None)

    left = deadline.left()
    alarm = None if left is None else loop.call_later(left, wake)
    try:
        yield came, wake
    finally:
        if alarm is not None:
            alarm.cancel()
