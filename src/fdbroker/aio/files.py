"""Requests about files, of a client for itself or on behalf of one that it acts for, for asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from typing import TYPE_CHECKING, Generic, TypeVar

from fdbroker.aio.session import Session
from fdbroker.aio.walk import Walk
from fdbroker.client.answers import (
    Contents,
    check_many,
    content_of,
    described,
    descriptor_of,
    opened,
    page_of,
    stat_of,
)
from fdbroker.client.engine import (
    DEFAULT_BATCH,
    DEFAULT_WALK_BATCH,
    ListPage,
    OpenPaths,
    StatPaths,
    sendable,
)
from fdbroker.client.requester import Requester
from fdbroker.client.results import file_from
from fdbroker.client.sealed import SEAL_LIMIT, seal_in_steps
from fdbroker.client.walk_call import WalkCall, walk_filter
from fdbroker.wire.format import MAX_PATHS, WalkKind

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterable
    from io import BufferedReader
    from types import TracebackType
    from typing import Self

    from fdbroker.client.engine import Answer, Batch, StrOrBytesPath
    from fdbroker.client.results import DescribedFile, OpenedFile, ReadFile
    from fdbroker.wire.messages import FileStat, ListEntry

_Result = TypeVar("_Result")


class Results(Generic[_Result]):
    """Results one after the other, in the order of the paths; an async iterator that should be closed.

    `aclose` (or the end of an `async with` block) closes the descriptors that
    were not delivered. Delivered ones belong to their results. For one task at a time.
    """

    def __init__(self, steps: AsyncGenerator[_Result, None]) -> None:
        self._steps = steps

    def __aiter__(self) -> AsyncIterator[_Result]:
        """Return what a loop asks."""
        return self._steps

    async def __anext__(self) -> _Result:
        """Return the next result.

        Raises:
            BrokerError: the request as a whole failed. Then there are no more.

        """
        return await anext(self._steps)

    async def __aenter__(self) -> Self:
        """Return itself."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        await self.aclose()

    async def aclose(self) -> None:
        """End it: nothing more is asked for, and what was not delivered is closed."""
        await self._steps.aclose()


class FileRequests(Requester[Session]):
    """Requests about files. Base of `Client` and `ServedClient`; see `fdbroker.client.files`."""

    async def open(
        self, path: StrOrBytesPath, *, sealed: bool = False, max_size: int = SEAL_LIMIT
    ) -> BufferedReader:
        """Return the file as a binary file object. The caller closes it. As `fdbroker.Client.open`.

        While a sealed copy is made, other tasks run after each MiB.
        """
        timeout = self._session.timeout
        until = None if timeout is None else time.monotonic() + timeout
        descriptor = await self.open_descriptor(path)
        if not sealed:
            return file_from(descriptor, path)
        try:
            with contextlib.closing(seal_in_steps(descriptor, max_size, until, os.fsencode(path))) as steps:
                while True:
                    try:
                        pause = next(steps)
                    except StopIteration as end:
                        return file_from(end.value, path)
                    await asyncio.sleep(pause)
        finally:
            os.close(descriptor)

    async def open_descriptor(self, path: StrOrBytesPath) -> int:
        """Return the file as a descriptor, which the caller has to close. Raises as `open`."""
        asked = sendable(path)
        return descriptor_of(
            await self._session.ask(OpenPaths([asked], self._acting_for), self._bound), asked
        )

    async def read_bytes(self, path: StrOrBytesPath) -> bytes:
        """Return all that is in the file. As `fdbroker.Client.read_bytes`."""
        asked = sendable(path)
        question = OpenPaths([asked], self._acting_for, copy=True)
        return content_of(await self._session.ask(question, self._bound), asked)

    def open_many(self, paths: Iterable[StrOrBytesPath], batch: int = DEFAULT_BATCH) -> Results[OpenedFile]:
        """Open many files with few messages. As `fdbroker.Client.open_many`, by `async for`."""
        check_many(paths, batch)

        async def deliver(asked: Batch, answer: Answer | None) -> Generator[OpenedFile, None, None]:
            return opened(asked, answer)

        return Results(self._session.ask_many(paths, batch, self._open_paths, deliver, self._bound))

    def read_many(self, paths: Iterable[StrOrBytesPath], batch: int = DEFAULT_BATCH) -> Results[ReadFile]:
        """Read many files with few messages. As `fdbroker.Client.read_many`, by `async for`."""
        check_many(paths, batch)
        return Results(self._session.ask_many(paths, batch, self._read_paths, self._read_all_of, self._bound))

    async def stat(self, path: StrOrBytesPath) -> FileStat:
        """Return the stat record of any kind of file; a symbolic link's own. Raises as `open`."""
        asked = sendable(path)
        return stat_of(await self._session.ask(StatPaths([asked], self._acting_for), self._bound), asked)

    def stat_many(self, paths: Iterable[StrOrBytesPath], batch: int = MAX_PATHS) -> Results[DescribedFile]:
        """Describe many files with few messages; otherwise as `open_many`."""
        check_many(paths, batch)

        async def deliver(asked: Batch, answer: Answer | None) -> Generator[DescribedFile, None, None]:
            return described(asked, answer)

        return Results(self._session.ask_many(paths, batch, self._stat_paths, deliver, self._bound))

    def walk(  # noqa: PLR0913 - each filter is one
        self,
        path: StrOrBytesPath,
        *,
        globs: Iterable[str | bytes] = (),
        kinds: WalkKind = WalkKind.REGULAR,
        least_size: int = 0,
        most_size: int | None = None,
        newer_than: int | None = None,
        descriptors: bool = True,
        batch: int = DEFAULT_WALK_BATCH,
        ahead: int = 2,
    ) -> Walk:
        """Go through everything below a directory. As `fdbroker.Client.walk`, by `async for`.

        A consumer that is slow has at most `ahead` batches of descriptors waiting for it.
        """
        asked = walk_filter(globs, kinds, least_size, most_size, newer_than)
        call = WalkCall(
            path,
            asked,
            descriptors=descriptors,
            batch=batch,
            ahead=ahead,
            acting_for=self._acting_for,
            bound=self._bound,
        )
        return Walk(self._session, call)

    # The name hides the built-in one in annotations of this class: no `list[...]` in them.
    async def list(self, path: StrOrBytesPath, *, page: int = 0) -> AsyncGenerator[ListEntry, None]:
        """Yield the entries of a directory. As `fdbroker.Client.list`; a refusal comes with the first."""
        asked = sendable(path)
        cookie, last = 0, False
        while not last:
            question = ListPage(asked, cookie, page, self._acting_for)
            reply = page_of(await self._session.ask(question, self._bound), asked)
            for entry in reply.entries:
                yield entry
            cookie, last = reply.cookie, reply.last

    async def _read_all_of(self, asked: Batch, answer: Answer | None) -> Generator[ReadFile, None, None]:
        contents = Contents(asked)
        try:
            if answer is not None:
                contents.take(answer)
            while paths := contents.missing():
                question = OpenPaths(paths, self._acting_for, copy=True)
                contents.take(await self._session.ask(question, self._bound))
        except BaseException:
            contents.close()
            raise
        return contents.results()
