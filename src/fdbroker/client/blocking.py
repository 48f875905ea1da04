"""The blocking client: ask the broker for files by path, get them open."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from fdbroker.client.answers import check_served, status_of
from fdbroker.client.connection import Connection
from fdbroker.client.engine import AskStatus
from fdbroker.client.files import FileRequests
from fdbroker.client.link import ConnectionLost, Deadline, adopt_socket, connect_socket, not_greeted
from fdbroker.client.requester import Connected
from fdbroker.client.serve_call import ServeCall
from fdbroker.client.service import Service
from fdbroker.client.session import Session, reconnect

if TYPE_CHECKING:
    import socket
    from types import TracebackType
    from typing import Self

    from fdbroker.client.engine import StrOrBytesPath

DEFAULT_SOCKET = "/run/fdbroker/broker.seqpacket"
DEFAULT_TIMEOUT = 30.0


def connect(path: StrOrBytesPath = DEFAULT_SOCKET, *, timeout: float | None = DEFAULT_TIMEOUT) -> Client:
    """Connect to the broker and return a client, which the caller should close.

    Args:
        path: the broker's socket, of SOCK_SEQPACKET or SOCK_STREAM.
        timeout: seconds that each request may take, with connecting and
            repeating; None: no limit.

    Raises:
        UnavailableError: the socket is not there, nobody listens, or this user may not connect.
        BrokerTimeoutError: no welcome in time.
        DisconnectedError: the broker closed several connections before its welcome.
        LimitError: the broker has too many connections, or too many of this user.
        ProtocolError: it is no broker, or has no version of the protocol in common.
        ValueError: a time-out that is not above 0.

    """
    deadline = Deadline.first(timeout)
    socket_path = os.fsencode(path)

    def connect_once(until: Deadline) -> Connection:
        return Connection.greet(connect_socket(socket_path, until), until)

    try:
        connection = connect_once(deadline)
    except ConnectionLost:
        connection = reconnect(connect_once, deadline)
    return Client(Session(connection, connect_once, timeout, repr(os.fsdecode(path))))


class Client(Connected[Session], FileRequests):
    """A connection to the broker, made by `connect` or `Client.from_socket`.

    It may be shared by threads: a lock is held while a request is sent and
    while an answer is waited for, so they take turns. Iterators that it
    returns are for one thread each, but several may be in use at a time. Not
    to be used in a signal handler.

    A client that `connect` made survives a restart of the broker: it connects
    anew and repeats what was not answered, a few times within its time-out.
    In a child after fork it connects anew as well, since the broker knows
    connections by process. One made by `from_socket` can do neither, and
    raises DisconnectedError.

    After a time-out or an error of the protocol the connection is given up;
    the next request opens another one.

    Every descriptor that a method returns is close-on-exec, open for reading
    alone and the caller's to close.
    """

    _shown_as = "fdbroker.Client"

    @classmethod
    def from_socket(cls, sock: socket.socket, *, timeout: float | None = DEFAULT_TIMEOUT) -> Client:
        """Return a client on a connection that exists: of a socketpair, or inherited.

        The client owns the connection from the call on: `sock` is detached, and
        closed on any error.

        Raises:
            ValueError: not a Unix socket of SOCK_SEQPACKET or SOCK_STREAM; a time-out that is not above 0.
            DisconnectedError: the other end is closed.
            BrokerError: as `connect`.

        """
        owned = adopt_socket(sock)
        try:
            deadline = Deadline.first(timeout)
        except ValueError:
            owned.close()
            raise
        try:
            connection = Connection.greet(owned, deadline)
        except ConnectionLost as lost:
            raise not_greeted(lost, "the other end") from lost
        return cls(Session(connection, None, timeout, "a given socket"))

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Close the connection, after the request that another thread may be waiting for.

        Files that were given stay open. May be called again; any other method
        raises ValueError afterwards.
        """
        self._asks.close()

    def status(self) -> dict[str, object]:
        """Return how the broker sees this connection: its policy's generation, the peer's ids, and more.

        Keys may be added in later versions.

        Raises:
            BrokerError: as `open`.

        """
        return status_of(self._asks.ask(AskStatus()))

    def serve(self, listener: str) -> Service:
        """Serve the clients of one of the broker's listeners, as the policy says that this process may.

            with client.serve("clamd") as service:
                for served in service:
                    with served, served.open("/home/u/file") as file: ...

        The broker accepts on that socket and hands each connection over, so that this process can't say
        who its clients are. The caller should close what is returned.

        Args:
            listener: its name in the policy.

        Raises:
            DeniedError: a PermissionError: this process may not serve it.
            BrokerError: as `open`.

        """
        name = listener.encode()
        call = ServeCall(name)
        check_served(self._asks.ask_by(call), name)
        # Clients are known on this connection alone.
        call.bound = call.link
        return Service(self._asks, call, listener)
