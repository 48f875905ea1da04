"""The pool in an event loop: files of clients in, verdicts out, and how many may wait.

Everything that waits has a descriptor, and the process has only so many. So each connection may have a number
of files here, a user a share of all that there may be, and who has as many is not read from. Trees and paths,
which the service itself opens, use half of that: what a client says besides (cancel, status) is heard.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from fdbroker.scan.service.watch import READABLE
from fdbroker.scan.turns import Source

if TYPE_CHECKING:
    from collections.abc import Callable

    from fdbroker.sandbox import Zygote
    from fdbroker.scan.pool import Pool
    from fdbroker.scan.service.configuration import Limits
    from fdbroker.scan.service.watch import Watch
    from fdbroker.scan.stamps import Stamp
    from fdbroker.scan.supervisor import Done, Loaded
    from fdbroker.scan.verdict import Error


class Ticket(NamedTuple):
    """What a file is handed in with: whose it is, which request it belongs to, who is told the verdict."""

    files: ClientFiles
    request: object
    tell: Callable[[Done], None]


class Hub:
    """Drives a pool. For one event loop, the one that runs when it is made."""

    def __init__(self, pool: Pool, limits: Limits, watch: Watch) -> None:
        self.pool = pool
        self.limits = limits
        self.queued = 0
        self.scanned = 0
        self._of_user: dict[int, int] = {}
        self._clients: dict[Source, ClientFiles] = {}
        self._loop = asyncio.get_running_loop()
        self._watch = watch
        self._watch.after = self.advance
        # What was watched last: of each worker, and of outside engines.
        self._workers: list[tuple[int, object]] = [(-1, None)] * pool.workers
        self._outside: list[int] = []
        self._ready: set[int] = set()
        self._is_due = False
        self._timer: asyncio.TimerHandle | None = None
        self._soon: asyncio.Handle | None = None
        self._closed = False

    @property
    def is_timed(self) -> bool:
        """Whether the pool will be looked after, though nothing happens, before any file can be late."""
        return self._timer is not None

    @property
    def clients(self) -> int:
        """How many connections may hand in files."""
        return len(self._clients)

    def client(self, user: int) -> ClientFiles:
        """Return what a connection of a user hands in files by; the caller closes it."""
        made = ClientFiles(self, Source(user))
        self._clients[made.source] = made
        return made

    def close(self) -> None:
        """Let go of the loop. The pool is its maker's."""
        self._closed = True
        self._watch.after = None
        self._let_go_of_outside()
        self._follow_workers([(-1, None)] * self.pool.workers)
        for handle in (self._timer, self._soon):
            if handle is not None:
                handle.cancel()

    def go_on(self) -> None:
        """Have the pool looked after, at the latest in the next round of the loop."""
        self._is_due = True
        if self._soon is None and not self._watch.in_round and not self._closed:
            self._soon = self._loop.call_soon(self.advance)

    def has_room(self, files: ClientFiles, part: int) -> bool:
        """Return whether a client may have one more file here, of the `part`th part of its room."""
        share = self.limits.total // (len(self._of_user) + 1)
        user = files.source.user
        return (
            files.queued < max(1, self.limits.per_client // part)
            and self._of_user.get(user, 0) < max(1, share // part)
            and self.queued < self.limits.total
        )

    def count(self, files: ClientFiles, change: int) -> None:
        """Note that a client has so many files more here, or fewer."""
        user = files.source.user
        files.queued += change
        self.queued += change
        count = self._of_user.get(user, 0) + change
        if count:
            self._of_user[user] = count
        else:
            self._of_user.pop(user, None)

    def forget(self, files: ClientFiles) -> None:
        """Drop what a client has here."""
        self.cancel(files, lambda _: True)
        self._clients.pop(files.source, None)

    def cancel(self, files: ClientFiles, wanted: Callable[[object], bool]) -> int:
        """Drop files of a client, by the requests that they belong to; return how many."""
        if not files.queued:
            return 0

        def of_ticket(ticket: object) -> bool:
            return isinstance(ticket, Ticket) and wanted(ticket.request)

        self._let_go_of_outside()
        dropped = len(self.pool.cancel(files.source, of_ticket))
        # Workers were ended, and their numbers may be others' before the pool is looked after.
        self._follow_workers(self.pool.workers_to_watch())
        self.go_on()
        if dropped:
            self.count(files, -dropped)
            self.make_room_known()
        return dropped

    def adopt(self, loaded: Loaded | None) -> Zygote | None:
        """Go on with engines that were loaded anew; as `Pool.adopt`."""
        self._let_go_of_outside()
        outgoing = self.pool.adopt(loaded)
        self._follow_workers(self.pool.workers_to_watch())
        self._ready.update(range(self.pool.workers))  # what was under way has no worker now
        self.go_on()
        return outgoing

    def advance(self) -> None:
        """Look after the pool, if there is anything to do."""
        if not self._is_due or self._closed:
            return
        self._is_due = False
        if self._soon is not None:
            self._soon.cancel()
            self._soon = None
        ready, self._ready = self._ready, set()
        # A descriptor of theirs may be closed, and its number be another one's: so they are watched anew.
        self._let_go_of_outside()
        try:
            finished = self.pool.advance(1, ready)
        finally:
            # Whatever it was: those that are under way are waited for.
            self._wait()
        for source, ticket, done in finished:
            assert isinstance(ticket, Ticket)  # noqa: S101 - for the type checker
            self.scanned += 1
            self.count(ticket.files, -1)
            if source in self._clients:  # unless it has gone since, in this very round
                try:
                    ticket.tell(done)
                except Exception as error:  # noqa: BLE001 - whatever it is, the others are told
                    self._loop.call_exception_handler(
                        {"message": "a client was not told", "exception": error}
                    )
        if finished:
            self.make_room_known()

    def _wait(self) -> None:
        """Be called when there is more to do."""
        self._follow_workers(self.pool.workers_to_watch())
        for fileno in self.pool.outside_filenos():
            self._watch.add(fileno, READABLE, self._on_outside)
            self._outside.append(fileno)
        deadline = self.pool.deadline()
        if deadline is None or (self._timer is not None and self._timer.when() <= deadline):
            return  # it looks again then
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(deadline, self._on_time)

    def _on_time(self) -> None:
        self._timer = None
        self._is_due = True
        self._ready.update(range(self.pool.workers))  # who is late says nothing
        self.advance()

    def _on_outside(self, _events: int) -> None:
        self._is_due = True

    def _follow_workers(self, workers: list[tuple[int, object]]) -> None:
        """Watch what workers say by; those that are what they were stay as they are."""
        if workers == self._workers:
            return
        for before, now in zip(self._workers, workers, strict=True):
            if now != before and before[0] >= 0:
                self._watch.let_go(before[0])
        for number, (before, now) in enumerate(zip(self._workers, workers, strict=True)):
            if now != before and now[0] >= 0:
                self._watch.add(now[0], READABLE, partial(self._on_worker, number))
        self._workers = workers

    def _on_worker(self, number: int, _events: int) -> None:
        self._ready.add(number)
        self._is_due = True

    def _let_go_of_outside(self) -> None:
        for fileno in self._outside:
            self._watch.let_go(fileno)
        self._outside.clear()

    def make_room_known(self) -> None:
        """Have clients that wait for room look whether there is some."""
        for files in tuple(self._clients.values()):
            files.look_again()


class ClientFiles:
    """The files of one connection. Its user has turns with others; connections of one user share these."""

    def __init__(self, hub: Hub, source: Source) -> None:
        self.source = source
        self.queued = 0
        self.on_room: Callable[[], None] | None = None
        self._hub = hub
        self._waiting: list[asyncio.Future[None]] = []

    def submit(
        self,
        request: object,
        tell: Callable[[Done], None],
        path: bytes,
        descriptor: int,
        *,
        max_size: int | None = None,
        owner: int | None = None,
        before: Stamp | Error | None = None,
    ) -> None:
        """Hand in a file of a request, whose descriptor is the pool's from now on.

        `tell` is called with its verdict, once, unless the request is cancelled before. `max_size`, `owner`,
        `before`: as of `Pool.enqueue`.
        """
        ticket = Ticket(self, request, tell)
        self._hub.count(self, 1)
        is_settled = self._hub.pool.enqueue(
            self.source, ticket, path, descriptor, max_size=max_size, owner=owner, before=before
        )
        if not is_settled or not self._hub.is_timed:
            self._hub.go_on()

    def keep_waiting(self, change: int) -> None:
        """Count so many files more, or fewer, that wait for something else before they are handed in."""
        self._hub.count(self, change)
        if change < 0:
            self._hub.make_room_known()

    def may_be_given(self) -> bool:
        """Return whether there is room for one more descriptor that the client sends."""
        return not self._hub.queued or self._hub.has_room(self, 1)

    def may_open(self) -> bool:
        """Return whether there is room for one more file that is opened for it, and it hears of them."""
        return not self.source.held and self._hub.has_room(self, 2)

    async def room(self) -> None:
        """Wait until a file may be opened."""
        while not self.may_open():
            waiting = asyncio.get_running_loop().create_future()
            self._waiting.append(waiting)
            try:
                await waiting
            finally:
                if waiting in self._waiting:
                    self._waiting.remove(waiting)

    def hold(self, *, held: bool) -> None:
        """Have no turns any more, or again: of who does not read the answers no file is scanned."""
        if self.source.held is not held:
            self.source.held = held
            self._hub.go_on()
            self.look_again()

    def cancel(self, request: object) -> int:
        """Drop the files of a request; return how many. Nobody is told anything of them any more."""
        return self._hub.cancel(self, lambda one: one is request)

    def close(self) -> None:
        """Drop all of them."""
        self.on_room = None
        self._hub.forget(self)

    def look_again(self) -> None:
        """Wake up who waits for room, if there is some."""
        if self._waiting and self.may_open():
            waiting, self._waiting = self._waiting, []
            for each in waiting:
                if not each.done():
                    each.set_result(None)
        if self.on_room is not None and self.may_be_given():
            self.on_room()
