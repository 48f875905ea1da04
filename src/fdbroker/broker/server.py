"""The loop: accept, receive, ask who, dispatch, record, send.

One thread, one epoll, non-blocking sockets. One message per connection and
round, so that a client with a full queue waits for the others. A client that
does not receive is not read from: what waits for it is at most one reply.

The invariant of every request: nothing is sent before the decision is
recorded, and whatever is not sent is closed.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import select
import socket
from typing import TYPE_CHECKING, NamedTuple

from fdbroker.broker.audit import member_text
from fdbroker.broker.connection import Connection, Unsent
from fdbroker.broker.identity import IdentityError, PeerAtConnect
from fdbroker.broker.in_flight import InFlight
from fdbroker.broker.opening import Outcome
from fdbroker.kernel import sockets
from fdbroker.kernel.descriptors import Descriptors
from fdbroker.wire.format import ERRNO_OF, MAX_FRAME, MAX_PATHS, VERSION, Kind, Reason
from fdbroker.wire.messages import (
    ErrorReply,
    Hello,
    ListRequest,
    MalformedError,
    OpenRequest,
    Request,
    StatRequest,
    StatusRequest,
    Welcome,
    refused,
)
from fdbroker.wire.replies import (
    encode_error,
    encode_list_reply,
    encode_open_reply,
    encode_stat_reply,
    encode_status_reply,
    encode_welcome,
)
from fdbroker.wire.requests import decode_request

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fdbroker.broker.audit import Audit
    from fdbroker.broker.identity import ControlGroups
    from fdbroker.broker.opening import Opener
    from fdbroker.policy.decide import Policy, View

SEND_BUFFER = 32768  # the kernel doubles it; no cost was seen, and less is in flight
ACCEPTS_PER_ROUND = 16


class _Counters:
    """Totals since the start, for `status`."""

    __slots__ = ("accepted", "allowed", "denied", "malformed", "refused_connections")

    def __init__(self) -> None:
        self.accepted = self.allowed = self.denied = self.malformed = self.refused_connections = 0


class Parts(NamedTuple):
    """What a broker is made of; `policy` has generation 1."""

    policy: Policy
    opener: Opener
    audit: Audit
    cgroups: ControlGroups
    identity_level: int


class Broker:
    """Serves listeners and adopted connections until it is stopped. Owns them all."""

    def __init__(self, parts: Parts) -> None:
        self._policy = parts.policy
        self._generation = 1
        self._opener = parts.opener
        self._audit = parts.audit
        self._cgroups = parts.cgroups
        self._level = parts.identity_level
        self._epoll = select.epoll()
        self._listeners: dict[int, tuple[socket.socket, str]] = {}
        self._connections: dict[int, Connection] = {}
        self._connections_of: dict[int, int] = {}
        self._accepted = 0
        self._counters = _Counters()
        self._room = bytearray(MAX_FRAME + 1)
        self._stopping = False
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._epoll.register(self._wake_read, select.EPOLLIN)
        # Held so that a connection can still be accepted, and refused, when descriptors run out.
        self._spare = os.open("/", os.O_PATH | os.O_CLOEXEC)
        most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._in_flight = InFlight(most // 2, most_per_uid=most // 8)
        # Each connection has a socket and a pidfd, and may hold a reply of 253.
        self._max_connections = most // 8
        self._handlers: dict[type, Callable[[Connection, Request, str | None], None]] = {
            Hello: self._hello,
            OpenRequest: self._open,
            StatRequest: self._stat,
            ListRequest: self._list,
            StatusRequest: self._status,
        }

    @property
    def wake_descriptor(self) -> int:
        """For `signal.set_wakeup_fd`: a byte written there makes the loop look up."""
        return self._wake_write

    def add_listener(self, listener: socket.socket, name: str) -> None:
        """Serve a listening SOCK_SEQPACKET socket; owned from now on. `name` is for the audit."""
        listener.setblocking(False)
        sockets.ask_for_credentials(listener)
        sockets.refuse_descriptors(listener)
        self._listeners[listener.fileno()] = (listener, name)
        self._epoll.register(listener, select.EPOLLIN)

    def adopt(self, sock: socket.socket, name: str) -> None:
        """Serve a connection that exists already; owned from now on.

        Raises:
            IdentityError: its peer can't be identified; the socket is closed.

        """
        try:
            sock.setblocking(False)
            sockets.ask_for_credentials(sock)
            sockets.refuse_descriptors(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
            peer = PeerAtConnect(sock, self._level)
        except BaseException:
            sock.close()
            raise
        self._accepted += 1
        connection = Connection(sock, peer, self._accepted, name)
        self._connections[sock.fileno()] = connection
        self._connections_of[peer.uid] = self._connections_of.get(peer.uid, 0) + 1
        self._epoll.register(sock, select.EPOLLIN)
        self._counters.accepted += 1

    def stop(self) -> None:
        """Make `serve` return after the round it is in. May be called from a signal handler or a thread."""
        self._stopping = True
        os.write(self._wake_write, b"\0")

    def serve(self) -> None:
        """Serve until `stop`."""
        while not self._stopping:
            self.step(-1)

    def step(self, timeout: float) -> None:
        """Serve one round of what is ready within `timeout` seconds (-1: wait)."""
        for descriptor, events in self._epoll.poll(timeout):
            connection = self._connections.get(descriptor)
            if connection is not None:
                self._on_connection(connection, events)
            elif descriptor in self._listeners:
                self._accept(*self._listeners[descriptor])
            elif descriptor == self._wake_read:
                os.read(self._wake_read, 64)

    def close(self) -> None:
        """Close every connection, every listener and the loop's own descriptors."""
        for connection in list(self._connections.values()):
            self._drop(connection)
        for listener, _ in self._listeners.values():
            listener.close()
        self._listeners.clear()
        self._epoll.close()
        for descriptor in (self._wake_read, self._wake_write, self._spare):
            if descriptor >= 0:
                os.close(descriptor)

    # Connections

    def _accept(self, listener: socket.socket, name: str) -> None:
        for _ in range(ACCEPTS_PER_ROUND):
            try:
                sock, _ = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in {errno.EMFILE, errno.ENFILE}:
                    self._accept_to_refuse(listener, name)
                    return
                # The connecting side gave up meanwhile, or the like: nobody to answer.
                self._audit.event("accept_failed", member_text(socket=name, errno=error.errno))
                continue
            if len(self._connections) >= self._max_connections:
                self._refuse(sock, name, "too many connections", "connections")
                continue
            try:
                self.adopt(sock, name)
            except IdentityError as error:
                self._counters.refused_connections += 1
                self._audit.event("connection_refused", member_text(socket=name, reason=str(error)))
                continue
            except OSError as error:
                self._audit.event("connection_refused", member_text(socket=name, reason=str(error)))
                continue
            self._refuse_if_too_many(self._connections[sock.fileno()], name)

    def _refuse_if_too_many(self, connection: Connection, name: str) -> None:
        most = self._policy.rule_set.settings.connections_per_uid
        uid = connection.peer.uid
        if self._connections_of[uid] <= most:
            return
        text = f"uid {uid} has {most} connections already, which is the limit (connections_per_uid)"
        self._reply_error(connection, 0, Kind.REFUSED, Reason.LIMIT, text)
        self._counters.refused_connections += 1
        self._audit.event(
            "connection_refused", member_text(socket=name, uid=uid, reason="connections_per_uid", limit=most)
        )
        self._drop(connection)

    def _accept_to_refuse(self, listener: socket.socket, name: str) -> None:
        """Out of descriptors: without this the listener would stay ready, and the loop would spin."""
        os.close(self._spare)
        self._spare = -1
        try:
            sock, _ = listener.accept()
            self._refuse(sock, name, "the broker has no descriptors left", "descriptors")
        except OSError:
            self._audit.event("accept_failed", member_text(socket=name, errno=errno.EMFILE))
        self._spare = os.open("/", os.O_PATH | os.O_CLOEXEC)

    def _refuse(self, sock: socket.socket, name: str, text: str, reason: str) -> None:
        """Refuse a connection that was not even looked at."""
        self._counters.refused_connections += 1
        self._audit.event("connection_refused", member_text(socket=name, reason=reason))
        with sock:
            error = ErrorReply(0, self._generation, Kind.REFUSED, Reason.LIMIT, ERRNO_OF[Reason.LIMIT], text)
            try:
                sockets.send(sock, encode_error(error), wait=False)
            except OSError:
                return

    def _go_on_if_received(self, connection: Connection) -> None:
        """Everything was received: read again, or close at last."""
        if not self._in_flight.settle(connection):
            return
        if connection.closing:
            self._drop(connection)
        else:
            connection.paused = False
            self._epoll.modify(connection.sock, select.EPOLLIN)

    def _hang_up(self, connection: Connection) -> None:
        """End a connection from our side, but keep counting what lies in the client's queue."""
        if self._in_flight.settle(connection):
            self._drop(connection)
            return
        if connection.unsent is not None:
            connection.unsent.descriptors.close()
            connection.unsent = None
        connection.closing = True
        # The client reads to its end; its hanging up is still told, by EPOLLHUP.
        connection.sock.shutdown(socket.SHUT_WR)
        self._epoll.modify(connection.sock, select.EPOLLOUT | select.EPOLLET)

    def _drop(self, connection: Connection) -> None:
        """Forget a connection whose client is gone, or has nothing left to receive."""
        self._in_flight.forget(connection)
        descriptor = connection.sock.fileno()
        self._epoll.unregister(descriptor)
        del self._connections[descriptor]
        uid = connection.peer.uid
        self._connections_of[uid] -= 1
        if not self._connections_of[uid]:
            del self._connections_of[uid]
        connection.close()

    def _on_connection(self, connection: Connection, events: int) -> None:
        if events & (select.EPOLLHUP | select.EPOLLERR):
            # Nobody is left to answer, and a decision nobody hears of is not made.
            self._drop(connection)
        elif connection.unsent is not None:
            self._send_what_waits(connection)
        elif connection.paused or connection.closing:
            self._go_on_if_received(connection)
        elif self._may_read(connection):
            self._serve_message(connection)

    def _may_read(self, connection: Connection) -> bool:
        """Return whether a full reply may go out; otherwise stop reading until all was received."""
        limit = self._policy.rule_set.settings.in_flight_per_connection
        if connection.in_flight + MAX_PATHS <= limit or self._in_flight.settle(connection):
            return True
        connection.paused = True
        # Edge-triggered: one event each time the peer receives something.
        self._epoll.modify(connection.sock, select.EPOLLOUT | select.EPOLLET)
        return False

    # Messages

    def _serve_message(self, connection: Connection) -> None:
        try:
            message = sockets.receive_into(connection.sock, self._room)
        except BlockingIOError:
            return
        except OSError as error:
            self._audit.event("receive_failed", f"{connection.record},{member_text(errno=error.errno)}")
            self._hang_up(connection)
            return
        if message.descriptors:
            count = len(message.descriptors)
            message.descriptors.close()
            self._malformed(connection, 0, f"{count} descriptors sent to the broker, which takes none")
            return
        if not message.data:
            self._hang_up(connection)
            return
        if message.truncated:
            self._malformed(connection, 0, f"a message longer than {MAX_FRAME} bytes")
            return
        try:
            request = decode_request(message.data)
            if isinstance(request, Hello) is connection.greeted:
                raise MalformedError(
                    "a second hello" if connection.greeted else "the first frame is not a hello", request.id
                )
        except MalformedError as error:
            self._malformed(connection, error.request_id, str(error))
            return
        objection = connection.peer.objection(message.credentials)
        self._handlers[type(request)](connection, request, objection)

    def _malformed(self, connection: Connection, request_id: int, text: str) -> None:
        self._counters.malformed += 1
        self._audit.event("malformed", f"{connection.record},{member_text(request=request_id, reason=text)}")
        self._reply_error(connection, request_id, Kind.MALFORMED, Reason.MALFORMED, text)
        self._hang_up(connection)

    def _view(self, connection: Connection) -> View:
        view = connection.view(self._generation)
        if view is None:
            view = self._policy.view(connection.peer.facts(self._cgroups))
            connection.keep_view(self._generation, view)
        return view

    def _hello(self, connection: Connection, request: Request, objection: str | None) -> None:
        assert isinstance(request, Hello)  # noqa: S101 - for the type checker; the table says it
        if objection is not None:
            self._refuse_request(connection, request.id, "hello", objection)
        elif not request.lowest <= VERSION <= request.highest:
            text = f"this broker speaks version {VERSION}, not {request.lowest} to {request.highest}"
            self._reply_error(connection, request.id, Kind.REFUSED, Reason.VERSION, text)
        else:
            connection.greeted = True
            welcome = Welcome(
                request.id,
                self._generation,
                version=VERSION,
                identity_level=connection.peer.level,
                features=0,
                max_paths=MAX_PATHS,
                max_frame=MAX_FRAME,
                in_flight=self._policy.rule_set.settings.in_flight_per_connection,
                copy_max=0,
            )
            self._reply(connection, request.id, encode_welcome(welcome))

    def _open(self, connection: Connection, request: Request, objection: str | None) -> None:
        assert isinstance(request, OpenRequest)  # noqa: S101 - for the type checker; the table says it
        paths = request.paths
        with Descriptors() as descriptors:
            refusal = _refusal_of_all(objection)
            if refusal is None and not self._in_flight.room_for(
                connection, len(paths), self._connections.values()
            ):
                refusal = Outcome(refused(Reason.LIMIT), "in_flight", None)
            if refusal is not None:
                outcomes = [refusal] * len(paths)
            else:
                outcomes = []
                view = self._view(connection).actions["open"]
                open_file = self._opener.open
                uid = connection.peer.uid
                for path in paths:
                    outcome = open_file(view, path, uid)
                    if outcome.descriptor >= 0:
                        descriptors.add(outcome.descriptor)
                    outcomes.append(outcome)
            if not self._record(connection, "open", request.id, paths, outcomes):
                descriptors.close()
                outcomes = [_NOT_RECORDED] * len(paths)
            results = [outcome.result for outcome in outcomes]
            reply = encode_open_reply(request.id, self._generation, results)
            self._reply(connection, request.id, reply, descriptors)

    def _stat(self, connection: Connection, request: Request, objection: str | None) -> None:
        assert isinstance(request, StatRequest)  # noqa: S101 - for the type checker; the table says it
        refusal = _refusal_of_all(objection)
        if refusal is not None:
            outcomes = [refusal] * len(request.paths)
        else:
            view = self._view(connection).actions["stat"]
            uid = connection.peer.uid
            outcomes = [self._opener.stat(view, path, uid) for path in request.paths]
        if not self._record(connection, "stat", request.id, request.paths, outcomes):
            outcomes = [_NOT_RECORDED] * len(request.paths)
        results = [(outcome.result, outcome.facts) for outcome in outcomes]
        self._reply(connection, request.id, encode_stat_reply(request.id, self._generation, results))

    def _list(self, connection: Connection, request: Request, objection: str | None) -> None:
        assert isinstance(request, ListRequest)  # noqa: S101 - for the type checker; the table says it
        entries: Sequence[bytes] = ()
        cookie, last = 0, True
        outcome = _refusal_of_all(objection)
        if outcome is None:
            view = self._view(connection)
            outcome, entries, cookie, last = self._opener.list(
                view, request.path, request.cookie, request.most, connection.peer.uid
            )
        shown = f',"entries":{len(entries)}'
        if not self._record(connection, "list", request.id, [request.path], [outcome], shown):
            outcome, entries, cookie, last = _NOT_RECORDED, (), 0, True
        reply = encode_list_reply(request.id, self._generation, outcome.result, entries, cookie, last=last)
        self._reply(connection, request.id, reply)

    def _status(self, connection: Connection, request: Request, objection: str | None) -> None:
        if objection is not None:
            self._refuse_request(connection, request.id, "status", objection)
            return
        peer = connection.peer
        document: dict[str, object] = {
            "generation": self._generation,
            "identity_level": peer.level,
            "peer": {"pid": peer.pid, "uid": peer.uid, "gid": peer.gid, "groups": sorted(peer.groups)},
            "in_flight": connection.in_flight,
            "audit": self._audit.run if self._audit.on else "off",
        }
        if peer.uid == 0:
            counters = self._counters
            document["totals"] = {
                "accepted": counters.accepted,
                "connections": len(self._connections),
                "in_flight": self._in_flight.total,
                "allowed": counters.allowed,
                "denied": counters.denied,
                "malformed": counters.malformed,
                "refused_connections": counters.refused_connections,
                "audit_failures": self._audit.failures,
            }
        reply = encode_status_reply(request.id, self._generation, json.dumps(document).encode())
        self._reply(connection, request.id, reply)

    # Record and send

    def _record(
        self,
        connection: Connection,
        action: str,
        request_id: int,
        paths: Sequence[bytes],
        outcomes: Sequence[Outcome],
        extra: str = "",
    ) -> bool:
        head = f'{connection.record},"request":{request_id},"generation":{self._generation}'
        decided = [
            (path, outcome.reason, outcome.rule) for path, outcome in zip(paths, outcomes, strict=True)
        ]
        allowed = sum(outcome.reason == "ok" for outcome in outcomes)
        self._counters.allowed += allowed
        self._counters.denied += len(outcomes) - allowed
        return self._audit.decisions(head, action, decided, extra)

    def _refuse_request(self, connection: Connection, request_id: int, what: str, objection: str) -> None:
        self._audit.event(
            f"{what}_refused", f"{connection.record},{member_text(request=request_id, reason=objection)}"
        )
        text = f"the sender of this message is not who connected: {objection}"
        self._reply_error(connection, request_id, Kind.REFUSED, Reason.IDENTITY, text)

    def _reply_error(
        self, connection: Connection, request_id: int, kind: Kind, reason: Reason, text: str
    ) -> None:
        reply = ErrorReply(request_id, self._generation, kind, reason, ERRNO_OF[reason], text)
        try:
            sockets.send(connection.sock, encode_error(reply), wait=False)
        except OSError:
            # Said to a client that does not listen; the audit has it.
            return

    def _reply(
        self, connection: Connection, request_id: int, data: bytes, descriptors: Descriptors | None = None
    ) -> None:
        """Send a reply, or keep it until there is room. Takes over `descriptors` if it keeps it."""
        numbers = () if descriptors is None else descriptors.numbers()
        try:
            sockets.send(connection.sock, data, numbers, wait=False)
        except BlockingIOError:
            waiting = Descriptors(() if descriptors is None else descriptors.take_all())
            connection.unsent = Unsent(data, waiting, request_id)
            self._epoll.modify(connection.sock, select.EPOLLOUT)
        except OSError as error:
            self._undelivered(connection, request_id, error)
        else:
            if numbers:
                self._in_flight.add(connection, len(numbers))

    def _send_what_waits(self, connection: Connection) -> None:
        unsent = connection.unsent
        assert unsent is not None  # noqa: S101 - for the type checker; the caller looked
        try:
            sockets.send(connection.sock, unsent.data, unsent.descriptors.numbers(), wait=False)
        except BlockingIOError:
            return
        except OSError as error:
            self._undelivered(connection, unsent.request_id, error)
            return
        self._in_flight.add(connection, len(unsent.descriptors))
        unsent.descriptors.close()
        connection.unsent = None
        self._epoll.modify(connection.sock, select.EPOLLIN)

    def _undelivered(self, connection: Connection, request_id: int, error: OSError) -> None:
        self._audit.event(
            "undelivered", f"{connection.record},{member_text(request=request_id, errno=error.errno)}"
        )
        if error.errno == errno.ETOOMANYREFS and connection.unsent is None:
            text = "too many descriptors are under way; receive what was sent, then ask again"
            self._reply_error(connection, request_id, Kind.REFUSED, Reason.LIMIT, text)
        else:
            self._hang_up(connection)


_NOT_RECORDED = Outcome(refused(Reason.AUDIT), "audit", None)


def _refusal_of_all(objection: str | None) -> Outcome | None:
    """Return the outcome of every path in a message whose sender is not who connected."""
    return None if objection is None else Outcome(refused(Reason.IDENTITY), objection, None)
