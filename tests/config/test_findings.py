"""Findings of a policy without errors: each is true, has its place, and goes when its cause does."""

# ruff: noqa: E501 - each case is a line

from __future__ import annotations

import copy
import json
import os
import re
import stat
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import example, given, settings

from fdbroker.config import compile_policy
from fdbroker.config.check import check
from fdbroker.config.findings import Finding, find
from fdbroker.config.identities import OfflineLookups
from fdbroker.config.places import Places
from fdbroker.config.surroundings import ThisMachine
from fdbroker.policy.decide import Policy, decide_object
from fdbroker.policy.globs import compile_glob
from fdbroker.policy.rule_index import MANY_PATTERNS
from fdbroker.policy.rules import RuleSet, read_policy
from fdbroker.wire.client import for_broker
from tests.descriptors.mounting import mounted
from tests.hanging.fuse import Operation, fuse_mounted
from tests.policy.decision_cases import CLIENT, FILE, Case, cases, objects
from tests.policy.decision_model import Asker, Facts
from tests.running_broker import CLIENT_UID, policy, rule

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from fdbroker.policy.globs import Glob

HEAD = "version: 1\nroots: {home: {path: /home}, mail: {path: /home/mail}}\nrules:\n"
ALLOW = "  - {name: a, allow: [open, stat], client: {user: u}, in: home, paths: [%s]}\n"


class FakeMachine:
    """A machine on which group 7 is empty, user 5 is in no group, and /nfs is mounted from elsewhere."""

    def has_members(self, gid: int) -> bool:
        return gid != 7

    def is_in(self, uid: int, gids: frozenset[int]) -> bool:
        return uid != 5

    def network_filesystem(self, path: bytes) -> str | None:
        return "nfs4" if path.startswith(b"/nfs") else None

    def unserved_filesystem(self, path: bytes) -> str | None:
        return "0x4d44" if path == b"/usb" else None

    def writers(
        self, root: bytes, glob: Glob, leaving_out: Sequence[tuple[bytes, Glob]]
    ) -> tuple[bytes, str] | None:
        return (b"/srv/in", "everybody") if root == b"/srv" else None


def findings_of(text: str, *, machine: bool = True) -> list[Finding]:
    rules = read_policy(for_broker(compile_policy(text.encode(), "f", OfflineLookups())))
    places = Places("f")
    places.add(text.encode(), "f")
    return find(rules, places, FakeMachine() if machine else None)


