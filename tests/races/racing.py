"""One race: a broker, an attacker, a client that looks at all it is given, and a careless opener beside it.

What is right is said by inode: a file that the client gets is one of those it
may have, or the broker was wrong. The careless opener does the same as root
under the same attack, checks before it opens, and must be caught: a race in
which nobody can be caught proves nothing.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fdbroker.wire.client import ListReply, OpenReply, encode_list, encode_open
from fdbroker.wire.format import Status
from tests.broker.speaking import Speaker
from tests.processes import in_child
from tests.races.attacking import VICTIMS_CPU, attacking
from tests.running_broker import CLIENT_UID, policy, running_broker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from tests.races.attacking import Attack
    from tests.running_broker import RunningBroker

LONG = os.environ.get("FDBROKER_RACES") == "long"
LEAST_OPENS = 40_000 if LONG else 3_000
LEAST_LISTS = 20_000 if LONG else 1_000
LEAST_STEPS = 20_000 if LONG else 2_000
SECONDS = 300 if LONG else 60  # more than any machine should need
GOOD, SECRET = b"good", b"secret"
_BATCH = 64

Inode = tuple[int, int]


@dataclass
class Tally:
    """What became of the tries of a client or of a careless opener."""

    tries: int = 0
    good: int = 0
    wrong: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    steps: int = 0  # of the attacker meanwhile

    def __str__(self) -> str:
        reasons = "".join(f", {count:,} {reason}" for reason, count in self.refused.most_common())
        return f"{self.tries:,} tries: {self.wrong:,} wrong, {self.good:,} good{reasons}"


@dataclass(frozen=True)
class Place:
    """Where a race is run: a tree that is served, what lies outside of it, and the broker's own files."""

    tree: Path
    outside: Path
    broker: Path


@dataclass(frozen=True)
class Race:
    """One race. `steps` are the attacker's, `attacker` its uid.

    `ask` makes a client ask the broker once and count; `careless` makes one
    try in its own way and says whether what it got was right, or None if it
    got nothing. `least`: how often a client asks at least, and `least_steps`
    how often the attacker does something meanwhile. `meets`: a reason that the
    client is told sooner or later; it asks until then.
    """

    steps: Sequence[Callable[[], None]]
    attacker: int
    ask: Callable[[Speaker, Tally], None]
    careless: Callable[[], bool | None]
    rules: Sequence[dict[str, Any]] = ()
    least: int = LEAST_OPENS
    least_steps: int = LEAST_STEPS
    meets: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What a race showed; `reasons` are those of the audit."""

    broker: Tally
    careless: Tally
    reasons: Counter[str]

    def __str__(self) -> str:
        hidden = "".join(f" {reason} {count:,}" for reason, count in self.reasons.most_common())
        return (
            f"fdbroker {self.broker}, {self.broker.steps:,} steps of the attacker;"
            f" audit:{hidden}; careless opener {self.careless}"
        )


def put(path: Path, content: bytes, uid: int) -> Inode:
    """Make a file that only `uid` can read, and return its inode."""
    path.write_bytes(content)
    os.chown(path, uid, uid)
    path.chmod(0o600)
    return inode_of(path.stat())


def inode_of(facts: os.stat_result) -> Inode:
    """Return what a file is known by, whatever it is called."""
    return facts.st_dev, facts.st_ino


@contextlib.contextmanager
def broker_for(place: Place, rules: Sequence[dict[str, Any]]) -> Iterator[RunningBroker]:
    """Run a broker for the tree, away from the attacker's CPU."""
    with contextlib.ExitStack() as stack:
        cpus = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {VICTIMS_CPU})  # it is forked from here
        try:
            broker = stack.enter_context(running_broker(place.broker, policy(place.tree, *rules)))
        finally:
            os.sched_setaffinity(0, cpus)
        yield broker


