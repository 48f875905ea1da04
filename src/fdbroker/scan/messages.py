"""What a scan service and its clients say to each other: one JSON object in each message. No I/O.

docs/scan-protocol.md describes them for other languages. Both ends read strictly: a member that is unknown,
missing or of a wrong type is no message. Paths are bytes: `path` has them where they are UTF-8, otherwise it
shows what can be shown, and `path_hex` has them all.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from fdbroker.scan.run import Scanned, Skipped
from fdbroker.scan.verdict import Answer, Clean, Error, Infected, Reason, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

VERSION = 1
# Bytes of a message, either way.
LONGEST_MESSAGE = 65536
# Of what is in one message: so it fits, whatever the names are.
MOST_PATHS = 1024
MOST_EXCLUSIONS = 256
LONGEST_PATH = 4095  # bytes, as PATH_MAX without its NUL
_LAST_ID = 2**32 - 1
_LAST_SIZE = 2**63 - 1


class MessageError(ValueError):
    """The bytes are no message; the text says what is wrong with them."""


# ---- what a client says ----


class Hello(NamedTuple):
    """The first message of a client."""

    version: int


class ScanDescriptor(NamedTuple):
    """Scan what is open behind the one descriptor that comes with the message."""

    id: int
    max_size: int | None


class ScanPaths(NamedTuple):
    """Scan files; the broker opens them on behalf of the client."""

    id: int
    paths: tuple[bytes, ...]
    max_size: int | None


class ScanTree(NamedTuple):
    """Scan a file, or all that is below a directory."""

    id: int
    path: bytes
    exclude: tuple[bytes, ...]
    max_size: int | None


class Cancel(NamedTuple):
    """Go on with a request no more; both end."""

    id: int
    request: int


class AskStatus(NamedTuple):
    """Tell how the service is."""

    id: int


class Renew(NamedTuple):
    """Load the engines anew; for those who may."""

    id: int


Request = Hello | ScanDescriptor | ScanPaths | ScanTree | Cancel | AskStatus | Renew


# ---- what the service says ----


class EngineState(NamedTuple):
    """An engine; `inside`: in workers of the service."""

    engine: str
    version: str
    inside: bool


class Welcome(NamedTuple):
    """The answer to hello. `max_size`: bytes of a file, None: no limit but that of the engines."""

    version: int
    service: str
    engines: tuple[EngineState, ...]
    max_size: int | None


class Results(NamedTuple):
    """Some of what a request came to, in any order. Paths are empty where a descriptor was handed in."""

    id: int
    results: tuple[Scanned | Skipped, ...]


class End(NamedTuple):
    """The end of a request: counts of what was told, and whether that is all there is.

    `missing`: why it is not. `bytes` of files whose verdict is no error.
    """

    id: int
    files: int
    bytes: int
    infected: int
    errors: int
    skipped: int
    missing: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Whether all that there is was seen."""
        return not self.missing


class StatusReply(NamedTuple):
    """How the service is: whatever it tells, by name."""

    id: int
    status: dict[str, Any]


class Refused(NamedTuple):
    """A request that is well-formed and not done; `reason` is one of docs/scan-protocol.md."""

    id: int
    reason: str
    text: str


class Farewell(NamedTuple):
    """The last message: the service closes the connection. `reason`: malformed, broker_gone, stopping."""

    reason: str
    text: str


ServiceAnswer = Welcome | Results | End | StatusReply | Refused | Farewell


# ---- bytes of requests ----


