from __future__ import annotations

import contextlib
import errno
import os
import signal
from typing import TYPE_CHECKING

import pytest

from fdbroker.kernel import sockets
from fdbroker.sandbox import ConfinementError, Worker, Zygote
from fdbroker.scan import supervisor as supervisor_module
from fdbroker.scan.hashes import load
from fdbroker.scan.supervisor import DEFAULT_TIMEOUT, DEFAULT_WINDOW, Done, Supervisor
from fdbroker.scan.verdict import Clean, Error, Infected
from fdbroker.scan.worker import Code
from tests.sandbox.confined import confinement, started_ids
from tests.scan.descriptors import EICAR, EICAR_NAME, make_and_open, open_descriptors
from tests.scan.puppet_workers import GARBAGE, NO_INDEX

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

KNOWN = load()
SIZE = 11


@pytest.fixture
def zygotes() -> Iterator[contextlib.ExitStack]:
    """Return what closes the zygotes of puppets at the end."""
    with contextlib.ExitStack() as stack:
        yield stack


def puppets(zygotes: contextlib.ExitStack, work: str, **state: object) -> Callable[[], Worker]:
    """Return what starts such workers, of puppet_workers.py."""
    module = "tests.scan.puppet_workers"
    zygote = Zygote(f"{module}:load", f"{module}:{work}", state, confinement=confinement())
    return zygotes.enter_context(zygote).spawn


def supervise(
    *,
    spawn: Callable[[], Worker] | None = None,
    timeout: float = DEFAULT_TIMEOUT,
    window: int = DEFAULT_WINDOW,
) -> Supervisor:
    return Supervisor(KNOWN, ids=started_ids(), spawn=spawn, timeout=timeout, window=window)


def first_worker(misbehaving: Callable[[], Worker], *, timeout: float = DEFAULT_TIMEOUT) -> Supervisor:
    """Return a supervisor whose first worker misbehaves, and whose others do not."""

    def spawn() -> Worker:
        return misbehaving() if made.workers_started == 0 else made._spawn_from_zygote()

    made = supervise(spawn=spawn, timeout=timeout)
    return made


def submit(supervisor: Supervisor, directory: Path, *contents: bytes) -> list[Done]:
    """Hand in files named 0, 1, ... with these contents; return what is done by then."""
    done: list[Done] = []
    for number, content in enumerate(contents):
        name = b"%d" % number
        done += supervisor.submit(name, make_and_open(directory / name.decode(), content))
    return done


def verdicts(done: list[Done]) -> list[str]:
    """Return the verdicts in the order of the files, errors by their reason."""
    ordered = sorted(done, key=lambda one: int(one.path))
    return [one.verdict.reason if isinstance(one.verdict, Error) else one.verdict.verdict for one in ordered]


def scan_all(supervisor: Supervisor, directory: Path, *contents: bytes) -> list[Done]:
    with supervisor:
        return [*submit(supervisor, directory, *contents), *supervisor.finish()]


def test_verdicts_are_exact(tmp_path: Path) -> None:
    done = scan_all(supervise(), tmp_path, b"fine", EICAR, b"", EICAR + b" ", b"x" * 1_000_000)
    assert done == [
        Done(b"0", 4, Clean()),
        Done(b"1", 68, Infected(EICAR_NAME)),
        Done(b"2", 0, Clean()),
        Done(b"3", 69, Clean()),
        Done(b"4", 1_000_000, Clean()),
    ]


@pytest.mark.parametrize("window", [1, 2, 64])
def test_many_files_keep_their_order_and_nothing_stays_open(window: int, tmp_path: Path) -> None:
    before = open_descriptors()
    contents = [EICAR if number % 7 == 3 else b"%d" % number for number in range(300)]
    supervisor = supervise(window=window)
    with supervisor:
        done = submit(supervisor, tmp_path, *contents)
        assert len(done) >= 300 - window
        done += supervisor.finish()
        assert supervisor.workers_started == 1
    assert [one.path for one in done] == [b"%d" % number for number in range(300)]
    assert verdicts(done) == ["infected" if number % 7 == 3 else "clean" for number in range(300)]
    assert open_descriptors() == before


def test_killed_worker_costs_one_file_and_the_next_one_scans_the_rest(tmp_path: Path) -> None:
    endless = tmp_path / "endless"
    endless.touch()
    os.truncate(endless, 1 << 40)  # a hole: nothing on the disk, and an hour of work
    supervisor = supervise()
    with supervisor:
        assert [*supervisor.submit(b"9", os.open(endless, os.O_RDONLY | os.O_CLOEXEC))] == []
        done = submit(supervisor, tmp_path, b"after", EICAR)
        assert done == []
        killed = supervisor.worker_pid
        assert killed is not None
        os.kill(killed, signal.SIGKILL)
        done = [*supervisor.finish()]
        assert supervisor.workers_started == 2
        assert supervisor.worker_pid != killed
    assert verdicts(done) == ["clean", "infected", "worker_died"]
    assert done[0].verdict == Error(
        "worker_died", "the worker ended while it had this file: it was killed (SIGKILL)"
    )


