"""What all clients of the service share, whatever they speak: the pool, who it is, how it renews itself."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
import weakref
from typing import TYPE_CHECKING, Protocol

from fdbroker.config.names import printable
from fdbroker.sandbox import SandboxError
from fdbroker.scan.engine import EngineError
from fdbroker.scan.service.aside import AsideForUsers, run_aside
from fdbroker.scan.service.filesystems import Mounted
from fdbroker.scan.service.hub import Hub
from fdbroker.scan.service.memory import Memory
from fdbroker.scan.service.watch import Watch

if TYPE_CHECKING:
    from fdbroker.aio import ServedClient
    from fdbroker.scan.pool import Pool, Version
    from fdbroker.scan.service.configuration import Configuration, Listener
    from fdbroker.scan.supervisor import Loaded

# Of a user, whatever the number of its connections: its files in memory, and requests whose files are opened.
_MOST_COPIES = 4
_MOST_OPENINGS = 4


class Connection(Protocol):
    """A client of the service, in whatever protocol it speaks. It owns its `ServedClient`.

    Made by a `Speaks`; it takes itself out of `core.connections` when it is over.
    """

    def end(self, reason: str, text: str) -> None:
        """Say so, as far as that can be done at once, and close. `reason`: broker_gone or stopping."""


class Speaks(Protocol):
    """What serves the clients of a listener: a protocol."""

    def __call__(self, core: Core, served: ServedClient, listener: Listener) -> object:
        """Serve a client that the broker has handed over: now, or by a `Connection` that goes on."""


class Core:
    """The service without its listeners. For one event loop, the one that runs when it is made."""

    def __init__(self, configuration: Configuration, pool: Pool, versions: list[Version]) -> None:
        self.configuration = configuration
        self.watch = Watch()
        self.hub = Hub(pool, configuration.limits, self.watch)
        self.memory = Memory(configuration.stream_memory)
        self.stop = asyncio.Event()  # the service is to end
        self.versions = versions
        self.connections: dict[Connection, Listener] = {}  # each with the listener that it came by
        self.aside = AsideForUsers()
        self.closings = AsideForUsers()  # nobody waits for those, and they keep nobody waiting
        self.mounted = Mounted()
        self.began = time.monotonic()
        self.renewed = 0
        self.outdated = False  # as it was seen last
        self.listeners: dict[str, str] = {}  # each with how it is
        self._renewing: asyncio.Task[str | None] | None = None
        # Each has batches of descriptors that wait for room.
        self.openings = asyncio.Semaphore(configuration.openings)
        self._openings: weakref.WeakValueDictionary[int, asyncio.Semaphore] = weakref.WeakValueDictionary()
        self._copies: weakref.WeakValueDictionary[int, asyncio.Semaphore] = weakref.WeakValueDictionary()

    def copies_of(self, user: int) -> asyncio.Semaphore:
        """Return what each copy of a file of this user's is made under; held by its connections."""
        return self._copies.setdefault(user, asyncio.Semaphore(_MOST_COPIES))

    def openings_of(self, user: int) -> asyncio.Semaphore:
        """Return what the files of a request of this user's are opened under; held by the requests."""
        return self._openings.setdefault(user, asyncio.Semaphore(_MOST_OPENINGS))

    async def renew(self) -> str | None:
        """Load the engines anew and go on with them; return why not, None if that is done.

        Files are scanned meanwhile, and none is missed. Who asks while it is done already gets its outcome.
        """
        return await asyncio.shield(self.begin_renewal())

    def begin_renewal(self) -> asyncio.Task[str | None]:
        """Begin to do as `renew`, for a caller who does not wait; cancel not what is returned."""
        if self._renewing is None or self._renewing.done():
            self._renewing = asyncio.create_task(self._renew())
        return self._renewing

    async def _renew(self) -> str | None:
        try:
            loaded, versions = await run_aside(lambda: _load(self.hub.pool))
        except (SandboxError, EngineError, OSError) as error:
            say(f"the engines could not be loaded anew, so those from before go on: {error}")
            return str(error)
        outgoing = self.hub.adopt(loaded)
        self.versions = versions
        self.outdated = False
        self.renewed += 1
        say(
            "the engines were loaded anew: "
            + ", ".join(f"{one.engine} {one.version}" for one in self.versions)
        )
        if outgoing is not None:
            await run_aside(outgoing.close)
        return None

    async def watch_databases(self) -> None:
        """Renew the engines whenever what they were loaded from has changed; for ever."""
        while True:
            await asyncio.sleep(self.configuration.check_databases)
            self.outdated = await run_aside(self.hub.pool.outdated)
            if self.outdated:
                await self.renew()

    def status(self) -> dict[str, object]:
        """Return how the service is, as its clients are told."""
        pool = self.hub.pool
        return {
            "seconds": round(time.monotonic() - self.began, 3),
            "clients": self.hub.clients,
            "files_waiting": pool.waiting,
            "files_under_way": pool.under_way,
            "files_scanned": self.hub.scanned,
            "workers": self.configuration.workers,
            "renewed": self.renewed,
            "outdated": self.outdated,
            "listeners": dict(self.listeners),
            "engines": [one._asdict() for one in self.versions],
        }

    def close(self) -> None:
        """Let go of the loop."""
        self.hub.close()
        self.watch.close()
        self.mounted.close()


def _load(pool: Pool) -> tuple[Loaded | None, list[Version]]:
    loaded = pool.load()
    try:
        return loaded, pool.versions(loaded)
    except BaseException:
        if loaded is not None:
            loaded.zygote.close()
        raise


def say(text: str) -> None:
    """Write a line for whoever looks after the service, which says who speaks."""
    write_line(f"fdbroker-scand: {printable(text)}")


def write_line(line: str) -> None:
    """Write a printable line for whoever looks after the service; if nobody reads it, it is lost."""
    with contextlib.suppress(OSError):
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()
