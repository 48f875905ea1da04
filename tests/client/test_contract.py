"""What both clients promise, on both kinds of socket, against the fake broker."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from fdbroker.client import (
    BrokerError,
    BrokerTimeoutError,
    ChangedError,
    Client,
    DeniedError,
    DisconnectedError,
    FileTimeoutError,
    FileTooLargeError,
    LimitError,
    MissingError,
    NotDirectoryError,
    PathInvalidError,
    ProtocolError,
    UnavailableError,
    WalkInterrupted,
    blocking,
)
from fdbroker.testing import FakeBroker
from fdbroker.wire.format import Incomplete, Limit, Reason, WalkKind
from fdbroker.wire.messages import (
    CancelRequest,
    Hello,
    LimitReached,
    ListRequest,
    MoreRequest,
    OpenRequest,
    ReleaseRequest,
    StatRequest,
    WalkRequest,
    Welcome,
)
from fdbroker.wire.replies import encode_welcome
from fdbroker.wire.stream import framed
from tests.client import facade
from tests.client.brokers import (
    ThreadedBroker,
    answer_all,
    answer_one,
    die_at_once,
    die_with_the_request,
    given,
    hear,
    say,
    welcome,
)
from tests.processes import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

# A client of either kind: they have no type in common. And what it is given.
Whatever = Any

FILES: dict[str, bytes | Reason | OSError] = {
    "/data/a": b"first\nsecond\n",
    "/data/b": b"",
    "/data/deep/c": b"\xff\xfe",
    "/data/deep/er/d": b"d" * 1000,
    "/data/secret": Reason.DENIED,
    "/data/failing": OSError(errno.ENOMEM, "no memory"),
    "/other/e": b"e",
}
# In the order of the fake broker's walk.
REGULAR = ["a", "b", "deep/c", "deep/er/d"]


class Kind(NamedTuple):
    """One client over one kind of socket."""

    connect: Callable[..., Any]
    from_socket: Callable[..., Any]
    socket: socket.SocketKind


KINDS = {
    f"{client}-{kind.name[5:].lower()}": Kind(connect, from_socket, kind)
    for client, connect, from_socket in (
        ("blocking", blocking.connect, Client.from_socket),
        ("asyncio", facade.connect, facade.from_socket),
    )
    for kind in (socket.SOCK_SEQPACKET, socket.SOCK_STREAM)
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


@pytest.fixture
def fake(kind: Kind, tmp_path: Path) -> Iterator[FakeBroker]:
    with FakeBroker(FILES, socket_path=tmp_path / "broker", kind=kind.socket) as broker:
        yield broker


@pytest.fixture
def client(kind: Kind, fake: FakeBroker, tmp_path: Path) -> Iterator[Whatever]:
    with kind.connect(tmp_path / "broker") as made:
        yield made


@pytest.fixture
def given_client(kind: Kind, fake: FakeBroker) -> Iterator[Whatever]:
    """Give a client that can't connect anew."""
    with kind.from_socket(fake.connect_socket()) as made:
        yield made


def asked(fake: FakeBroker, request: type) -> list[Any]:
    return [one for one in fake.requests if isinstance(one, request)]


# Files


def test_a_file_is_opened_and_read(client: Whatever) -> None:
    with client.open("/data/a") as file:
        assert (file.name, file.readline(), file.read()) == ("/data/a", b"first\n", b"second\n")
    descriptor = client.open_descriptor(b"/data/a")
    assert not os.get_inheritable(descriptor)
    os.close(descriptor)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/data/secret", DeniedError),
        ("/data/absent", MissingError),
        ("/data/failing", OSError),
        ("relative", PathInvalidError),
        ("/nul\0", PathInvalidError),
        (3, TypeError),
    ],
)
def test_a_refusal_is_the_error_that_a_caller_knows(client: Whatever, path: Whatever, expected: type) -> None:
    for ask in (client.open, client.open_descriptor, client.read_bytes, client.stat):
        with pytest.raises(expected):
            ask(path)
    assert client.stat("/data/a").size == 13


def test_many_files_come_in_order_each_with_its_own_result(client: Whatever) -> None:
    paths = ["/data/a", "/data/secret", "/nul\0", "/data/absent", "/data/deep/c"]
    seen: list[object] = []
    with client.open_many(paths, batch=2) as results:
        for result in results:
            with result:
                seen.append(type(result.error) if result.error else result.file.read())
    assert seen == [FILES["/data/a"], DeniedError, PathInvalidError, MissingError, b"\xff\xfe"]


