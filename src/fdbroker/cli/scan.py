"""`fdbroker scan`."""

from __future__ import annotations

import contextlib
import os
import pwd
import sys
import time
from typing import TYPE_CHECKING, NamedTuple

import click

from fdbroker import client
from fdbroker.cli import broker
from fdbroker.cli.ahead import LOOK_AHEAD, Ahead
from fdbroker.cli.failure import Failure
from fdbroker.cli.output import OutputError, ReaderGoneError, complain, complain_printable, flush, held_back
from fdbroker.cli.paths import absolute
from fdbroker.cli.scan_engines import configured_engines
from fdbroker.cli.scan_output import HumanOutput, JsonOutput, Output, Outputs, Totals
from fdbroker.cli.scan_via import (
    SCAND,
    SELF,
    SERVICE_USER,
    scan_by,
    service_for,
    versions_of,
    why_missing,
)
from fdbroker.cli.sizes import size_of_option
from fdbroker.cli.whole_file import whole_file
from fdbroker.config.defaults import ADD_USER
from fdbroker.config.names import id_of_number, is_number, printable
from fdbroker.sandbox import SandboxError
from fdbroker.scan.engine import EngineError, Inside
from fdbroker.scan.plugins import make
from fdbroker.scan.pool import MOST_JOBS, Pool
from fdbroker.scan.run import Scanned, scan
from fdbroker.scan.supervisor import DEFAULT_TIMEOUT
from fdbroker.scan.tree import Exclusions, walk
from fdbroker.scan.verdict import Clean

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from fdbroker.cli.progress import ScanProgress
    from fdbroker.sandbox.report import LayerReport
    from fdbroker.scan.client import ScanService
    from fdbroker.scan.pool import Version
    from fdbroker.scan.run import Skipped
    from fdbroker.scan.tree import Found

WORKER_USER = "fdbroker-worker"
_SECONDS_HELD_BACK = 0.1  # a line about what is clean, at most


def _exclusions(_context: click.Context, _parameter: click.Parameter, value: Sequence[str]) -> Exclusions:
    try:
        return Exclusions([os.fsencode(glob) for glob in value])
    except ValueError as error:
        raise click.BadParameter(printable(str(error))) from error


