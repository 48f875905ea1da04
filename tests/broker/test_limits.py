"""Limits by rate, of what rules give, and of idle connections, by a clock of the test."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from fdbroker.broker import limits as limits_module
from fdbroker.broker import server, walking, walks
from fdbroker.kernel import sockets
from fdbroker.kernel.descriptors import close_all
from fdbroker.kernel.errors import SyscallError
from fdbroker.kernel.files import reopen_for_reading
from fdbroker.wire.client import (
    OpenReply,
    WalkReply,
    encode_cancel,
    encode_list,
    encode_more,
    encode_open,
    encode_stat,
    encode_status,
    encode_walk,
)
from fdbroker.wire.format import Kind, Limit, Reason, Status, WalkKind
from fdbroker.wire.messages import ErrorReply, LimitReached, WalkFilter
from tests.broker.conftest import fill, no_descriptor_left
from tests.broker.speaking import DatagramSpeaker, Speaker, StreamSpeaker
from tests.broker.stepping import SteppedBroker
from tests.broker.test_acting import Acting, accepted, acting_broker, acting_policy, open_for
from tests.broker.test_control import in_child_on
from tests.broker.walks import Ground
from tests.running_broker import CLIENT_UID, OTHER_UID, policy, rule

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator
    from pathlib import Path

    from fdbroker.policy.rules import Rule
    from tests.broker.puppets import Puppet

KINDS = [Speaker, StreamSpeaker]


class Clock:
    """The time of the broker, which goes on when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def monotonic_ns(self) -> int:
        return round(self.now * 1_000_000_000)


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    for module in (server, walks, limits_module):
        fake = SimpleNamespace(monotonic=made.monotonic, monotonic_ns=made.monotonic_ns)
        monkeypatch.setattr(module, "time", fake)
    return made


@contextlib.contextmanager
def limited_broker(directory: Path, *rules: dict[str, Any], **limits: float) -> Iterator[SteppedBroker]:
    tree = directory / "tree"
    if not tree.exists():
        tree.mkdir()
        fill(tree)
    compiled = policy(tree, *rules, limits=limits)
    with no_descriptor_left(), SteppedBroker(tree, compiled, audit=directory / "audit") as broker:
        yield broker


def rate(what: str, per_second: int, burst: int | None = None) -> dict[str, int]:
    """Return the keys of a rate."""
    return {f"{what}_per_second": per_second, f"{what}_burst": burst or per_second}


@contextlib.contextmanager
def full_audit(broker: SteppedBroker) -> Iterator[None]:
    """Let nothing be recorded for the length of the block."""
    assert broker.audit_descriptor is not None
    kept, full = os.dup(broker.audit_descriptor), os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, broker.audit_descriptor)
    try:
        yield
    finally:
        os.dup2(kept, broker.audit_descriptor)
        os.close(kept)
        os.close(full)


def file_of(broker: SteppedBroker) -> bytes:
    return bytes(broker.tree / "file")


def reasons_of(speaker: Speaker, broker: SteppedBroker, count: int = 1, **flags: bool) -> list[str]:
    """Open a file so many times with one request; return what became of each."""
    answer = speaker.ask(encode_open(7, [file_of(broker)] * count, **flags))
    with answer.descriptors as descriptors:
        reply = answer.reply
        assert isinstance(reply, OpenReply), reply
        assert len(descriptors) == sum(one.status is Status.GIVEN for one in reply.results)
    return ["ok" if one.status in {Status.GIVEN, Status.COPIED} else one.reason.name for one in reply.results]


def limits_of(speaker: Speaker, broker: SteppedBroker, count: int) -> list[LimitReached]:
    """Do the same; return what is said of those that are refused."""
    answer = speaker.ask(encode_open(7, [file_of(broker)] * count))
    with answer.descriptors:
        assert isinstance(answer.reply, OpenReply)
        return [one.limit for one in answer.reply.results if one.limit is not None]


def hits(broker: SteppedBroker) -> dict[tuple[str, str | None], int]:
    return broker.broker._dispatch.limits.hits


# Requests


