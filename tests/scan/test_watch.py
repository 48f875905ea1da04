"""The descriptors that the scan service looks at: each has its call, and nobody has another one's."""

from __future__ import annotations

import asyncio
import os
import selectors
import socket
from functools import partial
from typing import TYPE_CHECKING

from fdbroker.scan.service.watch import IS_GONE, READABLE, SAYS_NO_MORE, WRITABLE, Watch, _Selector
from fdbroker.scan.service.watch import run as run_watched
from tests.scan.descriptors import open_descriptors

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


def watching(test: Callable[[Watch], Awaitable[None]], failed: list[Exception] | None = None) -> None:
    """Run a test with a watch in an event loop; nothing may stay open. `failed`: what calls raise."""

    async def run() -> None:
        loop = asyncio.get_running_loop()
        if failed is not None:
            loop.set_exception_handler(lambda _, context: failed.append(context["exception"]))
        watch = Watch()
        try:
            async with asyncio.timeout(20):
                await test(watch)
        finally:
            watch.close()

    before = open_descriptors()
    run_watched(run())
    assert open_descriptors() == before


def test_each_is_told_what_happened_and_others_may_be_waited_for_instead() -> None:
    async def test(watch: Watch) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            told: asyncio.Queue[int] = asyncio.Queue()
            watch.add(ours.fileno(), WRITABLE, told.put_nowait)
            assert await told.get() == WRITABLE
            watch.change(ours.fileno(), READABLE)
            while not told.empty():
                told.get_nowait()
            theirs.send(b"x")
            assert await told.get() == READABLE
            watch.change(ours.fileno(), SAYS_NO_MORE)
            while not told.empty():
                told.get_nowait()
            theirs.close()
            assert await told.get() & (SAYS_NO_MORE | IS_GONE)
            watch.let_go(ours.fileno())

    watching(test)


def test_a_call_that_fails_keeps_none_of_the_others_from_being_made() -> None:
    failed: list[Exception] = []

    async def test(watch: Watch) -> None:
        pairs = [socket.socketpair() for _ in range(3)]
        calls: list[int] = []
        rounds: asyncio.Queue[int] = asyncio.Queue()
        watch.after = lambda: rounds.put_nowait(len(calls))

        def call(number: int, _events: int) -> None:
            calls.append(number)
            watch.let_go(pairs[number][0].fileno())
            raise ValueError(number)

        for number, (ours, theirs) in enumerate(pairs):
            watch.add(ours.fileno(), READABLE, partial(call, number))
            theirs.send(b"x")
        assert await rounds.get() == 3
        assert sorted(calls) == [0, 1, 2]
        for pair in pairs:
            for sock in pair:
                sock.close()

    watching(test, failed=failed)
    assert sorted(str(error) for error in failed) == ["0", "1", "2"]


def test_what_fails_behind_a_round_ends_neither_the_loop_nor_who_had_a_part_in_it() -> None:
    failed: list[Exception] = []

    async def test(watch: Watch) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            told: asyncio.Queue[bytes] = asyncio.Queue()
            watch.after = lambda: 1 // 0  # type: ignore[assignment]
            watch.add(ours.fileno(), READABLE, lambda _: told.put_nowait(ours.recv(1)))
            for said in (b"x", b"y"):
                theirs.send(said)
                assert await told.get() == said
            watch.round(lambda: told.put_nowait(b"z"))
            assert await told.get() == b"z"
            watch.let_go(ours.fileno())

    watching(test, failed=failed)
    assert [type(error) for error in failed] == [ZeroDivisionError] * 3


def test_what_is_let_go_of_in_a_round_is_not_called_in_it() -> None:
    async def test(watch: Watch) -> None:
        pairs = [socket.socketpair() for _ in range(2)]
        called = []
        over = asyncio.Event()
        watch.after = over.set

        def call(_: int) -> None:
            called.append(1)
            for ours, _theirs in pairs:
                watch.let_go(ours.fileno())
                ours.close()

        for ours, theirs in pairs:
            watch.add(ours.fileno(), READABLE, call)
            theirs.send(b"x")
        await over.wait()
        assert called == [1]
        for _, theirs in pairs:
            theirs.close()

    watching(test)


