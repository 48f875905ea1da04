"""Messages of every kind: encoded by one function, made at random, read from docs/protocol.md."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import strategies as st

from fdbroker.wire import client, messages, replies
from fdbroker.wire.client import (
    ExplainReply,
    ListReply,
    OpenReply,
    ReloadReply,
    Reply,
    StatReply,
    StatusReply,
)
from fdbroker.wire.format import ACTIONS, MAX_LIST_ENTRIES, MAX_PATHS, MAX_POLICY, Kind, Reason, Status
from fdbroker.wire.messages import (
    GIVEN,
    ErrorReply,
    ExplainRequest,
    FileStat,
    Hello,
    ListEntry,
    ListRequest,
    OpenRequest,
    ReloadRequest,
    Request,
    Result,
    StatRequest,
    StatusRequest,
    Welcome,
)

PROTOCOL = Path(__file__).resolve().parents[2] / "docs" / "protocol.md"


def encode_request(message: Request) -> bytes:
    match message:
        case Hello():
            assert (message.lowest, message.highest, message.features) == (1, 1, 0)
            return client.encode_hello(message.id)
        case OpenRequest():
            return client.encode_open(message.id, message.paths)
        case StatRequest():
            return client.encode_stat(message.id, message.paths)
        case ListRequest():
            return client.encode_list(message.id, message.path, message.cookie, message.most)
        case StatusRequest():
            return client.encode_status(message.id)
        case ExplainRequest():
            return client.encode_explain(message.id, message.action, message.path)
        case ReloadRequest():
            return client.encode_reload(message.id, message.offset, message.piece, more=message.more)


def encode_reply(message: Reply) -> bytes:
    match message:
        case Welcome():
            return replies.encode_welcome(message)
        case OpenReply():
            return replies.encode_open_reply(message.id, message.generation, message.results)
        case StatReply():
            return replies.encode_stat_reply(message.id, message.generation, message.results)
        case ListReply():
            entries = [replies.encode_list_entry(entry) for entry in message.entries]
            return replies.encode_list_reply(
                message.id, message.generation, message.result, entries, message.cookie, last=message.last
            )
        case StatusReply():
            return replies.encode_status_reply(message.id, message.generation, message.document)
        case ExplainReply():
            return replies.encode_explain_reply(message.id, message.generation, message.document)
        case ReloadReply():
            return replies.encode_reload_reply(
                message.id, message.generation, message.received, more=message.more
            )
        case ErrorReply():
            return replies.encode_error(message)


u16 = st.integers(0, 2**16 - 1)
u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
i64 = st.integers(-(2**63), 2**63 - 1)
# What the wire can carry, also what no broker would open.
paths = st.binary(max_size=60).map(lambda path: path.replace(b"\0", b"0"))
path_lists = st.lists(paths, min_size=1, max_size=MAX_PATHS)
names = st.binary(min_size=1, max_size=255).filter(
    lambda name: b"/" not in name and b"\0" not in name and name not in {b".", b".."}
)

requests_of_all_kinds: st.SearchStrategy[Request] = st.one_of(
    st.builds(Hello, u32, st.just(1), st.just(1), st.just(0)),
    st.builds(OpenRequest, u32, path_lists),
    st.builds(StatRequest, u32, path_lists),
    st.builds(ListRequest, u32, paths, u64, st.integers(0, MAX_LIST_ENTRIES)),
    st.builds(StatusRequest, u32),
    st.builds(ExplainRequest, u32, st.sampled_from(list(ACTIONS.values())), paths),
    st.builds(
        ReloadRequest,
        u32,
        st.integers(0, MAX_POLICY - 200),
        st.binary(min_size=1, max_size=200),
        st.booleans(),
    ),
)

results = st.one_of(
    st.just(GIVEN),
    st.builds(Result, st.sampled_from([Status.REFUSED, Status.BROKEN]), st.sampled_from(list(Reason)), u16),
)
stats = st.builds(FileStat, u64, u64, u32, u32, u32, u32, u64, i64, i64)
described = st.one_of(
    st.tuples(st.just(GIVEN), stats), st.tuples(results.filter(lambda one: one is not GIVEN), st.none())
)
entries = st.builds(ListEntry, names, st.integers(0, 255), st.none() | stats)
texts = st.text(max_size=80)

replies_of_all_kinds: st.SearchStrategy[Reply] = st.one_of(
    st.builds(Welcome, u32, u32, u16, u16, u32, u16, u32, u32, u32),
    st.builds(OpenReply, u32, u32, st.lists(results, max_size=MAX_PATHS)),
    st.builds(StatReply, u32, u32, st.lists(described, max_size=40)),
    st.builds(ListReply, u32, u32, results, st.lists(entries, max_size=20), u64, st.booleans()),
    st.builds(StatusReply, u32, u32, st.binary(max_size=200)),
    st.builds(ExplainReply, u32, u32, st.binary(max_size=200)),
    st.builds(ReloadReply, u32, u32, u32, st.booleans()),
    st.builds(ErrorReply, u32, u32, st.sampled_from(list(Kind)), st.sampled_from(list(Reason)), u16, texts),
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


def _value(key: str, value: Any) -> Any:  # noqa: ANN401 - JSON
    # Bytes are written as text, one character (U+0000 to U+00FF) for each.
    if key == "paths":
        return [path.encode("latin-1") for path in value]
    if key in {"path", "document", "name", "piece"}:
        return value.encode("latin-1")
    if key == "result":
        return _result(value)
    if key == "results":
        return [(_result(one[0]), _stat(one[1])) if isinstance(one, list) else _result(one) for one in value]
    if key == "entries":
        return [
            ListEntry(entry["name"].encode("latin-1"), entry["kind"], _stat(entry["stat"])) for entry in value
        ]
    return value


def _result(value: str | dict[str, int]) -> Result:
    return GIVEN if value == "given" else Result(**value)  # type: ignore[arg-type] # as the document says


def _stat(value: dict[str, int] | None) -> FileStat | None:
    return None if value is None else FileStat(**value)
