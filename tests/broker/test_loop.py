"""The loop: greeting, bad frames, limits, clients that do not receive, and what is left open (in process)."""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import json
import os
import resource
import select
import socket
import struct
from typing import TYPE_CHECKING, NamedTuple

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fdbroker.kernel import sockets
from fdbroker.wire.client import (
    AcceptedReply,
    OpenReply,
    StatusReply,
    encode_hello,
    encode_list,
    encode_open,
    encode_serve,
    encode_stat,
    encode_status,
)
from fdbroker.wire.format import MAX_COPY, MAX_FRAME, MAX_PATHS, Kind, Reason, Type
from fdbroker.wire.messages import ErrorReply, Welcome
from tests.broker.conftest import no_descriptor_left
from tests.broker.speaking import SECONDS, Speaker, check_audit, descriptors_of, frame, read_opened
from tests.broker.stepping import SteppedBroker
from tests.running_broker import policy

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from fdbroker.broker.connection import Connection

HELLO_BODY = struct.pack("<8sHHI", b"fdbroker", 1, 1, 0)
FILES = 253


@pytest.fixture
def bystander(stepped: SteppedBroker) -> Iterator[Speaker]:
    """Return a client that is served before and after whatever the test does."""
    speaker = stepped.join()
    assert speaker.open_one(bytes(stepped.tree / "file")).content == b"content"
    yield speaker
    assert speaker.open_one(bytes(stepped.tree / "file")).content == b"content"


def limited(tree: Path, *, connections: int = 64, in_flight: int = 512) -> dict[str, object]:
    limits = {"connections_per_uid": connections, "in_flight_per_connection": in_flight}
    return policy(tree, limits=limits)


