"""Replies: round trips, and a broker that does not keep to the protocol."""

from __future__ import annotations

import os

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fdbroker.wire.client import (
    AcceptedReply,
    ExplainReply,
    ListReply,
    OpenReply,
    ReloadReply,
    ReopenReply,
    Reply,
    ServeReply,
    StatReply,
    StatusReply,
    WalkReply,
    decode_reply,
)
from fdbroker.wire.format import (
    COOKIE,
    ENTRY,
    HEADER,
    MAX_COPY,
    REPLY,
    RESULT,
    STAT,
    WALK_END,
    WALK_ENTRY,
    Incomplete,
    Kind,
    Limit,
    Reason,
    Status,
    Type,
)
from fdbroker.wire.messages import (
    GIVEN,
    AcceptedClient,
    ErrorReply,
    FileStat,
    LimitReached,
    ListEntry,
    MalformedError,
    Result,
    WalkEnd,
    WalkEntry,
    Welcome,
    broken,
    copied,
    limited,
    refused,
)
from tests.wire.frames import REPLY_TYPES, encode_reply, replies_of_all_kinds

STAT_RECORD = FileStat(1, 2, 0o100644, 1, 0, 0, 3, -1, 2**63 - 1)
DENIED = refused(Reason.DENIED)
MET = [
    WalkEntry(b"a/b", 8, STAT_RECORD.encode(), descriptor=True),
    WalkEntry(b"c" * 255, 4, STAT_RECORD.encode(), descriptor=False),
]
REACHED = LimitReached(Limit.OPENS_PER_SECOND, 10, 250)
EXAMPLES: list[Reply] = [
    Welcome(1, 7, 1, 2, 0, 253, 65536, 256, 0),
    OpenReply(2, 7, [GIVEN, DENIED, broken(5)]),
    StatReply(3, 7, [(GIVEN, STAT_RECORD), (DENIED, None)]),
    ListReply(4, 7, GIVEN, [ListEntry(b"a", 8, STAT_RECORD), ListEntry(b"b" * 255, 4, None)], 9, last=False),
    StatusReply(5, 7, b"{}"),
    ErrorReply(6, 7, Kind.REFUSED, Reason.LIMIT, 11, "später"),
    ExplainReply(7, 7, b"{}"),
    ReloadReply(8, 7, 12, more=True),
    OpenReply(2, 7, [copied(3), GIVEN, copied(0), DENIED, copied(2)], (b"abc", b"", b"de")),
    WalkReply(9, 7, GIVEN, MET, None),
    WalkReply(9, 7, GIVEN, MET[:1], WalkEnd(5, 4, 2, Incomplete.REFUSED | Incomplete.LIMIT)),
    WalkReply(9, 7, DENIED, [], WalkEnd(0, 0, 0, Incomplete(0))),
    ServeReply(10, 7, GIVEN),
    AcceptedReply(10, 7, AcceptedClient(1, 4321, 1000, 100, 2), 15),
    ReopenReply(12, 7, taken=True),
    OpenReply(2, 7, [limited(REACHED), copied(1), limited(REACHED), GIVEN], (b"a",)),
    StatReply(4, 7, [(limited(REACHED), None), (DENIED, None), (limited(REACHED), None)]),
    ListReply(5, 7, limited(REACHED), [], 0, last=True),
    ErrorReply(6, 7, Kind.REFUSED, Reason.LIMIT, 11, "", REACHED),
]
# Text without a length of its own: its end is the frame's end.
OF_ANY_LENGTH = (StatusReply, ErrorReply, ExplainReply)


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


@given(st.sampled_from(sorted(REPLY_TYPES)), st.integers(0, 3), st.integers(0, 3), st.binary(max_size=300))
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
    assert (type(decoded), decoded) != (type(reply), reply)


