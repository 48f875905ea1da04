"""The client's side of docs/protocol.md without I/O: requests to frames, frames to answers.

The blocking and the asyncio client are thin shells around it. One engine is
one connection: it numbers requests, knows which are outstanding, and holds
what comes back against them. After an error that ends the connection it
refuses to go on; a new connection gets a new engine.

The invariant: `receive` owns the descriptors it is given from its first line,
and either hands them on in an `Answer` to the one request they belong to or
closes them.
"""

from __future__ import annotations

import errno
import os
from enum import IntEnum, auto
from typing import TYPE_CHECKING, NamedTuple

from fdbroker.client.errors import (
    PathInvalidError,
    error_of_reply,
    path_not_sendable,
    protocol_error,
)
from fdbroker.wire.client import (
    ExplainReply,
    ListReply,
    OpenReply,
    ReloadReply,
    StatReply,
    StatusReply,
    decode_reply,
    encode_explain,
    encode_hello,
    encode_list,
    encode_open,
    encode_reload,
    encode_stat,
    encode_status,
)
from fdbroker.wire.format import (
    COOKIE,
    HEADER,
    MAX_FRAME,
    MAX_PATHS,
    VERSION,
    Kind,
)
from fdbroker.wire.messages import GIVEN, ErrorReply, MalformedError, Welcome

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import NoReturn

    from fdbroker.kernel.descriptors import Descriptors
    from fdbroker.wire.client import Reply

    StrOrBytesPath = str | bytes | os.PathLike[str] | os.PathLike[bytes]

DEFAULT_BATCH = 64  # where a file costs least
ROOM = MAX_FRAME + 1  # for a frame; one byte more than any, so that a longer one shows

_LAST_ID = 0xFFFFFFFF
# A broker that took less could not be asked for a path of the full length.
_LONGEST_PATH = 4096
_SMALLEST_FRAME = HEADER.size + COOKIE.size + _LONGEST_PATH


class State(IntEnum):
    """Where a connection is."""

    NEW = auto()
    GREETING = auto()  # hello is sent
    READY = auto()
    CLOSED = auto()


class Happening(IntEnum):
    """What may happen to a connection."""

    HELLO = auto()  # sent
    REQUEST = auto()  # sent
    WELCOME = auto()  # received
    ANSWER = auto()  # received: a reply to a request, or its refusal
    FAREWELL = auto()  # received: an error that ends the connection
    END = auto()  # either side closes


# What is not in this table does not happen: a RuntimeError if it is ours, a ProtocolError if it is theirs.
TRANSITIONS: dict[tuple[State, Happening], State] = {
    (State.NEW, Happening.HELLO): State.GREETING,
    (State.GREETING, Happening.WELCOME): State.READY,
    (State.GREETING, Happening.FAREWELL): State.CLOSED,
    (State.READY, Happening.REQUEST): State.READY,
    (State.READY, Happening.ANSWER): State.READY,
    (State.READY, Happening.FAREWELL): State.CLOSED,
    **{(state, Happening.END): State.CLOSED for state in State},
}
_OURS = frozenset({Happening.HELLO, Happening.REQUEST})


class OpenPaths(NamedTuple):
    """Open these: 1 to as many as `Limits` says."""

    paths: list[bytes]


class StatPaths(NamedTuple):
    """Describe these."""

    paths: list[bytes]


class ListPage(NamedTuple):
    """One page of a directory; `most` 0: the broker chooses how many."""

    path: bytes
    cookie: int = 0
    most: int = 0


class AskStatus(NamedTuple):
    """How does the broker see this connection?"""


class AskWhy(NamedTuple):
    """What does the name of a path decide for us? On a control socket."""

    action: str
    path: bytes


class HandOver(NamedTuple):
    """A piece of a compiled policy, from byte `offset` on; `more`: others follow. On a control socket."""

    offset: int
    piece: bytes
    more: bool


# As tuples: building a union for each question costs more than asking it.
_ASKS_PATHS = (OpenPaths, StatPaths)
_ANSWERS_PATHS = (OpenReply, StatReply)


class TooLargeError(ValueError):
    """A question above the limits of this broker, though another one may have taken it."""


Question = OpenPaths | StatPaths | ListPage | AskStatus | AskWhy | HandOver


class Answer(NamedTuple):
    """What came for request `id`. `descriptors`: one per given result, owned by who holds the answer."""

    id: int
    reply: Reply
    descriptors: Descriptors


class Limits(NamedTuple):
    """What one request may hold: as much as both sides of a connection can."""

    max_paths: int
    max_frame: int


# Of version 1, for what is prepared before the first welcome.
VERSION_LIMITS = Limits(MAX_PATHS, MAX_FRAME)

_REPLY_TO: dict[type, type] = {
    OpenPaths: OpenReply,
    StatPaths: StatReply,
    ListPage: ListReply,
    AskStatus: StatusReply,
    AskWhy: ExplainReply,
    HandOver: ReloadReply,
}


