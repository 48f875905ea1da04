"""Acting for others, for asyncio: the clients of a listener, and requests on their behalf."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from fdbroker.aio.files import FileRequests
from fdbroker.aio.session import Session
from fdbroker.client.requester import HandedOver
from fdbroker.client.serve_call import accepted_by

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import NoReturn, Self

    from fdbroker.client.serve_call import ServeCall


class Service:
    """The clients of a listener, as they connect; made by `Client.serve`. As `fdbroker.client.Service`."""

    def __init__(self, session: Session, call: ServeCall, listener: str) -> None:
        self._session = session
        self._call = call
        self._listener = listener
        self._came = asyncio.Event()
        self._closed = False
        call.wake = self._came.set

    def __repr__(self) -> str:
        """Return which listener it serves."""
        return f"<fdbroker.aio.Service of {self._listener!r}{' (closed)' if self._closed else ''}>"

    async def __aenter__(self) -> Self:
        """Return itself."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    def __del__(self) -> None:
        """Let clients that come be released."""
        self._call.abandon()

    def __aiter__(self) -> Self:
        """Return itself."""
        return self

    async def __anext__(self) -> ServedClient:
        """Wait for the next client and return it; ends when the service is closed. Raises as `accept`."""
        if not self._closed:
            try:
                return await self.accept()
            except ValueError:
                if not self._closed:  # by another task, while this one waited
                    raise
        raise StopAsyncIteration

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    async def accept(self) -> ServedClient:
        """Wait for a client and return it; the caller should close it. May be cancelled: no client is lost.

        Raises:
            DeniedError: a reload of the policy took the right to serve away. Clients that came are served on.
            DisconnectedError: the connection to the broker was lost, and with it the service.
            BrokerError: the broker did not keep to the protocol, or ended the connection with a reason.
            ValueError: the service, or its client, is closed.

        """
        while not self._call.answers:
            self._check()
            self._came.clear()
            await self._came.wait()
        return self._take()

    async def for_each(self, serve: Callable[[ServedClient], None]) -> NoReturn:
        """Call a function with each client as soon as it has come, in the midst of receiving; never returns.

        So no task has to be woken up for one. Raises as `accept`, and what the function raises. For one
        task at a time.
        """
        over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def come(*, check: bool = False) -> None:
            try:
                check = check or not self._call.answers
                while self._call.answers:
                    serve(self._take())
                if check:
                    self._check()
            except Exception as error:  # noqa: BLE001 - raised by who waits
                if not over.done():
                    over.set_exception(error)

        self._call.wake = come
        try:
            come(check=True)  # it may be over already, behind clients that came
            await over
            raise AssertionError("it ends by an error alone")
        finally:
            self._call.wake = self._came.set

    def _check(self) -> None:
        """Raise what keeps clients from coming."""
        if self._closed:
            raise ValueError(f"the service of {self._listener!r} is closed")
        self._session.check_bound(self._call)

    def _take(self) -> ServedClient:
        facts, sock = accepted_by(self._call)
        sock.settimeout(0)
        return ServedClient(self._session, self._call.bound, facts, sock)

    def close(self) -> None:
        """Serve nobody else; clients that still come are released at once. May be called again."""
        self._closed = True
        self._call.abandon()
        self._session.send_afterthoughts()
        if self._call.wake is not None:
            self._call.wake()


class ServedClient(HandedOver[Session], FileRequests):
    """A client of a service, and requests on its behalf. As `fdbroker.client.ServedClient`.

    `socket` does not block: for `loop.sock_recv`, or `asyncio.open_unix_connection(sock=...)`.
    """

    _shown_as = "fdbroker.aio.ServedClient"

    async def __aenter__(self) -> Self:
        """Return itself."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()
