"""What becomes allowed by another policy, and what is lost: over a given tree, for each kind of client.

Everything in the tree is put to both policies, by the broker's own decision,
and what comes out otherwise is counted, with some examples. So memory depends
on the rules, not on the tree.

Whom to decide for follows from the rules: those that they name, each with the
groups that the user database says, and somebody whom no rule names. Clients
about whom the same rules are, in either policy, are one kind.
"""

from __future__ import annotations

import errno
import itertools
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from fdbroker.broker.roots import HELPED_FILESYSTEMS, SERVED_FILESYSTEMS
from fdbroker.config.explain import (
    ALLOW,
    Asker,
    client_of_user,
    entry_text,
    judge,
    kind_refused,
    load_for_explaining,
    look_as_broker,
    with_control_group,
)
from fdbroker.config.identities import Fault, SystemLookups
from fdbroker.config.names import user_text
from fdbroker.config.surroundings import type_of_filesystem
from fdbroker.kernel.devices import place_at_once
from fdbroker.launcher.mounts import read_mounts
from fdbroker.policy.decide import ActionView, NameDecision, Policy, decide_object
from fdbroker.policy.globs import Glob
from fdbroker.policy.paths import components_below
from fdbroker.policy.rules import (
    ACTIONS,
    ClientFacts,
    ClientMatch,
    Root,
    Rule,
    RuleSet,
    Surroundings,
)

# Whom no rule can name: no user has it, and no file.
_NOBODY = 2**32 - 2
# The label of whom no rule about labels means; with None, which is not known, those that deny would hold.
_NO_LABEL = b""
_MOST_CLIENTS = 5000
MOST_KINDS = 200
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_GONE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP})


class Loaded(NamedTuple):
    """A policy to compare: what the broker takes of it, and the whole compiled document."""

    path: str
    rules: RuleSet
    document: Mapping[str, Any]


class _AnyDirectory(SystemLookups):
    """Roots need not exist any more, or yet: what is not there is an empty tree."""

    def directory(self, path: str) -> Fault | None:  # noqa: ARG002
        return None


def load(path: str) -> Loaded:
    """Read a policy file, compiled (`.json`) or not, whoever owns it: nothing is put in force.

    Raises:
        ConfigError: the file can't be read as a policy.
        OSError: it can't be opened.

    """
    loaded = load_for_explaining(path, _AnyDirectory())
    return Loaded(path, loaded.rules, loaded.document)


# ---- what the files say ----


class Change(NamedTuple):
    """What the policies say differently (`limits.connections_per_uid`). None: it is not said."""

    what: str
    old: Any
    new: Any


def changes(old: Loaded, new: Loaded) -> list[Change]:
    """Return what is not the same apart from the order of rules: settings, roots and rules."""
    return list(_changes(_flat(old.document), _flat(new.document)))


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Change]:
    for key in dict.fromkeys((*old, *new)):
        one, other = old.get(key), new.get(key)
        if one == other:
            continue
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            for change in _changes(one, other):
                yield change._replace(what=f"{key}.{change.what}")
        else:
            yield Change(key, one, other)