@click.command("scan", short_help="Scan files and trees for what is known to be bad.")
@click.argument("paths", metavar="PATH...", nargs=-1, required=True, type=click.UNPROCESSED)
@broker.socket_option
@click.option(
    "--via",
    type=click.Choice(["scand", "self"]),
    help="By the scan service, or by workers of this command.  [default: the service, if it is there and"
    " takes this user, and nothing is asked for that it does not do]",
)
@click.option(
    "--engine",
    "engines",
    multiple=True,
    type=click.UNPROCESSED,
    metavar="NAME[:OPTION=VALUE,...]",
    help="Who scans; several times for several engines, and the worst verdict counts.  [default: hashes]",
)
@click.option(
    "--hashes",
    "lists",
    multiple=True,
    type=click.UNPROCESSED,
    metavar="FILE",
    help="Add a list of what is bad, for the engine hashes. May be given more than once.",
)
@click.option(
    "--accept",
    multiple=True,
    metavar="KIND",
    help="What may be clean though nobody can look into it: encrypted, rar. May be given more than once.",
)
@click.option(
    "--jobs",
    "-j",
    type=click.IntRange(1, MOST_JOBS),
    metavar="N",
    help="Most workers at a time.  [default: one for each CPU]",
)
@click.option("--isolate", type=click.Choice(["file"]), help="A new worker for each file.")
@click.option(
    "--exclude",
    "exclusions",
    multiple=True,
    callback=_exclusions,
    metavar="GLOB",
    help="Leave out what matches, and all below it: '*.iso', '/srv/cache/**'. May be given more than once.",
)
@click.option(
    "--max-size",
    callback=size_of_option,
    metavar="SIZE",
    help="Larger files are not scanned, and each is an error: 50MiB, 1GB.",
)
@click.option(
    "--timeout",
    default=DEFAULT_TIMEOUT,
    show_default=True,
    type=click.FloatRange(min=0, min_open=True, max=86400),
    metavar="SECONDS",
    help="How long one file may take in a worker.",
)
@click.option(
    "--worker-uid",
    metavar="USER",
    help=f"Who reads the files if root starts the scan: a user's name or number.  [default: {WORKER_USER}]",
)
@click.option(
    "--infected", "-i", "only_infected", is_flag=True, help="Tell of what is infected or an error, alone."
)
@click.option(
    "--json", "as_json", is_flag=True, help="Write one JSON object per line (see docs/scanning.md)."
)
@click.option(
    "--report",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Write all that there is to tell to FILE as well, as --json does, once the scan has ended.",
)
@click.option(
    "-v",
    "--verbose",
    is_flag=True,
    help="List clean files, what was skipped, and the worker's confinement too.",
)
def command(  # noqa: PLR0913, PLR0917 - as many as options
    paths: Sequence[str],
    socket_path: str,
    via: str | None,
    engines: Sequence[str],
    lists: Sequence[str],
    accept: Sequence[str],
    jobs: int | None,
    isolate: str | None,
    exclusions: Exclusions,
    max_size: int | None,
    timeout: float,
    worker_uid: str | None,
    report: str | None,
    *,
    only_infected: bool,
    as_json: bool,
    verbose: bool,
) -> int:
    """Scan files, and directories with all that is below them.

    The broker opens the files, as far as its policy allows you to have them.
    Worker processes that can do nothing else read them, with the engines in them
    that --engine names: hashes compares each file's digest with lists of what is
    known to be bad (the built-in one has the EICAR test file), libclamav looks into
    archives, documents and mail with ClamAV's signatures. What the policy
    hides from listing is not seen, so it is not scanned: "clean" is said of what
    was listed.

    \b
    Exit status: 0  everything that was listed is clean
                 1  something is infected
                 2  something could not be scanned (also if something else is
                    infected), the scan was interrupted, or could not be done

    \b
    Examples:  fdbroker scan ~/Downloads
               fdbroker scan --hashes bad.sha256 --json /srv/upload
               fdbroker scan --engine libclamav --exclude '*.iso' /home
               fdbroker scan --engine libclamav:max_file_size=1GiB --engine yara-x:rules=/etc/rules /srv
    """  # noqa: D301 - \b is click's mark for a paragraph that keeps its lines
    if verbose and only_infected:
        raise click.UsageError("--verbose wants more than is told, and --infected less: one of them")
    starts = [absolute(path) for path in paths]
    output: Output = (
        JsonOutput(infected=only_infected)
        if as_json
        else HumanOutput(verbose=verbose, infected=only_infected)
    )
    request = _Request(
        starts,
        exclusions,
        socket_path,
        max_size,
        # Lines for each file would push a bar about, and JSON is to be read by programs, also on a terminal.
        shows_progress=sys.stderr.isatty() and not verbose and not (as_json and sys.stdout.isatty()),
    )
    service = service_for(via, socket_path)
    if service is not None:
        with service:
            totals = _told(lambda told: _scan_by_service(service, request, told), output, report)
        if totals.denied is not None and not as_json:
            denied = totals.denied
            asked = "walk" if denied.directory or os.path.isdir(denied.path) else "open"
            complain_printable(broker.see_why(denied.path, socket_path, asked, SERVICE_USER))
        return totals.exit_status()
    configured = configured_engines(engines, lists, accept)
    inside = any(isinstance(make(one), Inside) for one in configured)
    try:
        pool = Pool(
            configured,
            jobs=jobs or len(os.sched_getaffinity(0)),
            ids=worker_ids(worker_uid) if inside or worker_uid is not None else None,
            timeout=timeout,
            max_size=max_size,
            isolate=isolate is not None,
        )
    except EngineError as error:
        raise Failure(printable(str(error))) from error
    totals = _told(lambda output: _scan(pool, request, output), output, report)
    if totals.denied is not None and not as_json:
        asked = "list" if totals.denied.directory else "open"
        complain_printable(broker.see_why(totals.denied.path, socket_path, asked))
    return totals.exit_status()


