from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any, Unpack

import pytest

from fdbroker.kernel import bpf, capabilities, landlock, namespaces, process, process_state, seccomp
from fdbroker.kernel.capabilities import CAP_SYS_ADMIN
from fdbroker.kernel.errors import SyscallError
from fdbroker.kernel.libc import MACHINE
from fdbroker.sandbox import (
    STRICT,
    Confinement,
    ConfinementError,
    Layer,
    LayerReport,
    LayerState,
    Limits,
    Profile,
    Worker,
    Zygote,
)
from fdbroker.sandbox import confine as confine_module
from fdbroker.sandbox import surroundings as surroundings_module
from fdbroker.sandbox.confine import Given, confine
from fdbroker.sandbox.filters import filter_for
from tests.processes import ChildError, in_child
from tests.sandbox.confined import WORKER_UID, Options, ask, confinement, puppet, puppets

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PROFILES = [Profile.SEALED, Profile.SCRATCH]


@pytest.fixture(scope="module")
def sealed() -> Iterator[Zygote]:
    with puppets() as zygote:
        yield zygote


@pytest.fixture(scope="module")
def of_scratch() -> Iterator[Zygote]:
    with puppets(profile=Profile.SCRATCH) as zygote:
        yield zygote


def report_of(**options: Unpack[Options]) -> LayerReport:
    with puppet(**options) as worker:
        return worker.report


def missing(report: LayerReport) -> set[Layer]:
    return {state.layer for state in report.missing()}


@pytest.mark.root
@pytest.mark.parametrize("profile", PROFILES)
def test_every_layer_is_in_force_for_a_worker_that_root_starts(
    profile: Profile, sealed: Zygote, of_scratch: Zygote
) -> None:
    with (sealed if profile is Profile.SEALED else of_scratch).spawn() as worker:
        report = worker.report
    assert missing(report) == set()
    assert report.state(Layer.IDS).note == f"uid {WORKER_UID}, gid {WORKER_UID}, no other groups"


@pytest.mark.root
@pytest.mark.parametrize("profile", PROFILES)
def test_worker_of_an_unprivileged_parent_keeps_the_uid_and_says_so(
    profile: Profile, unprivileged: Callable[[Callable[[], Any]], Any]
) -> None:
    def start() -> tuple[list[str], str]:
        report = report_of(profile=profile)
        return [layer.name for layer in missing(report)], report.state(Layer.IDS).note

    assert unprivileged(start) == (["IDS"], f"unchanged: uid {WORKER_UID}, as who started it")


@pytest.mark.root
def test_the_kernel_confirms_what_the_report_says() -> None:
    with puppet("wait_for_the_end", limits=Limits(cpu_seconds=77, descriptors=9)) as worker:
        directory = f"/proc/{worker.pid}"
        state = process_state.read_process_state(worker.pid or 0)
        assert state.uids == state.gids == (WORKER_UID,) * 4
        assert state.groups == ()
        assert not state.permitted | state.effective | state.inheritable | state.ambient
        assert state.no_new_privs
        assert state.seccomp == 2
        assert sorted(os.listdir(f"{directory}/fd")) == ["0", "1", "2"]
        assert os.readlink(f"{directory}/fd/0").startswith("socket:")
        assert {os.readlink(f"{directory}/fd/{number}") for number in (1, 2)} == {os.devnull}
        assert os.listdir(f"{directory}/root/") == []
        for name in ("mnt", "net", "ipc", "uts", "cgroup", "pid"):
            assert os.readlink(f"{directory}/ns/{name}") != os.readlink(f"/proc/self/ns/{name}")
        with open(f"{directory}/mountinfo") as file:
            [mount] = file.read().splitlines()
        assert {"ro", "nosuid", "nodev", "noexec"} <= set(mount.split()[5].split(","))
        with open(f"{directory}/limits") as file:
            limits = {line[:26].strip(): line[26:].split()[:2] for line in file}
        assert limits["Max open files"] == ["9", "9"]
        assert limits["Max file size"] == ["0", "0"]
        assert limits["Max core file size"] == ["0", "0"]
        assert limits["Max processes"] == ["0", "0"]
        assert limits["Max locked memory"] == ["0", "0"]
        assert limits["Max cpu time"] == ["77", "77"]
        assert limits["Max address space"][0] != "unlimited"


