"""The control socket: who may ask what, explanations that agree with what happens, all or nothing."""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import os
import socket
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fdbroker.broker import accepting
from fdbroker.broker.control import Control
from fdbroker.policy.decide import ActionView, Policy
from fdbroker.policy.rules import RuleSet
from fdbroker.wire.client import (
    ReloadReply,
    decode_reply,
    encode_explain,
    encode_hello,
    encode_list,
    encode_open,
    encode_reload,
    encode_stat,
    encode_status,
)
from fdbroker.wire.format import ACTIONS, MAX_FRAME, Kind, Reason, Type
from fdbroker.wire.messages import ErrorReply
from fdbroker.wire.stream import FrameBuffer, framed
from tests.broker.speaking import Speaker, check_audit, frame, path_of
from tests.broker.stepping import SteppedBroker
from tests.processes import in_child
from tests.running_broker import OTHER_UID, policy, reachable_directory, rule

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

root = pytest.mark.root
UID = os.getuid()


@pytest.fixture
def control(stepped: SteppedBroker, tmp_path: Path) -> Speaker:
    """Return a connection of ours to the control socket."""
    return stepped.call(stepped.listen(tmp_path, control=True))


@pytest.fixture
def reachable() -> Iterator[Path]:
    with reachable_directory() as path:
        yield path


# What can be asked where


@pytest.mark.parametrize("asked", [encode_open(3, [b"/a"]), encode_stat(3, [b"/a"]), encode_list(3, b"/a")])
def test_files_are_not_to_be_had_on_the_control_socket(control: Speaker, asked: bytes) -> None:
    error = control.error(asked)
    assert (error.kind, error.reason, error.id) == (Kind.MALFORMED, Reason.MALFORMED, 3)
    assert error.text.endswith("Request is not for this socket")
    assert control.is_closed()


@pytest.mark.parametrize("asked", [encode_explain(3, "open", b"/a"), encode_reload(3, 0, b"{}", more=False)])
def test_what_the_control_socket_answers_is_not_to_be_asked_elsewhere(
    stepped: SteppedBroker, asked: bytes
) -> None:
    speaker = stepped.join()
    error = speaker.error(asked)
    assert (error.kind, error.reason, error.id) == (Kind.MALFORMED, Reason.MALFORMED, 3)
    assert speaker.is_closed()
    assert stepped.broker._dispatch.generation.number == 1


@pytest.mark.parametrize(
    "asked", [encode_status(3), encode_explain(3, "open", b"/a"), encode_reload(3, 0, b"{}", more=False)]
)
def test_control_socket_wants_a_hello_first(stepped: SteppedBroker, tmp_path: Path, asked: bytes) -> None:
    speaker = stepped.call(stepped.listen(tmp_path, control=True), hello=False)
    assert speaker.error(asked).text == "the first frame is not a hello"
    assert speaker.is_closed()


def test_no_type_of_request_is_for_both_sockets_but_hello_and_status(
    stepped: SteppedBroker, control: Speaker
) -> None:
    tables = stepped.broker._dispatch.table, stepped.broker._control.table
    assert {kind.__name__ for kind in tables[0].keys() & tables[1].keys()} == {"Hello", "StatusRequest"}
    assert {kind.__name__ for kind in tables[0].keys() ^ tables[1].keys()} == {
        "OpenRequest", "StatRequest", "ListRequest", "ExplainRequest", "ReloadRequest", "WalkRequest",
        "MoreRequest", "CancelRequest", "ServeRequest", "ReleaseRequest", "ReopenRequest",
    }  # fmt: skip


@root
@pytest.mark.parametrize(
    "asked",
    [
        encode_hello(9),
        encode_status(9),
        encode_explain(9, "open", b"/a"),
        encode_reload(9, 0, b"{}", more=True),
    ],
    ids=["hello", "status", "explain", "reload"],
)
def test_message_of_another_process_is_refused_on_the_control_socket(
    stepped: SteppedBroker, tmp_path: Path, asked: bytes
) -> None:
    greeted = asked[0] != Type.HELLO
    speaker = stepped.call(stepped.listen(tmp_path, control=True), hello=greeted)
    in_child(lambda: speaker.sock.send(asked) and None)
    stepped.serve()
    answer = speaker.receive()
    assert answer is not None
    assert isinstance(answer.reply, ErrorReply)
    assert (answer.reply.kind, answer.reply.reason) == (Kind.REFUSED, Reason.IDENTITY)
    record = stepped.records()[-1]
    assert record["event"] == f"{Type(asked[0]).name.lower()}_refused"
    assert record["reason"] == "sent_by_another_process"


# Status


