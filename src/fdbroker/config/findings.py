"""What a policy says that its author can't have meant, or should know: findings of a policy without an error.

A warning is a statement that holds, not a guess: where globs or conditions
are compared, it is made only of what was proven (`containment`), and where the
machine is asked, of what was seen there. So that a policy can be kept free of
them, none is about what a sound policy needs.
"""

from __future__ import annotations

import itertools
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

from fdbroker.broker.roots import HELPED_FILESYSTEMS
from fdbroker.config.containment import (
    Components,
    covers,
    disjoint,
    leading_names,
    literal,
    matches_all_of_a_depth,
    parse,
)
from fdbroker.config.errors import quoted
from fdbroker.config.names import group_text, printable, user_text
from fdbroker.config.places import Place, Places, RulePlace
from fdbroker.policy.globs import Glob, Pattern, compile_glob
from fdbroker.policy.paths import components_below
from fdbroker.policy.rule_index import MANY_PATTERNS, where_looked_up
from fdbroker.policy.rules import ClientMatch, Root, Rule, RuleSet

WARNING, NOTE = "warning", "note"
# Described in docs/policy-tools.md.
KINDS = (
    "never-matches",
    "hidden-by-deny",
    "excepts-nothing",
    "no-members",
    "anybody",
    "hard-links",
    "network-filesystem",
    "not-served",
    "weak-mode",
    "many-patterns",
    "not-compared",
)
_NOTES = frozenset({"not-compared"})
# Globs that are looked through for what covers others; some seconds' worth.
_MOST_COMPARED = 2_000_000
_READABLE_BY_ALL = 0o004
_MOST_NAMED = 4


class Finding(NamedTuple):
    """One thing to know. `kind` is one of KINDS; `rule` and `root` name what it is about, if either."""

    place: Place
    kind: str
    message: str
    cure: str
    rule: str | None = None
    root: str | None = None

    @property
    def severity(self) -> str:
        """`warning`, or `note` of what may well be meant."""
        return NOTE if self.kind in _NOTES else WARNING

    def __str__(self) -> str:
        """Return `file:line:column: severity: message; cure [kind]`, always one printable line."""
        return (
            f"{self.place}: {self.severity}: {printable(self.message)}; {printable(self.cure)} [{self.kind}]"
        )


class Surroundings(Protocol):
    """What findings ask of the machine that the policy is for."""

    def has_members(self, gid: int) -> bool:
        """Return whether any user that the system lists is in a group, be it as its primary one."""

    def is_in(self, uid: int, gids: frozenset[int]) -> bool:
        """Return whether a user is in one of these groups; True where there is no such user to ask about."""

    def network_filesystem(self, path: bytes) -> str | None:
        """Return the type of the file system at `path` if its answers come from elsewhere (FUSE, NFS ...)."""

    def unserved_filesystem(self, path: bytes) -> str | None:
        """Return the type of the file system at `path` if the broker serves no file of it."""

    def writers(
        self, root: bytes, glob: Glob, leaving_out: Sequence[tuple[bytes, Glob]]
    ) -> tuple[bytes, str] | None:
        """Return a directory in which a name may match and others than root make names, and who; or None.

        `leaving_out` are globs, with the directories that they are relative to, of what is not meant.
        """


def find(rules: RuleSet, places: Places, machine: Surroundings | None) -> list[Finding]:
    """Return what there is to know of a policy, in the order of its file. `machine` None: another one's."""
    findings = [*_of_settings(rules, places), *_of_rules(rules, places), *_of_patterns(rules, places)]
    if machine is not None:
        findings += [*_of_roots(rules, places, machine), *_of_members(rules, places, machine)]
        findings += _of_hard_links(rules, places, machine)
    return sorted(findings, key=lambda finding: finding.place.order)


# ---- settings and roots ----


def _of_settings(rules: RuleSet, places: Places) -> Iterator[Finding]:
    if not rules.settings.read_only_view_required:
        yield Finding(
            places.setting("read_only_view"),
            "weak-mode",
            "read_only_view: off lets the owner of a file make a descriptor of it writable again",
            "remove it, unless the broker can have no read-only view of the files",
        )
    if not rules.settings.deny_when_audit_fails:
        yield Finding(
            places.setting("audit"),
            "weak-mode",
            "audit: on_failure: allow hands out files of which there is no record",
            "remove it, unless that is meant",
        )


