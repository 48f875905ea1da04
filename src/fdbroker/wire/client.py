"""The client's half of the wire format: requests are encoded, replies decoded. The broker does not load it.

The decoder is as strict as the broker's: a client that is handed to a
sandboxed worker must not trust its broker's bytes more than needed.
"""

from __future__ import annotations

from fdbroker.wire.format import (
    ACCEPTED,
    ACTIONS,
    ANY_TIME,
    CLIENT,
    COOKIE,
    ENTRY,
    ENTRY_HAS_STAT,
    ERROR,
    FILE_COMES,
    FOR_CLIENT,
    HEADER,
    HELLO,
    LIMIT,
    LIST_LAST_PAGE,
    MAGIC,
    MAX_COPY,
    MAX_FRAME,
    MAX_GLOB,
    MAX_LIST_ENTRIES,
    MAX_LISTENER_NAME,
    MAX_PATHS,
    MAX_POLICY,
    MAX_WALK_GLOBS,
    MORE_FOLLOWS,
    NO_SIZE_LIMIT,
    PIECE,
    REPLY,
    RESULT,
    ROW,
    STAT,
    STATUS_PARTS,
    VERSION,
    WALK,
    WALK_DESCRIPTORS,
    WALK_END,
    WALK_ENTRY,
    WALK_ENTRY_HAS_DESCRIPTOR,
    WALK_LAST,
    WANTS_COPY,
    WELCOME,
    Incomplete,
    Kind,
    Limit,
    Reason,
    Status,
    Type,
    WalkKind,
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
    WalkFilter,
    Welcome,
)
from fdbroker.wire.records import NamedTuple

TYPE_CHECKING = False  # as typing has it, see records.py
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

# As plain numbers: packing a member of an Enum is slow.
_OPEN, _STAT, _OPEN_REPLY = int(Type.OPEN), int(Type.STAT), Type.OPEN | REPLY
_COPIED = Status.COPIED  # to ask an Enum for its member is slow as well
_new = tuple.__new__  # what a NamedTuple does itself, by a function in Python
_NO_STAT = bytes(STAT.size)
_WALK_RECORD_AT = WALK_ENTRY.size
_WALK_ENTRY_HEAD = WALK_ENTRY.size + STAT.size
_GIVEN = GIVEN.encode()
_NOT_NAMES = frozenset({b"", b".", b".."})
_ALL_INCOMPLETE = sum(Incomplete)
_ALL_KINDS = sum(WalkKind)
_MOST_U16 = (1 << 16) - 1
_MOST_U32 = (1 << 32) - 1
_MOST_U64 = (1 << 64) - 1


class OpenReply(NamedTuple):
    """One result per path; as many descriptors came with it as results are given.

    `copies`: the contents of those that are copied, in order.
    """

    id: int
    generation: int
    results: list[Result]
    copies: tuple[bytes, ...] = ()


class StatReply(NamedTuple):
    """One result per path, with its stat record where it is given."""

    id: int
    generation: int
    results: list[tuple[Result, FileStat | None]]


class ListReply(NamedTuple):
    """One page. `cookie` continues behind it unless `last`."""

    id: int
    generation: int
    result: Result
    entries: list[ListEntry]
    cookie: int
    last: bool


class WalkReply(NamedTuple):
    """A frame of a walk; as many descriptors came with it as entries have one. `end`: it is the last."""

    id: int
    generation: int
    result: Result
    entries: list[WalkEntry]
    end: WalkEnd | None


class ServeReply(NamedTuple):
    """Whether the clients of a listener will be handed over."""

    id: int
    generation: int
    result: Result


class AcceptedReply(NamedTuple):
    """A client of a listener that is served here; its socket came with it. `id`: of the request to serve."""

    id: int
    generation: int
    client: AcceptedClient
    # How many releases may be kept for a moment, to be sent together.
    may_hold_back: int = 0


class StatusReply(NamedTuple):
    """`document` is the JSON text."""

    id: int
    generation: int
    document: bytes


class ExplainReply(NamedTuple):
    """`document` is the JSON text."""

    id: int
    generation: int
    document: bytes


class ReloadReply(NamedTuple):
    """`received` bytes are there. `more`: others are waited for; else `generation` is the new one."""

    id: int
    generation: int
    received: int
    more: bool