class Engine:
    """One connection's requests and replies. Not thread-safe, but for `abandon`."""

    def __init__(self) -> None:
        self._state = State.NEW
        self._last_id = 0
        self._hello_id = 0
        self._outstanding: dict[int, Question] = {}
        self._abandoned: set[int] = set()
        self._welcome: Welcome | None = None
        self._limits = VERSION_LIMITS

    @property
    def state(self) -> State:
        """Where the connection is."""
        return self._state

    @property
    def outstanding(self) -> int:
        """How many requests have no answer yet."""
        return len(self._outstanding)

    @property
    def limits(self) -> Limits:
        """What one request may hold: the broker's word once it said welcome."""
        return self._limits

    @property
    def welcome(self) -> Welcome:
        """What the broker said at the beginning.

        Raises:
            RuntimeError: it has not said it yet.

        """
        if self._welcome is None:
            raise RuntimeError("the broker has not said welcome yet")
        return self._welcome

    def hello(self) -> bytes:
        """Return the first frame to send.

        Raises:
            RuntimeError: it was sent already, or the connection is closed.

        """
        self._happens(Happening.HELLO)
        self._hello_id = self._next_id()
        return encode_hello(self._hello_id)

    def request(self, question: Question) -> tuple[int, bytes]:
        """Return the id and the frame of a request, which is outstanding from now on.

        Raises:
            RuntimeError: before the welcome or after the end.
            TooLargeError: it is larger than `limits` allow.
            ValueError: it can't be expressed (no path, a NUL).

        """
        request_id = self._next_id()
        frame = self._encode(request_id, question)
        if self._state is not State.READY:  # which it stays; looking up members of an Enum is slow
            self._happens(Happening.REQUEST)
        self._outstanding[request_id] = question
        return request_id, frame

    def abandon(self, request_id: int) -> None:
        """Have the answer closed when it comes: nobody waits for it any more.

        May be called at any time, from another thread or a finalizer: it does
        nothing that could be caught half done.
        """
        if request_id in self._outstanding:
            self._abandoned.add(request_id)

    def receive(self, data: bytes, descriptors: Descriptors, *, truncated: bool = False) -> Answer | None:
        """Take one frame and what came with it; return the answer that it is.

        None: it was the welcome, or nobody waits for it any more. The
        descriptors are the engine's from here on, then the answer's.

        Raises:
            ProtocolError: the broker did not keep to the protocol, or said
                that we did not. The connection must be closed.
            BrokerError: the broker refused the connection. Likewise.

        """
        answer = None
        try:
            answer = self._receive(data, descriptors, truncated=truncated)
        finally:
            if answer is None:
                descriptors.close()
        return answer

    def close(self) -> None:
        """Note the end of the connection; nothing is outstanding after it."""
        self._happens(Happening.END)
        self._outstanding.clear()

    def _receive(self, data: bytes, descriptors: Descriptors, *, truncated: bool) -> Answer | None:
        if truncated:
            self._fail(f"a reply of more than {ROOM} bytes")
        try:
            reply = decode_reply(data)
        except MalformedError as error:
            self._fail(str(error), error.request_id)
        if isinstance(reply, ErrorReply) and (
            reply.id == 0 or reply.kind is Kind.MALFORMED or self._state is not State.READY
        ):
            self._check(descriptors, 0, reply)
            self._happens(Happening.FAREWELL)
            raise error_of_reply(reply)
        if isinstance(reply, Welcome):
            self._check(descriptors, 0, reply)
            self._greet(reply)
            return None
        return self._answer(reply, descriptors)

    def _greet(self, reply: Welcome) -> None:
        self._happens(Happening.WELCOME, reply.id)
        if reply.id != self._hello_id:
            self._fail(f"a welcome to hello {reply.id} instead of {self._hello_id}", reply.id)
        if reply.version != VERSION:
            self._fail(f"it chose version {reply.version}, which was not offered", reply.id)
        if reply.features:
            self._fail(f"it granted features that were not asked for ({reply.features:#x})", reply.id)
        if reply.max_paths < 1 or reply.max_frame < _SMALLEST_FRAME:
            self._fail(
                f"its limits leave no room for a request ({reply.max_paths} paths, {reply.max_frame} bytes)",
                reply.id,
            )
        self._welcome = reply
        self._limits = Limits(min(reply.max_paths, MAX_PATHS), min(reply.max_frame, MAX_FRAME))

    def _answer(self, reply: Reply, descriptors: Descriptors) -> Answer | None:
        if self._state is not State.READY:
            self._happens(Happening.ANSWER, reply.id)
        question = self._outstanding.pop(reply.id, None)
        if question is None:
            self._fail(f"a reply to request {reply.id}, which was not made or is answered already", reply.id)
        given = 0
        if not isinstance(reply, ErrorReply):
            if not isinstance(reply, _REPLY_TO[type(question)]):
                self._fail(
                    f"request {reply.id} ({type(question).__name__}) is answered by a {type(reply).__name__}",
                    reply.id,
                )
            if isinstance(question, _ASKS_PATHS) and isinstance(reply, _ANSWERS_PATHS):
                asked, answered = len(question.paths), len(reply.results)
                if asked != answered:
                    self._fail(f"{answered} results for the {asked} paths of request {reply.id}", reply.id)
            if isinstance(reply, OpenReply):
                given = reply.results.count(GIVEN)
            if isinstance(question, ListPage) and isinstance(reply, ListReply):
                self._check_page(question, reply)
        self._check(descriptors, given, reply)
        if reply.id in self._abandoned:
            self._abandoned.discard(reply.id)
            return None
        return Answer(reply.id, reply, descriptors)

    def _check(self, descriptors: Descriptors, expected: int, reply: Reply) -> None:
        if len(descriptors) != expected:
            self._fail(f"{len(descriptors)} descriptors came where {expected} belong", reply.id)

    def _check_page(self, question: ListPage, reply: ListReply) -> None:
        if reply.result is not GIVEN:
            return
        if question.most and len(reply.entries) > question.most:
            self._fail(f"a page of {len(reply.entries)} entries, {question.most} were asked for", reply.id)
        if not reply.last and reply.cookie == question.cookie:
            self._fail("a page that leads to itself", reply.id)

    def _encode(self, request_id: int, question: Question) -> bytes:
        if isinstance(question, OpenPaths):
            frame = encode_open(request_id, question.paths)
        elif isinstance(question, StatPaths):
            frame = encode_stat(request_id, question.paths)
        elif isinstance(question, ListPage):
            frame = encode_list(request_id, question.path, question.cookie, question.most)
        elif isinstance(question, AskWhy):
            frame = encode_explain(request_id, question.action, question.path)
        elif isinstance(question, HandOver):
            frame = encode_reload(request_id, question.offset, question.piece, more=question.more)
        else:
            frame = encode_status(request_id)
        paths = len(question.paths) if isinstance(question, _ASKS_PATHS) else 0
        if paths > self._limits.max_paths or len(frame) > self._limits.max_frame:
            raise TooLargeError(
                f"a request of {paths} paths and {len(frame)} bytes, the broker takes"
                f" {self._limits.max_paths} and {self._limits.max_frame}"
            )
        return frame

    def _next_id(self) -> int:
        """Return an id that is free: not 0, which error frames use where an id could not be read."""
        while True:
            self._last_id = self._last_id + 1 if self._last_id < _LAST_ID else 1
            if self._last_id not in self._outstanding:
                return self._last_id

    def _happens(self, happening: Happening, request_id: int = 0) -> None:
        follows = TRANSITIONS.get((self._state, happening))
        if follows is None:
            words = f"{happening.name.lower()} in state {self._state.name.lower()}"
            if happening in _OURS:
                raise RuntimeError(words)
            self._fail(words, request_id)
        self._state = follows

    def _fail(self, why: str, request_id: int = 0) -> NoReturn:
        self._state = State.CLOSED
        raise protocol_error(why, request_id)


