"""The engine without any socket: what it says, and what it takes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import given as given_that
from hypothesis import strategies as st

from fdbroker.client.engine import (
    ROOM,
    TRANSITIONS,
    VERSION_LIMITS,
    Answer,
    AskStatus,
    Engine,
    Happening,
    Limits,
    ListPage,
    OpenPaths,
    Question,
    State,
    StatPaths,
    batches,
    sendable,
)
from fdbroker.client.errors import BrokerError, LimitError, PathInvalidError, ProtocolError
from fdbroker.kernel.descriptors import Descriptors
from fdbroker.wire.client import OpenReply
from fdbroker.wire.format import HEADER, MAX_FRAME, Kind, Reason
from fdbroker.wire.messages import (
    GIVEN,
    ErrorReply,
    FileStat,
    Hello,
    ListEntry,
    ListRequest,
    OpenRequest,
    StatRequest,
    StatusRequest,
    refused,
)
from fdbroker.wire.replies import (
    encode_error,
    encode_list_entry,
    encode_list_reply,
    encode_open_reply,
    encode_stat_reply,
    encode_status_reply,
)
from fdbroker.wire.requests import decode_request
from tests.client.brokers import welcome

if TYPE_CHECKING:
    from collections.abc import Iterator

DENIED = refused(Reason.DENIED)
SOME_STAT = FileStat(1, 2, 3, 4, 5, 6, 7, 8, 9)


def no_descriptors() -> Descriptors:
    return Descriptors()


def some_descriptors(count: int) -> Descriptors:
    return Descriptors([os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC) for _ in range(count)])


def greeted(**limits: int) -> Engine:
    engine = Engine()
    engine.hello()
    assert engine.receive(welcome(**limits), no_descriptors()) is None
    return engine


def asked(question: Question) -> tuple[Engine, int]:
    engine = greeted()
    request_id, _ = engine.request(question)
    return engine, request_id


def error(request_id: int, kind: Kind = Kind.REFUSED, reason: Reason = Reason.LIMIT) -> bytes:
    return encode_error(ErrorReply(request_id, 1, kind, reason, 11, "said so"))


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("happening", Happening)
def test_the_table_has_every_transition_that_the_protocol_allows(state: State, happening: Happening) -> None:
    expected = {
        (State.NEW, Happening.HELLO): State.GREETING,
        (State.GREETING, Happening.WELCOME): State.READY,
        (State.GREETING, Happening.FAREWELL): State.CLOSED,
        (State.READY, Happening.REQUEST): State.READY,
        (State.READY, Happening.ANSWER): State.READY,
        (State.READY, Happening.FAREWELL): State.CLOSED,
    }.get((state, happening), State.CLOSED if happening is Happening.END else None)
    assert TRANSITIONS.get((state, happening)) is expected


def test_the_first_frame_is_a_hello_and_the_welcome_makes_it_ready() -> None:
    engine = Engine()
    states = [engine.state]
    assert isinstance(decode_request(engine.hello()), Hello)
    states.append(engine.state)
    engine.receive(welcome(max_paths=5), no_descriptors())
    states.append(engine.state)
    assert states == [State.NEW, State.GREETING, State.READY]
    assert engine.welcome.max_paths == 5
    assert engine.limits == Limits(5, MAX_FRAME)


def test_a_second_hello_is_a_mistake_of_the_caller() -> None:
    engine = greeted()
    with pytest.raises(RuntimeError, match="hello in state ready"):
        engine.hello()


@pytest.mark.parametrize("greet", [False, True])
def test_a_request_before_the_welcome_is_a_mistake_of_the_caller(*, greet: bool) -> None:
    engine = Engine()
    if greet:
        engine.hello()
    with pytest.raises(RuntimeError, match="request in state"):
        engine.request(AskStatus())
    with pytest.raises(RuntimeError, match="welcome"):
        _ = engine.welcome
    assert engine.outstanding == 0


def test_nothing_goes_on_after_the_end() -> None:
    engine, _ = asked(AskStatus())
    engine.close()
    engine.close()
    assert engine.state is State.CLOSED
    assert engine.outstanding == 0
    with pytest.raises(RuntimeError):
        engine.request(AskStatus())


def test_each_question_becomes_its_request_with_an_id_of_its_own() -> None:
    engine = greeted()
    questions: list[Question] = [
        OpenPaths([b"/a", b"/b"]),
        StatPaths([b"/a"]),
        ListPage(b"/d", 5, 10),
        AskStatus(),
    ]
    made = [engine.request(question) for question in questions]
    ids = [request_id for request_id, _ in made]
    assert len(set(ids)) == 4
    assert 0 not in ids
    assert [decode_request(frame) for _, frame in made] == [
        OpenRequest(ids[0], [b"/a", b"/b"]),
        StatRequest(ids[1], [b"/a"]),
        ListRequest(ids[2], b"/d", 5, 10),
        StatusRequest(ids[3]),
    ]
    assert engine.outstanding == 4


def test_ids_start_again_after_the_last_and_skip_what_is_outstanding() -> None:
    engine, first = asked(AskStatus())
    engine._last_id = 0xFFFFFFFF - 1
    assert engine.request(AskStatus())[0] == 0xFFFFFFFF
    assert engine.request(AskStatus())[0] == 1
    assert engine.request(AskStatus())[0] == first + 1


def test_replies_in_another_order_find_their_requests() -> None:
    engine = greeted()
    first, _ = engine.request(OpenPaths([b"/a"]))
    second, _ = engine.request(OpenPaths([b"/b", b"/c"]))
    with some_descriptors(1) as one, some_descriptors(2) as two:
        answer = engine.receive(encode_open_reply(second, 1, [GIVEN, GIVEN]), two)
        assert answer == Answer(second, OpenReply(second, 1, [GIVEN, GIVEN]), two)
        answer = engine.receive(encode_open_reply(first, 1, [GIVEN]), one)
        assert answer == Answer(first, OpenReply(first, 1, [GIVEN]), one)
        assert (len(one), len(two)) == (1, 2)
    assert engine.outstanding == 0


def test_a_refused_request_is_an_answer_and_the_connection_goes_on() -> None:
    engine, request_id = asked(OpenPaths([b"/a"]))
    answer = engine.receive(error(request_id), no_descriptors())
    assert answer is not None
    assert isinstance(answer.reply, ErrorReply)
    assert engine.state is State.READY


def test_an_abandoned_answer_is_closed_when_it_comes() -> None:
    engine, request_id = asked(OpenPaths([b"/a"]))
    engine.abandon(request_id)
    engine.abandon(99)
    descriptors = some_descriptors(1)
    assert engine.receive(encode_open_reply(request_id, 1, [GIVEN]), descriptors) is None
    assert len(descriptors) == 0
    assert engine.state is State.READY
    assert not engine._abandoned


STAT_REPLY = encode_stat_reply(2, 1, [(GIVEN, SOME_STAT)])
PAGE = encode_list_reply(2, 1, GIVEN, [encode_list_entry(ListEntry(b"a", 8, None))] * 2, 5, last=False)


@pytest.mark.parametrize(
    ("question", "frame", "descriptors"),
    [
        pytest.param(OpenPaths([b"/a"]), encode_open_reply(9, 1, [GIVEN]), 1, id="of a request not made"),
        pytest.param(OpenPaths([b"/a"]), encode_open_reply(1, 1, [GIVEN]), 1, id="with the id of the hello"),
        pytest.param(OpenPaths([b"/a"]), encode_open_reply(2, 1, [GIVEN, GIVEN]), 2, id="with a result more"),
        pytest.param(OpenPaths([b"/a"] * 2), encode_open_reply(2, 1, [GIVEN]), 1, id="with a result less"),
        pytest.param(OpenPaths([b"/a"]), encode_open_reply(2, 1, []), 0, id="without results"),
        pytest.param(OpenPaths([b"/a"]), encode_open_reply(2, 1, [GIVEN]), 0, id="without its descriptor"),
        pytest.param(OpenPaths([b"/a"]), encode_open_reply(2, 1, [GIVEN]), 2, id="with a descriptor more"),
        pytest.param(OpenPaths([b"/a"]), encode_open_reply(2, 1, [DENIED]), 1, id="that refuses and gives"),
        pytest.param(
            OpenPaths([b"/a"] * 253), encode_open_reply(2, 1, [GIVEN] * 253), 252, id="with 252 of 253"
        ),
        pytest.param(OpenPaths([b"/a"]), STAT_REPLY, 0, id="of another type"),
        pytest.param(AskStatus(), encode_open_reply(2, 1, []), 0, id="of another type, too"),
        pytest.param(
            StatPaths([b"/a"]), encode_stat_reply(2, 1, [(DENIED, None)] * 2), 0, id="of too many stats"
        ),
        pytest.param(
            StatPaths([b"/a"]),
            encode_stat_reply(2, 1, [(GIVEN, SOME_STAT)]),
            1,
            id="of stat with a descriptor",
        ),
        pytest.param(AskStatus(), encode_status_reply(2, 1, b"{}"), 3, id="of status with descriptors"),
        pytest.param(AskStatus(), error(2), 1, id="that is an error with a descriptor"),
        pytest.param(AskStatus(), error(0), 1, id="that is a farewell with a descriptor"),
        pytest.param(AskStatus(), error(9), 0, id="that refuses a request not made"),
        pytest.param(ListPage(b"/d", most=1), PAGE, 0, id="of list with more entries than asked for"),
        pytest.param(ListPage(b"/d", cookie=5), PAGE, 0, id="of list that leads to itself"),
        pytest.param(ListPage(b"/d"), PAGE, 1, id="of list with a descriptor"),
        pytest.param(AskStatus(), welcome(2), 0, id="that is a second welcome"),
        pytest.param(AskStatus(), b"", 0, id="that is empty"),
        pytest.param(AskStatus(), encode_status_reply(2, 1, b"{}")[:11], 2, id="that is cut"),
        pytest.param(AskStatus(), HEADER.pack(0x42, 0, 0, 2, 0), 1, id="of an unknown type"),
    ],
)
def test_a_protocol_error_is_a_reply(question: Question, frame: bytes, descriptors: int) -> None:
    engine, request_id = asked(question)
    assert request_id == 2
    owned = some_descriptors(descriptors)
    with pytest.raises(ProtocolError):
        engine.receive(frame, owned)
    assert len(owned) == 0
    assert engine.state is State.CLOSED
    with pytest.raises(RuntimeError):
        engine.request(AskStatus())


def test_an_answer_that_comes_twice_is_a_protocol_error() -> None:
    engine, request_id = asked(OpenPaths([b"/a"]))
    frame = encode_open_reply(request_id, 1, [DENIED])
    engine.receive(frame, no_descriptors())
    with pytest.raises(ProtocolError, match="answered already"):
        engine.receive(frame, no_descriptors())


def test_a_frame_that_was_cut_by_the_room_is_a_protocol_error() -> None:
    engine, request_id = asked(AskStatus())
    owned = some_descriptors(1)
    with pytest.raises(ProtocolError, match=str(ROOM)):
        engine.receive(encode_status_reply(request_id, 1, b"{}"), owned, truncated=True)
    assert len(owned) == 0


@pytest.mark.parametrize(
    ("frame", "descriptors"),
    [
        pytest.param(welcome(9), 0, id="to another hello"),
        pytest.param(welcome(version=2), 0, id="to another version"),
        pytest.param(welcome(features=1), 0, id="with features"),
        pytest.param(welcome(max_paths=0), 0, id="that allows no path"),
        pytest.param(welcome(max_frame=4000), 0, id="that allows no long path"),
        pytest.param(welcome(), 1, id="with a descriptor"),
        pytest.param(encode_status_reply(1, 1, b"{}"), 0, id="that is none"),
    ],
)
def test_a_protocol_error_is_a_welcome(frame: bytes, descriptors: int) -> None:
    engine = Engine()
    engine.hello()
    with pytest.raises(ProtocolError):
        engine.receive(frame, some_descriptors(descriptors))
    assert engine.state is State.CLOSED


@pytest.mark.parametrize("request_id", [0, 1])
def test_a_connection_that_is_refused_raises_why(request_id: int) -> None:
    engine = Engine()
    engine.hello()
    with pytest.raises(LimitError, match="said so") as caught:
        engine.receive(error(request_id), no_descriptors())
    assert caught.value.reason is Reason.LIMIT
    assert engine.state is State.CLOSED


@pytest.mark.parametrize("request_id", [0, 2])
def test_a_request_that_the_broker_calls_malformed_ends_the_connection(request_id: int) -> None:
    engine, _ = asked(AskStatus())
    with pytest.raises(ProtocolError, match="said so"):
        engine.receive(error(request_id, Kind.MALFORMED, Reason.MALFORMED), no_descriptors())
    assert engine.state is State.CLOSED


def test_an_answer_before_the_hello_is_a_protocol_error() -> None:
    with pytest.raises(ProtocolError):
        Engine().receive(error(0), no_descriptors())


@pytest.mark.parametrize("question", [OpenPaths([]), OpenPaths([b"/a\0"]), ListPage(b"/a", most=2000)])
def test_a_question_that_has_no_form_is_a_value_error_and_not_outstanding(question: Question) -> None:
    engine = greeted()
    with pytest.raises(ValueError, match=r"paths|NUL|entries"):
        engine.request(question)
    assert engine.outstanding == 0
    assert engine.state is State.READY


def test_a_question_above_the_limits_of_this_broker_is_a_value_error() -> None:
    engine = greeted(max_paths=2, max_frame=5000)
    engine.request(OpenPaths([b"/a"] * 2))
    with pytest.raises(ValueError, match="3 paths"):
        engine.request(OpenPaths([b"/a"] * 3))
    with pytest.raises(ValueError, match="5000"):
        engine.request(ListPage(b"/" + b"a" * 5000))


@given_that(st.binary(max_size=200), st.integers(0, 3))
def test_arbitrary_bytes_never_leak_a_descriptor_and_raise_one_kind_of_error(data: bytes, count: int) -> None:
    engine, _ = asked(OpenPaths([b"/a"]))
    descriptors = some_descriptors(count)
    try:
        answer = engine.receive(data, descriptors)
    except BrokerError:
        assert len(descriptors) == 0
    else:
        assert answer is not None
        answer.descriptors.close()


@given_that(
    st.lists(st.binary(max_size=300).map(lambda one: b"/" + one), max_size=60),
    st.integers(1, 20),
    st.integers(1, 10),
    st.integers(4400, 6000),
)
def test_batches_keep_the_order_and_fit(
    paths: list[bytes], most: int, max_paths: int, max_frame: int
) -> None:
    made = list(batches(paths, most, lambda: Limits(max_paths, max_frame)))
    assert [one for batch in made for one in batch.given] == paths
    assert [one for batch in made for one in batch.paths] == [path for path in paths if b"\0" not in path]
    for batch in made:
        assert 1 <= len(batch.given) <= min(most, max_paths)
        assert [one for place, one in enumerate(batch.given) if place not in batch.errors] == batch.paths
        if batch.paths:
            engine = greeted(max_paths=max_paths, max_frame=max_frame)
            engine.request(OpenPaths(batch.paths))


def test_a_batch_is_as_long_as_a_frame_allows() -> None:
    # 16 paths of 4,095 bytes with their NULs are 65,535 bytes: over with the header.
    path = b"/" + b"x" * 4094
    made = batches([path] * 31, 253, lambda: VERSION_LIMITS)
    assert [len(batch.paths) for batch in made] == [15, 15, 1]


def test_batches_read_no_further_than_they_must() -> None:
    read = []

    def paths() -> Iterator[bytes]:
        for number in range(100):
            read.append(number)
            yield b"/a"

    made = batches(paths(), 3, lambda: VERSION_LIMITS)
    next(made)
    assert len(read) == 3


def test_a_batch_of_nothing_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        next(batches([], 0, lambda: VERSION_LIMITS))


@pytest.mark.parametrize("path", ["/a", b"/a", os.fsdecode(b"/caf\xe9"), b"/caf\xe9", "", "relative"])
def test_a_path_is_sent_as_it_is_for_the_broker_to_judge(path: str | bytes) -> None:
    assert sendable(path) == os.fsencode(path)


@pytest.mark.parametrize("path", ["/a\0b", b"\0", "/" + "x" * 5000])
def test_a_path_that_no_frame_carries_has_its_error(path: str | bytes) -> None:
    with pytest.raises(PathInvalidError):
        sendable(path)
    [batch] = batches(["/a", path, "/b"], 9, lambda: VERSION_LIMITS)
    assert (batch.given, batch.paths, list(batch.errors)) == (["/a", path, "/b"], [b"/a", b"/b"], [1])


@pytest.mark.parametrize("path", [1, None, [b"/a"]])
def test_what_is_no_path_is_a_type_error(path: object) -> None:
    with pytest.raises(TypeError):
        sendable(path)  # type: ignore[arg-type]
