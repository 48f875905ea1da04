"""Descriptors that an event loop looks at: clients, and workers, each with its own call.

An event loop of asyncio takes a handle, a context and a place in a queue for each event, and most of a small
scan is such work. So the loop has a selector that makes the calls of these itself, one after the other, and
tells the loop of the others alone: `run` runs a program by such a loop. Readers of the loop, as that of the
broker's connection, are among them.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import math
import os
import select
import selectors
from functools import partial
from typing import TYPE_CHECKING, TypeVar, TypeVarTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Any

    from _typeshed import FileDescriptorLike

    Call = Callable[[int], None]

_Result = TypeVar("_Result")
_Rest = TypeVarTuple("_Rest")

# Events of epoll_ctl(2). What is told in any case is that the other end is gone.
READABLE = int(select.EPOLLIN)
WRITABLE = int(select.EPOLLOUT)
SAYS_NO_MORE = int(select.EPOLLRDHUP)
IS_GONE = int(select.EPOLLHUP | select.EPOLLERR)

# Whoever is gone by then, as most are, costs no system call to be watched.
_SECONDS_UNTIL_LATER = 0.05
_MOST_AT_ONCE = 64  # before other tasks have their turn


def run(main: Coroutine[Any, Any, _Result]) -> _Result:
    """Run a program in which there may be a `Watch`, and return its result; as `asyncio.run`."""
    with asyncio.Runner(loop_factory=_Loop) as runner:
        return runner.run(main)


class _Selector(selectors.EpollSelector):
    """As its base class, but that a watch may have descriptors of its own in the same epoll(7)."""

    def __init__(self) -> None:
        super().__init__()
        # By another descriptor: the base class keeps its own to itself.
        self.epoll = select.epoll.fromfd(os.dup(self.fileno()))
        self.watch: Watch | None = None

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Wait, make the calls of the watch, and return what there is of the loop's own."""
        if timeout is None:
            seconds = -1.0
        elif timeout <= 0:
            seconds = 0.0
        else:  # epoll_wait(2) counts milliseconds; what is due must not be asked for again and again before
            seconds = math.ceil(timeout * 1e3) * 1e-3
        ready = self.epoll.poll(seconds, _MOST_AT_ONCE)
        if self.watch is not None:
            ready = self.watch.look(ready)
        if not ready:
            return []
        found = []
        keys = self.get_map()
        for number, events in ready:
            # Not before the calls: they may have had another descriptor registered by this number.
            key = keys.get(number)
            if key is not None:
                mask = (events & ~READABLE and selectors.EVENT_WRITE) | (
                    events & ~WRITABLE and selectors.EVENT_READ
                )
                found.append((key, mask & key.events))
        return found

    def close(self) -> None:
        """Let go of all."""
        self.epoll.close()
        super().close()


class _Loop(asyncio.SelectorEventLoop):
    """An event loop in which there may be a `Watch`: it then calls readers, too, as those of the broker.

    Whose descriptor is waited for to write, as for a moment in rare cases, is the loop's own from then on.
    """

    def __init__(self) -> None:
        self.selector = _Selector()
        self._readers: dict[int, Callable[[], None]] = {}
        super().__init__(self.selector)

    def add_reader(self, fd: FileDescriptorLike, callback: Callable[[*_Rest], Any], *args: *_Rest) -> None:
        """Call a function whenever a descriptor is readable; as its base class."""
        watch, number = self.selector.watch, _number_of(fd)
        if watch is None or number in self.selector.get_map():
            super().add_reader(number, callback, *args)
            return
        if number in self._readers:
            watch.let_go(number)

        def read(_events: int = READABLE) -> None:
            callback(*args)

        self._readers[number] = read
        watch.add(number, READABLE, read)

    def remove_reader(self, fd: FileDescriptorLike) -> bool:
        """Call it no more; return whether there was one."""
        watch, number = self.selector.watch, _number_of(fd)
        if self._readers.pop(number, None) is None:
            return super().remove_reader(number)
        if watch is not None:
            watch.let_go(number)
        return True

    def add_writer(self, fd: FileDescriptorLike, callback: Callable[[*_Rest], Any], *args: *_Rest) -> None:
        """Call a function whenever a descriptor is writable; as its base class."""
        number = _number_of(fd)
        read = self._readers.get(number)
        if read is not None and self.remove_reader(number):
            super().add_reader(number, read)
        super().add_writer(number, callback, *args)


def _number_of(descriptor: FileDescriptorLike) -> int:
    return descriptor if isinstance(descriptor, int) else descriptor.fileno()


