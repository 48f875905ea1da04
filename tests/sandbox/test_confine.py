from __future__ import annotations

import errno
import json
import os
import signal
from typing import TYPE_CHECKING

import pytest

from fdbroker.kernel import capabilities, dumpable, landlock, process, process_state, sockets
from fdbroker.kernel.errors import SyscallError
from fdbroker.kernel.landlock import LandlockReport
from fdbroker.sandbox import confine as confine_module
from fdbroker.sandbox import process as process_module
from fdbroker.sandbox.confine import Confinement, ConfinementError, Limits
from fdbroker.sandbox.process import start_confined
from fdbroker.sandbox.report import Layer, LayerReport
from fdbroker.sandbox.worker_seccomp import worker_filter
from tests.processes import ChildError, in_child, wait_until
from tests.sandbox.confined import IDS, KILLING, REFUSING, WORKER_UID, answers_one, ask, started_ids

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable


def wait_for_the_end(channel: socket.socket) -> None:
    sockets.receive(channel, 1)


def report_of(confinement: Confinement) -> LayerReport:
    child, report = start_confined(confinement, wait_for_the_end)
    child.stop()
    return report


def missing(report: LayerReport) -> set[Layer]:
    return {state.layer for state in report.missing()}


@pytest.mark.root
def test_every_layer_is_in_force_for_a_worker_that_root_starts() -> None:
    report = report_of(Confinement(KILLING, IDS))
    assert missing(report) == set()
    assert report.state(Layer.IDS).note == f"uid {WORKER_UID}, gid {WORKER_UID}, no other groups"


@pytest.mark.root
def test_worker_of_an_unprivileged_parent_keeps_the_uid_and_says_so() -> None:
    def start() -> tuple[list[str], str]:
        dumpable.set_dumpable(True)  # a change of ids took it; a program that is started has it
        report = report_of(Confinement(KILLING))
        return [layer.name for layer in missing(report)], report.state(Layer.IDS).note

    assert in_child(start, uid=WORKER_UID) == (["IDS"], f"unchanged: uid {WORKER_UID}, as who started it")


@pytest.mark.root
def test_the_kernel_confirms_what_the_report_says() -> None:
    child, _ = start_confined(Confinement(KILLING, IDS, Limits(cpu_seconds=77)), wait_for_the_end)
    try:
        directory = f"/proc/{child.pid}"
        state = process_state.read_process_state(child.pid)
        assert state.uids == state.gids == (WORKER_UID,) * 4
        assert state.groups == ()
        assert not state.permitted | state.effective | state.inheritable | state.ambient
        assert state.no_new_privs
        assert state.seccomp == 2
        assert os.listdir(f"{directory}/fd") == ["0"]
        assert os.readlink(f"{directory}/fd/0").startswith("socket:")
        assert os.readlink(f"{directory}/root").endswith("(deleted)")
        assert os.readlink(f"{directory}/cwd").endswith("(deleted)")
        assert os.listdir(f"{directory}/root") == []
        assert os.getsid(child.pid) == child.pid
        with open(f"{directory}/limits") as file:
            limits = {line[:26].strip(): line[26:].split()[:2] for line in file}
        assert limits["Max open files"] == ["8", "8"]
        assert limits["Max file size"] == ["0", "0"]
        assert limits["Max core file size"] == ["0", "0"]
        assert limits["Max processes"] == ["0", "0"]
        assert limits["Max locked memory"] == ["0", "0"]
        assert limits["Max cpu time"] == ["77", "77"]
        assert limits["Max address space"][0] != "unlimited"
    finally:
        child.stop()


def test_worker_has_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FDBROKER_TEST_SECRET", "x")
    child, _ = start_confined(Confinement(REFUSING, started_ids()), answers_one(lambda _: sorted(os.environ)))
    try:
        with open(os.devnull, "rb") as null:
            assert ask(child, null.fileno()) == []
    finally:
        child.stop()


@pytest.mark.root
@pytest.mark.parametrize("ids", [None, (0, 0), (0, WORKER_UID), (WORKER_UID, 0)])
def test_root_never_starts_a_worker_that_is_root(ids: tuple[int, int] | None) -> None:
    with pytest.raises(ConfinementError, match="ids: a process that root starts needs"):
        report_of(Confinement(KILLING, ids))


@pytest.mark.root
def test_who_is_not_root_can_not_name_another_uid() -> None:
    with pytest.raises(ChildError, match="ids: only root can change them"):
        in_child(lambda: report_of(Confinement(KILLING, IDS)), uid=WORKER_UID)


@pytest.mark.parametrize("program", [b"", b"1234567", b"\xff" * 8])
def test_no_worker_without_its_filter(program: bytes) -> None:
    with pytest.raises(ConfinementError, match="seccomp"):
        report_of(Confinement(program, started_ids()))


def fail(*_arguments: object, **_named: object) -> object:
    raise SyscallError(errno.ENOSYS, "test")


@pytest.mark.parametrize(
    ("module", "function", "layer"),
    [
        (process, "close_range", "descriptors"),
        (process, "set_no_new_privs", "no_new_privs"),
        (capabilities, "capset", "capabilities"),
    ],
)
def test_no_worker_without_a_strict_layer(
    module: object, function: str, layer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, function, fail)
    with pytest.raises(ConfinementError, match=f"{layer}: test"):
        report_of(Confinement(KILLING, started_ids()))


@pytest.mark.root
def test_no_worker_if_the_ids_can_not_be_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "change_ids", fail)
    with pytest.raises(ConfinementError, match="ids: test"):
        report_of(Confinement(KILLING, IDS))


