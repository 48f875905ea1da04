"""Frames on a stream, with the descriptors that belong to them: in parts, joined, and against the rules."""

from __future__ import annotations

import os
import socket
import threading
from typing import TYPE_CHECKING

import pytest
from hypothesis import given as given_that
from hypothesis import strategies as st

from fdbroker.client import Client, DeniedError, DisconnectedError, ProtocolError
from fdbroker.client.connection import Connection
from fdbroker.client.engine import OpenPaths
from fdbroker.client.framing import StreamFrames
from fdbroker.client.link import Call, Deadline
from fdbroker.kernel import sockets
from fdbroker.kernel.descriptors import Descriptors
from fdbroker.wire.format import HEADER, LENGTH, MAX_FRAME, Reason
from fdbroker.wire.messages import GIVEN, MalformedError, refused
from fdbroker.wire.stream import framed
from tests.client.brokers import FIRST, SECOND, THIRD, given, welcome

if TYPE_CHECKING:
    from collections.abc import Iterator

DENIED = refused(Reason.DENIED)
SMALL, LARGE = bytes(HEADER.size), b"x" * 300


def null() -> int:
    return os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)


def some(count: int) -> Descriptors:
    return Descriptors([null() for _ in range(count)])


def taken(frames: StreamFrames) -> list[tuple[bytes, int]]:
    """Return the frames that are there, each with the number of its descriptors, which are closed."""
    seen = []
    while (frame := frames.next_frame()) is not None:
        with frame[1] as descriptors:
            seen.append((frame[0], len(descriptors)))
    return seen


def test_descriptors_belong_to_the_frame_that_the_last_byte_is_in() -> None:
    with StreamFrames() as frames:
        frames.add(framed(SMALL) + framed(LARGE), some(2))
        assert taken(frames) == [(SMALL, 0), (LARGE, 2)]
        # A frame that has nothing with it, and the beginning of one that has.
        frames.add(framed(SMALL) + framed(LARGE)[:1], some(3))
        assert taken(frames) == [(SMALL, 0)]
        assert len(frames) == 1
        for byte in framed(LARGE)[1:-1]:
            frames.add(bytes([byte]), Descriptors())
            assert taken(frames) == []
        # The rest of it and the next, of which the last byte is.
        frames.add(framed(LARGE)[-1:] + framed(SMALL), some(1))
        assert taken(frames) == [(LARGE, 3), (SMALL, 1)]
        assert len(frames) == 0


@pytest.mark.parametrize("rest", [framed(LARGE)[5:], framed(LARGE)[5:50]])
def test_descriptors_within_a_frame_that_had_begun_are_malformed(rest: bytes) -> None:
    with StreamFrames() as frames:
        frames.add(framed(SMALL) + framed(LARGE)[:5], some(1))
        unasked = some(2)
        with pytest.raises(MalformedError, match="2 descriptors"):
            frames.add(rest, unasked)
        assert len(unasked) == 0
        assert frames.next_frame() is None


@pytest.mark.parametrize("length", [0, 11, MAX_FRAME + 1, 0xFFFFFFFF])
def test_what_is_no_length_is_malformed_and_everything_is_closed(length: int) -> None:
    with StreamFrames() as frames:
        frames.add(framed(SMALL), some(1))
        unasked = some(2)
        with pytest.raises(MalformedError, match=str(length)):
            frames.add(framed(LARGE) + LENGTH.pack(length), unasked)
        assert len(unasked) == 0
        assert frames.next_frame() is None


def test_what_is_not_taken_is_closed() -> None:
    frames = StreamFrames()
    frames.add(framed(SMALL) + framed(LARGE), some(2))
    frames.add(framed(LARGE)[:20], some(2))
    frames.close()


@given_that(
    st.lists(st.tuples(st.integers(HEADER.size, 60), st.integers(0, 2)), max_size=12),
    st.lists(st.integers(1, 90), min_size=1),
)
def test_frames_arrive_whole_with_their_own_however_they_were_cut(
    sent: list[tuple[int, int]], cuts: list[int]
) -> None:
    """Cut as the kernel may: a read ends at the end of what descriptors came with, or within."""
    with StreamFrames() as frames:
        seen = []
        pieces = iter(cuts * 1000)
        pending = b""
        for number, (length, count) in enumerate(sent):
            frame = framed(bytes([number]) * length)
            if not count:
                pending += frame
                continue
            # What comes before in the same read, some of it or all; then the part with the descriptors.
            while pending and (cut := next(pieces)) < len(pending):
                frames.add(pending[:cut], Descriptors())
                pending = pending[cut:]
            cut = min(next(pieces), len(frame))
            frames.add(pending + frame[:cut], some(count))
            pending = frame[cut:]
            seen += taken(frames)
        frames.add(pending + framed(SMALL), Descriptors())
        seen += taken(frames)
    assert seen == [(bytes([number]) * length, count) for number, (length, count) in enumerate(sent)] + [
        (SMALL, 0)
    ]


# The kernel does it


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, Client]]:
    """Give a greeted client on a stream, and the broker's end."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours:
        ours.sendall(framed(welcome()))
        with Client.from_socket(theirs, timeout=5) as client:
            yield ours, client


def send_in_parts(sock: socket.socket, frame: bytes, descriptors: int, size: int) -> None:
    with some(descriptors) as owned:
        data = framed(frame)
        sockets.send(sock, data[:size], owned.numbers())
        for at in range(size, len(data), size):
            sock.sendall(data[at : at + size])


@pytest.mark.parametrize("size", [1, 3, 4, 5, 12, 1000])
def test_answers_that_come_in_parts_are_put_together(pair: tuple[socket.socket, Client], size: int) -> None:
    broker, client = pair
    with client.open_many(["/a", "/b", "/c"], batch=2) as results:
        send_in_parts(broker, given(FIRST, [DENIED, GIVEN]), 1, size)
        send_in_parts(broker, given(SECOND), 1, size)
        first, second, third = results
    assert isinstance(first.error, DeniedError)
    for result in (second, third):
        with result:
            assert os.fstat(result.descriptor)


def test_answers_that_are_read_at_once_keep_their_own_descriptors() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    deadline = Deadline.after(5)
    with ours:
        ours.sendall(framed(welcome()))
        connection = Connection.greet(theirs, deadline)
        calls = [Call(OpenPaths([b"/a"] * count)) for count in (100, 3, 1)]
        for call in calls:
            connection.send(call, deadline)
        ours.sendall(framed(given(FIRST, [DENIED] * 100)))
        send_in_parts(ours, given(SECOND, [GIVEN] * 3), 3, 1000)
        ours.sendall(framed(given(THIRD, [DENIED])))
        reads = 0
        while not calls[-1].answers:
            connection.wait(deadline)
            reads += 1
        assert reads == 2  # the kernel ends a read behind what descriptors came with
        counts = [len(answer.descriptors) for call in calls for answer in call.answers]
        assert counts == [0, 3, 0]
        for call in calls:
            call.abandon()
        connection.close()


@pytest.mark.parametrize(
    ("data", "descriptors"),
    [
        (framed(given(FIRST)), 0),
        (framed(given(FIRST)), 2),
        (framed(given(FIRST)), 253),
        (framed(given(SECOND)), 1),
        (LENGTH.pack(0), 1),
        (LENGTH.pack(MAX_FRAME + 1) + bytes(20), 3),
        (framed(given(FIRST, [DENIED])) + b"\xff\xff\xff\xff", 1),
        (b"\xff" * 100, 0),
    ],
)
def test_a_broker_that_breaks_the_protocol_is_given_up(
    pair: tuple[socket.socket, Client], data: bytes, descriptors: int
) -> None:
    broker, client = pair
    with some(descriptors) as owned:
        sockets.send(broker, data, owned.numbers())
    with pytest.raises(ProtocolError):
        client.open("/a")
    with pytest.raises(DisconnectedError):
        client.open("/a")


def test_a_broker_that_ends_within_a_frame_is_a_reset(pair: tuple[socket.socket, Client]) -> None:
    broker, client = pair
    with some(1) as owned:
        sockets.send(broker, framed(given(FIRST))[:9], owned.numbers())
    broker.close()
    with pytest.raises(DisconnectedError):
        client.open("/a")


def test_a_frame_is_sent_in_as_many_parts_as_the_socket_takes(pair: tuple[socket.socket, Client]) -> None:
    """And answers are received meanwhile: the broker reads on only when it was read from."""
    broker, client = pair
    client._session._connection._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # type: ignore[union-attr]
    long = b"/" + b"x" * 4000
    with client.open_many([long] * 30, batch=15) as results:

        def answer() -> None:
            for request_id in (FIRST, SECOND):
                read_frame(broker)
                broker.sendall(framed(given(request_id, [DENIED] * 15)))

        thread = threading.Thread(target=answer)
        read_frame(broker)  # the hello
        thread.start()
        assert len(list(results)) == 30
        thread.join()


def read_frame(sock: socket.socket) -> bytes:
    length = LENGTH.unpack(sock.recv(4, socket.MSG_WAITALL))[0]
    return sock.recv(length, socket.MSG_WAITALL)
