"""Walks, copies and services of a broker as it is started: with Landlock and seccomp around it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from fdbroker.wire.client import OpenReply, encode_open
from tests.broker.puppets import Puppet
from tests.broker.speaking import check_audit, read_walked
from tests.broker.test_acting import (
    accepted,
    connect,
    join,
    open_for,
    release,
    say,
    serve,
)
from tests.running_broker import CLIENT_UID, RunningBroker, reachable_directory, running_broker
from tests.uids import FIRST_UID

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.root

SERVICE_UID = FIRST_UID + 62
POLICY = """
version: 1
roots:
  tree: {path: DIRECTORY/tree}
rules:
  - name: for-clients
    allow: [open, stat, list, walk]
    client: {user: SERVICE}
    on_behalf_of: {user: CLIENT}
    in: tree
    paths: ["**"]
    where: {owner: on_behalf_of}
  - name: copies
    allow: [open, walk]
    client: {user: CLIENT}
    in: tree
    paths: ["**"]
    deliver: [descriptor, copy]
limits: {in_flight_per_connection: 253}
listeners:
  seqpacket: {path: DIRECTORY/broker.seqpacket}
  control: {path: DIRECTORY/control}
  clamd: {path: DIRECTORY/clamd, service: {user: SERVICE}}
"""


@pytest.fixture
def directory() -> Iterator[Path]:
    with reachable_directory() as path:
        (path / "tree").mkdir()
        for number in range(300):
            file = path / "tree" / f"f{number}"
            file.write_text(f"f{number}")
            os.chown(file, CLIENT_UID, CLIENT_UID)
        os.chown(path / "tree", CLIENT_UID, CLIENT_UID)
        yield path


@pytest.fixture
def running(directory: Path) -> Iterator[RunningBroker]:
    names = {"DIRECTORY": directory, "SERVICE": SERVICE_UID, "CLIENT": CLIENT_UID}
    text = POLICY
    for name, value in names.items():
        text = text.replace(name, str(value))
    with running_broker(directory, text, own_socket=False) as broker:
        yield broker
    check_audit(broker.records())


def test_service_acts_for_a_client_of_a_confined_broker(running: RunningBroker, directory: Path) -> None:
    with Puppet(uid=SERVICE_UID) as service, Puppet(uid=CLIENT_UID) as client:
        service.do(join, running.socket)
        assert service.do(serve, b"clamd") == "ok"
        before = len(running.descriptors())
        client.do(connect, directory / "clamd")
        client.do(say, b"x")
        got = service.do(accepted)
        assert (got.pid, got.uid) == (client.pid, CLIENT_UID)
        tree = bytes(directory / "tree")
        assert service.do(open_for, got.number, tree + b"/f7") == [("ok", b"f7")]
        assert service.do(open_for, None, tree + b"/f7") == [("denied", None)]
        service.do(release, got.number)
        assert service.do(open_for, got.number, tree + b"/f7") == [("identity", None)]
        client.do(connect, directory / "clamd")
        number = service.do(accepted).number
        client.end()
        assert service.do(open_for, number, tree + b"/f7") == [("identity", None)]
        service.do(release, number)
        assert len(running.descriptors()) == before


def test_walk_for_a_client_of_a_confined_broker_gives_its_files(
    running: RunningBroker, directory: Path
) -> None:
    with Puppet(uid=SERVICE_UID) as service, Puppet(uid=CLIENT_UID) as client:
        service.do(join, running.socket)
        service.do(serve, b"clamd")
        client.do(connect, directory / "clamd")
        number = service.do(accepted).number
        paths = service.do(walk_all, bytes(directory / "tree"), number)
        assert sorted(paths) == sorted(f"f{number}".encode() for number in range(300))


def walk_all(memory: dict[str, Any], start: bytes, number: int | None) -> list[bytes]:
    """Walk with much credit, so that it is the descriptors under way that keep the walk."""
    speaker = memory["speaker"]
    speaker.begin_walk(start, credit=100, client=number)
    entries = []
    while True:
        frame = read_walked(speaker.receive())
        assert frame.reason == "ok"
        assert all(path == content for path, content in frame.entries)
        entries += frame.entries
        if frame.end is not None:
            assert frame.end[:2] == (len(entries), len(entries))
            return [path for path, _ in entries]


def test_copies_and_walks_of_a_confined_broker(running: RunningBroker, directory: Path) -> None:
    with Puppet(uid=CLIENT_UID) as client:
        client.do(join, running.socket)
        assert client.do(copies, bytes(directory / "tree")) == [b"f0", b"f1", b"f2"]
        assert len(client.do(walk_all, bytes(directory / "tree"), None)) == 300


def copies(memory: dict[str, Any], tree: bytes) -> list[bytes]:
    reply = (
        memory["speaker"]
        .ask(encode_open(1, [tree + b"/f%d" % number for number in range(3)], copy=True))
        .reply
    )
    assert isinstance(reply, OpenReply)
    return list(reply.copies)
