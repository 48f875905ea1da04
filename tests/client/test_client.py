"""The client as programs use it, against the fake broker."""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import resource
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

import fdbroker
from fdbroker.client import (
    BrokerError,
    Client,
    DeniedError,
    DisconnectedError,
    MissingError,
    PathInvalidError,
    ReadOnlyError,
    ServedClient,
    UnavailableError,
    connect,
)
from fdbroker.client.results import file_from
from fdbroker.testing import FakeBroker
from fdbroker.wire.format import Kind, Reason
from fdbroker.wire.messages import (
    GIVEN,
    AcceptedClient,
    ErrorReply,
    Hello,
    ListRequest,
    OpenRequest,
    ReleaseRequest,
    StatRequest,
    refused,
)
from fdbroker.wire.replies import encode_accepted, encode_error, encode_serve_reply
from tests.client.brokers import FIRST, say, welcome
from tests.running_broker import reachable_directory

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FILES: dict[str, bytes | Reason | OSError] = {
    "/data/a": b"first\nsecond\n",
    "/data/b": b"",
    "/data/deep/c": b"\xff\xfe",
    "/data/secret": Reason.DENIED,
    "/data/leased": Reason.BUSY,
    "/data/failing": OSError(errno.ENOMEM, "no memory"),
}
PAST_A_PAGE = 253


@pytest.fixture
def fake() -> Iterator[FakeBroker]:
    with FakeBroker(FILES) as broker:
        yield broker


@pytest.fixture
def client(fake: FakeBroker) -> Iterator[Client]:
    with fake.connect() as made:
        yield made


def test_open_gives_a_binary_file_object(client: Client) -> None:
    with client.open("/data/a") as file:
        assert file.readline() == b"first\n"
        assert file.read() == b"second\n"
        assert file.name == "/data/a"
        assert file.mode == "rb"
        assert not file.writable()


@pytest.mark.parametrize("size", [0, 1, 65535, 65536, 65537, 300_000])
def test_read_bytes_gives_all_that_is_in_a_file(fake: FakeBroker, client: Client, size: int) -> None:
    fake[b"/data/any"] = content = os.urandom(size)
    assert client.read_bytes("/data/any") == content


def test_read_bytes_that_fails_is_an_error(
    fake: FakeBroker, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: object) -> bytes:
        raise OSError(errno.EIO, "it failed")

    fake["/data/a"] = bytes(20_000)  # more than comes as a copy
    with monkeypatch.context() as patched:
        patched.setattr(os, "read", fail)
        with pytest.raises(OSError) as caught:
            client.read_bytes("/data/a")
    assert caught.value.errno == errno.EIO
    with pytest.raises(PermissionError):
        client.read_bytes("/data/secret")


def test_what_is_opened_is_close_on_exec_read_only_and_not_shared(client: Client) -> None:
    first, second = client.open_descriptor("/data/a"), client.open_descriptor("/data/a")
    try:
        for descriptor in (first, second):
            assert not os.get_inheritable(descriptor)
            assert fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        assert os.read(first, 5) == b"first"
        assert os.read(second, 5) == b"first"
    finally:
        os.close(first)
        os.close(second)


class Named:
    def __fspath__(self) -> str:
        return "/data/a"


@pytest.mark.parametrize("path", ["/data/a", b"/data/a", Named()])
def test_a_path_is_text_or_bytes_or_a_path_object(client: Client, path: Any) -> None:  # noqa: ANN401
    with client.open(path) as file:
        assert file.name == os.fspath(path)
    assert client.stat(path).size == 13


def test_a_path_that_is_not_utf_8_arrives_as_it_is(fake: FakeBroker, client: Client) -> None:
    fake[b"/data/caf\xe9"] = b"x"
    with client.open(os.fsdecode(b"/data/caf\xe9")) as file:
        assert file.read() == b"x"