def _flat(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return a policy in which roots, rules and services are found by name."""
    flat: dict[str, Any] = {}
    for key, value in document.items():
        named = key in {"roots", "rules", "services"}
        flat |= {f"{key}.{entry['name']}": entry for entry in value} if named else {key: value}
    return flat


# ---- for whom ----


class ClientKind(NamedTuple):
    """Clients about whom the same rules are. `owner`, `acted_for_owns`: the uid is that of a file's owner."""

    title: str
    asker: Asker
    owns: bool = False
    acted_for_owns: bool = False


def kinds_of_clients(old: RuleSet, new: RuleSet) -> list[ClientKind]:
    """Return those whom the rules of either policy tell apart.

    Raises:
        ValueError: there are more than MOST_KINDS; the text says so.

    """
    found: dict[object, ClientKind] = {}
    for kind in itertools.islice(_candidates(old, new), _MOST_CLIENTS):
        key = _rules_about(old, kind), _rules_about(new, kind), _uids_that_count(old, new, kind)
        found.setdefault(key, kind)
        if len(found) > MOST_KINDS:
            raise ValueError(f"the rules tell more than {MOST_KINDS} kinds of clients apart")
    return list(found.values())


def kind_of_user(name: str) -> ClientKind | None:
    """Return a user, by name or number, or None if there is none: in no control group, of no rule's label."""
    client = client_of_user(name)
    if client is None:
        return None
    return ClientKind(f"user {user_text(client.uid)}", Asker(client._replace(label=_NO_LABEL)))


def _candidates(old: RuleSet, new: RuleSet) -> Iterator[ClientKind]:
    stranger = ClientFacts(_NOBODY, frozenset(), label=_NO_LABEL)
    yield ClientKind("everybody else", Asker(stranger))
    yield ClientKind("everybody else, of his own files", Asker(stranger), owns=True)
    for rule in (*old.rules, *new.rules):
        for entry in rule.clients:
            for title, client in _clients_of(entry, old, new):
                if not rule.on_behalf_of:
                    yield ClientKind(title, Asker(client))
                    if client.uid == _NOBODY:
                        yield ClientKind(f"{title}, of his own files", Asker(client), owns=True)
                for other in rule.on_behalf_of:
                    for theirs, acted_for in _clients_of(other, old, new):
                        words = f"{title}, for {theirs}"
                        yield ClientKind(words, Asker(client, acted_for))
                        if acted_for.uid == _NOBODY:
                            words += ", of his own files"
                            yield ClientKind(words, Asker(client, acted_for), acted_for_owns=True)


def _clients_of(entry: ClientMatch, old: RuleSet, new: RuleSet) -> Iterator[tuple[str, ClientFacts]]:
    """Return clients that an entry means, one for each choice that it leaves."""
    uids: Iterable[int | None] = [None] if entry.uids is None else sorted(entry.uids)
    gids: Iterable[int | None] = [None] if entry.gids is None else sorted(entry.gids)
    cgroups: Iterable[str | None] = [None] if entry.cgroups is None else sorted(entry.cgroups)
    labels: Iterable[bytes | None] = [None] if entry.labels is None else sorted(entry.labels)
    for uid, gid, cgroup, label in itertools.product(uids, gids, cgroups, labels):
        known = None if uid is None or uid < 0 else client_of_user(str(uid))
        client = known or ClientFacts(_NOBODY if uid is None else uid, frozenset())
        if gid is not None:
            client = client._replace(gids=client.gids | {gid})
        of_old, of_new = (with_control_group(client, cgroup, rules).cgroups for rules in (old, new))
        chosen = entry._replace(
            uids=None if uid is None else frozenset({uid}),
            gids=None if gid is None else frozenset({gid}),
            cgroups=None if cgroup is None else frozenset({cgroup}),
            labels=None if label is None else frozenset({label}),
        )
        told = _NO_LABEL if label is None else label
        yield entry_text(chosen), client._replace(cgroups=of_old | of_new, label=told)


def _rules_about(rules: RuleSet, kind: ClientKind) -> tuple[int, ...]:
    return tuple(rule.index for rule in rules.rules if rule.is_for(*kind.asker))


def _uids_that_count(old: RuleSet, new: RuleSet, kind: ClientKind) -> tuple[int | None, ...]:
    """Return by which uids owners are compared, where rules about this client do so."""
    owners = [
        rule.where.owner
        for rules in (old, new)
        for rule in rules.rules
        if rule.where is not None and rule.where.owner is not None and rule.is_for(*kind.asker)
    ]
    by_client = any(owner.client for owner in owners)
    by_acted_for = any(owner.on_behalf_of for owner in owners)
    client, acted_for = kind.asker.uids
    return (
        (-1 if kind.owns else client) if by_client else None,
        (-1 if kind.acted_for_owns else acted_for) if by_acted_for else None,
    )


# ---- over a tree ----


class Found(NamedTuple):
    """What two policies say of one path. `old`, `new`: the rule or the reason of each."""

    path: bytes
    kind: ClientKind
    action: str
    gained: bool
    old: str
    new: str


class Walked:
    """Counts of a comparison. `unread`: what could not be read.

    `watch` is called for each directory; `waits_for` before a mount is looked at whose server, where it is
    dead, never answers, so that whoever waits can know for what.
    """

    def __init__(self) -> None:
        self.watch: Callable[[bytes], None] = lambda _directory: None
        self.waits_for: Callable[[bytes], None] = lambda _mount: None
        self.entries = 0
        self.unread = 0
        self.first_unread: tuple[bytes, str] | None = None


class _Pair(NamedTuple):
    """One kind of client and one action, of which the policies may say different things."""

    kind: ClientKind
    action: str
    old: ActionView
    new: ActionView


def compare(
    old: RuleSet, new: RuleSet, kinds: Sequence[ClientKind], trees: Sequence[bytes], walked: Walked
) -> Iterator[Found]:
    """Put everything in `trees` to both policies, and yield what comes out otherwise."""
    policies = Policy(old), Policy(new)
    pairs = list(_pairs(*policies, kinds))
    if not pairs:
        return
    mounts = _Mounts()
    for met in _Walk((*old.roots, *new.roots), mounts, walked).over(trees):
        path, is_link = met.path, stat.S_ISLNK(met.facts.st_mode)
        for kind, action, one, other in pairs:
            names = one.decide(path), other.decide(path)
            if is_link and action in _FOLLOWING and any(name.followed is not None for name in names):
                before, after = (_follow(policy, path, kind, action) for policy in policies)
            else:
                before, after = (_decide(name, mounts, met, kind, action) for name in names)
            if before[0] is not after[0]:
                yield Found(path, kind, action, after[0], before[1], after[1])


# What follows links where a rule says so. Owners are compared with the uid of the client there.
_FOLLOWING = frozenset({"open", "stat", "list"})


def _follow(policy: Policy, path: bytes, kind: ClientKind, action: str) -> tuple[bool, str]:
    """Do as `_decide` for a symbolic link, which some rule may follow."""
    decision, reason, rule = judge(policy, kind.asker, action, path, look_as_broker).verdict
    return decision == ALLOW, reason if rule is None else f"rule {rule}"


def trees_of(old: RuleSet, new: RuleSet) -> list[bytes]:
    """Return the roots of both policies, without those within others."""
    paths = sorted({root.path for rules in (old, new) for root in rules.roots})
    outer: list[bytes] = []
    for path in paths:
        if not any(components_below(other, path) is not None for other in outer):
            outer.append(path)
    return outer


def _pairs(old: Policy, new: Policy, kinds: Sequence[ClientKind]) -> Iterator[_Pair]:
    """Return whom and what to ask for. Where the rules say the same, so do the policies."""
    rule_sets = old.rule_set, new.rule_set
    same_roots = _roots(old.rule_set) == _roots(new.rule_set)
    copies = any("copy" in rule.deliver for rules in rule_sets for rule in rules.rules)
    for kind in kinds:
        views = [policy.view(*kind.asker) for policy in (old, new)]
        about = [[rule for rule in rules.rules if rule.is_for(*kind.asker)] for rules in rule_sets]
        for action in (*ACTIONS, *(["copy"] if copies else [])):
            asked = "open" if action == "copy" else action
            said = [[_content(rule) for rule in rules if asked in rule.actions] for rules in about]
            if not same_roots or sorted(said[0]) != sorted(said[1]):
                yield _Pair(kind, action, *(view.actions[action] for view in views))


def _roots(rules: RuleSet) -> set[tuple[object, ...]]:
    return {(root.path, *root[3:]) for root in rules.roots}


# Not what a rule says, or only to whom, or how much at a time.
_NOT_COMPARED = frozenset({"clients", "index", "limits", "name", "on_behalf_of"})


def _content(rule: Rule) -> str:
    """Return what a rule says to those whom it is about."""
    return repr({key: _plain(getattr(rule, key)) for key in Rule.__slots__ if key not in _NOT_COMPARED})


def _plain(value: object) -> object:
    if isinstance(value, Glob):
        return value.pattern
    if isinstance(value, Root):
        return value.path
    if isinstance(value, frozenset):
        return sorted(map(repr, value))
    return [_plain(part) for part in value] if isinstance(value, tuple) else value


class _Met(NamedTuple):
    """Something in a tree. `mount`: the number of the mount that it is on."""

    path: bytes
    facts: os.stat_result
    mount: int


def _mount_of(descriptor: int) -> int:
    """Return the number of a mount, as openat2(2) tells mounts apart when it is to cross none.

    Not st_dev: files of one overlay have several, and one file system may be mounted twice. Before Linux 5.8
    there is nothing better.
    """
    place = place_at_once(descriptor)
    return place.mount or place.device


def _mount_at(path: bytes | str, directory: int | None = None) -> int:
    descriptor = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    try:
        return _mount_of(descriptor)
    finally:
        os.close(descriptor)


class _Mounts:
    """What the broker serves of what lies under a root, by mount and file system."""

    def __init__(self) -> None:
        self._of_roots: dict[bytes, int | None] = {}
        self._types: dict[int, int] = {}
        self._now_ns = time.time_ns()
        # More than are met: one may lie below what another one covers.
        self._points = {mount.point: mount.is_answered_by_others for mount in read_mounts()}

    def is_point(self, path: bytes) -> bool:
        """Return whether something may be mounted at a path, without a look at it."""
        return path in self._points

    def may_hang(self, path: bytes) -> bool:
        """Return whether what is mounted at a path is answered by a server."""
        return self._points.get(path, False)

    def objection(self, root: Root, met: _Met) -> str | None:
        """Return why the broker would not serve it, as in its audit, or None."""
        if not root.cross_mounts:
            if root.path not in self._of_roots:
                try:
                    self._of_roots[root.path] = _mount_at(root.path)
                except OSError:
                    self._of_roots[root.path] = None
            return None if met.mount == self._of_roots[root.path] else "crosses_mount"
        return None if self.is_served(met, helpers=root.helpers) else "filesystem"

    def surroundings(self, met: _Met) -> Surroundings:
        """Return what conditions ask beside the object: one moment for the whole comparison."""
        self.is_served(met, helpers=False)
        return Surroundings(self._now_ns, self._types[met.mount])

    def is_served(self, met: _Met, *, helpers: bool) -> bool:
        """Return whether files of the file system that something is on are ever served."""
        if met.mount not in self._types:
            self._types[met.mount] = type_of_filesystem(met.path) or 0
        kind = self._types[met.mount]
        return kind in SERVED_FILESYSTEMS or (helpers and kind in HELPED_FILESYSTEMS)


def _decide(
    name: NameDecision, mounts: _Mounts, met: _Met, kind: ClientKind, action: str
) -> tuple[bool, str]:
    """Return whether it is allowed, and the rule or the reason."""
    facts = met.facts
    if not name.allowed or name.root is None:
        return False, name.reason if name.rule is None else f"rule {name.rule.name}"
    if name.root.helpers and action in {"list", "walk"}:
        return False, "not_listed"
    refused = kind_refused(facts.st_mode, "open" if action == "copy" else action)
    refused = refused or mounts.objection(name.root, met)
    if refused is not None:
        return False, refused
    client, acted_for = kind.asker.uids
    decision = decide_object(
        name,
        facts,
        facts.st_uid if kind.owns else client,
        facts.st_uid if kind.acted_for_owns else acted_for,
        mounts.surroundings(met) if name.asks_surroundings else None,
    )
    # A condition that does not hold is named with the rule that would have allowed it.
    told = [] if decision.rule is None else [f"rule {decision.rule.name}"]
    told += [decision.reason] if decision.reason.startswith("where_") or not told else []
    return decision.allowed, ": ".join(told)


class _Walk:
    """Yields everything in trees, themselves included; symbolic links are not followed."""

    def __init__(self, roots: Sequence[Root], mounts: _Mounts, walked: Walked) -> None:
        self._roots = roots
        self._mounts = mounts
        self._walked = walked

    def over(self, trees: Sequence[bytes]) -> Iterator[_Met]:
        for tree in trees:
            if self._mounts.may_hang(tree):
                self._walked.waits_for(tree)
            try:
                facts, mount = os.lstat(tree), _mount_at(tree)
            except OSError as error:
                _note_unread(self._walked, tree, error)
                continue
            self._walked.entries += 1
            yield _Met(tree, facts, mount)
            waiting = [tree] if stat.S_ISDIR(facts.st_mode) else []
            while waiting:
                below: list[bytes] = []
                yield from self._in(waiting.pop(), below)
                waiting += sorted(below, reverse=True)

    def _in(self, directory: bytes, below: list[bytes]) -> Iterator[_Met]:
        """Yield what is in a directory, and add to `below` the directories that are to be read."""
        self._walked.watch(directory)
        try:
            descriptor = os.open(directory, _DIRECTORY)
        except OSError as error:
            _note_unread(self._walked, directory, error)
            return
        try:
            mount = _mount_of(descriptor)
            with os.scandir(descriptor) as entries:
                for entry in entries:
                    name = os.fsencode(entry.name)
                    path = os.path.join(directory, name)
                    if self._mounts.may_hang(path):
                        self._walked.waits_for(path)
                    try:
                        facts = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
                        its_mount = _mount_at(name, descriptor) if self._mounts.is_point(path) else mount
                    except OSError as error:
                        _note_unread(self._walked, path, error)
                        continue
                    self._walked.entries += 1
                    met = _Met(path, facts, its_mount)
                    yield met
                    if stat.S_ISDIR(facts.st_mode) and (its_mount == mount or self._goes_on(met)):
                        below.append(path)
        except OSError as error:
            _note_unread(self._walked, directory, error)
        finally:
            os.close(descriptor)

    def _goes_on(self, met: _Met) -> bool:
        """Return whether anything below a directory on another mount than the one above it may be served."""
        inside = any(components_below(met.path, root.path) is not None for root in self._roots)
        across = any(
            root.cross_mounts and components_below(root.path, met.path) is not None for root in self._roots
        )
        return (inside or across) and self._mounts.is_served(met, helpers=True)


def _note_unread(walked: Walked, path: bytes, error: OSError) -> None:
    if error.errno in _GONE:
        return
    walked.unread += 1
    walked.first_unread = walked.first_unread or (path, error.strerror or str(error))


# ---- counted ----


class GroupKey(NamedTuple):
    """What is counted together. `old`, `new`: the rule or the reason of either policy."""

    kind: ClientKind
    action: str
    gained: bool
    old: str
    new: str


class Group:
    """What came out alike: as many, and the first of them."""

    def __init__(self) -> None:
        self.count = 0
        self.examples: list[bytes] = []


def grouped(found: Iterable[Found], most_examples: int) -> dict[GroupKey, Group]:
    """Count what came out alike."""
    groups: dict[GroupKey, Group] = {}
    for each in found:
        key = GroupKey(each.kind, each.action, each.gained, each.old, each.new)
        group = groups.setdefault(key, Group())
        group.count += 1
        if len(group.examples) < most_examples:
            group.examples.append(each.path)
    return groups
