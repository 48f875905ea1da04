"""Whose file is next, and what a pool makes of it: with supervisors that do what hypothesis wants."""

from __future__ import annotations

import os
from collections import deque
from typing import TYPE_CHECKING, Any, ClassVar
from unittest import mock

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fdbroker.scan import pool as pool_module
from fdbroker.scan.plugins import configure
from fdbroker.scan.pool import Pool
from fdbroker.scan.stamps import Stamp
from fdbroker.scan.supervisor import Done, Loaded
from fdbroker.scan.turns import FILES_OF_A_TURN, Source, Turns
from fdbroker.scan.verdict import Answer, Clean, Error, Infected, Reason, Verdict
from tests.scan.descriptors import open_descriptors

if TYPE_CHECKING:
    from collections.abc import Callable

    from fdbroker.kernel.descriptors import Descriptors

WINDOW = 4
USERS = (1, 2, 3)
OWNERS = (11, 12)


def test_users_have_turns_however_many_files_they_have() -> None:
    turns: Turns[str] = Turns()
    sources = [Source(1), Source(2), Source(3)]
    for number in range(100):
        turns.add(sources[0], f"a{number}")
    turns.add(sources[1], "b")
    turns.add(sources[2], "c")
    taken = [turns.take(turns.users()[0]) for _ in range(4)]
    assert taken == ["a0", "b", "c", "a1"]
    assert turns.count == 98


def test_clients_of_a_user_have_turns_of_some_files() -> None:
    turns: Turns[int] = Turns()
    first, second = Source(1), Source(1)
    for number in range(100):
        turns.add(first, number)
    turns.add(second, -1)
    taken = [turns.take(1) for _ in range(FILES_OF_A_TURN + 2)]
    assert taken == [*range(FILES_OF_A_TURN), -1, FILES_OF_A_TURN]


def test_held_client_has_no_turn_and_the_others_of_its_user_have() -> None:
    turns: Turns[str] = Turns()
    held, other = Source(1), Source(1)
    held.held = True
    turns.add(held, "held")
    assert turns.users() == []
    assert turns.first(1) is None
    with pytest.raises(KeyError):
        turns.take(1)
    turns.add(other, "other")
    assert turns.take(1) == "other"
    held.held = False
    assert turns.take(1) == "held"


def test_what_is_removed_is_gone_and_the_rest_keeps_its_order() -> None:
    turns: Turns[int] = Turns()
    source = Source(1)
    for number in range(6):
        turns.add(source, number)
    assert turns.remove(source, lambda number: number % 2 == 0) == [0, 2, 4]
    assert turns.remove(Source(1), lambda _: True) == []
    assert turns.clear() == [1, 3, 5]
    assert turns.count == 0


class PuppetSupervisor:
    """Stands in for a `Supervisor`: answers when the test wants it, and notes whose files each worker had."""

    made: ClassVar[list[PuppetSupervisor]] = []
    look_up: ClassVar[Callable[[bytes], tuple[int, int]]]

    def __init__(self, engines: object, **_options: object) -> None:
        self.group = 2
        self.workers_started = 0
        self.files: deque[tuple[bytes, int, Stamp]] = deque()
        self.answers: deque[tuple[bytes, int, Stamp, Verdict]] = deque()
        self.domains: set[tuple[int, int]] = set()  # of the worker that there is now
        PuppetSupervisor.made.append(self)

    @property
    def under_way(self) -> int:
        return len(self.files) + len(self.answers)

    def enqueue(self, name: bytes, file: Descriptors, before: Stamp) -> None:
        self.workers_started += not self.domains
        self.domains.add(PuppetSupervisor.look_up(name))
        assert len(self.domains) == 1, "a worker has files of two domains"
        self.files.append((name, file.take(), before))

    def answer(self, verdict: Verdict) -> None:
        if self.files:
            self.answers.append((*self.files.popleft(), verdict))

    def advance(self, least: int = 1) -> list[Done]:
        done = []
        while self.answers:
            name, descriptor, before, verdict = self.answers.popleft()
            os.close(descriptor)
            done.append(Done(name, before.size, verdict, (Answer("hashes", verdict),)))
        return done

    def start_anew(self) -> None:
        self.replace_worker()

    def replace_worker(self) -> None:
        while self.answers:  # that nobody had received
            name, descriptor, before, _ = self.answers.pop()
            self.files.appendleft((name, descriptor, before))
        self.domains.clear()
        for name, _, _ in self.files:
            self.domains.add(PuppetSupervisor.look_up(name))

    def abandon(self) -> None:
        for file in self.files:
            os.close(file[1])
        for answer in self.answers:
            os.close(answer[1])
        self.files.clear()
        self.answers.clear()
        self.domains.clear()

    close = abandon

    def adopt(self, _loaded: Loaded) -> None:
        self.replace_worker()

    def fileno(self) -> int | None:
        return 0 if self.files else None

    def watched(self) -> tuple[int, object]:
        return 0, self.workers_started

    def deadline(self) -> float:
        return 0.0

    def spawn_from_zygote(self) -> None:
        raise AssertionError("nobody starts a worker here")


