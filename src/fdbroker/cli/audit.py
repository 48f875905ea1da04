"""`fdbroker audit`: read, verify, reopen, schema."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import stat
import sys
from collections import deque
from typing import TYPE_CHECKING

import click

from fdbroker.cli import audit_schema, broker
from fdbroker.cli.audit_file import follow_lines, lines_of, read_lines, with_rotated
from fdbroker.cli.audit_records import Filter, Gaps, NotARecordError, moment, path_of, read_record
from fdbroker.cli.control import connected
from fdbroker.cli.failure import Failure
from fdbroker.cli.group import SuggestingGroup
from fdbroker.cli.output import coloured, complain_printable, write_json, write_line
from fdbroker.cli.policy_file import load
from fdbroker.client import BrokerError
from fdbroker.config import DEFAULT_POLICY
from fdbroker.config.errors import did_you_mean
from fdbroker.config.names import counted, id_of_number, is_number, printable, user_name, user_text
from fdbroker.policy.globs import Glob, compile_glob

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from typing import Any

    from fdbroker.cli.audit_records import Line
    from fdbroker.cli.audit_verify import Finding

DEFAULT_FILE = "/var/log/fdbroker/audit.jsonl"
DEFAULT_UNIT = broker.SERVICE
EXIT_NOT_ACCOUNTED_FOR = 3
_LINES_WHEN_FOLLOWING = 10
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
# Told in words of their own, or of no interest to people.
_TOLD = frozenset(
    {"run", "seq", "time", "event", "connection", "socket", "request", "identity", "gid", "generation"}
    | {"pid", "uid", "path", "path_hex", "path_length", "decision", "reason", "rule"}
)


class _Commands(SuggestingGroup):
    """Reads where no other command is named, so that `fdbroker audit FILE` does."""

    default_command = "read"

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] not in {"-h", "--help"}):
            args = [self.default_command, *args]
        return super().parse_args(ctx, args)


@click.group("audit", cls=_Commands, short_help="Read and verify the record of every decision.")
def command() -> None:
    """Read and verify the broker's record of every decision, or move it to another file.

    Without a command it is read: fdbroker audit --denied is fdbroker audit read --denied.

    docs/audit.md says what the records are. All options of reading: fdbroker audit read --help.

    \b
    Examples:  fdbroker audit --denied -n 20
               fdbroker audit --follow --uid scanner
               fdbroker audit verify --rotated
    """  # noqa: D301 - \b is click's mark for a paragraph that keeps its lines


def _sources(function: Callable[..., int]) -> Callable[..., int]:
    """Add the options that say where the audit is."""
    for option in (
        click.argument("files", metavar="[FILE]...", nargs=-1, type=click.UNPROCESSED),
        click.option(
            "--rotated",
            is_flag=True,
            help="Also what FILE was rotated to (FILE.1, FILE.2.gz, ...), the oldest first.",
        ),
        click.option("--journal", is_flag=True, help="In the journal of systemd instead of in a file."),
        click.option(
            "--unit",
            metavar="UNIT",
            help=f"Only what this unit wrote to the journal.  [default: {DEFAULT_UNIT}]",
        ),
        click.option(
            "--journal-directory",
            "directory",
            metavar="DIR",
            help="The journal whose files are there, as of another machine.",
        ),
    ):
        function = option(function)
    return function


class _Source:
    """Where the audit is: files, standard input or the journal."""

    def __init__(
        self, files: Sequence[str], unit: str | None, directory: str | None, *, rotated: bool, journal: bool
    ) -> None:
        self.unit = unit or DEFAULT_UNIT
        self.directory = directory
        self.journal = journal or unit is not None or directory is not None
        if self.journal and (files or rotated):
            raise click.UsageError("files or the journal, not both")
        self.files = list(files)
        if not self.journal and not files:
            file = _usual_file()
            self.files = [file]
            if not rotated and _is_in_the_journal(file):
                self.journal = True
                complain_printable(f"there is no {printable(file)}; this is the journal of {self.unit}")
        if rotated:
            with _readable(self.files[0]):
                self.files = [path for file in self.files for path in with_rotated(file)]

    def lines(self) -> Iterator[Line]:
        """Yield all that is there now."""
        if self.journal:
            for line in self._of_journal(follow=False):
                if line is not None:
                    yield line
            return
        for file in self.files:
            with _readable(file):
                if file == "-":
                    yield from read_lines(sys.stdin.buffer, "-")
                    continue
                _warn_of_others(file)
                with lines_of(file) as lines:
                    yield from lines

    def follow(self) -> Iterator[Line | None]:
        """Yield what is there now, None, and then for ever what comes."""
        if self.journal:
            yield from self._of_journal(follow=True)
            return
        *older, file = self.files
        if file == "-":
            raise click.UsageError("standard input is read to its end anyway; --follow is for a file")
        self.files = older
        yield from self.lines()
        _warn_of_others(file)
        with _readable(file):
            for line in follow_lines(file):
                yield None if line is None else line._replace(source=printable(file))

    def _of_journal(self, *, follow: bool) -> Iterator[Line | None]:
        try:
            from fdbroker.cli.audit_journal import journal_lines  # noqa: PLC0415 - of another extra
        except ModuleNotFoundError as missing:
            raise Failure("the journal needs systemd-python: pip install 'fdbroker[daemon]'") from missing
        try:
            yield from journal_lines(self.unit, directory=self.directory, follow=follow)
        except OSError as error:
            raise Failure(
                f"the journal can't be read: {error.strerror or error}; run this as root, or see to"
                " --journal-directory"
            ) from error


def _usual_file() -> str:
    """Return the file that the policy names for the audit, the usual one where that can't be seen."""
    if not os.access(DEFAULT_POLICY, os.R_OK):
        return DEFAULT_FILE  # as for who is not root, whom an audit is not for
    try:
        named = load(DEFAULT_POLICY)["daemon"]["audit"]
    except ModuleNotFoundError:
        return DEFAULT_FILE  # what reads YAML is another extra
    except Failure as failure:
        first = failure.message.partition("\n")[0]
        complain_printable(
            f"where the policy has the audit go can't be read, so {DEFAULT_FILE} is taken: {first}"
        )
        return DEFAULT_FILE
    return named or DEFAULT_FILE