def test_an_iterator_that_is_left_closes_what_was_not_delivered(client: Whatever) -> None:
    with client.open_many(["/data/a"] * 200, batch=20) as results:
        next(results).close()
    assert client.stat("/data/a").size == 13


def test_an_error_of_the_callers_paths_comes_after_what_was_opened(client: Whatever) -> None:
    def paths() -> Iterator[str]:
        yield "/data/a"
        raise KeyError("mine")

    results = client.open_many(paths(), batch=1)
    next(results).close()
    with pytest.raises(KeyError, match="mine"):
        next(results)


def test_files_are_described_and_listed(fake: FakeBroker, client: Whatever) -> None:
    described, absent = client.stat_many(["/data/a", "/data/absent"], batch=1)
    assert described.stat.size == 13
    assert isinstance(absent.error, MissingError)
    assert sorted(entry.name for entry in client.list("/data", page=2)) == [b"a", b"b", b"deep"]
    assert len(asked(fake, ListRequest)) > 1
    for path, expected in [("/data/a", NotDirectoryError), ("/data/absent", MissingError)]:
        with pytest.raises(expected):
            list(client.list(path))


def test_status_and_welcome_are_what_the_broker_says(client: Whatever) -> None:
    assert client.status()["fake"] is True
    assert client.welcome.version == 1
    assert client.timeout == 30


def test_what_can_not_be_asked_is_an_error_at_once(client: Whatever) -> None:
    of_the_wrong_type: list[Callable[[], object]] = [
        lambda: client.open_many("/data/a"),
        lambda: client.read_many("/data/a"),
        lambda: client.walk("/data", globs="*"),
        lambda: client.walk(3),
    ]
    for wrong in of_the_wrong_type:
        with pytest.raises(TypeError):
            wrong()
    out_of_range: list[Callable[[], object]] = [
        lambda: client.open_many([], 254),
        lambda: client.stat_many([], 0),
        lambda: client.walk("/data", batch=0),
        lambda: client.walk("/data", ahead=0),
        lambda: client.walk("/data", kinds=WalkKind(0)),
        lambda: client.walk("/data", globs=["*"] * 17),
        lambda: client.walk("/data", globs=[""]),
        lambda: client.walk("/data", least_size=5, most_size=4),
        lambda: client.walk("/data", newer_than=1 << 63),
        lambda: client.walk("/nul\0"),
    ]
    for wrong in out_of_range:
        with pytest.raises(ValueError, match=r"\d|no kind|NUL"):
            wrong()


# Copies


def test_a_small_file_is_read_from_its_copy_and_a_large_one_from_its_descriptor(
    fake: FakeBroker, client: Whatever
) -> None:
    for size in (0, 1, 16_384, 16_385, 300_000):
        fake["/data/any"] = content = os.urandom(size)
        assert client.read_bytes("/data/any") == content
    assert all(request.copy for request in asked(fake, OpenRequest))


def test_many_files_are_read_in_order_copies_and_others(fake: FakeBroker, client: Whatever) -> None:
    for number in range(30):
        fake[f"/data/many/{number}"] = bytes([number]) * (number * 1000)
    paths = [f"/data/many/{number}" for number in range(30)]
    paths[3:3] = ["/data/secret", "/nul\0"]
    with client.read_many(paths, batch=16) as results:
        seen = [(result.path, result.error or result.content) for result in results]
    assert [path for path, _ in seen] == paths
    assert isinstance(seen[3][1], DeniedError)
    assert isinstance(seen[4][1], PathInvalidError)
    contents = [content for _, content in seen if isinstance(content, bytes)]
    assert contents == [bytes([number]) * (number * 1000) for number in range(30)]


def test_what_a_reply_had_no_room_for_is_asked_for_again(kind: Kind) -> None:
    files = {f"/data/{number}": bytes([number]) * 10_000 for number in range(10)}
    files["/data/huge"] = bytes(20_000)
    with (
        FakeBroker(files, kind=kind.socket, only_copies=True) as fake,
        kind.from_socket(fake.connect_socket()) as client,
    ):
        *read, huge = client.read_many(files)
        assert [result.content[:1] for result in read] == [bytes([number]) for number in range(10)]
        assert isinstance(huge.error, FileTooLargeError)
        with pytest.raises(FileTooLargeError):
            _ = huge.content
        # Three have room in a reply, so at most twice as many are asked for again.
        sizes = [len(request.paths) for request in asked(fake, OpenRequest)]
        assert sizes == [11, 6, 4, 1]


