"""One blocking connection: a socket, its engine, and the deadline of who waits.

The socket is never blocking; each wait is a poll(2) that ends at the deadline,
and a full send queue never keeps it from receiving: broker and client can't
wait for each other.
"""

from __future__ import annotations

import errno
import math
import select
import socket
import struct
import time
from typing import TYPE_CHECKING, NamedTuple

from fdbroker.client.engine import ROOM, Engine, State
from fdbroker.client.errors import BrokerTimeoutError, timed_out, too_many_files, unavailable
from fdbroker.kernel import sockets

if TYPE_CHECKING:
    from fdbroker.client.engine import Answer, Question
    from fdbroker.wire.messages import Welcome

_TIMEVAL = struct.Struct("@ll")
# Seconds, kept in the socket: set anew only where a deadline is nearer. With poll(2) an answer costs more.
_PATIENCE = 1.0
# ENOTCONN: a connect(2) that a signal interrupted.
_LOST = frozenset({errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN})


class ConnectionLost(Exception):
    """The broker closed the connection; the text says how it showed. For the client, which may repeat."""


class Deadline(NamedTuple):
    """A moment of the monotonic clock, and the time-out that it came from; None: never."""

    at: float | None
    seconds: float

    @classmethod
    def after(cls, seconds: float | None) -> Deadline:
        """Return the deadline `seconds` from now."""
        return cls(None, math.inf) if seconds is None else cls(time.monotonic() + seconds, seconds)

    def left(self) -> float | None:
        """Return the seconds that are left, at least 0; None: endless."""
        return None if self.at is None else max(0.0, self.at - time.monotonic())


class Call:
    """A question under way; owns its answer from when it came until it is taken."""

    __slots__ = ("answer", "connection", "id", "losses", "question")

    def __init__(self, question: Question) -> None:
        self.question = question
        # On which it was sent last.
        self.connection: Connection | None = None
        self.id = 0
        # How many connections it was lost with.
        self.losses = 0
        self.answer: Answer | None = None

    def abandon(self) -> None:
        """Close the answer, or have it closed when it comes. Takes no lock: a finalizer may call it."""
        if self.connection is not None:
            self.connection.forget(self)
        answer, self.answer = self.answer, None
        if answer is not None:
            answer.descriptors.close()


class Connection:
    """A greeted connection. Owns its socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._engine = Engine()
        self._calls: dict[int, Call] = {}
        self._was_reset = False
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
            connection._send_frame(connection._engine.hello(), deadline)
            while connection._engine.state is not State.READY:
                connection.receive(deadline)
        except BaseException:
            connection.close()
            raise
        return connection

    @property
    def welcome(self) -> Welcome:
        """What the broker said at the beginning."""
        return self._engine.welcome

    def send(self, call: Call, deadline: Deadline) -> None:
        """Send the question of `call`; its answer will be put there by `receive`.

        Raises:
            ConnectionLost: the broker closed the connection.
            TooLargeError: it is larger than this broker takes.
            BrokerError: as `receive`.

        """
        call.id, frame = self._engine.request(call.question)
        call.connection = self
        self._calls[call.id] = call
        self._send_frame(frame, deadline)

    def forget(self, call: Call) -> None:
        """Have the answer to `call` closed when it comes."""
        self._engine.abandon(call.id)
        self._calls.pop(call.id, None)

    def receive(self, deadline: Deadline) -> None:
        """Receive one frame, whosever it is, and put it where it belongs.

        Raises:
            ConnectionLost: the broker closed the connection.
            BrokerTimeoutError: nothing came.
            TooManyFilesError: descriptors came that this process had no room for.
            ProtocolError: the broker does not keep to the protocol.
            UnavailableError: the socket can't be used.
            BrokerError: the broker ended the connection, with a reason.

        """
        while True:
            left = deadline.left()
            if left is not None and left <= 0:
                raise timed_out(deadline.seconds, "the broker did not answer")
            wanted = _PATIENCE if left is None else min(left, _PATIENCE)
            if wanted != self._patience:
                self._set_patience(wanted)
            if self._receive_what_is_there():
                return

    def close(self) -> None:
        """Close the socket: what is under way on it is lost. Never shut down: a fork may share it."""
        self._engine.close()
        self._calls.clear()
        self._sock.close()

    def _set_patience(self, seconds: float) -> None:
        """Set how long the kernel waits for one frame (SO_RCVTIMEO): the deadline is looked at in between."""
        microseconds = max(1, int(seconds * 1_000_000))
        timeval = _TIMEVAL.pack(*divmod(microseconds, 1_000_000))
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
        self._patience = seconds

    def _receive_what_is_there(self) -> bool:
        """Receive a frame; False if none came while the kernel waited."""
        try:
            message = sockets.receive(self._sock, ROOM)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno == errno.EMFILE:
                raise too_many_files() from error
            if error.errno == errno.ECONNRESET and not self._was_reset:
                # Reported once, ahead of what is queued; the broker's last words may be there.
                self._was_reset = True
                return False
            if error.errno in _LOST:
                raise ConnectionLost(str(error)) from error
            # Not as it is: a PermissionError of a socket must not be taken for one of a file.
            raise unavailable(None, error) from error
        if not message.data:
            message.descriptors.close()
            raise ConnectionLost("the broker closed it")
        answer = self._engine.receive(message.data, message.descriptors, truncated=message.truncated)
        if answer is not None:
            call = self._calls.pop(answer.id, None)
            if call is None:
                answer.descriptors.close()
            else:
                call.answer = answer
        return True

    def _send_frame(self, frame: bytes, deadline: Deadline) -> None:
        while True:
            try:
                sockets.send(self._sock, frame, wait=False)
            except BlockingIOError:
                # The broker may be waiting for us to receive.
                events = self._ready.poll(_milliseconds(deadline))
                if not events:
                    raise timed_out(deadline.seconds, "the broker did not take a request") from None
                if events[0][1] & ~select.POLLOUT:
                    self._receive_what_is_there()
            except OSError as error:
                if error.errno not in _LOST:
                    raise unavailable(None, error) from error
                # It may have said why before it went. This ends with an error.
                while True:
                    self.receive(deadline)
            else:
                return


def connect_socket(path: bytes, deadline: Deadline) -> socket.socket:
    """Return a socket connected to the broker; the caller owns it.

    Raises:
        UnavailableError: it is not there, nobody listens, or this user may not.
        BrokerTimeoutError: the broker did not accept.

    """
    try:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    except OSError as error:
        raise unavailable(path, error) from error
    left = deadline.left()
    try:
        if left is not None:
            # A Unix socket that does not block fails at once where the listener's queue is full.
            microseconds = max(1, int(left * 1_000_000))
            sock.setsockopt(
                socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL.pack(*divmod(microseconds, 1_000_000))
            )
        sock.connect(path)
    except OSError as error:
        sock.close()
        if error.errno == errno.EAGAIN and left is not None:
            late = timed_out(deadline.seconds, "the broker did not accept the connection")
            raise BrokerTimeoutError(errno.ETIMEDOUT, str(late.strerror), path) from error
        raise unavailable(path, error) from error
    except BaseException:
        sock.close()
        raise
    return sock


def _milliseconds(deadline: Deadline) -> int | None:
    left = deadline.left()
    return None if left is None else math.ceil(left * 1000)
