"""What the broker keeps of one connection."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

from fdbroker.kernel.descriptors import close_all

if TYPE_CHECKING:
    import socket

    from fdbroker.broker.control import Loading
    from fdbroker.broker.dispatch import Table
    from fdbroker.broker.identity import PeerAtConnect
    from fdbroker.broker.in_flight import InFlight
    from fdbroker.policy.decide import View


class State(Enum):
    """What the loop waits for on a connection."""

    READING = "the next request"
    SENDING = "room for a reply that is ready"
    PAUSED = "the client to receive what was sent"
    CLOSING = "the same, and then the end"
    LOADING = "the policy that it handed over to be read"


class Unsent:
    """A reply that the socket had no room for; owns its descriptors."""

    __slots__ = ("data", "descriptors", "request_id")

    def __init__(self, data: bytes, descriptors: list[int], request_id: int) -> None:
        self.data = data
        self.descriptors = descriptors
        self.request_id = request_id


class Connection:
    """One client. Owns its socket, its peer's pidfd and a reply that waits; `close` ends all."""

    __slots__ = (
        "answers",
        "flight",
        "for_control",
        "greeted",
        "in_flight",
        "loading",
        "peer",
        "pieces",
        "record",
        "sock",
        "state",
        "unsent",
        "view",
        "view_generation",
    )

    def __init__(
        self, sock: socket.socket, peer: PeerAtConnect, record: str, answers: Table, flight: InFlight
    ) -> None:
        self.sock = sock
        self.peer = peer
        # What can be asked here, and how it is answered.
        self.answers = answers
        self.greeted = False
        # Whether it came by a control socket.
        self.for_control = False
        self.state = State.READING
        # Descriptors sent and, for all the kernel has told us, not yet received.
        self.in_flight = 0
        self.unsent: Unsent | None = None
        # Who asks, as every audit record of this connection says it.
        self.record = record
        # The count that its descriptors under way are part of.
        self.flight = flight
        # The part of the policy that is about this client, and the generation it was made of.
        self.view: View | None = None
        self.view_generation = 0
        # A policy that is being handed over, as far as it is there.
        self.pieces: bytearray | None = None
        # The same, when it is there whole.
        self.loading: Loading | None = None

    def count_in_flight(self) -> int:
        """Return how many descriptors are on their way now: the kernel is asked."""
        self.flight.settle(self)
        return self.in_flight

    def discard_unsent(self) -> None:
        """Let go of a reply that waits."""
        if self.unsent is not None:
            close_all(self.unsent.descriptors)
            self.unsent = None

    def close(self) -> None:
        """Close socket, pidfd and what was not sent."""
        self.discard_unsent()
        self.peer.close()
        self.sock.close()