def test_what_is_watched_later_is_called_then_unless_it_is_let_go_of_or_changed_before() -> None:
    async def test(watch: Watch) -> None:
        pairs = [socket.socketpair() for _ in range(3)]
        told: asyncio.Queue[int] = asyncio.Queue()

        def call(number: int, _events: int) -> None:
            told.put_nowait(number)

        for number, (ours, theirs) in enumerate(pairs):
            watch.add(ours.fileno(), 0, partial(call, number), later=True)
            theirs.send(b"x")
            if number:
                theirs.close()
        number_of_a_closed_one = pairs[1][0].fileno()
        watch.let_go(number_of_a_closed_one)
        pairs[1][0].close()
        reused = os.dup(pairs[0][0].fileno())
        assert reused == number_of_a_closed_one
        watch.change(pairs[0][0].fileno(), READABLE)
        assert await told.get() == 0
        watch.let_go(pairs[0][0].fileno())
        assert await told.get() == 2
        watch.let_go(pairs[2][0].fileno())
        os.close(reused)
        for pair in pairs:
            for sock in pair:
                sock.close()

    watching(test)


def test_what_is_closed_without_a_word_keeps_no_other_one_from_being_watched() -> None:
    async def test(watch: Watch) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            told: asyncio.Queue[int] = asyncio.Queue()
            watch.add(ours.fileno(), READABLE, told.put_nowait, later=True)
            with socket.socket() as closed:
                watch.add(closed.fileno(), READABLE, told.put_nowait, later=True)
            theirs.send(b"x")
            assert await told.get() == READABLE
            watch.let_go(ours.fileno())

    watching(test)


def test_a_call_of_ones_own_is_a_round_as_well() -> None:
    async def test(watch: Watch) -> None:
        seen = []
        watch.after = lambda: seen.append("after")
        assert not watch.in_round
        watch.round(lambda: seen.append(str(watch.in_round)))
        assert seen == ["True", "after"]
        assert not watch.in_round

    watching(test)


def test_what_is_to_be_called_soon_is_called_when_the_round_is_over() -> None:
    async def test(watch: Watch) -> None:
        seen: list[str] = []
        done = asyncio.Event()

        def after() -> None:
            seen.append("after")
            if len(seen) == 2:
                watch.soon(lambda: seen.append(f"told {watch.in_round}"))

        def call() -> None:
            seen.append("call")
            watch.soon(behind)

        def behind() -> None:
            seen.append("soon")
            watch.soon(done.set)  # the others have their turn first

        watch.after = after
        watch.round(call)
        assert seen == ["call", "after", "soon", "told True", "after"]
        assert not watch.in_round
        assert not done.is_set()
        await done.wait()
        done.clear()
        watch.soon(done.set)  # in no round
        assert not done.is_set()
        await done.wait()

    watching(test)