@pytest.fixture
def few_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let brokers that are made now believe that they may have 4,096 descriptors: 512 under way per uid."""
    monkeypatch.setattr(resource, "getrlimit", lambda _which: (4096, 4096))


# hello


def test_welcome_tells_version_level_and_limits(stepped: SteppedBroker) -> None:
    welcome = stepped.join(hello=False).greet()
    assert welcome.version == 1
    assert welcome.features == 0
    assert welcome.max_paths == MAX_PATHS == 253
    assert welcome.max_frame == MAX_FRAME == 65536
    assert welcome.in_flight == 512
    assert welcome.copy_max == MAX_COPY == 16384
    assert welcome.generation == 1


@pytest.mark.parametrize(
    "first", [encode_open(1, [b"/a"]), encode_stat(1, [b"/a"]), encode_list(1, b"/a"), encode_status(1)]
)
def test_nothing_is_answered_before_hello(stepped: SteppedBroker, bystander: Speaker, first: bytes) -> None:
    speaker = stepped.join(hello=False)
    error = speaker.error(first)
    assert (error.kind, error.reason, error.errno) == (Kind.MALFORMED, Reason.MALFORMED, errno.EPROTO)
    assert error.id == 1
    assert "the first frame is not a hello" in error.text
    assert speaker.is_closed()
    assert stepped.events() == ["malformed"]


def test_second_hello_ends_the_connection(stepped: SteppedBroker, bystander: Speaker) -> None:
    speaker = stepped.join()
    error = speaker.error(encode_hello(5))
    assert (error.kind, error.id, error.text) == (Kind.MALFORMED, 5, "a second hello")
    assert speaker.is_closed()
    assert "a second hello" in stepped.records()[-1]["reason"]


@pytest.mark.parametrize(("lowest", "highest"), [(2, 9), (0, 0), (65535, 65535)])
def test_without_a_common_version_hello_is_refused_and_may_be_said_again(
    stepped: SteppedBroker, lowest: int, highest: int
) -> None:
    speaker = stepped.join(hello=False)
    error = speaker.error(frame(1, body=struct.pack("<8sHHI", b"fdbroker", lowest, highest, 0)))
    assert (error.kind, error.reason, error.errno) == (Kind.REFUSED, Reason.VERSION, errno.EPROTONOSUPPORT)
    assert f"version 1, not {lowest} to {highest}" in error.text
    assert speaker.greet().version == 1


def test_hello_with_a_range_of_versions_and_unknown_features_gets_what_there_is(
    stepped: SteppedBroker,
) -> None:
    speaker = stepped.join(hello=False)
    reply = speaker.ask(frame(1, body=struct.pack("<8sHHI", b"fdbroker", 0, 7, 0xFFFFFFFF))).reply
    assert isinstance(reply, Welcome)
    assert (reply.version, reply.features) == (1, 0)


# bad frames

MALFORMED = {
    "no whole header": (b"\x02", "shorter than its header"),
    "type 0": (frame(0, body=b"/a"), "unknown request type 0x00"),
    "type 11": (frame(11, body=b"/a"), "unknown request type 0x0b"),
    "type of a reply": (frame(0x82, count=1, body=bytes(8)), "unknown request type 0x82"),
    "type of an error": (frame(0xFF, flags=1, body=bytes(4)), "unknown request type 0xff"),
    "flags": (frame(2, flags=4, count=1, body=b"/a"), "flags or reserved"),
    "generation": (frame(2, generation=1, count=1, body=b"/a"), "flags or reserved"),
    "0 paths": (frame(2, count=0, body=b"/a"), "1 to 253 paths, not 0"),
    "0 paths to stat": (frame(3, count=0), "1 to 253 paths, not 0"),
    "254 paths": (frame(2, count=254, body=b"\0".join([b"/a"] * 254)), "1 to 253 paths, not 254"),
    "65,535 paths": (frame(2, count=65535, body=b"/a"), "1 to 253 paths, not 65535"),
    "fewer paths": (frame(2, count=2, body=b"/a"), "2 paths announced, 1 sent"),
    "more paths": (frame(2, count=1, body=b"/a\0/b"), "1 paths announced, 2 sent"),
    "NUL at the end": (frame(3, count=1, body=b"/a\0"), "1 paths announced, 2 sent"),
    "list without cookie": (frame(4, body=b"1234567"), "without its cookie"),
    "list of too many": (frame(4, count=1025, body=bytes(8) + b"/a"), "at most 1024 entries"),
    "list with NUL": (frame(4, body=bytes(8) + b"/a\0b"), "NUL"),
    "status with a body": (frame(5, body=b"x"), "with a body"),
    "part of status without row": (frame(5, count=1), "its row is missing"),
    "status with an unknown part": (frame(5, count=9, body=bytes(4)), "9 is no part of the status"),
    "too long": (frame(2, count=1, body=b"/" * (MAX_FRAME - 11)), "longer than 65536"),
    "much too long": (frame(2, count=1, body=b"/" * 150_000), "longer than 65536"),
}
BAD_HELLOS = {
    "short": (frame(1, body=HELLO_BODY[:-1]), "wrong length"),
    "long": (frame(1, body=HELLO_BODY + b"\0"), "wrong length"),
    "count": (frame(1, count=1, body=HELLO_BODY), "wrong length"),
    "magic": (frame(1, body=b"FDBROKER" + HELLO_BODY[8:]), "magic"),
    "versions": (frame(1, body=struct.pack("<8sHHI", b"fdbroker", 2, 1, 0)), "lowest version"),
    "flags": (frame(1, flags=128, body=HELLO_BODY), "flags or reserved"),
    "open": (encode_open(77, [b"/a"]), "not a hello"),
}


def check_refused_as_malformed(stepped: SteppedBroker, speaker: Speaker, sent: bytes, said: str) -> None:
    connections = stepped.connections
    # What is sent must fit into the sender's own buffer.
    speaker.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 400_000)
    error = speaker.error(sent)
    assert (error.kind, error.reason, error.errno) == (Kind.MALFORMED, Reason.MALFORMED, errno.EPROTO)
    assert said in error.text
    assert error.id in {77, 0}
    assert speaker.is_closed()
    assert stepped.connections == connections - 1
    record = stepped.records()[-1]
    assert record["event"] == "malformed"
    assert record["reason"] == error.text
    assert record["request"] == error.id


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_frame_is_told_recorded_and_ends_the_connection(
    stepped: SteppedBroker, bystander: Speaker, case: str
) -> None:
    check_refused_as_malformed(stepped, stepped.join(), *MALFORMED[case])


@pytest.mark.parametrize("case", BAD_HELLOS)
def test_malformed_hello_is_told_recorded_and_ends_the_connection(
    stepped: SteppedBroker, bystander: Speaker, case: str
) -> None:
    check_refused_as_malformed(stepped, stepped.join(hello=False), *BAD_HELLOS[case])


def test_longest_frame_is_answered(stepped: SteppedBroker, bystander: Speaker) -> None:
    speaker = stepped.join()
    speaker.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 400_000)
    paths = [b"/" + b"x" * 258] * 252
    paths.append(b"/" * (MAX_FRAME - 12 - 252 * 260))
    sent = encode_open(7, paths)
    assert len(sent) == MAX_FRAME
    assert {entry.reason for entry in read_opened(speaker.ask(sent))} == {"path_invalid"}


def test_empty_message_ends_the_connection(stepped: SteppedBroker, bystander: Speaker) -> None:
    speaker = stepped.join()
    before = stepped.connections
    speaker.sock.send(b"")
    stepped.serve()
    assert speaker.is_closed()
    assert stepped.connections == before - 1


def test_client_that_stops_sending_is_let_go(stepped: SteppedBroker, bystander: Speaker) -> None:
    speaker = stepped.join()
    before = stepped.connections
    speaker.sock.shutdown(socket.SHUT_WR)
    stepped.serve()
    assert speaker.is_closed()
    assert stepped.connections == before - 1


def test_request_whose_sender_hung_up_is_not_decided(stepped: SteppedBroker, bystander: Speaker) -> None:
    speaker = stepped.join()
    decided = len(stepped.reasons())
    speaker.sock.send(encode_open(1, [bytes(stepped.tree / "file")]))
    speaker.close()
    assert len(stepped.reasons()) == decided


@pytest.mark.parametrize(
    "whole",
    [
        encode_open(1, [b"/a", b"/b"]),
        encode_stat(2, [b"/a"]),
        encode_list(3, b"/a"),
        encode_status(4),
        encode_hello(5),
    ],
)
def test_frame_cut_off_anywhere_is_answered_or_refused_and_never_a_crash(
    stepped: SteppedBroker, bystander: Speaker, whole: bytes
) -> None:
    for length in range(1, len(whole) + 1):
        for greeted in (True, False):
            speaker = stepped.join(hello=greeted)
            answer = speaker.ask(whole[:length])
            reply = answer.reply
            if isinstance(reply, ErrorReply):
                assert reply.kind == Kind.MALFORMED
                assert speaker.is_closed()
            else:
                # What is left may be a request of its own: a path is shorter without its end.
                assert length == len(whole) or reply.id == whole[4]
                assert not answer.descriptors
            speaker.close()
    assert stepped.connections == 1


frames = st.one_of(
    st.binary(min_size=1, max_size=80),
    st.builds(
        frame,
        st.integers(0, 255),
        st.sampled_from([0, 0, 0, 1, 255]),
        st.integers(0, 300),
        st.sampled_from([0, 0, 1]),
        st.binary(max_size=60),
    ),
    st.builds(
        lambda kind, parts, tail: frame(kind, count=len(parts), body=tail + b"\0".join(parts)),
        st.sampled_from([1, 2, 3, 4, 5]),
        st.lists(st.sampled_from([b"", b"/", b"/a", b"a", b"/..", b"/etc/passwd", b"/a/" * 99]), max_size=9),
        st.sampled_from([b"", bytes(8), b"\xff" * 8, HELLO_BODY]),
    ),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sent=st.lists(frames, min_size=1, max_size=4), greeted=st.booleans())
@example(sent=[HELLO_BODY], greeted=False)
def test_no_bytes_crash_it_or_leave_anything_behind(
    stepped: SteppedBroker,
    sent: list[bytes],
    greeted: bool,  # noqa: FBT001
) -> None:
    before = descriptors_of()
    speaker = stepped.join(hello=greeted)
    for message in sent:
        try:
            speaker.send(message)
        except BrokenPipeError:
            break
        answer = speaker.receive()
        if answer is None:
            break
        answer.descriptors.close()
    speaker.close()
    assert descriptors_of() == before
    assert stepped.connections == 0
    with stepped.join() as other:
        assert other.open_one(bytes(stepped.tree / "file")).content == b"content"


# descriptors that are sent to it


def send_rights(sock: socket.socket, count: int, data: bytes) -> None:
    with open("/dev/null", "rb") as file:
        rights = array.array("i", [file.fileno()] * count)
        sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])


def kernel_refuses_rights() -> bool:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        return sockets.refuse_descriptors(ours)


@pytest.mark.skipif(not kernel_refuses_rights(), reason="SO_PASSRIGHTS needs Linux 6.16")
@pytest.mark.parametrize("way", ["pair", "listener"])
def test_descriptor_sent_to_it_is_refused_by_the_kernel(
    stepped: SteppedBroker, bystander: Speaker, tmp_path: Path, way: str
) -> None:
    if way == "pair":
        speaker = stepped.join()
    else:
        # Before accept() as well: the option is the listener's.
        path = stepped.listen(tmp_path)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        speaker = Speaker(sock, stepped.serve)
        sock.connect(str(path))
        with pytest.raises(PermissionError):
            send_rights(sock, 1, encode_hello(1))
        stepped.serve()
        speaker.greet()
    with speaker:
        with pytest.raises(PermissionError):
            send_rights(speaker.sock, 1, encode_open(1, [bytes(stepped.tree / "file")]))
        assert speaker.open_one(bytes(stepped.tree / "file")).content == b"content"


@pytest.mark.parametrize("count", [1, 2, 253])
def test_descriptor_that_arrives_all_the_same_is_closed_and_ends_the_connection(
    stepped: SteppedBroker, bystander: Speaker, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """On a kernel without SO_PASSRIGHTS, or queued before it was set."""
    monkeypatch.setattr(sockets, "refuse_descriptors", lambda _sock: False)
    speaker = stepped.join()
    before = descriptors_of()
    send_rights(speaker.sock, count, encode_open(1, [bytes(stepped.tree / "file")]))
    stepped.serve()
    answer = speaker.receive()
    assert answer is not None
    assert isinstance(answer.reply, ErrorReply)
    assert answer.reply.kind == Kind.MALFORMED
    assert answer.reply.text == "descriptors were sent to the broker, which takes none"
    assert speaker.is_closed()
    assert len(descriptors_of()) == len(before) - 2  # the broker's end and its pidfd
    assert stepped.records()[-1]["reason"] == answer.reply.text


def test_descriptors_that_arrive_where_none_are_free_end_the_connection_and_nothing_else(
    stepped: SteppedBroker, bystander: Speaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sockets, "refuse_descriptors", lambda _sock: False)
    speaker = stepped.join()
    before = len(descriptors_of())
    with few_left(3):
        send_rights(speaker.sock, 50, encode_status(1))
        stepped.broker.step(0)
    answer = speaker.receive()
    assert answer is not None
    assert isinstance(answer.reply, ErrorReply)
    assert answer.reply.kind == Kind.MALFORMED
    assert speaker.is_closed()
    assert len(descriptors_of()) == before - 2
    record = stepped.records()[-1]
    assert record["event"] == "malformed"
    assert "descriptors were sent" in record["reason"]


class few_left:  # noqa: N801 - reads as a with-statement
    """Leave this process `count` free descriptors."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._filling: list[int] = []

    def __enter__(self) -> None:
        self._limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        highest = max(descriptors_of()) + 1
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 20, self._limits[1]))
        while True:
            try:
                self._filling.append(os.dup(0))
            except OSError:
                break
        for _ in range(self._count):
            os.close(self._filling.pop())

    def __exit__(self, *_: object) -> None:
        for descriptor in self._filling:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, self._limits)


