"""Calls that take long, or for ever, beside the event loop.

By threads that are daemons: the process can end while one of them still waits, which those of
`asyncio.to_thread` prevent.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import threading
from collections import deque
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

_SECONDS_BETWEEN_TRIES = 0.5

_T = TypeVar("_T")


def run_aside(function: Callable[[], _T]) -> asyncio.Future[_T]:
    """Have a function called by a thread; return what becomes its result.

    It is called in any case, also where nobody waits for the result any more.

    Raises:
        OSError: there is no thread to be had.

    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_T] = loop.create_future()

    def settle(result: _T) -> None:
        if not future.done():
            future.set_result(result)

    def fail(error: Exception) -> None:
        if not future.done():
            future.set_exception(error)

    def work() -> None:
        with contextlib.suppress(RuntimeError):  # the loop has been closed meanwhile
            try:
                result = function()
            except Exception as error:  # noqa: BLE001 - whatever it is, who waits is told
                loop.call_soon_threadsafe(fail, error)
            else:
                loop.call_soon_threadsafe(settle, result)

    try:
        threading.Thread(target=work, name="fdbroker-aside", daemon=True).start()
    except RuntimeError as error:
        raise OSError(errno.EAGAIN, f"no thread to be had: {error}") from error
    return future


class AsideForUsers:
    """Such calls for users, of whom each has a few at a time. One whose calls hang has no others done."""

    _MOST = 2

    def __init__(self) -> None:
        self._waiting: dict[int, deque[Callable[[], None]]] = {}
        self._running: dict[int, int] = {}

    def is_free_for(self, user: int) -> bool:
        """Return whether one more call of a user would run at once."""
        return not self._running or self._running.get(user, 0) < self._MOST

    def run(self, user: int, function: Callable[[], _T]) -> asyncio.Future[_T]:
        """Have a function called, in its turn; as `run_aside`, but that it waits for a thread."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[_T] = loop.create_future()

        def begin() -> None:
            self._running[user] = self._running.get(user, 0) + 1
            start()

        def start() -> None:
            try:
                run_aside(function).add_done_callback(over)
            except OSError:
                loop.call_later(_SECONDS_BETWEEN_TRIES, start)

        def over(done: asyncio.Future[_T]) -> None:
            self._running[user] -= 1
            error = done.exception()
            if future.done():
                pass
            elif error is None:
                future.set_result(done.result())
            else:
                future.set_exception(error)
            self._go_on(user)

        self._waiting.setdefault(user, deque()).append(begin)
        self._go_on(user)
        return future

    def _go_on(self, user: int) -> None:
        waiting = self._waiting.get(user, deque())
        while waiting and self._running.get(user, 0) < self._MOST:
            waiting.popleft()()
        if not waiting:
            self._waiting.pop(user, None)
        if not self._running.get(user):
            self._running.pop(user, None)
