"""Reading the broker's audit: lines of a file, also while it grows, and what is missing between them."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Mapping
    from typing import BinaryIO

    from fdbroker.policy.globs import Glob

_PAUSE = 0.2  # seconds
_CHUNK = 1 << 16  # bytes


class Line(NamedTuple):
    """One line with its number. `whole` False: the file ends before the line does."""

    number: int
    text: bytes
    whole: bool = True


def read_lines(file: BinaryIO) -> Iterator[Line]:
    """Yield the lines that are there."""
    for number, text in enumerate(file, 1):
        yield Line(number, text.rstrip(b"\n"), text.endswith(b"\n"))


def follow_lines(
    path: str, *, pause: Callable[[], None] = lambda: time.sleep(_PAUSE)
) -> Generator[Line | None]:
    """Yield lines as they are written, for ever, whatever becomes of the file, like `tail -F`.

    A file that is renamed is read to its end before the one that took its
    name; one that is cut to nothing is read from its beginning; one that is
    not there is waited for. None stands where nothing more is there now.

    Raises:
        OSError: it can't be opened for another reason than that it is missing.

    """
    while True:
        try:
            file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed below
        except FileNotFoundError:
            yield None
            pause()
            continue
        with file:
            yield from _follow_one(path, file, pause)


def _follow_one(path: str, file: BinaryIO, pause: Callable[[], None]) -> Generator[Line | None]:
    """Yield the lines of one file until another one has its name."""
    number, partial, ended = 0, b"", False
    while True:
        chunk = file.read(_CHUNK)
        if chunk:
            *lines, partial = (partial + chunk).split(b"\n")
            for text in lines:
                number += 1
                yield Line(number, text)
            continue
        if ended:
            # It was renamed, and nothing was written to it since that was seen.
            if partial:
                yield Line(number + 1, partial, whole=False)
            return
        yield None
        here = os.fstat(file.fileno())
        if here.st_size < file.tell():
            file.seek(0)
            number, partial = 0, b""
            continue
        try:
            there = os.stat(path)
        except FileNotFoundError:
            pause()  # between renaming the old one and making the new one
            continue
        ended = not os.path.samestat(here, there)
        if not ended:
            pause()


class NotARecordError(Exception):
    """The line is no record; the text says why."""


def read_record(line: Line) -> Mapping[str, object]:
    """Return a line as the record that it is.

    Raises:
        NotARecordError: it is none.

    """
    if not line.whole:
        raise NotARecordError("the file ends in the middle of a record")
    try:
        record = json.loads(line.text)
    except (ValueError, RecursionError) as error:
        raise NotARecordError(f"not JSON: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get("event"), str):
        raise NotARecordError("JSON, but no record of the audit")
    return record


def path_of(record: Mapping[str, object]) -> bytes | None:
    """Return the exact bytes of the path in a record (its beginning, if it has `path_length`), or None."""
    exact, path = record.get("path_hex"), record.get("path")
    if isinstance(exact, str):
        try:
            return bytes.fromhex(exact)
        except ValueError:
            return None
    return path.encode(errors="replace") if isinstance(path, str) else None


class Filter(NamedTuple):
    """Which records are wanted. None and False: not asked.

    `denied`: decisions that deny, and what was refused before there was one.
    """

    denied: bool = False
    uid: int | None = None
    glob: Glob | None = None

    def wants(self, record: Mapping[str, object]) -> bool:
        """Return whether all that is asked holds."""
        if self.denied and not _is_denial(record):
            return False
        if self.uid is not None and record.get("uid") != self.uid:
            return False
        if self.glob is None:
            return True
        path = path_of(record)
        return path is not None and self.glob.matches(path.lstrip(b"/").split(b"/"))


def _is_denial(record: Mapping[str, object]) -> bool:
    event = str(record.get("event"))
    if event == "serve":
        return record.get("reason") != "ok"
    # open_refused (the sender is not who connected), client_refused, datagram_refused and so on
    return record.get("decision") == "deny" or event.endswith("_refused")


@dataclass
class Gaps:
    """Sees which records are missing, by their numbers; those before the first one are not looked for."""

    _last: dict[str, int] = field(default_factory=dict)

    def before(self, record: Mapping[str, object]) -> tuple[int, int] | None:
        """Return the first and last number that are missing right before a record, or None."""
        run, number = record.get("run"), record.get("seq")
        if not isinstance(run, str) or not isinstance(number, int):
            return None
        last = self._last.get(run)
        self._last[run] = number
        return None if last is None or number <= last + 1 else (last + 1, number - 1)
