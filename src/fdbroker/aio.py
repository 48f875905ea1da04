"""The client for asyncio: what `fdbroker.connect` gives, with `await`.

    from fdbroker import aio

    async with await aio.connect() as client:
        with await client.open("/var/log/syslog") as file:
            ...

Any number of tasks may share a client: what they ask is sent at once and
answered in any order. There are no threads: the event loop watches one socket
that never blocks. What it cannot watch is reading a regular file, which waits
for the disk as it does anywhere.

Cancelling is safe: a file that comes for a task that is not there any more is
closed, and a walk that is left is cancelled at the broker.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import os
import time
import weakref
from collections import deque
from typing import TYPE_CHECKING, Generic, TypeVar

from fdbroker.client.answers import (
    Contents,
    check_many,
    check_served,
    content_of,
    described,
    descriptor_of,
    limits_of,
    opened,
    page_of,
    stat_of,
    status_of,
)
from fdbroker.client.blocking import DEFAULT_SOCKET, DEFAULT_TIMEOUT
from fdbroker.client.engine import (
    DEFAULT_BATCH,
    DEFAULT_WALK_BATCH,
    AskStatus,
    ListPage,
    OpenPaths,
    State,
    StatPaths,
    TooLargeError,
    batches,
    sendable,
)
from fdbroker.client.errors import (
    BrokerError,
    DisconnectedError,
    UnavailableError,
    disconnected,
    timed_out,
)
from fdbroker.client.link import (
    Call,
    ConnectionLost,
    Deadline,
    Link,
    adopt_socket,
    connect_socket_at_once,
    not_accepted,
    telling_the_sender,
)
from fdbroker.client.results import file_from
from fdbroker.client.sealed import SEAL_LIMIT, seal_in_steps
from fdbroker.client.serving import ServeCall, accepted_by
from fdbroker.client.session import MAY_COME_BACK, MOST_LOSSES, PAUSES
from fdbroker.client.walking import WalkCall, walk_filter
from fdbroker.wire.format import MAX_PATHS, WalkKind

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator, Iterable
    from io import BufferedReader
    from types import TracebackType
    from typing import Self

    from fdbroker.client.engine import Answer, Batch, Question, StrOrBytesPath
    from fdbroker.client.results import DescribedFile, OpenedFile, ReadFile, WalkedFile
    from fdbroker.wire.messages import AcceptedClient, FileStat, ListEntry, WalkEnd, Welcome

__all__ = [
    "DEFAULT_SOCKET",
    "DEFAULT_TIMEOUT",
    "Client",
    "Results",
    "ServedClient",
    "Service",
    "Walk",
    "connect",
]

_Result = TypeVar("_Result")
_MOST_AT_ONCE = 16  # frames that are received before other tasks get their turn
_FULL_QUEUE_PAUSE = 0.01  # seconds; nothing tells when a listener's queue has room


async def connect(
    path: StrOrBytesPath = DEFAULT_SOCKET,
    *,
    timeout: float | None = DEFAULT_TIMEOUT,  # noqa: ASYNC109 - it holds for each later request
) -> Client:
    """Connect to the broker and return a client, which the caller should close.

    Args and errors are those of `fdbroker.connect`.
    """
    deadline = Deadline.first(timeout)
    socket_path = os.fsencode(path)

    async def connect_once(until: Deadline) -> _WatchedLink:
        return await _WatchedLink.greet(await _connect_socket(socket_path, until), until)

    try:
        link = await connect_once(deadline)
    except ConnectionLost as lost:
        raise disconnected(f"the broker closed the connection before its welcome: {lost}") from lost
    return Client(_Session(link, connect_once, timeout, repr(os.fsdecode(path))))


class _Requests:
    """Requests about files. Base of `Client` and `ServedClient`; see `fdbroker.client.files`."""

    _acting_for: int | None = None
    _bound: Link | None = None

    @property
    def _session(self) -> _Session:
        """Who asks. Raises ValueError if that is over."""
        raise NotImplementedError

    async def open(
        self, path: StrOrBytesPath, *, sealed: bool = False, max_size: int = SEAL_LIMIT
    ) -> BufferedReader:
        """Return the file as a binary file object. The caller closes it. As `fdbroker.Client.open`.

        While a sealed copy is made, other tasks run after each MiB.
        """
        timeout = self._session.timeout
        until = None if timeout is None else time.monotonic() + timeout
        descriptor = await self.open_descriptor(path)
        if not sealed:
            return file_from(descriptor, path)
        try:
            with contextlib.closing(seal_in_steps(descriptor, max_size, until, os.fsencode(path))) as steps:
                while True:
                    try:
                        pause = next(steps)
                    except StopIteration as end:
                        return file_from(end.value, path)
                    await asyncio.sleep(pause)
        finally:
            os.close(descriptor)

    async def open_descriptor(self, path: StrOrBytesPath) -> int:
        """Return the file as a descriptor, which the caller has to close. Raises as `open`."""
        asked = sendable(path)
        return descriptor_of(
            await self._session.ask(OpenPaths([asked], self._acting_for), self._bound), asked
        )

    async def read_bytes(self, path: StrOrBytesPath) -> bytes:
        """Return all that is in the file. As `fdbroker.Client.read_bytes`."""
        asked = sendable(path)
        question = OpenPaths([asked], self._acting_for, copy=True)
        return content_of(await self._session.ask(question, self._bound), asked)

    def open_many(self, paths: Iterable[StrOrBytesPath], batch: int = DEFAULT_BATCH) -> Results[OpenedFile]:
        """Open many files with few messages. As `fdbroker.Client.open_many`, by `async for`."""
        check_many(paths, batch)

        async def deliver(asked: Batch, answer: Answer | None) -> Generator[OpenedFile, None, None]:
            return opened(asked, answer)

        return Results(self._session.ask_many(paths, batch, self._open_paths, deliver, self._bound))

    def read_many(self, paths: Iterable[StrOrBytesPath], batch: int = DEFAULT_BATCH) -> Results[ReadFile]:
        """Read many files with few messages. As `fdbroker.Client.read_many`, by `async for`."""
        check_many(paths, batch)
        return Results(self._session.ask_many(paths, batch, self._read_paths, self._read_all_of, self._bound))

    async def stat(self, path: StrOrBytesPath) -> FileStat:
        """Return the stat record of any kind of file; a symbolic link's own. Raises as `open`."""
        asked = sendable(path)
        return stat_of(await self._session.ask(StatPaths([asked], self._acting_for), self._bound), asked)

    def stat_many(self, paths: Iterable[StrOrBytesPath], batch: int = MAX_PATHS) -> Results[DescribedFile]:
        """Describe many files with few messages; otherwise as `open_many`."""
        check_many(paths, batch)

        async def deliver(asked: Batch, answer: Answer | None) -> Generator[DescribedFile, None, None]:
            return described(asked, answer)

        return Results(self._session.ask_many(paths, batch, self._stat_paths, deliver, self._bound))

    def walk(  # noqa: PLR0913 - each filter is one
        self,
        path: StrOrBytesPath,
        *,
        globs: Iterable[str | bytes] = (),
        kinds: WalkKind = WalkKind.REGULAR,
        least_size: int = 0,
        most_size: int | None = None,
        newer_than: int | None = None,
        descriptors: bool = True,
        batch: int = DEFAULT_WALK_BATCH,
        ahead: int = 2,
    ) -> Walk:
        """Go through everything below a directory. As `fdbroker.Client.walk`, by `async for`.

        A consumer that is slow has at most `ahead` batches of descriptors waiting for it.
        """
        asked = walk_filter(globs, kinds, least_size, most_size, newer_than)
        call = WalkCall(
            path,
            asked,
            descriptors=descriptors,
            batch=batch,
            ahead=ahead,
            acting_for=self._acting_for,
            bound=self._bound,
        )
        return Walk(self._session, call)

    # The name hides the built-in one in annotations of this class: no `list[...]` in them.
    async def list(self, path: StrOrBytesPath, *, page: int = 0) -> AsyncGenerator[ListEntry, None]:
        """Yield the entries of a directory. As `fdbroker.Client.list`; a refusal comes with the first."""
        asked = sendable(path)
        cookie, last = 0, False
        while not last:
            question = ListPage(asked, cookie, page, self._acting_for)
            reply = page_of(await self._session.ask(question, self._bound), asked)
            for entry in reply.entries:
                yield entry
            cookie, last = reply.cookie, reply.last

    def _open_paths(self, asked: Batch) -> OpenPaths:
        return OpenPaths(asked.paths, self._acting_for)

    def _read_paths(self, asked: Batch) -> OpenPaths:
        return OpenPaths(asked.paths, self._acting_for, copy=True)

    def _stat_paths(self, asked: Batch) -> StatPaths:
        return StatPaths(asked.paths, self._acting_for)

    async def _read_all_of(self, asked: Batch, answer: Answer | None) -> Generator[ReadFile, None, None]:
        contents = Contents(asked)
        try:
            if answer is not None:
                contents.take(answer)
            while paths := contents.missing():
                question = OpenPaths(paths, self._acting_for, copy=True)
                contents.take(await self._session.ask(question, self._bound))
        except BaseException:
            contents.close()
            raise
        return contents.results()


