"""Clients that can't be served from the first moment on: nothing of them is left, and others are."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import tempfile
from typing import TYPE_CHECKING, cast

import pytest

from fdbroker.clamd.protocol import FILDES_ALONE, WHOLE_CONVERSATIONS
from fdbroker.kernel import sockets
from fdbroker.scan.pool import Pool
from fdbroker.scan.service import closing, serving
from fdbroker.scan.service.clamd_short import serve_client
from fdbroker.scan.service.configuration import Configuration, Listener
from fdbroker.scan.service.core import Core
from fdbroker.scan.service.hub import Ticket
from fdbroker.scan.service.native import NativeClient
from fdbroker.scan.service.tcp import TcpClient, _Stranger
from fdbroker.scan.service.watch import run as run_watched
from fdbroker.scan.supervisor import Done
from fdbroker.scan.verdict import Clean, Error, Infected, Reason
from tests.scan.descriptors import open_descriptors

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from fdbroker.aio import ServedClient, Service
    from fdbroker.broker.notify import Notifier
    from fdbroker.kernel.descriptors import Descriptors
    from fdbroker.scan.service.core import Speaks
    from fdbroker.scan.verdict import Verdict


def with_core(test: Callable[[Core], Awaitable[None] | None]) -> None:
    """Run a test with a service that has no engines; nothing may stay open, nor be called later."""

    async def run() -> None:
        failed: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: failed.append(context))
        core = Core(Configuration(()), Pool([]), [])
        try:
            if (rest := test(core)) is not None:
                await asyncio.wait_for(rest, 20)
            await asyncio.sleep(0.15)  # longer than a plain command waits, and than a client is not watched
        finally:
            core.close()
        assert not failed

    before = open_descriptors()
    run_watched(run())
    assert open_descriptors() == before


def refuse_to_watch(*_arguments: object, **_named: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class _Served:
    """As a client that the broker has handed over."""

    uid = 1000

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock

    def close(self) -> None:
        self.socket.close()


@pytest.mark.parametrize(("speaks", "refused"), [(serve_client, "change"), (NativeClient, "add")])
def test_nothing_is_left_of_a_client_that_can_not_be_watched(
    speaks: Speaks, refused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def test(core: Core) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            theirs.send(b"PIN")  # to be waited for
            monkeypatch.setattr(core.watch, refused, refuse_to_watch)
            ours.settimeout(0)
            served = _Served(ours)
            with pytest.raises(OSError, match="No space"):
                speaks(core, cast("ServedClient", served), Listener("clamd"))
            served.close()  # as who made it does
            assert (len(core.connections), core.hub.clients, ours.fileno()) == (0, 0, -1)
        monkeypatch.undo()

    with_core(test)


def test_a_client_that_asks_much_in_one_breath_lets_others_have_their_turn() -> None:
    """Ten thousand commands fit into one read."""
    count = 8000

    async def run() -> None:
        core = Core(Configuration(()), Pool([]), [])
        pairs = [socket.socketpair() for _ in range(2)]
        try:
            for ours, theirs in pairs:
                ours.settimeout(0)
                theirs.settimeout(0)
                ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            (busy, asks_much), (_, asks_little) = pairs
            asks_much.send(b"zIDSESSION\0" + b"zPING\0" * count)
            serve_client(core, cast("ServedClient", _Served(busy)), Listener("clamd"))
            answers = asks_much.recv(1 << 20).count(b"\0")
            assert answers < 100, "that was one turn"
            asks_little.send(b"zPING\0")
            serve_client(core, cast("ServedClient", _Served(pairs[1][0])), Listener("clamd"))
            assert asks_little.recv(10) == b"PONG\0"
            while answers < count:
                await asyncio.sleep(0)
                with contextlib.suppress(BlockingIOError):
                    more = asks_much.recv(1 << 20).count(b"\0")
                    assert more < 200
                    answers += more
            assert answers == count
            for connection in tuple(core.connections):
                connection.end("stopping", "")
        finally:
            for pair in pairs:
                for sock in pair:
                    sock.close()
            core.close()

    async def in_time() -> None:
        async with asyncio.timeout(20):
            await run()

    before = open_descriptors()
    run_watched(in_time())
    assert open_descriptors() == before


def test_a_stranger_that_can_not_be_served_is_one_less_and_not_two(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = []

    def test(core: Core) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            monkeypatch.setattr(core.watch, "change", refuse_to_watch)
            ours.settimeout(0)
            stranger = _Stranger(ours, lambda: gone.append(1))
            with pytest.raises(OSError, match="No space"):
                TcpClient(core, stranger, "tcp", -2, Listener("clamd"))
            stranger.close()
            assert (len(core.connections), core.hub.clients) == (0, 0)
        monkeypatch.undo()

    with_core(test)
    assert gone == [1]


def test_a_stranger_for_whom_there_was_no_room_has_its_turn_from_when_there_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The next one who comes does not throw out the one who has waited longest for the service."""

    def test(core: Core) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            theirs.send(b"zINSTREAM\0")
            ours.settimeout(0)
            client = TcpClient(core, _Stranger(ours, lambda: None), "tcp", -2, Listener("clamd"))
            monkeypatch.setattr(client, "_may_go_on", lambda: False)
            client._go_on()
            assert client.waits_for_it_since is None
            began = asyncio.get_running_loop().time()
            client._last_moved = began - 3600.0
            monkeypatch.undo()
            client._go_on()
            since = client.waits_for_it_since
            assert since is not None
            assert since >= began
            client.end("stopping", "")

    with_core(test)


