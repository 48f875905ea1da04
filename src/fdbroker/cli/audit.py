"""`fdbroker audit`."""

from __future__ import annotations

import os
import pwd
import stat
import sys
from collections import deque
from typing import TYPE_CHECKING

import click

from fdbroker.cli.audit_file import (
    Filter,
    Gaps,
    Line,
    NotARecordError,
    follow_lines,
    path_of,
    read_lines,
    read_record,
)
from fdbroker.cli.failure import Failure
from fdbroker.cli.output import coloured, complain_printable, write_json, write_line
from fdbroker.config.names import id_of_number, is_number, printable, user_name, user_text
from fdbroker.policy.globs import Glob, compile_glob

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

DEFAULT_FILE = "/var/log/fdbroker/audit.jsonl"
_LINES_WHEN_FOLLOWING = 10
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
# Told in words of their own, or of no interest to people.
_TOLD = frozenset(
    {"run", "seq", "time", "event", "connection", "socket", "request", "identity", "gid", "generation"}
    | {"pid", "uid", "path", "path_hex", "path_length", "decision", "reason", "rule"}
)


@click.command("audit", short_help="Read the record of every decision.")
@click.argument("file", default=DEFAULT_FILE, type=click.UNPROCESSED)
@click.option("-f", "--follow", is_flag=True, help="Go on with what is written, also after a rotation.")
@click.option("--denied", is_flag=True, help="Only what was denied or refused.")
@click.option(
    "--path",
    "pattern",
    metavar="GLOB",
    help="Only these paths; a glob as in the policy, for the whole path (/home/**/*.key) or, without a '/',"
    " for the name (*.key).",
)
@click.option("--uid", "user", metavar="USER", help="Only what this user asked for, by number or name.")
@click.option(
    "-n",
    "--lines",
    "count",
    type=click.IntRange(0),
    metavar="N",
    help=f"Only the last N of these.  [default: all; with --follow {_LINES_WHEN_FOLLOWING}]",
)
@click.option(
    "--json", "as_json", is_flag=True, help="Write the records as they are, one JSON object per line."
)
def command(
    file: str,
    pattern: str | None,
    user: str | None,
    count: int | None,
    *,
    follow: bool,
    denied: bool,
    as_json: bool,
) -> int:
    """Show the broker's record of every decision: time, who, what, which path, the decision and why.

    FILE is where the policy says that the audit goes (audit: {to: FILE}); without it
    /var/log/fdbroker/audit.jsonl; - is standard input. Records that are missing
    (their numbers have a gap), lines that are none, and a file that others than
    root can write are told on standard error.

    \b
    Exit status: 0  shown
                 1  shown, but records are missing or could not be read
                 2  the file can't be read, wrong use, or the output could not be written

    \b
    Examples:  fdbroker audit --denied -n 20
               fdbroker audit --follow --uid scanner --path '/home/**'
               fdbroker audit --json | jq -r 'select(.event == "reloaded")'
    """  # noqa: D301 - \b is click's mark for a paragraph that keeps its lines
    wanted = Filter(denied, _uid(user), _glob(pattern))
    shown = _Shown(printable(file), wanted, as_json=as_json)
    if follow and file == "-":
        raise click.UsageError("standard input is read to its end anyway; --follow is for a file")
    _warn_of_others(file)
    try:
        if follow:
            _follow(file, shown, _LINES_WHEN_FOLLOWING if count is None else count)
        elif file == "-":
            shown.all(read_lines(sys.stdin.buffer), count)
        else:
            with open(file, "rb") as opened:
                shown.all(read_lines(opened), count)
    except OSError as error:
        raise Failure(_unreadable(file, error)) from error
    return shown.status


def _warn_of_others(file: str) -> None:
    """Say who else than root can have written a file. Whoever started this knows what is his own."""
    try:
        status = os.stat(file)
    except OSError:
        return  # said where it is opened, or there is none yet
    if not stat.S_ISREG(status.st_mode):
        return
    if status.st_uid not in {0, os.geteuid()}:
        found = f"belongs to {printable(user_name(status.st_uid))}"
    elif status.st_mode & _OTHERS_WRITE:
        found = f"has mode 0{stat.S_IMODE(status.st_mode):03o}"
    else:
        return
    complain_printable(f"{printable(file)}: {found}, so others than root can have written what it says")


