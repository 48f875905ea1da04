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
directory a decision is a dictionary look-up. Directories in which the same is
left share it. `ActionView.decide_whole` says the same without memory and index;
a property test holds the two together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from fdbroker.policy.paths import MAX_NAME_BYTES, MAX_PATH_BYTES, components_below, problem_with_path
from fdbroker.policy.rule_index import MANY_PATTERNS, RuleIndex, rules_at, step
from fdbroker.policy.rules import ACTIONS, ClientFacts, FileFacts, Root, Rule, RuleSet, Surroundings

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from fdbroker.policy.rule_index import Node, Nodes

# A client that names ever new directories fills this again and again: for all clients of the same
# rules, who then wait for a directory's rules to be read, and get the same answers.
MAX_REMEMBERED_DIRECTORIES = 4096
# Of their paths, which may have 4,095 each, and about that of what is left to ask in them.
MAX_REMEMBERED_BYTES = 2 << 20
MAX_COMBINED_SIZE = 1 << 17  # nodes, and rules that match there, in all of what is remembered of names
MAX_VIEWS = 1024
# More that rules spell out are looked up where the rules are: a dictionary of their own, for each directory
# in which others are left, would be the work that a client could have done again and again.
_MOST_NAMED = 64
_BYTES_LEFT, _BYTES_FOR_EACH = 300, 60  # of what is left to ask, and more for a name or node
_MOST_GIDS_KEPT = 64  # of one client; a process may have 65,536
_DELIVERED_BY = {"open": "descriptor", "copy": "copy"}
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


_new = tuple.__new__  # what a NamedTuple does itself, by a function in Python


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
            return _new(ObjectDecision, (True, "ok", rule))
        if nearest is None:
            failure, nearest = f"where_{failed}", rule
    return ObjectDecision(allowed=False, reason=failure, rule=nearest)


class MostNames(NamedTuple):
    """One decision for all names in a directory but `exceptions`, up to so many bytes long."""

    decision: NameDecision
    exceptions: Collection[bytes]
    longest_name: int


_NOT_NAMES = {
    b"": NameDecision(None, "trailing_slash"),
    b".": NameDecision(None, "dot_component"),
    b"..": NameDecision(None, "dot_component"),
}


class _Directory:
    """The rules as they stand for the names in one directory, or in several in which the same is left to ask.

    `named`: the answers for roots and for what is no name, and None for names
    that some rule spells out. `others`: the one for every other name of up to
    `longest_name` bytes, None where rules have patterns, or spell out many names. None: ask `by_name`.
    """

    __slots__ = ("_action", "_nodes", "_root", "longest_name", "named", "others")

    def __init__(
        self,
        action: ActionView,
        root: Root | None,
        nodes: Nodes,
        longest_name: int,
        roots_here: Mapping[bytes, NameDecision],
    ) -> None:
        self._action = action
        self._root = root
        self._nodes = tuple(nodes)
        self.longest_name = longest_name
        self.named: dict[bytes, NameDecision | None] = {}
        self.others: NameDecision | None = None
        if not any(node.patterns for node in nodes) and sum(len(node.names) for node in nodes) <= _MOST_NAMED:
            for node in nodes:
                self.named.update(dict.fromkeys(node.names))
            self.others = action.at(root, [node for node in nodes if node.stays])
        self.named.update(_NOT_NAMES)
        self.named.update(roots_here)

    @property
    def size(self) -> int:
        """About how many bytes this takes."""
        return _BYTES_LEFT + _BYTES_FOR_EACH * (len(self.named) + len(self._nodes))

    def by_name(self, name: bytes) -> NameDecision:
        return self._action.at(self._root, step(self._nodes, name))


class _SlowDirectory(_Directory):
    """One in which so many patterns are tried on each name that a request for several takes long."""

    __slots__ = ()

    def by_name(self, name: bytes) -> NameDecision:
        self._action.ping()
        return super().by_name(name)


