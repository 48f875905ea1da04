"""The blocking client: ask the broker for files by path, get them open."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import threading
import time
import weakref
from collections import deque
from typing import TYPE_CHECKING, TypeVar

from fdbroker.client.connection import Call, Connection, ConnectionLost, Deadline, connect_socket
from fdbroker.client.engine import (
    DEFAULT_BATCH,
    AskStatus,
    Limits,
    ListPage,
    OpenPaths,
    StatPaths,
    TooLargeError,
    batches,
    sendable,
)
from fdbroker.client.errors import (
    BrokerError,
    ReadOnlyError,
    UnavailableError,
    disconnected,
    error_of_reply,
    error_of_result,
    protocol_error,
    timed_out,
)
from fdbroker.client.results import DescribedFile, OpenedFile, Results, file_from
from fdbroker.wire.client import ListReply, OpenReply, StatReply, StatusReply
from fdbroker.wire.format import MAX_FRAME, MAX_PATHS
from fdbroker.wire.messages import GIVEN, ErrorReply

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator
    from io import BufferedReader
    from types import TracebackType
    from typing import Self

    from fdbroker.client.engine import Answer, Batch, Question, StrOrBytesPath
    from fdbroker.wire.messages import FileStat, ListEntry, Welcome

DEFAULT_SOCKET = "/run/fdbroker/broker.seqpacket"
DEFAULT_TIMEOUT = 30.0
_READ_SIZE = 1 << 16  # bytes; small enough not to cost a page fault for each small file
_LONGEST_TIMEOUT = 86400 * 20  # poll(2) counts milliseconds in 31 bits

_Result = TypeVar("_Result")

# Connections that one request may be lost with: a request that kills the broker must not go on doing so.
_MOST_LOSSES = 3
# Seconds before each try to connect again: a broker that is restarted by hand has no socket for a moment.
_PAUSES = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8)
_MAY_COME_BACK = frozenset({errno.ENOENT, errno.ECONNREFUSED})
# What may be asked for besides reading, since it changes nothing here.
_HARMLESS_FLAGS = os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK | os.O_NOFOLLOW | getattr(os, "O_LARGEFILE", 0)


def connect(path: StrOrBytesPath = DEFAULT_SOCKET, *, timeout: float | None = DEFAULT_TIMEOUT) -> Client:
    """Connect to the broker and return a client, which the caller should close.

    Args:
        path: the broker's SOCK_SEQPACKET socket.
        timeout: seconds that each request may take, with connecting and
            repeating; None: no limit.

    Raises:
        UnavailableError: the socket is not there, nobody listens, or this user may not connect.
        BrokerTimeoutError: no welcome in time.
        LimitError: the broker has too many connections, or too many of this user.
        ProtocolError: it is no broker, or has no version of the protocol in common.
        ValueError: a time-out that is not above 0.

    """
    deadline = _first_deadline(timeout)
    socket_path = os.fsencode(path)

    def connect_once(until: Deadline) -> Connection:
        return Connection.greet(connect_socket(socket_path, until), until)

    try:
        connection = connect_once(deadline)
    except ConnectionLost as lost:
        raise disconnected(f"the broker closed the connection before its welcome: {lost}") from lost
    return Client(connection, connect_once, timeout, repr(os.fsdecode(path)))


class Client:
    """A connection to the broker, made by `connect` or `Client.from_socket`.

    It may be shared by threads: a lock is held while a request is sent and
    while an answer is waited for, so they take turns. Iterators that it
    returns are for one thread each, but several may be in use at a time. Not
    to be used in a signal handler.

    A client that `connect` made survives a restart of the broker: it connects
    anew and repeats what was not answered, a few times within its time-out.
    In a child after fork it connects anew as well, since the broker knows
    connections by process. One made by `from_socket` can do neither, and
    raises DisconnectedError.

    After a time-out or an error of the protocol the connection is given up;
    the next request opens another one.

    Every descriptor that a method returns is close-on-exec, open for reading
    alone and the caller's to close.
    """

    def __init__(
        self,
        connection: Connection,
        connect_again: Callable[[Deadline], Connection] | None,
        timeout: float | None,
        name: str,
    ) -> None:
        self._connection: Connection | None = connection
        self._connect_again = connect_again
        self._timeout = timeout
        self._name = name
        self._welcome = connection.welcome
        self._lock = threading.Lock()
        self._closed = False
        _clients.add(self)

    @classmethod
    def from_socket(cls, sock: socket.socket, *, timeout: float | None = DEFAULT_TIMEOUT) -> Client:
        """Return a client on a connection that exists: of a socketpair, or inherited.

        The client owns the connection from the call on: `sock` is detached, and
        closed on any error.

        Raises:
            ValueError: not a Unix SOCK_SEQPACKET socket; a time-out that is not above 0.
            DisconnectedError: the other end is closed.
            BrokerError: as `connect`.

        """
        owned = socket.socket(fileno=sock.detach())
        try:
            deadline = _first_deadline(timeout)
            if owned.family != socket.AF_UNIX or owned.type != socket.SOCK_SEQPACKET:
                raise ValueError(f"the client needs a Unix SOCK_SEQPACKET socket, not {owned!r}")
        except BaseException:
            owned.close()
            raise
        # A frame of the full length has to fit, however small the buffer of what was inherited.
        with contextlib.suppress(OSError):
            owned.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * MAX_FRAME)
        try:
            connection = Connection.greet(owned, deadline)
        except ConnectionLost as lost:
            raise disconnected(f"the other end closed the connection before its welcome: {lost}") from lost
        return cls(connection, None, timeout, "a given socket")

    def __repr__(self) -> str:
        """Return where it leads and whether it is closed."""
        return f"<fdbroker.Client of {self._name}{' (closed)' if self._closed else ''}>"

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    @property
    def welcome(self) -> Welcome:
        """What the broker said when it was connected to last: version, identity level, limits."""
        return self._welcome

    @property
    def timeout(self) -> float | None:
        """Seconds that each request may take; None: no limit."""
        return self._timeout

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def close(self) -> None:
        """Close the connection, after the request that another thread may be waiting for.

        Files that were given stay open. May be called again; any other method
        raises ValueError afterwards.
        """
        with self._lock:
            self._closed = True
            self._drop()

    # Files

    def open(self, path: StrOrBytesPath) -> BufferedReader:
        """Return the file as a binary file object, like `open(path, "rb")`. The caller closes it.

        Paths are absolute and name what the *broker* sees under them.

        Raises:
            DeniedError: a PermissionError: the policy does not allow it.
            MissingError: a FileNotFoundError: allowed, and not there.
            NotDirectoryError, DirectoryError: as NotADirectoryError, IsADirectoryError.
            PathInvalidError: a ValueError too: relative, a NUL, `..` and the like.
            BusyError, LimitError: a BlockingIOError: try again.
            BrokerTimeoutError: a TimeoutError.
            UnavailableError, DisconnectedError, ProtocolError: a ConnectionError: not about the file at all.
            BrokerError: any other reason; and the base of all of these.

        """
        return file_from(self.open_descriptor(path), path)

    def open_descriptor(self, path: StrOrBytesPath) -> int:
        """Return the file as a descriptor, which the caller has to close. Raises as `open` does."""
        asked = sendable(path)
        answer = self._ask(OpenPaths([asked]))
        if answer.descriptors:  # one for each that is given, and one was asked for
            return answer.descriptors.take()
        raise _error_of(answer, 0, asked)

    def read_bytes(self, path: StrOrBytesPath) -> bytes:
        """Return all that is in the file, as `pathlib.Path.read_bytes`; for files that fit into memory.

        Raises:
            OSError: reading failed. Otherwise as `open`.

        """
        descriptor = self.open_descriptor(path)
        try:
            parts = []
            while data := os.read(descriptor, _READ_SIZE):
                parts.append(data)
            return b"".join(parts)
        finally:
            os.close(descriptor)

    def opener(self, path: StrOrBytesPath, flags: int) -> int:
        """Open for the built-in: `open(path, "rb", opener=client.opener)`, text modes as well.

        Returns a descriptor, which the caller (that is, `open`) owns.

        Raises:
            ReadOnlyError: a PermissionError: a mode that writes, creates or truncates.
            BrokerError: as `open`.

        """
        if flags & ~_HARMLESS_FLAGS:
            asked = os.fsencode(path)
            text = "the broker opens files for reading only; use mode 'r' or 'rb'"
            raise ReadOnlyError(errno.EACCES, text, asked)
        return self.open_descriptor(path)

    def open_many(self, paths: Iterable[StrOrBytesPath], batch: int = DEFAULT_BATCH) -> Results[OpenedFile]:
        """Open many files with few messages; one result per path, in order, each a file or its error.

            with client.open_many(paths) as results:
                for result in results:
                    if result.error is None:
                        with result.file as file: ...

        A path that is refused does not stop the others. `paths` is read as
        needed, up to two batches ahead of what was delivered; at any time at
        most two batches of descriptors are under way or wait to be delivered.
        Close the iterator if you leave it early (`with` does).

        Args:
            paths: absolute paths; what can't be sent gets its error, too.
            batch: paths per message, 1 to 253; the broker's limits may make it less.

        Raises:
            TypeError: a single path instead of many.
            ValueError: `batch` is out of range.
            BrokerError: when iterated: there is no more to come (BrokerTimeoutError, UnavailableError,
                DisconnectedError, ProtocolError, TooManyFilesError). What was received was delivered before.

        """
        _check_many(paths, batch)
        return Results(self._many(paths, batch, OpenPaths, _opened))

    def stat(self, path: StrOrBytesPath) -> FileStat:
        """Return the stat record of any kind of file; a symbolic link's own. Raises as `open` does."""
        asked = sendable(path)
        answer = self._ask(StatPaths([asked]))
        if isinstance(answer.reply, StatReply):
            facts = answer.reply.results[0][1]
            if facts is not None:
                return facts
        raise _error_of(answer, 0, asked)

    def stat_many(self, paths: Iterable[StrOrBytesPath], batch: int = MAX_PATHS) -> Results[DescribedFile]:
        """Describe many files with few messages; otherwise as `open_many`."""
        _check_many(paths, batch)
        return Results(self._many(paths, batch, StatPaths, _described))

    def status(self) -> dict[str, object]:
        """Return how the broker sees this connection: its policy's generation, the peer's ids, and more.

        Keys may be added in later versions.

        Raises:
            BrokerError: as `open`.

        """
        reply = self._ask(AskStatus()).reply
        if isinstance(reply, ErrorReply):
            raise error_of_reply(reply)
        try:
            document = json.loads(reply.document) if isinstance(reply, StatusReply) else None
        except (ValueError, RecursionError) as error:
            raise protocol_error(f"a status that is not JSON: {error}", reply.id) from error
        if not isinstance(document, dict):
            raise protocol_error("a status that is no JSON object", reply.id)
        return document

    # The name hides the built-in one in annotations of this class: no `list[...]` in them.
    def list(self, path: StrOrBytesPath, *, page: int = 0) -> Iterator[ListEntry]:
        """Return the entries of a directory that the policy lets this client see, in no order.

        The first page is fetched at once, so that a refusal is raised here; the
        others as the iterator gets there. Names that come or go meanwhile may
        be seen or not, as with readdir(3).

        Args:
            path: an absolute path.
            page: most entries to fetch at a time, up to 1,024; 0: as the broker likes.

        Raises:
            ValueError: `page` is out of range.
            NotDirectoryError: it is no directory.
            BrokerError: as `open`; from the iterator as well.

        """
        asked = sendable(path)
        return self._entries(asked, self._page(asked, 0, page), page)

    def _entries(self, path: bytes, first: ListReply, most: int) -> Generator[ListEntry, None, None]:
        reply = first
        yield from reply.entries
        while not reply.last:
            reply = self._page(path, reply.cookie, most)
            yield from reply.entries

    def _page(self, path: bytes, cookie: int, most: int) -> ListReply:
        answer = self._ask(ListPage(path, cookie, most))
        if isinstance(answer.reply, ListReply) and answer.reply.result is GIVEN:
            return answer.reply
        raise _error_of(answer, 0, path)

    # One question, and many

    def _ask(self, question: Question) -> Answer:
        call = Call(question)
        deadline = self._take_turn()
        try:
            return self._collect(call, deadline)
        except BaseException:
            call.abandon()
            raise
        finally:
            self._lock.release()

    def _many(
        self,
        paths: Iterable[StrOrBytesPath],
        batch: int,
        ask: type[OpenPaths | StatPaths],
        deliver: Callable[[Batch, Answer | None], Generator[_Result, None, None]],
    ) -> Generator[_Result, None, None]:
        """Yield what `deliver` makes of each path; while a batch is delivered the next one is under way.

        The lock is not held while this is suspended, so whoever iterates may use the client.
        """
        waiting = batches(paths, batch, self._limits)
        calls: deque[tuple[Batch, Call | None]] = deque()
        try:
            failure = self._start_next(waiting, ask, calls)
            while calls:
                asked, call = calls[0]
                answer = None if call is None else self._finish(call)
                calls.popleft()
                with contextlib.nullcontext() if answer is None else answer.descriptors:
                    # An error there must not take away what has come already.
                    failure = failure or self._start_next(waiting, ask, calls)
                    yield from deliver(asked, answer)
            if failure is not None:
                raise failure
        finally:
            for _, call in calls:
                if call is not None:
                    call.abandon()

    def _start_next(
        self,
        waiting: Iterator[Batch],
        ask: type[OpenPaths | StatPaths],
        calls: deque[tuple[Batch, Call | None]],
    ) -> Exception | None:
        """Send the next batch and append it to `calls`; return the error of that, or of the paths."""
        try:
            asked = next(waiting, None)
            if asked is None:
                return None
            call = Call(ask(asked.paths)) if asked.paths else None
            if call is not None:
                deadline = self._take_turn()
                try:
                    self._send_ahead(call, deadline)
                finally:
                    self._lock.release()
            calls.append((asked, call))
        except Exception as error:  # noqa: BLE001 - raised by the caller, when it is its turn
            return error
        return None

    def _finish(self, call: Call) -> Answer:
        deadline = self._take_turn()
        try:
            return self._collect(call, deadline)
        finally:
            self._lock.release()

    def _limits(self) -> Limits:
        """Return what one request may hold, by the last welcome."""
        said = self._welcome
        return Limits(max(1, min(said.max_paths, said.in_flight)), said.max_frame)

    # Connections: all of this with the lock held

    def _take_turn(self) -> Deadline:
        """Take the lock, which the caller releases, and return the deadline of what it does."""
        deadline = Deadline.after(self._timeout)
        if not self._lock.acquire(timeout=-1 if self._timeout is None else self._timeout):
            raise timed_out(deadline.seconds, "another thread's request was not answered")
        if self._closed:
            self._lock.release()
            raise ValueError("the client is closed")
        return deadline

    def _send_ahead(self, call: Call, deadline: Deadline) -> None:
        """Send if there is a connection; `_collect` does what is left to do."""
        if self._connection is None:
            return
        try:
            self._connection.send(call, deadline)
        except TooLargeError:
            return
        except ConnectionLost:
            self._drop()
        except BrokerError:
            self._drop()
            raise

    def _collect(self, call: Call, deadline: Deadline) -> Answer:
        """Return the answer, after sending the question (again) as needed."""
        while call.answer is None:
            try:
                if call.connection is not None and call.connection is self._connection:
                    call.connection.receive(deadline)
                else:
                    if call.connection is not None:
                        self._count_loss(call, "the connection was given up meanwhile")
                    self._connected(deadline).send(call, deadline)
            except ConnectionLost as lost:
                self._drop()
                self._count_loss(call, str(lost), lost)
            except BrokerError:
                # Whatever it was, a late answer could come on this connection.
                self._drop()
                raise
            except TooLargeError as error:
                raise disconnected(f"the broker was restarted with other limits: {error}") from error
        answer, call.answer = call.answer, None
        return answer

    def _count_loss(self, call: Call, how: str, lost: ConnectionLost | None = None) -> None:
        call.connection = None
        call.losses += 1
        if self._connect_again is None:
            raise disconnected(f"the connection ended, and it was not made by connect(): {how}") from lost
        if call.losses > _MOST_LOSSES:
            text = f"the broker closed {call.losses} connections without answering this request: {how}"
            raise disconnected(text) from lost

    def _connected(self, deadline: Deadline) -> Connection:
        """Return the connection, a new one if there is none."""
        if self._connection is None:
            if self._connect_again is None:
                raise disconnected("the connection has ended, and it was not made by connect()")
            self._connection = _reconnect(self._connect_again, deadline)
            self._welcome = self._connection.welcome
        return self._connection

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _forked(self) -> None:
        """In the child: let go of the parent's connection, and of a lock that a thread of it may hold."""
        self._lock = threading.Lock()
        self._drop()


