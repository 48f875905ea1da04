"""Explanations: the verdict is the broker's, and what is said beside it amounts to the same."""

from __future__ import annotations

import itertools
import json
import os
import stat
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, seed, settings

from fdbroker.config import ConfigError
from fdbroker.config import explain as explain_module
from fdbroker.config.explain import (
    ALLOW,
    DENY,
    UNKNOWN,
    Asker,
    Explanation,
    Seen,
    client_of_user,
    control_group_of_this_process,
    explain,
    load_for_explaining,
    look_as_broker,
    with_control_group,
)
from fdbroker.policy.decide import Policy, decide_object
from fdbroker.policy.rules import ClientFacts, Root, read_policy
from tests.descriptors.mounting import MS_RDONLY, MS_REMOUNT, mount, mounted
from tests.hanging.fuse import Operation, fuse_mounted
from tests.policy import decision_model
from tests.policy.decision_cases import Case, aimed, cases, objects
from tests.policy.decision_model import Facts
from tests.processes import children_of, in_child
from tests.running_broker import CLIENT_UID, policy, reachable_directory, rule

if TYPE_CHECKING:
    from pathlib import Path

# Nobody has these numbers, so that no name stands beside them.
UID, GID = 54321, 54322
CLIENT = ClientFacts(UID, frozenset({GID}))
ASKER = Asker(CLIENT)
FILE = Facts(stat.S_IFREG | 0o640, UID, GID, 10, 1)


def by_the_details(explanation: Explanation) -> str:
    """Return the verdict that follows from what is said of the rules."""
    applying = {(rule.effect, rule.applies) for rule in explanation.rules}
    if (DENY, True) in applying:
        return DENY
    if (ALLOW, True) not in applying and (ALLOW, None) not in applying:
        return DENY
    if (DENY, None) in applying or (ALLOW, True) not in applying:
        return UNKNOWN
    return ALLOW


def check_what_was_seen(case: Case, objects_there: list[Facts]) -> set[tuple[str, str, bool]]:
    """Check that the verdict on each object is the policy's, and its details amount to it."""
    document, (client, acted_for), action, paths = case
    asker = Asker(client, acted_for)
    rules = read_policy(document)
    view = Policy(rules).view(*asker).actions[action]
    reached = set()
    for path, found in itertools.product(paths, objects_there):
        seen = Seen(found, surroundings=found.around)
        explanation = explain(rules, asker, action, path.encode(), lambda *_, seen=seen: seen)
        decision = view.decide(path.encode())
        expected = decide_object(decision, found, *asker.uids, found.around) if decision.allowed else decision
        verdict = explanation.verdict
        assert (verdict.decision == ALLOW, verdict.reason) == (expected.allowed, expected.reason)
        assert verdict.rule == (None if expected.rule is None else expected.rule.name)
        assert by_the_details(explanation) == verdict.decision
        applying = {report.name for report in explanation.rules if report.applies}
        # A rule that is named for an allowance or a refusal is one that is said to apply.
        assert verdict.rule in applying or verdict.reason not in {"ok", "deny_rule"}
        assert "would answer" not in explanation.sentence
        reached.add((verdict.decision, verdict.reason, len(applying) > 1))
    return reached


def check_what_was_not_seen(case: Case) -> set[str]:
    """Check that what nobody could look at stays open just where it matters."""
    document, (client, acted_for), action, paths = case
    asker = Asker(client, acted_for)
    rules = read_policy(document)
    reached = set()
    for path in paths:
        explanation = explain(rules, asker, action, path.encode(), lambda *_: Seen(note="Permission denied"))
        decision, _, _ = explanation.verdict
        assert by_the_details(explanation) == decision
        expected = decision_model.expect(document, case.asker, action, path)
        if decision == UNKNOWN:
            assert expected.allows
            assert expected.rule is None
            assert "Permission denied" in explanation.sentence
        else:
            assert (decision == ALLOW) is (expected.rule is not None and expected.reason == "ok")
        reached.add(decision)
    return reached


@pytest.mark.unmeasured
@pytest.mark.usefixtures("same_cases")
def test_verdict_is_that_of_the_policy_and_stays_open_just_where_what_was_not_seen_matters() -> None:
    # Without these nobody sees that all is denied.
    reached: set[tuple[str, str, bool]] = set()
    unseen: set[str] = set()

    @settings(max_examples=150)
    @given(cases(), objects)
    def check(case: Case, any_objects: list[Facts]) -> None:
        reached.update(check_what_was_seen(case, aimed(case, any_objects)[-3:]))
        unseen.update(check_what_was_not_seen(case))

    (seed(1)(check) if settings().derandomize else check)()
    assert {(ALLOW, "ok", True), (ALLOW, "ok", False), (DENY, "deny_rule", True)} <= reached
    reasons = {"no_rule", "outside_roots", *(f"where_{what}" for what in decision_model.CONDITIONS)}
    assert reasons <= {reason for _, reason, _ in reached}
    assert unseen == {ALLOW, DENY, UNKNOWN}