# out of descriptors


def test_connection_is_accepted_and_refused_with_the_reason_when_descriptors_run_out(
    stepped: SteppedBroker, bystander: Speaker, tmp_path: Path
) -> None:
    path = stepped.listen(tmp_path)
    speaker = Speaker(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET), stepped.serve)
    speaker.sock.connect(str(path))
    with few_left(0):
        stepped.broker.step(0)
        # Nothing is waiting now: the loop does not spin.
        assert stepped.broker._epoll.poll(0) == []
    answer = speaker.receive()
    speaker.sock.close()
    assert answer is not None
    assert isinstance(answer.reply, ErrorReply)
    assert (answer.reply.kind, answer.reply.reason) == (Kind.REFUSED, Reason.LIMIT)
    assert "no descriptors left" in answer.reply.text
    assert stepped.records()[-1]["reason"] == "descriptors"
    with stepped.call(path) as later:
        assert later.open_one(bytes(stepped.tree / "file")).content == b"content"


def test_second_shortage_is_met_like_the_first(stepped: SteppedBroker, tmp_path: Path) -> None:
    path = stepped.listen(tmp_path)
    for _ in range(3):
        speaker = Speaker(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET), stepped.serve)
        speaker.sock.connect(str(path))
        with few_left(0):
            stepped.broker.step(0)
        answer = speaker.receive()
        assert answer is not None
        assert isinstance(answer.reply, ErrorReply)
        speaker.sock.close()


def test_reserve_comes_back_when_whoever_wanted_to_connect_is_gone(
    stepped: SteppedBroker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """accept() fails for lack of descriptors, and then for lack of anybody: the next shortage must be met."""
    stepped.listen(tmp_path)
    [listener] = stepped.broker._acceptor.listeners.values()
    stepped.broker._acceptor._accept_to_refuse(listener)
    assert stepped.broker._acceptor._spare >= 0


def test_reserve_that_can_not_be_had_again_does_not_end_the_broker(
    stepped: SteppedBroker, bystander: Speaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of the whole system's files (ENFILE), another process may be faster."""
    path = stepped.listen(tmp_path)
    speaker = Speaker(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET), stepped.serve)
    speaker.sock.connect(str(path))

    def fail(*_arguments: object, **_more: object) -> int:
        raise OSError(errno.ENFILE, "none left")

    with monkeypatch.context() as patch, few_left(0):
        patch.setattr(os, "open", fail)
        stepped.broker.step(0)
    speaker.sock.close()
    stepped.serve()
    with stepped.call(path) as later:
        assert later.open_one(bytes(stepped.tree / "file")).content == b"content"


def test_out_of_descriptors_an_open_is_broken_and_not_denied(stepped: SteppedBroker) -> None:
    speaker = stepped.join()
    file = bytes(stepped.tree / "file")
    with few_left(2):
        speaker.send(encode_open(7, [file] * 5))
    answer = speaker.receive()
    assert answer is not None
    opened = read_opened(answer)
    # Each needs two at once, and keeps one.
    assert [entry.reason for entry in opened] == ["ok"] + ["broken"] * 4
    assert opened[1].errno == errno.EMFILE
    assert stepped.reasons() == ["ok"] + ["EMFILE"] * 4


def test_error_of_accept_is_recorded_and_the_next_one_is_accepted(
    stepped: SteppedBroker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = stepped.listen(tmp_path)
    errors = [OSError(errno.ECONNABORTED, "gone")]
    accept = sockets.accept

    def fail_once(listener: socket.socket, kind: int) -> socket.socket:
        if errors:
            raise errors.pop()
        return accept(listener, kind)

    monkeypatch.setattr(sockets, "accept", fail_once)
    with stepped.call(path) as speaker:
        assert speaker.open_one(bytes(stepped.tree / "file")).content == b"content"
    assert stepped.events() == ["accept_failed"]
    assert stepped.records()[0]["errno"] == errno.ECONNABORTED


@pytest.fixture(params=[errno.ENFILE, errno.EMFILE])
def no_file_for_accept(
    request: pytest.FixtureRequest, stepped: SteppedBroker, tmp_path: Path
) -> Iterator[NoFileForAccept]:
    """Return a listener on which a client waits and no accept() succeeds, for whatever reason."""
    path = stepped.listen(tmp_path)
    waiting = Speaker(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET), stepped.serve)
    waiting.sock.connect(str(path))
    number: int = request.param

    def fail(_listener: socket.socket, _kind: int) -> socket.socket:
        raise OSError(number, "none left")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sockets, "accept", fail)
        yield NoFileForAccept(waiting, number, patch)
    waiting.sock.close()


