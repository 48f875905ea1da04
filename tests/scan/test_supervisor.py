from __future__ import annotations

import errno
import os
import signal
from typing import TYPE_CHECKING

import pytest

from fdbroker.kernel import sockets
from fdbroker.sandbox.confine import Confinement
from fdbroker.scan import supervisor as supervisor_module
from fdbroker.scan import worker
from fdbroker.scan.hashes import load
from fdbroker.scan.supervisor import DEFAULT_TIMEOUT, DEFAULT_WINDOW, Done, Supervisor
from fdbroker.scan.verdict import Clean, Error, Infected
from fdbroker.scan.worker import ANSWER, REQUEST, Code
from tests.sandbox.confined import started_ids
from tests.scan.descriptors import EICAR, EICAR_NAME, make_and_open, open_descriptors

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence
    from pathlib import Path

KNOWN = load()
SIZE = 11


def honest(channel: socket.socket) -> None:
    worker.serve(channel, KNOWN)


def supervise(
    *,
    serve: Callable[[socket.socket], object] | None = None,
    timeout: float = DEFAULT_TIMEOUT,
    window: int = DEFAULT_WINDOW,
) -> Supervisor:
    return Supervisor(KNOWN, ids=started_ids(), serve=serve, timeout=timeout, window=window)


def first_worker(
    misbehave: Callable[[socket.socket], object], *, timeout: float = DEFAULT_TIMEOUT
) -> Supervisor:
    """Return a supervisor whose first worker misbehaves, and whose others do not."""

    def serve(channel: socket.socket) -> None:
        # Forked, so this is how it was at the start of this worker.
        (misbehave if made.workers_started == 0 else honest)(channel)

    made = supervise(serve=serve, timeout=timeout)
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


def take(channel: socket.socket) -> tuple[int, int]:
    """Be a worker that takes a message: return number and size of its first request."""
    with (message := sockets.receive(channel, 1024)).descriptors:
        number, size = REQUEST.unpack_from(message.data)
        return number, size


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


