"""Requests: round trips, and everything that a stranger might write."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fdbroker.wire.client import (
    encode_cancel,
    encode_explain,
    encode_hello,
    encode_list,
    encode_more,
    encode_open,
    encode_release,
    encode_reload,
    encode_serve,
    encode_stat,
    encode_status,
    encode_walk,
)
from fdbroker.wire.format import (
    ANY_TIME,
    CLIENT,
    HEADER,
    MAX_FRAME,
    MAX_GLOB,
    MAX_LIST_ENTRIES,
    MAX_LISTENER_NAME,
    MAX_PATHS,
    MAX_POLICY,
    MAX_WALK_GLOBS,
    NO_SIZE_LIMIT,
    PIECE,
    WALK,
    Type,
    WalkKind,
)
from fdbroker.wire.messages import (
    CancelRequest,
    ExplainRequest,
    Hello,
    ListRequest,
    MalformedError,
    MoreRequest,
    OpenRequest,
    ReleaseRequest,
    ReloadRequest,
    ReopenRequest,
    Request,
    ServeRequest,
    StatRequest,
    StatusRequest,
    WalkFilter,
    WalkRequest,
)
from fdbroker.wire.requests import decode_request
from tests.wire.frames import REQUEST_TYPES, encode_request, requests_of_all_kinds

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ALL_KINDS = WalkKind(sum(WalkKind))
A_WALK = WalkRequest(8, b"/a", b"b/c", WalkFilter(globs=(b"*.c", b"**")), descriptors=True, credit=3, most=64)

EXAMPLES: list[Request] = [
    Hello(1, 1, 1, 0),
    OpenRequest(2, [b"/a", b"/b", b"/c"]),
    StatRequest(3, [b"/a"]),
    ListRequest(4, b"/dir", 77, 10),
    StatusRequest(5),
    StatusRequest(5, "clients", 7),
    ExplainRequest(6, "walk", b"/a"),
    ReloadRequest(7, 12, b"piece", more=True),
    ReopenRequest(13, comes=True),
    A_WALK,
    MoreRequest(9, 2),
    CancelRequest(10),
    ServeRequest(11, b"clamd"),
    ReleaseRequest(12, (3, 5)),
]
FOR_A_CLIENT: list[Request] = [
    OpenRequest(2, [b"/a", b"/b"], client=0x2F2F2F2F, copy=True),
    StatRequest(3, [b"/a"], client=0),
    ListRequest(4, b"/dir", 77, 10, client=0xFFFFFFFF),
    A_WALK._replace(client=5),
]
# Those that end with bytes of any length: only there a cut goes unseen, since a frame's end is its end.
OF_ANY_LENGTH = (
    OpenRequest,
    StatRequest,
    ListRequest,
    ExplainRequest,
    ReloadRequest,
    WalkRequest,
    ServeRequest,
)
# What the first flags of a type mean; all others must be 0.
FLAGS = {OpenRequest: 2, StatRequest: 1, ListRequest: 1, WalkRequest: 1, ReloadRequest: 1, ReopenRequest: 1}


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
    st.sampled_from(sorted(REQUEST_TYPES)),
    st.integers(0, 3),
    st.integers(0, 300),
    st.binary(max_size=200),
)
def test_arbitrary_bytes_behind_a_header_are_a_request_or_malformed(
    kind: int, flags: int, count: int, body: bytes
) -> None:
    frame = HEADER.pack(kind, flags, count, 9, 0) + body
    try:
        request_ = decode_request(frame)
    except MalformedError as error:
        assert error.request_id == 9  # noqa: PT017 - either outcome is right
    else:
        # One message has one form: what was read is written as it was.
        if not isinstance(request_, Hello):
            assert encode_request(request_) == frame


@given(requests_of_all_kinds, st.data())
def test_a_request_with_one_byte_changed_is_another_request_or_malformed(
    request_: Request, data: st.DataObject
) -> None:
    frame = bytearray(encode_request(request_))
    frame[data.draw(st.integers(0, len(frame) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        decoded = decode_request(bytes(frame))
    except MalformedError:
        return
    # No bit of it is overlooked.
    assert (type(decoded), decoded) != (type(request_), request_)
    if not isinstance(decoded, Hello):
        assert encode_request(decoded) == frame


@pytest.mark.parametrize("request_", EXAMPLES + FOR_A_CLIENT, ids=lambda one: type(one).__name__)
def test_a_request_that_is_cut_anywhere_is_never_taken_for_the_whole_one(request_: Request) -> None:
    frame = encode_request(request_)
    for length in range(len(frame)):
        try:
            shorter = decode_request(frame[:length])
        except MalformedError:
            continue
        assert isinstance(request_, OF_ANY_LENGTH)
        assert shorter != request_
        assert type(shorter) is type(request_)


@pytest.mark.parametrize(
    "request_",
    [request_ for request_ in EXAMPLES if not isinstance(request_, OF_ANY_LENGTH)],
    ids=lambda one: type(one).__name__,
)
def test_bytes_behind_a_request_of_fixed_length_are_malformed(request_: Request) -> None:
    with pytest.raises(MalformedError):
        decode_request(encode_request(request_) + b"\0")


@pytest.mark.parametrize("request_", EXAMPLES, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("offset", [1, 8, 9, 10, 11])
def test_flags_and_reserved_fields_of_a_request_are_0(request_: Request, offset: int) -> None:
    known = FLAGS.get(type(request_), 0) if offset == 1 else 0
    for bit in range(known, 8):
        frame = bytearray(encode_request(request_))
        frame[offset] |= 1 << bit
        with pytest.raises(MalformedError) as caught:
            decode_request(bytes(frame))
        assert caught.value.request_id == request_.id


@pytest.mark.parametrize("kind", [kind for kind in range(256) if kind not in REQUEST_TYPES])
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


@pytest.mark.parametrize("request_", FOR_A_CLIENT, ids=lambda one: type(one).__name__)
def test_the_number_of_the_client_comes_before_all_else_of_a_request(request_: Request) -> None:
    frame = encode_request(request_)
    assert decode_request(frame) == request_
    assert frame[1] & 1
    assert frame[HEADER.size : HEADER.size + CLIENT.size] == CLIENT.pack(request_.client)  # type: ignore[union-attr]
    without = encode_request(request_._replace(client=None))  # type: ignore[call-arg]
    assert frame[HEADER.size + CLIENT.size :] == without[HEADER.size :]


@pytest.mark.parametrize("kind", [Type.OPEN, Type.STAT, Type.LIST, Type.WALK])
@pytest.mark.parametrize("length", range(CLIENT.size))
def test_a_request_for_a_client_without_its_whole_number_is_malformed(kind: Type, length: int) -> None:
    with pytest.raises(MalformedError, match="without its number") as caught:
        decode_request(HEADER.pack(kind, 1, 1, 5, 0) + b"/abc"[:length])
    assert caught.value.request_id == 5


@pytest.mark.parametrize("encode", [encode_open, encode_stat])
def test_the_number_of_a_client_takes_its_room_in_a_full_frame(encode: object) -> None:
    longest = b"x" * (MAX_FRAME - HEADER.size - CLIENT.size)
    frame = encode(1, [longest], 7)  # type: ignore[operator] # both take the same
    assert len(frame) == MAX_FRAME
    assert decode_request(frame).client == 7  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="bytes together"):
        encode(1, [longest + b"x"], 7)  # type: ignore[operator]


@pytest.mark.parametrize("number", [-1, 1 << 32])
def test_what_is_no_number_of_a_client_is_not_encoded(number: int) -> None:
    calls: list[Callable[[], bytes]] = [
        lambda: encode_open(1, [b"/a"], number),
        lambda: encode_stat(1, [b"/a"], number),
        lambda: encode_list(1, b"/a", client=number),
        lambda: encode_walk(1, b"/a", WalkFilter(), credit=1, client=number),
        lambda: encode_release(1, [2, number]),
    ]
    for encode in calls:
        with pytest.raises(ValueError, match="number of a client"):
            encode()


def walk_frame(count: int = 0, kinds: int = 1, options: int = 0, texts: bytes = b"/a\0") -> bytes:
    body = WALK.pack(1, kinds, options, 0, NO_SIZE_LIMIT, ANY_TIME)
    return HEADER.pack(Type.WALK, 0, count, 5, 0) + body + texts


def test_a_walk_without_filters_names_every_regular_file() -> None:
    request_ = decode_request(walk_frame())
    assert request_ == WalkRequest(5, b"/a", b"", WalkFilter(), descriptors=False, credit=1, most=0)
    assert encode_walk(5, b"/a", WalkFilter(), credit=1, descriptors=False) == walk_frame()


@pytest.mark.parametrize(
    ("frame", "why"),
    [
        (walk_frame(count=MAX_PATHS + 1), "entries"),
        (walk_frame(count=0xFFFF), "entries"),
        (walk_frame(kinds=0), "kinds"),
        (walk_frame(kinds=16), "kinds"),
        (walk_frame(kinds=0xFFFF), "kinds"),
        (walk_frame(options=2), "options"),
        (walk_frame(options=0x8001), "options"),
        (walk_frame(texts=b""), "texts"),
        (walk_frame(texts=b"/a"), "texts"),
        (walk_frame(texts=b"/a\0" + b"\0x" * (MAX_WALK_GLOBS + 1)), "texts"),
        (walk_frame(texts=b"\0" * 60000), "texts"),
        (walk_frame(texts=b"/a\0b\0"), "glob"),
        (walk_frame(texts=b"/a\0b\0c\0\0d"), "glob"),
        (walk_frame(texts=b"/a\0b\0" + b"c" * (MAX_GLOB + 1)), "glob"),
        (walk_frame()[: HEADER.size + WALK.size - 1], "filter"),
    ],
)
def test_a_walk_that_breaks_the_rules_is_malformed(frame: bytes, why: str) -> None:
    with pytest.raises(MalformedError, match=why) as caught:
        decode_request(frame)
    assert caught.value.request_id == 5


def test_a_walk_at_all_its_limits_is_taken() -> None:
    asked = WalkFilter(ALL_KINDS, NO_SIZE_LIMIT, 0, (1 << 63) - 1, (b"g" * MAX_GLOB,) * MAX_WALK_GLOBS)
    request_ = WalkRequest(
        1, b"", b"x" * 4095, asked, descriptors=True, credit=(1 << 32) - 1, most=MAX_PATHS, client=1
    )
    assert decode_request(encode_request(request_)) == request_


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"path": b"/a\0"}, "NUL"),
        ({"behind": b"\0"}, "NUL"),
        ({"asked": WalkFilter(globs=(b"a\0b",))}, "NUL"),
        ({"asked": WalkFilter(globs=(b"",))}, "1 to 1024 bytes"),
        ({"asked": WalkFilter(globs=(b"x" * (MAX_GLOB + 1),))}, "1 to 1024 bytes"),
        ({"asked": WalkFilter(globs=(b"x",) * (MAX_WALK_GLOBS + 1))}, "at most 16 globs"),
        ({"asked": WalkFilter(kinds=WalkKind(0))}, "kind"),
        ({"asked": WalkFilter(kinds=WalkKind(16))}, "kind"),
        ({"asked": WalkFilter(least_size=-1)}, "sizes"),
        ({"asked": WalkFilter(most_size=1 << 64)}, "sizes"),
        ({"asked": WalkFilter(newer_than=1 << 63)}, "time"),
        ({"asked": WalkFilter(newer_than=ANY_TIME - 1)}, "time"),
        ({"most": MAX_PATHS + 1}, "entries"),
        ({"most": -1}, "entries"),
        ({"credit": -1}, "credit"),
        ({"credit": 1 << 32}, "credit"),
        ({"path": b"/" + b"x" * MAX_FRAME}, "too long"),
    ],
)
def test_a_walk_that_breaks_the_rules_is_not_encoded(changes: dict[str, object], why: str) -> None:
    arguments = {"path": b"/a", "asked": WalkFilter(), "credit": 1} | changes
    with pytest.raises(ValueError, match=why):
        encode_walk(1, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("credit", [-1, 0, 1 << 16])
def test_more_of_a_walk_is_1_to_65535_frames(credit: int) -> None:
    with pytest.raises(ValueError, match="1 to 65535 frames"):
        encode_more(1, credit)
    for most in (1, 0xFFFF):
        assert decode_request(encode_more(1, most)) == MoreRequest(1, most)
    with pytest.raises(MalformedError):
        decode_request(HEADER.pack(Type.MORE, 0, 0, 1, 0))


@pytest.mark.parametrize("numbers", [[], range(MAX_PATHS + 1)])
def test_a_release_of_none_or_of_too_many_is_neither_encoded_nor_decoded(numbers: Sequence[int]) -> None:
    with pytest.raises(ValueError, match="1 to 253 clients"):
        encode_release(1, numbers)
    frame = HEADER.pack(Type.RELEASE, 0, len(numbers), 1, 0) + struct.pack(f"<{len(numbers)}I", *numbers)
    with pytest.raises(MalformedError, match="1 to 253 clients"):
        decode_request(frame)


@pytest.mark.parametrize("change", [-1, 1])
def test_a_release_of_more_or_fewer_than_its_count_says_is_malformed(change: int) -> None:
    frame = bytearray(encode_release(1, [2, 3]))
    frame[2] += change
    with pytest.raises(MalformedError, match="1 to 253 clients"):
        decode_request(bytes(frame))


@pytest.mark.parametrize("kind", [Type.CANCEL, Type.SERVE])
def test_a_count_where_there_is_none_to_have_is_malformed(kind: Type) -> None:
    whole = {
        Type.CANCEL: encode_cancel(1),
        Type.SERVE: encode_serve(1, b"x"),
    }
    frame = bytearray(whole[kind])
    decode_request(bytes(frame))
    frame[2] = 1
    with pytest.raises(MalformedError):
        decode_request(bytes(frame))


@pytest.mark.parametrize("name", [b"", b"x" * (MAX_LISTENER_NAME + 1)])
def test_a_listener_without_a_name_or_with_too_long_a_one_is_malformed(name: bytes) -> None:
    with pytest.raises(ValueError, match="1 to 64 bytes"):
        encode_serve(1, name)
    with pytest.raises(MalformedError, match="1 to 64 bytes"):
        decode_request(HEADER.pack(Type.SERVE, 0, 0, 1, 0) + name)


@pytest.mark.parametrize("cookie", [-1, 1 << 64])
def test_what_is_no_cookie_is_not_encoded(cookie: int) -> None:
    with pytest.raises(ValueError, match="cookie"):
        encode_list(1, b"/a", cookie)


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


@pytest.mark.parametrize("number", [4, 0xFFFF])
def test_what_is_no_part_of_the_status_is_not_told(number: int) -> None:
    with pytest.raises(MalformedError, match=f"{number} is no part of the status"):
        decode_request(HEADER.pack(Type.STATUS, 0, number, 7, 0) + b"\0\0\0\0")
    with pytest.raises(ValueError, match="'rules' is none of decisions, clients, connections"):
        encode_status(1, "rules")
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


def test_a_policy_has_at_most_8_mib() -> None:
    last = ReloadRequest(1, MAX_POLICY - 1, b"x", more=False)
    assert decode_request(encode_request(last)) == last
    with pytest.raises(ValueError, match="no piece"):
        encode_reload(1, MAX_POLICY - 1, b"xy", more=False)
    with pytest.raises(MalformedError, match="more than"):
        decode_request(HEADER.pack(Type.RELOAD, 0, 0, 1, 0) + PIECE.pack(MAX_POLICY - 1) + b"xy")
    with pytest.raises(MalformedError, match="more than"):
        decode_request(HEADER.pack(Type.RELOAD, 0, 0, 1, 0) + PIECE.pack(0xFFFFFFFF) + b"x")
