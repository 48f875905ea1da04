"""Streams: frames in any parts, replies in parts, parts of other senders, what is under way (in process)."""

from __future__ import annotations

import contextlib
import os
import select
import socket
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fdbroker.kernel import sockets
from fdbroker.wire.client import (
    WalkReply,
    encode_hello,
    encode_open,
    encode_stat,
    encode_status,
    encode_walk,
)
from fdbroker.wire.format import HEADER, LENGTH, MAX_FRAME, Kind, WalkKind
from fdbroker.wire.messages import ErrorReply, WalkFilter
from fdbroker.wire.stream import FrameBuffer, framed
from tests.broker.conftest import no_descriptor_left
from tests.broker.speaking import StreamSpeaker, descriptors_of, read_opened
from tests.broker.test_loop import NO_ROOM, failing_sends
from tests.processes import in_child

if TYPE_CHECKING:
    from fdbroker.broker.connection import Connection
    from tests.broker.stepping import SteppedBroker

FILES = 253


@pytest.fixture
def speaker(stepped: SteppedBroker) -> StreamSpeaker:
    return stepped.join(StreamSpeaker)


def connection_of(stepped: SteppedBroker) -> Connection:
    """Return the only connection."""
    [connection] = stepped.broker._connections.values()
    return connection


def opened(speaker: StreamSpeaker, request_id: int = 7) -> list[str]:
    """Receive the answer to an open, and return the reasons."""
    answer = speaker.receive()
    assert answer is not None
    return [entry.reason for entry in read_opened(answer, request_id)]


# Frames in parts


def test_a_frame_may_come_byte_by_byte(stepped: SteppedBroker) -> None:
    speaker = stepped.join(StreamSpeaker, hello=False)
    for sent in (encode_hello(1), encode_open(7, [bytes(stepped.tree / "file")])):
        for byte in framed(sent):
            assert not select.select([speaker.sock], [], [], 0)[0]
            speaker.send_raw(bytes([byte]))
        answer = speaker.receive()
        assert answer is not None
        answer.descriptors.close()
        assert answer.reply.id == sent[4]
    assert stepped.reasons() == ["ok"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    counts=st.lists(st.integers(0, 5), min_size=1, max_size=12),
    cuts=st.lists(st.integers(1, 400), max_size=30),
    at_once=st.sampled_from([1, 3, 16, 100, MAX_FRAME]),
)
def test_frames_that_are_split_anywhere_are_answered_each_with_its_descriptors(
    stepped: SteppedBroker, counts: list[int], cuts: list[int], at_once: int
) -> None:
    with stepped.join(StreamSpeaker) as speaker:
        speaker.at_once = at_once
        file, missing = bytes(stepped.tree / "file"), bytes(stepped.tree / "missing")
        data = b"".join(
            framed(encode_open(number, [missing] + [file] * count)) for number, count in enumerate(counts)
        )
        for cut in cuts:
            if data:
                speaker.send_raw(data[:cut])
                data = data[cut:]
        if data:
            speaker.send_raw(data)
        for number, count in enumerate(counts):
            stepped.serve()
            assert opened(speaker, number) == ["not_found"] + ["ok"] * count
        assert speaker.sock.send(framed(encode_status(1)))
        stepped.serve()
        answer = speaker.receive()
        assert answer is not None
        assert answer.reply.id == 1


def test_many_frames_in_one_write_are_answered_in_order(
    stepped: SteppedBroker, speaker: StreamSpeaker
) -> None:
    bystander = stepped.join()
    speaker.sock.sendall(b"".join(framed(encode_status(number)) for number in range(3000)))
    for number in range(3000):
        stepped.broker.step(0)
        answer = speaker.receive()
        assert answer is not None
        assert answer.reply.id == number
    assert bystander.open_one(bytes(stepped.tree / "file")).content == b"content"
    assert stepped.broker._busy == {}
    assert stepped.broker._epoll.poll(0) == []


@pytest.mark.parametrize("length", [0, 1, HEADER.size - 1, MAX_FRAME + 1, 1 << 31, (1 << 32) - 1])
@pytest.mark.parametrize("behind", [b"", b"x", b"x" * 5000])
def test_a_length_that_no_frame_has_ends_the_connection_at_once(
    stepped: SteppedBroker, speaker: StreamSpeaker, length: int, behind: bytes
) -> None:
    speaker.send_raw(framed(encode_status(5)) + LENGTH.pack(length) + behind)
    status, error = speaker.receive(), speaker.receive()
    assert status is not None
    assert status.reply.id == 5
    assert error is not None
    assert isinstance(error.reply, ErrorReply)
    assert (error.reply.kind, error.reply.id) == (Kind.MALFORMED, 0)
    assert error.reply.text == f"a frame of {length} bytes: it has 12 to 65536"
    assert speaker.is_closed()
    assert stepped.connections == 0
    assert stepped.records()[-1]["reason"] == error.reply.text


