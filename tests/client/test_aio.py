"""What the asyncio client has besides the contract: many tasks, cancelling, loops and forks."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import resource
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest

from fdbroker import aio
from fdbroker.aio import link
from fdbroker.client import (
    BrokerTimeoutError,
    DisconnectedError,
    LimitError,
    ProtocolError,
    TooManyFilesError,
    WalkInterrupted,
)
from fdbroker.kernel import sockets
from fdbroker.testing import FakeBroker
from fdbroker.wire.format import ERRNO_OF, Kind, Reason
from fdbroker.wire.messages import (
    GIVEN,
    AcceptedClient,
    CancelRequest,
    ErrorReply,
    Hello,
    ReleaseRequest,
    StatRequest,
    StatusRequest,
    WalkRequest,
)
from fdbroker.wire.replies import encode_accepted, encode_error, encode_serve_reply, encode_status_reply
from fdbroker.wire.requests import decode_request
from fdbroker.wire.stream import framed
from tests.client.brokers import FIRST, SECOND, given, hear, say, welcome

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
    from pathlib import Path

FILES: dict[str, bytes | Reason | OSError] = {
    "/data/a": b"first\nsecond\n",
    "/data/secret": Reason.DENIED,
    **{f"/many/{number // 100}/{number % 100}": b"x" * number for number in range(1000)},
}
KINDS = (socket.SOCK_SEQPACKET, socket.SOCK_STREAM)


@pytest.fixture(params=KINDS)
def fake(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FakeBroker]:
    with FakeBroker(FILES, socket_path=tmp_path / "broker", kind=request.param) as broker:
        yield broker


@pytest.fixture
def path(fake: FakeBroker, tmp_path: Path) -> Path:
    return tmp_path / "broker"


async def exhausted(walk: aio.Walk) -> None:
    async for entry in walk:
        entry.close()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


# Many tasks


def test_tasks_share_a_connection_and_each_gets_its_own(fake: FakeBroker, path: Path) -> None:
    async def work(client: aio.Client, number: int) -> bool:
        name = f"/many/{number // 100}/{number % 100}"
        with await client.open(name) as file:
            if len(file.read()) != number:
                return False
        facts, content = await asyncio.gather(client.stat(name), client.read_bytes(name))
        return (facts.size, len(content)) == (number, number)

    async def main() -> None:
        async with await aio.connect(path) as client:
            results = await asyncio.gather(*(work(client, number) for number in range(300)))
            assert all(results)

    asyncio.run(main())
    assert sum(isinstance(request, Hello) for request in fake.requests) == 1


def test_what_tasks_ask_is_under_way_at_the_same_time() -> None:
    async def main() -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            say(ours, welcome())
            async with await aio.Client.from_socket(theirs) as client:
                one, two = (asyncio.create_task(client.open_descriptor(name)) for name in ("/a", "/b"))
                await asyncio.sleep(0)
                assert isinstance(hear(ours), Hello)
                asked = [hear(ours), hear(ours)]
                assert [request.paths for request in asked] == [[b"/a"], [b"/b"]]  # type: ignore[union-attr]
                # The answers come in another order.
                say(ours, given(SECOND), 1)
                os.close(await two)
                assert not one.done()
                say(ours, given(FIRST), 1)
                os.close(await one)

    asyncio.run(main())


def test_a_restart_in_the_middle_of_many_tasks_goes_unnoticed(fake: FakeBroker, path: Path) -> None:
    async def work(client: aio.Client, number: int) -> int:
        total = 0
        for _ in range(5):
            with await client.open(f"/many/1/{number}") as file:
                total += len(file.read())
        return total

    async def main() -> None:
        async with await aio.connect(path) as client:
            tasks = [asyncio.create_task(work(client, number)) for number in range(50)]
            for _ in range(2):
                await asyncio.sleep(0.01)
                await asyncio.to_thread(fake.disconnect)
            assert await asyncio.gather(*tasks) == [5 * (100 + number) for number in range(50)]

    asyncio.run(main())
    # They all went on on the same new one.
    assert sum(isinstance(request, Hello) for request in fake.requests) <= 3


# Cancelling


def test_500_opens_that_are_cancelled_at_any_moment_leave_no_descriptor(path: Path) -> None:
    random_moments = random.Random(5)  # noqa: S311 - no secret

    async def main() -> None:
        async with await aio.connect(path) as client:
            await client.status()
            before = descriptors()
            cancelled = 0
            for _ in range(500):
                task = asyncio.create_task(client.open("/data/a"))
                for _ in range(random_moments.randrange(5)):
                    await asyncio.sleep(random_moments.choice([0, 0, 0.0002]))
                task.cancel()
                try:
                    (await task).close()
                except asyncio.CancelledError:
                    cancelled += 1
            # Behind the answers to all of them.
            await client.status()
            assert descriptors() == before
            assert cancelled > 100
            assert client.welcome.version == 1

    asyncio.run(main())


def test_an_open_that_is_cancelled_when_its_answer_has_come_closes_it() -> None:
    async def main() -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            say(ours, welcome())
            async with await aio.Client.from_socket(theirs) as client:
                before = descriptors()
                task = asyncio.create_task(client.open_descriptor("/a"))
                await asyncio.sleep(0)
                say(ours, given(FIRST), 1)
                link = client._session._live()
                assert link is not None
                link._read()  # the loop would, in the same round in which the task is cancelled
                assert descriptors() == before + 1
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert descriptors() == before
                # And the other way round: cancelled first, then it comes.
                task = asyncio.create_task(client.open_descriptor("/b"))
                await asyncio.sleep(0)
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
                say(ours, given(SECOND), 1)
                say(ours, encode_status_reply(SECOND + 1, 7, b"{}"))
                assert await client.status() == {}
                assert descriptors() == before

    asyncio.run(main())


@pytest.mark.parametrize("what", ["open_many", "read_many", "walk", "sealed"])
def test_whatever_is_cancelled_leaves_no_descriptor(path: Path, what: str) -> None:
    random_moments = random.Random(7)  # noqa: S311 - no secret

    async def consume(client: aio.Client) -> None:
        if what == "sealed":
            for number in range(20):
                (await client.open(f"/many/1/{number}", sealed=True)).close()
            return
        iterators: dict[str, Any] = {
            "open_many": client.open_many([f"/many/1/{number}" for number in range(100)], 10),
            "read_many": client.read_many(["/many/9/99"] * 100, 50),
            "walk": client.walk("/many", batch=20),
        }
        async with iterators[what] as steps:
            async for step in steps:
                if what != "read_many":
                    step.close()
                await asyncio.sleep(0)

    async def main() -> None:
        async with await aio.connect(path) as client:
            await client.status()
            before = descriptors()
            for _ in range(40):
                task = asyncio.create_task(consume(client))
                await asyncio.sleep(random_moments.random() * 0.01)
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
                await client.status()
                assert descriptors() == before

    asyncio.run(main())


def test_a_walk_whose_task_is_cancelled_is_cancelled_at_the_broker(fake: FakeBroker, path: Path) -> None:
    async def consume(client: aio.Client, began: asyncio.Event) -> None:
        async with client.walk("/many", batch=1) as walk:
            async for entry in walk:
                entry.close()
                began.set()

    async def main() -> None:
        async with await aio.connect(path) as client:
            for _ in range(8):  # more than may go on at a time
                began = asyncio.Event()
                task = asyncio.create_task(consume(client, began))
                await began.wait()
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                await client.status()

    asyncio.run(main())
    assert sum(isinstance(request, CancelRequest) for request in fake.requests) == 8


def test_a_walk_that_is_dropped_is_cancelled_by_the_loop(fake: FakeBroker, path: Path) -> None:
    async def main() -> None:
        async with await aio.connect(path) as client:
            before = descriptors()
            walk = client.walk("/many", batch=10)
            (await anext(walk)).close()
            del walk
            gc.collect()
            for _ in range(5):  # the loop closes it in a task of its own
                await asyncio.sleep(0)
            await client.status()
            assert descriptors() == before

    asyncio.run(main())
    assert sum(isinstance(request, CancelRequest) for request in fake.requests) == 1


def test_a_client_that_waits_in_a_cancelled_accept_is_there_for_the_next(
    fake: FakeBroker, path: Path
) -> None:
    async def main() -> None:
        async with await aio.connect(path) as client, await client.serve("clamd") as service:
            task = asyncio.create_task(service.accept())
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            with fake.hand_over("clamd") as theirs:
                async with await service.accept() as served:
                    theirs.sendall(b"PING")
                    assert await asyncio.get_running_loop().sock_recv(served.socket, 10) == b"PING"

    asyncio.run(main())


def test_clients_are_served_as_they_come_until_the_service_ends(fake: FakeBroker, path: Path) -> None:
    async def main() -> None:
        numbers: list[int] = []
        came = asyncio.Event()

        def serve(served: aio.ServedClient) -> None:
            numbers.append(served.number)
            served.close()
            came.set()

        async with await aio.connect(path) as client, await client.serve("clamd") as service:
            with fake.hand_over("clamd"):
                await client.status()  # it is there before anybody waits
                serving = asyncio.create_task(service.for_each(serve))
                await came.wait()
                came.clear()
            with fake.hand_over("clamd"):
                await came.wait()
            assert numbers == [1, 2]
            service.close()
            with pytest.raises(ValueError, match="closed"):
                await serving
        async with await aio.connect(path) as client, await client.serve("clamd") as service:
            serving = asyncio.create_task(service.for_each(serve))
            await asyncio.sleep(0)
            client.close()
            with pytest.raises((DisconnectedError, ValueError)):
                await serving

    asyncio.run(main())


def test_who_serves_each_client_hears_of_a_loss_that_came_behind_one(fake: FakeBroker, path: Path) -> None:
    async def main() -> None:
        numbers = []

        def serve(served: aio.ServedClient) -> None:
            numbers.append(served.number)
            served.close()

        async with await aio.connect(path) as client, await client.serve("clamd") as service:
            with fake.hand_over("clamd"):
                await client.status()  # it is there before anybody waits
            client.close()
            async with asyncio.timeout(10):
                with pytest.raises((DisconnectedError, ValueError)):
                    await service.for_each(serve)
            assert numbers == [1]

    asyncio.run(main())


class HandingOver:
    """A hand-made broker and a service of it: what is handed over, and what the service says."""

    def __init__(self, ours: socket.socket, client: aio.Client, service: aio.Service) -> None:
        self._ours = ours
        self.client = client
        self._service = service

    async def serve_one(self, number: int, may_hold_back: int) -> None:
        """Have a client served, which is done at once."""
        (await self.hand_over(number, may_hold_back)).close()

    async def hand_over(self, number: int, may_hold_back: int) -> aio.ServedClient:
        mine, theirs = socket.socketpair()
        facts = AcceptedClient(number, 10, 20, 30, 2)
        with mine, theirs:
            sockets.send(self._ours, encode_accepted(FIRST, 7, facts, may_hold_back), [theirs.fileno()])
        return await self._service.accept()

    async def status(self) -> None:
        """Have the broker asked, and answer, something that is nobody's."""
        asking = asyncio.create_task(self.client.status())
        await asyncio.sleep(0)
        request = decode_request(self._ours.recv(1000))
        say(self._ours, encode_status_reply(request.id, 7, b"{}"))
        await asking

    async def released(self) -> tuple[int, ...]:
        """Return the numbers that the next message releases."""
        async with asyncio.timeout(10):
            data = await asyncio.get_running_loop().sock_recv(self._ours, 1000)
        request = decode_request(data)
        assert isinstance(request, ReleaseRequest)
        return request.clients

    def says_nothing(self) -> bool:
        try:
            self._ours.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        return False