def kinds_of(rules: str, head: str = HEAD) -> list[tuple[str, int, str | None]]:
    """Return the kind of each finding with its line among the rules and its rule."""
    start = head.count("\n")
    return [
        (found.kind, found.place.mark.line - start if found.place.mark else 0, found.rule)
        for found in findings_of(head + rules)
    ]


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        (ALLOW % '"**"', []),
        (ALLOW % '"x/**"' + "  - {name: d, deny: [open, stat], in: home, paths: '**'}\n", ["hidden-by-deny"]),
        (ALLOW % '"x/**"' + "  - {name: d, deny: open, in: home, paths: '*/**'}\n", ["hidden-by-deny"]),
        (ALLOW % '"**"' + "  - {name: d, deny: open, in: home, paths: '*/**'}\n", []),
        (ALLOW % '"x/*", y' + "  - {name: d, deny: [open, stat], in: home, paths: 'x/**'}\n", ["hidden-by-deny"]),
        # A deny rule that is about fewer: other clients, files with something, all but some.
        (ALLOW % "x" + "  - {name: d, deny: [open, stat], client: {user: v}, in: home, paths: x}\n", []),
        (ALLOW % "x" + "  - {name: d, deny: [open, stat], client: {user: [u, v]}, in: home, paths: x}\n", ["hidden-by-deny"]),
        (ALLOW % "x" + "  - {name: d, deny: [open, stat], client: {user: u, group: g}, in: home, paths: x}\n", []),
        (ALLOW % "x" + "  - {name: d, deny: [open, stat], in: home, paths: x, where: {size: {max: 1}}}\n", []),
        (ALLOW % "x" + "  - {name: d, deny: [open, stat], in: home, paths: x, on_behalf_of: any}\nlisteners: {s: {service: {user: v}}}\n", []),
        (ALLOW % "x" + "  - {name: d, deny: [open, stat], in: home, paths: '*', except: x}\n", []),
        (ALLOW % "x" + "  - {name: d, deny: [open, stat], in: home, paths: '*', except: y}\n", ["hidden-by-deny"]),
        # Several together.
        (ALLOW % '"*/x", y' + "  - {name: d, deny: [open, stat], in: home, paths: y}\n  - {name: e, deny: [open, stat], in: home, paths: '**/x'}\n", ["hidden-by-deny"]),
        # The outer root's deny rules hold inside.
        ("  - {name: a, allow: open, client: {user: u}, in: mail, paths: x}\n  - {name: d, deny: open, in: home, paths: 'mail/**'}\n", ["hidden-by-deny"]),
        (ALLOW % '"mail/x"', ["never-matches"]),
        (ALLOW % '"mail/x", y', ["never-matches"]),
        (ALLOW % '"**"' + "  - {name: b, allow: open, client: {user: u}, in: home, paths: 'x/*', except: '**'}\n", ["never-matches"]),
        ("  - {name: b, allow: open, client: {user: u}, in: home, paths: ['x/*', y], except: 'x/**'}\n", ["never-matches"]),
        ("  - {name: b, allow: open, client: {user: u}, in: home, paths: 'x/*', except: 'z/**'}\n", ["excepts-nothing"]),
        ("  - {name: b, allow: open, client: {user: u}, on_behalf_of: any, in: home, paths: 'x/*'}\n", ["never-matches"]),
        ("  - {name: b, allow: open, client: {user: u}, in: home, paths: x, where: {filesystem: [nfs, cifs]}}\n", ["never-matches"]),
        ("  - {name: b, allow: open, client: {user: u}, in: home, paths: x, where: {filesystem: [nfs, ext4]}}\n", []),
        ("  - {name: b, allow: open, client: any, in: home, paths: '**'}\n", ["anybody"]),
        ("  - {name: b, allow: open, client: any, in: home, paths: '*/*'}\n", ["anybody"]),
        ("  - {name: b, allow: open, client: any, in: home, paths: 'pub/**'}\n", []),
        ("  - {name: b, allow: stat, client: any, in: home, paths: '**'}\n", []),
        ("  - {name: b, allow: open, client: any, in: home, paths: '**', where: {owner: client}}\n", []),
        ("  - {name: b, allow: open, client: any, in: home, paths: '**', where: {mode: {all: '0004'}}}\n", []),
        ("  - {name: b, allow: open, client: {user: s}, on_behalf_of: any, in: home, paths: '**'}\nlisteners: {s: {service: {user: s}}}\n", ["anybody"]),
        ("  - {name: b, allow: open, client: {group: '7'}, in: home, paths: x}\n", ["no-members"]),
        ("  - {name: b, allow: open, client: {group: ['7', '8']}, in: home, paths: x}\n", []),
        ("  - {name: b, deny: open, client: {user: '5', group: '8'}, in: home, paths: x}\n", ["no-members"]),
        ("  - {name: b, deny: open, client: {user: ['5', '6'], group: '8'}, in: home, paths: x}\n", []),
        ("  - {name: b, allow: open, client: {user: u}, in: home, paths: '**/x'}\n", []),
        ("  []\nread_only_view: off\n", ["weak-mode"]),
        ("  []\naudit: {on_failure: allow}\n", ["weak-mode"]),
    ],
)  # fmt: skip
def test_each_kind_is_found_and_nothing_else(rules: str, expected: list[str]) -> None:
    assert [kind for kind, _, _ in kinds_of(rules)] == expected


