"""What the broker keeps of those it talks to."""

from __future__ import annotations

from collections import deque
from enum import Enum
from typing import TYPE_CHECKING

from fdbroker.kernel.descriptors import close_all
from fdbroker.wire.stream import FrameBuffer

if TYPE_CHECKING:
    import socket

    from fdbroker.broker.acting import ServedClient
    from fdbroker.broker.control import Loading
    from fdbroker.broker.counting import Durations
    from fdbroker.broker.dispatch import Asker, Table
    from fdbroker.broker.identity import Peer, PeerAtConnect
    from fdbroker.broker.in_flight import InFlight, Shares
    from fdbroker.broker.outcomes import Outcome
    from fdbroker.broker.walks import ActiveWalk


SEND_BUFFER = 32768  # the kernel doubles it; no cost was seen, and less is in flight


class State(Enum):
    """What the loop waits for on a connection."""

    READING = "the next request"
    SENDING = "room for a reply that is ready"
    PAUSED = "the client to receive what was sent"
    CLOSING = "the same, and then the end"
    LOADING = "the policy that it handed over to be read"
    WAITING = "answers that others are to give"
    TAKING = "the file that was announced for the audit"
    CLOSED = "nothing"


class Unsent:
    """A reply, or the rest of it, that the socket had no room for; owns its descriptors.

    `begun`: on a stream a part of it was sent, and with that its descriptors. `client`: the number of the
    client that it hands over to a service.
    """

    __slots__ = ("begun", "client", "data", "descriptors", "request_id")

    def __init__(
        self,
        data: bytes,
        descriptors: list[int],
        request_id: int,
        *,
        begun: bool = False,
        client: int | None = None,
    ) -> None:
        self.data = data
        self.descriptors = descriptors
        self.request_id = request_id
        self.begun = begun
        self.client = client


class Client:
    """Whoever asks: what the policy and the limits need to know. Owns replies that wait."""

    __slots__ = (
        "asker",
        "asker_generation",
        "durations",
        "flight",
        "given",
        "given_last",
        "in_flight",
        "last_request",
        "peer",
        "record",
        "refused",
        "requests",
        "shares",
        "sock",
        "times",
        "under_way",
        "unsent",
    )

    def __init__(
        self, sock: socket.socket, peer: Peer, record: str, flight: InFlight, durations: Durations
    ) -> None:
        # Where replies go.
        self.sock = sock
        self.peer = peer
        # Who asks, as every audit record says it.
        self.record = record
        # How long its requests took is counted with those of others that come the same way.
        self.durations = durations
        # How often it asked, and how many paths it was given and refused.
        self.requests = self.given = self.refused = 0
        # What it was given last, and how often since anything else: these are not counted elsewhere yet.
        self.given_last: Outcome | None = None
        self.times = 0
        # The count that its descriptors under way are part of.
        self.flight = flight
        # Descriptors sent and, for all the kernel has told us, not yet received.
        self.in_flight = 0
        # The same, message by message, the oldest first: the least that the kernel counts for it, how many,
        # and for which rules.
        self.under_way: deque[tuple[int, int, Shares]] = deque()
        # For which rules those of the next reply count.
        self.shares: Shares = ()
        # When it last asked for something, in monotonic seconds; noted only where somebody looks at it.
        self.last_request = 0.0
        # Replies for which there was no room, the oldest first.
        self.unsent: list[Unsent] = []
        # The part of the policy that is about this client, and the generation it was made of.
        self.asker: Asker | None = None
        self.asker_generation = 0

    def count_in_flight(self) -> int:
        """Return how many descriptors are on their way now: the kernel is asked."""
        self.flight.settle(self)
        return self.in_flight


class Connection(Client):
    """A client that connected. Owns its socket, its peer's pidfd and what it is in the middle of."""

    __slots__ = (
        "answers",
        "awaited",
        "began",
        "clients",
        "credentials",
        "delivering",
        "for_control",
        "greeted",
        "loading",
        "may_connect_anew",
        "number",
        "pieces",
        "serving",
        "state",
        "stream",
        "transport",
        "walks",
    )

    peer: PeerAtConnect

    def __init__(
        self,
        sock: socket.socket,
        peer: PeerAtConnect,
        record: str,
        answers: Table,
        flight: InFlight,
        durations: Durations,
        *,
        stream: bool,
    ) -> None:
        super().__init__(sock, peer, record, flight, durations)
        # Its number in the audit, and when it began: monotonic nanoseconds.
        self.number = self.began = 0
        self.transport = ""
        # What can be asked here, and how it is answered.
        self.answers = answers
        self.greeted = False
        # Whether it came by a control socket.
        self.for_control = False
        # Whether it came by a listener for requests, so that its client finds the way back.
        self.may_connect_anew = False
        self.state = State.READING
        # Frames of a stream as far as they are there, and the sender of what waits there.
        self.stream = FrameBuffer() if stream else None
        self.credentials: bytes | None = None
        # Walks that go on, by the id of their request.
        self.walks: dict[int, ActiveWalk] = {}
        # How many answers others are to give: processes that open what may hang.
        self.awaited = 0
        # Descriptors that they are sending, which are under way only when that is done.
        self.delivering = 0
        # The listeners whose clients are handed over here, with the id of the request that asked for it;
        # and the clients, by number.
        self.serving: dict[bytes, int] = {}
        self.clients: dict[int, ServedClient] = {}
        # A policy that is being handed over, as far as it is there.
        self.pieces: bytearray | None = None
        # The same, when it is there whole.
        self.loading: Loading | None = None

    def discard_unsent(self) -> None:
        """Let go of replies that wait."""
        for reply in self.unsent:
            close_all(reply.descriptors)
        self.unsent.clear()

    def end_what_goes_on(self) -> None:
        """Forget walks and loading, and let go of the clients that are acted for."""
        self.loading = None
        self.walks.clear()
        for client in self.clients.values():
            client.close()
        self.clients.clear()
        self.serving.clear()

    def close(self) -> None:
        """Close socket, pidfd, and all that is kept."""
        self.end_what_goes_on()
        self.discard_unsent()
        self.peer.close()
        self.sock.close()
