"""The scan service with a real broker, real users and real workers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import time
from typing import TYPE_CHECKING, Any

import click
import pytest

from fdbroker.cli import scan_via
from fdbroker.cli.failure import Failure
from fdbroker.client import DEFAULT_SOCKET
from fdbroker.scan.messages import End
from fdbroker.scan.verdict import Clean, Infected
from tests.broker.puppets import Puppet
from tests.cli.commands import run_as
from tests.processes import in_child, wait_until
from tests.running_broker import reachable_directory
from tests.scan.descriptors import EICAR, EICAR_NAME
from tests.scan.running_scand import (
    ANN,
    BOB,
    OF_A_WORKER,
    RunningScand,
    client_of,
    own,
    reasons,
    scand_and_broker,
)

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator
    from pathlib import Path

    from fdbroker.scan.verdict import Verdict
    from tests.for_other_users import ForOtherUsers

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    with reachable_directory() as path:
        (path / "tree").mkdir()
        for name, uid in (("ann", ANN), ("bob", BOB)):
            home = path / "tree" / name
            home.mkdir()
            for file, contents in (("clean", b"fine"), ("bad", EICAR), ("\udcff\n", b"fine")):
                (home / file).write_bytes(contents)
                own(home / file, uid)
            os.mkfifo(home / "fifo")
            own(home / "fifo", uid)
            own(home, uid, 0o700)
        yield path


@pytest.fixture(scope="module")
def scand(others: ForOtherUsers, directory: Path) -> Iterator[RunningScand]:
    configuration = "workers: 1\nspare_workers: 1\n"
    with scand_and_broker(others, directory, configuration, by_command_line=True) as (running, _):
        yield running


def test_users_get_verdicts_of_their_own_files_and_of_no_others(scand: RunningScand, directory: Path) -> None:
    tree = os.fsencode(directory / "tree")

    def ask() -> dict[bytes, str]:
        with client_of(scand.socket) as service:
            paths = [
                tree + b"/" + who + b"/" + name
                for who in (b"ann", b"bob")
                for name in (b"clean", b"bad", b"no")
            ]
            return reasons(service.scan_paths(paths))

    for uid, mine, other in ((ANN, b"ann", b"bob"), (BOB, b"bob", b"ann")):
        assert in_child(ask, uid=uid) == {
            tree + b"/" + mine + b"/clean": "clean",
            tree + b"/" + mine + b"/bad": "infected",
            # With a condition on the object, what is not there and what is refused have one answer.
            tree + b"/" + mine + b"/no": "denied",
            tree + b"/" + other + b"/clean": "denied",
            tree + b"/" + other + b"/bad": "denied",
            tree + b"/" + other + b"/no": "denied",
        }


def test_tree_is_scanned_as_far_as_the_client_may_have_it(scand: RunningScand, directory: Path) -> None:
    tree = os.fsencode(directory / "tree")

    def ask() -> list[tuple[dict[bytes, str], Any]]:
        with client_of(scand.socket) as service:
            told = []
            for start in (b"/ann", b"/bob", b"", b"/ann/bad"):
                scan = service.scan_tree(tree + start)
                told.append((reasons(scan), scan.end))
            return told

    (mine, end), other, top, file = in_child(ask, uid=ANN)
    assert mine == {
        tree + b"/ann/clean": "clean",
        tree + b"/ann/bad": "infected",
        tree + b"/ann/\xff\n": "clean",
        tree + b"/ann/fifo": "fifo",
    }
    assert end._replace(id=0) == End(0, 3, 4 + 4 + len(EICAR), 1, 0, 1, ())
    assert other[0] == {tree + b"/bob": "denied"}
    assert top[0] == {tree: "denied"}
    assert file[0] == {tree + b"/ann/bad": "infected"}


def test_tree_of_which_something_is_refused_is_not_complete(scand: RunningScand, directory: Path) -> None:
    start = os.fsencode(directory / "tree" / "ann" / "shared")
    os.mkdir(start)
    os.chown(start, ANN, ANN)
    with open(start + b"/of bob", "wb") as file:
        os.fchown(file.fileno(), BOB, BOB)

    def ask() -> tuple[dict[bytes, str], Any]:
        with client_of(scand.socket) as service, service.scan_tree(start) as scan:
            return reasons(scan), scan.end

    told, end = in_child(ask, uid=ANN)
    os.unlink(start + b"/of bob")
    os.rmdir(start)
    assert told == {}
    assert (end.complete, end.missing) == (False, ("refused",))


def test_descriptors_are_scanned_for_who_has_them(scand: RunningScand, directory: Path) -> None:
    def ask() -> list[Verdict]:
        with client_of(scand.socket) as service:
            made: list[Verdict] = []
            for contents, flags in ((b"fine", os.O_RDONLY), (EICAR, os.O_RDONLY), (EICAR, os.O_RDWR)):
                descriptor = os.memfd_create("x")
                os.write(descriptor, contents)
                if flags == os.O_RDONLY:
                    descriptor = os.open(f"/proc/self/fd/{descriptor}", flags)
                made.append(service.scan_descriptor(descriptor).verdict)
            return made

    assert in_child(ask, uid=BOB) == [Clean(), Infected(EICAR_NAME), Infected(EICAR_NAME)]


@pytest.mark.parametrize(
    ("message", "descriptors", "said"),
    [
        (b"{", 0, "it is no JSON"),
        (b"[" * 60000, 0, "it is no JSON"),
        (b"x" * 70000, 0, "at most 65536 bytes"),
        (b'{"type":"hello","version":1}', 1, "1 descriptors came with it"),
        (b'{"type":"hello","version":2}', 0, "version 2 is not spoken here"),
        (b'{"type":"hello","version":1,"x":1}', 0, "no member 'x'"),
        (b'{"type":"status","id":1}', 0, "the first message is hello"),
        (b'{"type":"scan_descriptor","id":1}', 0, "0 descriptors came with it, and it takes 1"),
        (b'{"type":"scan_descriptor","id":1}', 2, "2 descriptors came with it, and it takes 1"),
        (b'{"type":"shutdown"}', 0, "there is no request 'shutdown'"),
    ],
)
def test_what_is_no_message_ends_the_connection_with_the_reason(
    scand: RunningScand, message: bytes, descriptors: int, said: str
) -> None:
    def ask() -> bytes:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock, open("/dev/null") as null:
            sock.settimeout(20)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 200000)
            sock.connect(scand.socket)
            socket.send_fds(sock, [message], [null.fileno()] * descriptors)
            last = b""
            while got := sock.recv(70000):
                last = got
            return last

    farewell = json.loads(in_child(ask, uid=ANN))
    assert farewell["type"] == "farewell"
    assert farewell["reason"] == "malformed"
    assert said in farewell["message"]


def test_descriptors_that_are_of_no_use_are_errors_and_never_clean(
    scand: RunningScand, directory: Path
) -> None:
    file = directory / "tree" / "ann" / "clean"

    def ask() -> list[str]:
        reading, _ = os.pipe()
        made = [
            os.open(file, os.O_PATH),
            os.open(file, os.O_WRONLY),
            os.open(file.parent, os.O_RDONLY),
            reading,
            os.open("/dev/null", os.O_RDONLY),
        ]
        with client_of(scand.socket) as service:
            return [str(service.scan_descriptor(each).verdict.reason) for each in made]  # type: ignore[union-attr]

    assert in_child(ask, uid=ANN) == ["not_readable", "not_readable", *["not_regular"] * 3]


def test_client_that_reads_nothing_stops_its_own_files_alone(scand: RunningScand, directory: Path) -> None:
    before = scand.descriptors()
    file = os.fsencode(directory / "tree" / "bob" / "clean")
    with Puppet(uid=BOB) as bob:
        bob.do(flood, scand.socket, file)
        assert in_child(lambda: ask_status(scand)["clients"], uid=ANN) == 2
        started = time.monotonic()
        assert in_child(lambda: scan_one(scand, file.replace(b"bob", b"ann")), uid=ANN) == "clean"
        assert time.monotonic() - started < 5
        scanned = in_child(lambda: ask_status(scand)["files_scanned"], uid=ANN)
        assert scanned < 300_000
    wait_until(lambda: scand.descriptors() <= before + OF_A_WORKER, "its descriptors are closed")


def test_cancelled_tree_ends_at_once_and_says_so(scand: RunningScand, directory: Path) -> None:
    start = directory / "tree" / "ann" / "many"
    start.mkdir()
    for number in range(3000):
        (start / str(number)).write_bytes(b"fine")
        own(start / str(number), ANN)
    own(start, ANN, 0o700)
    before = scand.descriptors()

    def ask() -> tuple[int, Any]:
        with client_of(scand.socket) as service:
            scan = service.scan_tree(os.fsencode(start))
            next(scan)
            scan.cancel()
            count = 1 + sum(1 for _ in scan)
            return count, scan.end

    count, end = in_child(ask, uid=ANN)
    assert end.missing == ("cancelled",)
    assert end.files == count < 3000
    wait_until(lambda: scand.descriptors() <= before + OF_A_WORKER, "its descriptors are closed")


def test_single_file_is_not_kept_waiting_by_another_users_tree(scand: RunningScand, directory: Path) -> None:
    ann, bob = directory / "tree" / "ann" / "many", os.fsencode(directory / "tree" / "bob" / "bad")

    with Puppet(uid=ANN) as puppet:
        puppet.begin(scan_tree, scand.socket, os.fsencode(ann))
        assert in_child(lambda: scan_one(scand, bob), uid=BOB) == "infected"
        end = puppet.result()
    assert (end.files, end.errors, end.complete) == (3000, 0, True)


def flood(memory: dict[str, object], path: str, file: bytes) -> int:
    """Ask for far more than anybody gets, and read none of it; return how many requests were taken."""
    sock = memory["socket"] = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.connect(path)
    sock.send(b'{"type":"hello","version":1}')
    sock.settimeout(2)
    paths = json.dumps([os.fsdecode(file)] * min(1000, 60_000 // (len(file) + 4))).encode()
    for number in range(300):
        try:
            sock.send(b'{"type":"scan_paths","id":%d,"paths":%s}' % (number, paths))
        except TimeoutError:
            return number
    raise AssertionError("all of it was taken")


def scan_tree(memory: dict[str, object], path: str, start: bytes) -> object:
    with client_of(path) as service:
        scan = service.scan_tree(start)
        assert "infected" not in reasons(scan).values()
        return scan.end


def ask_status(scand: RunningScand) -> dict[str, Any]:
    with client_of(scand.socket) as service:
        return service.status()


def scan_one(scand: RunningScand, path: bytes) -> str:
    with client_of(scand.socket) as service:
        return service.scan_path(path).verdict.verdict


def command(scand: RunningScand, others: ForOtherUsers, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `fdbroker scan` as one of the users."""
    return run_as(ANN, others, "scan", *arguments, FDBROKER_SCAN_SOCKET=scand.socket)