@pytest.mark.parametrize("which", GARBAGE)
def test_garbage_is_an_error_and_the_worker_is_replaced(
    which: str, tmp_path: Path, zygotes: contextlib.ExitStack
) -> None:
    assert len(KNOWN) < NO_INDEX
    supervisor = first_worker(puppets(zygotes, "talk_garbage", which=which))
    done = scan_all(supervisor, tmp_path, b"x" * SIZE, b"fine", EICAR)
    assert verdicts(done) == ["worker_protocol", "clean", "infected"]
    assert supervisor.workers_started == 2


def test_right_answer_that_carries_a_descriptor_is_an_error(
    tmp_path: Path, zygotes: contextlib.ExitStack
) -> None:
    supervisor = first_worker(puppets(zygotes, "pass_a_descriptor"))
    before = open_descriptors()
    done = scan_all(supervisor, tmp_path, b"x" * SIZE, b"fine")
    assert verdicts(done)[1] == "clean"
    assert verdicts(done)[0] in {"worker_protocol", "worker_died"}
    assert open_descriptors() == before


def test_answer_before_the_question_is_an_error(tmp_path: Path, zygotes: contextlib.ExitStack) -> None:
    done = scan_all(first_worker(puppets(zygotes, "answer_too_early")), tmp_path, b"x" * SIZE, EICAR, b"fine")
    assert verdicts(done) == ["clean", "worker_protocol", "clean"]


def test_stuck_worker_is_a_timeout_and_is_replaced(tmp_path: Path, zygotes: contextlib.ExitStack) -> None:
    supervisor = first_worker(puppets(zygotes, "be_stuck"), timeout=1.0)
    with supervisor:
        supervisor.start()
        stuck = supervisor.worker_pid
        assert stuck is not None
        done = [*submit(supervisor, tmp_path, b"x" * SIZE, b"fine"), *supervisor.finish()]
        assert done[0].verdict == Error("timeout", "the worker did not answer within 1 s")
        assert verdicts(done) == ["timeout", "clean"]
        assert not os.path.exists(f"/proc/{stuck}")


def test_worker_that_dies_with_each_file_costs_each_file_and_ends(
    tmp_path: Path, zygotes: contextlib.ExitStack
) -> None:
    supervisor = supervise(spawn=puppets(zygotes, "take_and_end"))
    done = scan_all(supervisor, tmp_path, *[b"x"] * 5)
    assert verdicts(done) == ["worker_died"] * 5
    assert supervisor.workers_started == 5


def test_worker_that_ends_before_any_file_costs_one_file_each_time(
    tmp_path: Path, zygotes: contextlib.ExitStack
) -> None:
    done = scan_all(supervise(spawn=puppets(zygotes, "end_at_once")), tmp_path, *[b"x"] * 3)
    assert verdicts(done) == ["worker_died"] * 3


def test_answers_that_a_worker_gave_before_it_died_count(
    tmp_path: Path, zygotes: contextlib.ExitStack
) -> None:
    done = scan_all(first_worker(puppets(zygotes, "answer_one_and_end")), tmp_path, *[b"x" * SIZE] * 4)
    assert verdicts(done) == ["clean", "worker_died", "clean", "clean"]


def test_worker_killed_by_its_filter_is_told_apart(tmp_path: Path, zygotes: contextlib.ExitStack) -> None:
    done = scan_all(first_worker(puppets(zygotes, "open_a_file")), tmp_path, b"x")
    assert done[0].verdict == Error(
        "worker_died",
        "the worker ended while it had this file: it made a system call that it may not make (SIGSYS)",
    )


@pytest.mark.parametrize(
    ("code", "detail", "read", "verdict"),
    [
        (Code.READ_FAILED, errno.EIO, 3, Error("read_failed", "reading failed: Input/output error")),
        (Code.SHORT_READ, 0, 3, Error("short_read", "only 3 of 11 bytes could be read")),
        (Code.CHANGED, 0, 0, Error("changed", "the file changed while it was read")),
        (Code.INFECTED, 1, SIZE, Infected(EICAR_NAME)),
    ],
)
def test_each_answer_has_its_verdict(
    code: Code, detail: int, read: int, verdict: object, tmp_path: Path, zygotes: contextlib.ExitStack
) -> None:
    [done] = scan_all(
        supervise(spawn=puppets(zygotes, "answer_as_told", code=code, detail=detail, read=read)),
        tmp_path,
        b"x" * SIZE,
    )
    assert done == Done(b"0", SIZE, verdict)  # type: ignore[arg-type]


