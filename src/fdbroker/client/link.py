"""A connection without waiting: a socket, its engine, what waits to be sent, and whose answers come.

The blocking and the asyncio client say when to `flush` and to `receive`; what
happens then is here, once.
"""

from __future__ import annotations

import contextlib
import errno
import math
import socket
import struct
import time
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from fdbroker.client.engine import ROOM, Engine
from fdbroker.client.errors import (
    BrokerTimeoutError,
    DisconnectedError,
    disconnected,
    protocol_error,
    timed_out,
    too_many_files,
    unavailable,
)
from fdbroker.client.framing import StreamFrames
from fdbroker.kernel import sockets
from fdbroker.wire.format import MAX_FRAME
from fdbroker.wire.messages import MalformedError
from fdbroker.wire.stream import framed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fdbroker.client.engine import Answer, Question
    from fdbroker.kernel.descriptors import Descriptors
    from fdbroker.wire.messages import Welcome

TIMEVAL = struct.Struct("@ll")
KINDS = (socket.SOCK_SEQPACKET, socket.SOCK_STREAM)  # in the order in which they are tried
# ENOTCONN: a connect(2) that a signal interrupted.
_LOST = frozenset({errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN})
_LONGEST_TIMEOUT = 86400 * 20  # seconds; poll(2) counts milliseconds in 31 bits


class ConnectionLost(Exception):
    """The broker closed the connection; the text says how it showed. For the client, which may repeat."""


class Deadline(NamedTuple):
    """A moment of the monotonic clock, and the time-out that it came from; None: never."""

    at: float | None
    seconds: float

    @classmethod
    def after(cls, seconds: float | None, began: float | None = None) -> Deadline:
        """Return the deadline `seconds` after a moment of the monotonic clock, or after now."""
        if seconds is None:
            return cls(None, math.inf)
        return cls((time.monotonic() if began is None else began) + seconds, seconds)

    @classmethod
    def first(cls, timeout: float | None) -> Deadline:
        """Return the deadline of the first request of a client.

        Raises:
            ValueError: a time-out that no client can have.

        """
        if timeout is not None and not 0 < timeout <= _LONGEST_TIMEOUT:
            raise ValueError(
                f"a time-out is None or above 0 and at most {_LONGEST_TIMEOUT} seconds, not {timeout}"
            )
        return cls.after(timeout)

    def left(self) -> float | None:
        """Return the seconds that are left, at least 0; None: endless."""
        return None if self.at is None else max(0.0, self.at - time.monotonic())


class Call:
    """A question under way; owns its answers from when they came until they are taken.

    `bound`: the one connection on which it means anything; None: it may be
    repeated on another.
    """

    __slots__ = ("answers", "bound", "id", "link", "losses", "question", "wake")

    def __init__(self, question: Question, bound: Link | None = None) -> None:
        self.question: Question = question
        self.bound = bound
        # On which it was sent last.
        self.link: Link | None = None
        self.id = 0
        # How many connections it was lost with.
        self.losses = 0
        self.answers: list[Answer] = []
        # Called when an answer came, or no more will on this connection.
        self.wake: Callable[[], None] | None = None

    def renew(self) -> None:
        """Make the question what it is now, before it is sent (again)."""

    def deliver(self, answer: Answer) -> None:
        """Take an answer that came."""
        self.answers.append(answer)
        if self.wake is not None:
            self.wake()

    def abandon(self) -> None:
        """Close the answers, or have them closed when they come. Takes no lock: a finalizer may call it."""
        if self.link is not None:
            self.link.forget(self)
        while self.answers:
            self.answers.pop().descriptors.close()