class ReopenReply(NamedTuple):
    """`taken`: the audit goes to the file that was sent; else it is waited for."""

    id: int
    generation: int
    taken: bool


Reply = (
    Welcome
    | OpenReply
    | StatReply
    | ListReply
    | StatusReply
    | WalkReply
    | ServeReply
    | AcceptedReply
    | ExplainReply
    | ReloadReply
    | ReopenReply
    | ErrorReply
)


def encode_hello(request_id: int = 0) -> bytes:
    """Return a hello for the one version there is."""
    return HEADER.pack(Type.HELLO, 0, 0, request_id, 0) + HELLO.pack(MAGIC, VERSION, VERSION, 0)


def encode_open(
    request_id: int, paths: Sequence[bytes], client: int | None = None, *, copy: bool = False
) -> bytes:
    """Return an open request; ValueError: not 1 to 253 paths, a NUL, or too long together.

    `client` here and below: the number of the client that is acted for.
    """
    if len(paths) == 1 and client is None:
        # Most requests are one.
        path = paths[0]
        if 0 not in path and len(path) <= MAX_FRAME - HEADER.size:
            return HEADER.pack(_OPEN, WANTS_COPY if copy else 0, 1, request_id, 0) + path
    return _encode_paths(_OPEN, WANTS_COPY if copy else 0, request_id, paths, client)


def encode_stat(request_id: int, paths: Sequence[bytes], client: int | None = None) -> bytes:
    """Return a stat request; ValueError: not 1 to 253 paths, a NUL, or too long together."""
    return _encode_paths(_STAT, 0, request_id, paths, client)


def encode_list(
    request_id: int, path: bytes, cookie: int = 0, most: int = 0, client: int | None = None
) -> bytes:
    """Return a request for one page of a directory.

    Raises:
        ValueError: a NUL in the path, a path too long for a frame, more entries than a page can have, or
            no cookie.

    """
    if 0 in path:
        raise ValueError(f"a path can't have a NUL byte: {path!r}")
    if not 0 <= most <= MAX_LIST_ENTRIES:
        raise ValueError(f"a page has 0 to {MAX_LIST_ENTRIES} entries, not {most}")
    if not 0 <= cookie <= _MOST_U64:
        raise ValueError(f"{cookie} is no cookie")
    flags, number = _for_client(client)
    frame = HEADER.pack(Type.LIST, flags, most, request_id, 0) + number + COOKIE.pack(cookie) + path
    if len(frame) > MAX_FRAME:
        raise ValueError(f"a path of {len(path)} bytes is too long for a frame")
    return frame


def _for_client(client: int | None) -> tuple[int, bytes]:
    """Return the flag and the bytes that say whom a request is for."""
    return (0, b"") if client is None else (FOR_CLIENT, _number_of(client))


def _number_of(client: int) -> bytes:
    if not 0 <= client <= _MOST_U32:
        raise ValueError(f"{client} is no number of a client")
    return CLIENT.pack(client)


def encode_walk(  # noqa: PLR0913 - as many as the message has
    request_id: int,
    path: bytes,
    asked: WalkFilter,
    *,
    credit: int,
    behind: bytes = b"",
    descriptors: bool = True,
    most: int = 0,
    client: int | None = None,
) -> bytes:
    """Return a request to walk.

    Raises:
        ValueError: a NUL in a path or glob, too many globs or entries, no kind that there is, a number that
            is out of range, or too long together.

    """
    texts = (path, behind, *asked.globs)
    for text in texts:
        if 0 in text:
            raise ValueError(f"a path can't have a NUL byte: {text!r}")
    if not 0 <= most <= MAX_PATHS:
        raise ValueError(f"a frame of a walk has 0 to {MAX_PATHS} entries, not {most}")
    if len(asked.globs) > MAX_WALK_GLOBS:
        raise ValueError(f"a walk has at most {MAX_WALK_GLOBS} globs, not {len(asked.globs)}")
    for glob in asked.globs:
        if not 0 < len(glob) <= MAX_GLOB:
            raise ValueError(f"a glob has 1 to {MAX_GLOB} bytes, not {len(glob)}")
    if not 0 < asked.kinds <= _ALL_KINDS:
        raise ValueError(f"a walk of no kind of file that there is: {int(asked.kinds)}")
    if not (0 <= asked.least_size <= NO_SIZE_LIMIT and 0 <= asked.most_size <= NO_SIZE_LIMIT):
        raise ValueError(f"no sizes of files: {asked.least_size} to {asked.most_size} bytes")
    if not ANY_TIME <= asked.newer_than < -ANY_TIME:
        raise ValueError(f"{asked.newer_than} ns is no time of a file")
    if not 0 <= credit <= _MOST_U32:
        raise ValueError(f"a credit of {credit} frames: it is 0 to {_MOST_U32}")
    flags, number = _for_client(client)
    options = WALK_DESCRIPTORS if descriptors else 0
    body = WALK.pack(credit, asked.kinds, options, asked.least_size, asked.most_size, asked.newer_than)
    frame = HEADER.pack(Type.WALK, flags, most, request_id, 0) + number + body + b"\0".join(texts)
    if len(frame) > MAX_FRAME:
        raise ValueError(f"a walk of {len(frame)} bytes is too long for a frame")
    return frame