def test_neither_zygote_nor_worker_has_our_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FDBROKER_TEST_SECRET", "x")
    with puppet() as worker:
        assert ask(worker, "environment") in ([[], []], [["LC_CTYPE"], []])


def test_worker_is_the_first_process_of_a_namespace_of_its_own(sealed: Zygote) -> None:
    with sealed.spawn() as one, sealed.spawn() as other:
        assert [ask(one, "pid"), ask(other, "pid")] == [1, 1]


@pytest.mark.parametrize("uid", [0, -1, 65534, 0xFFFFFFFF])
def test_ids_that_are_no_workers_are_refused(uid: int) -> None:
    with pytest.raises(ValueError, match="can't have the id"):
        Confinement(uids=(uid,))
    with pytest.raises(ValueError, match="can't have the id"):
        Confinement(gid=uid)


@pytest.mark.root
def test_worker_of_root_has_an_unused_uid_where_none_is_named() -> None:
    with Zygote(None, "tests.sandbox.puppets:wait_for_the_end") as zygote, zygote.spawn() as one:
        assert who(one) == (60800, 60800)


def who(worker: Worker) -> tuple[int, int]:
    state = process_state.read_process_state(worker.pid or 0)
    return state.uids[0], state.gids[0]


@pytest.mark.root
def test_each_worker_has_a_uid_for_itself_while_it_lives() -> None:
    uids = (WORKER_UID, WORKER_UID + 1)
    with puppets(uids=uids) as zygote, zygote.spawn() as one:
        with zygote.spawn() as other:
            assert [who(one), who(other)] == [(uid, uid) for uid in uids]
            with pytest.raises(ConfinementError, match="all 2 uids are those of living workers"):
                zygote.spawn()
        with zygote.spawn() as other:
            assert who(other) == (WORKER_UID + 1, WORKER_UID + 1)


@pytest.mark.root
def test_who_is_not_root_can_not_name_another_uid() -> None:
    with pytest.raises(ChildError, match="uids: only root can start workers of other users"):
        in_child(lambda: report_of(uids=(WORKER_UID,)), uid=WORKER_UID)


@pytest.mark.root
def test_ids_that_can_not_be_changed_are_a_gap_that_only_who_asks_for_them_minds(
    unprivileged: Callable[[Callable[[], Any]], Any],
) -> None:
    with pytest.raises(ChildError, match="ConfinementError: ids: unchanged"):
        unprivileged(lambda: report_of(strict=frozenset({Layer.IDS})))


# ---- what a machine lacks: the same code in a child, with a kernel that refuses ----


def fail(*_arguments: object, **_named: object) -> object:
    raise SyscallError(errno.ENOSYS, "test")


def confine_here(wanted: Confinement, **given: object) -> LayerReport:
    """Confine a child, without a zygote; return its report."""
    surroundings = tuple(
        LayerState(layer, enforced=True, note="")
        for layer in (Layer.NAMESPACES, Layer.PID_NAMESPACE, Layer.EMPTY_ROOT)
    )

    def inside() -> str:
        # The test's own pipe must survive.
        confine_module.LAST_OF_ITS_OWN = 1023
        facts: dict[str, Any] = {
            "filter": filter_for(wanted),
            "ids": (WORKER_UID, WORKER_UID) if os.geteuid() == 0 else None,
            "zygote": os.pidfd_open(os.getppid()),
            "mapped": 1 << 40,
            "surroundings": surroundings,
            **given,
        }
        return confine(wanted, Given(**facts)).encode().hex()

    from fdbroker.sandbox.report import decode_report  # noqa: PLC0415

    return decode_report(bytes.fromhex(in_child(inside)))


