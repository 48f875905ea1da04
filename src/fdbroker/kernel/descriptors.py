"""Descriptors with one owner, closed on every path."""

from __future__ import annotations

import os

TYPE_CHECKING = False  # as typing has it, which takes a worker longer to load than this package
if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import TracebackType
    from typing import Self


def close_all(descriptors: list[int]) -> None:
    """Close every descriptor and empty the list. An error of close(2) changes nothing: the number is free."""
    if len(descriptors) == 1:  # as mostly: what is done for many would be in the time of each request
        least = descriptors.pop()
        os.closerange(least, least + 1)
        return
    # Numbers stand in a row, mostly, and close_range(2) takes a whole one.
    if descriptors:
        least, most = min(descriptors), max(descriptors)
        if most - least + 1 == len(descriptors):
            descriptors.clear()
            os.closerange(least, most + 1)
            return
    descriptors.sort()
    while descriptors:
        most = least = descriptors.pop()
        while descriptors and descriptors[-1] == least - 1:
            least = descriptors.pop()
        os.closerange(least, most + 1)


class Descriptors:
    """Owns open descriptors until somebody takes them; closes the rest.

    Make it before looking at the message that the descriptors came with. As a
    context manager it closes what is left at the end of the block.
    """

    __slots__ = ("_owned",)

    def __init__(self, owned: Iterable[int] = ()) -> None:
        self._owned = list(owned)

    def __len__(self) -> int:
        """Return how many are owned."""
        return len(self._owned)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close what is left."""
        self.close()

    def __del__(self) -> None:
        """Close what an exception left behind: the last resort, not the way."""
        if self._owned:
            close_all(self._owned)

    def add(self, descriptor: int) -> None:
        """Own one more."""
        self._owned.append(descriptor)

    def numbers(self) -> list[int]:
        """Return the numbers, in order; the ownership stays here."""
        return list(self._owned)

    def take(self) -> int:
        """Give the first one to the caller, who owns it from now on.

        Raises:
            IndexError: none is left.

        """
        return self._owned.pop(0)

    def take_all(self) -> list[int]:
        """Give all to the caller, in order."""
        owned, self._owned = self._owned, []
        return owned

    def close(self) -> None:
        """Let go of what is left."""
        close_all(self._owned)
