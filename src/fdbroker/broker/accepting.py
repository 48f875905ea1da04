"""Connections come: accepted, or refused with a reason, also when descriptors run out."""

from __future__ import annotations

import errno
import os
import select
import socket
from typing import TYPE_CHECKING, NamedTuple

from fdbroker.broker.audit import member_text
from fdbroker.broker.identity import IdentityError
from fdbroker.kernel import sockets
from fdbroker.wire.format import Kind, Limit, Reason
from fdbroker.wire.messages import LimitReached
from fdbroker.wire.stream import framed

if TYPE_CHECKING:
    from fdbroker.broker.audit import Audit
    from fdbroker.broker.connection import Connection
    from fdbroker.broker.dispatch import Dispatch, Table
    from fdbroker.broker.server import Broker

_ACCEPTS_PER_ROUND = 16
# Everybody may ask on a control socket, and whoever has subordinate ids has many of them: what they
# take up there must not be what the clients need.
_MOST_FOR_CONTROL = 64


class Listener(NamedTuple):
    """A socket that others come to, its name in the audit, and its type: SOCK_STREAM or another.

    `answers`: what can be asked on its connections; None: it takes datagrams,
    or its clients are those of `service`.
    """

    sock: socket.socket
    name: str
    kind: int
    answers: Table | None = None
    service: bytes | None = None


class Refusal(NamedTuple):
    """Why a connection is not served: for its client, and as members of the record; and by which limit."""

    text: str
    members: str
    limit: str
    reached: LimitReached | None = None


class Acceptor:
    """Owns the listeners. Accepts what comes and lets the broker adopt it."""

    def __init__(
        self, broker: Broker, epoll: select.epoll, dispatch: Dispatch, audit: Audit, max_connections: int
    ) -> None:
        self.listeners: dict[int, Listener] = {}
        self.max_connections = max_connections
        self.refused = 0
        # Those that are not listened to for one round, since accepting failed.
        self.resting: list[Listener] = []
        self._unwanted: set[int] = set()
        self._broker = broker
        self._epoll = epoll
        self._dispatch = dispatch
        self._audit = audit
        # Held so that a connection can still be accepted, and refused, when descriptors run out.
        self._spare = os.open("/", os.O_PATH | os.O_CLOEXEC)

    def add(self, listener: Listener, *, wanted: bool = True) -> None:
        """Listen; owned from now on. Not `wanted`: when somebody is there to serve its clients."""
        self.listeners[listener.sock.fileno()] = listener
        self._epoll.register(listener.sock, select.EPOLLIN if wanted else 0)
        if not wanted:
            self._unwanted.add(listener.sock.fileno())

    def close(self) -> None:
        """Close every listener."""
        for listener in self.listeners.values():
            listener.sock.close()
        self.listeners.clear()
        if self._spare >= 0:
            os.close(self._spare)

    def want(self, listener: Listener, *, wanted: bool) -> None:
        """Say whether somebody serves a listener's clients; until then they wait in its backlog."""
        descriptor = listener.sock.fileno()
        if wanted is (descriptor not in self._unwanted):
            return
        if wanted:
            self._unwanted.discard(descriptor)
        else:
            self._unwanted.add(descriptor)
        if listener not in self.resting:
            self._epoll.modify(listener.sock, select.EPOLLIN if wanted else 0)

    @property
    def some_are_unwanted(self) -> bool:
        """Whether the clients of some listener wait until somebody serves them."""
        return bool(self._unwanted)

    def listen_again(self) -> None:
        """Listen to those that were left alone for a round."""
        for listener in self.resting:
            wanted = listener.sock.fileno() not in self._unwanted
            self._epoll.modify(listener.sock, select.EPOLLIN if wanted else 0)
        self.resting.clear()

    def accept(self, listener: Listener) -> None:
        """Accept what waits, up to a number."""
        for _ in range(_ACCEPTS_PER_ROUND):
            try:
                sock = sockets.accept(listener.sock, listener.kind)
            except BlockingIOError:
                return
            except OSError as error:
                if self._failed(listener, error):
                    continue
                return
            try:
                connection = self._broker.adopt(sock, listener.name, listener.answers)
            except (IdentityError, OSError) as error:
                self.record_refusal(listener.name, member_text(reason=str(error)))
                continue
            self._broker.refuse_if_over_limit(connection, listener.name)

    def accept_one(self, listener: Listener) -> socket.socket | None:
        """Accept one connection, which the caller owns; None: there is none."""
        try:
            return sockets.accept(listener.sock, listener.kind)
        except BlockingIOError:
            return None
        except OSError as error:
            self._failed(listener, error)
            return None

    def objection(
        self, connection: Connection, *, of_uid: int, for_control: int, in_all: int, most: int
    ) -> Refusal | None:
        """Return why there is one connection too many with this new one, or None."""
        uid = connection.peer.uid
        if connection.for_control:
            if uid == 0:
                return None  # however many there are: who administers it must get in
            if for_control > _MOST_FOR_CONTROL:
                text = "too many ask for status and explanations at once; ask again"
                members = member_text(uid=uid, reason="control_connections")
                return Refusal(text, members, "control_connections")
        elif in_all - for_control > self.max_connections:
            members = member_text(uid=uid, reason="connections")
            reached = LimitReached(Limit.CONNECTIONS, self.max_connections, 0)
            return Refusal("the broker has too many connections", members, "connections", reached)
        if of_uid > most:
            text = f"uid {uid} has {most} connections already, which is the limit (connections_per_uid)"
            members = member_text(uid=uid, reason="connections_per_uid", limit=most)
            reached = LimitReached(Limit.CONNECTIONS_PER_UID, most, 0)
            return Refusal(text, members, "connections_per_uid", reached)
        return None

    def record_refusal(self, name: str, members: str) -> None:
        """Count and record a connection that is not served."""
        self.refused += 1
        self._audit.event("connection_refused", f"{member_text(socket=name)},{members}")

    def _failed(self, listener: Listener, error: OSError) -> bool:
        """See to a connection that could not be accepted. Return whether to go on with the next at once."""
        if error.errno in {errno.EMFILE, errno.ENFILE}:
            self._accept_to_refuse(listener)
            return False
        self._audit.event("accept_failed", member_text(socket=listener.name, errno=error.errno))
        if error.errno == errno.ECONNABORTED:  # the connecting side gave up: nobody to answer
            return True
        self.let_rest(listener)
        return False

    def _accept_to_refuse(self, listener: Listener) -> None:
        """Out of descriptors: without this the listener would stay ready, and the loop would spin."""
        if self._spare >= 0:
            os.close(self._spare)
            self._spare = -1
        try:
            with sockets.accept(listener.sock, listener.kind) as sock:
                self.record_refusal(listener.name, member_text(reason="descriptors"))
                text = "the broker has no descriptors left"
                if listener.answers is not None:
                    frame = self._dispatch.error(0, Kind.REFUSED, Reason.LIMIT, text)
                    sockets.send(
                        sock, framed(frame) if sock.type == socket.SOCK_STREAM else frame, wait=False
                    )
        except OSError as error:
            # The whole system is out of files (ENFILE): the listener rests a while, the connections go on.
            self._audit.event("accept_failed", member_text(socket=listener.name, errno=error.errno))
            self.let_rest(listener)
        try:
            self._spare = os.open("/", os.O_PATH | os.O_CLOEXEC)
        except OSError:
            # Tried again at the next shortage.
            return

    def let_rest(self, listener: Listener) -> None:
        """Leave a listener alone for one round: it would be ready again at once, and fail again."""
        self._epoll.modify(listener.sock, 0)
        self.resting.append(listener)
