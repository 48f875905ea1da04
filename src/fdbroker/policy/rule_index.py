"""Which of many rules match a path, without a look at each of them.

The globs of all rules in a root are one tree over components: what begins alike
is there once. A path goes through it component by component and is at several
nodes at a time, as `Glob.step` has several states: a name that globs spell out
is one look-up in each of these, be it one of ten or of ten thousand, and so is
the beginning or end that is spelled out of a component with wildcards. What is
tried one by one are components of which neither is, and those that share it.

A tree grows where paths go: of what nobody asks for, nodes hold only a list.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeAlias

if TYPE_CHECKING:
    import re
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from fdbroker.policy.globs import Component, Pattern
    from fdbroker.policy.rules import Rule


MANY_PATTERNS = 200  # more to be tried on one name take long: a request may name 253 new directories
_AT_A_TIME = 16  # components, of which a path may have 2,047


class _Ahead(NamedTuple):
    """A glob of a rule, from component `at` on. `excepts`: what it matches is left out of the rule."""

    components: Sequence[Component]
    at: int
    rule: Rule
    excepts: bool


def where_looked_up(pattern: Pattern) -> tuple[int | None, int | None, bytes]:
    """Return the part of names by which a component with wildcards is found, as a slice, and what it must be.

    The longer of beginning and end. Where neither is spelled out it is nothing of the name.
    """
    if len(pattern.head) >= len(pattern.tail):
        return 0, len(pattern.head), pattern.head
    return -len(pattern.tail), None, pattern.tail


class Node:
    """Where globs are behind the same components. `stays`: behind `**`, which takes any more.

    Of a node that was reached: `names`: where each name leads that globs spell out; `patterns`: for each part
    of a name that is looked up, by what it is, what else the whole name must match, and where that leads;
    `most_tried`: how many of them one name may meet there; `more`: the node behind a `**` that stands for
    nothing yet; `matching` and `left_out`: rules of which a glob ends here, the latter by their numbers.
    """

    __slots__ = ("_ahead", "left_out", "matching", "more", "most_tried", "names", "patterns", "stays")

    names: Mapping[bytes, Node]
    patterns: Sequence[tuple[int | None, int | None, _ByPart]]
    most_tried: int
    more: Node | None
    matching: Sequence[tuple[int, Rule]]
    left_out: Sequence[int]

    def __init__(self, *, stays: bool = False) -> None:
        self.stays = stays
        self._ahead: list[_Ahead] | None = []

    def add(self, ahead: _Ahead) -> None:
        """Have a glob go on from here. Not for a node that was reached."""
        assert self._ahead is not None  # noqa: S101 - or the rule would be passed over
        self._ahead.append(ahead)

    def reach(self) -> None:
        """Make the nodes behind this one, unless that was done."""
        if self._ahead is None:
            return
        names: dict[bytes, Node] = {}
        by_pattern: dict[Pattern, Node] = {}
        more: Node | None = None
        for components, at, rule, excepts in self._ahead:
            if at == len(components):
                continue
            component = components[at]
            if component is None:
                behind = more = more or Node(stays=True)
            elif isinstance(component, bytes):
                behind = names.setdefault(component, Node())
            else:
                behind = by_pattern.setdefault(component, Node())
            behind.add(_Ahead(components, at + 1, rule, excepts))
        here = [ahead for ahead in self._ahead if ahead.at == len(ahead.components)]
        self.matching = tuple((ahead.rule.index, ahead.rule) for ahead in here if not ahead.excepts)
        self.left_out = tuple(ahead.rule.index for ahead in here if ahead.excepts)
        self.names = names or _NO_NAMES
        by_part: dict[tuple[int | None, int | None], _ByPart] = {}
        for pattern, behind in by_pattern.items():
            start, end, part = where_looked_up(pattern)
            by_part.setdefault((start, end), {}).setdefault(part, []).append((pattern.expression, behind))
        self.patterns = tuple((start, end, found) for (start, end), found in by_part.items())
        self.most_tried = sum(max(map(len, found.values())) for found in by_part.values())
        self.more = more
        self._ahead = None
        if more is not None:
            more.reach()  # behind which there is no other `**` at once


_NO_NAMES: Mapping[bytes, Node] = {}
# Components with wildcards, and where they lead, by the part of names that is looked up.
_ByPart: TypeAlias = dict[bytes, list[tuple["re.Pattern[bytes]", Node]]]
# Where a path is in the trees: a set, in the order of the rules.
Nodes: TypeAlias = dict[Node, None]


class RuleIndex:
    """The rules, by root and by the components of their globs. `ping` is called when this takes long."""

    def __init__(self, rules: Iterable[Rule], ping: Callable[[], None]) -> None:
        self._trees: dict[int, Node] = {}
        self._ping = ping
        for rule in rules:
            tree = self._trees.setdefault(rule.root.number, Node())
            for glob in rule.paths:
                tree.add(_Ahead(glob.components, 0, rule, excepts=False))
            for glob in rule.excepts:
                tree.add(_Ahead(glob.components, 0, rule, excepts=True))

    def nodes(self, root_number: int, components: Iterable[bytes]) -> Nodes:
        """Return where a path of these components below a root is; {}: nothing there is in any rule."""
        nodes: Nodes = {}
        tree = self._trees.get(root_number)
        if tree is not None:
            _reach(tree, nodes)
        self._ping()
        for at, component in enumerate(components, 1):
            if not nodes:
                break
            nodes = step(nodes, component)
            if at % _AT_A_TIME == 0:
                self._ping()
        return nodes


def step(nodes: Iterable[Node], name: bytes) -> Nodes:
    """Return where a path is behind one more component."""
    reached: Nodes = {}
    for node in nodes:
        if node.stays:
            reached[node] = None
        behind = node.names.get(name)
        if behind is not None:
            _reach(behind, reached)
        for start, end, by_part in node.patterns:
            for expression, behind in by_part.get(name[start:end], ()):
                if expression.fullmatch(name) is not None:
                    _reach(behind, reached)
    return reached


def rules_at(nodes: Collection[Node]) -> list[Rule]:
    """Return the rules that match a path which is at `nodes`, in the order of the policy."""
    found: dict[int, Rule] = {}
    for node in nodes:
        found.update(node.matching)
    if found:
        for node in nodes:
            for index in node.left_out:
                found.pop(index, None)
    return [found[index] for index in sorted(found)]


def _reach(node: Node, reached: Nodes) -> None:
    node.reach()
    reached[node] = None
    if node.more is not None:
        reached[node.more] = None
