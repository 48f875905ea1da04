"""The messages that the broker has as values, each with the layout that docs/protocol.md gives it."""

from __future__ import annotations

from typing import NamedTuple

from fdbroker.wire.format import ERRNO_OF, RESULT, Kind, Reason, Status


class MalformedError(ValueError):
    """The other side broke the protocol; the text says how. `request_id` is 0 if unread."""

    def __init__(self, text: str, request_id: int = 0) -> None:
        super().__init__(text)
        self.request_id = request_id


class Hello(NamedTuple):
    """A client's first frame."""

    id: int
    lowest: int
    highest: int
    features: int


class OpenRequest(NamedTuple):
    """1 to 253 paths to open."""

    id: int
    paths: list[bytes]


class StatRequest(NamedTuple):
    """1 to 253 paths to describe."""

    id: int
    paths: list[bytes]


class ListRequest(NamedTuple):
    """One page of a directory. `most` 0: the broker chooses."""

    id: int
    path: bytes
    cookie: int
    most: int


class StatusRequest(NamedTuple):
    """How does the broker see this connection?"""

    id: int


class ExplainRequest(NamedTuple):
    """What does the name of a path decide for this client? `action` is one of format.ACTIONS."""

    id: int
    action: str
    path: bytes


class ReloadRequest(NamedTuple):
    """A piece of a compiled policy, from byte `offset` on. `more`: it is not the last."""

    id: int
    offset: int
    piece: bytes
    more: bool


Request = Hello | OpenRequest | StatRequest | ListRequest | StatusRequest | ExplainRequest | ReloadRequest


class Result(NamedTuple):
    """What became of one path."""

    status: Status
    reason: Reason
    errno: int

    def encode(self) -> bytes:
        """Return the 8 bytes."""
        return RESULT.pack(self.status, self.reason, self.errno, 0)


GIVEN = Result(Status.GIVEN, Reason.NONE, 0)


def refused(reason: Reason, number: int | None = None) -> Result:
    """Return the refusal for `reason`, with its usual errno or another."""
    return Result(Status.REFUSED, reason, ERRNO_OF[reason] if number is None else number)


def broken(number: int) -> Result:
    """Return the result for a failure on the broker's side."""
    return Result(Status.BROKEN, Reason.BROKEN, number)


class FileStat(NamedTuple):
    """The stat record: `mode` as st_mode, sizes in bytes, times in nanoseconds since 1970."""

    device: int
    inode: int
    mode: int
    links: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    ctime_ns: int


class ListEntry(NamedTuple):
    """A name in a directory. `kind` is readdir's d_type; `stat` None where it is not allowed."""

    name: bytes
    kind: int
    stat: FileStat | None


class Welcome(NamedTuple):
    """The broker's answer to hello. Limits are per request (paths, bytes) or connection."""

    id: int
    generation: int
    version: int
    identity_level: int
    features: int
    max_paths: int
    max_frame: int
    in_flight: int
    copy_max: int


class ErrorReply(NamedTuple):
    """An answer to a frame that gets none of its own kind."""

    id: int
    generation: int
    kind: Kind
    reason: Reason
    errno: int
    text: str
