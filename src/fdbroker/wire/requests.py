"""Requests: the client encodes them, the broker decodes them.

`decode_request` reads what a stranger wrote: exact lengths, a closed table of
types, and paths that are split at NUL, so that a path with a NUL inside can't
be expressed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fdbroker.wire.format import (
    COOKIE,
    HEADER,
    HELLO,
    MAGIC,
    MAX_FRAME,
    MAX_LIST_ENTRIES,
    MAX_PATHS,
    VERSION,
    Type,
)
from fdbroker.wire.messages import (
    Hello,
    ListRequest,
    MalformedError,
    OpenRequest,
    Request,
    StatRequest,
    StatusRequest,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def encode_hello(request_id: int = 0) -> bytes:
    """Return a hello for the one version there is."""
    return HEADER.pack(Type.HELLO, 0, 0, request_id, 0) + HELLO.pack(MAGIC, VERSION, VERSION, 0)


def encode_open(request_id: int, paths: Sequence[bytes]) -> bytes:
    """Return an open request; ValueError: not 1 to 253 paths, a NUL, or too long together."""
    return _encode_paths(Type.OPEN, request_id, paths)


def encode_stat(request_id: int, paths: Sequence[bytes]) -> bytes:
    """Return a stat request; ValueError: not 1 to 253 paths, a NUL, or too long together."""
    return _encode_paths(Type.STAT, request_id, paths)


def encode_list(request_id: int, path: bytes, cookie: int = 0, most: int = 0) -> bytes:
    """Return a request for one page of a directory.

    Raises:
        ValueError: a NUL in the path, a path too long for a frame, or more entries than a page can have.

    """
    if b"\0" in path:
        raise ValueError(f"a path can't have a NUL byte: {path!r}")
    if not 0 <= most <= MAX_LIST_ENTRIES:
        raise ValueError(f"a page has 0 to {MAX_LIST_ENTRIES} entries, not {most}")
    frame = HEADER.pack(Type.LIST, 0, most, request_id, 0) + COOKIE.pack(cookie) + path
    if len(frame) > MAX_FRAME:
        raise ValueError(f"a path of {len(path)} bytes is too long for a frame")
    return frame


def encode_status(request_id: int) -> bytes:
    """Return a status request."""
    return HEADER.pack(Type.STATUS, 0, 0, request_id, 0)


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
    decode = _DECODERS.get(kind)
    if decode is None:
        raise MalformedError(f"unknown request type {kind:#04x}", request_id)
    if flags or generation:
        raise MalformedError("flags or reserved fields are not 0", request_id)
    return decode(frame, count, request_id)


def _encode_paths(kind: Type, request_id: int, paths: Sequence[bytes]) -> bytes:
    if not 1 <= len(paths) <= MAX_PATHS:
        raise ValueError(f"a request has 1 to {MAX_PATHS} paths, not {len(paths)}")
    body = b"\0".join(paths)
    if body.count(b"\0") != len(paths) - 1:
        culprit = next(path for path in paths if b"\0" in path)
        raise ValueError(f"a path can't have a NUL byte: {culprit!r}")
    if HEADER.size + len(body) > MAX_FRAME:
        raise ValueError(
            f"the paths of a request have {len(body)} bytes together, over {MAX_FRAME - HEADER.size}"
        )
    return HEADER.pack(kind, 0, len(paths), request_id, 0) + body


def _decode_hello(frame: bytes, count: int, request_id: int) -> Hello:
    if count or len(frame) != HEADER.size + HELLO.size:
        raise MalformedError("a hello of the wrong length", request_id)
    magic, lowest, highest, features = HELLO.unpack_from(frame, HEADER.size)
    if magic != MAGIC:
        raise MalformedError("a hello without the magic bytes", request_id)
    if lowest > highest:
        raise MalformedError("a hello whose lowest version is above its highest", request_id)
    return Hello(request_id, lowest, highest, features)


def _decode_paths(frame: bytes, count: int, request_id: int) -> list[bytes]:
    if not 1 <= count <= MAX_PATHS:
        raise MalformedError(f"a request has 1 to {MAX_PATHS} paths, not {count}", request_id)
    paths = frame[HEADER.size :].split(b"\0")
    if len(paths) != count:
        raise MalformedError(f"{count} paths announced, {len(paths)} sent", request_id)
    return paths


def _decode_open(frame: bytes, count: int, request_id: int) -> OpenRequest:
    return OpenRequest(request_id, _decode_paths(frame, count, request_id))


def _decode_stat(frame: bytes, count: int, request_id: int) -> StatRequest:
    return StatRequest(request_id, _decode_paths(frame, count, request_id))


def _decode_list(frame: bytes, count: int, request_id: int) -> ListRequest:
    if count > MAX_LIST_ENTRIES:
        raise MalformedError(f"a page has at most {MAX_LIST_ENTRIES} entries, not {count}", request_id)
    if len(frame) < HEADER.size + COOKIE.size:
        raise MalformedError("a list request without its cookie", request_id)
    (cookie,) = COOKIE.unpack_from(frame, HEADER.size)
    path = frame[HEADER.size + COOKIE.size :]
    if b"\0" in path:
        raise MalformedError("a list request with a NUL in its path", request_id)
    return ListRequest(request_id, path, cookie, count)


def _decode_status(frame: bytes, count: int, request_id: int) -> StatusRequest:
    if count or len(frame) != HEADER.size:
        raise MalformedError("a status request with a body", request_id)
    return StatusRequest(request_id)


# What can be asked. What is not in this table does not exist.
_DECODERS: dict[int, Callable[[bytes, int, int], Request]] = {
    Type.HELLO: _decode_hello,
    Type.OPEN: _decode_open,
    Type.STAT: _decode_stat,
    Type.LIST: _decode_list,
    Type.STATUS: _decode_status,
}
