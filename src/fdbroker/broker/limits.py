"""Limits by rate and of what rules give: whose they are, what is left of them, what a refusal says.

Each is of one uid, however many connections, processes and datagrams it uses.
Where a service acts for a client it is the client's: one of them can't use up
what the service has for the others.

Requests of a uid are counted before they are looked at. What a uid opens in all is
counted by the paths it asks for, so that refusals are not free either. What a
rule gives is counted when it is given: no number depends on files that the
client may not have.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

from fdbroker.broker.audit import member_text
from fdbroker.broker.buckets import Buckets
from fdbroker.broker.outcomes import Outcome
from fdbroker.kernel.descriptors import close_all
from fdbroker.wire.format import MAX_PATHS, Kind, Limit, Reason, Status
from fdbroker.wire.messages import (
    GIVEN,
    CancelRequest,
    Hello,
    LimitReached,
    MoreRequest,
    ReleaseRequest,
    limited,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence
    from typing import Any

    from fdbroker.broker.audit import Audit
    from fdbroker.broker.connection import Client
    from fdbroker.broker.dispatch import Answer, Asker, Dispatch, Table
    from fdbroker.broker.in_flight import InFlight, Shares
    from fdbroker.policy.rules import Rate, Rule, RuleLimits, RuleSet
    from fdbroker.wire.messages import Request

    Handler = Callable[[Any, Request, str | None], Answer | None]

# They have no answer of their own, or let go of something.
_NOT_COUNTED = (Hello, MoreRequest, CancelRequest, ReleaseRequest)
_NO_SHARES: Shares = ()
_UNLIMITED = 1 << 31
_WORTH_A_FRAME = 32  # files


class _Watched(NamedTuple):
    """What can be asked on some sockets, and how it is answered where nothing is limited."""

    table: Table
    handlers: Table
    for_control: bool


class Limits:
    """What is left of each limit, for each uid; and how often each was reached."""

    def __init__(self, dispatch: Dispatch, audit: Audit, flight: InFlight) -> None:
        # By name of the limit, and of the rule whose it is.
        self.hits: dict[tuple[str, str | None], int] = {}
        self._dispatch = dispatch
        self._audit = audit
        self._flight = flight
        self._buckets = Buckets()
        self._watched: list[_Watched] = []
        self._opens: Rate | None = None

    def watch(self, table: Table, *, for_control: bool = False) -> None:
        """Limit what can be asked by this table; it has all its entries."""
        self._watched.append(_Watched(table, dict(table), for_control))

    def follow(self, rule_set: RuleSet) -> None:
        """Limit by this policy from now on; what it does not limit costs nothing."""
        settings = rule_set.settings
        rate, idle = settings.requests, settings.idle_timeout is not None
        self._opens = settings.opens
        opens = settings.opens is not None or any(rule.limits is not None for rule in rule_set.rules)
        self._dispatch.open_limits = self if opens else None
        self._flight.limit_uids(settings.in_flight_per_uid)
        for table, handlers, for_control in self._watched:
            for kind, handler in handlers.items():
                table[kind] = handler
                if rate is not None and kind not in _NOT_COUNTED:
                    table[kind] = self._limited(handler, rate, for_control=for_control)
                if idle:
                    table[kind] = _noted(table[kind])
        # Names of rules that are gone must not pile up.
        names = {None, *(rule.name for rule in rule_set.rules)}
        self.hits = {key: count for key, count in self.hits.items() if key[1] in names}

    def hit(self, limit: str, rule: Rule | None = None, count: int = 1) -> None:
        """Count that a limit was reached."""
        key = limit, None if rule is None else rule.name
        self.hits[key] = self.hits.get(key, 0) + count

    def document(self) -> list[dict[str, object]]:
        """Return the counts, for the status."""
        return [{"limit": limit, "rule": rule, "count": count} for (limit, rule), count in self.hits.items()]

    def _limited(self, handler: Handler, rate: Rate, *, for_control: bool) -> Handler:
        """Return a handler that answers so many requests a second."""
        take = self._buckets.take

        def answer(client: Client, request: Request, objection: str | None) -> Answer | None:
            uid, now = self._uid_of(client, request), time.monotonic_ns()
            if take(rate, uid, 1, now) or (for_control and uid == 0):
                return handler(client, request, objection)
            return self._refuse_request(client, request, rate, uid, now)

        return answer

    def _uid_of(self, client: Client, request: Request) -> int:
        """Return whose request it is: of a client that is acted for, or of who asks."""
        number = getattr(request, "client", None)
        if number is not None:
            served = self._dispatch.served(client, number)
            if served is not None:
                return served.peer.uid
        return client.peer.uid

    def _refuse_request(self, client: Client, request: Request, rate: Rate, uid: int, now: int) -> Answer:
        """Say that it comes too soon, and record it: once, however many paths it names."""
        wait = self._buckets.wait(rate, uid, now)
        reached = _reached(Limit.REQUESTS_PER_SECOND, rate.per_second, wait)
        self.hit("requests_per_second")
        number, request_id = getattr(request, "client", None), request.id
        members = member_text(
            request=request_id,
            generation=self._dispatch.generation.number,
            action=type(request).__name__.removesuffix("Request").lower(),
            paths=len(getattr(request, "paths", ())),
            reason="requests_per_second",
            limit=reached.value,
            retry_after_ms=reached.retry_after,
        )
        self._audit.event("request_refused", f"{self._dispatch.who(client, number)},{members}")
        text = f"uid {uid} may ask {rate.per_second} times a second (requests_per_second)"
        return self._dispatch.error(request_id, Kind.REFUSED, Reason.LIMIT, text, reached), []

    # Opens

    def admit(self, asker: Asker, wanted: int) -> int:
        """Take so many opens of who asks; return how many of them there were."""
        if self._opens is None:
            return wanted
        return self._buckets.take(self._opens, account_of(asker), wanted, time.monotonic_ns())

    def refusals(self, asker: Asker, count: int) -> list[Outcome]:
        """Return the outcomes for those paths that were not admitted."""
        if not count:
            return []
        assert self._opens is not None  # noqa: S101 - for the type checker: it admitted less
        wait = self._buckets.wait(self._opens, account_of(asker), time.monotonic_ns())
        self.hit("opens_per_second", None, count)
        return [_refusal(_reached(Limit.OPENS_PER_SECOND, self._opens.per_second, wait))] * count

    def too_many_in_flight(self, client: Client, count: int) -> Outcome | None:
        """Return the outcome for a reply that has no place in what its uid may have; None: nor in all."""
        if self._flight.has_share(client, count):
            return None
        self.hit("in_flight_per_uid", None, count)
        return _refusal(LimitReached(Limit.IN_FLIGHT_PER_UID, self._flight.most_per_uid, 0))

    def charge(
        self,
        asker: Asker,
        outcomes: list[Outcome],
        descriptors: list[int],
        copies: list[bytes],
        elsewhere: Collection[int] = (),
    ) -> Shares:
        """Take what is given from the rules that give it; take back from the answer what is too much.

        `elsewhere`: places of outcomes whose descriptors are not among `descriptors`.
        Return for which rules the rest counts as under way.
        """
        given_by = _given_by(outcomes)
        if not given_by:
            return _NO_SHARES
        uid, shares = account_of(asker), []
        refused = self._above_requests(given_by, uid)
        for (rule, limits), places in given_by.items():
            if places[0] in refused:
                continue
            kept = self._keep(rule, limits, uid, places, outcomes, refused)
            if kept and limits.in_flight is not None:
                shares.append(((rule.name, uid), kept))
        if refused:
            _take_out(refused, outcomes, descriptors, copies, elsewhere)
        return tuple(shares)

    def charge_request(self, asker: Asker, outcomes: list[Outcome]) -> None:
        """Take one request from each rule by which something is told; refuse what is told above its rate."""
        for place, refusal in self._above_requests(_given_by(outcomes), account_of(asker)).items():
            outcomes[place] = refusal

    def _above_requests(
        self, given_by: Mapping[tuple[Rule, RuleLimits], Sequence[int]], uid: int
    ) -> dict[int, Outcome]:
        """Take one request from each rule; return the refusals for what those give that have none left."""
        refused: dict[int, Outcome] = {}
        for (rule, limits), places in given_by.items():
            rate, now = limits.requests, time.monotonic_ns()
            if rate is not None and not self._buckets.take(rate, uid, 1, now):
                wait = self._buckets.wait(rate, uid, now)
                reached = _reached(Limit.RULE_REQUESTS_PER_SECOND, rate.per_second, wait)
                refused.update(dict.fromkeys(places, _refusal(reached, rule)))
                self.hit("rule_requests_per_second", rule)
        return refused

    def _keep(
        self,
        rule: Rule,
        limits: RuleLimits,
        uid: int,
        places: Sequence[int],
        outcomes: Sequence[Outcome],
        refused: dict[int, Outcome],
    ) -> int:
        """Note in `refused` what a rule does not give; return how many descriptors it does."""
        described = [place for place in places if outcomes[place].result is GIVEN]
        if limits.in_flight is not None:
            room = max(0, self._flight.room_of_rule(rule.name, uid, limits.in_flight, len(described)))
            beyond = described[room:]
            if beyond:
                reached = LimitReached(Limit.RULE_IN_FLIGHT, limits.in_flight, 0)
                refused.update(dict.fromkeys(beyond, _refusal(reached, rule)))
                self.hit("rule_in_flight", rule, len(beyond))
        if limits.opens is not None:
            now = time.monotonic_ns()
            rest = [place for place in places if place not in refused]
            beyond = rest[self._buckets.take(limits.opens, uid, len(rest), now) :]
            if beyond:
                wait = self._buckets.wait(limits.opens, uid, now)
                reached = _reached(Limit.RULE_OPENS_PER_SECOND, limits.opens.per_second, wait)
                refused.update(dict.fromkeys(beyond, _refusal(reached, rule)))
                self.hit("rule_opens_per_second", rule, len(beyond))
        return sum(place not in refused for place in described)

    # Walks, which wait instead of being refused

    def room(self, asker: Asker) -> int:
        """Return how many files who asks may open now."""
        return self._room(self._opens, account_of(asker))

    def room_of(self, asker: Asker, rule: Rule) -> int:
        """Return how many files a rule gives to who asks now."""
        limits, uid = rule.limits, account_of(asker)
        if limits is None:
            return _UNLIMITED
        if self._has_no_request(limits, uid):
            return 0
        room = self._room(limits.opens, uid)
        if limits.in_flight is not None:
            room = min(room, max(0, self._flight.room_of_rule(rule.name, uid, limits.in_flight, MAX_PATHS)))
        return room

    def _room(self, rate: Rate | None, uid: int) -> int:
        """Return how many are left; none where they are few: they would come one by one."""
        if rate is None:
            return _UNLIMITED
        left = self._buckets.left(rate, uid, time.monotonic_ns())
        return left if left >= min(rate.burst, max(1, rate.burst // 4), _WORTH_A_FRAME) else 0

    def _has_no_request(self, limits: RuleLimits, uid: int) -> bool:
        rate = limits.requests
        return rate is not None and not self._buckets.left(rate, uid, time.monotonic_ns())

    def held_back(self, asker: Asker, rule: Rule | None) -> None:
        """Count that a walk has to wait: for what `rule` gives, or for what its uid may open in all."""
        limits = None if rule is None else rule.limits
        if limits is None:
            self.hit("opens_per_second")
        elif self._has_no_request(limits, account_of(asker)):
            self.hit("rule_requests_per_second", rule)
        elif limits.opens is not None:
            self.hit("rule_opens_per_second", rule)
        else:
            self.hit("rule_in_flight", rule)

    def charge_walk(self, asker: Asker, opened_by: Mapping[Rule, int], count: int) -> Shares:
        """Take what one frame of a walk gives: `count` in all, and by rules. Return as `charge`."""
        uid, now, shares = account_of(asker), time.monotonic_ns(), []
        if self._opens is not None:
            self._buckets.take(self._opens, uid, count, now)
        for rule, number in opened_by.items():
            limits = rule.limits
            if limits is None:
                continue
            if limits.requests is not None:
                self._buckets.take(limits.requests, uid, 1, now)
            if limits.opens is not None:
                self._buckets.take(limits.opens, uid, number, now)
            if limits.in_flight is not None:
                shares.append(((rule.name, uid), number))
        return tuple(shares)


def account_of(asker: Asker) -> int:
    """Return whose limits hold: those of the client that is acted for, or of who asks."""
    return asker.uid if asker.on_behalf_of_uid is None else asker.on_behalf_of_uid


def _given_by(outcomes: Sequence[Outcome]) -> dict[tuple[Rule, RuleLimits], list[int]]:
    """Return the places of what rules with limits give, by those."""
    given_by: dict[tuple[Rule, RuleLimits], list[int]] = {}
    for place, outcome in enumerate(outcomes):
        rule = outcome.rule
        if rule is not None and rule.limits is not None and outcome.reason == "ok":
            given_by.setdefault((rule, rule.limits), []).append(place)
    return given_by


def _noted(handler: Handler) -> Handler:
    """Return a handler that notes when it is called."""

    def answer(client: Client, request: Request, objection: str | None) -> Answer | None:
        client.last_request = time.monotonic()
        return handler(client, request, objection)

    return answer


def _reached(limit: Limit, value: int, wait: int) -> LimitReached:
    """Return what is said of a limit; `wait` in nanoseconds."""
    return LimitReached(limit, value, max(1, -(-wait // 1_000_000)))


def _refusal(reached: LimitReached, rule: Rule | None = None) -> Outcome:
    outcome = Outcome(limited(reached), reached.limit.name.lower(), rule)
    outcome.record += f",{member_text(limit=reached.value, retry_after_ms=reached.retry_after)}"
    return outcome


def _take_out(
    refused: Mapping[int, Outcome],
    outcomes: list[Outcome],
    descriptors: list[int],
    copies: list[bytes],
    elsewhere: Collection[int],
) -> None:
    """Refuse what was opened or copied, by its place; its descriptors are closed."""
    kept: list[int] = []
    dropped: list[int] = []
    kept_copies = []
    opened, copied = iter(descriptors), iter(copies)
    for place, outcome in enumerate(outcomes):
        if outcome.result.status is Status.COPIED:
            copy = next(copied)
            if place not in refused:
                kept_copies.append(copy)
        elif outcome.result is GIVEN and place not in elsewhere:
            (dropped if place in refused else kept).append(next(opened))
    for place, outcome in refused.items():
        outcomes[place] = outcome
    copies[:] = kept_copies
    descriptors[:] = kept
    close_all(dropped)