def _of_roots(rules: RuleSet, places: Places, machine: Surroundings) -> Iterator[Finding]:
    for root in rules.roots:
        network = machine.network_filesystem(root.path)
        where = f"root {quoted(root.name)} is on a file system of type {network}"
        if network is not None and not root.helpers:
            yield Finding(
                places.root(root.name),
                "network-filesystem",
                f"{where}, whose files others answer for and may hold: the broker does not start with it",
                "add 'opens: helpers' to the root",
                root=root.name,
            )
        elif network is None and (unserved := machine.unserved_filesystem(root.path)) is not None:
            yield Finding(
                places.root(root.name),
                "not-served",
                f"root {quoted(root.name)} is on a file system of type {unserved}, of which the broker serves"
                " nothing",
                "name a directory on a local disk or tmpfs",
                root=root.name,
            )
        if network is None:
            continue
        for rule in rules.rules:
            if (
                rule.root is root
                and not rule.deny
                and rule.where is not None
                and rule.where.links is not None
            ):
                yield Finding(
                    places.rule(rule.name).place,
                    "never-matches",
                    f"rule {quoted(rule.name)} asks for the number of links, and {where}, where no such"
                    " condition holds",
                    "remove 'links' from the rule",
                    rule.name,
                )


# ---- who ----


def _of_members(rules: RuleSet, places: Places, machine: Surroundings) -> Iterator[Finding]:
    for rule in rules.rules:
        for key, entries in (("client", rule.clients), ("on_behalf_of", rule.on_behalf_of)):
            for entry in entries:
                text = _without_members(entry, machine)
                if text is not None:
                    yield Finding(
                        places.rule(rule.name).key(key),
                        "no-members",
                        f"rule {quoted(rule.name)}: {key}: {text}",
                        "add the user to the group, name another, or see that the unit has it"
                        " (SupplementaryGroups=)",
                        rule.name,
                    )


def _without_members(entry: ClientMatch, machine: Surroundings) -> str | None:
    if not entry.gids:
        return None
    groups = " or ".join(map(group_text, sorted(entry.gids)))
    if entry.uids is None:
        if any(machine.has_members(gid) for gid in entry.gids):
            return None
        return f"no user that this system lists is in group {groups}"
    if not entry.uids or any(machine.is_in(uid, entry.gids) for uid in entry.uids):
        return None
    return f"user {' or '.join(map(user_text, sorted(entry.uids)))} is not in group {groups}"


# ---- rules, by themselves and among each other ----


class _Whole(NamedTuple):
    """A rule with its globs from the root directory on. `leaves_out`: what it is not about."""

    rule: Rule
    paths: tuple[Components, ...]
    leaves_out: tuple[Components, ...]


def _of_rules(rules: RuleSet, places: Places) -> list[Finding]:
    whole = [_whole(rule, rules.roots) for rule in rules.rules]
    denies = _Denies(entry for entry in whole if entry.rule.deny)
    findings: list[Finding] = []
    for entry in whole:
        rule, at = entry.rule, places.rule(entry.rule.name)
        never = _reason_for_never(rule, rules)
        empty = [covers(entry.leaves_out, path) for path in entry.paths] if entry.leaves_out else []
        if never is None and empty and all(empty):
            never = _excepted(entry), "name what the rule is about, or remove it"
        if never is not None:
            message, cure = never
            message = f"rule {quoted(rule.name)} can never match: {message}"
            findings.append(Finding(at.place, "never-matches", message, cure, rule.name))
            continue
        live = [not gone for gone in empty] or [True] * len(entry.paths)
        findings += _of_globs(entry, at, live)
        if not rule.deny:
            findings += _hidden(entry, at, live, denies)
            findings += _anybody(entry, at)
    if denies.exhausted:
        findings.append(
            Finding(
                places.setting("rules"),
                "not-compared",
                "the policy has so many deny rules that not all were compared with what others allow",
                "begin globs with the names of directories: rules that differ there need no comparing",
            )
        )
    return findings