def encode_request(request: Request) -> bytes:
    """Return a request as bytes.

    Raises:
        MessageError: it is too long for a message.

    """
    body: dict[str, object]
    if isinstance(request, Hello):
        body = {"type": "hello", "version": request.version}
    elif isinstance(request, ScanDescriptor):
        body = {"type": "scan_descriptor", "id": request.id} | _optional(max_size=request.max_size)
    elif isinstance(request, ScanPaths):
        paths = [_text_or_hex(path) for path in request.paths]
        body = {"type": "scan_paths", "id": request.id, "paths": paths} | _optional(max_size=request.max_size)
    elif isinstance(request, ScanTree):
        body = {"type": "scan_tree", "id": request.id, **path_members(request.path)}
        body |= _optional(max_size=request.max_size)
        if request.exclude:
            body["exclude"] = [_text_or_hex(glob) for glob in request.exclude]
    elif isinstance(request, Cancel):
        body = {"type": "cancel", "id": request.id, "request": request.request}
    else:
        body = {"type": "status" if isinstance(request, AskStatus) else "renew", "id": request.id}
    data = _bytes_of(body)
    if len(data) > LONGEST_MESSAGE:
        raise MessageError(
            f"a message of {len(data)} bytes; the most are {LONGEST_MESSAGE}: ask for less at once"
        )
    return data


def decode_request(data: bytes) -> Request:
    """Return the request that bytes are.

    Raises:
        MessageError: they are none.

    """
    members = _Members(data)
    kind = members.text("type")
    if kind == "hello":
        request: Request = Hello(members.number("version", 0xFFFF))
    elif kind == "scan_descriptor":
        request = ScanDescriptor(members.id("id"), members.optional_size())
    elif kind == "scan_paths":
        paths = tuple(_path_of(one) for one in members.items("paths", MOST_PATHS))
        request = ScanPaths(members.id("id"), paths, members.optional_size())
    elif kind == "scan_tree":
        exclude = members.items("exclude", MOST_EXCLUSIONS, required=False)
        request = ScanTree(
            members.id("id"), members.path(), tuple(map(_path_of, exclude)), members.optional_size()
        )
    elif kind == "cancel":
        request = Cancel(members.id("id"), members.id("request"))
    elif kind == "status":
        request = AskStatus(members.id("id"))
    elif kind == "renew":
        request = Renew(members.id("id"))
    else:
        raise MessageError(f"there is no request {kind[:40]!a}")
    members.end()
    return request


# ---- bytes of answers ----


def encode_answer(answer: Welcome | End | StatusReply | Refused | Farewell) -> bytes:
    """Return an answer as bytes; of results there are `encode_results`."""
    body: dict[str, object]
    if isinstance(answer, Welcome):
        engines = [one._asdict() for one in answer.engines]
        body = {"type": "welcome", "version": answer.version, "service": answer.service, "engines": engines}
        body |= _optional(max_size=answer.max_size)
    elif isinstance(answer, End):
        body = {"type": "end", **answer._asdict(), "missing": list(answer.missing)}
        body["complete"] = answer.complete
    elif isinstance(answer, StatusReply):
        body = {"type": "status", "id": answer.id, "status": answer.status}
    elif isinstance(answer, Refused):
        body = {"type": "refused", "id": answer.id, "reason": answer.reason, "message": answer.text}
    else:
        body = {"type": "farewell", "reason": answer.reason, "message": answer.text}
    return _bytes_of(body)


def encode_results(number: int, results: Sequence[Scanned | Skipped]) -> list[bytes]:
    """Return as many messages as it takes to tell these results of request `number`."""
    head = b'{"type":"results","id":%d,"results":[' % number
    room = LONGEST_MESSAGE - len(head) - 2
    messages: list[bytes] = []
    parts: list[bytes] = []
    used = 0
    for result in results:
        part = _bytes_of(_members_of(result))
        if len(part) > room and isinstance(result, Scanned):
            # Names of the longest, by many engines: the one that counts is told.
            part = _bytes_of(_members_of(result._replace(verdict=_shorter(result.verdict), answers=())))
        if used + len(part) + 1 > room and parts:
            messages.append(head + b",".join(parts) + b"]}")
            parts, used = [], 0
        parts.append(part)
        used += len(part) + 1
    if parts:
        messages.append(head + b",".join(parts) + b"]}")
    return messages