def test_a_soon_call_that_fails_keeps_none_of_the_others_from_being_made() -> None:
    failed: list[Exception] = []

    async def test(watch: Watch) -> None:
        seen = []

        def call() -> None:
            watch.soon(lambda: 1 // 0)  # type: ignore[arg-type]
            watch.soon(lambda: seen.append(1))

        watch.round(call)
        assert seen == [1]

    watching(test, failed=failed)
    [error] = failed
    assert isinstance(error, ZeroDivisionError)


def test_others_in_the_same_loop_wait_as_in_any() -> None:
    async def test(watch: Watch) -> None:
        told: asyncio.Queue[int] = asyncio.Queue()
        watched, other = socket.socketpair()
        watch.add(watched.fileno(), READABLE, told.put_nowait)
        ours, theirs = socket.socketpair()
        reader, writer = await asyncio.open_connection(sock=ours)
        loop = asyncio.get_running_loop()
        theirs.settimeout(0)
        # More than a socket has room for, so that it is waited for in both ways.
        writer.write(b"x" * 1_000_000)
        there = 0
        while there < 1_000_000:
            there += len(await loop.sock_recv(theirs, 1 << 16))
        other.send(b"x")
        await loop.sock_sendall(theirs, b"answer\n")
        assert await reader.readline() == b"answer\n"
        assert await told.get() == READABLE
        began = loop.time()
        watch.let_go(watched.fileno())
        await asyncio.sleep(0.01)
        assert loop.time() - began >= 0.01
        writer.close()
        await writer.wait_closed()
        for sock in (theirs, watched, other):
            sock.close()

    watching(test)


def test_what_is_no_watchs_the_selector_tells_as_any_does() -> None:
    selector = _Selector()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        key = selector.register(ours, selectors.EVENT_READ)
        assert selector.select(0) == []
        key = selector.modify(ours, selectors.EVENT_READ | selectors.EVENT_WRITE)
        assert selector.select() == [(key, selectors.EVENT_WRITE)]
        theirs.send(b"x")
        assert selector.select(1.0) == [(key, selectors.EVENT_READ | selectors.EVENT_WRITE)]
        key = selector.modify(ours, selectors.EVENT_READ)
        assert selector.select(1.0) == [(key, selectors.EVENT_READ)]
        selector.epoll.register(theirs, WRITABLE)  # of a watch that is gone, say
        assert selector.select(1.0) == [(key, selectors.EVENT_READ)]
    before = open_descriptors()
    selector.close()
    assert len(before) - len(open_descriptors()) == 2


def test_a_reader_of_the_loop_is_called_in_a_round_until_it_is_removed() -> None:
    async def test(watch: Watch) -> None:
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        with ours, theirs:
            came: asyncio.Queue[tuple[str, bool]] = asyncio.Queue()

            def read(who: str) -> None:
                ours.recv(1)
                came.put_nowait((who, watch.in_round))

            assert not loop.remove_reader(ours)
            loop.add_reader(ours, read, "first")
            theirs.send(b"x")
            assert await came.get() == ("first", True)
            loop.add_reader(ours.fileno(), read, "second")  # in its place
            theirs.send(b"x")
            assert await came.get() == ("second", True)
            assert loop.remove_reader(ours)
            assert not loop.remove_reader(ours)
            theirs.send(b"x")
            for _ in range(3):  # rounds of the loop
                await asyncio.sleep(0)
            assert came.empty()

    watching(test)


def test_who_waits_to_write_as_well_hears_of_both() -> None:
    async def test(watch: Watch) -> None:
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        with ours, theirs:
            came: asyncio.Queue[str] = asyncio.Queue()

            def read(_: object = None) -> None:
                ours.recv(1)
                came.put_nowait("readable")

            def write() -> None:
                loop.remove_writer(ours)
                came.put_nowait("writable")

            loop.add_reader(ours, read)
            for _ in range(2):
                loop.add_writer(ours, write)
                assert await came.get() == "writable"
                theirs.send(b"x")
                assert await came.get() == "readable"
            loop.add_reader(ours, read, "again")
            theirs.send(b"x")
            assert await came.get() == "readable"
            assert loop.remove_reader(ours)
            watch.add(ours.fileno(), READABLE, read)  # its number is anybody's again
            theirs.send(b"x")
            assert await came.get() == "readable"
            watch.let_go(ours.fileno())

    watching(test)


def test_a_round_in_the_middle_of_another_is_a_part_of_it() -> None:
    async def test(watch: Watch) -> None:
        done: list[str] = []
        watch.after = lambda: done.append("after")

        def call() -> None:
            watch.soon(lambda: done.append("soon"))
            watch.round(lambda: done.append(f"inner {watch.in_round}"))
            done.append(f"outer {watch.in_round}")

        watch.round(call)
        assert done == ["inner True", "outer True", "after", "soon", "after"]

    watching(test)
