"""May this client do this to that path? Pure functions that return the reason with the answer.

A decision has two halves. The first needs the name alone and is made before
the file system is touched, so that outside the allowed patterns what exists
and what does not get one answer. The second needs the object, for rules with
conditions.

The order, in one sentence: any deny rule that matches wins; else any allow
rule that matches; else it is denied. A path belongs to the deepest root that
contains it, and only rules in that root allow; deny rules of every root that
contains it hold, so that a root within another can't undo a refusal.

`Policy.view` gives the part of a policy that is about one client, or about a
service that acts for a client, which its own rights never serve. A view keeps,
per directory, what is left to ask of the last component: for files of one
directory a decision is a dictionary look-up. `ActionView.decide_whole` says the
same without that memory; a property test holds the two together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from fdbroker.policy.globs import NOTHING, Remainder
from fdbroker.policy.paths import MAX_NAME_BYTES, MAX_PATH_BYTES, components_below, problem_with_path
from fdbroker.policy.rules import ACTIONS, ClientFacts, FileFacts, Root, Rule, RuleSet, Surroundings

if TYPE_CHECKING:
    import re
    from collections.abc import Collection, Iterable, Sequence

    from fdbroker.policy.globs import Glob

# A client that names ever new directories fills this again and again: for all clients of the same
# rules, who then wait for a directory's rules to be read, and get the same answers.
MAX_REMEMBERED_DIRECTORIES = 4096
MAX_REMEMBERED_BYTES = 1 << 20  # of their paths, which may have 4,095 each
MAX_VIEWS = 1024
_MOST_GIDS_KEPT = 64  # of one client; a process may have 65,536
_DELIVERED_BY = {"open": "descriptor", "copy": "copy"}
_NOT_NAMES = (b"", b".", b"..")
# What stands before the last slash of what is no path ("x", "//x"), and must not be taken for "/x".
_NOT_DIRECTORIES = frozenset({b"", b"/"})


class NameDecision:
    """What the name alone decides; immutable.

    `allowed` False: refused; `reason` and `rule` say why. `allowed` True: the
    object may be looked at, and `allows`, `denies` are the rules whose
    conditions it must meet or must not meet. `plain`: nothing is asked of the
    object, `rule` allows it, and the client may know whether it exists.
    `asks_links`: some condition is about the number of links, which is only
    worth something if the name is still there afterwards. `asks_surroundings`:
    some condition is about those. `followed`: what is decided where the name
    turns out to be, or to have on its way, a symbolic link; None: that it is
    refused.
    """

    __slots__ = (
        "allowed",
        "allows",
        "asks_links",
        "asks_surroundings",
        "denies",
        "followed",
        "plain",
        "reason",
        "root",
        "rule",
    )

    def __init__(
        self,
        root: Root | None,
        reason: str,
        rule: Rule | None = None,
        allows: tuple[Rule, ...] = (),
        denies: tuple[Rule, ...] = (),
        followed: NameDecision | None = None,
    ) -> None:
        self.root = root
        self.reason = reason
        self.allows = allows
        self.denies = denies
        self.followed = followed
        self.allowed = bool(allows)
        self.plain = len(allows) == 1 and allows[0].where is None and not denies
        wheres = [rule.where for rule in allows + denies if rule.where is not None]
        self.asks_links = any(where.links is not None for where in wheres)
        self.asks_surroundings = any(where.asks_surroundings for where in wheres)
        self.rule = allows[0] if self.plain else rule


class ObjectDecision(NamedTuple):
    """What name and object decide. `rule` allowed or refused it, or came nearest."""

    allowed: bool
    reason: str
    rule: Rule | None


def decide_object(
    name: NameDecision,
    facts: FileFacts,
    client_uid: int,
    on_behalf_of_uid: int | None = None,
    surroundings: Surroundings | None = None,
) -> ObjectDecision:
    """Decide on an object whose name was allowed. `reason` is `ok` or what failed.

    `client_uid` is that of the process that asks. `on_behalf_of_uid` is that
    of the client that it acts for, whom the view behind `name` was made for as
    well; None: it asks for itself. `surroundings` are wanted where `name.asks_surroundings`.
    """
    for rule in name.denies:
        where = rule.where
        if (
            where is None
            or where.first_failure(facts, client_uid, on_behalf_of_uid, surroundings, deny=True) is None
        ):
            return ObjectDecision(allowed=False, reason="deny_rule", rule=rule)
    failure = "no_rule"
    nearest = None
    for rule in name.allows:
        where = rule.where
        failed = (
            None
            if where is None
            else where.first_failure(facts, client_uid, on_behalf_of_uid, surroundings, deny=False)
        )
        if failed is None:
            return ObjectDecision(allowed=True, reason="ok", rule=rule)
        if nearest is None:
            failure, nearest = f"where_{failed}", rule
    return ObjectDecision(allowed=False, reason=failure, rule=nearest)


class _RuleRemainder(NamedTuple):
    """What one rule still asks of the last component."""

    rule: Rule
    include: Remainder
    exclude: Remainder

    @property
    def has_patterns(self) -> bool:
        return bool(self.include.patterns or self.exclude.patterns)

    def matches(self, name: bytes) -> bool:
        return self.include.matches(name) and not self.exclude.matches(name)


class MostNames(NamedTuple):
    """One decision for all names in a directory but `exceptions`, up to so many bytes long."""

    decision: NameDecision
    exceptions: Collection[bytes]
    longest_name: int


class _Directory:
    """The rules as they stand for the names in one directory.

    `named`: the answers for roots and for what is no name, and None for names
    that some rule spells out. `others`: the one for every other name of up to
    `longest_name` bytes, None where rules have patterns. None: ask `by_name`.
    """

    __slots__ = ("_action", "_remainders", "_root", "longest_name", "named", "others")

    def __init__(
        self,
        action: ActionView,
        path: bytes,
        root: Root | None,
        remainders: Sequence[_RuleRemainder],
        roots_here: Iterable[bytes],
    ) -> None:
        self._action = action
        self._root = root
        self._remainders = tuple(remainders)
        self.longest_name = min(MAX_NAME_BYTES, MAX_PATH_BYTES - len(path) - 1)
        self.named: dict[bytes, NameDecision | None] = {}
        self.others: NameDecision | None = None
        if not any(entry.has_patterns for entry in remainders):
            for entry in remainders:
                self.named.update(dict.fromkeys((*entry.include.names, *entry.exclude.names)))
            self.others = action.combine(root, [entry.rule for entry in remainders if entry.include.anything])
        for name in (*roots_here, *_NOT_NAMES):
            self.named[name] = action.decide_whole(path + b"/" + name)

    def by_name(self, name: bytes) -> NameDecision:
        return self._action.combine(
            self._root, [entry.rule for entry in self._remainders if entry.matches(name)]
        )


class ActionView:
    """The rules of one policy that are about one client and one action."""

    def __init__(self, policy: RuleSet, rules: Iterable[Rule]) -> None:
        self._rules = tuple(rules)
        # The deepest root first, so that the first one that contains a path serves it.
        self._roots = sorted(policy.roots, key=lambda root: len(root.path), reverse=True)
        self._directories: dict[bytes, _Directory] = {}
        self._remembered_bytes = 0
        self._combined: dict[tuple[int, ...], NameDecision] = {}
        self._top: _Directory | None = None  # of "/", which is no directory's path as others are
        # By the number of a root and components below it: the rules about what is in this directory or below
        # it, and those about names in it.
        self._above: dict[tuple[int, tuple[bytes, ...]], list[Rule]] = {}
        self._named_in: dict[tuple[int, tuple[bytes, ...]], list[Rule]] = {}
        for rule in self._rules:
            for above in {glob.above for glob in rule.paths if glob.above is not None}:
                self._above.setdefault((rule.root.number, above), []).append(rule)
            for named_in in {glob.named_in for glob in rule.paths if glob.named_in is not None}:
                self._named_in.setdefault((rule.root.number, named_in), []).append(rule)
        self._deepest = max((len(above) for _, above in self._above), default=0)

    def decide(self, path: bytes) -> NameDecision:
        """Decide on `path`, which may be any bytes without NUL. Never raises."""
        directory, slash, name = path.rpartition(b"/")
        # What no path may be is never remembered, and so is decided whole.
        rules = self._directories.get(directory)
        if rules is None:
            if slash and not directory:
                rules = self._top = self._top or self._read_directory(b"")
            elif directory in _NOT_DIRECTORIES or problem_with_path(directory) is not None:
                return self.decide_whole(path)
            else:
                rules = self._directories[directory] = self._read_directory(directory)
        if len(name) > rules.longest_name:
            return self.decide_whole(path)
        return rules.named.get(name, rules.others) or rules.by_name(name)

    def decide_most_in(self, directory: bytes) -> MostNames | None:
        """Return what `decide` says of most names in a directory, for who has all of them to decide on.

        None: the rules tell names apart by patterns, or it is no path of a directory.
        """
        rules = self._directories.get(directory)
        if rules is None:
            if directory in _NOT_DIRECTORIES or problem_with_path(directory) is not None:
                return None
            rules = self._directories[directory] = self._read_directory(directory)
        if rules.others is None:
            return None
        return MostNames(rules.others, rules.named.keys(), rules.longest_name)

    def decide_whole(self, path: bytes) -> NameDecision:
        """Decide on `path` from the rules, whole; what `decide` must agree with."""
        problem = problem_with_path(path)
        if problem is not None:
            return NameDecision(None, problem)
        serving = self._serving_root(path)
        matching = []
        for rule in self._rules:
            components = components_below(rule.root.path, path)
            if (
                components is not None
                and (rule.deny or rule.root is serving)
                and any(glob.matches(components) for glob in rule.paths)
                and not any(glob.matches(components) for glob in rule.excepts)
            ):
                matching.append(rule)
        return self.combine(serving, matching)

    def combine(self, root: Root | None, matching: Sequence[Rule]) -> NameDecision:
        """Return what the rules that match a name, in policy order, amount to."""
        key = (-1 if root is None else root.number, *(rule.index for rule in matching))
        decision = self._combined.get(key)
        if decision is None:
            if len(self._combined) >= MAX_REMEMBERED_DIRECTORIES:
                self._combined.clear()
            decision = self._combined[key] = _combine(root, matching)
        return decision

    def _serving_root(self, path: bytes) -> Root | None:
        for root in self._roots:
            if components_below(root.path, path) is not None:
                return root
        return None

    def _read_directory(self, directory: bytes) -> _Directory:
        """Return the rules for a directory, which is to be remembered; b"" stands for the one at the top."""
        serving = self._serving_root(directory or b"/")
        found: dict[int, Rule] = {}
        components_of: dict[int, list[bytes]] = {}
        for root in self._roots:
            components = components_below(root.path, directory or b"/")
            if components is None:
                continue
            components_of[root.number] = components
            places = [
                self._above.get((root.number, tuple(components[:end])), ())
                for end in range(min(len(components), self._deepest) + 1)
            ]
            places.append(self._named_in.get((root.number, tuple(components)), ()))
            for rules in places:
                found.update((rule.index, rule) for rule in rules if rule.deny or root is serving)
        remainders = []
        for _, rule in sorted(found.items()):
            components = components_of[rule.root.number]
            include = _remainder(rule.paths, components)
            exclude = _remainder(rule.excepts, components)
            if include is not NOTHING and not exclude.anything:
                remainders.append(_RuleRemainder(rule, include, exclude))
        here = frozenset(
            root.path.rpartition(b"/")[2]
            for root in self._roots
            if root.path.rpartition(b"/")[0] == directory
        )
        self._remembered_bytes += len(directory)
        if (
            len(self._directories) >= MAX_REMEMBERED_DIRECTORIES
            or self._remembered_bytes > MAX_REMEMBERED_BYTES
        ):
            self._directories.clear()
            self._remembered_bytes = len(directory)
        return _Directory(self, directory, serving, remainders, here)


class View:
    """The part of one policy that is about one client: an `ActionView` per action.

    Besides those that a policy names there is `copy`: opening, to hand out the
    contents and no descriptor, by the rules about `open`. `delivers_copies`:
    whether any of these allows something.
    """

    __slots__ = ("actions", "delivers_copies")

    def __init__(self, policy: RuleSet, rules: Sequence[Rule]) -> None:
        self.actions = {
            action: ActionView(policy, [rule for rule in rules if _is_about(rule, action)])
            for action in (*ACTIONS, "copy")
        }
        self.delivers_copies = any(not rule.deny and _is_about(rule, "copy") for rule in rules)


class Policy:
    """A compiled policy with the views of it that are in use."""

    def __init__(self, rule_set: RuleSet) -> None:
        self.rule_set = rule_set
        self._views: dict[tuple[int, ...], View] = {}
        # Of those who came before: of many rules, to look at each takes milliseconds.
        self._views_of: dict[tuple[ClientFacts, ClientFacts | None], View] = {}

    def view(self, client: ClientFacts, on_behalf_of: ClientFacts | None = None) -> View:
        """Return the view of a client, or of a service that acts for one (`on_behalf_of`).

        Those that the same rules are about share one.
        """
        asker = client, on_behalf_of
        known = self._views_of.get(asker)
        if known is not None:
            return known
        rules = [rule for rule in self.rule_set.rules if rule.is_for(client, on_behalf_of)]
        key = tuple(rule.index for rule in rules)
        view = self._views.get(key)
        if view is None:
            if len(self._views) >= MAX_VIEWS:
                self._views.clear()
            view = self._views[key] = View(self.rule_set, rules)
        if sum(len(facts.gids) for facts in asker if facts is not None) <= _MOST_GIDS_KEPT:
            if len(self._views_of) >= MAX_VIEWS:
                self._views_of.clear()
            self._views_of[asker] = view
        return view


def _is_about(rule: Rule, action: str) -> bool:
    """A rule that allows opening does so for what it delivers; one that denies it, for everything."""
    delivery = _DELIVERED_BY.get(action)
    if delivery is None:
        return action in rule.actions
    return "open" in rule.actions and (rule.deny or delivery in rule.deliver)


def _remainder(globs: Sequence[Glob], components: Sequence[bytes]) -> Remainder:
    """Return what any of `globs` asks of the last component below `components`."""
    names: list[bytes] = []
    patterns: list[re.Pattern[bytes]] = []
    for glob in globs:
        states = glob.start
        for component in components:
            states = glob.step(states, component)
            if not states:
                break
        rest = glob.remainder(states)
        if rest.anything:
            return rest
        names.extend(rest.names)
        patterns.extend(rest.patterns)
    if not names and not patterns:
        return NOTHING
    return Remainder(anything=False, names=tuple(names), patterns=tuple(patterns))


def _combine(root: Root | None, matching: Sequence[Rule]) -> NameDecision:
    denies = [rule for rule in matching if rule.deny]
    for rule in denies:
        if rule.where is None:
            return NameDecision(root, "deny_rule", rule)
    allows = [rule for rule in matching if not rule.deny]
    if not allows:
        return NameDecision(root, "outside_roots" if root is None else "no_rule")
    following = [rule for rule in allows if rule.follows_links]
    followed = NameDecision(root, "ok", None, _needed(following), tuple(denies)) if following else None
    return NameDecision(root, "ok", None, _needed(allows), tuple(denies), followed)


def _needed(allows: Sequence[Rule]) -> tuple[Rule, ...]:
    """One rule that asks nothing of the object makes the others' conditions moot."""
    unconditional = [rule for rule in allows if rule.where is None][:1]
    return tuple(unconditional or allows)
