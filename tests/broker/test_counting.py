"""What is counted is what happened, whoever asks for it; and clients can't make it grow."""

from __future__ import annotations

import gc
import json
import os
from collections import Counter
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fdbroker.broker import counting
from fdbroker.broker.counting import NANOSECONDS, Decisions, Durations, OfUids
from fdbroker.policy.rules import Rule
from fdbroker.wire.client import StatusReply, encode_open, encode_stat, encode_status
from fdbroker.wire.format import MAX_REPLY, Kind, Reason
from fdbroker.wire.messages import ErrorReply, OpenRequest
from tests.broker.speaking import DatagramSpeaker, Speaker, StreamSpeaker
from tests.broker.stepping import SteppedBroker
from tests.running_broker import policy, rule

if TYPE_CHECKING:
    from pathlib import Path

    from fdbroker.broker.connection import Client

root = pytest.mark.root
ACTIONS = ("open", "stat", "list", "walk")
NAMES = (
    b"file",
    b"empty",
    b"missing",
    b"directory",
    b"link",
    b"fifo",
    b"directory/inner",
    b"secret",
    b"../x",
)


@pytest.fixture
def control(stepped: SteppedBroker, tmp_path: Path) -> Speaker:
    return stepped.call(stepped.listen(tmp_path, control=True))


def counted(control: Speaker) -> dict[tuple[str, str | None, str], int]:
    """Return the decisions by action, rule and reason."""
    return {(row["action"], row["rule"], row["reason"]): row["count"] for row in control.rows("decisions")}


def recorded(broker: SteppedBroker) -> Counter[tuple[str, str | None, str]]:
    """Return the same of the audit."""
    return Counter(
        (record["event"], record["rule"], record["reason"])
        for record in broker.records()
        if "decision" in record
    )


def requests(control: Speaker) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["transport"], row["type"]): row for row in control.status()["requests"]}


def two_rules(tree: Path) -> dict[str, Any]:
    return policy(
        tree,
        rule("no secrets", effect="deny", paths=["secret"]),
        rule("inner", paths=["directory/**"]),
        rule("outer", paths=["*"]),
    )


@root
@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.lists(
        st.tuples(st.integers(0, 1), st.sampled_from(ACTIONS), st.lists(st.sampled_from(NAMES), min_size=1)),
        max_size=12,
    )
)
def test_decisions_are_counted_as_they_are_recorded(
    tree: Path, tmp_path: Path, asked: list[tuple[int, str, list[bytes]]]
) -> None:
    audit, listener = tmp_path / "audit", tmp_path / "control"
    for left in (audit, listener):
        left.unlink(missing_ok=True)
    with SteppedBroker(tree, two_rules(tree), audit=audit) as broker:
        control = broker.call(broker.listen(tmp_path, control=True))
        speakers = broker.join(), broker.join(StreamSpeaker)
        for who, action, names in asked:
            paths = [bytes(tree) + b"/" + name for name in names]
            if action == "open":
                speakers[who].ask(encode_open(7, paths)).descriptors.close()
            elif action == "stat":
                speakers[who].ask(encode_stat(7, paths))
            elif action == "list":
                speakers[who].page(paths[0])
            else:
                speakers[who].begin_walk(paths[0], credit=4)
                while (answer := speakers[who].receive()) and answer.reply.end is None:  # type: ignore[union-attr]
                    answer.descriptors.close()
                assert answer is not None
                answer.descriptors.close()
        expected = recorded(broker)
        assert counted(control) == expected
        totals = control.status()["totals"]
        assert totals["allowed"] == sum(count for key, count in expected.items() if key[2] == "ok")
        assert totals["denied"] == expected.total() - totals["allowed"]
        [client] = control.rows("clients")
        assert (client["allowed"], client["denied"]) == (totals["allowed"], totals["denied"])
        by_connection = control.rows("connections")
        assert sum(row["allowed"] for row in by_connection) == totals["allowed"]
        assert sum(row["denied"] for row in by_connection) == totals["denied"]


@root
def test_what_is_not_on_record_is_counted_as_refused_for_that(tree: Path, tmp_path: Path) -> None:
    with SteppedBroker(tree, audit=tmp_path / "audit") as broker:
        speaker, control = broker.join(), broker.call(broker.listen(tmp_path, control=True))
        assert speaker.open_one(bytes(tree / "file")).content == b"content"
        assert broker.audit_descriptor is not None
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, broker.audit_descriptor)
        os.close(full)
        assert speaker.open_one(bytes(tree / "file")).reason == "audit"
        assert counted(control) == {("open", "all", "ok"): 1, ("open", None, "audit"): 1}
        assert control.status()["audit_failures"] >= 1


