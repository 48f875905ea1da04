"""What can be asked and how it is answered. Knows no socket; what is not in the table does not exist.

The invariant of every request: its decisions are recorded before there is an
answer to send. If they can't be, the answer gives nothing.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, NamedTuple

from fdbroker.broker.audit import member_text
from fdbroker.broker.opening import Outcome, Page
from fdbroker.kernel.descriptors import close_all
from fdbroker.wire.format import ERRNO_OF, MAX_FRAME, MAX_PATHS, VERSION, Kind, Reason
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
    encode_open_reply,
    encode_stat_reply,
    encode_status_reply,
    encode_welcome,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from fdbroker.broker.audit import Audit
    from fdbroker.broker.connection import Connection
    from fdbroker.broker.identity import ControlGroups
    from fdbroker.broker.opening import Opener
    from fdbroker.policy.decide import Policy, View

Answer = tuple[bytes, list[int]]  # a frame, and the descriptors that go with it: the receiver's to close


class Parts(NamedTuple):
    """What a broker is made of; `policy` has generation 1, `in_force` is for the status."""

    policy: Policy
    opener: Opener
    audit: Audit
    cgroups: ControlGroups
    identity_level: int
    in_force: dict[str, object]


class Dispatch:
    """Answers requests by one policy at a time, which is its `generation`."""

    def __init__(self, parts: Parts, totals: Callable[[], Mapping[str, int]]) -> None:
        """`totals` counts what the loop counts, for the status."""
        self.settings = parts.policy.rule_set.settings
        self.generation = 1
        self.allowed = self.denied = 0
        self._policy = parts.policy
        self._opener = parts.opener
        self._audit = parts.audit
        self._cgroups = parts.cgroups
        self._in_force = parts.in_force
        self._totals = totals
        self._table: dict[type, Callable[[Connection, Request, str | None], Answer]] = {
            Hello: self._hello,
            OpenRequest: self._open,
            StatRequest: self._stat,
            ListRequest: self._list,
            StatusRequest: self._status,
        }

    def answer(self, connection: Connection, request: Request, objection: str | None) -> Answer:
        """Answer one request. `objection`: why its sender is not who connected, None if it is.

        The descriptors of the answer are the caller's.
        """
        return self._table[type(request)](connection, request, objection)

    def error(self, request_id: int, kind: Kind, reason: Reason, text: str) -> bytes:
        """Return an error frame of this generation."""
        return encode_error(ErrorReply(request_id, self.generation, kind, reason, ERRNO_OF[reason], text))

    def _hello(self, connection: Connection, request: Request, objection: str | None) -> Answer:
        assert isinstance(request, Hello)  # noqa: S101 - for the type checker; the table says it
        if objection is not None:
            return self._refuse(connection, "hello", request.id, objection)
        if not request.lowest <= VERSION <= request.highest:
            text = f"this broker speaks version {VERSION}, not {request.lowest} to {request.highest}"
            return self.error(request.id, Kind.REFUSED, Reason.VERSION, text), []
        connection.greeted = True
        welcome = Welcome(
            request.id,
            self.generation,
            version=VERSION,
            identity_level=connection.peer.level,
            features=0,
            max_paths=MAX_PATHS,
            max_frame=MAX_FRAME,
            in_flight=self.settings.in_flight_per_connection,
            copy_max=0,
        )
        return encode_welcome(welcome), []

    def _open(self, connection: Connection, request: Request, objection: str | None) -> Answer:
        assert isinstance(request, OpenRequest)  # noqa: S101 - for the type checker; the table says it
        paths = request.paths
        descriptors: list[int] = []
        try:
            if objection is not None:
                outcomes = [Outcome(refused(Reason.IDENTITY), objection)] * len(paths)
            elif not connection.may_have_more(len(paths)):
                outcomes = [_TOO_MANY_IN_FLIGHT] * len(paths)
            else:
                view = self._view(connection).actions["open"]
                outcomes = self._opener.open(view, paths, connection.peer.uid, descriptors)
            if not self._record(connection, "open", request.id, paths, outcomes, allowed=len(descriptors)):
                close_all(descriptors)
                outcomes = [_NOT_RECORDED] * len(paths)
            results = [outcome.result for outcome in outcomes]
            return encode_open_reply(request.id, self.generation, results), descriptors
        except BaseException:
            close_all(descriptors)
            raise

    def _stat(self, connection: Connection, request: Request, objection: str | None) -> Answer:
        assert isinstance(request, StatRequest)  # noqa: S101 - for the type checker; the table says it
        paths = request.paths
        if objection is not None:
            outcomes = [Outcome(refused(Reason.IDENTITY), objection)] * len(paths)
        else:
            view = self._view(connection).actions["stat"]
            uid = connection.peer.uid
            outcomes = [self._opener.stat(view, path, uid) for path in paths]
        allowed = sum(outcome.facts is not None for outcome in outcomes)
        if not self._record(connection, "stat", request.id, paths, outcomes, allowed=allowed):
            outcomes = [_NOT_RECORDED] * len(paths)
        results = [(outcome.result, outcome.facts) for outcome in outcomes]
        return encode_stat_reply(request.id, self.generation, results), []

    def _list(self, connection: Connection, request: Request, objection: str | None) -> Answer:
        assert isinstance(request, ListRequest)  # noqa: S101 - for the type checker; the table says it
        if objection is not None:
            page = Page(Outcome(refused(Reason.IDENTITY), objection))
        else:
            view = self._view(connection)
            page = self._opener.list(view, request.path, request.cookie, request.most, connection.peer.uid)
        outcome, shown = page.outcome, f',"entries":{len(page.entries)}'
        allowed = int(outcome.reason == "ok")
        if not self._record(
            connection, "list", request.id, [request.path], [outcome], shown, allowed=allowed
        ):
            page = Page(_NOT_RECORDED)
        reply = encode_list_reply(
            request.id, self.generation, page.outcome.result, page.entries, page.cookie, last=page.last
        )
        return reply, []

    def _status(self, connection: Connection, request: Request, objection: str | None) -> Answer:
        if objection is not None:
            return self._refuse(connection, "status", request.id, objection)
        peer = connection.peer
        document: dict[str, object] = {
            "generation": self.generation,
            "identity_level": peer.level,
            # A process may have 65,536 groups, and a reply has its limits.
            "peer": {"pid": peer.pid, "uid": peer.uid, "gid": peer.gid, "groups": sorted(peer.groups)[:1024]},
            "in_flight": connection.count_in_flight(),
            "audit": self._audit.run if self._audit.on else "off",
            "read_only_view": "required" if self.settings.read_only_view_required else "off",
            **self._in_force,
        }
        if peer.uid == 0:
            counts = {"allowed": self.allowed, "denied": self.denied, "audit_failures": self._audit.failures}
            document["totals"] = {**self._totals(), **counts}
        return encode_status_reply(request.id, self.generation, json.dumps(document).encode()), []

    def _view(self, connection: Connection) -> View:
        if connection.view is None or connection.view_generation != self.generation:
            connection.view = self._policy.view(connection.peer.facts(self._cgroups))
            connection.view_generation = self.generation
        return connection.view

    def _record(
        self,
        connection: Connection,
        action: str,
        request_id: int,
        paths: Sequence[bytes],
        outcomes: Sequence[Outcome],
        extra: str = "",
        *,
        allowed: int,
    ) -> bool:
        recorded = True
        if self._audit.on:
            requester = f'{connection.record},"request":{request_id},"generation":{self.generation}'
            records = [outcome.record for outcome in outcomes]
            recorded = self._audit.decisions(requester, action, paths, records, extra)
        given = allowed if recorded else 0
        self.allowed += given
        self.denied += len(outcomes) - given
        return recorded

    def _refuse(self, connection: Connection, what: str, request_id: int, objection: str) -> Answer:
        members = member_text(request=request_id, reason=objection)
        self._audit.event(f"{what}_refused", f"{connection.record},{members}")
        text = f"the sender of this message is not who connected: {objection}"
        return self.error(request_id, Kind.REFUSED, Reason.IDENTITY, text), []


_NOT_RECORDED = Outcome(refused(Reason.AUDIT), "audit")
_TOO_MANY_IN_FLIGHT = Outcome(refused(Reason.LIMIT), "in_flight")
