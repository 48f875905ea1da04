"""Services that act for their clients: who these are is the kernel's word, not the service's.

The broker accepts on a service's listener, keeps who connected, and hands the
connected socket to the service with a number. The service's requests name the
number, and are decided for both. (A socket taken *from* a service would not
do: the connecting end shows the listener's ids.)
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from fdbroker.broker.audit import member_text
from fdbroker.broker.identity import IdentityError, PeerAtConnect
from fdbroker.broker.watchdog import close_unread
from fdbroker.wire.format import Reason
from fdbroker.wire.messages import GIVEN, AcceptedClient, ReleaseRequest, Request, ServeRequest, refused
from fdbroker.wire.replies import encode_accepted, encode_serve_reply

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from fdbroker.broker.connection import Connection
    from fdbroker.broker.dispatch import Answer, Asker, Dispatch, Parts

_DENIED = refused(Reason.DENIED)
# Of one connection of a service: more clients wait in the listener's backlog until some are released.
MOST_CLIENTS = 1024
_LAST_NUMBER = 0xFFFFFFFF
# Each message of a service wakes us up, so while nobody is near a limit it may collect what it releases.
_MOST_HELD_BACK = 16
_MOST_USERS_LOOKED_AT = 64
_new = tuple.__new__  # what a NamedTuple does itself, by a function in Python


class ServedClient:
    """A client of a service, as the kernel named it when it connected. Owns its pidfd, until `close`."""

    __slots__ = ("asker", "asker_generation", "number", "peer", "record", "released")

    def __init__(self, number: int, peer: PeerAtConnect, released: Callable[[ServedClient], None]) -> None:
        self.number = number
        self.peer = peer
        # As `member_text` would write it: these are numbers.
        self.record = f'"for_number":{number},"for_pid":{peer.pid},"for_uid":{peer.uid},"for_gid":{peer.gid}'
        self.released = released
        # What the policy says about this client of that service, and the generation that says it.
        self.asker: Asker | None = None
        self.asker_generation = 0

    def close(self) -> None:
        """Let go of it: its number means nothing any more."""
        self.peer.close()
        self.released(self)


class Services:
    """The clients of services: accepted here, handed over, and counted until they are released."""

    def __init__(self, dispatch: Dispatch, parts: Parts, most: int) -> None:
        """`most` clients in all: of each a pidfd is kept."""
        self._dispatch = dispatch
        self._most = most
        self.count = 0
        self.someone_is_untold = False
        self._audit = parts.audit
        self._level, self._labels = parts.held.identity_level, parts.held.labels
        self._last_number = 0
        self._clients_of: dict[int, int] = {}
        # Connections by which the clients of a listener are taken, by its name.
        self._servers: dict[bytes, dict[Connection, None]] = {}
        # How the audit names the listener.
        self._members_of: dict[bytes, str] = {}
        dispatch.table |= {ServeRequest: self._serve, ReleaseRequest: self._release}

    def add_listener(self, name: bytes) -> None:
        """Let services ask for the clients of listener `name`."""
        self._servers[name] = {}
        self._members_of[name] = member_text(listener=os.fsdecode(name))

    def forget(self, connection: Connection) -> None:
        """Note that a connection is gone: nothing is handed over there any more."""
        for servers in self._servers.values():
            servers.pop(connection, None)

    def can_take(self, name: bytes) -> bool:
        """Return whether somebody is there to take the next client of a listener."""
        return self.count < self._most and any(map(_has_room, self._servers[name]))

    def server_for(self, name: bytes) -> Connection | None:
        """Return the connection that takes the next client of a listener; None: nobody can just now.

        A service that is not who connected any more gets no client: whoever holds its connection now,
        as a process that it had started may, could ask nothing for them.
        """
        if self.count >= self._most:
            return None
        able = [server for server in self._servers[name] if _has_room(server)]
        if len(able) > 1:
            able.sort(key=_number_of_clients)
        for server in able:
            objection = server.peer.present_objection()
            if objection is None:
                return server
            self._end_serving(server, name, objection)
        return None

    def end_where_denied(self) -> list[tuple[Connection, bytes]]:
        """End what the policy of now does not let be served; return what is to be said to whom.

        Clients that were handed over stay with their service: what it may ask for them is decided by rules.
        Whoever can't be told now gets no clients, and `someone_is_untold` until this is asked again.
        """
        number = self._dispatch.generation.number
        told = []
        self.someone_is_untold = False
        for name, servers in self._servers.items():
            for server in list(servers):
                if self._may_serve(server, name):
                    continue
                if _is_sent_to(server):
                    self.someone_is_untold = True
                else:
                    request_id = server.serving[name]
                    self._end_serving(server, name, "no_service")
                    told.append((server, encode_serve_reply(request_id, number, _DENIED)))
        return told

    def _may_serve(self, connection: Connection, name: bytes) -> bool:
        generation = self._dispatch.generation
        facts = connection.peer.facts(generation.cgroups)
        allowed = generation.policy.rule_set.services.get(name, ())
        return any(match.matches(facts) for match in allowed)

    def _end_serving(self, connection: Connection, name: bytes, why: str) -> None:
        """Hand nothing over there any more, and record why."""
        del self._servers[name][connection], connection.serving[name]
        members = member_text(listener=os.fsdecode(name), reason=why)
        self._audit.event("serve_ended", f"{connection.record},{members}")

    def accept(self, sock: socket.socket, name: bytes, server: Connection) -> Answer | None:
        """Return what hands a new client over to `server`; None: it is refused, and `sock` is closed."""
        number = self._last_number = self._last_number + 1
        peer = None
        try:
            peer = PeerAtConnect(sock, self._level, labels=self._labels)
            if peer.has_other_real_ids:
                # A set-user-ID program that was made to connect: what is said there may be anybody's.
                raise IdentityError("connected_with_other_ids")
            most = self._dispatch.generation.settings.connections_per_uid
            if self._clients_of.get(peer.uid, 0) >= most:
                raise IdentityError("connections_per_uid")
            if number > _LAST_NUMBER:
                raise IdentityError("numbers_used_up")
            client = ServedClient(number, peer, self._released)
            members = f"{self._members_of[name]},{server.record},{client.record}"
            if not self._audit.event("client_accepted", members) and self._audit.deny_on_failure:
                raise IdentityError("audit")
        except (IdentityError, OSError) as error:
            close_unread(sock)  # its listener is one on which descriptors may be sent: to the service
            if peer is not None:
                peer.close()
            members = member_text(uid=None if peer is None else peer.uid, reason=str(error))
            self._audit.event("client_refused", f"{self._members_of[name]},{members}")
            return None
        self.count += 1
        self._clients_of[peer.uid] = self._clients_of.get(peer.uid, 0) + 1
        server.clients[number] = client
        facts = _new(AcceptedClient, (number, peer.pid, peer.uid, peer.gid, peer.level))
        frame = encode_accepted(
            server.serving[name], self._dispatch.generation.number, facts, self._may_hold_back(most)
        )
        return frame, [sock.detach()]

    def _may_hold_back(self, most: int) -> int:
        """Return how many releases may wait for others, where a user may have `most` clients.

        Those that are not released yet count, and nobody may be refused since they are held back. So it goes
        by the user who has the most; of many it is not asked who that is.
        """
        if len(self._clients_of) > _MOST_USERS_LOOKED_AT:
            return 0
        return max(0, min((most - max(self._clients_of.values())) // 4, _MOST_HELD_BACK))

    def _released(self, client: ServedClient) -> None:
        uid = client.peer.uid
        self.count -= 1
        self._clients_of[uid] -= 1
        if not self._clients_of[uid]:
            del self._clients_of[uid]

    def _serve(self, connection: Connection, request: Request, objection: str | None) -> Answer:
        assert isinstance(request, ServeRequest)  # noqa: S101 - for the type checker; the table says it
        if objection is not None:
            return self._dispatch.refuse(connection, "serve", request.id, objection)
        generation = self._dispatch.generation
        name = request.listener
        servers = self._servers.get(name)
        result, reason = GIVEN, "ok"
        if servers is None or not self._may_serve(connection, name):
            # Which listeners there are is nobody's business who may not serve them.
            result, reason = _DENIED, "no_service"
        elif name in connection.serving:
            result, reason = refused(Reason.BUSY), "served_already"
        members = member_text(
            request=request.id, generation=generation.number, listener=os.fsdecode(name), reason=reason
        )
        if not self._audit.event("serve", f"{connection.record},{members}") and self._audit.deny_on_failure:
            result = refused(Reason.AUDIT)
        if result is GIVEN and servers is not None:
            servers[connection] = None
            connection.serving[name] = request.id
        return encode_serve_reply(request.id, generation.number, result), []

    def _release(self, connection: Connection, request: Request, objection: str | None) -> None:
        """Let go of clients. It has no answer: a service would be woken up for each that it is done with."""
        assert isinstance(request, ReleaseRequest)  # noqa: S101 - for the type checker; the table says it
        if objection is not None:
            members = member_text(request=request.id, reason=objection)
            self._audit.event("release_refused", f"{connection.record},{members}")
            return
        for number in request.clients:
            client = connection.clients.pop(number, None)
            if client is not None:
                client.close()


def _has_room(server: Connection) -> bool:
    # Of each client that comes: the streams alone are asked for more.
    return (
        not server.unsent
        and len(server.clients) < MOST_CLIENTS
        and (server.stream is None or not _is_sent_to(server))
    )


def _number_of_clients(server: Connection) -> int:
    return len(server.clients)


def _is_sent_to(server: Connection) -> bool:
    """Return whether a helper may be sending there: on a stream nothing may come in between."""
    return server.stream is not None and server.awaited > 0
