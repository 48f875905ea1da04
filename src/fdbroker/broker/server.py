"""The loop: accept, receive, ask who, let it be answered, send.

One thread, one epoll, non-blocking sockets. One message per uid and round, so
that whoever has many connections or a full queue waits for the others. A client
that does not receive is not read from: what waits for it is at most what it had
asked for by then.
"""

from __future__ import annotations

import gc
import os
import resource
import select
import socket
import time
from time import monotonic_ns
from typing import TYPE_CHECKING

from fdbroker.broker.accepting import Acceptor, Listener
from fdbroker.broker.acting import Services
from fdbroker.broker.audit import member_text
from fdbroker.broker.connection import SEND_BUFFER, Connection, State
from fdbroker.broker.control import Control
from fdbroker.broker.dispatch import Dispatch, Loop, Parts, Table
from fdbroker.broker.identity import PeerAtConnect
from fdbroker.broker.in_flight import InFlight
from fdbroker.broker.sending import Sender
from fdbroker.broker.walks import Walks, can_go_on
from fdbroker.kernel import sockets
from fdbroker.kernel.descriptors import close_all
from fdbroker.kernel.memory import release_free_memory
from fdbroker.wire.format import MAX_FRAME, MAX_PATHS, Kind, Limit, Reason
from fdbroker.wire.messages import Hello, LimitReached, MalformedError, ReleaseRequest, ServeRequest
from fdbroker.wire.requests import decode_request

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from fdbroker.broker.connection import Client
    from fdbroker.broker.datagrams import Datagrams
    from fdbroker.broker.helped import Helped
    from fdbroker.broker.open_helpers import OpenHelpers

_REST = 0.1  # seconds
_LOOK_AT_DEADLINES = 1.0  # seconds: how late a client may be noticed to be late
_MOST_SHOWN = 256  # connections, to those who look at all
_LOOK_FOR_IDLE = 30.0  # seconds, at most: how late an idle connection may be closed
_MOST_AWAITED = 16  # answers of others that one connection may wait for
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
    State.WAITING: 0,
    State.TAKING: select.EPOLLIN,
}