# Sealed copies


def test_a_sealed_copy_is_in_memory_and_can_not_be_changed(client: Whatever) -> None:
    with client.open("/data/a", sealed=True) as file:
        assert (file.name, file.tell(), file.read()) == ("/data/a", 0, FILES["/data/a"])
        descriptor = file.fileno()
        assert not os.get_inheritable(descriptor)
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
        for seal in (fcntl.F_SEAL_WRITE, fcntl.F_SEAL_GROW, fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_SEAL):
            assert seals & seal
        with pytest.raises(PermissionError):
            os.write(descriptor, b"x")
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, 0)


def test_a_sealed_copy_has_its_limits_and_the_errors_of_the_file(client: Whatever) -> None:
    with pytest.raises(FileTooLargeError, match="max_size") as caught:
        client.open("/data/a", sealed=True, max_size=12)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, b"/data/a")
    client.open("/data/a", sealed=True, max_size=13).close()
    with pytest.raises(DeniedError):
        client.open("/data/secret", sealed=True)
    assert issubclass(ChangedError, BlockingIOError)
    assert issubclass(FileTimeoutError, TimeoutError)


# Walks


def test_a_walk_names_and_opens_what_is_below(client: Whatever) -> None:
    with client.walk("/data") as walk:
        assert (walk.end, walk.last) == (None, b"")
        seen = []
        for entry in walk:
            with entry, entry.file as file:
                assert entry.path == f"/data/{entry.relative}"
                assert file.read() == FILES[entry.path]
                assert entry.stat.size == len(FILES[entry.path])  # type: ignore[arg-type]
            seen.append(entry.relative)
            assert walk.last == entry.relative.encode()
        assert seen == REGULAR
        assert walk.end == (4, 4, 3, Incomplete.REFUSED | Incomplete.FAILED)
        assert walk.resumed == 0


def test_a_walk_speaks_as_its_start_does(client: Whatever) -> None:
    with client.walk(b"/data/deep", kinds=WalkKind.REGULAR | WalkKind.DIRECTORY, descriptors=False) as walk:
        entries = list(walk)
    assert [(entry.path, entry.relative, entry.kind) for entry in entries] == [
        (b"/data/deep/c", b"c", 8),
        (b"/data/deep/er", b"er", 4),
        (b"/data/deep/er/d", b"er/d", 8),
    ]
    assert not any(entry.is_open for entry in entries)
    with pytest.raises(ValueError, match="without its descriptor"):
        entries[0].detach()
    with client.walk("/") as walk:
        paths = []
        for entry in walk:
            entry.close()
            paths.append(entry.path)
    assert paths == [f"/data/{path}" for path in REGULAR] + ["/other/e"]


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"globs": ["*"]}, ["a", "b"]),
        ({"globs": [b"deep/**", "nothing"]}, ["deep/c", "deep/er/d"]),
        ({"least_size": 3}, ["a", "deep/er/d"]),
        ({"most_size": 13}, ["a", "b", "deep/c"]),
        ({"least_size": 1, "most_size": 2}, ["deep/c"]),
        ({"newer_than": 0}, []),
        ({"newer_than": -1}, []),
        ({"kinds": WalkKind.SYMLINK}, []),
    ],
)
def test_filters_say_what_a_walk_names(client: Whatever, filters: Whatever, expected: list[str]) -> None:
    if filters.get("newer_than") == -1:
        filters, expected = {"newer_than": -2}, REGULAR
    with client.walk("/data", descriptors=False, **filters) as walk:
        assert [entry.relative for entry in walk] == expected


@pytest.mark.parametrize(
    ("path", "filters", "expected"),
    [
        ("/data/a", {}, NotDirectoryError),
        ("/data/absent", {}, MissingError),
        ("/data/secret", {}, DeniedError),
        ("/data", {"globs": ["["]}, PathInvalidError),
    ],
)
def test_a_walk_that_is_refused_says_why(
    client: Whatever, path: str, filters: Whatever, expected: type
) -> None:
    with client.walk(path, **filters) as walk, pytest.raises(expected):
        next(walk)
    assert client.stat("/data/a").size == 13


def many(fake: FakeBroker, count: int = 100) -> list[str]:
    names = [f"{number // 10}/{number % 10}" for number in range(count)]
    for name in names:
        fake[f"/many/{name}"] = name.encode()
    return names