def in_child_on(broker: SteppedBroker, path: Path, ask: Callable[[Speaker], Any], **who: Any) -> Any:  # noqa: ANN401
    """Ask as another user, on a connection of its own, while the broker is stepped here."""
    ready, done = socket.socketpair()

    def client() -> None:
        with Speaker.connect(path) as speaker:
            done.send(json.dumps(ask(speaker)).encode())

    pid = os.fork()
    if not pid:
        try:
            os.setgroups(who.get("groups", ()))
            os.setresgid(*[who.get("gid", who["uid"])] * 3)
            os.setresuid(*[who["uid"]] * 3)
            client()
        finally:
            os._exit(0)
    done.close()
    ready.setblocking(False)  # noqa: FBT003 - the standard library's own
    try:
        while True:
            broker.broker.step(0.01)
            try:
                return json.loads(ready.recv(1 << 20))
            except BlockingIOError:
                continue
    finally:
        ready.close()
        os.waitpid(pid, 0)


WHOLE = {"pid", "version", "totals", "loaded", "fingerprint", "rules", "roots", "limits", "listeners"}


@root
@pytest.mark.parametrize(
    ("uid", "groups", "whole"),
    [(0, (), True), (71, (), True), (72, (99, 81), True), (72, (99,), False), (81, (71,), False)],
)
def test_whole_status_is_for_root_and_admins_and_others_hear_of_themselves(
    tree: Path,
    reachable: Path,
    uid: int,
    groups: tuple[int, ...],
    whole: bool,  # noqa: FBT001
) -> None:
    compiled = policy(tree, admins={"uids": [71], "gids": [81]})
    with SteppedBroker(tree, compiled, audit=reachable / "audit") as broker:
        path = broker.listen(reachable, control=True)
        told = in_child_on(broker, path, Speaker.status, uid=uid, gid=1, groups=groups)
        assert (told.keys() & WHOLE == WHOLE) is whole
        assert bool(told.keys() & WHOLE) is whole
        assert (told["peer"]["uid"], told["generation"]) == (uid, 1)


@root
def test_whole_status_says_what_is_in_force(tree: Path, tmp_path: Path) -> None:
    compiled = policy(tree, rule("a"), rule("b"))
    with SteppedBroker(tree, compiled, audit=tmp_path / "audit") as broker:
        listener = broker.listen(tmp_path)
        control = broker.call(broker.listen(tmp_path, control=True))
        broker.call(listener).open_one(bytes(tree / "file"))
        told = control.status()
        assert told["pid"] == os.getpid()
        assert told["version"] == "of the tests"
        assert told["roots"] == [{"name": "tree", "path": str(tree), "cross_mounts": False, "opens": "loop"}]
        assert (told["rules"], told["roots_in_all"]) == (2, 1)
        assert told["limits"] == compiled["limits"]
        assert told["listeners"] == [
            {"name": "listener", "control": False},
            {"name": "control", "control": True},
        ]
        assert told["totals"]["connections"] == 2
        assert told["totals"]["allowed"] == 1
        assert told["audit"] == broker.records()[0]["run"]
        assert told["audit_sequence"] == len(broker.records())
        assert (told["audit_failures"], told["audit_on_failure"]) == (0, "deny")
        assert told["loaded"].endswith("Z")
        assert len(told["fingerprint"]) == 8


@root
def test_status_of_a_policy_with_very_many_roots_fits_into_a_frame(tree: Path, tmp_path: Path) -> None:
    roots = []
    for number in range(500):
        (tree / f"r{number}").mkdir()
        roots.append(
            {
                "name": f"root-{number}",
                "path": str(tree / f"r{number}"),
                "cross_mounts": False,
                "opens": "loop",
            }
        )
    roots.append({"name": "tree", "path": str(tree), "cross_mounts": False, "opens": "loop"})
    with SteppedBroker(tree, policy(tree, roots=roots), audit=tmp_path / "audit") as broker:
        told = broker.call(broker.listen(tmp_path, control=True)).status()
    assert told["roots_in_all"] == 501
    assert 50 < len(told["roots"]) < 501
    assert told["roots"][0]["name"] == "root-0"


@root
def test_root_gets_to_the_control_socket_when_all_its_connections_are_taken(
    tree: Path, tmp_path: Path
) -> None:
    limits = {"connections_per_uid": 2, "in_flight_per_connection": 512}
    with SteppedBroker(tree, policy(tree, limits=limits), audit=tmp_path / "audit") as broker:
        path, listener = broker.listen(tmp_path, control=True), broker.listen(tmp_path)
        held = [broker.call(listener) for _ in range(2)]
        with broker.call(listener, hello=False) as third:
            assert isinstance(third.receive(), tuple)
            assert third.is_closed()
        broker.broker._acceptor.max_connections = 2
        with broker.call(path) as control:
            assert control.status()["totals"]["connections"] == 3
        assert len(held) == 2