# A child under its filter could not answer, and within its limits not even that.
HERE = frozenset({Layer.SECCOMP, Layer.LIMITS})


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
    with pytest.raises(ChildError, match=f"ConfinementError: {layer}: test"):
        confine_here(confinement(unsafe_without=HERE))


@pytest.mark.root
def test_no_worker_if_the_ids_can_not_be_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "change_ids", fail)
    with pytest.raises(ChildError, match="ConfinementError: ids: test"):
        confine_here(confinement(unsafe_without=HERE))


@pytest.mark.root
@pytest.mark.parametrize("ids", [None, (0, 0), (0, WORKER_UID), (WORKER_UID, 0)])
def test_root_never_starts_a_worker_that_is_root(ids: tuple[int, int] | None) -> None:
    with pytest.raises(ChildError, match="ids: a process that root starts needs"):
        confine_here(confinement(unsafe_without=HERE), ids=ids)


def test_no_worker_if_capabilities_are_left_after_giving_them_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capabilities, "capset", lambda _wanted: None)
    monkeypatch.setattr(capabilities, "capget", lambda: capabilities.Capabilities(1, 1, 0))
    with pytest.raises(ChildError, match="capabilities: after giving up all"):
        confine_here(confinement(unsafe_without=HERE))


@pytest.mark.parametrize("program", [b"", b"1234567", b"\xff" * 8])
def test_no_worker_without_its_filter(program: bytes) -> None:
    with pytest.raises(ChildError, match="ConfinementError: seccomp"):
        confine_here(confinement(), filter=program)


@pytest.mark.parametrize(
    ("module", "function", "replacement", "layer", "note"),
    [
        (landlock, "restrict_to", fail, Layer.LANDLOCK, "test(): ENOSYS, Function not implemented"),
        (process, "deny_write_execute", lambda: False, Layer.WRITE_EXECUTE, "Linux 6.3 has it first"),
    ],
)
def test_layer_that_the_machine_lacks_is_reported_and_missed_where_it_is_strict(
    module: object,
    function: str,
    replacement: Callable[..., object],
    layer: Layer,
    note: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, function, replacement)
    report = confine_here(confinement(unsafe_without=HERE))
    assert layer in missing(report)
    assert report.state(layer).note == note
    with pytest.raises(ChildError, match=f"ConfinementError: {layer.value}: "):
        confine_here(confinement(unsafe_without=HERE, strict=frozenset({layer})))


@pytest.mark.parametrize("abi", [3, 6])
def test_older_landlock_is_in_force_with_what_it_lacks_in_the_note(abi: int) -> None:
    state = report_of(landlock_abi=abi).state(Layer.LANDLOCK)
    assert state.enforced
    assert state.note.startswith(f"ABI {abi}, no rules")
    assert ("not of this kernel: TCP, ioctl on devices, abstract sockets" in state.note) == (abi == 3)
    assert ("not of this kernel" in state.note) == (abi < 6)


def test_without_landlock_a_sealed_worker_starts_and_one_that_may_open_does_not() -> None:
    state = report_of(landlock_abi=0).state(Layer.LANDLOCK)
    assert state == LayerState(
        Layer.LANDLOCK, enforced=False, note="this kernel has no Landlock, or it is not enabled at boot"
    )
    with pytest.raises(ConfinementError, match="landlock: this kernel has no Landlock"):
        report_of(landlock_abi=0, profile=Profile.SCRATCH)