GARBAGE: dict[str, Callable[[int, int], bytes]] = {
    "too short": lambda number, size: ANSWER.pack(number, Code.CLEAN, 0, size)[:-1],
    "too long": lambda number, size: ANSWER.pack(number, Code.CLEAN, 0, size) + b"\0",
    "far too long": lambda number, size: b"\0" * 60_000,
    "text": lambda number, size: b"clean",
    "of no file": lambda number, size: ANSWER.pack(number + 1000, Code.CLEAN, 0, size),
    "of a later file": lambda number, size: ANSWER.pack(number + 1, Code.CLEAN, 0, size),
    "of an unknown code": lambda number, size: ANSWER.pack(number, 6, 0, size),
    "of code 0": lambda number, size: ANSWER.pack(number, 0, 0, size),
    "clean with a detail": lambda number, size: ANSWER.pack(number, Code.CLEAN, 1, size),
    "clean after half of it": lambda number, size: ANSWER.pack(number, Code.CLEAN, 0, size // 2),
    "clean after more than it": lambda number, size: ANSWER.pack(number, Code.CLEAN, 0, size + 1),
    "infected with an unknown name": lambda number, size: ANSWER.pack(
        number, Code.INFECTED, len(KNOWN), size
    ),
    "infected with the last number": lambda number, size: ANSWER.pack(
        number, Code.INFECTED, 0xFFFFFFFF, size
    ),
    "infected after half of it": lambda number, size: ANSWER.pack(number, Code.INFECTED, 0, size // 2),
    "failed without an errno": lambda number, size: ANSWER.pack(number, Code.READ_FAILED, 0, 0),
    "failed with a strange errno": lambda number, size: ANSWER.pack(number, Code.READ_FAILED, 4096, 0),
    "short after all of it": lambda number, size: ANSWER.pack(number, Code.SHORT_READ, 0, size),
    "changed with a detail": lambda number, size: ANSWER.pack(number, Code.CHANGED, 1, 0),
}


@pytest.mark.parametrize("answer", GARBAGE.values(), ids=GARBAGE)
def test_garbage_is_an_error_and_the_worker_is_replaced(
    answer: Callable[[int, int], bytes], tmp_path: Path
) -> None:
    def misbehave(channel: socket.socket) -> None:
        sockets.send(channel, answer(*take(channel)))
        sockets.receive(channel, 64).descriptors.close()
        sockets.receive(channel, 64).descriptors.close()

    supervisor = first_worker(misbehave)
    done = scan_all(supervisor, tmp_path, b"x" * SIZE, b"fine", EICAR)
    assert verdicts(done) == ["worker_protocol", "clean", "infected"]
    assert supervisor.workers_started == 2


def test_right_answer_that_carries_a_descriptor_is_an_error(tmp_path: Path) -> None:
    def misbehave(channel: socket.socket) -> None:
        number, size = take(channel)
        sockets.send(channel, ANSWER.pack(number, Code.CLEAN, 0, size), [0])

    before = open_descriptors()
    done = scan_all(first_worker(misbehave), tmp_path, b"x" * SIZE, b"fine")
    assert verdicts(done)[1] == "clean"
    assert verdicts(done)[0] in {"worker_protocol", "worker_died"}
    assert open_descriptors() == before


def test_answer_before_the_question_is_an_error(tmp_path: Path) -> None:
    def misbehave(channel: socket.socket) -> None:
        number, size = take(channel)
        sockets.send(channel, ANSWER.pack(number, Code.CLEAN, 0, size))
        sockets.send(channel, ANSWER.pack(number + 1, Code.CLEAN, 0, 999))
        sockets.receive(channel, 64).descriptors.close()

    done = scan_all(first_worker(misbehave), tmp_path, b"x" * SIZE, EICAR, b"fine")
    assert verdicts(done) == ["clean", "worker_protocol", "clean"]


def test_stuck_worker_is_a_timeout_and_is_replaced(tmp_path: Path) -> None:
    def misbehave(channel: socket.socket) -> None:
        take(channel)
        while True:
            os.getpid()

    supervisor = first_worker(misbehave, timeout=1.0)
    with supervisor:
        supervisor.start()
        stuck = supervisor.worker_pid
        assert stuck is not None
        done = [*submit(supervisor, tmp_path, b"x" * SIZE, b"fine"), *supervisor.finish()]
        assert done[0].verdict == Error("timeout", "the worker did not answer within 1 s")
        assert verdicts(done) == ["timeout", "clean"]
        assert not os.path.exists(f"/proc/{stuck}")


def test_worker_that_dies_with_each_file_costs_each_file_and_ends(tmp_path: Path) -> None:
    supervisor = supervise(serve=take)
    done = scan_all(supervisor, tmp_path, *[b"x"] * 5)
    assert verdicts(done) == ["worker_died"] * 5
    assert supervisor.workers_started == 5


def test_worker_that_ends_before_any_file_costs_one_file_each_time(tmp_path: Path) -> None:
    done = scan_all(supervise(serve=lambda _channel: None), tmp_path, *[b"x"] * 3)
    assert verdicts(done) == ["worker_died"] * 3


def test_answers_that_a_worker_gave_before_it_died_count(tmp_path: Path) -> None:
    def misbehave(channel: socket.socket) -> None:
        number, size = take(channel)
        # With requests left unread, the kernel reports a reset first.
        sockets.send(channel, ANSWER.pack(number, Code.CLEAN, 0, size))

    done = scan_all(first_worker(misbehave), tmp_path, *[b"x" * SIZE] * 4)
    assert verdicts(done) == ["clean", "worker_died", "clean", "clean"]


def test_worker_killed_by_its_filter_is_told_apart(tmp_path: Path) -> None:
    def misbehave(channel: socket.socket) -> None:
        take(channel)
        os.open("/etc/passwd", os.O_RDONLY)

    done = scan_all(first_worker(misbehave), tmp_path, b"x")
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
    code: Code, detail: int, read: int, verdict: object, tmp_path: Path
) -> None:
    def answer(channel: socket.socket) -> None:
        sockets.send(channel, ANSWER.pack(take(channel)[0], code, detail, read))

    [done] = scan_all(supervise(serve=answer), tmp_path, b"x" * SIZE)
    assert done == Done(b"0", SIZE, verdict)  # type: ignore[arg-type]


@pytest.mark.parametrize("change", [lambda path: os.truncate(path, 3), lambda path: os.utime(path, (1, 1))])
def test_file_that_changed_by_the_parents_own_look_is_not_clean(
    change: Callable[[Path], None], tmp_path: Path
) -> None:
    supervisor = supervise(serve=answer_in_pairs)
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


def test_without_a_worker_every_file_is_an_error(tmp_path: Path) -> None:
    supervisor = supervise()
    supervisor._confinement = Confinement(b"", started_ids())
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


def answer_in_pairs(channel: socket.socket) -> None:
    while True:
        for number, size in [take(channel), take(channel)]:
            sockets.send(channel, ANSWER.pack(number, Code.CLEAN, 0, size))


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


def test_leaving_early_closes_everything(tmp_path: Path) -> None:
    before = open_descriptors()
    with supervise(serve=lambda channel: channel.recv(1)) as supervisor:
        submit(supervisor, tmp_path, *[b"x"] * 10)
        pid = supervisor.worker_pid
    assert open_descriptors() == before
    assert not os.path.exists(f"/proc/{pid}")