@root
def test_whoever_fills_the_control_socket_takes_nothing_from_clients(
    tree: Path, reachable: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accepting, "_MOST_FOR_CONTROL", 3)
    with SteppedBroker(tree, audit=reachable / "audit") as broker:
        path, listener = broker.listen(reachable, control=True), broker.listen(reachable)
        broker.broker._acceptor.max_connections = 2

        def fill(first: Speaker) -> list[str]:
            """Return what became of the connections behind the first; all stay open to the end."""
            held, told = [first], []
            for _ in range(4):
                speaker = Speaker.connect(path, hello=False)
                held.append(speaker)
                with contextlib.suppress(BrokenPipeError):  # refused already
                    speaker.sock.send(encode_hello(1))
                # A reset is told once, ahead of the refusal.
                answer = speaker.receive() or speaker.receive()
                assert answer is not None
                refused = isinstance(answer.reply, ErrorReply)
                told.append(answer.reply.text if isinstance(answer.reply, ErrorReply) else "welcome")
                assert refused is (len(held) > 3)
            # Nothing of what clients may have is taken up by that.
            with Speaker.connect(listener), Speaker.connect(listener):
                return told

        told = in_child_on(broker, path, fill, uid=OTHER_UID)
        busy = "too many ask for status and explanations at once; ask again"
        assert told == ["welcome", "welcome", busy, busy]
        assert [
            record["reason"] for record in broker.records() if record["event"] == "connection_refused"
        ] == ["control_connections"] * 2
        broker.serve()
        assert broker.broker._for_control == 0


# Explanations


RULES = [
    rule("inner", paths=["directory/**"]),
    rule("small", paths=["*"], where={"size": {"max": 3}}),
    rule("mine", paths=["f*"], where={"owner": {"uids": [UID], "client": False, "on_behalf_of": False}}),
    rule("never-linked", effect="deny", paths=["link*"], where={"links": {"min": 2}}),
    rule("never", effect="deny", paths=["fifo"]),
    rule("listing", actions=["list"], paths=["**"]),
]


@pytest.fixture
def explained(tree: Path, tmp_path: Path) -> Iterator[tuple[SteppedBroker, Speaker]]:
    with SteppedBroker(tree, policy(tree, *RULES), audit=tmp_path / "audit") as broker:
        yield broker, broker.call(broker.listen(tmp_path, control=True))


@pytest.mark.parametrize(
    ("action", "name", "expected"),
    [
        ("open", "directory/x", (True, "ok", "tree", "inner", [], [])),
        ("open", "file", (True, "ok", "tree", None, ["small", "mine"], [])),
        ("open", "other", (True, "ok", "tree", "small", ["small"], [])),
        ("open", "link", (True, "ok", "tree", "small", ["small"], ["never-linked"])),
        ("open", "fifo", (False, "deny_rule", "tree", "never", [], [])),
        ("open", "other/x", (False, "no_rule", "tree", None, [], [])),
        ("list", "other/x", (True, "ok", "tree", "listing", [], [])),
        ("list", "fifo", (False, "deny_rule", "tree", "never", [], [])),
        ("walk", "directory/x", (True, "ok", "tree", "inner", [], [])),
        ("open", "../elsewhere", (False, "dot_component", None, None, [], [])),
    ],
)
def test_explanation_says_which_rules_there_are_and_what_they_ask(
    explained: tuple[SteppedBroker, Speaker], action: str, name: str, expected: tuple[object, ...]
) -> None:
    broker, control = explained
    asked = bytes(broker.tree) + b"/" + name.encode()
    told = control.explain(action, asked)
    assert (told["action"], told["generation"], told["path"]) == (action, 1, asked.decode())
    keys = ("allowed", "reason", "root", "rule", "asked_of_object", "denies")
    assert tuple(told[key] for key in keys) == expected
    assert (told["asked_of_object_in_all"], told["denies_in_all"]) == (len(expected[4]), len(expected[5]))  # type: ignore[arg-type]
    record = broker.records()[-1]
    assert record["event"] == "explained"
    assert (path_of(record), record["action"], record["reason"]) == (asked, action, expected[1])
    assert "decision" not in record


@pytest.mark.parametrize("tail", [b"x", b"\xff", "\u2603".encode()])
def test_explanation_of_a_long_path_is_recorded_by_its_beginning(
    explained: tuple[SteppedBroker, Speaker], tail: bytes
) -> None:
    """Anybody may ask for it: what it leaves in the audit is not much."""
    broker, control = explained
    asked = bytes(broker.tree) + b"/" + b"/".join([tail * 60] * 20)
    told = control.explain("open", asked)
    assert path_of(told) == asked
    record = broker.records()[-1]
    assert path_of(record) == asked[:256]
    assert record["path_length"] == len(asked)
    assert len(json.dumps(record)) < 3000


def test_explaining_touches_no_file(
    explained: tuple[SteppedBroker, Speaker], monkeypatch: pytest.MonkeyPatch
) -> None:
    broker, control = explained

    def fail(*_arguments: object) -> None:
        raise AssertionError("the file system was touched")

    for name in ("open", "stat", "list"):
        monkeypatch.setattr(broker.opener.__class__, name, fail)
    for action in ACTIONS.values():
        assert control.explain(action, bytes(broker.tree / "missing"))["reason"]


