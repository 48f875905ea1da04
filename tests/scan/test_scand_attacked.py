"""Clients of the scan service that want to harm it, or the others, or to hear of a file what is not so."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from typing import TYPE_CHECKING

import pytest

from tests.broker.puppets import Puppet
from tests.hanging.fuse import Operation, abort, fuse_mounted
from tests.processes import children_of, in_child, wait_until
from tests.running_broker import reachable_directory
from tests.scan.clamav import BAD, make_database, running_clamd
from tests.scan.descriptors import lingering_socket
from tests.scan.running_scand import (
    ANN,
    BOB,
    OF_A_WORKER,
    RunningScand,
    client_of,
    copy_treacherous_engine,
    own,
    reasons,
    scand_and_broker,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.for_other_users import ForOtherUsers

pytestmark = pytest.mark.root

_CONFIGURATION = """
engines:
  treacherous: {{word: {word}}}
workers: 1
spare_workers: 1
queue: {{per_client: 40}}
timeout: 60s
"""
_HELLO = b'{"type":"hello","version":1}'


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    with reachable_directory() as path:
        for name, uid in (("ann", ANN), ("bob", BOB)):
            (path / "tree" / name).mkdir(parents=True)
            own(path / "tree" / name, uid, 0o755)
        copy_treacherous_engine(path)
        (path / "word").write_bytes(b"Smoke")
        yield path


@pytest.fixture(scope="module")
def scand(others: ForOtherUsers, directory: Path) -> Iterator[RunningScand]:
    configuration = _CONFIGURATION.format(word=directory / "word")
    with scand_and_broker(others, directory, configuration, str(directory / "engines")) as (running, _):
        yield running


def connected(path: str) -> socket.socket:
    """Return a connection that was greeted."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.settimeout(20)
    sock.connect(path)
    sock.send(_HELLO)
    sock.recv(70_000)
    return sock


def memory_of(pid: int) -> int:
    """Return how many KiB a process has in memory."""
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS:"))


def keep_copies_waiting(memory: dict[str, object], path: str, count: int) -> None:
    """Hand in files that can be written, and an engine hangs at; leave the connection open."""
    sock = memory["socket"] = connected(path)
    for number in range(count):
        descriptor = os.memfd_create("x")
        os.write(descriptor, b"hang")
        socket.send_fds(sock, [b'{"type":"scan_descriptor","id":%d}' % number], [descriptor])
        os.close(descriptor)


def under_way(scand: RunningScand) -> int:
    def ask() -> int:
        with client_of(scand.socket) as service:
            return int(str(service.status()["files_under_way"]))

    return in_child(ask, uid=BOB)


def test_files_that_wait_to_be_copied_are_closed_when_their_client_goes(scand: RunningScand) -> None:
    before = scand.descriptors()
    with Puppet(uid=ANN) as ann:
        ann.do(keep_copies_waiting, scand.socket, 15)
        wait_until(lambda: under_way(scand), "it scans")
    wait_until(lambda: scand.descriptors() <= before + OF_A_WORKER, "its descriptors are closed")


def test_files_that_wait_to_be_copied_count_as_files_that_wait(scand: RunningScand) -> None:
    def hand_in_many() -> int:
        with connected(scand.socket) as sock:
            sock.settimeout(1)
            for number in range(250):
                descriptor = os.memfd_create("x")
                os.write(descriptor, b"hang")
                try:
                    socket.send_fds(sock, [b'{"type":"scan_descriptor","id":%d}' % number], [descriptor])
                except (TimeoutError, OSError):
                    return number
                finally:
                    os.close(descriptor)
                most = max(0, scand.descriptors() - before)
                assert most < 60, number
        return 250

    before = scand.descriptors()
    assert in_child(hand_in_many) < 250


def test_requests_that_were_cancelled_before_their_turn_are_forgotten(
    scand: RunningScand, directory: Path
) -> None:
    home = directory / "tree" / "ann"
    names = [home / f"hang{number}" for number in range(30)]
    for name in names:
        name.write_bytes(b"hang")
        own(name, ANN)

    def ask_and_cancel() -> int:
        with connected(scand.socket) as sock:
            paths = json.dumps([os.fsdecode(name) for name in names]).encode()
            sock.send(b'{"type":"scan_paths","id":1,"paths":%s}' % paths)
            many = json.dumps([f"/{number:055d}" for number in range(1000)]).encode()
            for number in range(2, 402):
                sock.send(b'{"type":"scan_paths","id":%d,"paths":%s}' % (number, many))
                sock.send(b'{"type":"cancel","id":9999,"request":%d}' % number)
                for _ in range(2):
                    assert b'"end"' in sock.recv(70_000)
            return memory_of(scand.pid)

    before = memory_of(scand.pid)
    assert in_child(ask_and_cancel, uid=ANN) - before < 10_000


