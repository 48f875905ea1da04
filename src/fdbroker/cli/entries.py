"""How directory entries are shown: their kind, their stat record in columns and as JSON members."""

from __future__ import annotations

import datetime as dt
import stat
from typing import TYPE_CHECKING, NamedTuple

from fdbroker.config.names import group_name, printable, user_name

if TYPE_CHECKING:
    from fdbroker.client import FileStat


class Kind(NamedTuple):
    """What an entry is: in words, and as ls(1) begins its lines."""

    words: str
    letter: str


# By d_type of readdir(3).
_KINDS = {
    stat.S_IFREG >> 12: Kind("file", "-"),
    stat.S_IFDIR >> 12: Kind("directory", "d"),
    stat.S_IFLNK >> 12: Kind("symlink", "l"),
    stat.S_IFIFO >> 12: Kind("fifo", "p"),
    stat.S_IFSOCK >> 12: Kind("socket", "s"),
    stat.S_IFCHR >> 12: Kind("character device", "c"),
    stat.S_IFBLK >> 12: Kind("block device", "b"),
}
_UNKNOWN = Kind("unknown", "?")


def kind_of(d_type: int, facts: FileStat | None) -> Kind:
    """Return what an entry is: by its stat record, or where there is none by `d_type` of readdir(3)."""
    return _KINDS.get(d_type if facts is None else stat.S_IFMT(facts.mode) >> 12, _UNKNOWN)


def stat_members(facts: FileStat) -> dict[str, object]:
    """Return the JSON members of a stat record."""
    return {
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


def stat_columns(d_type: int, facts: FileStat | None) -> tuple[str, str, str, str, str, str]:
    """Return mode, links, owner, group, size and time (UTC), printable; question marks without a record."""
    if facts is None:
        return kind_of(d_type, None).letter + "?" * 9, "?", "?", "?", "?", "?"
    return (
        stat.filemode(facts.mode),
        str(facts.links),
        printable(user_name(facts.uid)),
        printable(group_name(facts.gid)),
        str(facts.size),
        _time(facts.mtime_ns),
    )


def _time(nanoseconds: int) -> str:
    try:
        moment = dt.datetime.fromtimestamp(nanoseconds // 1_000_000_000, dt.UTC)
    except (OverflowError, ValueError, OSError):
        return "?"
    return moment.strftime("%Y-%m-%d %H:%M:%S")
