"""The scan service in trouble: engines that hang, crash and lie, a broker that ends, its own end."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from typing import TYPE_CHECKING, Any

import pytest

from fdbroker.scan.client import ServiceGoneError, ServiceUnavailableError, connect
from tests.broker.puppets import Puppet
from tests.processes import children_of, in_child, wait_until
from tests.running_broker import reachable_directory, running_broker
from tests.scan.running_scand import (
    ANN,
    BOB,
    SCAND_UID,
    RunningScand,
    client_of,
    copy_treacherous_engine,
    own,
    policy_text,
    reasons,
    running_scand,
    scand_and_broker,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.for_other_users import ForOtherUsers

pytestmark = pytest.mark.root

WORD = b"Smoke"
_TREACHEROUS = """
engines:
  treacherous: {{word: {word}}}
workers: 1
spare_workers: 1
timeout: 2s
check_databases: 1s
may_renew: {{user: [{ann}]}}
"""


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    with served_directory() as path:
        yield path


@pytest.fixture
def own_directory() -> Iterator[Path]:
    with served_directory() as path:
        yield path


@contextlib.contextmanager
def served_directory() -> Iterator[Path]:
    with reachable_directory() as path:
        for name, uid in (("ann", ANN), ("bob", BOB)):
            home = path / "tree" / name
            home.mkdir(parents=True)
            own(home, uid, 0o755)
        copy_treacherous_engine(path)
        (path / "word").write_bytes(WORD)
        yield path


def fill(directory: Path, uid: int, *contents: bytes) -> list[bytes]:
    """Make files of a user, with these contents; return their paths."""
    home = directory / "tree" / ("ann" if uid == ANN else "bob")
    paths = []
    for content in contents:
        path = home / str(len(os.listdir(home)))
        path.write_bytes(content)
        own(path, uid, 0o644)
        paths.append(os.fsencode(path))
    return paths


@pytest.fixture(scope="module")
def scand(others: ForOtherUsers, directory: Path) -> Iterator[RunningScand]:
    with scand_alone(others, directory) as running:
        yield running


@pytest.fixture
def scand_to_renew(others: ForOtherUsers, own_directory: Path) -> Iterator[RunningScand]:
    """Run one whose engines are loaded anew: what it says of that is told from what others have it say."""
    with scand_alone(others, own_directory) as running:
        yield running


@contextlib.contextmanager
def scand_alone(others: ForOtherUsers, directory: Path) -> Iterator[RunningScand]:
    configuration = _TREACHEROUS.format(word=directory / "word", ann=ANN)
    with scand_and_broker(others, directory, configuration, str(directory / "engines")) as (running, _):
        yield running


def ask(scand: RunningScand, paths: list[bytes]) -> dict[bytes, str]:
    with client_of(scand.socket) as service:
        return reasons(service.scan_paths(paths))


def descriptor_of(scand: RunningScand, path: bytes) -> str:
    """Scan a file by a descriptor of this process's own."""
    with client_of(scand.socket) as service, open(path, "rb") as file:
        verdict = service.scan_descriptor(file.fileno()).verdict
    return str(getattr(verdict, "reason", verdict.verdict))


def test_worker_that_is_turned_lies_of_no_other_user_and_no_other_owner(
    scand: RunningScand, directory: Path
) -> None:
    turning, bad = fill(directory, ANN, b"turn", WORD)
    [of_bob] = fill(directory, BOB, WORD)
    for _ in range(3):
        assert in_child(lambda: ask(scand, [turning]), uid=ANN) == {turning: "clean"}
        # Its next file may be lied about: the same user, the same owner. Nobody else's.
        in_child(lambda: ask(scand, [bad]), uid=ANN)
        assert in_child(lambda: ask(scand, [of_bob]), uid=BOB) == {of_bob: "infected"}
        assert in_child(lambda: ask(scand, [turning]), uid=ANN) == {turning: "clean"}
        assert in_child(lambda: descriptor_of(scand, of_bob), uid=ANN) == "infected"
        assert in_child(lambda: ask(scand, [turning]), uid=ANN) == {turning: "clean"}
        assert in_child(lambda: descriptor_of(scand, bad), uid=BOB) == "infected"