@pytest.mark.parametrize("reply", EXAMPLES, ids=lambda one: type(one).__name__)
def test_a_reply_that_is_cut_anywhere_is_never_taken_for_the_whole_one(reply: Reply) -> None:
    frame = encode_reply(reply)
    for length in range(len(frame)):
        try:
            shorter = decode_reply(frame[:length])
        except MalformedError:
            continue
        assert isinstance(reply, OF_ANY_LENGTH)
        assert shorter != reply


@pytest.mark.parametrize(
    "reply",
    [reply for reply in EXAMPLES if not isinstance(reply, OF_ANY_LENGTH)],
    ids=lambda one: type(one).__name__,
)
def test_bytes_behind_a_reply_are_malformed(reply: Reply) -> None:
    with pytest.raises(MalformedError):
        decode_reply(encode_reply(reply) + b"\0")


@pytest.mark.parametrize("kind", [kind for kind in range(256) if kind not in REPLY_TYPES])
def test_an_unknown_type_is_malformed(kind: int) -> None:
    with pytest.raises(MalformedError, match="unknown reply type"):
        decode_reply(HEADER.pack(kind, 0, 0, 3, 0))


@pytest.mark.parametrize("reply", EXAMPLES, ids=lambda one: type(one).__name__)
def test_flags_of_a_reply_are_those_of_its_type(reply: Reply) -> None:
    frame = encode_reply(reply)
    allowed = {
        ListReply: {0, 1},
        ReloadReply: {0, 1},
        ReopenReply: {0, 1},
        ErrorReply: {1, 2, 3},
        # Another layout for the last frame, so none can be taken for the other.
        WalkReply: {frame[1]},
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
        RESULT.pack(2, 14, 5, 1),
        RESULT.pack(3, 1, 13, 0),
        RESULT.pack(3, 1, 0, 0),
        RESULT.pack(3, 0, 13, 0),
        RESULT.pack(3, 0, 0, MAX_COPY + 1) + bytes(MAX_COPY + 1),
        RESULT.pack(4, 0, 0, 0),
        RESULT.pack(255, 1, 13, 0),
        RESULT.pack(1, 99, 13, 0),
    ],
)
def test_an_impossible_result_is_malformed(result: bytes) -> None:
    with pytest.raises(MalformedError) as caught:
        decode_reply(HEADER.pack(Type.OPEN | REPLY, 0, 1, 8, 0) + result)
    assert caught.value.request_id == 8


def test_a_stat_record_that_comes_with_a_refusal_is_malformed() -> None:
    body = DENIED.encode() + STAT_RECORD.encode()
    with pytest.raises(MalformedError):
        decode_reply(HEADER.pack(Type.STAT | REPLY, 0, 1, 8, 0) + body)


@pytest.mark.parametrize("name", [b"", b".", b"..", b"a/b", b"/", b"a\0", b"\0"])
def test_a_name_that_is_none_is_malformed(name: bytes) -> None:
    reply = ListReply(4, 7, GIVEN, [ListEntry(name, 8, None)], 9, last=True)
    with pytest.raises(MalformedError, match="name"):
        decode_reply(encode_reply(reply))


@pytest.mark.parametrize(("flags", "reserved", "record"), [(2, 0, False), (0, 1, False), (0, 0, True)])
def test_bits_of_an_entry_that_mean_nothing_are_malformed(flags: int, reserved: int, *, record: bool) -> None:
    entry = ENTRY.pack(1, 8, flags, reserved) + (STAT_RECORD.encode() if record else bytes(STAT.size)) + b"a"
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
        (EXAMPLES[12], 2),
        (EXAMPLES[13], 2),
        (EXAMPLES[14], 2),
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


def test_the_largest_copy_is_taken() -> None:
    reply = OpenReply(1, 1, [copied(MAX_COPY)], (bytes(MAX_COPY),))
    assert decode_reply(encode_reply(reply)) == reply