class Scans(RuleBasedStateMachine):
    """Clients hand in files, workers answer or die; whoever waits is served in time."""

    @initialize(jobs=st.integers(1, 2), spare=st.integers(0, 1))
    def begin(self, jobs: int, spare: int) -> None:
        self.before = open_descriptors()
        self.patches: list[Any] = [
            mock.patch.object(pool_module, "Supervisor", PuppetSupervisor),
            mock.patch.object(pool_module, "DEFAULT_WINDOW", WINDOW),
            mock.patch.object(pool_module, "admit", lambda descriptor: self.stamps[descriptor]),
        ]
        for patch in self.patches:
            patch.start()
        PuppetSupervisor.made = []
        PuppetSupervisor.look_up = self._domain_of
        self.stamps: dict[int, Stamp] = {}
        self.pool = Pool([configure("hashes")], jobs=jobs, spare=spare)
        self.lanes = PuppetSupervisor.made
        self.sources = [Source(user) for user in USERS for _ in range(2)]
        self.waiting: dict[int, Source] = {}  # tickets without a verdict
        self.sources_of: dict[int, Source] = {}
        self.owners: dict[int, int] = {}
        self.told: dict[int, Verdict] = {}
        self.said: dict[int, Verdict] = {}  # by engines, of the last worker that had the file
        self.last = 0

    def _domain_of(self, name: bytes) -> tuple[int, int]:
        ticket = int(name)
        return self.sources_of[ticket].user, self.owners[ticket]

    @rule(which=st.integers(0, 5), owners=st.lists(st.sampled_from(OWNERS), min_size=1, max_size=10))
    def hand_in(self, which: int, owners: list[int]) -> None:
        for owner in owners:
            self.last += 1
            descriptor = os.open("/dev/null", os.O_RDONLY)
            self.stamps[descriptor] = Stamp(10, 0, 0, owner)
            self.waiting[self.last] = self.sources_of[self.last] = self.sources[which]
            self.owners[self.last] = owner
            self.pool.enqueue(self.sources[which], self.last, b"%d" % self.last, descriptor)
        self._go_on()

    @rule(
        which=st.integers(0, 2),
        count=st.integers(1, 5),
        verdict=st.sampled_from([Clean(), Error(Reason.CRASHED, "x")]),
    )
    def answer(self, which: int, count: int, verdict: Verdict) -> None:
        lane = self.lanes[which % len(self.lanes)]
        for _ in range(count):
            if lane.files:
                self.said[int(lane.files[0][0])] = verdict
                lane.answer(verdict)
        self._go_on()

    @rule(which=st.integers(0, 2))
    def worker_dies(self, which: int) -> None:
        self.lanes[which % len(self.lanes)].replace_worker()
        self._go_on()

    @rule()
    def renew(self) -> None:
        self.pool.adopt(mock.sentinel.loaded)
        self._go_on()

    @rule(which=st.integers(0, 5), held=st.booleans())
    def hold(self, which: int, held: bool) -> None:  # noqa: FBT001 - hypothesis calls it
        self.sources[which].held = held
        self._go_on()

    @rule(which=st.integers(0, 5), parity=st.integers(0, 2))
    def cancel(self, which: int, parity: int) -> None:
        source = self.sources[which]

        def wanted(ticket: object) -> bool:
            return isinstance(ticket, int) and (parity == 2 or ticket % 2 == parity)

        dropped = self.pool.cancel(source, wanted)
        expected = {ticket for ticket, whose in self.waiting.items() if whose is source and wanted(ticket)}
        assert set(dropped) == expected, "all that had no verdict, and nothing else"
        assert len(dropped) == len(expected)
        for ticket in expected:
            del self.waiting[ticket]
        self._go_on()

    def _go_on(self) -> None:
        for one in self.pool.advance():
            assert isinstance(one.ticket, int)
            assert self.waiting.pop(one.ticket) is one.source, "one verdict each, for who handed it in"
            assert one.done.verdict == self.said[one.ticket], "what an engine said of this very file"
            self.told[one.ticket] = one.done.verdict

    @precondition(lambda self: hasattr(self, "pool"))
    @rule(busy=st.integers(0, 5))
    def whoever_waits_is_served_before_others_have_had_much(self, busy: int) -> None:
        """One file after the other is answered, so that no worker is ever without; and one user has many."""
        for source in self.sources:
            source.held = False
        self.hand_in(busy, [OWNERS[0]] * 20 * WINDOW)
        pending = {whose.user for whose in self.waiting.values()}
        before = {user: self._waiting_of(user) for user in pending}
        # Those that are ahead have their turns first, each a window at most beside what was under way.
        for _ in range(2 * len(pending) * WINDOW + WINDOW):
            for lane in self.lanes:
                if lane.files:
                    self.said[int(lane.files[0][0])] = Clean()
                    lane.answer(Clean())
            self._go_on()
        for user in pending:
            assert self._waiting_of(user) < before[user], f"user {user} had no turn"

    def _waiting_of(self, user: int) -> int:
        return sum(whose.user == user for whose in self.waiting.values())

    @invariant()
    def counts_agree(self) -> None:
        if hasattr(self, "pool"):
            assert self.pool.waiting + self.pool.under_way >= len(self.waiting)
            for lane in self.pool._lanes:
                assert len(lane.files) == lane.supervisor.under_way
                assert lane.bytes == 10 * len(lane.files)

    @invariant()
    def spare_workers_are_for_those_who_have_none(self) -> None:
        if hasattr(self, "pool"):
            for user in USERS:
                had = [lane for lane in self.pool._lanes if lane.files and lane.domain is not None]
                mine = [lane for lane in had if lane.domain is not None and lane.domain.user == user]
                assert len(mine) <= self.pool._jobs

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            self.pool.close()
            assert open_descriptors() == self.before
            for patch in self.patches:
                patch.stop()