@pytest.mark.root
def test_where_user_namespaces_are_refused_the_rest_is_in_force_and_the_report_says_so(
    unprivileged: Callable[[Callable[[], Any]], Any],
) -> None:
    def start(profile: Profile) -> list[tuple[str, str]]:
        # As on a system that leaves them to root: nobody gets a new namespace of any kind.
        process.set_no_new_privs()
        refusing = {"unshare": errno.EPERM}
        seccomp.install(bpf.assemble({}, machine=MACHINE, errnos=refusing, otherwise=bpf.ALLOW))
        return [(state.layer.name, state.note) for state in report_of(profile=profile).missing()]

    gaps = dict(unprivileged(lambda: start(Profile.SEALED)))
    assert gaps.keys() == {"NAMESPACES", "PID_NAMESPACE", "EMPTY_ROOT", "IDS"}
    why = "no user namespace: unshare(flags='0x10000000'): EPERM, Operation not permitted"
    assert gaps["PID_NAMESPACE"] == gaps["EMPTY_ROOT"] == why
    assert gaps["NAMESPACES"] == f"not mount, network, ipc, uts, cgroup: {why}"
    with pytest.raises(ChildError, match="ConfinementError: empty root: no user namespace"):
        unprivileged(lambda: start(Profile.SCRATCH))


@pytest.mark.root
def test_root_without_its_right_to_mount_starts_sealed_workers_and_says_what_they_lack() -> None:
    def start(profile: Profile) -> dict[str, str]:
        process.drop_from_bounding_set(CAP_SYS_ADMIN)  # as in most containers
        return {state.layer.name: state.note for state in report_of(profile=profile).missing()}

    why = "unshare: EPERM, Operation not permitted"
    assert in_child(lambda: start(Profile.SEALED)) == {
        "NAMESPACES": f"not mount, network, ipc, uts, cgroup: {why}",
        "PID_NAMESPACE": why,
        "EMPTY_ROOT": why,
    }
    with pytest.raises(ChildError, match=f"ConfinementError: empty root: {why}"):
        in_child(lambda: start(Profile.SCRATCH))


def test_strict_layers_are_the_documented_ones() -> None:
    assert {layer.value for layer in STRICT} == {
        "descriptors",
        "ids",
        "capabilities",
        "no_new_privs",
        "seccomp",
    }
    assert Confinement(profile=Profile.SCRATCH).must_hold() == STRICT | {Layer.EMPTY_ROOT, Layer.LANDLOCK}


# ---- the directory of its own, memory, code ----


def test_worker_can_use_its_directory(of_scratch: Zygote) -> None:
    with of_scratch.spawn() as one, puppet(profile=Profile.SCRATCH, jit=True) as other:
        for worker in (one, other):
            assert ask(worker, "use_scratch") == {"names": ["made", "renamed"], "left": "unpa", "after": []}


def test_directory_is_its_own_and_empty_for_the_next_one(of_scratch: Zygote) -> None:
    with of_scratch.spawn() as one, of_scratch.spawn() as other:
        assert [ask(one, "scratch_names"), ask(other, "scratch_names")] == [[], []]
        assert ask(one, "scratch_names") == ["mine"]


def test_full_directory_is_an_error_that_the_worker_survives() -> None:
    with puppet(profile=Profile.SCRATCH, scratch_size=4 << 20) as worker:
        assert ask(worker, "fill_scratch") == os.strerror(errno.ENOSPC)
        assert ask(worker, "pid") == 1


def test_file_beyond_its_limit_is_an_error_that_the_worker_survives() -> None:
    with puppet(profile=Profile.SCRATCH, limits=Limits(file_size=1 << 20)) as worker:
        assert ask(worker, "fill_scratch") == os.strerror(errno.EFBIG)


@pytest.fixture(scope="module")
def with_little_memory() -> Iterator[Zygote]:
    with puppets(limits=Limits(extra_memory=64 << 20)) as zygote:
        yield zygote


def test_memory_has_its_limit(with_little_memory: Zygote) -> None:
    with with_little_memory.spawn() as worker:
        assert ask(worker, "use_memory", size=16 << 20) == f"{16 << 20} bytes"
        assert ask(worker, "use_memory", size=128 << 20) == "MemoryError"


