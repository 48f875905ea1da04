r"""The record of every decision: JSON lines, ASCII only, one write per request.

A path is text where its bytes are UTF-8, so that `path.encode()` gives them
back; otherwise `path` shows what can be shown and `path_hex` has the bytes.
Everything outside printable ASCII is escaped, so that no name can end a line,
colour a terminal or forge a field.

`run` is random for each start of the broker and `seq` counts its records: a
gap shows. When a write fails or is short the caller gives nothing (unless the
policy says `on_failure: allow`); the next write starts on a new line and ends
with an `audit_failed` record, which tells what to think of the numbers `from` to
`to`: they are missing, or stand there although nothing was given. docs/audit.md
has every record, member by member.
"""

from __future__ import annotations

import fcntl
import os
import stat
from json.encoder import encode_basestring_ascii as quoted
from time import gmtime, strftime, time_ns
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

# Longer ones are refused as paths; their beginning is enough to recognise them.
_MAX_RECORDED_BYTES = 4096
_STANDARD_OUTPUT = 1
_MILLION = 1_000_000
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def quoted_path(path: bytes, most: int = _MAX_RECORDED_BYTES, key: str = '"path":') -> str:
    """Return the JSON members that record `path`, of which the first `most` bytes are kept.

    `key`: what the first one begins with; the others have its name in theirs.
    """
    cut = ""
    if len(path) > most:
        cut = f',"{key[1:-2]}_length":{len(path)}'
        path = path[:most]
    try:
        return key + quoted(path.decode()) + cut
    except UnicodeDecodeError:
        return f'{key}{quoted(path.decode(errors="replace"))},"{key[1:-2]}_hex":"{path.hex()}"{cut}'


class Audit:
    """Writes records to a descriptor that the launcher opened, or that root brought since; owns the latter.

    Without a descriptor nothing is recorded: for benchmarks and trials, and
    `status` says so.
    """

    def __init__(self, descriptor: int | None, *, deny_on_failure: bool, boot: str = "unknown") -> None:
        """`boot` is what tells this boot from others, for the first record of a file."""
        self.run = os.urandom(8).hex()
        self.boot = boot
        self.deny_on_failure = deny_on_failure
        self.failures = 0
        self.events: dict[str, int] = {}  # how many of each, recorded or not
        self._descriptor = descriptor
        self.sequence = 0  # of the next record
        self.on = descriptor is not None
        self._resynchronise = False
        self._lost_from: int | None = None  # the first number of a write that failed
        self._lost_given = False  # whether something was given all the same
        self._prefix = f'{{"run":"{self.run}","seq":'

    def decisions(
        self, requester: str, action: str, paths: Collection[bytes], records: Iterable[str], extra: str = ""
    ) -> bool:
        """Record what was decided for the paths of one request.

        `requester` is JSON members as `member_text` gives them, and so is each
        of `records`, by `decision_members`. Return whether to go on with it.
        """
        if self._descriptor is None:
            return True
        first = self.sequence
        if len(paths) == 1:
            # As below, without what serves many: it is in the time of each request for one file.
            self.sequence = first + 1
            (path,), (record,) = paths, records
            text = (
                f'{self._prefix}{first},"time":"{now_text()}","event":"{action}",{requester},'
                f"{quoted_path(path)}{extra},{record}}}\n"
            )
            return self._write(first, text) or not self.deny_on_failure
        self.sequence = behind = first + len(paths)
        prefix, middle = self._prefix, f',"time":"{now_text()}","event":"{action}",{requester},'
        lines = [
            f"{prefix}{number}{middle}{quoted_path(path)}{extra},{record}}}\n"
            for number, path, record in zip(range(first, behind), paths, records, strict=True)
        ]
        return self._write(first, "".join(lines)) or not self.deny_on_failure

    def event(self, name: str, members: str = "") -> bool:
        """Record something that is not a decision on a path. Return whether it was written."""
        self.events[name] = self.events.get(name, 0) + 1
        if self._descriptor is None:
            return True
        first = self.sequence
        return self._write(first, self._event(name, members))

    def objection_to_reopening(self) -> str | None:
        """Return why the audit can't go on in another file, None if it can."""
        if self._descriptor is None:
            return "there is no audit: name a file in the policy (audit.to), and restart the broker"
        if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
            return "the audit goes to standard output, which is no file: whoever takes it there keeps it"
        return None

    def go_on_in(self, descriptor: int, members: str) -> bool:
        """Write to another file from now on, and that it is so first of all; owned from now on.

        Return whether it is so: where it can't be written, the audit goes on in the file of before.
        """
        old, first = self._descriptor, self.sequence
        self._descriptor = descriptor
        begun = member_text(boot=self.boot, broker_pid=os.getpid())
        if not self._write(first, self._event("reopened", f"{members},{begun}")):
            self._descriptor = old
            os.close(descriptor)
            return False
        if old is not None:
            os.close(old)
        if old == _STANDARD_OUTPUT:
            # What is opened next would have its number.
            self._descriptor = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, old)
            os.close(descriptor)
        return True

    def _event(self, name: str, members: str) -> str:
        sequence, self.sequence = self.sequence, self.sequence + 1
        comma = "," if members else ""
        return f'{self._prefix}{sequence},"time":"{now_text()}","event":{quoted(name)}{comma}{members}}}\n'

    def _write(self, first: int, text: str) -> bool:
        """Write records from number `first` on; say whether they are all there."""
        assert self._descriptor is not None  # noqa: S101 - for the type checker; the callers looked
        if self._lost_from is not None:
            lost = {"from": self._lost_from, "to": first - 1, "given": int(self._lost_given)}
            text += self._event("audit_failed", member_text(**lost))
            if self._resynchronise:
                text = f"\n{text}"
        data = text.encode()
        try:
            written = os.write(self._descriptor, data)
        except OSError:
            written = 0
        if written == len(data):
            if self._lost_from is not None:
                self._resynchronise = self._lost_given = False
                self._lost_from = None
            return True
        self.failures += 1
        self._resynchronise = self._resynchronise or written > 0
        self._lost_given = self._lost_given or not self.deny_on_failure
        if self._lost_from is None:
            self._lost_from = first
        return False