class _Request(NamedTuple):
    """What is to be scanned, and by which broker."""

    starts: Sequence[bytes]
    exclusions: Exclusions
    socket_path: str
    max_size: int | None
    shows_progress: bool


def _told(scan: Callable[[Output], Totals], output: Output, report: str | None) -> Totals:
    """Scan, tell what it came to, in the report as well, and return it."""
    with contextlib.ExitStack() as stack:
        if report is not None:
            output = Outputs([output, JsonOutput(stack.enter_context(_report_file(report)))])
        try:
            totals = scan(output)
            output.totals(totals)
        except ReaderGoneError as error:
            # A scan whose findings nobody reads must not end like a program that was asked to stop.
            raise OutputError(str(error)) from error
    return totals


@contextlib.contextmanager
def _report_file(path: str) -> Iterator[Callable[[str], None]]:
    """Give what writes a line of the report, which is there when the block ends without an error."""
    try:
        # Names of files are nobody else's business.
        with whole_file(path, 0o600) as file:

            def write(line: str) -> None:
                file.write(line.encode("ascii") + b"\n")

            yield write
    except OSError as error:
        raise Failure(f"the report {printable(path)} could not be written: {error.strerror}") from error


def _scan(pool: Pool, request: _Request, output: Output) -> Totals:
    """Scan and return what it came to."""
    totals = Totals()
    began = time.monotonic()
    try:
        with pool:
            # The engines are loaded by another process, and meanwhile the tree is listed.
            _begun(pool)
            with _connected(pool, request.socket_path) as connected:
                found = _once(walk(connected, request.starts, request.exclusions), request.starts)
                ahead = Ahead(found, LOOK_AHEAD if request.shows_progress else 0)
                ahead.read_until(lambda: pool.is_loaded)
                layers, versions = _started(pool)
                if layers is not None:
                    output.layers(layers)
                output.engines(versions, SELF)
                began = time.monotonic()
                with _progress(shown=request.shows_progress) as progress, held_back():
                    _scan_all(connected, pool, request.starts, ahead, output, totals, progress)
    except client.BrokerError as error:
        totals.complete = False
        complain(f"the broker does not answer any more, so the scan is incomplete: {error.strerror}")
    except KeyboardInterrupt:
        totals.complete = False
        complain("interrupted, so the scan is incomplete")
    totals.seconds = time.monotonic() - began
    return totals


def _begun(pool: Pool) -> None:
    """Begin to load the engines; Failure."""
    try:
        pool.begin()
    except (SandboxError, OSError) as error:
        raise _no_worker(error) from error


def _connected(pool: Pool, socket_path: str) -> client.Client:
    """Connect to the broker. Without one, what is wrong with the engines is told first; Failure."""
    try:
        return broker.connect(socket_path)
    except Failure:
        _started(pool)
        raise


def _scan_by_service(service: ScanService, request: _Request, output: Output) -> Totals:
    """Have the scan service scan, and return what it came to."""
    from fdbroker.scan.client import ScanServiceError  # noqa: PLC0415 - own workers need nothing of it

    totals = Totals()
    began = time.monotonic()

    def missing(start: bytes, why: Sequence[str]) -> None:
        totals.complete = False
        reasons = "; ".join(map(why_missing, why))
        complain_printable(f"not all below {printable(start)} was scanned: {reasons}")

    try:
        output.engines(versions_of(service), SCAND)
        results = scan_by(service, request.starts, request.exclusions.globs, request.max_size, missing)
        with _progress(shown=request.shows_progress) as progress, held_back():
            _tell(results, Ahead((), 0), progress, output, totals)
    except ScanServiceError as error:
        totals.complete = False
        complain(f"the scan service does not go on, so the scan is incomplete: {error.strerror}")
    except KeyboardInterrupt:
        totals.complete = False
        complain("interrupted, so the scan is incomplete")
    totals.seconds = time.monotonic() - began
    return totals