class Link:
    """A connection's socket, which it owns, and all that is under way on it. For one thread at a time."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._engine = Engine()
        self._calls: dict[int, Call] = {}
        self._unsent: deque[bytes | memoryview] = deque()
        self._frames = StreamFrames() if sock.type == socket.SOCK_STREAM else None
        self._was_reset = False

    @property
    def welcome(self) -> Welcome:
        """What the broker said at the beginning."""
        return self._engine.welcome

    def queue_call(self, call: Call) -> None:
        """Have the question of `call` sent; its answers will be delivered to it.

        Raises:
            TooLargeError: it is larger than this broker takes.
            ValueError: it can't be expressed.

        """
        self._queue(self._frame_of(call))

    def send_at_once(self, call: Call, descriptor: int) -> None:
        """Send the question of `call` and a copy of a descriptor beside it, where nothing waits to be sent.

        Raises:
            ConnectionLost: the broker closed the connection.
            UnavailableError: the socket can't be used, or does not take descriptors.

        """
        frame = self._frame_of(call)
        try:
            sockets.send(self._sock, frame, [descriptor])
        except OSError as error:
            if error.errno in _LOST:
                raise ConnectionLost(str(error)) from error
            raise unavailable(None, error) from error

    def _frame_of(self, call: Call) -> bytes:
        """Return what asks the question of `call`, whose answers are its from now on."""
        call.id, frame = self._engine.request(call.question)
        call.link = self
        self._calls[call.id] = call
        return frame

    def queue_more(self, call: Call, frames: int) -> None:
        """Have so many frames more of a walk asked for, unless it has ended."""
        frame = self._engine.more(call.id, frames)
        if frame is not None:
            self._queue(frame)

    def forget(self, call: Call) -> None:
        """Have the answers to `call` closed when they come. Takes no lock: a finalizer may call it."""
        self._engine.abandon(call.id)
        self._calls.pop(call.id, None)

    def release_later(self, client: int) -> None:
        """Have a client released with the next that is sent. Takes no lock: a finalizer may call it."""
        self._engine.release_later(client)

    def flush(self) -> bool:
        """Send what the socket takes; return whether that was all.

        Raises:
            ConnectionLost: the broker closed the connection; it may have said why before.
            UnavailableError: the socket can't be used.

        """
        for afterthought in self._engine.afterthoughts():
            self._queue(afterthought)
        unsent = self._unsent
        while unsent:
            frame = unsent[0]
            try:
                # A SEQPACKET socket takes a frame whole or not at all (unix(7)).
                sent = sockets.send_at_once(self._sock, frame)
            except BlockingIOError:
                return False
            except OSError as error:
                if error.errno in _LOST:
                    raise ConnectionLost(str(error)) from error
                # Not as it is: a PermissionError of a socket must not be taken for one of a file.
                raise unavailable(None, error) from error
            if sent < len(frame):
                unsent[0] = memoryview(frame)[sent:]
            else:
                unsent.popleft()
        return True

    def receive(self) -> bool:
        """Receive what is there and deliver it; False if nothing was. Waits as the socket is set.

        Raises:
            ConnectionLost: the broker closed the connection.
            TooManyFilesError: descriptors came that this process had no room for.
            ProtocolError: the broker does not keep to the protocol.
            UnavailableError: the socket can't be used.
            BrokerError: the broker ended the connection, with a reason.

        """
        message = self._take_message()
        if message is None:
            return False
        if self._frames is None:
            self._deliver(message.data, message.descriptors, truncated=message.truncated)
            return True
        try:
            self._frames.add(message.data, message.descriptors)
        except MalformedError as error:
            raise protocol_error(str(error)) from error
        while (frame := self._frames.next_frame()) is not None:
            self._deliver(*frame)
        return True

    def _take_message(self) -> sockets.Received | None:
        """Receive what is there, which is not nothing; the caller owns it. None: nothing is there.

        Raises as `receive`.
        """
        try:
            message = sockets.receive(self._sock, ROOM)
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno == errno.EMFILE:
                raise too_many_files() from error
            if error.errno == errno.ECONNRESET and not self._was_reset:
                # Reported once, ahead of what is queued; the broker's last words may be there.
                self._was_reset = True
                return None
            if error.errno in _LOST:
                raise ConnectionLost(str(error)) from error
            raise unavailable(None, error) from error
        if not message.data:
            message.descriptors.close()
            raise ConnectionLost("the broker closed it")
        return message

    def close(self) -> None:
        """Close the socket: what is under way on it is lost. Never shut down: a fork may share it."""
        self._engine.close()
        self._unsent.clear()
        if self._frames is not None:
            self._frames.close()
        self._sock.close()
        calls, self._calls = self._calls, {}
        for call in calls.values():
            if call.wake is not None:
                call.wake()

    def _queue(self, frame: bytes) -> None:
        self._unsent.append(frame if self._frames is None else framed(frame))

    def _deliver(self, data: bytes, descriptors: Descriptors, *, truncated: bool = False) -> None:
        answer = self._engine.receive(data, descriptors, truncated=truncated)
        if answer is not None:
            self._hand_out(answer)

    def _hand_out(self, answer: Answer) -> None:
        call = self._calls.pop(answer.id, None) if answer.last else self._calls.get(answer.id)
        if call is None:
            answer.descriptors.close()
        else:
            call.deliver(answer)


@contextlib.contextmanager
def telling_the_sender(sock: socket.socket) -> Iterator[None]:
    """Have what is sent in this block tell who sends it, whether or not the other end asks for it yet.

    It does not where a super-server has accepted and no broker has begun; what
    has no sender is refused. Afterwards off again: else each reply would bring
    credentials, too.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    try:
        yield
    finally:
        if sock.fileno() >= 0:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 0)


