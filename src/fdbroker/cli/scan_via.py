"""Which way `fdbroker scan` goes: by the scan service of this machine, or by workers of its own."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from fdbroker import client
from fdbroker.cli.broker import given_descriptors
from fdbroker.cli.failure import Failure
from fdbroker.cli.output import complain
from fdbroker.config.names import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from fdbroker.scan.client import ScanService
    from fdbroker.scan.pool import Version
    from fdbroker.scan.run import Scanned, Skipped

SERVICE_VARIABLE = "FDBROKER_SCAN_SOCKET"
SCAND, SELF = "scand", "self"
# Seconds for its greeting, where the command can do without the service, and where it was asked for.
_GREETED_WITHIN = {None: 3.0, SCAND: 20.0}

# As docs/scand.md has it; who administers the machine may have chosen another one.
SERVICE_USER = "fdbroker-scand"

_GONE = {"broker_gone": "the broker ended or was restarted", "stopping": "the scan service was stopped"}

# What the service has chosen for all of its clients, by the parameters of the command.
_OF_OWN_WORKERS = {
    "engines": "--engine",
    "lists": "--hashes",
    "accept": "--accept",
    "jobs": "--jobs",
    "isolate": "--isolate",
    "timeout": "--timeout",
    "worker_uid": "--worker-uid",
}


def service_for(via: str | None, socket_path: str) -> ScanService | None:
    """Return a connection to the scan service, which the caller closes; None: the command scans by itself.

    Without `--via` the service is taken if its socket is there and accepts this user, the service answers,
    and nothing is asked for that only the command's own workers do.

    Raises:
        Failure: it is asked for, and can't be had.
        UsageError: it is asked for with what it does not take.

    """
    context = click.get_current_context()
    own = [
        option
        for name, option in _OF_OWN_WORKERS.items()
        if context.get_parameter_source(name) not in {ParameterSource.DEFAULT, None}
    ]
    if via == SELF:
        return None
    if via is None:
        other_broker = socket_path != client.DEFAULT_SOCKET or given_descriptors() is not None
        if own or (other_broker and SERVICE_VARIABLE not in os.environ):
            return None
    elif own:
        raise click.UsageError(
            f"{own[0]} is for scans by the command's own workers; how the service scans its configuration"
            " says: leave it out, or say --via self"
        )
    from fdbroker.scan.client import (  # noqa: PLC0415 - own workers need nothing of it
        DEFAULT_SOCKET,
        ScanServiceError,
        ServiceTimeoutError,
        ServiceUnavailableError,
        connect,
    )

    path = os.environ.get(SERVICE_VARIABLE, DEFAULT_SOCKET)
    try:
        return connect(path, greeted_within=_GREETED_WITHIN[via])
    except ServiceUnavailableError as error:
        if via is None:
            return None
        raise Failure(f"{printable(path)}: {error.strerror}; {_cure(error)}") from error
    except ServiceTimeoutError as error:
        found = f"{printable(path)}: {error.strerror}"
        if via is None:
            complain(f"{found}; does fdbroker-scand run? This command scans by workers of its own")
            return None
        raise Failure(f"{found}; start fdbroker-scand (its log may say more), or say --via self") from error
    except ScanServiceError as error:
        raise Failure(printable(f"{path}: {error.strerror}")) from error


def _cure(error: OSError) -> str:
    if error.errno in {errno.EACCES, errno.EPERM}:
        return "whoever administers the machine can let you (listeners of the policy), or say --via self"
    if error.errno == errno.EPROTOTYPE:
        return "its listener in the policy needs 'type: seqpacket'; write that, or say --via self"
    if error.errno == errno.ENOENT:  # the broker makes it, or systemd, whether the service runs or not
        return (
            "it is the listener 'scan' of the policy, which the broker makes at its start, or"
            " fdbroker-scan.socket (docs/scand.md); see to these, or say --via self"
        )
    return "start the broker and fdbroker-scand, or say --via self"


def versions_of(service: ScanService) -> list[Version]:
    """Return the engines of the service."""
    from fdbroker.scan.pool import Version  # noqa: PLC0415 - loads engines; of this command's own it may need none

    return [Version(*one) for one in service.welcome.engines]


def scan_by(
    service: ScanService,
    starts: Sequence[bytes],
    exclude: Sequence[bytes],
    max_size: int | None,
    missing: Callable[[bytes, Sequence[str]], None],
) -> Iterator[Scanned | Skipped]:
    """Yield what the service finds below each start, each path once.

    `missing` is told of each start of which the service left something out, and why.

    Raises:
        ScanServiceError: the service is gone, or refuses.

    """
    overlap = len(starts) > 1
    seen: set[bytes] = set()
    for start in starts:
        with service.scan_tree(start, exclude=exclude, max_size=max_size) as scan:
            for result in scan:
                if overlap:
                    if result.path in seen:
                        continue
                    seen.add(result.path)
                yield result
            if scan.end is not None and scan.end.missing:
                missing(start, scan.end.missing)


def why_missing(reason: str) -> str:
    """Return what a word of `missing` of docs/scan-protocol.md means, and the word, printable."""
    from fdbroker.cli.walk import MISSING  # noqa: PLC0415 - of no use to a scan that is complete

    for word, text in MISSING.values():
        if word == reason:
            return f"{text} ({reason})"
    if reason in _GONE:
        return f"{_GONE[reason]} meanwhile; scan again ({reason})"
    return printable(reason)
