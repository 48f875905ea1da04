"""From handover to a serving broker, piece by piece: what is verified, and how a difference is told."""

from __future__ import annotations

import contextlib
import errno
import gc
import importlib.machinery
import importlib.util
import json
import marshal
import os
import py_compile
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fdbroker.broker import entry, main
from fdbroker.broker.entry import TrustedFinder, UntrustedSourceError, check_only_root_writes
from fdbroker.broker.identity import LevelProbe, probe_level
from fdbroker.broker.main import StartError
from fdbroker.broker.roots import RootError, hold_roots
from fdbroker.broker.server import Broker
from fdbroker.kernel import dumpable, landlock, seccomp
from fdbroker.kernel.errors import SyscallError
from fdbroker.kernel.landlock import LandlockReport
from fdbroker.kernel.process_state import read_process_state
from fdbroker.policy.rules import Root
from tests.broker.conftest import no_descriptor_left
from tests.broker.speaking import Speaker, descriptors_of, read_audit
from tests.processes import in_child
from tests.running_broker import BROKER_UID, policy, rule

if TYPE_CHECKING:
    from collections.abc import Iterator

SOURCES = Path(entry.__file__).parents[1]


# The handover


def handover_document(**changes: object) -> dict[str, Any]:
    return {
        "uid": BROKER_UID,
        "gid": BROKER_UID,
        "policy": policy("/srv"),
        "listeners": [[5, "broker.seqpacket", None], [7, "clamd", "clamd"]],
        "connections": [[6, "worker"]],
        "control": None,
        "audit": 1,
        "ready": None,
        "notify": None,
        "watchdog_usec": None,
        "held": [],
        "roots": [],
        "cgroup_root": "/sys/fs/cgroup",
        "boot_id": "boot",
        "version": "1.2",
        "launcher_fingerprint": "0a-0b",
        "seccomp": "0600",
        "helper_seccomp": ["0600", "0600"],
    } | changes


def handover_descriptor(document: object) -> int:
    descriptor = os.memfd_create("handover")
    os.write(descriptor, document if isinstance(document, bytes) else json.dumps(document).encode())
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def test_handover_is_read_to_its_end_and_closed() -> None:
    with no_descriptor_left():
        handover = main.read_handover(handover_descriptor(handover_document(roots=[["tree", 8]])))
    assert (handover.uid, handover.gid) == (BROKER_UID, BROKER_UID)
    assert handover.listeners == [(5, "broker.seqpacket", None), (7, "clamd", "clamd")]
    assert handover.connections == [(6, "worker")]
    assert handover.roots == {"tree": 8}
    assert handover.seccomp == b"\x06\x00"
    assert handover.launcher_fingerprint == "0a-0b"
    assert handover.policy.roots[0].path == b"/srv"


@pytest.mark.parametrize("key", handover_document())
def test_handover_without_one_of_its_keys_does_not_start(key: str) -> None:
    document = handover_document()
    del document[key]
    with (
        no_descriptor_left(),
        pytest.raises(StartError, match=r"handover can't be read.*start the broker"),
    ):
        main.read_handover(handover_descriptor(document))


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"7", b"\xff", b"null"])
def test_handover_that_is_none_does_not_start(text: bytes) -> None:
    with no_descriptor_left(), pytest.raises(StartError, match="handover can't be read"):
        main.read_handover(handover_descriptor(text))


@pytest.mark.parametrize(
    "changes",
    [
        {"uid": "x"},
        {"listeners": [5]},
        {"listeners": [[5, "broker.seqpacket"]]},
        {"listeners": 5},
        {"seccomp": "xyz"},
        {"helper_seccomp": ["xyz", ""]},
        {"helper_seccomp": [""]},
        {"seccomp": 5},
        {"control": "7"},
        {"held": 7},
        {"roots": [8]},
        {"roots": [["tree", "x"]]},
    ],
)
def test_handover_with_an_impossible_value_does_not_start(changes: dict[str, object]) -> None:
    with no_descriptor_left(), pytest.raises(StartError, match="handover can't be read"):
        main.read_handover(handover_descriptor(handover_document(**changes)))