def test_other_requests_are_answered_between_two_entries(fake: FakeBroker, client: Whatever) -> None:
    names = many(fake)
    seen = []
    with client.walk("/many", batch=7) as walk:
        for entry in walk:
            with entry, client.open(entry.path) as again:
                assert entry.file.read() == again.read() == entry.relative.encode()
            assert client.stat(entry.path).size == 3
            seen.append(entry.relative)
    assert seen == names


def test_two_walks_go_side_by_side(fake: FakeBroker, client: Whatever) -> None:
    names = many(fake)
    with client.walk("/many", batch=7) as one, client.walk("/many", batch=9) as two:
        for first, second, name in zip(one, two, names, strict=True):
            with first, second:
                assert first.relative == second.relative == name
        for walk in (one, two):
            with pytest.raises(StopIteration):
                next(walk)
            assert walk.end.entries == 100


def test_a_slow_consumer_has_no_more_waiting_than_it_asked_for(fake: FakeBroker, client: Whatever) -> None:
    many(fake)
    before = len(os.listdir("/proc/self/fd"))
    most = 0
    with client.walk("/many", batch=5, ahead=3) as walk:
        for entry in walk:
            # All that the broker may send is here, since its answer to this came behind it.
            client.status()
            most = max(most, len(os.listdir("/proc/self/fd")) - before)
            entry.close()
    assert most <= 5 * 3 + 2  # what is delivered, and the listing
    [request] = asked(fake, WalkRequest)
    assert (request.most, request.credit) == (5, 3)
    assert sum(more.credit for more in asked(fake, MoreRequest)) <= 20


def test_a_walk_that_is_left_is_cancelled_at_the_broker(fake: FakeBroker, client: Whatever) -> None:
    many(fake)
    for _ in range(10):  # more than may go on at a time
        with client.walk("/many", batch=2) as walk:
            next(walk).close()
        assert walk.end is None
        with pytest.raises(StopIteration):
            next(walk)
        client.status()
    assert len(asked(fake, CancelRequest)) == 10


def test_a_walk_that_never_began_asks_nothing(fake: FakeBroker, client: Whatever) -> None:
    with client.walk("/data"):
        pass
    client.walk("/data").close()
    assert not asked(fake, WalkRequest)


@pytest.mark.parametrize("lost_after", [0, 1, 13, 50, 99, 100])
def test_a_walk_goes_on_behind_what_was_delivered_last(
    fake: FakeBroker, client: Whatever, lost_after: int
) -> None:
    names = many(fake)
    seen: list[str] = []
    with client.walk("/many", batch=10, ahead=1) as walk:
        for entry in walk:
            seen.append(entry.relative)
            with entry:
                assert entry.file.read() == entry.relative.encode()
            if len(seen) == lost_after:
                fake.disconnect()
        end = walk.end
    assert seen == names
    assert (end.entries, end.descriptors) == (100, 100)
    if walk.resumed:
        assert end.incomplete & Incomplete.FAILED  # what was left out before was never told
        assert asked(fake, WalkRequest)[-1].behind
    assert walk.resumed == (1 if 0 < lost_after < 90 else walk.resumed)


def test_a_walk_whose_place_is_gone_is_interrupted(fake: FakeBroker, client: Whatever) -> None:
    names = many(fake)
    seen = []
    with client.walk("/many", batch=10, ahead=1) as walk:
        for _ in range(10):
            with next(walk) as entry:
                seen.append(entry.relative)
        fake.disconnect()
        del fake[f"/many/{names[9]}"]
        with pytest.raises(WalkInterrupted, match="no such file") as caught:
            next(walk)
        with pytest.raises(StopIteration):
            next(walk)
        assert walk.end is None
    error = caught.value
    assert (error.filename, error.last, error.entries, error.descriptors) == (b"/many", b"0/9", 10, 10)
    assert error.reason is Reason.NOT_FOUND
    assert isinstance(error.__cause__, MissingError)


def test_a_walk_of_a_connection_that_can_not_be_replaced_is_interrupted(
    fake: FakeBroker, given_client: Whatever
) -> None:
    many(fake)
    with given_client.walk("/many", batch=10, ahead=2) as walk:
        next(walk).close()
        given_client.status()
        fake.disconnect()
        # What had come is delivered all the same.
        for _ in range(19):
            next(walk).close()
        with pytest.raises(WalkInterrupted) as caught:
            next(walk)
    assert caught.value.entries == 20
    assert isinstance(caught.value.__cause__, DisconnectedError)