def decode_answer(data: bytes) -> ServiceAnswer:
    """Return the answer that bytes are.

    Raises:
        MessageError: they are none.

    """
    members = _Members(data)
    kind = members.text("type")
    if kind == "results":
        results = tuple(map(_result_of, members.items("results", LONGEST_MESSAGE)))
        answer: ServiceAnswer = Results(members.id("id"), results)
    elif kind == "end":
        files, size, infected, errors, skipped = [
            members.number(name, _LAST_SIZE) for name in ("files", "bytes", "infected", "errors", "skipped")
        ]
        missing = tuple(_as_text(one, "missing") for one in members.items("missing", MOST_PATHS))
        answer = End(members.id("id"), files, size, infected, errors, skipped, missing)
        if members.boolean("complete") is not answer.complete:
            raise MessageError("it is complete, and something is missing")
    elif kind == "welcome":
        engines = tuple(map(_engine_of, members.items("engines", MOST_PATHS)))
        answer = Welcome(
            members.number("version", 0xFFFF), members.text("service"), engines, members.optional_size()
        )
    elif kind == "status":
        status = members.take("status")
        if not isinstance(status, dict):
            raise MessageError("status is no object")
        answer = StatusReply(members.id("id"), status)
    elif kind == "refused":
        answer = Refused(members.id("id"), members.text("reason"), members.text("message"))
    elif kind == "farewell":
        answer = Farewell(members.text("reason"), members.text("message"))
    else:
        raise MessageError(f"there is no answer {kind[:40]!a}")
    members.end()
    return answer


def path_members(path: bytes) -> dict[str, object]:
    """Return the members of a path: `path`, and `path_hex` where `path` does not have all its bytes."""
    try:
        return {"path": path.decode()}
    except UnicodeDecodeError:
        return {"path": path.decode(errors="replace"), "path_hex": path.hex()}


def verdict_members(verdict: Verdict) -> dict[str, object]:
    """Return the members of a verdict: `verdict`, and what belongs to it."""
    if isinstance(verdict, Infected):
        more = {"more": list(verdict.more)} if verdict.more else {}
        return {"verdict": verdict.verdict, "name": verdict.name, **more}
    if isinstance(verdict, Error):
        return {"verdict": verdict.verdict, "reason": str(verdict.reason), "message": verdict.text}
    return {"verdict": verdict.verdict}


def _members_of(result: Scanned | Skipped) -> dict[str, object]:
    path = path_members(result.path) if result.path else {}
    if isinstance(result, Skipped):
        return {**path, "skipped": result.kind}
    members = {**path, **verdict_members(result.verdict)}
    if result.size is not None:
        members["size"] = result.size
    if result.directory:
        members["directory"] = True
    if len(result.answers) > 1:
        members["engines"] = [
            {"engine": answer.engine, **verdict_members(answer.verdict)} for answer in result.answers
        ]
    return members


def _shorter(verdict: Verdict) -> Verdict:
    return Infected(verdict.name) if isinstance(verdict, Infected) else verdict


def _result_of(value: object) -> Scanned | Skipped:
    members = _Members(value)
    path = members.path(required=False)
    if members.has("skipped"):
        result: Scanned | Skipped = Skipped(path, members.text("skipped"))
    else:
        verdict = _verdict_of(members)
        size = members.number("size", _LAST_SIZE) if members.has("size") else None
        directory = members.boolean("directory") if members.has("directory") else False
        answers = tuple(map(_answer_of, members.items("engines", MOST_PATHS, required=False)))
        result = Scanned(path, verdict, size, directory, answers)
    members.end()
    return result


def _answer_of(value: object) -> Answer:
    members = _Members(value)
    answer = Answer(members.text("engine"), _verdict_of(members))
    members.end()
    return answer


def _verdict_of(members: _Members) -> Verdict:
    kind = members.text("verdict")
    if kind == "clean":
        return Clean()
    try:
        if kind == "infected":
            more = members.items("more", MOST_PATHS, required=False)
            return Infected(members.text("name"), tuple(_as_text(one, "more") for one in more))
        if kind == "error":
            return Error(Reason(members.text("reason")), members.text("message"))
    except ValueError as error:
        raise MessageError(str(error)) from error
    raise MessageError(f"there is no verdict {kind[:40]!a}")


