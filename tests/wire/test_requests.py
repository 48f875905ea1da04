"""Requests: round trips, and everything that a stranger might write."""

from __future__ import annotations

import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fdbroker.wire.client import (
    encode_explain,
    encode_hello,
    encode_list,
    encode_open,
    encode_reload,
    encode_stat,
    encode_status,
)
from fdbroker.wire.format import HEADER, MAX_FRAME, MAX_LIST_ENTRIES, MAX_PATHS, MAX_POLICY, PIECE, Type
from fdbroker.wire.messages import (
    ExplainRequest,
    Hello,
    ListRequest,
    MalformedError,
    OpenRequest,
    ReloadRequest,
    Request,
    StatRequest,
    StatusRequest,
)
from fdbroker.wire.requests import decode_request
from tests.wire.frames import encode_request, requests_of_all_kinds

EXAMPLES: list[Request] = [
    Hello(1, 1, 1, 0),
    OpenRequest(2, [b"/a", b"/b", b"/c"]),
    StatRequest(3, [b"/a"]),
    ListRequest(4, b"/dir", 77, 10),
    StatusRequest(5),
    ExplainRequest(6, "walk", b"/a"),
    ReloadRequest(7, 12, b"piece", more=True),
]


@given(requests_of_all_kinds)
def test_a_request_survives_the_wire(request_: Request) -> None:
    decoded = decode_request(encode_request(request_))
    assert decoded == request_
    assert type(decoded) is type(request_)


@given(st.binary(max_size=300))
@example(b"")
def test_arbitrary_bytes_are_a_request_or_malformed(frame: bytes) -> None:
    try:
        decode_request(frame)
    except MalformedError:
        return


@given(
    st.sampled_from([kind for kind in Type if kind is not Type.ERROR]),
    st.integers(0, 300),
    st.binary(max_size=200),
)
def test_arbitrary_bytes_behind_a_header_are_a_request_or_malformed(
    kind: Type, count: int, body: bytes
) -> None:
    frame = HEADER.pack(kind, 0, count, 9, 0) + body
    try:
        request_ = decode_request(frame)
    except MalformedError as error:
        assert error.request_id == 9  # noqa: PT017 - either outcome is right
    else:
        # One message has one form: what was read is written as it was.
        if not isinstance(request_, Hello):
            assert encode_request(request_) == frame


