"""Requests with paths that helpers open: begun, waited for, and decided when the helpers have answered.

The loop goes on meanwhile. What the helpers say is judged by the policy of the
moment at which they say it, as if the request had come then; what other paths
the request has is opened then. What is given is sent by the helper that has it
open, after it was recorded.
"""

from __future__ import annotations

import errno
import socket
import time
from functools import partial
from typing import TYPE_CHECKING

from fdbroker.broker.audit import member_text
from fdbroker.broker.connection import SEND_BUFFER, State
from fdbroker.broker.helper_pool import Job, JobPath
from fdbroker.broker.judging import judge_report
from fdbroker.broker.limits import account_of
from fdbroker.broker.outcomes import NEEDS_HELPER, NOT_RECORDED, TOO_MANY_IN_FLIGHT, Outcome
from fdbroker.kernel.descriptors import close_all
from fdbroker.kernel.sockets import bytes_not_received
from fdbroker.wire.format import Kind, Reason
from fdbroker.wire.messages import GIVEN, OpenRequest, refused
from fdbroker.wire.replies import encode_open_reply, encode_stat_reply
from fdbroker.wire.stream import framed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fdbroker.broker.audit import Audit
    from fdbroker.broker.connection import Connection
    from fdbroker.broker.dispatch import Asker, Dispatch, Loop
    from fdbroker.broker.helper_pool import Delivery, JobAnswer, Report
    from fdbroker.broker.in_flight import Shares
    from fdbroker.broker.open_helpers import OpenHelpers
    from fdbroker.wire.messages import StatRequest