@root
def test_requests_are_counted_by_transport_and_type_with_the_time_they_took(
    stepped: SteppedBroker, control: Speaker, tmp_path: Path
) -> None:
    file = bytes(stepped.tree / "file")
    for speaker in (stepped.join(), stepped.join(StreamSpeaker)):
        for _ in range(3):
            speaker.open_one(file)
        speaker.stat(file)
        speaker.page(bytes(stepped.tree))
        speaker.begin_walk(bytes(stepped.tree), credit=1)
        speaker.receive()
    found = requests(control)
    for transport in ("seqpacket", "stream"):
        kinds = {kind: row["requests"] for (way, kind), row in found.items() if way == transport}
        assert kinds == {"hello": 1, "open": 3, "stat": 1, "list": 1, "walk": 1}
    for (_, kind), row in found.items():
        timed = 0 if kind == "walk" else row["requests"]
        assert (row["timed"], sum(row["by_bits"].values())) == (timed, timed)
        least = sum(count << int(bits) - 1 for bits, count in row["by_bits"].items())
        assert least <= row["nanoseconds"] <= 2 * least
    assert found["control", "hello"]["requests"] == 1


@root
def test_datagrams_are_counted_as_such(tree: Path, tmp_path: Path) -> None:
    with SteppedBroker(tree) as broker:
        path = broker.listen(tmp_path, kind=DatagramSpeaker)
        control = broker.call(broker.listen(tmp_path, control=True))
        speaker = broker.call(path, DatagramSpeaker, hello=False)
        for _ in range(3):
            assert speaker.open_one(bytes(tree / "file")).content == b"content"
        assert requests(control)["datagram", "open"]["timed"] == 3
        assert counted(control) == {("open", "all", "ok"): 3}
        [client] = control.rows("clients")
        assert (client["allowed"], client["requests"] >= 3) == (3, True)


@root
def test_what_is_under_way_and_what_was_sent_is_told(
    stepped: SteppedBroker, control: Speaker, tree: Path
) -> None:
    speaker = stepped.join()
    before = control.status()["totals"]["descriptors_sent"]
    for _ in range(2):
        speaker.sock.send(encode_open(7, [bytes(tree / "file")] * 100))
        stepped.serve()
    assert control.status()["totals"]["descriptors_sent"] == before + 200
    [row] = [row for row in control.rows("connections") if row["transport"] == "seqpacket"]
    assert (row["pid"], row["uid"]) == (os.getpid(), os.getuid())
    assert (row["requests"], row["allowed"], row["in_flight"]) == (3, 200, 200)
    for answer in speaker.arrived():
        answer.descriptors.close()
    assert control.status()["totals"]["descriptors_sent"] == before + 200


@root
def test_events_are_counted_by_name(stepped: SteppedBroker, control: Speaker) -> None:
    speaker = stepped.join()
    speaker.sock.send(b"nonsense")
    stepped.serve()
    assert control.status()["events"] == {"malformed": 1}


@root
def test_a_client_that_is_gone_still_counts(stepped: SteppedBroker, control: Speaker, tree: Path) -> None:
    for _ in range(3):
        with stepped.join() as speaker:
            speaker.open(*[bytes(tree / "file")] * 2, bytes(tree / "missing"))
    assert counted(control) == {("open", "all", "ok"): 6, ("open", "all", "not_found"): 3}
    [client] = control.rows("clients")
    assert (client["uid"], client["allowed"], client["denied"]) == (os.getuid(), 6, 3)
    assert client["connections"] == 1


@root
def test_counts_of_a_rule_outlive_the_rule_and_go_on_with_one_of_its_name(
    stepped: SteppedBroker, control: Speaker, tree: Path
) -> None:
    speaker, file = stepped.join(), bytes(tree / "file")
    speaker.open_one(file)
    stepped.switch(policy(tree, rule("other")))
    speaker.open_one(file)
    stepped.switch(policy(tree, rule("all")))
    speaker.open_one(file)
    assert counted(control) == {("open", "all", "ok"): 2, ("open", "other", "ok"): 1}


@pytest.mark.unmeasured
@root
def test_counts_of_rules_that_are_gone_are_given_up_where_there_are_very_many(
    stepped: SteppedBroker, control: Speaker, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counting, "MOST_NAMED", 3)
    speaker, file = stepped.join(), bytes(tree / "file")
    for number in range(8):
        stepped.switch(policy(tree, rule(f"rule {number}")))
        speaker.open_one(file)
    assert len(counted(control)) <= 4
    assert control.status()["totals"]["allowed"] == 8
    assert counted(control)["open", "rule 7", "ok"] == 1


