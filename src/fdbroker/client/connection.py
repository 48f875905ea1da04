"""One blocking connection: a link, and the deadline of who waits.

Sending never waits in the kernel: a full send queue does not keep the client
from receiving, so broker and client can't wait for each other.
"""

from __future__ import annotations

import math
import select
import socket
import time
from typing import TYPE_CHECKING

from fdbroker.client.engine import State
from fdbroker.client.errors import timed_out
from fdbroker.client.link import TIMEVAL, ConnectionLost, Link, telling_the_sender
from fdbroker.kernel import sockets

if TYPE_CHECKING:
    from fdbroker.client.engine import Answer
    from fdbroker.client.link import Call, Deadline

# Seconds, kept in the socket: set anew only where a deadline is nearer. With poll(2) an answer costs more.
_PATIENCE = 1.0


class Connection(Link):
    """A greeted connection. Owns its socket."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self._ready = select.poll()
        self._ready.register(sock, select.POLLIN | select.POLLOUT)
        # Receiving waits in the kernel, a while at a time; sending never waits.
        sock.settimeout(None)
        self._patience = 0.0
        self._set_patience(_PATIENCE)

    @classmethod
    def greet(cls, sock: socket.socket, deadline: Deadline) -> Connection:
        """Take over a connected socket and exchange hello and welcome; the socket is closed on any error.

        Raises:
            ConnectionLost: the broker closed it without a word.
            BrokerError: it was refused, took too long or broke the protocol.

        """
        connection = cls(sock)
        try:
            connection._queue(connection._engine.hello())
            with telling_the_sender(sock):
                connection.send_queued(deadline)
            while connection._engine.state is not State.READY:
                connection.wait(deadline)
        except BaseException:
            connection.close()
            raise
        return connection

    def fileno(self) -> int:
        """Return the number of its socket."""
        return self._sock.fileno()

    def send(self, call: Call, deadline: Deadline) -> None:
        """Send the question of `call`; its answers will be delivered to it by `wait`.

        Raises:
            ConnectionLost: the broker closed the connection.
            TooLargeError: it is larger than this broker takes.
            BrokerError: as `wait`.

        """
        self.queue_call(call)
        self.send_queued(deadline)

    def exchange(self, call: Call, began: float, timeout: float | None) -> Answer | None:
        """Send the question of `call`, or queue it; return its answer if that comes next, as it mostly does.

        None: `send_queued` and `wait` go on with it. `began`: when its time-out began (monotonic clock).

        Raises:
            TooLargeError: as `send`. ConnectionLost, BrokerError: as `wait`.

        """
        if (
            self._calls
            or self._unsent
            or self._frames is not None
            or self._engine.has_afterthoughts
            or (timeout is not None and time.monotonic() - began + self._patience > timeout)
        ):
            self.queue_call(call)
            return None
        request_id, frame = self._engine.request(call.question)
        call.id = request_id
        call.link = self
        answer = None
        try:
            sockets.send_at_once(self._sock, frame)
        except OSError:
            self._queue(frame)  # to meet that error again, where it is told
        else:
            message = self._take_message()
            if message is not None:
                data, descriptors, _, truncated = message
                answer = self._engine.receive(data, descriptors, truncated=truncated)
                if answer is not None and answer.id == request_id and answer.last:
                    return answer
        self._calls[request_id] = call
        if answer is not None:
            self._hand_out(answer)
        return None

    def send_queued(self, deadline: Deadline) -> None:
        """Send what waits to be sent. Raises as `send`."""
        while True:
            try:
                if self.flush():
                    return
            except ConnectionLost:
                # It may have said why before it went. This ends with an error.
                while True:
                    self.wait(deadline)
            # The broker may be waiting for us to receive.
            events = self._ready.poll(_milliseconds(deadline))
            if not events:
                raise timed_out(deadline.seconds, "the broker did not take a request")
            if events[0][1] & ~select.POLLOUT:
                self.receive()

    def wait(self, deadline: Deadline) -> None:
        """Receive something, whosever it is, and deliver it.

        Raises:
            BrokerTimeoutError: nothing came.
            ConnectionLost: the broker closed the connection.
            BrokerError: as `Link.receive`.

        """
        while True:
            left = deadline.left()
            if left is not None and left <= 0:
                raise timed_out(deadline.seconds, "the broker did not answer")
            wanted = _PATIENCE if left is None else min(left, _PATIENCE)
            if wanted != self._patience:
                self._set_patience(wanted)
            if self.receive():
                return

    def receive_if_ready(self) -> None:
        """Receive something if it is there; don't wait. Raises as `Link.receive`."""
        events = self._ready.poll(0)
        if events and events[0][1] & ~select.POLLOUT:
            self.receive()

    def _set_patience(self, seconds: float) -> None:
        """Set how long the kernel waits for one frame (SO_RCVTIMEO): the deadline is looked at in between."""
        microseconds = max(1, int(seconds * 1_000_000))
        timeval = TIMEVAL.pack(*divmod(microseconds, 1_000_000))
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
        self._patience = seconds


def _milliseconds(deadline: Deadline) -> int | None:
    left = deadline.left()
    return None if left is None else math.ceil(left * 1000)
