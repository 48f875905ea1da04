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
from collections import deque
from enum import IntEnum, auto
from typing import TYPE_CHECKING, NamedTuple

from fdbroker.client.errors import (
    PathInvalidError,
    error_of_reply,
    path_not_sendable,
    protocol_error,
)
from fdbroker.wire.client import (
    AcceptedReply,
    ExplainReply,
    ListReply,
    OpenReply,
    ReloadReply,
    ReopenReply,
    ServeReply,
    StatReply,
    StatusReply,
    WalkReply,
    decode_reply,
    encode_cancel,
    encode_explain,
    encode_hello,
    encode_list,
    encode_more,
    encode_open,
    encode_release,
    encode_reload,
    encode_reopen,
    encode_serve,
    encode_stat,
    encode_status,
    encode_walk,
)
from fdbroker.wire.format import (
    CLIENT,
    COOKIE,
    HEADER,
    MAX_FRAME,
    MAX_PATHS,
    VERSION,
    Kind,
)
from fdbroker.wire.messages import GIVEN, ErrorReply, MalformedError, WalkFilter, Welcome

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from typing import NoReturn

    from fdbroker.kernel.descriptors import Descriptors
    from fdbroker.wire.client import Reply

    StrOrBytesPath = str | bytes | os.PathLike[str] | os.PathLike[bytes]

DEFAULT_BATCH = 64  # where a file costs least
DEFAULT_WALK_BATCH = 128  # the same for a walk, whose frames cost more
MOST_MORE = 0xFFFF  # frames that one request for more of a walk can ask for
ROOM = MAX_FRAME + 1  # for a frame; one byte more than any, so that a longer one shows

_LAST_ID = 0xFFFFFFFF
# A broker that took less could not be asked for a path of the full length.
_LONGEST_PATH = 4096
_SMALLEST_FRAME = HEADER.size + CLIENT.size + COOKIE.size + _LONGEST_PATH


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
    """Open these: 1 to as many as `Limits` says. `copy`: their contents will do as well.

    `client` here and below: the number of the client that a service acts for; None: for itself.
    """

    paths: list[bytes]
    client: int | None = None
    copy: bool = False


class StatPaths(NamedTuple):
    """Describe these."""

    paths: list[bytes]
    client: int | None = None


class ListPage(NamedTuple):
    """One page of a directory; `most` 0: the broker chooses how many."""

    path: bytes
    cookie: int = 0
    most: int = 0
    client: int | None = None


class WalkTree(NamedTuple):
    """Everything below a directory. Has many answers, `credit` of them before `Engine.more` asks for more.

    `behind`: the path, relative to the start, to go on behind; empty: from the beginning.
    `most`: entries per answer; 0: the broker chooses.
    """

    path: bytes
    filter: WalkFilter
    behind: bytes = b""
    descriptors: bool = True
    credit: int = 1
    most: int = 0
    client: int | None = None


class ServeListener(NamedTuple):
    """Give me the clients of a listener: an answer now, and another for each client."""

    listener: bytes


class AskStatus(NamedTuple):
    """How does the broker see this connection? On a control socket: the rows of a part from one on."""

    part: str | None = None
    row: int = 0


class AskWhy(NamedTuple):
    """What does the name of a path decide for us? On a control socket."""

    action: str
    path: bytes


class HandOver(NamedTuple):
    """A piece of a compiled policy, from byte `offset` on; `more`: others follow. On a control socket."""

    offset: int
    piece: bytes
    more: bool


class BringFile(NamedTuple):
    """A file for the audit, which comes next, or, `comes`, beside this. On a control socket."""

    comes: bool


_new = tuple.__new__  # what a NamedTuple does itself, by a function in Python
# As tuples: building a union for each question costs more than asking it.
_ASKS_PATHS = (OpenPaths, StatPaths)
_ANSWERS_PATHS = (OpenReply, StatReply)


class TooLargeError(ValueError):
    """A question above the limits of this broker, though another one may have taken it."""


