"""What a client has to do with connections, for asyncio: asking, and going on with another one."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import os
import weakref
from collections import deque
from typing import TYPE_CHECKING, TypeVar

from fdbroker.aio.link import WatchedLink, waking
from fdbroker.client.answers import limits_of
from fdbroker.client.engine import TooLargeError, batches
from fdbroker.client.errors import BrokerError, UnavailableError, disconnected, timed_out
from fdbroker.client.link import Call, ConnectionLost, Deadline
from fdbroker.client.session import count_loss, may_come_back, pauses

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterable

    from fdbroker.client.engine import Answer, Batch, OpenPaths, Question, StatPaths, StrOrBytesPath
    from fdbroker.client.link import Link
    from fdbroker.client.walk_call import WalkCall
    from fdbroker.wire.messages import Welcome

_Result = TypeVar("_Result")


class Session:
    """Asks the questions of one client, and of those that it acts for; any number of tasks at a time."""

    def __init__(
        self,
        link: WatchedLink,
        connect_again: Callable[[Deadline], Awaitable[WatchedLink]] | None,
        timeout: float | None,
        name: str,
    ) -> None:
        self._link = link
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
        if consumed and link.ended is None and call.link is link:
            link.queue_more(call, consumed)
            link.send_queued()
        return await self._collect(call)

    def send_afterthoughts(self) -> None:
        """Tell the broker what is not wanted any more."""
        self._link.send_afterthoughts()

    def check_bound(self, call: Call) -> None:
        """Raise what ended the connection on which a call was sent, if it has ended; ValueError if closed."""
        self._check_open()
        link = self._link
        if call.link is link and link.ended is None:
            return
        why = link.ended if call.link is link else None
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
                self._lost(call, call.link)
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

    async def _wait(self, call: Call, link: WatchedLink, deadline: Deadline) -> None:
        """Wait until `call` has an answer, or its connection has ended."""
        heard = link.heard
        with waking(link.loop, deadline) as (came, wake):
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

    def _lost(self, call: Call, link: Link) -> None:
        """Raise what ended the connection on which a call was sent, if it was an error; or count the loss."""
        call.link = None
        why = link.ended if isinstance(link, WatchedLink) else None
        if isinstance(why, BrokerError):
            raise copy.copy(why) from why
        count_loss(call, str(why), why, final=self._connect_again is None)

    def _live(self) -> WatchedLink | None:
        """Return the connection, None if it has ended.

        Raises:
            RuntimeError: it belongs to another event loop.

        """
        link = self._link
        if link.ended is not None:
            return None
        if link.loop is not asyncio.get_running_loop():
            raise RuntimeError(
                "this client belongs to another event loop: each needs one of its own, made by connect()"
            )
        return link

    async def _connected(self, deadline: Deadline) -> WatchedLink:
        """Return the connection, a new one if there is none."""
        link = self._live()
        if link is not None:
            return link
        connect_again = self._connect_again
        if connect_again is None:
            raise disconnected("the connection has ended, and it was not made by connect()")

        async def unless_closed(deadline: Deadline) -> WatchedLink:
            self._check_open()
            return await connect_again(deadline)

        try:
            async with asyncio.timeout(deadline.left()), self._connecting:
                link = self._live()
                if link is None:
                    link = await reconnect(unless_closed, deadline)
                    self._link, self.welcome = link, link.welcome
                return link
        except TimeoutError as late:
            if isinstance(late, BrokerError):
                raise
            raise timed_out(deadline.seconds, "the broker did not come back") from late

    def _forked(self) -> None:
        """In the child: let go of the parent's connection, and of a lock that a task of it may hold."""
        self._connecting = asyncio.Lock()
        self._link.let_go()


async def reconnect(
    connect_again: Callable[[Deadline], Awaitable[WatchedLink]], deadline: Deadline
) -> WatchedLink:
    """Return a connection to a broker that was there a moment ago, and may be one that is being restarted.

    Raises:
        BrokerError: it does not come back.

    """
    last: Exception | None = None
    for pause in pauses(deadline):
        await asyncio.sleep(pause)
        try:
            return await connect_again(deadline)
        except (UnavailableError, ConnectionLost) as error:
            last = may_come_back(error)
    raise last or timed_out(deadline.seconds, "the broker did not come back")


# Those that a child after fork would otherwise share with its parent.
_sessions: weakref.WeakSet[Session] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for session in tuple(_sessions):
        session._forked()  # noqa: SLF001 - a part of the class that can't be a method


os.register_at_fork(after_in_child=_after_fork_in_child)
