"""Connecting to the broker, and the client object that comes of it, for asyncio."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from fdbroker.aio.files import FileRequests
from fdbroker.aio.link import WatchedLink, connect_socket
from fdbroker.aio.service import Service
from fdbroker.aio.session import Session, reconnect
from fdbroker.client.answers import check_served, status_of
from fdbroker.client.blocking import DEFAULT_SOCKET, DEFAULT_TIMEOUT
from fdbroker.client.engine import AskStatus
from fdbroker.client.link import ConnectionLost, Deadline, adopt_socket, not_greeted
from fdbroker.client.requester import Connected
from fdbroker.client.serve_call import ServeCall

if TYPE_CHECKING:
    import socket
    from types import TracebackType
    from typing import Self

    from fdbroker.client.engine import StrOrBytesPath


async def connect(
    path: StrOrBytesPath = DEFAULT_SOCKET,
    *,
    timeout: float | None = DEFAULT_TIMEOUT,  # noqa: ASYNC109 - it holds for each later request
) -> Client:
    """Connect to the broker and return a client, which the caller should close.

    Args and errors are those of `fdbroker.connect`.
    """
    deadline = Deadline.first(timeout)
    socket_path = os.fsencode(path)

    async def connect_once(until: Deadline) -> WatchedLink:
        return await WatchedLink.greet(await connect_socket(socket_path, until), until)

    try:
        link = await connect_once(deadline)
    except ConnectionLost:
        link = await reconnect(connect_once, deadline)
    return Client(Session(link, connect_once, timeout, repr(os.fsdecode(path))))


class Client(Connected[Session], FileRequests):
    """A connection to the broker, made by `connect` or `Client.from_socket`; for one event loop.

    It survives a restart of the broker as `fdbroker.Client` does. After a fork the child's client connects
    anew, with the child's own event loop; one made by `from_socket` can do neither.

    An error of the protocol ends the connection for all tasks that wait on it; after a time-out it is
    given up if nothing came on it meanwhile. The next request opens another one.
    """

    _shown_as = "fdbroker.aio.Client"

    @classmethod
    async def from_socket(
        cls,
        sock: socket.socket,
        *,
        timeout: float | None = DEFAULT_TIMEOUT,  # noqa: ASYNC109 - it holds for each later request
    ) -> Client:
        """Return a client on a connection that exists. As `fdbroker.Client.from_socket`."""
        owned = adopt_socket(sock)
        try:
            deadline = Deadline.first(timeout)
        except ValueError:
            owned.close()
            raise
        try:
            link = await WatchedLink.greet(owned, deadline)
        except ConnectionLost as lost:
            raise not_greeted(lost, "the other end") from lost
        return cls(Session(link, None, timeout, "a given socket"))

    async def __aenter__(self) -> Self:
        """Return itself."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Close the connection; tasks that wait for an answer get ValueError, as does any later request.

        Files that were given stay open. May be called again.
        """
        self._asks.close()

    async def status(self) -> dict[str, object]:
        """Return how the broker sees this connection. As `fdbroker.Client.status`."""
        return status_of(await self._asks.ask(AskStatus()))

    async def serve(self, listener: str) -> Service:
        """Serve the clients of one of the broker's listeners. As `fdbroker.Client.serve`."""
        name = listener.encode()
        call = ServeCall(name)
        check_served(await self._asks.ask_by(call), name)
        call.bound = call.link
        return Service(self._asks, call, listener)