def test_path_that_is_none_is_explained_by_what_is_wrong_with_it() -> None:
    odd = ["", "srv", "/srv/", "//srv", "/srv/./a", "/srv/../a", "/srv/" + "x" * 256, "/srv" + "/x" * 2048]
    case = Case(policy("/srv", rule("all")), decision_model.Asker(CLIENT), "open", odd)
    reached = check_what_was_seen(case, [FILE])
    assert {reason for _, reason, _ in reached} == set(decision_model.PROBLEMS)
    assert check_what_was_not_seen(case) == {DENY}


def explained(
    document: dict[str, Any], path: str, *, acted_for: ClientFacts | None = None, seen: Seen
) -> Explanation:
    return explain(read_policy(document), Asker(CLIENT, acted_for), "open", path.encode(), lambda *_: seen)


def test_nothing_is_looked_at_where_the_name_is_refused() -> None:
    def look(_root: Root, _path: bytes, _action: str) -> Seen:
        raise AssertionError("looked")

    document = policy("/srv", rule("no", effect="deny"))
    for path in (b"/srv/x", b"/elsewhere", b"/srv/../x", b"relative"):
        assert explain(read_policy(document), ASKER, "open", path, look).verdict.decision == DENY


def test_each_condition_is_told_with_the_value_of_the_object() -> None:
    where = {
        "owner": {"uids": [0], "client": True, "on_behalf_of": False},
        "group": {"gids": [54323]},
        "mode": {"none": 0o022},
        "size": {"max": 5},
        "links": {"max": 1},
    }
    explanation = explained(policy("/srv", rule("some", where=where)), "/srv/a", seen=Seen(FILE))
    [report] = explanation.rules
    told = {check.what: (check.holds, check.text) for check in report.checks}
    assert told["owner"] == (True, "must be 0 (root) or the client itself; is 54321")
    assert told["group"] == (False, "must be 54323; is 54322")
    assert told["mode"] == (True, "must have nothing of 0022; is 0640")
    assert told["size"] == (False, "must be at most 5 bytes; is 10")
    assert told["links"] == (True, "must be at most 1; is 1")
    assert report.failures == 2
    assert explanation.verdict == (DENY, "where_group", "some")
    assert "not with this group" in explanation.sentence


def test_mode_of_which_no_bit_is_asked_is_a_condition_as_well() -> None:
    """No policy file can say so, but a compiled one; the broker looks at the object before it answers."""
    document = policy("/srv", rule("some", where={"mode": {"all": 0}}))
    unseen = explained(document, "/srv/a", seen=Seen(note="not seen"))
    assert unseen.verdict.decision == by_the_details(unseen) == UNKNOWN
    seen = explained(document, "/srv/a", seen=Seen(FILE))
    assert seen.verdict.decision == by_the_details(seen) == ALLOW
    assert seen.rules[0].checks[-1] == ("mode", True, "must have 0000; is 0640")


def test_glob_that_matches_and_exception_are_named() -> None:
    document = policy("/srv", rule("some", paths=["x/*", "**/*.log"], **{"except": ["old/**"]}))
    checks = {
        path: {check.what: check for check in explained(document, path, seen=Seen(FILE)).rules[0].checks}
        for path in ("/srv/a/b.log", "/srv/old/b.log", "/srv/y")
    }
    assert checks["/srv/a/b.log"]["paths"].text == "matches **/*.log"
    assert checks["/srv/a/b.log"]["except"].holds
    assert checks["/srv/old/b.log"]["except"].text == "matches old/**, which is excepted"
    assert checks["/srv/y"]["paths"].text == "matches none of x/*, **/*.log"


def test_client_of_another_rule_is_told_apart() -> None:
    document = policy("/srv", rule("some", clients=[{"uids": [1], "gids": [7]}, {"cgroups": ["/a"]}]))
    [report] = explained(document, "/srv/a", seen=Seen(FILE)).rules
    [client] = [check for check in report.checks if check.what == "client"]
    assert client.holds is False
    assert "user 1 (daemon) and group 7" in client.text
    assert "control group /a" in client.text
    assert "the client is user 54321" in client.text