def test_outside_what_is_allowed_an_explanation_does_not_tell_what_is_there(
    explained: tuple[SteppedBroker, Speaker],
) -> None:
    _, control = explained
    there, missing = (control.explain("open", path) for path in (b"/etc/passwd", b"/etc/missing"))
    assert {**there, "path": ""} == {**missing, "path": ""}
    assert (there["reason"], there["root"]) == ("outside_roots", None)


@pytest.mark.parametrize(
    "path", [b"\xff/caf\xe9", b"", b"\x01\n\x1b[0m", b"relative", b"/" + b"\xff" * 60_000]
)
def test_any_bytes_can_be_asked_about_and_come_back(control: Speaker, path: bytes) -> None:
    answer = control.ask(encode_explain(11, "open", path))
    assert len(answer.raw) <= MAX_FRAME
    told = json.loads(answer.raw[12:])
    assert path_of(told) == path[:4096]
    assert told.get("path_length", len(path)) == len(path)
    assert not told["allowed"]


def test_explanation_of_thousands_of_rules_fits_into_a_frame(tree: Path, tmp_path: Path) -> None:
    rules = [rule(f"{'n' * 100}-{number}", where={"size": {"max": number}}) for number in range(2000)]
    rules += [rule(f"d-{number}", effect="deny", where={"size": {"max": number}}) for number in range(2000)]
    with SteppedBroker(tree, policy(tree, *rules), audit=tmp_path / "audit") as broker:
        control = broker.call(broker.listen(tmp_path, control=True))
        told = control.explain("open", bytes(tree) + b"/" + b"\xff" * 255)
    assert (told["asked_of_object_in_all"], told["denies_in_all"]) == (2000, 2000)
    assert told["asked_of_object"] == [entry["name"] for entry in rules[: len(told["asked_of_object"])]]
    assert 10 < len(told["asked_of_object"]) < 2000
    assert told["denies"][0] == "d-0"


NAMES = [
    "file",
    "empty",
    "missing",
    "link",
    "fifo",
    "directory",
    "directory/inner",
    "file/x",
    "x" * 256,
    ".",
    "",
]
some_rules = st.fixed_dictionaries(
    {
        "effect": st.sampled_from(["allow", "allow", "deny"]),
        "paths": st.lists(
            st.sampled_from(["*", "**", "file", "f*", "directory/**", "*/inner", "[de]*"]),
            min_size=1,
            max_size=2,
        ),
        "except": st.lists(st.sampled_from(["empty", "d*", "link"]), max_size=1),
        "where": st.sampled_from(
            [
                {},
                {},
                {"size": {"max": 3}},
                {"owner": {"uids": [UID], "client": False, "on_behalf_of": False}},
                {"links": {"min": 2}},
            ]
        ),
        "actions": st.sampled_from([["open", "stat", "list", "walk"], ["open"], ["stat", "list"]]),
    }
)


def holds(where: dict[str, Any], path: bytes) -> bool:
    """Return whether a regular file is as these conditions ask."""
    facts = os.stat(path)
    return {
        "size": facts.st_size <= 3,
        "owner": facts.st_uid == UID,
        "links": facts.st_nlink >= 2,
    }[next(iter(where))]