def test_handover_that_is_no_descriptor_does_not_start() -> None:
    with pytest.raises(StartError, match="Bad file descriptor"):
        main.read_handover(max(descriptors_of()) + 100)


def test_policy_that_can_not_be_used_is_told_with_its_place() -> None:
    document = handover_document(policy=policy("/srv", rule("x", root="nowhere")))
    with (
        no_descriptor_left(),
        pytest.raises(StartError, match=r"compiled policy.*rules\[0\]\.root is 'nowhere'"),
    ):
        main.read_handover(handover_descriptor(document))


# Descriptors


def handover(**changes: object) -> main.Handover:
    return main.read_handover(handover_descriptor(handover_document(**changes)))


def present() -> list[int]:
    return sorted(number for number in descriptors_of() if number > 2)


def test_descriptors_that_were_promised_are_all_there_are() -> None:
    main.check_descriptors(handover(listeners=[[n, "x", None] for n in present()], connections=[], audit=1))
    main.check_descriptors(
        handover(listeners=[[n, "x", None] for n in present()[1:]], connections=[], audit=present()[0])
    )


@pytest.mark.parametrize("key", ["control", "notify", "ready", "audit", "held"])
def test_descriptor_of_every_kind_is_one_that_was_promised(key: str) -> None:
    with open("/dev/null", "rb") as one:
        number = one.fileno()
        others = [[n, "x", None] for n in present() if n != number]
        told = handover(listeners=others, connections=[], **{key: [number] if key == "held" else number})
        main.check_descriptors(told)
    with pytest.raises(StartError, match="was handed descriptors"):
        main.check_descriptors(told)


def test_descriptor_that_nobody_promised_does_not_start() -> None:
    known = handover(listeners=[[n, "x", None] for n in present()], connections=[])
    with open("/dev/null", "rb"), pytest.raises(StartError, match="close all others") as caught:
        main.check_descriptors(known)
    assert "was handed descriptors" in str(caught.value)


def test_descriptor_that_was_promised_and_is_missing_does_not_start() -> None:
    known = handover(listeners=[[n, "x", None] for n in present()], connections=[[max(present()) + 50, "y"]])
    with pytest.raises(StartError, match="was handed descriptors"):
        main.check_descriptors(known)


# The state of the process

GOOD_STATE = read_process_state()._replace(
    uids=(BROKER_UID,) * 4,
    gids=(BROKER_UID,) * 4,
    groups=(),
    inheritable=4,
    permitted=4,
    effective=4,
    bounding=4,
    ambient=4,
    no_new_privs=True,
    threads=1,
)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"uids": (0, BROKER_UID, BROKER_UID, BROKER_UID)}, "uids"),
        ({"uids": (BROKER_UID, BROKER_UID, 0, BROKER_UID)}, "uid 0, which never opens a file"),
        ({"gids": (BROKER_UID, 0, BROKER_UID, BROKER_UID)}, "gids"),
        ({"groups": (0,)}, "supplementary groups"),
        ({"permitted": 0}, "permitted capabilities '0x0'"),
        ({"permitted": 6}, "permitted capabilities '0x6'"),
        ({"effective": 0}, "effective capabilities"),
        ({"effective": 5}, "effective capabilities"),
        ({"bounding": 7}, "bounding set 0x7"),
        ({"no_new_privs": False}, "no_new_privs"),
        ({"threads": 2}, "threads 2 instead of 1"),
    ],
)
def test_process_that_is_not_what_it_should_be_does_not_start(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], said: str
) -> None:
    monkeypatch.setattr(main, "read_process_state", lambda: GOOD_STATE._replace(**changes))
    with pytest.raises(StartError, match="start it by its launcher") as caught:
        main.check_state(handover())
    assert said in str(caught.value)


@pytest.mark.parametrize("groups", [(), (BROKER_UID,)])
def test_process_that_is_what_it_should_be_starts(
    monkeypatch: pytest.MonkeyPatch, groups: tuple[int, ...]
) -> None:
    monkeypatch.setattr(main, "read_process_state", lambda: GOOD_STATE._replace(groups=groups))
    main.check_state(handover())


