"""The engine's requests with more than one answer (walks, services), and those for a client or a copy."""

from __future__ import annotations

import os

import pytest
from hypothesis import given as given_that
from hypothesis import strategies as st

from fdbroker.client.engine import (
    Answer,
    AskStatus,
    Engine,
    ListPage,
    OpenPaths,
    Question,
    ServeListener,
    State,
    StatPaths,
    WalkTree,
)
from fdbroker.client.errors import BrokerError, ProtocolError
from fdbroker.kernel.descriptors import Descriptors
from fdbroker.wire.client import AcceptedReply, ServeReply, WalkReply
from fdbroker.wire.format import Incomplete, Kind, Reason, WalkKind
from fdbroker.wire.messages import (
    GIVEN,
    AcceptedClient,
    CancelRequest,
    ErrorReply,
    FileStat,
    ListRequest,
    MoreRequest,
    OpenRequest,
    ReleaseRequest,
    Request,
    ServeRequest,
    StatRequest,
    WalkEnd,
    WalkEntry,
    WalkFilter,
    WalkRequest,
    copied,
    refused,
)
from fdbroker.wire.replies import (
    encode_accepted,
    encode_error,
    encode_open_reply,
    encode_serve_reply,
    encode_walk_entry,
    encode_walk_reply,
)
from fdbroker.wire.requests import decode_request
from tests.client.brokers import welcome

DENIED = refused(Reason.DENIED)
SOME_STAT = FileStat(1, 2, 3, 4, 5, 6, 7, 8, 9)
ASKED = WalkFilter(WalkKind.REGULAR, 1, 2, 3, (b"*.c", b"**/x"))
FIRST = 2  # the hello has 1


def no_descriptors() -> Descriptors:
    return Descriptors()


def some_descriptors(count: int) -> Descriptors:
    return Descriptors([os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC) for _ in range(count)])


def greeted() -> Engine:
    engine = Engine()
    engine.hello()
    assert engine.receive(welcome(copy_max=100), no_descriptors()) is None
    return engine


def asked(question: Question) -> Engine:
    engine = greeted()
    assert engine.request(question)[0] == FIRST
    return engine


def walk_frame(
    entries: int = 0, opened: int = 0, end: tuple[int, int] | None = None, request_id: int = FIRST
) -> bytes:
    """Return a frame of a walk: so many entries, so many of them opened; `end`: the counts of the whole."""
    made = [
        encode_walk_entry(WalkEntry(b"d/%d" % number, 8, SOME_STAT.encode(), number < opened))
        for number in range(entries)
    ]
    last = None if end is None else WalkEnd(*end, 1, Incomplete(0))
    return encode_walk_reply(request_id, 7, GIVEN, made, last)


def test_a_request_says_for_whom_it_is_and_whether_a_copy_will_do() -> None:
    engine = greeted()
    cases: list[tuple[Question, Request]] = [
        (OpenPaths([b"/a"], 9, copy=True), OpenRequest(2, [b"/a"], 9, copy=True)),
        (StatPaths([b"/a"], 9), StatRequest(3, [b"/a"], 9)),
        (ListPage(b"/a", 1, 2, 9), ListRequest(4, b"/a", 1, 2, 9)),
        (
            WalkTree(b"/a", ASKED, b"x", descriptors=False, credit=4, most=5, client=9),
            WalkRequest(5, b"/a", b"x", ASKED, descriptors=False, credit=4, most=5, client=9),
        ),
        (ServeListener(b"clamd"), ServeRequest(6, b"clamd")),
    ]
    for question, expected in cases:
        assert decode_request(engine.request(question)[1]) == expected


# Copies


def test_a_copy_comes_beside_descriptors() -> None:
    engine = asked(OpenPaths([b"/a", b"/b", b"/c"], copy=True))
    frame = encode_open_reply(FIRST, 7, [copied(2), GIVEN, copied(0)], [b"ab", b""])
    with some_descriptors(1) as one:
        answer = engine.receive(frame, one)
        assert answer is not None
        assert answer.reply.copies == (b"ab", b"")  # type: ignore[union-attr]
        assert (len(answer.descriptors), answer.last) == (1, True)