def _reconnect(connect_again: Callable[[Deadline], Connection], deadline: Deadline) -> Connection:
    last: Exception | None = None
    for pause in _PAUSES:
        left = deadline.left()
        if left is not None and left <= pause:
            break
        time.sleep(pause)
        try:
            return connect_again(deadline)
        except UnavailableError as error:
            if error.errno not in _MAY_COME_BACK:
                raise
            last = error
        except ConnectionLost as lost:
            last = disconnected(f"the broker closed the connection before its welcome: {lost}")
    raise last or timed_out(deadline.seconds, "the broker did not come back")


def _check_many(paths: object, batch: int) -> None:
    if isinstance(paths, str | bytes):
        raise TypeError(f"many paths are wanted, not one: {paths!r}")
    if not 1 <= batch <= MAX_PATHS:
        raise ValueError(f"a batch has 1 to {MAX_PATHS} paths, not {batch}")


def _error_of(answer: Answer, at: int, path: bytes) -> BrokerError:
    """Return the exception for what was not given: the whole request's, or that of its result `at`."""
    reply = answer.reply
    if isinstance(reply, ErrorReply):
        return error_of_reply(reply, path)
    if isinstance(reply, StatReply):
        result = reply.results[at][0]
    elif isinstance(reply, ListReply):
        result = reply.result
    else:
        assert isinstance(reply, OpenReply)  # noqa: S101 - for the type checker; the engine matched it
        result = reply.results[at]
    return error_of_result(result, path, answer.id)