@pytest.mark.parametrize("lengths", [(2, 3), (4, 0), (3, 1, 0)])
def test_copies_that_are_not_as_long_together_as_they_are_said_to_be_are_malformed(
    lengths: tuple[int, ...],
) -> None:
    results = b"".join(copied(length).encode() for length in lengths)
    frame = HEADER.pack(Type.OPEN | REPLY, 0, len(lengths), 8, 0) + results
    right = bytes(sum(lengths))
    decode_reply(frame + right)
    for wrong in (right[:-1], right + b"x", b""):
        with pytest.raises(MalformedError):
            decode_reply(frame + wrong)


def test_only_the_contents_of_a_file_can_be_a_copy() -> None:
    copy = copied(0).encode()
    for frame in (
        HEADER.pack(Type.STAT | REPLY, 0, 1, 8, 0) + copy + bytes(STAT.size),
        HEADER.pack(Type.LIST | REPLY, 1, 0, 8, 0) + copy + COOKIE.pack(0),
        HEADER.pack(Type.WALK | REPLY, 1, 0, 8, 0) + copy + WALK_END.pack(0, 0, 0, 0),
        HEADER.pack(Type.SERVE | REPLY, 0, 0, 8, 0) + copy,
    ):
        with pytest.raises(MalformedError, match="copy where none can be"):
            decode_reply(frame)


@pytest.mark.parametrize(
    "path", [b"", b"/", b"/a", b"a/", b"a//b", b".", b"..", b"a/..", b"../a", b"a/./b", b"a\0b", b"\0"]
)
def test_a_path_of_a_walk_that_may_lead_elsewhere_is_malformed(path: bytes) -> None:
    reply = WalkReply(9, 7, GIVEN, [WalkEntry(path, 8, STAT_RECORD.encode(), descriptor=False)], None)
    with pytest.raises(MalformedError, match="impossible path"):
        decode_reply(encode_reply(reply))


def test_a_path_of_a_walk_may_have_any_other_bytes() -> None:
    path = b"...\xff/.a\n/b "
    reply = WalkReply(9, 7, GIVEN, [WalkEntry(path, 8, STAT_RECORD.encode(), descriptor=True)], None)
    assert decode_reply(encode_reply(reply)) == reply


@pytest.mark.parametrize("flags", [2, 3, 0x80])
def test_flags_of_a_walked_entry_that_mean_nothing_are_malformed(flags: int) -> None:
    entry = WALK_ENTRY.pack(1, 8, flags) + STAT_RECORD.encode() + b"a"
    with pytest.raises(MalformedError, match="flags"):
        decode_reply(HEADER.pack(Type.WALK | REPLY, 0, 1, 8, 0) + GIVEN.encode() + entry)


@pytest.mark.parametrize("missing", [128, 1 << 31, 255])
def test_a_walk_that_is_incomplete_in_an_unknown_way_is_malformed(missing: int) -> None:
    frame = HEADER.pack(Type.WALK | REPLY, 1, 0, 8, 0) + GIVEN.encode() + WALK_END.pack(0, 0, 0, missing)
    with pytest.raises(MalformedError, match="unknown way"):
        decode_reply(frame)


@pytest.mark.parametrize(
    "reply",
    [WalkReply(9, 7, DENIED, [], None), WalkReply(9, 7, DENIED, MET[:1], WalkEnd(1, 0, 0, Incomplete(0)))],
)
def test_a_walk_that_is_refused_and_goes_on_is_malformed(reply: Reply) -> None:
    with pytest.raises(MalformedError, match="refused and goes on"):
        decode_reply(encode_reply(reply))


@pytest.mark.parametrize("device", [0, 1, 65024, 2**43, 2**63, 2**64 - 1, os.makedev(259, 2**20 - 1)])
def test_a_device_of_any_number_survives_the_wire(device: int) -> None:
    facts = STAT_RECORD._replace(device=device)
    assert FileStat.decode(facts.encode()) == facts
    *_, major, minor = STAT.unpack(facts.encode())
    if device < 2**43:  # of larger ones os.major knows nothing
        assert (major, minor) == (os.major(device), os.minor(device))
