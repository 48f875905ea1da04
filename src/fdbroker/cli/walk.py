"""`fdbroker walk`."""

from __future__ import annotations

import datetime as dt
import hashlib
import os
import re
import sys
import time
from typing import TYPE_CHECKING, Any

import click

from fdbroker.cli import broker
from fdbroker.cli.entries import kind_of, stat_columns, stat_members
from fdbroker.cli.output import (
    complain,
    complain_printable,
    flush,
    path_members,
    write_bytes,
    write_json,
    write_line,
)
from fdbroker.cli.paths import absolute
from fdbroker.cli.progress import WalkProgress
from fdbroker.cli.sizes import size_of_option
from fdbroker.client import BrokerError, WalkInterrupted
from fdbroker.config.names import printable
from fdbroker.config.scalars import parse_duration
from fdbroker.policy.globs import compile_glob
from fdbroker.scan.tree import is_about_the_connection
from fdbroker.wire.format import ANY_TIME, MAX_GLOB, MAX_WALK_GLOBS, Incomplete, WalkKind

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fdbroker.client import Client, WalkedFile, WalkEnd

_LETTERS = {"f": WalkKind.REGULAR, "d": WalkKind.DIRECTORY, "l": WalkKind.SYMLINK, "o": WalkKind.OTHER}
_SECOND = 1_000_000_000  # nanoseconds
_READ_SIZE = 1 << 16  # bytes
# What the end of a walk says is missing: as JSON, and for people.
MISSING = {
    Incomplete.REFUSED: ("refused", "the policy does not let you see or enter something"),
    Incomplete.FAILED: ("failed", "something could not be read (the broker's log may say more)"),
    Incomplete.CHANGED: ("changed", "something moved or went away meanwhile"),
    Incomplete.CROSSES_MOUNT: ("crosses_mount", "other mounts were not entered, or are not served"),
    Incomplete.TOO_LONG: ("too_long", "a path was too long"),
    Incomplete.CANCELLED: ("cancelled", "it was cancelled"),
    Incomplete.LIMIT: ("limit", "a limit of the broker was reached"),
}
_EXIT_NOT_GIVEN = 1
_EXIT_INTERRUPTED = 2
_EXIT_INCOMPLETE = 3
_HELP_OF_TIMES = "write a duration (30s, 5min, 2h, 7d) or a date (2026-01-31, or 2026-01-31T12:00:00, in UTC)"