def test_a_client_at_whose_first_words_the_service_fails_is_closed_and_the_next_one_is_served(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    served: list[str] = []

    def speaks(_core: object, client: _Served, _listener: object) -> None:
        if not served:
            served.append("failed")
            message = "what came\n"
            raise ValueError(message)
        served.append("served")
        client.close()

    class _Coming:
        async def for_each(self, serve: Callable[[ServedClient], None]) -> None:
            for _ in range(2):
                ours, theirs = socket.socketpair()
                with theirs:
                    serve(cast("ServedClient", _Served(ours)))
                assert ours.fileno() == -1

    def test(core: Core) -> None:
        monkeypatch.setitem(serving.PROTOCOLS, "clamd", cast("Speaks", speaks))
        coming = serving._take_clients(
            core, "clamd", Listener("clamd"), cast("Service", _Coming()), cast("Notifier", None)
        )
        with pytest.raises(StopIteration):
            coming.send(None)

    with_core(test)
    assert served == ["failed", "served"]
    assert r"uid 1000 could not be served: ValueError: what came\x0a" in capsys.readouterr().err


def test_who_can_not_be_told_keeps_no_verdict_from_the_others() -> None:
    failed: list[object] = []

    async def run() -> None:
        asyncio.get_running_loop().set_exception_handler(
            lambda _, context: failed.append(context["exception"])
        )
        core = Core(Configuration(()), Pool([]), [])
        told: list[Done] = []
        files = core.hub.client(1000)
        no_file = Error(Reason.NOT_REGULAR, "")

        def fail(_: Done) -> None:
            raise ZeroDivisionError

        def hand_in() -> None:
            for tell in (fail, told.append):
                files.submit("request", tell, b"", os.open("/", os.O_RDONLY), before=no_file)

        core.watch.round(hand_in)
        assert [done.verdict for done in told] == [no_file]
        assert core.hub.queued == files.queued == 0
        files.close()
        core.close()

    before = open_descriptors()
    run_watched(run())
    assert open_descriptors() == before
    assert [type(error) for error in failed] == [ZeroDivisionError]


@pytest.mark.parametrize(("said", "answer"), WHOLE_CONVERSATIONS.items())
def test_a_ping_is_answered_before_anything_is_made_for_who_asks(
    said: bytes, answer: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def test(core: Core) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            ours.settimeout(0)
            theirs.settimeout(10)
            theirs.send(said)
            monkeypatch.setattr(core.watch, "add", refuse_to_watch)
            serve_client(core, cast("ServedClient", _Served(ours)), Listener("clamd"))
            assert ours.fileno() == -1
            assert (theirs.recv(100), theirs.recv(100)) == (answer, b"")
            assert (len(core.connections), core.hub.clients) == (0, 0)

    with_core(test)


def told(
    receive: Callable[[socket.socket, int], tuple[bytes, Descriptors, bool]],
    monkeypatch: pytest.MonkeyPatch,
    say: Callable[[socket.socket], object],
) -> list[bytes]:
    """Return what a client is told whose first bytes are received by `receive`, read by read, to the end."""
    reads: list[bytes] = []

    def receive_first(sock: socket.socket, size: int) -> tuple[bytes, Descriptors, bool]:
        monkeypatch.undo()
        return receive(sock, size)

    async def test(core: Core) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            for sock in (ours, theirs):
                sock.settimeout(0)
            say(theirs)
            monkeypatch.setattr(sockets, "receive_unclosed", receive_first)
            serve_client(core, cast("ServedClient", _Served(ours)), Listener("clamd"))
            while not reads or reads[-1]:
                reads.append(await asyncio.get_running_loop().sock_recv(theirs, 100))

    with_core(test)
    return reads


def test_what_is_said_behind_a_ping_is_read_before_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    clients = []

    def say(client: socket.socket) -> None:
        clients.append(client)
        client.send(b"zPING\0")

    def receive(sock: socket.socket, size: int) -> tuple[bytes, Descriptors, bool]:
        came = sockets.receive_unclosed(sock, size)
        clients[0].send(b"zVERSION\0")
        return came

    # What is left unread would be a reset, at which the answer may be missed.
    assert told(receive, monkeypatch, say) == [b"PONG\0", b""]


def test_a_ping_that_a_descriptor_comes_with_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def say(client: socket.socket) -> None:
        with open(__file__, "rb") as file:
            socket.send_fds(client, [b"zPING\0"], [file.fileno()])

    stray = b"PROTOCOL ERROR: ancillary data sent without FILDES. ERROR\0"
    assert told(sockets.receive_unclosed, monkeypatch, say) == [stray, b""]


def test_a_ping_of_which_descriptors_were_dropped_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def receive(sock: socket.socket, size: int) -> tuple[bytes, Descriptors, bool]:
        data, owned, _ = sockets.receive_unclosed(sock, size)
        return data, owned, True

    assert b"PONG" not in b"".join(told(receive, monkeypatch, lambda client: client.send(b"zPING\0")))


def with_one_file(
    test: Callable[[Core, socket.socket], Awaitable[None] | None],
    said: bytes = b"zFILDES\0\0",
    flags: int = os.O_RDONLY,
) -> None:
    """Run a test with a client that has handed in a file, which no engine will ever answer for."""

    def run(core: Core) -> Awaitable[None] | None:
        ours, theirs = socket.socketpair()
        ours.settimeout(0)
        theirs.settimeout(0)
        with tempfile.NamedTemporaryFile() as file:
            descriptor = os.open(file.name, flags)
            socket.send_fds(theirs, [said], [descriptor])
            os.close(descriptor)
            serve_client(core, cast("ServedClient", _Served(ours)), Listener("clamd"))
        return test(core, theirs)

    with_core(run)


def verdict_is(core: Core, verdict: Verdict) -> None:
    [ticket] = core.hub.pool.cancel(next(iter(core.hub._clients)))
    assert isinstance(ticket, Ticket)
    core.hub.count(ticket.files, -1)
    ticket.tell(Done(b"", 0, verdict))


async def end_of_all(core: Core) -> None:
    while core.connections:  # noqa: ASYNC110 - what ends is no task, and tells nobody
        await asyncio.sleep(0)


async def all_that_is_told(client: socket.socket) -> bytes:
    with client:
        answer = b""
        while part := await asyncio.get_running_loop().sock_recv(client, 100):
            answer += part
        return answer


@pytest.mark.parametrize(
    ("verdict", "words"),
    [
        (Clean(), b"OK"),
        (Infected("Some-Name"), b"Some-Name FOUND"),
        (Error(Reason.TIMED_OUT, "late"), b"late. ERROR"),
    ],
)
@pytest.mark.parametrize(("said", "end"), FILDES_ALONE.items())
def test_who_hands_in_one_file_is_told_of_it_and_gone(
    said: bytes, end: bytes, verdict: Verdict, words: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    async def test(core: Core, client: socket.socket) -> None:
        verdict_is(core, verdict)
        assert not core.connections
        assert not core.hub.clients
        name, _, rest = (await all_that_is_told(client)).partition(b": ")
        assert (name[:3], rest) == (b"fd[", words + end)

    with_one_file(test, said)
    lines = capfd.readouterr().err.splitlines()
    assert lines == ([] if words == b"OK" else [lines[0]])
    assert all(f": {words.decode()}" in line and "uid 1000: /" in line for line in lines)


def test_what_is_said_behind_one_file_is_read_before_the_end() -> None:
    async def test(core: Core, client: socket.socket) -> None:
        client.send(b"zVERSION\0")
        verdict_is(core, Clean())
        assert len(core.connections) == 1  # for a moment
        loop = asyncio.get_running_loop()
        assert (await loop.sock_recv(client, 100)).endswith(b": OK\0")
        with pytest.raises(BrokenPipeError):
            client.send(b"zPING\0")
        assert await loop.sock_recv(client, 100) == b""  # and no reset
        client.close()
        await end_of_all(core)

    with_one_file(test)


def test_who_says_no_end_behind_one_file_is_closed_a_moment_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closing, "_DRAINING", 0.05)

    async def test(core: Core, client: socket.socket) -> None:
        client.send(b"zVERSION\0")
        verdict_is(core, Clean())
        await end_of_all(core)
        with pytest.raises(BrokenPipeError):
            client.send(b"zVERSION\0")
        client.close()

    with_one_file(test)


def test_the_file_of_who_is_gone_is_dropped() -> None:
    async def test(core: Core, client: socket.socket) -> None:
        client.close()
        await end_of_all(core)
        assert not core.hub.clients
        assert not core.hub.queued

    with_one_file(test)


@pytest.mark.parametrize("more", [b"", b"zVERSION\0"])
def test_who_has_handed_in_one_file_is_told_that_the_service_ends(more: bytes) -> None:
    async def test(core: Core, client: socket.socket) -> None:
        client.send(more)
        for connection in tuple(core.connections):
            connection.end("stopping", "the service is being stopped")
        assert not core.connections
        assert not core.hub.queued
        answer = await asyncio.get_running_loop().sock_recv(client, 100)
        assert answer.endswith(b": the service is being stopped. ERROR\0")
        client.close()

    with_one_file(test)


def test_nothing_is_left_of_one_file_whose_client_can_not_be_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    def test(core: Core) -> None:
        ours, theirs = socket.socketpair()
        ours.settimeout(0)
        with theirs, open(__file__, "rb") as file:
            socket.send_fds(theirs, [b"zFILDES\0\0"], [file.fileno()])
            monkeypatch.setattr(core.watch, "add", refuse_to_watch)
            served = _Served(ours)
            with pytest.raises(OSError, match="No space"):
                serve_client(core, cast("ServedClient", served), Listener("clamd"))
            served.close()  # as who made it does
            assert (len(core.connections), core.hub.clients, core.hub.queued) == (0, 0, 0)
        monkeypatch.undo()

    with_core(test)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (os.O_WRONLY, b"the descriptor is not open for reading. ERROR"),
        (os.O_PATH, b"not open for reading. ERROR"),
    ],
)
def test_one_file_that_no_engine_may_have_is_an_error(flags: int, words: bytes) -> None:
    async def test(core: Core, client: socket.socket) -> None:
        assert words in await all_that_is_told(client)
        assert not core.connections

    with_one_file(test, flags=flags)


