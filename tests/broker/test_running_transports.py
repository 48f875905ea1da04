"""Streams and datagrams of a broker that runs by itself, confined: other users, and who takes all."""

from __future__ import annotations

import contextlib
import errno
import signal
import socket
from typing import TYPE_CHECKING

import pytest

from fdbroker.broker.identity import probe_level
from fdbroker.wire.client import encode_open
from fdbroker.wire.stream import framed
from tests.broker.conftest import fill
from tests.broker.speaking import Speaker, StreamSpeaker, check_long_audit, read_opened
from tests.processes import background, become, in_child, wait_until
from tests.running_broker import CLIENT_UID, OTHER_UID, policy, reachable_directory, running_broker
from tests.soak.brokers import KINDS, Everywhere, served_everywhere

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.root

FILES = 253


@pytest.fixture(scope="module")
def small() -> Iterator[Everywhere]:
    """Return a broker that may have 4,096 descriptors: 512 of a uid may be under way."""
    with reachable_directory() as directory, served_everywhere(directory, most_descriptors=4096) as served:
        yield served
        audit = served.broker.audit.read_bytes()
        check_long_audit(audit)
        assert b'"errno":%d' % errno.ETOOMANYREFS not in audit


def reasons(served: Everywhere, kind: type[Speaker], count: int) -> list[str]:
    """Open a file so many times at once."""
    with served.call(kind) as speaker:
        return [entry.reason for entry in speaker.open(*[bytes(served.tree / "file")] * count)]


@pytest.mark.parametrize("kind", KINDS)
def test_each_transport_serves_other_users_from_within_the_confinement(
    small: Everywhere, kind: type[Speaker]
) -> None:
    """Datagrams are answered at abstract addresses, which Landlock would keep out of reach."""
    private = small.tree / "private"
    private.write_bytes(b"private")
    private.chmod(0o600)

    def client() -> tuple[bytes | None, list[bytes], int]:
        with small.call(kind) as speaker:
            content = speaker.open_one(bytes(private)).content
            return content, speaker.list_all(bytes(small.tree)), len(speaker.stat(bytes(private)).results)

    content, names, described = in_child(client, uid=CLIENT_UID)
    assert (content, described) == (b"private", 1)
    assert b"private" in names
    record = small.broker.decisions()[-1]
    assert (record["uid"], record["identity"]) == (CLIENT_UID, probe_level().level)


def test_a_stream_that_was_connected_before_is_served_under_its_name(reachable: Path) -> None:
    tree = reachable / "tree"
    tree.mkdir()
    fill(tree)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    number = theirs.fileno()
    with (
        running_broker(reachable, policy(tree), f"--inherited={number}=worker", pass_fds=[number]) as broker,
        ours,
    ):
        theirs.close()
        with StreamSpeaker(ours) as speaker:
            speaker.greet()
            assert speaker.open_one(bytes(tree / "file")).content == b"content"
        assert broker.decisions()[-1]["socket"] == "worker"


@pytest.mark.parametrize("kind", KINDS)
def test_who_never_receives_can_not_take_the_descriptors_of_others(
    small: Everywhere, kind: type[Speaker]
) -> None:
    request = encode_open(7, [bytes(small.tree / "file")] * FILES)
    here, there = socket.socketpair()

    def rogue() -> None:
        become(CLIENT_UID)
        speakers = [small.call(kind) for _ in range(40)]
        for speaker in speakers:
            speaker.sock.setblocking(False)  # noqa: FBT003 - the standard library's own
            for _ in range(2):
                with contextlib.suppress(OSError):
                    speaker.send(request)
            with contextlib.suppress(OSError):
                speaker.send(b"\xff\xff malformed")
        there.send(b"sent")
        signal.pause()

    with here, there, background(rogue):
        assert here.recv(10) == b"sent"
        for _ in range(3):
            for other in KINDS:
                served = in_child(lambda other=other: reasons(small, other, FILES), uid=OTHER_UID)  # type: ignore[misc]
                assert served == ["ok"] * FILES
        with small.call(Speaker) as speaker:
            assert FILES <= speaker.status()["totals"]["in_flight"] <= 512 + FILES
    wait_until(lambda: connections(small) == 1, "the rogue's connections gone")


def connections(served: Everywhere) -> int:
    """Return how many connections there are, with the one that asks."""
    with served.call(Speaker) as speaker:
        found: int = speaker.status()["totals"]["connections"]
        return found


@pytest.mark.parametrize("kind", [Speaker, StreamSpeaker])
def test_a_client_that_sends_ahead_and_receives_gets_all_in_order(
    small: Everywhere, kind: type[Speaker]
) -> None:
    """As many descriptors as the kernel allows a user, several times over, and never too many at a time."""
    file = bytes(small.tree / "file")
    with small.call(kind) as speaker:
        speaker.sock.setblocking(False)  # noqa: FBT003 - as above
        waiting = [encode_open(number, [file] * FILES) for number in range(60)]
        data = b""
        for number in range(60):
            answer = None
            while answer is None:
                with contextlib.suppress(BlockingIOError):
                    while data or waiting:
                        if not data:
                            message = waiting.pop(0)
                            data = framed(message) if kind is StreamSpeaker else message
                        data = data[speaker.sock.send(data) :]
                with contextlib.suppress(BlockingIOError):
                    answer = speaker.receive()
                    assert answer is not None
            assert {entry.reason for entry in read_opened(answer, number)} == {"ok"}
    assert b'"event":"undelivered"' not in small.broker.audit.read_bytes()
