"""How an explanation is shown: that of a policy file, and the shorter one that a broker gives."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING, Any, NamedTuple

from fdbroker.cli.output import coloured, path_members
from fdbroker.config.names import counted, group_text, printable, user_name, user_text
from fdbroker.policy.rules import ClientFacts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fdbroker.config.explain import Explanation, RuleCheck, RuleReport, Seen
    from fdbroker.policy.rules import FileFacts

_STATUS = {"allow": 0, "deny": 1, "unknown": 3}
_COLOURS = {"allow": "green", "deny": "red", "unknown": "yellow"}
# A policy with no more rules than these is shown whole.
_FEW = 6
_OF_A_WALK = (
    "What lies below it is decided by itself, name by name: it needs 'walk' to be met, and 'open' as well if"
    " files are to be given, as a scan wants them. Ask about a file there, with --action open."
)
_MARKS = {True: "+", False: "-", None: "?"}


def status_of(explanation: Explanation) -> int:
    """Return the exit status of the command."""
    return _STATUS[explanation.verdict.decision]


class Source(NamedTuple):
    """Where an explanation comes from. `generation`: of the running broker, None where it was not asked.

    `notes`: why the broker would not take the file. `control_group`: of who is explained, if it is known.
    """

    policy: str
    notes: Sequence[str] = ()
    control_group: str | None = None
    generation: int | None = None


def to_document(explanation: Explanation, source: Source) -> dict[str, object]:
    """Return an explanation as JSON members."""
    client, acted_for, verdict = explanation.client, explanation.on_behalf_of, explanation.verdict
    return {
        **path_members(explanation.path),
        "action": explanation.action,
        "source": "file" if source.generation is None else "broker",
        "policy": printable(source.policy),
        "generation": source.generation,
        "notes": list(source.notes),
        "client": _client_members(client),
        "on_behalf_of": None if acted_for is None else _client_members(acted_for),
        "root": None if explanation.root is None else explanation.root.name,
        "decision": verdict.decision,
        "reason": verdict.reason,
        "rule": verdict.rule,
        "sentence": printable(explanation.sentence),
        **_seen_members(explanation),
        "followed": _followed_members(explanation.followed),
    }


def _seen_members(explanation: Explanation) -> dict[str, object]:
    """Return the object and the rules of one name."""
    return {
        "object": _object_members(explanation.seen),
        "rules": [
            {
                "name": rule.name,
                "effect": rule.effect,
                "applies": rule.applies,
                "checks": [_check_members(check) for check in rule.checks],
            }
            for rule in explanation.rules
        ],
    }


def _followed_members(followed: Explanation | None) -> dict[str, object] | None:
    """Return what is said of the name to which a link leads, None where none is followed."""
    if followed is None:
        return None
    return {
        **path_members(followed.path),
        **_seen_members(followed),
        "followed": _followed_members(followed.followed),
    }


def _client_members(client: ClientFacts) -> dict[str, object]:
    return {"uid": client.uid, "gids": sorted(client.gids), "cgroups": sorted(client.cgroups)}


def _check_members(check: RuleCheck) -> dict[str, object]:
    return {"what": check.what, "holds": check.holds, "text": printable(check.text)}


def _object_members(seen: Seen | None) -> dict[str, object] | None:
    if seen is None:
        return None
    facts = seen.facts
    members: dict[str, object] = {"seen": facts is not None, "problem": seen.reason or printable(seen.note)}
    if facts is not None:
        members |= {
            "type": _type(facts.st_mode),
            "uid": facts.st_uid,
            "gid": facts.st_gid,
            "mode": f"{stat.S_IMODE(facts.st_mode):04o}",
            "size": facts.st_size,
            "links": facts.st_nlink,
        }
    return members


def lines_of(explanation: Explanation, source: Source, *, verbose: bool) -> list[str]:
    """Return an explanation for people."""
    client, acted_for = explanation.client, explanation.on_behalf_of
    lines = [
        f"path    {printable(explanation.path)}",
        f"action  {explanation.action}",
        f"client  {_client_line(client)}",
        *([] if acted_for is None else [f"for     {_client_line(acted_for)}"]),
        *([] if source.control_group is None else [f"cgroup  {printable(source.control_group)}"]),
        f"policy  {printable(source.policy)}",
    ]
    if source.generation is not None:
        lines.append(f"broker  it decides by this file (generation {source.generation}), and says the same")
    if explanation.seen is not None:
        lines.append(f"object  {_object_line(explanation.seen)}")
    lines += lines_of_rules(explanation, verbose=verbose)
    if explanation.action == "walk" and explanation.verdict.decision == "allow":
        lines.append(_OF_A_WALK)
    if explanation.verdict.decision == "unknown" and os.geteuid() != 0:
        lines.append(
            f"Root can look at it: run this again as root, with --as {printable(user_name(client.uid))}."
        )
    return lines


def lines_of_rules(explanation: Explanation, *, verbose: bool, few: int = _FEW) -> list[str]:
    """Return the rules that come near, or all (`verbose`), and the sentence, each behind an empty line.

    Of a policy with no more rules than `few` all are shown.
    """
    lines = _lines_of_one_name(explanation, verbose=verbose, few=few)
    followed = explanation.followed
    while followed is not None:
        lines += [
            "",
            f"A symbolic link leads to {printable(followed.path)}, which is asked for in its place.",
        ]
        if followed.seen is not None:
            lines.append(f"object  {_object_line(followed.seen)}")
        lines += _lines_of_one_name(followed, verbose=verbose, few=few)
        followed = followed.followed
    sentence = explanation.sentence
    colour = _COLOURS[explanation.verdict.decision]
    return [*lines, "", coloured(printable(sentence[:1].upper() + sentence[1:]) + ".", colour)]


def _lines_of_one_name(explanation: Explanation, *, verbose: bool, few: int) -> list[str]:
    lines = []
    everyone = verbose or len(explanation.rules) <= few
    shown = [rule for rule in explanation.rules if everyone or _is_near(rule, explanation)]
    for rule in shown:
        lines += ["", *_rule_lines(rule)]
    hidden = len(explanation.rules) - len(shown)
    if hidden:
        be = "is" if hidden == 1 else "are"
        lines += ["", f"{counted(hidden, 'other rule')} {be} not about this at all (-v shows them)."]
    return lines


def _client_line(client: ClientFacts) -> str:
    groups = ", ".join(map(group_text, sorted(client.gids))) or "none"
    line = f"user {user_text(client.uid)}, groups {groups}"
    if client.cgroups:
        line += f", control groups {', '.join(map(printable, sorted(client.cgroups)))}"
    if client.label is not None:
        line += f", label {printable(client.label)}"
    return line


def _is_near(rule: RuleReport, explanation: Explanation) -> bool:
    """Return whether a rule applies, might, or fails in one thing alone."""
    return rule.failures <= 1 or rule.name == explanation.verdict.rule


def _rule_lines(rule: RuleReport) -> list[str]:
    word = {True: "applies", False: "does not apply", None: "may apply"}[rule.applies]
    colour = _COLOURS[rule.effect]
    head = f"rule {printable(rule.name)} ({rule.effect}): {word}"
    lines = [coloured(head, colour) if rule.applies else head]
    width = max(len(check.what) for check in rule.checks)
    return lines + [
        f"  {_MARKS[check.holds]} {check.what.ljust(width)}  {printable(check.text)}" for check in rule.checks
    ]


def _object_line(seen: Seen) -> str:
    if seen.facts is None:
        return printable(seen.note) if seen.note else f"not there as asked for ({seen.reason})"
    facts: FileFacts = seen.facts
    return (
        f"{_type(facts.st_mode)}, owner {user_text(facts.st_uid)}, group {group_text(facts.st_gid)},"
        f" mode 0{stat.S_IMODE(facts.st_mode):03o}, {counted(facts.st_size, 'byte')},"
        f" {counted(facts.st_nlink, 'link')}"
    )


def _type(mode: int) -> str:
    kinds = {
        stat.S_IFREG: "regular file",
        stat.S_IFDIR: "directory",
        stat.S_IFLNK: "symbolic link",
        stat.S_IFIFO: "FIFO",
        stat.S_IFSOCK: "socket",
        stat.S_IFCHR: "character device",
        stat.S_IFBLK: "block device",
    }
    return kinds.get(stat.S_IFMT(mode), "of an unknown kind")


# ---- what a broker says ----


def status_of_answer(answer: Mapping[str, Any]) -> int:
    """Return the exit status for a broker's answer."""
    return _STATUS[_decision(answer)]