def test_the_longest_frame_is_answered(stepped: SteppedBroker, speaker: StreamSpeaker) -> None:
    sent = encode_open(7, [b"/" + b"x" * (MAX_FRAME - HEADER.size - 1)])
    assert len(sent) == MAX_FRAME
    speaker.sock.setblocking(False)  # noqa: FBT003 - the standard library's own
    data = framed(sent)
    while data:
        data = data[speaker.sock.send(data) :]
        stepped.serve()
    assert opened(speaker) == ["path_invalid"]


@pytest.mark.parametrize("sent", range(1, 20))
def test_a_client_that_goes_in_the_middle_of_a_frame_has_asked_for_nothing(
    stepped: SteppedBroker, sent: int
) -> None:
    with no_descriptor_left():
        speaker = stepped.join(StreamSpeaker)
        speaker.send_raw(framed(encode_open(7, [bytes(stepped.tree / "file")]))[:sent])
        speaker.close()
    assert stepped.records() == []
    assert stepped.connections == 0


def test_what_a_client_asked_for_before_it_ended_its_sending_is_answered(
    stepped: SteppedBroker, speaker: StreamSpeaker
) -> None:
    asked = [encode_open(number, [bytes(stepped.tree / "file")]) for number in range(20)]
    speaker.sock.sendall(b"".join(map(framed, asked)))
    speaker.sock.shutdown(socket.SHUT_WR)
    for _ in range(20):
        stepped.serve()
    for number in range(20):
        assert opened(speaker, number) == ["ok"]
    assert speaker.is_closed()
    stepped.serve()
    assert stepped.connections == 0


def test_bytes_out_of_band_are_no_part_of_a_frame(stepped: SteppedBroker, speaker: StreamSpeaker) -> None:
    """MSG_OOB (Linux 5.15): the byte is not among what recvmsg(2) gives, and nothing spins over it."""
    bystander = stepped.join()
    data = framed(encode_open(7, [bytes(stepped.tree / "file")]))
    speaker.send_raw(data[:9])
    try:
        speaker.sock.send(b"!", socket.MSG_OOB)
    except OSError as error:
        pytest.skip(f"MSG_OOB: {error.strerror}")
    stepped.serve()
    assert stepped.broker._epoll.poll(0) == []
    speaker.send_raw(data[9:])
    assert opened(speaker) == ["ok"]
    assert bystander.open_one(bytes(stepped.tree / "file")).content == b"content"


# Who sent which part


def test_a_frame_that_another_process_wrote_is_refused_between_others_that_are_served(
    stepped: SteppedBroker, speaker: StreamSpeaker
) -> None:
    asked = encode_open(7, [bytes(stepped.tree / "file")])
    speaker.sock.send(framed(asked))
    in_child(lambda: speaker.sock.send(framed(asked)))
    speaker.sock.send(framed(asked))
    stepped.serve()
    assert [opened(speaker) for _ in range(3)] == [["ok"], ["identity"], ["ok"]]
    assert stepped.reasons() == ["ok", "sent_by_another_process", "ok"]


@pytest.mark.parametrize("step", ["at each part", "at the end"])
@pytest.mark.parametrize(
    ("begin", "end"), [(0, 1), (0, 3), (0, 10), (2, 3), (4, 9), (10, 11), (10, None), (-1, None)]
)
def test_a_frame_of_which_another_process_wrote_a_part_is_refused(
    stepped: SteppedBroker, speaker: StreamSpeaker, begin: int, end: int | None, step: str
) -> None:
    data = framed(encode_open(7, [bytes(stepped.tree / "file")]))
    other = data[begin:end]
    first, last = data[:begin], data[len(data[:begin]) + len(other) :]
    for part, by_us in ((first, True), (other, False), (last, True)):
        if part and by_us:
            speaker.sock.send(part)
        elif part:
            in_child(lambda part=part: speaker.sock.send(part))  # type: ignore[misc]
        if step == "at each part":
            stepped.serve()
    stepped.serve()
    assert opened(speaker) == ["identity"]
    assert stepped.reasons() == ["sent_by_another_process"]
    # The next one is ours alone.
    assert speaker.open_one(bytes(stepped.tree / "file")).content == b"content"


