"""What a client wants to have scanned by its name, opened by the broker on behalf of that client."""

from __future__ import annotations

import asyncio
import contextlib
import stat
import time
from collections import deque
from typing import TYPE_CHECKING, NamedTuple, Protocol

from fdbroker.client import (
    BrokerError,
    DirectoryError,
    LimitError,
    NotDirectoryError,
    WalkInterrupted,
    WalkKind,
)
from fdbroker.scan.run import Scanned, Skipped, error_of
from fdbroker.scan.tree import EXCLUDED, KINDS, Exclusions, is_about_the_connection
from fdbroker.scan.verdict import Error, Reason

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable

    from fdbroker.aio import ServedClient

_REGULAR = stat.S_IFREG >> 12
_BATCH = 64
FAILED = "failed"  # why something is missing if nobody thought of it
DESCRIPTORS_OF_A_REQUEST = 2 * _BATCH  # that are opened and not handed in yet, at most
_SECONDS_AT_A_TIME = 0.005  # before other clients have their turn


class ToScan(NamedTuple):
    """A file that was opened; `descriptor` belongs to who has this."""

    path: bytes
    descriptor: int


Opened = ToScan | Scanned | Skipped


class OpensFiles(Protocol):
    """A request of a client whose files the broker opens; `task` does so, and is cancelled to end that."""

    task: asyncio.Task[None] | None


class OneByOne:
    """The requests of one connection whose files are to be opened: one after the other, in their order."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[OpensFiles, Callable[[], Coroutine[None, None, None]]]] = deque()
        self._running: asyncio.Task[None] | None = None

    def add(self, request: OpensFiles, open_files: Callable[[], Coroutine[None, None, None]]) -> None:
        """Call a function for a request, and run what it returns, when those before are over."""
        self._waiting.append((request, open_files))
        if self._running is None:
            self._begin_next()

    def drop(self, request: OpensFiles) -> None:
        """Begin no more with a request, and end it if it has begun."""
        self._waiting = deque(one for one in self._waiting if one[0] is not request)
        if request.task is not None:
            request.task.cancel()

    def close(self) -> None:
        """Begin with none, and end the one that has begun."""
        self._waiting.clear()
        if self._running is not None:
            self._running.cancel()

    def _begin_next(self) -> None:
        request, open_files = self._waiting.popleft()
        request.task = self._running = asyncio.create_task(open_files())
        self._running.add_done_callback(self._over)

    def _over(self, _: asyncio.Task[None]) -> None:
        self._running = None
        if self._waiting:
            self._begin_next()


async def files_at(served: ServedClient, paths: Iterable[bytes]) -> AsyncGenerator[Opened, None]:
    """Yield what becomes of each path: a file, or the error that it has.

    Raises:
        BrokerError: the broker is gone, or does not know the client any more.

    """
    async with served.open_many(list(paths), batch=_BATCH) as results:
        async for result in results:
            path = bytes(result.path)  # type: ignore[arg-type]
            if result.error is None:
                yield ToScan(path, result.detach())
            elif is_about_the_connection(result.error):
                raise result.error
            else:
                yield Scanned(path, error_of(result.error))


class TreeOfFiles:
    """Everything at a path and below it, as the policy lets the client have it.

    `missing` says, at the end, why that is not all that there is; empty: it is.
    """

    def __init__(self, served: ServedClient, start: bytes, exclusions: Exclusions) -> None:
        self.missing: tuple[str, ...] = ()
        self._served = served
        self._start = start
        self._way = ExclusionsOnTheWay(exclusions, start)

    async def entries(self) -> AsyncGenerator[Opened, None]:
        """Yield what the broker meets. A start that is no directory is a file.

        Raises:
            BrokerError: the broker is gone, or does not know the client any more.

        """
        kinds = WalkKind.REGULAR | WalkKind.SYMLINK | WalkKind.OTHER
        begun = False
        told: set[bytes] = set()
        try:
            async with self._served.walk(self._start, kinds=kinds, batch=_BATCH, ahead=1) as walk:
                async for entry in walk:
                    begun = True
                    path = bytes(entry.path)  # type: ignore[arg-type]
                    try:
                        excluded = await self._way.excluded(path)
                    except BaseException:
                        entry.close()
                        raise
                    if excluded is not None:
                        entry.close()
                        if excluded not in told:
                            told.add(excluded)
                            yield Skipped(excluded, EXCLUDED)
                    elif entry.kind != _REGULAR:
                        yield Skipped(path, KINDS.get(entry.kind, "of an unknown kind"))
                    elif entry.is_open:
                        yield ToScan(path, entry.detach())
                    else:
                        yield Scanned(
                            path, Error(Reason.DENIED, "the policy names this file, and does not open it")
                        )
                if walk.end is not None:
                    self.missing = tuple(
                        sorted(flag.name.lower() for flag in walk.end.incomplete if flag.name)
                    )
        except BrokerError as error:
            if isinstance(error, WalkInterrupted) or is_about_the_connection(error):
                raise
            # What a limit refuses would be refused for another reason as a file.
            if begun or isinstance(error, LimitError):
                yield Scanned(self._start, error_of(error), directory=True)
                return
            async with contextlib.aclosing(self._as_a_file(error)) as entries:
                async for each in entries:
                    yield each

    async def _as_a_file(self, error: BrokerError) -> AsyncGenerator[Opened, None]:
        """Yield the start as what it may be, a file, after `error` said that it can't be walked."""
        async with self._served.open_many([self._start]) as results:
            async for result in results:
                if result.error is None:
                    yield ToScan(self._start, result.detach())
                elif is_about_the_connection(result.error):
                    raise result.error
                elif isinstance(result.error, DirectoryError) and not isinstance(error, NotDirectoryError):
                    yield Scanned(self._start, error_of(error), directory=True)
                else:
                    yield Scanned(self._start, error_of(result.error))


class ExclusionsOnTheWay:
    """Exclusions as a walk meets them: what is known of a directory is not found out again for each entry.

    Globs and directories are the client's choice, and may be many. So other tasks run meanwhile.
    """

    def __init__(self, exclusions: Exclusions, start: bytes) -> None:
        self._exclusions = exclusions
        # Nothing up to the start is ever left out.
        self._fixed = len([name for name in start.split(b"/") if name])
        # Of the path that was looked at last: its names, and behind each the states of the globs.
        self._names: list[bytes] = []
        self._states = [exclusions.start()]
        self._until = 0.0

    async def excluded(self, path: bytes) -> bytes | None:
        """Return what is left out with a path: itself, or a directory on its way; None: it is not."""
        if not self._exclusions.globs:
            return None
        names = path[1:].split(b"/")
        same = 0
        for ours, theirs in zip(self._names, names, strict=False):
            if ours != theirs:
                break
            same += 1
        del self._names[same:], self._states[same + 1 :]
        for name in names[same:]:
            if self._is_out():
                break
            if time.monotonic() >= self._until:
                await asyncio.sleep(0)
                self._until = time.monotonic() + _SECONDS_AT_A_TIME
            self._states.append(self._exclusions.step(self._states[-1], name))
            self._names.append(name)
        return b"/" + b"/".join(self._names) if self._is_out() else None

    def _is_out(self) -> bool:
        return len(self._names) > self._fixed and self._exclusions.accept(self._states[-1])