@pytest.mark.unmeasured
@pytest.mark.parametrize(
    ("glob", "found"),
    [
        ("*x%d*/**", True),
        ("**/a/?%d*", True),
        ("a/*%d[yz]/b", True),
        ("a%d*", False),
        ("*/x%d/**", False),
        ("**/x%d", False),
        ("**/*.%d", False),
        ("d%d/*x*", False),
    ],
)
@pytest.mark.parametrize("in_one_rule", [False, True])
def test_many_patterns_that_are_tried_on_one_name_are_told_once(
    glob: str,
    found: bool,  # noqa: FBT001
    in_one_rule: bool,  # noqa: FBT001
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # One case by as many as are many in truth; what a glob's form and the rules' number do shows with fewer.
    most = 200 if (glob, in_one_rule) == ("*x%d*/**", False) else 20
    assert MANY_PATTERNS == 200
    monkeypatch.setattr("fdbroker.config.findings.MANY_PATTERNS", most)

    def kinds(count: int) -> list[tuple[str, int, str | None]]:
        globs = ", ".join(f"'{glob % n}'" for n in range(1000, 1000 + count))
        each = [globs] if in_one_rule else globs.split(", ")
        return kinds_of(
            "".join(
                f"  - {{name: r{at}, deny: [open, stat], in: home, paths: [{paths}]}}\n"
                for at, paths in enumerate(each)
            )
        )

    assert kinds(most) == []
    assert kinds(most + 1) == ([("many-patterns", 1, "r0")] if found else [])


@pytest.mark.unmeasured
def test_patterns_are_not_many_where_each_is_about_another_client_or_they_are_one() -> None:
    rule_of = "  - {{name: r{0}, allow: open, client: {{user: u{1}}}, in: home, paths: '*x{2}*/**'}}\n"
    assert kinds_of("".join(rule_of.format(n, n, n) for n in range(250))) == []
    assert kinds_of("".join(rule_of.format(n, 1, 1) for n in range(250))) == []
    [(kind, _, _)] = kinds_of("".join(rule_of.format(n, 1, n) for n in range(250)))
    assert kind == "many-patterns"


def test_place_is_that_of_what_is_meant() -> None:
    text = (
        HEAD
        + "  - name: deny\n    deny: open\n    in: home\n    paths: ['*/keys/**']\n"
        + "  - name: allow\n    allow: open\n    client: {user: u}\n    in: home\n    paths: [x, a/keys/b]\n"
    )
    [found] = findings_of(text)
    assert str(found) == (
        "f:12:16: warning: rule 'allow': paths: all that 'a/keys/b' matches is denied by rule 'deny'; remove"
        " what is allowed in vain, or narrow the deny rule ('except', 'client') [hidden-by-deny]"
    )


def test_names_that_are_only_known_elsewhere_are_not_taken_for_each_other() -> None:
    rules = ALLOW % "x" + "  - {name: d, deny: [open, stat], client: {user: v}, in: home, paths: x}\n"
    assert findings_of(HEAD + rules, machine=False) == []


ROOTS = "version: 1\nroots: {n: {path: /nfs%s}, s: {path: /srv}, u: {path: /usb}}\nrules:\n"


def test_roots_are_looked_at_where_they_are() -> None:
    rule = "  - {name: b, allow: open, client: {user: u}, in: %s, paths: '*'%s}\n"
    kinds = [(found.kind, found.root or found.rule) for found in findings_of(ROOTS % "" + rule % ("s", ""))]
    assert kinds == [("network-filesystem", "n"), ("not-served", "u"), ("hard-links", "b")]
    helped = ROOTS % ", opens: helpers"
    for where in ("{links: {max: 1}}", "{owner: client}"):
        found = findings_of(helped + rule % ("s", f", where: {where}"))
        assert [each.kind for each in found] == ["not-served"]
    found = findings_of(helped + rule % ("s", ", where: {links: {max: 2}}"))
    assert [each.kind for each in found] == ["not-served", "hard-links"]
    found = findings_of(helped + rule % ("n", ", where: {links: {max: 1}}"))
    assert [each.kind for each in found] == ["not-served", "never-matches"]
    listing = helped + "  - {name: b, allow: [list, walk], client: {user: u}, in: n, paths: '*'}\n"
    assert [each.kind for each in findings_of(listing)] == ["not-served", "never-matches"]


def test_so_many_rules_that_comparing_takes_long_are_not_all_compared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fdbroker.config.findings._MOST_COMPARED", 20)
    rules = "".join(f"  - {{name: d{n}, deny: open, in: home, paths: '*/x{n}'}}\n" for n in range(30))
    assert [kind for kind, _, _ in kinds_of(rules + ALLOW % "x")] == ["not-compared"]


# ---- true of every policy ----

SAYS_WHOLE = re.compile(r"rule '([^']*)' (?:can never match: |allows nothing: )")
SAYS_ACTIONS = re.compile(r"rule '([^']*)' allows no ([a-z ]+): ")
SAYS_GLOB = re.compile(
    r"rule '([^']*)': paths: (?:all that )?'([^']*)' (?:can never match|matches is denied by)"
)
SAYS_PART = re.compile(r"rule '([^']*)': paths: all that '([^']*)' matches is denied for ([a-z, ]+) by")


def without_what_is_said(document: dict[str, Any], message: str) -> dict[str, Any] | None:
    """Return the policy without what a finding says to be of no use; None if it says no such thing."""
    changed = copy.deepcopy(document)
    by_name = {rule["name"]: rule for rule in changed["rules"]}
    if match := SAYS_WHOLE.match(message):
        changed["rules"].remove(by_name[match[1]])
    elif match := SAYS_ACTIONS.match(message):
        rule = by_name[match[1]]
        rule["actions"] = [action for action in rule["actions"] if action not in match[2].split(" and no ")]
    elif match := SAYS_PART.match(message):
        rule = by_name[match[1]]
        lost = match[3].split(", ")
        rest = {**rule, "actions": lost, "paths": [glob for glob in rule["paths"] if glob != match[2]]}
        rule["actions"] = [action for action in rule["actions"] if action not in lost]
        if rest["paths"]:
            changed["rules"].append({**rest, "name": "rest"})
    elif match := SAYS_GLOB.match(message):
        rule = by_name[match[1]]
        rule["paths"] = [glob for glob in rule["paths"] if glob != match[2]]
        if not rule["paths"]:
            changed["rules"].remove(rule)
    else:
        return None
    return changed


@pytest.fixture
def reached() -> set[str]:
    """Return a set for what the examples come to."""
    return set()


@pytest.mark.unmeasured
def test_what_is_said_to_be_of_no_use_changes_no_decision_when_it_goes(reached: set[str]) -> None:
    def answers(rules: RuleSet, case: Case, found: list[Facts]) -> list[bool]:
        client, acted_for = case.asker
        view = Policy(rules).view(client, acted_for)
        uids = client.uid, None if acted_for is None else acted_for.uid
        decisions = [view.actions[action].decide(path.encode()) for action in actions for path in case.paths]
        return [
            name.allowed and decide_object(name, facts, *uids, facts.around).allowed
            for name in decisions
            for facts in found
        ]

    actions = ("stat", "list", "walk", "open", "copy")

    hidden = policy("/", rule("one", paths=["a/*"]), rule("never", effect="deny", paths=["a/**"]))

    @settings(max_examples=150, deadline=None)
    @given(cases(), objects)
    # A rule that is hidden as a whole is rarely drawn.
    @example(Case(hidden, Asker(CLIENT), "open", ["/a/b", "/a/b/c", "/b"]), [Facts(FILE)])
    def check(case: Case, found: list[Facts]) -> None:
        service = {"name": "s", "clients": [{"uids": [1]}]}
        document = case.document | {"services": [service]}
        rules = read_policy(document)
        # The others `open` refuses whatever the rules say.
        regular = [facts for facts in found if stat.S_ISREG(facts.st_mode)]
        before: list[bool] = []
        for finding in find(rules, Places("f"), None):
            changed = without_what_is_said(document, finding.message)
            if changed is None:
                reached.add(finding.kind)
                continue
            reached.add(f"{finding.kind} {SAYS_WHOLE.match(finding.message) is not None}")
            before = before or answers(rules, case, regular)
            assert before == answers(read_policy(changed), case, regular)

    check()
    assert {
        "hidden-by-deny True",
        "hidden-by-deny False",
        "never-matches True",
        "never-matches False",
    } <= reached


# ---- this machine ----


def test_directory_that_others_write_to_is_found_where_names_may_match(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir(mode=0o700)
    (tmp_path / "in").mkdir()
    (tmp_path / "in").chmod(0o1777)
    machine, root = ThisMachine(), bytes(tmp_path)

    def found(glob: str, *leaving_out: str) -> tuple[bytes, str] | None:
        out = [(root, compile_glob(each.encode())) for each in leaving_out]
        return machine.writers(root, compile_glob(glob.encode()), out)

    there = (bytes(tmp_path / "in"), "everybody")
    assert found("**") == found("*/*.x") == found("in/*") == found("in/a") == there
    assert found("*") is None
    assert found("own/**") is None
    assert found("none/**") is None
    assert found("**", "in/**") is None
    assert found("**", "in/*.x") == there


@pytest.mark.root
def test_owner_and_group_of_a_directory_are_told(tmp_path: Path) -> None:
    machine, root = ThisMachine(), bytes(tmp_path)
    os.chown(tmp_path, CLIENT_UID, 0)
    assert machine.writers(root, compile_glob(b"*"), ()) == (root, f"user {CLIENT_UID}")
    os.chown(tmp_path, 0, CLIENT_UID)
    tmp_path.chmod(0o775)
    assert machine.writers(root, compile_glob(b"*"), ()) == (root, f"group {CLIENT_UID}")


@pytest.mark.root
def test_mounts_are_told_apart_without_asking_them(tmp_path: Path) -> None:
    (tmp_path / "a b").mkdir()
    with mounted("tmpfs", tmp_path / "a b"):
        machine = ThisMachine()
        assert machine.network_filesystem(bytes(tmp_path / "a b")) is None
        assert machine.unserved_filesystem(bytes(tmp_path / "a b")) is None
        assert any(mount.point == bytes(tmp_path / "a b") for mount in machine._mounts)
    assert ThisMachine().unserved_filesystem(b"/proc") == "0x9fa0"
    assert ThisMachine().unserved_filesystem(b"/nowhere") is None


@pytest.mark.root
def test_mount_whose_files_others_answer_for_is_known_by_its_type_whatever_its_name(tmp_path: Path) -> None:
    for name in (
        "plain",
        "with a blank",
        "with\na line's end",
        "with\ra carriage return",
        "with \\ and \xff",
    ):
        (tmp_path / name).mkdir()
        with fuse_mounted(tmp_path / name, {}) as server:
            machine = ThisMachine()
            there = bytes(tmp_path / name)
            assert machine.network_filesystem(there) == "fuse"
            assert machine.network_filesystem(there + b"/below") == "fuse"
            assert machine.network_filesystem(there + b"beside") is None
            assert server.asked(Operation.GETATTR, "") == 0


def test_groups_without_members_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = ThisMachine()
    assert machine.has_members(0)
    assert not machine.has_members(54321)
    assert machine.is_in(0, frozenset({0}))
    assert not machine.is_in(0, frozenset({54321}))
    assert machine.is_in(54321, frozenset({0}))


# ---- the command ----


def test_warnings_are_told_and_only_strictness_makes_them_fail(tmp_path: Path) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text(
        HEAD.replace("/home/mail", "/mnt")
        + "  - {name: b, allow: open, client: any, in: home, paths: '**', where: {links: {max: 1}}}\n"
    )
    checked = check(str(file), dev=True, offline=True)
    assert checked.summary() == f"{file}: 2 roots, 1 rule, 1 warning\n"
    assert checked.told().startswith(f"{file}:4:28: warning: rule 'b' lets every process")
    assert (checked.status(strict=False), checked.status(strict=True)) == (0, 1)
    [found] = json.loads(checked.document())["findings"]
    assert (found["severity"], found["kind"], found["line"], found["rule"]) == ("warning", "anybody", 4, "b")
    ignoring = check(str(file), dev=True, offline=True, ignored=["anybody"])
    assert ignoring.summary().endswith("2 roots, 1 rule, no problems\n")
    file.write_text("version: 2\n")
    broken = check(str(file), dev=True)
    assert (broken.status(strict=True), broken.summary()) == (2, "")
    [error] = json.loads(broken.document())["findings"]
    assert (error["severity"], error["kind"], error["line"]) == ("error", None, 1)
