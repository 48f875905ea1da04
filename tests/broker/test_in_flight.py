"""What is under way, by the kernel's word: never less than there is, whatever was sent and received."""

from __future__ import annotations

import os
import socket
from collections import deque
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdbroker.broker import in_flight
from fdbroker.broker.in_flight import InFlight
from fdbroker.kernel import sockets

if TYPE_CHECKING:
    from collections.abc import Iterator

KINDS = {"seqpacket": socket.SOCK_SEQPACKET, "stream": socket.SOCK_STREAM}


class _Client(SimpleNamespace):
    """What is asked of a client; a key, as that is."""

    def __hash__(self) -> int:  # type: ignore[override] # a namespace has none
        return id(self)


class Pair:
    """A client, its end of the connection, and the count of what the broker sends it."""

    def __init__(self, kind: int) -> None:
        self.ours, self.theirs = socket.socketpair(socket.AF_UNIX, kind)
        self.kind = kind
        self.flight = InFlight(10_000, 10_000)
        self.client: Any = _Client(
            sock=self.ours, peer=SimpleNamespace(uid=1), in_flight=0, under_way=deque(), unsent=[], shares=()
        )
        self.sent: list[tuple[int, int]] = []  # sizes and descriptors of what was not received

    def close(self) -> None:
        self.ours.close()
        self.theirs.close()

    def send(self, size: int, count: int) -> bool:
        """Send a message if there is room for it; return whether there was."""
        here = os.open("/", os.O_PATH | os.O_CLOEXEC)
        try:
            sent = sockets.send_part(self.ours, bytes(size), [here] * count, wait=False)
        except BlockingIOError:
            return False
        finally:
            os.close(here)
        assert sent == size or self.kind == socket.SOCK_STREAM
        self.flight.add(self.client, count, sent)
        self.sent.append((sent, count))
        return True

    def receive(self) -> None:
        """Receive the oldest message whole."""
        size, count = self.sent.pop(0)
        left, came = size, 0
        while left:
            received = sockets.receive(self.theirs, left)
            came += len(received.descriptors)
            received.descriptors.close()
            left -= len(received.data)
        assert came == count

    @property
    def under_way(self) -> int:
        """How many descriptors the client has not received."""
        return sum(count for _, count in self.sent)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> int:
    """Return a kind of socket."""
    return KINDS[request.param]


@pytest.fixture
def pair(kind: int) -> Iterator[Pair]:
    """Give a client that has received all."""
    made = Pair(kind)
    yield made
    made.close()


STEPS = st.lists(
    st.one_of(
        st.tuples(st.integers(1, 30_000), st.integers(1, 60)), st.none(), st.just("settle"), st.just("plain")
    ),
    max_size=30,
)


@given(steps=STEPS)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_the_count_is_never_less_than_what_the_client_has_not_received(
    kind: int, steps: list[tuple[int, int] | str | None]
) -> None:
    pair = Pair(kind)
    try:
        for step in steps:
            if step is None:
                if pair.sent:
                    pair.receive()
            elif step == "settle":
                assert pair.flight.settle(pair.client) == (pair.client.in_flight == 0)
            elif isinstance(step, str):
                # A reply without descriptors, of which nothing is counted.
                if sockets.send_part(pair.ours, b"plain", wait=False):
                    pair.sent.append((5, 0))
            else:
                pair.send(*step)
            assert pair.flight.total == pair.client.in_flight >= pair.under_way
        while pair.sent:
            pair.receive()
        assert pair.flight.settle(pair.client)
        assert pair.flight.total == 0
    finally:
        pair.close()


def test_what_was_received_is_forgotten_while_the_rest_is_under_way(pair: Pair) -> None:
    for _ in range(6):
        assert pair.send(6000, 64)
    for received in range(1, 6):
        pair.receive()
        assert not pair.flight.settle(pair.client)
        # At most one message more than there is: the kernel's buffers are larger than what is in them.
        assert (6 - received) * 64 <= pair.client.in_flight <= (7 - received) * 64
    pair.receive()
    assert pair.flight.settle(pair.client)
    assert pair.client.in_flight == 0


def test_what_may_be_received_in_another_order_is_forgotten_at_the_end_alone(pair: Pair) -> None:
    # As where a helper has sent the first, and is heard of behind the second.
    here = os.open("/", os.O_PATH | os.O_CLOEXEC)
    try:
        sockets.send(pair.ours, bytes(20), [here])
        pair.send(2000, 253)
        pair.flight.add(pair.client, 1, None)
    finally:
        os.close(here)
    sockets.receive(pair.theirs, 20).descriptors.close()
    assert not pair.flight.settle(pair.client)
    assert pair.client.in_flight >= 253
    pair.receive()
    assert pair.flight.settle(pair.client)
    assert pair.flight.total == 0


def test_clients_that_received_all_or_went_are_remembered_for_no_rule() -> None:
    # One that never receives would otherwise keep all those of its uid that come and go.
    flight, pairs = InFlight(10_000, 10_000), [Pair(socket.SOCK_SEQPACKET) for _ in range(4)]
    for pair in pairs:
        pair.flight = flight
        for _ in range(2):
            pair.client.shares = ((("rule", 1), 3),)
            assert pair.send(6000, 3)
    stalled, receiving, *going = pairs
    for pair in going:
        pair.close()
        flight.forget(pair.client)
    while receiving.sent:
        receiving.receive()
        flight.settle(receiving.client)
    assert list(flight._sent_by_rule[("rule", 1)]) == [stalled.client]
    assert flight.room_of_rule("rule", 1, 10, 10) == 4
    stalled.close()
    flight.forget(stalled.client)
    receiving.close()
    assert not flight._sent_by_rule
    assert not flight._of_rule


def test_who_has_its_share_is_asked_about_alone_unless_all_have_too_much() -> None:
    pairs = [Pair(socket.SOCK_SEQPACKET) for _ in range(4)]
    flight = InFlight(40, 12)
    asked: list[socket.socket] = []

    def never_received(sock: socket.socket) -> int:
        asked.append(sock)
        return 1 << 20

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(in_flight, "bytes_not_received", never_received)
        for pair, uid in zip(pairs, (1, 1, 2, 3), strict=True):
            pair.flight, pair.client.peer.uid = flight, uid
            assert pair.send(10, 5)
        assert not flight.room_for(pairs[0].client, 3)
        assert asked == [pair.ours for pair in pairs[:2]]
        asked.clear()
        assert not flight.room_for(pairs[2].client, 21)
        assert asked == [pair.ours for pair in pairs]
    for pair in pairs:
        pair.close()