Question = (
    OpenPaths | StatPaths | ListPage | AskStatus | WalkTree | ServeListener | AskWhy | HandOver | BringFile
)


class Answer(NamedTuple):
    """What came for request `id`. `descriptors`: one per given result, owned by who holds the answer.

    `last`: no other comes for this request.
    """

    id: int
    reply: Reply
    descriptors: Descriptors
    last: bool = True


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
    WalkTree: WalkReply,
    ServeListener: ServeReply,
    AskWhy: ExplainReply,
    HandOver: ReloadReply,
    BringFile: ReopenReply,
}


class _Progress:
    """What of a walk is known on this side: frames that may still come, and what came."""

    __slots__ = ("cancelled", "credit", "descriptors", "entries")

    def __init__(self, credit: int) -> None:
        self.credit = credit
        self.entries = 0
        self.descriptors = 0
        self.cancelled = False


class Engine:
    """One connection's requests and replies. Not thread-safe, but for `abandon` and `release_later`."""

    def __init__(self) -> None:
        self._state = State.NEW
        self._last_id = 0
        self._hello_id = 0
        self._outstanding: dict[int, Question] = {}
        self._abandoned: set[int] = set()
        self._walks: dict[int, _Progress] = {}
        # Requests to serve that were given, and the clients that came by them and were not released.
        self._services: set[int] = set()
        self._clients: set[int] = set()
        # What `afterthoughts` says to the broker: walks to cancel, clients to release.
        self._to_cancel: deque[int] = deque()
        self._to_release: deque[int] = deque()
        # How many of the latter may wait for each other, as the broker said with the last client that came.
        self._may_hold_back = 0
        self.clients_that_came = 0  # of listeners, in all
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
        if type(question) is OpenPaths:
            asked, client, copy = question
            frame = encode_open(request_id, asked, client, copy=copy)
            paths = len(asked)
        else:
            frame = self._encode(request_id, question)
            paths = len(question.paths) if type(question) is StatPaths else 0
        most_paths, most_bytes = self._limits
        if paths > most_paths or len(frame) > most_bytes:
            raise TooLargeError(
                f"a request of {paths} paths and {len(frame)} bytes, the broker takes"
                f" {most_paths} and {most_bytes}"
            )
        if self._state is not State.READY:  # which it stays; looking up members of an Enum is slow
            self._happens(Happening.REQUEST)
        self._outstanding[request_id] = question
        if isinstance(question, WalkTree):
            self._walks[request_id] = _Progress(question.credit)
        return request_id, frame

    def more(self, request_id: int, frames: int) -> bytes | None:
        """Return the frame that lets the broker send so many frames more of a walk; None: it has ended.

        Raises:
            ValueError: not 1 to 65,535 frames.

        """
        if not 1 <= frames <= MOST_MORE:
            raise ValueError(f"more of a walk is 1 to {MOST_MORE} frames, not {frames}")
        walk = self._walks.get(request_id)
        if walk is None or walk.cancelled:
            return None
        walk.credit += frames
        return encode_more(request_id, frames)

    def abandon(self, request_id: int) -> None:
        """Have the answer closed when it comes: nobody waits for it any more.

        A walk is cancelled, and the clients of a listener are released; that
        is what `afterthoughts` tells the broker.

        May be called at any time, from another thread or a finalizer: it does
        nothing that could be caught half done.
        """
        if request_id in self._outstanding or request_id in self._services:
            self._abandoned.add(request_id)
            if request_id in self._walks:
                self._to_cancel.append(request_id)

    def release_later(self, client: int) -> None:
        """Have `afterthoughts` release a client. May be called as `abandon`."""
        self._to_release.append(client)

    @property
    def has_afterthoughts(self) -> bool:
        """Whether `afterthoughts` may have something to say."""
        return bool(self._to_cancel or self._to_release)

    @property
    def releases_may_wait(self) -> bool:
        """Whether `afterthoughts` has nothing to say but releases, so few that the broker lets them wait."""
        return 0 < len(self._to_release) <= self._may_hold_back and not self._to_cancel

    def afterthoughts(self) -> Sequence[bytes]:
        """Return frames that are to be sent, of walks and clients that nobody wants any more.

        Mostly none; to be asked whenever something is sent or was received.
        """
        if not self.has_afterthoughts:
            return ()
        frames: list[bytes] = []
        if self._state is not State.READY:
            return frames
        while self._to_cancel:
            request_id = self._to_cancel.popleft()
            walk = self._walks.get(request_id)
            if walk is not None and not walk.cancelled:
                walk.cancelled = True
                frames.append(encode_cancel(request_id))
        released = []
        while self._to_release:
            client = self._to_release.popleft()
            if client in self._clients:
                # No request names it from now on, so that the broker may do with the number what it likes.
                self._clients.discard(client)
                released.append(client)
        frames += [
            encode_release(self._next_id(), released[first : first + MAX_PATHS])
            for first in range(0, len(released), MAX_PATHS)
        ]
        return frames

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
            if truncated:
                self._fail(f"a reply of more than {ROOM} bytes")
            try:
                reply = decode_reply(data)
            except MalformedError as error:
                self._fail(str(error), error.request_id)
            if type(reply) is OpenReply:
                request_id, _, results, _ = reply
                question = self._outstanding.get(request_id)
                if (
                    type(question) is OpenPaths
                    and len(question.paths) == len(results) == len(descriptors) == results.count(GIVEN)
                    and request_id not in self._abandoned
                    and self._state is State.READY
                ):
                    # As it mostly is, with nothing in it that `_receive` could object to.
                    del self._outstanding[request_id]
                    answer = _new(Answer, (request_id, reply, descriptors, True))
                    return answer
            elif type(reply) is AcceptedReply and self._state is State.READY:
                answer = self._accept(reply, descriptors)
                return answer
            answer = self._receive(reply, descriptors)
        finally:
            if answer is None:
                descriptors.close()
        return answer

    def close(self) -> None:
        """Note the end of the connection; nothing is outstanding after it."""
        self._happens(Happening.END)
        self._outstanding.clear()
        self._walks.clear()
        self._services.clear()
        self._clients.clear()

    def _receive(self, reply: Reply, descriptors: Descriptors) -> Answer | None:
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
        if isinstance(reply, ServeReply) and reply.id in self._services and reply.result is not GIVEN:
            # A reload took the right away: it was given, and is over now.
            self._check(descriptors, 0, reply)
            self._services.discard(reply.id)
            return self._unless_abandoned(Answer(reply.id, reply, descriptors, last=True))
        question = self._outstanding.get(reply.id)
        if question is None:
            self._fail(f"a reply to request {reply.id}, which was not made or is answered already", reply.id)
        given, last = 0, True
        if not isinstance(reply, ErrorReply):
            given, last = self._check_answer(question, reply)
        self._check(descriptors, given, reply)
        if last or isinstance(reply, ServeReply):
            del self._outstanding[reply.id]
            self._walks.pop(reply.id, None)
        if not last and isinstance(reply, ServeReply):
            self._services.add(reply.id)
        return self._unless_abandoned(Answer(reply.id, reply, descriptors, last))

    def _unless_abandoned(self, answer: Answer) -> Answer | None:
        if answer.id not in self._abandoned:
            return answer
        if answer.last:
            self._abandoned.discard(answer.id)
        return None

    def _accept(self, reply: AcceptedReply, descriptors: Descriptors) -> Answer | None:
        number = reply.client.number
        if reply.id not in self._services:
            self._fail(f"a client of a listener that nobody serves (request {reply.id})", reply.id)
        if number in self._clients:
            self._fail(f"another client with the number {number}, which is in use", reply.id)
        if len(descriptors) != 1:
            self._check(descriptors, 1, reply)
        self._clients.add(number)
        self._may_hold_back = reply.may_hold_back
        self.clients_that_came += 1
        if reply.id in self._abandoned:
            self._to_release.append(number)
            return None
        return _new(Answer, (reply.id, reply, descriptors, False))

    def _check_answer(self, question: Question, reply: Reply) -> tuple[int, bool]:
        """Check what answers a question: how many descriptors belong to it, and is it the last answer?"""
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
            if reply.copies:
                self._check_copies(question, reply)
            return reply.results.count(GIVEN), True
        if isinstance(question, WalkTree) and isinstance(reply, WalkReply):
            return self._check_walk(question, reply), reply.end is not None
        if isinstance(question, ListPage) and isinstance(reply, ListReply):
            self._check_page(question, reply)
        return 0, not isinstance(reply, ServeReply) or reply.result is not GIVEN

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

    def _check_copies(self, question: Question, reply: OpenReply) -> None:
        if not isinstance(question, OpenPaths) or not question.copy:
            self._fail("a copy of a file that was to be opened", reply.id)
        longest = max(map(len, reply.copies))
        if longest > self.welcome.copy_max:
            self._fail(f"a copy of {longest} bytes, above its own limit of {self.welcome.copy_max}", reply.id)

    def _check_walk(self, question: WalkTree, reply: WalkReply) -> int:
        """Check a frame of a walk and return how many descriptors belong to it."""
        walk = self._walks[reply.id]
        # A last frame without entries says that the walk was refused or cancelled, or has nothing more.
        if reply.entries or reply.end is None:
            if not walk.credit:
                self._fail("a frame of a walk that was not asked for", reply.id)
            walk.credit -= 1
        if len(reply.entries) > (question.most or MAX_PATHS):
            self._fail(
                f"{len(reply.entries)} entries in a frame of a walk, {question.most} were asked for", reply.id
            )
        given = sum([entry.descriptor for entry in reply.entries])
        if given and not question.descriptors:
            self._fail("a walk that opens files, which was not asked for", reply.id)
        walk.entries += len(reply.entries)
        walk.descriptors += given
        end = reply.end
        if end is not None and (end.entries, end.descriptors) != (walk.entries, walk.descriptors):
            self._fail(
                f"a walk that ends with {end.entries} entries and {end.descriptors} descriptors;"
                f" {walk.entries} and {walk.descriptors} came",
                reply.id,
            )
        return given

    def _encode(self, request_id: int, question: Question) -> bytes:
        if isinstance(question, StatPaths):
            frame = encode_stat(request_id, question.paths, question.client)
        elif isinstance(question, ListPage):
            frame = encode_list(request_id, question.path, question.cookie, question.most, question.client)
        elif isinstance(question, WalkTree):
            frame = _encode_walk(request_id, question)
        elif isinstance(question, ServeListener):
            frame = encode_serve(request_id, question.listener)
        elif isinstance(question, AskWhy):
            frame = encode_explain(request_id, question.action, question.path)
        elif isinstance(question, HandOver):
            frame = encode_reload(request_id, question.offset, question.piece, more=question.more)
        elif isinstance(question, BringFile):
            frame = encode_reopen(request_id, comes=question.comes)
        else:
            # Paths to open are encoded where they are asked for.
            assert isinstance(question, AskStatus)  # noqa: S101 - for the type checker
            frame = encode_status(request_id, question.part, question.row)
        return frame

    def _next_id(self) -> int:
        """Return an id that is free: not 0, which error frames use where an id could not be read."""
        while True:
            self._last_id = self._last_id + 1 if self._last_id < _LAST_ID else 1
            if self._last_id not in self._outstanding and self._last_id not in self._services:
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


def _encode_walk(request_id: int, question: WalkTree) -> bytes:
    return encode_walk(
        request_id,
        question.path,
        question.filter,
        credit=question.credit,
        behind=question.behind,
        descriptors=question.descriptors,
        most=question.most,
        client=question.client,
    )


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
            room, full = max_frame - HEADER.size - CLIENT.size + 1, min(most, max_paths)
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
