"""Files for outside engines: whatever a session does, no file is clean without its explicit answer."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fdbroker.scan.engine import EngineError, Outside, Progress, Session, SessionLostError
from fdbroker.scan.outside import Handover
from fdbroker.scan.verdict import Clean, Error, Infected, Reason, Verdict
from tests.scan.descriptors import make_and_open

if TYPE_CHECKING:
    from collections.abc import Sequence

WINDOW = 3


class FakeSession(Session):
    """Does what the test has it do."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.had: list[int] = []
        self.said: list[Progress] = []
        self.lost: SessionLostError | None = None
        self.closed = False

    def room(self) -> int:
        return WINDOW - len(self.had)

    def submit(self, number: int, descriptor: int, size: int) -> bool:
        assert not self.closed
        os.fstat(descriptor)
        if self.lost is not None:
            raise self.lost
        if self.engine.takes_nothing:
            return False
        self.had.append(number)
        return True

    def filenos(self) -> Sequence[int]:
        return ()

    def deadline(self) -> float | None:
        return time.monotonic()

    def answers(self) -> list[Progress]:
        if self.engine.answers_itself:
            self.answer(self.had[:1])
        if self.lost is not None:
            raise self.lost
        said, self.said = self.said, []
        return said

    def answer(self, numbers: Sequence[int], verdict: Verdict | None = None) -> None:
        for number in list(numbers):
            self.said.append(Progress(number, verdict or self.engine.verdicts.get(number, Clean())))
            if number in self.had:
                self.had.remove(number)

    def close(self) -> None:
        self.closed = True


class FakeEngine(Outside):
    name = "fake"
    options_type = object

    def __init__(self) -> None:
        super().__init__(None)
        self.sessions: list[FakeSession] = []
        self.verdicts: dict[int, Verdict] = {}
        self.down = False
        self.takes_nothing = False
        self.answers_itself = False
        # What loses every session that has it.
        self.poison: set[int] = set()

    def version(self) -> str:
        return "fake"

    def connect(self) -> FakeSession:
        if self.down:
            raise EngineError("it is down")
        self.sessions.append(FakeSession(self))
        return self.sessions[-1]

    @property
    def session(self) -> FakeSession:
        return self.sessions[-1]


class File(NamedTuple):
    path: Path
    descriptor: int
    stamp: tuple[int, int, int]


def stamp(descriptor: int) -> tuple[int, int, int]:
    facts = os.fstat(descriptor)
    return facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns


VERDICTS = st.sampled_from([Clean(), Infected("Bad"), Error(Reason.ENGINE_FAILED, "no")])