def _decision(answer: Mapping[str, Any]) -> str:
    if not answer.get("allowed"):
        return "deny"
    return "unknown" if answer.get("asked_of_object") or answer.get("denies") else "allow"


def document_of_answer(
    answer: Mapping[str, Any], path: bytes, client: ClientFacts | None = None
) -> dict[str, Any]:
    """Return what a broker says as the members that an explanation of a policy file has, too.

    `client`: who asked it; None: this process.
    """
    decision = _decision(answer)
    undecided = decision == "unknown"
    rules = [(name, "allow") for name in answer.get("asked_of_object") or ()]
    rules += [(name, "deny") for name in answer.get("denies") or ()]
    return {
        **path_members(path),
        "action": answer.get("action"),
        "source": "broker",
        "policy": None,
        "generation": answer.get("generation"),
        "notes": [],
        "client": _client_members(client or _this_process()),
        "on_behalf_of": None,
        "root": answer.get("root"),
        "decision": decision,
        "reason": "not_seen" if undecided else answer.get("reason"),
        "rule": None if undecided else answer.get("rule"),
        "sentence": _sentence(answer),
        "object": None,
        "rules": [{"name": name, "effect": effect, "applies": None, "checks": []} for name, effect in rules],
        "followed": None,
    }


def _this_process() -> ClientFacts:
    return ClientFacts(os.geteuid(), frozenset({os.getegid(), *os.getgroups()}))