def test_whom_a_service_may_act_for_is_told() -> None:
    document = policy(
        "/srv",
        rule("own"),
        rule(
            "others",
            on_behalf_of=[{"uids": [54323]}],
            where={"owner": {"uids": [], "client": False, "on_behalf_of": True}},
        ),
        rule("never", effect="deny", paths=["keys"]),
    )

    def told(acted_for: ClientFacts | None, owner: int) -> tuple[Explanation, list[str]]:
        explanation = explained(
            document, "/srv/a", acted_for=acted_for, seen=Seen(FILE._replace(st_uid=owner))
        )
        texts = [check.text for report in explanation.rules for check in report.checks]
        return explanation, [text for text in texts if "act" in text]

    itself, texts = told(None, UID)
    assert (itself.verdict, itself.on_behalf_of) == ((ALLOW, "ok", "own"), None)
    assert texts == [
        "is about a service that acts for user 54323; the client acts for nobody",
        "must be the client that is acted for; is 54321",
    ]
    theirs, texts = told(ClientFacts(54323, frozenset()), 54323)
    assert (theirs.verdict, theirs.on_behalf_of) == ((ALLOW, "ok", "others"), ClientFacts(54323, frozenset()))
    assert texts == [
        "does not say for whom the client may act, so it allows what the client asks for itself alone",
        "is about a service that acts for user 54323; it acts for user 54323",
        "must be the client that is acted for; is 54323",
    ]
    assert told(ClientFacts(54323, frozenset()), UID)[0].verdict == (DENY, "where_owner", "others")
    assert told(ClientFacts(54324, frozenset()), 54324)[0].verdict == (DENY, "no_rule", None)


def test_rule_of_an_outer_root_does_not_allow_and_says_why() -> None:
    document = policy("/srv", rule("outer"))
    document["roots"].append({"name": "inner", "path": "/srv/in", "cross_mounts": False, "opens": "loop"})
    explanation = explained(document, "/srv/in/a", seen=Seen(FILE))
    assert explanation.verdict == (DENY, "no_rule", None)
    [root] = [check for check in explanation.rules[0].checks if check.what == "root"]
    assert "deeper root inner (/srv/in)" in root.text


def test_rule_that_hands_out_no_descriptors_opens_nothing() -> None:
    explanation = explained(policy("/srv", rule("copies", deliver=["copy"])), "/srv/a", seen=Seen(FILE))
    assert explanation.verdict.reason == "no_rule"
    assert explanation.rules[0].applies is False


# ---- looking ----


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "directory").mkdir()
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "linked").symlink_to("directory")
    os.mkfifo(tmp_path / "fifo")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "action", "reason"),
    [
        ("file", "open", None),
        ("file", "stat", None),
        ("file", "list", "not_directory"),
        ("directory", "open", "is_directory"),
        ("directory", "list", None),
        ("link", "open", "symlink"),
        ("link", "stat", None),
        ("linked/x", "open", "symlink"),
        ("file", "walk", None),
        ("directory", "walk", None),
        ("link", "walk", None),
        ("fifo", "open", "not_regular"),
        ("file/x", "open", "not_directory"),
        ("absent", "open", "not_found"),
    ],
)
def test_object_is_looked_at_as_the_broker_does(
    tree: Path, name: str, action: str, reason: str | None
) -> None:
    rules = read_policy(policy(tree))
    seen = look_as_broker(rules.roots[0], bytes(tree / name), action)
    assert seen.reason == reason
    if reason is None:
        assert seen.facts == os.lstat(tree / name)
    explanation = explain(rules, ASKER, action, bytes(tree / name), look_as_broker)
    assert explanation.verdict == (DENY if reason else ALLOW, reason or "ok", "all")
    assert explanation.sentence.startswith("denied: " if reason else "allowed: ")


