"""Messages of every kind: encoded by one function, made at random, read from docs/protocol.md."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import strategies as st

from fdbroker.wire import client, messages, replies
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
)
from fdbroker.wire.format import (
    ACTIONS,
    MAX_COPY,
    MAX_LIST_ENTRIES,
    MAX_LISTENER_NAME,
    MAX_PATHS,
    MAX_POLICY,
    MAX_WALK_GLOBS,
    REPLY,
    STATUS_PARTS,
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
    CancelRequest,
    ErrorReply,
    ExplainRequest,
    FileStat,
    Hello,
    LimitReached,
    ListEntry,
    ListRequest,
    MoreRequest,
    OpenRequest,
    ReleaseRequest,
    ReloadRequest,
    ReopenRequest,
    Request,
    Result,
    ServeRequest,
    StatRequest,
    StatusRequest,
    WalkEnd,
    WalkEntry,
    WalkFilter,
    WalkRequest,
    Welcome,
    copied,
    limited,
)

# A walk's `more` and `cancel` have no reply of their own, and accepted clients come without being asked for.
REQUEST_TYPES = {int(kind) for kind in Type} - {Type.ACCEPTED, Type.ERROR}
WITHOUT_REPLY = (Type.MORE, Type.CANCEL, Type.RELEASE)
REPLY_TYPES = {kind | REPLY for kind in Type if kind not in WITHOUT_REPLY}
PROTOCOL = Path(__file__).resolve().parents[2] / "docs" / "protocol.md"


def encode_request(message: Request) -> bytes:
    match message:
        case Hello():
            assert (message.lowest, message.highest, message.features) == (1, 1, 0)
            return client.encode_hello(message.id)
        case OpenRequest():
            return client.encode_open(message.id, message.paths, message.client, copy=message.copy)
        case StatRequest():
            return client.encode_stat(message.id, message.paths, message.client)
        case ListRequest():
            return client.encode_list(message.id, message.path, message.cookie, message.most, message.client)
        case WalkRequest():
            return client.encode_walk(
                message.id,
                message.path,
                message.filter,
                credit=message.credit,
                behind=message.behind,
                descriptors=message.descriptors,
                most=message.most,
                client=message.client,
            )
        case MoreRequest():
            return client.encode_more(message.id, message.credit)
        case CancelRequest():
            return client.encode_cancel(message.id)
        case ServeRequest():
            return client.encode_serve(message.id, message.listener)
        case ReleaseRequest():
            return client.encode_release(message.id, message.clients)
        case StatusRequest():
            return client.encode_status(message.id, message.part, message.row)
        case ExplainRequest():
            return client.encode_explain(message.id, message.action, message.path)
        case ReloadRequest():
            return client.encode_reload(message.id, message.offset, message.piece, more=message.more)
        case ReopenRequest():
            return client.encode_reopen(message.id, comes=message.comes)


def encode_reply(message: Reply) -> bytes:
    match message:
        case Welcome():
            return replies.encode_welcome(message)
        case OpenReply():
            return replies.encode_open_reply(message.id, message.generation, message.results, message.copies)
        case StatReply():
            return replies.encode_stat_reply(message.id, message.generation, message.results)
        case ListReply():
            entries = [replies.encode_list_entry(entry) for entry in message.entries]
            return replies.encode_list_reply(
                message.id, message.generation, message.result, entries, message.cookie, last=message.last
            )
        case WalkReply():
            met = [replies.encode_walk_entry(entry) for entry in message.entries]
            return replies.encode_walk_reply(message.id, message.generation, message.result, met, message.end)
        case ServeReply():
            return replies.encode_serve_reply(message.id, message.generation, message.result)
        case AcceptedReply():
            return replies.encode_accepted(
                message.id, message.generation, message.client, message.may_hold_back
            )
        case StatusReply():
            return replies.encode_status_reply(message.id, message.generation, message.document)
        case ExplainReply():
            return replies.encode_explain_reply(message.id, message.generation, message.document)
        case ReloadReply():
            return replies.encode_reload_reply(
                message.id, message.generation, message.received, more=message.more
            )
        case ReopenReply():
            return replies.encode_reopen_reply(message.id, message.generation, taken=message.taken)
        case ErrorReply():
            return replies.encode_error(message)


u16 = st.integers(0, 2**16 - 1)
u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
i64 = st.integers(-(2**63), 2**63 - 1)
# What the wire can carry, also what no broker would open.
paths = st.binary(max_size=60).map(lambda path: path.replace(b"\0", b"0"))
path_lists = st.lists(paths, min_size=1, max_size=MAX_PATHS)
names = st.binary(min_size=1, max_size=255).map(
    lambda name: b"..." if name in {b".", b".."} else name.replace(b"/", b"0").replace(b"\0", b"1")
)

numbers = st.none() | u32  # of the client that a service acts for
kinds = st.integers(1, sum(WalkKind)).map(WalkKind)
globs = st.lists(
    st.binary(min_size=1, max_size=60).map(lambda glob: glob.replace(b"\0", b"*")), max_size=MAX_WALK_GLOBS
)
filters = st.builds(WalkFilter, kinds, u64, u64, i64, globs.map(tuple))

requests_of_all_kinds: st.SearchStrategy[Request] = st.one_of(
    st.builds(Hello, u32, st.just(1), st.just(1), st.just(0)),
    st.builds(OpenRequest, u32, path_lists, numbers, st.booleans()),
    st.builds(StatRequest, u32, path_lists, numbers),
    st.builds(ListRequest, u32, paths, u64, st.integers(0, MAX_LIST_ENTRIES), numbers),
    st.builds(
        WalkRequest,
        u32,
        paths,
        paths,
        filters,
        st.booleans(),
        u32,
        st.integers(0, MAX_PATHS),
        numbers,
    ),
    st.builds(MoreRequest, u32, st.integers(1, 2**16 - 1)),
    st.builds(CancelRequest, u32),
    st.builds(ServeRequest, u32, st.binary(min_size=1, max_size=MAX_LISTENER_NAME)),
    st.builds(ReleaseRequest, u32, st.lists(u32, min_size=1, max_size=MAX_PATHS).map(tuple)),
    u32.map(StatusRequest),
    st.builds(StatusRequest, u32, st.sampled_from(list(STATUS_PARTS.values())), u32),
    st.builds(ExplainRequest, u32, st.sampled_from(list(ACTIONS.values())), paths),
    st.builds(
        ReloadRequest,
        u32,
        st.integers(0, MAX_POLICY - 200),
        st.binary(min_size=1, max_size=200),
        st.booleans(),
    ),
    st.builds(ReopenRequest, u32, st.booleans()),
)

not_given = st.builds(
    Result,
    st.sampled_from([Status.REFUSED, Status.BROKEN]),
    st.sampled_from(list(Reason)),
    u16,
    st.just(0),
    st.none(),
)
results = st.just(GIVEN) | not_given
limits = st.builds(LimitReached, st.sampled_from(list(Limit)), u32, u32)
copies = st.binary(max_size=40) | st.integers(0, MAX_COPY).map(bytes)
times = st.builds(lambda seconds, rest: seconds * 10**9 + rest, i64, st.integers(0, 10**9 - 1))
stats = st.builds(FileStat, u64, u64, u16, u32, u32, u32, u64, times, times)
described = st.tuples(st.just(GIVEN), stats) | st.tuples(not_given | limits.map(limited), st.none())
entries = st.builds(ListEntry, names, st.integers(0, 255), st.none() | stats)
walked = st.builds(
    WalkEntry,
    st.lists(names, min_size=1, max_size=4).map(b"/".join),
    st.integers(0, 255),
    stats.map(FileStat.encode),
    st.booleans(),
)
ends = st.builds(WalkEnd, u64, u64, u64, st.integers(0, sum(Incomplete)).map(Incomplete))
accepted = st.builds(AcceptedClient, u32, u32, u32, u32, u16)
texts = st.text(max_size=80)


@st.composite
def open_replies(draw: st.DrawFn) -> OpenReply:
    """Return replies with any mixture of descriptors, copies and refusals."""
    given: list[Result] = []
    contents: list[bytes] = []
    for one in draw(st.lists(results | copies | limits.map(limited), max_size=MAX_PATHS)):
        if isinstance(one, bytes):
            contents.append(one)
        given.append(copied(len(one)) if isinstance(one, bytes) else one)
    return OpenReply(draw(u32), draw(u32), given, tuple(contents))


replies_of_all_kinds: st.SearchStrategy[Reply] = st.one_of(
    st.builds(Welcome, u32, u32, u16, u16, u32, u16, u32, u32, u32),
    open_replies(),
    st.builds(StatReply, u32, u32, st.lists(described, max_size=40)),
    st.builds(ListReply, u32, u32, results, st.lists(entries, max_size=20), u64, st.booleans()),
    st.builds(ListReply, u32, u32, limits.map(limited), st.just([]), u64, st.booleans()),
    st.builds(WalkReply, u32, u32, st.just(GIVEN), st.lists(walked, max_size=20), st.none() | ends),
    st.builds(WalkReply, u32, u32, not_given, st.just([]), ends),
    st.builds(ServeReply, u32, u32, results),
    st.builds(AcceptedReply, u32, u32, accepted, u16),
    st.builds(StatusReply, u32, u32, st.binary(max_size=200)),
    st.builds(ExplainReply, u32, u32, st.binary(max_size=200)),
    st.builds(ReloadReply, u32, u32, u32, st.booleans()),
    st.builds(ReopenReply, u32, u32, st.booleans()),
    st.builds(
        ErrorReply,
        u32,
        u32,
        st.sampled_from(list(Kind)),
        st.sampled_from(list(Reason)),
        u16,
        texts,
        st.none(),
    ),
    st.builds(ErrorReply, u32, u32, st.just(Kind.REFUSED), st.just(Reason.LIMIT), u16, texts, limits),
)


class Vector(NamedTuple):
    """A test vector of the document: a message, or why there is none, and its bytes."""

    direction: str  # "request" or "reply"
    message: Any
    why: str
    frame: bytes


def vectors() -> list[Vector]:
    """Read them from docs/protocol.md."""
    text = PROTOCOL.read_text()
    section = text[text.index("\n## Test vectors") :]
    found = []
    for direction, content in re.findall(
        r"^```(request|reply)\n(.*?)^```$", section, re.MULTILINE | re.DOTALL
    ):
        document, end = json.JSONDecoder().raw_decode(content)
        frame = bytes.fromhex(re.sub(r"#.*", "", content[end:]))
        if "malformed" in document:
            found.append(Vector(direction, None, document["malformed"], frame))
        else:
            found.append(Vector(direction, _message(document), "", frame))
    return found


def _message(document: dict[str, Any]) -> Any:  # noqa: ANN401 - JSON
    name = document.pop("message")
    kind = getattr(messages, name, None) or getattr(client, name)
    return kind(**{key: _value(key, value) for key, value in document.items()})


def _value(key: str, value: Any) -> Any:  # noqa: ANN401 - JSON, with one case for each layout
    # Bytes are written as text, one character (U+0000 to U+00FF) for each.
    if key == "paths":
        return [path.encode("latin-1") for path in value]
    if key == "clients":
        return tuple(value)
    if key in {"copies", "globs"}:
        return tuple(text.encode("latin-1") for text in value)
    if key in {"path", "behind", "listener", "document", "name", "piece"}:
        return value.encode("latin-1")
    if key == "result":
        return _result(value)
    if key == "results":
        return [(_result(one[0]), _stat(one[1])) if isinstance(one, list) else _result(one) for one in value]
    if key == "entries" and isinstance(value, list):
        return [_entry(entry) for entry in value]
    if key == "filter":
        return WalkFilter(**{name: _value(name, each) for name, each in value.items()})
    if key == "end" and value is not None:
        return WalkEnd(**value)
    if key == "limit":
        return LimitReached(**value)
    if key == "client" and isinstance(value, dict):
        return AcceptedClient(**value)
    return value


def _entry(entry: dict[str, Any]) -> ListEntry | WalkEntry:
    if "name" in entry:
        return ListEntry(entry["name"].encode("latin-1"), entry["kind"], _stat(entry["stat"]))
    facts = FileStat(**entry["stat"])
    return WalkEntry(entry["path"].encode("latin-1"), entry["kind"], facts.encode(), entry["descriptor"])


def _result(value: str | dict[str, int]) -> Result:
    if value == "given":
        return GIVEN
    return Result(**{key: _value(key, one) for key, one in value.items()})  # type: ignore[union-attr]


def _stat(value: dict[str, int] | None) -> FileStat | None:
    return None if value is None else FileStat(**value)