@pytest.mark.parametrize(
    ("path", "expected", "reason"),
    [
        ("/data/secret", PermissionError, Reason.DENIED),
        ("/data/absent", FileNotFoundError, Reason.NOT_FOUND),
        ("/data/leased", BlockingIOError, Reason.BUSY),
        ("/data/deep", IsADirectoryError, Reason.NOT_REGULAR),
        ("/data/failing", OSError, Reason.BROKEN),
        ("data/a", ValueError, Reason.PATH_INVALID),
        ("", ValueError, Reason.PATH_INVALID),
        ("/data/../data/a", ValueError, Reason.PATH_INVALID),
        ("/data/a\0", ValueError, Reason.PATH_INVALID),
        ("/" + "x" * 70000, ValueError, Reason.PATH_INVALID),
    ],
)
def test_a_refusal_is_the_os_error_that_a_caller_knows(
    client: Client, path: str, expected: type[Exception], reason: Reason
) -> None:
    with pytest.raises(expected) as caught:
        client.open(path)
    error = caught.value
    assert isinstance(error, BrokerError)
    assert error.reason is reason
    assert error.filename == os.fsencode(path)


def test_a_relative_path_is_told_what_is_wrong_with_it(client: Client) -> None:
    with pytest.raises(PathInvalidError, match="absolute paths only"):
        client.open("data/a")
    with pytest.raises(PathInvalidError, match="empty"):
        client.open("")


def test_a_refusal_has_the_number_of_its_request(fake: FakeBroker, client: Client) -> None:
    with pytest.raises(DeniedError) as caught:
        client.open("/data/secret")
    assert caught.value.request_id == fake.requests[-1].id


def test_what_is_no_path_is_a_type_error(client: Client) -> None:
    with pytest.raises(TypeError):
        client.open(3)  # type: ignore[arg-type]


# opener


def test_the_built_in_open_works_with_the_opener(client: Client) -> None:
    with open("/data/a", "rb", opener=client.opener) as binary:
        assert binary.read() == b"first\nsecond\n"
    with open("/data/a", encoding="utf-8", opener=client.opener) as text:
        assert text.readlines() == ["first\n", "second\n"]
    with open(b"/data/a", "rb", buffering=0, opener=client.opener) as raw:
        assert raw.read(5) == b"first"


@pytest.mark.parametrize("mode", ["w", "wb", "a", "x", "r+", "w+b"])
def test_the_opener_refuses_every_mode_that_writes(client: Client, fake: FakeBroker, mode: str) -> None:
    with pytest.raises(PermissionError, match="for reading only") as caught:
        open("/data/a", mode, opener=client.opener)  # noqa: SIM115 - it is refused
    assert isinstance(caught.value, ReadOnlyError)
    assert caught.value.filename == b"/data/a"
    assert [type(request) for request in fake.requests] == [Hello]


@pytest.mark.parametrize("flags", [os.O_PATH, os.O_DIRECTORY, os.O_CREAT, os.O_TRUNC, os.O_WRONLY, os.O_RDWR])
def test_the_opener_refuses_flags_that_it_can_not_honour(client: Client, flags: int) -> None:
    with pytest.raises(ReadOnlyError):
        client.opener("/data/a", flags | os.O_CLOEXEC)


# open_many


def test_many_files_come_in_order_each_with_its_own_result(client: Client) -> None:
    paths: list[str | bytes] = [
        "/data/a",
        "/data/secret",
        b"/data/b",
        "/data/absent",
        "/data/nul\0",
        "rel",
        "/data/deep/c",
    ]
    seen: list[tuple[object, object]] = []
    with client.open_many(paths, batch=2) as results:
        for result in results:
            with result:
                if result.error is None:
                    seen.append((result.path, result.file.read()))
                else:
                    seen.append((result.path, type(result.error)))
    assert seen == [
        ("/data/a", b"first\nsecond\n"),
        ("/data/secret", DeniedError),
        (b"/data/b", b""),
        ("/data/absent", MissingError),
        ("/data/nul\0", PathInvalidError),
        ("rel", PathInvalidError),
        ("/data/deep/c", b"\xff\xfe"),
    ]


@pytest.mark.parametrize(
    ("count", "batch", "sizes"),
    [
        (0, 64, []),
        (1, 64, [1]),
        (64, 64, [64]),
        (65, 64, [64, 1]),
        (254, 253, [253, 1]),
        (3, 1, [1, 1, 1]),
    ],
)
def test_many_paths_are_sent_in_batches(
    fake: FakeBroker, client: Client, count: int, batch: int, sizes: list[int]
) -> None:
    with client.open_many(["/data/a"] * count, batch) as results:
        opened = 0
        for result in results:
            with result.file as file:
                assert file.read(5) == b"first"
            opened += 1
    assert opened == count
    sent = [len(request.paths) for request in fake.requests if isinstance(request, OpenRequest)]
    assert sent == sizes