def encode_more(request_id: int, credit: int) -> bytes:
    """Return what lets the broker send more frames of walk `request_id`; ValueError: not 1 to 65,535."""
    if not 1 <= credit <= _MOST_U16:
        raise ValueError(f"more of a walk is 1 to {_MOST_U16} frames, not {credit}")
    return HEADER.pack(Type.MORE, 0, credit, request_id, 0)


def encode_cancel(request_id: int) -> bytes:
    """Return what ends walk `request_id`."""
    return HEADER.pack(Type.CANCEL, 0, 0, request_id, 0)


def encode_serve(request_id: int, listener: bytes) -> bytes:
    """Return a request for the clients of a listener; ValueError: its name is empty or too long."""
    if not 1 <= len(listener) <= MAX_LISTENER_NAME:
        raise ValueError(f"the name of a listener has 1 to {MAX_LISTENER_NAME} bytes, not {len(listener)}")
    return HEADER.pack(Type.SERVE, 0, 0, request_id, 0) + listener


def encode_release(request_id: int, clients: Sequence[int]) -> bytes:
    """Return what says that clients are not acted for any more; ValueError: no such numbers, or too many."""
    if not 1 <= len(clients) <= MAX_PATHS:
        raise ValueError(f"a release is of 1 to {MAX_PATHS} clients, not {len(clients)}")
    head = HEADER.pack(Type.RELEASE, 0, len(clients), request_id, 0)
    return head + b"".join(map(_number_of, clients))


def encode_status(request_id: int, part: str | None = None, row: int = 0) -> bytes:
    """Return a request for the status, or for a part of it from a row on; ValueError: no such part."""
    if part is None:
        return HEADER.pack(Type.STATUS, 0, 0, request_id, 0)
    return HEADER.pack(Type.STATUS, 0, _number_named(STATUS_PARTS, part), request_id, 0) + ROW.pack(row)


def encode_explain(request_id: int, action: str, path: bytes) -> bytes:
    """Return a request to explain; ValueError: no such action, a NUL, or too long."""
    number = _number_named(ACTIONS, action)
    if 0 in path:
        raise ValueError(f"a path can't have a NUL byte: {path!r}")
    frame = HEADER.pack(Type.EXPLAIN, 0, number, request_id, 0) + path
    if len(frame) > MAX_FRAME:
        raise ValueError(f"a path of {len(path)} bytes is too long for a frame")
    return frame


def _number_named(names: Mapping[int, str], name: str) -> int:
    number = next((number for number, known in names.items() if known == name), None)
    if number is None:
        raise ValueError(f"{name!r} is none of {', '.join(names.values())}")
    return number


def for_broker(policy: Mapping[str, object]) -> dict[str, object]:
    """Return what the broker takes of a compiled policy: all but `daemon`, which is the launcher's."""
    return {key: value for key, value in policy.items() if key != "daemon"}


def encode_reload(request_id: int, offset: int, piece: bytes, *, more: bool) -> bytes:
    """Return a request with one piece of a policy; ValueError: an empty one, or too long."""
    if not piece or offset + len(piece) > MAX_POLICY:
        raise ValueError(f"{len(piece)} bytes at {offset} are no piece of a policy of at most {MAX_POLICY}")
    flags = MORE_FOLLOWS if more else 0
    frame = HEADER.pack(Type.RELOAD, flags, 0, request_id, 0) + PIECE.pack(offset) + piece
    if len(frame) > MAX_FRAME:
        raise ValueError(f"a piece of {len(piece)} bytes is too long for a frame")
    return frame