class Client(_Requests):
    """A connection to the broker, made by `connect` or `Client.from_socket`; for one event loop.

    It survives a restart of the broker as `fdbroker.Client` does. After a fork the child's client connects
    anew, with the child's own event loop; one made by `from_socket` can do neither.

    An error of the protocol ends the connection for all tasks that wait on it; after a time-out it is
    given up if nothing came on it meanwhile. The next request opens another one.
    """

    def __init__(self, session: _Session) -> None:
        self._asks = session

    @classmethod
    async def from_socket(
        cls,
        sock: socket.socket,
        *,
        timeout: float | None = DEFAULT_TIMEOUT,  # noqa: ASYNC109 - it holds for each later request
    ) -> Client:
        """Return a client on a connection that exists. As `fdbroker.Client.from_socket`."""
        owned = adopt_socket(sock)
        try:
            deadline = Deadline.first(timeout)
        except ValueError:
            owned.close()
            raise
        try:
            link = await _WatchedLink.greet(owned, deadline)
        except ConnectionLost as lost:
            raise disconnected(f"the other end closed the connection before its welcome: {lost}") from lost
        return cls(_Session(link, None, timeout, "a given socket"))

    def __repr__(self) -> str:
        """Return where it leads and whether it is closed."""
        return f"<fdbroker.aio.Client of {self._asks.name}{' (closed)' if self.closed else ''}>"

    async def __aenter__(self) -> Self:
        """Return itself."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    @property
    def welcome(self) -> Welcome:
        """What the broker said when it was connected to last: version, identity level, limits."""
        return self._asks.welcome

    @property
    def timeout(self) -> float | None:
        """Seconds that each request may take; None: no limit."""
        return self._asks.timeout

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._asks.closed

    def close(self) -> None:
        """Close the connection; tasks that wait for an answer get ValueError, as does any later request.

        Files that were given stay open. May be called again.
        """
        self._asks.close()

    async def status(self) -> dict[str, object]:
        """Return how the broker sees this connection. As `fdbroker.Client.status`."""
        return status_of(await self._asks.ask(AskStatus()))

    async def serve(self, listener: str) -> Service:
        """Serve the clients of one of the broker's listeners. As `fdbroker.Client.serve`."""
        name = listener.encode()
        call = ServeCall(name)
        check_served(await self._asks.ask_by(call), name)
        call.bound = call.link
        return Service(self._asks, call, listener)

    @property
    def _session(self) -> _Session:
        return self._asks


