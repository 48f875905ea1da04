"""`fdbroker-scand`: the command."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

import fdbroker
from fdbroker.broker.notify import Notifier
from fdbroker.clamd.import_conf import as_text, as_yaml, import_conf
from fdbroker.config.errors import ConfigError
from fdbroker.config.names import printable
from fdbroker.launcher.activation import connect_notify_socket, passed_descriptors, watchdog_usec
from fdbroker.launcher.errors import LaunchError
from fdbroker.launcher.until_ready import READY
from fdbroker.sandbox import SandboxError
from fdbroker.scan.engine import EngineError
from fdbroker.scan.pool import Pool
from fdbroker.scan.service.configuration import (
    DEFAULT_CONFIGURATION,
    Configuration,
    Limits,
    load_configuration,
)
from fdbroker.scan.service.core import say
from fdbroker.scan.service.opening import DESCRIPTORS_OF_A_REQUEST
from fdbroker.scan.service.serving import serve
from fdbroker.scan.service.tcp import listening_socket
from fdbroker.scan.service.watch import run
from fdbroker.scan.supervisor import DEFAULT_WINDOW

if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence

    from fdbroker.scan.pool import Version

EXIT_NOT_STARTED = 2
# Descriptors of the process that are no files to scan: standard ones, the loop's, the broker's, the zygote's.
_ITS_OWN = 64
_OF_A_WORKER = 4
# Connections of clients: as many as the broker hands over at most on one connection.
_CLIENTS = 1024
# What one of clamd's clients may have besides: a stream that is not whole, and a descriptor that just came.
_OF_A_CLAMD_CLIENT = 2


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--config",
    "path",
    default=DEFAULT_CONFIGURATION,
    show_default=True,
    metavar="FILE",
    help="What it is to do. Only root may be able to write it.",
)
@click.option(
    "--check", is_flag=True, help="Say what is wrong with the configuration, and end. Nothing is loaded."
)
@click.option("--dev", is_flag=True, help="For trying: who starts it may own the configuration, too.")
@click.option(
    "--ready-fd",
    "ready",
    type=click.IntRange(3),
    metavar="FD",
    help="Write 'ready' here when the engines are loaded, and close it: for supervisors like s6.",
)
@click.version_option(fdbroker.__version__, prog_name="fdbroker-scand")
@click.pass_context
def command(context: click.Context, path: str, ready: int | None, *, check: bool, dev: bool) -> int:
    """Scan files for the clients of the broker's listeners.

    Started by a service manager or by hand, in the foreground, as a user of its
    own and never as root. SIGHUP has the engines loaded anew, SIGTERM ends it.

    \b
    Exit status: 0  it was told to end
                 2  it could not start, or what it needs is gone

    \b
    Examples:  fdbroker-scand --check
               setpriv --reuid=fdbroker-scand --regid=fdbroker-scand --init-groups fdbroker-scand
    """  # noqa: D301 - \b is click's mark for a paragraph that keeps its lines
    if context.invoked_subcommand is not None:
        return 0
    if os.geteuid() == 0 and not check:
        say("it has hostile files read, so it does not run as root; start it as a user of its own")
        return EXIT_NOT_STARTED
    try:
        configuration = load_configuration(path, dev=dev)
    except ConfigError as error:
        for problem in error.problems:
            sys.stderr.write(f"{printable(str(problem))}\n")
        return EXIT_NOT_STARTED
    if check:
        click.echo(f"{printable(path)}: no problems")
        return 0
    try:
        return _run(configuration, ready)
    except (EngineError, SandboxError, LaunchError, OSError) as error:
        say(f"it can't start: {error}")
        return EXIT_NOT_STARTED


@command.command("import-clamd-conf", short_help="Translate a clamd.conf into a scand.yaml.")
@click.argument("path", metavar="FILE")
@click.option("-v", "--verbose", is_flag=True, help="List also what holds without any option.")
def import_clamd_conf(path: str, *, verbose: bool) -> int:
    """Translate a clamd.conf into a scand.yaml, on standard output.

    What becomes of each line is said on standard error, what has no equivalent
    first. What holds without any option is counted. Nothing is changed.

    \b
    Exit status: 0  translated
                 2  the file can't be read

    \b
    Example:  fdbroker-scand import-clamd-conf /etc/clamav/clamd.conf > scand.yaml
    """  # noqa: D301 - \b is click's mark for a paragraph that keeps its lines
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        say(f"{path}: {error.strerror}")
        return EXIT_NOT_STARTED
    imported = import_conf(text)
    sys.stdout.write(as_yaml(imported))
    sys.stdout.flush()
    sys.stderr.write(as_text(imported, verbose=verbose))
    return 0


class _Managers(Notifier):
    """Tells systemd, and who reads `ready` instead: a line, and its end, when it is ready at first."""

    def __init__(self, descriptor: int | None, watchdog_usec: int | None, ready: int | None) -> None:
        super().__init__(descriptor, watchdog_usec)
        if ready is not None:
            os.set_inheritable(ready, False)
        self._ready = ready

    def say(self, **variables: str) -> None:
        super().say(**variables)
        if self._ready is not None and "READY" in variables:
            with contextlib.suppress(OSError):  # nobody reads it any more
                os.write(self._ready, READY)
            os.close(self._ready)
            self._ready = None


def _run(configuration: Configuration, ready: int | None) -> int:
    with listening_socket(configuration.tcp, passed_descriptors()) or contextlib.nullcontext() as tcp:
        _run_with(configuration, tcp, ready)
    return 0


def _run_with(configuration: Configuration, tcp: socket.socket | None, ready: int | None) -> None:
    descriptors = _most_descriptors()
    openings = openings_within(configuration, descriptors)
    limits = limits_within(configuration, descriptors)
    if limits != configuration.limits:
        say(f"queue: total: {limits.total} files, as the process may have so few descriptors")
    configuration = configuration._replace(limits=limits, openings=openings)
    socket_of_manager = connect_notify_socket()
    watchdog = None if socket_of_manager is None else watchdog_usec()
    with (
        contextlib.closing(_Managers(socket_of_manager, watchdog, ready)) as notifier,
        Pool(
            configuration.engines,
            jobs=configuration.workers,
            spare=configuration.spare_workers,
            timeout=configuration.timeout,
            max_size=configuration.max_size,
            files_per_worker=configuration.files_per_worker,
            in_background=True,
        ) as pool,
    ):
        report = pool.start()
        if report is not None:
            missing = ", ".join(state.layer.value for state in report.missing())
            say("its workers are confined" + (f", but for: {missing}" if missing else " by all layers"))
        versions: list[Version] = pool.versions()
        # All that is here by now stays, and need not be looked at again while clients wait.
        gc.collect()
        gc.freeze()
        run(serve(configuration, pool, versions, notifier, tcp))


def limits_within(configuration: Configuration, descriptors: int) -> Limits:
    """Return how many files may wait where the process may have so many descriptors.

    The kernel counts those under way to the workers besides, against the same number: those of all processes
    of this user, as they are sent and not received. Two lanes of a window must fit in any case.

    Raises:
        LaunchError: there is no room for any.

    """
    workers = configuration.workers + configuration.spare_workers
    of_clients = sum(
        _CLIENTS * (1 + _OF_A_CLAMD_CLIENT * (listener.protocol == "clamd"))
        for listener in configuration.listeners.values()
    )
    if configuration.tcp is not None:
        of_clients += configuration.tcp.connections * (1 + _OF_A_CLAMD_CLIENT)
    opened = openings_within(configuration, descriptors) * DESCRIPTORS_OF_A_REQUEST
    room = descriptors - _ITS_OWN - _OF_A_WORKER * workers - of_clients - opened
    under_way = DEFAULT_WINDOW * workers
    if room < DEFAULT_WINDOW or under_way > descriptors:
        raise LaunchError(
            f"the process may have {descriptors} descriptors (RLIMIT_NOFILE), too few for {workers} workers;"
            " raise LimitNOFILE= of its unit, or lower `workers` and `spare_workers`"
        )
    limits = configuration.limits
    return limits._replace(total=min(limits.total, room), per_client=min(limits.per_client, room))


def openings_within(configuration: Configuration, descriptors: int) -> int:
    """Return of how many requests files may be opened at a time: for them is a quarter of the descriptors."""
    return max(2, min(configuration.openings, descriptors // 4 // DESCRIPTORS_OF_A_REQUEST))


def _most_descriptors() -> int:
    """Have as many descriptors as may be had, and return how many."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return 1 << 20 if most == resource.RLIM_INFINITY else most


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    try:
        status = command.main(arguments, prog_name="fdbroker-scand", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return EXIT_NOT_STARTED
    except (click.Abort, KeyboardInterrupt):
        return EXIT_NOT_STARTED
    return status if isinstance(status, int) else 0