class NoFileForAccept(NamedTuple):
    """A client that waits to be accepted, why it is not, and the patch that says so."""

    waiting: Speaker
    errno: int
    patch: pytest.MonkeyPatch


def test_accept_that_can_not_be_helped_is_recorded_once_and_tried_again_after_a_round_of_rest(
    stepped: SteppedBroker, no_file_for_accept: NoFileForAccept
) -> None:
    attempts = []
    for _ in range(6):
        before = len(stepped.records())
        stepped.broker.step(0)
        attempts.append(len(stepped.records()) - before)
    # Every second round the listener rests.
    assert attempts == [1, 0] * 3
    assert {(record["event"], record["errno"], record["socket"]) for record in stepped.records()} == {
        ("accept_failed", no_file_for_accept.errno, "listener")
    }
    # The reserve is there again for a shortage that can be helped.
    assert stepped.broker._acceptor._spare >= 0


def test_loop_does_not_spin_over_a_listener_that_rests(
    stepped: SteppedBroker, no_file_for_accept: NoFileForAccept, monkeypatch: pytest.MonkeyPatch
) -> None:
    stepped.broker.step(-1)
    assert stepped.broker._epoll.poll(0) == []  # somebody waits there, and nobody looks
    waits = []
    epoll = stepped.broker._epoll

    class Watched:
        """The loop's epoll; notes how long it was to wait."""

        def __getattr__(self, name: str) -> object:
            return getattr(epoll, name)

        def poll(self, timeout: float, most: int) -> list[tuple[int, int]]:
            waits.append(timeout)
            return epoll.poll(max(timeout, 0), most)  # never for ever, in a test

    monkeypatch.setattr(stepped.broker, "_epoll", Watched())
    # It would wait for ever, and comes back by itself to listen again.
    stepped.broker.step(-1)
    assert waits == [0.1]
    stepped.broker.step(-1)
    assert waits == [0.1, -1]
    assert stepped.events() == ["accept_failed"] * 2


def test_listener_that_rested_is_served_again_once_there_are_files(
    stepped: SteppedBroker, no_file_for_accept: NoFileForAccept
) -> None:
    for _ in range(3):
        stepped.broker.step(0)
    no_file_for_accept.patch.undo()
    for _ in range(2):
        stepped.broker.step(0)
    no_file_for_accept.waiting.greet()
    assert no_file_for_accept.waiting.open_one(bytes(stepped.tree / "file")).content == b"content"
    assert stepped.broker._acceptor.resting == []
    assert stepped.events() == ["accept_failed"] * 2


def test_connections_are_served_while_a_listener_rests(
    stepped: SteppedBroker, no_file_for_accept: NoFileForAccept
) -> None:
    speaker = stepped.join()
    file = bytes(stepped.tree / "file")
    steps = 0
    for number in range(10):
        speaker.sock.send(encode_open(number, [file]))
        stepped.broker.step(-1)
        steps += 1
        # One round is enough, whether the listener rests in it or fails again.
        speaker.sock.settimeout(0)
        answer = speaker.receive()
        assert answer is not None
        assert [entry.content for entry in read_opened(answer, number)] == [b"content"]
    assert stepped.reasons() == ["ok"] * steps
    assert len(stepped.events()) <= steps + 8  # `join` lets it serve 8 rounds
    assert set(stepped.events()) == {"accept_failed"}


def test_broker_closes_while_a_listener_rests(tree: Path, tmp_path: Path) -> None:
    def fail(_listener: socket.socket, _kind: int) -> socket.socket:
        raise OSError(errno.ENFILE, "none left")

    with no_descriptor_left(), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        with SteppedBroker(tree) as broker:
            sock.connect(str(broker.listen(tmp_path)))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sockets, "accept", fail)
                broker.broker.step(0)
            assert len(broker.broker._acceptor.resting) == 1
        with pytest.raises(ConnectionResetError):
            sock.recv(1)


# limits of connections


def test_connections_over_the_limit_get_a_frame_that_names_limit_and_value(
    tree: Path, tmp_path: Path
) -> None:
    with SteppedBroker(tree, limited(tree, connections=3), audit=tmp_path / "audit") as broker:
        path = broker.listen(tmp_path)
        speakers = [broker.call(path) for _ in range(3)]
        fourth = broker.call(path, hello=False)
        answer = fourth.receive()
        assert answer is not None
        assert isinstance(answer.reply, ErrorReply)
        assert (answer.reply.kind, answer.reply.reason) == (Kind.REFUSED, Reason.LIMIT)
        assert answer.reply.id == 0
        assert "connections_per_uid" in answer.reply.text
        assert f"uid {os.getuid()} has 3 connections" in answer.reply.text
        assert fourth.is_closed()
        record = broker.records()[-1]
        assert (record["event"], record["reason"], record["limit"], record["uid"]) == (
            "connection_refused", "connections_per_uid", 3, os.getuid(),
        )  # fmt: skip
        assert all(speaker.open_one(bytes(tree / "file")).content for speaker in speakers)
        speakers[0].close()
        assert broker.call(path).open_one(bytes(tree / "file")).content == b"content"
        assert broker.connections == 3


def test_connections_over_the_limit_of_all_get_a_frame_that_says_so(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _which: (16, 16))
    with SteppedBroker(tree, audit=tmp_path / "audit") as broker:
        path = broker.listen(tmp_path)
        speakers = [broker.call(path) for _ in range(2)]
        answer = broker.call(path, hello=False).receive()
        assert answer is not None
        assert isinstance(answer.reply, ErrorReply)
        assert (answer.reply.kind, answer.reply.reason) == (Kind.REFUSED, Reason.LIMIT)
        assert "too many connections" in answer.reply.text
        assert broker.records()[-1]["reason"] == "connections"
        assert broker.connections == len(speakers)