@pytest.mark.unmeasured
def test_explanation_agrees_with_what_open_does(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Refused by the name: never given. Nothing asked: given if it can be. Else: if the conditions hold."""
    directory = tmp_path_factory.mktemp("explained")
    (directory / "tree" / "directory").mkdir(parents=True)
    tree = directory / "tree"
    (tree / "file").write_bytes(b"content")
    (tree / "empty").touch()
    (tree / "directory" / "inner").write_bytes(b"in")
    (tree / "link").symlink_to("file")
    os.mkfifo(tree / "fifo")
    met = set()

    @settings(suppress_health_check=[HealthCheck.too_slow], max_examples=60, deadline=None)
    @given(st.lists(some_rules, max_size=4))
    def check(changes: list[dict[str, Any]]) -> None:
        rules = {f"r{number}": rule(f"r{number}", **change) for number, change in enumerate(changes)}
        compiled = policy(tree) | {"rules": list(rules.values())}
        (directory / "audit").unlink(missing_ok=True)  # it is read after each question
        with SteppedBroker(tree, compiled, audit=directory / "audit") as broker:
            control, asker = broker.call(broker.listen(directory, control=True)), broker.join()
            for name in NAMES:
                path = bytes(tree) + b"/" + name.encode()
                told = control.explain("open", path)
                opened = asker.open_one(path)
                record = broker.records()[-1]
                asked, denies = told["asked_of_object"], told["denies"]
                regular = name in {"file", "empty", "directory/inner"}
                if not told["allowed"]:
                    assert opened.content is None
                    assert (record["reason"], record["rule"]) == (told["reason"], told["rule"])
                elif not asked and not denies:
                    assert record["rule"] == told["rule"]
                    assert (opened.content is not None) is regular
                elif regular:
                    forbidding = [one for one in denies if holds(rules[one]["where"], path)]
                    allowing = [one for one in asked if holds(rules[one]["where"], path)]
                    if not asked:  # the one that allows it asks nothing
                        allowing = [told["rule"]]
                    assert (opened.content is not None) is (bool(allowing) and not forbidding), (told, record)
                    if forbidding:
                        assert (record["reason"], record["rule"]) == ("deny_rule", forbidding[0])
                    elif allowing:
                        assert (record["reason"], record["rule"]) == ("ok", allowing[0])
                    else:
                        assert record["rule"] == asked[0]
                    met.add((bool(forbidding), opened.content is not None))
                else:
                    assert opened.content is None
        (directory / "control").unlink()

    check()
    assert met == {(True, False), (False, True), (False, False)}, "some answer was never met"


# Reload


def files_of(tree: Path, *names: str) -> dict[str, Any]:
    """Return a policy by which only these files are to be had."""
    return policy(tree, rule("some", paths=list(names)))


@root
def test_reload_is_met_by_the_next_request_of_a_connection_that_lives_on(
    stepped: SteppedBroker, control: Speaker
) -> None:
    speaker = stepped.join()
    file, inner = bytes(stepped.tree / "file"), bytes(stepped.tree / "directory" / "inner")
    assert [entry.reason for entry in speaker.open(file, inner)] == ["ok", "ok"]
    reply = control.reload(files_of(stepped.tree, "file"))
    assert isinstance(reply, ReloadReply)
    assert (reply.generation, reply.more) == (2, False)
    assert [entry.reason for entry in speaker.open(file, inner)] == ["ok", "denied"]
    answer = speaker.ask(encode_open(7, [inner]))
    assert answer.reply.generation == 2
    assert control.status()["generation"] == 2
    assert [record["generation"] for record in stepped.records() if "decision" in record] == [1, 1, 2, 2, 2]
    check_audit(stepped.records())


@root
def test_reload_is_recorded_with_both_fingerprints(stepped: SteppedBroker, control: Speaker) -> None:
    before = control.status()["fingerprint"]
    control.reload(files_of(stepped.tree, "file"))
    after = control.status()["fingerprint"]
    assert before != after
    [record] = [record for record in stepped.records() if record["event"] == "reloaded"]
    assert (record["old_generation"], record["generation"], record["rules"]) == (1, 2, 1)
    assert (record["old_fingerprint"], record["fingerprint"]) == (before, after)
    assert (record["uid"], record["pid"], record["socket"]) == (0, os.getpid(), "control")
    control.reload(policy(stepped.tree))
    assert control.status()["fingerprint"] == before


@root
@pytest.mark.parametrize("size", [1, 7, 1000, MAX_FRAME - 16])
def test_policy_may_come_in_pieces_of_any_size(stepped: SteppedBroker, control: Speaker, size: int) -> None:
    reply = control.reload(files_of(stepped.tree, "file"), size)
    assert reply.generation == 2


@root
def test_root_that_is_left_out_is_not_served_and_can_come_back(tree: Path, tmp_path: Path) -> None:
    """A policy numbers its own roots, so the second of the start may be the first of a later one."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "file").write_bytes(b"other")
    roots = [
        {"name": "tree", "path": str(tree), "cross_mounts": False, "opens": "loop"},
        {"name": "other", "path": str(other), "cross_mounts": False, "opens": "loop"},
    ]
    both = policy(tree, rule("a"), rule("b", root="other"), roots=roots)
    alone = policy(tree, rule("b", root="other"), roots=roots[1:])
    turned = policy(tree, rule("b", root="other"), rule("a"), roots=roots[::-1])
    with SteppedBroker(tree, both, audit=tmp_path / "audit") as broker:
        control = broker.call(broker.listen(tmp_path, control=True))
        speaker = broker.join()
        asked = [bytes(tree / "file"), bytes(other / "file")]
        for compiled, expected in [
            (both, [b"content", b"other"]),
            (alone, [None, b"other"]),
            (turned, [b"content", b"other"]),
            (alone, [None, b"other"]),
        ]:
            assert isinstance(control.reload(compiled), ReloadReply)
            assert [entry.content for entry in speaker.open(*asked)] == expected


@root
def test_limits_and_what_becomes_of_what_is_not_recorded_are_those_of_the_new_policy(
    stepped: SteppedBroker, control: Speaker, tmp_path: Path
) -> None:
    limits = {"connections_per_uid": 3, "in_flight_per_connection": 300}
    path = stepped.listen(tmp_path)
    held = [stepped.call(path)]
    control.reload(policy(stepped.tree, limits=limits, audit={"on_failure": "allow"}))
    held.append(stepped.call(path))
    with stepped.call(path, hello=False) as fourth:
        answer = fourth.receive()
        assert answer is not None
        assert isinstance(answer.reply, ErrorReply)
        assert "has 3 connections already" in answer.reply.text
    assert not stepped.audit.deny_on_failure
    assert held[1].status()["generation"] == 2
    control.reload(policy(stepped.tree))
    assert stepped.audit.deny_on_failure


@root
def test_who_may_serve_a_listener_can_change_and_the_listeners_can_not(tree: Path, tmp_path: Path) -> None:
    def served(*names: str, by: int) -> dict[str, Any]:
        return policy(tree, services=[{"name": name, "clients": [{"uids": [by]}]} for name in names])

    with SteppedBroker(tree, served("a", "b", by=7), audit=tmp_path / "audit") as broker:
        control = broker.call(broker.listen(tmp_path, control=True))
        control.reload(served("b", "a", by=8))
        services = broker.broker._dispatch.generation.policy.rule_set.services
        assert {name: [match.uids for match in who] for name, who in services.items()} == {
            b"a": [frozenset({8})],
            b"b": [frozenset({8})],
        }
        for names in ((), ("a",), ("a", "c"), ("a", "b", "c")):
            refused = control.ask(encode_reload(5, 0, json.dumps(served(*names, by=8)).encode(), more=False))
            assert isinstance(refused.reply, ErrorReply)
            assert "and were 'a', 'b' when the broker started: restart the broker" in refused.reply.text


REFUSED: list[tuple[Callable[[Path], dict[str, Any] | bytes], str]] = [
    (lambda _tree: b"garbage", "this is no compiled policy: Expecting value"),
    (lambda _tree: b"\xff\xfe\x00", "this is no compiled policy"),
    (lambda _tree: b"[]", "the policy is not a JSON object"),
    (lambda _tree: b"[" * 200_000, "this is no compiled policy"),
    (lambda tree: json.dumps(policy(tree)).encode()[:-1], "this is no compiled policy"),
    (lambda tree: policy(tree) | {"surprise": 1}, "missing or unknown keys: surprise"),
    (lambda tree: policy(tree, rule("x", root="nowhere")), "rules[0].root is 'nowhere'"),
    (lambda tree: policy(tree) | {"x\ud800\n": 1}, "missing or unknown keys"),
    (lambda tree: policy(tree, version="x" * 100_000), "version"),
    (lambda tree: policy(tree, rule("x", effect="y" * 100_000)), "rules[0].effect is 'yyy"),
    (
        lambda tree: policy(
            tree, roots=[{"name": "tree", "path": str(tree), "cross_mounts": True, "opens": "loop"}]
        ),
        "root 'tree'",
    ),
    (
        lambda tree: policy(
            tree,
            roots=[{"name": "tree", "path": f"{tree}/directory", "cross_mounts": False, "opens": "loop"}],
        ),
        "not among those that the broker opened when it started",
    ),
    (
        lambda tree: policy(
            tree,
            rule("x", root="new"),
            roots=[{"name": "new", "path": str(tree), "cross_mounts": False, "opens": "loop"}],
        ),
        "root 'new'",
    ),
    (
        lambda tree: policy(
            tree,
            roots=[{"name": "tree", "path": str(tree), "cross_mounts": False, "opens": "helpers"}],
        ),
        "or its cross_mounts or opens was another",
    ),
    (
        lambda tree: policy(tree, services=[{"name": "clamd", "clients": [{"uids": [7]}]}]),
        "its listeners of services are 'clamd', and were none when the broker started: restart the broker",
    ),
    (lambda tree: policy(tree, read_only_view="off"), "read_only_view was 'required'"),
    (
        lambda tree: policy(tree, rule("x", clients=[{"cgroups": ["/system.slice/x.service"]}])),
        "rules for units or control groups",
    ),
]


@root
@pytest.mark.parametrize(("make", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_refused_reload_leaves_everything_as_it_was_and_says_what_to_do(
    stepped: SteppedBroker,
    control: Speaker,
    make: Callable[[Path], dict[str, Any] | bytes],
    said: str,
) -> None:
    speaker = stepped.join()
    file = bytes(stepped.tree / "file")
    assert speaker.open_one(file).content == b"content"
    before, generation = control.status(), stepped.broker._dispatch.generation
    error = control.reload(make(stepped.tree))
    assert isinstance(error, ErrorReply)
    assert (error.kind, error.reason, error.errno) == (Kind.REFUSED, Reason.POLICY, errno.EINVAL)
    assert said in error.text
    assert error.text.endswith(("compile it anew", "restart the broker"))
    assert len(error.text) < 2000
    [record] = [record for record in stepped.records() if record["event"] == "reload_refused"]
    assert said.replace("\n", "\\n") in record["reason"]
    assert stepped.broker._dispatch.generation is generation
    after = control.status()
    for told in (before, after):
        for changes in ("audit_sequence", "events", "requests"):
            told.pop(changes)
    assert after == before
    assert speaker.open_one(file).content == b"content"
    assert control.reload(policy(stepped.tree)).generation == 2


@root
def test_policy_that_could_not_be_recorded_is_not_loaded(
    stepped: SteppedBroker, control: Speaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(stepped.audit, "_descriptor", os.open("/dev/full", os.O_WRONLY))
        error = control.reload(files_of(stepped.tree, "file"))
        os.close(stepped.audit._descriptor)  # type: ignore[arg-type]
    assert isinstance(error, ErrorReply)
    assert (error.reason, error.errno) == (Reason.AUDIT, errno.EIO)
    assert stepped.broker._dispatch.generation.number == 1
    assert control.explain("open", bytes(stepped.tree / "directory" / "inner"))["allowed"]
    assert control.reload(files_of(stepped.tree, "file")).generation == 2


@root
@pytest.mark.parametrize("wrong", [5, 19, 21, 10])
def test_pieces_must_follow_one_another_and_what_was_refused_is_begun_anew(
    stepped: SteppedBroker, control: Speaker, wrong: int
) -> None:
    text = json.dumps(files_of(stepped.tree, "file")).encode()
    for offset in (0, 10):
        reply = control.ask(encode_reload(1, offset, text[offset : offset + 10], more=True)).reply
        assert isinstance(reply, ReloadReply)
        assert reply.received == offset + 10
    for offset in (wrong, 20):  # the rest of what was under way is no beginning
        error = control.error(encode_reload(2, offset, text[offset:], more=False))
        assert error.reason == Reason.POLICY
        assert error.text.endswith("begin again, at 0")
    # A new beginning needs no end of the one before.
    control.ask(encode_reload(4, 0, b"garbage", more=True))
    assert control.reload(text).generation == 2


@root
def test_two_connections_may_hand_over_policies_at_once_and_do_not_mix(
    stepped: SteppedBroker, control: Speaker, tmp_path: Path
) -> None:
    other = stepped.call(tmp_path / "control")
    texts = [json.dumps(files_of(stepped.tree, name)).encode() for name in ("file", "empty")]
    for speaker, text in zip((control, other), texts, strict=True):
        speaker.ask(encode_reload(1, 0, text[:50], more=True))
    for number, (speaker, text) in enumerate(zip((control, other), texts, strict=True)):
        reply = speaker.ask(encode_reload(2, 50, text[50:], more=False)).reply
        assert isinstance(reply, ReloadReply)
        assert reply.generation == 2 + number
    assert stepped.join().open_one(bytes(stepped.tree / "empty")).reason == "ok"
    assert stepped.join().open_one(bytes(stepped.tree / "file")).reason == "denied"


@root
def test_connection_lost_in_the_middle_of_a_reload_leaves_nothing_behind(
    stepped: SteppedBroker, tmp_path: Path
) -> None:
    path = stepped.listen(tmp_path, control=True)
    with stepped.call(path) as control:
        control.ask(encode_reload(1, 0, json.dumps(policy(stepped.tree)).encode()[:-1], more=True))
        [connection] = stepped.broker._connections.values()
        assert connection.pieces
    assert stepped.connections == 0
    assert stepped.broker._dispatch.generation.number == 1
    with stepped.call(path) as control:
        assert control.error(encode_reload(1, 100, b"}", more=False)).reason == Reason.POLICY


@root
def test_oversized_piece_ends_the_connection_and_the_reload(stepped: SteppedBroker, control: Speaker) -> None:
    control.ask(encode_reload(1, 0, b"{", more=True))
    control.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 400_000)
    error = control.error(frame(Type.RELOAD, body=bytes(4) + b"x" * MAX_FRAME))
    assert error.kind == Kind.MALFORMED
    assert control.is_closed()
    assert stepped.broker._dispatch.generation.number == 1


@root
def test_others_than_root_can_not_change_the_policy_nor_have_pieces_kept(tree: Path, reachable: Path) -> None:
    compiled = policy(tree, admins={"uids": [OTHER_UID], "gids": []})
    with SteppedBroker(tree, compiled, audit=reachable / "audit") as broker:
        path = broker.listen(reachable, control=True)

        def attempt(speaker: Speaker) -> list[object]:
            told = [speaker.error(encode_reload(1, 0, b"{}", more=more)) for more in (True, False)]
            return [(error.reason, error.errno, error.text) for error in told]

        told = in_child_on(broker, path, attempt, uid=OTHER_UID)
        assert told == [[Reason.DENIED, errno.EACCES, "only root changes the policy: run it as root"]] * 2
        assert broker.broker._dispatch.generation.number == 1
        assert broker.events() == ["reload_refused"] * 2
        assert {record["uid"] for record in broker.records()} == {OTHER_UID}


def objects_of(*kinds: type) -> int:
    """Return how many objects of these types exist. No collection: the broker has to do that itself."""
    return sum(isinstance(thing, kinds) for thing in gc.get_objects())


@root
def test_a_hundred_reloads_leave_one_policy_in_memory(
    stepped: SteppedBroker, control: Speaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where idle clients asked by an old one, and never ask again."""
    # What is frozen is not listed: neither the first policy nor what other tests have left.
    gc.freeze()
    monkeypatch.setattr(gc, "freeze", lambda: None)
    monkeypatch.setattr(gc, "unfreeze", lambda: None)
    idle = []
    for number in range(100):
        assert control.reload(files_of(stepped.tree, "file", f"f{number}")).generation == 2 + number
        if number < 20:
            idle.append(stepped.join())
            assert idle[-1].open_one(bytes(stepped.tree / "file")).reason == "ok"
        if number in {30, 99}:
            assert objects_of(Policy, RuleSet) == 2
            assert objects_of(ActionView) == 0
    assert idle[0].open_one(bytes(stepped.tree / "file")).reason == "ok"
    assert objects_of(ActionView) == 5
    assert isinstance(stepped.broker._control, Control)


@root
def test_view_of_an_earlier_policy_is_not_used_even_where_it_was_kept(
    stepped: SteppedBroker, control: Speaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stepped.broker._control, "_switched", lambda: None)
    speaker = stepped.join()
    assert speaker.open_one(bytes(stepped.tree / "empty")).reason == "ok"
    control.reload(files_of(stepped.tree, "file"))
    assert speaker.open_one(bytes(stepped.tree / "empty")).reason == "denied"


def begin_reload(stepped: SteppedBroker, control: Speaker, name: str) -> None:
    """Hand over a policy of many rules, of which the broker reads very few in a round."""
    rules = [rule(f"r{number}", paths=[name]) for number in range(200)]
    text = json.dumps(policy(stepped.tree, *rules)).encode()
    control.sock.send(encode_reload(1, 0, text, more=False))
    stepped.broker.step(0)
    assert stepped.broker._loading


@root
def test_reload_whose_sender_leaves_while_it_is_read_is_given_up_and_the_next_one_has_its_turn(
    stepped: SteppedBroker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = stepped.listen(tmp_path, control=True)
    gone, stays = stepped.call(path), stepped.call(path)
    with monkeypatch.context() as patch:
        patch.setattr("fdbroker.broker.control._MOMENT", 1e-6)
        begin_reload(stepped, gone, "empty")
        begin_reload(stepped, stays, "file")
        gone.sock.close()
        stepped.broker.step(0)
    stepped.serve()
    answer = stays.receive()
    assert answer is not None
    assert isinstance(answer.reply, ReloadReply)
    assert answer.reply.generation == 2
    assert stepped.join().open_one(bytes(stepped.tree / "file")).reason == "ok"
    assert stepped.join().open_one(bytes(stepped.tree / "empty")).reason == "denied"
    assert [record["event"] for record in stepped.records()].count("reloaded") == 1


@root
def test_who_waits_for_its_policy_to_be_read_is_not_read_from(
    stepped: SteppedBroker, control: Speaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("fdbroker.broker.control._MOMENT", 1e-6)
        begin_reload(stepped, control, "file")
        control.sock.send(encode_status(2))
        stepped.broker.step(0)
    stepped.serve()
    answers = [control.receive(), control.receive()]
    assert [answer is not None and (answer.reply.id, answer.reply.generation) for answer in answers] == [
        (1, 2),
        (2, 2),
    ]


@root
def test_failure_of_ours_while_a_policy_is_read_ends_that_connection_alone(
    stepped: SteppedBroker, control: Speaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: object) -> None:
        raise MemoryError

    speaker = stepped.join()
    with monkeypatch.context() as patch:
        patch.setattr("fdbroker.broker.control.make_generation", fail)
        error = control.reload(files_of(stepped.tree, "file"))
    assert isinstance(error, ErrorReply)
    assert (error.kind, error.reason) == (Kind.BROKEN, Reason.BROKEN)
    assert control.is_closed()
    assert stepped.broker._dispatch.generation.number == 1
    assert speaker.open_one(bytes(stepped.tree / "empty")).reason == "ok"
    [record] = [record for record in stepped.records() if record["event"] == "failed"]
    assert "MemoryError" in record["reason"]
    assert stepped.call(stepped.tree.parent / "control").reload(policy(stepped.tree)).generation == 2


@root
def test_request_behind_a_reload_on_a_stream_is_answered_without_another(stepped: SteppedBroker) -> None:
    """It was received together with the reload, so nothing comes that would wake the loop up for it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with theirs:
        stepped.broker.adopt(ours, "control", stepped.broker._control.table)
        document = json.dumps(policy(stepped.tree)).encode()
        requests = encode_hello(1), encode_reload(2, 0, document, more=False), encode_status(3)
        theirs.sendall(b"".join(framed(request) for request in requests))
        stepped.serve()
        frames = FrameBuffer()
        frames.add(theirs.recv(MAX_FRAME, socket.MSG_DONTWAIT))
        replies = []
        while (reply := frames.next_frame()) is not None:
            replies.append(decode_reply(reply).id)
        assert replies == [1, 2, 3]