TestScans = Scans.TestCase
TestScans.settings = settings(max_examples=60, stateful_step_count=40)


@pytest.fixture
def puppets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a pool made with puppets, whose files are all of one owner."""
    monkeypatch.setattr(pool_module, "Supervisor", PuppetSupervisor)
    monkeypatch.setattr(PuppetSupervisor, "look_up", lambda _name: (0, 0), raising=False)
    PuppetSupervisor.made = []


@pytest.mark.usefixtures("puppets")
def test_verdicts_in_another_order_are_of_no_file() -> None:
    before = open_descriptors()
    with Pool([configure("hashes")]) as pool:
        [puppet] = PuppetSupervisor.made
        paths = (b"1", b"2", b"3", b"4")
        for path in paths:
            pool.enqueue(Source(0), path, path, os.open(__file__, os.O_RDONLY))
        assert pool.advance() == []
        puppet.answer(Clean())
        puppet.files.rotate()
        for _ in range(2):
            puppet.answer(Clean())
        finished = pool.advance()
        # The first one as well, whose verdict may be its own, and the one that has none yet.
        assert [(one.ticket, one.done.path) for one in finished] == [(path, path) for path in paths]
        assert {one.done.verdict for one in finished} == {
            Error(Reason.UNKNOWN_ANSWER, "the verdicts are not as many as the files, or in another order")
        }
        assert (pool.under_way, puppet.files) == (0, deque())
        # It goes on with what comes, by another worker.
        pool.enqueue(Source(0), b"5", b"5", os.open(__file__, os.O_RDONLY))
        assert pool.advance() == []
        puppet.answer(Clean())
        [one] = pool.advance()
        assert (one.ticket, one.done.verdict) == (b"5", Clean())
        assert puppet.workers_started == 2
    assert open_descriptors() == before


@pytest.mark.usefixtures("puppets")
def test_a_verdict_that_is_lost_makes_no_other_file_clean() -> None:
    before = open_descriptors()
    with Pool([configure("hashes")]) as pool:
        [puppet] = PuppetSupervisor.made
        for ticket in (b"1", b"2", b"3"):
            pool.enqueue(Source(0), ticket, b"", os.open(__file__, os.O_RDONLY))  # as a client without names
        assert pool.advance() == []
        puppet.answer(Infected("lost"))
        os.close(puppet.answers.pop()[1])
        puppet.answer(Clean())
        finished = pool.advance()
        assert [one.ticket for one in finished] == [b"1", b"2", b"3"]
        assert {type(one.done.verdict) for one in finished} == {Error}
        assert pool.under_way == 0
        # It goes on with what comes.
        pool.enqueue(Source(0), b"4", b"", os.open(__file__, os.O_RDONLY))
        puppet.answer(Clean())
        assert [(one.ticket, one.done.verdict) for one in pool.advance()] == [(b"4", Clean())]
    assert open_descriptors() == before
