"""`fdbroker cat`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from fdbroker.cli import broker
from fdbroker.cli.failure import Failure
from fdbroker.cli.output import complain_printable, flush, write_bytes
from fdbroker.cli.paths import absolute
from fdbroker.client import BrokerError
from fdbroker.config.names import printable

if TYPE_CHECKING:
    from collections.abc import Sequence
    from io import BufferedReader

    from fdbroker.client import OpenedFile

_CHUNK = 1 << 20


@click.command("cat", short_help="Write files to standard output.")
@click.argument("paths", metavar="PATH...", nargs=-1, required=True, type=click.UNPROCESSED)
@broker.socket_option
def command(paths: Sequence[str], socket_path: str) -> int:
    """Write files to standard output, one after the other, byte for byte.

    The broker opens them, as far as its policy allows you to have them. What
    it does not give is told on standard error, and the others follow.

    \b
    Exit status: 0  every file was written
                 1  a file was not given, or could not be read
                 2  no broker, wrong use, or the output could not be written

    \b
    Examples:  fdbroker cat /home/alice/notes.txt
               fdbroker cat /var/log/app/a.log /var/log/app/b.log | grep ERROR
               fdbroker cat /srv/mail/archive.tar | tar t
    """  # noqa: D301 - \b is click's mark for a paragraph that keeps its lines
    starts = [absolute(path) for path in paths]
    status = 0
    with broker.connect(socket_path) as connected:
        try:
            with connected.open_many(starts) as results:
                for path, result in zip(starts, results, strict=True):
                    problem = _cat(path, result, socket_path)
                    if problem is not None:
                        complain_printable(problem)
                        status = 1
        except BrokerError as error:
            raise Failure(str(broker.obstacle(socket_path, error))) from error
    flush()
    return status


def _cat(path: bytes, result: OpenedFile, socket_path: str) -> str | None:
    """Write a file; return why that was not possible, printable, or None."""
    if result.error is not None:
        return broker.refusal(path, result.error, socket_path)
    with result.file as file:
        problem = _write(file)
    return None if problem is None else f"{printable(path)}: can't be read: {printable(problem)}"


def _write(file: BufferedReader) -> str | None:
    """Write a file; return why it could not be read to its end, or None."""
    while True:
        try:
            data = file.read1(_CHUNK)
        except OSError as error:
            return error.strerror or str(error)
        if not data:
            return None
        write_bytes(data)
