"""Whose file is next: users take turns, and of each user the clients; no I/O.

A user who has a million files waiting has one turn, as has one who has a single file. A client keeps the
turn of its user for some files, as a worker that goes from one owner's files to another's is a new one.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

# Files of one client before the next one of its user has its turn.
FILES_OF_A_TURN = 16

_Item = TypeVar("_Item")


class Source:
    """A client: whose files have turns. `user`: its uid, by the kernel's word; `held`: it has no turn now."""

    __slots__ = ("held", "user")

    def __init__(self, user: int) -> None:
        self.user = user
        self.held = False


class _User(Generic[_Item]):
    """What waits of a user: in the order of turns of its clients."""

    __slots__ = ("left", "waiting")

    def __init__(self) -> None:
        self.waiting: dict[Source, deque[_Item]] = {}
        self.left = FILES_OF_A_TURN

    def current(self) -> Source | None:
        """Return the client whose turn it is, None if all are held."""
        for source in self.waiting:
            if not source.held:
                return source
        return None

    def end_turn(self, source: Source) -> None:
        """Have the next client, if there is one."""
        self.left = FILES_OF_A_TURN
        if source in self.waiting:
            self.waiting[source] = self.waiting.pop(source)


class Turns(Generic[_Item]):
    """Items that wait, in the order of the turns."""

    def __init__(self) -> None:
        self._users: dict[int, _User[_Item]] = {}
        self.count = 0
        """How many wait."""

    def add(self, source: Source, item: _Item) -> None:
        """Have it wait behind the others of its client."""
        user = self._users.get(source.user)
        if user is None:
            user = self._users[source.user] = _User()
        queue = user.waiting.get(source)
        if queue is None:
            queue = user.waiting[source] = deque()
        queue.append(item)
        self.count += 1

    def users(self) -> list[int]:
        """Return who has something that may be taken, in the order of turns."""
        return [number for number, user in self._users.items() if user.current() is not None]

    def first(self, user: int) -> _Item | None:
        """Return what is next of a user, and leave it there; None: nothing is."""
        waiting = self._users.get(user)
        if waiting is None or (source := waiting.current()) is None:
            return None
        return waiting.waiting[source][0]

    def take(self, user: int) -> _Item:
        """Take what is next of a user; it is another user's turn then.

        Raises:
            KeyError: nothing is.

        """
        waiting = self._users.pop(user)
        source = waiting.current()
        if source is None:
            self._users[user] = waiting
            raise KeyError(user)
        queue = waiting.waiting[source]
        item = queue.popleft()
        self.count -= 1
        waiting.left -= 1
        if not queue:
            del waiting.waiting[source]
        if not queue or waiting.left <= 0:
            waiting.end_turn(source)
        if waiting.waiting:
            self._users[user] = waiting
        return item

    def remove(self, source: Source, wanted: Callable[[_Item], bool]) -> list[_Item]:
        """Take those items of a client out that are `wanted`."""
        user = self._users.get(source.user)
        queue = None if user is None else user.waiting.get(source)
        if user is None or queue is None:
            return []
        removed = [item for item in queue if wanted(item)]
        if removed:
            left = deque(item for item in queue if not wanted(item))
            self.count -= len(removed)
            if left:
                user.waiting[source] = left
            else:
                del user.waiting[source]
                if not user.waiting:
                    del self._users[source.user]
        return removed

    def clear(self) -> list[_Item]:
        """Take all of them."""
        items = [item for user in self._users.values() for queue in user.waiting.values() for item in queue]
        self._users.clear()
        self.count = 0
        return items