def _follow(file: str, shown: _Shown, count: int) -> None:
    """Show the last `count` records, and then each as it comes, until an interrupt."""
    last: deque[Mapping[str, object]] | None = deque(maxlen=count)
    try:
        for line in follow_lines(file):
            if line is None:
                # What was there has been read.
                for record in last or ():
                    shown.write(record)
                last = None
                continue
            wanted = shown.read(line)
            if wanted is not None and last is None:
                shown.write(wanted)
            elif wanted is not None and last is not None:
                last.append(wanted)
    except KeyboardInterrupt:
        return  # the way to end it


class _Shown:
    """Writes records that are wanted, and notes what could not be read."""

    def __init__(self, name: str, wanted: Filter, *, as_json: bool) -> None:
        self._name = name
        self._wanted = wanted
        self._as_json = as_json
        self._gaps = Gaps()
        self.status = 0

    def all(self, lines: Iterable[Line], count: int | None) -> None:
        """Show the records of lines that come to an end, or the last of them."""
        records = (record for record in map(self.read, lines) if record is not None)
        for record in records if count is None else deque(records, maxlen=count):
            self.write(record)

    def read(self, line: Line) -> Mapping[str, object] | None:
        """Return a record that is wanted, None for anything else."""
        if not line.text.strip():
            return None  # what the broker begins anew with, after a write that was cut short
        try:
            record = read_record(line)
        except NotARecordError as error:
            complain_printable(f"{self._name}:{line.number}: {printable(str(error))}")
            self.status = 1
            return None
        missing = self._gaps.before(record)
        if missing is not None:
            run = printable(str(record.get("run")))
            complain_printable(
                f"{self._name}:{line.number}: records {missing[0]} to {missing[1]} of run {run} are missing"
            )
            self.status = 1
        return record if self._wanted.wants(record) else None

    def write(self, record: Mapping[str, object]) -> None:
        """Show one record."""
        if self._as_json:
            write_json(record)
        else:
            write_line(_line(record))


def _line(record: Mapping[str, object]) -> str:
    """Return a record as a line for people."""
    parts = [_time(record)]
    decision = record.get("decision")
    if decision is not None:
        text = printable(str(decision)).upper().ljust(5)
        parts.append(coloured(text, "red" if decision == "deny" else "green"))
    parts.append(printable(str(record["event"])))
    uid = record.get("uid")
    if isinstance(uid, int):
        parts.append(f"user {printable(user_text(uid))}")
    if "pid" in record:
        parts.append(f"pid {printable(str(record['pid']))}")
    path = path_of(record)
    if path is not None:
        parts.append(printable(path) + ("..." if "path_length" in record else ""))
    if record.get("reason") is not None:
        parts.append(printable(str(record["reason"])))
    if record.get("rule") is not None:
        parts.append(f"rule {printable(str(record['rule']))}")
    parts += [f"{printable(key)}={printable(str(record[key]))}" for key in record if key not in _TOLD]
    return "  ".join(parts)


def _time(record: Mapping[str, object]) -> str:
    """Return the time to the second, in UTC as it is recorded."""
    date, _, clock = str(record.get("time", "?")).partition("T")
    return printable(f"{date} {clock.partition('.')[0]}Z")


def _uid(user: str | None) -> int | None:
    if user is None:
        return None
    try:
        uid = id_of_number(user) if is_number(user) else pwd.getpwnam(user).pw_uid
    except (KeyError, ValueError):  # the latter for a NUL
        uid = None
    if uid is None:
        raise click.UsageError(f"--uid {user}: there is no such user")
    return uid


def _glob(pattern: str | None) -> Glob | None:
    if pattern is None:
        return None
    absolute = pattern if "/" in pattern else f"/**/{pattern}"
    if not absolute.startswith("/"):
        raise click.UsageError("--path: begin with '/', or give a name without any, as in '*.key'")
    try:
        return compile_glob(absolute[1:].encode(errors="surrogateescape"))
    except ValueError as error:
        raise click.UsageError(f"--path: {error}") from error


def _unreadable(file: str, error: OSError) -> str:
    text = f"{printable(file)}: can't be read: {error.strerror}."
    if isinstance(error, FileNotFoundError):
        return (
            f"{text} The policy says where the audit goes (audit: {{to: FILE}}); if it does not, it is the"
            " standard output of fdbrokerd."
        )
    if isinstance(error, PermissionError):
        return f"{text} It says who asked for which file, so it is for root; run this as root."
    return text
