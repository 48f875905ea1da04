"""Replies: round trips, and a broker that does not keep to the protocol."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fdbroker.wire.client import (
    ExplainReply,
    ListReply,
    OpenReply,
    ReloadReply,
    Reply,
    StatReply,
    StatusReply,
    decode_reply,
)
from fdbroker.wire.format import ENTRY, HEADER, REPLY, RESULT, STAT, Kind, Reason, Status, Type
from fdbroker.wire.messages import (
    GIVEN,
    ErrorReply,
    FileStat,
    ListEntry,
    MalformedError,
    Result,
    Welcome,
    broken,
    refused,
)
from tests.wire.frames import encode_reply, replies_of_all_kinds

STAT_RECORD = FileStat(1, 2, 0o100644, 1, 0, 0, 3, -1, 2**63 - 1)
DENIED = refused(Reason.DENIED)
EXAMPLES: list[Reply] = [
    Welcome(1, 7, 1, 2, 0, 253, 65536, 256, 0),
    OpenReply(2, 7, [GIVEN, DENIED, broken(5)]),
    StatReply(3, 7, [(GIVEN, STAT_RECORD), (DENIED, None)]),
    ListReply(4, 7, GIVEN, [ListEntry(b"a", 8, STAT_RECORD), ListEntry(b"b" * 255, 4, None)], 9, last=False),
    StatusReply(5, 7, b"{}"),
    ErrorReply(6, 7, Kind.REFUSED, Reason.LIMIT, 11, "später"),
    ExplainReply(7, 7, b"{}"),
    ReloadReply(8, 7, 12, more=True),
]
TYPES = [kind | REPLY for kind in Type]


@given(replies_of_all_kinds)
def test_a_reply_survives_the_wire(reply: Reply) -> None:
    decoded = decode_reply(encode_reply(reply))
    assert decoded == reply
    assert type(decoded) is type(reply)


@given(st.binary(max_size=400))
@example(b"")
def test_arbitrary_bytes_are_a_reply_or_malformed(frame: bytes) -> None:
    try:
        decode_reply(frame)
    except MalformedError:
        return


@given(st.sampled_from(TYPES), st.integers(0, 3), st.integers(0, 3), st.binary(max_size=300))
def test_arbitrary_bytes_behind_a_header_are_a_reply_or_malformed(
    kind: int, flags: int, count: int, body: bytes
) -> None:
    frame = HEADER.pack(kind, flags, count, 9, 3) + body
    try:
        reply = decode_reply(frame)
    except MalformedError as error:
        assert error.request_id == 9  # noqa: PT017 - either outcome is right
    else:
        # One message has one form, so no bit of it is overlooked.
        assert encode_reply(reply) == frame


@given(replies_of_all_kinds, st.data())
def test_a_reply_with_one_byte_changed_is_another_reply_or_malformed(
    reply: Reply, data: st.DataObject
) -> None:
    frame = bytearray(encode_reply(reply))
    frame[data.draw(st.integers(0, len(frame) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        decoded = decode_reply(bytes(frame))
    except MalformedError:
        return
    assert encode_reply(decoded) == frame


@pytest.mark.parametrize("reply", EXAMPLES, ids=lambda one: type(one).__name__)
def test_a_reply_that_is_cut_anywhere_is_never_taken_for_the_whole_one(reply: Reply) -> None:
    frame = encode_reply(reply)
    for length in range(len(frame)):
        try:
            shorter = decode_reply(frame[:length])
        except MalformedError:
            continue
        # Text without a length of its own: its end is the frame's end.
        assert isinstance(reply, StatusReply | ErrorReply | ExplainReply)
        assert shorter != reply


@pytest.mark.parametrize("reply", [*EXAMPLES[:4], EXAMPLES[7]], ids=lambda one: type(one).__name__)
def test_bytes_behind_a_reply_are_malformed(reply: Reply) -> None:
    with pytest.raises(MalformedError):
        decode_reply(encode_reply(reply) + b"\0")


@pytest.mark.parametrize("kind", [kind for kind in range(256) if kind not in TYPES])
def test_an_unknown_type_is_malformed(kind: int) -> None:
    with pytest.raises(MalformedError, match="unknown reply type"):
        decode_reply(HEADER.pack(kind, 0, 0, 3, 0))


@pytest.mark.parametrize("reply", EXAMPLES, ids=lambda one: type(one).__name__)
def test_flags_of_a_reply_are_those_of_its_type(reply: Reply) -> None:
    frame = encode_reply(reply)
    allowed = {
        ListReply: {0, 1},
        ReloadReply: {0, 1},
        ErrorReply: {1, 2, 3},
    }.get(type(reply), {0})
    for flags in range(256):
        changed = frame[:1] + bytes([flags]) + frame[2:]
        if flags in allowed:
            decode_reply(changed)
        else:
            with pytest.raises(MalformedError):
                decode_reply(changed)


@pytest.mark.parametrize(
    "result",
    [
        RESULT.pack(0, 1, 0, 0),
        RESULT.pack(0, 0, 13, 0),
        RESULT.pack(0, 0, 0, 1),
        RESULT.pack(1, 1, 13, 1),
        RESULT.pack(3, 1, 13, 0),
        RESULT.pack(1, 99, 13, 0),
    ],
)
def test_an_impossible_result_is_malformed(result: bytes) -> None:
    with pytest.raises(MalformedError) as caught:
        decode_reply(HEADER.pack(Type.OPEN | REPLY, 0, 1, 8, 0) + result)
    assert caught.value.request_id == 8


def test_a_stat_record_that_comes_with_a_refusal_is_malformed() -> None:
    body = DENIED.encode() + STAT.pack(*STAT_RECORD)
    with pytest.raises(MalformedError):
        decode_reply(HEADER.pack(Type.STAT | REPLY, 0, 1, 8, 0) + body)


@pytest.mark.parametrize("name", [b"", b".", b"..", b"a/b", b"/", b"a\0", b"\0"])
def test_a_name_that_is_none_is_malformed(name: bytes) -> None:
    reply = ListReply(4, 7, GIVEN, [ListEntry(name, 8, None)], 9, last=True)
    with pytest.raises(MalformedError, match="name"):
        decode_reply(encode_reply(reply))


@pytest.mark.parametrize(("flags", "reserved", "record"), [(2, 0, False), (0, 1, False), (0, 0, True)])
def test_bits_of_an_entry_that_mean_nothing_are_malformed(flags: int, reserved: int, *, record: bool) -> None:
    entry = (
        ENTRY.pack(1, 8, flags, reserved) + (STAT.pack(*STAT_RECORD) if record else bytes(STAT.size)) + b"a"
    )
    body = GIVEN.encode() + bytes(8) + entry
    with pytest.raises(MalformedError):
        decode_reply(HEADER.pack(Type.LIST | REPLY, 1, 1, 8, 0) + body)


@pytest.mark.parametrize(
    ("reply", "at"),
    [
        (EXAMPLES[0], 2),
        (EXAMPLES[0], 22),
        (EXAMPLES[4], 2),
        (EXAMPLES[5], 2),
        (EXAMPLES[5], 13),
        (EXAMPLES[6], 2),
        (EXAMPLES[7], 2),
    ],
)
def test_reserved_fields_of_a_reply_are_0(reply: Reply, at: int) -> None:
    frame = bytearray(encode_reply(reply))
    frame[at] ^= 1
    with pytest.raises(MalformedError):
        decode_reply(bytes(frame))


def test_text_that_is_not_utf_8_is_malformed() -> None:
    frame = encode_reply(ErrorReply(6, 7, Kind.REFUSED, Reason.LIMIT, 11, "")) + b"\xff"
    with pytest.raises(MalformedError):
        decode_reply(frame)


def test_a_given_result_is_recognised_by_identity() -> None:
    reply = decode_reply(encode_reply(OpenReply(1, 1, [GIVEN, Result(Status.REFUSED, Reason.BUSY, 11)])))
    assert isinstance(reply, OpenReply)
    assert reply.results[0] is GIVEN


def test_text_that_has_no_utf_8_is_escaped_and_never_fails() -> None:
    """It may quote what somebody wrote, half a surrogate pair in JSON for one."""
    frame = encode_reply(ErrorReply(6, 7, Kind.REFUSED, Reason.POLICY, 22, "'\ud800' is no root"))
    reply = decode_reply(frame)
    assert isinstance(reply, ErrorReply)
    assert reply.text == "'\\ud800' is no root"
