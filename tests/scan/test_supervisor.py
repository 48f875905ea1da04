from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fdbroker.kernel import sockets
from fdbroker.kernel.descriptors import Descriptors
from fdbroker.sandbox import Confinement, Worker, Zygote, ZygoteError
from fdbroker.sandbox.waiting import is_readable
from fdbroker.scan import supervisor as supervisor_module
from fdbroker.scan.engine import EngineError
from fdbroker.scan.plugins import configure
from fdbroker.scan.supervisor import DEFAULT_TIMEOUT, DEFAULT_WINDOW, Done, Supervisor
from fdbroker.scan.verdict import Answer, Clean, Error, Infected, Reason
from tests.sandbox.confined import started_ids
from tests.scan import misbehaving
from tests.scan.descriptors import EICAR, EICAR_NAME, make_and_open, open_descriptors

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    BadWorkers = Callable[..., AbstractContextManager[Supervisor]]

HASHES = configure("hashes")
SIZE = 11


def supervise(
    *,
    spawn: Callable[[], Worker] | None = None,
    timeout: float = DEFAULT_TIMEOUT,
    window: int = DEFAULT_WINDOW,
) -> Supervisor:
    return Supervisor([HASHES], ids=started_ids(), spawn=spawn, timeout=timeout, window=window)


def confinement() -> Confinement:
    ids = started_ids()
    return Confinement(uids=() if ids is None else ids[:1], gid=None if ids is None else ids[1])


@pytest.fixture(scope="module")
def good() -> Iterator[Supervisor]:
    """Give one whose zygote has workers for many tests; it has none itself."""
    with supervise() as made:
        made.spawn_from_zygote().stop()
        yield made


