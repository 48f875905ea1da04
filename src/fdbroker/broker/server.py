"""The loop: accept, receive, ask who, let it be answered, send.

One thread, one epoll, non-blocking sockets. One message per uid and round, so
that whoever has many connections or a full queue waits for the others. A client
that does not receive is not read from: what waits for it is at most one reply.
"""

from __future__ import annotations

import errno
import gc
import os
import resource
import select
import socket
from typing import TYPE_CHECKING, NamedTuple

from fdbroker.broker.audit import member_text
from fdbroker.broker.connection import Connection, State, Unsent
from fdbroker.broker.control import Control
from fdbroker.broker.dispatch import Dispatch, Parts, Table
from fdbroker.broker.identity import IdentityError, PeerAtConnect
from fdbroker.broker.in_flight import InFlight
from fdbroker.kernel import sockets
from fdbroker.kernel.descriptors import close_all
from fdbroker.wire.format import MAX_FRAME, MAX_PATHS, Kind, Reason
from fdbroker.wire.messages import Hello, MalformedError
from fdbroker.wire.requests import decode_request

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

SEND_BUFFER = 32768  # the kernel doubles it; no cost was seen, and less is in flight
ACCEPTS_PER_ROUND = 16
_REST = 0.1  # seconds
# Everybody may ask on a control socket, and whoever has subordinate ids has many of them: what they
# take up there must not be what the clients need.
_MOST_FOR_CONTROL = 64
_READY = select.EPOLLIN
_READING = State.READING  # to look up a member of an Enum costs as much as a small system call
_GONE = select.EPOLLHUP | select.EPOLLERR
# Edge-triggered: one event each time the client receives something.
_RECEIVES = select.EPOLLOUT | select.EPOLLET
_INTEREST = {
    State.READING: select.EPOLLIN,
    State.SENDING: select.EPOLLOUT,
    State.PAUSED: _RECEIVES,
    State.CLOSING: _RECEIVES,
    State.LOADING: 0,  # that it hangs up is told all the same
}


class _Listener(NamedTuple):
    """A listening socket, its name in the audit, and what can be asked on its connections."""

    sock: socket.socket
    name: str
    answers: Table