def _whole(rule: Rule, roots: Sequence[Root]) -> _Whole:
    below = literal(_names(rule.root.path))
    leaves_out = [below + parse(glob.pattern) for glob in rule.excepts]
    if not rule.deny:  # a path belongs to its deepest root, and only rules of that root allow
        inner = [root for root in roots if _is_below(root.path, rule.root.path)]
        leaves_out += [(*literal(_names(root.path)), None) for root in inner]
    return _Whole(rule, tuple(below + parse(glob.pattern) for glob in rule.paths), tuple(leaves_out))


def _names(path: bytes) -> list[bytes]:
    return [name for name in path.split(b"/") if name]


def _is_below(path: bytes, other: bytes) -> bool:
    return bool(components_below(other, path))


def _excepted(entry: _Whole) -> str:
    if entry.rule.excepts and len(entry.leaves_out) > len(entry.rule.excepts):
        return "'except' and deeper roots leave nothing of what 'paths' match"
    if entry.rule.excepts:
        return "'except' leaves nothing of what 'paths' match"
    return "all that 'paths' match belongs to deeper roots, where only their rules allow"


def _reason_for_never(rule: Rule, rules: RuleSet) -> tuple[str, str] | None:
    if rule.on_behalf_of and not rules.services:
        return (
            "it is about a service that acts for clients, and the policy has no listener of a service",
            "add the service to 'listeners', or remove 'on_behalf_of'",
        )
    if rule.root.helpers and not rule.deny and rule.actions <= {"list", "walk"}:
        return (
            f"root {quoted(rule.root.name)} says 'opens: helpers', and nothing there is listed or walked",
            "remove the rule, or allow open or stat",
        )
    types = rule.where.filesystems if rule.where is not None else None
    if types is not None and not rule.root.helpers and types <= HELPED_FILESYSTEMS.keys():
        return (
            f"no file system that it names is served in root {quoted(rule.root.name)} ('opens: loop')",
            "add 'opens: helpers' to the root, or remove the rule",
        )
    return None


def _of_globs(entry: _Whole, at: RulePlace, live: Sequence[bool]) -> Iterator[Finding]:
    rule = entry.rule
    shown = f"rule {quoted(rule.name)}: paths"
    for glob, alive in zip(rule.paths, live, strict=True):
        text = _shown(glob.pattern)
        if not alive:
            yield Finding(
                at.glob("paths", glob.pattern),
                "never-matches",
                f"{shown}: {text} can never match: the rule leaves out all of it ('except', deeper roots)",
                "remove the glob, or narrow what is left out",
                rule.name,
            )
    for glob in rule.excepts:
        below = literal(_names(rule.root.path)) + parse(glob.pattern)
        if all(disjoint(path, below) for path in entry.paths):
            yield Finding(
                at.glob("except", glob.pattern),
                "excepts-nothing",
                f"rule {quoted(rule.name)}: except: {_shown(glob.pattern)} leaves out nothing: no path that"
                " it matches is among 'paths'",
                "check its spelling (it is relative to the root), or remove it",
                rule.name,
            )


def _of_patterns(rules: RuleSet, places: Places) -> Iterator[Finding]:
    """Find the roots in which many patterns must be tried on one name, for one client and one action."""
    tried_on: dict[tuple[object, ...], dict[Pattern, tuple[Rule, str, Glob]]] = defaultdict(dict)
    for rule in rules.rules:
        globs = [*(("paths", glob) for glob in rule.paths), *(("except", glob) for glob in rule.excepts)]
        for (key, glob), action in itertools.product(globs, rule.actions):
            for at, component in enumerate(glob.components):
                if isinstance(component, Pattern):
                    whose = rule.root, rule.clients, rule.on_behalf_of, action
                    together = tried_on[(*whose, glob.components[:at], where_looked_up(component))]
                    together.setdefault(component, (rule, key, glob))
    told: set[Root] = set()
    for tried in sorted(tried_on.values(), key=len, reverse=True):
        rule, key, glob = next(iter(tried.values()))
        if len(tried) <= MANY_PATTERNS or rule.root in told:
            continue
        told.add(rule.root)
        yield Finding(
            places.rule(rule.name).glob(key, glob.pattern),
            "many-patterns",
            f"rule {quoted(rule.name)}: {key}: {_shown(glob.pattern)} is the first of {len(tried)} globs of"
            f" root {quoted(rule.root.name)} that begin alike, go on with wildcards, and are tried one by one"
            " on each name that comes there",
            "begin or end each component with what is different in it ('name*', '*.ending'), or write one"
            " glob for several ('[0-9]')",
            rule.name,
        )


