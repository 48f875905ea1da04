"""Rules for control groups, with clients that are in one, below one, beside one, and that are moved."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fdbroker.broker.identity import probe_level
from fdbroker.launcher.start import find_cgroup2
from tests.broker.conftest import fill
from tests.broker.speaking import Speaker
from tests.processes import become, in_child
from tests.running_broker import CLIENT_UID, RunningBroker, policy, rule, running_broker

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.root

NAME = f"fdbroker-test-{os.getpid()}"


def why_not() -> str:
    """Return why control groups can't be tried here, or nothing."""
    if probe_level().level < 2:
        return probe_level().reason
    place = find_cgroup2()
    if place is None:
        return "no cgroup2 is mounted"
    try:
        made = Path(place) / f"{NAME}-probe"
        made.mkdir()
        made.rmdir()
    except OSError as error:
        return f"cgroup2 at {place} can't be written: {error.strerror}"
    return ""


@pytest.fixture(scope="module")
def groups() -> Iterator[Path]:
    """Return a control group of ours with others below."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    place = Path(find_cgroup2() or "") / NAME
    names = ["unit", "unit/below", "unit/below/deep", "unit-beside", "other"]
    made = [place, *(place / name for name in names)]
    for path in made:
        path.mkdir()
    yield place
    for path in reversed(made):
        path.rmdir()


@pytest.fixture(scope="module")
def running(groups: Path, shared_directory: Path) -> Iterator[RunningBroker]:
    del groups
    compiled = policy(
        shared_directory / "tree",
        rule("unit", clients=[{"cgroups": [f"/{NAME}/unit"]}], paths=["file"]),
        rule("deep and user", clients=[{"cgroups": [f"/{NAME}/unit/below/deep"], "uids": [CLIENT_UID]}],
             paths=["empty"]),
        rule("gone", clients=[{"cgroups": [f"/{NAME}/gone"]}]),
    )  # fmt: skip
    with running_broker(shared_directory, compiled) as broker:
        yield broker


def fates(running: RunningBroker, group: Path, uid: int = CLIENT_UID) -> list[str]:
    """Return what becomes of two files for a client in a group."""

    def client() -> list[str]:
        (group / "cgroup.procs").write_text(str(os.getpid()))
        become(uid)
        with Speaker.connect(running.socket) as speaker:
            tree = bytes(running.socket.parent / "tree")
            return [entry.reason for entry in speaker.open(tree + b"/file", tree + b"/empty")]

    return in_child(client)


@pytest.mark.parametrize(
    ("group", "uid", "expected"),
    [
        ("unit", CLIENT_UID, ["ok", "denied"]),
        ("unit/below", CLIENT_UID, ["ok", "denied"]),
        ("unit/below/deep", CLIENT_UID, ["ok", "ok"]),
        ("unit/below/deep", 0, ["ok", "denied"]),
        ("unit-beside", CLIENT_UID, ["denied", "denied"]),
        ("other", CLIENT_UID, ["denied", "denied"]),
        (".", CLIENT_UID, ["denied", "denied"]),
    ],
)
def test_client_is_served_by_the_group_that_it_is_in_or_below(
    running: RunningBroker, groups: Path, group: str, uid: int, expected: list[str]
) -> None:
    assert fates(running, groups / group, uid) == expected


def test_client_in_no_group_that_is_named_is_denied(running: RunningBroker) -> None:
    with Speaker.connect(running.socket) as speaker:
        assert speaker.open_one(bytes(running.socket.parent / "tree" / "file")).reason == "denied"


def test_group_made_later_below_the_named_one_counts(running: RunningBroker, groups: Path) -> None:
    later = groups / "unit" / "later"
    later.mkdir()
    try:
        assert fates(running, later) == ["ok", "denied"]
    finally:
        later.rmdir()


def test_group_of_that_name_elsewhere_does_not_count(running: RunningBroker, groups: Path) -> None:
    """A subtree that was delegated can hold any name: the whole path counts."""
    alike = groups / "other" / NAME
    alike.mkdir()
    (alike / "unit").mkdir()
    try:
        assert fates(running, alike / "unit") == ["denied", "denied"]
    finally:
        (alike / "unit").rmdir()
        alike.rmdir()


def test_client_that_is_moved_after_it_connected_is_refused(running: RunningBroker, groups: Path) -> None:
    file = bytes(running.socket.parent / "tree" / "file")

    def client() -> list[object]:
        (groups / "unit" / "cgroup.procs").write_text(str(os.getpid()))
        with Speaker.connect(running.socket) as speaker:
            before = speaker.open_one(file).reason
            (groups / "other" / "cgroup.procs").write_text(str(os.getpid()))
            after = speaker.open_one(file)[:2]
        with Speaker.connect(running.socket) as speaker:
            return [before, *after, speaker.open_one(file).reason]

    assert in_child(client) == ["ok", "identity", errno.EPERM, "denied"]
    reasons = [record["reason"] for record in running.decisions()[-3:]]
    assert reasons == ["ok", "identity_changed_since_connect", "no_rule"]


def test_tree_of_groups_can_be_listed_and_not_read(running: RunningBroker, groups: Path) -> None:
    """The broker looks ids up below the named groups; reading their files is outside its Landlock domain."""
    assert fates(running, groups / "unit" / "below") == ["ok", "denied"]
    assert not [what for what in running.descriptors().values() if NAME in what or "cgroup" in what]


def test_inherited_connection_has_the_group_of_who_made_it(groups: Path, reachable: Path) -> None:
    """The kernel says who called socketpair(2); that is who must ask, and where it is now."""
    tree = reachable / "tree"
    tree.mkdir()
    fill(tree)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    number = theirs.fileno()
    compiled = policy(tree, rule("unit", clients=[{"cgroups": [f"/{NAME}/unit"]}]))
    with running_broker(reachable, compiled, f"--inherited={number}=worker", pass_fds=[number]), ours:
        theirs.close()
        with Speaker(ours) as speaker:
            speaker.greet()
            assert speaker.open_one(bytes(tree / "file")).reason == "denied"
