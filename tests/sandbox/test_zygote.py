from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import socket
import threading
import time
from typing import TYPE_CHECKING

import pytest

from fdbroker.kernel import process_state, sockets
from fdbroker.sandbox import (
    ConfinementError,
    Ended,
    Layer,
    LayerReport,
    LayerState,
    Worker,
    Zygote,
    ZygoteError,
)
from fdbroker.sandbox import zygote as zygote_module
from fdbroker.sandbox.names import find, name_of
from fdbroker.sandbox.waiting import is_readable
from tests.processes import children_of, in_child, wait_until
from tests.sandbox import puppets as functions
from tests.sandbox.confined import PUPPETS, ask, confinement, puppet, puppets, started_ids

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


def start(warm: str | None = None, *, timeout: float = 60.0) -> Zygote:
    name = None if warm is None else f"{PUPPETS}:{warm}"
    return Zygote(name, f"{PUPPETS}:wait_for_the_end", confinement=confinement(), timeout=timeout)


def zygote_itself(zygote: Zygote) -> int:
    """Return the process that forks workers: a child of the one that was started."""
    assert zygote.pid is not None
    return children_of(zygote.pid)[0]


def is_running(pid: int | None) -> bool:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b") ")[2][:1] not in b"ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def open_descriptors() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))


# ---- starting ----


def begin(warm: str) -> Zygote:
    """Begin to start one, and do not wait for it."""
    return Zygote(f"{PUPPETS}:{warm}", f"{PUPPETS}:wait_for_the_end", confinement=confinement(), wait=False)


def test_who_does_not_wait_for_the_start_waits_for_the_first_worker() -> None:
    work = f"{PUPPETS}:wait_for_the_end"
    with (
        Zygote(None, work, confinement=confinement(), wait=False) as zygote,
        zygote.spawn() as worker,
    ):
        assert zygote.has_started
        assert is_running(worker.pid)


def test_what_goes_wrong_while_nobody_waits_is_told_with_the_first_worker() -> None:
    before = open_descriptors()
    with begin("raise_an_error") as zygote:
        with pytest.raises(ZygoteError, match="the zygote did not start: "):
            zygote.spawn()
        with pytest.raises(ZygoteError, match="closed"):
            zygote.spawn()
    assert open_descriptors() == before


def test_who_says_why_it_can_not_load_is_told_by_its_text_alone() -> None:
    with pytest.raises(ZygoteError) as raised, begin("say_why") as zygote:
        zygote.spawn()
    assert str(raised.value) == "the database is not there; put it there"


def test_one_that_is_still_loading_is_ended_at_once() -> None:
    began = time.monotonic()
    with begin("be_slow") as zygote:
        pid = zygote.pid
        assert not zygote.has_started
    assert not is_running(pid)
    assert time.monotonic() - began < zygote_module._SECONDS_TO_DIE


def test_state_and_arguments_reach_the_worker() -> None:
    with (
        Zygote(functions.load, functions.answer, {"word": ["x", 1]}, confinement=confinement()) as zygote,
        zygote.spawn() as worker,
    ):
        assert ask(worker, "told") == ["x", 1]


@pytest.mark.parametrize(
    ("warm", "text"),
    [
        ("raise_an_error", "RuntimeError: the database is not there"),
        ("no_such_function", "ImportError: tests.sandbox.puppets has no no_such_function"),
        ("end_the_zygote", "it ended"),
        ("leave_a_thread", "2 threads are running after tests.sandbox.puppets:leave_a_thread"),
    ],
)
def test_zygote_that_does_not_start_says_why_and_leaves_nothing(warm: str, text: str) -> None:
    before, children = open_descriptors(), children_of(os.getpid())
    with pytest.raises(ZygoteError, match=text):
        start(warm)
    assert open_descriptors() == before
    assert set(children_of(os.getpid())) <= set(children)


def test_zygote_that_takes_too_long_is_ended() -> None:
    before, children = open_descriptors(), children_of(os.getpid())
    with pytest.raises(ZygoteError, match="did not answer in time"):
        start("be_slow", timeout=1.0)
    assert open_descriptors() == before
    assert set(children_of(os.getpid())) <= set(children)