def handing_over(test: Callable[[HandingOver], Awaitable[None]]) -> None:
    async def main() -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            say(ours, welcome())
            async with await aio.Client.from_socket(theirs) as client:
                hear(ours)
                say(ours, encode_serve_reply(FIRST, 7, GIVEN))
                async with await client.serve("clamd") as service:
                    hear(ours)
                    ours.settimeout(0)
                    await test(HandingOver(ours, client, service))
            gc.collect()

    asyncio.run(main())


def test_releases_wait_for_others_as_far_as_the_broker_lets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "_HELD_BACK", 1000.0)

    async def test(broker: HandingOver) -> None:
        for number in (1, 2):
            await broker.serve_one(number, 2)
            assert broker.says_nothing()
        await broker.serve_one(3, 2)
        assert await broker.released() == (1, 2, 3)
        await broker.serve_one(4, 9)
        assert broker.says_nothing()
        await broker.serve_one(5, 0)  # near a limit: what is held back goes when that is heard of
        assert await broker.released() == (4,)
        assert await broker.released() == (5,)

    handing_over(test)


def test_releases_that_nobody_joins_are_sent_a_moment_later(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(broker: HandingOver) -> None:
        for number in (1, 2):  # the second by another alarm
            await broker.serve_one(number, 5)
            assert await broker.released() == (number,)

    handing_over(test)
    # Who was not busy is not going to be, so there is nothing to wait for.
    monkeypatch.setattr(link, "_HELD_BACK", -1.0)
    handing_over(test)


def test_what_was_said_with_a_client_that_came_a_while_ago_holds_no_more() -> None:
    async def test(broker: HandingOver) -> None:
        served = await broker.hand_over(1, 5)
        broker.client._asks._link._client_came_at = 0.0
        await broker.status()  # of others it says nothing
        served.close()
        assert not broker.says_nothing()
        assert await broker.released() == (1,)

    handing_over(test)


def test_releases_that_wait_go_with_what_is_said_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "_HELD_BACK", 1000.0)

    async def test(broker: HandingOver) -> None:
        await broker.serve_one(1, 5)
        asking = asyncio.create_task(broker.client.status())
        await asyncio.sleep(0)
        assert not broker.says_nothing()
        asking.cancel()
        kinds = [type(decode_request(broker._ours.recv(1000))) for _ in range(2)]
        assert sorted(kinds, key=repr) == [ReleaseRequest, StatusRequest]
        await broker.serve_one(2, 5)  # and what waits when all ends is gone with it

    handing_over(test)