def test_a_walk_that_never_began_has_the_error_of_the_connection(
    fake: FakeBroker, given_client: Whatever
) -> None:
    fake.disconnect()
    with pytest.raises(DisconnectedError):
        given_client.status()
    with given_client.walk("/data") as walk, pytest.raises(DisconnectedError):
        next(walk)


# Services


def test_a_service_gets_its_clients_and_asks_for_them(fake: FakeBroker, client: Whatever) -> None:
    with client.serve("clamd") as service:
        with (
            fake.hand_over("clamd", pid=7, uid=8, gid=9) as theirs,
            next(service) as served,
        ):
            assert (served.number, served.pid, served.uid, served.gid) == (1, 7, 8, 9)
            assert served.identity_level == 0
            theirs.sendall(b"SCAN")
            served.socket.settimeout(5)
            assert served.socket.recv(10) == b"SCAN"
            with served.open("/data/a") as file:
                assert file.read() == FILES["/data/a"]
            assert served.read_bytes("/data/a") == FILES["/data/a"]
            assert served.stat("/data/a").size == 13
            for result in served.open_many(["/data/a", "/data/b"]):
                result.close()
            assert [result.stat.size for result in served.stat_many(["/data/a"])] == [13]
            assert [result.content for result in served.read_many(["/data/b"])] == [b""]
            assert len(list(served.list("/data"))) == 3
            with served.walk("/data", descriptors=False) as walk:
                assert len(list(walk)) == 4
            for kind_of_request in (OpenRequest, StatRequest, ListRequest, WalkRequest):
                assert {request.client for request in asked(fake, kind_of_request)} == {1}
            client.stat("/data/a")
            assert asked(fake, StatRequest)[-1].client is None
        client.status()
        assert [request.clients for request in asked(fake, ReleaseRequest)] == [(1,)]
        with pytest.raises(ValueError, match="client 1 is closed"):
            served.stat("/data/a")
        assert "uid 8" in repr(served)
        assert "clamd" in repr(service)
    assert service.closed


def test_clients_wait_for_their_turn_whatever_else_is_asked(fake: FakeBroker, client: Whatever) -> None:
    with client.serve("one") as one, client.serve("two") as two:
        theirs = [fake.hand_over(name) for name in ("one", "two", "one")]
        client.status()
        numbers = []
        for service in (two, one, one):
            with service.accept(5) as served:
                numbers.append(served.number)
        assert numbers == [2, 1, 3]
        for sock in theirs:
            sock.close()
        with pytest.raises(TimeoutError):
            one.accept(0.01)
        with fake.hand_over("one"), one.accept(5) as served:
            assert served.stat("/data/a").size == 13


def test_clients_that_nobody_took_are_closed_and_released_with_the_service(
    fake: FakeBroker, client: Whatever
) -> None:
    with client.serve("clamd") as service, fake.hand_over("clamd") as waiting:
        client.status()
        service.close()
        assert waiting.recv(1) == b""
        with fake.hand_over("clamd") as late:
            client.status()
            assert late.recv(1) == b""
        client.status()
        with pytest.raises(StopIteration):
            next(service)
        with pytest.raises(ValueError, match="closed"):
            service.accept()
    # The second goes behind the last request, whose reply may be here before.
    wait_until(
        lambda: sorted(one for request in asked(fake, ReleaseRequest) for one in request.clients) == [1, 2],
        "the release of both",
    )


def test_a_service_ends_with_its_connection_and_its_clients_are_not_taken_for_others(
    fake: FakeBroker, client: Whatever
) -> None:
    with client.serve("clamd") as service, fake.hand_over("clamd"), service.accept(5) as served:
        assert served.stat("/data/a").size == 13
        fake.disconnect()
        with pytest.raises(DisconnectedError):
            served.stat("/data/a")
        # The client itself connects anew; the numbers there are others'.
        assert client.stat("/data/a").size == 13
        with (
            client.serve("clamd") as again,
            fake.hand_over("clamd"),
            again.accept(5) as other,
        ):
            assert other.stat("/data/a").size == 13
            for ask in (served.stat, served.read_bytes, served.open):
                with pytest.raises(ConnectionResetError):
                    ask("/data/a")
            for lazy in (served.open_many(["/data/a"]), served.walk("/data")):
                with lazy, pytest.raises(ConnectionResetError):
                    next(lazy)
        with pytest.raises(DisconnectedError):
            next(service)