def test_a_batch_is_no_longer_than_the_broker_allows() -> None:
    with FakeBroker(FILES, max_paths=3) as fake, fake.connect() as client:
        for result in client.open_many(["/data/b"] * 7):
            result.close()
        sent = [len(request.paths) for request in fake.requests if isinstance(request, OpenRequest)]
        assert sent == [3, 3, 1]


def test_a_batch_of_long_paths_fits_into_its_frame(client: Client) -> None:
    long = "/" + "/".join(["x" * 255] * 15)
    errors = [result.error for result in client.open_many([long] * 100, 253)]
    assert all(isinstance(error, MissingError) for error in errors)
    assert len(errors) == 100


def test_paths_that_can_not_be_sent_cause_no_request(fake: FakeBroker, client: Client) -> None:
    errors = [result.error for result in client.open_many(["/a\0"] * 5, 2)]
    assert all(isinstance(error, PathInvalidError) for error in errors)
    assert [type(request) for request in fake.requests] == [Hello]


@pytest.mark.parametrize("batch", [0, -1, 254])
def test_an_impossible_batch_is_a_value_error_at_once(client: Client, batch: int) -> None:
    with pytest.raises(ValueError, match="1 to 253"):
        client.open_many([], batch)


@pytest.mark.parametrize("paths", ["/data/a", b"/data/a"])
def test_one_path_instead_of_many_is_a_type_error_at_once(client: Client, paths: Any) -> None:  # noqa: ANN401
    with pytest.raises(TypeError, match="many paths"):
        client.open_many(paths)
    with pytest.raises(TypeError, match="many paths"):
        client.stat_many(paths)


def test_closing_the_iterator_closes_what_was_not_delivered(client: Client) -> None:
    with client.open_many(["/data/a"] * 200) as results:
        first = next(results)
    assert list(results) == []
    # What was delivered belongs to its result.
    with first.file as file:
        assert file.read(5) == b"first"


def test_an_iterator_that_is_dropped_closes_what_was_not_delivered(client: Client) -> None:
    next(client.open_many(["/data/a"] * 200)).close()


def test_a_result_that_is_dropped_closes_its_descriptor(client: Client) -> None:
    for result in client.open_many(["/data/a"] * 3):
        assert result.error is None


def test_the_descriptors_under_way_are_two_batches_at_most(client: Client) -> None:
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    most = 0
    for result in client.open_many(["/data/b"] * 500, batch=10):
        most = max(most, len(os.listdir("/proc/self/fd")))
        result.close()
    # The fake broker's are in the same process: while it serves one batch it holds its descriptors.
    assert most <= before + 4 * 10


def test_an_error_of_the_callers_paths_comes_after_what_was_opened(client: Client) -> None:
    def paths() -> Iterator[str]:
        yield "/data/a"
        raise KeyError("mine")

    results = client.open_many(paths(), batch=1)
    next(results).close()
    with pytest.raises(KeyError, match="mine"):
        next(results)


def test_the_client_may_be_used_while_an_iterator_is_in_use(client: Client) -> None:
    opened = 0
    for result, described in zip(
        client.open_many(["/data/a"] * 20, 3), client.stat_many(["/data/a"] * 20, 2), strict=True
    ):
        with result, client.open("/data/a") as file:
            assert result.file.read() == file.read()
        assert described.stat == client.stat("/data/a")
        opened += 1
    assert opened == 20


# Results


def test_a_result_hands_its_descriptor_over_once(client: Client) -> None:
    [result] = client.open_many(["/data/a"])
    assert os.fstat(result.descriptor)
    descriptor = result.detach()
    assert descriptor >= 0
    for use in (lambda: result.file, lambda: result.descriptor, result.detach):
        with pytest.raises(ValueError, match="closed or detached"):
            use()
    result.close()
    os.close(descriptor)


def test_a_result_and_its_file_are_closed_together(client: Client) -> None:
    [result] = client.open_many(["/data/a"])
    with result:
        file = result.file
        assert result.file is file
        assert result.descriptor == file.fileno()
        with pytest.raises(ValueError, match="has the descriptor"):
            result.detach()
    assert file.closed


def test_a_file_outlives_the_result_that_it_came_from(client: Client) -> None:
    [result] = client.open_many(["/data/a"])
    file = result.file
    del result
    with file:
        assert file.read(5) == b"first"


