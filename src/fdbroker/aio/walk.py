"""Walks, for asyncio."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fdbroker.client.errors import DisconnectedError, UnavailableError
from fdbroker.client.walk_call import WalkSoFar

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator
    from types import TracebackType
    from typing import Self

    from fdbroker.aio.session import Session
    from fdbroker.client.results import WalkedFile
    from fdbroker.client.walk_call import WalkCall


class Walk(WalkSoFar):
    """What is below a directory, one entry after the other; an async iterator that should be closed.

    As `fdbroker.client.Walk`: `aclose`, the end of an `async with` block, or a task that is cancelled while
    it waits for an entry cancel it at the broker.
    """

    def __init__(self, session: Session, call: WalkCall) -> None:
        super().__init__(call)
        self._session = session
        self._steps = self._go()

    def __aiter__(self) -> AsyncIterator[WalkedFile]:
        """Return what a loop asks."""
        return self._steps

    async def __anext__(self) -> WalkedFile:
        """Return the next entry.

        Raises:
            WalkInterrupted: the connection was lost, and the walk can't go on.
            BrokerError: the walk was refused, or failed.

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
        """Cancel it, unless it has ended; close what was not delivered. May be called again."""
        await self._steps.aclose()

    async def _go(self) -> AsyncGenerator[WalkedFile, None]:
        call = self._call
        consumed = 0
        try:
            while call.end is None:
                try:
                    answer = await self._session.next_of_walk(call, consumed)
                except (UnavailableError, DisconnectedError) as error:
                    if not call.id:
                        raise  # it never began
                    raise call.interrupted(error) from error
                with answer.descriptors:
                    for entry in call.entries_of(answer):
                        yield entry
                consumed = 1
        finally:
            call.abandon()
            self._session.send_afterthoughts()