def test_engine_that_hangs_costs_its_file_and_nobody_else_waits(scand: RunningScand, directory: Path) -> None:
    hanging = fill(directory, ANN, b"hang", b"fine", WORD)
    [of_bob] = fill(directory, BOB, WORD)
    with Puppet(uid=ANN) as ann:
        ann.begin(scan_paths, scand.socket, hanging)
        wait_until(lambda: in_child(lambda: status(scand)["files_under_way"], uid=BOB), "it hangs")
        began = time.monotonic()
        assert in_child(lambda: ask(scand, [of_bob]), uid=BOB) == {of_bob: "infected"}
        assert time.monotonic() - began < 1.5
        assert ann.result() == dict(zip(hanging, ["timed_out", "clean", "infected"], strict=True))


def test_client_that_goes_takes_its_hanging_file_with_it(scand: RunningScand, directory: Path) -> None:
    idle = scand.descriptors()
    hanging = fill(directory, ANN, *[b"hang"] * 20)
    with Puppet(uid=ANN) as ann:
        ann.begin(scan_paths, scand.socket, hanging)
        wait_until(lambda: in_child(lambda: status(scand)["files_under_way"], uid=BOB), "it hangs")
    wait_until(
        lambda: not in_child(lambda: status(scand)["files_under_way"], uid=BOB), "it is let go of", 1.5
    )
    wait_until(lambda: scand.descriptors() <= idle + 3, "its descriptors are closed")  # of a worker, at most


def test_engine_that_crashes_costs_its_file_alone(scand: RunningScand, directory: Path) -> None:
    paths = fill(directory, ANN, b"fine", b"crash", WORD, b"crash", b"fine")
    said = in_child(lambda: ask(scand, paths), uid=ANN)
    assert list(map(said.get, paths)) == ["clean", "crashed", "infected", "crashed", "clean"]


def test_changed_database_is_noticed_and_no_request_is_missed(
    scand_to_renew: RunningScand, own_directory: Path
) -> None:
    scand, directory = scand_to_renew, own_directory
    [path] = fill(directory, ANN, b"Fire and " + WORD)
    other = fill(directory, ANN, b"Fire")[0]
    assert in_child(lambda: ask(scand, [path, other]), uid=ANN) == {path: "infected", other: "clean"}
    (directory / "word").write_bytes(b"Fire")
    seen: set[str] = set()
    with Puppet(uid=ANN) as ann:
        end = time.monotonic() + 20
        while "infected" not in seen and time.monotonic() < end:
            answer = ann.do(scan_paths, scand.socket, [path, other])
            assert answer[path] == "infected"
            seen.add(answer[other])
            time.sleep(0.01)
    assert seen == {"clean", "infected"}, scand.errors()
    assert in_child(lambda: status(scand)["engines"], uid=ANN)[0]["version"] == "Fire"


def test_hangup_renews_and_a_broken_database_changes_nothing(
    scand_to_renew: RunningScand, own_directory: Path
) -> None:
    scand, directory = scand_to_renew, own_directory
    [path] = fill(directory, ANN, WORD)
    os.rename(directory / "word", directory / "hidden")
    scand.process.send_signal(signal.SIGHUP)
    scand.wait_for("RELOADING=1")
    scand.wait_for("READY=1")
    assert "those from before go on" in scand.errors()
    assert in_child(lambda: ask(scand, [path]), uid=ANN) == {path: "infected"}
    os.rename(directory / "hidden", directory / "word")
    scand.process.send_signal(signal.SIGHUP)
    scand.wait_for("READY=1")
    assert "loaded anew: treacherous Smoke" in scand.errors()


def test_who_may_have_the_engines_renewed_is_configured(scand_to_renew: RunningScand) -> None:
    def renew() -> str:
        with client_of(scand_to_renew.socket) as service:
            try:
                service.renew()
            except OSError as error:
                return str(error.strerror)
            return "done"

    assert in_child(renew, uid=ANN) == "done"
    assert "may not have the engines loaded anew" in in_child(renew, uid=BOB)


def test_service_that_is_stopped_says_so_and_leaves_no_process(
    others: ForOtherUsers, own_directory: Path
) -> None:
    hanging = fill(own_directory, ANN, b"hang")
    with scand_alone(others, own_directory) as scand:
        children = children_of(scand.pid)
        with Puppet(uid=ANN) as ann:
            ann.begin(farewell, scand.socket, hanging)
            wait_until(lambda: in_child(lambda: status(scand)["files_under_way"], uid=BOB), "it scans")
            assert scand.stop() == 0
            assert ann.result() == ("stopping", [])
        assert all(not os.path.exists(f"/proc/{child}") for child in children)
        assert "STOPPING=1" in scand_said(scand)


