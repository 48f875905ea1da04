from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from fdbroker.client import UnavailableError, connect
from fdbroker.scan.plugins import configure
from fdbroker.scan.run import DEFAULT_BATCH, Scanned, Skipped, scan
from fdbroker.scan.supervisor import Supervisor
from fdbroker.scan.verdict import Clean, Error, Infected, Verdict
from tests.processes import in_child
from tests.running_broker import policy, reachable_directory, rule, running_broker
from tests.sandbox.confined import IDS, WORKER_UID
from tests.scan.descriptors import EICAR_NAME, open_descriptors
from tests.scan.trees import BIG, Tree, make_tree

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.running_broker import RunningBroker

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    with reachable_directory() as path:
        yield path


@pytest.fixture(scope="module")
def tree(directory: Path) -> Tree:
    return make_tree(directory / "tree")


@pytest.fixture(scope="module")
def broker(directory: Path, tree: Tree) -> Iterator[RunningBroker]:
    """Run one from which all may be had."""
    with reachable_directory() as own, running_broker(own, policy(directory / "tree")) as running:
        yield running


@pytest.fixture(scope="module")
def supervisor() -> Iterator[Supervisor]:
    with Supervisor([configure("hashes")], ids=IDS) as running:
        running.start()
        yield running


def scan_with(
    broker: RunningBroker, supervisor: Supervisor, *starts: bytes, batch: int = DEFAULT_BATCH
) -> list[Scanned | Skipped]:
    with connect(broker.socket) as client:
        return list(scan(client, supervisor, starts, batch=batch))


def verdicts(events: list[Scanned | Skipped]) -> dict[bytes, Verdict]:
    scanned = [event for event in events if isinstance(event, Scanned)]
    found = {event.path: event.verdict for event in scanned}
    assert len(found) == len(scanned), "a path came twice"
    return found


def try_to_open(path: bytes) -> str:
    try:
        os.close(os.open(path, os.O_RDONLY))
    except OSError as error:
        return type(error).__name__
    return "opened"


def test_workers_uid_can_not_open_any_of_the_files_itself(tree: Tree) -> None:
    paths = sorted(tree.clean | tree.infected)
    results = in_child(lambda: [try_to_open(path) for path in paths], uid=WORKER_UID)
    assert results == ["PermissionError"] * len(paths)


def test_tree_of_three_users_gets_exact_verdicts(
    broker: RunningBroker, supervisor: Supervisor, tree: Tree
) -> None:
    before = open_descriptors()
    events = scan_with(broker, supervisor, tree.root)
    assert verdicts(events) == dict.fromkeys(tree.clean, Clean()) | dict.fromkeys(
        tree.infected, Infected(EICAR_NAME)
    )
    assert {event.path: event.kind for event in events if isinstance(event, Skipped)} == tree.skipped
    assert sum(event.size or 0 for event in events if isinstance(event, Scanned)) == tree.size > BIG
    assert open_descriptors() == before


@pytest.mark.parametrize("batch", [1, 3])
def test_batches_make_no_difference(
    batch: int, broker: RunningBroker, supervisor: Supervisor, tree: Tree
) -> None:
    assert (
        verdicts(scan_with(broker, supervisor, tree.root, batch=batch)).keys() == tree.clean | tree.infected
    )


def test_files_named_one_by_one_are_scanned(
    broker: RunningBroker, supervisor: Supervisor, tree: Tree
) -> None:
    starts = sorted(tree.infected | tree.clean)
    assert verdicts(scan_with(broker, supervisor, *starts)).keys() == tree.clean | tree.infected


def test_denied_file_is_an_error_with_the_reason_and_the_others_are_scanned(
    supervisor: Supervisor, directory: Path, tree: Tree
) -> None:
    rules = [rule("all"), rule("no", effect="deny", actions=["open"], paths=["home1/with spaces*"])]
    with running_broker(directory, policy(directory / "tree", *rules)) as broker:
        found = verdicts(scan_with(broker, supervisor, tree.root))
    denied = tree.root + b"/home1/with spaces and 'quotes'"
    verdict = found.pop(denied)
    assert isinstance(verdict, Error)
    assert verdict.reason == "denied"
    assert found.keys() == (tree.clean | tree.infected) - {denied}
    assert all(not isinstance(other, Error) for other in found.values())


def test_start_that_the_policy_does_not_know_is_denied_not_clean(
    broker: RunningBroker, supervisor: Supervisor, tree: Tree
) -> None:
    events = scan_with(
        broker, supervisor, b"/etc/shadow", tree.root + b"/missing", tree.root + b"/home0/fifo"
    )
    reasons = {
        path: verdict.reason for path, verdict in verdicts(events).items() if isinstance(verdict, Error)
    }
    assert reasons == {
        b"/etc/shadow": "denied",
        tree.root + b"/missing": "not_found",
        tree.root + b"/home0/fifo": "not_regular",
    }


def test_directory_that_may_not_be_listed_is_an_error_of_that_directory(
    supervisor: Supervisor, directory: Path, tree: Tree
) -> None:
    with running_broker(directory, policy(directory / "tree", rule("o", actions=["open"]))) as broker:
        events = scan_with(broker, supervisor, tree.root + b"/home0", tree.root + b"/home0/empty")
    assert verdicts(events) == {
        tree.root + b"/home0/empty": Clean(),
        tree.root + b"/home0": verdicts(events)[tree.root + b"/home0"],
    }
    [unlisted] = [event for event in events if isinstance(event, Scanned) and event.directory]
    assert unlisted.path == tree.root + b"/home0"
    assert isinstance(unlisted.verdict, Error)
    assert unlisted.verdict.reason == "denied"


def test_broker_that_dies_makes_errors_of_what_was_asked_and_is_told(directory: Path, tree: Tree) -> None:
    events: list[Scanned | Skipped] = []
    with (
        running_broker(directory, policy(directory / "tree"), stop=False) as broker,
        Supervisor([configure("hashes")], ids=IDS) as supervisor,
        connect(broker.socket, timeout=2.0) as client,
    ):
        running = scan(client, supervisor, [tree.root], batch=1)
        events.append(next(running))
        broker.process.kill()
        broker.process.wait()
        broker.socket.unlink()
        with pytest.raises(UnavailableError):
            events.extend(running)
    found = verdicts(events)
    errors = {path: verdict for path, verdict in found.items() if isinstance(verdict, Error)}
    assert errors
    assert {verdict.reason for verdict in errors.values()} <= {"broker_gone"}
    assert found.keys() < tree.clean | tree.infected
    assert all(found[path] != Clean() for path in found.keys() & tree.infected)
