"""What the broker counts, for those who administer it.

| what | by | counted where |
|---|---|---|
| decisions | action, reason, rule | `Decisions`, with each record |
| requests, and how long they took | transport, type | `Durations`, when the reply was sent |
| requests, paths given and refused | connection; uid | the connection's own; `OfUids` when it is gone |
| events | the name of the record | `Audit.events` |

No name here is a client's: actions, transports, types and events are the
broker's own, reasons are its own or errno's names, rules are root's. So memory
is bounded by the policy, by what is connected, and by the two numbers below.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from fdbroker.broker.audit import now_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from fdbroker.broker.connection import Client
    from fdbroker.broker.outcomes import Outcome
    from fdbroker.policy.rules import Rule
    from fdbroker.wire.messages import Request

TRANSPORTS = ("seqpacket", "stream", "datagram", "control")  # `control`: its socket, whatever its type
MOST_UIDS = 128
# Of rules that later policies do not have: beyond it they go at a reload.
MOST_NAMED = 4096

# In the counts of one type: behind the buckets by the number of bits, nanoseconds in all; and how many
# requests are not timed.
NANOSECONDS = 64
UNTIMED = 65


class Durations(dict["type[Request]", "list[int]"]):
    """How long requests of one transport took, by type: nanoseconds, each to be appended to its list.

    From the moment that the loop turned to the request to that at which its reply was with the kernel. To
    append is all that is done for each request; `settle` twice a second makes counts of it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._counts: dict[type[Request], list[int]] = {}

    def __missing__(self, kind: type[Request]) -> list[int]:
        """Begin with another type."""
        self._counts[kind] = [0] * (UNTIMED + 1)
        taken = self[kind] = []
        return taken

    def settle(self) -> dict[type[Request], list[int]]:
        """Return the counts: number n of a list is of those that took over 2**(n-1) to 2**n ns."""
        for kind, taken in self.items():
            if taken:
                counts = self._counts[kind]
                counts[NANOSECONDS] += sum(taken)
                for nanoseconds in taken:
                    counts[(nanoseconds - 1).bit_length()] += 1
                taken.clear()
        return self._counts

    def count_untimed(self, kind: type[Request], by: int = 1) -> None:
        """Count a request that has no reply, or gets it later, or several."""
        self[kind]  # there is a list of it from now on
        self._counts[kind][UNTIMED] += by


class Decisions:
    """How often each rule decided what, and why: `by_name`, by action, reason and the rule's name.

    The order of `by_name` stays; what is new comes last.
    """

    def __init__(self) -> None:
        self.by_name: dict[tuple[str, str, str | None], int] = {}
        # The same without names: of these nothing is ever given up.
        self.allowed = self.denied = 0

    def count(self, client: Client, action: str, outcomes: Sequence[Outcome]) -> None:
        """Count what was decided for a client.

        What is like what was given last is counted with the client until it is something else: see
        `Dispatch.record`, which does that all day.
        """
        self.settle(client)
        for outcome, times in Counter(outcomes).items():
            self._add(client, action, outcome, times)
        last = outcomes[-1]
        # One object stands for all that a rule gives; and none of them for another action.
        if action == "open" and last.reason == "ok":
            client.given_last = last

    def settle(self, client: Client) -> None:
        """Count what is counted with a client so far, and keep nothing of the policy that gave it."""
        last = client.given_last
        if last is not None:
            self._add(client, "open", last, client.times)
            client.given_last = None
            client.times = 0

    def _add(self, client: Client, action: str, outcome: Outcome, times: int) -> None:
        key = action, outcome.reason, None if outcome.rule is None else outcome.rule.name
        self.by_name[key] = self.by_name.get(key, 0) + times
        if outcome.reason == "ok":
            client.given += times
            self.allowed += times
        else:
            client.refused += times
            self.denied += times

    def rows(self) -> list[dict[str, object]]:
        """Return them for the status."""
        return [
            {"action": action, "rule": rule, "reason": reason, "count": count}
            for (action, reason, rule), count in self.by_name.items()
        ]

    def begin_policy(self, rules: Iterable[Rule]) -> None:
        """Make room where there is much of rules that the policy does not have any more."""
        if len(self.by_name) > MOST_NAMED:
            present: set[str | None] = {None, *(rule.name for rule in rules)}
            self.by_name = {key: count for key, count in self.by_name.items() if key[2] in present}


