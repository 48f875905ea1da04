"""Tables of expectations: read strictly, decided by the policy's own code, and told apart from what is not so."""

# ruff: noqa: E501 - each case is a line

from __future__ import annotations

import itertools
import stat
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest
import yaml
from hypothesis import given, settings

from fdbroker.config import ConfigError, compile_policy
from fdbroker.config.errors import Mark
from fdbroker.config.expectations import Case, DescribedObject, Outcome, read_cases, read_table, run
from fdbroker.config.explain import Asker, FactNotGivenError, Seen
from fdbroker.policy.decide import Policy, decide_object
from fdbroker.policy.rules import ClientFacts, RuleSet, read_policy
from fdbroker.wire.client import for_broker
from tests.policy.decision_cases import Case as DecisionCase
from tests.policy.decision_cases import aimed, cases, objects
from tests.policy.decision_model import NOW, SECOND

if TYPE_CHECKING:
    from fdbroker.policy.rules import Surroundings
    from tests.policy.decision_model import Facts

EXAMPLES = Path(__file__).resolve().parents[2] / "config" / "examples"
POLICY = """\
version: 1
roots: {home: {path: /home}, far: {path: /far, opens: helpers}}
rules:
  - {name: keys, deny: [open, stat], in: home, paths: "*/.ssh/**"}
  - {name: own, allow: [open, stat, list], client: {group: users}, in: home, paths: "**", where: {owner: client}}
  - {name: public, allow: [open, list, walk], client: any, in: home, paths: "pub/**"}
  - {name: small, allow: open, client: {user: s, unit: s.service}, in: home, paths: "**",
     where: {size: {max: 1KiB}, mode: {all: "0400"}, group: users, links: {max: 1}}}
  - {name: acting, allow: open, client: {user: s}, on_behalf_of: {user: alice}, in: home, paths: "**",
     where: {owner: on_behalf_of}}
  - {name: far, allow: [open, list], client: any, in: far, paths: "**"}
  - {name: old, allow: stat, client: {user: old}, in: home, paths: "**", where: {age: {min: 1h}, filesystem: xfs}}
  - {name: labelled, allow: list, client: {label: x_t}, in: home, paths: "**"}
listeners: {s: {service: {user: s}}}
"""


def outcomes(rows: str, head: str = "version: 1\n", policy: str = POLICY) -> list[Outcome]:
    found, rules = cases_of(f"{head}tests:\n{rows}", policy)
    return list(run(found, rules))


def cases_of(text: str, policy: str = POLICY) -> tuple[list[Case], RuleSet]:
    table = read_table(text.encode(), "t")
    rules = read_policy(for_broker(compile_policy(policy.encode(), "p", table.names)))
    return read_cases(table, rules, table.names), rules


def problem(row: str, head: str = "version: 1\n") -> str:
    [outcome] = outcomes(f"  - {row}\n", head)
    return outcome.problem


ALICE = "as: {user: alice, groups: [users]}"


