from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdbroker.scan import answers as answers_module
from fdbroker.scan.answers import LONGEST_ANSWER, AnswerError, all_clean, decode, encode
from fdbroker.scan.verdict import (
    LONGEST_NAME,
    LONGEST_TEXT,
    MOST_NAMES,
    Answer,
    Clean,
    Error,
    Infected,
    Reason,
    Verdict,
    found,
    worst,
)
from fdbroker.wire.format import Reason as WireReason

# All that str.isprintable() is true of.
PRINTABLE = st.characters(categories=["L", "M", "N", "P", "S"], include_characters=" ")
NAMES = st.text(PRINTABLE, min_size=1, max_size=12)
VERDICTS: st.SearchStrategy[Verdict] = st.one_of(
    st.just(Clean()),
    st.builds(Infected, NAMES, st.lists(NAMES, max_size=MOST_NAMES - 1).map(tuple)),
    st.builds(Error, st.sampled_from(Reason), st.text(max_size=40)),
)
NUMBERS = st.integers(0, 2**64 - 1)


CLEAN = all_clean(["engine0", "engine1"])
FILES = st.tuples(NUMBERS, NUMBERS, st.lists(VERDICTS, min_size=2, max_size=2))


@given(NUMBERS, NUMBERS, st.lists(VERDICTS, min_size=1, max_size=8))
def test_an_answer_is_read_as_it_was_written(number: int, size: int, verdicts: list[Verdict]) -> None:
    written = answers(*verdicts)
    data = encode(number, size, written)
    assert len(data) <= LONGEST_ANSWER
    assert decode(data, all_clean(answer.engine for answer in written)) == [(number, size, written)]


@given(st.lists(FILES, min_size=1, max_size=8))
def test_answers_of_one_message_are_read_in_turn(files: list[tuple[int, int, list[Verdict]]]) -> None:
    written = [(number, size, answers(*verdicts)) for number, size, verdicts in files]
    assert decode(b"".join([encode(*one) for one in written]), CLEAN) == written


@given(st.binary(max_size=64), st.integers(1, 3))
def test_any_bytes_are_answers_or_an_error(data: bytes, count: int) -> None:
    with contextlib.suppress(AnswerError):
        assert decode(data, all_clean(["engine"] * count))


@given(st.lists(FILES, min_size=1, max_size=3), st.binary(max_size=16))
def test_a_message_with_something_behind_its_answers_is_none(
    files: list[tuple[int, int, list[Verdict]]], rest: bytes
) -> None:
    written = b"".join([encode(number, size, answers(*verdicts)) for number, size, verdicts in files])
    with pytest.raises(AnswerError):
        decode(written + rest + b"\0", CLEAN)


@given(VERDICTS, st.integers(0, 200), st.integers(0, 255))
def test_a_byte_that_was_changed_never_makes_a_clean_of_what_was_not(
    verdict: Verdict, at: int, byte: int
) -> None:
    data = bytearray(encode(1, 2, [Answer("engine", verdict)]))
    data[at % len(data)] = byte
    try:
        read = decode(bytes(data), all_clean(["engine"]))
    except AnswerError:
        return
    if isinstance(read[0].answers[0].verdict, Clean):
        assert isinstance(verdict, Clean) or (at % len(data) == 17 and len(data) == 21)


@pytest.mark.parametrize(("reason", "text"), [(1, b""), (0, b"x")])
def test_clean_for_a_reason_or_with_a_text_is_no_answer(reason: int, text: bytes) -> None:
    said = (
        answers_module._HEAD.pack(1, 2, 1)
        + answers_module._ENGINE.pack(answers_module._CLEAN, reason, len(text))
        + text
    )
    with pytest.raises(AnswerError, match="kind 1 with reason"):
        decode(said, all_clean(["engine"]))


def test_names_that_do_not_fit_are_left_out_and_the_finding_stays() -> None:
    long = tuple("é" * (LONGEST_NAME - 1) + chr(0x61 + number) for number in range(MOST_NAMES))
    data = encode(1, 2, [Answer("engine", Infected(long[0], long[1:]))])
    assert len(data) <= LONGEST_ANSWER
    [[_, _, [answer]]] = decode(data, all_clean(["engine"]))
    assert isinstance(answer.verdict, Infected)
    assert answer.verdict.name == long[0]
    assert 0 < len(answer.verdict.more) < MOST_NAMES - 1


def answers(*verdicts: Verdict) -> tuple[Answer, ...]:
    return tuple(Answer(f"engine{index}", verdict) for index, verdict in enumerate(verdicts))


MEMORY, FAILED = Error(Reason.MEMORY, "a"), Error(Reason.ENGINE_FAILED, "b")


@pytest.mark.parametrize(
    ("verdicts", "verdict"),
    [
        ([Clean()], Clean()),
        ([Clean(), Clean()], Clean()),
        ([Clean(), MEMORY], MEMORY),
        ([MEMORY, FAILED], MEMORY),
        ([MEMORY, Infected("x"), Clean()], Infected("x")),
        ([Infected("x"), Infected("y", ("x", "z"))], Infected("x", ("y", "z"))),
        ([], Error(Reason.NOT_LOADED, "no engine was asked")),
    ],
)
def test_the_worst_verdict_counts(verdicts: list[Verdict], verdict: Verdict) -> None:
    assert worst(answers(*verdicts)) == verdict


@given(st.lists(VERDICTS, max_size=5))
def test_clean_is_said_when_every_engine_said_it_and_only_then(verdicts: list[Verdict]) -> None:
    every = bool(verdicts) and all(isinstance(verdict, Clean) for verdict in verdicts)
    assert isinstance(worst(answers(*verdicts)), Clean) == every


@given(st.lists(st.text(max_size=300)))
def test_whatever_was_found_has_a_name_that_can_be_shown_or_is_an_error(names: list[str]) -> None:
    verdict = found(names)
    if isinstance(verdict, Infected):
        assert len({verdict.name, *verdict.more}) == 1 + len(verdict.more)
    else:
        assert verdict.reason is Reason.UNKNOWN_ANSWER


@pytest.mark.parametrize("name", ["", "a\nb", "a\x1b[31m", "x" * (LONGEST_NAME + 1), "a\0b"])
def test_a_name_that_can_not_be_shown_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="not a name"):
        Infected("x", (name,))
    with pytest.raises(ValueError, match="not a name"):
        Infected(name)


@given(st.text(max_size=600))
def test_the_text_of_an_error_is_one_line(text: str) -> None:
    shown = Error(Reason.BROKEN, text).text
    assert shown.isprintable()
    assert len(shown) <= LONGEST_TEXT


def test_each_reason_of_the_broker_is_a_reason_of_a_verdict() -> None:
    names = {reason.name.lower() for reason in WireReason if reason}
    assert names <= set(Reason)
