"""Brokers that do what the protocol forbids, or go away; no descriptor is ever left behind."""

from __future__ import annotations

import errno
import os
import resource
import socket
from typing import TYPE_CHECKING

import pytest

from fdbroker.client import (
    BrokerTimeoutError,
    Client,
    DeniedError,
    DisconnectedError,
    LimitError,
    ProtocolError,
    TooManyFilesError,
    UnavailableError,
    connect,
)
from fdbroker.client.connection import Connection
from fdbroker.client.engine import OpenPaths
from fdbroker.client.link import Call, Deadline, connect_socket
from fdbroker.kernel import sockets
from fdbroker.wire.format import ERRNO_OF, HEADER, MAX_FRAME, Kind, Reason, Type
from fdbroker.wire.messages import GIVEN, ErrorReply, Hello, OpenRequest, broken, refused
from fdbroker.wire.replies import (
    encode_error,
    encode_list_reply,
    encode_stat_reply,
    encode_status_reply,
)
from tests.client.brokers import (
    FIRST,
    GENERATION,
    HELLO,
    SECOND,
    THIRD,
    ThreadedBroker,
    answer_all,
    answer_one,
    broker_saying,
    die_at_once,
    die_with_the_request,
    given,
    hear,
    say,
    welcome,
)

if TYPE_CHECKING:
    from pathlib import Path

DENIED = refused(Reason.DENIED)


def error(request_id: int, kind: Kind, reason: Reason, text: str = "said so") -> bytes:
    return encode_error(ErrorReply(request_id, GENERATION, kind, reason, ERRNO_OF[reason], text))


@pytest.mark.parametrize(
    ("frame", "descriptors"),
    [
        pytest.param(given(FIRST), 2, id="too many descriptors"),
        pytest.param(given(FIRST), 253, id="very many descriptors"),
        pytest.param(given(FIRST), 0, id="no descriptor"),
        pytest.param(given(FIRST, [DENIED]), 1, id="a refusal with a descriptor"),
        pytest.param(given(FIRST, [GIVEN, GIVEN]), 2, id="too many results"),
        pytest.param(given(FIRST, []), 0, id="no results"),
        pytest.param(given(SECOND), 1, id="the wrong id"),
        pytest.param(given(HELLO), 1, id="the id of the hello"),
        pytest.param(encode_status_reply(FIRST, 1, b"{}"), 1, id="the wrong type"),
        pytest.param(welcome(FIRST), 0, id="a second welcome"),
        pytest.param(given(FIRST)[:-1], 1, id="a truncated frame"),
        pytest.param(given(FIRST)[:5], 1, id="a truncated header"),
        pytest.param(given(FIRST) + b"\0", 1, id="a byte too many"),
        pytest.param(bytes(MAX_FRAME + 2), 1, id="a frame above the limit"),
        pytest.param(b"\xff" * 40, 1, id="nonsense"),
        pytest.param(error(FIRST, Kind.REFUSED, Reason.LIMIT), 1, id="an error with a descriptor"),
        pytest.param(error(FIRST, Kind.MALFORMED, Reason.MALFORMED), 0, id="that we were malformed"),
        pytest.param(error(0, Kind.MALFORMED, Reason.MALFORMED), 0, id="that something was malformed"),
    ],
)
def test_a_broker_that_answers_open_with_nonsense_is_given_up(frame: bytes, descriptors: int) -> None:
    with broker_saying((frame, descriptors)) as (client, broker):
        with pytest.raises(ProtocolError) as caught:
            client.open("/a")
        assert isinstance(caught.value, ConnectionError)
        assert isinstance(hear(broker), OpenRequest)
        assert hear(broker) is None
        with pytest.raises(DisconnectedError, match=r"not made by connect\(\)"):
            client.open("/a")


@pytest.mark.parametrize("number", [1, 63, 64])
def test_descriptors_that_do_not_match_the_results_of_a_batch_are_closed(number: int) -> None:
    results = [GIVEN] * 65
    with (
        broker_saying((given(FIRST, results), number)) as (client, _),
        client.open_many(["/a"] * 65, batch=65) as many,
        pytest.raises(ProtocolError, match=f"{number} descriptors came where 65 belong"),
    ):
        next(many)