@pytest.mark.parametrize(
    ("question", "length", "why"),
    [
        (OpenPaths([b"/a"]), 2, "was to be opened"),
        (OpenPaths([b"/a"], copy=True), 101, "above its own limit of 100"),
    ],
)
def test_a_copy_that_nobody_asked_for_or_that_is_too_long_is_a_protocol_error(
    question: Question, length: int, why: str
) -> None:
    engine = asked(question)
    with pytest.raises(ProtocolError, match=why):
        engine.receive(encode_open_reply(FIRST, 7, [copied(length)], [b"x" * length]), no_descriptors())
    assert engine.state is State.CLOSED


# Walks


def test_a_walk_has_many_answers_of_which_the_last_is_told() -> None:
    engine = asked(WalkTree(b"/d", WalkFilter(), credit=2))
    seen: list[Answer | None] = []
    with some_descriptors(2) as two, some_descriptors(1) as one:
        seen.append(engine.receive(walk_frame(3, 2), two))
        assert engine.outstanding == 1
        # Other requests are answered in between.
        engine.request(AskStatus())
        seen.append(engine.receive(walk_frame(1, 1, (4, 3)), one))
    assert [answer.last for answer in seen if answer] == [False, True]
    assert isinstance(seen[1].reply, WalkReply)  # type: ignore[union-attr]
    assert engine.outstanding == 1


def test_more_of_a_walk_can_be_asked_for_until_it_has_ended() -> None:
    engine = asked(WalkTree(b"/d", WalkFilter(), credit=1))
    engine.receive(walk_frame(1), no_descriptors())
    frame = engine.more(FIRST, 65535)
    assert frame is not None
    assert decode_request(frame) == MoreRequest(FIRST, 65535)
    engine.receive(walk_frame(1), no_descriptors())
    engine.receive(walk_frame(0, 0, (2, 0)), no_descriptors())
    assert engine.more(FIRST, 1) is None
    assert engine.more(99, 1) is None


@pytest.mark.parametrize("frames", [0, -1, 65536])
def test_an_impossible_credit_is_a_value_error(frames: int) -> None:
    with pytest.raises(ValueError, match="65535"):
        asked(WalkTree(b"/d", WalkFilter())).more(FIRST, frames)


def test_a_walk_that_is_refused_has_one_answer_which_needs_no_credit() -> None:
    engine = asked(WalkTree(b"/d", WalkFilter(), credit=0))
    frame = encode_walk_reply(FIRST, 7, DENIED, [], WalkEnd(0, 0, 0, Incomplete(0)))
    answer = engine.receive(frame, no_descriptors())
    assert answer is not None
    assert answer.last
    assert engine.outstanding == 0


def test_a_walk_can_be_refused_by_an_error() -> None:
    engine = asked(WalkTree(b"/d", WalkFilter()))
    error = encode_error(ErrorReply(FIRST, 7, Kind.REFUSED, Reason.LIMIT, 11, "four walks are enough"))
    answer = engine.receive(error, no_descriptors())
    assert answer is not None
    assert answer.last
    assert engine.more(FIRST, 1) is None


def test_an_abandoned_walk_is_cancelled_once_and_what_comes_is_closed() -> None:
    engine = asked(WalkTree(b"/d", WalkFilter(), credit=5))
    engine.abandon(FIRST)
    engine.abandon(FIRST)
    assert [decode_request(frame) for frame in engine.afterthoughts()] == [CancelRequest(FIRST)]
    assert not engine.afterthoughts()
    assert engine.more(FIRST, 1) is None
    for frame in (walk_frame(2, 2), walk_frame(1, 1, (3, 3))):
        owned = some_descriptors(2 if frame == walk_frame(2, 2) else 1)
        assert engine.receive(frame, owned) is None
        assert len(owned) == 0
    assert engine.outstanding == 0
    assert not engine._abandoned