@pytest.mark.parametrize("kind", KINDS)
def test_requests_above_their_rate_are_refused_whole_and_are_answered_again_in_time(
    tmp_path: Path, clock: Clock, kind: type[Speaker]
) -> None:
    with limited_broker(tmp_path, **rate("requests", 10, 3)) as broker, broker.join(kind) as speaker:
        path = file_of(broker)
        requests = [encode_open(7, [path] * 5), encode_stat(7, [path]), encode_status(7)]
        for _ in range(3):
            assert reasons_of(speaker, broker) == ["ok"]
        walk = encode_walk(7, bytes(broker.tree), WalkFilter(WalkKind.REGULAR), credit=1, descriptors=True)
        for request in (*requests, encode_list(7, bytes(broker.tree)), walk):
            error = speaker.error(request)
            assert (error.id, error.kind, error.reason) == (7, Kind.REFUSED, Reason.LIMIT)
            assert error.limit == LimitReached(Limit.REQUESTS_PER_SECOND, 10, 100)
        clock.now += 0.06
        assert speaker.error(requests[0]).limit == LimitReached(Limit.REQUESTS_PER_SECOND, 10, 40)
        clock.now += 0.04
        assert reasons_of(speaker, broker) == ["ok"]
        assert hits(broker) == {("requests_per_second", None): 6}
        refused = [record for record in broker.records() if record["event"] == "request_refused"]
        assert [record["action"] for record in refused] == ["open", "stat", "status", "list", "walk", "open"]
        assert refused[0]["paths"] == 5
        assert {(record["reason"], record["limit"]) for record in refused} == {("requests_per_second", 10)}
        assert [record["retry_after_ms"] for record in refused] == [100] * 5 + [40]
        assert {record["uid"] for record in refused} == {os.getuid()}


def test_what_has_no_answer_of_its_own_is_no_request(tmp_path: Path) -> None:
    with limited_broker(tmp_path, **rate("requests", 1)) as broker, broker.join() as speaker:
        speaker.begin_walk(bytes(broker.tree), credit=0)
        for _ in range(3):
            speaker.send(encode_more(99, 1))
            speaker.send(encode_cancel(99))
        answer = speaker.ask(encode_cancel(20))
        assert isinstance(answer.reply, WalkReply)
        assert speaker.error(encode_status(8)).limit is not None


@pytest.mark.parametrize("other", KINDS)
def test_requests_of_all_connections_and_datagrams_of_a_uid_are_counted_together(
    reachable: Path, other: type[Speaker]
) -> None:
    limits = {"connections_per_uid": 8, **rate("requests", 5), **rate("opens", 1000)}
    with limited_broker(reachable, **limits) as broker:
        datagrams = broker.listen(reachable, kind=DatagramSpeaker)
        for number in range(5):
            with broker.join(KINDS[number % 2]) as speaker:
                assert reasons_of(speaker, broker) == ["ok"]
        with broker.join(other) as speaker, broker.call(datagrams, DatagramSpeaker, hello=False) as third:
            for one in (speaker, third):
                assert one.error(encode_open(7, [file_of(broker)])).limit is not None


@pytest.mark.root
def test_root_can_always_ask_on_a_control_socket_and_others_can_not(reachable: Path) -> None:
    with limited_broker(reachable, **rate("requests", 2)) as broker:
        control = broker.listen(reachable, control=True)
        with broker.call(control) as speaker:
            for _ in range(5):
                assert speaker.status()["limits"]["requests_per_second"] == 2
            assert speaker.status()["limits_hit"] == []
        control.chmod(0o666)
        asked = in_child_on(broker, control, ask_for_status_thrice, uid=CLIENT_UID)
        assert asked == ["StatusReply", "StatusReply", "ErrorReply"]


def ask_for_status_thrice(speaker: Speaker) -> list[str]:
    return [type(speaker.ask(encode_status(7)).reply).__name__ for _ in range(3)]


# Opens


@pytest.mark.parametrize("kind", KINDS)
def test_of_one_request_those_paths_are_served_that_there_is_room_for(
    tmp_path: Path, clock: Clock, kind: type[Speaker]
) -> None:
    with limited_broker(tmp_path, **rate("opens", 100, 10)) as broker, broker.join(kind) as speaker:
        assert reasons_of(speaker, broker, 64) == ["ok"] * 10 + ["LIMIT"] * 54
        clock.now += 0.05
        assert limits_of(speaker, broker, 7) == [LimitReached(Limit.OPENS_PER_SECOND, 100, 10)] * 2
        assert hits(broker) == {("opens_per_second", None): 56}
        last = broker.records()[-1]
        assert (last["decision"], last["reason"], last["rule"]) == ("deny", "opens_per_second", None)
        assert (last["limit"], last["retry_after_ms"]) == (100, 10)


def test_paths_that_are_refused_count_as_asked_for(tmp_path: Path) -> None:
    nothing = rule("nothing", paths=["none"])
    with limited_broker(tmp_path, nothing, **rate("opens", 10)) as broker, broker.join() as speaker:
        assert reasons_of(speaker, broker, 12) == ["DENIED"] * 10 + ["LIMIT"] * 2