def test_of_a_session_that_does_not_read_its_answers_no_ping_is_lost() -> None:
    count = 2000

    async def run() -> None:
        core = Core(Configuration(()), Pool([]), [])
        ours, theirs = socket.socketpair()
        try:
            for sock in (ours, theirs):
                sock.settimeout(0)
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the least that the kernel gives
            theirs.send(b"zIDSESSION\0")
            serve_client(core, cast("ServedClient", _Served(ours)), Listener("clamd"))
            sent, answers = 0, bytearray()
            while sent < count:
                with contextlib.suppress(BlockingIOError):
                    theirs.send(b"zPING\0")
                    sent += 1
                    await asyncio.sleep(0)
                    continue
                answers += theirs.recv(1 << 16)  # it waits for that
                await asyncio.sleep(0)
            while answers.count(b"\0") < count:
                await asyncio.sleep(0)
                with contextlib.suppress(BlockingIOError):
                    answers += theirs.recv(1 << 16)
            assert answers == b"".join(b"%d: PONG\0" % number for number in range(1, count + 1))
        finally:
            theirs.close()
            for connection in list(core.connections):
                connection.end("stopping", "the service ends")
            core.close()

    before = open_descriptors()
    run_watched(asyncio.wait_for(run(), 30))
    assert open_descriptors() == before