def encode_reopen(request_id: int, *, comes: bool) -> bytes:
    """Return a request that announces a file for the audit, or, `comes`, has it beside it."""
    return HEADER.pack(Type.REOPEN, FILE_COMES if comes else 0, 0, request_id, 0)


def _encode_paths(
    kind: int, flags: int, request_id: int, paths: Sequence[bytes], client: int | None
) -> bytes:
    if not 1 <= len(paths) <= MAX_PATHS:
        raise ValueError(f"a request has 1 to {MAX_PATHS} paths, not {len(paths)}")
    body = b"\0".join(paths)
    if body.count(b"\0") != len(paths) - 1:
        culprit = next(path for path in paths if 0 in path)
        raise ValueError(f"a path can't have a NUL byte: {culprit!r}")
    if client is not None:
        flags, body = flags | FOR_CLIENT, _number_of(client) + body
    if HEADER.size + len(body) > MAX_FRAME:
        raise ValueError(
            f"the paths of a request have {len(body)} bytes together, over {MAX_FRAME - HEADER.size}"
        )
    return HEADER.pack(kind, flags, len(paths), request_id, 0) + body


def decode_reply(frame: bytes) -> Reply:
    """Decode one frame of a broker.

    Raises:
        MalformedError: it breaks the protocol; the text says how.

    """
    if len(frame) < HEADER.size:
        raise MalformedError(f"a frame of {len(frame)} bytes is shorter than its header ({HEADER.size})")
    kind, flags, count, request_id, generation = HEADER.unpack_from(frame)
    if (
        kind == _OPEN_REPLY
        and not flags
        and len(frame) == HEADER.size + RESULT.size * count
        and frame.endswith(_GIVEN * count)
    ):
        # Most replies are one by which everything is given.
        return _new(OpenReply, (request_id, generation, [GIVEN] * count, ()))
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
    if status == _COPIED and not reason and not number and length <= MAX_COPY:
        return _new(Result, (_COPIED, Reason.NONE, 0, length, None))
    if status == Status.REFUSED and reason == Reason.LIMIT and length == LIMIT.size:
        return Result(Status.REFUSED, Reason.LIMIT, number, length)  # what it says follows
    if status in {Status.GIVEN, Status.COPIED} or length:
        raise ValueError("a result that is given and has a reason, or one with an impossible length")
    return Result(Status(status), Reason(reason), number)


def _decode_uncopied_result(frame: bytes, at: int) -> Result:
    """Decode a result of something that can't be copied."""
    result = _decode_result(frame, at)
    if result.status is Status.COPIED:
        raise ValueError("a copy where none can be")
    return result


def _decode_own_result(frame: bytes, at: int) -> Result:
    """Decode a result of something that can't be copied, and has nothing behind it."""
    result = _decode_uncopied_result(frame, at)
    if result.length:
        raise ValueError("a limit where none can be")
    return result


def _decode_limit(frame: bytes, at: int) -> LimitReached:
    limit, reserved, more_reserved, value, retry_after = LIMIT.unpack_from(frame, at)
    if reserved or more_reserved:
        raise ValueError("a limit whose reserved fields are not 0")
    return LimitReached(Limit(limit), value, retry_after)


def _decode_stat_record(frame: bytes, at: int, *, filled: bool) -> FileStat | None:
    if filled:
        facts = FileStat.decode(frame, at)
        if not frame.startswith(facts.encode(), at):
            raise ValueError("a stat record with reserved bytes that are not 0, or more than a second")
        return facts
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
    at = HEADER.size + count * RESULT.size
    if len(frame) < at:
        raise MalformedError("an open reply that ends within its results", request_id)
    results = [_decode_result(frame, place) for place in range(HEADER.size, at, RESULT.size)]
    copies = []
    for result in results:
        if result.status is _COPIED:
            copies.append(frame[at : at + result.length])
            at += result.length
    results = _decode_limits(frame, at, results, "an open reply", request_id)
    return OpenReply(request_id, generation, results, tuple(copies))


