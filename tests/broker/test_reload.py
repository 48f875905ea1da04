"""Another policy for a broker that runs: under load, again and again, interrupted, refused."""

from __future__ import annotations

import contextlib
import json
import mmap
import operator
import os
import random
import select
import signal
import socket
import time
import traceback
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from fdbroker.broker.generation import Held, key_of, problem_with
from fdbroker.broker.roots import HeldRoot
from fdbroker.policy.rules import read_policy
from fdbroker.wire.client import OpenReply, ReloadReply, encode_open, encode_reload
from fdbroker.wire.format import HEADER, MAX_POLICY, PIECE, Kind, Reason, Type
from fdbroker.wire.messages import ErrorReply
from tests.broker.speaking import Speaker, check_audit, path_of, read_audit, read_opened
from tests.processes import background, become, in_child, wait_until
from tests.running_broker import (
    CLIENT_UID,
    OTHER_UID,
    RunningBroker,
    policy,
    reachable_directory,
    rule,
    running_broker,
    with_control,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.root

CLIENTS = 8
RELOADS = 50
PIECE_SIZE = 60_000
WATCHDOG = 3.0  # seconds, as docs/fdbrokerd.md has it for systemd


@pytest.fixture
def reachable() -> Iterator[Path]:
    with reachable_directory() as path:
        (path / "tree").mkdir()
        (path / "tree" / "a").write_bytes(b"a")
        (path / "tree" / "b").write_bytes(b"b")
        yield path


@pytest.fixture
def notifications(reachable: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """Return a socket to which a broker that is started now says what a service says to systemd."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(reachable / "notify"))
        sock.settimeout(0)
        monkeypatch.setenv("NOTIFY_SOCKET", str(reachable / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", str(int(WATCHDOG * 1e6)))
        yield sock


@pytest.fixture
def running(reachable: Path) -> Iterator[RunningBroker]:
    with running_broker(reachable, alternating(reachable / "tree", 1), with_control(reachable)) as broker:
        yield broker
    check_audit(read_audit(broker.audit.read_bytes()))


def alternating(tree: Path, generation: int) -> dict[str, Any]:
    """Return the policy of a generation: odd allows `a` alone, even `b` alone."""
    return policy(tree, rule("only", paths=["a" if generation % 2 else "b"]))


def allowed(path: bytes, generation: int) -> bool:
    return path.endswith(b"/a" if generation % 2 else b"/b")


# Under load


class Progress:
    """How many answers each client has had, which all processes see; and whether they are to stop."""

    def __init__(self) -> None:
        self._shared = memoryview(mmap.mmap(-1, 8 * (CLIENTS + 1))).cast("Q")

    def count(self, client: int) -> None:
        """Count one more answer."""
        self._shared[client] += 1

    def counts(self) -> list[int]:
        """Return the answers of every client."""
        return self._shared[:CLIENTS].tolist()

    def since_now(self) -> Callable[[], bool]:
        """Return what says whether each client has had an answer since this call."""
        before = self.counts()
        return lambda: all(map(operator.gt, self.counts(), before))

    @property
    def stopped(self) -> bool:
        """Whether to ask no more."""
        return bool(self._shared[CLIENTS])

    def stop(self) -> None:
        """Let them come to their end."""
        self._shared[CLIENTS] = 1


def ask_until_stopped(running: RunningBroker, tree: Path, client: int, progress: Progress) -> int:
    """Ask for both files, two requests ahead, and check every answer; return how many policies were met."""
    paths = [bytes(tree / "a"), bytes(tree / "b")]
    asked = answered = last = 0
    generations = set()
    with Speaker.connect(running.socket) as speaker:
        while not progress.stopped or answered < asked:
            while asked < answered + 2 and not progress.stopped:
                asked += 1
                speaker.send(encode_open(asked, paths))
            answer = speaker.receive()
            assert answer is not None, "the connection was closed"
            answered += 1
            generation = answer.reply.generation
            assert isinstance(answer.reply, OpenReply), answer.reply
            for path, opened in zip(paths, read_opened(answer, answered), strict=True):
                expected = ("ok", path[-1:]) if allowed(path, generation) else ("denied", None)
                assert (opened.reason, opened.content) == expected, (path, generation)
            assert generation >= last, "a policy of before was met again"
            last = generation
            generations.add(generation)
            progress.count(client)
            # Somebody's request is under way all the while, without one reload being met by a thousand.
            select.select([], [], [], 0.001)
    return len(generations)


@contextlib.contextmanager
def clients_under_way(running: RunningBroker, tree: Path, progress: Progress) -> Iterator[None]:
    """Have them ask all the while; at the end they have had all their answers, and found nothing wrong."""
    pids = []
    for number in range(CLIENTS):
        pid = os.fork()
        if not pid:
            met = 0
            try:
                become((CLIENT_UID, OTHER_UID)[number % 2])
                met = ask_until_stopped(running, tree, number, progress)
            except BaseException:  # noqa: BLE001 - shown, and told by the status
                traceback.print_exc()
            finally:
                os._exit(0 if met > RELOADS * 3 // 4 else 1)
        pids.append(pid)
    try:
        yield
    finally:
        progress.stop()
        statuses = [os.waitpid(pid, 0)[1] for pid in pids]
    assert statuses == [0] * CLIENTS


def test_reloads_under_load_lose_no_request_and_each_is_decided_by_one_generation(
    running: RunningBroker, reachable: Path
) -> None:
    tree = reachable / "tree"
    own = [bytes(tree / "a"), bytes(tree / "b")]
    progress = Progress()
    with (
        clients_under_way(running, tree, progress),
        Speaker.connect(running.control) as control,
        Speaker.connect(running.socket) as speaker,
    ):
        for generation in range(2, 2 + RELOADS):
            wait_until(progress.since_now(), "an answer to each client")
            reply = control.reload(alternating(tree, generation))
            assert isinstance(reply, ReloadReply)
            assert reply.generation == generation
            # What is asked after a reload was answered is decided by it.
            answer = speaker.ask(encode_open(7, own))
            assert answer.reply.generation == generation
            assert [opened.content is not None for opened in read_opened(answer)] == [
                allowed(path, generation) for path in own
            ]
    # Every request of every client is on record, and ours: none was lost, none was decided twice.
    records = running.records()
    decisions = [record for record in records if "decision" in record]
    assert len(decisions) == 2 * (sum(progress.counts()) + RELOADS)
    for record in decisions:
        expected = "allow" if allowed(path_of(record), record["generation"]) else "deny"
        assert record["decision"] == expected, record
    # Between two reloads nothing was decided by another policy than the one in force.
    current = 1
    for record in records:
        if record["event"] == "reloaded":
            assert record["generation"] == current + 1
            current += 1
        elif "decision" in record:
            assert record["generation"] == current
    assert current == 1 + RELOADS


def hand_over(control: Speaker, text: bytes) -> None:
    """Hand over a policy to its end; its answer comes when it is read."""
    at = 0
    while at + PIECE_SIZE < len(text):
        piece = text[at : at + PIECE_SIZE]
        assert isinstance(control.ask(encode_reload(1, at, piece, more=True)).reply, ReloadReply)
        at += PIECE_SIZE
    control.send(encode_reload(2, at, text[at:], more=False))


class Reading(NamedTuple):
    """How long the broker took to read a policy, and others to be answered; seconds, and generations."""

    took: float
    waits: list[float]
    generations: list[int]


def ask_while_it_reads(
    running: RunningBroker, tree: Path, text: bytes, each: Callable[[], None] = lambda: None
) -> Reading:
    """Hand over a policy and ask for a file, until it is in force; call `each` after each answer."""
    with Speaker.connect(running.control) as control, Speaker.connect(running.socket) as speaker:
        hand_over(control, text)
        begun = time.monotonic()
        waits = []
        generations = []
        while not select.select([control.sock], [], [], 0)[0]:
            before = time.monotonic()
            answer = speaker.ask(encode_open(7, [bytes(tree / "a")]))
            waits.append(time.monotonic() - before)
            generations.append(answer.reply.generation)
            assert read_opened(answer)[0].content == b"a"
            each()
            select.select([control.sock], [], [], 0.002)  # others leave most of the time to the reading
        took = time.monotonic() - begun
        done = control.receive()
        assert done is not None
        assert isinstance(done.reply, ReloadReply), done.reply
        assert done.reply.generation == 2
    return Reading(took, waits, generations)


def test_largest_policy_neither_stalls_others_nor_trips_the_watchdog(
    notifications: socket.socket,
    running: RunningBroker,
    reachable: Path,
    record_property: Any,  # noqa: ANN401
) -> None:
    """No step of the reading takes long, as parsing it and putting it in force are: it takes seconds."""
    tree = reachable / "tree"
    only = rule("only", paths=["a"])
    where = {
        "owner": {"uids": [1], "client": True, "on_behalf_of": False},
        "mode": {"none": 0o22},
        "size": {"max": 2**31},
    }
    some = rule("r", where=where)
    count = (MAX_POLICY - 1000) // (len(json.dumps(some)) + 50)
    rules = [
        some
        | {
            "name": f"r{number}",
            "clients": [{"uids": [7, number]}],
            "paths": [f"*-{number}/**", f"**/x{number}?"],
        }
        for number in range(count)
    ]
    text = json.dumps(policy(tree, only, *rules)).encode()
    assert MAX_POLICY * 0.95 < len(text) <= MAX_POLICY
    pings = [time.monotonic()]

    def note_pings() -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                if b"WATCHDOG=1" in notifications.recv(4096):
                    pings.append(time.monotonic())

    reading = ask_while_it_reads(running, tree, text.ljust(MAX_POLICY), note_pings)
    pings.append(time.monotonic())
    gaps = [later - earlier for earlier, later in pairwise(pings)]
    record_property("reload_seconds", round(reading.took, 3))
    record_property("longest_wait_seconds", round(max(reading.waits), 3))
    record_property("longest_gap_seconds", round(max(gaps), 3))
    assert len(pings) > 2, "the watchdog was not told anything"
    assert max(gaps) < WATCHDOG
    assert reading.generations.count(1) > 10, "nobody was served while it was read"
    assert max(reading.waits) < reading.took / 3


# Memory


def resident(running: RunningBroker) -> int:
    """Return the resident set in KiB."""
    return int(running.status()["VmRSS"].split()[0])


def test_a_hundred_reloads_do_not_pile_up(running: RunningBroker, reachable: Path) -> None:
    tree = reachable / "tree"
    rules = [rule(f"r{number}", paths=[f"d{number}/*.txt", "a"]) for number in range(100)]
    compiled = json.dumps(policy(tree, *rules)).encode()
    idle = [Speaker.connect(running.socket) for _ in range(20)]
    sizes = {}
    with Speaker.connect(running.control) as control:
        for number in range(1, 101):
            assert control.reload(compiled).generation == 1 + number
            assert idle[number % 20].open_one(bytes(tree / "a")).content == b"a"
            sizes[number] = resident(running)
    for speaker in idle:
        speaker.close()
    # One such policy has more than 300 KiB.
    assert sizes[100] - sizes[30] < 2048, (sizes[30], sizes[100])


# Interrupted and refused


def test_whoever_hands_over_a_policy_and_dies_leaves_the_broker_as_it_was(
    running: RunningBroker, reachable: Path
) -> None:
    text = json.dumps(alternating(reachable / "tree", 2)).encode()
    before = running.descriptors()
    for killed_after in (1, len(text) // 2, len(text) - 1):
        ours, theirs = os.pipe()

        def half(until: int = killed_after, ready: int = theirs) -> None:
            speaker = Speaker.connect(running.control)
            speaker.ask(encode_reload(1, 0, text[:until], more=True))
            os.write(ready, b"there")
            signal.pause()

        with background(half):
            assert os.read(ours, 5) == b"there"
        os.close(ours)
        os.close(theirs)
    wait_until(lambda: running.descriptors().items() <= before.items(), "the connections gone")
    with Speaker.connect(running.control) as control:
        assert control.status()["generation"] == 1
        assert control.reload(text).generation == 2


def test_policy_whose_sender_is_gone_before_it_is_read_is_not_loaded(
    running: RunningBroker, reachable: Path
) -> None:
    """Whether it was loaded is then known to nobody but the audit, which agrees with what is in force."""
    tree = reachable / "tree"
    rules = [rule(f"r{number}", paths=[f"*-{number}/**"]) for number in range(3000)]
    text = json.dumps(policy(tree, *rules)).encode()
    with Speaker.connect(running.control) as control:
        hand_over(control, text)
    with Speaker.connect(running.control) as control:
        wait_until(lambda: control.status()["totals"]["connections"] == 1, "the other connection gone")
        generation = control.status()["generation"]
    reloaded = [record for record in running.records() if record["event"] == "reloaded"]
    assert generation == 1 + len(reloaded)


def test_garbage_in_pieces_is_answered_or_ends_the_connection_and_changes_nothing(
    running: RunningBroker, reachable: Path
) -> None:
    seeded = random.Random(5)  # noqa: S311 - reproducible, not secret
    text = json.dumps(alternating(reachable / "tree", 2)).encode()
    for _ in range(300):
        with Speaker.connect(running.control) as control:
            for _ in range(seeded.randrange(1, 5)):
                piece = bytearray(text[: seeded.randrange(1, len(text))])
                piece[seeded.randrange(len(piece))] ^= seeded.randrange(1, 256)
                head = HEADER.pack(
                    Type.RELOAD, seeded.choice([0, 0, 1, 2]), seeded.choice([0, 0, 0, 1]), 9, 0
                )
                control.send(
                    head + PIECE.pack(seeded.choice([0, 0, 0, len(piece), 2**32 - 1])) + bytes(piece)
                )
                answer = control.receive()
                assert answer is not None
                if isinstance(answer.reply, ErrorReply):
                    if answer.reply.kind == Kind.MALFORMED:
                        assert control.is_closed()
                        break
                    continue
                assert isinstance(answer.reply, ReloadReply)
                assert answer.reply.more, "garbage was taken for a policy"
    with Speaker.connect(running.control) as control, Speaker.connect(running.socket) as speaker:
        assert control.status()["generation"] == 1
        assert speaker.open_one(bytes(reachable / "tree" / "a")).content == b"a"
        assert control.reload(text).generation == 2


def test_only_root_may_reload_and_the_audit_has_who_tried(running: RunningBroker, reachable: Path) -> None:
    text = json.dumps(alternating(reachable / "tree", 2)).encode()

    def attempt() -> tuple[str, str, bool]:
        with Speaker.connect(running.control) as control:
            reply = control.reload(text)
            assert isinstance(reply, ErrorReply)
            return reply.reason.name, reply.text, "totals" in control.status()

    assert in_child(attempt, uid=CLIENT_UID) == (
        "DENIED",
        "only root changes the policy: run it as root",
        False,
    )
    [record] = [record for record in running.records() if record["event"] == "reload_refused"]
    assert record["uid"] == CLIENT_UID
    with Speaker.connect(running.control) as control:
        assert control.status()["generation"] == 1


def test_root_that_appeared_later_needs_a_restart_and_a_reload_says_so(
    running: RunningBroker, reachable: Path
) -> None:
    other = reachable / "other"
    other.mkdir()
    roots = [{"name": "other", "path": str(other), "cross_mounts": False, "opens": "loop"}]
    with Speaker.connect(running.control) as control:
        reply = control.reload(policy(reachable / "tree", rule("x", root="other"), roots=roots))
        assert isinstance(reply, ErrorReply)
        assert reply.reason == Reason.POLICY
        assert "restart the broker" in reply.text
        assert control.status()["roots"][0]["name"] == "tree"


@pytest.mark.parametrize(
    ("changes", "level", "labels", "said"),
    [
        ({"identity": "strict"}, 1, False, "this kernel has level 1: PIDFD_GET_INFO needs Linux 6.13; use a"),
        ({"identity": "strict"}, 2, False, None),
        (
            {"rules": [rule("x", clients=[{"labels": ["x_t"]}])]},
            2,
            False,
            "no security module of this kernel",
        ),
        ({"rules": [rule("x", on_behalf_of=[{"labels": ["x_t"]}])]}, 2, False, "no security module of this"),
        ({"rules": [rule("x", clients=[{"labels": ["x_t"]}])]}, 0, True, None),
    ],
)
def test_policy_that_asks_more_of_identities_than_the_kernel_tells_is_not_loaded(
    changes: dict[str, Any],
    level: int,
    said: str | None,
    *,
    labels: bool,
) -> None:
    rule_set = read_policy(policy("/tree") | changes)
    root = HeldRoot(-1, 6, cross_mounts=False, read_only_required=True)
    held = Held(
        {key_of(rule_set.roots[0]): root}, -1, None, read_only_view=True, identity_level=level, labels=labels
    )
    problem = problem_with(rule_set, held)
    assert (problem is None) if said is None else (said in (problem or ""))


def test_whole_status_of_a_running_broker_has_its_layers(running: RunningBroker) -> None:
    with Speaker.connect(running.control) as control:
        told = control.status()
    assert (told["pid"], told["seccomp"], told["read_only_view"]) == (running.pid, True, "required")
    assert told["landlock"] >= 1
    assert told["version"]
    assert {listener["name"]: listener["control"] for listener in told["listeners"]} == {
        "broker.seqpacket": False,
        "control": True,
    }
