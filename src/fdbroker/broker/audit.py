r"""The record of every decision: JSON lines, ASCII only, one write per request.

A path is text where its bytes are UTF-8, so that `path.encode()` gives them
back; otherwise `path` shows what can be shown and `path_hex` has the bytes.
Everything outside printable ASCII is escaped, so that no name can end a line,
colour a terminal or forge a field.

`run` is random for each start of the broker and `seq` counts its records: a
gap shows. When a write fails or is short the caller gives nothing (unless the
policy says `on_failure: allow`); the next write starts on a new line and ends
with an `audit_failed` record, which tells what to think of the numbers `from` to
`to`: they are missing, or stand there although nothing was given.
"""

from __future__ import annotations

import os
import time
from json.encoder import encode_basestring_ascii as quoted
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

# Longer ones are refused as paths; their beginning is enough to recognise them.
_MAX_RECORDED_BYTES = 4096


def quoted_path(path: bytes, most: int = _MAX_RECORDED_BYTES, name: str = "path") -> str:
    """Return the JSON members, called `name` and so on, that record `path`: its first `most` bytes."""
    cut = ""
    if len(path) > most:
        cut = f',"{name}_length":{len(path)}'
        path = path[:most]
    try:
        return f'"{name}":{quoted(path.decode())}{cut}'
    except UnicodeDecodeError:
        return f'"{name}":{quoted(path.decode(errors="replace"))},"{name}_hex":"{path.hex()}"{cut}'


class Audit:
    """Writes records to a descriptor that the launcher opened; owns nothing.

    Without a descriptor nothing is recorded: for benchmarks and trials, and
    `status` says so.
    """

    def __init__(self, descriptor: int | None, *, deny_on_failure: bool) -> None:
        self.run = os.urandom(8).hex()
        self.deny_on_failure = deny_on_failure
        self.failures = 0
        self._descriptor = descriptor
        self.sequence = 0  # of the next record
        self.on = descriptor is not None
        self._resynchronise = False
        self._lost_from: int | None = None  # the first number of a write that failed
        self._prefix = f'{{"run":"{self.run}","seq":'

    def decisions(
        self, requester: str, action: str, paths: Sequence[bytes], records: Iterable[str], extra: str = ""
    ) -> bool:
        """Record what was decided for the paths of one request.

        `requester` is JSON members as `member_text` gives them, and so is each
        of `records`, by `decision_members`. Return whether to go on with it.
        """
        if self._descriptor is None:
            return True
        prefix, first = self._prefix, self.sequence
        self.sequence = behind = first + len(paths)
        middle = f',"time":"{now_text()}","event":"{action}",{requester},'
        lines = [
            f"{prefix}{number}{middle}{quoted_path(path)}{extra},{record}}}\n"
            for number, path, record in zip(range(first, behind), paths, records, strict=True)
        ]
        return self._write(first, "".join(lines)) or not self.deny_on_failure

    def event(self, name: str, members: str = "") -> bool:
        """Record something that is not a decision on a path. Return whether it was written."""
        if self._descriptor is None:
            return True
        first = self.sequence
        return self._write(first, self._event(name, members))

    def _event(self, name: str, members: str) -> str:
        sequence, self.sequence = self.sequence, self.sequence + 1
        comma = "," if members else ""
        return f'{self._prefix}{sequence},"time":"{now_text()}","event":{quoted(name)}{comma}{members}}}\n'

    def _write(self, first: int, text: str) -> bool:
        """Write records from number `first` on; say whether they are all there."""
        assert self._descriptor is not None  # noqa: S101 - for the type checker; the callers looked
        if self._lost_from is not None:
            lost = {"from": self._lost_from, "to": first - 1, "given": int(not self.deny_on_failure)}
            text += self._event("audit_failed", member_text(**lost))
        data = text.encode("ascii")
        if self._resynchronise:
            data = b"\n" + data
        try:
            written = os.write(self._descriptor, data)
        except OSError:
            written = 0
        if written == len(data):
            self._resynchronise = False
            self._lost_from = None
            return True
        self.failures += 1
        self._resynchronise = self._resynchronise or written > 0
        if self._lost_from is None:
            self._lost_from = first
        return False


def decision_members(reason: str, rule: str | None) -> str:
    """Return the members that say what was decided: `ok` is the one reason to allow."""
    return member_text(decision="allow" if reason == "ok" else "deny", reason=reason, rule=rule)


def member_text(**members: str | int | None) -> str:
    """Return JSON members without braces, in the order given."""
    return ",".join(
        f'"{name}":{value if isinstance(value, int) else "null" if value is None else quoted(value)}'
        for name, value in members.items()
    )


_second = (0, "")  # the text of the last second that was asked for


def now_text() -> str:
    """Return the time, as records have it: UTC, to the microsecond."""
    global _second  # noqa: PLW0603 - one value, replaced whole
    seconds, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
    if seconds != _second[0]:
        _second = seconds, time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{_second[1]}.{nanoseconds // 1000:06d}Z"


def failure_text(error: BaseException) -> str:
    """Return what was raised and where, for a report of a bug."""
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    where = "" if at is None else f" at {os.path.basename(at.tb_frame.f_code.co_filename)}:{at.tb_lineno}"
    return f"{error!r}{where}"
