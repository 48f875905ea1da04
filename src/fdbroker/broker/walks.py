"""Walks that go on: each sends its next frame when there is credit, and the client has room for it.

A walk may last for long, and each of its frames is a request of its own as far
as decisions go: the policy of that moment decides, the client must still be who
it was, and what is given is on record before it is sent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fdbroker.broker.audit import member_text
from fdbroker.broker.opening import Outcome
from fdbroker.broker.walking import Walk
from fdbroker.kernel.descriptors import close_all
from fdbroker.wire.format import Incomplete, Reason
from fdbroker.wire.messages import (
    GIVEN,
    CancelRequest,
    MalformedError,
    MoreRequest,
    Request,
    WalkEnd,
    WalkRequest,
    refused,
)
from fdbroker.wire.replies import encode_walk_reply

if TYPE_CHECKING:
    from fdbroker.broker.connection import Connection
    from fdbroker.broker.dispatch import Answer, Dispatch, Parts

MOST_WALKS = 4  # of one connection
_BATCH = 64  # where a file costs least
_MOST_CREDIT = 1 << 31
_NOTHING = WalkEnd(0, 0, 0, Incomplete.LIMIT)


class ActiveWalk:
    """A walk of one connection, and what it may still send."""

    __slots__ = ("credit", "most", "request", "walk")

    def __init__(self, request: WalkRequest, walk: Walk) -> None:
        self.request = request
        self.walk = walk
        self.credit = request.credit
        self.most = request.most or _BATCH


class Walks:
    """Begins walks, goes on with them and ends them."""

    def __init__(self, dispatch: Dispatch, parts: Parts) -> None:
        self._dispatch = dispatch
        self._audit = parts.audit
        self._proc_self_fd = parts.held.proc_self_fd
        dispatch.table |= {WalkRequest: self._begin, MoreRequest: self._more, CancelRequest: self._cancel}

    def next_frame(self, connection: Connection) -> Answer | None:
        """Go on with the walk that may; the caller saw `can_go_on`. None: it found nothing to name yet."""
        request_id, active = next(
            (request_id, active) for request_id, active in connection.walks.items() if active.credit
        )
        # The next one gets its turn before this one gets another.
        connection.walks[request_id] = connection.walks.pop(request_id)
        request = active.request
        asker = self._dispatch.asker(connection, request.client)
        if isinstance(asker, str):
            return self._stop(connection, request, Reason.IDENTITY, asker)
        objection = connection.peer.present_objection()
        if objection is not None:
            return self._stop(connection, request, Reason.IDENTITY, objection)
        active.walk.decide_by(asker, self._dispatch.generation.opener.roots)
        batch = active.walk.step(active.most)
        try:
            allowed = len(batch.paths) if batch.result is GIVEN else 0
            if batch.paths and not self._dispatch.record(
                asker, connection, "walk", request_id, batch.paths, batch.records, allowed=allowed
            ):
                close_all(batch.descriptors)
                return self._stop(connection, request, Reason.AUDIT, "audit")
            if batch.end is not None:
                del connection.walks[request_id]
                self._note_end(asker.record, active, batch.end)
            elif not batch.entries:
                return None
            active.credit -= 1
            generation = self._dispatch.generation.number
            frame = encode_walk_reply(request_id, generation, batch.result, batch.entries, batch.end)
        except BaseException:
            close_all(batch.descriptors)
            raise
        return frame, batch.descriptors

    def _begin(self, connection: Connection, request: Request, objection: str | None) -> Answer | None:
        assert isinstance(request, WalkRequest)  # noqa: S101 - for the type checker; the table says it
        if request.id in connection.walks:
            raise MalformedError("a walk with the id of one that goes on", request.id)
        asker = self._dispatch.asker(connection, request.client) if objection is None else objection
        if isinstance(asker, str):
            return self._refuse(connection, request, Reason.IDENTITY, asker)
        if len(connection.walks) >= MOST_WALKS:
            return self._refuse(connection, request, Reason.LIMIT, "walks")
        roots = self._dispatch.generation.opener.roots
        walk = Walk(request, roots, asker.view, asker.uid, self._proc_self_fd)
        connection.walks[request.id] = ActiveWalk(request, walk)
        return None

    def _more(self, connection: Connection, request: Request, objection: str | None) -> None:
        assert isinstance(request, MoreRequest)  # noqa: S101 - for the type checker; the table says it
        walk = connection.walks.get(request.id)
        if walk is not None and objection is None:
            walk.credit = min(walk.credit + request.credit, _MOST_CREDIT)

    def _cancel(self, connection: Connection, request: Request, objection: str | None) -> Answer | None:
        active = connection.walks.get(request.id)
        if active is None or objection is not None:
            return None
        del connection.walks[request.id]
        end = active.walk.cancel()
        self._note_end(connection.record, active, end)
        return encode_walk_reply(request.id, self._dispatch.generation.number, GIVEN, (), end), []

    def _stop(self, connection: Connection, request: WalkRequest, reason: Reason, why: str) -> Answer:
        """End a walk that may not go on, whatever it has sent."""
        del connection.walks[request.id]
        return self._refuse(connection, request, reason, why)

    def _refuse(self, connection: Connection, request: WalkRequest, reason: Reason, why: str) -> Answer:
        records = [Outcome(refused(reason), why).record]
        self._dispatch.record(why, connection, "walk", request.id, [request.path], records, allowed=0)
        number = self._dispatch.generation.number
        return encode_walk_reply(request.id, number, refused(reason), (), _NOTHING), []

    def _note_end(self, record: str, active: ActiveWalk, end: WalkEnd) -> None:
        """Record what a walk sent in all and what it left out, of which the client is told the kinds."""
        left_out = {f"left_out_{why.name}".lower(): count for why, count in active.walk.left_out.items()}
        members = member_text(
            request=active.request.id,
            entries=end.entries,
            descriptors=end.descriptors,
            directories=end.directories,
            incomplete=int(end.incomplete),
            **left_out,
        )
        self._audit.event("walk_ended", f"{record},{members}")


def can_go_on(connection: Connection) -> bool:
    """Return whether some walk of this connection has credit."""
    return any(walk.credit for walk in connection.walks.values())
