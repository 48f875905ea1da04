"""A broker whose audit has no room (a full file system, a reader that is stuck): it denies, and goes on."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from fdbroker.broker.audit import Audit, decision_members
from tests.broker.speaking import Speaker, path_of, read_audit
from tests.cli.commands import run_here
from tests.running_broker import policy, reachable_directory, running_broker, with_control

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.running_broker import RunningBroker

pytestmark = pytest.mark.root


@pytest.fixture
def reachable() -> Iterator[Path]:
    with reachable_directory() as path:
        (path / "tree").mkdir()
        (path / "tree" / "file").write_bytes(b"content")
        yield path


@pytest.fixture
def disk(reachable: Path) -> Iterator[Path]:
    """Return a file system that is small."""
    path = reachable / "disk"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k,mode=755", "none", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


def fill_up(disk: Path) -> None:
    with open(disk / "filling", "wb", buffering=0) as filling, contextlib.suppress(OSError):
        while filling.write(bytes(4096)):
            pass


def ask(speaker: Speaker, file: Path, name: str) -> str:
    """Ask for a file by a name that is not there, so that each request has its own, or for itself."""
    return speaker.open_one(bytes(file.parent / name)).reason


def verified(*data: bytes, directory: Path) -> tuple[int, list[dict[str, Any]]]:
    (directory / "copy").write_bytes(b"".join(data))
    result = run_here("audit", "verify", "--json", str(directory / "copy"))
    return result.returncode, json.loads(result.stdout)["findings"]


def denied_until_there_is_room(
    running: RunningBroker, file: Path, make_room: Callable[[], object], *, largest: int = 1
) -> tuple[int, int]:
    """Ask until the audit is full, make room, ask again; return how often it was given and denied."""
    given = denied = 0
    with Speaker.connect(running.socket) as speaker:
        while denied < 5:
            opened = speaker.open(*[bytes(file)] * largest)
            reasons = {one.reason for one in opened}
            assert reasons in ({"ok"}, {"audit"})
            assert all((one.content is None) is (one.reason == "audit") for one in opened)
            given, denied = given + (reasons == {"ok"}), denied + (reasons == {"audit"})
            assert given < 5000, "there was always room"
        make_room()
        assert speaker.open_one(bytes(file)).content == b"content"
        assert speaker.open_one(bytes(file)).content == b"content"
    return given, denied


def test_a_full_file_system_is_a_denial_until_there_is_room_again(reachable: Path, disk: Path) -> None:
    file = reachable / "tree/file"
    compiled = policy(reachable / "tree")
    with running_broker(reachable, compiled, with_control(reachable), audit=str(disk / "audit")) as running:
        fill_up(disk)
        given, denied = denied_until_there_is_room(running, file, (disk / "filling").unlink)
    data = (disk / "audit").read_bytes()
    assert all(line[:1] in {b"{", b""} for line in data.split(b"\n"))
    assert data.endswith(b"\n")
    status, findings = verified(data, directory=reachable)
    assert status == 1
    assert all(finding["told"] for finding in findings)
    records = read_audit(data)
    [told] = [record for record in records if record["event"] == "audit_failed"]
    assert told["given"] == 0
    # Each request that was denied, and the report that went with all but the first of them.
    assert told["to"] - told["from"] + 1 == denied + (denied - 1)
    assert sum(record["event"] == "open" for record in records) == given + 2
    assert json.loads(data.split(b"\n")[-2])["event"] == "stopped"


def test_what_is_given_though_it_could_not_be_recorded_is_counted(reachable: Path, disk: Path) -> None:
    file = reachable / "tree/file"
    compiled = policy(reachable / "tree", audit={"on_failure": "allow"})
    with running_broker(reachable, compiled, with_control(reachable), audit=str(disk / "audit")) as running:
        fill_up(disk)
        with Speaker.connect(running.socket) as speaker:
            for _ in range(60):
                assert speaker.open_one(bytes(file)).content == b"content"
            (disk / "filling").unlink()
            assert speaker.open_one(bytes(file)).content == b"content"
    records = read_audit((disk / "audit").read_bytes())
    [told] = [record for record in records if record["event"] == "audit_failed"]
    assert told["given"] == 1
    opened = sum(record["event"] == "open" for record in records)
    # The others have their numbers among those that are told, each but the first with a report beside it.
    lost = 61 - opened
    assert told["to"] - told["from"] + 1 == lost + (lost - 1)
    assert verified((disk / "audit").read_bytes(), directory=reachable)[0] == 1


@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_a_reader_that_is_stuck_is_a_denial_until_it_reads_on(reachable: Path, kind: str) -> None:
    """As journald behind its socket, or a logger behind a pipe."""
    file = reachable / "tree/file"
    if kind == "pipe":
        reading, writing = os.pipe()
    else:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        reading, writing = ours.detach(), theirs.detach()
    os.set_blocking(reading, False)
    data = bytearray()

    def read_on() -> None:
        with contextlib.suppress(BlockingIOError):
            while piece := os.read(reading, 1 << 20):
                data.extend(piece)

    try:
        with running_broker(
            reachable, policy(reachable / "tree"), with_control(reachable), audit="-", stdout=writing
        ) as running:
            os.close(writing)
            given, _ = denied_until_there_is_room(running, file, read_on, largest=100)
        read_on()
    finally:
        os.close(reading)
    assert given > 3  # there was room for the largest request several times over
    assert data.endswith(b"\n")
    status, findings = verified(bytes(data), directory=reachable)
    assert status == 1, findings
    records = read_audit(bytes(data))
    [told] = [record for record in records if record["event"] == "audit_failed"]
    doubtful = range(told["from"], told["to"] + 1)
    certain = [one for one in records if "path" in one and one["seq"] not in doubtful]
    assert len(certain) == given * 100 + 2
    assert {path_of(record) for record in certain} == {bytes(file)}


def test_a_reader_that_is_gone_is_a_denial_for_ever(reachable: Path) -> None:
    reading, writing = os.pipe()
    with running_broker(
        reachable, policy(reachable / "tree"), with_control(reachable), audit="-", stdout=writing
    ) as running:
        os.close(writing)
        os.close(reading)
        with Speaker.connect(running.socket) as speaker:
            for _ in range(3):
                assert ask(speaker, reachable / "tree/file", "file") == "audit"
            assert ask(speaker, reachable / "tree/file", "none") == "audit"


def test_a_failure_under_allow_is_told_as_given_also_if_a_reload_denies_since() -> None:
    written: list[bytes] = []

    def write(_descriptor: int, data: bytes) -> int:
        written.append(data)
        return len(data)

    with pytest.MonkeyPatch.context() as patch:
        audit = Audit(5, deny_on_failure=False)
        patch.setattr(os, "write", lambda _descriptor, _data: 0)
        assert audit.decisions('"uid":1', "open", [b"/a"], [decision_members("ok", "r")])
        audit.deny_on_failure = True
        assert not audit.decisions('"uid":1', "open", [b"/a"], [decision_members("ok", "r")])
        patch.setattr(os, "write", write)
        assert audit.event("stopped")
    [told] = [record for record in read_audit(b"".join(written)) if record["event"] == "audit_failed"]
    assert (told["from"], told["given"]) == (0, 1)
