"""What a scan service and its clients say: any of it comes back as it was, and nothing else is taken."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdbroker.scan.messages import (
    LONGEST_MESSAGE,
    AskStatus,
    Cancel,
    End,
    EngineState,
    Farewell,
    Hello,
    MessageError,
    Refused,
    Renew,
    Results,
    ScanDescriptor,
    ScanPaths,
    ScanTree,
    StatusReply,
    Welcome,
    decode_answer,
    decode_request,
    encode_answer,
    encode_request,
    encode_results,
)
from fdbroker.scan.run import Scanned, Skipped
from fdbroker.scan.verdict import Answer, Clean, Error, Infected, Reason

ids = st.integers(0, 2**32 - 1)
sizes = st.none() | st.integers(0, 2**63 - 1)
paths = st.binary(min_size=1, max_size=20).map(lambda path: path.replace(b"\0", b"/"))
names = st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=8)
verdicts = st.one_of(
    st.just(Clean()),
    st.builds(Infected, names, st.lists(names, max_size=3).map(tuple)),
    st.builds(Error, st.sampled_from(Reason), names),
)
results = st.one_of(
    st.builds(
        Scanned,
        paths,
        verdicts,
        sizes,
        st.booleans(),
        st.lists(st.builds(Answer, names, verdicts), min_size=2, max_size=3).map(tuple),
    ),
    st.builds(Skipped, paths, names),
)
counts = st.integers(0, 2**63 - 1)


@given(
    st.one_of(
        st.builds(Hello, st.integers(0, 0xFFFF)),
        st.builds(ScanDescriptor, ids, sizes),
        st.builds(ScanPaths, ids, st.lists(paths, max_size=5).map(tuple), sizes),
        st.builds(ScanTree, ids, paths, st.lists(paths, max_size=5).map(tuple), sizes),
        st.builds(Cancel, ids, ids),
        st.builds(AskStatus, ids),
        st.builds(Renew, ids),
    )
)
def test_a_request_comes_back_as_it_was(request: Hello) -> None:
    data = encode_request(request)
    assert data.isascii()
    assert decode_request(data) == request


@given(
    st.one_of(
        st.builds(
            Welcome,
            st.integers(0, 0xFFFF),
            names,
            st.lists(st.builds(EngineState, names, names, st.booleans()), max_size=3).map(tuple),
            sizes,
        ),
        st.builds(End, ids, counts, counts, counts, counts, counts, st.lists(names, max_size=3).map(tuple)),
        st.builds(StatusReply, ids, st.dictionaries(names, counts)),
        st.builds(Refused, ids, names, names),
        st.builds(Farewell, names, names),
    )
)
def test_an_answer_comes_back_as_it_was(answer: Welcome) -> None:
    assert decode_answer(encode_answer(answer)) == answer


@given(ids, st.lists(results, max_size=8))
def test_results_come_back_as_they_were(number: int, told: list[Scanned | Skipped]) -> None:
    messages = [decode_answer(data) for data in encode_results(number, told)]
    back: list[Scanned | Skipped] = []
    for message in messages:
        assert isinstance(message, Results)
        assert message.id == number
        back += message.results
    assert back == told


def test_results_that_are_long_are_told_in_several_messages_and_the_longest_shorter() -> None:
    worst = Infected("\U0001d400" * 255, ("\U0001d401" * 255,) * 15)
    long = Scanned(b"\xff" * 4095, worst, 1, answers=tuple(Answer(f"e{one}", worst) for one in range(8)))
    told = [long, *[Scanned(b"/" + b"\xff" * 4000, Clean(), 1)] * 30]
    messages = encode_results(1, told)
    assert all(len(data) <= LONGEST_MESSAGE for data in messages)
    back: list[Any] = []
    for data in messages:
        answer = decode_answer(data)
        assert isinstance(answer, Results)
        back += answer.results
    assert len(back) == len(told)
    assert back[0].verdict == Infected(worst.name)
    assert back[0].path == long.path


@given(st.binary(max_size=200))
def test_whatever_comes_is_a_message_or_an_error_that_says_why(data: bytes) -> None:
    for decode in (decode_request, decode_answer):
        with contextlib.suppress(MessageError):
            decode(data)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3)
)


@given(
    st.sampled_from(["scan_paths", "scan_tree", "scan_descriptor", "results", "end", "welcome", "cancel"]),
    st.dictionaries(
        st.sampled_from(["id", "path", "path_hex", "paths", "exclude", "max_size", "results", "engines"]),
        _json,
    ),
)
def test_members_of_any_kind_are_taken_or_refused(kind: str, members: dict[str, object]) -> None:
    data = json.dumps({"type": kind, **members}).encode()
    for decode in (decode_request, decode_answer):
        with contextlib.suppress(MessageError):
            decode(data)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b'{"type":"cancel","id":1,"id":1,"request":1}', "a member is there twice"),
        (b'{"type":"cancel","id":1.0,"request":1}', "id is no whole number"),
        (b'{"type":"cancel","id":true,"request":1}', "id is no whole number"),
        (b'{"type":"cancel","id":NaN,"request":1}', "NaN is no number"),
        (b'{"type":"cancel","id":1}', "the member 'request' is missing"),
        (b'{"type":"scan_tree","id":1,"path":"\\ud800"}', "write path_hex"),
        (b'{"type":"scan_tree","id":1,"path":"a\\u0000"}', "no NUL"),
        (b'{"type":"scan_tree","id":1,"path_hex":"0"}', "path_hex"),
        (b'{"type":"scan_paths","id":1,"paths":[{"hex":"00"}]}', "an object with path_hex alone"),
        (b"[" * 50_000, "it is no JSON"),
        (b'{"type":"cancel","id":' + b"1" * 5000 + b"}", "it is no JSON"),
    ],
)
def test_what_is_wrong_with_a_request_is_said(data: bytes, said: str) -> None:
    with pytest.raises(MessageError, match=said):
        decode_request(data)


def test_an_end_can_not_be_complete_and_lack_something() -> None:
    data = json.loads(encode_answer(End(1, 0, 0, 0, 0, 0, ("refused",))))
    with pytest.raises(MessageError, match="something is missing"):
        decode_answer(json.dumps(data | {"complete": True}).encode())