def _started(pool: Pool) -> tuple[LayerReport | None, Sequence[Version]]:
    """Start the first worker; return what confines it, and which engines there are.

    Raises:
        Failure: there is no worker, or an engine is not there.

    """
    try:
        return pool.start(), pool.versions()
    except (SandboxError, OSError) as error:
        raise _no_worker(error) from error
    except EngineError as error:
        raise Failure(printable(f"{error}; nothing was scanned")) from error


def _no_worker(error: Exception) -> Failure:
    return Failure(printable(f"no worker could be started, so nothing was scanned: {error}"))


def _progress(*, shown: bool) -> AbstractContextManager[ScanProgress | None]:
    """Return the bar, None where there is none to be shown."""
    if not shown:
        return contextlib.nullcontext()
    from fdbroker.cli.progress import ScanProgress  # noqa: PLC0415 - it takes as long as to load an engine

    return ScanProgress()


def _scan_all(
    connected: client.Client,
    pool: Pool,
    starts: Sequence[bytes],
    ahead: Ahead,
    output: Output,
    totals: Totals,
    progress: ScanProgress | None,
) -> None:
    """Scan, tell and count."""
    _tell(scan(connected, pool, starts, found=ahead), ahead, progress, output, totals)


def _tell(
    events: Iterable[Scanned | Skipped],
    ahead: Ahead,
    progress: ScanProgress | None,
    output: Output,
    totals: Totals,
) -> None:
    """Tell what comes, and count it."""
    told = time.monotonic()
    for event in events:
        if isinstance(event, Scanned):
            totals.add(event)
            if isinstance(event.verdict, Clean):
                output.scanned(event)
                now = time.monotonic()
                if now - told > _SECONDS_HELD_BACK:
                    told = now
                    flush()
            elif progress is None:
                output.scanned(event)
                flush()
            else:
                progress.refresh(totals, ahead)
                with progress.out_of_the_way():
                    output.scanned(event)
                    flush()
        else:
            totals.skipped += 1
            output.skipped(event)
        if progress is not None:
            progress.update(totals, ahead)


def _once(found: Iterable[Found], starts: Sequence[bytes]) -> Iterator[Found]:
    """Leave out what was found before, below another of overlapping starts.

    Each start is walked nevertheless: what lies above it may be hidden, or not be listed to its end.
    """
    within = [start for start in starts if any(_is_below(start, other) for other in starts)]
    within += [start for start in set(starts) if starts.count(start) > 1]
    if not within:
        yield from found
        return
    seen: set[bytes] = set()
    for each in found:
        # Nothing else can come twice, so nothing else is remembered.
        if any(each.path == start or _is_below(each.path, start) for start in within):
            if each.path in seen:
                continue
            seen.add(each.path)
        yield each


def _is_below(path: bytes, directory: bytes) -> bool:
    return path != directory and path.startswith(directory.rstrip(b"/") + b"/")


def worker_ids(wanted: str | None) -> tuple[int, int] | None:
    """Return uid and gid of the worker, None where it can't be another user than this one.

    Raises:
        UsageError: no such user, root itself, or not ours to choose.

    """
    if os.geteuid() != 0:
        if wanted is not None:
            raise click.UsageError(
                "--worker-uid is for root: nobody else can start a process of another user."
            )
        return None
    ids = _user(WORKER_USER if wanted is None else wanted)
    if ids is None and wanted is None:
        raise click.UsageError(
            "root does not read hostile files itself: a worker of another user does, and there is no user"
            f" {WORKER_USER} on this machine. Add one ({ADD_USER} {WORKER_USER}), or say who the worker"
            " shall be: --worker-uid USER."
        )
    if ids is None:
        raise click.UsageError(f"--worker-uid {wanted}: there is no such user.")
    if 0 in ids:
        raise click.UsageError("the worker's user and group must not be root's: see --worker-uid.")
    return ids


def _user(text: str) -> tuple[int, int] | None:
    """Return uid and gid of a user; a number that no user has is its own group."""
    if is_number(text):
        uid = id_of_number(text)
        if uid is None:
            return None
        try:
            return uid, pwd.getpwuid(uid).pw_gid
        except KeyError:
            return uid, uid
    try:
        entry = pwd.getpwnam(text)
    except KeyError:
        return None
    return entry.pw_uid, entry.pw_gid
