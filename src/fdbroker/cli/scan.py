"""`fdbroker scan`."""

from __future__ import annotations

import os
import pwd
import sys
import time
from typing import TYPE_CHECKING

import click

from fdbroker import client
from fdbroker.cli import broker
from fdbroker.cli.failure import Failure
from fdbroker.cli.output import OutputError, ReaderGoneError, complain, complain_printable
from fdbroker.cli.paths import absolute
from fdbroker.cli.progress import Ahead, ScanProgress
from fdbroker.cli.scan_output import HumanOutput, JsonOutput, Output, Totals
from fdbroker.config.names import id_of_number, is_number, printable
from fdbroker.sandbox import SandboxError
from fdbroker.scan.engine import EngineError
from fdbroker.scan.engines import hashes
from fdbroker.scan.plugins import configure
from fdbroker.scan.run import Scanned, scan
from fdbroker.scan.supervisor import DEFAULT_TIMEOUT, Supervisor
from fdbroker.scan.tree import walk
from fdbroker.scan.verdict import Clean, Error

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from fdbroker.scan.tree import Found

WORKER_USER = "fdbroker-worker"


@click.command("scan", short_help="Scan files and trees for what is known to be bad.")
@click.argument("paths", metavar="PATH...", nargs=-1, required=True, type=click.UNPROCESSED)
@broker.socket_option
@click.option(
    "--hashes",
    "lists",
    multiple=True,
    type=click.UNPROCESSED,
    metavar="FILE",
    help="Add a list of what is bad: a SHA-256 and a name in each line. May be given more than once.",
)
@click.option(
    "--timeout",
    default=DEFAULT_TIMEOUT,
    show_default=True,
    type=click.FloatRange(min=0, min_open=True, max=86400),
    metavar="SECONDS",
    help="How long one file may take.",
)
@click.option(
    "--worker-uid",
    metavar="USER",
    help=f"Who reads the files if root starts the scan: a user's name or number.  [default: {WORKER_USER}]",
)
@click.option(
    "--json", "as_json", is_flag=True, help="Write one JSON object per line (see docs/scanning.md)."
)
@click.option(
    "-v",
    "--verbose",
    is_flag=True,
    help="List clean files, what was skipped, and the worker's confinement too.",
)
def command(
    paths: Sequence[str],
    socket_path: str,
    lists: Sequence[str],
    timeout: float,
    worker_uid: str | None,
    *,
    as_json: bool,
    verbose: bool,
) -> int:
    """Scan files, and directories with all that is below them.

    The broker opens the files, as far as its policy allows you to have them. A
    worker process that can do nothing else reads them and compares each file's
    SHA-256 with a list of what is known to be bad. The built-in list has the
    EICAR test file. What the policy hides from listing is not seen, so it is not
    scanned: "clean" is said of what was listed.

    \b
    Exit status: 0  everything that was listed is clean
                 1  something is infected
                 2  something could not be scanned (also if something else is
                    infected), or the scan could not be done

    \b
    Examples:  fdbroker scan ~/Downloads
               fdbroker scan --hashes bad.sha256 --json /srv/upload
    """  # noqa: D301 - \b is click's mark for a paragraph that keeps its lines
    ids = worker_ids(worker_uid)
    starts = [absolute(path) for path in paths]
    output: Output = JsonOutput() if as_json else HumanOutput(verbose=verbose)
    # Lines for each file would push a bar about, and JSON is to be read by programs, also on a terminal.
    show_progress = not verbose and not (as_json and sys.stdout.isatty())
    try:
        # Here too, so that what is wrong with a list is told as that, and before a worker is started.
        files = [absolute(path) for path in lists]
        hashes.load(files)
        engine = configure("hashes", {"lists": [os.fsdecode(path) for path in files]})
    except EngineError as error:
        raise Failure(printable(str(error))) from error
    with Supervisor([engine], ids=ids, timeout=timeout) as supervisor:
        try:
            report = supervisor.start()
        except (SandboxError, OSError) as error:
            text = f"no worker could be started, so nothing was scanned: {error}"
            raise Failure(printable(text)) from error
        with broker.connect(socket_path) as connected:
            try:
                output.layers(report)
                totals, denied = _scan(connected, supervisor, starts, output, show_progress=show_progress)
                output.totals(totals)
            except ReaderGoneError as error:
                # A scan whose findings nobody reads must not end like a program that was asked to stop.
                raise OutputError(str(error)) from error
    if denied is not None and not as_json:
        complain_printable(broker.see_why(denied.path, socket_path, "list" if denied.directory else "open"))
    return totals.exit_status()


def _scan(
    connected: client.Client,
    supervisor: Supervisor,
    starts: Sequence[bytes],
    output: Output,
    *,
    show_progress: bool,
) -> tuple[Totals, Scanned | None]:
    """Scan and return what it came to, and the first path that was denied."""
    totals = Totals()
    denied = None
    began = time.monotonic()
    try:
        with ScanProgress(wanted=show_progress) as progress:
            ahead = Ahead(_once(walk(connected, starts), starts), progress.look_ahead)
            for event in scan(connected, supervisor, starts, found=ahead):
                if isinstance(event, Scanned):
                    totals.add(event)
                    if isinstance(event.verdict, Clean):
                        output.scanned(event)
                    else:
                        if isinstance(event.verdict, Error) and event.verdict.reason == "denied":
                            denied = denied or event
                        progress.refresh(totals, ahead)
                        with progress.out_of_the_way():
                            output.scanned(event)
                else:
                    totals.skipped += 1
                    output.skipped(event)
                progress.update(totals, ahead)
    except client.BrokerError as error:
        totals.complete = False
        complain(f"the broker does not answer any more, so the scan is incomplete: {error.strerror}")
    except KeyboardInterrupt:
        totals.complete = False
        complain("interrupted, so the scan is incomplete")
    totals.seconds = time.monotonic() - began
    return totals, denied


def _once(found: Iterable[Found], starts: Sequence[bytes]) -> Iterator[Found]:
    """Leave out what was found before, below another of overlapping starts.

    Each start is walked nevertheless: what lies above it may be hidden, or not be listed to its end.
    """
    within = [start for start in starts if any(_is_below(start, other) for other in starts)]
    within += [start for start in set(starts) if starts.count(start) > 1]
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
            f" {WORKER_USER} on this machine. Add one (useradd --system {WORKER_USER}), or say who the worker"
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
