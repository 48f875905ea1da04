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
    from fdbroker.broker.walking import Batch

MOST_WALKS = 4  # of one connection
_BATCH = 64  # where a file costs least
_MOST_CREDIT = 1 << 31


class ActiveWalk:
    """A walk of one connection, and what it may still send. Owns the walk."""

    __slots__ = ("credit", "most", "request", "walk")

    def __init__(self, request: WalkRequest, walk: Walk) -> None:
        self.request = request
        self.walk = walk
        self.credit = request.credit
        self.most = request.most or _BATCH

    def close(self) -> None:
        """End it without a word."""
        self.walk.close()


class Walks:
    """Begins walks, goes on with them and ends them."""

    def __init__(self, dispatch: Dispatch, parts: Parts) -> None:
        self._dispatch = dispatch
        self._audit = parts.audit
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
        if request.client is None:
            objection = connection.peer.present_objection()
        else:
            objection = asker if isinstance(asker, str) else connection.peer.present_objection()
        if objection is not None or isinstance(asker, str):
            return self._stop(connection, active, Reason.IDENTITY, str(objection))
        batch = active.walk.step(asker, active.most)
        try:
            if batch.paths and not self._dispatch.record(
                asker, connection, "walk", request_id, batch.paths, batch.outcomes, allowed=len(batch.paths)
            ):
                close_all(batch.descriptors)
                return self._stop(connection, active, Reason.AUDIT, "audit")
            if batch.end is not None:
                self._note_end(connection, active, batch)
                del connection.walks[request_id]
                active.close()
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
        walk = ActiveWalk(request, Walk(request, self._dispatch.generation.opener))
        connection.walks[request.id] = walk
        if isinstance(asker, str):
            return self._stop(connection, walk, Reason.IDENTITY, asker)
        if len(connection.walks) > MOST_WALKS:
            return self._stop(connection, walk, Reason.LIMIT, "walks")
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
        batch = active.walk.cancel()
        del connection.walks[request.id]
        self._note_end(connection, active, batch)
        active.close()
        generation = self._dispatch.generation.number
        return encode_walk_reply(request.id, generation, batch.result, (), batch.end), []

    def _stop(self, connection: Connection, active: ActiveWalk, reason: Reason, why: str) -> Answer:
        """End a walk that may not go on, whatever it has sent."""
        request = active.request
        del connection.walks[request.id]
        active.close()
        paths, outcomes = [request.path], [Outcome(refused(reason), why)]
        self._dispatch.record(why, connection, "walk", request.id, paths, outcomes, allowed=0)
        end = WalkEnd(0, 0, 0, Incomplete.LIMIT)
        number = self._dispatch.generation.number
        return encode_walk_reply(request.id, number, refused(reason), (), end), []

    def _note_end(self, connection: Connection, active: ActiveWalk, batch: Batch) -> None:
        """Record what a walk sent in all and what it left out, of which the client is told the kinds."""
        assert batch.end is not None  # noqa: S101 - for the type checker; the callers looked
        sent, descriptors, directories, incomplete = batch.end
        left_out = {f"left_out_{reason}": count for reason, count in active.walk.left_out.items()}
        members = member_text(
            request=active.request.id,
            entries=sent,
            descriptors=descriptors,
            directories=directories,
            incomplete=int(incomplete),
            **left_out,
        )
        self._audit.event("walk_ended", f"{connection.record},{members}")


def can_go_on(connection: Connection) -> bool:
    """Return whether some walk of this connection has credit."""
    return any(walk.credit for walk in connection.walks.values())