def test_who_connects_again_while_the_service_stops_waits_for_the_next_one(
    others: ForOtherUsers, own_directory: Path
) -> None:
    def service() -> Any:  # noqa: ANN401 - a context manager
        return running_scand(others, own_directory)

    broker = running_broker(
        own_directory, policy_text(own_directory), f"--socket-group={SCAND_UID}", own_socket=False
    )
    with broker, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Puppet(uid=uid)) for uid in (ANN, BOB) for _ in range(3)]
        with service() as scand:
            scand.wait_for("scan: serving")
            idle = scand.descriptors()
            for client in clients:
                client.begin(come_again, scand.socket)
            wait_until(lambda: scand.descriptors() >= idle + len(clients), "they are there")
            assert scand.stop() == 0
        with service():
            assert [client.result() for client in clients] == ["stopping"] * len(clients)


def come_again(_memory: dict[str, object], path: str) -> str:
    """Ask until the service ends the connection, connect and ask again at once; return why it ended."""
    reasons_told: list[str] = []
    with client_of(path) as service:
        while not reasons_told:
            try:
                service.status()
            except ServiceGoneError as error:
                reasons_told.append(error.reason)
    with client_of(path) as service:
        service.status()
    return reasons_told[0]


def scand_said(scand: RunningScand) -> str:
    scand.wait_for("STOPPING=1")
    return "\n".join(scand.said)


def test_listener_of_the_wrong_type_is_said_to_serve_nobody(others: ForOtherUsers) -> None:
    swapped = "listeners: {scan: {protocol: clamd}, clamd: {protocol: scan}}\n"
    with reachable_directory() as directory:
        (directory / "tree").mkdir()
        with scand_and_broker(others, directory, swapped) as (scand, _):
            for path, kind, cure in (
                (scand.socket, socket.SOCK_SEQPACKET, "write type: stream at scan in listeners"),
                (str(scand.clamd), socket.SOCK_STREAM, "write type: seqpacket at clamd in listeners"),
            ):
                with socket.socket(socket.AF_UNIX, kind) as sock:
                    sock.settimeout(20)
                    sock.connect(path)
                    assert sock.recv(100) == b""
                scand.wait_for(cure)


def test_broker_that_is_started_anew_is_found_again_and_clients_are_told(
    others: ForOtherUsers, own_directory: Path
) -> None:
    directory = own_directory
    configuration = _TREACHEROUS.format(word=directory / "word", ann=ANN)
    [path, *hanging] = fill(directory, ANN, WORD, *[b"hang"] * 3)

    def broker() -> Any:  # noqa: ANN401 - a context manager
        return running_broker(
            directory, policy_text(directory), f"--socket-group={SCAND_UID}", own_socket=False
        )

    with running_scand(others, directory, configuration, str(directory / "engines")) as scand:
        with broker():
            scand.wait_for("scan: serving")
            assert in_child(lambda: ask(scand, [path]), uid=ANN) == {path: "infected"}
            ann = Puppet(uid=ANN)
            ann.begin(farewell, scand.socket, hanging)
            wait_until(lambda: in_child(lambda: status(scand)["files_under_way"], uid=BOB), "it scans")
        with ann:
            assert ann.result() == ("broker_gone", [])
        scand.wait_for("not served")
        with pytest.raises(ServiceUnavailableError):
            connect(scand.socket)
        with broker():
            scand.wait_for("scan: serving")
            assert in_child(lambda: ask(scand, [path]), uid=ANN) == {path: "infected"}


def scan_paths(_memory: dict[str, object], path: str, paths: list[bytes]) -> dict[bytes, str]:
    with client_of(path) as service:
        return reasons(service.scan_paths(paths))


def farewell(_memory: dict[str, object], path: str, paths: list[bytes]) -> tuple[str, list[bytes]]:
    """Return why the service ended the connection, and of which files there was a verdict."""
    told: list[bytes] = []
    with client_of(path) as service:
        try:
            told += (result.path for result in service.scan_paths(paths))
        except ServiceGoneError as error:
            return error.reason, told
    raise AssertionError("it went on")


def status(scand: RunningScand) -> dict[str, Any]:
    with client_of(scand.socket) as service:
        return service.status()