def _decode_limits(
    frame: bytes, at: int, results: Sequence[Result], what: str, request_id: int
) -> list[Result]:
    """Return results with the limits that they say follow; these end `frame`, which is `what`."""
    read = []
    for result in results:
        if not result.length or result.status is _COPIED:
            read.append(result)
            continue
        if len(frame) < at + LIMIT.size:
            raise MalformedError(f"{what} ends within its limits", request_id)
        read.append(result._replace(limit=_decode_limit(frame, at)))
        at += LIMIT.size
    _expect(frame, at, what, request_id)
    return read


def _decode_stat(frame: bytes, _flags: int, count: int, request_id: int, generation: int) -> StatReply:
    size = RESULT.size + STAT.size
    limits_at = HEADER.size + count * size
    if len(frame) < limits_at:
        raise MalformedError("a stat reply that ends within its results", request_id)
    results: list[Result] = []
    records: list[FileStat | None] = []
    for at in range(HEADER.size, limits_at, size):
        result = _decode_uncopied_result(frame, at)
        results.append(result)
        records.append(_decode_stat_record(frame, at + RESULT.size, filled=result is GIVEN))
    results = _decode_limits(frame, limits_at, results, "a stat reply", request_id)
    return StatReply(request_id, generation, list(zip(results, records, strict=True)))


def _decode_list(frame: bytes, flags: int, count: int, request_id: int, generation: int) -> ListReply:
    at = HEADER.size + RESULT.size + COOKIE.size
    if len(frame) < at:
        raise MalformedError("a list reply without its result and cookie", request_id)
    result = _decode_uncopied_result(frame, HEADER.size)
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
        if len(name) != length or b"/" in name or b"\0" in name or name in _NOT_NAMES:
            raise MalformedError("a list reply with an impossible name", request_id)
        entries.append(ListEntry(name, kind, facts))
    [result] = _decode_limits(frame, at, [result], "a list reply", request_id)
    return ListReply(request_id, generation, result, entries, cookie, bool(flags & LIST_LAST_PAGE))


def _decode_walk(frame: bytes, flags: int, count: int, request_id: int, generation: int) -> WalkReply:
    at = HEADER.size + RESULT.size
    end_at = len(frame) - WALK_END.size if flags & WALK_LAST else len(frame)
    if end_at < at:
        raise MalformedError("a frame of a walk that ends too early", request_id)
    result = _decode_own_result(frame, HEADER.size)
    entries: list[WalkEntry] = []
    paths: list[bytes] = []
    unpack, add, add_path = WALK_ENTRY.unpack_from, entries.append, paths.append
    for _ in range(count):
        path_at = at + _WALK_ENTRY_HEAD
        if path_at > end_at:
            raise MalformedError("a frame of a walk that ends within an entry", request_id)
        length, kind, entry_flags = unpack(frame, at)
        if entry_flags > WALK_ENTRY_HAS_DESCRIPTOR:
            raise MalformedError("an entry with unknown flags", request_id)
        record = frame[at + _WALK_RECORD_AT : path_at]
        at = path_at + length
        path = frame[path_at:at]
        add_path(path)
        add(_new(WalkEntry, (path, kind, record, entry_flags == WALK_ENTRY_HAS_DESCRIPTOR)))
    # Where each entry ends is where the next one begins, so one look sees all that are cut off. A caller will
    # join a path to another one: it must not lead anywhere else.
    names = b"/".join(paths)
    if at > end_at or 0 in names or (paths and not _NOT_NAMES.isdisjoint(names.split(b"/"))):
        raise MalformedError("a frame of a walk with an impossible path", request_id)
    if at != end_at:
        raise MalformedError("a frame of a walk with bytes behind its entries", request_id)
    end = None
    if flags & WALK_LAST:
        sent, descriptors, directories, incomplete = WALK_END.unpack_from(frame, end_at)
        if incomplete & ~_ALL_INCOMPLETE:
            raise MalformedError("a walk that is incomplete in an unknown way", request_id)
        end = WalkEnd(sent, descriptors, directories, Incomplete(incomplete))
    if result is not GIVEN and (end is None or entries):
        raise MalformedError("a walk that is refused and goes on", request_id)
    return WalkReply(request_id, generation, result, entries, end)