class Results(Generic[_Result]):
    """Results one after the other, in the order of the paths; an async iterator that should be closed.

    `aclose` (or the end of an `async with` block) closes the descriptors that
    were not delivered. Delivered ones belong to their results. For one task at a time.
    """

    def __init__(self, steps: AsyncGenerator[_Result, None]) -> None:
        self._steps = steps

    def __aiter__(self) -> AsyncIterator[_Result]:
        """Return what a loop asks."""
        return self._steps

    async def __anext__(self) -> _Result:
        """Return the next result.

        Raises:
            BrokerError: the request as a whole failed. Then there are no more.

        """
        return await anext(self._steps)

    async def __aenter__(self) -> Self:
        """Return itself."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        await self.aclose()

    async def aclose(self) -> None:
        """End it: nothing more is asked for, and what was not delivered is closed."""
        await self._steps.aclose()


class Walk:
    """What is below a directory, one entry after the other; an async iterator that should be closed.

    As `fdbroker.client.Walk`: `aclose`, the end of an `async with` block, or a task that is cancelled while
    it waits for an entry cancel it at the broker.
    """

    def __init__(self, session: _Session, call: WalkCall) -> None:
        self._session = session
        self._call = call
        self._steps = self._go()

    def __aiter__(self) -> AsyncIterator[WalkedFile]:
        """Return what a loop asks."""
        return self._steps

    async def __anext__(self) -> WalkedFile:
        """Return the next entry.

        Raises:
            WalkInterrupted: the connection was lost, and the walk can't go on.
            BrokerError: the walk was refused, or failed.

        """
        return await anext(self._steps)

    async def __aenter__(self) -> Self:
        """Return itself."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        await self.aclose()

    @property
    def end(self) -> WalkEnd | None:
        """What was named in all and what is missing, once it is exhausted. As `fdbroker.client.Walk.end`."""
        return self._call.end

    @property
    def last(self) -> bytes:
        """The path, relative to the start, of the entry that was delivered last; empty: none was."""
        return self._call.last

    @property
    def resumed(self) -> int:
        """How many times it went on on another connection."""
        return self._call.resumed

    async def aclose(self) -> None:
        """Cancel it, unless it has ended; close what was not delivered. May be called again."""
        await self._steps.aclose()

    async def _go(self) -> AsyncGenerator[WalkedFile, None]:
        call = self._call
        consumed = 0
        try:
            while call.end is None:
                try:
                    answer = await self._session.next_of_walk(call, consumed)
                except (UnavailableError, DisconnectedError) as error:
                    if not call.id:
                        raise  # it never began
                    raise call.interrupted(error) from error
                with answer.descriptors:
                    for entry in call.entries_of(answer):
                        yield entry
                consumed = 1
        finally:
            call.abandon()
            self._session.send_afterthoughts()