def test_what_serving_a_client_raises_ends_it_and_the_next_client_waits(fake: FakeBroker, path: Path) -> None:
    async def main() -> None:
        def fail(served: aio.ServedClient) -> None:
            served.close()
            raise KeyError(served.number)

        async with await aio.connect(path) as client, await client.serve("clamd") as service:
            with fake.hand_over("clamd"), fake.hand_over("clamd"):
                with pytest.raises(KeyError, match="1"):
                    await service.for_each(fail)
                async with await service.accept() as served:
                    assert served.number == 2

    asyncio.run(main())


def test_clients_are_served_by_tasks_while_others_are_waited_for(fake: FakeBroker, path: Path) -> None:
    async def serve_one(served: aio.ServedClient) -> None:
        async with served:
            reader, writer = await asyncio.open_unix_connection(sock=served.socket.dup())
            name = (await reader.readline()).decode().strip()
            writer.write(str((await served.stat(name)).size).encode())
            await writer.drain()
            writer.close()
            await writer.wait_closed()

    def ask(number: int) -> bytes:
        with fake.hand_over("clamd") as sock:
            sock.sendall(f"/many/1/{number}\n".encode())
            return sock.makefile("rb").read()

    async def main() -> None:
        async with (
            await aio.connect(path) as client,
            await client.serve("clamd") as service,
            asyncio.TaskGroup() as group,
        ):
            asking = [asyncio.create_task(asyncio.to_thread(ask, number)) for number in range(20)]
            came = 0
            async for served in service:
                group.create_task(serve_one(served))
                came += 1  # not by their numbers: threads hand them over in any order
                if came == 20:
                    service.close()
            assert await asyncio.gather(*asking) == [str(100 + number).encode() for number in range(20)]

    asyncio.run(main())
    assert len({request.client for request in fake.requests if isinstance(request, StatRequest)}) == 20