def test_a_walk_that_ended_before_it_was_abandoned_is_not_cancelled() -> None:
    engine = asked(WalkTree(b"/d", WalkFilter()))
    engine.abandon(FIRST)
    engine.receive(walk_frame(0, 0, (0, 0)), no_descriptors())
    assert not engine.afterthoughts()


@pytest.mark.parametrize(
    ("question", "frames", "descriptors", "why"),
    [
        pytest.param(
            WalkTree(b"/d", WalkFilter(), credit=1),
            [walk_frame(1), walk_frame(1)],
            0,
            "not asked for",
            id="more frames than credit",
        ),
        pytest.param(
            WalkTree(b"/d", WalkFilter(), credit=0),
            [walk_frame(1, 0, (1, 0))],
            0,
            "not asked for",
            id="a last frame with entries and no credit",
        ),
        pytest.param(
            WalkTree(b"/d", WalkFilter(), most=2), [walk_frame(3)], 0, "3 entries", id="too many entries"
        ),
        pytest.param(
            WalkTree(b"/d", WalkFilter(), descriptors=False),
            [walk_frame(2, 1)],
            1,
            "opens files",
            id="descriptors where none are wanted",
        ),
        pytest.param(
            WalkTree(b"/d", WalkFilter()), [walk_frame(2, 1)], 2, "2 descriptors", id="a descriptor more"
        ),
        pytest.param(
            WalkTree(b"/d", WalkFilter()), [walk_frame(2, 2)], 1, "1 descriptors", id="a descriptor less"
        ),
        pytest.param(
            WalkTree(b"/d", WalkFilter()),
            [walk_frame(2, 0, (3, 0))],
            0,
            "3 entries and 0",
            id="an end that counts more than came",
        ),
        pytest.param(
            WalkTree(b"/d", WalkFilter()),
            [walk_frame(1, 0, (1, 0)), walk_frame(1)],
            0,
            "not made or is answered",
            id="a frame after the end",
        ),
        pytest.param(AskStatus(), [walk_frame(1)], 0, "answered by a WalkReply", id="to another request"),
    ],
)
def test_a_walk_that_breaks_the_protocol_ends_the_connection(
    question: Question, frames: list[bytes], descriptors: int, why: str
) -> None:
    engine = asked(question)
    for frame in frames[:-1]:
        engine.receive(frame, no_descriptors())
    owned = some_descriptors(descriptors)
    with pytest.raises(ProtocolError, match=why):
        engine.receive(frames[-1], owned)
    assert len(owned) == 0
    assert engine.state is State.CLOSED


# Services


def accepted(number: int = 5, request_id: int = FIRST) -> bytes:
    return encode_accepted(request_id, 7, AcceptedClient(number, 10, 20, 30, 2))


def serving() -> Engine:
    engine = asked(ServeListener(b"clamd"))
    answer = engine.receive(encode_serve_reply(FIRST, 7, GIVEN), no_descriptors())
    assert answer == Answer(FIRST, ServeReply(FIRST, 7, GIVEN), answer.descriptors, last=False)  # type: ignore[union-attr]
    assert engine.outstanding == 0
    return engine


def test_clients_come_under_the_id_of_the_request_to_serve_each_with_its_socket() -> None:
    engine = serving()
    with some_descriptors(1) as one:
        answer = engine.receive(accepted(), one)
        assert answer is not None
        assert answer.reply == AcceptedReply(FIRST, 7, AcceptedClient(5, 10, 20, 30, 2))
        assert (len(answer.descriptors), answer.last) == (1, False)


def test_a_second_answer_may_say_that_serving_is_over_and_no_other() -> None:
    engine = serving()
    refusal = encode_serve_reply(FIRST, 7, refused(Reason.DENIED))
    answer = engine.receive(refusal, no_descriptors())
    assert answer is not None
    assert answer.last
    assert answer.reply == ServeReply(FIRST, 7, refused(Reason.DENIED))
    with some_descriptors(1) as one, pytest.raises(ProtocolError, match="nobody serves"):
        engine.receive(accepted(), one)
    for second in (refusal, encode_serve_reply(FIRST, 7, GIVEN)):
        engine = serving()
        if second is refusal:
            engine.receive(refusal, no_descriptors())
        with pytest.raises(ProtocolError, match="answered already"):
            engine.receive(second, no_descriptors())


