"""`fdbroker ls`."""

from __future__ import annotations

import datetime as dt
import stat
from typing import TYPE_CHECKING

import click

from fdbroker.cli import broker
from fdbroker.cli.failure import Failure
from fdbroker.cli.output import complain_printable, path_members, write_json, write_line
from fdbroker.cli.paths import absolute
from fdbroker.client import BrokerError, ListEntry, NotDirectoryError
from fdbroker.config.names import group_name, printable, user_name
from fdbroker.scan.tree import is_about_the_connection

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fdbroker.client import Client, FileStat

# d_type of readdir(3), and how ls(1) begins its lines.
_KINDS = {
    stat.S_IFREG >> 12: ("file", "-"),
    stat.S_IFDIR >> 12: ("directory", "d"),
    stat.S_IFLNK >> 12: ("symlink", "l"),
    stat.S_IFIFO >> 12: ("fifo", "p"),
    stat.S_IFSOCK >> 12: ("socket", "s"),
    stat.S_IFCHR >> 12: ("character device", "c"),
    stat.S_IFBLK >> 12: ("block device", "b"),
}
_UNKNOWN = ("unknown", "?")


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


def _kind(entry: ListEntry) -> tuple[str, str]:
    kind = entry.kind if entry.stat is None else stat.S_IFMT(entry.stat.mode) >> 12
    return _KINDS.get(kind, _UNKNOWN)


def _document(directory_path: bytes, is_inside: bool, entry: ListEntry) -> dict[str, object]:  # noqa: FBT001
    path = directory_path.rstrip(b"/") + b"/" + entry.name if is_inside else directory_path
    document: dict[str, object] = {**path_members(path), "kind": _kind(entry)[0]}
    facts = entry.stat
    if facts is not None:
        document |= {
            "mode": f"{stat.S_IMODE(facts.mode):04o}",
            "links": facts.links,
            "uid": facts.uid,
            "gid": facts.gid,
            "size": facts.size,
            "mtime_ns": facts.mtime_ns,
            "ctime_ns": facts.ctime_ns,
            "inode": facts.inode,
            "device": facts.device,
        }
    return document


def _lines(entries: Sequence[ListEntry], *, is_long: bool) -> list[str]:
    if not is_long:
        return [printable(entry.name) for entry in entries]
    rows = [(*_columns(entry), printable(entry.name)) for entry in entries]
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


def _columns(entry: ListEntry) -> tuple[str, str, str, str, str, str]:
    """Return mode, links, owner, group, size, time; question marks where the policy shows the name alone."""
    facts = entry.stat
    if facts is None:
        return _kind(entry)[1] + "?" * 9, "?", "?", "?", "?", "?"
    return (
        stat.filemode(facts.mode),
        str(facts.links),
        printable(user_name(facts.uid)),
        printable(group_name(facts.gid)),
        str(facts.size),
        _time(facts),
    )


def _time(facts: FileStat) -> str:
    try:
        moment = dt.datetime.fromtimestamp(facts.mtime_ns // 1_000_000_000, dt.UTC)
    except (OverflowError, ValueError, OSError):
        return "?"
    return moment.strftime("%Y-%m-%d %H:%M:%S")