# Back-pressure


def test_a_walk_is_not_read_faster_than_it_is_consumed(fake: FakeBroker, path: Path) -> None:
    async def main() -> None:
        async with await aio.connect(path) as client:
            before = descriptors()
            async with client.walk("/many", batch=10, ahead=2) as walk:
                for _ in range(35):
                    (await anext(walk)).close()
                    await client.status()
                    assert descriptors() <= before + 20
            assert walk.end is None

    asyncio.run(main())
    [request] = [request for request in fake.requests if isinstance(request, WalkRequest)]
    assert request.credit == 2


def test_paths_are_read_two_batches_ahead_at_most(path: Path) -> None:
    read = 0

    def paths() -> Iterator[str]:
        nonlocal read
        for _ in range(1000):
            read += 1
            yield "/data/a"

    async def main() -> None:
        async with await aio.connect(path) as client:
            before = descriptors()
            async with client.open_many(paths(), batch=10) as results:
                for number in range(55):
                    (await anext(results)).close()
                    await client.status()
                    assert read <= number // 10 * 10 + 20
                    assert descriptors() <= before + 20

    asyncio.run(main())


# What goes wrong


def test_an_error_of_the_protocol_is_told_to_all_who_wait(path: Path) -> None:
    async def main() -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            say(ours, welcome())
            async with await aio.Client.from_socket(theirs) as client:
                tasks = [asyncio.create_task(client.open_descriptor("/a")) for _ in range(3)]
                await asyncio.sleep(0)
                say(ours, given(FIRST), 3)
                errors = await asyncio.gather(*tasks, return_exceptions=True)
                assert all(isinstance(error, ProtocolError) for error in errors)
                assert len({id(error) for error in errors}) == 3
                with pytest.raises(DisconnectedError):
                    await client.status()

    asyncio.run(main())