@pytest.mark.parametrize(
    "row",
    [
        f"{{{ALICE}, path: /home/a, object: {{owner: alice}}, expect: allowed, rule: own, reason: ok}}",
        f"{{{ALICE}, path: /home/a, object: {{owner: bob}}, expect: denied, reason: where_owner}}",
        f"{{{ALICE}, path: /home/a/.ssh/id, expect: denied, rule: keys, reason: deny_rule}}",
        f"{{{ALICE}, path: /home/a, object: {{owner: alice, type: directory}}, expect: denied, reason: is_directory}}",
        f"{{{ALICE}, path: /home/a, object: {{owner: alice, type: symlink}}, expect: denied, reason: symlink}}",
        f"{{{ALICE}, path: /home/a, object: {{owner: alice, type: fifo}}, expect: denied, reason: not_regular}}",
        f"{{{ALICE}, path: /home/a, object: {{type: missing}}, expect: denied, reason: not_found}}",
        f"{{{ALICE}, path: /home/a, object: {{owner: alice}}, action: list, expect: allowed}}",
        f"{{{ALICE}, path: /home/a, object: {{owner: alice, type: file}}, action: list, expect: denied}}",
        "{as: alice, path: /home/a, expect: denied, reason: no_rule}",
        "{as: bob, path: /home/pub/x, expect: allowed, rule: public}",
        "{as: '1000', path: /home/pub, action: list, expect: allowed}",
        "{as: bob, path: /etc/shadow, expect: denied, reason: outside_roots}",
        "{as: bob, path: /far/x, expect: allowed}",
        "{as: bob, path: /far, action: list, expect: denied, reason: not_listed}",
        "{as: s, on_behalf_of: alice, path: /home/x, object: {owner: alice}, expect: allowed, rule: acting}",
        "{as: s, on_behalf_of: alice, path: /home/x, object: {owner: bob}, expect: denied}",
        "{as: s, on_behalf_of: bob, path: /home/x, object: {owner: bob}, expect: denied, reason: no_rule}",
        "{as: {user: s, unit: s.service}, path: /home/x, expect: allowed, rule: small, object: {size: 1KiB, mode: '0440', group: users, links: 1, owner: x}}",
        "{as: {user: s, cgroup: /system.slice/s.service/x}, path: /home/x, expect: denied, reason: where_size, object: {size: 1025, mode: '0440', group: users, links: 1}}",
        "{as: {user: s, unit: t.service}, path: /home/x, expect: denied, reason: no_rule}",
        "{as: {user: bob, label: x_t}, path: /home/x, action: list, expect: allowed, rule: labelled}",
        "{as: {user: bob, label: y_t}, path: /home/x, action: list, expect: denied, reason: no_rule}",
        "{as: old, path: /home/x, action: stat, object: {age: 2h, filesystem: xfs}, expect: allowed, rule: old}",
        "{as: old, path: /home/x, action: stat, object: {age: 5s, filesystem: xfs}, expect: denied, reason: where_age}",
        "{as: old, path: /home/x, action: stat, object: {age: 2h, filesystem: ext4}, expect: denied, reason: where_filesystem}",
    ],
)  # fmt: skip
def test_what_the_policy_does_is_as_expected(row: str) -> None:
    assert problem(row) == ""


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{as: bob, path: /home/pub/x, expect: denied}", "expected to be denied, and is allowed"),
        ("{as: bob, path: /home/x, expect: allowed}", "expected to be allowed, and is denied"),
        ("{as: bob, path: /home/pub/x, expect: allowed, rule: own}", "allowed as expected, but by rule 'public', not by rule 'own'"),
        ("{as: bob, path: /home/x, expect: denied, rule: keys}", "denied as expected, but by no rule, not by rule 'keys'"),
        ("{as: bob, path: /home/x, expect: denied, reason: deny_rule}", "denied as expected, but because of no_rule, not of deny_rule"),
        ("{as: old, path: /home/x, action: stat, object: {age: 2h}, expect: denied}", "a rule asks about the file: add 'object: {filesystem: ...}'"),
        ("{as: old, path: /home/x, action: stat, object: {filesystem: xfs}, expect: denied}", "a rule asks about the file: add 'object: {age: ...}'"),
        (f"{{{ALICE}, path: /home/x, expect: denied}}", "a rule asks about the file: add 'object: {owner: ...}'"),
        ("{as: {user: s, unit: s.service}, path: /home/x, object: {group: users}, expect: denied}", "a rule asks about the file: add 'object: {mode: ...}'"),
        ("{as: {user: s, unit: s.service}, path: /home/x, object: {group: users, mode: '0400'}, expect: denied}", "a rule asks about the file: add 'object: {size: ...}'"),
    ],
)  # fmt: skip
def test_what_is_not_as_expected_is_told(row: str, said: str) -> None:
    assert problem(row) == said


def test_numbers_of_names_are_those_of_the_table() -> None:
    row = "{as: '7', path: /home/x, object: {owner: '7'}, expect: allowed, rule: acting, on_behalf_of: '7'}"
    assert "denied" in problem(row)
    assert problem(row, "version: 1\nusers: {s: 7, alice: 7}\n") == ""