class Service:
    """The clients of a listener, as they connect; made by `Client.serve`. As `fdbroker.client.Service`."""

    def __init__(self, session: _Session, call: ServeCall, listener: str) -> None:
        self._session = session
        self._call = call
        self._listener = listener
        self._came = asyncio.Event()
        self._closed = False
        call.wake = self._came.set

    def __repr__(self) -> str:
        """Return which listener it serves."""
        return f"<fdbroker.aio.Service of {self._listener!r}{' (closed)' if self._closed else ''}>"

    async def __aenter__(self) -> Self:
        """Return itself."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    def __del__(self) -> None:
        """Let clients that come be released."""
        self._call.abandon()

    def __aiter__(self) -> Self:
        """Return itself."""
        return self

    async def __anext__(self) -> ServedClient:
        """Wait for the next client and return it; ends when the service is closed. Raises as `accept`."""
        if not self._closed:
            try:
                return await self.accept()
            except ValueError:
                if not self._closed:  # by another task, while this one waited
                    raise
        raise StopAsyncIteration

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    async def accept(self) -> ServedClient:
        """Wait for a client and return it; the caller should close it. May be cancelled: no client is lost.

        Raises:
            DeniedError: a reload of the policy took the right to serve away. Clients that came are served on.
            DisconnectedError: the connection to the broker was lost, and with it the service.
            BrokerError: the broker did not keep to the protocol, or ended the connection with a reason.
            ValueError: the service, or its client, is closed.

        """
        while not self._call.answers:
            if self._closed:
                raise ValueError(f"the service of {self._listener!r} is closed")
            self._session.check_bound(self._call)
            self._came.clear()
            await self._came.wait()
        facts, sock = accepted_by(self._call, os.fsencode(self._listener))
        sock.settimeout(0)
        return ServedClient(self._session, self._call.bound, facts, sock)

    def close(self) -> None:
        """Serve nobody else; clients that still come are released at once. May be called again."""
        self._closed = True
        self._call.abandon()
        self._session.send_afterthoughts()
        self._came.set()


class ServedClient(_Requests):
    """A client of a service, and requests on its behalf. As `fdbroker.client.ServedClient`.

    `socket` does not block: for `loop.sock_recv`, or `asyncio.open_unix_connection(sock=...)`.
    """

    def __init__(
        self, session: _Session, link: Link | None, facts: AcceptedClient, sock: socket.socket
    ) -> None:
        self._asks = session
        self._bound = link
        self._acting_for = facts.number
        self._closed = False
        self.socket = sock
        self.number = facts.number
        self.pid = facts.pid
        self.uid = facts.uid
        self.gid = facts.gid
        self.identity_level = facts.identity_level

    def __repr__(self) -> str:
        """Return who it is."""
        closed = " (closed)" if self._closed else ""
        return f"<fdbroker.aio.ServedClient {self.number}: uid {self.uid}, pid {self.pid}{closed}>"

    async def __aenter__(self) -> Self:
        """Return itself."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    def __del__(self) -> None:
        """Have it released with the next request; the socket closes itself."""
        if not self._closed and self._bound is not None:
            self._bound.release_later(self.number)

    def close(self) -> None:
        """Act for it no more, and close its socket. May be called again."""
        if not self._closed:
            self._closed = True
            self.socket.close()
            if self._bound is not None:
                self._bound.release_later(self.number)
            self._asks.send_afterthoughts()

    @property
    def _session(self) -> _Session:
        if self._closed:
            raise ValueError(f"client {self.number} is closed")
        return self._asks


