"""What can be asked on the control socket: the whole status, explanations, and another policy.

A policy comes in pieces and is read when it is there whole, a moment at a time,
since others want to be served meanwhile. Until it is known to be sound, to fit
into what is held and to be on record, nothing changes; then all changes at once.
"""

from __future__ import annotations

import gc
import json
import os
import time
from typing import TYPE_CHECKING, NamedTuple

from fdbroker.broker.audit import member_text, objection_to_file, quoted_path
from fdbroker.broker.connection import State
from fdbroker.broker.generation import make_generation, problem_with
from fdbroker.kernel import sockets
from fdbroker.policy.rules import PolicyError, read_policy_in_steps
from fdbroker.wire.format import Kind, Reason
from fdbroker.wire.messages import (
    ExplainRequest,
    Hello,
    MalformedError,
    ReloadRequest,
    ReopenRequest,
    Request,
    StatusRequest,
)
from fdbroker.wire.replies import (
    encode_explain_reply,
    encode_reload_reply,
    encode_reopen_reply,
    encode_status_reply,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Mapping, Sequence

    from fdbroker.broker.connection import Connection
    from fdbroker.broker.dispatch import Answer, Dispatch, Parts, Table
    from fdbroker.kernel.descriptors import Descriptors
    from fdbroker.policy.rules import Rule, RuleSet, Settings

# Of lists in an answer, so that it fits into one frame; JSON text.
_MAX_LISTED = 8192
_MAX_ROWS = 24576  # the same, where there is nothing else
# Of a path, in the record: anybody may ask, and nothing is given, so a request is not to fill the disk.
_MAX_EXPLAINED_BYTES = 256
_MAX_OBJECTION = 1000  # characters of what is wrong with a policy
_MOMENT = 0.01  # seconds


class Loading(NamedTuple):
    """A policy that is there whole and is being read."""

    request_id: int
    received: int
    steps: Generator[None, None, RuleSet]


class Control:
    """Answers on the control socket, by and for the policy that `dispatch` answers by."""

    def __init__(
        self,
        dispatch: Dispatch,
        parts: Parts,
        facts: Callable[[], Mapping[str, object]],
        rows: Callable[[str], Sequence[object]],
        switched: Callable[[], None],
    ) -> None:
        """`facts` is what the loop knows, for the status, and `rows` the lists that are asked for apart.

        `switched` is called when the policy is another.
        """
        self._dispatch = dispatch
        self._audit = parts.audit
        self._held = parts.held
        self._version = parts.version
        self._facts = facts
        self._rows = rows
        self._switched = switched
        # What came beside the message that is being answered, where its connection may send that.
        self.file: Descriptors | None = None
        self.table: Table = {
            Hello: dispatch.table[Hello],
            StatusRequest: self._status,
            ExplainRequest: self._explain,
            ReloadRequest: self._reload,
            ReopenRequest: self._reopen,
        }

    def _status(self, connection: Connection, request: Request, objection: str | None) -> Answer:
        assert isinstance(request, StatusRequest)  # noqa: S101 - for the type checker; the table says it
        if objection is not None:
            return self._dispatch.refuse(connection, "status", request.id, objection)
        generation = self._dispatch.generation
        is_admin = generation.settings.admins.include(connection.peer.facts(generation.cgroups))
        if request.part is not None and not is_admin:
            return self._dispatch.refuse_part(request)
        if request.part is not None:
            rows = self._rows(request.part)
            listed = _as_many_as_fit(rows[request.row :], _MAX_ROWS)
            following = request.row + len(listed)
            document: dict[str, object] = {
                "rows": listed,
                "next": following if following < len(rows) else None,
            }
        else:
            document = self._dispatch.status_of(connection)
            if is_admin:
                document |= self._whole_status()
        return encode_status_reply(request.id, generation.number, json.dumps(document).encode()), []

    def _whole_status(self) -> dict[str, object]:
        _, policy, settings, _, _, loaded = self._dispatch.generation
        rule_set = policy.rule_set
        roots = [
            {
                "name": root.name,
                "path": os.fsdecode(root.path),
                "cross_mounts": root.cross_mounts,
                "opens": "helpers" if root.helpers else "loop",
            }
            for root in rule_set.roots
        ]
        return {
            "pid": os.getpid(),
            "version": self._version,
            "totals": self._dispatch.totals(),
            "loaded": loaded,
            "fingerprint": rule_set.fingerprint,
            "launcher_fingerprint": self._held.launcher_fingerprint,
            "rules": len(rule_set.rules),
            "roots": _as_many_as_fit(roots),
            "roots_in_all": len(roots),
            "limits": _limits(settings),
            "limits_hit": _as_many_as_fit(self._dispatch.limits.document()),
            "audit_on_failure": "deny" if settings.deny_when_audit_fails else "allow",
            "audit_sequence": self._audit.sequence,
            "audit_failures": self._audit.failures,
            "events": dict(self._audit.events),
            "started": self._dispatch.counts.began,
            "requests": self._dispatch.counts.requests(),
            **self._facts(),
        }

    def _explain(self, connection: Connection, request: Request, objection: str | None) -> Answer:
        """Say what the name alone decides, for who asks. The file system is not touched."""
        assert isinstance(request, ExplainRequest)  # noqa: S101 - for the type checker; the table says it
        if objection is not None:
            return self._dispatch.refuse(connection, "explain", request.id, objection)
        number = self._dispatch.generation.number
        decision = self._dispatch.own_asker(connection).view.actions[request.action].decide(request.path)
        rule = decision.rule or (decision.allows[0] if len(decision.allows) == 1 else None)
        asking = [allow for allow in decision.allows if allow.where is not None]
        document = {
            "action": request.action,
            "generation": number,
            "allowed": decision.allowed,
            "reason": decision.reason,
            "root": None if decision.root is None else decision.root.name,
            "rule": None if rule is None else rule.name,
            "asked_of_object": _as_many_as_fit(_names(asking)),
            "asked_of_object_in_all": len(asking),
            "denies": _as_many_as_fit(_names(decision.denies)),
            "denies_in_all": len(decision.denies),
        }
        members = member_text(request=request.id, generation=number, action=request.action)
        asked = quoted_path(request.path, _MAX_EXPLAINED_BYTES)
        reason = member_text(reason=decision.reason)
        if not self._record("explained", f"{connection.record},{members},{asked},{reason}"):
            return self._not_recorded(request.id)
        text = f"{{{quoted_path(request.path)},{json.dumps(document)[1:]}"
        return encode_explain_reply(request.id, number, text.encode()), []

    def _reload(self, connection: Connection, request: Request, objection: str | None) -> Answer | None:
        """Take a piece of a policy; the last one is answered when all of it was read, by `load`."""
        assert isinstance(request, ReloadRequest)  # noqa: S101 - for the type checker; the table says it
        if objection is not None:
            return self._dispatch.refuse(connection, "reload", request.id, objection)
        if connection.peer.uid != 0:
            text = "only root changes the policy: run it as root"
            return self._refuse_reload(connection, request.id, Reason.DENIED, text)
        if request.offset == 0:
            connection.pieces = bytearray()
        if connection.pieces is None or len(connection.pieces) != request.offset:
            connection.pieces = None
            text = f"the piece at byte {request.offset} does not follow what is there: begin again, at 0"
            return self._refuse_reload(connection, request.id, Reason.POLICY, text)
        connection.pieces += request.piece
        received = len(connection.pieces)
        if request.more:
            number = self._dispatch.generation.number
            return encode_reload_reply(request.id, number, received, more=True), []
        pieces, connection.pieces = connection.pieces, None
        try:
            steps = read_policy_in_steps(_parse(pieces))
        except (ValueError, RecursionError) as error:
            return self._no_policy(connection, request.id, error)
        connection.loading = Loading(request.id, received, steps)
        return None

    def load(self, connection: Connection, loading: Loading) -> Answer | None:
        """Go on with a policy that was handed over, for a moment. None: it is not all read yet."""
        until = time.monotonic() + _MOMENT
        try:
            while time.monotonic() < until:
                next(loading.steps)
        except StopIteration as end:
            return self._switch(connection, loading, end.value)
        except PolicyError as error:
            return self._no_policy(connection, loading.request_id, error)
        return None

    def _switch(self, connection: Connection, loading: Loading, rule_set: RuleSet) -> Answer:
        """Decide by this policy from now on, or say why not: all or nothing."""
        request_id, received, _ = loading
        problem = problem_with(rule_set, self._held)
        if problem is not None:
            return self._refuse_reload(connection, request_id, Reason.POLICY, problem)
        old = self._dispatch.generation
        new = make_generation(old.number + 1, rule_set, self._held)
        members = member_text(
            request=request_id,
            generation=new.number,
            fingerprint=rule_set.fingerprint,
            rules=len(rule_set.rules),
            old_generation=old.number,
            old_fingerprint=old.policy.rule_set.fingerprint,
        )
        if not self._record("reloaded", f"{connection.record},{members}"):
            return self._not_recorded(request_id)
        del old  # it ends now, with all that was remembered for it
        self._dispatch.generation = new
        self._audit.deny_on_failure = new.settings.deny_when_audit_fails
        self._switched()
        return encode_reload_reply(request_id, new.number, received, more=False), []

    def _reopen(self, connection: Connection, request: Request, objection: str | None) -> Answer:
        """Let root alone bring another file for the audit: first announced, then with the next message."""
        assert isinstance(request, ReopenRequest)  # noqa: S101 - for the type checker; the table says it
        if objection is not None:
            return self._dispatch.refuse(connection, "reopen", request.id, objection)
        if connection.peer.uid != 0:
            return self._refuse_reopen(connection, request.id, Reason.DENIED, "only root may do it")
        if request.comes:
            return self._take_file(connection, request.id)
        why = self._audit.objection_to_reopening()
        if why is not None:
            return self._refuse_reopen(connection, request.id, Reason.AUDIT, why)
        if connection.stream is not None:
            # Where one message ends and the next begins is not the kernel's word there.
            raise MalformedError("a file for the audit can't come by a stream", request.id)
        sockets.refuse_descriptors(connection.sock, refuse=False)
        connection.state = State.TAKING
        return encode_reopen_reply(request.id, self._dispatch.generation.number, taken=False), []

    def _take_file(self, connection: Connection, request_id: int) -> Answer:
        if self.file is None or len(self.file) != 1:
            text = "a file for the audit comes alone, with the message behind the one that announces it"
            raise MalformedError(text, request_id)
        why = objection_to_file(self.file.numbers()[0])
        if why is not None:
            return self._refuse_reopen(connection, request_id, Reason.DENIED, f"the new file {why}")
        number = self._dispatch.generation.number
        members = f"{connection.record},{member_text(request=request_id, generation=number)}"
        if not self._audit.go_on_in(self.file.take(), members):
            text = "the new file can't be written to, so the audit goes on in the old one: free its disk"
            return self._refuse_reopen(connection, request_id, Reason.AUDIT, text)
        return encode_reopen_reply(request_id, number, taken=True), []

    def _refuse_reopen(self, connection: Connection, request_id: int, reason: Reason, text: str) -> Answer:
        members = member_text(request=request_id, reason=text)
        self._audit.event("reopen_refused", f"{connection.record},{members}")
        return self._dispatch.error(request_id, Kind.REFUSED, reason, text), []

    def _no_policy(self, connection: Connection, request_id: int, error: Exception) -> Answer:
        text = f"this is no compiled policy: {str(error)[:_MAX_OBJECTION]}; compile it anew"
        return self._refuse_reload(connection, request_id, Reason.POLICY, text)

    def _record(self, event: str, members: str) -> bool:
        return self._audit.event(event, members) or not self._audit.deny_on_failure

    def _refuse_reload(self, connection: Connection, request_id: int, reason: Reason, text: str) -> Answer:
        generation = self._dispatch.generation.number
        members = member_text(request=request_id, generation=generation, reason=text)
        self._audit.event("reload_refused", f"{connection.record},{members}")
        return self._dispatch.error(request_id, Kind.REFUSED, reason, text), []

    def _not_recorded(self, request_id: int) -> Answer:
        text = "it could not be recorded, so nothing was done: free the audit's disk, or see to who reads it"
        return self._dispatch.error(request_id, Kind.REFUSED, Reason.AUDIT, text), []


def _parse(text: bytearray) -> object:
    """Parse JSON, in one go: whoever waits meanwhile waits a tenth as long without the collector.

    It would look at all that is there again and again, and there are no cycles in it.
    """
    gc.disable()
    try:
        return json.loads(text)
    finally:
        gc.enable()


def _limits(settings: Settings) -> dict[str, float]:
    """Return the limits of every client, by their names in the policy: those that there are."""
    requests, opens = settings.requests, settings.opens
    limits = {
        "connections_per_uid": settings.connections_per_uid,
        "in_flight_per_connection": settings.in_flight_per_connection,
        "message_within": settings.message_within,
        "in_flight_per_uid": settings.in_flight_per_uid,
        "requests_per_second": None if requests is None else requests.per_second,
        "requests_burst": None if requests is None else requests.burst,
        "opens_per_second": None if opens is None else opens.per_second,
        "opens_burst": None if opens is None else opens.burst,
        "idle_timeout": settings.idle_timeout,
    }
    return {name: value for name, value in limits.items() if value is not None}


def _names(rules: Iterable[Rule]) -> list[str]:
    return [rule.name for rule in rules]


def _as_many_as_fit(values: Iterable[object], most: int = _MAX_LISTED) -> list[object]:
    """Return the first of `values`, as many as an answer has room for."""
    listed, size = [], 0
    for value in values:
        size += len(json.dumps(value)) + 2
        if size > most:
            break
        listed.append(value)
    return listed