def test_copies_are_opens(tmp_path: Path) -> None:
    copying = rule("all", deliver=["copy"], limits=rate("opens", 4))
    with limited_broker(tmp_path, copying, **rate("opens", 6)) as broker, broker.join() as speaker:
        answer = speaker.ask(encode_open(7, [file_of(broker)] * 8, copy=True))
        assert isinstance(answer.reply, OpenReply)
        assert answer.reply.copies == (b"content",) * 4
        told = [one.limit.limit for one in answer.reply.results if one.limit is not None]
        assert told == [Limit.RULE_OPENS_PER_SECOND] * 2 + [Limit.OPENS_PER_SECOND] * 2


def test_what_a_rule_gives_is_counted_and_what_it_does_not_give_is_not(tmp_path: Path, clock: Clock) -> None:
    some = rule("some", paths=["file", "missing"], limits=rate("opens", 10, 3))
    others = rule("others", paths=["empty"])
    with limited_broker(tmp_path, some, others) as broker, broker.join() as speaker:
        file, missing, empty = (bytes(broker.tree / name) for name in ("file", "missing", "empty"))
        for _ in range(5):
            assert [one.reason for one in speaker.open(missing, empty)] == ["not_found", "ok"]
        found = speaker.open(file, missing, empty, file, file, file, empty, file)
        assert [one.reason for one in found] == [
            "ok",
            "not_found",
            "ok",
            "ok",
            "ok",
            "limit",
            "ok",
            "limit",
        ]
        assert [one.content for one in found if one.reason == "ok"] == [
            b"content",
            b"",
            b"content",
            b"content",
            b"",
        ]
        clock.now += 0.1
        assert [one.reason for one in speaker.open(file, file)] == ["ok", "limit"]
        assert hits(broker) == {("rule_opens_per_second", "some"): 3}
        last = broker.records()[-1]
        assert (last["reason"], last["rule"], last["limit"]) == ("rule_opens_per_second", "some", 10)


def test_requests_to_which_a_rule_gives_something_have_a_rate_of_their_own(
    tmp_path: Path, clock: Clock
) -> None:
    some = rule("some", paths=["file", "missing"], limits=rate("requests", 10, 3))
    others = rule("others", paths=["empty"])
    with limited_broker(tmp_path, some, others) as broker, broker.join() as speaker:
        file, missing, empty = (bytes(broker.tree / name) for name in ("file", "missing", "empty"))
        for _ in range(5):  # it gives nothing
            assert [one.reason for one in speaker.open(missing, empty)] == ["not_found", "ok"]
        assert [one.reason for one in speaker.open(file, file, empty)] == ["ok"] * 3
        assert speaker.stat(file, missing).results[0][0].status is Status.GIVEN
        assert [one.reason for one in speaker.open(file)] == ["ok"]
        assert [one.reason for one in speaker.open(file, empty, file)] == ["limit", "ok", "limit"]
        [(told, facts), (other, _)] = speaker.stat(file, empty).results
        assert told.limit == LimitReached(Limit.RULE_REQUESTS_PER_SECOND, 10, 100)
        assert facts is None
        assert other.status is Status.GIVEN
        clock.now += 0.1
        assert [one.reason for one in speaker.open(file, file)] == ["ok", "ok"]
        assert [one.reason for one in speaker.open(file)] == ["limit"]
        assert hits(broker) == {("rule_requests_per_second", "some"): 3}
        last = broker.records()[-1]
        assert (last["reason"], last["rule"], last["limit"]) == ("rule_requests_per_second", "some", 10)


def test_a_listing_is_a_request_of_its_rule(tmp_path: Path, clock: Clock) -> None:
    with limited_broker(tmp_path, rule("all", limits=rate("requests", 10, 1))) as broker:
        tree = bytes(broker.tree)
        with broker.join() as speaker:
            assert speaker.page(tree).entries
            for wait, left in ((0.0, 100), (0.06, 40)):
                clock.now += wait
                page = speaker.page(tree)
                assert page.entries == []
                assert page.result.limit == LimitReached(Limit.RULE_REQUESTS_PER_SECOND, 10, left)
            clock.now += 0.04
            assert speaker.page(tree).entries


def test_a_walk_waits_for_the_requests_of_its_rule_frame_by_frame(tmp_path: Path, clock: Clock) -> None:
    with limited_broker(tmp_path, rule("all", limits=rate("requests", 10, 2))) as broker:
        (broker.tree / "many").mkdir()
        for number in range(57):
            (broker.tree / "many" / str(number)).touch()
        with broker.join() as speaker:
            names, seconds = walk_all(speaker, broker, clock, most=10)
            assert len(names) == len(set(names)) == 60
            assert 0.35 <= seconds <= 0.55  # six frames, two of them at once
            assert reasons_of(speaker, broker) == ["LIMIT"]
        assert ("rule_requests_per_second", "all") in hits(broker)


