"""Whether a file, or what an engine was loaded from, is still what it was."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple, Self

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fdbroker.scan.engine import Engine

_new = tuple.__new__  # what a NamedTuple does itself, by a function in Python; there are four for each file


class Stamp(NamedTuple):
    """What changes when a file's contents do, and whose it is. Size in bytes, times in nanoseconds.

    mtime can be set back by the owner, ctime can't. A store through a mapping that was made dirty before
    moves neither: docs/scanning.md names that gap.
    """

    size: int
    mtime: int
    ctime: int
    owner: int

    @classmethod
    def of(cls, facts: os.stat_result) -> Self:
        """Return the stamp of what fstat(2) said."""
        return _new(cls, (facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_uid))


_Entry = tuple[bytes, int, int, int, int]  # path, inode, size, mtime, ctime; a missing one has -1


class Databases:
    """The databases of some engines, as they were when this was made.

    Make it before the engines are warmed up: what changes while they load is noticed then. It opens no
    file and reads none: a look costs a stat of each file.
    """

    def __init__(self, engines: Iterable[Engine]) -> None:
        self._paths = tuple(sorted({path for engine in engines for path in engine.databases()}))
        self._seen = self._look()

    def changed(self) -> bool:
        """Return whether a file was changed, replaced, added or removed."""
        return self._look() != self._seen

    def _look(self) -> frozenset[_Entry]:
        seen = set()
        for path in self._paths:
            seen.add(_entry(path))
            try:
                with os.scandir(path) as entries:
                    seen |= {_entry(entry.path) for entry in entries}
            except OSError:
                continue  # a file, or not there: that is in its entry
        return frozenset(seen)


def _entry(path: bytes) -> _Entry:
    try:
        facts = os.stat(path)
    except OSError:
        return path, -1, -1, -1, -1
    return path, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns
