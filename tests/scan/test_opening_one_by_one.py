"""The requests of one connection whose files are opened: one after the other."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from fdbroker.scan.service.opening import OneByOne

if TYPE_CHECKING:
    from collections.abc import Coroutine


class _Request:
    """A request that goes on until it is told; notes in `events` what becomes of it."""

    def __init__(self, name: str, events: list[str]) -> None:
        self.task: asyncio.Task[None] | None = None
        self.go_on = asyncio.Event()
        self._name = name
        self._events = events

    def opened(self) -> Coroutine[None, None, None]:
        return self._open()

    async def _open(self) -> None:
        self._events.append(f"{self._name} begins")
        try:
            await self.go_on.wait()
        except asyncio.CancelledError:
            self._events.append(f"{self._name} is cancelled")
            raise
        self._events.append(f"{self._name} ends")


async def _settle() -> None:
    """Have everything done that nothing holds up."""
    for _ in range(10):
        await asyncio.sleep(0)


def test_requests_are_begun_one_after_the_other_in_their_order() -> None:
    async def main() -> list[str]:
        events: list[str] = []
        requests = [_Request(name, events) for name in "abc"]
        in_turn = OneByOne()
        for request in requests:
            in_turn.add(request, request.opened)
        for request in requests:
            await _settle()
            request.go_on.set()
        await _settle()
        return events

    assert asyncio.run(main()) == ["a begins", "a ends", "b begins", "b ends", "c begins", "c ends"]


def test_a_request_that_comes_when_all_are_over_is_begun() -> None:
    async def main() -> list[str]:
        events: list[str] = []
        in_turn = OneByOne()
        for name in "ab":
            request = _Request(name, events)
            request.go_on.set()
            in_turn.add(request, request.opened)
            await _settle()
        return events

    assert asyncio.run(main()) == ["a begins", "a ends", "b begins", "b ends"]


def test_a_request_that_is_dropped_makes_way_for_the_next_one_and_one_that_waits_is_never_begun() -> None:
    async def main() -> list[str]:
        events: list[str] = []
        first, second, third = requests = [_Request(name, events) for name in "abc"]
        in_turn = OneByOne()
        for request in requests:
            in_turn.add(request, request.opened)
        await _settle()
        in_turn.drop(second)
        in_turn.drop(first)
        third.go_on.set()
        await _settle()
        return events

    assert asyncio.run(main()) == ["a begins", "a is cancelled", "c begins", "c ends"]


def test_nothing_begins_when_it_is_closed() -> None:
    async def main() -> list[str]:
        events: list[str] = []
        in_turn = OneByOne()
        for request in [_Request(name, events) for name in "ab"]:
            in_turn.add(request, request.opened)
        await _settle()
        in_turn.close()
        await _settle()
        return events

    assert asyncio.run(main()) == ["a begins", "a is cancelled"]


def test_a_request_that_fails_makes_way_for_the_next_one() -> None:
    async def main() -> list[str]:
        events: list[str] = []
        failed, second = _Request("a", events), _Request("b", events)
        second.go_on.set()

        async def fail() -> None:
            raise OSError("of a test")

        in_turn = OneByOne()
        in_turn.add(failed, fail)
        in_turn.add(second, second.opened)
        await _settle()
        assert failed.task is not None
        assert isinstance(failed.task.exception(), OSError)
        return events

    assert asyncio.run(main()) == ["b begins", "b ends"]