def test_descriptor_with_the_access_mode_that_reads_nothing_is_not_handed_to_any_engine(
    scand: RunningScand, directory: Path
) -> None:
    path = directory / "tree" / "ann" / "modes"
    path.write_bytes(b"Smoke")
    own(path, ANN)

    def ask() -> str:
        with client_of(scand.socket) as service:
            return str(service.scan_descriptor(os.open(path, 3)).verdict.reason)  # type: ignore[union-attr]

    assert in_child(ask, uid=ANN) == "not_readable"


def test_who_passes_a_descriptor_can_not_move_the_offset_under_an_engine_that_reads_by_it(
    others: ForOtherUsers,
) -> None:
    script = "sleep 0.1; grep -q Smoke && exit 1; exit 0"
    configuration = f"engines:\n  command: {{argv: [/bin/sh, -c, {json.dumps(script)}]}}\n"

    def ask() -> str:
        descriptor = os.open(path, os.O_RDONLY)
        over = threading.Event()

        def move() -> None:
            while not over.is_set():
                os.lseek(descriptor, 0, os.SEEK_END)

        thread = threading.Thread(target=move)
        thread.start()
        try:
            with client_of(str(directory / "scan")) as service:
                return service.scan_descriptor(descriptor).verdict.verdict
        finally:
            over.set()
            thread.join()

    with reachable_directory() as directory:
        path = directory / "tree"
        path.mkdir()
        path /= "moved"
        path.write_bytes(b"x" * 100_000 + b"Smoke\n")
        own(path, ANN)
        with scand_and_broker(others, directory, configuration):
            assert in_child(ask, uid=ANN) == "infected"


def test_who_passes_a_descriptor_can_not_make_reads_of_a_clamd_fail(others: ForOtherUsers) -> None:
    def ask() -> set[str]:
        descriptor = os.open(path, os.O_RDONLY)
        toggle = (
            "import fcntl, os\nwhile True:\n"
            " fcntl.fcntl(0, fcntl.F_SETFL, os.O_DIRECT); fcntl.fcntl(0, fcntl.F_SETFL, 0)"
        )
        with (
            subprocess.Popen([others.python, "-c", toggle], stdin=descriptor) as toggling,
            client_of(str(directory / "scan")) as service,
        ):
            try:
                return {service.scan_descriptor(descriptor).verdict.verdict for _ in range(200)}
            finally:
                toggling.kill()

    with reachable_directory() as directory:
        (directory / "tree").mkdir()
        path = directory / "tree" / "bad"
        path.write_bytes(BAD)
        own(path, ANN)
        database = make_database(directory / "database")
        with (
            running_clamd(directory, database, "AlertExceedsMax yes", "AlertEncrypted yes") as clamd,
            scand_and_broker(others, directory, f"engines:\n  clamd: {{socket: {clamd}}}\n"),
        ):
            said = in_child(ask, uid=ANN)
    assert "infected" in said
    assert "clean" not in said


def test_exclusions_of_one_client_hold_up_nobody_else(scand: RunningScand, directory: Path) -> None:
    start = directory / "tree" / "ann" / "deep"
    start.mkdir()
    own(start, ANN, 0o755)

    def make_deep() -> None:
        os.chdir(start)
        for _ in range(200):
            for number in range(3):
                os.close(os.open(str(number), os.O_CREAT | os.O_WRONLY, 0o600))
            os.mkdir("a")
            os.chdir("a")

    in_child(make_deep, uid=ANN)
    globs = ["/".join(["a", "**"] * 600) + "/q"] * 20
    with Puppet(uid=ANN) as ann:
        ann.do(ask_for_tree, scand.socket, os.fspath(start), globs)
        for _ in range(10):
            assert in_child(lambda: seconds_of_a_status(scand), uid=BOB) < 0.5
    shutil.rmtree(start)


def test_globs_of_one_client_are_compiled_while_others_are_answered(
    scand: RunningScand, directory: Path
) -> None:
    letters = "abcdefghijklmnopqrstuvwxyz"
    names = [f"{one}{two}{three}?" for one in letters for two in letters for three in letters]
    globs = ["/".join(names[begin : begin + 800]) for begin in range(0, 12_000, 800)]
    with Puppet(uid=ANN) as ann:
        ann.do(ask_for_trees, scand.socket, os.fspath(directory / "tree" / "ann"), globs, 30)
        for _ in range(5):
            assert in_child(lambda: seconds_of_a_status(scand), uid=BOB) < 1