def test_a_rule_that_is_gone_is_not_kept_by_what_it_decided(
    stepped: SteppedBroker, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gc, "freeze", lambda: None)  # what is frozen is not listed
    stepped.switch(policy(tree, rule("to be gone")))
    speaker = stepped.join()
    for _ in range(3):
        speaker.open_one(bytes(tree / "file"))
    stepped.switch(policy(tree, rule("other")))
    gc.collect()
    kept = {each.name for each in gc.get_objects() if isinstance(each, Rule)}
    assert "other" in kept
    assert "to be gone" not in kept
    assert speaker.open_one(bytes(tree / "file")).content == b"content"


@root
def test_decisions_of_very_many_rules_come_row_by_row(tree: Path, tmp_path: Path) -> None:
    for number in range(900):
        (tree / f"f{number}").touch()
    rules = [rule(f"a rule with a name of some length {n}", paths=[f"f{n}"]) for n in range(900)]
    with SteppedBroker(tree, policy(tree, *rules)) as broker:
        speaker, control = broker.join(), broker.call(broker.listen(tmp_path, control=True))
        for number in range(900):
            speaker.open_one(bytes(tree / f"f{number}"))
        found = counted(control)
        assert found == {("open", each["name"], "ok"): 1 for each in rules}
        assert len(control.ask(encode_status(3, "decisions")).raw) <= MAX_REPLY
        beyond = control.ask(encode_status(3, "decisions", 5000)).reply
        assert isinstance(beyond, StatusReply)
        assert json.loads(beyond.document) == {"rows": [], "next": None}


@pytest.mark.parametrize("part", ["decisions", "clients", "connections"])
def test_lists_are_not_told_on_the_sockets_of_clients(stepped: SteppedBroker, part: str) -> None:
    error = stepped.join().error(encode_status(3, part))
    assert isinstance(error, ErrorReply)
    assert (error.kind, error.reason) == (Kind.REFUSED, Reason.DENIED)


# What is kept for what is gone


def gone(uid: int, requests: int, allowed: int, denied: int) -> Client:
    made = SimpleNamespace(peer=SimpleNamespace(uid=uid), requests=requests, given=allowed, refused=denied)
    return cast("Client", made)


clients = st.builds(gone, st.integers(0, 400), st.integers(0, 9), st.integers(0, 9), st.integers(0, 9))


@given(st.lists(clients, max_size=600), st.lists(clients, max_size=300))
def test_of_any_number_of_uids_a_few_are_kept_and_nothing_is_lost(
    left: list[Client], present: list[Client]
) -> None:
    of_uids = OfUids()
    for client in left:
        of_uids.add(client)
        assert len(of_uids._of) <= counting.MOST_UIDS
    connections_of = Counter(client.peer.uid for client in present)
    rows = of_uids.rows(present, connections_of)
    assert len(rows) <= counting.MOST_UIDS + 1
    assert of_uids.rows(present, connections_of) == rows
    named = {cast("int", row["uid"]): row["connections"] for row in rows if row["uid"] is not None}
    assert named == {uid: connections_of[uid] for uid in named}
    others = [row["connections"] for row in rows if row["uid"] is None]
    assert others in ([], [len(present) - sum(connections_of[uid] for uid in named)])
    for told, counted_as in (("requests", "requests"), ("allowed", "given"), ("denied", "refused")):
        assert sum(cast("int", row[told]) for row in rows) == sum(
            getattr(client, counted_as) for client in (*left, *present)
        )


@given(st.lists(st.lists(st.integers(0, 1 << 62), max_size=20), max_size=4))
def test_each_time_is_in_its_bucket_however_often_they_are_settled(rounds: list[list[int]]) -> None:
    durations = Durations()
    for taken in rounds:
        durations[OpenRequest] += taken
        durations.settle()
    times = [nanoseconds for taken in rounds for nanoseconds in taken]
    counts = durations.settle().get(OpenRequest, [0] * (NANOSECONDS + 2))
    assert counts[NANOSECONDS] == sum(times)
    for bits in range(NANOSECONDS):
        within = sum(counts[: bits + 1])
        # 0 ns stand with 2.
        assert within == sum(1 for each in times if (each or 2) <= 1 << bits)


def test_a_run_of_what_one_rule_gives_is_one_addition(
    stepped: SteppedBroker, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    count = Decisions.count

    def counted_too(*asked: Any) -> None:  # noqa: ANN401 - whatever it is called with
        calls.append(asked)
        count(*asked)

    monkeypatch.setattr(Decisions, "count", counted_too)
    speaker = stepped.join()
    for number in (1, 64, 200, 3):
        speaker.open(*[bytes(tree / "file")] * number)
    assert len(calls) == 1
