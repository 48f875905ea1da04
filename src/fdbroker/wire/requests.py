"""Requests, as the broker reads them; `client.py` writes them.

`decode_request` reads what a stranger wrote: exact lengths, a closed table of
types, and paths that are split at NUL, so that a path with a NUL inside can't
be expressed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fdbroker.wire.format import (
    ACTIONS,
    COOKIE,
    HEADER,
    HELLO,
    MAGIC,
    MAX_FRAME,
    MAX_LIST_ENTRIES,
    MAX_PATHS,
    MAX_POLICY,
    MORE_FOLLOWS,
    PIECE,
    Type,
)
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

if TYPE_CHECKING:
    from collections.abc import Callable

_BODY = HEADER.size
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


def _decode_open(frame: bytes, _flags: int, count: int, request_id: int) -> OpenRequest:
    paths = frame[_BODY:].split(b"\0")
    if len(paths) != count or count > MAX_PATHS:
        raise _wrong_count(count, len(paths), request_id)
    return _new(OpenRequest, (request_id, paths))


def _decode_stat(frame: bytes, _flags: int, count: int, request_id: int) -> StatRequest:
    paths = frame[_BODY:].split(b"\0")
    if len(paths) != count or count > MAX_PATHS:
        raise _wrong_count(count, len(paths), request_id)
    return StatRequest(request_id, paths)


def _wrong_count(announced: int, sent: int, request_id: int) -> MalformedError:
    if not 1 <= announced <= MAX_PATHS:
        return MalformedError(f"a request has 1 to {MAX_PATHS} paths, not {announced}", request_id)
    return MalformedError(f"{announced} paths announced, {sent} sent", request_id)


def _decode_list(frame: bytes, _flags: int, count: int, request_id: int) -> ListRequest:
    if count > MAX_LIST_ENTRIES:
        raise MalformedError(f"a page has at most {MAX_LIST_ENTRIES} entries, not {count}", request_id)
    if len(frame) < HEADER.size + COOKIE.size:
        raise MalformedError("a list request without its cookie", request_id)
    (cookie,) = COOKIE.unpack_from(frame, HEADER.size)
    path = frame[HEADER.size + COOKIE.size :]
    if 0 in path:
        raise MalformedError("a list request with a NUL in its path", request_id)
    return ListRequest(request_id, path, cookie, count)


def _decode_status(frame: bytes, _flags: int, count: int, request_id: int) -> StatusRequest:
    if count or len(frame) != HEADER.size:
        raise MalformedError("a status request with a body", request_id)
    return StatusRequest(request_id)


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


# What can be asked, with the flags it may have. What is not in this table does not exist.
_DECODERS: dict[int, tuple[Callable[[bytes, int, int, int], Request], int]] = {
    Type.HELLO: (_decode_hello, 0),
    Type.OPEN: (_decode_open, 0),
    Type.STAT: (_decode_stat, 0),
    Type.LIST: (_decode_list, 0),
    Type.STATUS: (_decode_status, 0),
    Type.EXPLAIN: (_decode_explain, 0),
    Type.RELOAD: (_decode_reload, MORE_FOLLOWS),
}
_UNKNOWN = (None, 0)