def test_a_service_whose_right_was_taken_away_is_told_and_keeps_its_clients(
    fake: FakeBroker, client: Whatever
) -> None:
    with client.serve("clamd") as service:
        theirs = [fake.hand_over("clamd") for _ in range(2)]
        with service.accept(5) as served:
            fake.end_service("clamd")
            # Those that had come by then are there.
            with service.accept(5) as other:
                assert other.number == 2
            for _ in range(2):
                with pytest.raises(DeniedError, match="clamd"):
                    service.accept(5)
            assert served.stat("/data/a").size == 13
        with client.serve("clamd") as again, fake.hand_over("clamd"), again.accept(5) as served:
            assert served.number == 3
        for sock in theirs:
            sock.close()


def test_a_service_that_waits_is_told_that_its_right_was_taken_away(
    fake: FakeBroker, client: Whatever
) -> None:
    with client.serve("clamd") as service:
        ender = threading.Timer(0.05, fake.end_service, ["clamd"])
        ender.start()
        with pytest.raises(DeniedError):
            next(service)
        ender.join()


def test_a_service_that_waits_learns_of_the_end(fake: FakeBroker, client: Whatever) -> None:
    with client.serve("clamd") as service:
        ender = threading.Timer(0.05, fake.disconnect)
        ender.start()
        with pytest.raises(DisconnectedError):
            next(service)
        ender.join()


# The life of a client


def test_a_restart_of_the_broker_goes_unnoticed(fake: FakeBroker, client: Whatever) -> None:
    results = client.open_many(["/data/a"] * 4, batch=1)
    next(results).close()
    for ask in (
        lambda: [result.close() for result in results],
        lambda: client.stat("/data/a"),
        lambda: list(client.list("/data")),
        client.status,
        lambda: client.read_bytes("/data/a"),
    ):
        fake.disconnect()
        assert ask()
    assert len(asked(fake, Hello)) == 6


def test_a_given_connection_that_ends_is_a_reset(fake: FakeBroker, given_client: Whatever) -> None:
    fake.disconnect()
    for _ in range(2):
        with pytest.raises(ConnectionResetError, match=r"connect\(\)"):
            given_client.open("/data/a")


def test_a_broker_that_is_gone_is_unavailable(kind: Kind, tmp_path: Path) -> None:
    with FakeBroker(FILES, socket_path=tmp_path / "broker", kind=kind.socket):
        client = kind.connect(tmp_path / "broker", timeout=0.2)
    with client, pytest.raises(UnavailableError) as caught:
        client.stat("/data/a")
    assert caught.value.errno == errno.ENOENT
    with pytest.raises(UnavailableError):
        kind.connect(tmp_path / "broker")


def test_a_closed_client_raises_value_error_and_its_files_stay_open(client: Whatever) -> None:
    file = client.open("/data/a")
    walk = client.walk("/data", batch=1)
    assert not client.closed
    client._real.close() if hasattr(client, "_real") else client.close()
    assert client.closed
    with file:
        assert file.read(5) == b"first"
    for use in (lambda: client.stat("/data/a"), client.status, lambda: next(walk), lambda: client.serve("x")):
        with pytest.raises(ValueError, match="closed"):
            use()
    assert "closed" in repr(client)


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), 1e10])
def test_an_impossible_timeout_is_a_value_error(kind: Kind, timeout: float) -> None:
    with pytest.raises(ValueError, match="time-out"):
        kind.connect("/nonexistent", timeout=timeout)
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind.socket)
    with ours, pytest.raises(ValueError, match="time-out"):
        kind.from_socket(theirs, timeout=timeout)
    assert theirs.fileno() == -1


def test_a_socket_that_no_broker_talks_on_is_a_value_error_and_closed(kind: Kind) -> None:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    with pytest.raises(ValueError, match="SOCK_STREAM"):
        kind.from_socket(sock)
    assert sock.fileno() == -1


def test_silence_is_a_timeout(kind: Kind) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind.socket)
    with ours, pytest.raises(BrokerTimeoutError):
        kind.from_socket(theirs, timeout=0.02)


def test_a_broker_that_never_accepts_is_a_timeout(kind: Kind, tmp_path: Path) -> None:
    path = str(tmp_path / "broker")
    with socket.socket(socket.AF_UNIX, kind.socket) as listener:
        listener.bind(path)
        listener.listen(0)
        with pytest.raises(BrokerTimeoutError, match="did not answer"):
            kind.connect(path, timeout=0.05)
        # That one is in the queue, which is full now.
        with pytest.raises(BrokerTimeoutError, match="did not accept") as caught:
            kind.connect(path, timeout=0.05)
        assert caught.value.filename == os.fsencode(path)