def _anybody(entry: _Whole, at: RulePlace) -> Iterator[Finding]:
    rule = entry.rule
    where = rule.where
    asked = rule.on_behalf_of or rule.clients
    everybody = ClientMatch(*[None] * len(ClientMatch._fields))
    if "open" not in rule.actions or everybody not in asked:
        return
    if where is not None and (where.owner is not None or where.mode_all & _READABLE_BY_ALL):
        return
    broad = [glob for glob in rule.paths if matches_all_of_a_depth(parse(glob.pattern))]
    if not broad:
        return
    who = "whoever a service acts for" if rule.on_behalf_of else "every process on the machine"
    word = "on_behalf_of" if rule.on_behalf_of else "client"
    yield Finding(
        at.key("on_behalf_of" if rule.on_behalf_of else "client"),
        "anybody",
        f"rule {quoted(rule.name)} lets {who} have {_shown(broad[0].pattern)} of root"
        f" {quoted(rule.root.name)}, whoever owns the files",
        f"name users or groups, or add 'where: {{owner: {word}}}'",
        rule.name,
    )


# ---- what deny rules leave of allow rules ----


class _Denies:
    """The deny rules, by the names that their globs begin with."""

    def __init__(self, denies: Iterable[_Whole]) -> None:
        self._by_names: Mapping[tuple[bytes, ...], dict[int, tuple[_Whole, list[Components]]]] = defaultdict(
            dict
        )
        self._left = _MOST_COMPARED
        for entry in denies:
            for path in entry.paths:
                found = self._by_names[leading_names(path)].setdefault(entry.rule.index, (entry, []))
                found[1].append(path)

    @property
    def exhausted(self) -> bool:
        """Whether there was more to compare than is compared."""
        return self._left <= 0

    def that_hide(self, allow: _Whole, action: str, path: Components) -> list[str]:
        """Return the deny rules that refuse all that `path` of a rule allows; [] if it is not proven."""
        candidates: dict[int, tuple[_Whole, list[Components]]] = {}
        names = leading_names(path)
        for end in range(len(names) + 1):
            for index, (entry, globs) in self._by_names.get(names[:end], {}).items():
                self._left -= len(globs)
                if self._left <= 0:
                    return []
                if _refuses_all(entry, allow, action, path):
                    candidates.setdefault(index, (entry, []))[1].extend(globs)
        every = [glob for _, globs in candidates.values() for glob in globs]
        if not every or not covers([*every, *allow.leaves_out], path):
            return []
        for entry, globs in candidates.values():
            if covers([*globs, *allow.leaves_out], path):
                return [entry.rule.name]
        return [candidates[index][0].rule.name for index in sorted(candidates)]


def _refuses_all(deny: _Whole, allow: _Whole, action: str, path: Components) -> bool:
    """Return whether a deny rule holds wherever the other does and its own globs match."""
    return (
        action in deny.rule.actions
        and _asks_no_more(deny.rule, allow.rule, action)
        and _means_all_of(deny.rule.clients, allow.rule.clients)
        and (
            not deny.rule.on_behalf_of
            or (
                bool(allow.rule.on_behalf_of)
                and _means_all_of(deny.rule.on_behalf_of, allow.rule.on_behalf_of)
            )
        )
        and all(disjoint(left, path) or covers(allow.leaves_out, left) for left in deny.leaves_out)
    )


def _asks_no_more(deny: Rule, allow: Rule, action: str) -> bool:
    # The same conditions are met by the same files. Of directories some hold in allow rules and not in these.
    return deny.where is None or (deny.where == allow.where and action == "open")


