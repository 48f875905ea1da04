"""What can be asked and how it is answered. Knows no socket; what is not in the table does not exist.

The invariant of every request: its decisions are recorded before there is an
answer to send. If they can't be, the answer gives nothing.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

from fdbroker.broker.audit import failure_text, member_text
from fdbroker.broker.connection import Connection
from fdbroker.broker.counting import Counts
from fdbroker.broker.limits import Limits
from fdbroker.broker.listing import Page
from fdbroker.broker.outcomes import NEEDS_HELPER, NOT_RECORDED, TOO_MANY_IN_FLIGHT, Outcome
from fdbroker.kernel.descriptors import close_all
from fdbroker.wire.format import ERRNO_OF, MAX_COPY, MAX_FRAME, MAX_PATHS, VERSION, Kind, Reason
from fdbroker.wire.messages import (
    ErrorReply,
    Hello,
    ListRequest,
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
    encode_open_given,
    encode_open_reply,
    encode_stat_reply,
    encode_status_reply,
    encode_welcome,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from fdbroker.broker.acting import ServedClient
    from fdbroker.broker.audit import Audit
    from fdbroker.broker.connection import Client
    from fdbroker.broker.generation import Generation, Held
    from fdbroker.broker.helped import Helped
    from fdbroker.broker.in_flight import InFlight
    from fdbroker.broker.notify import Notifier
    from fdbroker.broker.watchdog import Watchdog
    from fdbroker.policy.decide import View
    from fdbroker.wire.messages import LimitReached, MalformedError

Answer = tuple[bytes, list[int]]  # a frame, and the descriptors that go with it: the receiver's to close
# What can be asked on a connection. The text: why the sender is not who connected, None if it is.
# No answer: it comes later, or there is none; see server.py.
Table = dict[type[Request], "Callable[[Any, Request, str | None], Answer | None]"]


class Loop(NamedTuple):
    """What the loop does for a request that is answered later."""

    send: Callable[[Connection, bytes, list[int], int], None]
    read_on: Callable[[Connection], None]
    hang_up: Callable[[Connection], None]
    fail: Callable[[Connection, int, Exception], None]


class Asker(NamedTuple):
    """For whom a request is decided: what the policy says about them, and how the audit names them.

    `on_behalf_of_uid`: of the client that a service acts for; None: it asks for itself.
    """

    view: View
    uid: int
    on_behalf_of_uid: int | None
    record: str


class Parts(NamedTuple):
    """What a broker is made of. `layers` and `version` are for the status."""

    generation: Generation
    held: Held
    audit: Audit
    notifier: Notifier
    layers: dict[str, object]
    version: str
    watchdog: Watchdog


class Dispatch:
    """Answers requests by one policy at a time, which is its `generation`."""

    def __init__(self, parts: Parts, totals: Callable[[], Mapping[str, int]], flight: InFlight) -> None:
        """`totals` counts what the loop counts, for the status."""
        self.generation = parts.generation
        self.helped: Helped | None = None  # where some root is served by helpers
        self.counts = Counts()
        self.open_limits: Limits | None = None  # where the policy limits what is opened, or what rules give
        self.malformed_messages = 0
        self._audit = parts.audit
        self._layers = parts.layers
        self._totals = totals
        self.limits = Limits(self, parts.audit, flight)
        self.table: Table = {
            Hello: self._hello,
            OpenRequest: self._open,
            StatRequest: self._stat,
            ListRequest: self._list,
            StatusRequest: self._status,
        }

    def error(
        self, request_id: int, kind: Kind, reason: Reason, text: str, limit: LimitReached | None = None
    ) -> bytes:
        """Return an error frame of this generation."""
        number = self.generation.number
        return encode_error(ErrorReply(request_id, number, kind, reason, ERRNO_OF[reason], text, limit))

    def malformed(self, record: str, error: MalformedError) -> bytes:
        """Record and count what breaks the protocol; return what to say. `record`: its sender's members."""
        self.malformed_messages += 1
        members = member_text(request=error.request_id, reason=str(error))
        self._audit.event("malformed", f"{record},{members}")
        return self.error(error.request_id, Kind.MALFORMED, Reason.MALFORMED, str(error))

    def failed(self, record: str, request_id: int, error: Exception) -> bytes:
        """Record that something is wrong with us; return what to say. `record`: members of who asked."""
        members = member_text(request=request_id, reason=failure_text(error))
        self._audit.event("failed", f"{record},{members}")
        text = "the broker failed on this request; its audit says where"
        return self.error(request_id, Kind.BROKEN, Reason.BROKEN, text)

    def _hello(self, connection: Connection, request: Request, objection: str | None) -> Answer:
        assert isinstance(request, Hello)  # noqa: S101 - for the type checker; the table says it
        if objection is not None:
            return self.refuse(connection, "hello", request.id, objection)
        if not request.lowest <= VERSION <= request.highest:
            text = f"this broker speaks version {VERSION}, not {request.lowest} to {request.highest}"
            return self.error(request.id, Kind.REFUSED, Reason.VERSION, text), []
        connection.greeted = True
        welcome = Welcome(
            request.id,
            self.generation.number,
            version=VERSION,
            identity_level=connection.peer.level,
            features=0,
            max_paths=MAX_PATHS,
            max_frame=MAX_FRAME,
            in_flight=self.generation.settings.in_flight_per_connection,
            copy_max=MAX_COPY,
        )
        return encode_welcome(welcome), []

    def _open(self, connection: Client, request: Request, objection: str | None) -> Answer | None:
        assert isinstance(request, OpenRequest)  # noqa: S101 - for the type checker; the table says it
        request_id, paths, client, copy = request
        generation, limits = self.generation, self.open_limits
        descriptors: list[int] = []
        copies: list[bytes] = []
        try:
            asker: Asker | str | None = connection.asker if objection is None else objection
            if asker is None or client is not None or connection.asker_generation != generation.number:
                asker = objection or self.asker(connection, client)
            if isinstance(asker, str):
                outcomes = [Outcome(refused(Reason.IDENTITY), asker)] * len(paths)
            elif not connection.flight.room_for(connection, len(paths)):
                outcomes = [self.too_many_in_flight(connection, len(paths))] * len(paths)
            elif limits is not None:
                outcomes = self._open_admitted(limits, asker, request, descriptors, copies)
            elif copy:
                outcomes = generation.opener.open_or_copy(asker, paths, descriptors, copies)
            else:
                outcomes = generation.opener.open(asker, paths, descriptors)
            if self.helped is not None and self._is_for_helpers(connection, request, asker, outcomes):
                close_all(descriptors)
                return None
            if limits is not None and not isinstance(asker, str):
                connection.shares = limits.charge(asker, outcomes, descriptors, copies)
            if not self.record(asker, connection, "open", request_id, paths, outcomes, number=client):
                close_all(descriptors)
                connection.shares = ()
                copies.clear()
                outcomes = [NOT_RECORDED] * len(paths)
            if len(descriptors) == len(paths):  # as it mostly is: all were given
                return encode_open_given(request_id, generation.number, len(paths)), descriptors
            if copies:
                self.counts.copied += sum(map(len, copies))
            results = [outcome.result for outcome in outcomes]
            return encode_open_reply(request_id, generation.number, results, copies), descriptors
        except BaseException:
            close_all(descriptors)
            raise

    def _open_admitted(
        self,
        limits: Limits,
        asker: Asker,
        request: OpenRequest,
        descriptors: list[int],
        copies: list[bytes],
    ) -> list[Outcome]:
        """Open as many as who asks may open now, the first of them. Appends as `Opener.open` does."""
        opener, paths = self.generation.opener, request.paths
        admitted = limits.admit(asker, len(paths))
        if request.copy:
            outcomes = opener.open_or_copy(asker, paths[:admitted], descriptors, copies)
        else:
            outcomes = opener.open(asker, paths[:admitted], descriptors)
        return outcomes + limits.refusals(asker, len(paths) - admitted)

    def too_many_in_flight(self, client: Client, count: int) -> Outcome:
        """Return the outcome for paths whose descriptors would be too many on their way."""
        return self.limits.too_many_in_flight(client, count) or TOO_MANY_IN_FLIGHT

    def _is_for_helpers(
        self,
        client: Client,
        request: OpenRequest | StatRequest,
        asker: Asker | str,
        outcomes: Sequence[Outcome],
    ) -> bool:
        """Return whether a request is answered later, by what helpers find."""
        if self.helped is None or isinstance(asker, str) or NEEDS_HELPER not in outcomes:
            return False
        if not isinstance(client, Connection):
            return False
        self.helped.begin(client, request, asker, outcomes)
        return True

    def _stat(self, connection: Client, request: Request, objection: str | None) -> Answer | None:
        assert isinstance(request, StatRequest)  # noqa: S101 - for the type checker; the table says it
        paths = request.paths
        asker = self.asker(connection, request.client) if objection is None else objection
        if isinstance(asker, str):
            outcomes = [Outcome(refused(Reason.IDENTITY), asker)] * len(paths)
        else:
            opener = self.generation.opener
            outcomes = opener.describe(asker, paths)
        if self._is_for_helpers(connection, request, asker, outcomes):
            return None
        if self.open_limits is not None and not isinstance(asker, str):
            self.open_limits.charge_request(asker, outcomes)
        if not self.record(asker, connection, "stat", request.id, paths, outcomes, number=request.client):
            outcomes = [NOT_RECORDED] * len(paths)
        results = [(outcome.result, outcome.facts) for outcome in outcomes]
        return encode_stat_reply(request.id, self.generation.number, results), []

    def _list(self, connection: Connection, request: Request, objection: str | None) -> Answer:
        assert isinstance(request, ListRequest)  # noqa: S101 - for the type checker; the table says it
        asker = self.asker(connection, request.client) if objection is None else objection
        if isinstance(asker, str):
            page = Page(Outcome(refused(Reason.IDENTITY), asker))
        else:
            page = self.generation.opener.list(asker, request.path, request.cookie, request.most)
            if self.open_limits is not None:
                outcomes = [page.outcome]
                self.open_limits.charge_request(asker, outcomes)
                if outcomes[0] is not page.outcome:
                    page = Page(outcomes[0])
        outcome, shown = page.outcome, f',"entries":{len(page.entries)}'
        if not self.record(
            asker,
            connection,
            "list",
            request.id,
            [request.path],
            [outcome],
            shown,
            number=request.client,
        ):
            page = Page(NOT_RECORDED)
        number = self.generation.number
        reply = encode_list_reply(
            request.id, number, page.outcome.result, page.entries, page.cookie, last=page.last
        )
        return reply, []

    def _status(self, connection: Connection, request: Request, objection: str | None) -> Answer:
        assert isinstance(request, StatusRequest)  # noqa: S101 - for the type checker; the table says it
        if objection is not None:
            return self.refuse(connection, "status", request.id, objection)
        if request.part is not None:
            return self.refuse_part(request)
        document = self.status_of(connection)
        if connection.peer.uid == 0:
            document["totals"] = self.totals()
        return encode_status_reply(request.id, self.generation.number, json.dumps(document).encode()), []

    def refuse_part(self, request: StatusRequest) -> Answer:
        """Return what is said to whoever may not see a part of the status, or not here."""
        text = f"{request.part} are shown on the control socket, to root and the policy's admins"
        return self.error(request.id, Kind.REFUSED, Reason.DENIED, text), []

    def status_of(self, connection: Connection) -> dict[str, object]:
        """Return how the broker sees a connection, which whoever made it may know."""
        peer = connection.peer
        return {
            "generation": self.generation.number,
            "identity_level": peer.level,
            # A process may have 65,536 groups, and a reply has its limits.
            "peer": {"pid": peer.pid, "uid": peer.uid, "gid": peer.gid, "groups": sorted(peer.groups)[:1024]},
            "in_flight": connection.count_in_flight(),
            "audit": self._audit.run if self._audit.on else "off",
            "read_only_view": "required" if self.generation.settings.read_only_view_required else "off",
            **self._layers,
        }

    def totals(self) -> dict[str, int]:
        """Return what was counted since the start."""
        counted = self._totals()  # which settles what is counted with clients
        return {
            **counted,
            "allowed": self.counts.decisions.allowed,
            "denied": self.counts.decisions.denied,
            "bytes_copied": self.counts.copied,
            "audit_failures": self._audit.failures,
        }

    def own_asker(self, client: Client) -> Asker:
        """Return for whom a request of `client` for itself is decided: never by an earlier policy."""
        generation, asker = self.generation, client.asker
        if asker is None or client.asker_generation != generation.number:
            view = generation.policy.view(client.peer.facts(generation.cgroups))
            asker = client.asker = Asker(view, client.peer.uid, None, client.record)
            client.asker_generation = generation.number
        return asker

    def asker(self, client: Client, number: int | None) -> Asker | str:
        """Return for whom a request of `client` is decided, by the policy of now; or why it is refused.

        `number`: of the client's own client, for whom it asks; None: for itself.
        """
        if number is None:
            return self.own_asker(client)
        generation = self.generation
        served = self.served(client, number)
        if served is None:
            return "no_such_client"
        objection = served.peer.present_objection()
        if objection is not None:
            return f"client_{objection}"
        if served.asker is None or served.asker_generation != generation.number:
            facts = client.peer.facts(generation.cgroups), served.peer.facts(generation.cgroups)
            record = self.who(client, number)
            served.asker = Asker(generation.policy.view(*facts), client.peer.uid, served.peer.uid, record)
            served.asker_generation = generation.number
        return served.asker

    @staticmethod
    def served(client: Client, number: int) -> ServedClient | None:
        """Return that client of a service which has this number, if there is one."""
        return client.clients.get(number) if isinstance(client, Connection) else None

    def who(self, client: Client, number: int | None) -> str:
        """Return how the audit names who asks: `client`, and whom it says to ask for, if it is known here."""
        if number is None:
            return client.record
        served = self.served(client, number)
        return f"{client.record},{member_text(for_number=number) if served is None else served.record}"

    def record(  # noqa: PLR0913 - what a record says
        self,
        asker: Asker | str,
        client: Client,
        action: str,
        request_id: int,
        paths: Collection[bytes],
        outcomes: Sequence[Outcome],
        extra: str = "",
        *,
        number: int | None = None,
    ) -> bool:
        """Record and count what was decided for `paths`.

        `outcomes`: one for each of them. `number`: of the client that the request was for, which is to be
        told also where that was refused. Return whether to go on with it.
        """
        if self._audit.on:
            who = self.who(client, number) if isinstance(asker, str) else asker.record
            requester = f'{who},"request":{request_id},"generation":{self.generation.number}'
            records = [outcome.record for outcome in outcomes]
            if not self._audit.decisions(requester, action, paths, records, extra):
                self.counts.decisions.count(client, action, [NOT_RECORDED] * len(paths))
                return False
        asked = len(paths)
        first = outcomes[0]
        if first is client.given_last and (asked == 1 or outcomes.count(first) == asked):
            client.times += asked
        else:
            self.counts.decisions.count(client, action, outcomes)
        return True

    def refuse(self, connection: Connection, what: str, request_id: int, objection: str) -> Answer:
        """Record and say that the sender of a message is not who connected."""
        members = member_text(request=request_id, reason=objection)
        self._audit.event(f"{what}_refused", f"{connection.record},{members}")
        text = f"the sender of this message is not who connected: {objection}"
        return self.error(request_id, Kind.REFUSED, Reason.IDENTITY, text), []