def test_a_broker_that_ends_instead_of_answering_is_a_reset_of_the_connection() -> None:
    with broker_saying(end=True) as (client, _):
        with pytest.raises(ConnectionResetError, match="broker closed it") as caught:
            client.open("/a")
        assert isinstance(caught.value, DisconnectedError)
        with pytest.raises(DisconnectedError):
            client.stat("/a")


def test_a_broker_that_ends_in_the_middle_of_a_batch_job_delivers_what_it_said() -> None:
    with (
        broker_saying((given(FIRST, [GIVEN, DENIED]), 1), end=False) as (client, broker),
        client.open_many(["/a", "/b", "/c"], batch=2) as many,
    ):
        first = next(many)
        broker.close()
        with first:
            assert os.fstat(first.descriptor)
        assert isinstance(next(many).error, DeniedError)
        with pytest.raises(DisconnectedError):
            next(many)


def test_an_empty_message_is_the_end_whatever_comes_with_it() -> None:
    with broker_saying((b"", 1)) as (client, _), pytest.raises(DisconnectedError):
        client.status()


def test_the_last_words_of_a_broker_are_read_though_it_never_read_the_request() -> None:
    with broker_saying() as (client, broker):
        many = client.open_many(["/a", "/b"], batch=1)
        say(broker, given(FIRST), 1)
        # The next batch is under way and unread when the broker closes, so the kernel reports a reset first.
        with next(many):
            say(broker, error(0, Kind.BROKEN, Reason.BROKEN, "out of memory"))
            broker.close()
        with pytest.raises(OSError, match="out of memory"):
            next(many)


def test_the_last_words_of_a_broker_are_read_though_it_takes_no_request_any_more() -> None:
    with broker_saying((error(0, Kind.REFUSED, Reason.IDENTITY, "who are you"), 0), end=True) as (client, _):
        with pytest.raises(DeniedError, match="who are you"):
            client.open("/a")
        with pytest.raises(DisconnectedError):
            client.open("/a")


def test_silence_is_a_timeout_and_ends_the_connection() -> None:
    with broker_saying(timeout=0.02) as (client, broker):
        with pytest.raises(TimeoutError) as caught:
            client.open("/a")
        assert isinstance(caught.value, BrokerTimeoutError)
        assert caught.value.errno == errno.ETIMEDOUT
        assert isinstance(hear(broker), OpenRequest)
        assert hear(broker) is None
        with pytest.raises(DisconnectedError):
            client.open("/a")


def test_a_broker_that_takes_no_requests_is_a_timeout() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        say(ours, welcome())
        connection = Connection.greet(theirs, Deadline.after(30.0))
        long = OpenPaths([b"/" + b"x" * 4094] * 15)
        with pytest.raises(BrokerTimeoutError, match="did not take"):
            send_until_it_fails(connection, long, Deadline.after(0.05))
        connection.close()


def send_until_it_fails(connection: Connection, question: OpenPaths, deadline: Deadline) -> None:
    while True:
        connection.send(Call(question), deadline)