def _is_in_the_journal(file: str) -> bool:
    """Return whether the broker is a service whose audit goes to no file, as its unit comes."""
    try:
        os.stat(file)
    except FileNotFoundError:
        return broker.is_a_service()
    except OSError:
        pass  # it is there, and whoever reads it is told why that fails
    return False


@contextlib.contextmanager
def _readable(file: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Failure(_unreadable(file, error)) from error


@command.command("read", short_help="Show the records, or some of them.")
@_sources
@click.option("-f", "--follow", is_flag=True, help="Go on with what is written, also after a rotation.")
@click.option("--denied", is_flag=True, help="Only what was denied or refused.")
@click.option("--decision", type=click.Choice(["allow", "deny"]), help="Only what was decided so.")
@click.option("--event", metavar="EVENT", help="Only this action (open, stat, list, walk) or other event.")
@click.option(
    "--path",
    "pattern",
    metavar="GLOB",
    help="Only these paths; a glob as in the policy, for the whole path (/home/**/*.key) or, without a '/',"
    " for the name (*.key).",
)
@click.option("--below", metavar="PATH", type=click.UNPROCESSED, help="Only this path and what is below it.")
@click.option("--uid", "user", metavar="USER", help="Only what this user asked for, by number or name.")
@click.option(
    "--for", "for_user", metavar="USER", help="Only what a service asked for on behalf of this user."
)
@click.option("--rule", metavar="NAME", help="Only what this rule decided.")
@click.option("--reason", metavar="REASON", help="Only what was decided or refused for this reason.")
@click.option("--request", type=int, metavar="N", help="Only the request with this number; see --connection.")
@click.option("--connection", type=int, metavar="N", help="Only what was asked on this connection.")
@click.option("--since", metavar="TIME", help="Only from then on: 10min, 2h, 3d ago, or date and time (UTC).")
@click.option("--until", metavar="TIME", help="Only what was before.")
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
def read(  # noqa: PLR0913 - one for each option
    files: tuple[str, ...],
    unit: str | None,
    directory: str | None,
    count: int | None,
    *,
    rotated: bool,
    journal: bool,
    follow: bool,
    as_json: bool,
    **asked: Any,  # noqa: ANN401 - click's, of a filter
) -> int:
    """Show the broker's record of every decision: time, who, what, which path, the decision and why.

    Without FILE it is where /etc/fdbroker/policy.yaml says that the audit goes (audit:
    {to: FILE}), else /var/log/fdbroker/audit.jsonl or, where that is not and systemd
    starts the broker, the journal; - is standard input. Compressed files are read as well. Records that
    are missing (their numbers have a gap), lines that are none, and a file that others
    than root can write are told on standard error.

    \b
    Exit status: 0  shown
                 1  shown, but records are missing or could not be read
                 2  the file can't be read, wrong use, or the output could not be written

    \b
    Examples:  fdbroker audit --denied -n 20
               fdbroker audit --follow --uid scanner --path '/home/**'
               fdbroker audit --journal --since 2h --rule never-keys
               fdbroker audit --json | jq -r 'select(.event == "reloaded")'
    """  # noqa: D301 - \b is click's mark for a paragraph that keeps its lines
    wanted = _filter(**asked)
    if wanted.event is not None and wanted.event not in audit_schema.EVENTS:
        cure = did_you_mean(wanted.event, audit_schema.EVENTS, "fdbroker audit schema has all")
        complain_printable(f"--event {wanted.event}: this version knows no such event; {cure}")
    source = _Source(files, unit, directory, rotated=rotated, journal=journal)
    shown = _Shown(wanted, as_json=as_json)
    if follow:
        _follow(source, shown, _LINES_WHEN_FOLLOWING if count is None else count)
    else:
        shown.all(source.lines(), count)
    return shown.status


def _filter(
    *,
    denied: bool,
    pattern: str | None,
    below: str | None,
    user: str | None,
    for_user: str | None,
    since: str | None,
    until: str | None,
    **equal: Any,  # noqa: ANN401 - as above
) -> Filter:
    return Filter(
        denied=denied,
        uid=_uid(user, "--uid"),
        for_uid=_uid(for_user, "--for"),
        glob=_glob(pattern),
        below=None if below is None else os.fsencode(below),
        since=_moment(since, "--since"),
        until=_moment(until, "--until"),
        **equal,
    )


def _moment(text: str | None, option: str) -> str | None:
    if text is None:
        return None
    try:
        return moment(text)
    except (ValueError, OverflowError) as error:
        raise click.UsageError(
            f"{option} {text}: write how long ago (10min, 2h, 3d), or a date and time (2026-11-24 09:30)"
        ) from error


@command.command("verify", short_help="Find what is missing, damaged, out of order or twice.")
@_sources
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object with all that was found.")
def verify(
    files: tuple[str, ...],
    unit: str | None,
    directory: str | None,
    *,
    rotated: bool,
    journal: bool,
    as_json: bool,
) -> int:
    """Find what is wrong with an audit: records that are missing, damaged, out of order, twice; mixed boots.

    FILE as in reading; give all files of an audit in the order in which they were
    written, or the one in use with --rotated.

    What nobody can find in the records alone: that the last ones were removed, since
    nothing tells how many there were (fdbroker status shows the number of the next
    one), or the oldest files; and what root, who can write the file, made up with
    right numbers. Send the records to another machine where that matters.

    \b
    Exit status: 0  nothing is wrong
                 1  records are missing or cut short, and the broker itself says
                    that it could not write them
                 2  it can't be read, wrong use, or the output could not be written
                 3  something is wrong that nobody accounts for

    \b
    Examples:  fdbroker audit verify --rotated
               fdbroker audit verify --journal --json
    """  # noqa: D301 - \b is click's mark for a paragraph that keeps its lines
    from fdbroker.cli.audit_verify import Verifier  # noqa: PLC0415 - only here

    verifier = Verifier()
    for line in _Source(files, unit, directory, rotated=rotated, journal=journal).lines():
        verifier.add(line)
    findings = verifier.findings()
    status = 0
    if findings:
        status = 1 if all(finding.told for finding in findings) else EXIT_NOT_ACCOUNTED_FOR
    if as_json:
        found = [finding._asdict() for finding in findings]
        document: dict[str, object] = {"records": verifier.records, "runs": verifier.runs}
        write_json(document | {"findings": found, "notes": verifier.notes, "exit_status": status})
        return status
    for note in verifier.notes:
        write_line(note)
    for finding in findings:
        write_line(_shown_finding(finding))
    counts = f"{counted(verifier.records, 'record')} of {counted(verifier.runs, 'run')}"
    verdict = ("nothing is wrong", "all that is wrong is told by the broker", "", "see above")[status]
    write_line(f"{counts}: {verdict}")
    return status


def _shown_finding(finding: Finding) -> str:
    kind = coloured(finding.kind.upper().ljust(7), "yellow" if finding.told else "red")
    return f"{kind}  {finding.place}  {finding.text}"


@command.command("reopen", short_help="Have the broker go on in a new file, as root.")
@click.argument("file", required=False, type=click.UNPROCESSED)
@broker.control_option
def reopen(file: str | None, control_path: str | None) -> int:
    """Have the running broker write its audit to FILE from now on, as root: behind a rotation.

    Without FILE it is where /etc/fdbroker/policy.yaml says that the audit goes, else
    /var/log/fdbroker/audit.jsonl. It is made, mode 0640, if it is missing. When
    this returns 0, nothing more is written to the file before. No record is lost or
    split: the broker switches between two records, and the first in the new file
    says so. If anything is wrong, it goes on in the file that it has.

    Not needed where the audit goes to the journal, which rotates itself.

    \b
    Exit status: 0  the audit goes to FILE
                 2  it goes on where it was: the file can't be used, the broker
                    refused it, there is no broker, you are not root

    \b
    Examples:  mv /var/log/fdbroker/audit.jsonl /var/log/fdbroker/audit.jsonl.1
               fdbroker audit reopen
    """  # noqa: D301 - \b is click's mark for a paragraph that keeps its lines
    from fdbroker.launcher.auditing import open_audit_file  # noqa: PLC0415 - only here
    from fdbroker.launcher.errors import LaunchError  # noqa: PLC0415 - likewise

    if os.geteuid() != 0:
        raise Failure("only root moves the audit: run this as root")
    path = os.path.abspath(_usual_file() if file is None else file)
    with connected(control_path) as control:
        try:
            descriptor = open_audit_file(path)
        except LaunchError as error:
            raise Failure(printable(str(error))) from error
        try:
            control.reopen_audit(descriptor)
        except BrokerError as error:
            why = printable(error.strerror or str(error))
            raise Failure(f"{printable(path)}: the audit goes on where it was: {why}") from error
        finally:
            os.close(descriptor)
    write_line(f"the audit goes to {printable(path)}")
    return 0


@command.command("schema", short_help="Write the JSON Schema of the records.")
@click.option("--closed", is_flag=True, help="Without room for events and members of later versions.")
def schema(*, closed: bool) -> int:
    """Write the JSON Schema (draft 2020-12) of a record of the audit.

    \b
    Exit status: 0  written
                 2  wrong use, or the output could not be written

    \b
    Examples:  fdbroker audit schema >audit.schema.json
    """  # noqa: D301 - \b is click's mark for a paragraph that keeps its lines
    write_line(json.dumps(audit_schema.schema(closed=closed), indent=1))
    return 0


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


def _follow(source: _Source, shown: _Shown, count: int) -> None:
    """Show the last `count` records, and then each as it comes, until an interrupt."""
    last: deque[Mapping[str, object]] | None = deque(maxlen=count)
    try:
        for line in source.follow():
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

    def __init__(self, wanted: Filter, *, as_json: bool) -> None:
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
        place = f"{line.source}:{line.number}"
        try:
            record = read_record(line)
        except NotARecordError as error:
            complain_printable(f"{place}: {printable(str(error))}")
            self.status = 1
            return None
        missing = self._gaps.before(record)
        if missing is not None:
            run = printable(str(record.get("run")))
            complain_printable(f"{place}: records {missing[0]} to {missing[1]} of run {run} are missing")
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


def _uid(user: str | None, option: str) -> int | None:
    if user is None:
        return None
    try:
        uid = id_of_number(user) if is_number(user) else pwd.getpwnam(user).pw_uid
    except (KeyError, ValueError):  # the latter for a NUL
        uid = None
    if uid is None:
        raise click.UsageError(f"{option} {user}: there is no such user")
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