def test_command_goes_by_the_service_where_it_is_and_says_so(
    scand: RunningScand, others: ForOtherUsers, directory: Path
) -> None:
    home = f"{directory}/tree/ann"
    for via in ([], ["--via", "scand"]):
        done = command(scand, others, *via, "--exclude", "many", "--verbose", home)
        assert done.returncode == 1, done.stdout + done.stderr
        *lines, summary, engines = done.stdout.splitlines()
        assert sorted(lines)[:3] == [
            rf"{home}/\xff\x0a: clean",
            f"{home}/bad: infected: {EICAR_NAME}",
            f"{home}/clean: clean",
        ]
        assert f"{home}/fifo: skipped: fifo" in lines
        assert summary.startswith("3 files, 76 bytes, 1 infected, 0 errors, ")
        assert engines == "Scanned by hashes (hashes 1, 3 digests), in workers of fdbroker-scand."


def test_command_names_a_file_once_and_an_incomplete_scan_is_an_error(
    scand: RunningScand, others: ForOtherUsers, directory: Path
) -> None:
    start = directory / "tree" / "ann" / "shared with bob"
    start.mkdir()
    for name, uid in (("mine", ANN), ("of bob", BOB)):
        (start / name).write_bytes(b"fine")
        own(start / name, uid)
    own(start, ANN, 0o700)
    done = command(scand, others, "--json", str(start), f"{start}/mine")
    shutil.rmtree(start)
    assert done.returncode == 2
    first, *files, summary = map(json.loads, done.stdout.splitlines())
    assert (first["type"], first["via"]) == ("engines", "scand")
    assert [(file["path"], file["verdict"]) for file in files] == [(f"{start}/mine", "clean")]
    assert (summary["files"], summary["complete"], summary["exit_status"]) == (1, False, 2)
    assert done.stderr == (
        f"fdbroker: not all below {start} was scanned:"
        " the policy does not let you see or enter something (refused)\n"
    )