def _decode_serve(frame: bytes, _flags: int, count: int, request_id: int, generation: int) -> ServeReply:
    _expect(frame, HEADER.size + RESULT.size, "a reply to serve", request_id)
    if count:
        raise MalformedError("a reply to serve whose count is not 0", request_id)
    return ServeReply(request_id, generation, _decode_own_result(frame, HEADER.size))


def _decode_accepted(
    frame: bytes, _flags: int, count: int, request_id: int, generation: int
) -> AcceptedReply:
    _expect(frame, HEADER.size + ACCEPTED.size, "an accepted client", request_id)
    number, pid, uid, gid, level, may_hold_back = ACCEPTED.unpack_from(frame, HEADER.size)
    if count:
        raise MalformedError("an accepted client whose count is not 0", request_id)
    client = _new(AcceptedClient, (number, pid, uid, gid, level))
    return _new(AcceptedReply, (request_id, generation, client, may_hold_back))


def _decode_status(frame: bytes, _flags: int, count: int, request_id: int, generation: int) -> StatusReply:
    if count:
        raise MalformedError("a status reply whose count is not 0", request_id)
    return StatusReply(request_id, generation, frame[HEADER.size :])


def _decode_explain(frame: bytes, _flags: int, count: int, request_id: int, generation: int) -> ExplainReply:
    if count:
        raise MalformedError("an explanation whose count is not 0", request_id)
    return ExplainReply(request_id, generation, frame[HEADER.size :])


def _decode_reload(frame: bytes, flags: int, count: int, request_id: int, generation: int) -> ReloadReply:
    _expect(frame, HEADER.size + PIECE.size, "a reload reply", request_id)
    if count:
        raise MalformedError("a reload reply whose count is not 0", request_id)
    (received,) = PIECE.unpack_from(frame, HEADER.size)
    return ReloadReply(request_id, generation, received, more=bool(flags & MORE_FOLLOWS))


def _decode_reopen(frame: bytes, flags: int, count: int, request_id: int, generation: int) -> ReopenReply:
    _expect(frame, HEADER.size, "a reply about the audit's file", request_id)
    if count:
        raise MalformedError("a reply about the audit's file whose count is not 0", request_id)
    return ReopenReply(request_id, generation, taken=bool(flags & FILE_COMES))


def _decode_error(frame: bytes, flags: int, count: int, request_id: int, generation: int) -> ErrorReply:
    if len(frame) < HEADER.size + ERROR.size:
        raise MalformedError("an error frame without its reason", request_id)
    reason, reserved, number = ERROR.unpack_from(frame, HEADER.size)
    if reserved or count > 1:
        raise MalformedError(
            "an error frame with an impossible count, or a reserved field that is not 0", request_id
        )
    at = HEADER.size + ERROR.size
    limit = None
    if count:
        if reason != Reason.LIMIT or len(frame) < at + LIMIT.size:
            raise MalformedError(
                "an error frame that ends within its limit, or has one and another reason", request_id
            )
        limit = _decode_limit(frame, at)
        at += LIMIT.size
    return ErrorReply(request_id, generation, Kind(flags), Reason(reason), number, frame[at:].decode(), limit)


_FLAGS = {
    Type.LIST | REPLY: LIST_LAST_PAGE,
    Type.WALK | REPLY: WALK_LAST,
    Type.RELOAD | REPLY: MORE_FOLLOWS,
    Type.REOPEN | REPLY: FILE_COMES,
    Type.ERROR: Kind.REFUSED | Kind.MALFORMED | Kind.BROKEN,
}
_DECODERS: dict[int, Callable[[bytes, int, int, int, int], Reply]] = {
    Type.HELLO | REPLY: _decode_welcome,
    Type.OPEN | REPLY: _decode_open,
    Type.STAT | REPLY: _decode_stat,
    Type.LIST | REPLY: _decode_list,
    Type.STATUS | REPLY: _decode_status,
    Type.WALK | REPLY: _decode_walk,
    Type.SERVE | REPLY: _decode_serve,
    Type.ACCEPTED | REPLY: _decode_accepted,
    Type.EXPLAIN | REPLY: _decode_explain,
    Type.RELOAD | REPLY: _decode_reload,
    Type.REOPEN | REPLY: _decode_reopen,
    Type.ERROR: _decode_error,
}
