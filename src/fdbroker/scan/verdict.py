"""What a scan says of a file.

`Clean` needs the explicit answer of an engine that was given the whole file
within its limits. Everything else that is not `Infected` is an `Error`, and an
error is never shown or counted as clean.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable


class Reason(StrEnum):
    """Why nobody knows: all that an `Error` can have. docs/scanning.md says what each means."""

    # The engine had the file, and did not get through it.
    TOO_LARGE = "too_large"
    LIMIT_EXCEEDED = "limit_exceeded"
    UNSCANNABLE_ENCRYPTED = "unscannable_encrypted"
    UNSCANNABLE_CONTAINER = "unscannable_container"
    SCRATCH_FULL = "scratch_full"
    MEMORY = "memory"
    ENGINE_FAILED = "engine_failed"
    UNKNOWN_ANSWER = "unknown_answer"
    # The file was not what it was said to be, or did not stay so.
    READ_FAILED = "read_failed"
    SHORT_READ = "short_read"
    CHANGED = "changed"
    NOT_READABLE = "not_readable"
    # Whoever had the file is gone.
    TIMED_OUT = "timed_out"
    CRASHED = "crashed"
    KILLED = "killed"
    FORBIDDEN_CALL = "forbidden_call"
    # Nobody had it.
    NOT_LOADED = "not_loaded"
    CANCELLED = "cancelled"
    # The broker did not give it: its reasons, as docs/protocol.md has them (two are above).
    DENIED = "denied"
    PATH_INVALID = "path_invalid"
    NOT_FOUND = "not_found"
    NOT_DIRECTORY = "not_directory"
    NOT_REGULAR = "not_regular"
    SYMLINK = "symlink"
    CROSSES_MOUNT = "crosses_mount"
    MOUNT_NOT_READ_ONLY = "mount_not_read_only"
    FILESYSTEM = "filesystem"
    BUSY = "busy"
    IDENTITY = "identity"
    LIMIT = "limit"
    AUDIT = "audit"
    BROKEN = "broken"
    MALFORMED = "malformed"
    VERSION = "version"
    POLICY = "policy"
    # The broker did not answer as it should.
    BROKER_GONE = "broker_gone"


LONGEST_NAME = 255
LONGEST_TEXT = 500
MOST_NAMES = 16


@dataclass(frozen=True)
class Clean:
    """The engine was given the whole file, within its limits, and knows nothing against it."""

    verdict: Literal["clean"] = "clean"


@dataclass(frozen=True)
class Infected:
    """The engine found what is called `name`, and what `more` has besides.

    Raises:
        ValueError: a name is empty, longer than 255 characters or not
            printable, or there are more than 16.

    """

    name: str
    more: tuple[str, ...] = ()
    verdict: Literal["infected"] = "infected"

    def __post_init__(self) -> None:
        """Refuse what could not be shown."""
        if len(self.more) >= MOST_NAMES:
            raise ValueError(f"more than {MOST_NAMES} names")
        for name in (self.name, *self.more):
            if not name or len(name) > LONGEST_NAME or not name.isprintable():
                raise ValueError(f"not a name of something that was found: {name[:LONGEST_NAME]!a}")


@dataclass(frozen=True)
class Error:
    """Nobody knows. `text` is a sentence for people; what can't be printed, or is too much, is left out."""

    reason: Reason
    text: str
    verdict: Literal["error"] = "error"

    def __post_init__(self) -> None:
        """Make the text one line that can be shown."""
        text = self.text
        if len(text) > LONGEST_TEXT or not text.isprintable():
            text = "".join(one if one.isprintable() else " " for one in text[:LONGEST_TEXT]).strip()
            object.__setattr__(self, "text", text)


Verdict = Clean | Infected | Error


class Answer(NamedTuple):
    """The verdict of one engine, by its name."""

    engine: str
    verdict: Verdict


def found(names: Iterable[str]) -> Infected | Error:
    """Return `Infected` with what an engine found, in whatever bytes it has named it.

    Each name once, at most 16; what is not printable in a name is shown as `?`. Without a single name the
    answer means nothing, and is an error.
    """
    shown: dict[str, None] = {}
    for name in names:
        text = "".join(one if one.isprintable() else "?" for one in name[:LONGEST_NAME]).strip()
        if text and len(shown) < MOST_NAMES:
            shown.setdefault(text)
    if not shown:
        return Error(Reason.UNKNOWN_ANSWER, "the engine found something and did not say what")
    first, *more = shown
    return Infected(first, tuple(more))


def worst(answers: Iterable[Answer]) -> Verdict:
    """Return the one verdict on a file that several engines have answered for.

    A finding outweighs an error, an error outweighs clean; of two errors the first one stands. What other
    engines found is added to `more`. No answer at all is an error.
    """
    verdicts = [answer.verdict for answer in answers]
    if len(verdicts) == 1 and not isinstance(verdicts[0], Infected):
        return verdicts[0]
    names: dict[str, None] = {}
    for verdict in verdicts:
        if isinstance(verdict, Infected):
            names |= dict.fromkeys((verdict.name, *verdict.more))
    if names:
        return found(names)
    for verdict in verdicts:
        if isinstance(verdict, Error):
            return verdict
    if not verdicts:
        return Error(Reason.NOT_LOADED, "no engine was asked")
    return Clean()