def refuse_all_before_receiving_more(sock: socket.socket) -> None:
    """Answer each request, and read no other before the answer is in the small queue to the client."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    hello = hear(sock)
    assert isinstance(hello, Hello)
    say(sock, welcome(hello.id))
    while request := hear(sock):
        assert isinstance(request, OpenRequest)
        say(sock, given(request.id, [DENIED] * len(request.paths)))


def test_a_full_queue_does_not_keep_the_client_from_receiving(tmp_path: Path) -> None:
    path = tmp_path / "broker"
    with ThreadedBroker(str(path), refuse_all_before_receiving_more):
        deadline = Deadline.after(30.0)
        connection = Connection.greet(connect_socket(os.fsencode(path), deadline), deadline)
        calls = [Call(OpenPaths([b"/" + b"x" * 4094] * 15)) for _ in range(30)]
        for call in calls:
            connection.send(call, deadline)
        while not calls[-1].answers:
            connection.wait(deadline)
        assert all(call.answers for call in calls)
        connection.close()


def test_a_timeout_closes_what_an_iterator_has_under_way() -> None:
    with broker_saying((given(FIRST), 1), timeout=0.02) as (client, _):
        many = client.open_many(["/a", "/b"], batch=1)
        with next(many):
            pass
        with pytest.raises(BrokerTimeoutError):
            next(many)
        with pytest.raises(StopIteration):
            next(many)


def test_a_late_answer_to_an_iterator_that_was_closed_is_closed() -> None:
    with broker_saying((given(FIRST), 1)) as (client, broker):
        many = client.open_many(["/a", "/b"], batch=1)
        next(many).close()
        many.close()
        # The request of /b is under way, and its answer comes before that of the next request.
        say(broker, given(SECOND), 1)
        say(broker, encode_status_reply(THIRD, 1, b'{"a": 1}'))
        assert client.status() == {"a": 1}


def test_an_answer_to_another_request_is_kept_for_it() -> None:
    with broker_saying((given(FIRST), 1)) as (client, broker):
        with client.open_many(["/a", "/b"], batch=1) as many:
            next(many).close()
            say(broker, given(SECOND), 1)
            say(broker, encode_status_reply(THIRD, 1, b"{}"))
            assert client.status() == {}
            # It came, and waits here.
            with next(many) as result:
                assert os.fstat(result.descriptor)
        with client.open_many(["/a", "/b"], batch=1) as many:
            say(broker, given(THIRD + 1), 1)
            next(many).close()
            say(broker, given(THIRD + 2), 1)
            say(broker, encode_status_reply(THIRD + 3, 1, b"{}"))
            client.status()
            # And is closed with the iterator.


def test_a_process_without_room_for_the_descriptors_loses_none_of_those_that_came() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with broker_saying((given(FIRST, [GIVEN] * 100), 100)) as (client, _):
        spare = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        resource.setrlimit(resource.RLIMIT_NOFILE, (spare + 20, hard))
        try:
            with (
                client.open_many(["/a"] * 100, batch=100) as many,
                pytest.raises(TooManyFilesError) as caught,
            ):
                next(many)
            assert caught.value.errno == errno.EMFILE
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            os.close(spare)


def test_too_many_descriptors_under_way_is_a_blocking_io_error_and_the_connection_goes_on() -> None:
    refusal = error(FIRST, Kind.REFUSED, Reason.LIMIT, "too many descriptors are under way")
    with broker_saying((refusal, 0), (given(SECOND), 1)) as (client, _):
        with pytest.raises(BlockingIOError, match="under way") as caught:
            client.open("/a")
        assert isinstance(caught.value, LimitError)
        assert (caught.value.filename, caught.value.request_id) == (b"/a", FIRST)
        os.close(client.open_descriptor("/a"))


def test_a_batch_that_is_refused_as_a_whole_refuses_each_of_its_paths() -> None:
    refusal = error(FIRST, Kind.REFUSED, Reason.LIMIT)
    with (
        broker_saying((refusal, 0), (given(SECOND), 1)) as (client, _),
        client.open_many(["/a", "/b", "/c"], batch=2) as many,
    ):
        a, b, c = many
        assert isinstance(a.error, LimitError)
        assert a.error.filename == b"/a"
        assert isinstance(b.error, LimitError)
        assert b.error.filename == b"/b"
        with c:
            assert c.error is None


def test_a_status_can_be_refused() -> None:
    refusal = error(FIRST, Kind.REFUSED, Reason.IDENTITY)
    with broker_saying((refusal, 0)) as (client, _), pytest.raises(DeniedError):
        client.status()


@pytest.mark.parametrize("number", [errno.ENOBUFS, errno.EACCES, errno.EPERM])
@pytest.mark.parametrize("call", ["send_at_once", "receive"])
def test_a_socket_that_fails_is_not_taken_for_a_file_that_is_refused(
    monkeypatch: pytest.MonkeyPatch, number: int, call: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    with broker_saying((given(FIRST), 1)) as (client, _):
        monkeypatch.setattr(sockets, call, fail)
        with pytest.raises(UnavailableError) as caught:
            client.open("/a")
        assert caught.value.errno == number
        monkeypatch.undo()
        with pytest.raises(DisconnectedError):
            client.open("/a")


def test_a_failure_to_send_the_next_batch_comes_after_what_was_received(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    send = sockets.send_at_once

    def fail_at_b(sock: socket.socket, data: bytes) -> int:
        if b"/b" in data:
            raise OSError(errno.ENOBUFS, "no buffer")
        return send(sock, data)

    with (
        broker_saying((given(FIRST), 1)) as (client, _),
        client.open_many(["/a", "/b"], batch=1) as many,
    ):
        monkeypatch.setattr(sockets, "send_at_once", fail_at_b)
        with next(many) as result:
            assert result.error is None
        with pytest.raises(UnavailableError):
            next(many)
        monkeypatch.undo()


@pytest.mark.parametrize("document", [b"", b"{", b"[]", b"\xff", b"[" * 60000])
def test_a_status_that_is_no_json_object_is_a_protocol_error(document: bytes) -> None:
    reply = encode_status_reply(FIRST, 1, document)
    with broker_saying((reply, 0)) as (client, _), pytest.raises(ProtocolError):
        client.status()


def test_a_list_that_leads_in_a_circle_is_a_protocol_error() -> None:
    with broker_saying(
        (encode_list_reply(FIRST, 1, GIVEN, [], 5, last=False), 0),
        (encode_list_reply(SECOND, 1, GIVEN, [], 5, last=False), 0),
    ) as (client, _):
        entries = client.list("/d")
        with pytest.raises(ProtocolError, match="leads to itself"):
            next(entries)


def test_a_list_can_be_refused_on_a_later_page() -> None:
    with broker_saying(
        (encode_list_reply(FIRST, 1, GIVEN, [], 5, last=False), 0),
        (encode_list_reply(SECOND, 1, DENIED, [], 0, last=True), 0),
    ) as (client, _):
        entries = client.list("/d")
        with pytest.raises(PermissionError):
            next(entries)


def test_a_stat_that_is_refused_has_the_error_of_the_open() -> None:
    with broker_saying((encode_stat_reply(FIRST, 1, [(broken(errno.ENOMEM), None)]), 0)) as (client, _):
        with pytest.raises(OSError, match="Cannot allocate memory") as caught:
            client.stat("/a")
        assert caught.value.errno == errno.ENOMEM


@pytest.mark.parametrize(
    ("frame", "expected"),
    [
        (error(0, Kind.REFUSED, Reason.LIMIT), LimitError),
        (error(HELLO, Kind.REFUSED, Reason.VERSION), ProtocolError),
        (error(HELLO, Kind.REFUSED, Reason.IDENTITY), DeniedError),
        (welcome(version=2), ProtocolError),
        (welcome(max_paths=0), ProtocolError),
        (HEADER.pack(Type.HELLO | 0x80, 0, 0, HELLO, 0), ProtocolError),
        (b"HTTP/1.1 400 Bad Request", ProtocolError),
        (b"", DisconnectedError),
    ],
)
def test_a_connection_that_is_not_welcomed_is_closed(frame: bytes, expected: type[Exception]) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        say(ours, frame)
        with pytest.raises(expected):
            Client.from_socket(theirs)
        assert isinstance(hear(ours), Hello)
        assert hear(ours) is None
        assert theirs.fileno() == -1


def test_a_connection_that_is_refused_before_it_says_hello_has_the_reason() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        say(ours, error(0, Kind.REFUSED, Reason.LIMIT, "too many connections"))
    with pytest.raises(LimitError, match="too many connections"):
        Client.from_socket(theirs)


def test_a_broker_that_never_says_welcome_is_a_timeout() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, pytest.raises(BrokerTimeoutError):
        Client.from_socket(theirs, timeout=0.02)


def test_a_broker_that_never_accepts_is_a_timeout(tmp_path: Path) -> None:
    path = str(tmp_path / "broker")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen(0)
        with pytest.raises(BrokerTimeoutError, match="did not answer"):
            connect(path, timeout=0.02)
        # That one is in the queue, which is full now.
        with pytest.raises(BrokerTimeoutError, match="did not accept") as caught:
            connect(path, timeout=0.02)
        assert caught.value.filename == os.fsencode(path)


def test_a_request_is_repeated_on_a_new_connection(tmp_path: Path) -> None:
    path = str(tmp_path / "broker")
    with (
        ThreadedBroker(path, die_with_the_request, die_at_once, answer_all) as broker,
        connect(path) as client,
    ):
        os.close(client.open_descriptor("/a"))
        assert broker.connections == 3
        # The limits of the new broker hold.
        assert client.welcome.max_paths == 4


def test_an_idle_connection_that_was_lost_is_replaced(tmp_path: Path) -> None:
    path = str(tmp_path / "broker")
    with ThreadedBroker(path, answer_one, answer_all) as broker, connect(path) as client:
        os.close(client.open_descriptor("/a"))
        os.close(client.open_descriptor("/b"))
        assert broker.connections == 2


def test_a_batch_under_way_is_repeated(tmp_path: Path) -> None:
    path = str(tmp_path / "broker")
    with (
        ThreadedBroker(path, answer_one, answer_one, answer_all) as broker,
        connect(path) as client,
        client.open_many([f"/{number}" for number in range(8)], batch=2) as many,
    ):
        taken = []
        for result in many:
            with result:
                taken.append((result.path, result.error))
        assert taken == [(f"/{number}", None) for number in range(8)]
        assert broker.connections == 3


def test_a_request_that_kills_the_broker_is_not_repeated_for_ever(tmp_path: Path) -> None:
    path = str(tmp_path / "broker")
    with ThreadedBroker(path, die_with_the_request) as broker, connect(path) as client:
        with pytest.raises(DisconnectedError, match="4 connections"):
            client.open("/a")
        assert broker.connections == 4


def test_a_batch_that_a_restarted_broker_has_no_room_for_is_an_error(tmp_path: Path) -> None:
    path = str(tmp_path / "broker")
    with (
        ThreadedBroker(path, die_with_the_request, answer_all) as _,
        connect(path) as client,
        client.open_many(["/a"] * 5) as many,
        pytest.raises(DisconnectedError, match="5 paths"),
    ):
        next(many)


def test_a_broker_that_is_gone_for_good_is_unavailable(tmp_path: Path) -> None:
    path = str(tmp_path / "broker")
    with ThreadedBroker(path, answer_one) as _:
        client = connect(path, timeout=0.2)
        os.close(client.open_descriptor("/a"))
    with client, pytest.raises(UnavailableError) as caught:
        client.open("/a")
    assert caught.value.errno == errno.ECONNREFUSED


def test_a_socket_that_was_replaced_by_another_kind_is_unavailable_at_once(tmp_path: Path) -> None:
    path = tmp_path / "broker"
    with ThreadedBroker(str(path), answer_one) as _:
        client = connect(path)
        os.close(client.open_descriptor("/a"))
    path.unlink()
    with client, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(str(path))
        with pytest.raises(UnavailableError) as caught:
            client.open("/a")
        assert caught.value.errno == errno.EPROTOTYPE


def test_a_client_is_usable_after_a_timeout(tmp_path: Path) -> None:
    path = str(tmp_path / "broker")

    def say_nothing(sock: socket.socket) -> None:
        hello = hear(sock)
        assert isinstance(hello, Hello)
        say(sock, welcome(hello.id))
        assert isinstance(hear(sock), OpenRequest)
        assert hear(sock) is None  # the client gave up

    with ThreadedBroker(path, say_nothing, answer_all) as broker, connect(path, timeout=0.5) as client:
        with pytest.raises(BrokerTimeoutError):
            client.open("/a")
        os.close(client.open_descriptor("/a"))
        assert broker.connections == 2


def test_a_client_is_usable_after_a_protocol_error(tmp_path: Path) -> None:
    path = str(tmp_path / "broker")

    def answer_wrongly(sock: socket.socket) -> None:
        hello = hear(sock)
        assert isinstance(hello, Hello)
        say(sock, welcome(hello.id))
        request = hear(sock)
        assert request is not None
        say(sock, given(request.id), 3)
        assert hear(sock) is None

    with ThreadedBroker(path, answer_wrongly, answer_all) as broker, connect(path) as client:
        with pytest.raises(ProtocolError):
            client.open("/a")
        os.close(client.open_descriptor("/a"))
        assert broker.connections == 2
