"""A listing that is read further than it was asked for."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from fdbroker.scan.tree import File

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from fdbroker.scan.tree import Found

LOOK_AHEAD = 200_000  # entries, some 200 bytes each: the end of any larger tree is told when it is nearer
_AT_A_TIME = 64


class Ahead:
    """What a walk finds, read further than was asked for, so that a bar knows how much there is.

    An iterator over the same. It goes `limit` entries ahead at most, some
    for each that is taken: nobody waits for the listing of a whole tree. An
    error of the walk is raised in its place, behind all that came before it.
    With a limit of 0 a loop does not count: there is no bar then.
    """

    def __init__(self, found: Iterable[Found], limit: int) -> None:
        self._found = iter(found)
        self._limit = limit
        self._waiting: deque[Found] = deque()
        self._error: Exception | None = None
        self.files = 0
        self.complete = False

    def __iter__(self) -> Iterator[Found]:
        """Return itself; or the rest, where nothing is read ahead of it, so that each entry costs less."""
        return self if self._limit else self._rest()

    def _rest(self) -> Iterator[Found]:
        while self._waiting:
            yield self._waiting.popleft()
        if self._error is not None:
            raise self._error
        if not self.complete:
            yield from self._found

    def __next__(self) -> Found:
        """Return the next one; raises as the walk does."""
        waiting = self._waiting
        if not self.complete:
            if not waiting:
                self._read(1)
            if self._limit > len(waiting):
                self._read(min(_AT_A_TIME, self._limit - len(waiting)))
        if waiting:
            return waiting.popleft()
        if self._error is not None:
            raise self._error
        raise StopIteration

    def read_until(self, enough: Callable[[], bool]) -> None:
        """Read ahead for somebody who has nothing else to do, as far as is allowed at all."""
        while not self.complete and len(self._waiting) < LOOK_AHEAD and not enough():
            self._read(_AT_A_TIME)

    def _read(self, count: int) -> None:
        while count > 0 and not self.complete:
            count -= 1
            try:
                found = next(self._found)
            except StopIteration:
                self.complete = True
            except OSError as error:
                self._error = error
                self.complete = True
            else:
                self.files += isinstance(found, File)
                self._waiting.append(found)
