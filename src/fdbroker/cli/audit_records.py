"""Records of the audit: read from lines, picked by what they say, and what is missing between them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, NamedTuple

from fdbroker.policy.paths import components_below

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fdbroker.policy.globs import Glob

_AGO = re.compile(r"(\d{1,6})(s|m|min|h|d|w)")
_UNITS = {"s": "seconds", "m": "minutes", "min": "minutes", "h": "hours", "d": "days", "w": "weeks"}


class Line(NamedTuple):
    """One line with its number. `whole` False: the file ends before the line does.

    `source`: the file, or the journal, that it is of; empty: the only one.
    """

    number: int
    text: bytes
    whole: bool = True
    source: str = ""


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


def moment(text: str) -> str:
    """Return a moment as records have it, to compare their times with: UTC, to the millisecond.

    `10min` (or `10m`), `2h`, `3d`, `1w`: so long ago. Otherwise a date, with or without a time of day, in
    UTC unless it says another zone (`2026-11-24 09:30+01:00`).

    Raises:
        ValueError: neither.

    """
    ago = _AGO.fullmatch(text)
    if ago is not None:
        when = datetime.now(UTC) - timedelta(**{_UNITS[ago[2]]: int(ago[1])})
    else:
        when = datetime.fromisoformat(text)
        when = when.replace(tzinfo=UTC) if when.tzinfo is None else when.astimezone(UTC)
    return f"{when:%Y-%m-%dT%H:%M:%S}.{when.microsecond // 1000:03d}Z"


class Filter(NamedTuple):
    """Which records are wanted: all that is asked must hold. None and False: not asked.

    `denied`: decisions that deny, and what was refused before there was one. `uid`: of who asked;
    `for_uid`: of the client that a service asked for. `below`: the path, or what is below it.
    `since`, `until`: as `moment` gives them, the first inclusive, the second exclusive.
    """

    denied: bool = False
    uid: int | None = None
    for_uid: int | None = None
    glob: Glob | None = None
    below: bytes | None = None
    event: str | None = None
    decision: str | None = None
    rule: str | None = None
    reason: str | None = None
    request: int | None = None
    connection: int | None = None
    since: str | None = None
    until: str | None = None

    def wants(self, record: Mapping[str, object]) -> bool:
        """Return whether all that is asked holds."""
        if self.denied and not _is_denial(record):
            return False
        for name in _EQUAL:
            wanted = getattr(self, name)
            if wanted is not None and record.get(name) != wanted:
                return False
        time = str(record.get("time"))
        if (self.since is not None and time < self.since) or (self.until is not None and time >= self.until):
            return False
        if self.glob is None and self.below is None:
            return True
        path = path_of(record)
        if path is None or (self.below is not None and not _is_below(path, self.below)):
            return False
        return self.glob is None or self.glob.matches(path.lstrip(b"/").split(b"/"))


_EQUAL = ("uid", "for_uid", "event", "decision", "rule", "reason", "request", "connection")


def _is_below(path: bytes, start: bytes) -> bool:
    return components_below(start.rstrip(b"/") or b"/", path) is not None


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
