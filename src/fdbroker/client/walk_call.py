"""One walk as far as it got, over as many connections as it takes. No I/O.

What is kept is the last entry that was *delivered*: on another connection the
walk goes on behind it, so that nothing is left out and nothing comes twice.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from fdbroker.client.engine import WalkTree, sendable
from fdbroker.client.errors import BrokerError, WalkInterrupted, error_of_reply, error_of_walk
from fdbroker.client.link import Call
from fdbroker.client.results import WalkedFile
from fdbroker.wire.client import WalkReply
from fdbroker.wire.format import (
    ANY_TIME,
    MAX_GLOB,
    MAX_PATHS,
    MAX_WALK_GLOBS,
    NO_SIZE_LIMIT,
    Incomplete,
    Reason,
)
from fdbroker.wire.messages import GIVEN, ErrorReply, WalkEnd, WalkFilter

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable

    from fdbroker.client.engine import Answer, StrOrBytesPath
    from fdbroker.client.link import Link
    from fdbroker.wire.format import WalkKind

_MOST_AHEAD = 0xFFFF  # frames


def walk_filter(
    globs: Iterable[str | bytes],
    kinds: WalkKind,
    least_size: int,
    most_size: int | None,
    newer_than: int | None,
) -> WalkFilter:
    """Return what a walk is to name.

    Raises:
        TypeError: a single glob instead of several.
        ValueError: what no request can carry.

    """
    if isinstance(globs, str | bytes):
        raise TypeError(f"globs are a sequence, not one: {globs!r}")
    patterns = tuple(os.fsencode(glob) for glob in globs)
    if len(patterns) > MAX_WALK_GLOBS:
        raise ValueError(f"a walk has at most {MAX_WALK_GLOBS} globs, not {len(patterns)}")
    for pattern in patterns:
        if not 0 < len(pattern) <= MAX_GLOB or 0 in pattern:
            raise ValueError(f"a glob has 1 to {MAX_GLOB} bytes and no NUL: {pattern!r}")
    if not kinds:
        raise ValueError("a walk of no kind of file")
    most = NO_SIZE_LIMIT if most_size is None else most_size
    if not 0 <= least_size <= most <= NO_SIZE_LIMIT:
        raise ValueError(f"sizes are at least 0, the least ({least_size}) before the most ({most_size})")
    since = ANY_TIME if newer_than is None else newer_than
    if not ANY_TIME <= since < -ANY_TIME:
        raise ValueError(f"a time is in nanoseconds since 1970, in 64 bits, not {newer_than}")
    return WalkFilter(kinds, least_size, most, since, patterns)


class WalkCall(Call):
    """A walk and how far it got; its question changes with each connection.

    Raises:
        ValueError: `batch` is not 1 to 253, or `ahead` not 1 to 65,535.
        PathInvalidError: the path can't be sent.

    """

    __slots__ = (
        "_ahead",
        "_as_text",
        "_behind",
        "_prefix",
        "_resumed",
        "_shown_prefix",
        "descriptors",
        "end",
        "entries",
        "last",
    )

    def __init__(
        self,
        path: StrOrBytesPath,
        asked: WalkFilter,
        *,
        descriptors: bool,
        batch: int,
        ahead: int,
        acting_for: int | None,
        bound: Link | None,
    ) -> None:
        if not 1 <= batch <= MAX_PATHS:
            raise ValueError(f"a batch has 1 to {MAX_PATHS} entries, not {batch}")
        if not 1 <= ahead <= _MOST_AHEAD:
            raise ValueError(f"a walk is 1 to {_MOST_AHEAD} batches ahead, not {ahead}")
        start = sendable(path)
        super().__init__(
            WalkTree(start, asked, descriptors=descriptors, credit=ahead, most=batch, client=acting_for),
            bound,
        )
        self._as_text = isinstance(os.fspath(path), str)
        self._prefix = start.rstrip(b"/") + b"/"
        self._shown_prefix = os.fsdecode(self._prefix)
        self._resumed = 0
        # What was delivered last, below the start, and how much in all.
        self.last = b""
        self.entries = 0
        self.descriptors = 0
        self.end: WalkEnd | None = None

    @property
    def start(self) -> bytes:
        """The directory that the walk began with."""
        assert isinstance(self.question, WalkTree)  # noqa: S101 - for the type checker
        return self.question.path

    @property
    def resumed(self) -> int:
        """How many times it went on on another connection."""
        return self._resumed

    def renew(self) -> None:
        """Go on behind what was delivered last, before the question is sent (again)."""
        if self.id:
            self._resumed += 1
            assert isinstance(self.question, WalkTree)  # noqa: S101 - for the type checker
            self.question = self.question._replace(behind=self.last)

    def deliver(self, answer: Answer) -> None:
        """Take an answer that came: the connection is good for something."""
        self.losses = 0
        super().deliver(answer)

    def entries_of(self, answer: Answer) -> Generator[WalkedFile, None, None]:
        """Yield what came in a frame, each with its descriptor; `end` is set behind the last one.

        Raises:
            WalkInterrupted: it was refused to go on.
            BrokerError: the walk was refused.

        """
        reply = answer.reply
        if isinstance(reply, ErrorReply):
            raise self._refused(error_of_reply(reply, self.start))
        assert isinstance(reply, WalkReply)  # noqa: S101 - for the type checker; the engine matched it
        if reply.result is not GIVEN:
            assert isinstance(self.question, WalkTree)  # noqa: S101 - for the type checker
            has_globs = bool(self.question.filter.globs)
            raise self._refused(error_of_walk(reply.result, self.start, answer.id, has_globs=has_globs))
        take = answer.descriptors.take
        for entry in reply.entries:
            name = entry.path
            self.last = name
            self.entries += 1
            descriptor = -1
            if entry.descriptor:
                descriptor = take()
                self.descriptors += 1
            if self._as_text:
                text = os.fsdecode(name)
                yield WalkedFile(self._shown_prefix + text, text, entry, descriptor)
            else:
                yield WalkedFile(self._prefix + name, name, entry, descriptor)
        if reply.end is not None:
            self.end = self._whole_end(reply.end)

    def interrupted(self, cause: Exception) -> WalkInterrupted:
        """Return the exception for a walk that can't go on; the caller raises it from `cause`."""
        why = cause.strerror if isinstance(cause, OSError) else str(cause)
        where = f"behind {os.fsdecode(self.last)!r}" if self.last else "before its first entry"
        text = f"the walk was cut off {where}, after {self.entries} entries, and can't go on: {why}"
        return WalkInterrupted(
            errno.ECONNRESET,
            text,
            self.start,
            cause.reason if isinstance(cause, BrokerError) else Reason.NONE,
            self.id,
            self.last,
            self.entries,
            self.descriptors,
        )

    def _refused(self, error: Exception) -> Exception:
        if not self._resumed:
            return error
        interrupted = self.interrupted(error)
        interrupted.__cause__ = error
        return interrupted

    def _whole_end(self, said: WalkEnd) -> WalkEnd:
        if not self._resumed:
            return said
        # What the connections that were lost had left out until then was never told.
        missing = said.incomplete | Incomplete.FAILED
        return WalkEnd(self.entries, self.descriptors, said.directories, missing)


class WalkSoFar:
    """What can be asked about a walk at any time. Base of the iterators of both clients."""

    def __init__(self, call: WalkCall) -> None:
        self._call = call

    @property
    def end(self) -> WalkEnd | None:
        """What was named in all and what is missing, once it is exhausted; None: it is not.

        Of a walk that went on on another connection `incomplete` always says
        `FAILED`: what the lost one had left out was never told.
        """
        return self._call.end

    @property
    def last(self) -> bytes:
        """The path, relative to the start, of the entry that was delivered last; empty: none was."""
        return self._call.last

    @property
    def resumed(self) -> int:
        """How many times it went on on another connection."""
        return self._call.resumed