def test_many_connections_at_once_are_all_accepted(stepped: SteppedBroker, tmp_path: Path) -> None:
    path = stepped.listen(tmp_path)
    speakers = []
    for _ in range(50):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.connect(str(path))
        speakers.append(Speaker(sock, stepped.serve))
    stepped.serve()
    for speaker in speakers:
        with speaker:
            speaker.greet()
    assert stepped.connections == 0


def test_refusal_that_nobody_hears_changes_nothing(tree: Path, tmp_path: Path) -> None:
    with SteppedBroker(tree, limited(tree, connections=1), audit=tmp_path / "audit") as broker:
        path = broker.listen(tmp_path)
        first = broker.call(path)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.connect(str(path))
        sock.close()
        broker.serve()
        assert first.open_one(bytes(tree / "file")).content == b"content"
        assert broker.connections == 1


# clients that do not receive


def stall(broker: SteppedBroker, speaker: Speaker, requests: int) -> None:
    """Ask for a file again and again without receiving."""
    request = encode_open(7, [bytes(broker.tree / "file")] * FILES)
    for _ in range(requests):
        speaker.sock.send(request)
        broker.serve()


def test_client_that_does_not_receive_is_not_read_from_until_it_does(
    stepped: SteppedBroker, bystander: Speaker
) -> None:
    speaker = stepped.join()
    stall(stepped, speaker, 5)
    # 2 x 253 would be over 512 - 253: the second was still read, the third was not.
    [connection] = [found for found in stepped.broker._connections.values() if found.in_flight > 1]
    assert connection.in_flight == 2 * FILES
    assert stepped.reasons().count("ok") == 2 * FILES + 1
    assert bystander.open_one(bytes(stepped.tree / "file")).content == b"content"
    assert stepped.broker._epoll.poll(0) == []  # the loop does not spin over it
    for answered in range(5):
        answer = speaker.receive()
        assert answer is not None
        assert len(read_opened(answer)) == FILES
        stepped.serve()
        if answered == 0:
            # What was received makes room for one more; the rest is still waited for.
            assert stepped.reasons().count("ok") == 3 * FILES + 2
            assert connection.in_flight == 2 * FILES
    assert stepped.reasons().count("ok") == 5 * FILES + 2


def test_descriptors_in_flight_are_bounded_per_uid_over_all_its_connections(
    tree: Path, tmp_path: Path, few_descriptors: None
) -> None:
    with SteppedBroker(tree, audit=tmp_path / "audit") as broker:
        speakers = [broker.join() for _ in range(5)]
        for speaker in speakers:
            stall(broker, speaker, 2)
        assert broker.in_flight <= 512
        assert broker.in_flight == 2 * FILES
        # The others were refused, not kept waiting, since no one knows when their turn comes.
        assert broker.reasons().count("in_flight_per_uid") == 4 * 2 * FILES
        answer = speakers[1].receive()
        assert answer is not None
        assert {entry.reason for entry in read_opened(answer)} == {"limit"}
        small = broker.join()
        assert {entry.reason for entry in small.open(*[bytes(tree / "file")] * 6)} == {"ok"}
        assert {entry.reason for entry in small.open(*[bytes(tree / "file")] * 7)} == {"limit"}
        for _ in range(2):
            received = speakers[0].receive()
            assert received is not None
            received.descriptors.close()
        # Nobody tells the broker: it asks the kernel when it gets tight.
        assert {entry.reason for entry in small.open(*[bytes(tree / "file")] * FILES)} == {"ok"}


def test_share_of_a_uid_holds_a_full_reply_however_few_descriptors_there_are(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _which: (1024, 1024))  # an eighth is 128
    with SteppedBroker(tree, audit=tmp_path / "audit") as broker:
        first, second = broker.join(), broker.join()
        files = [bytes(tree / "file")] * FILES
        stall(broker, first, 1)
        assert broker.in_flight == FILES
        assert second.open_one(files[0]).reason == "limit"
        answer = first.receive()
        assert answer is not None
        assert {entry.reason for entry in read_opened(answer)} == {"ok"}
        for speaker in (second, first, second):
            assert {entry.reason for entry in speaker.open(*files)} == {"ok"}


def test_hanging_up_on_a_client_that_does_not_receive_keeps_counting_what_it_has(
    tree: Path, tmp_path: Path, few_descriptors: None
) -> None:
    with SteppedBroker(tree, audit=tmp_path / "audit") as broker:
        rogues = []
        for _ in range(6):
            rogue = broker.join()
            rogues.append(rogue)
            stall(broker, rogue, 1)
            rogue.sock.send(b"malformed")
            broker.serve()
            assert broker.in_flight <= 512
        assert broker.in_flight == 2 * FILES
        assert broker.reasons().count("in_flight_per_uid") == 4 * FILES
        # The two that hold something are kept until they have it, the others are gone.
        assert broker.connections == 2
        other = broker.join()
        assert other.open_one(bytes(tree / "file")).content == b"content"
        # It receives what was on its way, the error, and the end.
        answer = rogues[0].receive()
        assert answer is not None
        assert isinstance(answer.reply, OpenReply)
        answer.descriptors.close()
        answer = rogues[0].receive()
        assert answer is not None
        assert isinstance(answer.reply, ErrorReply)
        assert rogues[0].is_closed()
        broker.serve()
        assert broker.connections == 2
        # The other one hangs up without receiving: the kernel takes back what it never got.
        rogues[1].sock.close()
        broker.serve()
        assert broker.connections == 1
        assert broker.in_flight <= 1  # of the one that was served, who was not asked since


def test_client_with_a_full_queue_gets_its_reply_when_there_is_room(
    stepped: SteppedBroker, bystander: Speaker
) -> None:
    speaker = stepped.join()
    request = encode_stat(8, [bytes(stepped.tree / "file")] * FILES)
    sent = 0
    while True:
        speaker.sock.send(request, socket.MSG_DONTWAIT)
        sent += 1
        stepped.serve()
        if stepped.reasons().count("ok") < sent * FILES + 1:
            break  # the last one was not read: a reply waits
        assert sent < 100
    assert bystander.open_one(bytes(stepped.tree / "file")).content == b"content"
    assert stepped.broker._epoll.poll(0) == []
    for _ in range(sent):
        answer = speaker.receive()
        assert answer is not None
        assert len(answer.raw) == 12 + 88 * FILES
        stepped.serve()
    assert stepped.connections == 2