def test_the_id_of_a_service_is_not_used_for_another_request() -> None:
    engine = serving()
    engine._last_id = FIRST - 1
    assert engine.request(AskStatus())[0] == FIRST + 1


def test_a_client_that_was_released_may_have_its_number_again() -> None:
    engine = serving()
    with some_descriptors(1) as one:
        engine.receive(accepted(), one)
    engine.release_later(5)
    assert len(engine.afterthoughts()) == 1
    with some_descriptors(1) as one:
        assert engine.receive(accepted(), one) is not None


def test_a_client_is_released_later_once_and_only_if_it_was_not_already() -> None:
    engine = serving()
    with some_descriptors(1) as one:
        engine.receive(accepted(), one)
    for _ in range(2):
        engine.release_later(5)
    [frame] = engine.afterthoughts()
    released = decode_request(frame)
    assert released == ReleaseRequest(released.id, (5,))
    assert engine.outstanding == 0


def test_the_clients_of_an_abandoned_service_are_closed_and_released() -> None:
    engine = serving()
    engine.abandon(FIRST)
    owned = some_descriptors(1)
    assert engine.receive(accepted(), owned) is None
    assert len(owned) == 0
    [frame] = engine.afterthoughts()
    assert isinstance(decode_request(frame), ReleaseRequest)


def test_after_the_end_there_are_no_afterthoughts() -> None:
    engine = serving()
    engine.release_later(5)
    engine.close()
    assert not engine.afterthoughts()


@pytest.mark.parametrize("descriptors", [0, 2])
def test_a_client_without_its_socket_is_a_protocol_error(descriptors: int) -> None:
    engine = serving()
    owned = some_descriptors(descriptors)
    with pytest.raises(ProtocolError, match="where 1 belong"):
        engine.receive(accepted(), owned)
    assert len(owned) == 0


def test_a_number_that_is_in_use_is_a_protocol_error() -> None:
    engine = serving()
    with some_descriptors(1) as one:
        engine.receive(accepted(), one)
    with pytest.raises(ProtocolError, match="number 5"):
        engine.receive(accepted(), some_descriptors(1))


@pytest.mark.parametrize("reply", [None, DENIED])
def test_a_client_of_a_listener_that_nobody_serves_is_a_protocol_error(reply: object) -> None:
    engine = asked(ServeListener(b"clamd"))
    if reply is not None:
        answer = engine.receive(encode_serve_reply(FIRST, 7, DENIED), no_descriptors())
        assert answer is not None
        assert answer.last
    owned = some_descriptors(1)
    with pytest.raises(ProtocolError, match="nobody serves"):
        engine.receive(accepted(), owned)
    assert len(owned) == 0


frames = st.one_of(
    st.binary(max_size=200),
    st.builds(
        walk_frame,
        st.integers(0, 3),
        st.integers(0, 3),
        st.one_of(st.none(), st.tuples(st.integers(0, 5), st.integers(0, 5))),
        st.integers(1, 4),
    ),
    st.builds(accepted, st.integers(0, 2), st.integers(1, 4)),
    st.builds(encode_serve_reply, st.integers(1, 4), st.just(7), st.sampled_from([GIVEN, DENIED])),
)


@given_that(st.lists(st.tuples(frames, st.integers(0, 3)), max_size=6))
def test_whatever_comes_no_descriptor_is_left_behind(sent: list[tuple[bytes, int]]) -> None:
    engine = greeted()
    for question in (WalkTree(b"/d", WalkFilter(), credit=3), ServeListener(b"clamd"), OpenPaths([b"/a"])):
        engine.request(question)
    for frame, count in sent:
        descriptors = some_descriptors(count)
        try:
            answer = engine.receive(frame, descriptors)
        except BrokerError:
            assert len(descriptors) == 0
            return
        if answer is None:
            assert len(descriptors) == 0
        else:
            answer.descriptors.close()
