"""Replies: the broker encodes them, the client decodes them.

The decoder is as strict as the other one: a client that is handed to a
sandboxed worker must not trust its broker's bytes more than needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fdbroker.wire.format import (
    COOKIE,
    ENTRY,
    ENTRY_HAS_STAT,
    ERROR,
    HEADER,
    LIST_LAST_PAGE,
    REPLY,
    RESULT,
    STAT,
    WELCOME,
    Kind,
    Reason,
    Status,
    Type,
)
from fdbroker.wire.messages import (
    GIVEN,
    ErrorReply,
    FileStat,
    ListEntry,
    ListReply,
    MalformedError,
    OpenReply,
    Reply,
    Result,
    StatReply,
    StatusReply,
    Welcome,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_NO_STAT = bytes(STAT.size)
_GIVEN = GIVEN.encode()
_OPEN_REPLY = int(Type.OPEN | REPLY)


def encode_welcome(reply: Welcome) -> bytes:
    """Return the frame."""
    return HEADER.pack(Type.HELLO | REPLY, 0, 0, reply.id, reply.generation) + WELCOME.pack(
        reply.version,
        reply.identity_level,
        reply.features,
        reply.max_paths,
        0,
        reply.max_frame,
        reply.in_flight,
        reply.copy_max,
    )


def encode_open_reply(request_id: int, generation: int, results: Sequence[Result]) -> bytes:
    """Return the frame; its descriptors, one per given result, go beside it."""
    entries = [_GIVEN if result is GIVEN else result.encode() for result in results]
    return HEADER.pack(_OPEN_REPLY, 0, len(entries), request_id, generation) + b"".join(entries)


def encode_stat_reply(
    request_id: int, generation: int, results: Sequence[tuple[Result, FileStat | None]]
) -> bytes:
    """Return the frame."""
    entries = [
        result.encode() + (_NO_STAT if facts is None else STAT.pack(*facts)) for result, facts in results
    ]
    return HEADER.pack(Type.STAT | REPLY, 0, len(entries), request_id, generation) + b"".join(entries)


def encode_list_entry(entry: ListEntry) -> bytes:
    """Return one entry of a list reply."""
    if entry.stat is None:
        return ENTRY.pack(len(entry.name), entry.kind, 0, 0) + _NO_STAT + entry.name
    return ENTRY.pack(len(entry.name), entry.kind, ENTRY_HAS_STAT, 0) + STAT.pack(*entry.stat) + entry.name


def encode_list_reply(
    request_id: int, generation: int, result: Result, entries: Sequence[bytes], cookie: int, *, last: bool
) -> bytes:
    """Return the frame from entries that `encode_list_entry` made."""
    flags = LIST_LAST_PAGE if last else 0
    head = HEADER.pack(Type.LIST | REPLY, flags, len(entries), request_id, generation)
    return head + result.encode() + COOKIE.pack(cookie) + b"".join(entries)


def encode_status_reply(request_id: int, generation: int, document: bytes) -> bytes:
    """Return the frame."""
    return HEADER.pack(Type.STATUS | REPLY, 0, 0, request_id, generation) + document


def encode_error(reply: ErrorReply) -> bytes:
    """Return the frame."""
    return (
        HEADER.pack(Type.ERROR, reply.kind, 0, reply.id, reply.generation)
        + ERROR.pack(reply.reason, 0, reply.errno)
        + reply.text.encode()
    )


def decode_reply(frame: bytes) -> Reply:
    """Decode one frame of a broker.

    Raises:
        MalformedError: it breaks the protocol; the text says how.

    """
    if len(frame) < HEADER.size:
        raise MalformedError(f"a frame of {len(frame)} bytes is shorter than its header ({HEADER.size})")
    kind, flags, count, request_id, generation = HEADER.unpack_from(frame)
    decode = _DECODERS.get(kind)
    if decode is None:
        raise MalformedError(f"unknown reply type {kind:#04x}", request_id)
    if flags & ~_FLAGS.get(kind, 0):
        raise MalformedError(f"flags {flags:#04x}, which this type does not have", request_id)
    try:
        return decode(frame, flags, count, request_id, generation)
    except (ValueError, IndexError) as error:
        if isinstance(error, MalformedError):
            raise
        # An unknown status, reason or kind; an impossible result; or text that is not UTF-8.
        raise MalformedError(f"a reply with an impossible value: {error}", request_id) from None


def _expect(frame: bytes, length: int, what: str, request_id: int) -> None:
    if len(frame) != length:
        raise MalformedError(f"{what} of {len(frame)} bytes instead of {length}", request_id)


def _decode_result(frame: bytes, at: int) -> Result:
    if frame.startswith(_GIVEN, at):
        return GIVEN
    status, reason, number, length = RESULT.unpack_from(frame, at)
    if not status or length:
        raise ValueError("a result that is given and has a reason, or one with a length")
    return Result(Status(status), Reason(reason), number)


def _decode_stat_record(frame: bytes, at: int, *, filled: bool) -> FileStat | None:
    if filled:
        return FileStat(*STAT.unpack_from(frame, at))
    if not frame.startswith(_NO_STAT, at):
        raise ValueError("a stat record where none is given")
    return None


def _decode_welcome(frame: bytes, _flags: int, count: int, request_id: int, generation: int) -> Welcome:
    _expect(frame, HEADER.size + WELCOME.size, "a welcome", request_id)
    version, level, features, max_paths, reserved, max_frame, in_flight, copy_max = WELCOME.unpack_from(
        frame, HEADER.size
    )
    if count or reserved:
        raise MalformedError("a welcome whose reserved fields are not 0", request_id)
    return Welcome(
        request_id, generation, version, level, features, max_paths, max_frame, in_flight, copy_max
    )


def _decode_open(frame: bytes, _flags: int, count: int, request_id: int, generation: int) -> OpenReply:
    size = RESULT.size
    _expect(frame, HEADER.size + count * size, "an open reply", request_id)
    body = frame[HEADER.size :]
    if body == _GIVEN * count:
        return OpenReply(request_id, generation, [GIVEN] * count)
    results = [_decode_result(body, at) for at in range(0, count * size, size)]
    return OpenReply(request_id, generation, results)


def _decode_stat(frame: bytes, _flags: int, count: int, request_id: int, generation: int) -> StatReply:
    size = RESULT.size + STAT.size
    _expect(frame, HEADER.size + count * size, "a stat reply", request_id)
    results: list[tuple[Result, FileStat | None]] = []
    for at in range(HEADER.size, len(frame), size):
        result = _decode_result(frame, at)
        facts = _decode_stat_record(frame, at + RESULT.size, filled=result is GIVEN)
        results.append((result, facts))
    return StatReply(request_id, generation, results)


def _decode_list(frame: bytes, flags: int, count: int, request_id: int, generation: int) -> ListReply:
    at = HEADER.size + RESULT.size + COOKIE.size
    if len(frame) < at:
        raise MalformedError("a list reply without its result and cookie", request_id)
    result = _decode_result(frame, HEADER.size)
    (cookie,) = COOKIE.unpack_from(frame, HEADER.size + RESULT.size)
    entries = []
    for _ in range(count):
        if len(frame) < at + ENTRY.size + STAT.size:
            raise MalformedError("a list reply that ends within an entry", request_id)
        length, kind, entry_flags, reserved = ENTRY.unpack_from(frame, at)
        if entry_flags & ~ENTRY_HAS_STAT or reserved:
            raise MalformedError("an entry whose reserved fields are not 0", request_id)
        at += ENTRY.size
        facts = _decode_stat_record(frame, at, filled=bool(entry_flags))
        at += STAT.size
        name = frame[at : at + length]
        at += length
        # What a name may be is part of the contract: a caller will join it to a path.
        if len(name) != length or b"/" in name or b"\0" in name or name in {b"", b".", b".."}:
            raise MalformedError("a list reply with an impossible name", request_id)
        entries.append(ListEntry(name, kind, facts))
    _expect(frame, at, "a list reply", request_id)
    return ListReply(request_id, generation, result, entries, cookie, bool(flags & LIST_LAST_PAGE))


def _decode_status(frame: bytes, _flags: int, count: int, request_id: int, generation: int) -> StatusReply:
    if count:
        raise MalformedError("a status reply whose count is not 0", request_id)
    return StatusReply(request_id, generation, frame[HEADER.size :])


def _decode_error(frame: bytes, flags: int, count: int, request_id: int, generation: int) -> ErrorReply:
    if len(frame) < HEADER.size + ERROR.size:
        raise MalformedError("an error frame without its reason", request_id)
    reason, reserved, number = ERROR.unpack_from(frame, HEADER.size)
    if count or reserved:
        raise MalformedError("an error frame whose reserved fields are not 0", request_id)
    text = frame[HEADER.size + ERROR.size :].decode()
    return ErrorReply(request_id, generation, Kind(flags), Reason(reason), number, text)


_FLAGS = {Type.LIST | REPLY: LIST_LAST_PAGE, Type.ERROR: Kind.REFUSED | Kind.MALFORMED | Kind.BROKEN}
_DECODERS: dict[int, Callable[[bytes, int, int, int, int], Reply]] = {
    Type.HELLO | REPLY: _decode_welcome,
    Type.OPEN | REPLY: _decode_open,
    Type.STAT | REPLY: _decode_stat,
    Type.LIST | REPLY: _decode_list,
    Type.STATUS | REPLY: _decode_status,
    Type.ERROR: _decode_error,
}
