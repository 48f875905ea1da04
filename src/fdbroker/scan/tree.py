"""What there is to scan: a tree, listed through the broker.

A list of directories to do, no recursion: depth costs memory, not stack. Loops
can't be, since symbolic links are not followed.
"""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING, NamedTuple

from fdbroker.client import BrokerError, BrokerTimeoutError, NotDirectoryError, TooManyFilesError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from fdbroker.client import Client, ListEntry

# d_type of readdir(3) is what st_mode has in its upper bits.
_UNKNOWN = 0
_DIRECTORY = stat.S_IFDIR >> 12
_REGULAR = stat.S_IFREG >> 12
_KINDS = {
    stat.S_IFIFO >> 12: "fifo",
    stat.S_IFCHR >> 12: "character device",
    stat.S_IFBLK >> 12: "block device",
    stat.S_IFLNK >> 12: "symbolic link",
    stat.S_IFSOCK >> 12: "socket",
}


class File(NamedTuple):
    """Something to open. `unlisted`: it may be a directory; then this is why it could not be listed."""

    path: bytes
    unlisted: BrokerError | None = None


class NotAFile(NamedTuple):
    """An entry that is never opened; `kind` says what it is."""

    path: bytes
    kind: str


class Unlisted(NamedTuple):
    """A directory that could not be listed, or not to its end."""

    path: bytes
    error: BrokerError


Found = File | NotAFile | Unlisted


def walk(client: Client, starts: Iterable[bytes]) -> Iterator[Found]:
    """Yield what lies below `starts`, which are absolute paths of files or directories.

    Raises:
        BrokerError: the broker does not answer any more; it is not about one directory.

    """
    for start in starts:
        yield from _from(client, start)


def is_about_the_connection(error: BrokerError) -> bool:
    """Return whether an error speaks of the broker, not of the path that was asked for."""
    return isinstance(error, (ConnectionError, BrokerTimeoutError, TooManyFilesError))


def _from(client: Client, start: bytes) -> Iterator[Found]:
    # What is not known to be a directory is tried as one; what can't be listed may be opened.
    directories = [(start, False)]
    while directories:
        path, known = directories.pop()
        try:
            for entry in client.list(path):
                found = _entry(path, entry)
                if found is None:
                    directories.append((_join(path, entry.name), _kind(entry) == _DIRECTORY))
                else:
                    yield found
                known = True
        except BrokerError as error:
            if is_about_the_connection(error):
                raise
            if known:
                yield Unlisted(path, error)
            else:
                yield File(path, None if isinstance(error, NotDirectoryError) else error)


def _entry(directory: bytes, entry: ListEntry) -> File | NotAFile | None:
    """Return what an entry is, None if it is to be listed, or to be tried."""
    kind = _kind(entry)
    if kind in {_DIRECTORY, _UNKNOWN}:
        return None
    path = _join(directory, entry.name)
    if kind == _REGULAR:
        return File(path)
    return NotAFile(path, _KINDS.get(kind, "of an unknown kind"))


def _kind(entry: ListEntry) -> int:
    return entry.kind if entry.stat is None else stat.S_IFMT(entry.stat.mode) >> 12


def _join(directory: bytes, name: bytes) -> bytes:
    return directory + name if directory == b"/" else directory + b"/" + name