def test_the_end_of_a_frame_by_another_process_does_not_become_ours_by_what_follows(
    stepped: SteppedBroker, speaker: StreamSpeaker
) -> None:
    data = framed(encode_open(7, [bytes(stepped.tree / "file")]))
    speaker.sock.send(data + data[:20])
    in_child(lambda: speaker.sock.send(data[20:] + data + data[:10]))
    speaker.sock.send(data[10:] + data[:10])
    stepped.serve()
    speaker.send_raw(data[10:])
    assert opened(speaker) == ["ok"]
    # The second and third, the fourth of which we wrote the end, and so, as it was not apart, ours.
    assert [opened(speaker) for _ in range(4)] == [["identity"]] * 4
    assert speaker.open_one(bytes(stepped.tree / "file")).content == b"content"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(
    parts=st.lists(st.tuples(st.integers(1, 60), st.booleans()), min_size=1, max_size=8),
    serve_between=st.booleans(),
)
def test_no_frame_with_a_byte_of_another_process_is_ever_served(
    stepped: SteppedBroker,
    parts: list[tuple[int, bool]],
    serve_between: bool,  # noqa: FBT001
) -> None:
    frames = [framed(encode_open(number, [bytes(stepped.tree / "file")])) for number in range(4)]
    data = b"".join(frames)
    whose: list[bool] = []
    with stepped.join(StreamSpeaker) as speaker:
        for size, ours in (*parts, (len(data), True)):
            part, data = data[:size], data[size:]
            whose += [ours] * len(part)
            if part and ours:
                speaker.sock.send(part)
            elif part:
                in_child(lambda part=part: speaker.sock.send(part))  # type: ignore[misc]
            if serve_between:
                stepped.serve()
        at = 0
        for number, one in enumerate(frames):
            stepped.serve()
            answer = opened(speaker, number)
            if not all(whose[at : at + len(one)]):
                assert answer == ["identity"]
            at += len(one)


# Replies in parts


@pytest.fixture
def narrow(stepped: SteppedBroker, speaker: StreamSpeaker) -> StreamSpeaker:
    """Return a client for which a few kilobytes have room, and a directory whose walk has large frames."""
    connection_of(stepped).sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    (stepped.tree / "wide").mkdir()
    for number in range(100):
        (stepped.tree / "wide" / f"{number:0200}").write_bytes(b"%d" % number)
    return speaker


def walk(stepped: SteppedBroker) -> bytes:
    return encode_walk(
        7, bytes(stepped.tree / "wide"), WalkFilter(WalkKind.REGULAR), credit=9, descriptors=True
    )


def test_descriptors_of_a_reply_in_parts_come_with_its_first_byte_and_no_other(
    stepped: SteppedBroker, narrow: StreamSpeaker
) -> None:
    narrow.send(walk(stepped))
    [reply] = connection_of(stepped).unsent
    assert (reply.begun, reply.descriptors) == (True, [])
    under_way = stepped.in_flight
    first = sockets.receive(narrow.sock, 1)
    with first.descriptors as descriptors:
        assert len(descriptors) == under_way > 32
        # They are there, and counted as long as the rest of their message is not received.
        stepped.serve()
        assert stepped.in_flight == under_way
        (length,) = LENGTH.unpack(first.data + narrow.sock.recv(3))
        data = b""
        while len(data) < length:
            part = sockets.receive(narrow.sock, min(1000, length - len(data)))
            assert not part.descriptors
            data += part.data
            stepped.serve()
        numbers = descriptors.numbers()
        contents = [os.pread(number, 9, 0) for number in numbers]
    narrow._data, narrow._came_with = LENGTH.pack(length) + data, []
    answer = narrow.receive()
    assert answer is not None
    assert isinstance(answer.reply, WalkReply)
    assert [b"%d" % int(entry.path) for entry in answer.reply.entries] == contents


def receive_walk(speaker: StreamSpeaker, stepped: SteppedBroker) -> int:
    """Receive a walk to its end, in small parts; return how many descriptors came."""
    came = 0
    speaker.at_once = 1500
    speaker.sock.settimeout(0)
    for _ in range(10_000):
        stepped.serve()
        try:
            answer = speaker.receive()
        except BlockingIOError:
            continue
        assert answer is not None
        assert isinstance(answer.reply, WalkReply)
        with answer.descriptors as descriptors:
            assert len(descriptors) == len(answer.reply.entries)
            came += len(descriptors)
        if answer.reply.end is not None:
            return came
    pytest.fail("the walk did not end")


