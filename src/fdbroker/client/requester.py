"""Who asks about files: a client for itself, or a service for one of its clients. No I/O.

What the blocking and the asyncio client have in common of it; how an answer
is waited for is theirs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Generic, Protocol, TypeVar

from fdbroker.client.engine import OpenPaths, StatPaths

if TYPE_CHECKING:
    import socket

    from fdbroker.client.engine import Batch
    from fdbroker.client.link import Link
    from fdbroker.wire.messages import AcceptedClient, Welcome


class _OwnSession(Protocol):
    """What a session must tell of itself to the client that owns it."""

    @property
    def name(self) -> str:
        """Where it leads."""

    @property
    def welcome(self) -> Welcome:
        """What the broker said when it was connected to last."""

    @property
    def timeout(self) -> float | None:
        """Seconds that each request may take."""

    @property
    def closed(self) -> bool:
        """Whether it was closed."""


class _SendsAfterthoughts(Protocol):
    """What a session must be able to do for a client that was handed over."""

    def send_afterthoughts(self) -> None:
        """Send what waits for the next request, if that can be done at once."""


_Session = TypeVar("_Session")
_SessionOfClient = TypeVar("_SessionOfClient", bound=_OwnSession)
_SessionOfServed = TypeVar("_SessionOfServed", bound=_SendsAfterthoughts)


class Requester(ABC, Generic[_Session]):
    """Asks by a session.

    `_acting_for` is the number of the client that it asks for, which is good
    on the connection `_bound` alone.
    """

    _acting_for: int | None = None
    _bound: Link | None = None

    @property
    @abstractmethod
    def _session(self) -> _Session:
        """Who asks. Raises ValueError if that is over."""

    def _open_paths(self, asked: Batch) -> OpenPaths:
        return OpenPaths(asked.paths, self._acting_for)

    def _read_paths(self, asked: Batch) -> OpenPaths:
        return OpenPaths(asked.paths, self._acting_for, copy=True)

    def _stat_paths(self, asked: Batch) -> StatPaths:
        return StatPaths(asked.paths, self._acting_for)


class Connected(Requester[_SessionOfClient]):
    """Asks for itself, by a session that it owns."""

    _shown_as: ClassVar[str]

    def __init__(self, session: _SessionOfClient) -> None:
        self._asks = session

    def __repr__(self) -> str:
        """Return where it leads and whether it is closed."""
        return f"<{self._shown_as} of {self._asks.name}{' (closed)' if self.closed else ''}>"

    @property
    def welcome(self) -> Welcome:
        """What the broker said when it was connected to last: version, identity level, limits."""
        return self._asks.welcome

    @property
    def timeout(self) -> float | None:
        """Seconds that each request may take; None: no limit."""
        return self._asks.timeout

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._asks.closed

    @property
    def _session(self) -> _SessionOfClient:
        return self._asks


class HandedOver(Requester[_SessionOfServed]):
    """Asks for a client of a service that the broker handed over; owns its socket."""

    _shown_as: ClassVar[str]

    def __init__(
        self, session: _SessionOfServed, link: Link | None, facts: AcceptedClient, sock: socket.socket
    ) -> None:
        self._asks = session
        self._bound = link
        self._acting_for = facts.number
        self._closed = False
        self.socket = sock
        self.number = facts.number
        self.pid = facts.pid
        self.uid = facts.uid
        self.gid = facts.gid
        self.identity_level = facts.identity_level

    def __repr__(self) -> str:
        """Return who it is."""
        closed = " (closed)" if self._closed else ""
        return f"<{self._shown_as} {self.number}: uid {self.uid}, pid {self.pid}{closed}>"

    def __del__(self) -> None:
        """Have it released with the next request; the socket closes itself."""
        if not self._closed and self._bound is not None:
            self._bound.release_later(self.number)

    def close(self) -> None:
        """Act for it no more, and close its socket. May be called again."""
        if not self._closed:
            self._closed = True
            self.socket.close()
            if self._bound is not None:
                self._bound.release_later(self.number)
            self._asks.send_afterthoughts()

    @property
    def _session(self) -> _SessionOfServed:
        if self._closed:
            raise ValueError(f"client {self.number} is closed")
        return self._asks