def test_zygote_inherits_no_descriptor_and_no_signal_mask() -> None:
    read_end, write_end = os.pipe()
    os.set_inheritable(write_end, True)
    old = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        with start() as zygote, zygote.spawn() as worker:
            os.close(write_end)
            assert os.read(read_end, 1) == b""
            with open(f"/proc/{worker.pid}/status") as file:
                assert "SigBlk:\t0000000000000000\n" in file.readlines()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)
        os.close(read_end)


def test_zygote_starts_where_many_threads_run_and_outlives_the_one_that_started_it() -> None:
    started: list[Zygote] = []
    thread = threading.Thread(target=lambda: started.append(start()))
    other = threading.Thread(target=(ended := threading.Event()).wait)
    other.start()
    thread.start()
    thread.join()
    try:
        with started[0] as zygote, zygote.spawn() as worker:
            assert is_running(worker.pid)
    finally:
        ended.set()
        other.join()


def test_many_threads_may_spawn() -> None:
    workers: list[Worker] = []
    with start() as zygote:
        threads = [threading.Thread(target=lambda: workers.append(zygote.spawn())) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len({worker.pid for worker in workers}) == 8
        for worker in workers:
            worker.stop()


def test_zygote_keeps_what_starts_workers_and_no_other_capability(zygote_of_any: Zygote) -> None:
    state = process_state.read_process_state(zygote_itself(zygote_of_any))
    assert state.permitted | state.effective | state.inheritable == (1 << 6 | 1 << 7 | 1 << 21)
    assert state.no_new_privs


# ---- ends ----


@pytest.fixture(scope="module")
def zygote_of_any() -> Iterator[Zygote]:
    with puppets("be_told") as zygote:
        yield zygote


@contextlib.contextmanager
def told(zygote: Zygote, work: str) -> Iterator[Worker]:
    """Yield a worker that is this."""
    with zygote.spawn() as worker:
        sockets.send(worker.channel, work.encode())
        yield worker


@pytest.mark.parametrize(
    ("work", "ended"),
    [
        ("end_with_3", Ended(3, None, "it ended with status 3")),
        ("return_at_once", Ended(0, None, "it ended with status 0")),
        ("divide_by_zero", Ended(1, None, "it ended with status 1")),
        ("open_a_file", Ended(None, signal.SIGSYS, "it made a system call that it may not make (SIGSYS)")),
        ("crash", Ended(None, signal.SIGSEGV, "it crashed (SIGSEGV)")),
    ],
)
def test_end_of_a_worker_is_told(zygote_of_any: Zygote, work: str, ended: Ended) -> None:
    with told(zygote_of_any, work) as worker:
        assert worker.wait(10.0) == ended
        assert worker.wait() == worker.stop() == ended


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (signal.SIGKILL, "it was killed (SIGKILL)"),
    ],
)
def test_signal_that_ended_a_worker_is_told(zygote_of_any: Zygote, number: int, text: str) -> None:
    with told(zygote_of_any, "wait_for_the_end") as worker:
        os.kill(worker.pid or 0, number)
        assert str(worker.wait(10.0)) == text


@pytest.mark.parametrize(
    ("code", "status", "text"),
    [
        (os.CLD_KILLED, signal.SIGXCPU, "it used up its CPU time (SIGXCPU)"),
        (os.CLD_DUMPED, signal.SIGBUS, "it crashed (SIGBUS)"),
        (os.CLD_KILLED, signal.SIGRTMIN + 1, f"it was ended by signal {signal.SIGRTMIN + 1}"),
        (None, 0, "its zygote is gone, and so is it"),
    ],
)
def test_each_way_to_end_has_its_words(code: int | None, status: int, text: str) -> None:
    assert zygote_module._how(code, status).text == text


def test_worker_beyond_its_cpu_time_is_killed() -> None:
    from fdbroker.sandbox import Limits  # noqa: PLC0415

    with puppet("run_for_ever", limits=Limits(cpu_seconds=1)) as worker:
        assert str(worker.wait(20.0)) == "it was killed (SIGKILL)"


def test_worker_that_goes_on_is_killed_at_the_stop_and_not_before(zygote_of_any: Zygote) -> None:
    with told(zygote_of_any, "run_for_ever") as worker:
        assert worker.wait(0.0) is None
        assert is_running(worker.pid)
        assert str(worker.stop()) == "it was killed (SIGKILL)"