def run(place: Place, race: Race) -> Outcome:
    """Run a race and check what has to hold in each: nothing wrong, much right, and the careless caught."""
    with broker_for(place, race.rules) as broker:
        with attacking(*race.steps, uid=race.attacker) as attack:
            tally = in_child(lambda: _ask_often(broker, race, attack), uid=CLIENT_UID)
            careless = in_child(lambda: try_often(race.careless, attack))
        reasons = Counter(record["reason"] for record in broker.decisions())
    outcome = Outcome(tally, careless, reasons)
    assert tally.wrong == 0, outcome
    assert tally.tries >= race.least, outcome
    assert tally.good > tally.tries / 100, outcome
    assert careless.wrong > 0, outcome
    return outcome


def _ask_often(broker: RunningBroker, race: Race, attack: Attack) -> Tally:
    os.sched_setaffinity(0, {VICTIMS_CPU})
    tally = Tally()
    before = attack.steps
    with Speaker.connect(broker.socket) as speaker:
        end = time.monotonic() + SECONDS
        while (
            tally.tries < race.least
            or attack.steps - before < race.least_steps
            or not tally.good
            or (race.meets is not None and race.meets not in tally.refused)
        ):
            race.ask(speaker, tally)
            assert time.monotonic() < end, f"{tally}, {attack.steps - before} steps"
    tally.steps = attack.steps - before
    return tally


def try_often(careless: Callable[[], bool | None], attack: Attack) -> Tally:
    """Try in a careless way until caught."""
    os.sched_setaffinity(0, {VICTIMS_CPU})
    tally = Tally()
    before = attack.steps
    end = time.monotonic() + SECONDS
    while not tally.wrong and time.monotonic() < end:
        for _ in range(100):
            tally.tries += 1
            try:
                right = careless()
            except OSError as error:
                tally.refused[type(error).__name__] += 1
                continue
            if right is None:
                tally.refused["refused"] += 1
            elif right:
                tally.good += 1
            else:
                tally.wrong += 1
    tally.steps = attack.steps - before
    return tally


def asking_to_open(good: set[Inode], *paths: Path) -> Callable[[Speaker, Tally], None]:
    """Return what asks for `paths` in batches and looks at every descriptor."""
    names = [bytes(path) for path in paths]
    request = encode_open(1, names * (_BATCH // len(names)))

    def ask(speaker: Speaker, tally: Tally) -> None:
        answer = speaker.ask(request)
        with answer.descriptors as descriptors:
            reply = answer.reply
            assert isinstance(reply, OpenReply), reply
            numbers = descriptors.numbers()
            given = [result for result in reply.results if result.status is Status.GIVEN]
            assert len(numbers) == len(given)
            for number in numbers:
                if is_right(number, good):
                    tally.good += 1
                else:
                    tally.wrong += 1
        tally.tries += len(reply.results)
        tally.refused.update(
            result.reason.name.lower() for result in reply.results if result.status is not Status.GIVEN
        )

    return ask


def asking_to_list(good: set[bytes], path: Path) -> Callable[[Speaker, Tally], None]:
    """Return what asks for a directory whose names are known, whole or in part."""
    request = encode_list(1, bytes(path))

    def ask(speaker: Speaker, tally: Tally) -> None:
        reply = speaker.ask(request).reply
        assert isinstance(reply, ListReply), reply
        tally.tries += 1
        if reply.result.status is not Status.GIVEN:
            tally.refused[reply.result.reason.name.lower()] += 1
        elif {entry.name for entry in reply.entries} <= good:
            tally.good += bool(reply.entries)
        else:
            tally.wrong += 1

    return ask


def is_right(descriptor: int, good: set[Inode]) -> bool:
    """Return whether this is one of the files that may be had, by inode and by content."""
    inode, content = inode_of(os.fstat(descriptor)), os.pread(descriptor, 64, 0)
    assert content in {GOOD, SECRET}
    assert (content == GOOD) is (inode in good)
    return inode in good