def _means_all_of(wide: Sequence[ClientMatch], narrow: Sequence[ClientMatch]) -> bool:
    return all(any(_means_all(one, other) for one in wide) for other in narrow)


def _means_all(wide: ClientMatch, narrow: ClientMatch) -> bool:
    """Return whether whoever `narrow` means, `wide` does."""
    if narrow.cgroups is not None and wide.cgroups is not None:
        above = tuple(f"{path}/" for path in wide.cgroups)
        if not all(f"{path}/".startswith(above) for path in narrow.cgroups):
            return False
        narrow = narrow._replace(cgroups=wide.cgroups)
    return all(
        ours is None or (theirs is not None and theirs <= ours)
        for ours, theirs in zip(wide, narrow, strict=True)
    )


def _hidden(entry: _Whole, at: RulePlace, live: Sequence[bool], denies: _Denies) -> Iterator[Finding]:
    rule = entry.rule
    globs = [glob for glob, alive in zip(rule.paths, live, strict=True) if alive]
    paths = [path for path, alive in zip(entry.paths, live, strict=True) if alive]
    actions = sorted(rule.actions)
    hiding = {
        (action, number): found
        for action in actions
        for number, path in enumerate(paths)
        if (found := denies.that_hide(entry, action, path))
    }
    gone = [action for action in actions if all((action, number) in hiding for number in range(len(paths)))]
    shown = f"rule {quoted(rule.name)}"
    cure = "remove what is allowed in vain, or narrow the deny rule ('except', 'client')"
    if gone:
        which = _listed(name for action in gone for n in range(len(paths)) for name in hiding[action, n])
        what = "nothing" if gone == actions else f"no {' and no '.join(gone)}"
        message = f"{shown} allows {what}: all that it is about is denied by {which}"
        yield Finding(at.place, "hidden-by-deny", message, cure, rule.name)
    for number, glob in enumerate(globs):
        lost = [action for action in actions if action not in gone and (action, number) in hiding]
        if lost:
            which = _listed(name for action in lost for name in hiding[action, number])
            left = "" if len(lost) == len(actions) else f" for {', '.join(lost)}"
            message = f"{shown}: paths: all that {_shown(glob.pattern)} matches is denied{left} by {which}"
            yield Finding(at.glob("paths", glob.pattern), "hidden-by-deny", message, cure, rule.name)


def _listed(names: Iterable[str]) -> str:
    found = list(dict.fromkeys(names))
    more = len(found) - _MOST_NAMED
    shown = [quoted(name) for name in found[:_MOST_NAMED]] + ([f"{more} more"] if more > 0 else [])
    return f"rule{'s' * (len(found) > 1)} {' and '.join(shown)}"


# ---- hard links ----


def _of_hard_links(rules: RuleSet, places: Places, machine: Surroundings) -> Iterator[Finding]:
    everything = compile_glob(b"**")
    denied = [
        (rule.root.path, glob)
        for rule in rules.rules
        if rule.deny and "open" in rule.actions and rule.where is None and not rule.excepts
        for glob in rule.paths
    ]
    for rule in rules.rules:
        root = rule.root
        if rule.deny or "open" not in rule.actions or root.helpers or _guards(rule):
            continue
        if machine.network_filesystem(root.path) is not None:
            continue
        leaving_out = [(root.path, glob) for glob in rule.excepts] + denied
        leaving_out += [(other.path, everything) for other in rules.roots if _is_below(other.path, root.path)]
        found = next(
            filter(None, (machine.writers(root.path, glob, leaving_out) for glob in rule.paths)), None
        )
        if found is not None:
            directory, who = found
            yield Finding(
                places.rule(rule.name).place,
                "hard-links",
                f"rule {quoted(rule.name)} opens files in {_shown(directory)}, where {who} can make hard"
                " links to files of others",
                "add 'where: {links: {max: 1}}', or ask for the owner",
                rule.name,
            )


def _guards(rule: Rule) -> bool:
    where = rule.where
    return where is not None and (
        where.owner is not None or (where.links is not None and where.links.most == 1)
    )


def _shown(text: bytes) -> str:
    return quoted(os.fsdecode(text))
