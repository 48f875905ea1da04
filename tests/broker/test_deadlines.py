"""Clients that are late: a hello and the rest of a frame must come in time, by a clock of the test."""

from __future__ import annotations

import socket
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from fdbroker.broker import server
from fdbroker.broker.connection import State
from fdbroker.wire.client import encode_hello, encode_open, encode_stat, encode_status, encode_walk
from fdbroker.wire.format import Kind, Reason, WalkKind
from fdbroker.wire.messages import ErrorReply, WalkFilter
from fdbroker.wire.stream import framed
from tests.broker.speaking import Speaker, StreamSpeaker, descriptors_of, frame, read_opened
from tests.broker.test_loop import HELLO_BODY, NO_ROOM, failing_sends

if TYPE_CHECKING:
    from tests.broker.stepping import SteppedBroker

WITHIN = 10.0  # what a policy has that says nothing


class Clock:
    """The time of the loop, which goes on when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(server, "time", SimpleNamespace(monotonic=made.monotonic))
    return made


def wait(stepped: SteppedBroker, clock: Clock, seconds: float) -> None:
    """Let time pass, and the broker look at the clock at every half second."""
    end = clock.now + seconds
    while clock.now < end:
        clock.now = min(clock.now + 0.5, end)
        stepped.broker.step(0)


def check_hung_up(stepped: SteppedBroker, speaker: Speaker, what: str) -> None:
    """Check that a client was told that it was late, and recorded."""
    answer = speaker.receive()
    assert answer is not None
    assert isinstance(answer.reply, ErrorReply)
    assert (answer.reply.kind, answer.reply.reason, answer.reply.id) == (Kind.REFUSED, Reason.LIMIT, 0)
    assert answer.reply.text == f"{what} must come within 10 s"
    assert speaker.is_closed()
    # Behind it there may be the end of a walk.
    [record] = [record for record in stepped.records()[-2:] if record["event"] == "too_slow"]
    assert record["reason"] == f"{what} did not come in time"
    assert stepped.broker._deadlines == {}


@pytest.mark.parametrize("kind", [Speaker, StreamSpeaker])
def test_a_client_that_says_no_hello_is_hung_up_on(
    stepped: SteppedBroker, clock: Clock, kind: type[Speaker]
) -> None:
    before = descriptors_of()
    speaker = stepped.join(kind, hello=False)
    wait(stepped, clock, WITHIN - 0.5)
    assert stepped.connections == 1
    wait(stepped, clock, 2)
    check_hung_up(stepped, speaker, "a hello")
    assert stepped.connections == 0
    assert len(descriptors_of()) == len(before) + 1  # the client's own


@pytest.mark.parametrize("kind", [Speaker, StreamSpeaker])
def test_a_hello_that_is_refused_does_not_give_more_time(
    stepped: SteppedBroker, clock: Clock, kind: type[Speaker]
) -> None:
    speaker = stepped.join(kind, hello=False)
    for _ in range(4):
        wait(stepped, clock, 2)
        assert speaker.error(frame(1, body=HELLO_BODY[:8] + b"\2\0\2\0" + bytes(4))).reason == Reason.VERSION
    wait(stepped, clock, 4)
    check_hung_up(stepped, speaker, "a hello")


@pytest.mark.parametrize("kind", [Speaker, StreamSpeaker])
def test_a_client_that_said_hello_may_be_silent_for_as_long_as_it_likes(
    stepped: SteppedBroker, clock: Clock, kind: type[Speaker]
) -> None:
    speaker = stepped.join(kind)
    wait(stepped, clock, 1000)
    assert stepped.broker._deadlines == {}
    assert speaker.open_one(bytes(stepped.tree / "file")).content == b"content"
    wait(stepped, clock, 1000)
    assert speaker.open_one(bytes(stepped.tree / "file")).content == b"content"


def test_half_a_hello_on_a_stream_is_no_hello(stepped: SteppedBroker, clock: Clock) -> None:
    speaker = stepped.join(StreamSpeaker, hello=False)
    for byte in framed(encode_hello(1))[:-1]:
        if stepped.broker._deadlines:
            speaker.sock.send(bytes([byte]))
            wait(stepped, clock, 1)
    check_hung_up(stepped, speaker, "a hello")


@pytest.mark.parametrize("sent", [1, 3, 4, 10, 20])
def test_half_a_frame_is_waited_for_from_its_first_byte_on(
    stepped: SteppedBroker, clock: Clock, sent: int
) -> None:
    speaker = stepped.join(StreamSpeaker)
    wait(stepped, clock, 100)
    data = framed(encode_open(7, [bytes(stepped.tree / "file")]))
    speaker.send_raw(data[:sent])
    wait(stepped, clock, WITHIN - 1)
    speaker.send_raw(data[sent : sent + 1])
    assert stepped.connections == 1
    wait(stepped, clock, 2)
    check_hung_up(stepped, speaker, "the rest of a message")
    assert stepped.reasons() == []


def test_one_byte_a_second_is_enough_for_short_frames_alone(stepped: SteppedBroker, clock: Clock) -> None:
    speaker = stepped.join(StreamSpeaker)
    sent = 0
    for byte in framed(encode_open(7, [bytes(stepped.tree / "file")])):
        if not stepped.broker._deadlines and sent:
            break
        speaker.sock.send(bytes([byte]))
        sent += 1
        wait(stepped, clock, 1)
    assert sent <= WITHIN + 1
    check_hung_up(stepped, speaker, "the rest of a message")


def test_each_frame_has_its_own_time(stepped: SteppedBroker, clock: Clock) -> None:
    speaker = stepped.join(StreamSpeaker)
    data = framed(encode_status(7))
    speaker.send_raw(data[:5])
    for _ in range(20):
        wait(stepped, clock, WITHIN - 2)
        # The end of one and the beginning of another in one part.
        speaker.send_raw(data[5:] + data[:5])
        answer = speaker.receive()
        assert answer is not None
        assert answer.reply.id == 7
    wait(stepped, clock, WITHIN + 1)
    check_hung_up(stepped, speaker, "the rest of a message")


def test_while_a_reply_waits_for_room_it_is_not_the_client_who_is_late(
    stepped: SteppedBroker, clock: Clock
) -> None:
    speaker = stepped.join(StreamSpeaker)
    data = framed(encode_open(7, [bytes(stepped.tree / "file")]))
    with failing_sends(*[NO_ROOM] * 60):
        speaker.sock.send(data + data[:10])
        wait(stepped, clock, 2 * WITHIN)
        assert stepped.connections == 1
    stepped.serve()
    answer = speaker.receive()
    assert answer is not None
    assert [entry.reason for entry in read_opened(answer)] == ["ok"]
    # Now it is: as long as before.
    wait(stepped, clock, WITHIN - 1)
    assert stepped.connections == 1
    wait(stepped, clock, 2)
    check_hung_up(stepped, speaker, "the rest of a message")


def test_while_a_client_is_not_read_from_its_frames_are_not_late(
    stepped: SteppedBroker, clock: Clock
) -> None:
    speaker = stepped.join(StreamSpeaker)
    data = framed(encode_open(7, [bytes(stepped.tree / "file")] * 253))
    speaker.sock.sendall(data * 3 + data[:100])
    stepped.serve()
    [connection] = stepped.broker._connections.values()
    assert connection.state is State.PAUSED
    wait(stepped, clock, 3 * WITHIN)
    assert stepped.connections == 1
    for _ in range(3):
        answer = speaker.receive()
        assert answer is not None
        assert len(read_opened(answer)) == 253
        stepped.serve()
    speaker.send_raw(data[100:])
    answer = speaker.receive()
    assert answer is not None
    assert len(read_opened(answer)) == 253


def test_while_a_walk_waits_for_its_client_the_rest_of_a_frame_is_not_late(
    stepped: SteppedBroker, clock: Clock
) -> None:
    speaker = stepped.join(StreamSpeaker)
    walk = encode_walk(5, bytes(stepped.tree), WalkFilter(WalkKind.REGULAR), credit=9, most=1)
    status = framed(encode_status(1))
    speaker.sock.send(framed(walk))
    stepped.broker.step(0)
    with failing_sends(*[NO_ROOM] * 100):
        speaker.sock.send(status[:10])
        stepped.broker.step(0)
        [connection] = stepped.broker._connections.values()
        assert connection.state is State.SENDING
        # It was begun while the client could be late.
        stepped.broker._expect(connection)
        wait(stepped, clock, 2 * WITHIN)
        assert stepped.connections == 1
    speaker.send_raw(status[10:])
    ids = []
    while 1 not in ids:
        answer = speaker.receive()
        assert answer is not None
        ids.append(answer.reply.id)
        stepped.serve()
    assert 5 in ids


def test_the_rest_of_a_frame_behind_one_whose_walk_goes_on_is_waited_for(
    stepped: SteppedBroker, clock: Clock
) -> None:
    speaker = stepped.join(StreamSpeaker)
    walk = encode_walk(5, bytes(stepped.tree), WalkFilter(WalkKind.REGULAR), credit=1, most=1)
    speaker.send_raw(framed(walk) + framed(encode_status(1))[:10])
    wait(stepped, clock, WITHIN + 2)
    assert speaker.receive() is not None  # the one frame of the walk that it had credit for
    check_hung_up(stepped, speaker, "the rest of a message")


def test_who_is_late_with_replies_in_its_queue_is_kept_until_it_has_them(
    stepped: SteppedBroker, clock: Clock
) -> None:
    speaker = stepped.join(StreamSpeaker)
    speaker.send_raw(framed(encode_open(7, [bytes(stepped.tree / "file")] * 5)) + b"x")
    wait(stepped, clock, WITHIN + 2)
    assert (stepped.connections, stepped.in_flight) == (1, 5)
    answer = speaker.receive()
    assert answer is not None
    assert len(read_opened(answer)) == 5
    check_hung_up(stepped, speaker, "the rest of a message")
    stepped.serve()
    assert (stepped.connections, stepped.in_flight) == (0, 0)


def test_the_loop_looks_up_in_time_by_itself(stepped: SteppedBroker) -> None:
    """With somebody to be waited for it does not sleep for ever, and without it does."""
    stepped.join(hello=False)
    stepped.serve()
    started = time.monotonic()
    stepped.broker.step(-1)
    assert time.monotonic() - started < 5


def test_many_silent_clients_are_no_trouble_to_others(stepped: SteppedBroker, clock: Clock) -> None:
    silent = [stepped.join(kind, hello=False) for kind in (Speaker, StreamSpeaker) * 20]
    other = stepped.join()
    for _ in range(30):
        wait(stepped, clock, 0.5)
        assert other.open_one(bytes(stepped.tree / "file")).content == b"content"
    assert stepped.connections == 1
    assert stepped.events() == ["too_slow"] * len(silent)
    for speaker in silent:
        assert speaker.receive() is not None
        assert speaker.is_closed()


# Who rests


def test_a_client_that_asks_without_pause_does_not_keep_a_walk_of_another_from_going_on(
    stepped: SteppedBroker,
) -> None:
    """A walk for whose descriptors there is no place rests a moment; the moment must end."""
    busy, walker = stepped.join(), stepped.join()
    flight = stepped.broker._flight
    walker.sock.send(
        encode_walk(5, bytes(stepped.tree), WalkFilter(WalkKind.REGULAR), credit=9, descriptors=True)
    )
    most, flight.most_per_uid = flight.most_per_uid, 50
    stepped.serve()
    assert stepped.broker._resting
    flight.most_per_uid = most
    came = 0
    walker.sock.settimeout(1)
    while came < 3:  # in one frame, or more where a step takes its time
        for number in range(5):
            busy.sock.send(encode_status(number))
            stepped.broker.step(0)
        answer = walker.receive()
        assert answer is not None
        with answer.descriptors as descriptors:
            came += len(descriptors)
    assert came == 3


def test_an_answer_by_a_full_socket_is_not_late_for_a_client_without_frames(
    stepped: SteppedBroker, clock: Clock
) -> None:
    speaker = stepped.join()
    request = encode_stat(8, [bytes(stepped.tree / "file")] * 253)
    speaker.sock.settimeout(0)
    try:
        while True:
            speaker.sock.send(request, socket.MSG_DONTWAIT)
            stepped.serve()
    except BlockingIOError:
        pass
    wait(stepped, clock, 100)
    assert stepped.connections == 1
    assert stepped.events() == []