def _time(_context: click.Context, _parameter: click.Parameter, value: str | None) -> int | None:
    if value is None:
        return None
    try:
        return _moment(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def _moment(text: str) -> int:
    """Return nanoseconds since 1970; ValueError with the cure: neither a duration nor a date."""
    if re.fullmatch("[0-9]+[A-Za-z]*", text):
        moment = time.time_ns() - parse_duration(text) * _SECOND
    else:
        try:
            date = dt.datetime.fromisoformat(text)
        except ValueError:
            raise ValueError(f"{text} is no time; {_HELP_OF_TIMES}") from None
        if date.tzinfo is None:
            date = date.replace(tzinfo=dt.UTC)
        since = date - dt.datetime.fromtimestamp(0, dt.UTC)
        moment = (since.days * 86400 + since.seconds) * _SECOND + since.microseconds * 1000
    if not ANY_TIME <= moment < -ANY_TIME:
        raise ValueError(f"{text} is beyond the times that files have; {_HELP_OF_TIMES}")
    return moment


def _kinds(_context: click.Context, _parameter: click.Parameter, value: str) -> WalkKind:
    kinds = WalkKind(0)
    for letter in value.split(","):
        if letter not in _LETTERS:
            raise click.BadParameter(
                f"{letter!r} is none of f (regular files), d (directories), l (symbolic links),"
                " o (others); several go with commas: f,d"
            )
        kinds |= _LETTERS[letter]
    return kinds


def _globs(_context: click.Context, _parameter: click.Parameter, value: Sequence[str]) -> list[bytes]:
    globs = [os.fsencode(glob) for glob in value]
    if len(globs) > MAX_WALK_GLOBS:
        raise click.BadParameter(f"at most {MAX_WALK_GLOBS} can be given, not {len(globs)}")
    for glob in globs:
        try:
            compile_glob(glob)
        except ValueError as error:
            raise click.BadParameter(f"{os.fsdecode(glob)}: {error}") from error
        if len(glob) > MAX_GLOB:
            raise click.BadParameter(f"{os.fsdecode(glob)}: longer than {MAX_GLOB} bytes")
    return globs


@click.command("walk", short_help="Find files below directories, as far as the policy lets you.")
@click.argument("paths", metavar="PATH...", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option(
    "--glob",
    "globs",
    multiple=True,
    type=click.UNPROCESSED,
    metavar="GLOB",
    callback=_globs,
    help="Only what matches, by its path below PATH, as in the policy: '*.c', '**/*.c'. If given more than"
    " once, one must match.",
)
@click.option(
    "--type",
    "kinds",
    default="f",
    show_default=True,
    metavar="LETTERS",
    callback=_kinds,
    help="Only these: f regular files, d directories, l symbolic links, o others; f,d for several.",
)
@click.option(
    "--min-size",
    "least",
    type=click.UNPROCESSED,
    callback=size_of_option,
    default="0",
    metavar="SIZE",
    help="Only files of at least SIZE, as 10kB or 1MiB.",
)
@click.option(
    "--max-size",
    "most",
    type=click.UNPROCESSED,
    callback=size_of_option,
    metavar="SIZE",
    help="Only files of at most SIZE.",
)
@click.option(
    "--newer-than",
    "newer",
    type=click.UNPROCESSED,
    callback=_time,
    metavar="TIME",
    help="Only what was modified after TIME: a date (2026-01-31, 2026-01-31T12:00:00, in UTC), or how long"
    " ago (30s, 5min, 2h, 7d).",
)
@click.option(
    "-l", "--long", "is_long", is_flag=True, help="Show mode, links, owner, group, size and time (UTC) too."
)
@click.option(
    "--sha256", "with_hash", is_flag=True, help="Read each file and show its SHA-256 before its path."
)
@click.option(
    "-0", "--print0", "raw", is_flag=True, help="End lines by NUL and write paths as they are, for xargs -0."
)
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object per line (see docs/cli.md).")
@broker.socket_option
def command(  # noqa: PLR0913 - as many as there are options
    paths: Sequence[str],
    globs: Sequence[bytes],
    kinds: WalkKind,
    least: int,
    most: int | None,
    newer: int | None,
    socket_path: str,
    *,
    is_long: bool,
    with_hash: bool,
    raw: bool,
    as_json: bool,
) -> int:
    """Find files below directories, as far as the broker's policy lets you see them.

    The broker walks the tree itself and sends what it finds: paths in no
    particular order, a line for each. Symbolic links are not followed. What the
    policy hides is left out; that something was left out is said on standard
    error at the end, and by the exit status.

    \b
    Exit status: 0  everything that the options ask for was named
                 1  a PATH was not given, or a file could not be read (--sha256)
                 2  no broker, wrong use, the output could not be written, or
                    the walk was interrupted
                 3  something is missing: standard error says what kind of thing

    \b
    Examples:  fdbroker walk /srv/upload
               fdbroker walk --glob '**/*.log' --newer-than 24h -l /var/log
               fdbroker walk --sha256 --max-size 100MiB /home
               fdbroker walk -0 /srv | xargs -0 -n1 fdbroker cat
    """  # noqa: D301 - \b is click's mark for a paragraph that keeps its lines
    if with_hash and kinds != WalkKind.REGULAR:
        raise click.UsageError("--sha256 is of regular files: leave --type away.")
    if as_json and (raw or is_long):
        raise click.UsageError("--json has all of it: leave -l and -0 away.")
    if most is not None and least > most:
        raise click.UsageError(f"--min-size {least} is above --max-size {most}: nothing has such a size.")
    starts = [absolute(path) for path in paths]
    show = _json_line if as_json else _line(is_long=is_long, with_hash=with_hash, raw=raw)
    status = 0
    with broker.connect(socket_path) as connected, WalkProgress(wanted=not sys.stdout.isatty()) as progress:
        for start in starts:
            walk = _Walk(connected, start, socket_path, show, progress, with_hash=with_hash)
            found = walk.run(globs=globs, kinds=kinds, least_size=least, most_size=most, newer_than=newer)
            if as_json:
                write_json({"type": "end", **path_members(start), **walk.summary(), "exit_status": found})
            if found == _EXIT_INTERRUPTED:
                return found
            status = min(filter(None, (status, found)), default=0)  # 1 wins over 3
    flush()
    return status


class _Walk:
    """The walk below one start, and what it came to."""

    def __init__(
        self,
        connected: Client,
        start: bytes,
        socket_path: str,
        show: Callable[[WalkedFile, str | None], None],
        progress: WalkProgress,
        *,
        with_hash: bool,
    ) -> None:
        self._connected = connected
        self._start = start
        self._socket_path = socket_path
        self._show = show
        self._progress = progress
        self._with_hash = with_hash
        self._end: WalkEnd | None = None
        self._shown = 0
        self._status = 0

    def run(self, **asked: Any) -> int:  # noqa: ANN401 - as Client.walk takes them
        """Show what there is and return the exit status of that."""
        try:
            with self._connected.walk(self._start, descriptors=self._with_hash, **asked) as walk:
                for entry in walk:
                    with entry:
                        self._show(entry, self._hash(entry) if self._with_hash else None)
                    self._shown += 1
                    self._progress.update(self._shown, entry.stat.size)
                self._end = walk.end
        except BrokerError as error:
            if isinstance(error, WalkInterrupted) or is_about_the_connection(error):
                text = printable(error.strerror or str(error))
                complain_printable(f"{printable(self._start)}: the walk is incomplete: {text}")
                return _EXIT_INTERRUPTED
            complain_printable(broker.refusal(self._start, error, self._socket_path, "walk"))
            return _EXIT_NOT_GIVEN
        except KeyboardInterrupt:
            complain(f"{os.fsdecode(self._start)}: interrupted, so the walk is incomplete")
            return _EXIT_INTERRUPTED
        missing = self._missing()
        if missing:
            complain_printable(
                f"{printable(self._start)}: the walk is incomplete: "
                + "; ".join(MISSING[each][1] for each in missing)
            )
        return self._status or (_EXIT_INCOMPLETE if missing else 0)

    def summary(self) -> dict[str, object]:
        """Return the JSON members of the end; nulls where the walk has none."""
        end = self._end
        return {
            "entries": None if end is None else end.entries,
            "descriptors": None if end is None else end.descriptors,
            "directories": None if end is None else end.directories,
            "incomplete": None if end is None else [MISSING[each][0] for each in self._missing()],
        }

    def _missing(self) -> list[Incomplete]:
        return [] if self._end is None else [each for each in MISSING if each in self._end.incomplete]

    def _hash(self, entry: WalkedFile) -> str | None:
        if entry.is_open:
            try:
                return _sha256(entry.descriptor)
            except OSError as error:
                why = printable(error.strerror or str(error))
        else:
            why = "the policy lets you see it, but not open it"
        complain_printable(f"{printable(os.fsencode(entry.path))}: can't be read: {why}")
        self._status = _EXIT_NOT_GIVEN
        return None


def _sha256(descriptor: int) -> str:
    """Return the sum of a file. Without a file object and its buffer, which cost as much as a small file."""
    digest = hashlib.sha256()
    while data := os.read(descriptor, _READ_SIZE):
        digest.update(data)
    return digest.hexdigest()


def _json_line(entry: WalkedFile, digest: str | None) -> None:
    document: dict[str, object] = {
        "type": "entry",
        **path_members(os.fsencode(entry.path)),
        "kind": kind_of(entry.kind, entry.stat).words,
        **stat_members(entry.stat),
    }
    if digest is not None:
        document["sha256"] = digest
    write_json(document)


def _line(*, is_long: bool, with_hash: bool, raw: bool) -> Callable[[WalkedFile, str | None], None]:
    def show(entry: WalkedFile, digest: str | None) -> None:
        if with_hash and digest is None:
            return  # told already; a line without its sum would be taken for another kind of line
        before = ""
        if is_long:
            mode, links, owner, group, size, moment = stat_columns(entry.kind, entry.stat)
            # Nothing is known of the lines to come, so these are widths that are mostly enough.
            before = f"{mode} {links:>3} {owner:<8} {group:<8} {size:>10} {moment} "
        if digest is not None:
            before += f"{digest}  "
        path = os.fsencode(entry.path)
        if raw:
            write_bytes(before.encode() + path + b"\0")
        else:
            write_line(before + printable(path))

    return show