def test_a_refused_result_raises_its_error_whenever_the_file_is_wanted(client: Client) -> None:
    [result] = client.open_many(["/data/secret"])
    for use in (lambda: result.file, lambda: result.descriptor, result.detach):
        with pytest.raises(DeniedError) as caught:
            use()
        assert caught.value is result.error
    with result:
        pass


def test_results_say_what_they_are(client: Client) -> None:
    given, refused = client.open_many(["/data/a", "/data/secret"])
    assert "'/data/a' descriptor=" in repr(given)
    assert "DeniedError" in repr(refused)
    with given:
        assert "file=" in repr(given.file) or "BufferedReader" in repr(given)
    [detached] = client.open_many(["/data/a"])
    os.close(detached.detach())
    assert "closed or taken" in repr(detached)
    described, absent = client.stat_many(["/data/a", "/data/absent"])
    assert "FileStat" in repr(described)
    assert "no such file" in repr(absent)


def test_a_file_object_that_can_not_be_made_closes_its_descriptor() -> None:
    # A directory, which no broker gives: the file object refuses it.
    with pytest.raises(IsADirectoryError):
        file_from(os.open("/", os.O_RDONLY | os.O_CLOEXEC), "/")


# stat, list, status


def test_stat_describes_files_and_directories(client: Client) -> None:
    record = client.stat("/data/a")
    assert (record.size, record.mode & 0o170000) == (13, 0o100000)
    assert client.stat("/data").mode & 0o170000 == 0o040000
    with pytest.raises(MissingError):
        client.stat("/data/absent")
    with pytest.raises(PathInvalidError):
        client.stat("/data/a\0")


def test_stat_many_describes_each_path_or_says_why_not(fake: FakeBroker, client: Client) -> None:
    first, second, third = client.stat_many(["/data/a", "/data/secret", "/nul\0"], batch=1)
    assert first.stat.size == 13
    assert first.error is None
    with pytest.raises(DeniedError):
        _ = second.stat
    assert isinstance(third.error, PathInvalidError)
    assert sum(isinstance(request, StatRequest) for request in fake.requests) == 2


def test_list_gives_what_the_client_may_see(client: Client) -> None:
    entries = {entry.name: entry for entry in client.list("/data")}
    assert entries.keys() == {b"a", b"b", b"deep"}
    assert entries[b"deep"].kind == 4
    facts = entries[b"a"].stat
    assert facts is not None
    assert facts.size == 13


def test_list_fetches_page_after_page(fake: FakeBroker, client: Client) -> None:
    for number in range(PAST_A_PAGE):
        fake[f"/many/{number:03}"] = b""
    names = [entry.name for entry in client.list("/many", page=100)]
    assert names == [b"%03d" % number for number in range(PAST_A_PAGE)]
    pages = [request for request in fake.requests if isinstance(request, ListRequest)]
    assert [page.cookie for page in pages] == [0, 100, 200]


def test_list_raises_its_refusal_at_once(client: Client) -> None:
    with pytest.raises(NotADirectoryError):
        client.list("/data/a")
    with pytest.raises(FileNotFoundError):
        client.list("/data/absent")
    with pytest.raises(PathInvalidError):
        client.list("/data\0")
    with pytest.raises(ValueError, match="entries"):
        client.list("/data", page=2000)


def test_list_fetches_no_page_that_nobody_asks_for(fake: FakeBroker, client: Client) -> None:
    for number in range(PAST_A_PAGE):
        fake[f"/many/{number:03}"] = b""
    next(client.list("/many", page=10))
    assert sum(isinstance(request, ListRequest) for request in fake.requests) == 1


def test_status_and_welcome_are_what_the_broker_says(client: Client) -> None:
    assert client.status()["fake"] is True
    assert client.welcome.version == 1
    assert client.welcome.max_paths == 253


# The life of a client


def test_a_closed_client_raises_value_error_and_its_files_stay_open(fake: FakeBroker) -> None:
    client = fake.connect()
    file = client.open("/data/a")
    results = client.open_many(["/data/a"] * 3, batch=1)
    next(results).close()
    assert not client.closed
    client.close()
    client.close()
    assert client.closed
    with file:
        assert file.read(5) == b"first"
    uses: list[Any] = [
        lambda: client.open("/data/a"),
        lambda: client.stat("/data/a"),
        lambda: client.list("/data"),
        client.status,
        lambda: next(results),
        lambda: next(client.open_many(["/data/a"])),
    ]
    for use in uses:
        with pytest.raises(ValueError, match="closed"):
            use()
    assert "closed" in repr(client)


