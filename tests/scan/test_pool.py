"""Several workers, engines of both kinds: each file has one verdict, a worker has one owner's files."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import TYPE_CHECKING

import pytest

from fdbroker.scan import pool as pool_module
from fdbroker.scan.engine import EngineError
from fdbroker.scan.plugins import Configured, configure
from fdbroker.scan.pool import Pool, _Lane
from fdbroker.scan.supervisor import Supervisor
from fdbroker.scan.verdict import Answer, Clean, Error, Infected, Reason
from tests.sandbox.confined import started_ids
from tests.scan.descriptors import EICAR, EICAR_NAME, make_and_open, open_descriptors

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from fdbroker.scan.pool import _File
    from fdbroker.scan.supervisor import Done, _Job
    from fdbroker.scan.verdict import Verdict

HASHES = configure("hashes")
FINDS_E = configure("command", {"argv": ["/bin/sh", "-c", "grep -c E >/dev/null && exit 1; exit 0"]})
OWNERS = (31101, 31102, 31103)


@contextlib.contextmanager
def pool(
    engines: Sequence[Configured] = (HASHES,),
    *,
    jobs: int = 1,
    max_size: int | None = None,
    isolate: bool = False,
    timeout: float = 30,
) -> Iterator[Pool]:
    ids = started_ids()
    with Pool(engines, jobs=jobs, ids=ids, timeout=timeout, max_size=max_size, isolate=isolate) as made:
        yield made


def scan(made: Pool, directory: Path, contents: Sequence[bytes], owners: Sequence[int] = ()) -> list[Done]:
    """Scan files named 0, 1, ...; return what is done in their order."""
    done: list[Done] = []
    for number, content in enumerate(contents):
        path = directory / str(number)
        descriptor = make_and_open(path, content)
        if owners:
            os.chown(path, owners[number], owners[number])
        done += made.submit(b"%d" % number, descriptor)
    done += made.finish()
    ordered = sorted(done, key=lambda one: int(one.path))
    assert [int(one.path) for one in ordered] == list(range(len(contents))), "each has one verdict"
    return ordered


def workers_of(made: Pool) -> list[int]:
    """Return how many workers each lane has started."""
    return [lane.supervisor.workers_started for lane in made._lanes]


@pytest.mark.parametrize("jobs", [1, 2, 5])
def test_many_files_have_one_verdict_each_however_many_workers_there_are(jobs: int, tmp_path: Path) -> None:
    before = open_descriptors()
    contents = [EICAR if number % 7 == 3 else b"fine %d" % number for number in range(500)]
    with pool(jobs=jobs) as made:
        done = scan(made, tmp_path, contents)
        assert set(workers_of(made)) <= {0, 1}
    assert [one.verdict for one in done] == [
        Infected(EICAR_NAME) if content == EICAR else Clean() for content in contents
    ]
    assert [one.size for one in done] == list(map(len, contents))
    assert open_descriptors() == before


def test_few_files_start_one_worker(tmp_path: Path) -> None:
    with pool(jobs=4) as made:
        scan(made, tmp_path, [b"a", b"b", EICAR])
        assert workers_of(made) == [1, 0, 0, 0]


@pytest.mark.root
def test_no_worker_has_files_of_two_owners(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owners = [OWNERS[number // 40 % 3] for number in range(360)]
    with pool(jobs=2) as made:
        given: dict[int | None, set[int]] = {}
        send = Supervisor._send_one_message

        def noted(supervisor: Supervisor, jobs: list[_Job]) -> None:
            send(supervisor, jobs)
            given.setdefault(supervisor.worker_pid, set()).update(job.before.owner for job in jobs)

        monkeypatch.setattr(Supervisor, "_send_one_message", noted)
        done = scan(made, tmp_path, [b"x"] * len(owners), owners)
    assert {type(one.verdict) for one in done} == {Clean}
    assert all(len(had) == 1 for had in given.values())
    assert {owner for had in given.values() for owner in had} == set(OWNERS)


def test_of_large_files_a_worker_has_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "_MOST_BYTES", 1000)
    had: list[int] = []
    gather = _Lane.gather

    def noted(lane: _Lane, file: _File) -> None:
        had.append(lane.bytes)
        gather(lane, file)

    monkeypatch.setattr(_Lane, "gather", noted)
    with pool(jobs=2) as made:
        done = scan(made, tmp_path, [b"x" * 300] * 100)
    assert {type(one.verdict) for one in done} == {Clean}
    assert 0 < max(had) < 1000


def test_isolated_files_have_a_worker_each(tmp_path: Path) -> None:
    with pool(jobs=2, isolate=True) as made:
        done = scan(made, tmp_path, [b"a", EICAR, b"c", b"d", b"e"])
        assert sum(workers_of(made)) == 5
    assert [one.verdict.verdict for one in done] == ["clean", "infected", "clean", "clean", "clean"]


def test_larger_files_than_asked_for_are_errors(tmp_path: Path) -> None:
    with pool(max_size=len(EICAR)) as made:
        done = scan(made, tmp_path, [EICAR, EICAR + b"\n"])
    assert done[0].verdict == Infected(EICAR_NAME)
    assert isinstance(done[1].verdict, Error)
    assert done[1].verdict.reason is Reason.TOO_LARGE
    assert [one.size for one in done] == [len(EICAR), len(EICAR) + 1]


@pytest.mark.parametrize("inside_first", [False, True])
def test_engines_of_both_kinds_are_asked_and_the_worst_verdict_counts(
    inside_first: bool,  # noqa: FBT001 - a parameter
    tmp_path: Path,
) -> None:
    engines = [HASHES, FINDS_E] if inside_first else [FINDS_E, HASHES]
    before = open_descriptors()
    with pool(engines, jobs=2) as made:
        done = scan(made, tmp_path, [b"fine", b"E", EICAR + b"\n"] * 10)
    assert open_descriptors() == before
    wanted: list[dict[str, Verdict]] = [
        {"command": Clean(), "hashes": Clean()},
        {"command": Infected("sh"), "hashes": Clean()},
        {"command": Infected("sh"), "hashes": Infected(EICAR_NAME)},
    ]
    names = [one.name for one in engines]
    for number, one in enumerate(done):
        assert dict(one.answers) == wanted[number % 3]
        assert [answer.engine for answer in one.answers] == names
        assert one.verdict.verdict == ("infected" if number % 3 else "clean")


def test_without_inside_engines_there_is_no_worker(tmp_path: Path) -> None:
    with pool([FINDS_E], jobs=2) as made:
        assert made.start() is None
        done = scan(made, tmp_path, [b"a", b"E"])
        assert made.workers == 0
    assert [one.answers for one in done] == [
        (Answer("command", Clean()),),
        (Answer("command", Infected("sh")),),
    ]


def test_files_of_a_dead_worker_are_scanned_by_others(tmp_path: Path) -> None:
    with pool(jobs=2) as made:
        made.start()
        pid = made._lanes[0].supervisor.worker_pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        done = scan(made, tmp_path, [EICAR] * 100)
    errors = [one for one in done if isinstance(one.verdict, Error)]
    assert len(errors) <= 1
    assert len(done) - len(errors) == sum(one.verdict == Infected(EICAR_NAME) for one in done)


def test_versions_are_told_by_a_worker_that_has_no_file() -> None:
    with pool([FINDS_E, HASHES]) as made:
        versions = made.versions()
        assert [(one.engine, one.inside) for one in versions] == [("command", False), ("hashes", True)]
        assert versions[1].version == "hashes 1, 3 digests"
        assert workers_of(made) == [0]


def test_an_engine_can_not_be_asked_twice() -> None:
    with pytest.raises(EngineError, match="hashes: it is asked for twice"):
        Pool([HASHES, HASHES])


def test_closing_it_closes_what_is_under_way(tmp_path: Path) -> None:
    before = open_descriptors()
    with pool([FINDS_E, HASHES], jobs=2) as made:
        for number in range(20):
            list(made.submit(b"%d" % number, make_and_open(tmp_path / str(number), b"x")))
    assert open_descriptors() == before