def ask_for_trees(memory: dict[str, object], path: str, start: str, globs: list[str], count: int) -> None:
    made = [connected(path) for _ in range(count)]
    for sock in made:
        sock.send(json.dumps({"type": "scan_tree", "id": 1, "path": start, "exclude": globs}).encode())
    memory["sockets"] = made


def ask_for_tree(memory: dict[str, object], path: str, start: str, globs: list[str]) -> None:
    sock = memory["socket"] = connected(path)
    sock.send(json.dumps({"type": "scan_tree", "id": 1, "path": start, "exclude": globs}).encode())


def seconds_of_a_status(scand: RunningScand) -> float:
    """Return how long a client waits that connects and asks how the service is."""
    began = time.monotonic()
    with client_of(scand.socket) as service:
        service.status()
    return time.monotonic() - began


def test_worker_that_closes_its_channel_and_lives_holds_up_nobody_else(
    scand: RunningScand, directory: Path
) -> None:
    names = [directory / "tree" / "ann" / f"close{number}" for number in range(5)]
    for name in names:
        name.write_bytes(b"close")
        own(name, ANN)
    with Puppet(uid=ANN) as ann:
        ann.begin(reasons_of, scand.socket, [os.fsencode(name) for name in names])
        wait_until(lambda: under_way(scand), "it scans")
        waits = [in_child(lambda: seconds_of_a_status(scand), uid=BOB) for _ in range(30)]
        # Each of the five workers would hold up one; a busy machine may be late once.
        assert sum(wait >= 0.5 for wait in waits) <= 1, waits
        assert set(ann.result().values()) == {"killed"}


def test_engines_are_loaded_anew_for_a_zygote_that_ended_while_others_are_answered(
    scand: RunningScand, directory: Path
) -> None:
    path, *others = [directory / "tree" / "ann" / f"smoke{number}" for number in range(20)]
    for name in (path, *others):
        name.write_bytes(b"Smoke")
        own(name, ANN)
    (directory / "word.slow").touch()
    try:
        for child in children_of(scand.pid):
            os.kill(child, signal.SIGKILL)
        with Puppet(uid=ANN) as ann:
            # The first one finds out.
            begin = [os.fsencode(path), *map(os.fsencode, others)]
            ann.begin(reasons_of, scand.socket, begin)
            wait_until(lambda: under_way(scand), "they wait")
            for _ in range(10):
                assert in_child(lambda: seconds_of_a_status(scand), uid=BOB) < 0.5
            (directory / "word.slow").unlink()
            # A worker that is gone costs the file that it is at, or would be.
            assert set(ann.result().values()) <= {"infected", "crashed", "killed", "not_loaded"}
            assert ann.do(reasons_of, scand.socket, [os.fsencode(path)]) == {os.fsencode(path): "infected"}
    finally:
        (directory / "word.slow").unlink(missing_ok=True)


def reasons_of(_memory: dict[str, object], path: str, paths: list[bytes]) -> dict[bytes, str]:
    with client_of(path) as service:
        return reasons(service.scan_paths(paths))


def test_trees_of_a_client_that_reads_nothing_keep_nobody_from_having_a_tree_scanned(
    scand: RunningScand, directory: Path
) -> None:
    home = directory / "tree" / "ann" / "many"
    home.mkdir()
    for number in range(300):
        (home / str(number)).write_bytes(b"hang")
        own(home / str(number), ANN)
    own(home, ANN, 0o755)
    path = directory / "tree" / "bob" / "smoke"
    path.write_bytes(b"Smoke")
    own(path, BOB)

    def scan() -> dict[bytes, str]:
        with client_of(scand.socket) as service:
            tree = service.scan_tree(os.fspath(path.parent))
            told = reasons(tree)
            assert tree.end is not None
            assert tree.end.complete
            return told

    before = scand.descriptors()
    with Puppet(uid=ANN) as ann:
        ann.do(begin_trees, scand.socket, os.fspath(home), 40)
        wait_until(lambda: under_way(scand), "it scans")
        for _ in range(3):
            assert in_child(scan, uid=BOB) == {os.fsencode(path): "infected"}
        # For each connection one, and for four requests what was opened for them.
        assert scand.descriptors() - before < 40 + 4 * 128
    path.unlink()


def begin_trees(memory: dict[str, object], path: str, start: str, count: int) -> None:
    made = [connected(path) for _ in range(count)]
    for sock in made:
        sock.send(json.dumps({"type": "scan_tree", "id": 1, "path": start}).encode())
    memory["sockets"] = made