def test_a_client_says_where_it_leads(tmp_path: Path) -> None:
    with FakeBroker(socket_path=tmp_path / "broker") as fake, fake.connect(timeout=None) as client:
        assert repr(client) == f"<fdbroker.Client of '{tmp_path}/broker'>"
        assert client.timeout is None


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), 1e10])
def test_an_impossible_timeout_is_a_value_error(timeout: float) -> None:
    with pytest.raises(ValueError, match="time-out"):
        connect("/nonexistent", timeout=timeout)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, pytest.raises(ValueError, match="time-out"):
        Client.from_socket(theirs, timeout=timeout)
    assert theirs.fileno() == -1


@pytest.mark.parametrize(
    ("family", "kind"), [(socket.AF_INET, socket.SOCK_STREAM), (socket.AF_UNIX, socket.SOCK_DGRAM)]
)
def test_a_socket_of_another_type_is_a_value_error_and_closed(family: int, kind: int) -> None:
    theirs = socket.socket(family, kind)
    with pytest.raises(ValueError, match="SOCK_SEQPACKET"):
        Client.from_socket(theirs)
    assert theirs.fileno() == -1


def test_a_missing_broker_is_not_a_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "broker"
    with pytest.raises(UnavailableError, match="start the broker") as caught:
        connect(path)
    assert caught.value.errno == errno.ENOENT
    assert caught.value.filename == os.fsencode(path)
    assert isinstance(caught.value, ConnectionError)
    assert not isinstance(caught.value, FileNotFoundError | PermissionError)


def test_a_socket_that_nobody_listens_on_is_unavailable(tmp_path: Path) -> None:
    path = tmp_path / "broker"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
    with pytest.raises(UnavailableError, match="nobody listens") as caught:
        connect(path)
    assert caught.value.errno == errno.ECONNREFUSED


def test_a_socket_of_another_type_is_unavailable(tmp_path: Path) -> None:
    path = tmp_path / "broker"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(path))
        with pytest.raises(UnavailableError, match="SOCK_SEQPACKET"):
            connect(path)


def test_a_process_without_descriptors_can_not_connect(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # No broker, not even a fake one: its thread opens descriptors as well.
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "broker"))
        listener.listen()
        spare = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        os.close(spare)
        resource.setrlimit(resource.RLIMIT_NOFILE, (spare, hard))
        try:
            with pytest.raises(UnavailableError, match="Too many open files"):
                connect(tmp_path / "broker")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_socket_path_that_is_too_long_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="too long"):
        connect(tmp_path / ("x" * 200))


@pytest.mark.root
def test_a_socket_that_the_user_may_not_connect_to_names_the_group() -> None:
    with reachable_directory() as directory, FakeBroker(socket_path=directory / "broker"):
        path = directory / "broker"
        path.chmod(0o600)
        child = os.fork()
        if not child:
            status = 1
            try:
                os.setgroups([])
                os.setresgid(65534, 65534, 65534)
                os.setresuid(65534, 65534, 65534)
                connect(path)
            except UnavailableError as error:
                if error.errno == errno.EACCES and "fdbroker-clients" in str(error):
                    status = 0
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_restart_of_the_broker_goes_unnoticed(tmp_path: Path) -> None:
    path = tmp_path / "broker"
    with FakeBroker(FILES, socket_path=path) as fake, fake.connect() as client:
        results = client.open_many(["/data/a"] * 4, batch=1)
        next(results).close()
        fake.disconnect()
        assert [result.error for result in results] == [None] * 3
        fake.disconnect()
        assert client.stat("/data/a").size == 13
        fake.disconnect()
        assert len(list(client.list("/data"))) == 3
        fake.disconnect()
        assert client.status()["fake"]
        assert sum(isinstance(request, Hello) for request in fake.requests) == 5


def test_a_broker_that_is_started_again_later_is_found(tmp_path: Path) -> None:
    path = tmp_path / "broker"
    with FakeBroker(FILES, socket_path=path) as first:
        client = first.connect()
    # The socket is gone now, as when a broker is restarted by hand.
    again: list[FakeBroker] = []
    starter = threading.Timer(0.02, lambda: again.append(FakeBroker(FILES, socket_path=path)))
    starter.start()
    with client, client.open("/data/a") as file:
        assert file.read(5) == b"first"
    starter.join()
    again[0].close()


