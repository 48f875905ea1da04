"""A scan: list, open through the broker, have a worker read, give verdicts."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, NamedTuple, Protocol

from fdbroker.client import BrokerError, DirectoryError
from fdbroker.scan.tree import File, Found, NotAFile, walk
from fdbroker.scan.verdict import Answer, Error, Reason, Verdict

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from fdbroker.client import Client
    from fdbroker.scan.supervisor import Done

DEFAULT_BATCH = 64
_new = tuple.__new__  # what a NamedTuple does itself, by a function in Python; there is one for each file


class Scanned(NamedTuple):
    """A path with its verdict. `size` in bytes, None if it could not be opened.

    `directory`: it is a directory that could not be listed. `answers`: of each engine.
    """

    path: bytes
    verdict: Verdict
    size: int | None = None
    directory: bool = False
    answers: tuple[Answer, ...] = ()


class Skipped(NamedTuple):
    """An entry that is no regular file and no directory; `kind` says what it is."""

    path: bytes
    kind: str


class Scanner(Protocol):
    """Who gives verdicts: a `Supervisor` or a `Pool`."""

    def submit(self, path: bytes, descriptor: int) -> Iterable[Done]:
        """Hand in a file; yield verdicts of whatever files, as many as it takes to have room for more."""

    def finish(self) -> Iterator[Done]:
        """Yield the verdicts of all files that are under way."""


def scan(
    client: Client,
    scanner: Scanner,
    starts: Iterable[bytes],
    *,
    batch: int = DEFAULT_BATCH,
    found: Iterable[Found] | None = None,
) -> Iterator[Scanned | Skipped]:
    """Scan the files and trees at `starts`, which are absolute paths; yield verdicts as they come.

    `found` is what `walk` finds there, for a caller who wants to see it first.

    Raises:
        BrokerError: the broker does not answer any more. What was known to
            exist has its verdict by then; what else there is, nobody knows.

    """
    # Of what the listing found: what is no file, and the files whose opening is under way.
    aside: deque[Scanned | Skipped] = deque()
    asked: deque[File] = deque()

    def paths() -> Iterator[bytes]:
        for entry in walk(client, starts) if found is None else found:
            if isinstance(entry, File):
                asked.append(entry)
                yield entry.path
            elif isinstance(entry, NotAFile):
                aside.append(Skipped(entry.path, entry.kind))
            else:
                aside.append(_unlisted(entry.path, entry.error))

    broken: BrokerError | None = None
    with client.open_many(paths(), batch=batch) as results:
        try:
            for result in results:
                if aside:
                    yield from _take(aside)
                file = asked.popleft()
                if result.error is None:
                    for path, size, verdict, answers in scanner.submit(file.path, result.detach()):
                        yield _new(Scanned, (path, verdict, size, False, answers))
                else:
                    yield _not_opened(file, result.error)
        except BrokerError as error:
            broken = error
    for path, size, verdict, answers in scanner.finish():
        yield _new(Scanned, (path, verdict, size, False, answers))
    yield from _take(aside)
    if broken is not None:
        for file in asked:
            yield Scanned(file.path, error_of(broken))
        raise broken


def error_of(error: BrokerError) -> Error:
    """Return the verdict on what the broker did not give: its reason, as docs/protocol.md names it."""
    text = error.strerror or str(error)
    if not error.reason:
        return Error(Reason.BROKER_GONE, text)
    return Error(Reason(error.reason.name.lower()), text)


def _not_opened(file: File, error: BrokerError) -> Scanned:
    if file.unlisted is not None and isinstance(error, DirectoryError):
        return _unlisted(file.path, file.unlisted)
    return Scanned(file.path, error_of(error))


def _unlisted(path: bytes, error: BrokerError) -> Scanned:
    return Scanned(path, error_of(error), directory=True)


def _take(queue: deque[Scanned | Skipped]) -> Iterator[Scanned | Skipped]:
    while queue:
        yield queue.popleft()
