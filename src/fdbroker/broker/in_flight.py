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

from fdbroker.kernel.sockets import bytes_not_received

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fdbroker.broker.connection import Connection

# SIOCOUTQ counts the buffer of a message that is just being freed as 1.
_DRAINED = 1


class InFlight:
    """The count per uid and in all; the count of a connection is its own `in_flight`."""

    def __init__(self, most: int, most_per_uid: int, connections: Mapping[int, Connection]) -> None:
        """`connections` are all there are, by whatever key, kept up to date by their owner."""
        self.total = 0
        self._connections = connections
        self._most = most
        self._most_per_uid = most_per_uid
        self._of_uid: dict[int, int] = {}

    def add(self, connection: Connection, count: int) -> None:
        """Count descriptors that were sent, or wait to be."""
        connection.in_flight += count
        self.total += count
        uid = connection.peer.uid
        self._of_uid[uid] = self._of_uid.get(uid, 0) + count

    def forget(self, connection: Connection) -> None:
        """Take back all that a connection has in flight: it was received, or its queue is gone."""
        count, connection.in_flight = connection.in_flight, 0
        if not count:
            return
        self.total -= count
        uid = connection.peer.uid
        self._of_uid[uid] -= count
        if not self._of_uid[uid]:
            del self._of_uid[uid]

    def settle(self, connection: Connection) -> bool:
        """Ask the kernel whether all was received; if so, forget it. Return whether it was."""
        if connection.unsent is not None and connection.unsent.descriptors:
            return False  # nor was it sent
        if connection.in_flight and bytes_not_received(connection.sock) > _DRAINED:
            return False
        self.forget(connection)
        return True

    def room_for(self, connection: Connection, count: int) -> bool:
        """Return whether `count` more may go to this client. Asks the kernel only when it is tight."""
        uid, of_uid = connection.peer.uid, self._of_uid
        if self.total + count <= self._most and of_uid.get(uid, 0) + count <= self._most_per_uid:
            return True
        for other in self._connections.values():
            self.settle(other)
        return self.total + count <= self._most and of_uid.get(uid, 0) + count <= self._most_per_uid