def fill_queue(broker: SteppedBroker, speaker: Speaker) -> None:
    """Ask for long lists until a reply has to wait."""
    [connection] = [found for found in broker.broker._connections.values() if found.in_flight == 0][-1:]
    for _ in range(100):
        speaker.sock.send(encode_stat(8, [bytes(broker.tree / "file")] * FILES), socket.MSG_DONTWAIT)
        broker.broker.step(0)
        if connection.unsent:
            return
    pytest.fail("the queue never filled")


def test_descriptors_of_a_reply_that_waits_are_closed_when_the_client_goes(
    stepped: SteppedBroker, bystander: Speaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = descriptors_of()
    speaker = stepped.join()
    send = sockets.send_part

    def full(sock: socket.socket, data: bytes, descriptors: list[int] = [], *, wait: bool = True) -> int:  # noqa: B006
        if descriptors:
            raise BlockingIOError(errno.EAGAIN, "no room")
        return send(sock, data, descriptors, wait=wait)

    monkeypatch.setattr(sockets, "send_part", full)
    speaker.send(encode_open(7, [bytes(stepped.tree / "file")] * 10))
    assert len(descriptors_of()) == len(before) + 3 + 10
    speaker.close()
    monkeypatch.undo()
    assert descriptors_of() == before


def test_descriptors_of_replies_that_wait_count_and_are_taken_back_in_the_audit(
    stepped: SteppedBroker, bystander: Speaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is open in the broker: uncounted, a few clients that never read would take all it may have."""
    share = stepped.broker._flight.most_per_uid
    send = sockets.send_part

    def full(sock: socket.socket, data: bytes, descriptors: list[int] = [], *, wait: bool = True) -> int:  # noqa: B006
        if descriptors:
            raise BlockingIOError(errno.EAGAIN, "no room")
        return send(sock, data, descriptors, wait=wait)

    speakers = [stepped.join() for _ in range(share // FILES + 2)]
    before = len(descriptors_of())
    with monkeypatch.context() as patched:
        patched.setattr(sockets, "send_part", full)
        for speaker in speakers:
            speaker.send(encode_open(7, [bytes(stepped.tree / "file")] * FILES))
        held = len(descriptors_of()) - before
        assert share - FILES < held <= share
        assert stepped.in_flight == held
        for speaker in speakers:
            speaker.close()
    assert stepped.in_flight == 0
    assert stepped.events().count("undelivered") == held // FILES


@pytest.mark.parametrize("how", [socket.SHUT_RDWR, socket.SHUT_WR, socket.SHUT_RD])
def test_descriptors_in_the_queue_of_a_client_that_shut_its_socket_down_count_until_it_is_gone(
    stepped: SteppedBroker, how: int
) -> None:
    """A hang-up is told for a shutdown of both directions, too; the queue with its descriptors lives on."""
    speaker = stepped.join()
    speaker.sock.send(encode_open(7, [bytes(stepped.tree / "file")] * 10))
    stepped.serve()
    speaker.sock.shutdown(how)
    stepped.serve()
    assert stepped.in_flight == 10
    assert stepped.connections == 1
    speaker.close()
    stepped.serve()
    assert stepped.in_flight == 0
    assert stepped.connections == 0


def test_uid_with_many_connections_gets_one_answer_a_round_while_others_wait(
    stepped: SteppedBroker, bystander: Speaker
) -> None:
    [other] = stepped.broker._connections.values()
    greedy = [stepped.join() for _ in range(5)]
    mine = other.peer.uid
    other.peer.uid = mine + 1  # in this process everybody has one uid
    try:
        for speaker in (*greedy, bystander):
            speaker.sock.send(encode_stat(7, [bytes(stepped.tree / "file")]))
        stepped.broker.step(0)
        answered = [record["connection"] for record in stepped.records() if record["event"] == "stat"]
        assert sorted(answered) == [1, 2]
        stepped.broker.step(0)
        assert sum(record["event"] == "stat" for record in stepped.records()) == 6
        for speaker in (*greedy, bystander):
            assert speaker.receive() is not None
    finally:
        other.peer.uid = mine


@contextlib.contextmanager
def no_number_free_below(number: int) -> Iterator[None]:
    """Have every number of a descriptor below one of them taken."""
    taken: list[int] = []
    while not taken or taken[-1] < number:
        taken.append(os.open("/", os.O_PATH | os.O_CLOEXEC))
    try:
        yield
    finally:
        for descriptor in taken:
            os.close(descriptor)


def test_client_that_comes_in_the_round_in_which_another_goes_is_not_taken_for_that_one(
    tree: Path, tmp_path: Path
) -> None:
    compiled = policy(tree, services=[{"name": "clamd", "clients": [{"any": True}]}])
    with no_descriptor_left(), SteppedBroker(tree, compiled) as broker:
        listener, of_service = broker.listen(tmp_path), broker.listen_for(tmp_path, "clamd")
        with broker.call(listener) as service, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            service.ask(encode_serve(5, b"clamd"))
            [number] = broker.broker._connections
            with socket.socket(socket.AF_UNIX, Speaker.kind) as newcomer, no_number_free_below(number):
                # All of it is found in one round, in this order: that the service is gone is seen when the
                # client is handed over, and the number of its descriptor is free before its own event comes.
                client.connect(str(of_service))
                newcomer.connect(str(listener))
                service.sock.shutdown(socket.SHUT_RDWR)
                broker.broker.step(0)
                assert list(broker.broker._connections) == [number]
                speaker = Speaker(newcomer, broker.serve)
                speaker.greet()
                assert speaker.open_one(bytes(tree / "file")).content == b"content"


def test_reply_that_waits_is_sent_with_its_descriptors_once_there_is_room(
    stepped: SteppedBroker, bystander: Speaker
) -> None:
    speaker = stepped.join()
    fill_queue(stepped, speaker)
    speaker.sock.send(encode_open(9, [bytes(stepped.tree / "file")] * 10))
    seen = 0
    while True:
        stepped.serve()
        answer = speaker.receive()
        assert answer is not None
        if isinstance(answer.reply, OpenReply):
            assert [entry.content for entry in read_opened(answer, 9)] == [b"content"] * 10
            break
        seen += 1
    assert seen >= 3


@pytest.mark.parametrize("waiting", [False, True])
@pytest.mark.parametrize("number", [errno.EPIPE, errno.ENOBUFS, errno.EMSGSIZE])
def test_reply_that_can_not_be_sent_is_recorded_and_ends_the_connection(
    stepped: SteppedBroker,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    waiting: bool,  # noqa: FBT001
) -> None:
    before = descriptors_of()
    speaker = stepped.join()
    errors = [BlockingIOError(errno.EAGAIN, "no room")] * waiting + [OSError(number, "it failed")]

    def fail(*_arguments: object, **_more: object) -> None:
        raise errors.pop(0)

    with monkeypatch.context() as patch:
        patch.setattr(sockets, "send_part", fail)
        speaker.send(encode_open(7, [bytes(stepped.tree / "file")] * 3))
    assert speaker.is_closed()
    speaker.close()
    assert descriptors_of() == before
    assert stepped.reasons() == ["ok"] * 3
    record = stepped.records()[-1]
    assert (record["event"], record["errno"], record["request"]) == ("undelivered", number, 7)


NO_ROOM = BlockingIOError(errno.EAGAIN, "no room")
TOO_MANY = OSError(errno.ETOOMANYREFS, "too many")


@contextlib.contextmanager
def failing_sends(*errors: OSError) -> Iterator[list[OSError]]:
    """Let the next sends of the broker fail so; gives what is left of the errors."""
    send = sockets.send_part
    left = list(errors)

    def fail(sock: socket.socket, data: bytes, descriptors: list[int] = [], *, wait: bool = True) -> int:  # noqa: B006
        if left:
            raise left.pop(0)
        return send(sock, data, descriptors, wait=wait)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sockets, "send_part", fail)
        yield left


@pytest.mark.parametrize(
    "errors",
    [
        [TOO_MANY],
        [NO_ROOM, TOO_MANY],
        [TOO_MANY, NO_ROOM],
        [TOO_MANY, NO_ROOM, NO_ROOM, NO_ROOM],
        [NO_ROOM, NO_ROOM, TOO_MANY, NO_ROOM, NO_ROOM],
    ],
)
def test_too_many_references_are_told_and_the_connection_goes_on(
    stepped: SteppedBroker, bystander: Speaker, errors: list[OSError]
) -> None:
    speaker = stepped.join()
    before = descriptors_of()
    with failing_sends(*errors) as left:
        error = speaker.error(encode_open(7, [bytes(stepped.tree / "file")] * 3))
        assert not left
    assert (error.kind, error.reason, error.id) == (Kind.REFUSED, Reason.LIMIT, 7)
    assert descriptors_of() == before
    assert stepped.events() == ["undelivered"]
    assert (stepped.records()[-1]["errno"], stepped.records()[-1]["request"]) == (errno.ETOOMANYREFS, 7)
    assert speaker.open_one(bytes(stepped.tree / "file")).content == b"content"


@pytest.mark.parametrize("errors", [[TOO_MANY], [NO_ROOM, TOO_MANY], [NO_ROOM, NO_ROOM, TOO_MANY]])
def test_client_of_a_service_that_can_not_be_handed_over_is_let_go_and_the_next_one_is_handed_over(
    tree: Path, tmp_path: Path, errors: list[OSError]
) -> None:
    compiled = policy(tree, services=[{"name": "clamd", "clients": [{"any": True}]}])
    with no_descriptor_left(), SteppedBroker(tree, compiled, audit=tmp_path / "audit") as broker:
        listener, of_service = broker.listen(tmp_path), broker.listen_for(tmp_path, "clamd")
        with broker.call(listener) as service:
            service.ask(encode_serve(5, b"clamd"))
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client, failing_sends(*errors) as left:
                client.connect(str(of_service))
                broker.serve()
                assert not left
                assert client.recv(1) == b""
            assert broker.broker._services.count == 0
            assert service.arrived() == []
            assert broker.events()[-1] == "undelivered"
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
                client.connect(str(of_service))
                broker.serve()
                [answer] = service.arrived()
                with answer.descriptors as descriptors:
                    assert (type(answer.reply), len(descriptors)) == (AcceptedReply, 1)


def test_refusal_for_too_many_references_waits_for_room_and_nothing_is_read_before_it(
    stepped: SteppedBroker, bystander: Speaker
) -> None:
    speaker = stepped.join()
    file = bytes(stepped.tree / "file")
    before = descriptors_of()
    decided = len(stepped.reasons())
    speaker.sock.settimeout(0)
    with failing_sends(TOO_MANY, NO_ROOM):
        speaker.sock.send(encode_open(7, [file] * 3))
        speaker.sock.send(encode_open(8, [file]))
        stepped.broker.step(0)
        with pytest.raises(BlockingIOError):
            speaker.receive()
        [[waits]] = [found.unsent for found in stepped.broker._connections.values() if found.unsent]
        # What was opened is closed already; what waits is the refusal alone.
        assert (waits.request_id, waits.descriptors) == (7, [])
        assert descriptors_of() == before
        stepped.serve()
    refusal, given_ = speaker.receive(), speaker.receive()
    assert refusal is not None
    assert given_ is not None
    assert isinstance(refusal.reply, ErrorReply)
    assert (refusal.reply.reason, refusal.reply.id) == (Reason.LIMIT, 7)
    assert [entry.content for entry in read_opened(given_, 8)] == [b"content"]
    assert stepped.reasons()[decided:] == ["ok"] * 4


def test_client_that_goes_while_its_refusal_waits_leaves_nothing_behind(
    stepped: SteppedBroker, bystander: Speaker
) -> None:
    before = descriptors_of()
    speaker = stepped.join()
    with failing_sends(TOO_MANY, NO_ROOM):
        speaker.sock.send(encode_open(7, [bytes(stepped.tree / "file")] * 3))
        stepped.broker.step(0)
        speaker.close()
    assert descriptors_of() == before
    assert stepped.connections == 1


# the rest


def test_status_tells_the_client_about_itself_and_root_about_all(stepped: SteppedBroker) -> None:
    stepped.join()
    speaker = stepped.join()
    speaker.open(bytes(stepped.tree / "file"), b"/etc/passwd")
    status = speaker.status()
    assert status["generation"] == 1
    assert status["peer"]["pid"] == os.getpid()
    assert status["peer"]["uid"] == os.getuid()
    assert set(os.getgroups()) <= set(status["peer"]["groups"])
    assert status["in_flight"] == 0
    assert status["audit"] == stepped.audit.run
    if os.getuid() == 0:
        totals = status["totals"]
        assert (totals["allowed"], totals["denied"], totals["accepted"], totals["connections"]) == (
            1,
            1,
            2,
            2,
        )
        assert totals["audit_failures"] == 0
    else:
        assert "totals" not in status


def test_status_counts_what_is_under_way_by_the_word_of_the_kernel(stepped: SteppedBroker) -> None:
    speaker = stepped.join()
    [connection] = stepped.broker._connections.values()
    stall(stepped, speaker, 1)
    speaker.sock.send(encode_status(10))
    stepped.serve()
    answer = speaker.receive()
    assert answer is not None
    assert len(read_opened(answer)) == FILES
    # The status was asked for while nothing had been received.
    answer = speaker.receive()
    assert answer is not None
    assert isinstance(answer.reply, StatusReply)
    assert json.loads(answer.reply.document)["in_flight"] == FILES
    # Everything is received now, and the broker hears of it by asking.
    assert connection.in_flight == FILES
    status = speaker.status()
    assert status["in_flight"] == 0
    assert "totals" not in status or status["totals"]["in_flight"] == 0


def test_status_of_a_broker_without_audit_says_so(tree: Path) -> None:
    with SteppedBroker(tree) as broker:
        speaker = broker.join()
        assert speaker.open_one(bytes(tree / "file")).content == b"content"
        assert speaker.status()["audit"] == "off"


def test_requests_may_be_sent_ahead_and_are_answered_each(stepped: SteppedBroker) -> None:
    speaker = stepped.join()
    for number in range(20):
        speaker.sock.send(encode_status(1000 + number))
    for _ in range(20):
        stepped.broker.step(0)
    answers = [speaker.receive() for _ in range(20)]
    assert [answer.reply.id for answer in answers if answer] == list(range(1000, 1020))
    assert all(answer and isinstance(answer.reply, StatusReply) for answer in answers)


def test_one_message_per_connection_and_round(stepped: SteppedBroker) -> None:
    busy, other = stepped.join(), stepped.join()
    for number in range(5):
        busy.sock.send(encode_status(number))
    other.sock.send(encode_status(9))
    stepped.broker.step(0)
    busy.sock.settimeout(0)
    assert busy.receive() is not None
    with pytest.raises(BlockingIOError):
        busy.receive()
    assert other.receive() is not None


def test_stop_ends_the_loop_after_its_round(
    stepped: SteppedBroker, bystander: Speaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = stepped.broker._serve_message

    def stop_within(connection: Connection) -> None:
        stepped.broker.stop()
        handle(connection)

    monkeypatch.setattr(stepped.broker, "_serve_message", stop_within)
    bystander.sock.send(encode_status(1))
    bystander.sock.send(encode_status(2))
    stepped.broker.serve()
    answer = bystander.receive()
    assert answer is not None
    assert answer.reply.id == 1
    # It stays stopped, and a stop that nobody waited for is not forgotten.
    stepped.broker.serve()
    stepped.broker.step(0)
    assert bystander.receive() is not None


@pytest.mark.parametrize("whose", ["one uid", "many uids"])
def test_stop_does_not_wait_for_the_rest_of_a_long_round(
    stepped: SteppedBroker, monkeypatch: pytest.MonkeyPatch, whose: str
) -> None:
    handle = stepped.broker._serve_message
    speakers = [stepped.join() for _ in range(6)]
    if whose == "many uids":
        for number, connection in enumerate(stepped.broker._connections.values()):
            connection.peer.uid = number

    def stop_within(connection: Connection) -> None:
        stepped.broker.stop()
        handle(connection)

    monkeypatch.setattr(stepped.broker, "_serve_message", stop_within)
    for speaker in speakers:
        speaker.sock.send(encode_status(1))
    stepped.broker.serve()
    answered = 0
    for speaker in speakers:
        speaker.sock.setblocking(False)  # noqa: FBT003 - the standard library's own
        with contextlib.suppress(BlockingIOError):
            answered += speaker.receive() is not None
    for connection in stepped.broker._connections.values():
        connection.peer.uid = os.getuid()  # as they are counted
    assert answered == 1


def test_byte_for_the_wake_descriptor_wakes_it_once(stepped: SteppedBroker) -> None:
    os.write(stepped.broker.wake_descriptor, b"\x0f")
    stepped.broker.step(SECONDS)
    assert stepped.broker._epoll.poll(0) == []


def test_closing_ends_every_connection_and_every_listener(tree: Path, tmp_path: Path) -> None:
    with no_descriptor_left():
        broker = SteppedBroker(tree, audit=tmp_path / "audit")
        path = broker.listen(tmp_path)
        speakers = [broker.join(), broker.call(path)]
        stall(broker, speakers[0], 3)
        others = [Speaker(speaker.sock.dup()) for speaker in speakers]
        broker.close()
        for other in others:
            while (answer := other.receive()) is not None:
                answer.descriptors.close()
            other.close()
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock,
            pytest.raises(ConnectionRefusedError),
        ):
            sock.connect(str(path))


def test_accepted_connections_inherit_nothing_and_block_nobody(
    stepped: SteppedBroker, tmp_path: Path
) -> None:
    path = stepped.listen(tmp_path)
    stepped.call(path)
    [connection] = stepped.broker._connections.values()
    assert not connection.sock.getblocking()
    assert fcntl.fcntl(connection.sock, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    assert connection.sock.getsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED) == 1
    assert connection.sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == 65536
    assert select.select([], [connection.sock], [], 0)[1]


def test_everything_is_recorded_exactly_once(stepped: SteppedBroker, tmp_path: Path) -> None:
    path = stepped.listen(tmp_path)
    for _ in range(3):
        with stepped.call(path) as speaker:
            speaker.open(bytes(stepped.tree / "file"))
            speaker.error(b"nonsense")
    check_audit(stepped.records())
    assert [record["event"] for record in stepped.records()] == ["open", "malformed"] * 3
    assert {record["socket"] for record in stepped.records()} == {"listener"}
    assert [record["connection"] for record in stepped.records()] == [1, 1, 2, 2, 3, 3]


def test_unknown_type_byte_is_no_member_of_the_table(stepped: SteppedBroker) -> None:
    known = {*Type} - {Type.ACCEPTED, Type.ERROR}
    for kind in range(256):
        speaker = stepped.join()
        speaker.send(frame(kind, count=1, body=b"/a"))
        answer = None if kind == Type.MORE else speaker.receive()
        if kind not in known:
            assert answer is not None
            reply = answer.reply
            assert isinstance(reply, ErrorReply)
            assert reply.text == f"unknown request type {kind:#04x}"
        speaker.close()
