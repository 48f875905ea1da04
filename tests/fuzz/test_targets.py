"""The targets of `make fuzz`, for a moment, by hypothesis."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import PURE, Choices, EndToEnd
from tests.wire.frames import vectors

if TYPE_CHECKING:
    from collections.abc import Iterator

# Bytes of which a part is right.
FRAMES = [vector.frame for vector in vectors()]
data = st.one_of(
    st.binary(max_size=400),
    st.builds(
        lambda frame, at, byte: frame[:at] + byte + frame[at + len(byte) :],
        st.sampled_from(FRAMES),
        st.integers(0, 60),
        st.binary(max_size=3),
    ),
    st.lists(st.sampled_from(FRAMES), max_size=4).map(b"".join),
)


@pytest.fixture(scope="module")
def end_to_end() -> Iterator[EndToEnd]:
    with EndToEnd() as made:
        yield made


@pytest.mark.parametrize("target", PURE)
@given(sent=data)
def test_any_bytes_are_decoded_or_malformed(target: str, sent: bytes) -> None:
    PURE[target](sent)


@settings(max_examples=300)
@given(sent=st.binary(max_size=300))
def test_any_messages_are_answered_as_they_ask_and_leave_nothing_behind(
    end_to_end: EndToEnd, sent: bytes
) -> None:
    end_to_end(sent)


def test_choices_end_with_their_bytes() -> None:
    choices = Choices(b"\5\xff\1")
    assert (choices.number(9), choices.take(1), choices.number(255)) == (5, b"\xff", 1)
    assert not choices
    assert (choices.number(9), choices.take(5)) == (0, b"")
