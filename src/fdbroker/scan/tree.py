"""What there is to scan: a tree, listed through the broker.

A list of directories to do, no recursion: depth costs memory, not stack. Loops
can't be, since symbolic links are not followed.
"""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING, NamedTuple

from fdbroker.client import BrokerError, BrokerTimeoutError, NotDirectoryError, TooManyFilesError
from fdbroker.policy.globs import compile_glob

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from fdbroker.client import Client, ListEntry
    from fdbroker.policy.globs import Glob

# d_type of readdir(3) is what st_mode has in its upper bits.
_UNKNOWN = 0
_DIRECTORY = stat.S_IFDIR >> 12
_REGULAR = stat.S_IFREG >> 12
# What is never opened, by the kind of its entry.
KINDS = {
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


_new = tuple.__new__  # what a NamedTuple does itself, by a function in Python; there is one for each file

Found = File | NotAFile | Unlisted


EXCLUDED = "excluded"


class Exclusions:
    """Paths that are left out, by globs as those of a policy: `*` stays within a name, `**` does not.

    A glob that begins with `/` is about whole paths, any other one about the end of a path at any depth.
    What is below an excluded directory is excluded with it.

    Raises:
        ValueError: what is wrong with a glob.

    """

    def __init__(self, globs: Iterable[bytes] = ()) -> None:
        self.globs = tuple(globs)
        self._globs: list[Glob] = []
        for glob in self.globs:
            try:
                self._globs.append(compile_glob(glob[1:] if glob.startswith(b"/") else b"**/" + glob))
            except ValueError as error:
                raise ValueError(f"{glob.decode('utf-8', 'backslashreplace')}: {error}") from error

    def have(self, path: bytes) -> bool:
        """Return whether an absolute path is left out."""
        if not self._globs:
            return False
        components = path[1:].split(b"/")
        return any(glob.matches(components) for glob in self._globs)

    def start(self) -> tuple[int, ...]:
        """Return the states of the globs at the root, for `step`."""
        return tuple(glob.start for glob in self._globs)

    def step(self, states: tuple[int, ...], name: bytes) -> tuple[int, ...]:
        """Return their states after one more name of a path."""
        return tuple([glob.step(state, name) for glob, state in zip(self._globs, states, strict=True)])

    def accept(self, states: tuple[int, ...]) -> bool:
        """Return whether a path that ends here is left out."""
        return any(glob.accepts(state) for glob, state in zip(self._globs, states, strict=True))


_NOTHING = Exclusions()


def walk(client: Client, starts: Iterable[bytes], exclusions: Exclusions = _NOTHING) -> Iterator[Found]:
    """Yield what lies below `starts`, which are absolute paths of files or directories.

    What is excluded is not opened, nor entered, and yielded as `NotAFile` of the kind "excluded"; `starts`
    are never excluded.

    Raises:
        BrokerError: the broker does not answer any more; it is not about one directory.

    """
    for start in starts:
        yield from _from(client, start, exclusions)


def is_about_the_connection(error: BrokerError) -> bool:
    """Return whether an error speaks of the broker, not of the path that was asked for."""
    return isinstance(error, (ConnectionError, BrokerTimeoutError, TooManyFilesError))


def _from(client: Client, start: bytes, exclusions: Exclusions) -> Iterator[Found]:
    # What is not known to be a directory is tried as one; what can't be listed may be opened.
    directories = [(start, False)]
    excluded = exclusions.have if exclusions.globs else None
    while directories:
        path, known = directories.pop()
        prefix = path if path == b"/" else path + b"/"
        try:
            for entry in client.list(path):
                whole = prefix + entry.name
                kind = _kind(entry)
                if excluded is not None and excluded(whole):
                    yield NotAFile(whole, EXCLUDED)
                elif kind == _REGULAR:
                    yield _new(File, (whole, None))
                elif kind in {_DIRECTORY, _UNKNOWN}:
                    directories.append((whole, kind == _DIRECTORY))
                else:
                    yield NotAFile(whole, KINDS.get(kind, "of an unknown kind"))
                known = True
        except BrokerError as error:
            if is_about_the_connection(error):
                raise
            if known:
                yield Unlisted(path, error)
            else:
                yield File(path, None if isinstance(error, NotDirectoryError) else error)


def _kind(entry: ListEntry) -> int:
    return entry.kind if entry.stat is None else stat.S_IFMT(entry.stat.mode) >> 12