@given(requests_of_all_kinds, st.data())
def test_a_request_with_one_byte_changed_is_a_request_or_malformed(
    request_: Request, data: st.DataObject
) -> None:
    frame = bytearray(encode_request(request_))
    frame[data.draw(st.integers(0, len(frame) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        decode_request(bytes(frame))
    except MalformedError:
        return


@pytest.mark.parametrize("request_", EXAMPLES, ids=lambda one: type(one).__name__)
def test_a_request_that_is_cut_anywhere_is_never_taken_for_the_whole_one(request_: Request) -> None:
    frame = encode_request(request_)
    for length in range(len(frame)):
        try:
            shorter = decode_request(frame[:length])
        except MalformedError:
            continue
        # Only in what comes last can a cut go unseen, since a frame's end is its end.
        assert isinstance(request_, OpenRequest | StatRequest | ListRequest | ExplainRequest | ReloadRequest)
        assert shorter != request_
        assert type(shorter) is type(request_)


@pytest.mark.parametrize("request_", [EXAMPLES[0], EXAMPLES[4]], ids=lambda one: type(one).__name__)
def test_bytes_behind_a_request_of_fixed_length_are_malformed(request_: Request) -> None:
    with pytest.raises(MalformedError):
        decode_request(encode_request(request_) + b"\0")


@pytest.mark.parametrize("request_", EXAMPLES, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("offset", [1, 8, 9, 10, 11])
def test_flags_and_reserved_fields_of_a_request_are_0(request_: Request, offset: int) -> None:
    flag_of_its_own = isinstance(request_, ReloadRequest) and offset == 1
    for bit in range(1 if flag_of_its_own else 0, 8):
        frame = bytearray(encode_request(request_))
        frame[offset] |= 1 << bit
        with pytest.raises(MalformedError) as caught:
            decode_request(bytes(frame))
        assert caught.value.request_id == request_.id


@pytest.mark.parametrize("kind", [kind for kind in range(256) if kind not in list(Type)[:-1]])
def test_an_unknown_type_is_malformed(kind: int) -> None:
    with pytest.raises(MalformedError, match="unknown request type"):
        decode_request(HEADER.pack(kind, 0, 1, 3, 0) + b"/a")


@pytest.mark.parametrize("encode", [encode_open, encode_stat])
@pytest.mark.parametrize("count", [1, 2, MAX_PATHS - 1, MAX_PATHS])
def test_1_to_253_paths_fit_into_a_request(encode: object, count: int) -> None:
    paths = [b"/%d" % number for number in range(count)]
    frame = encode(1, paths)  # type: ignore[operator] # both take the same
    assert decode_request(frame).paths == paths  # type: ignore[union-attr]


@pytest.mark.parametrize("encode", [encode_open, encode_stat])
@pytest.mark.parametrize("count", [0, MAX_PATHS + 1])
def test_0_or_254_paths_are_not_encoded(encode: object, count: int) -> None:
    with pytest.raises(ValueError, match="1 to 253 paths"):
        encode(1, [b"/a"] * count)  # type: ignore[operator]


@pytest.mark.parametrize("kind", [Type.OPEN, Type.STAT])
@pytest.mark.parametrize("count", [0, MAX_PATHS + 1, 65535])
def test_0_or_254_paths_are_malformed(kind: Type, count: int) -> None:
    frame = HEADER.pack(kind, 0, count, 5, 0) + b"\0".join([b"/a"] * count)
    with pytest.raises(MalformedError) as caught:
        decode_request(frame[:MAX_FRAME])
    assert caught.value.request_id == 5


@pytest.mark.parametrize("announced", [1, 2, 4, 5])
def test_another_number_of_paths_than_announced_is_malformed(announced: int) -> None:
    with pytest.raises(MalformedError, match="announced"):
        decode_request(HEADER.pack(Type.OPEN, 0, announced, 5, 0) + b"/a\0/b\0/c")


@pytest.mark.parametrize("path", [b"\0", b"/a\0b", b"/a\0", b"\0/a"])
def test_a_path_with_a_nul_is_not_encoded(path: bytes) -> None:
    with pytest.raises(ValueError, match="NUL"):
        encode_open(1, [b"/x", path])
    with pytest.raises(ValueError, match="NUL"):
        encode_stat(1, [path])
    with pytest.raises(ValueError, match="NUL"):
        encode_list(1, path)


def test_a_path_with_a_nul_in_a_list_request_is_malformed() -> None:
    with pytest.raises(MalformedError, match="NUL"):
        decode_request(HEADER.pack(Type.LIST, 0, 0, 5, 0) + bytes(8) + b"/a\0/b")


def test_a_frame_of_the_full_length_is_taken_and_a_longer_one_is_not() -> None:
    longest = [b"/" + b"x" * (MAX_FRAME - HEADER.size - 1)]
    frame = encode_open(1, longest)
    assert len(frame) == MAX_FRAME
    assert decode_request(frame) == OpenRequest(1, longest)
    with pytest.raises(MalformedError, match="longer than"):
        decode_request(frame + b"x")
    with pytest.raises(ValueError, match="bytes together"):
        encode_open(1, [longest[0] + b"x"])


def test_a_list_request_that_would_be_too_long_is_not_encoded() -> None:
    longest = b"/" + b"x" * (MAX_FRAME - HEADER.size - 8 - 1)
    assert len(encode_list(1, longest)) == MAX_FRAME
    with pytest.raises(ValueError, match="bytes"):
        encode_list(1, longest + b"x")


@pytest.mark.parametrize("most", [-1, MAX_LIST_ENTRIES + 1])
def test_a_page_of_an_impossible_length_is_not_encoded(most: int) -> None:
    with pytest.raises(ValueError, match="entries"):
        encode_list(1, b"/a", most=most)


def test_a_page_of_more_than_1024_entries_is_malformed() -> None:
    frame = HEADER.pack(Type.LIST, 0, MAX_LIST_ENTRIES + 1, 5, 0) + bytes(8) + b"/a"
    with pytest.raises(MalformedError, match="entries"):
        decode_request(frame)


def test_a_hello_is_strict_about_its_magic_and_its_versions() -> None:
    frame = encode_hello(1)
    with pytest.raises(MalformedError, match="magic"):
        decode_request(frame.replace(b"fdbroker", b"fdbrokeR"))
    head = frame[: HEADER.size + 8]
    assert decode_request(head + struct.pack("<HHI", 1, 9, 0xFFFF)) == Hello(1, 1, 9, 0xFFFF)
    with pytest.raises(MalformedError, match="lowest"):
        decode_request(head + struct.pack("<HHI", 2, 1, 0))


def test_a_status_request_has_no_body_and_no_count() -> None:
    assert decode_request(encode_status(7)) == StatusRequest(7)
    with pytest.raises(MalformedError):
        decode_request(HEADER.pack(Type.STATUS, 0, 1, 7, 0))


@pytest.mark.parametrize("action", [0, 5, 65535])
def test_what_is_no_action_is_not_explained(action: int) -> None:
    with pytest.raises(MalformedError, match=f"{action} is no action"):
        decode_request(HEADER.pack(Type.EXPLAIN, 0, action, 7, 0) + b"/a")
    with pytest.raises(ValueError, match="'read' is none of open, stat, list, walk"):
        encode_explain(1, "read", b"/a")


@pytest.mark.parametrize("path", [b"\0", b"/a\0b", b"/a\0"])
def test_a_path_with_a_nul_is_not_explained(path: bytes) -> None:
    with pytest.raises(MalformedError, match="NUL"):
        decode_request(HEADER.pack(Type.EXPLAIN, 0, 1, 7, 0) + path)
    with pytest.raises(ValueError, match="NUL"):
        encode_explain(1, "open", path)


def test_a_path_to_explain_may_fill_a_frame_and_no_more() -> None:
    longest = b"x" * (MAX_FRAME - HEADER.size)
    assert decode_request(encode_explain(1, "stat", longest)) == ExplainRequest(1, "stat", longest)
    with pytest.raises(ValueError, match="too long"):
        encode_explain(1, "stat", longest + b"x")


def test_a_piece_has_at_least_a_byte_and_at_most_a_frame() -> None:
    longest = b"x" * (MAX_FRAME - HEADER.size - PIECE.size)
    assert decode_request(encode_reload(1, 0, longest, more=True)) == ReloadRequest(1, 0, longest, more=True)
    with pytest.raises(ValueError, match="too long"):
        encode_reload(1, 0, longest + b"x", more=True)
    with pytest.raises(ValueError, match="no piece"):
        encode_reload(1, 0, b"", more=True)
    with pytest.raises(MalformedError, match="without a piece"):
        decode_request(HEADER.pack(Type.RELOAD, 0, 0, 1, 0) + PIECE.pack(0))
    with pytest.raises(MalformedError, match="without a piece"):
        decode_request(HEADER.pack(Type.RELOAD, 0, 1, 1, 0) + PIECE.pack(0) + b"x")


def test_a_policy_has_at_most_64_mib() -> None:
    last = ReloadRequest(1, MAX_POLICY - 1, b"x", more=False)
    assert decode_request(encode_request(last)) == last
    with pytest.raises(ValueError, match="no piece"):
        encode_reload(1, MAX_POLICY - 1, b"xy", more=False)
    with pytest.raises(MalformedError, match="more than"):
        decode_request(HEADER.pack(Type.RELOAD, 0, 0, 1, 0) + PIECE.pack(MAX_POLICY - 1) + b"xy")
    with pytest.raises(MalformedError, match="more than"):
        decode_request(HEADER.pack(Type.RELOAD, 0, 0, 1, 0) + PIECE.pack(0xFFFFFFFF) + b"x")