@pytest.mark.parametrize(
    ("name", "action", "verdict", "sentence"),
    [
        (
            "link",
            "open",
            (ALLOW, "ok", "all"),
            "allowed: rule all allows it; it is a name of {tree}/file, by",
        ),
        ("linked", "list", (ALLOW, "ok", "all"), "allowed: "),
        ("linked/x", "open", (DENY, "not_found", "all"), "denied: "),
        ("linked/x", "walk", (DENY, "symlink", "all"), "denied: "),
        ("linked", "open", (DENY, "is_directory", "all"), "denied: "),
        ("secret", "open", (DENY, "deny_rule", "private"), "denied: rule private denies it, and"),
        (
            "large",
            "open",
            (DENY, "where_size", "small"),
            "denied: rule small would allow it, but not of this",
        ),
        (
            "outside",
            "open",
            (DENY, "link_leaves_root", "all"),
            "denied: rule all is about it, but a component",
        ),
        ("loop", "open", (DENY, "too_many_links", "all"), "denied: rule all is about it, but more than"),
    ],
)
def test_link_that_is_followed_is_explained_by_both_names(
    tree: Path, name: str, action: str, verdict: tuple[str, str, str], sentence: str
) -> None:
    (tree / "secret").symlink_to("private/secret")
    (tree / "large").symlink_to("file")
    (tree / "outside").symlink_to("../file")
    (tree / "loop").symlink_to("loop")
    rules = read_policy(
        policy(
            tree,
            rule("all", **{"symlinks": "within-root", "except": ["large"]}),
            rule("small", symlinks="within-root", paths=["large"], where={"size": {"max": 1}}),
            rule("private", effect="deny", paths=["private/**"]),
        )
    )
    explanation = explain(rules, ASKER, action, bytes(tree / name), look_as_broker)
    assert explanation.verdict == verdict
    assert explanation.sentence.startswith(sentence.format(tree=tree))


def test_other_mount_and_kernel_file_system_are_not_served() -> None:
    without = read_policy(policy("/"))
    across = read_policy(
        policy("/", roots=[{"name": "tree", "path": "/", "cross_mounts": True, "opens": "loop"}])
    )
    path = b"/proc/version"
    assert explain(without, ASKER, "open", path, look_as_broker).verdict.reason == "crosses_mount"
    assert explain(across, ASKER, "open", path, look_as_broker).verdict.reason == "filesystem"


@pytest.mark.root
@pytest.mark.parametrize(
    ("view", "flags", "noted"), [("required", 0, True), ("off", 0, False), ("required", MS_RDONLY, False)]
)
def test_mount_that_may_be_writable_for_the_broker_is_noted(
    tree: Path,
    view: str,
    flags: int,
    noted: bool,  # noqa: FBT001 - a parameter
) -> None:
    roots = [{"name": "tree", "path": str(tree), "cross_mounts": True, "opens": "loop"}]
    rules = read_policy(policy(tree, roots=roots, read_only_view=view))
    with mounted("tmpfs", tree / "directory"):
        (tree / "directory" / "file").write_bytes(b"")
        if flags:
            mount(b"none", bytes(tree / "directory"), flags=MS_REMOUNT | flags)
        there, here = (
            explain(rules, ASKER, "open", bytes(tree / name), look_as_broker)
            for name in ("directory/file", "file")
        )
    assert there.verdict == here.verdict == (ALLOW, "ok", "all")
    assert ("mount_not_read_only" in there.sentence) is noted
    assert here.sentence == "allowed: rule all allows it"


@pytest.mark.root
def test_what_may_not_be_looked_at_is_said_and_not_guessed() -> None:
    with reachable_directory() as directory:
        (directory / "closed").mkdir(mode=0o700)
        (directory / "closed" / "file").write_bytes(b"")
        path = bytes(directory / "closed" / "file")

        def look(where: dict[str, Any]) -> tuple[str, str]:
            rules = read_policy(policy(directory, rule("some", where=where)))
            explanation = explain(rules, ASKER, "open", path, look_as_broker)
            return explanation.verdict.decision, explanation.sentence

        assert in_child(lambda: look({"size": {"max": 1}}), uid=CLIENT_UID) == (
            UNKNOWN,
            "it depends on the file, which could not be looked at: Permission denied",
        )
        decision, sentence = in_child(lambda: look({}), uid=CLIENT_UID)
        assert decision == ALLOW
        assert "whether it is there was not seen: Permission denied" in sentence
        assert look({"size": {"max": 1}})[0] == ALLOW


@pytest.mark.parametrize(
    ("action", "reason"), [("open", "ok"), ("stat", "ok"), ("list", "not_listed"), ("walk", "not_listed")]
)
def test_what_helpers_serve_is_said_to_be_neither_listed_nor_walked(
    tree: Path, action: str, reason: str
) -> None:
    rules = read_policy(
        policy(tree, roots=[{"name": "tree", "path": str(tree), "cross_mounts": False, "opens": "helpers"}])
    )
    path = bytes(tree / ("file" if reason == "ok" else "directory"))
    explanation = explain(rules, ASKER, action, path, look_as_broker)
    assert explanation.verdict == (ALLOW if reason == "ok" else DENY, reason, "all")
    assert ("'opens: helpers'" in explanation.sentence) is (reason != "ok")