@pytest.mark.parametrize("operation", ["FLUSH", "GETATTR", "STATFS", "READ"])
@pytest.mark.parametrize("times", [1, 3])
def test_descriptor_of_a_users_own_file_system_that_never_answers_holds_up_nobody_else(
    scand: RunningScand, directory: Path, operation: str, times: int
) -> None:
    target = directory / "fuse"
    target.mkdir(exist_ok=True)
    with (
        fuse_mounted(target, {"file": b"fine"}, owner=ANN) as server,
        Puppet(uid=ANN) as ann,
    ):
        ann.do(open_for_both, os.fspath(target / "file"))
        server.never.add((Operation[operation], "" if operation == "STATFS" else "file"))
        ann.do(pass_it_on, scand.socket, times)
        try:
            for _ in range(10):
                assert in_child(lambda: seconds_of_a_status(scand), uid=BOB) < 0.5
        finally:
            abort(target)


@pytest.mark.parametrize("count", [1, 2, 100])
def test_socket_that_lingers_when_it_is_closed_holds_up_nobody_else(scand: RunningScand, count: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, Puppet(uid=ANN) as ann:
        ann.do(connect_for_later, scand.socket)
        # So that it is the service that closes it for the last time.
        scand.process.send_signal(signal.SIGSTOP)
        try:
            ann.do(pass_on_a_lingering_socket, listener.getsockname(), count)
        finally:
            scand.process.send_signal(signal.SIGCONT)
        for _ in range(10):
            assert in_child(lambda: seconds_of_a_status(scand), uid=BOB) < 0.5


@pytest.mark.parametrize("first", [b"{}", b""])
def test_message_that_nobody_reads_with_a_socket_that_lingers_holds_up_nobody_else(
    scand: RunningScand, first: bytes
) -> None:
    """At the first one the connection is closed; the second one ends with it."""
    with socket.create_server(("127.0.0.1", 0)) as listener, Puppet(uid=ANN) as ann:
        ann.do(connect_for_later, scand.socket)
        scand.process.send_signal(signal.SIGSTOP)
        try:
            ann.do(say, first)
            ann.do(say, b"")
            ann.do(pass_on_a_lingering_socket, listener.getsockname(), 1)
        finally:
            scand.process.send_signal(signal.SIGCONT)
        for _ in range(10):
            assert in_child(lambda: seconds_of_a_status(scand), uid=BOB) < 0.5


def say(memory: dict[str, object], message: bytes) -> None:
    sock = memory["socket"]
    assert isinstance(sock, socket.socket)
    sock.send(message)


def connect_for_later(memory: dict[str, object], path: str) -> None:
    memory["socket"] = connected(path)


def pass_on_a_lingering_socket(memory: dict[str, object], address: tuple[str, int], count: int) -> None:
    """Have the service close a socket whose bytes nobody reads."""
    sock = memory["socket"]
    assert isinstance(sock, socket.socket)
    lingering = lingering_socket(address)
    socket.send_fds(sock, [b'{"type":"scan_descriptor","id":1}'], [lingering.fileno()] * count)
    os.close(lingering.detach())


def test_descriptor_of_a_users_own_file_system_is_not_scanned(scand: RunningScand, directory: Path) -> None:
    target = directory / "fuse"
    target.mkdir(exist_ok=True)

    def ask() -> list[str]:
        with client_of(scand.socket) as service:
            descriptors = [os.open(target / "file", flags) for flags in (os.O_RDONLY, os.O_RDWR, os.O_PATH)]
            return [str(service.scan_descriptor(each).verdict.reason) for each in descriptors]  # type: ignore[union-attr]

    before = scand.descriptors()
    with fuse_mounted(target, {"file": b"fine"}, owner=ANN):
        assert in_child(ask, uid=ANN) == ["filesystem"] * 3
    wait_until(lambda: scand.descriptors() <= before, "its descriptors are closed")


def open_for_both(memory: dict[str, object], path: str) -> None:
    memory["descriptor"] = os.open(path, os.O_RDWR)


def pass_it_on(memory: dict[str, object], path: str, times: int) -> None:
    """Hand the descriptor in by several connections: as it should be, too early, and too often."""
    sockets: list[socket.socket] = []
    memory["sockets"] = sockets
    for number in range(times):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.connect(path)
        if number == 0:
            sock.send(_HELLO)
        message = b'{"type":"scan_descriptor","id":1}' if number != 1 else _HELLO
        descriptor = memory["descriptor"]
        assert isinstance(descriptor, int)
        socket.send_fds(sock, [message], [descriptor] * (1 if number < 2 else 100))
        sockets.append(sock)