def objection_to_file(descriptor: int) -> str | None:
    """Return why records may not be appended to an open file, None if they may.

    It has to be a regular file of root's with one name that nobody else can write, open for appending alone.
    """
    facts = os.fstat(descriptor)
    if not stat.S_ISREG(facts.st_mode):
        return "is not a regular file"
    if facts.st_uid != 0 or facts.st_nlink != 1 or facts.st_mode & _OTHERS_WRITE:
        return "must belong to root, have one name and be writable by nobody else: move it away"
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    if flags & os.O_ACCMODE != os.O_WRONLY or not flags & os.O_APPEND:
        return "must be open for appending and nothing else"
    return None


def decision_members(reason: str, rule: str | None) -> str:
    """Return the members that say what was decided: `ok` is the one reason to allow."""
    return member_text(decision="allow" if reason == "ok" else "deny", reason=reason, rule=rule)


def member_text(**members: str | int | None) -> str:
    """Return JSON members without braces, in the order given."""
    return ",".join(
        f'"{name}":{value if isinstance(value, int) else "null" if value is None else quoted(value)}'
        for name, value in members.items()
    )


_moment, _moment_text = 0, ""  # when the last millisecond that was asked for began, in nanoseconds; its text


def now_text() -> str:
    """Return the time, as records have it: UTC, to the millisecond. Many records may have the same."""
    global _moment, _moment_text  # noqa: PLW0603 - replaced together
    now = time_ns()
    if not 0 <= now - _moment < _MILLION:
        milliseconds = now // _MILLION
        _moment = milliseconds * _MILLION
        seconds, milliseconds = divmod(milliseconds, 1000)
        _moment_text = f"{strftime('%Y-%m-%dT%H:%M:%S', gmtime(seconds))}.{milliseconds:03d}Z"
    return _moment_text


def failure_text(error: BaseException) -> str:
    """Return what was raised and where, for a report of a bug."""
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    where = "" if at is None else f" at {os.path.basename(at.tb_frame.f_code.co_filename)}:{at.tb_lineno}"
    return f"{error!r}{where}"