class ActionView:
    """The rules of one policy that are about one client and one action."""

    def __init__(self, policy: RuleSet, rules: Iterable[Rule], ping: Callable[[], None]) -> None:
        self._rules = tuple(rules)
        self.ping = ping
        # The deepest root first, so that the first one that contains a path serves it.
        self._roots = sorted(policy.roots, key=lambda root: len(root.path), reverse=True)
        self._roots_in: dict[bytes, list[bytes]] = {}
        for root in self._roots:
            parent, _, name = root.path.rpartition(b"/")
            self._roots_in.setdefault(parent, []).append(name)
        self._index: RuleIndex | None = None  # made when it is needed: of many rules, that takes long
        self._directories: dict[bytes, _Directory] = {}
        # What several directories share, by the root, the nodes, and how long a name may be.
        self._shared: dict[tuple[int | Node, ...], _Directory] = {}
        self._remembered_bytes = 0
        self._combined: dict[tuple[int | Node, ...], NameDecision] = {}  # by the root and the nodes
        self._combined_size = 0
        self._top: _Directory | None = None  # of "/", which is no directory's path as others are

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
        return _combine(serving, matching)

    def at(self, root: Root | None, nodes: Collection[Node]) -> NameDecision:
        """Return what the rules amount to for a name that is at `nodes` and served by `root`."""
        key: tuple[int | Node, ...] = (-1 if root is None else root.number, *nodes)
        decision = self._combined.get(key)
        if decision is None:
            matching = [rule for rule in rules_at(nodes) if rule.deny or rule.root is root]
            self._combined_size += len(key) + len(matching)
            if len(self._combined) >= MAX_REMEMBERED_DIRECTORIES or self._combined_size > MAX_COMBINED_SIZE:
                self._combined.clear()
                self._combined_size = len(key) + len(matching)
            decision = self._combined[key] = _combine(root, matching)
        return decision

    def _serving_root(self, path: bytes) -> Root | None:
        for root in self._roots:
            if components_below(root.path, path) is not None:
                return root
        return None

    def _nodes(self, path: bytes) -> tuple[Root | None, Nodes]:
        """Return the root that serves a path, and where it is among the rules of all that contain it."""
        index = self._index = self._index or RuleIndex(self._rules, self.ping)
        serving = None
        nodes: Nodes = {}
        for root in self._roots:
            components = components_below(root.path, path)
            if components is not None:
                serving = serving or root
                nodes.update(index.nodes(root.number, components))
        return serving, nodes

    def _read_directory(self, directory: bytes) -> _Directory:
        """Return the rules for a directory, which is to be remembered; b"" stands for the one at the top."""
        serving, nodes = self._nodes(directory or b"/")
        longest_name = min(MAX_NAME_BYTES, MAX_PATH_BYTES - len(directory) - 1)
        roots_here = {
            name: self.at(*self._nodes(directory + b"/" + name)) for name in self._roots_in.get(directory, ())
        }
        if not directory:
            roots_here[b""] = self.at(serving, nodes)  # "/", be it a root or not
        key: tuple[int | Node, ...] = (-1 if serving is None else serving.number, longest_name, *nodes)
        read = None if roots_here else self._shared.get(key)
        new = read is None
        if read is None:
            slow = sum(node.most_tried for node in nodes) > MANY_PATTERNS
            read = (_SlowDirectory if slow else _Directory)(self, serving, nodes, longest_name, roots_here)
        self._remembered_bytes += len(directory) + (read.size if new else 0)
        if (
            len(self._directories) >= MAX_REMEMBERED_DIRECTORIES
            or self._remembered_bytes > MAX_REMEMBERED_BYTES
        ):
            self._directories.clear()
            self._shared.clear()
            self._remembered_bytes = len(directory) + read.size
        if not roots_here:
            self._shared[key] = read
        return read


class View:
    """The part of one policy that is about one client: an `ActionView` per action.

    Besides those that a policy names there is `copy`: opening, to hand out the
    contents and no descriptor, by the rules about `open`. `delivers_copies`:
    whether any of these allows something.
    """

    __slots__ = ("actions", "delivers_copies")

    def __init__(self, policy: RuleSet, rules: Sequence[Rule], ping: Callable[[], None]) -> None:
        self.actions = {
            action: ActionView(policy, [rule for rule in rules if _is_about(rule, action)], ping)
            for action in (*ACTIONS, "copy")
        }
        self.delivers_copies = any(not rule.deny and _is_about(rule, "copy") for rule in rules)


class Policy:
    """A compiled policy with the views of it that are in use.

    `ping` is told that work goes on: when a directory is met for the first time, on the way there, and for
    each name in one where many patterns are tried.
    """

    def __init__(self, rule_set: RuleSet, ping: Callable[[], None] = lambda: None) -> None:
        self.rule_set = rule_set
        self._ping = ping
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
            view = self._views[key] = View(self.rule_set, rules, self._ping)
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
