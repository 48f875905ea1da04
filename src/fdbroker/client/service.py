"""Acting for others: the clients of a listener that the broker hands over, and requests on their behalf."""

from __future__ import annotations

import contextlib
import os
import select
import threading
from typing import TYPE_CHECKING

from fdbroker.client.errors import BrokerError, disconnected
from fdbroker.client.files import FileRequests
from fdbroker.client.link import Deadline
from fdbroker.client.requester import HandedOver
from fdbroker.client.serve_call import accepted_by
from fdbroker.client.session import Session

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from fdbroker.client.serve_call import ServeCall


class _Bell:
    """Wakes up the threads that wait for clients, whichever thread received one. Owns an eventfd.

    Its descriptor is closed when nobody waits on it any more: a number that
    is closed under a poll(2) would wake up nobody, and could be another file's.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._number = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._waiting = 0
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def ring(self) -> None:
        """Have all who wait look again."""
        with self._lock:
            if self._number >= 0:
                os.eventfd_write(self._number, 1)

    def wait(self, sock: int, deadline: Deadline) -> bool:
        """Wait until it rings, or something comes on a socket; False: the time is up."""
        with self._lock:
            over = self._closed
            self._waiting += not over
        if over:
            return True
        try:
            ready = select.poll()
            ready.register(sock, select.POLLIN)
            ready.register(self._number, select.POLLIN)
            left = deadline.left()
            return bool(ready.poll(None if left is None else left * 1000))
        finally:
            with self._lock:
                self._waiting -= 1
                if self._closed:
                    self._close_unless_waited_on()
                elif self._waiting == 0:  # all have seen it
                    with contextlib.suppress(BlockingIOError):
                        os.eventfd_read(self._number)

    def close(self) -> None:
        """Ring for the last time. May be called again."""
        with self._lock:
            # In this order: who wakes up sees that it is closed.
            self._closed = True
            if self._waiting:
                os.eventfd_write(self._number, 1)
            self._close_unless_waited_on()

    def _close_unless_waited_on(self) -> None:
        if self._waiting == 0 and self._number >= 0:
            number, self._number = self._number, -1
            os.close(number)


class Service:
    """The clients of a listener, as they connect; made by `Client.serve`.

    An iterator that waits for the next client. It ends with
    DisconnectedError when the connection to the broker is lost: the
    clients that it knew are unknown on another one, and so is the service.
    Several threads may wait.
    """

    def __init__(self, session: Session, call: ServeCall, listener: str) -> None:
        self._session = session
        self._call = call
        self._listener = listener
        self._bell = _Bell()
        call.wake = self._bell.ring

    def __repr__(self) -> str:
        """Return which listener it serves."""
        return f"<fdbroker.Service of {self._listener!r}{' (closed)' if self.closed else ''}>"

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    def __del__(self) -> None:
        """Close what it owns, and let clients that come be released."""
        self.close()

    def __iter__(self) -> Self:
        """Return itself."""
        return self

    def __next__(self) -> ServedClient:
        """Wait for the next client and return it; ends when the service is closed. Raises as `accept`."""
        if not self.closed:
            try:
                return self.accept()
            except ValueError:
                if not self.closed:  # in another thread, while this one waited
                    raise
        raise StopIteration

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._bell.closed

    def accept(self, timeout: float | None = None) -> ServedClient:
        """Wait for a client and return it; the caller should close it.

        Args:
            timeout: seconds to wait; None: for ever.

        Raises:
            TimeoutError: nobody connected. The service goes on.
            DeniedError: a reload of the policy took the right to serve away. Clients that came are served on.
            DisconnectedError: the connection to the broker was lost, and with it the service.
            BrokerError: the broker did not keep to the protocol, or ended the connection with a reason.
            ValueError: the service, or its client, is closed.

        """
        deadline = Deadline.after(timeout)
        while True:
            if self.closed:
                raise ValueError(f"the service of {self._listener!r} is closed")
            try:
                facts, sock = accepted_by(self._call)
                return ServedClient(self._session, self._call.bound, facts, sock)
            except IndexError:  # none has come, or another thread was faster
                pass
            except BrokerError:
                self._bell.ring()  # others may wait as well
                raise
            connection = self._session.connection_of(self._call)
            if connection is None:
                self._bell.ring()  # others may wait as well
                raise disconnected(f"the connection was lost by which the clients of {self._listener!r} came")
            number = connection.fileno()
            if number >= 0 and not self._bell.wait(number, deadline):
                raise TimeoutError(f"nobody connected to {self._listener!r} within {timeout} s")
            self._session.receive_if_ready(connection)

    def close(self) -> None:
        """Serve nobody else; clients that still come are released at once. May be called again."""
        self._call.abandon()
        self._bell.close()


class ServedClient(HandedOver[Session], FileRequests):
    """A client of a service: its socket, who it is by the kernel's word, and requests on its behalf.

    What is asked here the policy allows only where both the service and this
    client may have it (`on_behalf_of`). It holds as long as the connection to
    the broker on which the client was handed over, and as long as the client's
    process lives; then requests raise DisconnectedError or DeniedError.

    Attributes:
        socket: the connection to the client; owned by this object.
        number: what the broker calls it.
        pid, uid, gid: of the process that connected, when it did.
        identity_level: how sure that is: 0, 1 or 2.

    """

    _shown_as = "fdbroker.ServedClient"

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()