def _sentence(answer: Mapping[str, Any]) -> str:
    decision, rule = _decision(answer), printable(str(answer.get("rule")))
    if decision == "allow":
        return f"allowed: rule {rule} allows it, whether or not it is there"
    if decision == "unknown":
        return "it depends on the file: see the conditions of these rules"
    reasons = {
        "deny_rule": f"rule {rule} denies it, and a deny rule always wins",
        "no_rule": "no rule allows it to you, and what is not allowed is denied",
        "outside_roots": "it lies in none of the trees that the policy names (roots)",
    }
    reason = printable(str(answer.get("reason")))
    return f"denied: {reasons.get(reason, reason)}"


def lines_of_answer(answer: Mapping[str, Any], path: bytes, client: ClientFacts | None = None) -> list[str]:
    """Return for people what a broker says of the client that asks, by the name alone."""
    decision = _decision(answer)
    lines = [
        f"path    {printable(path)}",
        f"action  {printable(str(answer.get('action')))}",
        f"client  you, user {user_text(os.geteuid())}"
        if client is None
        else f"client  {_client_line(client)}",
        f"policy  generation {answer.get('generation')} of the running broker; by the name alone",
        f"root    {printable(str(answer.get('root') or 'none'))}",
    ]
    for label, key in (("allow", "asked_of_object"), ("deny", "denies")):
        names = answer.get(key)
        if names:
            shown = ", ".join(printable(str(name)) for name in names)
            lines.append(f"{label.ljust(6)}  if the file meets the conditions of rule {shown}")
    colour = _COLOURS[decision]
    sentence = _sentence(answer)
    user = printable(user_name(os.geteuid() if client is None else client.uid))
    more = f"Root sees the rules and the file: run this again as root, with --as {user}."
    of_a_walk = [_OF_A_WALK] if answer.get("action") == "walk" and decision != "deny" else []
    return [*lines, "", coloured(f"{sentence[:1].upper()}{sentence[1:]}.", colour), *of_a_walk, more]
