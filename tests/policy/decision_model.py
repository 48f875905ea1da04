"""What a policy decides, said a second time in the plainest way: over the JSON document, rule by rule.

Globs are those of the standard library, component by component, so nothing is
shared with fdbroker.policy but the words.
"""

from __future__ import annotations

import fnmatch
import stat
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from fdbroker.policy.rules import Surroundings

if TYPE_CHECKING:
    from fdbroker.policy.rules import ClientFacts


NOW = 10**18  # some moment in nanoseconds
SECOND = 10**9


class Facts(NamedTuple):
    """What fstat, and fstatfs, say of an object, as far as rules ask."""

    st_mode: int
    st_uid: int = 0
    st_gid: int = 0
    st_size: int = 0
    st_nlink: int = 1
    st_mtime_ns: int = 0
    filesystem: int = 0

    @property
    def around(self) -> Surroundings:
        """When and on what file system it was looked at."""
        return Surroundings(NOW, self.filesystem)


class Asker(NamedTuple):
    """Who asks, and for whom: None where it asks for itself."""

    client: ClientFacts
    on_behalf_of: ClientFacts | None = None


class Expected(NamedTuple):
    """What the name alone decides: the root that serves, the rules that are left to ask, by index.

    `follows`: those that are left to ask where the name is one of a link.
    """

    root: str | None
    reason: str
    allows: tuple[int, ...] = ()
    denies: tuple[int, ...] = ()
    rule: int | None = None
    follows: tuple[int, ...] = ()


class Outcome(NamedTuple):
    """What is answered about a path and the object that is there: why, and by which rule, by index."""

    reason: str
    rule: int | None


CONDITIONS = ("owner", "group", "mode", "filesystem", "size", "links", "age")
PROBLEMS = (
    "empty",
    "path_too_long",
    "relative",
    "trailing_slash",
    "empty_component",
    "dot_component",
    "name_too_long",
)


def problem(path: str) -> str | None:
    """Return what keeps `path`, of ASCII without NUL, from being asked for."""
    if not path:
        return "empty"
    if len(path) > 4095:
        return "path_too_long"
    if path[0] != "/":
        return "relative"
    if path[-1] == "/":
        return None if path == "/" else "trailing_slash"
    for name in path[1:].split("/"):
        if name in {"", ".", ".."}:
            return "dot_component" if name else "empty_component"
        if len(name) > 255:
            return "name_too_long"
    return None


@cache
def glob_matches(pattern: tuple[str, ...], path: tuple[str, ...]) -> bool:
    """Say whether components of a glob match those of a path; no escapes."""
    if not pattern:
        return not path
    if pattern[0] == "**":
        return any(glob_matches(pattern[1:], path[i:]) for i in range(len(path) + 1))
    return bool(path) and fnmatch.fnmatchcase(path[0], pattern[0]) and glob_matches(pattern[1:], path[1:])


def below(root: str, path: str) -> tuple[str, ...] | None:
    """Return the components of `path` below `root`, None outside it."""
    of_root = tuple(part for part in root.split("/") if part)
    of_path = tuple(part for part in path.split("/") if part)
    return of_path[len(of_root) :] if of_path[: len(of_root)] == of_root else None


def is_for(rule: dict[str, Any], asker: Asker) -> bool:
    """Say whether a rule is about who asks, and about whom it asks for."""
    deny = bool(rule["effect"] == "deny")
    if not is_one_of(rule["clients"], asker.client, or_may_be=deny):
        return False
    if asker.on_behalf_of is not None and rule["on_behalf_of"]:
        return is_one_of(rule["on_behalf_of"], asker.on_behalf_of, or_may_be=deny)
    if asker.on_behalf_of is not None:
        return deny
    return not rule["on_behalf_of"]


def is_one_of(entries: list[dict[str, Any]], client: ClientFacts, *, or_may_be: bool = False) -> bool:
    """Say whether some entry is about a client, or may be, as far as its groups are known."""
    any_group = or_may_be and not client.groups_known
    return any(
        "any" in entry
        or (
            ("uids" not in entry or client.uid in entry["uids"])
            and ("gids" not in entry or any_group or any(gid in client.gids for gid in entry["gids"]))
            and ("cgroups" not in entry or any(group in client.cgroups for group in entry["cgroups"]))
            and (
                "labels" not in entry
                or (or_may_be if client.label is None else client.label.decode() in entry["labels"])
            )
        )
        for entry in entries
    )


