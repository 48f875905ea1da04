"""`fdbroker ls`."""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING

import click

from fdbroker.cli import broker
from fdbroker.cli.entries import kind_of, stat_columns, stat_members
from fdbroker.cli.failure import Failure
from fdbroker.cli.output import complain_printable, path_members, write_json, write_line
from fdbroker.cli.paths import absolute
from fdbroker.client import BrokerError, ListEntry, NotDirectoryError
from fdbroker.config.names import printable
from fdbroker.scan.tree import is_about_the_connection

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fdbroker.client import Client


@click.command("ls", short_help="List a directory as the policy lets you see it.")
@click.argument("paths", metavar="PATH...", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option(
    "-l", "--long", "is_long", is_flag=True, help="Show mode, links, owner, group, size and time (UTC) too."
)
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object per entry (see docs/cli.md).")
@broker.socket_option
def command(paths: Sequence[str], socket_path: str, *, is_long: bool, as_json: bool) -> int:
    """List directories as the broker's policy lets you see them.

    What you may not see is left out, as if it were not there. A path that is
    no directory is shown itself. Names are shown with everything that could
    play with a terminal as \\xNN; --json has their exact bytes.

    \b
    Exit status: 0  everything was listed
                 1  a path was not given
                 2  no broker, wrong use, or the output could not be written

    \b
    Examples:  fdbroker ls /home
               fdbroker ls -l /home/alice /var/log
               fdbroker ls --json /srv | jq -r .path
    """  # noqa: D301 - \b is click's mark for a paragraph that keeps its lines
    starts = [absolute(path) for path in paths]
    status = 0
    with broker.connect(socket_path) as connected:
        for number, path in enumerate(starts):
            action, directory = "list", True
            try:
                try:
                    entries = sorted(connected.list(path), key=lambda entry: entry.name)
                except NotDirectoryError:
                    action, directory = "stat", False
                    entries = [_itself(connected, path)]
            except BrokerError as error:
                if is_about_the_connection(error):
                    raise Failure(str(broker.obstacle(socket_path, error))) from error
                complain_printable(broker.refusal(path, error, socket_path, action))
                status = 1
                continue
            if as_json:
                for entry in entries:
                    write_json(_document(path, directory, entry))
                continue
            if len(starts) > 1 and directory:
                write_line(f"{'' if number == 0 else chr(10)}{printable(path)}:")
            for line in _lines(entries, is_long=is_long):
                write_line(line)
    return status


def _itself(connected: Client, path: bytes) -> ListEntry:
    """Return what is under a path that is no directory; raises as `stat` does."""
    facts = connected.stat(path)
    return ListEntry(path, stat.S_IFMT(facts.mode) >> 12, facts)


def _document(directory_path: bytes, is_inside: bool, entry: ListEntry) -> dict[str, object]:  # noqa: FBT001
    path = directory_path.rstrip(b"/") + b"/" + entry.name if is_inside else directory_path
    document: dict[str, object] = {**path_members(path), "kind": kind_of(entry.kind, entry.stat).words}
    return document if entry.stat is None else document | stat_members(entry.stat)


def _lines(entries: Sequence[ListEntry], *, is_long: bool) -> list[str]:
    if not is_long:
        return [printable(entry.name) for entry in entries]
    rows = [(*stat_columns(entry.kind, entry.stat), printable(entry.name)) for entry in entries]
    widths = [max(len(row[column]) for row in rows) for column in range(6)] if rows else []
    right = {1, 4}  # numbers
    return [
        " ".join(
            row[column].rjust(width) if column in right else row[column].ljust(width)
            for column, width in enumerate(widths)
        )
        + f" {row[-1]}"
        for row in rows
    ]
