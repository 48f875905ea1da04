"""The broker's audit in files: rotated ones with the one in use, compressed or not, also while it grows."""

from __future__ import annotations

import contextlib
import gzip
import os
import re
import time
import zlib
from typing import TYPE_CHECKING

from fdbroker.cli.audit_records import Line
from fdbroker.config.names import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator
    from typing import BinaryIO

_PAUSE = 0.2  # seconds
_CHUNK = 1 << 16  # bytes
_GZIP = b"\x1f\x8b"
# What logrotate adds to a name: a number, or with dateext a date (and with dateformat a time).
_ROTATED = re.compile(r"\.(?P<number>\d{1,9})(\.gz)?|-(?P<date>[0-9][0-9T_-]*)(\.gz)?")


def read_lines(file: Iterable[bytes], source: str = "") -> Iterator[Line]:
    """Yield the lines that are there.

    Raises:
        OSError: it can't be read, or is compressed and damaged (gzip.BadGzipFile).

    """
    try:
        for number, text in enumerate(file, 1):
            yield Line(number, text.rstrip(b"\n"), text.endswith(b"\n"), source)
    except (EOFError, zlib.error) as error:
        raise gzip.BadGzipFile(f"what is compressed in it is damaged: {error}") from error


@contextlib.contextmanager
def lines_of(path: str) -> Iterator[Iterator[Line]]:
    """Give the lines of a file, compressed (gzip) or not, as its first bytes say. Raises as `read_lines`."""
    with open(path, "rb") as file:
        if file.peek(2)[:2] != _GZIP:
            yield read_lines(file, printable(path))
            return
        with gzip.GzipFile(fileobj=file) as unpacked:
            yield read_lines(unpacked, printable(path))


def with_rotated(path: str) -> list[str]:
    """Return the files that `path` was rotated to, the oldest first, and `path` itself.

    Names as logrotate makes them: with a number, of which the highest is the oldest, or a date.
    """
    directory, name = os.path.split(path)
    numbered: list[tuple[int, str]] = []
    dated: list[str] = []
    for entry in os.listdir(directory or "."):
        found = _ROTATED.fullmatch(entry.removeprefix(name)) if entry.startswith(name) else None
        if found is None:
            continue
        if found["number"] is not None:
            numbered.append((-int(found["number"]), entry))
        else:
            dated.append(entry)
    older = [entry for _, entry in sorted(numbered)] + sorted(dated)
    return [*(os.path.join(directory, entry) for entry in older), path]


def follow_lines(
    path: str, *, pause: Callable[[], None] = lambda: time.sleep(_PAUSE)
) -> Generator[Line | None]:
    """Yield lines as they are written, for ever, whatever becomes of the file, like `tail -F`.

    A file that is renamed is read on until there is something in the one that took
    its name; one that is cut to nothing is read from its beginning; one that is
    not there is waited for. None stands where nothing more is there now.

    Raises:
        OSError: it can't be opened for another reason than that it is missing.

    """
    while True:
        try:
            file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed below
        except FileNotFoundError:
            yield None
            pause()
            continue
        with file:
            yield from _follow_one(path, file, pause)


def _follow_one(path: str, file: BinaryIO, pause: Callable[[], None]) -> Generator[Line | None]:
    """Yield the lines of one file until another one has its name."""
    number, partial, ended = 0, b"", False
    while True:
        chunk = file.read(_CHUNK)
        if chunk:
            *lines, partial = (partial + chunk).split(b"\n")
            for text in lines:
                number += 1
                yield Line(number, text)
            continue
        if ended:
            # It was renamed, the new one is written to, and this one has been read to its end since.
            if partial:
                yield Line(number + 1, partial, whole=False)
            return
        yield None
        here = os.fstat(file.fileno())
        if here.st_size < file.tell():
            file.seek(0)
            number, partial = 0, b""
            continue
        try:
            there = os.stat(path)
        except FileNotFoundError:
            pause()  # between renaming the old one and making the new one
            continue
        # While the new one is empty, the broker may still write to this one: it is made before it is used.
        ended = not os.path.samestat(here, there) and there.st_size > 0
        if not ended:
            pause()
