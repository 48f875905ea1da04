"""A walk of the blocking client: an iterator over what the broker meets."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fdbroker.client.errors import DisconnectedError, UnavailableError
from fdbroker.client.walk_call import WalkSoFar

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator
    from types import TracebackType
    from typing import Self

    from fdbroker.client.results import WalkedFile
    from fdbroker.client.session import Session
    from fdbroker.client.walk_call import WalkCall


class Walk(WalkSoFar):
    """What is below a directory, one entry after the other; an iterator that should be closed.

    `close` (or the end of a `with` block, or of the iterator's life) cancels
    it and closes the descriptors that were not delivered. Delivered ones
    belong to their entries. To be used by one thread at a time.
    """

    def __init__(self, session: Session, call: WalkCall) -> None:
        super().__init__(call)
        self._session = session
        self._steps = self._go()

    def __iter__(self) -> Iterator[WalkedFile]:
        """Return what a loop asks: the same entries, without a call of `__next__` for each."""
        return self._steps

    def __next__(self) -> WalkedFile:
        """Return the next entry.

        Raises:
            WalkInterrupted: the connection was lost, and the walk can't go on.
            BrokerError: the walk was refused, or failed.

        """
        return next(self._steps)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Cancel it, unless it has ended; close what was not delivered. May be called again."""
        self._steps.close()
        self._session.send_afterthoughts()

    def _go(self) -> Generator[WalkedFile, None, None]:
        call = self._call
        consumed = 0
        try:
            while call.end is None:
                try:
                    answer = self._session.next_of_walk(call, consumed)
                except (UnavailableError, DisconnectedError) as error:
                    if not call.id:
                        raise  # it never began
                    raise call.interrupted(error) from error
                with answer.descriptors:
                    yield from call.entries_of(answer)
                consumed = 1
        finally:
            call.abandon()
