"""Replies, as the broker writes them; `client.py` reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fdbroker.wire.format import (
    ACCEPTED,
    COOKIE,
    ENTRY,
    ENTRY_HAS_STAT,
    ERROR,
    FILE_COMES,
    HEADER,
    LIST_LAST_PAGE,
    MORE_FOLLOWS,
    PIECE,
    REPLY,
    STAT,
    WALK_END,
    WALK_ENTRY,
    WALK_ENTRY_HAS_DESCRIPTOR,
    WALK_LAST,
    WELCOME,
    Type,
)
from fdbroker.wire.messages import (
    GIVEN,
    AcceptedClient,
    ErrorReply,
    FileStat,
    ListEntry,
    Result,
    WalkEnd,
    WalkEntry,
    Welcome,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

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


def encode_open_reply(
    request_id: int, generation: int, results: Sequence[Result], copies: Sequence[bytes] = ()
) -> bytes:
    """Return the frame; its descriptors, one per given result, go beside it.

    `copies`: the contents of those that are copied, in order.
    """
    entries = [_GIVEN if result is GIVEN else result.encode() for result in results]
    head = HEADER.pack(_OPEN_REPLY, 0, len(entries), request_id, generation)
    return b"".join((head, *entries, *copies, _limits_of(results)))


def _limits_of(results: Sequence[Result]) -> bytes:
    return b"".join(result.limit.encode() for result in results if result.limit is not None)


def encode_open_given(request_id: int, generation: int, count: int) -> bytes:
    """Return the frame for `count` paths that were all given."""
    return HEADER.pack(_OPEN_REPLY, 0, count, request_id, generation) + _GIVEN * count


def encode_stat_reply(
    request_id: int, generation: int, results: Sequence[tuple[Result, FileStat | None]]
) -> bytes:
    """Return the frame."""
    entries = [result.encode() + (_NO_STAT if facts is None else facts.encode()) for result, facts in results]
    head = HEADER.pack(Type.STAT | REPLY, 0, len(entries), request_id, generation)
    return head + b"".join(entries) + _limits_of([result for result, _ in results])


def encode_list_entry(entry: ListEntry) -> bytes:
    """Return one entry of a list reply."""
    if entry.stat is None:
        return ENTRY.pack(len(entry.name), entry.kind, 0, 0) + _NO_STAT + entry.name
    return ENTRY.pack(len(entry.name), entry.kind, ENTRY_HAS_STAT, 0) + entry.stat.encode() + entry.name


def encode_list_reply(
    request_id: int, generation: int, result: Result, entries: Sequence[bytes], cookie: int, *, last: bool
) -> bytes:
    """Return the frame from entries that `encode_list_entry` made."""
    flags = LIST_LAST_PAGE if last else 0
    head = HEADER.pack(Type.LIST | REPLY, flags, len(entries), request_id, generation)
    return head + result.encode() + COOKIE.pack(cookie) + b"".join(entries) + _limits_of([result])


def encode_walk_entry(entry: WalkEntry) -> bytes:
    """Return one entry of a walk's frame."""
    flags = WALK_ENTRY_HAS_DESCRIPTOR if entry.descriptor else 0
    return WALK_ENTRY.pack(len(entry.path), entry.kind, flags) + entry.record + entry.path


def encode_walk_reply(
    request_id: int, generation: int, result: Result, entries: Sequence[bytes], end: WalkEnd | None
) -> bytes:
    """Return a frame of a walk from entries that `encode_walk_entry` made. `end`: it is the last one.

    Its descriptors, one per entry that has one, go beside it. A walk that is refused ends at once.
    """
    head = HEADER.pack(
        Type.WALK | REPLY, 0 if end is None else WALK_LAST, len(entries), request_id, generation
    )
    tail = b"" if end is None else WALK_END.pack(*end)
    return head + result.encode() + b"".join(entries) + tail


def encode_serve_reply(request_id: int, generation: int, result: Result) -> bytes:
    """Return the frame."""
    return HEADER.pack(Type.SERVE | REPLY, 0, 0, request_id, generation) + result.encode()


def encode_accepted(
    request_id: int, generation: int, client: AcceptedClient, may_hold_back: int = 0
) -> bytes:
    """Return the frame; the client's socket goes beside it. `request_id`: of the request to serve.

    `may_hold_back`: how many releases may be kept for a moment, to be sent together.
    """
    head = HEADER.pack(Type.ACCEPTED | REPLY, 0, 0, request_id, generation)
    return head + ACCEPTED.pack(*client, may_hold_back)


def encode_status_reply(request_id: int, generation: int, document: bytes) -> bytes:
    """Return the frame."""
    return HEADER.pack(Type.STATUS | REPLY, 0, 0, request_id, generation) + document


def encode_explain_reply(request_id: int, generation: int, document: bytes) -> bytes:
    """Return the frame."""
    return HEADER.pack(Type.EXPLAIN | REPLY, 0, 0, request_id, generation) + document


def encode_reload_reply(request_id: int, generation: int, received: int, *, more: bool) -> bytes:
    """Return the frame."""
    flags = MORE_FOLLOWS if more else 0
    return HEADER.pack(Type.RELOAD | REPLY, flags, 0, request_id, generation) + PIECE.pack(received)


def encode_reopen_reply(request_id: int, generation: int, *, taken: bool) -> bytes:
    """Return the frame. `taken`: the file is the audit's now; else it is waited for."""
    return HEADER.pack(Type.REOPEN | REPLY, FILE_COMES if taken else 0, 0, request_id, generation)


def encode_error(reply: ErrorReply) -> bytes:
    """Return the frame."""
    limit = b"" if reply.limit is None else reply.limit.encode()
    return (
        HEADER.pack(Type.ERROR, reply.kind, 1 if limit else 0, reply.id, reply.generation)
        + ERROR.pack(reply.reason, 0, reply.errno)
        + limit
        + reply.text.encode(errors="backslashreplace")
    )