def test_no_worker_if_capabilities_are_left_after_giving_them_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capabilities, "capset", lambda _wanted: None)
    monkeypatch.setattr(capabilities, "capget", lambda: capabilities.Capabilities(1, 1, 0))
    with pytest.raises(ConfinementError, match="capabilities: after giving up all"):
        report_of(Confinement(KILLING, started_ids()))


@pytest.mark.root
@pytest.mark.parametrize(
    ("module", "function", "replacement", "layer", "note"),
    [
        (
            landlock,
            "restrict_to",
            lambda _trees: LandlockReport(0, (), ("files",)),
            Layer.LANDLOCK,
            "this kernel has no Landlock, or it is not enabled at boot",
        ),
        (landlock, "restrict_to", fail, Layer.LANDLOCK, "test(): ENOSYS, Function not implemented"),
        (process, "deny_write_execute", lambda: False, Layer.WRITE_EXECUTE, "Linux 6.3 has it first"),
        (os, "chroot", fail, Layer.EMPTY_ROOT, "test(): ENOSYS, Function not implemented"),
        (dumpable, "set_dumpable", fail, Layer.NOT_DUMPABLE, "test(): ENOSYS, Function not implemented"),
    ],
)
def test_layer_that_the_machine_lacks_is_reported(
    module: object,
    function: str,
    replacement: Callable[..., object],
    layer: Layer,
    note: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, function, replacement)
    report = report_of(Confinement(KILLING, IDS))
    assert missing(report) == {layer}
    assert report.state(layer).note == note


@pytest.mark.root
def test_older_landlock_is_in_force_with_what_it_lacks_in_the_note(monkeypatch: pytest.MonkeyPatch) -> None:
    old = landlock.restrict_to
    monkeypatch.setattr(landlock, "restrict_to", lambda trees: old(trees, abi=3))
    state = report_of(Confinement(KILLING, IDS)).state(Layer.LANDLOCK)
    assert state.enforced
    assert (
        state.note == "ABI 3, no rules; not of this kernel: TCP, ioctl on devices, abstract sockets, signals"
    )


def test_second_thread_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confine_module, "_count_threads", lambda: 2)
    with pytest.raises(ConfinementError, match="2 threads"):
        report_of(Confinement(KILLING, started_ids()))


def test_parent_does_not_believe_what_the_kernel_contradicts(monkeypatch: pytest.MonkeyPatch) -> None:
    read = process_state.read_process_state
    monkeypatch.setattr(
        process_state,
        "read_process_state",
        lambda pid: read(pid)._replace(no_new_privs=False, seccomp=0, permitted=4, uids=(1, 1, 1, 0)),
    )
    with pytest.raises(
        ConfinementError, match="says otherwise than the process: ids, capabilities, no_new_privs, seccomp"
    ):
        report_of(Confinement(KILLING, started_ids()))


def test_child_that_dies_on_the_way_is_an_error_that_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_module, "confine", lambda _wanted, parent: os._exit(9))
    with pytest.raises(ConfinementError, match="it ended with status 9"):
        report_of(Confinement(KILLING, started_ids()))


def test_child_that_reports_nonsense_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nonsense:
        def encode(self) -> bytes:
            return b"nonsense"

    monkeypatch.setattr(process_module, "confine", lambda _wanted, parent: Nonsense())
    with pytest.raises(ConfinementError, match="the report"):
        report_of(Confinement(KILLING, started_ids()))


def test_failed_start_leaves_neither_process_nor_descriptor() -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    with pytest.raises(ConfinementError):
        report_of(Confinement(b"", started_ids()))
    assert sorted(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_start_without_a_descriptor_to_be_had_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, "pidfd_open", fail)
    with pytest.raises(OSError, match="ENOSYS"):
        report_of(Confinement(KILLING, started_ids()))
    assert sorted(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b") ")[2][:1] not in b"ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_worker_dies_with_its_parent() -> None:
    def leave_one_behind() -> int:
        child, _ = start_confined(Confinement(KILLING, started_ids()), wait_for_ever)
        return child.pid

    def wait_for_ever(_channel: socket.socket) -> None:
        while True:
            os.getpid()

    pid = in_child(leave_one_behind)
    wait_until(lambda: not is_running(pid), "the worker is gone")


@pytest.mark.parametrize(
    ("end", "text"),
    [
        (lambda _channel: os._exit(3), "it ended with status 3"),
        (lambda _channel: None, "it ended with status 0"),
        (lambda _channel: 1 / 0, "it ended with status 1"),
    ],
)
def test_end_of_a_worker_is_told(end: Callable[[socket.socket], object], text: str) -> None:
    child, _ = start_confined(Confinement(KILLING, started_ids()), end)
    assert child.stop(grace=10.0) == text
    assert child.stop() == text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (signal.SIGKILL, "it was killed (SIGKILL)"),
        (signal.SIGSEGV, "it crashed (SIGSEGV)"),
        (signal.SIGXCPU, "it used up its CPU time (SIGXCPU)"),
        (signal.SIGRTMIN + 1, f"it was ended by signal {signal.SIGRTMIN + 1}"),
    ],
)
def test_signal_that_ended_a_worker_is_told(number: int, text: str) -> None:
    child, _ = start_confined(Confinement(KILLING, started_ids()), wait_for_the_end)
    os.kill(child.pid, number)
    assert child.stop(grace=10.0) == text


@pytest.mark.root
def test_channel_takes_the_place_of_standard_input_also_where_that_is_closed() -> None:
    def start_with_standard_input_closed() -> str:
        os.close(0)
        return json.dumps([state.layer.name for state in report_of(Confinement(KILLING, IDS)).missing()])

    assert in_child(start_with_standard_input_closed) == "[]"


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_filter_is_made_for_each_machine(machine: str) -> None:
    assert len(worker_filter(machine)) % 8 == 0
