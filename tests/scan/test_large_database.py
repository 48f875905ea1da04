"""A database of ClamAV as large as a real one: it is loaded once, and workers share it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fdbroker.kernel import sockets
from fdbroker.sandbox.waiting import is_readable
from fdbroker.scan.answers import LONGEST_ANSWER, all_clean, decode
from fdbroker.scan.plugins import configure
from fdbroker.scan.supervisor import Supervisor
from fdbroker.scan.verdict import Clean, Infected, Verdict
from fdbroker.scan.worker import REQUEST
from tests.sandbox.confined import started_ids
from tests.scan.clamav import BAD, BAD_NAME, make_database
from tests.scan.descriptors import make_and_open

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fdbroker.sandbox import Worker

DIGESTS, PATTERNS = 300_000, 20_000
FILES = 300
MIB = 1 << 20


@pytest.fixture(scope="module")
def supervisor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Supervisor]:
    database = make_database(tmp_path_factory.mktemp("large") / "database")
    chance = random.Random(1)  # noqa: S311 - to have the same ones again
    with (database / "many.hdb").open("w") as file:
        for number in range(DIGESTS):
            file.write(f"{chance.getrandbits(128):032x}:{chance.randint(1, 10_000)}:Digest-{number}\n")
    with (database / "many.ndb").open("w") as file:
        for number in range(PATTERNS):
            file.write(f"Pattern-{number}:0:*:{chance.getrandbits(256):064x}\n")
    engine = configure("libclamav", {"database": str(database)})
    with Supervisor([engine], ids=started_ids()) as made:
        yield made


def memory(worker: Worker) -> tuple[int, int]:
    """Return how many bytes a process shares with others, and has for itself; proc_pid_smaps(5)."""
    counts: dict[str, int] = {}
    for line in Path(f"/proc/{worker.pid}/smaps_rollup").read_text("ascii").splitlines()[1:]:
        name, value, *_ = line.split()
        counts[name] = int(value) * 1024
    private = counts["Private_Clean:"] + counts["Private_Dirty:"]
    return counts["Rss:"] - private, private


def scan(worker: Worker, path: Path, contents: bytes) -> Verdict:
    descriptor = make_and_open(path, contents)
    sockets.send(worker.channel, REQUEST.pack(1, len(contents)), [descriptor])
    assert is_readable(worker.channel.fileno(), 30.0)
    with (message := sockets.receive(worker.channel, LONGEST_ANSWER + 1)).descriptors:
        [said] = decode(message.data, all_clean(["libclamav"]))
    return said.answers[0].verdict


@pytest.mark.root
def test_a_further_worker_has_a_tenth_of_the_engine_for_itself_at_most(
    supervisor: Supervisor, tmp_path: Path
) -> None:
    with supervisor.spawn_from_zygote() as first, supervisor.spawn_from_zygote() as second:
        for worker in (first, second):
            shared, private = memory(worker)
            assert shared > 30 * MIB, "the engine is not there"
            assert private <= 4 * MIB
            for number in range(FILES):
                # Contents of their own, so that nothing is known from the scan before.
                contents = b"%d " % number * 1000
                assert scan(worker, tmp_path / f"{number}", contents) == Clean()
            assert scan(worker, tmp_path / "bad", b"x" * 1000 + BAD) == Infected(BAD_NAME)
        for worker in (first, second):
            shared, private = memory(worker)
            assert private <= max(shared // 10, 4 * MIB)
