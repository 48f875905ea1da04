"""The policy file: whether it can be trusted and read, what it warns of, and what it asks of the kernel."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from fdbroker.broker.generation import problem_with_identity
from fdbroker.broker.identity import gives_labels, probe_level
from fdbroker.cli.checks.check import BROKEN, MISSING, OK, WEAKER, Check
from fdbroker.config.names import counted, printable
from fdbroker.wire.client import for_broker

if TYPE_CHECKING:
    from fdbroker.config import CompiledPolicy


def policy_file(path: str) -> tuple[Check, CompiledPolicy | None]:
    """Check the file, and return what it compiles to, None if it does not."""
    name = printable(path)
    meaning = "says who may read what; only root can have written it"
    try:
        from fdbroker.config import ConfigError, load_policy_file  # noqa: PLC0415 - another extra
    except ModuleNotFoundError as error:
        return Check(name, WEAKER, f"not looked at: {error}", meaning, "pip install 'fdbroker[daemon]'"), None
    try:
        os.stat(path)
    except FileNotFoundError:
        cure = "write one (docs/policy.md; config/examples has some), then: fdbroker policy check"
        return Check(name, MISSING, "does not exist", meaning, cure), None
    except OSError as error:
        return Check(name, WEAKER, f"not looked at: {error.strerror}", meaning, "run this as root"), None
    if not os.access(path, os.R_OK):
        return Check(name, WEAKER, "not looked at: you may not read it", meaning, "run this as root"), None
    try:
        compiled = load_policy_file(path)
    except ConfigError as error:
        more = f" (and {len(error.problems) - 1} more)" if len(error.problems) > 1 else ""
        cure = f"see all with: fdbroker policy check {name}"
        found = f"{str(error.problems[0]).removeprefix(f'{path}:').strip()}{more}"
        return Check(name, BROKEN, found, meaning, cure), None
    roots, rules = counted(len(compiled["roots"]), "root"), counted(len(compiled["rules"]), "rule")
    counts = f"root's, {roots}, {rules}, no problems"
    return Check(name, OK, counts, meaning), compiled


def warnings(path: str, compiled: CompiledPolicy | None) -> list[Check]:
    """Return what the policy file says that its author can't have meant; nothing of one with errors."""
    if compiled is None:
        return []
    from fdbroker.config.check import check  # noqa: PLC0415 - another extra
    from fdbroker.config.findings import WARNING  # noqa: PLC0415 - likewise

    name, meaning = "policy warnings", "what the policy says is what its author can have meant"
    checked = check(path)
    if checked.errors:
        return []  # it was changed since it was read
    found = [finding for finding in checked.findings if finding.severity == WARNING]
    if not found:
        return [Check(name, OK, "none", meaning)]
    first = f"{counted(len(found), 'warning')}; the first: {printable(found[0].message)} [{found[0].kind}]"
    return [Check(name, WEAKER, first, meaning, f"see all with: fdbroker policy check {printable(path)}")]


def needs(compiled: CompiledPolicy | None) -> list[Check]:
    """Check whether the kernel tells what the policy asks of clients, and what limits their rates."""
    labels = gives_labels()
    found = (
        "a security module gives them" if labels else "no security module gives any: no rule can have 'label'"
    )
    checks = [Check("labels", OK, found, "rules can be about the labels of a security module")]
    if compiled is None:
        return checks
    from fdbroker.policy.rules import read_policy  # noqa: PLC0415 - only here

    level, why = probe_level()
    problem = problem_with_identity(read_policy(for_broker(compiled)), level, why, labels=labels)
    if problem is not None:
        meaning = "the kernel tells what the policy asks of clients; otherwise the broker does not start"
        checks.append(
            Check("identity", MISSING, problem, meaning, "change the policy, or take such a kernel")
        )
    limits = compiled["limits"]
    rates = [f"{key} {value}" for key, value in limits.items() if key.endswith("_per_second")]
    found = (
        ", ".join(rates)
        or "none for all of a user's requests (limits: requests_per_second, opens_per_second)"
    )
    return [*checks, Check("limits by rate", OK, found, "one user can ask, and have recorded, only so much")]