def test_row_with_several_paths_and_actions_is_a_case_for_each() -> None:
    found = outcomes(
        "  - {name: n, as: bob, action: [open, walk], path: [/home/pub/x, /home/pub/y], expect: allowed}\n"
    )
    assert [outcome.case.title for outcome in found] == [
        f"n: bob {action} {path}" for action in ("open", "walk") for path in ("/home/pub/x", "/home/pub/y")
    ]
    assert not any(outcome.problem for outcome in found)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("version: 2\ntests: []\n", "t:1:10: version 2 of tables is not known; write 'version: 1'"),
        ("version: 1\n", "t:1:1: key 'tests' is missing; add 'tests: ...'"),
        ("version: 1\nusers: {a: no}\ntests: []\n", "t:2:12: users: 'a': 'no' is no number of a user or group; write decimal digits"),
        ("version: 1\ntests: [{as: a, path: /x}]\n", "t:2:9: test 1: key 'expect' is missing; add 'expect: ...'"),
        ("version: 1\ntests: [{as: a, path: /x, expect: allow}]\n", "t:2:35: test 1: expect: 'allow' is not a choice here; did you mean 'allowed'?"),
        ("version: 1\ntests: [{as: a, path: x, expect: denied}]\n", "t:2:23: path: 'x' is not absolute; write an absolute path, as in /var/mail"),
        ("version: 1\ntests: [{as: a, path: /x, expect: denied, rule: ow}]\n", "t:2:49: test 1: rule: 'ow' is not known; did you mean 'own'?"),
        ("version: 1\ntests: [{as: a, path: /x, expect: denied, reason: no_rul}]\n", "t:2:51: test 1: reason: 'no_rul' is not known; did you mean 'no_rule'?"),
        ("version: 1\ntests: [{as: {user: a, unit: x}, path: /x, expect: denied}]\n", "t:2:30: test 1: as: unit: 'x' is not the name of a service or scope; write 'x.service'"),
        ("version: 1\ntests: [{as: {group: a}, path: /x, expect: denied}]\n", "t:2:15: test 1: as: unknown key 'group'; did you mean 'groups'?"),
        ("version: 1\ntests: [{as: a, path: /x, object: {mode: 640}, expect: denied}]\n", "t:2:42: test 1: object: mode: '640' is not a file mode; write octal digits that begin with 0, as in \"0640\" or \"02000\""),
        ("version: 1\ntests: [{as: a, path: /x, object: {type: missing, size: 1}, expect: denied}]\n", "t:2:35: test 1: object: of what is missing there is nothing to say; leave the rest out"),
        ("version: 1\ntests: [{as: &a a, path: /x, expect: denied}]\n", "t:2:14: anchors are not allowed, and '&' begins one: '&a'; remove it, or put the whole value in quotes"),
    ],
)  # fmt: skip
def test_table_is_read_strictly(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        cases_of(text)
    assert said in [str(each) for each in caught.value.problems]


@pytest.mark.unmeasured
def test_outcome_is_that_of_the_policys_own_decision() -> None:
    reached = set()

    @settings(max_examples=60, deadline=None)
    @given(cases(), objects)
    def check(case: DecisionCase, found: list[Facts]) -> None:
        rules = read_policy(case.document)
        asker = Asker(case.asker.client, case.asker.on_behalf_of)
        view = Policy(rules).view(*asker).actions[case.action]
        for path, facts in itertools.product(case.paths, aimed(case, found)[:3]):
            name = view.decide(path.encode())
            allowed = name.allowed and decide_object(name, facts, *asker.uids, facts.around).allowed
            described = DescribedObject(
                stat.S_IFMT(facts.st_mode),
                {
                    "owner": facts.st_uid,
                    "group": facts.st_gid,
                    "mode": stat.S_IMODE(facts.st_mode),
                    "size": facts.st_size,
                    "links": facts.st_nlink,
                    "age": (NOW - facts.st_mtime_ns) // SECOND,
                    "filesystem": facts.filesystem,
                },
            )
            seen = Seen(described, surroundings=cast("Surroundings", described))
            row = Case(Mark(1, 1, "t"), "", asker, case.action, path.encode(), seen, allowed, None, None)
            [outcome] = run([row], rules)
            assert outcome.problem == ""
            reached.add(allowed)

    check()
    assert reached == {True, False}


def test_fact_that_nobody_gave_is_an_error_and_no_zero() -> None:
    described = DescribedObject(stat.S_IFREG, {"size": 1})
    assert (described.st_size, stat.S_ISREG(described.st_mode)) == (1, True)
    assert described.st_mode & 0 == 0
    for field, key in (("st_uid", "owner"), ("st_gid", "group"), ("st_nlink", "links")):
        with pytest.raises(FactNotGivenError, match=key):
            getattr(described, field)
    with pytest.raises(FactNotGivenError, match="mode"):
        _ = described.st_mode & 0o400


def documents() -> list[Path]:
    return sorted((EXAMPLES / "expectations").glob("*.yaml"))


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.stem)
def test_example_is_as_expected_and_each_of_its_rules_is_tested(path: Path) -> None:
    table = read_table(path.read_bytes(), str(path))
    assert table.policy_path is not None
    policy = Path(table.policy_path)
    rules = read_policy(for_broker(compile_policy(policy.read_bytes(), str(policy), table.names)))
    found = list(run(read_cases(table, rules, table.names), rules))
    assert [outcome.problem for outcome in found if outcome.problem] == []
    spoken = {outcome.judged.verdict.rule for outcome in found if outcome.judged is not None}
    assert {rule.name for rule in rules.rules} <= spoken


def test_every_example_has_its_expectations() -> None:
    assert [path.name for path in documents()] == sorted(path.name for path in EXAMPLES.glob("*.yaml"))
    assert all(isinstance(yaml.safe_load(path.read_text()), dict) for path in documents())


def test_whoever_is_not_named_is_nobody() -> None:
    [outcome] = outcomes("  - {as: zz, path: /home/pub/x, expect: allowed}\n")
    assert outcome.case.asker.client.uid < 0
    assert outcome.case.asker == Asker(ClientFacts(outcome.case.asker.client.uid, frozenset()))