def test_worker_ends_with_its_zygote() -> None:
    with puppets("run_for_ever") as zygote, zygote.spawn() as worker:
        assert zygote.pid is not None
        os.kill(zygote.pid, signal.SIGKILL)
        wait_until(lambda: not is_running(worker.pid), "the worker is gone")
        assert worker.wait(10.0) == Ended(None, None, "its zygote is gone, and so is it")
        with pytest.raises(ZygoteError, match="the zygote is gone"):
            zygote.spawn()


def test_worker_ends_when_the_zygote_is_closed() -> None:
    with puppets("run_for_ever") as zygote:
        worker = zygote.spawn()
    assert not is_running(worker.pid)
    assert worker.stop().text == "its zygote is gone, and so is it"
    with pytest.raises(ZygoteError, match="the zygote is closed"):
        zygote.spawn()


@pytest.mark.parametrize("how", [os._exit, lambda _status: os.kill(os.getpid(), signal.SIGKILL)])
def test_zygote_and_workers_end_with_their_parent(how: Callable[[int], object]) -> None:
    def leave_them_behind() -> list[int | None]:
        zygote = puppets("run_for_ever")
        worker = zygote.spawn()
        told = json.dumps([zygote.pid, worker.pid]).encode()
        os.write(write_end, told)
        how(0)
        return []

    read_end, write_end = os.pipe()
    with pytest.raises(AssertionError, match="ended without an answer"):
        in_child(leave_them_behind)
    pids = json.loads(os.read(read_end, 100))
    os.close(read_end)
    os.close(write_end)
    for pid in pids:
        wait_until(lambda pid=pid: not is_running(pid), "it is gone")  # type: ignore[misc]