@pytest.mark.parametrize("said", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\xff" * 40, b""])
def test_what_is_no_broker_is_a_protocol_error(kind: Kind, said: bytes) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind.socket)
    with ours:
        if said:
            ours.send(said)
        ours.shutdown(socket.SHUT_WR)
        with pytest.raises(ProtocolError if said else DisconnectedError) as caught:
            kind.from_socket(theirs)
    assert isinstance(caught.value, BrokerError)
    assert theirs.fileno() == -1


def test_requests_of_the_full_length_are_sent(fake: FakeBroker, client: Whatever) -> None:
    long = "/" + "/".join(["x" * 255] * 15)
    with client.stat_many([long] * 300) as results:
        errors = [result.error for result in results]
    assert len(errors) == 300
    assert all(isinstance(error, MissingError) for error in errors)


def test_more_paths_than_the_broker_takes_are_split(kind: Kind) -> None:
    with (
        FakeBroker(FILES, max_paths=3, kind=kind.socket) as fake,
        kind.from_socket(fake.connect_socket()) as client,
    ):
        for result in client.open_many(["/data/b"] * 7):
            result.close()
        assert [len(request.paths) for request in asked(fake, OpenRequest)] == [3, 3, 1]


def test_four_walks_are_enough(fake: FakeBroker, client: Whatever) -> None:
    many(fake)
    walks = [client.walk("/many", batch=1) for _ in range(5)]
    for walk in walks[:4]:
        next(walk).close()
    with pytest.raises(LimitError):
        next(walks[4])
    for walk in walks:
        walk.close()


@pytest.mark.parametrize("wait", [0, 250])
def test_a_file_above_a_limit_is_an_error_of_its_own_and_the_others_are_given(
    fake: FakeBroker, client: Whatever, wait: int
) -> None:
    fake["/data/limited"] = LimitReached(Limit.RULE_OPENS_PER_SECOND, 20, wait)
    paths = ["/data/limited", "/data/a", "/data/limited"]
    for many in client.read_many, client.open_many:
        first, given, last = list(many(paths))
        assert given.error is None
        if many == client.open_many:
            given.close()
        for refused in (first, last):
            assert isinstance(refused.error, LimitError)
            assert (refused.error.limit, refused.error.value) == ("rule_opens_per_second", 20)
            assert refused.error.retry_after == (wait / 1000 or None)
    for ask in client.open, client.read_bytes, client.stat, lambda path: list(client.list(path)):
        with pytest.raises(LimitError):
            ask("/data/limited")


def test_a_request_above_a_limit_is_refused_whole_and_the_connection_goes_on(
    fake: FakeBroker, client: Whatever
) -> None:
    client.read_bytes("/data/a")
    for ask in (
        client.open,
        client.read_bytes,
        client.stat,
        lambda path: list(client.list(path)),
        lambda path: next(client.walk(path)),
    ):
        fake.limit_requests(LimitReached(Limit.REQUESTS_PER_SECOND, 100, 10))
        with pytest.raises(LimitError) as caught:
            ask("/data")
        assert (caught.value.limit, caught.value.value) == ("requests_per_second", 100)
        assert caught.value.retry_after == pytest.approx(0.01)
        assert client.read_bytes("/data/a") == FILES["/data/a"]


# Who is told


