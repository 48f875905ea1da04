"""Descriptors that were sent and, by the kernel's word, not yet received.

The kernel bounds them per *sending user*, over all its sockets, by
RLIMIT_NOFILE: past it every sendmsg(2) of the broker is ETOOMANYREFS, whoever
it is for. So they are counted per connection, per client uid and in all, and
one uid never gets more than its share. A count goes back when SIOCOUTQ says
that it was received; the client's word is not asked. SIOCOUTQ counts whole
buffers, which are larger than what was sent in them by a few hundred bytes at
least; a queue is received from its beginning; so what can still be in it is
the end of what was sent that is no larger than SIOCOUTQ says, and no more.

Hazard: what lies unread in a client's queue stays in flight after the broker
closes its own end. A connection that is to be closed is therefore kept until
its queue is empty, or the client is gone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fdbroker.kernel.sockets import DRAINED, bytes_not_received

if TYPE_CHECKING:
    from fdbroker.broker.connection import Client

    # For which rules and uids descriptors count beside all others, and how many.
    Shares = tuple[tuple[tuple[str, int], int], ...]


# Of the kernel for each message: struct sk_buff and skb_shared_info have more (SKB_TRUESIZE).
_OVERHEAD = 256


class InFlight:
    """The count per uid and in all; the count of a client is its own `in_flight`."""

    def __init__(self, most: int, most_per_uid: int) -> None:
        self.total = 0
        # How many are not under way any more.
        self.taken_back = 0
        self.most_per_uid = most_per_uid
        self._most = most
        self._share = most_per_uid
        self._of_uid: dict[int, int] = {}
        # By the name of a rule that limits them, and uid.
        self._of_rule: dict[tuple[str, int], int] = {}
        # And how many of those each client was sent: nobody else is asked about when they are used up.
        self._sent_by_rule: dict[tuple[str, int], dict[Client, int]] = {}
        # Those that have something in flight.
        self._clients: dict[Client, None] = {}

    def add(self, client: Client, count: int, size: int | None) -> None:
        """Count descriptors that were sent, or wait to be, with the first of `size` bytes.

        None: others that are counted before may be received after these, as where a helper sent these
        before we hear of it, or where several receive. They count for the client's `shares`, too.
        """
        client.in_flight += count
        shares = client.shares
        if shares:
            client.shares = ()
            for key, number in shares:
                self._of_rule[key] = self._of_rule.get(key, 0) + number
                sent = self._sent_by_rule.setdefault(key, {})
                sent[client] = sent.get(client, 0) + number
        # Without bytes of its own it is thought to be in whatever is left.
        client.under_way.append((0 if size is None else size + _OVERHEAD, count, shares))
        self.total += count
        uid = client.peer.uid
        self._of_uid[uid] = self._of_uid.get(uid, 0) + count
        self._clients[client] = None

    def forget(self, client: Client) -> None:
        """Take back all that a client has in flight: it was received, or its queue is gone."""
        if self._of_rule:
            for _, _, shares in client.under_way:
                self._take_back_shares(client, shares)
        client.under_way.clear()
        self._take_back(client, client.in_flight)

    def limit_uids(self, most: int | None) -> None:
        """Let a uid have so many, at most its share (None: its share); `most_per_uid` is how many that is."""
        self.most_per_uid = self._share if most is None else min(most, self._share)

    def room_of_rule(self, rule: str, uid: int, most: int, wanted: int) -> int:
        """Return how many of `most` a rule still gives a uid. Asks the kernel if it is less than `wanted`."""
        key = (rule, uid)
        if most - self._of_rule.get(key, 0) < wanted:
            for client in tuple(self._sent_by_rule.get(key, ())):
                self.settle(client)
        return most - self._of_rule.get(key, 0)

    def _take_back_shares(self, client: Client, shares: Shares) -> None:
        for key, number in shares:
            sent = self._sent_by_rule[key]
            sent[client] -= number
            if not sent[client]:
                del sent[client]
            self._of_rule[key] -= number
            if not self._of_rule[key]:
                del self._of_rule[key], self._sent_by_rule[key]

    def _take_back(self, client: Client, count: int) -> None:
        if not count:
            return
        client.in_flight -= count
        self.total -= count
        self.taken_back += count
        uid = client.peer.uid
        self._of_uid[uid] -= count
        if not self._of_uid[uid]:
            del self._of_uid[uid]
        if not client.in_flight:
            del self._clients[client]

    def settle(self, client: Client) -> bool:
        """Ask the kernel what was received, and forget that. Return whether it was all."""
        if any(reply.descriptors for reply in client.unsent):
            return False  # nor was it sent
        if client.in_flight:
            left = bytes_not_received(client.sock)
            if left > DRAINED:
                self._forget_received(client, left)
                return False
        self.forget(client)
        return True

    def _forget_received(self, client: Client, left: int) -> None:
        """Forget all but the end of what was sent that can be in `left` bytes of the queue."""
        under_way = client.under_way
        kept = 0
        for size, _, _ in reversed(under_way):
            left -= size
            if left < 0:
                break
            kept += 1
        received = 0
        while len(under_way) > kept:
            _, count, shares = under_way.popleft()
            received += count
            self._take_back_shares(client, shares)
        self._take_back(client, received)

    def room_for(self, client: Client, count: int) -> bool:
        """Return whether `count` more may go to this client. Asks the kernel only when it is tight."""
        uid, of_uid = client.peer.uid, self._of_uid
        if self.total + count <= self._most and of_uid.get(uid, 0) + count <= self.most_per_uid:
            return True
        of_all = self.total + count > self._most
        for other in tuple(self._clients):
            # Who has used up its own share is not to have the kernel asked about everybody again and again.
            if of_all or other.peer.uid == uid:
                self.settle(other)
        return self.total + count <= self._most and self.has_share(client, count)

    def has_share(self, client: Client, count: int) -> bool:
        """Return whether `count` more are within what the client's uid may have."""
        return self._of_uid.get(client.peer.uid, 0) + count <= self.most_per_uid
