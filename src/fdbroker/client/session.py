"""What a blocking client has behind it: a connection, another one when it is lost, and whose turn it is."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
import weakref
from collections import deque
from typing import TYPE_CHECKING, TypeVar

from fdbroker.client.answers import limits_of
from fdbroker.client.engine import TooLargeError, batches
from fdbroker.client.errors import BrokerError, UnavailableError, disconnected, timed_out
from fdbroker.client.link import Call, ConnectionLost, Deadline, not_greeted

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator

    from fdbroker.client.connection import Connection
    from fdbroker.client.engine import Answer, Batch, Limits, OpenPaths, Question, StatPaths, StrOrBytesPath
    from fdbroker.client.link import Link
    from fdbroker.client.walk_call import WalkCall
    from fdbroker.wire.messages import Welcome

_Result = TypeVar("_Result")

# Connections that one request may be lost with: a request that kills the broker must not go on doing so.
_MOST_LOSSES = 3
# Seconds before each try to connect again: a broker that is restarted by hand has no socket for a moment.
PAUSES = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8)
_MAY_COME_BACK = frozenset({errno.ENOENT, errno.ECONNREFUSED})


class Session:
    """Asks the questions of one client, and of those that it acts for. May be shared by threads.

    Made with a greeted connection, which it owns. `connect_again` makes
    another one; None: it can't be replaced. In a child after fork the
    parent's connection is let go of.
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
        self._lock = threading.Lock()
        self.timeout = timeout
        self.name = name
        # What the broker said when it was connected to last.
        self.welcome: Welcome = connection.welcome
        self.closed = False
        _sessions.add(self)

    def close(self) -> None:
        """Close the connection, after the request that another thread may be waiting for."""
        with self._lock:
            self.closed = True
            self._drop()

    def ask(self, question: Question, bound: Link | None = None) -> Answer:
        """Return the answer to a question, which the caller owns.

        `bound`: the one connection on which it means anything.

        Raises:
            BrokerError: there is none.
            ValueError: the client is closed.

        """
        return self.ask_by(Call(question, bound))

    def ask_by(self, call: Call) -> Answer:
        """Return the first answer to a call. Raises as `ask`."""
        began = self._take_turn()
        try:
            return self._collect(call, began)
        except BaseException:
            call.abandon()
            raise
        finally:
            self._lock.release()

    def ask_many(
        self,
        paths: Iterable[StrOrBytesPath],
        batch: int,
        ask: Callable[[Batch], OpenPaths | StatPaths],
        deliver: Callable[[Batch, Answer | None], Generator[_Result, None, None]],
        bound: Link | None = None,
    ) -> Generator[_Result, None, None]:
        """Yield what `deliver` makes of each path; while a batch is delivered the next one is under way.

        The lock is not held while this is suspended, so whoever iterates may use the client.
        """
        waiting = batches(paths, batch, self._limits)
        calls: deque[tuple[Batch, Call | None]] = deque()
        try:
            failure = self._start_next(waiting, ask, calls, bound)
            while calls:
                asked, call = calls[0]
                answer = None if call is None else self._finish(call)
                calls.popleft()
                with contextlib.nullcontext() if answer is None else answer.descriptors:
                    # An error there must not take away what has come already.
                    failure = failure or self._start_next(waiting, ask, calls, bound)
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
        ask: Callable[[Batch], OpenPaths | StatPaths],
        calls: deque[tuple[Batch, Call | None]],
        bound: Link | None,
    ) -> Exception | None:
        """Send the next batch and append it to `calls`; return the error of that, or of the paths."""
        try:
            asked = next(waiting, None)
            if asked is None:
                return None
            call = Call(ask(asked), bound) if asked.paths else None
            if call is not None:
                began = self._take_turn()
                try:
                    self._send_ahead(call, self._deadline(began))
                finally:
                    self._lock.release()
            calls.append((asked, call))
        except Exception as error:  # noqa: BLE001 - raised by the caller, when it is its turn
            return error
        return None

    def _finish(self, call: Call) -> Answer:
        began = self._take_turn()
        try:
            return self._collect(call, began)
        finally:
            self._lock.release()

    def _limits(self) -> Limits:
        """Return what one request may hold, by the last welcome."""
        return limits_of(self.welcome)

    # Walks and services

    def next_of_walk(self, call: WalkCall, consumed: int) -> Answer:
        """Return the next frame of a walk; so many that were delivered make room for others.

        Raises:
            BrokerError: as `ask`.

        """
        began = self._take_turn()
        try:
            connection = self._connection
            if consumed and connection is not None and call.link is connection:
                try:
                    connection.queue_more(call, consumed)
                    connection.send_queued(self._deadline(began))
                except ConnectionLost:
                    self._drop()
                except BrokerError:
                    self._drop()
                    raise
            return self._collect(call, began)
        finally:
            self._lock.release()

    def send_afterthoughts(self) -> None:
        """Tell the broker what is not wanted any more: at once if that needs no waiting, or later."""
        if not self._lock.acquire(blocking=False):
            return
        try:
            if self._connection is not None:
                self._connection.flush()
        except (ConnectionLost, BrokerError):
            self._drop()
        finally:
            self._lock.release()

    def connection_of(self, call: Call) -> Connection | None:
        """Return the connection on which a call was sent, None if that has ended.

        Raises:
            ValueError: the client is closed.

        """
        if self.closed:
            raise ValueError("the client is closed")
        connection = self._connection
        return connection if connection is not None and call.link is connection else None

    def receive_if_ready(self, connection: Connection) -> None:
        """Receive what is there, if the connection is still in use. Raises BrokerError as `ask`."""
        with self._lock:
            if self._connection is not connection:
                return
            try:
                connection.receive_if_ready()
            except ConnectionLost:
                self._drop()
            except BrokerError:
                self._drop()
                raise

    # Connections: all of this with the lock held

    def _take_turn(self) -> float:
        """Take the lock, which the caller releases; return when its time began (monotonic clock)."""
        began = time.monotonic()
        timeout = self.timeout
        if not self._lock.acquire(timeout=-1 if timeout is None else timeout):
            raise timed_out(self._deadline(began).seconds, "another thread's request was not answered")
        if self.closed:
            self._lock.release()
            raise ValueError("the client is closed")
        return began

    def _deadline(self, began: float) -> Deadline:
        """Return until when something may take that began then."""
        return Deadline.after(self.timeout, began)

    def _send_ahead(self, call: Call, deadline: Deadline) -> None:
        """Send if there is a connection; `_collect` does what is left to do."""
        if self._connection is None:
            return
        if call.bound is not None and call.bound is not self._connection:
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

    def _collect(self, call: Call, began: float) -> Answer:
        """Return the next answer, after sending the question (again) as needed."""
        while not call.answers:
            try:
                connection = self._connection
                if connection is not None and call.link is connection:
                    connection.wait(self._deadline(began))
                else:
                    if call.link is not None:
                        count_loss(
                            call, "the connection was given up meanwhile", final=self._connect_again is None
                        )
                    if call.bound is not None and call.bound is not connection:
                        raise disconnected("the connection has ended on which this was handed over")
                    if connection is None:
                        connection = self._connected(self._deadline(began))
                    call.renew()
                    answer = connection.exchange(call, began, self.timeout)
                    if answer is not None:
                        return answer
                    connection.send_queued(self._deadline(began))
            except ConnectionLost as lost:
                self._drop()
                count_loss(call, str(lost), lost, final=self._connect_again is None)
            except BrokerError:
                # Whatever it was, a late answer could come on this connection.
                self._drop()
                raise
            except TooLargeError as error:
                raise disconnected(f"the broker was restarted with other limits: {error}") from error
        return call.answers.pop(0)

    def _connected(self, deadline: Deadline) -> Connection:
        """Return the connection, a new one if there is none."""
        if self._connection is None:
            if self._connect_again is None:
                raise disconnected("the connection has ended, and it was not made by connect()")
            self._connection = reconnect(self._connect_again, deadline)
            self.welcome = self._connection.welcome
        return self._connection

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _forked(self) -> None:
        """In the child: let go of the parent's connection, and of a lock that a thread of it may hold."""
        self._lock = threading.Lock()
        self._drop()