def test_zygote_that_is_not_warm_yet_ends_with_its_parent_whichever_thread_started_it(tmp_path: Path) -> None:
    def start_from_a_thread() -> None:
        arguments = {"told": str(tmp_path / "told")}
        warm, work = f"{PUPPETS}:tell_and_be_slow", f"{PUPPETS}:wait_for_the_end"
        threading.Thread(
            target=lambda: Zygote(warm, work, arguments, confinement=confinement()), daemon=True
        ).start()
        assert is_readable(reader, 20.0)
        os.kill(os.getpid(), signal.SIGKILL)

    os.mkfifo(tmp_path / "told")
    reader = os.open(tmp_path / "told", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with pytest.raises(AssertionError, match="ended without an answer"):
        in_child(start_from_a_thread)
    assert os.read(reader, 2) == b"."
    # Whoever could write is gone.
    assert is_readable(reader, 20.0)
    assert os.read(reader, 1) == b""
    os.close(reader)


@pytest.mark.root
def test_siblings_have_no_descriptor_of_each_other(zygote_of_any: Zygote) -> None:
    with zygote_of_any.spawn() as one, zygote_of_any.spawn() as other:
        # Its end of the channel was the only one, so its end is seen though the sibling lives.
        one.kill()
        assert str(one.wait(10.0)) == "it was killed (SIGKILL)"
        assert other.wait(0.0) is None
        assert [sorted(os.listdir(f"/proc/{other.pid}/fd"))] == [["0", "1", "2"]]


@pytest.mark.root
def test_nothing_stays_open_after_many_workers() -> None:
    before = open_descriptors()
    with puppets("wait_for_the_end") as zygote:
        proper = zygote_itself(zygote)
        held = len(os.listdir(f"/proc/{proper}/fd"))
        for _ in range(20):
            with zygote.spawn():
                pass
        wait_until(
            lambda: len(os.listdir(f"/proc/{proper}/fd")) == held, "the zygote closed what it had of them"
        )
    assert open_descriptors() == before


# ---- a zygote or a worker that does not do what it should ----


def test_parent_waits_for_no_zygote_that_does_not_answer() -> None:
    with start() as zygote:
        proper = zygote_itself(zygote)
        os.kill(proper, signal.SIGSTOP)
        with pytest.raises(ZygoteError, match="did not answer in time, so it was ended"):
            zygote.spawn(timeout=0.5)
        wait_until(lambda: not is_running(proper), "it is gone")
        with pytest.raises(ZygoteError, match="closed"):
            zygote.spawn()


def speaking_worker(*said: bytes) -> Worker:
    """Return a worker, in truth a process of ours, whose first messages are these."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(0.0)
    read_end, write_end = os.pipe()
    os.close(write_end)
    with theirs:
        for message in said:
            sockets.send(theirs, message)
    return Worker(ours, os.pidfd_open(os.getpid()), read_end)


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ((b"\1nonsense",), "the report"),
        ((b"\0seccomp: not here",), "seccomp: not here"),
        ((b"\2",), "ended before it was confined"),
        ((), "ended before it was confined"),
    ],
)
def test_worker_that_reports_no_layers_is_none(said: tuple[bytes, ...], text: str) -> None:
    worker = speaking_worker(*said)
    with pytest.raises(ConfinementError, match=text):
        worker.confirm(confinement(), time.monotonic() + 5.0)
    worker.wait(1.0)


@pytest.mark.parametrize(
    ("lacks", "strict", "text"),
    [
        ({Layer.SECCOMP, Layer.LANDLOCK, Layer.CAPABILITIES}, {}, "missing: capabilities, seccomp$"),
        ({Layer.LANDLOCK}, {Layer.LANDLOCK}, "missing: landlock$"),
        ({Layer.IDS}, {Layer.IDS}, "missing: ids$"),
        # That of nobody who may not change them; this process is no worker, which is seen next.
        ({Layer.IDS}, {}, "otherwise than the worker"),
    ],
)
def test_worker_that_says_itself_that_it_lacks_a_strict_layer_is_none(
    lacks: set[Layer], strict: set[Layer], text: str
) -> None:
    report = LayerReport(tuple(LayerState(layer, layer not in lacks, "") for layer in Layer))
    worker = speaking_worker(b"\1" + report.encode())
    with pytest.raises(ConfinementError, match=text):
        worker.confirm(confinement(strict=frozenset(strict)), time.monotonic() + 5.0)
    worker.wait(1.0)


def test_parent_does_not_believe_what_the_kernel_contradicts(
    zygote_of_any: Zygote, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = process_state.read_process_state
    monkeypatch.setattr(
        process_state,
        "read_process_state",
        lambda pid: read(pid)._replace(no_new_privs=False, seccomp=0, permitted=4, uids=(1, 1, 1, 0)),
    )
    with pytest.raises(
        ConfinementError, match="otherwise than the worker: ids, capabilities, no_new_privs, seccomp"
    ):
        zygote_of_any.spawn()


def test_spawn_without_a_descriptor_to_be_had_leaves_nothing_behind(
    zygote_of_any: Zygote, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: object) -> object:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    before = open_descriptors()
    monkeypatch.setattr(socket, "socketpair", fail)
    with pytest.raises(OSError, match="Too many open files"):
        zygote_of_any.spawn()
    assert open_descriptors() == before


def test_worker_can_not_pass_a_descriptor_to_its_parent(zygote_of_any: Zygote) -> None:
    with zygote_of_any.spawn() as worker:
        assert worker.channel.getsockopt(socket.SOL_SOCKET, sockets.SO_PASSRIGHTS) == 0


# ---- names ----


@pytest.mark.parametrize(
    "function",
    [
        lambda: None,
        "no colon",
        "module:",
        "a.b:c d",
        "os:system; ls",
        b"os:getpid",
        type("Odd", (), {"__module__": "__main__", "__qualname__": "f"})(),
    ],
)
def test_what_can_not_be_imported_by_name_is_refused(function: Callable[..., object]) -> None:
    with pytest.raises(ValueError, match=r"can't be imported by its name|no name of a function"):
        name_of(function)


def test_name_of_a_function_finds_it() -> None:
    assert find(name_of(functions.count)) is functions.count
    assert find("os.path:join") is os.path.join


@pytest.mark.parametrize("name", ["no_such_module_at_all:f", "os:no_such_thing", "os:sep"])
def test_name_that_finds_no_function_is_an_import_error(name: str) -> None:
    with pytest.raises(ImportError):
        find(name)


def test_worker_ids_are_those_of_the_tests(zygote_of_any: Zygote) -> None:
    with zygote_of_any.spawn() as worker:
        ids = started_ids() or (os.getuid(), os.getgid())
        state = process_state.read_process_state(worker.pid or 0)
        assert (state.uids[0], state.gids[0]) == ids