class Events(RuleBasedStateMachine):
    """Any order of files, answers (right, wrong, twice), losses, refusals, and changes of files."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.engine = FakeEngine()
        self.handover = Handover(self.engine)
        self.files: dict[int, File] = {}
        self.verdicts: dict[int, Verdict] = {}
        self.explicitly_clean: set[int] = set()

    @rule()
    def submit(self) -> None:
        number = len(self.files)
        path = Path(self.directory.name) / str(number)
        descriptor = make_and_open(path)
        self.files[number] = File(path, descriptor, stamp(descriptor))
        self.handover.submit(number, descriptor)

    @precondition(lambda self: self.engine.sessions)
    @rule(which=st.integers(0, WINDOW), verdict=VERDICTS)
    def answer(self, which: int, verdict: Verdict) -> None:
        session = self.engine.session
        if which < len(session.had) and session.lost is None:
            if isinstance(verdict, Clean):
                self.explicitly_clean.add(session.had[which])
            session.answer([session.had[which]], verdict)

    @precondition(lambda self: self.engine.sessions)
    @rule(number=st.integers(0, 20))
    def answer_for_a_file_that_it_does_not_have(self, number: int) -> None:
        session = self.engine.session
        if number not in session.had:
            session.said.append(Progress(number, Clean()))

    @precondition(lambda self: self.engine.sessions)
    @rule(reason=st.sampled_from([Reason.CRASHED, Reason.TIMED_OUT]))
    def lose_the_session(self, reason: Reason) -> None:
        self.engine.session.lost = SessionLostError(reason, "lost")

    @rule(down=st.booleans(), takes_nothing=st.booleans())
    def go_down_or_up(self, down: bool, takes_nothing: bool) -> None:  # noqa: FBT001 - of hypothesis
        self.engine.down, self.engine.takes_nothing = down, takes_nothing

    @precondition(lambda self: self.files)
    @rule(which=st.integers(0, 20), how=st.sampled_from(["cut", "grow", "times"]))
    def change_a_file(self, which: int, how: str) -> None:
        path = self.files[which % len(self.files)].path
        if how == "times":
            os.utime(path, (1, 1))
        else:
            os.truncate(path, 3 if how == "cut" else 100)

    @rule()
    def collect(self) -> None:
        self.take(self.handover.answers())

    def take(self, done: Sequence[Progress]) -> None:
        for number, verdict in done:
            assert number not in self.verdicts, "answered twice"
            self.verdicts[number] = verdict
            file = self.files[number]
            if isinstance(verdict, Clean):
                assert number in self.explicitly_clean
                assert stamp(file.descriptor) == file.stamp

    @invariant()
    def what_is_not_answered_is_under_way(self) -> None:
        under_way = set(self.handover._files) | {one.number for one in self.handover._done}
        assert under_way | set(self.verdicts) == set(self.files)

    def teardown(self) -> None:
        self.engine.answers_itself = True
        self.engine.takes_nothing = self.engine.down = False
        # By now what the session says by itself is explicit.
        self.explicitly_clean |= set(self.files)
        self.take(self.handover.finish())
        assert self.verdicts.keys() == self.files.keys()
        self.handover.close()
        assert all(session.closed for session in self.engine.sessions)
        for file in self.files.values():
            os.close(file.descriptor)
        self.directory.cleanup()


TestEvents = Events.TestCase
TestEvents.settings = settings(max_examples=60, stateful_step_count=30)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


def submit_all(handover: Handover, directory: Path, count: int) -> list[int]:
    descriptors = [make_and_open(directory / str(number)) for number in range(count)]
    for number, descriptor in enumerate(descriptors):
        handover.submit(number, descriptor)
    return descriptors


def test_the_file_that_loses_each_session_has_the_error_and_the_others_their_answers(
    engine: FakeEngine, tmp_path: Path
) -> None:
    class Poisoned(FakeSession):
        def answers(self) -> list[Progress]:
            if 1 in self.had:
                raise SessionLostError(Reason.CRASHED, "lost")
            self.answer(list(self.had))
            return super().answers()

    def connect() -> Poisoned:
        engine.sessions.append(Poisoned(engine))
        return engine.sessions[-1]  # type: ignore[return-value]

    engine.connect = connect  # type: ignore[method-assign]
    with Handover(engine) as handover:
        descriptors = submit_all(handover, tmp_path, 5)
        verdicts = dict(handover.finish())
    assert verdicts == {
        0: Clean(),
        1: Error(Reason.CRASHED, "lost"),
        2: Clean(),
        3: Clean(),
        4: Clean(),
    }
    assert all(session.closed for session in engine.sessions)
    for descriptor in descriptors:
        os.close(descriptor)


def test_an_engine_that_is_down_makes_every_file_an_error(engine: FakeEngine, tmp_path: Path) -> None:
    engine.down = True
    with Handover(engine) as handover:
        descriptors = submit_all(handover, tmp_path, 2)
        assert handover.finish() == [
            Progress(number, Error(Reason.NOT_LOADED, "it is down")) for number in range(2)
        ]
    for descriptor in descriptors:
        os.close(descriptor)


def test_a_session_that_takes_nothing_though_it_has_room_keeps_nobody_waiting(
    engine: FakeEngine, tmp_path: Path
) -> None:
    with Handover(engine) as handover:
        descriptors = submit_all(handover, tmp_path, 1)
        engine.session.answer([0])
        assert handover.answers() == [Progress(0, Clean())]
        engine.takes_nothing = True
        handover.submit(1, descriptors[0])
        assert handover.deadline() == 0.0, "there is something to be told"
        assert handover.answers() == [Progress(1, Error(Reason.ENGINE_FAILED, "the engine takes no file"))]
    os.close(descriptors[0])


def test_a_number_that_is_under_way_is_refused(engine: FakeEngine, tmp_path: Path) -> None:
    with Handover(engine) as handover:
        [descriptor] = submit_all(handover, tmp_path, 1)
        with pytest.raises(ValueError, match="file 0 is under way"):
            handover.submit(0, descriptor)
        assert handover.room() == WINDOW - 1
    os.close(descriptor)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [(os.O_WRONLY, Reason.NOT_READABLE), (os.O_PATH, Reason.NOT_READABLE)],
)
def test_what_can_not_be_read_never_gets_to_the_engine(
    flags: int, reason: Reason, engine: FakeEngine, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"x")
    descriptor = os.open(tmp_path / "file", flags | os.O_CLOEXEC)
    with Handover(engine) as handover:
        handover.submit(0, descriptor)
        [(_, verdict)] = handover.finish()
    os.close(descriptor)
    assert isinstance(verdict, Error)
    assert verdict.reason is reason
    assert engine.sessions == []


def test_what_is_no_file_never_gets_to_the_engine(engine: FakeEngine, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    with Handover(engine) as handover:
        for number, descriptor in enumerate((reader, os.open(tmp_path, os.O_RDONLY | os.O_CLOEXEC), 999)):
            handover.submit(number, descriptor)
            if descriptor != 999:
                os.close(descriptor)
        reasons = [verdict.reason for _, verdict in handover.finish() if isinstance(verdict, Error)]
    os.close(writer)
    assert reasons == [Reason.NOT_REGULAR, Reason.NOT_REGULAR, Reason.READ_FAILED]