class Broker:
    """Serves listeners and adopted connections until it is stopped. Owns them all."""

    def __init__(self, parts: Parts) -> None:
        self._dispatch = Dispatch(parts, self._totals)
        self._control = Control(self._dispatch, parts, self._facts, self._switched)
        self._notifier = parts.notifier
        self._audit = parts.audit
        self._level = parts.identity_level
        self._epoll = select.epoll()
        self._listeners: dict[int, _Listener] = {}
        # Listeners that are not listened to for one round, since accepting failed.
        self._resting: list[socket.socket] = []
        self._connections: dict[int, Connection] = {}
        self._connections_of: dict[int, int] = {}
        # Those on control sockets, of root and others.
        self._for_control = 0
        self._accepted = self._refused = self._malformed = 0
        # Connections on which a policy was handed over, one after the other.
        self._loading: list[Connection] = []
        self._stopping = False
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._epoll.register(self._wake_read, select.EPOLLIN)
        # Held so that a connection can still be accepted, and refused, when descriptors run out.
        self._spare = os.open("/", os.O_PATH | os.O_CLOEXEC)
        most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        # A full reply must fit into the share of one uid, or its request could never be answered.
        self._flight = InFlight(most // 2, max(most // 8, MAX_PATHS), self._connections)
        # Each connection has a socket and a pidfd, and may hold a reply of 253.
        self._max_connections = most // 8

    @property
    def wake_descriptor(self) -> int:
        """For `signal.set_wakeup_fd`: a byte written there makes the loop look up."""
        return self._wake_write

    def add_listener(self, listener: socket.socket, name: str, *, control: bool = False) -> None:
        """Serve a listening SOCK_SEQPACKET socket; owned from now on. `name` is for the audit.

        `control`: for those who administer the broker; see control.py for what can be asked there.
        """
        listener.settimeout(0)
        sockets.ask_for_credentials(listener)
        sockets.refuse_descriptors(listener)
        answers = self._control.table if control else self._dispatch.table
        self._listeners[listener.fileno()] = _Listener(listener, name, answers)
        self._epoll.register(listener, select.EPOLLIN)

    def adopt(self, sock: socket.socket, name: str, answers: Table | None = None) -> Connection:
        """Serve a connection that exists already; owned from now on. `answers`: what can be asked there.

        Raises:
            IdentityError: its peer can't be identified; the socket is closed.
            OSError: so it is when the socket can't be used.

        """
        try:
            sock.settimeout(0)
            sockets.ask_for_credentials(sock)
            sockets.refuse_descriptors(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
            self._epoll.register(sock, _READY)
            peer = PeerAtConnect(sock, self._level)
        except BaseException:
            sock.close()
            raise
        self._accepted += 1
        record = member_text(
            socket=name,
            connection=self._accepted,
            pid=peer.pid,
            uid=peer.uid,
            gid=peer.gid,
            identity=peer.level,
        )
        connection = Connection(sock, peer, record, answers or self._dispatch.table, self._flight)
        connection.for_control = answers is self._control.table
        self._for_control += connection.for_control
        self._connections[sock.fileno()] = connection
        self._connections_of[peer.uid] = self._connections_of.get(peer.uid, 0) + 1
        return connection

    def stop(self) -> None:
        """Make `serve` return after the round it is in. May be called from a signal handler or a thread."""
        self._stopping = True
        os.write(self._wake_write, b"\0")

    def serve(self) -> None:
        """Serve until `stop`, or until nobody is left to be served and nobody can come."""
        while not self._stopping and (self._listeners or self._connections):
            self.step(self._notifier.before_waiting())

    def step(self, timeout: float) -> None:
        """Serve one round of what is ready within `timeout` seconds (-1: wait)."""
        resting, self._resting = self._resting, []
        if self._loading:
            timeout = 0
        elif resting and not 0 <= timeout < _REST:
            timeout = _REST
        # Room for all of them, or it would not show who else wants something; and for no more, which costs.
        most = len(self._connections) + len(self._listeners) + 1
        ready = self._epoll.poll(timeout, most)
        for listener in resting:
            self._epoll.register(listener, _READY)
        if len(ready) == 1 and not self._loading:  # one client wants one thing, as it mostly is
            descriptor, events = ready[0]
            connection = self._connections.get(descriptor)
            if connection is not None and events == _READY and connection.state is _READING:
                self._serve_message(connection)
                return
        self._serve_all(ready)
        if self._loading:
            self._load_on(self._loading[0])

    def _serve_all(self, ready: Iterable[tuple[int, int]]) -> None:
        """Serve one message for each uid, and what else happened."""
        served: set[int] = set()
        waiting: list[Connection] = []
        for descriptor, events in ready:
            connection = self._connections.get(descriptor)
            if connection is not None:
                uid = connection.peer.uid
                if events != _READY or connection.state is not _READING:
                    self._on_other_event(connection, events)
                elif uid in served:
                    waiting.append(connection)
                elif not served or self._goes_on():
                    served.add(uid)
                    self._serve_message(connection)
            elif descriptor in self._listeners:
                self._accept(self._listeners[descriptor])
            elif descriptor == self._wake_read:
                os.read(self._wake_read, 64)
        if len(served) == 1:
            # Nobody else wants anything. Otherwise it is one message per uid and round, whatever
            # number of connections it has: the rest is ready again in the next round.
            for connection in waiting:
                if connection.state is _READING and self._goes_on():
                    self._serve_message(connection)

    def _goes_on(self) -> bool:
        """Say, in the middle of a round, which may be long, that the loop lives; return whether to go on."""
        self._notifier.ping()
        return not self._stopping

    def close(self) -> None:
        """Close every connection, every listener and the loop's own descriptors."""
        for connection in list(self._connections.values()):
            self._drop(connection)
        for listener in self._listeners.values():
            listener.sock.close()
        self._listeners.clear()
        self._epoll.close()
        close_all([self._wake_read, self._wake_write])
        if self._spare >= 0:
            os.close(self._spare)

    def _totals(self) -> Mapping[str, int]:
        return {
            "accepted": self._accepted,
            "connections": len(self._connections),
            "in_flight": self._flight.total,
            "malformed": self._malformed,
            "refused_connections": self._refused,
        }

    def _facts(self) -> Mapping[str, object]:
        """Return what the loop knows of itself, for the whole status."""
        return {
            "listeners": [
                {"name": name, "control": answers is self._control.table}
                for _, name, answers in self._listeners.values()
            ],
            "connections_most": self._max_connections,
        }

    def _switched(self) -> None:
        """Forget the policy before: idle clients must not keep it, with all they asked by it."""
        for connection in self._connections.values():
            connection.view = None
        settle_memory()
        self.say_status()

    def say_status(self, **more: str) -> None:
        """Tell the service manager what is served, and `more`."""
        number, policy = self._dispatch.generation[:2]
        rules = len(policy.rule_set.rules)
        self._notifier.say(**more, STATUS=f"Serving by policy generation {number} ({rules} rules)")

    def say_stopping(self) -> None:
        """Tell the service manager that this was the end."""
        self._notifier.say(STOPPING="1", STATUS="Stopping")

    # Connections come

    def _accept(self, listener: _Listener) -> None:
        for _ in range(ACCEPTS_PER_ROUND):
            try:
                sock, _ = listener.sock.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in {errno.EMFILE, errno.ENFILE}:
                    self._accept_to_refuse(listener)
                    return
                self._audit.event("accept_failed", member_text(socket=listener.name, errno=error.errno))
                if error.errno == errno.ECONNABORTED:  # the connecting side gave up: nobody to answer
                    continue
                self._let_rest(listener.sock)
                return
            self._take_or_refuse(sock, listener)

    def _take_or_refuse(self, sock: socket.socket, listener: _Listener) -> None:
        name = listener.name
        try:
            connection = self.adopt(sock, name, listener.answers)
        except (IdentityError, OSError) as error:
            self._refused += 1
            self._audit.event("connection_refused", member_text(socket=name, reason=str(error)))
            return
        uid, most = connection.peer.uid, self._dispatch.generation.settings.connections_per_uid
        if connection.for_control:
            if uid == 0:
                return  # however many there are: who administers it must get in
            if self._for_control > _MOST_FOR_CONTROL:
                text = "too many ask for status and explanations at once; ask again"
                self._refuse(sock, name, text, member_text(uid=uid, reason="control_connections"))
                self._drop(connection)
                return
        elif len(self._connections) - self._for_control > self._max_connections:
            members = member_text(uid=uid, reason="connections")
            self._refuse(sock, name, "the broker has too many connections", members)
            self._drop(connection)
            return
        if self._connections_of[uid] > most:
            text = f"uid {uid} has {most} connections already, which is the limit (connections_per_uid)"
            members = member_text(uid=uid, reason="connections_per_uid", limit=most)
            self._refuse(sock, name, text, members)
            self._drop(connection)

    def _refuse(self, sock: socket.socket, name: str, text: str, members: str) -> None:
        """Record and say why a connection is not served; the caller closes it."""
        self._refused += 1
        self._audit.event("connection_refused", f"{member_text(socket=name)},{members}")
        self._send_error(sock, 0, Kind.REFUSED, Reason.LIMIT, text)

    def _accept_to_refuse(self, listener: _Listener) -> None:
        """Out of descriptors: without this the listener would stay ready, and the loop would spin."""
        if self._spare >= 0:
            os.close(self._spare)
            self._spare = -1
        try:
            sock, _ = listener.sock.accept()
            with sock:
                members = member_text(reason="descriptors")
                self._refuse(sock, listener.name, "the broker has no descriptors left", members)
        except OSError as error:
            # The whole system is out of files (ENFILE): the listener rests a while, the connections go on.
            self._audit.event("accept_failed", member_text(socket=listener.name, errno=error.errno))
            self._let_rest(listener.sock)
        try:
            self._spare = os.open("/", os.O_PATH | os.O_CLOEXEC)
        except OSError:
            # Tried again at the next shortage.
            return

    def _let_rest(self, listener: socket.socket) -> None:
        """Leave a listener alone for one round: it would be ready again at once, and fail again."""
        self._epoll.unregister(listener)
        self._resting.append(listener)

    # Connections go

    def _hang_up(self, connection: Connection) -> None:
        """End a connection from our side, but keep counting what lies in the client's queue."""
        connection.loading = None
        self._discard_unsent(connection)
        if self._flight.settle(connection):
            self._drop(connection)
            return
        # The client reads to the end of its queue; that it hangs up is still told, by EPOLLHUP.
        connection.sock.shutdown(socket.SHUT_WR)
        self._wait_for(connection, State.CLOSING)

    def _discard_unsent(self, connection: Connection) -> None:
        """Let go of a reply that waits, and take back in the audit what it would have given."""
        if connection.unsent is not None:
            members = member_text(request=connection.unsent.request_id, errno=errno.EPIPE)
            self._audit.event("undelivered", f"{connection.record},{members}")
            connection.discard_unsent()

    def _drop(self, connection: Connection) -> None:
        """Forget a connection whose client is gone, or has nothing left to receive."""
        connection.loading = None
        self._discard_unsent(connection)
        self._flight.forget(connection)
        descriptor = connection.sock.fileno()
        self._epoll.unregister(descriptor)
        del self._connections[descriptor]
        self._for_control -= connection.for_control
        uid = connection.peer.uid
        self._connections_of[uid] -= 1
        if not self._connections_of[uid]:
            del self._connections_of[uid]
        connection.close()

    def _wait_for(self, connection: Connection, state: State) -> None:
        connection.state = state
        self._epoll.modify(connection.sock, _INTEREST[state])

    def _on_other_event(self, connection: Connection, events: int) -> None:
        """Whatever is not simply the next request."""
        if events & _GONE and connection.state is not State.CLOSING:
            # Nobody is left to answer, and a decision nobody hears of is not made. But it may be that
            # both directions were shut down by a client that lives on, with its queue: then that counts on.
            self._hang_up(connection)
        elif connection.state is State.SENDING:
            self._send_what_waits(connection)
        elif connection.state is State.READING:
            self._serve_message(connection)
        elif self._flight.settle(connection):
            if connection.state is State.CLOSING:
                self._drop(connection)
            else:
                self._wait_for(connection, State.READING)

    # Messages

    def _serve_message(self, connection: Connection) -> None:
        # A full reply must have its place before the request is read.
        most = self._dispatch.generation.settings.in_flight_per_connection
        if connection.in_flight + MAX_PATHS > most and not self._flight.settle(connection):
            self._wait_for(connection, State.PAUSED)
            return
        try:
            data, credentials, flags = sockets.receive_data(connection.sock, MAX_FRAME + 1)
        except BlockingIOError:
            return
        except OSError as error:
            self._audit.event("receive_failed", f"{connection.record},{member_text(errno=error.errno)}")
            self._hang_up(connection)
            return
        if not data and not flags:
            self._hang_up(connection)
            return
        try:
            if flags:
                raise MalformedError(
                    "descriptors were sent to the broker, which takes none"
                    if flags & sockets.CONTROL_TRUNCATED
                    else f"a message is longer than {MAX_FRAME} bytes"
                )
            request = decode_request(data)
            answer = connection.answers.get(type(request))
            if answer is None:
                raise MalformedError(f"{type(request).__name__} is not for this socket", request.id)
            if (type(request) is Hello) is connection.greeted:
                text = "a second hello" if connection.greeted else "the first frame is not a hello"
                raise MalformedError(text, request.id)
        except MalformedError as error:
            self._malformed += 1
            members = member_text(request=error.request_id, reason=str(error))
            self._audit.event("malformed", f"{connection.record},{members}")
            self._send_error(connection.sock, error.request_id, Kind.MALFORMED, Reason.MALFORMED, str(error))
            self._hang_up(connection)
            return
        try:
            answered = answer(connection, request, connection.peer.objection(credentials))
        except Exception as error:  # noqa: BLE001 - whatever it is, it is a denial, and the others are served
            self._fail(connection, request.id, error)
            return
        if answered is None:
            self._loading.append(connection)
            self._wait_for(connection, State.LOADING)
            return
        self._send(connection, *answered, request.id)

    def _load_on(self, connection: Connection) -> None:
        """Go on reading the policy that was handed over here, for a moment; answer when it is read."""
        loading = connection.loading
        if loading is None:  # its client is gone
            del self._loading[0]
            return
        try:
            answered = self._control.load(connection, loading)
        except Exception as error:  # noqa: BLE001 - as above
            self._fail(connection, loading.request_id, error)
            return
        if answered is not None:
            del self._loading[0]
            connection.loading = None
            self._wait_for(connection, State.READING)
            self._send(connection, *answered, loading.request_id)

    def _fail(self, connection: Connection, request_id: int, error: Exception) -> None:
        """Record and say that something is wrong with us, and end the connection."""
        members = member_text(request=request_id, reason=_describe(error))
        self._audit.event("failed", f"{connection.record},{members}")
        text = "the broker failed on this request; its audit says where"
        self._send_error(connection.sock, request_id, Kind.BROKEN, Reason.BROKEN, text)
        self._hang_up(connection)

    def _send(self, connection: Connection, data: bytes, descriptors: list[int], request_id: int) -> None:
        """Send a reply, or keep it until there is room; its descriptors are owned here from now on."""
        try:
            sockets.send(connection.sock, data, descriptors, wait=False)
        except OSError as error:
            self._keep_unsent(connection, Unsent(data, descriptors, request_id), error)
            return
        if descriptors:
            self._flight.add(connection, len(descriptors))
            close_all(descriptors)

    def _keep_unsent(self, connection: Connection, reply: Unsent, error: OSError) -> None:
        """Keep a new reply for which there was no room; let go of one that can't be sent at all."""
        if isinstance(error, BlockingIOError):
            connection.unsent = reply
            # They are open here, which costs us as much as if they were on their way.
            self._flight.add(connection, len(reply.descriptors))
            self._wait_for(connection, State.SENDING)
            return
        close_all(reply.descriptors)
        members = member_text(request=reply.request_id, errno=error.errno)
        self._audit.event("undelivered", f"{connection.record},{members}")
        if error.errno != errno.ETOOMANYREFS:
            self._hang_up(connection)
            return
        # Our own share is far below; others of this uid may have used up the rest.
        text = "too many descriptors are under way; receive what was sent, then ask again"
        error_frame = self._dispatch.error(reply.request_id, Kind.REFUSED, Reason.LIMIT, text)
        self._send(connection, error_frame, [], reply.request_id)

    def _send_what_waits(self, connection: Connection) -> None:
        reply = connection.unsent
        assert reply is not None  # noqa: S101 - that is what the state SENDING means
        try:
            sockets.send(connection.sock, reply.data, reply.descriptors, wait=False)
        except BlockingIOError:
            return  # it waits on, and its descriptors are counted already
        except OSError as error:
            connection.unsent = None
            self._wait_for(connection, State.READING)
            self._keep_unsent(connection, reply, error)
        else:
            connection.unsent = None
            close_all(reply.descriptors)
            self._wait_for(connection, State.READING)

    def _send_error(
        self, sock: socket.socket, request_id: int, kind: Kind, reason: Reason, text: str
    ) -> None:
        try:
            sockets.send(sock, self._dispatch.error(request_id, kind, reason, text), wait=False)
        except OSError:
            # Said to a client that does not listen; the audit has it.
            return


def settle_memory() -> None:
    """Let go of what is gone; what exists now stays, and the collector need not look at it again."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()


def _describe(error: Exception) -> str:
    """Return what was raised and where, for a report of a bug."""
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    where = "" if at is None else f" at {os.path.basename(at.tb_frame.f_code.co_filename)}:{at.tb_lineno}"
    return f"{error!r}{where}"