@pytest.mark.parametrize("change", [lambda path: os.truncate(path, 3), lambda path: os.utime(path, (1, 1))])
def test_file_that_changed_by_the_parents_own_look_is_not_clean(
    change: Callable[[Path], None], tmp_path: Path, zygotes: contextlib.ExitStack
) -> None:
    supervisor = supervise(spawn=puppets(zygotes, "answer_in_pairs"))
    with supervisor:
        assert submit(supervisor, tmp_path, b"x" * SIZE) == []
        change(tmp_path / "0")
        done = [*supervisor.submit(b"1", make_and_open(tmp_path / "1")), *supervisor.finish()]
    assert verdicts(done) == ["changed", "clean"]


def test_old_worker_is_replaced_without_losing_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "_SECONDS_OF_A_WORKER", 0.0)
    supervisor = supervise()
    done = scan_all(supervisor, tmp_path, *[b"fine", EICAR] * 5)
    assert verdicts(done) == ["clean", "infected"] * 5
    assert supervisor.workers_started > 1


def no_worker() -> Worker:
    raise ConfinementError("seccomp: not here")


def test_without_a_worker_every_file_is_an_error(tmp_path: Path) -> None:
    supervisor = supervise(spawn=no_worker)
    before = open_descriptors()
    done = scan_all(supervisor, tmp_path, b"fine", EICAR)
    assert verdicts(done) == ["no_worker"] * 2
    assert "seccomp" in str(done[0].verdict)
    assert open_descriptors() == before


def test_what_is_no_regular_file_is_never_handed_on(tmp_path: Path) -> None:
    with supervise() as supervisor:
        directory = os.open(tmp_path, os.O_RDONLY | os.O_CLOEXEC)
        [done] = supervisor.submit(b"0", directory)
        assert verdicts([done]) == ["not_regular"]
        [done] = supervisor.submit(b"0", directory)  # closed by now
        assert verdicts([done]) == ["read_failed"]
        assert supervisor.workers_started == 0


def refuse_sends(monkeypatch: pytest.MonkeyPatch, number: int, refused: Sequence[bool]) -> None:
    """Have the next sends fail, or not, as given."""
    send, refusals = sockets.send, iter(refused)

    def refuse(
        channel: socket.socket, data: bytes, descriptors: Sequence[int] = (), *, wait: bool = True
    ) -> None:
        if next(refusals, False):
            raise OSError(number, os.strerror(number))
        send(channel, data, descriptors, wait=wait)

    monkeypatch.setattr(sockets, "send", refuse)


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.ETOOMANYREFS])
def test_file_that_the_kernel_does_not_take_now_is_sent_later(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with supervise() as supervisor:
        supervisor.start()
        refuse_sends(monkeypatch, number, [False, True])
        done = [*submit(supervisor, tmp_path, *[b"fine"] * 4), *supervisor.finish()]
        assert verdicts(done) == ["clean"] * 4
        assert supervisor.workers_started == 1


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.ETOOMANYREFS])
def test_file_that_the_kernel_does_not_take_though_none_is_under_way_is_an_error(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with supervise() as supervisor:
        supervisor.start()
        refuse_sends(monkeypatch, number, [True])
        done = [*submit(supervisor, tmp_path, b"fine", EICAR), *supervisor.finish()]
        assert verdicts(done) == ["no_worker", "infected"]
        assert supervisor.workers_started == 1


def test_worker_that_takes_nothing_costs_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with supervise() as supervisor:
        supervisor.start()
        refuse_sends(monkeypatch, errno.EPIPE, [True])
        done = [*submit(supervisor, tmp_path, b"fine", EICAR), *supervisor.finish()]
        assert supervisor.workers_started == 2
    assert verdicts(done) == ["worker_died", "infected"]
    assert "the worker took no file (Broken pipe): it ended with status 0" in str(done[0].verdict)


def test_leaving_early_closes_everything(tmp_path: Path, zygotes: contextlib.ExitStack) -> None:
    spawn = puppets(zygotes, "wait")
    before = open_descriptors()
    with supervise(spawn=spawn) as supervisor:
        submit(supervisor, tmp_path, *[b"x"] * 10)
        pid = supervisor.worker_pid
    assert open_descriptors() == before
    assert not os.path.exists(f"/proc/{pid}")
