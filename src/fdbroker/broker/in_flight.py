"""Descriptors that were sent and, by the kernel's word, not yet received.

The kernel bounds them per *sending user*, over all its sockets, by
RLIMIT_NOFILE: past it every sendmsg(2) of the broker is ETOOMANYREFS, whoever
it is for. So they are counted per connection, per client uid and in all, and
one uid never gets more than its share. A count goes back when SIOCOUTQ says
that everything was received; the client's word is not asked.

Hazard: what lies unread in a client's queue stays in flight after the broker
closes its own end. A connection that is to be closed is therefore kept until
its queue is empty, or the client is gone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fdbroker.kernel.sockets import DRAINED, bytes_not_received

if TYPE_CHECKING:
    from fdbroker.broker.connection import Client


class InFlight:
    """The count per uid and in all; the count of a client is its own `in_flight`."""

    def __init__(self, most: int, most_per_uid: int) -> None:
        self.total = 0
        self._most = most
        self._most_per_uid = most_per_uid
        self._of_uid: dict[int, int] = {}
        # Those that have something in flight.
        self._clients: dict[Client, None] = {}

    def add(self, client: Client, count: int) -> None:
        """Count descriptors that were sent, or wait to be."""
        client.in_flight += count
        self.total += count
        uid = client.peer.uid
        self._of_uid[uid] = self._of_uid.get(uid, 0) + count
        self._clients[client] = None

    def forget(self, client: Client) -> None:
        """Take back all that a client has in flight: it was received, or its queue is gone."""
        count, client.in_flight = client.in_flight, 0
        if not count:
            return
        self.total -= count
        uid = client.peer.uid
        self._of_uid[uid] -= count
        if not self._of_uid[uid]:
            del self._of_uid[uid]
        del self._clients[client]

    def settle(self, client: Client) -> bool:
        """Ask the kernel whether all was received; if so, forget it. Return whether it was."""
        if any(reply.descriptors for reply in client.unsent):
            return False  # nor was it sent
        if client.in_flight and bytes_not_received(client.sock) > DRAINED:
            return False
        self.forget(client)
        return True

    def room_for(self, client: Client, count: int) -> bool:
        """Return whether `count` more may go to this client. Asks the kernel only when it is tight."""
        uid, of_uid = client.peer.uid, self._of_uid
        if self.total + count <= self._most and of_uid.get(uid, 0) + count <= self._most_per_uid:
            return True
        for other in tuple(self._clients):
            self.settle(other)
        return self.total + count <= self._most and of_uid.get(uid, 0) + count <= self._most_per_uid
