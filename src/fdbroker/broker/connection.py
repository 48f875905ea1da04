"""What the broker keeps of one connection."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fdbroker.broker.audit import member_text

if TYPE_CHECKING:
    import socket

    from fdbroker.broker.identity import PeerAtConnect
    from fdbroker.kernel.descriptors import Descriptors
    from fdbroker.policy.decide import View


class Unsent:
    """A reply that the socket had no room for; owns its descriptors."""

    __slots__ = ("data", "descriptors", "request_id")

    def __init__(self, data: bytes, descriptors: Descriptors, request_id: int) -> None:
        self.data = data
        self.descriptors = descriptors
        self.request_id = request_id


class Connection:
    """One client. Owns its socket, its peer's pidfd and a reply that waits; `close` ends all."""

    __slots__ = (
        "_generation",
        "_view",
        "closing",
        "greeted",
        "in_flight",
        "number",
        "paused",
        "peer",
        "record",
        "sock",
        "unsent",
    )

    def __init__(self, sock: socket.socket, peer: PeerAtConnect, number: int, name: str) -> None:
        self.sock = sock
        self.peer = peer
        self.number = number
        self.greeted = False
        # Descriptors sent and, for all the kernel has told us, not yet received.
        self.in_flight = 0
        # Nothing is read: the client has to receive first.
        self.paused = False
        # Nothing is read any more: the client may receive what is on its way.
        self.closing = False
        self.unsent: Unsent | None = None
        # Who asks, as every audit record of this connection says it.
        self.record = member_text(
            socket=name, connection=number, pid=peer.pid, uid=peer.uid, gid=peer.gid, identity=peer.level
        )
        self._view: View | None = None
        self._generation = -1

    def view(self, generation: int) -> View | None:
        """Return the view of policy `generation`, None if it has to be made."""
        return self._view if generation == self._generation else None

    def keep_view(self, generation: int, view: View) -> None:
        """Keep the view of a generation until the next one."""
        self._generation, self._view = generation, view

    def close(self) -> None:
        """Close socket, pidfd and what was not sent."""
        if self.unsent is not None:
            self.unsent.descriptors.close()
            self.unsent = None
        self.peer.close()
        self.sock.close()