def _opened(asked: Batch, answer: Answer | None) -> Generator[OpenedFile, None, None]:
    if answer is not None and len(answer.descriptors) == len(asked.given):
        # As it mostly is: all were given.
        take = answer.descriptors.take
        for given in asked.given:
            yield OpenedFile(given, take())
        return
    reply = None if answer is None else answer.reply
    results = reply.results if isinstance(reply, OpenReply) else None
    at = 0
    for place, given in enumerate(asked.given):
        if answer is None or place in asked.errors:
            yield OpenedFile(given, error=asked.errors[place])
            continue
        if results is not None and results[at] is GIVEN:
            yield OpenedFile(given, answer.descriptors.take())
        else:
            yield OpenedFile(given, error=_error_of(answer, at, asked.paths[at]))
        at += 1


def _described(asked: Batch, answer: Answer | None) -> Generator[DescribedFile, None, None]:
    reply = None if answer is None else answer.reply
    results = reply.results if isinstance(reply, StatReply) else None
    at = 0
    for place, given in enumerate(asked.given):
        if answer is None or place in asked.errors:
            yield DescribedFile(given, error=asked.errors[place])
            continue
        facts = None if results is None else results[at][1]
        error = None if facts is not None else _error_of(answer, at, asked.paths[at])
        yield DescribedFile(given, facts, error)
        at += 1


def _first_deadline(timeout: float | None) -> Deadline:
    if timeout is not None and not 0 < timeout <= _LONGEST_TIMEOUT:
        raise ValueError(
            f"a time-out is None or above 0 and at most {_LONGEST_TIMEOUT} seconds, not {timeout}"
        )
    return Deadline.after(timeout)


# Those that a child after fork would otherwise share with its parent.
_clients: weakref.WeakSet[Client] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for client in tuple(_clients):
        client._forked()  # noqa: SLF001 - a part of the class that can't be a method


os.register_at_fork(after_in_child=_after_fork_in_child)