def matching_rules(
    document: dict[str, Any], asker: Asker, action: str, path: str
) -> tuple[str | None, list[int]]:
    """Return the name of the root that serves `path`, and the rules that match it."""
    paths = {root["name"]: root["path"] for root in document["roots"]}
    containing = [name for name in paths if below(paths[name], path) is not None]
    serving = max(containing, key=lambda name: len(paths[name]), default=None)
    named = "open" if action == "copy" else action
    delivery = {"open": "descriptor", "copy": "copy"}.get(action)
    matching = []
    for index, rule in enumerate(document["rules"]):
        rest = below(paths[rule["root"]], path)
        if (
            rest is not None
            and named in rule["actions"]
            and is_for(rule, asker)
            and any(glob_matches(tuple(glob.split("/")), rest) for glob in rule["paths"])
            and not any(glob_matches(tuple(glob.split("/")), rest) for glob in rule["except"])
            and (rule["effect"] == "deny" or rule["root"] == serving)
            and (rule["effect"] == "deny" or delivery is None or delivery in rule["deliver"])
        ):
            matching.append(index)
    return serving, matching


def expect(document: dict[str, Any], asker: Asker, action: str, path: str) -> Expected:
    """Return what the name alone has to decide."""
    trouble = problem(path)
    if trouble is not None:
        return Expected(None, trouble)
    serving, matching = matching_rules(document, asker, action, path)
    rules = document["rules"]
    denies = [i for i in matching if rules[i]["effect"] == "deny"]
    allows = [i for i in matching if rules[i]["effect"] == "allow"]
    for i in denies:
        if not rules[i]["where"]:
            return Expected(serving, "deny_rule", rule=i)
    if not allows:
        return Expected(serving, "outside_roots" if serving is None else "no_rule")
    free = [i for i in allows if not rules[i]["where"]]
    left = tuple(free[:1] or allows)
    following = [i for i in allows if rules[i]["symlinks"] == "within-root"]
    follows = tuple([i for i in following if i in free][:1] or following)
    return Expected(serving, "ok", left, tuple(denies), left[0] if free and not denies else None, follows)


def conditions_failing(where: dict[str, Any], facts: Facts, asker: Asker, *, deny: bool) -> list[str]:
    """Return the conditions that an object does not meet, in the order in which they are asked."""
    regular = stat.S_ISREG(facts.st_mode)
    failing = []
    for name in sorted(where, key=CONDITIONS.index):
        wanted = where[name]
        if name == "owner":
            accepted = set(wanted["uids"])
            if wanted["client"]:
                accepted.add(asker.client.uid)
            if wanted["on_behalf_of"] and asker.on_behalf_of is not None:
                accepted.add(asker.on_behalf_of.uid)
            good = facts.st_uid in accepted
        elif name == "group":
            good = facts.st_gid in wanted["gids"]
        elif name == "mode":
            good = all(
                bool(facts.st_mode >> bit & 1) is is_set
                for key, is_set in (("all", True), ("none", False))
                for bit in range(16)
                if wanted.get(key, 0) >> bit & 1
            )
        elif name == "filesystem":
            good = facts.filesystem in wanted["types"]
        elif not regular:
            good = not deny
        elif name == "age":
            modified = min(facts.st_mtime_ns, NOW)  # in the future it is as if it were now
            newest = NOW - wanted.get("min", 0) * SECOND
            oldest = NOW - wanted["max"] * SECOND if "max" in wanted else modified
            good = oldest <= modified <= newest
        else:
            value = facts.st_size if name == "size" else facts.st_nlink
            good = wanted.get("min", value) <= value <= wanted.get("max", value)
        if not good:
            failing.append(name)
    return failing


def outcome(document: dict[str, Any], asker: Asker, action: str, path: str, facts: Facts) -> Outcome:
    """Return the reason and the rule that are named in the end, whatever of it the name alone decides."""
    expected = expect(document, asker, action, path)
    for i in expected.denies:
        if not conditions_failing(document["rules"][i]["where"], facts, asker, deny=True):
            return Outcome("deny_rule", i)
    failing = {
        i: conditions_failing(document["rules"][i]["where"], facts, asker, deny=False)
        for i in expected.allows
    }
    for i, names in failing.items():
        if not names:
            return Outcome("ok", i)
    for i, names in failing.items():
        return Outcome(f"where_{names[0]}", i)
    return Outcome(expected.reason, expected.rule)


def rules_about(document: dict[str, Any], asker: Asker, action: str, path: str) -> list[dict[str, Any]]:
    """Return the rules that match a path; none where it is no path."""
    if problem(path) is not None:
        return []
    _, matching = matching_rules(document, asker, action, path)
    return [document["rules"][i] for i in matching]


def is_given(rules: list[dict[str, Any]], asker: Asker, facts: Facts) -> bool:
    """Say what comes out in the end, by the rules that match a path, of the object that is there."""
    holding = {
        rule["effect"]
        for rule in rules
        if not conditions_failing(rule["where"], facts, asker, deny=rule["effect"] == "deny")
    }
    return holding == {"allow"}
