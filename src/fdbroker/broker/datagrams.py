"""Requests by datagram: each is from whom the kernel says, and has one reply.

A reply by address goes to whoever has that address when it is sent. A path can
be made to lead to another socket, which would then be given descriptors that
nobody there asked for; so only senders are answered that have an abstract
address of the form that the kernel gives (autobind of unix(7)).

What is sent by one socket counts as that socket's until it is received, whoever
it is for; so each uid that has something under way gets a socket of its own.
"""

from __future__ import annotations

import os
import re
import socket
import time
from typing import TYPE_CHECKING, NamedTuple

from fdbroker.broker.audit import member_text
from fdbroker.broker.connection import Client
from fdbroker.broker.identity import IdentityError, PeerOfMessage
from fdbroker.kernel import sockets
from fdbroker.kernel.descriptors import close_all
from fdbroker.kernel.peers import read_ucred
from fdbroker.wire.format import MAX_FRAME, MAX_PATHS
from fdbroker.wire.messages import ListRequest, MalformedError, OpenRequest, StatRequest
from fdbroker.wire.requests import decode_request

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fdbroker.broker.audit import Audit
    from fdbroker.broker.dispatch import Dispatch
    from fdbroker.broker.in_flight import InFlight
    from fdbroker.wire.messages import Request

_SENDERS = 16  # uids that can have something under way at a time
_AUTOBOUND = re.compile(rb"\0[0-9a-f]{5}")
_CAN_BE_ASKED = (OpenRequest, StatRequest, ListRequest)


class _Answered(NamedTuple):
    """A reply, its descriptors, and what it is an answer to; `kind` None: to nothing that can be asked."""

    frame: bytes
    descriptors: list[int]
    request_id: int
    kind: type[Request] | None = None


class Datagrams:
    """Answers datagrams. Owns the sockets that replies are sent by."""

    def __init__(self, dispatch: Dispatch, audit: Audit, level: int, flight: InFlight) -> None:
        """Make these sockets: no socket can be made once the filter is installed."""
        self._dispatch = dispatch
        self._audit = audit
        self._level = level
        self._flight = flight
        self._free: list[socket.socket] = []
        self._clients: dict[int, Client] = {}  # by uid: those that have one of the sockets
        for _ in range(_SENDERS):
            sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._free.append(sender)
            # So that receivers can see who sends.
            sockets.ask_for_credentials(sender)

    def close(self) -> None:
        """Close them."""
        for client in self._clients.values():
            self._flight.forget(client)
            client.sock.close()
        for sender in self._free:
            sender.close()

    def clients(self) -> Iterable[Client]:
        """Return those that have something under way, or had just now."""
        return self._clients.values()

    def serve(self, listener: socket.socket, name: str) -> None:
        """Receive one datagram and answer it."""
        began = time.monotonic_ns()
        try:
            data, credentials, pidfd, address, flags = sockets.receive_datagram(listener, MAX_FRAME + 1)
        except BlockingIOError:
            return None
        except OSError as error:
            self._audit.event("receive_failed", member_text(socket=name, errno=error.errno))
            return None
        try:
            if flags & sockets.CONTROL_TRUNCATED:  # there may have been no room for the sender's pidfd
                raise IdentityError("descriptors_sent")
            peer = PeerOfMessage(credentials, pidfd, self._level)
        except IdentityError as error:
            return self._refuse(f"{member_text(socket=name)}{_sender_members(credentials)}", str(error))
        finally:
            if pidfd >= 0:
                os.close(pidfd)
        record = member_text(socket=name, pid=peer.pid, uid=peer.uid, gid=peer.gid, identity=peer.level)
        if not _AUTOBOUND.fullmatch(address):
            return self._refuse(record, "sender_without_autobound_address")
        client = self._client(peer, record)
        if client is None:
            return self._refuse(record, "replies_not_received")
        too_long = bool(flags & sockets.DATA_TRUNCATED)
        answered = self._answer(client, data, too_long=too_long)
        descriptors = answered.descriptors
        try:
            sockets.send_datagram(client.sock, answered.frame, descriptors, address)
        except OSError as error:
            client.shares = ()
            members = member_text(request=answered.request_id, errno=error.errno)
            self._audit.event("undelivered", f"{record},{members}")
        else:
            if answered.kind is not None:
                client.requests += 1
                client.durations[answered.kind].append(time.monotonic_ns() - began)
            if descriptors:
                # Each process of that uid receives its own, in whatever order.
                self._flight.add(client, len(descriptors), None)
        finally:
            close_all(descriptors)

    def _refuse(self, record: str, reason: str) -> None:
        self._audit.event("datagram_refused", f"{record},{member_text(reason=reason)}")

    def _answer(self, client: Client, data: bytes, *, too_long: bool) -> _Answered:
        request_id = 0
        try:
            if too_long:
                raise MalformedError(f"a message is longer than {MAX_FRAME} bytes")
            request = decode_request(data)
            request_id = request.id
            if not isinstance(request, _CAN_BE_ASKED) or request.client is not None:
                raise MalformedError(f"{type(request).__name__} is not for this socket", request_id)
            answered = self._dispatch.table[type(request)](client, request, None)
            assert answered is not None  # noqa: S101 - only connections are answered later
        except MalformedError as error:
            return _Answered(self._dispatch.malformed(client.record, error), [], error.request_id)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is a denial, and the others are served
            return _Answered(self._dispatch.failed(client.record, request_id, error), [], request_id)
        return _Answered(*answered, request_id, type(request))

    def _client(self, peer: PeerOfMessage, record: str) -> Client | None:
        """Return who asks, with a socket for the reply; None: its uid, or all, must receive first."""
        most = self._dispatch.generation.settings.in_flight_per_connection
        for uid, client in list(self._clients.items()):
            # One whose queue is empty needs its socket no more. (Bytes without descriptors count, too.)
            if sockets.bytes_not_received(client.sock) <= sockets.DRAINED and self._flight.settle(client):
                self._free.append(client.sock)
                del self._clients[uid]
                self._dispatch.counts.leave(client)
        before = self._clients.get(peer.uid)
        if before is None:
            if not self._free:
                return None
            self._clients[peer.uid] = Client(
                self._free.pop(), peer, record, self._flight, self._dispatch.counts.durations["datagram"]
            )
        elif before.in_flight + MAX_PATHS > most:
            return None
        client = self._clients[peer.uid]
        # Another process of that uid, maybe: nothing is remembered of the one before.
        client.peer, client.record, client.asker = peer, record, None
        return client


def _sender_members(credentials: bytes | None) -> str:
    """Return what the kernel says of a sender that is not identified, to be added to a record."""
    if credentials is None:
        return ""
    pid, uid, gid = read_ucred(credentials)
    return f",{member_text(pid=pid, uid=uid, gid=gid)}"