class Broker:
    """Serves listeners and adopted connections until it is stopped. Owns them all."""

    def __init__(self, parts: Parts) -> None:
        most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        # A full reply must fit into the share of one uid, or its request could never be answered.
        self._flight = InFlight(most // 2, max(most // 8, MAX_PATHS))
        self._dispatch = Dispatch(parts, self._totals, self._flight)
        self._walks = Walks(self._dispatch, parts)
        self._control = Control(self._dispatch, parts, self._facts, self._rows, self._switched)
        self._notifier = parts.notifier
        self._watchdog = parts.watchdog
        self._counts = self._dispatch.counts
        self._watchdog.often = self._counts.settle_durations
        self._helpers: OpenHelpers | None = None
        self._helper_descriptors: frozenset[int] = frozenset()
        self._audit = parts.audit
        self._sender = Sender(
            self._dispatch, self._audit, self._flight, self._wait_for, self._read_on, self._hang_up
        )
        self._level, self._labels = parts.held.identity_level, parts.held.labels
        self._epoll = select.epoll()
        self._connections: dict[int, Connection] = {}
        self._connections_of: dict[int, int] = {}
        # Those on control sockets, of root and others.
        self._for_control = 0
        self._accepted = 0
        # Connections that have something to do without an event: a frame of a stream that is there
        # already, a walk that may go on.
        self._busy: dict[Connection, None] = {}
        # Those that wait a moment, since others of their uid have all descriptors under way that it may have.
        self._resting: list[Connection] = []
        # When a hello, or the rest of a frame that has begun, must be there.
        self._deadlines: dict[Connection, float] = {}
        self._next_look = 0.0
        # Connections on which a policy was handed over, one after the other.
        self._loading: list[Connection] = []
        self._stopping = False
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._epoll.register(self._wake_read, select.EPOLLIN)
        self._services = Services(self._dispatch, parts, most // 8)
        # Each connection has a socket and a pidfd, and may hold a reply of 253.
        self._acceptor = Acceptor(self, self._epoll, self._dispatch, self._audit, most // 8)
        self._datagrams: Datagrams | None = None
        # After how many seconds a connection on which nothing happens is closed, and when to look next.
        self._idle_timeout: float | None = None
        self._next_look_for_idle = 0.0
        self._dispatch.limits.watch(self._dispatch.table)
        self._dispatch.limits.watch(self._control.table, for_control=True)
        self._follow_limits()

    @property
    def wake_descriptor(self) -> int:
        """For `signal.set_wakeup_fd`: a byte written there makes the loop look up."""
        return self._wake_write

    @property
    def takes_datagrams(self) -> bool:
        """Whether one of the listeners is a SOCK_DGRAM socket."""
        return self._datagrams is not None

    def add_listener(
        self, listener: socket.socket, name: str, *, control: bool = False, service: str | None = None
    ) -> None:
        """Serve a socket that listens, or takes datagrams; owned from now on. `name` is for the audit.

        `control`: for those who administer the broker; see control.py for what can be asked there.
        `service`: its clients are handed over to whoever serves it; see acting.py.
        """
        listener.settimeout(0)
        if service is not None:
            # What comes from there is the service's to receive, descriptors as well.
            self._services.add_listener(os.fsencode(service))
            served = Listener(listener, name, int(listener.type), service=os.fsencode(service))
            self._acceptor.add(served, wanted=False)
            return
        sockets.ask_for_credentials(listener)
        sockets.refuse_descriptors(listener)
        if listener.type == socket.SOCK_DGRAM:
            sockets.ask_for_pidfds(listener)
            if self._datagrams is None:
                # Loaded where it is used; nothing can be loaded later.
                from fdbroker.broker.datagrams import Datagrams  # noqa: PLC0415

                self._datagrams = Datagrams(self._dispatch, self._audit, self._level, self._flight)
            self._acceptor.add(Listener(listener, name, int(listener.type)))
            return
        answers = self._control.table if control else self._dispatch.table
        self._acceptor.add(Listener(listener, name, int(listener.type), answers))

    def use_helpers(self, helpers: OpenHelpers, helped: type[Helped]) -> None:
        """Have what may hang opened by others; owned from now on. `helped` answers by what they say."""
        self._helpers = helpers
        self._helper_descriptors = frozenset(helpers.descriptors())
        for descriptor in self._helper_descriptors:
            self._epoll.register(descriptor, _READY)
        loop = Loop(self._sender.send, self._read_on, self._hang_up, self._fail)
        self._dispatch.helped = helped(helpers, self._dispatch, self._audit, loop)

    def _on_helper(self, descriptor: int) -> None:
        assert self._helpers is not None  # noqa: S101 - for the type checker: it is one of its descriptors
        self._helpers.on_ready(descriptor)
        self._helper_descriptors = frozenset(self._helpers.descriptors())

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
            peer = PeerAtConnect(sock, self._level, labels=self._labels)
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
        stream = sock.type == socket.SOCK_STREAM
        answers = answers or self._dispatch.table
        for_control = answers is self._control.table
        transport = "control" if for_control else "stream" if stream else "seqpacket"
        durations = self._counts.durations[transport]
        connection = Connection(sock, peer, record, answers, self._flight, durations, stream=stream)
        connection.number, connection.began = self._accepted, monotonic_ns()
        connection.transport = transport
        connection.for_control = for_control
        self._for_control += connection.for_control
        self._connections[sock.fileno()] = connection
        self._connections_of[peer.uid] = self._connections_of.get(peer.uid, 0) + 1
        self._expect(connection)
        return connection

    def stop(self) -> None:
        """Make `serve` return after the round it is in. May be called from a signal handler or a thread."""
        self._stopping = True
        os.write(self._wake_write, b"\0")

    def serve(self) -> None:
        """Serve until `stop`, or until nobody is left to be served and nobody can come."""
        while not self._stopping and (self._acceptor.listeners or self._connections):
            self.step(self._notifier.before_waiting())
        self._watchdog.stop()

    def step(self, timeout: float) -> None:
        """Serve one round of what is ready within `timeout` seconds (-1: wait)."""
        if self._idle_timeout is not None:
            timeout = self._look_for_idle(timeout, self._idle_timeout)
        until = None if self._helpers is None else self._helpers.next_deadline()
        waiting = self._busy or self._deadlines or self._loading or self._resting or self._acceptor.resting
        if waiting or until is not None:
            timeout = self._shorter(timeout, until)
        # Room for all of them, or it would not show who else wants something; and for no more, which costs.
        most = len(self._connections) + len(self._acceptor.listeners) + 1
        if self._helpers is not None:
            most += len(self._helper_descriptors)
        ready = self._epoll.poll(self._watchdog.before_waiting(timeout), most)
        self._watchdog.after_waiting(len(ready))
        if len(ready) == 1 and until is None and not waiting:
            # One client wants one thing, as it mostly is.
            descriptor, events = ready[0]
            connection = self._connections.get(descriptor)
            if connection is None:
                listener = self._acceptor.listeners.get(descriptor)
                if listener is not None:
                    self._on_listener(listener)
                    return
            elif events == _READY and connection.state is _READING:
                self._serve_message(connection)
                return
        self._acceptor.listen_again()
        resting, self._resting = self._resting, []
        self._serve_all(ready)
        for connection in resting:
            self._see_what_waits(connection)
        if self._busy:
            self._go_on()
        if self._deadlines:
            self._look_at_deadlines()
        if self._loading:
            self._load_on(self._loading[0])
        if until is not None and self._helpers is not None:
            self._helpers.expire(time.monotonic())

    def _shorter(self, timeout: float, until: float | None) -> float:
        """Return for how many seconds to wait at most, of a `timeout` (-1: for ever), since others wait."""
        if until is not None:
            timeout = _at_most(timeout, max(0.0, until - time.monotonic()))
        if self._busy or self._loading:
            return 0
        resting = self._resting or self._acceptor.resting
        if self._deadlines or resting:
            timeout = _at_most(timeout, _REST if resting else _LOOK_AT_DEADLINES)
        return timeout

    def _serve_all(self, ready: Iterable[tuple[int, int]]) -> None:
        """Serve one message for each uid, and what else happened."""
        served: set[int] = set()
        waiting: list[Connection] = []
        coming: list[Listener] = []
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
            elif descriptor in self._acceptor.listeners:
                coming.append(self._acceptor.listeners[descriptor])
            elif descriptor in self._helper_descriptors:
                self._on_helper(descriptor)
            elif descriptor == self._wake_read:
                os.read(self._wake_read, 64)
        if len(served) == 1:
            # Nobody else wants anything. Otherwise it is one message per uid and round, whatever
            # number of connections it has: the rest is ready again in the next round.
            for connection in waiting:
                if connection.state is _READING and self._goes_on():
                    self._serve_message(connection)
        # Last: who comes may get the number of a descriptor that was closed in this round, and must not get
        # an event of the one who had it.
        for listener in coming:
            self._on_listener(listener)

    def _go_on(self) -> None:
        """Do one thing for each uid that has something to do without an event."""
        served: set[int] = set()
        for connection in list(self._busy):
            uid = connection.peer.uid
            if uid in served or not self._goes_on():
                continue
            served.add(uid)
            # Its next turn is after those of others of this uid.
            del self._busy[connection]
            if connection.state is not _READING:
                continue
            if (
                connection.stream is not None
                and connection.stream.has_frame
                and self._has_room(connection, MAX_PATHS)
            ):
                self._serve_stream(connection, receive=False)
            if connection.state is _READING and can_go_on(connection) and not self._walk_on(connection):
                self._resting.append(connection)
            else:
                self._see_what_waits(connection)

    def _see_what_waits(self, connection: Connection) -> None:
        """Note whether a connection has something to do without an event, or has begun a frame."""
        if connection.state is not _READING:
            return
        stream = connection.stream
        if (connection.walks and can_go_on(connection)) or (stream is not None and stream.has_frame):
            self._busy[connection] = None
        if stream is not None and len(stream) and not stream.has_frame:
            self._expect(connection)

    def _goes_on(self) -> bool:
        """Say, in the middle of a round, which may be long, that the loop lives; return whether to go on."""
        self._notifier.ping()
        self._watchdog.ping()
        return not self._stopping

    def close(self) -> None:
        """Close every connection, every listener and the loop's own descriptors."""
        for connection in list(self._connections.values()):
            self._drop(connection)
        self._acceptor.close()
        if self._helpers is not None:
            self._helpers.close()
        if self._datagrams is not None:
            self._datagrams.close()
        self._epoll.close()
        close_all([self._wake_read, self._wake_write])

    def _clients(self) -> Iterator[Client]:
        """Return all clients of now, those that sent datagrams as well."""
        yield from self._connections.values()
        if self._datagrams is not None:
            yield from self._datagrams.clients()

    def _settle_decisions(self) -> None:
        for client in self._clients():
            self._counts.decisions.settle(client)

    def _totals(self) -> Mapping[str, int]:
        self._settle_decisions()
        not_sent = self._sender.not_sent(self._connections.values())
        return {
            "descriptors_sent": self._flight.total + self._flight.taken_back - not_sent,
            "accepted": self._accepted,
            "connections": len(self._connections),
            "in_flight": self._flight.total,
            "malformed": self._dispatch.malformed_messages,
            "refused_connections": self._acceptor.refused,
        }

    def _facts(self) -> Mapping[str, object]:
        """Return what the loop knows of itself, for the whole status."""
        return {
            "listeners": [
                {"name": listener.name, "control": listener.answers is self._control.table}
                for listener in self._acceptor.listeners.values()
            ],
            "connections_most": self._acceptor.max_connections,
            "walks": self._walks.count,
            "unsent_replies": sum(len(connection.unsent) for connection in self._connections.values()),
            "clients_served": self._services.count,
            "helpers_stuck": 0 if self._helpers is None else self._helpers.stuck,
        }

    def _rows(self, part: str) -> Sequence[object]:
        """Return a list of the whole status that is asked for apart."""
        self._settle_decisions()
        if part == "decisions":
            return self._counts.decisions.rows()
        if part == "clients":
            return self._counts.of_uids.rows(self._clients(), self._connections_of)
        now = monotonic_ns()
        busiest = sorted(
            self._connections.values(), key=lambda one: one.requests / (now - one.began + 1), reverse=True
        )
        return [
            {
                "connection": one.number,
                "pid": one.peer.pid,
                "uid": one.peer.uid,
                "transport": one.transport,
                "age": (now - one.began) // 1_000_000,
                "requests": one.requests,
                "allowed": one.given,
                "denied": one.refused,
                "in_flight": one.count_in_flight(),
                "walks": len(one.walks),
                "unsent_replies": len(one.unsent),
            }
            for one in busiest[:_MOST_SHOWN]
        ]

    def _switched(self) -> None:
        """Forget the policy before: idle clients must not keep it, with all they asked by it."""
        self._settle_decisions()
        self._counts.decisions.begin_policy(self._dispatch.generation.policy.rule_set.rules)
        for connection in self._connections.values():
            connection.asker = None
            for client in connection.clients.values():
                client.asker = None
            if connection.walks:
                self._walks.decide_anew(connection)
        self._follow_limits()
        self._tell_who_may_not_serve()
        settle_memory()
        self.say_status()

    def _follow_limits(self) -> None:
        """Limit by the policy of now."""
        rule_set = self._dispatch.generation.policy.rule_set
        self._dispatch.limits.follow(rule_set)
        before, self._idle_timeout = self._idle_timeout, rule_set.settings.idle_timeout
        if before is None and self._idle_timeout is not None:
            # When they last asked was not noted.
            for connection in self._connections.values():
                connection.last_request = time.monotonic()

    def say_status(self, **more: str) -> None:
        """Tell the service manager what is served, and `more`."""
        number, policy = self._dispatch.generation[:2]
        rules = len(policy.rule_set.rules)
        self._notifier.say(**more, STATUS=f"Serving by policy generation {number} ({rules} rules)")

    def say_stopping(self) -> None:
        """Tell the service manager that this was the end."""
        self._notifier.say(STOPPING="1", STATUS="Stopping")

    # Connections come

    def _on_listener(self, listener: Listener) -> None:
        if listener.service is not None:
            self._accept_for_service(listener, listener.service)
        elif listener.answers is None:
            assert self._datagrams is not None  # noqa: S101 - made with the first of them
            self._datagrams.serve(listener.sock, listener.name)
        else:
            self._acceptor.accept(listener)

    def refuse_if_over_limit(self, connection: Connection, name: str) -> None:
        """Say why a new connection is not served, and drop it, where there are too many."""
        uid, most = connection.peer.uid, self._dispatch.generation.settings.connections_per_uid
        refusal = self._acceptor.objection(
            connection,
            of_uid=self._connections_of[uid],
            for_control=self._for_control,
            in_all=len(self._connections),
            most=most,
        )
        if refusal is not None:
            self._acceptor.record_refusal(name, refusal.members)
            self._dispatch.limits.hit(refusal.limit)
            self._sender.send_last(
                connection,
                self._dispatch.error(0, Kind.REFUSED, Reason.LIMIT, refusal.text, refusal.reached),
            )
            self._drop(connection)
            return
        connection.may_connect_anew = not connection.for_control
        if self._idle_timeout is not None:
            connection.last_request = time.monotonic()

    def _accept_for_service(self, listener: Listener, service: bytes) -> None:
        server = self._services.server_for(service)
        if server is None:
            self._acceptor.want(listener, wanted=False)
            return
        if not self._flight.room_for(server, 1):
            self._acceptor.let_rest(listener)
            return
        sock = self._acceptor.accept_one(listener)
        if sock is None:
            return
        answered = self._services.accept(sock, service, server)
        if answered is not None:
            newest = next(reversed(server.clients))
            self._sender.send(server, *answered, server.serving[service], newest)

    def _see_who_serves(self) -> None:
        """Listen for the clients of those services that can take some."""
        for listener in self._acceptor.listeners.values():
            if listener.service is not None:
                self._acceptor.want(listener, wanted=self._services.can_take(listener.service))

    def _tell_who_may_not_serve(self) -> None:
        for connection, frame in self._services.end_where_denied():
            self._sender.send(connection, frame, [], 0)

    # Connections go

    def _expect(self, connection: Connection) -> None:
        """Give a hello, or the rest of a frame, the time that the policy gives."""
        if connection not in self._deadlines:
            seconds = self._dispatch.generation.settings.message_within
            self._deadlines[connection] = time.monotonic() + seconds

    def _look_at_deadlines(self) -> None:
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + _LOOK_AT_DEADLINES
        for connection, until in list(self._deadlines.items()):
            if now < until:
                continue
            del self._deadlines[connection]
            if connection.state is not _READING:  # it is we who are late
                self._expect(connection)
                continue
            what = "the rest of a message" if connection.greeted else "a hello"
            members = member_text(request=0, reason=f"{what} did not come in time")
            self._audit.event("too_slow", f"{connection.record},{members}")
            seconds = self._dispatch.generation.settings.message_within
            text = f"{what} must come within {seconds:g} s"
            reached = LimitReached(Limit.MESSAGE_WITHIN, int(seconds), 0)
            self._dispatch.limits.hit("message_within")
            self._sender.send_last(
                connection, self._dispatch.error(0, Kind.REFUSED, Reason.LIMIT, text, reached)
            )
            self._hang_up(connection)

    def _look_for_idle(self, timeout: float, idle: float) -> float:
        """Close what has been idle for so many seconds; return how long to wait for events at most."""
        now = time.monotonic()
        if now >= self._next_look_for_idle:
            self._next_look_for_idle = now + min(max(idle / 8, _REST), _LOOK_FOR_IDLE)
            for connection in list(self._connections.values()):
                if connection.last_request + idle <= now and self._is_idle(connection):
                    members = member_text(reason="idle_timeout", limit=int(idle))
                    self._audit.event("connection_ended", f"{connection.record},{members}")
                    self._dispatch.limits.hit("idle_timeout")
                    self._hang_up(connection)
        return _at_most(timeout, max(0.0, self._next_look_for_idle - now))

    def _is_idle(self, connection: Connection) -> bool:
        """Return whether nothing is under way, and its client can connect anew when it wants something."""
        return (
            connection.may_connect_anew
            and connection.greeted
            and connection.state is _READING
            and not (connection.walks or connection.awaited or connection.serving or connection.clients)
            and connection not in self._busy
            and connection not in self._deadlines
            and self._flight.settle(connection)
        )

    def _hang_up(self, connection: Connection) -> None:
        """End a connection from our side, but keep counting what lies in the client's queue."""
        if connection.state is State.CLOSED:  # by the first of two things that were to be sent there
            return
        self._sender.discard_unsent(connection)
        if self._flight.settle(connection):
            self._drop(connection)
            return
        self._end_what_goes_on(connection)
        # The client reads to the end of its queue; that it hangs up is still told, by EPOLLHUP.
        connection.sock.shutdown(socket.SHUT_WR)
        self._wait_for(connection, State.CLOSING)

    def _end_what_goes_on(self, connection: Connection) -> None:
        if connection.awaited and self._helpers is not None:
            self._helpers.cancel(connection)
            connection.awaited = 0
        self._busy.pop(connection, None)
        self._deadlines.pop(connection, None)
        if connection.walks:
            self._walks.end_all(connection)
        served = bool(connection.serving or connection.clients)
        if connection.serving:
            self._services.forget(connection)
        connection.end_what_goes_on()
        if served:
            self._see_who_serves()

    def _drop(self, connection: Connection) -> None:
        """Forget a connection whose client is gone, or has nothing left to receive."""
        self._end_what_goes_on(connection)
        self._sender.discard_unsent(connection)
        self._flight.forget(connection)
        self._counts.leave(connection)
        descriptor = connection.sock.fileno()
        self._epoll.unregister(descriptor)
        del self._connections[descriptor]
        self._for_control -= connection.for_control
        uid = connection.peer.uid
        self._connections_of[uid] -= 1
        if not self._connections_of[uid]:
            del self._connections_of[uid]
        connection.state = State.CLOSED
        connection.close()

    def _wait_for(self, connection: Connection, state: State) -> None:
        connection.state = state
        self._epoll.modify(connection.sock, _INTEREST[state])

    def _read_on(self, connection: Connection) -> None:
        """Go on with a connection whose client has received what kept it."""
        if connection.awaited >= _MOST_AWAITED:
            self._wait_for(connection, State.WAITING)
            return
        self._wait_for(connection, _READING)
        self._see_what_waits(connection)
        if connection.serving:
            if self._services.someone_is_untold:
                self._tell_who_may_not_serve()
            self._see_who_serves()

    def _on_other_event(self, connection: Connection, events: int) -> None:
        """Whatever is not simply the next request."""
        if events & _GONE and connection.state is not State.CLOSING:
            # Nobody is left to answer, and a decision nobody hears of is not made. But it may be that
            # both directions were shut down by a client that lives on, with its queue: then that counts on.
            self._hang_up(connection)
        elif connection.state is State.SENDING:
            self._sender.send_what_waits(connection)
        elif connection.state is State.READING:
            self._serve_message(connection)
        elif connection.state is State.TAKING:
            self._take_file(connection)
        elif self._flight.settle(connection):
            if connection.state is State.CLOSING:
                self._drop(connection)
            else:
                self._read_on(connection)
        elif connection.state is State.PAUSED:
            most = self._dispatch.generation.settings.in_flight_per_connection
            if connection.in_flight + MAX_PATHS <= most:
                self._read_on(connection)

    # Messages

    def _serve_message(self, connection: Connection) -> None:
        # The first look of `_has_room`, without a call of it: in each request.
        most = self._dispatch.generation.settings.in_flight_per_connection
        if connection.in_flight + MAX_PATHS > most and not self._has_room(connection, MAX_PATHS):
            return
        if connection.stream is not None:
            self._serve_stream(connection, receive=True)
            return
        try:
            data, credentials, flags = sockets.receive_data(connection.sock, MAX_FRAME + 1)
        except BlockingIOError:
            return
        except OSError as error:
            self._receive_failed(connection, error)
            return
        if not data and not flags:
            self._hang_up(connection)
            return
        if flags:
            self._malformed_by(connection, MalformedError(_objection_to_flags(flags)))
            return
        self._answer(connection, data, credentials)

    def _take_file(self, connection: Connection) -> None:
        """Receive the one message that may bring a descriptor: root announced it."""
        try:
            received = sockets.receive(connection.sock, MAX_FRAME + 1)
        except BlockingIOError:
            return
        except OSError as error:
            self._receive_failed(connection, error)
            return
        with received.descriptors as descriptors:
            if not received.data and not len(descriptors):
                self._hang_up(connection)
                return
            connection.state = _READING
            sockets.refuse_descriptors(connection.sock)
            self._control.file = descriptors
            self._answer(connection, received.data, received.credentials)
            self._control.file = None

    def _has_room(self, connection: Connection, count: int) -> bool:
        """Return whether a reply of `count` descriptors has its place, before it is made; if not, wait."""
        most = self._dispatch.generation.settings.in_flight_per_connection - count
        if connection.in_flight <= most or self._flight.settle(connection) or connection.in_flight <= most:
            return True
        self._wait_for(connection, State.PAUSED)
        return False

    def _serve_stream(self, connection: Connection, *, receive: bool) -> None:
        """Serve the next frame of a stream: one that is there, or one that is there now."""
        stream = connection.stream
        assert stream is not None  # noqa: S101 - for the type checker; the callers looked
        try:
            frame = stream.next_frame()
            if frame is None and receive:
                data, credentials, flags = sockets.receive_data(connection.sock, MAX_FRAME)
                if flags:
                    raise MalformedError(_objection_to_flags(flags))
                if not data:
                    self._hang_up(connection)
                    return
                # A frame is from whoever sent all of it. Parts of different senders are never joined.
                if not len(stream) or connection.credentials == connection.peer.credentials:
                    connection.credentials = credentials
                stream.add(data)
                frame = stream.next_frame()
        except BlockingIOError:
            return
        except MalformedError as error:
            self._malformed_by(connection, error)
            return
        except OSError as error:
            self._receive_failed(connection, error)
            return
        if frame is not None:
            if connection.greeted:  # a hello is waited for until it was accepted
                self._deadlines.pop(connection, None)
            self._answer(connection, frame, connection.credentials)
        self._see_what_waits(connection)

    def _receive_failed(self, connection: Connection, error: OSError) -> None:
        self._audit.event("receive_failed", f"{connection.record},{member_text(errno=error.errno)}")
        self._hang_up(connection)

    def _malformed_by(self, connection: Connection, error: MalformedError) -> None:
        """Record and say what breaks the protocol, and end the connection."""
        self._sender.send_last(connection, self._dispatch.malformed(connection.record, error))
        self._hang_up(connection)

    def _answer(self, connection: Connection, data: bytes, credentials: bytes | None) -> None:
        request_id = 0
        try:
            request = decode_request(data)
            request_id = request.id
            kind = type(request)
            answer = connection.answers.get(kind)
            if answer is None:
                raise MalformedError(f"{kind.__name__} is not for this socket", request.id)
            if (kind is Hello) is connection.greeted:
                text = "a second hello" if connection.greeted else "the first frame is not a hello"
                raise MalformedError(text, request.id)
            answered = answer(connection, request, connection.peer.objection(credentials))
        except MalformedError as error:
            self._malformed_by(connection, error)
            return
        except Exception as error:  # noqa: BLE001 - whatever it is, it is a denial, and the others are served
            self._fail(connection, request_id, error)
            return
        if answered is None:
            connection.requests += 1
            connection.durations.count_untimed(kind)
            if kind is not ReleaseRequest:
                self._answer_later(connection)
            elif self._acceptor.some_are_unwanted:
                self._see_who_serves()
            return
        if self._deadlines and connection.greeted:
            self._deadlines.pop(connection, None)
        reply, descriptors = answered
        self._sender.send(connection, reply, descriptors, request_id)
        connection.requests += 1
        connection.durations[kind].append(monotonic_ns() - self._watchdog.now)
        if kind is ServeRequest:
            self._see_who_serves()

    def _answer_later(self, connection: Connection) -> None:
        """See what a request has begun that has no answer yet."""
        if connection.loading is not None:
            self._loading.append(connection)
            self._wait_for(connection, State.LOADING)
        elif connection.awaited and (connection.stream is not None or connection.awaited >= _MOST_AWAITED):
            # A reply on a stream may be sent by a helper, and nothing may come in between.
            self._wait_for(connection, State.WAITING)
        else:
            self._see_what_waits(connection)

    def _walk_on(self, connection: Connection) -> bool:
        """Send the next frame of a walk, if its descriptors have a place. False: it is to wait a moment."""
        most = self._walks.most_in_next_frame(connection)
        if not self._has_room(connection, most):
            return True
        if not self._flight.room_for(connection, most):
            return False
        try:
            answered = self._walks.next_frame(connection)
        except Exception as error:  # noqa: BLE001 - as above
            self._fail(connection, 0, error)
            return True
        if answered is not None:
            self._sender.send(connection, *answered)
        return not self._walks.held_back

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
            self._sender.send(connection, *answered, loading.request_id)
            self._see_what_waits(connection)

    def _fail(self, connection: Connection, request_id: int, error: Exception) -> None:
        """Record and say that something is wrong with us, and end the connection."""
        self._sender.send_last(connection, self._dispatch.failed(connection.record, request_id, error))
        self._hang_up(connection)


def settle_memory() -> None:
    """Let go of what is gone; what exists now stays, and the collector need not look at it again."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    release_free_memory()


def _at_most(timeout: float, seconds: float) -> float:
    """Return the shorter of a timeout (-1: for ever) and so many seconds."""
    return timeout if 0 <= timeout <= seconds else seconds


def _objection_to_flags(flags: int) -> str:
    if flags & sockets.CONTROL_TRUNCATED:
        return "descriptors were sent to the broker, which takes none"
    return f"a message is longer than {MAX_FRAME} bytes"