def _engine_of(value: object) -> EngineState:
    members = _Members(value)
    state = EngineState(members.text("engine"), members.text("version"), members.boolean("inside"))
    members.end()
    return state


class _Members:
    """The members of an object, each to be taken once."""

    def __init__(self, what: object) -> None:
        if isinstance(what, bytes):
            what = _parsed(what)
        if not isinstance(what, dict):
            raise MessageError("it is no JSON object")
        self._left = dict(what)

    def has(self, name: str) -> bool:
        return name in self._left

    def take(self, name: str) -> object:
        if name not in self._left:
            raise MessageError(f"the member {name!r} is missing")
        return self._left.pop(name)

    def text(self, name: str) -> str:
        return _as_text(self.take(name), name)

    def number(self, name: str, most: int) -> int:
        value = self.take(name)
        if type(value) is not int or not 0 <= value <= most:
            raise MessageError(f"{name} is no whole number from 0 to {most}")
        return value

    def id(self, name: str) -> int:
        return self.number(name, _LAST_ID)

    def boolean(self, name: str) -> bool:
        value = self.take(name)
        if not isinstance(value, bool):
            raise MessageError(f"{name} is neither true nor false")
        return value

    def items(self, name: str, most: int, *, required: bool = True) -> list[object]:
        if not required and name not in self._left:
            return []
        value = self.take(name)
        if not isinstance(value, list) or len(value) > most:
            raise MessageError(f"{name} is no list of at most {most} items")
        return value

    def optional_size(self) -> int | None:
        return self.number("max_size", _LAST_SIZE) if self.has("max_size") else None

    def path(self, *, required: bool = True) -> bytes:
        """Return what `path` and `path_hex` say; nothing where they are missing and may be."""
        if not required and not self.has("path") and not self.has("path_hex"):
            return b""
        shown = self.text("path") if self.has("path") or not self.has("path_hex") else ""
        if self.has("path_hex"):
            return _path_of({"path_hex": self.take("path_hex")})
        return _path_of(shown)

    def end(self) -> None:
        """Refuse what nobody has taken."""
        if self._left:
            raise MessageError(f"there is no member {min(self._left)[:40]!a} here")


def _parsed(data: bytes) -> object:
    if len(data) > LONGEST_MESSAGE:
        raise MessageError(f"a message has at most {LONGEST_MESSAGE} bytes")
    try:
        return json.loads(data.decode(), object_pairs_hook=_each_once, parse_constant=_no_number)
    except MessageError:
        raise
    except (ValueError, RecursionError) as error:
        raise MessageError(f"it is no JSON: {error}") from error


def _each_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise MessageError("a member is there twice")
    return members


def _no_number(text: str) -> NoReturn:
    raise MessageError(f"{text} is no number")


def _as_text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise MessageError(f"{name} is no text")
    return value


def _path_of(value: object) -> bytes:
    """Return a path, or a glob: text that is UTF-8, or an object with its bytes."""
    if isinstance(value, dict):
        if set(value) != {"path_hex"} or not isinstance(value["path_hex"], str):
            raise MessageError("a path is text, or an object with path_hex alone")
        try:
            path = bytes.fromhex(value["path_hex"])
        except ValueError as error:
            raise MessageError(f"path_hex: {error}") from error
    else:
        try:
            path = _as_text(value, "path").encode()
        except UnicodeEncodeError as error:
            raise MessageError("a path with half a character in it; write path_hex") from error
    if not path or len(path) > LONGEST_PATH or 0 in path:
        raise MessageError(f"a path has 1 to {LONGEST_PATH} bytes and no NUL")
    return path


def _text_or_hex(path: bytes) -> object:
    try:
        return path.decode()
    except UnicodeDecodeError:
        return {"path_hex": path.hex()}


def _optional(**members: object) -> dict[str, object]:
    return {name: value for name, value in members.items() if value is not None}


_encode: Callable[[object], str] = json.JSONEncoder(separators=(",", ":")).encode


def _bytes_of(body: dict[str, object]) -> bytes:
    return _encode(body).encode("ascii")
