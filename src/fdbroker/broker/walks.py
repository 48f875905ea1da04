"""Walks that go on: each sends its next frame when there is credit, and the client has room for it.

A walk may last for long, and each of its frames is a request of its own as far
as decisions go: the policy of that moment decides, the client must still be who
it was, and what is given is on record before it is sent.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING

from fdbroker.broker.audit import member_text
from fdbroker.broker.outcomes import Outcome
from fdbroker.broker.walking import BATCH, NO_PATHS, Batch, Walk
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
    from fdbroker.broker.dispatch import Answer, Asker, Dispatch, Parts
    from fdbroker.broker.limits import Limits

MOST_WALKS = 4  # of one connection, or of one client of a service on it
# A walk that waits for credit keeps its place: up to a megabyte, 2,000 directories deep. It has states of its
# globs in each, so it counts once more for each so many bytes of these.
MOST_WALKS_OF_UID = 32
MOST_WALKS_IN_ALL = 256
_BYTES_OF_GLOBS = 1024
_MOST_CREDIT = 1 << 31
_HELD_BACK = 0.02  # seconds until a walk that a limit holds back is tried again
_SIGN_OF_LIFE = 2.0  # seconds after which a frame without entries says that the walk goes on
# What is missing then, whatever the walk has met.
_LEFT_OUT = {
    Reason.IDENTITY: Incomplete.REFUSED,
    Reason.LIMIT: Incomplete.LIMIT,
    Reason.AUDIT: Incomplete.FAILED,
}


class ActiveWalk:
    """A walk of one connection, what it has sent and what it may still send."""

    __slots__ = (
        "counts",
        "credit",
        "descriptors",
        "entries",
        "most",
        "not_before",
        "request",
        "sent",
        "uid",
        "walk",
    )

    def __init__(self, request: WalkRequest, walk: Walk, uid: int, counts: int) -> None:
        self.request = request
        self.uid = uid  # that it counts for
        self.counts = counts  # for so many
        self.walk = walk
        self.credit = request.credit
        self.most = request.most or BATCH
        # What was sent so far, and when the last frame was.
        self.entries = self.descriptors = 0
        self.sent = time.monotonic()
        # When it may go on, since a limit holds it back.
        self.not_before = 0.0


class Walks:
    """Begins walks, goes on with them and ends them."""

    def __init__(self, dispatch: Dispatch, parts: Parts) -> None:
        # Whether the walk that had its turn last waits for a limit.
        self.held_back = False
        self._dispatch = dispatch
        self._audit = parts.audit
        self._proc_self_fd = parts.held.proc_self_fd
        self.count = 0
        # As each counts.
        self._counted = 0
        self._counted_of: dict[int, int] = {}
        self._ping = parts.watchdog.ping
        dispatch.table |= {WalkRequest: self._begin, MoreRequest: self._more, CancelRequest: self._cancel}

    @staticmethod
    def most_in_next_frame(connection: Connection) -> int:
        """Return how many descriptors the next frame may have."""
        walk = _whose_turn(connection)
        return 0 if walk is None or not walk.request.descriptors else walk.most

    def next_frame(self, connection: Connection) -> tuple[bytes, list[int], int] | None:
        """Go on with the walk that may; the caller saw `can_go_on`. None: it found nothing to name yet.

        The number is the request's. The descriptors are the caller's.
        """
        active = _whose_turn(connection)
        assert active is not None  # noqa: S101 - for the type checker; the caller looked
        request_id = active.request.id
        limits = self._dispatch.open_limits if active.request.descriptors else None
        # The next one gets its turn before this one gets another.
        connection.walks[request_id] = connection.walks.pop(request_id)
        self.held_back = limits is not None and time.monotonic() < active.not_before
        if self.held_back:
            return None
        asker = self._dispatch.asker(connection, active.request.client)
        if isinstance(asker, str):
            return self._stop(connection, active, Reason.IDENTITY, asker)
        objection = connection.peer.present_objection()
        if objection is not None:
            return self._stop(connection, active, Reason.IDENTITY, objection)
        active.walk.decide_by(asker, self._dispatch.generation.opener.roots)
        batch = active.walk.step(active.most) if limits is None else self._limited_step(active, asker, limits)
        try:
            recorded = not batch.paths or self._dispatch.record(
                asker, connection, "walk", request_id, batch.paths, batch.outcomes
            )
            if recorded:
                active.entries += len(batch.entries)
                active.descriptors += len(batch.descriptors)
                if limits is not None:
                    connection.shares = limits.charge_walk(asker, batch.opened_by, len(batch.descriptors))
                now = time.monotonic()
                if batch.end is None and not batch.entries and now < active.sent + _SIGN_OF_LIFE:
                    return None
                active.sent = now
                active.credit -= 1
                if batch.end is not None:
                    self._forget(connection, request_id)
                    self._note_end(asker.record, active, batch.end)
                generation = self._dispatch.generation.number
                frame = encode_walk_reply(request_id, generation, batch.result, batch.entries, batch.end)
                return frame, batch.descriptors, request_id
        except BaseException:
            close_all(batch.descriptors)
            raise
        close_all(batch.descriptors)
        return self._stop(connection, active, Reason.AUDIT, "audit")

    def _limited_step(self, active: ActiveWalk, asker: Asker, limits: Limits) -> Batch:
        """Go on as far as the limits allow; where they do not, note when to try again."""
        room = min(active.most, limits.room(asker))
        batch = Batch(GIVEN, [], NO_PATHS, [], [], None)
        if room:
            batch = active.walk.step(room, partial(limits.room_of, asker))
            if batch.entries or batch.end is not None or batch.held_back_by is None:
                return batch
        limits.held_back(asker, batch.held_back_by)
        active.not_before = time.monotonic() + _HELD_BACK
        self.held_back = True
        return batch

    def decide_anew(self, connection: Connection) -> None:
        """Let go of the policy before: walks without credit must not keep it."""
        for active in connection.walks.values():
            asker = self._dispatch.asker(connection, active.request.client)
            if not isinstance(asker, str):  # which ends the walk as soon as it would go on
                active.walk.decide_by(asker, self._dispatch.generation.opener.roots)

    def end_all(self, connection: Connection) -> None:
        """End the walks of a connection that ends, and record what they sent."""
        for request_id, active in list(connection.walks.items()):
            self._forget(connection, request_id)
            end = active.walk.stop(Incomplete.CANCELLED)
            self._note_end(self._dispatch.who(connection, active.request.client), active, end)

    def _forget(self, connection: Connection, request_id: int) -> None:
        active = connection.walks.pop(request_id)
        self.count -= 1
        self._counted -= active.counts
        self._counted_of[active.uid] -= active.counts
        if not self._counted_of[active.uid]:
            del self._counted_of[active.uid]

    def _begin(self, connection: Connection, request: Request, objection: str | None) -> Answer | None:
        assert isinstance(request, WalkRequest)  # noqa: S101 - for the type checker; the table says it
        if request.id in connection.walks:
            raise MalformedError("a walk with the id of one that goes on", request.id)
        asker = self._dispatch.asker(connection, request.client) if objection is None else objection
        if isinstance(asker, str):
            return self._refuse(connection, request, Reason.IDENTITY, asker), []
        # Of a service each client has its own, or one of them would keep the others from any.
        of_client = sum(one.request.client == request.client for one in connection.walks.values())
        uid = asker.uid if asker.on_behalf_of_uid is None else asker.on_behalf_of_uid
        counts = 1 + sum(map(len, request.filter.globs)) // _BYTES_OF_GLOBS
        of_uid, in_all = self._counted_of.get(uid, 0) + counts, self._counted + counts
        if of_client >= MOST_WALKS or of_uid > MOST_WALKS_OF_UID or in_all > MOST_WALKS_IN_ALL:
            return self._refuse(connection, request, Reason.LIMIT, "walks"), []
        roots = self._dispatch.generation.opener.roots
        walk = Walk(request, roots, asker.view, asker.uid, self._proc_self_fd, self._ping)
        connection.walks[request.id] = ActiveWalk(request, walk, uid, counts)
        self.count += 1
        self._counted = in_all
        self._counted_of[uid] = of_uid
        return None

    def _more(self, connection: Connection, request: Request, objection: str | None) -> None:
        assert isinstance(request, MoreRequest)  # noqa: S101 - for the type checker; the table says it
        if objection is not None:
            self._note_objection(connection, "more", request.id, objection)
            return
        walk = connection.walks.get(request.id)
        if walk is not None:
            walk.credit = min(walk.credit + request.credit, _MOST_CREDIT)

    def _cancel(self, connection: Connection, request: Request, objection: str | None) -> Answer | None:
        if objection is not None:
            self._note_objection(connection, "cancel", request.id, objection)
            return None
        active = connection.walks.get(request.id)
        if active is None:
            return None
        self._forget(connection, request.id)
        end = active.walk.cancel()
        self._note_end(self._dispatch.who(connection, active.request.client), active, end)
        return encode_walk_reply(request.id, self._dispatch.generation.number, GIVEN, (), end), []

    def _note_objection(self, connection: Connection, what: str, request_id: int, objection: str) -> None:
        """Record a message of somebody else, which has no answer: to its walk it means nothing."""
        members = member_text(request=request_id, reason=objection)
        self._audit.event(f"{what}_refused", f"{connection.record},{members}")

    def _stop(
        self, connection: Connection, active: ActiveWalk, reason: Reason, why: str
    ) -> tuple[bytes, list[int], int]:
        """End a walk that may not go on; the last frame counts what was sent, which is what was recorded."""
        request = active.request
        self._forget(connection, request.id)
        why_missing = _LEFT_OUT[reason]
        walked = active.walk.stop(why_missing)
        incomplete = walked.incomplete | why_missing
        end = WalkEnd(active.entries, active.descriptors, walked.directories, incomplete)
        frame = self._refuse(connection, request, reason, why, end)
        self._note_end(self._dispatch.who(connection, request.client), active, end)
        return frame, [], request.id

    def _refuse(
        self,
        connection: Connection,
        request: WalkRequest,
        reason: Reason,
        why: str,
        end: WalkEnd | None = None,
    ) -> bytes:
        """Record and return the last frame of a walk that may not begin, or not go on behind `end`."""
        outcomes = [Outcome(refused(reason), why)]
        self._dispatch.record(
            why, connection, "walk", request.id, [request.path], outcomes, number=request.client
        )
        number = self._dispatch.generation.number
        end = end or WalkEnd(0, 0, 0, _LEFT_OUT[reason])
        return encode_walk_reply(request.id, number, refused(reason), (), end)

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
    return _whose_turn(connection) is not None


def _whose_turn(connection: Connection) -> ActiveWalk | None:
    """Return the first walk that has credit."""
    return next((walk for walk in connection.walks.values() if walk.credit), None)