def test_the_last_words_of_a_broker_are_heard(path: Path) -> None:
    said = encode_error(ErrorReply(0, 7, Kind.BROKEN, Reason.BROKEN, ERRNO_OF[Reason.BROKEN], "no memory"))

    async def main() -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            say(ours, welcome())
            async with await aio.Client.from_socket(theirs) as client:
                say(ours, said)
                ours.close()
                with pytest.raises(OSError, match="no memory"):
                    await client.status()

    asyncio.run(main())


def test_a_timeout_gives_up_a_connection_on_which_nothing_comes_and_no_other() -> None:
    async def main() -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            say(ours, welcome())
            async with await aio.Client.from_socket(theirs, timeout=0.2) as client:
                # The broker answers others meanwhile: it is one file that hangs.
                before = descriptors()
                task = asyncio.create_task(client.open_descriptor("/hangs"))
                await asyncio.sleep(0)
                answered = 0
                while not task.done():
                    status = asyncio.create_task(client.status())
                    await asyncio.sleep(0.01)
                    say(ours, encode_status_reply(SECOND + answered, 7, b"{}"))
                    assert await status == {}
                    answered += 1
                with pytest.raises(BrokerTimeoutError):
                    await task
                # Its late answer is closed.
                say(ours, given(FIRST), 1)
                status = asyncio.create_task(client.status())
                await asyncio.sleep(0)
                say(ours, encode_status_reply(SECOND + answered, 7, b"{}"))
                assert await status == {}
                assert descriptors() == before
                # Now it is silent.
                with pytest.raises(BrokerTimeoutError):
                    await client.status()
                with pytest.raises(DisconnectedError):
                    await client.status()

    asyncio.run(main())


def test_a_broker_that_does_not_receive_holds_nobody_else_up(path: Path) -> None:
    async def main() -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with ours:
            ours.sendall(framed(welcome()))
            async with await aio.Client.from_socket(theirs, timeout=0.5) as client:
                long = b"/" + b"x" * 4000
                tasks = [asyncio.create_task(client.open_descriptor(long)) for _ in range(300)]
                ticks = 0
                while not tasks[0].done():
                    await asyncio.sleep(0.01)
                    ticks += 1
                assert ticks > 20
                errors = await asyncio.gather(*tasks, return_exceptions=True)
                assert all(isinstance(error, (BrokerTimeoutError, DisconnectedError)) for error in errors)

    asyncio.run(main())


def test_no_room_for_descriptors_ends_the_connection_and_leaks_none() -> None:
    async def main() -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            say(ours, welcome())
            async with await aio.Client.from_socket(theirs) as client:
                task = asyncio.create_task(anext(client.open_many(["/a"] * 60)))
                await asyncio.sleep(0)
                say(ours, given(FIRST, [GIVEN] * 60), 60)
                soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
                spare = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
                resource.setrlimit(resource.RLIMIT_NOFILE, (spare + 5, hard))
                try:
                    with pytest.raises(TooManyFilesError):
                        await task
                finally:
                    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
                    os.close(spare)

    asyncio.run(main())


def test_a_refused_connection_has_its_reason(path: Path) -> None:
    said = encode_error(ErrorReply(0, 7, Kind.REFUSED, Reason.LIMIT, ERRNO_OF[Reason.LIMIT], "too many"))

    async def main() -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            say(ours, said)
            with pytest.raises(LimitError, match="too many"):
                await aio.Client.from_socket(theirs)

    asyncio.run(main())


def test_closing_wakes_up_those_who_wait() -> None:
    async def main() -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            say(ours, welcome())
            client = await aio.Client.from_socket(theirs, timeout=None)
            task = asyncio.create_task(client.status())
            await asyncio.sleep(0)
            client.close()
            client.close()
            with pytest.raises(ValueError, match="closed"):
                await task

    asyncio.run(main())


