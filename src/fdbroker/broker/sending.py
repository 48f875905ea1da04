"""Replies on their way: sent at once, kept until there is room, or taken back in the audit.

A reply was recorded before it came here. So what is not sent in the end is recorded
as well, and its descriptors are closed: each is owned here until it is with the kernel.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from fdbroker.broker.audit import member_text
from fdbroker.broker.connection import State, Unsent
from fdbroker.kernel import sockets
from fdbroker.kernel.descriptors import close_all
from fdbroker.wire.format import Kind, Reason
from fdbroker.wire.stream import framed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from fdbroker.broker.audit import Audit
    from fdbroker.broker.connection import Connection
    from fdbroker.broker.dispatch import Dispatch
    from fdbroker.broker.in_flight import InFlight


class Sender:
    """Sends to connections. What it finds on the way is the loop's to do: wait, read on, hang up."""

    def __init__(
        self,
        dispatch: Dispatch,
        audit: Audit,
        flight: InFlight,
        wait_for: Callable[[Connection, State], None],
        read_on: Callable[[Connection], None],
        hang_up: Callable[[Connection], None],
    ) -> None:
        self._dispatch = dispatch
        self._audit = audit
        self._flight = flight
        self._wait_for = wait_for
        self._read_on = read_on
        self._hang_up = hang_up
        self._never_sent = 0  # descriptors that were counted as under way

    def not_sent(self, connections: Iterable[Connection]) -> int:
        """Return how many descriptors were counted as under way that wait still, or never were sent."""
        waiting = (len(reply.descriptors) for connection in connections for reply in connection.unsent)
        return self._never_sent + sum(waiting)

    def send(
        self,
        connection: Connection,
        data: bytes,
        descriptors: list[int],
        request_id: int,
        client: int | None = None,
    ) -> None:
        """Send a reply, or keep it until there is room; its descriptors are owned here from now on.

        `client`: the number of the client that is handed over by it.
        """
        if connection.stream is not None:
            data = framed(data)
        if connection.unsent:
            self._keep_unsent(connection, Unsent(data, descriptors, request_id, client=client))
            return
        try:
            sent = sockets.send_part(connection.sock, data, descriptors, wait=False)
        except BlockingIOError:
            self._keep_unsent(connection, Unsent(data, descriptors, request_id, client=client))
            return
        except OSError as error:
            self._let_go(connection, Unsent(data, descriptors, request_id, client=client), error)
            return
        if descriptors:
            self._flight.add(connection, len(descriptors), sent)
            close_all(descriptors)
        if sent < len(data):
            self._keep_unsent(connection, Unsent(data[sent:], [], request_id, begun=True))

    def _keep_unsent(self, connection: Connection, reply: Unsent) -> None:
        """Keep a reply for which there was no room."""
        connection.unsent.append(reply)
        if reply.descriptors:
            # They are open here, which costs us as much as if they were on their way.
            self._flight.add(connection, len(reply.descriptors), len(reply.data))
        if connection.state is not State.SENDING:
            self._wait_for(connection, State.SENDING)

    def _let_go(self, connection: Connection, reply: Unsent, error: OSError) -> None:
        """Let go of a reply that can't be sent at all."""
        close_all(reply.descriptors)
        connection.shares = ()
        self._record_unsent(connection, reply, error.errno)
        if error.errno != errno.ETOOMANYREFS:
            self._hang_up(connection)
            return
        if reply.client is not None:
            # The service has never heard of it, and so would not release it.
            client = connection.clients.pop(reply.client, None)
            if client is not None:
                client.close()
            return
        # Our own share is far below; others of this uid may have used up the rest.
        text = "too many descriptors are under way; receive what was sent, then ask again"
        error_frame = self._dispatch.error(reply.request_id, Kind.REFUSED, Reason.LIMIT, text)
        self.send(connection, error_frame, [], reply.request_id)

    def send_what_waits(self, connection: Connection) -> None:
        """Send what was kept, as far as there is room now; read on when that was all."""
        while connection.unsent:
            reply = connection.unsent[0]
            try:
                sent = sockets.send_part(connection.sock, reply.data, reply.descriptors, wait=False)
            except BlockingIOError:
                return  # it waits on, and its descriptors are counted already
            except OSError as error:
                del connection.unsent[0]
                self._never_sent += len(reply.descriptors)
                self._let_go(connection, reply, error)
                return
            close_all(reply.descriptors)
            if sent < len(reply.data):
                reply.data = reply.data[sent:]
                reply.begun = True
                return
            del connection.unsent[0]
        self._read_on(connection)

    def send_last(self, connection: Connection, frame: bytes) -> None:
        """Send the last frame of a connection, if there is room for it: one behind the rest of another."""
        if connection.unsent:
            return
        try:
            sockets.send(connection.sock, frame if connection.stream is None else framed(frame), wait=False)
        except OSError:
            # Said to a client that does not listen; the audit has it.
            return

    def discard_unsent(self, connection: Connection) -> None:
        """Let go of replies that wait, and take back in the audit what they would have given."""
        for reply in connection.unsent:
            self._never_sent += len(reply.descriptors)
            self._record_unsent(connection, reply, errno.EPIPE)
        connection.discard_unsent()

    def _record_unsent(self, connection: Connection, reply: Unsent, number: int | None) -> None:
        """Record that a reply, or the end of it, is not sent: who got a part of it has its descriptors."""
        members = member_text(request=reply.request_id, errno=number)
        event = "partly_delivered" if reply.begun else "undelivered"
        self._audit.event(event, f"{connection.record},{members}")
