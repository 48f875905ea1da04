"""The messages that the broker has as values, each with the layout that docs/protocol.md gives it."""

from __future__ import annotations

from fdbroker.wire.format import (
    ANY_TIME,
    ERRNO_OF,
    LIMIT,
    NO_SIZE_LIMIT,
    RESULT,
    STAT,
    Incomplete,
    Kind,
    Limit,
    Reason,
    Status,
    WalkKind,
)
from fdbroker.wire.records import NamedTuple

_SECOND = 1_000_000_000  # nanoseconds


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
    """1 to 253 paths to open. `copy`: the contents will do as well as a descriptor.

    `client` here and below: the number of the client that a service acts for; None: for itself.
    """

    id: int
    paths: list[bytes]
    client: int | None = None
    copy: bool = False


class StatRequest(NamedTuple):
    """1 to 253 paths to describe."""

    id: int
    paths: list[bytes]
    client: int | None = None


class ListRequest(NamedTuple):
    """One page of a directory. `most` 0: the broker chooses."""

    id: int
    path: bytes
    cookie: int
    most: int
    client: int | None = None


class WalkFilter(NamedTuple):
    """What a walk names: all must hold.

    Sizes in bytes, for regular files alone; the mtime in nanoseconds since 1970.
    `globs`: of the path relative to the walk's start; none: every path. `newer_than`: exclusive.
    """

    kinds: WalkKind = WalkKind.REGULAR
    least_size: int = 0
    most_size: int = NO_SIZE_LIMIT
    newer_than: int = ANY_TIME
    globs: tuple[bytes, ...] = ()


class WalkRequest(NamedTuple):
    """Everything below a directory.

    `most` entries per frame (0: the broker chooses), `credit` frames at first.
    `behind`: the path, relative to the start, to go on behind; empty: from the beginning.
    """

    id: int
    path: bytes
    behind: bytes
    filter: WalkFilter
    descriptors: bool
    credit: int
    most: int
    client: int | None = None


class MoreRequest(NamedTuple):
    """So many frames more of walk `id`. Has no answer of its own."""

    id: int
    credit: int


class CancelRequest(NamedTuple):
    """End walk `id`; its last frame is the answer."""

    id: int


class ServeRequest(NamedTuple):
    """Give me the clients of a listener."""

    id: int
    listener: bytes


class ReleaseRequest(NamedTuple):
    """I act for these clients no more: 1 to MAX_PATHS of them."""

    id: int
    clients: tuple[int, ...]


class StatusRequest(NamedTuple):
    """How does the broker see this connection? Or: the rows of `part` from number `row` on."""

    id: int
    part: str | None = None
    row: int = 0


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


class ReopenRequest(NamedTuple):
    """Another file for the audit: announced, or, `comes`, beside this frame."""

    id: int
    comes: bool


Request = (
    Hello
    | OpenRequest
    | StatRequest
    | ListRequest
    | StatusRequest
    | WalkRequest
    | MoreRequest
    | CancelRequest
    | ServeRequest
    | ReleaseRequest
    | ExplainRequest
    | ReloadRequest
    | ReopenRequest
)


class LimitReached(NamedTuple):
    """Which limit was reached, what it is, and when it is worth trying again.

    `retry_after`: milliseconds; 0: it is not time that helps, but to receive or to close something.
    """

    limit: Limit
    value: int
    retry_after: int

    def encode(self) -> bytes:
        """Return the 12 bytes."""
        return LIMIT.pack(self.limit, 0, 0, self.value, self.retry_after)


class Result(NamedTuple):
    """What became of one path. `length`: bytes of its own behind all results.

    Those are its copy, where the status is COPIED, or `limit`.
    """

    status: Status
    reason: Reason
    errno: int
    length: int = 0
    limit: LimitReached | None = None

    def encode(self) -> bytes:
        """Return the 8 bytes."""
        return RESULT.pack(self.status, self.reason, self.errno, self.length)


GIVEN = Result(Status.GIVEN, Reason.NONE, 0)


def refused(reason: Reason, number: int | None = None) -> Result:
    """Return the refusal for `reason`, with its usual errno or another."""
    return Result(Status.REFUSED, reason, ERRNO_OF[reason] if number is None else number)


def limited(reached: LimitReached) -> Result:
    """Return the refusal for a limit, with which one it is."""
    return Result(Status.REFUSED, Reason.LIMIT, ERRNO_OF[Reason.LIMIT], LIMIT.size, reached)


def copied(length: int) -> Result:
    """Return the result for a file of `length` bytes whose contents come in the reply."""
    return Result(Status.COPIED, Reason.NONE, 0, length)


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

    def encode(self) -> bytes:
        """Return it as it is sent."""
        device, inode, mode, links, uid, gid, size, modified, changed = self
        return STAT.pack(
            *(links, uid, gid, mode, inode, size),
            *(*divmod(changed, _SECOND), *divmod(modified, _SECOND)),
            # As makedev(3) puts them together.
            *(device >> 32 & 0xFFFFF000 | device >> 8 & 0xFFF, device >> 12 & 0xFFFFFF00 | device & 0xFF),
        )

    @classmethod
    def decode(cls, frame: bytes, at: int = 0) -> FileStat:
        """Return the record that begins there; struct.error: it is cut off."""
        record = STAT.unpack_from(frame, at)
        links, uid, gid, mode, inode, size, c_seconds, c_rest, m_seconds, m_rest, major, minor = record
        changed, modified = c_seconds * _SECOND + c_rest, m_seconds * _SECOND + m_rest
        device = (major & 0xFFFFF000) << 32 | (major & 0xFFF) << 8 | (minor & 0xFFFFFF00) << 12 | minor & 0xFF
        return cls(device, inode, mode, links, uid, gid, size, modified, changed)


class ListEntry(NamedTuple):
    """A name in a directory. `kind` is readdir's d_type; `stat` None where it is not allowed."""

    name: bytes
    kind: int
    stat: FileStat | None


class WalkEntry(NamedTuple):
    """A name that a walk met. `path` is relative to its start, `kind` readdir's d_type.

    `record` is its stat record as it is sent, of which most who walk want little.
    """

    path: bytes
    kind: int
    record: bytes
    descriptor: bool

    @property
    def stat(self) -> FileStat:
        """What the record says."""
        return FileStat.decode(self.record)


class WalkEnd(NamedTuple):
    """What a walk sent in all, and which kinds of things it left out."""

    entries: int
    descriptors: int
    directories: int
    incomplete: Incomplete


class AcceptedClient(NamedTuple):
    """A client of a service, as the kernel named it when it connected."""

    number: int
    pid: int
    uid: int
    gid: int
    identity_level: int


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
    """An answer to a frame that gets none of its own kind. `limit`: which one was reached, if it says so."""

    id: int
    generation: int
    kind: Kind
    reason: Reason
    errno: int
    text: str
    limit: LimitReached | None = None