def test_an_empty_bucket_does_not_tell_of_files_that_the_client_may_not_have(tmp_path: Path) -> None:
    """Where a rule has conditions, missing and refused are one answer, with and without tokens."""
    small = rule("small", where={"size": {"max": 3}}, limits=rate("opens", 2))
    with limited_broker(tmp_path, small) as broker, broker.join() as speaker:
        large, missing, empty = (bytes(broker.tree / name) for name in ("file", "missing", "empty"))
        for _ in range(3):
            assert [one.reason for one in speaker.open(large, missing)] == ["denied", "denied"]
        assert [one.reason for one in speaker.open(empty, empty, empty)] == ["ok", "ok", "limit"]
        assert [one.reason for one in speaker.open(large, missing)] == ["denied", "denied"]


def test_what_is_not_on_record_is_not_given_however_much_is_left(tmp_path: Path) -> None:
    counted = rule("all", limits={"in_flight": 5})
    with limited_broker(tmp_path, counted) as broker, broker.join() as speaker:
        with full_audit(broker):
            assert reasons_of(speaker, broker, 3) == ["AUDIT"] * 3
        assert reasons_of(speaker, broker, 6) == ["ok"] * 5 + ["LIMIT"]


def test_what_was_not_given_does_not_count_for_a_rule_later(tmp_path: Path) -> None:
    with limited_broker(tmp_path, rule("all", limits={"in_flight": 5})) as broker, broker.join() as speaker:
        with full_audit(broker):
            assert reasons_of(speaker, broker, 3) == ["AUDIT"] * 3
        broker.switch(policy(broker.tree))
        speaker.send(encode_open(7, [file_of(broker)]))
        assert broker.in_flight == 1
        assert broker.broker._flight._of_rule == {}
        answer = speaker.receive()
        assert answer is not None
        answer.descriptors.close()


# Descriptors under way


@pytest.mark.parametrize("kind", KINDS)
def test_descriptors_of_a_rule_are_under_way_until_they_are_received(
    tmp_path: Path, kind: type[Speaker]
) -> None:
    few = rule("few", paths=["file"], limits={"in_flight": 5})
    others = rule("others", paths=["empty"])
    with limited_broker(tmp_path, few, others) as broker:
        with broker.join(kind) as stalled, broker.join(kind) as other:
            stalled.send(encode_open(7, [file_of(broker)] * 4))
            assert limits_of(other, broker, 3) == [LimitReached(Limit.RULE_IN_FLIGHT, 5, 0)] * 2
            assert [one.reason for one in other.open(bytes(broker.tree / "empty"))] == ["ok"]
            answer = stalled.receive()
            assert answer is not None
            answer.descriptors.close()
            assert reasons_of(other, broker, 5) == ["ok"] * 5
            stalled.send(encode_open(7, [file_of(broker)] * 5))
            assert reasons_of(other, broker) == ["LIMIT"]
        with broker.join(kind) as speaker:  # what a connection had that is gone is free again
            assert reasons_of(speaker, broker, 6) == ["ok"] * 5 + ["LIMIT"]
        assert hits(broker)[("rule_in_flight", "few")] == 4
        broker.serve()
        assert broker.broker._flight._of_rule == {}


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_received_first_is_free_again_while_the_rest_is_under_way(
    tmp_path: Path, kind: type[Speaker]
) -> None:
    with (
        limited_broker(tmp_path, rule("all", limits={"in_flight": 400})) as broker,
        broker.join(kind) as stalled,
        broker.join(kind) as other,
    ):
        for _ in range(2):
            stalled.send(encode_open(7, [file_of(broker)] * 200))
        assert reasons_of(other, broker) == ["LIMIT"]
        answer = stalled.receive()
        assert answer is not None
        answer.descriptors.close()
        assert reasons_of(other, broker, 202) == ["ok"] * 200 + ["LIMIT"] * 2