class Helped:
    """Answers requests by what helpers say. Owns nothing."""

    def __init__(self, helpers: OpenHelpers, dispatch: Dispatch, audit: Audit, loop: Loop) -> None:
        self._helpers = helpers
        self._dispatch = dispatch
        self._audit = audit
        self._loop = loop

    def begin(
        self,
        connection: Connection,
        request: OpenRequest | StatRequest,
        asker: Asker,
        outcomes: Sequence[Outcome],
    ) -> None:
        """Have those paths looked at whose outcome is NEEDS_HELPER; answer the request later."""
        opens = isinstance(request, OpenRequest)
        decide = asker.view.actions["open" if opens else "stat"].decide
        roots = self._dispatch.generation.opener.roots
        indexes, paths = [], []
        for index, path in enumerate(request.paths):
            if outcomes[index] is NEEDS_HELPER:
                decision = decide(path)
                root = roots[decision.root.number]  # type: ignore[union-attr]  # it was allowed
                indexes.append(index)
                paths.append(JobPath(root.descriptor, path, decision.asks_links))
        connection.awaited += 1
        # What is above a limit now is not opened later either.
        over = {place: outcome for place, outcome in enumerate(outcomes) if outcome.result.limit is not None}
        done = partial(self._answer, connection, request, indexes, over, time.monotonic_ns())
        # One client of a service must not take up what the service may have for all of them.
        self._helpers.submit(Job(paths, opens, account_of(asker), connection, done))

    def _answer(
        self,
        connection: Connection,
        request: OpenRequest | StatRequest,
        indexes: Sequence[int],
        over: Mapping[int, Outcome],
        began: int,
        answer: JobAnswer,
    ) -> None:
        """Decide, record and send; by the helper if it has something open that is given."""
        delivering = False
        try:
            reports = dict(zip(indexes, answer.reports, strict=True))
            asker = self._dispatch.asker(connection, request.client)
            if not isinstance(asker, str):
                asker = connection.peer.present_objection() or asker
            if isinstance(request, OpenRequest):
                number = answer.number
                delivering = self._answer_open(connection, request, asker, number, reports, over, began)
            else:
                self._answer_stat(connection, request, asker, reports)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is a denial, and the others are served
            self._loop.fail(connection, request.id, error)
        finally:
            if not delivering:
                self._helpers.release(answer.number)
                self._end(connection, request, began)

    def _answer_open(
        self,
        connection: Connection,
        request: OpenRequest,
        asker: Asker | str,
        number: int,
        reports: Mapping[int, Report],
        over: Mapping[int, Outcome],
        began: int,
    ) -> bool:
        """Answer; return whether a helper delivers it."""
        paths, generation = request.paths, self._dispatch.generation.number
        descriptors: list[int] = []
        copies: list[bytes] = []
        try:
            shares: Shares = ()
            if isinstance(asker, str):
                outcomes = [Outcome(refused(Reason.IDENTITY), asker)] * len(paths)
            elif self._is_full(connection, len(paths)):
                outcomes = [TOO_MANY_IN_FLIGHT] * len(paths)
            elif not connection.flight.room_for(connection, len(paths)):
                outcomes = [self._dispatch.too_many_in_flight(connection, len(paths))] * len(paths)
            else:
                outcomes, reports = self._open(request, asker, reports, over, descriptors, copies)
                if self._dispatch.open_limits is not None:
                    shares = self._dispatch.open_limits.charge(asker, outcomes, descriptors, copies, reports)
            if not self._dispatch.record(
                asker, connection, "open", request.id, paths, outcomes, number=request.client
            ):
                close_all(descriptors)
                copies.clear()
                outcomes, shares = [NOT_RECORDED] * len(paths), ()
            places = _places(outcomes, reports)
            self._dispatch.counts.copied += sum(map(len, copies))
            results = [outcome.result for outcome in outcomes]
            frame = encode_open_reply(request.id, generation, results, copies)
            if len(descriptors) == len(places):  # what is given is all open here
                sent, descriptors = descriptors, []
                connection.shares = shares
                self._loop.send(connection, frame, sent, request.id)
                return False
            if connection.stream is not None:
                frame = framed(frame)
            connection.delivering += len(places)
            done = partial(self._delivered, connection, request, len(places), shares, began)
            self._helpers.deliver(number, connection.sock, frame, places, descriptors, done)
            return True
        finally:
            close_all(descriptors)

    def _is_full(self, connection: Connection, count: int) -> bool:
        """Return whether `count` descriptors more would be too many for this client, or have to wait for it.

        A helper that waits is kept from others. Half of what the queue may hold is room for any reply.
        """
        if connection.unsent or bytes_not_received(connection.sock) > SEND_BUFFER:
            return True
        # What was asked for before is counted when it is answered; not when this was read.
        most = self._dispatch.generation.settings.in_flight_per_connection
        return connection.count_in_flight() + connection.delivering + count > most

    def _open(
        self,
        request: OpenRequest,
        asker: Asker,
        reports: Mapping[int, Report],
        over: Mapping[int, Outcome],
        descriptors: list[int],
        copies: list[bytes],
    ) -> tuple[list[Outcome], Mapping[int, Report]]:
        """Open what is opened here, and decide on what the helper has open; return which that is, too."""
        opener = self._dispatch.generation.opener
        # Those above a limit are the last ones: what is admitted is the beginning.
        admitted = request.paths[: len(request.paths) - len(over)]
        if request.copy:
            outcomes = opener.open_or_copy(asker, admitted, descriptors, copies)
        else:
            outcomes = opener.open(asker, admitted, descriptors)
        outcomes += over.values()
        # By the policy of now another root may serve a path, and then it was opened here.
        reports = {index: reports[index] for index in reports if outcomes[index] is NEEDS_HELPER}
        for index, report in reports.items():
            outcomes[index] = judge_report(asker, "open", request.paths[index], report, opener.roots)
        return outcomes, reports

    def _answer_stat(
        self,
        connection: Connection,
        request: StatRequest,
        asker: Asker | str,
        reports: Mapping[int, Report],
    ) -> None:
        paths, opener = request.paths, self._dispatch.generation.opener
        if isinstance(asker, str):
            outcomes = [Outcome(refused(Reason.IDENTITY), asker)] * len(paths)
        else:
            outcomes = opener.describe(asker, paths)
            for index, report in reports.items():
                if outcomes[index] is NEEDS_HELPER:
                    outcomes[index] = judge_report(asker, "stat", paths[index], report, opener.roots)
            if self._dispatch.open_limits is not None:
                self._dispatch.open_limits.charge_request(asker, outcomes)
        if not self._dispatch.record(
            asker, connection, "stat", request.id, paths, outcomes, number=request.client
        ):
            outcomes = [NOT_RECORDED] * len(paths)
        results = [(outcome.result, outcome.facts) for outcome in outcomes]
        frame = encode_stat_reply(request.id, self._dispatch.generation.number, results)
        self._loop.send(connection, frame, [], request.id)

    def _delivered(
        self,
        connection: Connection,
        request: OpenRequest,
        count: int,
        shares: Shares,
        began: int,
        delivery: Delivery,
    ) -> None:
        """Count what is under way, or take it back in the audit."""
        connection.delivering -= count
        if delivery.sent != 0:  # whole, in part, or nobody knows: they go with the first byte
            connection.shares = shares
            connection.flight.add(connection, count, None)  # other replies may have been sent since
        if delivery.errno:
            members = member_text(request=request.id, errno=delivery.errno)
            event = "partly_delivered" if delivery.sent else "undelivered"
            self._audit.event(event, f"{connection.record},{members}")
            if delivery.sent == 0 and delivery.errno in {errno.ETIMEDOUT, errno.ETOOMANYREFS}:
                text = "the descriptors could not be sent in time; receive what was sent, then ask again"
                reason = Reason.TIMED_OUT if delivery.errno == errno.ETIMEDOUT else Reason.LIMIT
                frame = self._dispatch.error(request.id, Kind.REFUSED, reason, text)
                self._loop.send(connection, frame, [], request.id)
            else:
                if connection.state is not State.CLOSED:
                    # Its socket may lie in the queue of a helper that has ended: closing ours is no end.
                    connection.sock.shutdown(socket.SHUT_WR)
                self._loop.hang_up(connection)
        self._end(connection, request, began)

    def _end(self, connection: Connection, request: OpenRequest | StatRequest, began: int) -> None:
        # It was counted when it came; only now it is known how long it took.
        connection.durations.count_untimed(type(request), -1)
        connection.durations[type(request)].append(time.monotonic_ns() - began)
        if connection.awaited:  # it is not, if the connection has ended
            connection.awaited -= 1
        if connection.state is State.WAITING:
            self._loop.read_on(connection)


def _places(outcomes: Sequence[Outcome], reports: Mapping[int, Report]) -> list[int]:
    """Return where each descriptor that is given comes from, in the order of the paths.

    As `encode_deliver` has it: from a helper, which has open what is given of its `reports`, or from here.
    """
    places: list[int] = []
    own = 0
    for index, outcome in enumerate(outcomes):
        if outcome.result is GIVEN:
            own -= index not in reports
            places.append(reports[index].place if index in reports else own)
    return places