class OfUids:
    """Requests, paths given and paths refused by uid, of the clients that are gone."""

    def __init__(self) -> None:
        self._of: dict[int, list[int]] = {}
        self._others = [0, 0, 0]

    def add(self, client: Client) -> None:
        """Count what a client did that is gone."""
        _add_to(self._of, client)
        if len(self._of) > MOST_UIDS:
            # Half of them at once: it is not to cost anything for each of 65,536 uids that come and go.
            self._leave(self._of, MOST_UIDS // 2, self._others)

    def with_present(self, present: Iterable[Client]) -> tuple[dict[int, list[int]], list[int]]:
        """Return the counts by uid with those of clients that are there, and of all other uids together."""
        of, others = {uid: list(counts) for uid, counts in self._of.items()}, list(self._others)
        for client in present:
            _add_to(of, client)
        if len(of) > MOST_UIDS:
            self._leave(of, MOST_UIDS, others)
        return of, others

    def rows(self, present: Iterable[Client], connections_of: Mapping[int, int]) -> list[dict[str, object]]:
        """Return them for the status, those who ask most first; uid None: all others."""
        of, others = self.with_present(present)
        rows: list[dict[str, object]] = [
            {
                "uid": uid,
                "connections": connections_of.get(uid, 0),
                "requests": requests,
                "allowed": given,
                "denied": refused,
            }
            for uid, (requests, given, refused) in sorted(of.items(), key=lambda item: -item[1][0])
        ]
        requests, given, refused = others
        if requests:
            in_all = sum(connections_of.values()) - sum(connections_of.get(uid, 0) for uid in of)
            counts = {"requests": requests, "allowed": given, "denied": refused}
            rows.append({"uid": None, "connections": in_all, **counts})
        return rows

    @staticmethod
    def _leave(of: dict[int, list[int]], most: int, others: list[int]) -> None:
        """Leave those uids that asked most often; the counts of the rest go to `others`."""
        for uid in sorted(of, key=lambda uid: of[uid][0])[:-most]:
            for place, count in enumerate(of.pop(uid)):
                others[place] += count


class Counts:
    """All that is counted here. `copied`: bytes of files that were sent in replies."""

    def __init__(self) -> None:
        self.began = now_text()
        self.decisions = Decisions()
        self.durations = {transport: Durations() for transport in TRANSPORTS}
        self.of_uids = OfUids()
        self.copied = 0

    def settle_durations(self) -> None:
        """Make counts of what was appended."""
        for durations in self.durations.values():
            durations.settle()

    def leave(self, client: Client) -> None:
        """Keep what a client did that is gone."""
        self.decisions.settle(client)
        self.of_uids.add(client)

    def requests(self) -> list[dict[str, object]]:
        """Return how many requests there were and how long they took, for the status."""
        return [
            {
                "transport": transport,
                "type": kind.__name__.removesuffix("Request").lower(),
                "requests": sum(counts) - counts[NANOSECONDS],
                "timed": sum(counts[:NANOSECONDS]),
                "nanoseconds": counts[NANOSECONDS],
                # 2**n ns, by n: the buckets that are not empty.
                "by_bits": {bits: count for bits, count in enumerate(counts[:NANOSECONDS]) if count},
            }
            for transport, durations in self.durations.items()
            for kind, counts in durations.settle().items()
        ]


def _add_to(of: dict[int, list[int]], client: Client) -> None:
    counts = of.setdefault(client.peer.uid, [0, 0, 0])
    counts[0] += client.requests
    counts[1] += client.given
    counts[2] += client.refused