def test_the_hello_tells_who_sends_it_to_a_broker_that_begins_afterwards(kind: Kind) -> None:
    """What is queued before the receiver asks for credentials has them only if the sender asked as well."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind.socket)
    with ours, theirs.dup() as same, ThreadPoolExecutor(1) as thread:
        greeting = thread.submit(kind.from_socket, theirs)
        select.select([ours], [], [])  # the hello is there
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        _, ancillary, _, _ = ours.recvmsg(1000, socket.CMSG_SPACE(12))
        assert [struct.unpack("3i", content)[0] for _, _, content in ancillary] == [os.getpid()]
        welcome = encode_welcome(Welcome(1, 1, 1, 0, 0, 253, 65536, 256, 0))
        ours.send(framed(welcome) if kind.socket == socket.SOCK_STREAM else welcome)
        with greeting.result(timeout=60):
            assert not same.getsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED)


# Brokers that go away, or come back as others


@pytest.fixture(params=[name for name in KINDS if name.endswith("seqpacket")])
def connecting(request: pytest.FixtureRequest) -> Callable[..., Whatever]:
    """Give what connects either client to a hand-made broker, which talks on SOCK_SEQPACKET alone."""
    return KINDS[request.param].connect


def test_a_request_is_repeated_on_a_new_connection(
    connecting: Callable[..., Whatever], tmp_path: Path
) -> None:
    path = tmp_path / "broker"
    with (
        ThreadedBroker(str(path), die_with_the_request, die_at_once, answer_all) as broker,
        connecting(path) as client,
    ):
        os.close(client.open_descriptor("/a"))
        assert broker.connections == 3
        assert client.welcome.max_paths == 4


def test_a_request_that_kills_the_broker_is_not_repeated_for_ever(
    connecting: Callable[..., Whatever], tmp_path: Path
) -> None:
    path = tmp_path / "broker"
    with ThreadedBroker(str(path), die_with_the_request) as broker, connecting(path) as client:
        with pytest.raises(DisconnectedError, match="4 connections"):
            client.open("/a")
        assert broker.connections == 4


def test_a_batch_under_way_is_repeated(connecting: Callable[..., Whatever], tmp_path: Path) -> None:
    path = tmp_path / "broker"
    with (
        ThreadedBroker(str(path), answer_one, answer_one, answer_all) as broker,
        connecting(path) as client,
        client.open_many([f"/{number}" for number in range(8)], batch=2) as many_results,
    ):
        for number, result in enumerate(many_results):
            with result:
                assert (result.path, result.error) == (f"/{number}", None)
        assert broker.connections == 3


def test_a_batch_that_a_restarted_broker_has_no_room_for_is_an_error(
    connecting: Callable[..., Whatever], tmp_path: Path
) -> None:
    path = tmp_path / "broker"
    with (
        ThreadedBroker(str(path), die_with_the_request, answer_all),
        connecting(path) as client,
        client.open_many(["/a"] * 5) as results,
        pytest.raises(DisconnectedError, match="5 paths"),
    ):
        next(results)


def test_a_broker_that_is_restarted_before_its_welcome_is_connected_to_again(
    connecting: Callable[..., Whatever], tmp_path: Path
) -> None:
    path = tmp_path / "broker"
    with (
        ThreadedBroker(str(path), die_at_once, die_at_once, answer_all) as broker,
        connecting(path) as client,
    ):
        os.close(client.open_descriptor("/a"))
    assert broker.connections == 3


def test_a_broker_that_always_closes_before_its_welcome_is_a_reset(
    connecting: Callable[..., Whatever], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fdbroker.client.session.PAUSES", (0.0, 0.0))
    path = tmp_path / "broker"
    with (
        ThreadedBroker(str(path), die_at_once),
        pytest.raises(DisconnectedError, match="before its welcome"),
    ):
        connecting(path)


def test_a_client_is_usable_after_a_timeout(connecting: Callable[..., Whatever], tmp_path: Path) -> None:
    path = tmp_path / "broker"

    def say_nothing(sock: socket.socket) -> None:
        hello = hear(sock)
        assert hello is not None
        say(sock, welcome(hello.id))
        while hear(sock) is not None:
            pass  # until the client gives up

    with (
        ThreadedBroker(str(path), say_nothing, answer_all) as broker,
        connecting(path, timeout=0.3) as client,
    ):
        with pytest.raises(BrokerTimeoutError):
            client.open("/a")
        os.close(client.open_descriptor("/a"))
        assert broker.connections == 2


def test_a_broker_that_comes_back_and_says_nothing_is_a_timeout(
    connecting: Callable[..., Whatever], tmp_path: Path
) -> None:
    path = tmp_path / "broker"

    def hear_and_say_nothing(sock: socket.socket) -> None:
        while hear(sock) is not None:
            pass

    with (
        ThreadedBroker(str(path), answer_one, hear_and_say_nothing),
        connecting(path, timeout=0.2) as client,
    ):
        os.close(client.open_descriptor("/a"))
        with pytest.raises(BrokerTimeoutError):
            client.open("/a")


def test_a_protocol_error_ends_the_connection_and_the_next_request_opens_another(
    connecting: Callable[..., Whatever], tmp_path: Path
) -> None:
    path = tmp_path / "broker"

    def answer_wrongly(sock: socket.socket) -> None:
        hello = hear(sock)
        assert hello is not None
        say(sock, welcome(hello.id))
        request = hear(sock)
        assert request is not None
        say(sock, given(request.id), 3)
        assert hear(sock) is None

    with (
        ThreadedBroker(str(path), answer_wrongly, answer_all) as broker,
        connecting(path) as client,
    ):
        with pytest.raises(ProtocolError):
            client.open("/a")
        os.close(client.open_descriptor("/a"))
        assert broker.connections == 2