def test_a_given_connection_that_ends_is_a_reset(fake: FakeBroker, client: Client) -> None:
    fake.disconnect()
    for _ in range(2):
        with pytest.raises(ConnectionResetError, match=r"connect\(\)") as caught:
            client.open("/data/a")
        assert isinstance(caught.value, DisconnectedError)
    with client.open_many(["/data/a"]) as results, pytest.raises(DisconnectedError):
        next(results)


def test_a_given_socket_with_small_buffers_carries_frames_of_the_full_length(fake: FakeBroker) -> None:
    sock = fake.connect_socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    long = "/" + "/".join(["x" * 255] * 15)
    with Client.from_socket(sock) as client:
        assert len(list(client.stat_many([long] * 40))) == 40


# Threads and forks


def test_threads_share_a_client(client: Client) -> None:
    def work(number: int) -> bool:
        with client.open("/data/a") as file:
            if file.read() != b"first\nsecond\n":
                return False
        with client.open_many(["/data/a", "/data/secret"] * 20, batch=number % 7 + 1) as results:
            for at, result in enumerate(results):
                with result:
                    if (result.error is None) != (at % 2 == 0):
                        return False
        return client.stat("/data/a").size == 13

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(40)))


def test_a_thread_that_waits_too_long_for_its_turn_is_a_timeout() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with FakeBroker() as fake:
        ours.close()
        theirs.close()
        with fake.connect(timeout=0.02) as client:
            with client._session._lock, pytest.raises(fdbroker.BrokerTimeoutError, match="another thread"):
                client.status()
            # That says nothing about the connection.
            assert client.status()["fake"]


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


def test_a_child_connects_anew_and_leaves_the_parents_connection_alone(tmp_path: Path) -> None:
    path = tmp_path / "broker"
    with FakeBroker(FILES, socket_path=path) as fake, fake.connect() as client:
        results = client.open_many(["/data/a"] * 4, batch=2)
        next(results).close()

        def check() -> None:
            with client.open("/data/a") as file:
                assert file.read(5) == b"first"
            # One of the first batch is here already; those of the second are asked for anew.
            assert len([result.file.read() for result in results]) == 3
            client.close()

        assert in_child(check) == 0
        assert sum(isinstance(request, Hello) for request in fake.requests) == 2
        assert [result.error for result in results] == [None] * 3
        assert client.stat("/data/a").size == 13
        assert sum(isinstance(request, Hello) for request in fake.requests) == 2


def test_a_walk_of_the_parent_is_unharmed_by_a_child_that_goes_on_with_it_as_well(tmp_path: Path) -> None:
    files = {f"/many/{number}": b"x" for number in range(100)}
    with (
        FakeBroker(files, socket_path=tmp_path / "broker") as fake,
        fake.connect() as client,
        client.walk("/many", batch=10) as walk,
    ):
        names = {next(walk).relative for _ in range(25)}

        def check() -> None:
            with client.walk("/many", batch=3) as another:
                next(another).close()
            # What had come is here; the rest is asked for on a connection of the child's own.
            theirs = {entry.relative for entry in walk}
            assert len(theirs) == 75
            assert not theirs & names
            assert walk.resumed == 1

        assert in_child(check) == 0
        names |= {entry.relative for entry in walk}
        assert len(names) == 100
        assert walk.resumed == 0
        assert walk.end == (100, 100, 1, 0)
        assert sum(isinstance(request, Hello) for request in fake.requests) == 2


def test_a_child_serves_nobody_and_its_parent_does(tmp_path: Path) -> None:
    with (
        FakeBroker(FILES, socket_path=tmp_path / "broker") as fake,
        fake.connect() as client,
        client.serve("clamd") as service,
        fake.hand_over("clamd"),
        next(service) as served,
    ):

        def check() -> None:
            with pytest.raises(ConnectionResetError):
                next(service)
            with pytest.raises(ConnectionResetError):
                served.stat("/data/a")
            served.close()

        assert in_child(check) == 0
        assert served.stat("/data/a").size == 13
        with fake.hand_over("clamd"), service.accept(5) as other:
            assert other.stat("/data/a").size == 13


