"""What the service manager hears: that it serves, that the loop goes round, that it stops; when it ends."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import signal
import socket
import subprocess
import time
from typing import TYPE_CHECKING, Self

import pytest

from fdbroker.broker.dispatch import Asker
from fdbroker.broker.generation import make_generation
from fdbroker.broker.notify import Notifier
from fdbroker.policy.rules import ClientFacts, read_policy
from fdbroker.wire.client import ReloadReply, encode_open
from tests.broker.conftest import fill
from tests.broker.speaking import Speaker
from tests.broker.stepping import SteppedBroker
from tests.processes import wait_until
from tests.running_broker import (
    RunningBroker,
    launcher_command,
    launcher_environment,
    policy,
    reachable_directory,
    rule,
    running_broker,
    with_control,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SECONDS = 20


class Manager:
    """The socket of a service manager. `said`: every message, as it came."""

    def __init__(self, path: Path | str) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind(str(path))
        os.chmod(path, 0o666)
        self.sock.settimeout(SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.sock.close()

    def hear(self) -> dict[str, str]:
        """Return the next message, which must come."""
        text = self.sock.recv(4096).decode()
        return dict(line.split("=", 1) for line in text.split("\n"))

    def hear_now(self) -> list[dict[str, str]]:
        """Return what is there."""
        heard = []
        while select.select([self.sock], [], [], 0)[0]:
            heard.append(self.hear())
        return heard


@pytest.fixture
def reachable() -> Iterator[Path]:
    with reachable_directory() as path:
        (path / "tree").mkdir()
        fill(path / "tree")
        yield path


@pytest.fixture
def manager(reachable: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    """Return a manager whom the brokers of this test tell."""
    monkeypatch.setenv("NOTIFY_SOCKET", str(reachable / "notify"))
    with Manager(reachable / "notify") as made:
        yield made


# By itself


def pair(watchdog_usec: int | None = None) -> tuple[Notifier, socket.socket]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    ours.setblocking(False)  # noqa: FBT003 - the standard library's own
    return Notifier(theirs.detach(), watchdog_usec), ours


def test_several_things_are_said_in_one_message() -> None:
    notifier, ours = pair()
    with ours:
        notifier.say(READY="1", STATUS="Serving")
        assert ours.recv(100) == b"READY=1\nSTATUS=Serving"
    notifier.close()


def test_without_a_manager_nothing_is_said_and_nothing_is_due() -> None:
    notifier = Notifier()
    notifier.say(READY="1")
    assert notifier.before_waiting() == -1
    notifier.close()


def test_without_a_watchdog_there_is_no_ping() -> None:
    notifier, ours = pair()
    with ours:
        assert notifier.before_waiting() == -1
        with pytest.raises(BlockingIOError):
            ours.recv(100)
    notifier.close()


def test_watchdog_is_told_at_least_each_half_of_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    notifier, ours = pair(3_000_000)
    with ours:
        pings = []
        for _ in range(40):
            now[0] += notifier.before_waiting()
            with contextlib.suppress(BlockingIOError):
                assert ours.recv(100) == b"WATCHDOG=1"
                pings.append(now[0])
        assert len(pings) > 30
        assert max(after - before for before, after in itertools.pairwise(pings)) <= 1.5
        # Whoever has no time to wait pings all the same, and not each time.
        count = 0
        for _ in range(1000):
            now[0] += 0.01
            notifier.ping()
            with contextlib.suppress(BlockingIOError):
                count += bool(ours.recv(100))
        assert 7 <= count <= 11
    notifier.close()


def test_what_finds_no_room_is_said_later_and_is_not_forgotten() -> None:
    notifier, ours = pair()
    with ours:
        count = 0
        while not notifier._unsent:
            notifier.say(STATUS=str(count))
            count += 1
            assert count < 10_000
        notifier.say(READY="1", STATUS="last")
        assert 0 < notifier.before_waiting() <= 0.1
        for number in range(count - 1):
            assert ours.recv(100) == f"STATUS={number}".encode()
        assert notifier.before_waiting() == -1
        assert sorted(ours.recv(100).split(b"\n")) == [b"READY=1", b"STATUS=last"]
    notifier.close()


def test_manager_that_is_gone_is_no_trouble() -> None:
    notifier, ours = pair(1_000_000)
    ours.close()
    notifier.say(READY="1")
    assert notifier.before_waiting() > 0
    notifier.close()


def test_broker_that_has_much_to_do_in_one_round_pings_within_it(tree: Path, tmp_path: Path) -> None:
    """A watchdog that is told between rounds alone would end a broker that is only busy."""
    notifier, ours = pair(1)
    with ours, SteppedBroker(tree, audit=tmp_path / "audit", notifier=notifier) as broker:
        speakers = [broker.join() for _ in range(5)]
        for speaker in speakers:
            speaker.sock.send(encode_open(7, [bytes(tree / "file")]))
        broker.broker.step(0)
        pings = 0
        with contextlib.suppress(BlockingIOError):
            while ours.recv(100) == b"WATCHDOG=1":
                pings += 1
        assert pings >= 4
    notifier.close()


def test_rules_that_take_long_tell_the_watchdog_in_the_middle_of_a_request(stepped: SteppedBroker) -> None:
    """With many that must be tried one by one, 64 new directories may be seconds."""
    pings: list[int] = []
    held = stepped._held._replace(ping=lambda: pings.append(1))
    rules = read_policy(policy(stepped.tree, rule("logs", paths=["**/*.log"])))
    generation = make_generation(2, rules, held)
    view = generation.policy.view(ClientFacts(os.getuid(), frozenset()))
    asker = Asker(view, os.getuid(), None, "")
    outcomes = generation.opener.open(asker, [bytes(stepped.tree / f"{n}/x") for n in range(64)], [])
    assert {outcome.reason for outcome in outcomes} == {"no_rule"}
    assert len(pings) == 64


# A running broker


@pytest.mark.root
def test_messages_come_in_order_from_ready_to_stopping(reachable: Path, manager: Manager) -> None:
    tree = reachable / "tree"
    with running_broker(reachable, policy(tree), with_control(reachable)) as broker:
        assert manager.hear() == {"READY": "1", "STATUS": "Serving by policy generation 1 (1 rules)"}
        with Speaker.connect(broker.control) as control:
            assert isinstance(control.reload(policy(tree, rule("a"), rule("b"))), ReloadReply)
        assert manager.hear() == {"STATUS": "Serving by policy generation 2 (2 rules)"}
        assert manager.hear_now() == []
    assert manager.hear_now() == [{"STOPPING": "1", "STATUS": "Stopping"}]


@pytest.mark.root
def test_ready_is_said_when_it_can_be_asked_and_by_the_process_that_was_started(
    reachable: Path, manager: Manager
) -> None:
    manager.sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    with running_broker(reachable, policy(reachable / "tree")) as broker:
        data, ancillary, _, _ = manager.sock.recvmsg(4096, 100)
        assert data.startswith(b"READY=1")
        [(_, _, credentials)] = ancillary
        assert int.from_bytes(credentials[:4], "little") == broker.pid
        with Speaker.connect(broker.socket) as speaker:
            assert speaker.open_one(bytes(reachable / "tree" / "file")).content == b"content"


@pytest.fixture
def watched(reachable: Path, manager: Manager, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunningBroker]:
    """Return a broker that is to ping each 150 ms."""
    monkeypatch.setenv("WATCHDOG_USEC", "300000")
    with running_broker(reachable, policy(reachable / "tree")) as broker:
        assert "READY" in manager.hear()
        yield broker


@pytest.mark.root
def test_idle_broker_pings_and_one_that_is_stuck_is_silent(watched: RunningBroker, manager: Manager) -> None:
    times = []
    for _ in range(10):
        assert manager.hear() == {"WATCHDOG": "1"}
        times.append(time.monotonic())
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert 0.05 < sorted(gaps)[len(gaps) // 2] <= 0.15
    os.kill(watched.pid, signal.SIGSTOP)
    try:
        wait_until(lambda: watched.status()["State"].startswith("T"), "it to be stopped")
        manager.hear_now()
        silent = not select.select([manager.sock], [], [], 0.6)[0]
    finally:
        os.kill(watched.pid, signal.SIGCONT)
    assert silent
    assert manager.hear() == {"WATCHDOG": "1"}


@pytest.mark.root
def test_busy_broker_pings(watched: RunningBroker, manager: Manager, reachable: Path) -> None:
    file = bytes(reachable / "tree" / "file")
    with Speaker.connect(watched.socket) as speaker:
        begun = time.monotonic()
        pings = 0
        while pings < 5:
            # It never waits for as long as its next ping is away.
            assert speaker.open_one(file).content == b"content"
            select.select([], [], [], 0.002)
            pings += manager.hear_now().count({"WATCHDOG": "1"})
            assert time.monotonic() - begun < SECONDS, pings
        assert pings <= (time.monotonic() - begun) / 0.08 + 1


@pytest.mark.root
def test_manager_that_goes_away_or_hears_nothing_does_not_stop_the_broker(
    watched: RunningBroker, manager: Manager, reachable: Path
) -> None:
    file = bytes(reachable / "tree" / "file")
    with Speaker.connect(watched.socket) as speaker:
        manager.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        # Three pings each, and as long as that takes.
        for _ in range(50):
            assert speaker.open_one(file).content == b"content"
            select.select([], [], [], 0.01)
        manager.sock.close()
        for _ in range(50):
            assert speaker.open_one(file).content == b"content"
            select.select([], [], [], 0.01)


# When it ends


@pytest.mark.root
def test_broker_ends_by_itself_when_its_last_inherited_connection_is_gone(reachable: Path) -> None:
    """As inetd and UCSPI servers start it: nobody else can come."""
    tree = reachable / "tree"
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2)]
    numbers = [theirs.fileno() for _, theirs in pairs]
    policy_file = reachable / "policy.json"
    policy_file.write_text(json.dumps(policy(tree)))
    ready, write_end = os.pipe()
    process = subprocess.Popen(
        [
            *launcher_command(policy_file, *(f"--inherited={number}" for number in numbers)),
            f"--audit={reachable / 'audit'}",
            f"--ready-fd={write_end}",
        ],
        env=launcher_environment(),
        stdin=subprocess.DEVNULL,
        pass_fds=[*numbers, write_end],
    )
    try:
        os.close(write_end)
        for _, theirs in pairs:
            theirs.close()
        first, second = (Speaker(ours) for ours, _ in pairs)
        with open(ready, "rb") as file:
            assert file.read() == b"ready\n"  # a message before has no credentials of its sender
        for speaker in (first, second):
            speaker.greet()
            assert speaker.open_one(bytes(tree / "file")).content == b"content"
        first.close()
        assert second.open_one(bytes(tree / "file")).content == b"content"
        assert process.poll() is None
        second.close()
        assert process.wait(timeout=SECONDS) == 0
    finally:
        process.kill()
        process.wait()
    assert b'"event":"stopped"' in (reachable / "audit").read_bytes()


@pytest.mark.root
def test_stop_waits_neither_for_many_connections_nor_for_replies_that_wait(reachable: Path) -> None:
    tree = reachable / "tree"
    limits = {"connections_per_uid": 600, "in_flight_per_connection": 512}
    file = bytes(tree / "file")
    with contextlib.ExitStack() as stack:
        broker = stack.enter_context(running_broker(reachable, policy(tree, limits=limits), stop=False))
        speakers = [stack.enter_context(Speaker.connect(broker.socket)) for _ in range(500)]
        for speaker in speakers:
            # More than its queue takes: replies wait. And work for seconds.
            for request in range(3):
                speaker.sock.send(encode_open(request, [file] * 253))
        begun = time.monotonic()
        os.kill(broker.pid, signal.SIGTERM)
        assert broker.process.wait(timeout=SECONDS) == 0
        took = time.monotonic() - begun
        assert broker.records()[-1]["event"] == "stopped"
        answered = len({(r["connection"], r["request"]) for r in broker.decisions()})
    assert answered < 1500, "there was nothing left to be interrupted"
    assert took < 5, took  # less than a second where nobody else has the CPUs; no client reads within ten