@pytest.mark.root
def test_a_file_system_that_does_not_answer_is_said_and_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    roots = [{"name": "tree", "path": str(tmp_path), "cross_mounts": False, "opens": "helpers"}]
    rules = read_policy(policy(tmp_path, roots=roots))
    with fuse_mounted(tmp_path, {"good": b"good", "stuck": b"stuck"}) as server:
        server.never.add((Operation.LOOKUP, "stuck"))
        for name, verdict in (("good", (ALLOW, "ok", "all")), ("stuck", (DENY, "timed_out", "all"))):
            if verdict[0] == DENY:
                monkeypatch.setattr(explain_module, "STEP_SECONDS", 0.2)
            explanation = explain(rules, ASKER, "open", bytes(tmp_path / name), look_as_broker)
            assert explanation.verdict == verdict
            assert ("did not answer within 3 s" in explanation.sentence) == (name == "stuck")
        # Whoever waits for it has no stream of ours, so that a pipe ends all the same.
        [waiting] = children_of(os.getpid())
        directory = f"/proc/{waiting}/fd"
        assert {os.readlink(f"{directory}/{name}") for name in os.listdir(directory)} == {str(tmp_path)}
    os.waitpid(waiting, 0)


def test_root_that_is_not_there_is_said() -> None:
    rules = read_policy(policy("/no/such/directory"))
    seen = look_as_broker(rules.roots[0], b"/no/such/directory/a", "open")
    assert seen.facts is None
    assert "root 'tree' (/no/such/directory) can't be opened" in seen.note


def test_looking_leaves_no_descriptor_behind(tree: Path) -> None:
    rules = read_policy(policy(tree))
    before = os.listdir("/proc/self/fd")
    for name in ("file", "absent", "linked/x"):
        look_as_broker(rules.roots[0], bytes(tree / name), "open")
    assert os.listdir("/proc/self/fd") == before


# ---- who ----


def test_user_is_taken_by_name_or_number() -> None:
    assert client_of_user("root") == client_of_user("0")
    root = client_of_user("root")
    assert root is not None
    assert root.uid == 0
    assert 0 in root.gids
    assert client_of_user("54321") == ClientFacts(54321, frozenset())
    assert client_of_user("no-such-user") is None
    for number in ("4294967295", "9" * 5000):  # what no user can have
        assert client_of_user(number) is None


def test_client_is_in_the_named_control_groups_that_hold_it() -> None:
    named = ["/system.slice/a.service", "/system.slice", "/system.slice/a"]
    rules = read_policy(policy("/", rule("some", clients=[{"cgroups": named}])))
    inside = with_control_group(CLIENT, "/system.slice/a.service/sub", rules).cgroups
    assert inside == {"/system.slice/a.service", "/system.slice"}
    assert with_control_group(CLIENT, "/system.slice", rules).cgroups == {"/system.slice"}
    assert with_control_group(CLIENT, None, rules).cgroups == frozenset()


def test_own_control_group_is_the_one_that_proc_says() -> None:
    with open("/proc/self/cgroup") as file:
        assert f"0::{control_group_of_this_process() or ''}" in file.read()


# ---- the policy ----


def test_compiled_policy_is_read_with_what_is_the_launchers(tmp_path: Path) -> None:
    compiled = tmp_path / "policy.json"
    compiled.write_text(json.dumps({**policy("/srv"), "daemon": {"uid": 1}}))
    loaded = load_for_explaining(str(compiled))
    assert [rule.name for rule in loaded.rules.rules] == ["all"]


def test_policy_file_that_a_broker_would_not_take_is_explained_with_a_note(tmp_path: Path) -> None:
    rules = "rules: [{name: all, allow: open, in: tree, client: any, paths: '**'}]"
    text = f"version: 1\nroots: {{tree: {{path: /}}}}\n{rules}\n"
    file = tmp_path / "policy.yaml"
    file.write_text(text)
    file.chmod(0o666)
    loaded = load_for_explaining(str(file))
    assert [rule.name for rule in loaded.rules.rules] == ["all"]
    assert any("lets others write" in note for note in loaded.notes)


@pytest.mark.parametrize(
    ("name", "text"), [("p.json", "{"), ("p.json", "[]"), ("p.json", "{}"), ("p.yaml", "a")]
)
def test_what_is_no_policy_is_an_error_that_names_the_file(tmp_path: Path, name: str, text: str) -> None:
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(ConfigError, match=name):
        load_for_explaining(str(file))


def test_missing_policy_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_for_explaining(str(tmp_path / "none.yaml"))