class Batch(NamedTuple):
    """The paths of one request. `given`: as the caller wrote them; `paths`: those that are sent, in order.

    `errors`: for each of `given` that can't be sent, by its place there, what keeps it.
    """

    given: list[StrOrBytesPath]
    paths: list[bytes]
    errors: dict[int, PathInvalidError]


def sendable(given: StrOrBytesPath) -> bytes:
    """Return a path in the form that is sent.

    What the broker can judge is left to the broker.

    Raises:
        PathInvalidError: it can't be sent at all.
        TypeError: neither text nor bytes nor a path object.

    """
    path = given if type(given) is bytes else os.fsencode(given)
    if 0 in path:
        raise path_not_sendable(path, errno.EINVAL, "it has a NUL byte in it")
    if len(path) > _LONGEST_PATH:
        raise path_not_sendable(path, errno.ENAMETOOLONG, f"it has {len(path)} bytes")
    return path


def batches(paths: Iterable[StrOrBytesPath], most: int, limits: Callable[[], Limits]) -> Iterator[Batch]:
    """Split `paths` into what fits into one request each; lazily, in order.

    `limits` is asked for each of them, since a broker that was restarted may have others.

    Raises:
        ValueError: `most` is below 1.
        TypeError: as `sendable`. What was read before is lost with it.

    """
    if most < 1:
        raise ValueError(f"a batch has at least 1 path, not {most}")
    given, sent, errors = batch = Batch([], [], {})
    room = full = 0
    for one in paths:
        try:
            path = sendable(one)
            error = None
        except PathInvalidError as invalid:
            path, error = b"", invalid
        if given and len(path) >= room:
            yield batch
            given, sent, errors = batch = Batch([], [], {})
        if not given:
            max_paths, max_frame = limits()
            room, full = max_frame - HEADER.size + 1, min(most, max_paths)
        if error is None:
            sent.append(path)
            room -= len(path) + 1
        else:
            errors[len(given)] = error
        given.append(one)
        # Not one path further is read, since the caller may make it only after this batch.
        if len(given) == full:
            yield batch
            given, sent, errors = batch = Batch([], [], {})
    if given:
        yield batch
