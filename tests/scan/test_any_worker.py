"""A worker that says anything: no file is clean but for an answer that says so of it, whole and unchanged."""

from __future__ import annotations

import os
import socket
import tempfile
from pathlib import Path
from typing import NamedTuple

from hypothesis import given, settings
from hypothesis import strategies as st

from fdbroker.kernel import sockets
from fdbroker.sandbox import Ended
from fdbroker.scan.answers import encode
from fdbroker.scan.plugins import configure
from fdbroker.scan.supervisor import Done, Supervisor
from fdbroker.scan.verdict import Answer, Clean, Error, Infected, Reason, Verdict
from tests.scan.descriptors import make_and_open, open_descriptors

FILES = 4
SIZE = 5


class Said(NamedTuple):
    """An answer of a worker, right or wrong."""

    number: int
    size: int
    verdicts: tuple[Verdict, ...]

    def data(self) -> bytes:
        return encode(self.number, self.size, [Answer("hashes", verdict) for verdict in self.verdicts])


VERDICTS: st.SearchStrategy[Verdict] = st.sampled_from(
    [Clean(), Clean(), Infected("Bad"), Error(Reason.MEMORY, "m"), Error(Reason.LIMIT_EXCEEDED, "l")]
)
ANSWERS = st.builds(
    Said,
    st.integers(0, FILES + 1),
    st.sampled_from([SIZE, SIZE, SIZE, SIZE - 1, 0]),
    st.lists(VERDICTS, min_size=1, max_size=2).map(tuple) | st.tuples(VERDICTS),
)
IN_TURN = st.lists(VERDICTS, max_size=FILES)
# What one worker says before it ends: answers in turn, from some file on, then anything.
WORKERS = st.tuples(
    st.integers(1, FILES), IN_TURN, st.lists(ANSWERS | st.binary(min_size=1, max_size=40), max_size=2)
)


class FakeWorker:
    """What a supervisor sees of a worker; it has said all by the time that it is started."""

    pid = None

    def __init__(self, said: list[Said | bytes]) -> None:
        self.channel, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.channel.settimeout(0.0)
        for each in said:
            sockets.send(self.theirs, each.data() if isinstance(each, Said) else each)
        self.theirs.shutdown(socket.SHUT_WR)
        self.report = None

    def let_go(self) -> None:
        self.channel.close()
        self.theirs.close()

    stop = let_go

    def wait(self, _timeout: float) -> Ended:
        return Ended(1, None, "it ended with status 1")


@settings(max_examples=120)
@given(st.lists(WORKERS, max_size=6), st.sets(st.integers(1, FILES)), st.booleans())
def test_no_file_is_clean_without_the_right_answer(
    workers: list[tuple[int, list[Verdict], list[Said | bytes]]],
    changed: set[int],
    in_background: bool,  # noqa: FBT001 - a parameter
) -> None:
    said_clean: set[int] = set()
    coming = iter(workers)

    def spawn() -> FakeWorker:
        start, in_turn, rest = next(coming, (1, [], []))
        turns = [Said(start + index, SIZE, (verdict,)) for index, verdict in enumerate(in_turn)]
        every = [*turns, *rest]
        for each in every:
            if isinstance(each, Said) and each.size == SIZE and each.verdicts == (Clean(),):
                said_clean.add(each.number)
        return FakeWorker(every)

    before = open_descriptors()
    with tempfile.TemporaryDirectory() as directory:
        supervisor = Supervisor(
            [configure("hashes")],
            spawn=spawn,  # type: ignore[arg-type]
            window=FILES * 4,
            in_background=in_background,
        )
        with supervisor:
            done: list[Done] = []
            for number in range(1, FILES + 1):
                path = Path(directory) / str(number)
                done += supervisor.submit(b"%d" % number, make_and_open(path, b"x" * SIZE))
                # Nothing is read before the last file is there: the window is larger.
                if number in changed:
                    os.utime(path, (1, 1))
            done += supervisor.finish()
    assert sorted(int(one.path) for one in done) == list(range(1, FILES + 1)), "each file is answered once"
    for one in done:
        if isinstance(one.verdict, Clean):
            assert int(one.path) in said_clean - changed
            assert one.answers == (Answer("hashes", Clean()),)
    assert open_descriptors() == before