class Watch:
    """Calls functions when something happens to descriptors. For one event loop, that of `run`, which runs.

    Each is told the events. `after` is called when a round of such calls is over, and behind it what was to
    be called `soon`.
    """

    def __init__(self) -> None:
        self.after: Callable[[], None] | None = None
        self.in_round = False
        """Whether `after` will be called without anybody's doing."""
        self._loop = asyncio.get_running_loop()
        assert isinstance(self._loop, _Loop)  # noqa: S101 - for the type checker
        self._selector = self._loop.selector
        self._epoll = self._selector.epoll
        self._selector.watch = self
        self._calls: dict[int, Call] = {}
        self._later: dict[int, int] = {}
        self._soon: list[Callable[[], None]] = []
        self._sees_to_soon = False
        self._soon_in_loop: asyncio.Handle | None = None
        self._timer: asyncio.TimerHandle | None = None

    def add(self, descriptor: int, events: int, call: Call, *, later: bool = False) -> None:
        """Call a function whenever one of the events is there; let go of it before it is closed here.

        `later`: from a moment on, for what is mostly let go of by then.
        """
        self._calls[descriptor] = call
        if not later:
            self._epoll.register(descriptor, events)
            return
        self._later[descriptor] = events
        if self._timer is None:
            self._timer = self._loop.call_later(_SECONDS_UNTIL_LATER, self._begin)

    def change(self, descriptor: int, events: int) -> None:
        """Wait for other events from now on."""
        if self._later.pop(descriptor, None) is None:
            self._epoll.modify(descriptor, events)
        else:
            self._epoll.register(descriptor, events)

    def let_go(self, descriptor: int) -> None:
        """Call nothing for it any more; also where nothing was to be called, or it is closed already."""
        if self._calls.pop(descriptor, None) is not None and self._later.pop(descriptor, None) is None:
            with contextlib.suppress(OSError):
                self._epoll.unregister(descriptor)

    def round(self, call: Callable[[], object]) -> None:
        """Make a call as if it were for one of the descriptors, or for the one whose call makes it."""
        if self.in_round:
            call()
            return
        self._sees_to_soon = True
        try:
            self._part_of_round(call)
            if self._soon:
                self._part_of_round(self._make_soon_calls)
        finally:
            self._sees_to_soon = False
            if self._soon:  # what is behind that has its turn when others had theirs
                self._have_soon_calls_made()

    def soon(self, call: Callable[[], None]) -> None:
        """Make a call when this round is over; outside one, in the next round of the loop.

        What is told to a client, of several files perhaps, is so said once, and at once.
        """
        self._soon.append(call)
        if not self._sees_to_soon:
            self._have_soon_calls_made()

    def close(self) -> None:
        """Let go of all."""
        if self._soon_in_loop is not None:
            self._soon_in_loop.cancel()
        if self._timer is not None:
            self._timer.cancel()
        self._selector.watch = None
        for descriptor in list(self._calls):
            self.let_go(descriptor)

    def look(self, ready: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Make the calls of a round for what is ready by epoll(7); return what is not its own."""
        calls = self._calls
        own = [one for one in ready if one[0] in calls]
        if not own:
            return ready
        others = [one for one in ready if one[0] not in calls] if len(own) < len(ready) else []
        self.round(partial(self._call, own))
        return others

    def _part_of_round(self, call: Callable[[], object]) -> None:
        self.in_round = True
        try:
            call()
        finally:
            self.in_round = False
            if self.after is not None:
                try:
                    self.after()
                except Exception as error:  # noqa: BLE001 - it is nobody's in this round, and would end the loop
                    self._failed(error)

    def _have_soon_calls_made(self) -> None:
        if self._soon_in_loop is None:
            self._soon_in_loop = self._loop.call_soon(self._in_loop)

    def _in_loop(self) -> None:
        self._soon_in_loop = None
        self._make_soon_calls()

    def _make_soon_calls(self) -> None:
        calls, self._soon = self._soon, []
        for call in calls:
            try:
                call()
            except Exception as error:  # noqa: BLE001 - whatever it is, the others are served
                self._failed(error)

    def _failed(self, error: Exception) -> None:
        self._loop.call_exception_handler({"message": "a call failed", "exception": error})

    def _begin(self) -> None:
        self._timer = None
        while self._later:
            descriptor, events = self._later.popitem()
            try:
                self._epoll.register(descriptor, events)
            except OSError as error:
                if error.errno == errno.EBADF:  # it was closed without a word
                    continue
                # There are too many for now.
                self._later[descriptor] = events
                self._timer = self._loop.call_later(_SECONDS_UNTIL_LATER, self._begin)
                return

    def _call(self, ready: list[tuple[int, int]]) -> None:
        for descriptor, events in ready:
            call = self._calls.get(descriptor)
            if call is None:  # it was let go of in this very round
                continue
            try:
                call(events)
            except Exception as error:  # noqa: BLE001 - whatever it is, the others are served
                self._failed(error)