@pytest.fixture(scope="module")
def orders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the file by which workers are told how to misbehave."""
    path = tmp_path_factory.mktemp("orders") / "orders"
    path.write_bytes(bytes(misbehaving.LONGEST_ORDER))
    return path


@pytest.fixture(scope="module")
def bad_zygote(orders: Path) -> Iterator[Zygote]:
    """Give a zygote whose workers do as they are told."""
    arguments = {"orders": str(orders)}
    with Zygote(misbehaving.load, misbehaving.obey, arguments, confinement=confinement()) as zygote:
        yield zygote


@pytest.fixture
def bad(bad_zygote: Zygote, orders: Path, good: Supervisor) -> BadWorkers:
    """Return what gives a supervisor whose first worker misbehaves, and whose others do not."""

    @contextlib.contextmanager
    def bad_workers(
        mode: str,
        *,
        work: Callable[..., object] = misbehaving.misbehave,
        timeout: float = DEFAULT_TIMEOUT,
        window: int = DEFAULT_WINDOW,
        all_of_them: bool = False,
    ) -> Iterator[Supervisor]:
        def spawn() -> Worker:
            if made.workers_started == 0 or all_of_them:
                return bad_zygote.spawn()
            return good.spawn_from_zygote()

        misbehaving.order(orders, work, mode)
        made = supervise(spawn=spawn, timeout=timeout, window=window)
        with made:
            yield made

    return bad_workers


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
    return [*submit(supervisor, directory, *contents), *supervisor.finish()]


def test_verdicts_are_exact(tmp_path: Path) -> None:
    with supervise() as supervisor:
        done = scan_all(supervisor, tmp_path, b"fine", EICAR, b"", EICAR + b" ", b"x" * 1_000_000)
    clean, infected = Clean(), Infected(EICAR_NAME)
    assert done == [
        Done(b"0", 4, clean, (Answer("hashes", clean),)),
        Done(b"1", 68, infected, (Answer("hashes", infected),)),
        Done(b"2", 0, clean, (Answer("hashes", clean),)),
        Done(b"3", 69, clean, (Answer("hashes", clean),)),
        Done(b"4", 1_000_000, clean, (Answer("hashes", clean),)),
    ]


def test_a_worker_that_ends_while_it_has_nothing_is_let_go_of_once_that_shows(
    good: Supervisor, tmp_path: Path
) -> None:
    with supervise(spawn=good.spawn_from_zygote) as supervisor:
        scan_all(supervisor, tmp_path, b"fine")
        supervisor.let_go_if_gone()
        watched, killed = supervisor.watched(), supervisor.worker_pid
        assert killed is not None
        os.kill(killed, signal.SIGKILL)
        assert is_readable(watched[0], 10)
        supervisor.let_go_if_gone()
        assert supervisor.watched()[0] == -1
        assert verdicts(scan_all(supervisor, tmp_path, b"fine")) == ["clean"]
        assert supervisor.watched() != watched


@pytest.mark.parametrize("window", [1, 2, 64])
def test_many_files_keep_their_order_and_nothing_stays_open(
    good: Supervisor, window: int, tmp_path: Path
) -> None:
    before = open_descriptors()
    contents = [EICAR if number % 7 == 3 else b"%d" % number for number in range(300)]
    supervisor = supervise(spawn=good.spawn_from_zygote, window=window)
    with supervisor:
        done = submit(supervisor, tmp_path, *contents)
        assert len(done) >= 300 - window
        done += supervisor.finish()
        assert supervisor.workers_started == 1
    assert [one.path for one in done] == [b"%d" % number for number in range(300)]
    assert verdicts(done) == ["infected" if number % 7 == 3 else "clean" for number in range(300)]
    assert open_descriptors() == before


def test_killed_worker_costs_one_file_and_the_next_one_scans_the_rest(
    good: Supervisor, tmp_path: Path
) -> None:
    endless = tmp_path / "endless"
    endless.touch()
    os.truncate(endless, 1 << 40)  # a hole: nothing on the disk, and an hour of work
    supervisor = supervise(spawn=good.spawn_from_zygote)
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
    assert verdicts(done) == ["clean", "infected", "killed"]
    assert done[0].verdict == Error(
        Reason.KILLED, "the worker ended while it had this file: it was killed (SIGKILL)"
    )


@pytest.mark.parametrize("mode", misbehaving.GARBAGE)
def test_garbage_is_an_error_and_the_worker_is_replaced(bad: BadWorkers, mode: str, tmp_path: Path) -> None:
    with bad(mode, work=misbehaving.answer_once) as supervisor:
        done = scan_all(supervisor, tmp_path, b"x" * SIZE, b"fine", EICAR)
        assert verdicts(done) == ["unknown_answer", "clean", "infected"]
        assert supervisor.workers_started == 2


def test_right_answer_that_carries_a_descriptor_is_an_error(bad: BadWorkers, tmp_path: Path) -> None:
    before = open_descriptors()
    with bad("descriptor") as supervisor:
        first, second = verdicts(scan_all(supervisor, tmp_path, b"x" * SIZE, b"fine"))
    assert second == "clean"
    assert first in {"unknown_answer", "crashed"}
    assert open_descriptors() == before


def test_answer_before_the_question_is_not_believed(bad: BadWorkers, tmp_path: Path) -> None:
    with bad("early") as supervisor:
        done = scan_all(supervisor, tmp_path, b"x" * SIZE, EICAR, b"fine")
        assert supervisor.workers_started == 2
    assert verdicts(done) == ["clean", "infected", "clean"]


@pytest.mark.parametrize(("content", "verdict"), [(b"crash", "crashed"), (b"wait", "timed_out")])
@pytest.mark.parametrize("window", [1, 8, 64])
def test_of_files_in_one_message_those_that_a_worker_fails_at_are_errors_and_no_others(
    bad: BadWorkers, content: bytes, verdict: str, window: int, tmp_path: Path
) -> None:
    wanted = ["clean"] * 40
    contents = [b"fine"] * 40
    # Each that is waited for takes the whole timeout.
    for number in (0, 7, 9, 38) if content == b"crash" else (0, 9):
        contents[number], wanted[number] = content, verdict
    wanted[5] = wanted[8] = "infected"
    contents[5] = contents[8] = b"found"
    before = open_descriptors()
    work = misbehaving.crash_at_a_file
    with bad("", work=work, timeout=0.5, window=window, all_of_them=True) as supervisor:
        done = scan_all(supervisor, tmp_path, *contents)
    assert [one.path for one in done] == [b"%d" % number for number in range(40)]
    assert verdicts(done) == wanted
    assert open_descriptors() == before


def test_what_a_worker_says_behind_an_engine_that_is_spoilt_is_not_believed(
    bad: BadWorkers, tmp_path: Path
) -> None:
    with bad("", work=misbehaving.crash_at_a_file, all_of_them=True) as supervisor:
        done = scan_all(supervisor, tmp_path, b"fine", b"fine", b"spoil", b"found", b"fine")
        assert supervisor.workers_started == 2
    assert verdicts(done) == ["clean", "clean", "memory", "infected", "clean"]


def test_stuck_worker_is_a_timeout_and_is_replaced(bad: BadWorkers, tmp_path: Path) -> None:
    with bad("loop", timeout=0.5) as supervisor:
        supervisor.start()
        assert supervisor.worker_pid is not None
        with Descriptors([os.pidfd_open(supervisor.worker_pid)]) as stuck:
            done = scan_all(supervisor, tmp_path, b"x" * SIZE, b"fine")
            assert done[0].verdict == Error(Reason.TIMED_OUT, "the worker did not answer within 0.5 s")
            assert verdicts(done) == ["timed_out", "clean"]
            # It was killed, which nobody waited for.
            assert is_readable(stuck.numbers()[0], 20)


@pytest.mark.parametrize("mode", ["take and end", "end at once"])
def test_worker_that_ends_with_each_file_costs_each_file_and_ends(
    bad: BadWorkers, mode: str, tmp_path: Path
) -> None:
    with bad(mode, all_of_them=True) as supervisor:
        assert verdicts(scan_all(supervisor, tmp_path, *[b"x"] * 5)) == ["crashed"] * 5


def test_answers_that_a_worker_gave_before_it_died_count(bad: BadWorkers, tmp_path: Path) -> None:
    with bad("answer and end") as supervisor:
        done = scan_all(supervisor, tmp_path, *[b"x" * SIZE] * 4)
        assert supervisor.workers_started == 2
    assert verdicts(done) == ["clean"] * 4


def test_worker_that_ended_behind_its_files_costs_no_other_file(bad: BadWorkers, tmp_path: Path) -> None:
    with bad("answer and end") as supervisor:
        done = scan_all(supervisor, tmp_path, b"x")
        assert supervisor._worker is not None
        assert is_readable(supervisor._worker.channel.fileno(), 20)  # its end
        done += scan_all(supervisor, tmp_path, b"x")
        assert supervisor.workers_started == 2
    assert verdicts(done) == ["clean"] * 2


@pytest.mark.parametrize(
    ("mode", "reason", "text"),
    [
        ("open", Reason.FORBIDDEN_CALL, "it made a system call that it may not make (SIGSYS)"),
        ("crash", Reason.CRASHED, "it crashed (SIGSEGV)"),
    ],
)
def test_how_a_worker_ended_is_told_apart(
    bad: BadWorkers, mode: str, reason: Reason, text: str, tmp_path: Path
) -> None:
    with bad(mode) as supervisor:
        done = scan_all(supervisor, tmp_path, b"x")
    assert done[0].verdict == Error(reason, f"the worker ended while it had this file: {text}")


@pytest.mark.root
def test_file_cut_off_under_an_engine_that_maps_it_is_an_error(bad: BadWorkers, tmp_path: Path) -> None:
    with bad("", work=misbehaving.map_and_read) as supervisor:
        assert submit(supervisor, tmp_path, bytes(1 << 20)) == []
        maps = Path(f"/proc/{supervisor.worker_pid}/maps")
        while str(tmp_path / "0") not in maps.read_text():
            pass
        os.truncate(tmp_path / "0", 0)
        [done] = supervisor.finish()
    text = "the worker ended while it had this file: it crashed (SIGBUS)"
    assert done.verdict == Error(Reason.CRASHED, text)


@pytest.mark.parametrize(("mode", "verdict"), [("short", misbehaving.SHORT), ("found", misbehaving.FOUND)])
def test_each_answer_has_its_verdict(
    bad: BadWorkers, mode: str, verdict: Error | Infected, tmp_path: Path
) -> None:
    with bad(mode, work=misbehaving.answer_once) as supervisor:
        [done] = scan_all(supervisor, tmp_path, b"x" * SIZE)
    assert done == Done(b"0", SIZE, verdict, (Answer("hashes", verdict),))


@pytest.mark.parametrize("change", [lambda path: os.truncate(path, 3), lambda path: os.utime(path, (1, 1))])
def test_file_that_changed_by_the_parents_own_look_is_not_clean(
    bad: BadWorkers, change: Callable[[Path], None], tmp_path: Path
) -> None:
    with bad("pairs") as supervisor:
        assert submit(supervisor, tmp_path, b"x" * SIZE) == []
        change(tmp_path / "0")
        done = [*supervisor.submit(b"1", make_and_open(tmp_path / "1")), *supervisor.finish()]
    assert verdicts(done) == ["changed", "clean"]


def test_old_worker_is_replaced_without_losing_a_file(
    good: Supervisor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "_SECONDS_OF_A_WORKER", 0.0)
    supervisor = supervise(spawn=good.spawn_from_zygote)
    with supervisor:
        done = scan_all(supervisor, tmp_path, *[b"fine", EICAR] * 5)
    assert verdicts(done) == ["clean", "infected"] * 5
    assert supervisor.workers_started > 1


def test_without_a_worker_every_file_is_an_error(tmp_path: Path) -> None:
    def spawn() -> Worker:
        raise ZygoteError("there is none in this test")

    before = open_descriptors()
    with supervise(spawn=spawn) as supervisor:
        done = scan_all(supervisor, tmp_path, b"fine", EICAR)
    assert verdicts(done) == ["not_loaded"] * 2
    assert "there is none in this test" in str(done[0].verdict)
    assert open_descriptors() == before


def test_an_engine_that_can_not_be_loaded_makes_every_file_an_error(tmp_path: Path) -> None:
    engine = configure("hashes", {"lists": [str(tmp_path / "missing")]})
    with Supervisor([engine], ids=started_ids()) as supervisor:
        done = scan_all(supervisor, tmp_path, b"fine", EICAR)
    assert verdicts(done) == ["not_loaded"] * 2
    assert "missing: No such file or directory" in str(done[0].verdict)


def test_an_engine_that_runs_elsewhere_is_refused(tmp_path: Path) -> None:
    engine = configure("command", {"argv": ["/bin/true"]})
    with pytest.raises(EngineError, match="engine command: it does not run in a worker"):
        Supervisor([engine])
    with pytest.raises(EngineError, match="1 to 8 engines"):
        Supervisor([])


def test_of_several_engines_each_answers_and_the_worst_counts(tmp_path: Path) -> None:
    rules = tmp_path / "rules.yar"
    rules.write_text('rule fine { strings: $a = "fine" condition: $a }')
    small = configure("yara-x", {"rules": [str(rules)], "max_file_size": 100})
    with Supervisor([HASHES, small], ids=started_ids()) as supervisor:
        done = scan_all(supervisor, tmp_path, b"good", b"fine", EICAR, b"x" * 101)
    assert [[answer.verdict.verdict for answer in one.answers] for one in done] == [
        ["clean", "clean"],
        ["clean", "infected"],
        ["infected", "clean"],
        ["clean", "error"],
    ]
    assert verdicts(done) == ["clean", "infected", "infected", "too_large"]
    assert [answer.engine for answer in done[0].answers] == ["hashes", "yara-x"]


def test_what_is_no_regular_file_is_never_handed_on(good: Supervisor, tmp_path: Path) -> None:
    with supervise(spawn=good.spawn_from_zygote) as supervisor:
        directory = os.open(tmp_path, os.O_RDONLY | os.O_CLOEXEC)
        [done] = supervisor.submit(b"0", directory)
        assert verdicts([done]) == ["not_regular"]
        [done] = supervisor.submit(b"0", directory)  # closed by now
        assert verdicts([done]) == ["read_failed"]
        assert supervisor.workers_started == 0


def test_engines_are_loaded_anew_and_no_file_is_missed(tmp_path: Path) -> None:
    listed = tmp_path / "list"
    listed.write_text("")
    engine = configure("hashes", {"lists": [str(listed)]})
    worse = hashlib.sha256(b"worse").hexdigest()
    before = open_descriptors()
    with Supervisor([engine], ids=started_ids()) as supervisor:
        assert not supervisor.outdated()
        done = submit(supervisor, tmp_path, *[b"worse"] * 100)
        done += supervisor.finish()
        assert not supervisor.outdated()
        listed.write_text(f"{worse} Worse\n")
        assert supervisor.outdated()
        # Some are under way.
        for number in range(100, 200):
            name = b"%d" % number
            done += supervisor.submit(name, make_and_open(tmp_path / name.decode(), b"worse"))
            if number == 150:
                supervisor.renew()
                assert not supervisor.outdated()
        done += supervisor.finish()
    assert [one.path for one in done] == [b"%d" % number for number in range(200)]
    found = verdicts(done)
    assert found[:100] == ["clean"] * 100
    assert found[150:] == ["infected"] * 50
    assert open_descriptors() == before


def test_what_can_not_be_loaded_leaves_all_as_it_was(tmp_path: Path) -> None:
    listed = tmp_path / "list"
    listed.write_text(f"{hashlib.sha256(b'bad').hexdigest()} Bad\n")
    with Supervisor([configure("hashes", {"lists": [str(listed)]})], ids=started_ids()) as supervisor:
        supervisor.start()
        listed.write_text("not a list\n")
        with pytest.raises(ZygoteError, match="list:1: not a digest"):
            supervisor.renew()
        assert supervisor.outdated()
        done = scan_all(supervisor, tmp_path, b"bad", b"fine")
    assert verdicts(done) == ["infected", "clean"]


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
    good: Supervisor, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with supervise(spawn=good.spawn_from_zygote) as supervisor:
        supervisor.start()
        refuse_sends(monkeypatch, number, [False, True])
        done = [*submit(supervisor, tmp_path, *[b"fine"] * 4), *supervisor.finish()]
        assert verdicts(done) == ["clean"] * 4
        assert supervisor.workers_started == 1


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.ETOOMANYREFS])
def test_file_that_the_kernel_does_not_take_though_none_is_under_way_is_an_error(
    good: Supervisor, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with supervise(spawn=good.spawn_from_zygote) as supervisor:
        supervisor.start()
        refuse_sends(monkeypatch, number, [True])
        done = [*submit(supervisor, tmp_path, b"fine", EICAR), *supervisor.finish()]
        assert verdicts(done) == ["not_loaded", "infected"]
        assert supervisor.workers_started == 1


def test_worker_that_takes_nothing_costs_one_file(
    good: Supervisor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with supervise(spawn=good.spawn_from_zygote) as supervisor:
        supervisor.start()
        refuse_sends(monkeypatch, errno.EPIPE, [True])
        done = [*submit(supervisor, tmp_path, b"fine", EICAR), *supervisor.finish()]
        assert supervisor.workers_started == 2
    assert verdicts(done) == ["crashed", "infected"]
    assert "the worker took no file (Broken pipe): it ended with status 0" in str(done[0].verdict)


def test_leaving_early_closes_everything(bad: BadWorkers, tmp_path: Path) -> None:
    before = open_descriptors()
    with bad("loop") as supervisor:
        submit(supervisor, tmp_path, *[b"x"] * 10)
        pid = supervisor.worker_pid
    assert open_descriptors() == before
    assert not os.path.exists(f"/proc/{pid}")


def test_versions_are_told_by_the_worker_of_the_start_and_after_its_first_file_by_another(
    tmp_path: Path,
) -> None:
    spawned: list[None] = []

    def spawn() -> Worker:
        spawned.append(None)
        return supervisor.spawn_from_zygote()

    with supervise(spawn=spawn) as supervisor:
        supervisor.start()
        told = supervisor.versions()
        assert (told, len(spawned)) == (["hashes 1, 3 digests"], 1)
        assert verdicts([*submit(supervisor, tmp_path, EICAR), *supervisor.finish()]) == ["infected"]
        assert (supervisor.versions(), len(spawned)) == (told, 2)
        assert supervisor.workers_started == 1


def test_a_worker_that_could_not_be_asked_for_versions_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with supervise() as supervisor:
        supervisor.start()
        refuse_sends(monkeypatch, errno.EPIPE, [True])
        with pytest.raises(OSError, match="Broken pipe"):
            supervisor.versions()
        assert verdicts([*submit(supervisor, tmp_path, EICAR), *supervisor.finish()]) == ["infected"]
        assert supervisor.workers_started == 2