def test_command_says_how_to_find_why_the_policy_refused_a_path(
    scand: RunningScand, others: ForOtherUsers, directory: Path
) -> None:
    home = f"{directory}/tree/bob"
    done = command(scand, others, "--via", "scand", home)
    assert done.returncode == 2
    asked = f"fdbroker policy explain --as fdbroker-scand --on-behalf-of {ANN} --action walk {home}\n"
    assert done.stderr.endswith(asked)


def test_service_that_does_not_greet_is_told_and_done_without(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = directory / "silent"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        listening.bind(os.fspath(path))
        listening.listen()
        monkeypatch.setenv("FDBROKER_SCAN_SOCKET", os.fspath(path))
        monkeypatch.setattr(scan_via, "_GREETED_WITHIN", {None: 0.01, "scand": 0.01})
        with click.Context(click.Command("scan")):
            assert scan_via.service_for(None, DEFAULT_SOCKET) is None
            with pytest.raises(Failure, match=r"said nothing for 0\.01 s; start fdbroker-scand"):
                scan_via.service_for("scand", DEFAULT_SOCKET)
    path.unlink()


def test_listener_of_the_wrong_type_is_told_with_the_cure(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = directory / "stream"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        listening.bind(os.fspath(path))
        listening.listen()
        monkeypatch.setenv("FDBROKER_SCAN_SOCKET", os.fspath(path))
        with click.Context(click.Command("scan")), pytest.raises(Failure, match="needs 'type: seqpacket'"):
            scan_via.service_for("scand", DEFAULT_SOCKET)
    path.unlink()


def test_command_says_what_it_can_not_ask_of_the_service(
    scand: RunningScand, others: ForOtherUsers, directory: Path
) -> None:
    done = command(scand, others, "--via", "scand", "--jobs", "2", "/")
    assert done.returncode == 2
    assert "--jobs is for scans by the command's own workers" in done.stderr
    done = command(scand, others, "--jobs", "2", "--socket", f"{directory}/none", "/")
    assert done.returncode == 2, "and without --via it goes the other way"
    assert "no broker has its socket there" in done.stderr
    scand.socket += "-not-there"
    try:
        done = command(scand, others, "--via", "scand", "/")
    finally:
        scand.socket = scand.socket.removesuffix("-not-there")
    assert done.returncode == 2
    assert "it is the listener 'scan' of the policy" in done.stderr


def test_files_to_be_copied_are_closed_though_their_client_is_gone(scand: RunningScand) -> None:
    """It is stopped meanwhile, so that it sees their end in the round in which they come."""
    idle = scand.descriptors()
    with Puppet(uid=BOB) as bob:
        bob.do(greet, scand.socket)
        scand.process.send_signal(signal.SIGSTOP)
        try:
            bob.do(hand_over_to_be_copied_and_go)
        finally:
            scand.process.send_signal(signal.SIGCONT)
    wait_until(lambda: scand.descriptors() <= idle + OF_A_WORKER, "they are closed")


def greet(memory: dict[str, Any], path: str) -> None:
    memory["socks"] = [socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(10)]
    for sock in memory["socks"]:
        sock.connect(path)
        sock.send(b'{"type": "hello", "version": 1}')
        assert sock.recv(1000)


def hand_over_to_be_copied_and_go(memory: dict[str, Any]) -> None:
    descriptor = os.memfd_create("x")
    os.ftruncate(descriptor, 1 << 20)
    for sock in memory["socks"]:
        for number in range(8):
            socket.send_fds(sock, [b'{"type": "scan_descriptor", "id": %d}' % number], [descriptor])
        sock.close()