# Connections


class _WatchedLink(Link):
    """A link whose socket an event loop watches. `ended` is why it is over."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        sock.settimeout(0)
        self.loop = asyncio.get_running_loop()
        self.ended: ConnectionLost | BrokerError | None = None
        # Reads that had something: shows whether the broker is alive.
        self.heard = 0
        self._is_writing = False
        self._greeted: Callable[[], None] | None = None
        self.loop.add_reader(sock, self._read)

    @classmethod
    async def greet(cls, sock: socket.socket, deadline: Deadline) -> _WatchedLink:
        """Take over a connected socket and exchange hello and welcome; the socket is closed on any error.

        Raises:
            ConnectionLost: the broker closed it without a word.
            BrokerError: it was refused, took too long or broke the protocol.

        """
        link = cls(sock)
        try:
            link._queue(link._engine.hello())
            with _waking(link.loop, deadline) as (came, wake):
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
        if self.ended is not None:
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

    def end(self, why: ConnectionLost | BrokerError) -> None:
        """Close it; everybody who waits on it is woken up. May be called again."""
        if self.ended is None:
            self.ended = why
            self.loop.remove_reader(self._sock)
            if self._is_writing:
                self.loop.remove_writer(self._sock)
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
        try:
            for _ in range(_MOST_AT_ONCE):
                if not self.receive():
                    break
                self.heard += 1
        except (ConnectionLost, BrokerError) as why:
            self.end(why)
            return
        self.send_queued()  # clients that came and nobody wants are released
        if self._greeted is not None and self._engine.state is State.READY:
            self._greeted()


async def _connect_socket(path: bytes, deadline: Deadline) -> socket.socket:
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
def _waking(
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


class _Session:
    """Asks the questions of one client, and of those that it acts for; any number of tasks at a time."""

    def __init__(
        self,
        link: _WatchedLink,
        connect_again: Callable[[Deadline], Awaitable[_WatchedLink]] | None,
        timeout: float | None,
        name: str,
    ) -> None:
        self._link: _WatchedLink | None = link
        self._connect_again = connect_again
        self._connecting = asyncio.Lock()
        self.timeout = timeout
        self.name = name
        self.welcome: Welcome = link.welcome
        self.closed = False
        _sessions.add(self)

    def close(self) -> None:
        """Close the connection."""
        self.closed = True
        if self._link is not None:
            self._link.end(ConnectionLost("the client was closed"))

    async def ask(self, question: Question, bound: Link | None = None) -> Answer:
        """Return the answer to a question, which the caller owns. Raises BrokerError, ValueError."""
        return await self.ask_by(Call(question, bound))

    async def ask_by(self, call: Call) -> Answer:
        """Return the first answer to a call."""
        try:
            return await self._collect(call)
        except BaseException:
            call.abandon()
            raise

    async def ask_many(
        self,
        paths: Iterable[StrOrBytesPath],
        batch: int,
        ask: Callable[[Batch], OpenPaths | StatPaths],
        deliver: Callable[[Batch, Answer | None], Awaitable[Generator[_Result, None, None]]],
        bound: Link | None,
    ) -> AsyncGenerator[_Result, None]:
        """Yield what `deliver` makes of each path; while a batch is delivered the next one is under way."""
        waiting = batches(paths, batch, lambda: limits_of(self.welcome))
        calls: deque[tuple[Batch, Call | None]] = deque()
        failure: Exception | None = None

        def start_next() -> None:
            # An error there must not take away what has come already.
            nonlocal failure
            try:
                asked = next(waiting, None)
                if asked is not None and failure is None:
                    call = Call(ask(asked), bound) if asked.paths else None
                    if call is not None:
                        self._send_ahead(call)
                    calls.append((asked, call))
            except Exception as error:  # noqa: BLE001 - raised below, when it is its turn
                failure = error

        try:
            start_next()
            while calls:
                asked, call = calls[0]
                answer = None if call is None else await self._collect(call)
                calls.popleft()
                with contextlib.nullcontext() if answer is None else answer.descriptors:
                    start_next()
                    with contextlib.closing(await deliver(asked, answer)) as results:
                        for result in results:
                            yield result
            if failure is not None:
                raise failure
        finally:
            for _, call in calls:
                if call is not None:
                    call.abandon()

    async def next_of_walk(self, call: WalkCall, consumed: int) -> Answer:
        """Return the next frame of a walk; so many that were delivered make room for others."""
        link = self._link
        if consumed and link is not None and link.ended is None and call.link is link:
            link.queue_more(call, consumed)
            link.send_queued()
        return await self._collect(call)

    def send_afterthoughts(self) -> None:
        """Tell the broker what is not wanted any more."""
        if self._link is not None:
            self._link.send_queued()

    def check_bound(self, call: Call) -> None:
        """Raise what ended the connection on which a call was sent, if it has ended; ValueError if closed."""
        self._check_open()
        link = self._link
        if link is None or call.link is not link or link.ended is not None:
            why = None if link is None or call.link is not link else link.ended
            if isinstance(why, BrokerError):
                raise copy.copy(why) from why
            raise disconnected("the connection was lost by which clients came") from why

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError("the client is closed")

    def _send_ahead(self, call: Call) -> None:
        """Send if there is a connection; `_collect` does what is left to do."""
        link = self._live()
        if link is None or (call.bound is not None and call.bound is not link):
            return
        with contextlib.suppress(TooLargeError):
            link.queue_call(call)
            link.send_queued()

    async def _collect(self, call: Call) -> Answer:
        """Return the next answer, after sending the question (again) as needed."""
        deadline = Deadline.after(self.timeout)
        while not call.answers:
            self._check_open()
            link = self._live()
            if link is not None and call.link is link:
                await self._wait(call, link, deadline)
                continue
            if call.link is not None:
                self._count_loss(call)
            if call.bound is not None and call.bound is not link:
                raise disconnected("the connection has ended on which this was handed over")
            link = await self._connected(deadline)
            call.renew()
            try:
                link.queue_call(call)
            except TooLargeError as error:
                raise disconnected(f"the broker was restarted with other limits: {error}") from error
            link.send_queued()
        return call.answers.pop(0)

    async def _wait(self, call: Call, link: _WatchedLink, deadline: Deadline) -> None:
        """Wait until `call` has an answer, or its connection has ended."""
        heard = link.heard
        with _waking(link.loop, deadline) as (came, wake):
            call.wake = wake
            try:
                await came
            finally:
                call.wake = None
        if call.answers or link.ended is not None:
            return
        late = timed_out(deadline.seconds, "the broker did not answer")
        if link.heard == heard:
            link.end(ConnectionLost("nothing came on it, and it was given up"))
        raise late

    def _count_loss(self, call: Call) -> None:
        link, call.link = call.link, None
        why = link.ended if isinstance(link, _WatchedLink) else None
        if isinstance(why, BrokerError):
            raise copy.copy(why) from why
        call.losses += 1
        if call.bound is not None:
            raise disconnected(f"the connection ended on which this was handed over: {why}") from why
        if self._connect_again is None:
            raise disconnected(f"the connection ended, and it was not made by connect(): {why}") from why
        if call.losses > MOST_LOSSES:
            text = f"the broker closed {call.losses} connections without answering this request: {why}"
            raise disconnected(text) from why

    def _live(self) -> _WatchedLink | None:
        """Return the connection, None if it has ended.

        Raises:
            RuntimeError: it belongs to another event loop.

        """
        link = self._link
        if link is None or link.ended is not None:
            return None
        if link.loop is not asyncio.get_running_loop():
            raise RuntimeError(
                "this client belongs to another event loop: each needs one of its own, made by connect()"
            )
        return link

    async def _connected(self, deadline: Deadline) -> _WatchedLink:
        """Return the connection, a new one if there is none."""
        link = self._live()
        if link is not None:
            return link
        if self._connect_again is None:
            raise disconnected("the connection has ended, and it was not made by connect()")
        try:
            async with asyncio.timeout(deadline.left()), self._connecting:
                link = self._live()
                if link is None:
                    link = await self._reconnect(self._connect_again, deadline)
                    self._link, self.welcome = link, link.welcome
                return link
        except TimeoutError as late:
            if isinstance(late, BrokerError):
                raise
            raise timed_out(deadline.seconds, "the broker did not come back") from late

    async def _reconnect(
        self, connect_again: Callable[[Deadline], Awaitable[_WatchedLink]], deadline: Deadline
    ) -> _WatchedLink:
        last: Exception | None = None
        for pause in PAUSES:
            left = deadline.left()
            if left is not None and left <= pause:
                break
            await asyncio.sleep(pause)
            self._check_open()
            try:
                return await connect_again(deadline)
            except UnavailableError as error:
                if error.errno not in MAY_COME_BACK:
                    raise
                last = error
            except ConnectionLost as lost:
                last = disconnected(f"the broker closed the connection before its welcome: {lost}")
        raise last or timed_out(deadline.seconds, "the broker did not come back")

    def _forked(self) -> None:
        """In the child: let go of the parent's connection, and of a lock that a task of it may hold."""
        self._connecting = asyncio.Lock()
        if self._link is not None:
            self._link.let_go()


# Those that a child after fork would otherwise share with its parent.
_sessions: weakref.WeakSet[_Session] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for session in tuple(_sessions):
        session._forked()  # noqa: SLF001 - a part of the class that can't be a method


os.register_at_fork(after_in_child=_after_fork_in_child)