def adopt_socket(sock: socket.socket) -> socket.socket:
    """Take over a connection that somebody else made: `sock` is detached, the caller owns what is returned.

    Raises:
        ValueError: it is of no type that the broker talks on. It was closed.

    """
    owned = socket.socket(fileno=sock.detach())
    try:
        if owned.family != socket.AF_UNIX or owned.type not in KINDS:
            raise ValueError(f"the client needs a Unix SOCK_SEQPACKET or SOCK_STREAM socket, not {owned!r}")
        # A frame of the full length has to fit, however small the buffer of what was inherited.
        with contextlib.suppress(OSError):
            owned.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * MAX_FRAME)
    except BaseException:
        owned.close()
        raise
    return owned


def connect_socket(path: bytes, deadline: Deadline) -> socket.socket:
    """Return a socket connected to the broker, of the kind that it listens with; the caller owns it.

    Raises:
        UnavailableError: it is not there, nobody listens, or this user may not.
        BrokerTimeoutError: the broker did not accept.

    """
    left = deadline.left()

    def prepare(sock: socket.socket) -> None:
        if left is not None:
            # A Unix socket that does not block fails at once where the listener's queue is full.
            microseconds = max(1, int(left * 1_000_000))
            sock.setsockopt(
                socket.SOL_SOCKET, socket.SO_SNDTIMEO, TIMEVAL.pack(*divmod(microseconds, 1_000_000))
            )

    try:
        return _connect(path, prepare)
    except OSError as error:
        if error.errno == errno.EAGAIN and left is not None:
            raise not_accepted(path, deadline) from error
        raise unavailable(path, error) from error


def connect_socket_at_once(path: bytes) -> socket.socket:
    """Return a socket that never blocks, connected to the broker; the caller owns it.

    Raises:
        BlockingIOError: the queue of the broker's socket is full.
        UnavailableError: as `connect_socket`.

    """
    try:
        return _connect(path, lambda sock: sock.settimeout(0))
    except BlockingIOError:
        raise
    except OSError as error:
        raise unavailable(path, error) from error


def _connect(path: bytes, prepare: Callable[[socket.socket], None]) -> socket.socket:
    last: OSError | None = None
    for kind in KINDS:
        sock = socket.socket(socket.AF_UNIX, kind)
        try:
            prepare(sock)
            sock.connect(path)
        except OSError as error:
            sock.close()
            if error.errno != errno.EPROTOTYPE:
                raise
            last = error  # the broker listens with another kind
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    assert last is not None  # noqa: S101 - for the type checker; there is a kind to try
    raise last


def not_greeted(lost: ConnectionLost, who: str = "the broker") -> DisconnectedError:
    """Return the exception for a connection that `who` closed without a word."""
    return disconnected(f"{who} closed the connection before its welcome: {lost}")


def not_accepted(path: bytes, deadline: Deadline) -> BrokerTimeoutError:
    """Return the exception for a broker that did not take a connection from its queue in time."""
    late = timed_out(deadline.seconds, "the broker did not accept the connection")
    return BrokerTimeoutError(errno.ETIMEDOUT, str(late.strerror), path)