def test_threads_serve_clients_while_another_one_waits_for_them(tmp_path: Path) -> None:
    with (
        FakeBroker(FILES, socket_path=tmp_path / "broker") as fake,
        fake.connect() as client,
        client.serve("clamd") as service,
        ThreadPoolExecutor(4) as pool,
    ):

        def serve(served: ServedClient) -> None:
            with served:
                for _ in range(20):
                    served.stat("/data/a")
                served.socket.sendall(served.read_bytes("/data/a"))

        def accept() -> int:
            return len([pool.submit(serve, served) for served in service])

        waiter = ThreadPoolExecutor(1)
        accepted = waiter.submit(accept)
        socks = [fake.hand_over("clamd") for _ in range(30)]
        for sock in socks:
            with sock, sock.makefile("rb") as answer:
                assert answer.read() == FILES["/data/a"]
        service.close()
        assert accepted.result(5) == 30
        waiter.shutdown()


def test_threads_that_wait_for_clients_all_learn_of_the_end(tmp_path: Path) -> None:
    with (
        FakeBroker(FILES, socket_path=tmp_path / "broker") as fake,
        fake.connect() as client,
        client.serve("clamd") as service,
        ThreadPoolExecutor(3) as pool,
    ):
        waiting = [pool.submit(service.accept, 10) for _ in range(3)]
        with fake.hand_over("clamd"), fake.hand_over("clamd"):
            fake.disconnect()
        ends = [one.exception(10) or one.result() for one in waiting]
        for served in ends:
            if isinstance(served, ServedClient):
                served.close()
        assert any(isinstance(end, DisconnectedError) for end in ends)
        assert not any(isinstance(end, TimeoutError) for end in ends)


def test_closing_a_client_wakes_up_who_waits_for_others(tmp_path: Path) -> None:
    with FakeBroker(socket_path=tmp_path / "broker") as fake, ThreadPoolExecutor(1) as pool:
        client = fake.connect()
        with client.serve("clamd") as service:
            waiting = pool.submit(service.accept, 10)
            client.close()
            assert isinstance(waiting.exception(5), ValueError)


def test_a_client_that_is_dropped_is_released_with_what_is_sent_next(tmp_path: Path) -> None:
    with (
        FakeBroker(FILES, socket_path=tmp_path / "broker") as fake,
        fake.connect() as client,
        client.serve("clamd") as service,
        fake.hand_over("clamd"),
    ):
        next(service).socket.close()
        client.status()
        client.status()
        assert [one.clients for one in fake.requests if isinstance(one, ReleaseRequest)] == [(1,)]
        del service
        client.status()


def test_what_is_handed_over_and_no_socket_is_a_protocol_error() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        say(ours, welcome())
        say(ours, encode_serve_reply(FIRST, 7, GIVEN))
        say(ours, encode_accepted(FIRST, 7, AcceptedClient(1, 2, 3, 4, 0)), 1)  # of /dev/null
        with (
            Client.from_socket(theirs) as client,
            client.serve("clamd") as service,
            pytest.raises(fdbroker.ProtocolError, match="no socket"),
        ):
            service.accept(5)


@pytest.mark.parametrize("answer", ["refused", "error"])
def test_a_listener_that_may_not_be_served_is_denied(answer: str) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        say(ours, welcome())
        refusal = ErrorReply(FIRST, 7, Kind.REFUSED, Reason.DENIED, errno.EACCES, "not you")
        frames = {
            "refused": encode_serve_reply(FIRST, 7, refused(Reason.DENIED)),
            "error": encode_error(refusal),
        }
        say(ours, frames[answer])
        with Client.from_socket(theirs) as client, pytest.raises(PermissionError) as caught:
            client.serve("clamd")
        assert caught.value.filename == b"clamd"


def test_a_child_does_not_wait_for_a_thread_of_its_parent(tmp_path: Path) -> None:
    path = tmp_path / "broker"
    with FakeBroker(FILES, socket_path=path) as fake, fake.connect() as client, client._session._lock:
        assert in_child(lambda: client.stat("/data/a")) == 0


def test_a_child_can_not_use_a_given_connection(client: Client) -> None:
    def check() -> None:
        with pytest.raises(ConnectionResetError):
            client.stat("/data/a")

    assert in_child(check) == 0
    assert client.stat("/data/a").size == 13
