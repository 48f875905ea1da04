"""Frames on a stream: however it is cut into parts, the same frames come out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdbroker.wire.format import HEADER, LENGTH, MAX_FRAME
from fdbroker.wire.messages import MalformedError
from fdbroker.wire.stream import FrameBuffer, framed
from tests.wire.frames import encode_request, requests_of_all_kinds

SHORTEST = bytes(range(HEADER.size))
frames = st.lists(
    requests_of_all_kinds.map(encode_request)
    | st.just(SHORTEST)
    | st.integers(0, 255).map(lambda value: bytes([value]) * MAX_FRAME),
    max_size=6,
)


def taken(buffer: FrameBuffer) -> list[bytes]:
    """Return the frames that are there whole."""
    found = []
    while (frame := buffer.next_frame()) is not None:
        found.append(frame)
    return found


@given(st.lists(st.integers(0, MAX_FRAME + 2) | st.integers(8, 16)), st.data())
def test_there_is_a_frame_if_it_can_be_taken_or_is_malformed(lengths: list[int], data: st.DataObject) -> None:
    stream = b"".join(LENGTH.pack(length) + bytes(length) for length in lengths[:3])
    buffer = FrameBuffer()
    buffer.add(stream[: data.draw(st.integers(0, len(stream)))])
    while True:
        expected = buffer.has_frame
        try:
            frame = buffer.next_frame()
        except MalformedError:
            assert expected
            return
        assert expected is (frame is not None)
        if frame is None:
            return


@given(frames, st.data())
def test_any_split_of_any_sequence_of_frames_gives_the_same_frames(
    sent: list[bytes], data: st.DataObject
) -> None:
    stream = b"".join(map(framed, sent))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=30)))
    buffer, received = FrameBuffer(), []
    for begin, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        buffer.add(stream[begin:end])
        # Between parts the frames are taken or not.
        if data.draw(st.booleans()):
            received += taken(buffer)
    received += taken(buffer)
    assert received == sent
    assert len(buffer) == 0


def test_frames_that_come_byte_by_byte_are_there_with_their_last_byte() -> None:
    sent = [SHORTEST, SHORTEST + b"x"]
    buffer = FrameBuffer()
    for frame in sent:
        whole = framed(frame)
        for at in range(len(whole) - 1):
            buffer.add(whole[at : at + 1])
            assert buffer.next_frame() is None
            assert len(buffer) == at + 1
        buffer.add(whole[-1:])
        assert buffer.next_frame() == frame


@pytest.mark.parametrize("length", [0, 1, 11, MAX_FRAME + 1, 1 << 24, (1 << 32) - 1])
def test_an_impossible_length_is_malformed_as_soon_as_it_is_there(length: int) -> None:
    buffer = FrameBuffer()
    buffer.add(framed(SHORTEST))
    buffer.add(LENGTH.pack(length)[:-1])
    assert taken(buffer) == [SHORTEST]
    buffer.add(LENGTH.pack(length)[-1:])
    for _ in range(2):  # and it stays so
        with pytest.raises(MalformedError, match=f"a frame of {length} bytes"):
            buffer.next_frame()


@pytest.mark.parametrize("length", [HEADER.size, MAX_FRAME])
def test_the_shortest_and_the_longest_frame_are_taken(length: int) -> None:
    buffer = FrameBuffer()
    buffer.add(framed(bytes(length)))
    assert taken(buffer) == [bytes(length)]


@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_frames_or_malformed_and_none_is_lost(stream: bytes) -> None:
    buffer = FrameBuffer()
    buffer.add(stream)
    found = []
    try:
        found = taken(buffer)
    except MalformedError:
        assert len(buffer) >= LENGTH.size
    assert sum(len(framed(frame)) for frame in found) + len(buffer) <= len(stream)
    assert stream.startswith(b"".join(map(framed, found)))