def reconnect(connect_again: Callable[[Deadline], Connection], deadline: Deadline) -> Connection:
    """Return a connection to a broker that was there a moment ago, and may be one that is being restarted.

    Raises:
        BrokerError: it does not come back.

    """
    last: Exception | None = None
    for pause in pauses(deadline):
        time.sleep(pause)
        try:
            return connect_again(deadline)
        except (UnavailableError, ConnectionLost) as error:
            last = may_come_back(error)
    raise last or timed_out(deadline.seconds, "the broker did not come back")


def pauses(deadline: Deadline) -> Iterator[float]:
    """Yield the seconds before each try to connect again, as long as there is time for one."""
    for pause in PAUSES:
        left = deadline.left()
        if left is not None and left <= pause:
            return
        yield pause


def may_come_back(error: UnavailableError | ConnectionLost) -> Exception:
    """Return what to raise if no try to connect comes after the one that failed so.

    Raises:
        UnavailableError: another try would fail as well.

    """
    if isinstance(error, ConnectionLost):
        return not_greeted(error)
    if error.errno not in _MAY_COME_BACK:
        raise error
    return error


def count_loss(call: Call, how: str, lost: Exception | None = None, *, final: bool) -> None:
    """Note that a connection was lost with a call under way on it.

    `final`: no other connection can take its place.

    Raises:
        DisconnectedError: the call can't be repeated, from `lost`.

    """
    call.link = None
    call.losses += 1
    if call.bound is not None:
        raise disconnected(f"the connection ended on which this was handed over: {how}") from lost
    if final:
        raise disconnected(f"the connection ended, and it was not made by connect(): {how}") from lost
    if call.losses > _MOST_LOSSES:
        text = f"the broker closed {call.losses} connections without answering this request: {how}"
        raise disconnected(text) from lost


# Those that a child after fork would otherwise share with its parent.
_sessions: weakref.WeakSet[Session] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for session in tuple(_sessions):
        session._forked()  # noqa: SLF001 - a part of the class that can't be a method


os.register_at_fork(after_in_child=_after_fork_in_child)