# Loops and forks


def test_a_client_is_for_one_loop(path: Path) -> None:
    first, second = asyncio.new_event_loop(), asyncio.new_event_loop()
    try:
        client = first.run_until_complete(aio.connect(path))
        with pytest.raises(RuntimeError, match="another event loop"):
            second.run_until_complete(client.status())
        assert first.run_until_complete(client.status())["fake"]
        client.close()
    finally:
        first.close()
        second.close()


def in_child(check: Any) -> int:  # noqa: ANN401
    """Run `check` in a child process; return its exit status."""
    child = os.fork()
    if not child:
        status = 1
        try:
            check()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_child_connects_anew_with_a_loop_of_its_own_and_the_parents_walk_goes_on(
    fake: FakeBroker, path: Path
) -> None:
    async def in_the_child(client: aio.Client) -> None:
        with await client.open("/data/a") as file:
            assert file.read(5) == b"first"
        client.close()

    async def main() -> None:
        async with await aio.connect(path) as client:
            walk = client.walk("/many", batch=7)
            seen = 0
            for _ in range(100):
                (await anext(walk)).close()
                seen += 1
            # Not on the parent's loop, which can't run in two processes.
            assert in_child(lambda: asyncio.run(in_the_child(client))) == 0
            async for entry in walk:
                entry.close()
                seen += 1
            assert seen == 1000
            assert walk.end is not None
            assert walk.end.entries == 1000
            assert walk.resumed == 0

    asyncio.run(main())
    assert sum(isinstance(request, Hello) for request in fake.requests) == 2


def test_a_child_can_not_use_a_given_connection(fake: FakeBroker) -> None:
    async def in_the_child(client: aio.Client) -> None:
        with pytest.raises(ConnectionResetError):
            await client.status()

    async def main() -> None:
        async with await aio.Client.from_socket(fake.connect_socket()) as client:
            assert in_child(lambda: asyncio.run(in_the_child(client))) == 0
            assert (await client.status())["fake"]

    asyncio.run(main())


def test_a_walk_of_the_parent_that_a_child_goes_on_with_is_its_own(fake: FakeBroker, path: Path) -> None:
    """Each has what had come, and asks for the rest on its own connection."""

    async def rest(walk: AsyncIterator[Any]) -> list[str]:
        names = []
        async for entry in walk:
            entry.close()
            names.append(str(entry.relative))
        return names

    loop = asyncio.new_event_loop()
    try:
        client = loop.run_until_complete(aio.connect(path))
        walk = client.walk("/many", batch=7)

        async def begin() -> list[str]:
            names = []
            for _ in range(500):
                entry = await anext(walk)
                entry.close()
                names.append(str(entry.relative))
            return names

        names = loop.run_until_complete(begin())

        def check() -> None:
            theirs = asyncio.run(rest(walk))
            assert len(set(names) | set(theirs)) == len(names) + len(theirs) == 1000

        assert in_child(check) == 0
        names += loop.run_until_complete(rest(walk))
        assert len(set(names)) == len(names) == 1000
        client.close()
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


def test_a_walk_that_is_interrupted_is_told_as_such(fake: FakeBroker) -> None:
    async def main() -> None:
        async with (
            await aio.Client.from_socket(fake.connect_socket()) as client,
            client.walk("/many", batch=1) as walk,
        ):
            (await anext(walk)).close()
            await asyncio.to_thread(fake.disconnect)
            with pytest.raises(WalkInterrupted):
                await exhausted(walk)

    asyncio.run(main())


def test_there_are_no_threads_and_nothing_but_the_standard_library() -> None:
    program = "import sys, fdbroker.aio; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    ours = {name.split(".")[1] for name in done.stdout.split() if name.startswith("fdbroker.")}
    assert ours == {"aio", "client", "wire", "kernel"}


def test_a_client_makes_no_thread(path: Path) -> None:
    async def main() -> None:
        before = threading.active_count()
        async with await aio.connect(path) as client:
            with await client.open("/data/a", sealed=True) as file:
                assert file.read(5) == b"first"
            # That of the fake broker for this connection.
            assert threading.active_count() == before + 1

    asyncio.run(main())


def test_its_names_are_there() -> None:
    for name in aio.__all__:
        assert getattr(aio, name) is not None