def test_a_slow_reader_gets_everything_and_is_counted_out_at_the_end(
    stepped: SteppedBroker, narrow: StreamSpeaker
) -> None:
    before = descriptors_of()
    narrow.send(walk(stepped))
    assert receive_walk(narrow, stepped) == 100
    narrow.sock.settimeout(30)
    assert narrow.status()["in_flight"] == 0
    assert descriptors_of() == before
    assert "undelivered" not in stepped.events()


@pytest.mark.parametrize("waited", [False, True])
def test_of_a_reply_in_parts_whose_client_goes_the_audit_says_that_a_part_was_delivered(
    stepped: SteppedBroker,
    narrow: StreamSpeaker,
    waited: bool,  # noqa: FBT001
) -> None:
    before = descriptors_of()
    with failing_sends(*[NO_ROOM] * waited):
        narrow.send(walk(stepped))
    narrow.close()
    # The walk ended when its last frame was made, or with its client.
    assert sorted(stepped.events()) == ["partly_delivered", "walk_ended"]
    [record] = [record for record in stepped.records() if record["event"] == "partly_delivered"]
    assert record["request"] == 7
    assert stepped.in_flight == 0
    assert len(descriptors_of()) == len(before) - 3


def test_of_a_reply_that_was_not_begun_it_says_undelivered(
    stepped: SteppedBroker, speaker: StreamSpeaker
) -> None:
    request = framed(encode_stat(8, [bytes(stepped.tree / "file")] * FILES))
    for _ in range(100):
        speaker.sock.send(request)
        stepped.broker.step(0)
        if connection_of(stepped).unsent:
            break
    [reply] = connection_of(stepped).unsent
    begun = reply.begun
    speaker.close()
    assert stepped.events() == ["partly_delivered" if begun else "undelivered"]


# What is under way


def test_frames_that_wait_here_are_not_answered_while_the_client_has_too_much_under_way(
    stepped: SteppedBroker, speaker: StreamSpeaker
) -> None:
    bystander = stepped.join()
    request = framed(encode_open(7, [bytes(stepped.tree / "file")] * 80))
    each = MAX_FRAME // len(request)  # so many are received at once
    assert each > 4
    speaker.sock.sendall(request * each)
    for _ in range(3):
        stepped.serve()
    # 4 x 80 and a full reply would be over 512.
    assert stepped.reasons().count("ok") == stepped.in_flight == 4 * 80
    assert stepped.broker._busy == {}
    assert stepped.broker._epoll.poll(0) == []
    assert bystander.open_one(bytes(stepped.tree / "file")).content == b"content"
    for _ in range(each):
        assert opened(speaker) == ["ok"] * 80
        stepped.serve()
        assert stepped.in_flight <= 4 * 80 + 1
    assert stepped.reasons().count("ok") == each * 80 + 1


def test_a_slow_reader_slows_only_itself(stepped: SteppedBroker, speaker: StreamSpeaker) -> None:
    others = [stepped.join(), stepped.join(StreamSpeaker)]
    request = framed(encode_stat(8, [bytes(stepped.tree / "file")] * FILES))
    speaker.sock.settimeout(0)
    sent = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            sent += speaker.sock.send(request)
            stepped.serve()
    assert sent > len(request)
    for other in others:
        for _ in range(10):
            assert other.open_one(bytes(stepped.tree / "file")).content == b"content"
    assert stepped.broker._epoll.poll(0) == []


# The buffer


@settings(max_examples=200)
@given(
    frames=st.lists(st.binary(min_size=12, max_size=300), max_size=6),
    cuts=st.lists(st.integers(1, 200), max_size=20),
    tail=st.binary(max_size=3),
)
def test_frames_come_out_of_the_buffer_as_they_were_whatever_the_parts(
    frames: list[bytes], cuts: list[int], tail: bytes
) -> None:
    buffer, found = FrameBuffer(), []
    data = b"".join(map(framed, frames)) + tail
    for cut in (*cuts, len(data)):
        buffer.add(data[:cut])
        data = data[cut:]
        while buffer.has_frame:
            found.append(buffer.next_frame())
        assert buffer.next_frame() is None
    assert found == frames
    assert len(buffer) == len(tail)