def test_garbage_of_a_long_life_does_not_fill_the_memory(with_little_memory: Zygote) -> None:
    with with_little_memory.spawn() as worker:
        assert ask(worker, "make_cycles", megabytes=256) == "done"


def test_who_compiles_while_it_runs_may_make_code_and_the_report_says_so() -> None:
    with puppet(jit=True) as worker:
        assert ask(worker, "write_executable") == 0
        assert missing(worker.report) - {Layer.IDS} == {Layer.WRITE_EXECUTE}
        assert worker.report.state(Layer.WRITE_EXECUTE).note == "not wanted: it compiles while it runs"


@pytest.mark.parametrize("profile", Profile)
@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_filter_is_made_for_each_machine(machine: str, jit: bool, profile: Profile) -> None:  # noqa: FBT001
    program = b"/bin/true" if profile is Profile.PROGRAM else None
    assert len(filter_for(Confinement(profile=profile, jit=jit, program=program), machine)) % 8 == 0


def test_confinement_survives_being_told() -> None:
    wanted = Confinement(
        profile=Profile.PROGRAM,
        program=b"/bin/\xff",
        readable=(b"/usr/share",),
        uids=(5, 6),
        gid=7,
        strict=frozenset({Layer.IDS}),
        limits=Limits(cpu_seconds=3),
        landlock_abi=2,
        unsafe_without=frozenset({Layer.LIMITS}),
    )
    assert Confinement.from_json(wanted.to_json()) == wanted


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"uids": (5, 5)}, "one is named twice"),
        ({"scratch_size": 0}, "without room"),
        ({"program": b"/bin/true"}, "the others can have none"),
        ({"profile": Profile.PROGRAM}, "needs one"),
        ({"profile": Profile.PROGRAM, "program": b"bin/true"}, "no absolute path"),
        ({"readable": (b"/usr/../etc",)}, "no absolute path"),
    ],
)
def test_confinement_that_means_nothing_is_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Confinement(**options)


def test_namespace_that_is_refused_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(kind: int) -> None:
        if kind == 0x40000000:
            raise SyscallError(errno.EPERM, "unshare", flags=hex(kind))

    monkeypatch.setattr(namespaces, "unshare", refuse)
    monkeypatch.setattr(surroundings_module, "_is_not_the_systems", lambda _name: False)
    state = surroundings_module._enter_others(None, None)
    assert not state.enforced
    assert state.note == "not network: unshare: EPERM, Operation not permitted"


@pytest.mark.root
def test_namespaces_that_are_its_services_own_need_not_be_the_workers_own() -> None:
    def enter(kinds: int) -> tuple[bool, str]:
        namespaces.unshare(kinds)
        refusing = {"unshare": errno.EPERM}
        process.set_no_new_privs()
        seccomp.install(bpf.assemble({}, machine=MACHINE, errnos=refusing, otherwise=bpf.ALLOW))
        state = surroundings_module._enter_others(None, None)
        return state.enforced, state.note

    network_and_ipc = namespaces.CLONE_NEWNET | namespaces.CLONE_NEWIPC
    enforced, note = in_child(lambda: enter(network_and_ipc))
    assert not enforced
    assert note.endswith("cgroup: unshare: EPERM, Operation not permitted")
    assert "network" not in note
    assert "ipc" not in note


def test_namespaces_that_are_shared_with_a_service_are_told_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(kind: int) -> None:
        if kind != namespaces.CLONE_NEWCGROUP:
            raise SyscallError(errno.EPERM, "unshare", flags=hex(kind))

    monkeypatch.setattr(namespaces, "unshare", refuse)
    monkeypatch.setattr(surroundings_module, "_is_not_the_systems", lambda name: name != "mount")
    state = surroundings_module._enter_others(None, None)
    assert state.enforced
    assert state.note == "mount, network (its service's), ipc (its service's), uts (its service's), cgroup"