def test_a_rule_that_gave_all_asks_only_about_those_whom_it_gave_something(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = rule("few", paths=["file"], limits={"in_flight": 2})
    others = rule("others", paths=["empty"], limits={"in_flight": 200})
    asked: list[socket.socket] = []

    def bytes_not_received(sock: socket.socket) -> int:
        asked.append(sock)
        return sockets.bytes_not_received(sock)

    with limited_broker(tmp_path, few, others) as broker, contextlib.ExitStack() as stack:
        for _ in range(20):
            stalled = stack.enter_context(broker.join())
            stalled.send(encode_open(7, [bytes(broker.tree / "empty")]))
        speaker, other = stack.enter_context(broker.join()), stack.enter_context(broker.join())
        other.send(encode_open(7, [file_of(broker)]))
        monkeypatch.setattr("fdbroker.broker.in_flight.bytes_not_received", bytes_not_received)
        for _ in range(3):
            assert reasons_of(speaker, broker, 3) == ["ok", "LIMIT", "LIMIT"]
        assert len(set(asked)) == 2  # of the speaker and the other


def test_the_share_of_a_uid_may_be_made_smaller(tmp_path: Path) -> None:
    with limited_broker(tmp_path, in_flight_per_uid=253) as broker:
        with broker.join() as stalled, broker.join() as other:
            stalled.send(encode_open(7, [file_of(broker)] * 250))
            assert limits_of(other, broker, 4) == [LimitReached(Limit.IN_FLIGHT_PER_UID, 253, 0)] * 4
            assert reasons_of(other, broker, 3) == ["ok"] * 3
            broker.switch(policy(broker.tree))
            assert reasons_of(other, broker, 250) == ["ok"] * 250
        assert hits(broker) == {("in_flight_per_uid", None): 4}


# Walks


def walk_all(
    speaker: Speaker, broker: SteppedBroker, clock: Clock, most: int = 0
) -> tuple[list[bytes], float]:
    """Walk with credit for all; return the names, and how many seconds it took."""
    names: list[bytes] = []
    began = clock.now
    speaker.begin_walk(bytes(broker.tree), credit=10_000, most=most)
    while True:
        for answer in speaker.arrived():
            with answer.descriptors as descriptors:
                assert isinstance(answer.reply, WalkReply), answer.reply
                assert answer.reply.result.status is Status.GIVEN
                assert len(descriptors) == len(answer.reply.entries)
                names += [entry.path for entry in answer.reply.entries]
            if answer.reply.end is not None:
                assert answer.reply.end.incomplete == 0
                assert answer.reply.end.descriptors == len(names)
                return names, clock.now - began
        clock.now += 0.01
        broker.serve()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("careful", [False, True])
@pytest.mark.parametrize("of_rule", [False, True])
def test_a_walk_is_held_back_and_gives_everything_once(
    tmp_path: Path, clock: Clock, kind: type[Speaker], *, careful: bool, of_rule: bool
) -> None:
    """With a rule that asks for something of each object no file is plain."""
    where = {"size": {"max": 1000}} if careful else {}
    limited_rule = rule("all", where=where, **({"limits": rate("opens", 100, 20)} if of_rule else {}))
    limits = {} if of_rule else rate("opens", 100, 20)
    with limited_broker(tmp_path, limited_rule, **limits) as broker:
        (broker.tree / "many").mkdir()
        for number in range(300):
            (broker.tree / "many" / str(number)).touch()
        with broker.join(kind) as speaker:
            names, seconds = walk_all(speaker, broker, clock)
            assert len(names) == len(set(names)) == 303
            assert 2.8 <= seconds <= 3.2
            # An open is an open: what the walk took is gone.
            assert reasons_of(speaker, broker, 30).count("ok") <= 10
        [(limit, name)] = [key for key in hits(broker) if hits(broker)[key] > 15]
        expected = ("rule_opens_per_second", "all") if of_rule else ("opens_per_second", None)
        assert (limit, name) == expected
        given = [
            record["path"]
            for record in broker.records()
            if record["event"] == "walk" and "decision" in record
        ]
        assert len(given) == 304  # with the start


def test_a_walk_goes_through_files_of_rules_with_and_without_limits_once(
    tmp_path: Path, clock: Clock
) -> None:
    named = rule("named", paths=[f"many/{number}" for number in range(0, 120, 3)])
    others = rule("others", limits=rate("opens", 50, 5))
    with limited_broker(tmp_path, named, others) as broker:
        (broker.tree / "many").mkdir()
        for number in range(120):
            (broker.tree / "many" / str(number)).touch()
        with broker.join() as speaker:
            names, _ = walk_all(speaker, broker, clock)
            assert len(names) == len(set(names)) == 123


def test_a_walk_that_is_held_back_costs_nothing_until_it_may_go_on(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []
    step = walking.Walk.step

    def counted(walk: walking.Walk, *arguments: Any) -> walking.Batch:  # noqa: ANN401 - as they are
        steps.append(walk)
        return step(walk, *arguments)

    with (
        limited_broker(tmp_path, rule("all", limits={"in_flight": 1})) as broker,
        broker.join() as stalled,
        broker.join() as speaker,
    ):
        stalled.send(encode_open(7, [file_of(broker)]))
        speaker.begin_walk(bytes(broker.tree), credit=10)
        monkeypatch.setattr(walking.Walk, "step", counted)
        for _ in range(20):
            broker.broker.step(0)
            assert broker.broker._busy == {}
            assert len(broker.broker._resting) == 1
        assert steps == []
        clock.now += 1
        broker.broker.step(0)
        broker.broker.step(0)
        assert len(steps) == 1


def test_a_walk_waits_for_what_its_rule_has_under_way(tmp_path: Path, clock: Clock) -> None:
    with limited_broker(tmp_path, rule("all", limits={"in_flight": 2})) as broker:
        for number in range(20):
            (broker.tree / str(number)).touch()
        with broker.join() as speaker:
            names, _ = walk_all(speaker, broker, clock)
            assert len(set(names)) == 23
        assert hits(broker).keys() == {("rule_in_flight", "all")}


def test_a_step_of_a_walk_asks_once_how_much_a_rule_gives(tmp_path: Path) -> None:
    small = rule("small", where={"size": {"max": 10}}, limits={"in_flight": 4})
    (tmp_path / "tree").mkdir()
    for number in range(20):
        (tmp_path / "tree" / str(number)).touch()
    ground = Ground(policy(tmp_path / "tree", small, read_only_view="off"))
    asked = []

    def most_of(rule: Rule) -> int:
        asked.append(rule.name)
        return 4

    try:
        walk = ground.walk(descriptors=True)
        for number in range(5):
            batch = walk.step(100, most_of)
            assert len(batch.descriptors) == 4
            close_all(batch.descriptors)
            assert asked == ["small"] * (number + 1)
    finally:
        ground.close()


def test_what_a_walk_could_not_open_is_not_counted_as_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = rule("small", where={"size": {"max": 10}}, limits={"in_flight": 9})
    (tmp_path / "tree").mkdir()
    for number in range(4):
        (tmp_path / "tree" / str(number)).touch()
    ground = Ground(policy(tmp_path / "tree", small, read_only_view="off"))

    def refuse_files(proc_self_fd: int, descriptor: int) -> int:
        if (
            stat.S_ISREG(os.fstat(descriptor).st_mode)
            and os.readlink(f"/proc/self/fd/{descriptor}")[-1] in "13"
        ):
            raise SyscallError(errno.EAGAIN, "openat")  # a lease
        return reopen_for_reading(proc_self_fd, descriptor)

    monkeypatch.setattr(walking, "reopen_for_reading", refuse_files)
    try:
        batch = ground.walk(descriptors=True).step(100, lambda _rule: 9)
        assert len(batch.descriptors) == 2
        close_all(batch.descriptors)
        assert {each.name: count for each, count in batch.opened_by.items()} == {"small": 2}
    finally:
        ground.close()


def test_frames_of_a_walk_whose_filter_left_out_all_of_a_rule_count_for_it_as_nothing(tmp_path: Path) -> None:
    some = rule("some", paths=["**"], limits={"in_flight": 400})
    large = rule("large", paths=["*/large/**"], limits={"in_flight": 400})
    tree = tmp_path / "tree"
    for number in range(10):
        for name, size in (("large", 5), ("small", 1)):
            (tree / f"{number}" / name).mkdir(parents=True)
            (tree / f"{number}" / name / "file").write_bytes(bytes(size))
    with limited_broker(tmp_path, large, some) as broker, broker.join() as speaker:
        speaker.begin_walk(bytes(broker.tree), credit=20, asked=WalkFilter(most_size=2), most=1)
        broker.serve()
        assert set(broker.broker._flight._of_rule) == {("some", os.getuid())}
        answers = speaker.arrived()
        broker.serve()
        assert sum(len(answer.descriptors) for answer in answers) == 10
        for answer in answers:
            answer.descriptors.close()
        [connection] = broker.broker._connections.values()
        assert connection.count_in_flight() == 0
        assert broker.broker._flight._of_rule == {}


def test_a_walk_that_opens_nothing_is_not_held_back(tmp_path: Path, clock: Clock) -> None:
    with limited_broker(tmp_path, **rate("opens", 1)) as broker, broker.join() as speaker:
        assert reasons_of(speaker, broker) == ["ok"]
        speaker.begin_walk(bytes(broker.tree), credit=10, descriptors=False)
        *_, last = speaker.arrived()
        assert isinstance(last.reply, WalkReply)
        assert last.reply.end is not None
        assert clock.now == 1000.0


def test_a_walk_that_waits_says_that_it_goes_on_and_can_be_cancelled(tmp_path: Path, clock: Clock) -> None:
    with (
        limited_broker(tmp_path, rule("all", limits={"in_flight": 1})) as broker,
        broker.join() as stalled,
        broker.join() as speaker,
    ):
        stalled.send(encode_open(7, [file_of(broker)]))
        speaker.begin_walk(bytes(broker.tree), credit=10)
        wait(broker, clock, 5)
        told = speaker.arrived()
        assert len(told) == 2
        for answer in told:
            assert isinstance(answer.reply, WalkReply)
            assert (answer.reply.entries, answer.reply.end) == ([], None)
        speaker.send(encode_cancel(20))
        [answer] = speaker.arrived()
        assert isinstance(answer.reply, WalkReply)
        assert answer.reply.end is not None
        # The start was decided on, and is on record once.
        started = [one for one in broker.records() if one["event"] == "walk" and one["reason"] == "ok"]
        assert [one["path"] for one in started] == [str(broker.tree)]


def test_walks_and_lists_do_not_go_around_the_limits_of_requests(tmp_path: Path) -> None:
    with limited_broker(tmp_path, **rate("requests", 2)) as broker, broker.join() as speaker:
        speaker.list_all(bytes(broker.tree))
        speaker.begin_walk(bytes(broker.tree), credit=0)
        for frame in (encode_list(7, bytes(broker.tree)), encode_open(7, [file_of(broker)])):
            assert speaker.error(frame).limit is not None


# A reload


def test_a_reload_keeps_what_was_taken_unless_the_limit_is_another(tmp_path: Path) -> None:
    limits = {**rate("requests", 1, 100), **rate("opens", 1, 5)}
    both = rule("all", limits=rate("opens", 1, 4))
    with limited_broker(tmp_path, both, **limits) as broker, broker.join() as speaker:
        assert reasons_of(speaker, broker, 4) == ["ok"] * 4
        broker.switch(policy(broker.tree, both, limits=limits))
        assert limits_of(speaker, broker, 2) == [
            LimitReached(Limit.RULE_OPENS_PER_SECOND, 1, 1000),
            LimitReached(Limit.OPENS_PER_SECOND, 1, 1000),
        ]
        broker.switch(policy(broker.tree, rule("all", limits=rate("opens", 2, 4)), limits=limits))
        assert limits_of(speaker, broker, 1) == [LimitReached(Limit.OPENS_PER_SECOND, 1, 1000)]
        broker.switch(policy(broker.tree))
        assert reasons_of(speaker, broker, 100) == ["ok"] * 100
        # Of rules that are gone nothing is counted any more.
        assert ("rule_opens_per_second", "all") in hits(broker)
        broker.switch(policy(broker.tree, rule("another")))
        assert hits(broker) == {("opens_per_second", None): 2}


def test_where_nothing_is_limited_requests_are_answered_by_the_same_functions(tmp_path: Path) -> None:
    with limited_broker(tmp_path) as broker:
        dispatch = broker.broker._dispatch
        plain = dict(dispatch.table)
        assert dispatch.open_limits is None
        broker.switch(policy(broker.tree, limits={"idle_timeout": 5.0, **rate("requests", 5)}))
        assert all(dispatch.table[kind] != handler for kind, handler in plain.items())
        assert dispatch.open_limits is None
        broker.switch(policy(broker.tree, rule("all", limits={"in_flight": 5})))
        assert dispatch.open_limits is not None
        assert dispatch.table == plain
        broker.switch(policy(broker.tree))
        assert dispatch.open_limits is None


# Services that act for clients


@pytest.fixture
def acting(reachable: Path) -> Iterator[Acting]:
    yield from acting_broker(reachable)


def served_clients(acting: Acting) -> tuple[Puppet, int, int]:
    """Return a service, and the numbers of its clients of two uids."""
    service = acting.serving()
    numbers = []
    for uid in (CLIENT_UID, OTHER_UID):
        acting.client(uid)
        numbers.append(service.do(accepted).number)
    return service, numbers[0], numbers[1]


ANY_CLIENT = {"on_behalf_of": [{"any": True}], "paths": ["own/file"]}


@pytest.mark.root
def test_one_client_of_a_service_does_not_use_up_what_the_others_have(acting: Acting) -> None:
    service, one, other = served_clients(acting)
    file = bytes(acting.tree / "own" / "file")
    for limits, limit in (
        ({"limits": rate("opens", 1, 3)}, {}),
        ({}, rate("opens", 1, 3)),
    ):
        acting.broker.switch(acting_policy(acting.tree, rule("any", **ANY_CLIENT, **limits), limits=limit))
        for number in (one, other, None):
            found = [reason for reason, _ in service.do(open_for, number, *[file] * 5)]
            # What it opens for itself is by another rule here, which has no limit of its own.
            assert found.count("ok") == (5 if number is None and not limit else 3)


@pytest.mark.root
def test_requests_for_a_client_are_those_of_the_client(acting: Acting) -> None:
    service, one, other = served_clients(acting)
    file = bytes(acting.tree / "own" / "file")
    acting.broker.switch(acting_policy(acting.tree, rule("any", **ANY_CLIENT), limits=rate("requests", 1, 2)))

    def ask(number: int | None) -> bool:
        return bool(service.do(is_answered, number, file))

    assert [ask(one) for _ in range(4)] == [True, True, False, False]
    assert [ask(other) for _ in range(3)] == [True, True, False]
    # A number that is nobody's is the service's own request, and so is what it asks for itself.
    assert [ask(None), ask(12345), ask(None), ask(12345)] == [True, True, False, False]
    refused = [record for record in acting.broker.records() if record["event"] == "request_refused"]
    assert [record.get("for_uid") for record in refused[:3]] == [CLIENT_UID, CLIENT_UID, OTHER_UID]


def is_answered(memory: dict[str, Any], number: int | None, path: bytes) -> bool:
    """Ask; return whether it was answered, in whatever way, and not refused for its rate."""
    answer = memory["speaker"].ask(encode_open(7, [path], number))
    with answer.descriptors:
        return not isinstance(answer.reply, ErrorReply)


# Idle connections


@contextlib.contextmanager
def idling_broker(directory: Path) -> Iterator[tuple[SteppedBroker, Path]]:
    with limited_broker(directory, idle_timeout=60.0) as broker:
        yield broker, broker.listen(directory)


def wait(broker: SteppedBroker, clock: Clock, seconds: float) -> None:
    end = clock.now + seconds
    while clock.now < end:
        clock.now += 1
        broker.serve()


def test_a_connection_on_which_nothing_happens_is_closed_and_recorded(reachable: Path, clock: Clock) -> None:
    with idling_broker(reachable) as (broker, path):
        idle, busy = broker.call(path), broker.call(path)
        for _ in range(4):
            wait(broker, clock, 20)
            assert reasons_of(busy, broker) == ["ok"]
        assert broker.connections == 1
        assert idle.is_closed()
        [record] = [record for record in broker.records() if record["event"] == "connection_ended"]
        assert (record["connection"], record["reason"], record["limit"]) == (1, "idle_timeout", 60)
        assert hits(broker) == {("idle_timeout", None): 1}


@pytest.mark.root
def test_a_connection_with_something_under_way_is_not_idle(reachable: Path, clock: Clock) -> None:
    with idling_broker(reachable) as (broker, path):
        walker, unread, inherited = broker.call(path), broker.call(path), broker.join()
        control = broker.call(broker.listen(reachable, control=True))
        walker.begin_walk(bytes(broker.tree), credit=0)
        unread.send(encode_open(7, [file_of(broker)]))
        wait(broker, clock, 200)
        # The walk has credit some day; what lies unread counts; the others could not connect anew.
        assert broker.connections == 4
        assert inherited.open_one(file_of(broker)).reason == "ok"
        assert control.status()["limits"]["idle_timeout"] == 60.0
        answer = unread.receive()
        assert answer is not None
        answer.descriptors.close()
        assert reasons_of(unread, broker) == ["ok"]
        assert isinstance(walker.ask(encode_cancel(20)).reply, WalkReply)
        wait(broker, clock, 70)
        assert broker.connections == 2
        assert unread.is_closed()
        assert walker.is_closed()


def test_connections_that_were_there_before_the_limit_have_all_of_its_time(
    reachable: Path, clock: Clock
) -> None:
    with limited_broker(reachable) as broker:
        speaker = broker.call(broker.listen(reachable))
        wait(broker, clock, 1000)
        broker.switch(policy(broker.tree, limits={"idle_timeout": 60.0}))
        wait(broker, clock, 50)
        assert broker.connections == 1
        wait(broker, clock, 20)
        assert broker.connections == 0
        assert speaker.is_closed()


def test_a_loop_that_waits_for_idle_connections_sleeps_until_it_has_to_look(
    reachable: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    with idling_broker(reachable) as (broker, _):
        timeouts: list[float] = []
        before_waiting = broker.broker._watchdog.before_waiting

        def note(timeout: float) -> float:
            timeouts.append(timeout)
            return before_waiting(0)

        monkeypatch.setattr(broker.broker._watchdog, "before_waiting", note)
        for timeout in (-1, 100.0, 0, 2.0):
            broker.broker.step(timeout)
        assert timeouts == [7.5, 7.5, 0, 2.0]


def test_connections_over_a_limit_are_told_which_and_counted(reachable: Path, clock: Clock) -> None:
    with limited_broker(reachable, connections_per_uid=1, message_within=10.0) as broker:
        path = broker.listen(reachable)
        silent = broker.call(path, hello=False)
        other = broker.call(path, hello=False)
        answer = other.receive()
        assert answer is not None
        assert isinstance(answer.reply, ErrorReply)
        assert answer.reply.limit == LimitReached(Limit.CONNECTIONS_PER_UID, 1, 0)
        wait(broker, clock, 12)
        answer = silent.receive()
        assert answer is not None
        assert isinstance(answer.reply, ErrorReply)
        assert answer.reply.limit == LimitReached(Limit.MESSAGE_WITHIN, 10, 0)
        assert hits(broker) == {("connections_per_uid", None): 1, ("message_within", None): 1}
