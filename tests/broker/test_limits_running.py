"""Limits of a broker that runs by itself, confined, against users who try to get around them."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import select
import socket
import time
from typing import TYPE_CHECKING

import pytest

from fdbroker import LimitError, aio, connect
from fdbroker.client import control
from fdbroker.wire.client import OpenReply, WalkReply, encode_list, encode_open, encode_walk
from fdbroker.wire.format import Status, WalkKind
from fdbroker.wire.messages import ErrorReply, WalkFilter
from fdbroker.wire.stream import framed
from tests.broker.conftest import fill
from tests.broker.speaking import DatagramSpeaker, Speaker, StreamSpeaker, check_long_audit
from tests.processes import background, in_child, wait_until
from tests.running_broker import (
    BROKER_UID,
    CLIENT_UID,
    OTHER_UID,
    RunningBroker,
    policy,
    reachable_directory,
    rule,
    running_broker,
    with_control,
)
from tests.uids import FIRST_UID

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Attack = Callable[["Served"], int]

pytestmark = pytest.mark.root

BURST = 100
PER_SECOND = 50
FILES = 120  # more than the burst, and few enough that reading all records takes no longer than the attack
KINDS = (Speaker, StreamSpeaker)
WITHIN = 0.5  # of 99 of 100 answers to a bystander, by design


class Served:
    """A broker with a socket for each transport, and what it serves."""

    def __init__(self, broker: RunningBroker, directory: Path) -> None:
        self.broker = broker
        self.directory = directory
        self.tree = directory / "tree"
        self.file = bytes(self.tree / "file")

    def call(self, kind: type[Speaker]) -> Speaker:
        if kind is DatagramSpeaker:
            return DatagramSpeaker.to(self.directory / "broker.dgram", broker_uid=BROKER_UID)
        stream = kind is StreamSpeaker
        return kind.connect(self.directory / "broker.stream" if stream else self.broker.socket)


@contextlib.contextmanager
def served(
    directory: Path, *rules: dict[str, object], opens: str = "loop", limits: dict[str, float] | None = None
) -> Iterator[Served]:
    tree = directory / "tree"
    tree.mkdir()
    fill(tree)
    for number in range(400):
        (tree / "directory" / str(number)).touch()
    root = {"name": "tree", "path": str(tree), "cross_mounts": False, "opens": opens}
    sockets = [f"--{option}={directory / f'broker.{option}'}" for option in ("stream", "dgram")]
    compiled = policy(tree, *rules, limits=limits, roots=[root])
    with running_broker(directory, compiled, with_control(directory), *sockets) as broker:
        yield Served(broker, directory)
    check_long_audit(broker.audit.read_bytes())


def rate(what: str) -> dict[str, float]:
    return {f"{what}_per_second": PER_SECOND, f"{what}_burst": BURST}


def given_in(answer: object) -> int:
    """Count what a reply gives."""
    reply = getattr(answer, "reply", None)
    if isinstance(reply, OpenReply):
        return sum(result.status is Status.GIVEN for result in reply.results)
    if isinstance(reply, WalkReply):
        return sum(entry.descriptor for entry in reply.entries)
    return 0


def ask_until_refused(speaker: Speaker, request: bytes) -> int:
    """Ask again and again, a while after the first refusal as well; return how many files came."""
    given = refusals = 0
    while refusals < 5:
        answer = speaker.ask(request)
        with answer.descriptors:
            given += given_in(answer)
            reply = answer.reply
            refusals += isinstance(reply, ErrorReply) or (
                isinstance(reply, OpenReply) and any(result.limit is not None for result in reply.results)
            )
    return given


# Each returns how many files it got; all of them together by one uid.


def by_many_connections(served: Served) -> int:
    given = 0
    for number in range(20):
        with served.call(KINDS[number % 2]) as speaker:
            given += ask_until_refused(speaker, encode_open(7, [served.file]))
    return given


def by_many_processes(served: Served) -> int:
    return sum(in_child(lambda: by_large_requests(served)) for _ in range(4))


def by_large_requests(served: Served) -> int:
    with served.call(Speaker) as speaker:
        return ask_until_refused(speaker, encode_open(7, [served.file] * FILES))


def by_datagrams(served: Served) -> int:
    given = 0
    for _ in range(5):
        with served.call(DatagramSpeaker) as speaker:
            given += ask_until_refused(speaker, encode_open(7, [served.file]))
    return given


def by_walks(served: Served) -> int:
    """Walk with all the credit there is, four times at once, for a second."""
    given = 0
    end = time.monotonic() + 1
    with served.call(Speaker) as speaker:
        for number in range(4):
            speaker.send(
                encode_walk(
                    20 + number,
                    bytes(served.tree),
                    WalkFilter(WalkKind.REGULAR),
                    credit=9999,
                    descriptors=True,
                )
            )
        while (left := end - time.monotonic()) > 0:
            select.select([speaker.sock], [], [], left)
            for answer in speaker.arrived():
                with answer.descriptors:
                    given += given_in(answer)
    return given


WAYS: list[Attack] = [by_many_connections, by_many_processes, by_large_requests, by_datagrams, by_walks]


# Of these each asks as a uid of its own, and has a bucket of its own.


def uids_for(way: Attack) -> tuple[int, int]:
    """Return who asks in this way, and somebody else."""
    first = FIRST_UID + 70 + 2 * WAYS.index(way)
    return first, first + 1


@pytest.fixture(scope="module", params=[False, True], ids=["of uid", "of rule"])
def few_opens(request: pytest.FixtureRequest) -> Iterator[Served]:
    """Return a broker that gives a uid few files, by the limits of all or by those of its rule."""
    rules = [rule("all", limits=rate("opens"))] if request.param else []
    limits = {} if request.param else rate("opens")
    with reachable_directory() as directory, served(directory, *rules, limits=limits) as broker:
        yield broker


@pytest.mark.parametrize("way", WAYS)
def test_no_way_of_asking_gives_more_files_than_the_limit(few_opens: Served, way: Attack) -> None:
    uid, other = uids_for(way)
    began = time.monotonic()
    given = in_child(lambda: way(few_opens), uid=uid)
    seconds = time.monotonic() - began
    assert BURST * 0.9 <= given <= BURST + PER_SECOND * seconds + 1
    # Another one has all of its own.
    assert in_child(lambda: by_large_requests(few_opens), uid=other) >= BURST


@pytest.mark.parametrize("of_rule", [False, True])
def test_files_that_helpers_open_are_no_way_around(reachable: Path, *, of_rule: bool) -> None:
    rules = [rule("all", limits=rate("opens"))] if of_rule else []
    with served(reachable, *rules, opens="helpers", limits={} if of_rule else rate("opens")) as broker:
        began = time.monotonic()
        for uid in (CLIENT_UID, OTHER_UID):
            given = in_child(lambda: by_large_requests(broker), uid=uid)
            assert BURST <= given <= BURST + PER_SECOND * (time.monotonic() - began) + 1


@pytest.fixture(scope="module")
def few_requests() -> Iterator[Served]:
    """Return a broker that answers few requests of a uid."""
    with reachable_directory() as directory, served(directory, limits=rate("requests")) as broker:
        yield broker


@pytest.mark.parametrize("way", WAYS[:-1])
def test_no_way_of_asking_is_answered_more_often_than_the_limit(few_requests: Served, way: Attack) -> None:
    uid, _ = uids_for(way)
    began = time.monotonic()
    in_child(lambda: way(few_requests), uid=uid)
    seconds = time.monotonic() - began
    # Those that are not read cost the less.
    of_uid = b'"uid":%d,' % uid
    records = [line for line in few_requests.broker.audit.read_bytes().splitlines() if of_uid in line]
    # Of a request that is answered each path is on record.
    paths = sum(b'"decision":"' in line for line in records)
    answered = paths / (FILES if way in {by_large_requests, by_many_processes} else 1)
    assert BURST <= answered <= BURST + PER_SECOND * seconds + 1
    refused = [json.loads(line) for line in records if b'"event":"request_refused"' in line]
    assert refused
    assert {(one["reason"], one["limit"]) for one in refused} == {("requests_per_second", PER_SECOND)}


def test_the_counts_of_the_status_are_those_of_the_refusals(reachable: Path) -> None:
    with served(reachable, rule("all", limits=rate("opens")), limits=rate("requests")) as broker:
        for uid in (CLIENT_UID, OTHER_UID):
            in_child(lambda: by_large_requests(broker), uid=uid)
            in_child(lambda: by_many_connections(broker), uid=uid)
        with control.connect(broker.broker.control) as connection:
            told = connection.status()["limits_hit"]
        records = broker.broker.records()
        assert isinstance(told, list)
        assert {(one["limit"], one["rule"]): one["count"] for one in told} == {
            ("rule_opens_per_second", "all"): sum(
                one.get("reason") == "rule_opens_per_second" for one in records
            ),
            ("requests_per_second", None): sum(one["event"] == "request_refused" for one in records),
        }


# One user does all it can; another one is as well off as before.


def floods(served: Served) -> None:
    """Ask, connect, and begin messages, as fast as the broker lets us."""
    halves: list[socket.socket] = []
    speakers = [served.call(kind) for kind in KINDS * 5]
    opened = encode_open(7, [served.file] * FILES)
    listed = encode_list(8, bytes(served.tree / "directory"))
    for number in itertools.count(9):
        walked = encode_walk(
            number, bytes(served.tree), WalkFilter(WalkKind.REGULAR), credit=10, descriptors=True
        )
        requests = [opened, listed, walked]
        for speaker in speakers:
            for request in requests:
                with contextlib.suppress(OSError):
                    stream = isinstance(speaker, StreamSpeaker)
                    speaker.sock.send(framed(request) if stream else request, socket.MSG_DONTWAIT)
            with contextlib.suppress(OSError):
                for answer in speaker.arrived():
                    answer.descriptors.close()
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        halves.append(sock)
        with contextlib.suppress(OSError):
            sock.setblocking(False)  # noqa: FBT003 - the standard library's own
            sock.connect(str(served.directory / "broker.stream"))
            sock.send(b"\x20\0\0")
        while len(halves) > 40:
            halves.pop(0).close()


def test_a_user_who_floods_changes_nothing_for_another(reachable: Path) -> None:
    limits = {**rate("requests"), **rate("opens"), "connections_per_uid": 32, "message_within": 1.0}
    with served(reachable, limits=limits) as broker:

        def ask() -> tuple[list[float], set[bytes | None]]:
            taken, contents = [], set()
            with broker.call(Speaker) as speaker:
                for _ in range(BURST):
                    before = time.monotonic()
                    contents.add(speaker.open_one(broker.file).content)
                    taken.append(time.monotonic() - before)
            return taken, contents

        with background(lambda: floods(broker), uid=CLIENT_UID):
            wait_until(
                lambda: b"requests_per_second" in broker.broker.audit.read_bytes(), "a refusal of the flood"
            )
            taken, contents = in_child(ask, uid=OTHER_UID)
        # As many as there are in its own bucket, whatever the other one did to his.
        assert contents == {b"content"}
        assert sorted(taken)[BURST * 99 // 100 - 1] < WITHIN


# The clients


def test_who_waits_for_as_long_as_the_broker_says_gets_on(reachable: Path) -> None:
    limits: dict[str, float] = {"opens_per_second": 20, "opens_burst": 2}
    with served(reachable, limits=limits) as broker, connect(broker.broker.socket) as client:
        first, second, third = list(client.open_many([broker.file] * 3))
        for opened in (first, second):
            opened.close()
        error = third.error
        assert isinstance(error, LimitError)
        assert (error.limit, error.value) == ("opens_per_second", 20)
        assert error.retry_after is not None
        assert 0 < error.retry_after <= 0.05
        time.sleep(error.retry_after)  # what the broker said is long enough
        assert client.read_bytes(broker.file) == b"content"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_whose_idle_connection_was_closed_does_not_notice(reachable: Path, *, stream: bool) -> None:
    with served(reachable, limits={"idle_timeout": 1.0}) as broker:
        path = broker.directory / "broker.stream" if stream else broker.broker.socket

        def ended() -> int:
            return broker.broker.audit.read_bytes().count(b'"event":"connection_ended"')

        with connect(path) as client:
            assert client.read_bytes(broker.file) == b"content"
            wait_until(ended, "the end of an idle connection")
            with client.open(broker.file) as file:
                assert file.read() == b"content"


async def _ask_after(path: Path, file: bytes, ended: Callable[[], int]) -> None:
    async with await aio.connect(path) as client:
        assert await client.read_bytes(file) == b"content"
        wait_until(ended, "the end of an idle connection")
        assert await client.read_bytes(file) == b"content"


def test_neither_does_one_for_asyncio(reachable: Path) -> None:
    with served(reachable, limits={"idle_timeout": 1.0}) as broker:

        def ended() -> int:
            return broker.broker.audit.read_bytes().count(b'"event":"connection_ended"')

        asyncio.run(_ask_after(broker.broker.socket, broker.file, ended))
