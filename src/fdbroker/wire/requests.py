"""Requests, as the broker reads them; `client.py` writes them.

`decode_request` reads what a stranger wrote: exact lengths, a closed table of
types, and paths that are split at NUL, so that a path with a NUL inside can't
be expressed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fdbroker.wire.format import (
    ACTIONS,
    CLIENT,
    COOKIE,
    FILE_COMES,
    FOR_CLIENT,
    HEADER,
    HELLO,
    MAGIC,
    MAX_FRAME,
    MAX_GLOB,
    MAX_LIST_ENTRIES,
    MAX_LISTENER_NAME,
    MAX_PATHS,
    MAX_POLICY,
    MAX_WALK_GLOBS,
    MORE_FOLLOWS,
    PIECE,
    ROW,
    STATUS_PARTS,
    WALK,
    WALK_DESCRIPTORS,
    WANTS_COPY,
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

if TYPE_CHECKING:
    from collections.abc import Callable

_BODY = HEADER.size
_ALL_KINDS = int(WalkKind.REGULAR | WalkKind.DIRECTORY | WalkKind.SYMLINK | WalkKind.OTHER)
_new = tuple.__new__  # what a NamedTuple does itself, by a function in Python


def decode_request(frame: bytes) -> Request:
    """Decode one frame of a client.

    Raises:
        MalformedError: it breaks the protocol; the text says how, and
            `request_id` is the frame's id where its header could be read.

    """
    if len(frame) < HEADER.size:
        raise MalformedError(f"a frame of {len(frame)} bytes is shorter than its header ({HEADER.size})")
    if len(frame) > MAX_FRAME:
        raise MalformedError(f"a frame is longer than {MAX_FRAME} bytes")
    kind, flags, count, request_id, generation = HEADER.unpack_from(frame)
    decode, known_flags = _DECODERS.get(kind, _UNKNOWN)
    if decode is None:
        raise MalformedError(f"unknown request type {kind:#04x}", request_id)
    if generation or flags & ~known_flags:
        raise MalformedError("flags or reserved fields are not 0", request_id)
    return decode(frame, flags, count, request_id)


def _decode_hello(frame: bytes, _flags: int, count: int, request_id: int) -> Hello:
    if count or len(frame) != HEADER.size + HELLO.size:
        raise MalformedError("a hello of the wrong length", request_id)
    magic, lowest, highest, features = HELLO.unpack_from(frame, HEADER.size)
    if magic != MAGIC:
        raise MalformedError("a hello without the magic bytes", request_id)
    if lowest > highest:
        raise MalformedError("a hello whose lowest version is above its highest", request_id)
    return Hello(request_id, lowest, highest, features)


def _decode_open(frame: bytes, flags: int, count: int, request_id: int) -> OpenRequest:
    client, at = _client_of(frame, request_id) if flags & FOR_CLIENT else (None, _BODY)
    paths = frame[at:].split(b"\0")
    if len(paths) != count or count > MAX_PATHS:
        raise _wrong_count(count, len(paths), request_id)
    return _new(OpenRequest, (request_id, paths, client, bool(flags & WANTS_COPY)))


def _decode_stat(frame: bytes, flags: int, count: int, request_id: int) -> StatRequest:
    client, at = _client_of(frame, request_id) if flags & FOR_CLIENT else (None, _BODY)
    paths = frame[at:].split(b"\0")
    if len(paths) != count or count > MAX_PATHS:
        raise _wrong_count(count, len(paths), request_id)
    return StatRequest(request_id, paths, client)


def _client_of(frame: bytes, request_id: int) -> tuple[int, int]:
    """Return the number of the client that is acted for, and where the rest of the body begins."""
    if len(frame) < _BODY + CLIENT.size:
        raise MalformedError("a request for a client without its number", request_id)
    return CLIENT.unpack_from(frame, _BODY)[0], _BODY + CLIENT.size


def _wrong_count(announced: int, sent: int, request_id: int) -> MalformedError:
    if not 1 <= announced <= MAX_PATHS:
        return MalformedError(f"a request has 1 to {MAX_PATHS} paths, not {announced}", request_id)
    return MalformedError(f"{announced} paths announced, {sent} sent", request_id)


def _decode_list(frame: bytes, flags: int, count: int, request_id: int) -> ListRequest:
    if count > MAX_LIST_ENTRIES:
        raise MalformedError(f"a page has at most {MAX_LIST_ENTRIES} entries, not {count}", request_id)
    client, at = _client_of(frame, request_id) if flags & FOR_CLIENT else (None, _BODY)
    if len(frame) < at + COOKIE.size:
        raise MalformedError("a list request without its cookie", request_id)
    (cookie,) = COOKIE.unpack_from(frame, at)
    path = frame[at + COOKIE.size :]
    if 0 in path:
        raise MalformedError("a list request with a NUL in its path", request_id)
    return ListRequest(request_id, path, cookie, count, client)


def _decode_walk(frame: bytes, flags: int, count: int, request_id: int) -> WalkRequest:
    if count > MAX_PATHS:
        raise MalformedError(f"a frame of a walk has at most {MAX_PATHS} entries, not {count}", request_id)
    client, at = _client_of(frame, request_id) if flags & FOR_CLIENT else (None, _BODY)
    if len(frame) < at + WALK.size:
        raise MalformedError("a walk without its filter", request_id)
    credit, kinds, options, least, most, newer_than = WALK.unpack_from(frame, at)
    if not kinds or kinds & ~_ALL_KINDS or options & ~WALK_DESCRIPTORS:
        raise MalformedError("a walk of unknown kinds or options", request_id)
    path, *rest = frame[at + WALK.size :].split(b"\0")
    if not 1 <= len(rest) <= 1 + MAX_WALK_GLOBS:
        raise MalformedError(
            f"a walk has a start, a path to go on behind and 0 to {MAX_WALK_GLOBS} globs, not"
            f" {len(rest) + 1} texts",
            request_id,
        )
    behind, *globs = rest
    if not all(0 < len(glob) <= MAX_GLOB for glob in globs):
        raise MalformedError(f"a glob has 1 to {MAX_GLOB} bytes", request_id)
    asked = WalkFilter(WalkKind(kinds), least, most, newer_than, tuple(globs))
    descriptors = bool(options & WALK_DESCRIPTORS)
    return WalkRequest(request_id, path, behind, asked, descriptors, credit, count, client)


def _decode_more(frame: bytes, _flags: int, count: int, request_id: int) -> MoreRequest:
    if not count or len(frame) != HEADER.size:
        raise MalformedError("more of a walk without saying how much", request_id)
    return MoreRequest(request_id, count)


def _decode_cancel(frame: bytes, _flags: int, count: int, request_id: int) -> CancelRequest:
    if count or len(frame) != HEADER.size:
        raise MalformedError("the end of a walk with a body", request_id)
    return CancelRequest(request_id)


def _decode_serve(frame: bytes, _flags: int, count: int, request_id: int) -> ServeRequest:
    listener = frame[_BODY:]
    if count or not 1 <= len(listener) <= MAX_LISTENER_NAME:
        raise MalformedError(f"the name of a listener has 1 to {MAX_LISTENER_NAME} bytes", request_id)
    return ServeRequest(request_id, listener)


def _decode_release(frame: bytes, _flags: int, count: int, request_id: int) -> ReleaseRequest:
    if not 1 <= count <= MAX_PATHS or len(frame) != HEADER.size + CLIENT.size * count:
        raise MalformedError(f"a release has the numbers of 1 to {MAX_PATHS} clients", request_id)
    return ReleaseRequest(request_id, tuple(number for (number,) in CLIENT.iter_unpack(frame[_BODY:])))


def _decode_status(frame: bytes, _flags: int, count: int, request_id: int) -> StatusRequest:
    if not count:
        if len(frame) != HEADER.size:
            raise MalformedError("a status request with a body", request_id)
        return StatusRequest(request_id)
    part = STATUS_PARTS.get(count)
    if part is None or len(frame) != HEADER.size + ROW.size:
        raise MalformedError(f"{count} is no part of the status, or its row is missing", request_id)
    return StatusRequest(request_id, part, *ROW.unpack_from(frame, _BODY))


def _decode_explain(frame: bytes, _flags: int, count: int, request_id: int) -> ExplainRequest:
    action = ACTIONS.get(count)
    if action is None:
        raise MalformedError(f"{count} is no action that can be explained", request_id)
    path = frame[HEADER.size :]
    if 0 in path:
        raise MalformedError("a request to explain with a NUL in its path", request_id)
    return ExplainRequest(request_id, action, path)


def _decode_reload(frame: bytes, flags: int, count: int, request_id: int) -> ReloadRequest:
    if count or len(frame) <= HEADER.size + PIECE.size:
        raise MalformedError("a reload without a piece of a policy", request_id)
    (offset,) = PIECE.unpack_from(frame, HEADER.size)
    piece = frame[HEADER.size + PIECE.size :]
    if offset + len(piece) > MAX_POLICY:
        raise MalformedError(f"a policy of more than {MAX_POLICY} bytes", request_id)
    return ReloadRequest(request_id, offset, piece, more=bool(flags & MORE_FOLLOWS))


def _decode_reopen(frame: bytes, flags: int, count: int, request_id: int) -> ReopenRequest:
    if count or len(frame) != HEADER.size:
        raise MalformedError("a file for the audit with a body", request_id)
    return ReopenRequest(request_id, comes=bool(flags & FILE_COMES))


# What can be asked, with the flags it may have. What is not in this table does not exist.
_DECODERS: dict[int, tuple[Callable[[bytes, int, int, int], Request], int]] = {
    Type.HELLO: (_decode_hello, 0),
    Type.OPEN: (_decode_open, FOR_CLIENT | WANTS_COPY),
    Type.STAT: (_decode_stat, FOR_CLIENT),
    Type.LIST: (_decode_list, FOR_CLIENT),
    Type.STATUS: (_decode_status, 0),
    Type.WALK: (_decode_walk, FOR_CLIENT),
    Type.MORE: (_decode_more, 0),
    Type.CANCEL: (_decode_cancel, 0),
    Type.SERVE: (_decode_serve, 0),
    Type.RELEASE: (_decode_release, 0),
    Type.EXPLAIN: (_decode_explain, 0),
    Type.RELOAD: (_decode_reload, MORE_FOLLOWS),
    Type.REOPEN: (_decode_reopen, FILE_COMES),
}
_UNKNOWN = (None, 0)
