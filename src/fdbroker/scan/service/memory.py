"""How much of what clients send is kept in memory: contents, not descriptors.

All that there may be is shared by the users who have something. Whoever has more than a share waits, and is
not read from. But of each user one may always go on, the one that has waited longest to be whole: if all were
begun and none could end, they would wait for each other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Memory:
    """What all clients may have, `total` bytes; more by what is one file's of each user."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.used = 0
        self._of_user: dict[int, list[Kept]] = {}

    def keep(self, user: int, on_room: Callable[[], None]) -> Kept:
        """Return the account of one file's contents; whoever has it lets go of it.

        `on_room` is called when it may grow again, after it could not.
        """
        kept = Kept(self, user, on_room)
        self._of_user.setdefault(user, []).append(kept)
        return kept

    def has_room(self, kept: Kept, more: int) -> bool:
        """Return whether it may have so many bytes more."""
        of_user = self._of_user[kept.user]
        if next(one for one in of_user if not one.whole) is kept:
            return True
        share = self.total // (len(self._of_user) + 1)
        return self.used + more <= self.total and sum(one.size for one in of_user) + more <= share

    def forget(self, kept: Kept) -> None:
        """Drop an account."""
        of_user = self._of_user[kept.user]
        of_user.remove(kept)
        self.used -= kept.size
        if not of_user:
            del self._of_user[kept.user]
        self.make_room_known()

    def make_room_known(self) -> None:
        """Have those go on that wait and may."""
        waiting = [one for of_user in self._of_user.values() for one in of_user if one.waits_for]
        for one in waiting:
            if one.waits_for and one.may_grow(one.waits_for):
                one.on_room()


class Kept:
    """The contents of one file, as far as they are here."""

    def __init__(self, memory: Memory, user: int, on_room: Callable[[], None]) -> None:
        self.user = user
        self.on_room = on_room
        self.size = 0
        self.whole = False
        self.waits_for = 0
        self._memory = memory
        self._forgotten = False

    def may_grow(self, more: int) -> bool:
        """Return whether there is room for so many bytes; if not, it hears of it when there is."""
        room = self._memory.has_room(self, more)
        self.waits_for = 0 if room else more
        return room

    def grow(self, more: int) -> None:
        """Note that it has so many bytes more."""
        self.size += more
        self._memory.used += more

    def end(self) -> None:
        """Note that it is whole, and waits for nothing but its verdict."""
        self.whole = True
        self._memory.make_room_known()

    def let_go(self) -> None:
        """Note that it is gone. May be said again."""
        if not self._forgotten:
            self._forgotten = True
            self._memory.forget(self)
