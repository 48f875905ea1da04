"""`fdbroker policy test`."""

from __future__ import annotations

import collections
from typing import TYPE_CHECKING, NamedTuple

import click

from fdbroker.cli.explanation import lines_of_rules
from fdbroker.cli.failure import Failure
from fdbroker.cli.output import coloured, path_members, write_json, write_line
from fdbroker.cli.policy_file import problems_as_failure, readable
from fdbroker.config.names import counted, printable
from fdbroker.config.sources import MAX_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fdbroker.config.expectations import Outcome
    from fdbroker.config.identities import Lookups
    from fdbroker.policy.rules import RuleSet

EXIT_FAILED = 1
_CURE = "check the path and who runs this"


class _Ran(NamedTuple):
    """A table with its policy and what came of it."""

    table: str
    policy: str
    rules: RuleSet
    outcomes: Sequence[Outcome]

    @property
    def failed(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.problem]

    @property
    def untested(self) -> list[str]:
        """The rules that no outcome is owed to."""
        spoken = {outcome.judged.verdict.rule for outcome in self.outcomes if outcome.judged is not None}
        return [rule.name for rule in self.rules.rules if rule.name not in spoken]


@click.command("test", short_help="Compare a policy with a table of what is expected of it.")
@click.argument("tables", nargs=-1, required=True, metavar="TABLE...")
@click.option(
    "--policy", "policy_path", metavar="FILE", help="The policy file.  [default: the one that TABLE names]"
)
@click.option(
    "--here",
    is_flag=True,
    help="Names are this machine's users and groups. Without it nobody of them need exist.",
)
@click.option("--tap", is_flag=True, help="Write the results as TAP version 14.")
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object (see docs/policy-tools.md).")
@click.option("-v", "--verbose", is_flag=True, help="Show also what is as expected, and every rule.")
def command(
    tables: tuple[str, ...], policy_path: str | None, *, here: bool, tap: bool, as_json: bool, verbose: bool
) -> int:
    """Compare a policy with tables of what is expected of it: who is to be allowed what, and who is not.

    Neither users nor files need exist, and nothing is changed, so that it runs
    wherever the policy is written. docs/policy-tools.md says how a table is
    written.

    \b
    Exit status: 0  all is as expected
                 1  something is not
                 2  the table or the policy has problems, or wrong use

    \b
    Examples:  fdbroker policy test expectations.yaml
               fdbroker policy test --policy draft.yaml --tap expectations/*.yaml
    """  # noqa: D301 - \b is click's mark for a paragraph that keeps its lines
    if tap and as_json:
        raise click.UsageError("--tap and --json are two formats: give one of them")
    ran = [_run(table, policy_path, here=here) for table in tables]
    if as_json:
        _write_json(ran)
    elif tap:
        _write_tap(ran)
    else:
        _write_text(ran, verbose=verbose)
    return EXIT_FAILED if any(each.failed for each in ran) else 0


def _run(table: str, policy_path: str | None, *, here: bool) -> _Ran:
    from fdbroker.config import SystemLookups, expectations  # noqa: PLC0415 - another extra

    with problems_as_failure():
        tests = expectations.read_table(_read(table), table)
        policy = policy_path or tests.policy_path
        if policy is None:
            text = f"{printable(table)}: names no policy; add 'policy: FILE', or give --policy FILE"
            raise Failure(text)
        names = SystemLookups() if here else tests.names
        rules = _rules(policy, names)
        cases = expectations.read_cases(tests, rules, names)
    return _Ran(table, policy, rules, list(expectations.run(cases, rules)))


def _rules(path: str, names: Lookups) -> RuleSet:
    from fdbroker.config.explain import load_for_explaining  # noqa: PLC0415 - another extra

    with readable(path, _CURE):
        return load_for_explaining(path, names).rules


def _read(path: str) -> bytes:
    with readable(path, _CURE), open(path, "rb") as file:
        return file.read(MAX_BYTES + 1)  # so that a longer one is refused as such


# ---- for people ----


def _write_text(ran: Sequence[_Ran], *, verbose: bool) -> None:
    for each in ran:
        for outcome in each.outcomes:
            title = printable(outcome.case.title)
            if not outcome.problem:
                if verbose:
                    write_line(f"{coloured('ok', 'green')}    {title}")
                continue
            write_line(f"{coloured('FAIL', 'red')}  {title}")
            write_line(f"  {outcome.case.mark}: {printable(outcome.problem)}")
            for line in _why(outcome, each.rules, verbose=verbose):
                write_line(f"  {line}".rstrip())
            write_line("")
        if verbose and each.untested:
            names = ", ".join(map(printable, each.untested))
            write_line(f"{printable(each.policy)}: no test is decided by {names}")
    count = collections.Counter(bool(outcome.problem) for each in ran for outcome in each.outcomes)
    colour = "red" if count[True] else "green"
    write_line(coloured(f"{counted(count.total(), 'test')}, {count[True]} failed", colour))


def _why(outcome: Outcome, rules: RuleSet, *, verbose: bool) -> list[str]:
    explanation = outcome.explanation(rules)
    return [] if explanation is None else lines_of_rules(explanation, verbose=verbose, few=0)


# ---- for programs ----


def _write_tap(ran: Sequence[_Ran]) -> None:
    outcomes = [(each, outcome) for each in ran for outcome in each.outcomes]
    write_line("TAP version 14")
    write_line(f"1..{len(outcomes)}")
    for number, (each, outcome) in enumerate(outcomes, 1):
        # A "#" would begin a directive.
        title = printable(outcome.case.title).replace("\\", "\\\\").replace("#", "\\#")
        write_line(f"{'not ok' if outcome.problem else 'ok'} {number} - {title}")
        if outcome.problem:
            write_line(f"# {outcome.case.mark}: {printable(outcome.problem)}")
            for line in _why(outcome, each.rules, verbose=False):
                write_line(f"# {click.unstyle(line)}".rstrip())


def _write_json(ran: Sequence[_Ran]) -> None:
    rows = [_members(each, outcome) for each in ran for outcome in each.outcomes]
    write_json(
        {
            "tests": rows,
            "passed": sum(row["passed"] is True for row in rows),
            "failed": sum(row["passed"] is False for row in rows),
            "untested_rules": {printable(each.policy): each.untested for each in ran},
        }
    )


def _members(ran: _Ran, outcome: Outcome) -> dict[str, object]:
    case, judged = outcome.case, outcome.judged
    explanation = outcome.explanation(ran.rules) if outcome.problem else None
    return {
        "name": printable(case.title),
        "table": printable(ran.table),
        "line": case.mark.line,
        "column": case.mark.column,
        "policy": printable(ran.policy),
        **path_members(case.path),
        "action": case.action,
        "expected": "allow" if case.allowed else "deny",
        "decision": None if judged is None else judged.verdict.decision,
        "reason": None if judged is None else judged.verdict.reason,
        "rule": None if judged is None else judged.verdict.rule,
        "passed": not outcome.problem,
        "problem": printable(outcome.problem),
        "sentence": "" if explanation is None else printable(explanation.sentence),
    }