def test_everything_that_differs_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "read_process_state", lambda: GOOD_STATE._replace(permitted=0, threads=3))
    with pytest.raises(StartError) as caught:
        main.check_state(handover())
    assert "permitted" in str(caught.value)
    assert "threads" in str(caught.value)


def test_missing_openat2_is_told_with_its_likely_causes(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: object) -> int:
        raise SyscallError(errno.ENOSYS, "openat2")

    monkeypatch.setattr(main, "open_path_beneath", fail)
    with no_descriptor_left(), pytest.raises(StartError, match=r"Linux 5\.6.*RestrictSUIDSGID="):
        main._probe_openat2()


# Roots


@contextlib.contextmanager
def open_directory(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_PATH | os.O_DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def root(path: Path | str) -> Root:
    raw = os.fsencode(path)
    return Root(0, "tree", raw, cross_mounts=False, skip=len(raw) + 1)


def test_roots_are_held_without_following_links(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "file").touch()
    with no_descriptor_left():
        for bad in (tmp_path / "link", tmp_path / "link" / "x", tmp_path / "file", tmp_path / "missing"):
            with pytest.raises(
                RootError, match="must be a directory, reached without symbolic links"
            ) as caught:
                hold_roots([root(tmp_path / "real"), root(bad)], read_only_required=False)
            assert "root 'tree'" in str(caught.value)
            assert str(bad) in str(caught.value)
        [held] = hold_roots([root(tmp_path / "real")], read_only_required=False)
        assert os.path.samestat(os.fstat(held.descriptor), (tmp_path / "real").stat())
        os.close(held.descriptor)


@pytest.mark.parametrize("path", ["/proc", "/proc/self", "/sys/kernel"])
def test_root_on_a_kernel_file_system_is_refused(path: str) -> None:
    path = os.path.realpath(path)
    with (
        no_descriptor_left(),
        pytest.raises(RootError, match="is not served: choose a directory on a local disk"),
    ):
        hold_roots([root(path)], read_only_required=False)


def test_writable_root_is_refused_where_the_view_must_be_read_only(tmp_path: Path) -> None:
    with (
        no_descriptor_left(),
        pytest.raises(RootError, match=r"writable.*ReadOnlyPaths=/.*read_only_view: off"),
    ):
        hold_roots([root(tmp_path)], read_only_required=True)


def test_root_may_be_the_root_directory() -> None:
    [held] = hold_roots([Root(0, "all", b"/", cross_mounts=False, skip=1)], read_only_required=False)
    assert os.path.samestat(os.fstat(held.descriptor), Path("/").stat())
    os.close(held.descriptor)


def test_a_root_that_is_handed_over_must_be_the_one_of_the_policy(tmp_path: Path) -> None:
    with open_directory(tmp_path) as there, open_directory(Path("/")) as elsewhere:
        for opens, handed, is_right in (
            ("helpers", [["tree", there]], True),
            ("helpers", [["tree", elsewhere]], False),
            ("helpers", [["other", there]], False),
            ("helpers", [], False),
            ("loop", [["tree", there]], True),
            ("loop", [["tree", elsewhere]], False),
            ("loop", [], True),
        ):
            [tree] = policy(tmp_path)["roots"]
            compiled = policy(tmp_path, roots=[tree | {"opens": opens}])
            document = handover_document(policy=compiled, roots=handed)
            handover = main.read_handover(handover_descriptor(document))
            with contextlib.nullcontext() if is_right else pytest.raises(StartError) as caught:
                main.check_roots(handover)
            if caught is not None:
                assert f"root 'tree' ({tmp_path}) was handed over as " in str(caught.value)
                assert str(caught.value).endswith("start the broker again, by its launcher")
        (tmp_path / "moved").mkdir()
        with open_directory(tmp_path / "moved") as moved:
            compiled = policy(tmp_path / "moved")
            handover = main.read_handover(
                handover_descriptor(handover_document(policy=compiled, roots=[["tree", moved]]))
            )
            main.check_roots(handover)
            (tmp_path / "moved").rmdir()
            with pytest.raises(StartError, match=r"moved \(deleted\)'.*moved or removed meanwhile"):
                main.check_roots(handover)


def test_a_root_that_is_open_already_is_not_opened_again(tmp_path: Path) -> None:
    with open_directory(tmp_path) as there:
        [held] = hold_roots([root("/nowhere")], {"tree": there}, read_only_required=False)
        assert held.descriptor == there


# All of it, without what can't be undone


STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@pytest.fixture
def harmless(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Let `main` do everything but restrict this process; give what it would have done, in order."""
    done: list[str] = []
    state = GOOD_STATE._replace(seccomp=2)

    def restrict(trees: list[int], list_only: list[int], *, reach_abstract_sockets: bool) -> LandlockReport:
        done.append(f"landlock {len(trees)}+{len(list_only)}")
        assert not reach_abstract_sockets
        return LandlockReport(7, ("files",), ())

    monkeypatch.setattr(landlock, "restrict_to", restrict)
    monkeypatch.setattr(seccomp, "install", lambda program: done.append(f"seccomp {program.hex()}"))
    monkeypatch.setattr(dumpable, "set_dumpable", lambda dumpable: done.append(f"dumpable {dumpable}"))
    monkeypatch.setattr(resource, "setrlimit", lambda which, limits: done.append(f"limit {which} {limits}"))
    monkeypatch.setattr(main, "check_descriptors", lambda _handover: done.append("descriptors"))
    monkeypatch.setattr(main, "check_state", lambda _handover: done.append("state"))
    monkeypatch.setattr(main, "parse_process_state", lambda _text: state)
    monkeypatch.setattr(gc, "freeze", lambda: None)
    handlers = {number: signal.getsignal(number) for number in STOPPING}
    yield done
    signal.set_wakeup_fd(-1)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_restrictions_come_last_and_before_anything_is_served(
    harmless: list[str], tree: Path, tmp_path: Path
) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    audit = os.open(tmp_path / "audit", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    read_end, write_end = os.pipe()
    descriptor = handover_descriptor(
        handover_document(
            policy=policy(tree, read_only_view="off"),
            listeners=[],
            connections=[[ours.detach(), "worker"]],
            audit=audit,
            ready=write_end,
        )
    )
    status: list[int] = []
    answers: list[object] = []
    serve = Broker.serve

    def serve_some(broker: Broker) -> None:
        """Be the loop and its client in turn."""
        assert os.read(read_end, 100) == b"ready\n"
        speaker = Speaker(theirs, lambda: broker.step(0))
        speaker.greet()
        answers.append(speaker.open_one(bytes(tree / "file")).content)
        os.kill(os.getpid(), signal.SIGTERM)
        serve(broker)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Broker, "serve", serve_some)
        status.append(main.run(descriptor))
    theirs.close()
    os.close(audit)
    os.close(read_end)
    assert status == [main.EXIT_STOPPED]
    assert answers == [b"content"]
    assert harmless == [
        "descriptors",
        "state",
        "limit 4 (0, 0)",
        "dumpable False",
        "landlock 1+0",
        "seccomp 0600",
    ]
    records = read_audit((tmp_path / "audit").read_bytes())
    assert [record["event"] for record in records] == ["started", "open", "stopped"]
    assert records[0]["boot"] == "boot"
    assert records[0]["pid"] == os.getpid()
    assert records[0]["landlock"] == 7
    for number in held_by_run():
        os.close(number)


def held_by_run() -> list[int]:
    """Return what a run leaves to the end of its process: roots and /proc/self/fd."""
    return [number for number, what in descriptors_of().items() if number > 2 and is_directory(what)]


def is_directory(what: str) -> bool:
    return what.endswith(("/fd", "/tree"))


def refusal(capfd: pytest.CaptureFixture[str], **changes: object) -> str:
    """Run with a handover and return why it did not start."""
    assert main.run(handover_descriptor(handover_document(**changes))) == main.EXIT_NOT_STARTED
    for number in held_by_run():
        os.close(number)
    text = capfd.readouterr().err
    assert text.startswith("fdbroker: ")
    return text


def test_run_tells_why_it_does_not_start(capfd: pytest.CaptureFixture[str]) -> None:
    assert main.run(handover_descriptor(b"")) == main.EXIT_NOT_STARTED
    assert "start the broker by its launcher" in capfd.readouterr().err


@pytest.mark.usefixtures("harmless")
def test_rules_for_control_groups_need_a_kernel_that_tells_them(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    compiled = policy(tree, rule("unit", clients=[{"cgroups": ["/system.slice/x.service"]}]))
    with monkeypatch.context() as patch:
        patch.setattr(main, "probe_level", lambda: LevelProbe(1, "PIDFD_GET_INFO needs Linux 6.13"))
        assert "rules for units or control groups, but PIDFD_GET_INFO needs Linux 6.13" in refusal(
            capfd, policy=compiled
        )
    monkeypatch.setattr(main, "probe_level", lambda: LevelProbe(2, ""))
    assert "no cgroup2 is mounted" in refusal(capfd, policy=compiled, cgroup_root=None)


@pytest.mark.usefixtures("harmless")
def test_rules_for_labels_need_a_kernel_that_tells_them(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    compiled = policy(tree, rule("labelled", clients=[{"labels": ["x_t"]}]))
    monkeypatch.setattr(main, "gives_labels", lambda: False)
    said = refusal(capfd, policy=compiled)
    assert "the policy has rules for labels, but no security module of this kernel says" in said
    for_service = policy(tree, services=[{"name": "clamd", "clients": [{"labels": ["x_t"]}]}])
    assert "the policy has rules for labels" in refusal(capfd, policy=for_service)


@pytest.mark.usefixtures("harmless")
@pytest.mark.parametrize("level", [0, 1])
def test_strict_identity_needs_a_kernel_with_level_2(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], level: int
) -> None:
    monkeypatch.setattr(main, "probe_level", lambda: LevelProbe(level, "SOMETHING needs Linux 6.x"))
    said = refusal(capfd, policy=policy(tree, identity="strict"))
    assert "'identity: strict', for which level 2 is needed" in said
    assert f"this kernel has level {level}: SOMETHING needs Linux 6.x; use a newer kernel" in said


def test_rules_for_control_groups_let_their_tree_be_listed(
    harmless: list[str], tree: Path, tmp_path: Path
) -> None:
    compiled = policy(tree, rule("unit", clients=[{"cgroups": ["/a"]}]), read_only_view="off")
    if probe_level().level < 2:
        pytest.skip(probe_level().reason)
    with no_descriptor_left():
        document = handover(
            policy=compiled, listeners=[], connections=[], cgroup_root=str(tmp_path), audit=None
        )
        broker, _ = main.build(document)
        broker.close()
        for number in held_by_run():
            os.close(number)
    assert "landlock 1+1" in harmless


@pytest.mark.usefixtures("harmless")
def test_filter_that_does_not_show_does_not_start(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(main, "parse_process_state", lambda _text: GOOD_STATE._replace(seccomp=0))
    changes: dict[str, object] = {
        "listeners": [],
        "connections": [],
        "policy": policy(tree, read_only_view="off"),
    }
    assert "does not show it" in in_child(lambda: refused_in_child(changes))


def refused_in_child(changes: dict[str, object]) -> str:
    """Return why `build` does not start; what it opened until then ends with the process."""
    with pytest.raises(StartError) as caught:
        main.build(handover(**changes))
    return str(caught.value)


@pytest.mark.usefixtures("harmless")
@pytest.mark.parametrize("on_failure", ["deny", "allow"])
def test_audit_that_can_not_be_written_does_not_start_where_it_must(tree: Path, on_failure: str) -> None:
    def build() -> str:
        audit = os.open("/dev/full", os.O_WRONLY)
        compiled = policy(tree, read_only_view="off", audit={"on_failure": on_failure})
        document = handover(listeners=[], connections=[], policy=compiled, audit=audit)
        try:
            main.build(document)
        except StartError as error:
            return str(error)
        return "started"

    expected = "started" if on_failure == "allow" else "the audit can't be written; free its disk"
    assert expected in in_child(build)


@pytest.mark.usefixtures("harmless")
def test_layers_that_the_kernel_lacks_are_named(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        landlock, "restrict_to", lambda _trees, _more, **_options: LandlockReport(5, ("files",), ("signals",))
    )
    document = handover(listeners=[], connections=[], policy=policy(tree, read_only_view="off"), audit=None)
    in_child(lambda: main.build(document) is None)
    assert "Landlock of this kernel (ABI 5) lacks: ('signals',)" in capfd.readouterr().err


# The finder of the entry


def test_finder_finds_the_trusted_folders_and_nothing_else() -> None:
    finder = TrustedFinder(str(SOURCES), check=False)
    package = finder.find_spec("fdbroker", None)
    assert package is not None
    assert package.loader is None
    assert package.submodule_search_locations == []
    for folder in ("kernel", "wire", "policy", "broker"):
        spec = finder.find_spec(f"fdbroker.{folder}", None)
        assert spec is not None
        assert spec.origin == str(SOURCES / folder / "__init__.py")
    module = finder.find_spec("fdbroker.kernel.libc", None)
    assert module is not None
    assert module.origin == str(SOURCES / "kernel" / "libc.py")
    for other in (
        "os", "yaml", "fdbrokerx", "fdbroker.client", "fdbroker.config", "fdbroker.launcher", "fdbroker.cli",
        "fdbroker.kernel.missing", "fdbroker.kernel.libc.x", "fdbroker..kernel", "fdbroker.kernel/../client",
    ):  # fmt: skip
        assert finder.find_spec(other, None) is None, other


@pytest.fixture
def roots_own(tmp_path: Path) -> Iterator[Path]:
    """Give a directory that nobody but root can change, nor those above it."""
    outside = Path("/root") if Path("/root").is_dir() else tmp_path
    base = outside / f"fdbroker-test-{os.getpid()}"
    base.mkdir(mode=0o755)
    try:
        yield base
    finally:
        shutil.rmtree(base)


@pytest.mark.root
def test_finder_takes_sources_and_never_a_compiled_file_beside_them(roots_own: Path) -> None:
    folder = roots_own / "kernel"
    folder.mkdir(mode=0o755)
    source = folder / "libc.py"
    source.write_text("WHO = 'source'\n")
    source.chmod(0o644)
    # A .pyc that matches its source in time and size, with other code.
    cached = Path(importlib.util.cache_from_source(str(source)))
    cached.parent.mkdir()
    facts = source.stat()
    head = importlib.util.MAGIC_NUMBER + (0).to_bytes(4, "little")
    head += int(facts.st_mtime).to_bytes(4, "little") + facts.st_size.to_bytes(4, "little")
    poison = compile("WHO = 'poison'\n", str(source), "exec")
    cached.write_bytes(head + marshal.dumps(poison))
    assert who(importlib.util.spec_from_file_location("poisoned", source)) == "poison"  # what Python does
    found = TrustedFinder(str(roots_own), check=True).find_spec("fdbroker.kernel.libc", None)
    assert who(found) == "source"
    assert cached.read_bytes() == head + marshal.dumps(poison)


@pytest.mark.root
def test_finder_takes_what_root_compiled_of_the_very_source_and_nothing_else(
    roots_own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, compiled = roots_own / "kernel", roots_own / "compiled"
    for made in (folder, compiled):
        made.mkdir(mode=0o755)
    monkeypatch.setattr(entry, "PRECOMPILED", str(compiled))
    source = folder / "libc.py"
    source.write_text("WHO = 'source'\n")
    source.chmod(0o644)
    code = compiled / entry.name_of_code(str(source), source.read_bytes())
    other = roots_own / "other.py"
    other.write_text("WHO = 'compiled'\n")
    # Coverage would look for the source when it is gone.
    py_compile.compile(str(other), str(code), dfile="<compiled>")
    finder = TrustedFinder(str(roots_own), check=True)
    assert who(finder.find_spec("fdbroker.kernel.libc", None)) == "compiled"
    code.chmod(0o664)
    with pytest.raises(UntrustedSourceError, match=f"{code}.*somebody other than root"):
        who(finder.find_spec("fdbroker.kernel.libc", None))
    code.chmod(0o644)
    whole = code.read_bytes()
    for length in (0, 8, len(whole) - 4):  # a loss of power may leave it so
        code.write_bytes(whole[:length])
        assert who(finder.find_spec("fdbroker.kernel.libc", None)) == "source"
    code.write_bytes(whole)
    times = source.stat()
    source.write_text("WHO = 'sourcf'\n")  # as long, and as old
    os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert who(finder.find_spec("fdbroker.kernel.libc", None)) == "sourcf"
    # The same text elsewhere is another source.
    assert entry.name_of_code("/a", b"x") != entry.name_of_code("/b", b"x")


def who(spec: importlib.machinery.ModuleSpec | None) -> str:
    assert spec is not None
    assert spec.loader is not None
    module = types.ModuleType(spec.name)
    spec.loader.exec_module(module)
    return str(module.__dict__["WHO"])


@pytest.mark.root
@pytest.mark.parametrize("what", ["file", "folder", "base", "owner", "link"])
def test_finder_refuses_what_somebody_else_can_change(roots_own: Path, what: str) -> None:
    folder = roots_own / "kernel"
    folder.mkdir(mode=0o755)
    source = folder / "libc.py"
    source.write_text("")
    source.chmod(0o644)
    finder = TrustedFinder(str(roots_own), check=True)
    assert finder.find_spec("fdbroker.kernel.libc", None) is not None
    place = {"folder": folder, "base": roots_own}.get(what, source)
    if what == "owner":
        os.chown(source, BROKER_UID, 0)
        said = f" belongs to uid {BROKER_UID}, so somebody other than root can change it; as root: chown"
    elif what == "link":
        source.rename(folder / "real.py")
        source.symlink_to("real.py")
        said = f" is a symbolic link to {folder}/real.py; start fdbrokerd by a path without links, or"
    else:
        place.chmod(0o664 if what == "file" else 0o775)
        mode = "0664" if what == "file" else "0775"
        said = f" has mode {mode}, so somebody other than root can change it; as root: chmod go-w {place}, or"
    with pytest.raises(UntrustedSourceError, match=re.escape(f"{place}{said}") + ".*--dev to try it out"):
        finder.find_spec("fdbroker.kernel.libc", None)
    # Tried out from a checkout, anything goes.
    assert TrustedFinder(str(roots_own), check=False).find_spec("fdbroker.kernel.libc", None) is not None


def test_directory_that_all_can_write_is_no_place_for_sources(tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)
    with pytest.raises(UntrustedSourceError, match=str(tmp_path)):
        check_only_root_writes(str(tmp_path))


def run_entry(script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-I", "-S", "-B", str(script), *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_entry_of_sources_that_others_can_write_does_not_start_and_says_so(tmp_path: Path) -> None:
    copy = tmp_path / "fdbroker"
    shutil.copytree(SOURCES / "broker", copy / "broker")
    copy.chmod(0o777)
    done = run_entry(copy / "broker" / "entry.py", "0")
    assert done.returncode == 2
    assert done.stderr.startswith("fdbroker: ")
    assert f"as root: chmod go-w {copy}, or install fdbroker where all is root's" in done.stderr


def test_entry_imports_the_trusted_folders_alone_and_reaches_the_handover() -> None:
    done = run_entry(SOURCES / "broker" / "entry.py", "0", "--dev")
    assert done.returncode == 2
    assert done.stderr.startswith("fdbroker: the handover can't be read")


def test_entry_starts_what_main_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["entry.py", "42", "--dev"])
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(main, "run", lambda descriptor: descriptor)
    assert entry.main() == 42
    assert isinstance(sys.meta_path[-1], TrustedFinder)


def test_entry_tells_what_it_does_not_trust(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(_path: str) -> None:
        raise UntrustedSourceError("it is not root's")

    monkeypatch.setattr(sys, "argv", ["entry.py", "42"])
    monkeypatch.setattr(entry, "check_only_root_writes", refuse)
    assert entry.main() == 2
    assert capfd.readouterr().err == "fdbroker: it is not root's\n"
