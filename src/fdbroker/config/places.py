"""Where in its file a policy says what, for whoever speaks of it after it was compiled."""

from __future__ import annotations

from collections.abc import Mapping as Map
from typing import NamedTuple

from fdbroker.config.errors import Mark, ProblemList
from fdbroker.config.names import printable
from fdbroker.config.yaml_tree import List, Mapping, Node, Text, parse_yaml


class Place(NamedTuple):
    """A place in a file; `mark` None: the file as a whole. `number` is that of the file among several."""

    file: str
    mark: Mark | None
    number: int = 0

    @property
    def order(self) -> tuple[int, int, int]:
        """By which places are sorted."""
        return (self.number, 0, 0) if self.mark is None else (self.number, self.mark.line, self.mark.column)

    def __str__(self) -> str:
        """Return `file:line:column`, printable."""
        return printable(self.file) if self.mark is None else str(self.mark)


class RulePlace(NamedTuple):
    """The places of one rule: its name, its keys, and the globs of those that have some."""

    place: Place
    keys: Map[str, Place]
    globs: Map[tuple[str, bytes], Place]

    def key(self, name: str) -> Place:
        """Return the place of a key, that of the rule if it is left out."""
        return self.keys.get(name, self.place)

    def glob(self, key: str, pattern: bytes) -> Place:
        """Return the place of a glob."""
        return self.globs.get((key, pattern), self.place)


class Places:
    """The places of a policy's roots, rules and settings, by name."""

    def __init__(self, file: str) -> None:
        self._whole = Place(file, None)
        self._settings: dict[str, Place] = {}
        self._roots: dict[str, Place] = {}
        self._rules: dict[str, RulePlace] = {}

    def setting(self, key: str) -> Place:
        """Return the place of a key of the policy."""
        return self._settings.get(key, self._whole)

    def root(self, name: str) -> Place:
        """Return the place of a root."""
        return self._roots.get(name, self._whole)

    def rule(self, name: str) -> RulePlace:
        """Return the places of a rule."""
        return self._rules.get(name) or RulePlace(self._whole, {}, {})

    def add(self, text: bytes, file: str, number: int = 0) -> None:
        """Add those of a file, which has no errors."""
        tree = parse_yaml(text, ProblemList(file))
        entries = tree.entries if isinstance(tree, Mapping) else {}
        for key, entry in entries.items():
            self._settings.setdefault(key, Place(file, entry.key.mark, number))
            if key == "roots" and isinstance(entry.value, Mapping):
                for name, root in entry.value.entries.items():
                    self._roots[name] = Place(file, root.key.mark, number)
            if key == "rules" and isinstance(entry.value, List):
                for rule in entry.value.items:
                    self._add_rule(rule, file, number)

    def _add_rule(self, rule: Node, file: str, number: int) -> None:
        entries = rule.entries if isinstance(rule, Mapping) else {}
        if "name" not in entries or not isinstance(entries["name"].value, Text):
            return
        name = entries["name"].value
        globs: dict[tuple[str, bytes], Place] = {
            (key, text.value.encode()): Place(file, text.mark, number)
            for key in ("paths", "except")
            if key in entries
            for text in _texts(entries[key].value)
        }
        keys = {key: Place(file, entry.key.mark, number) for key, entry in entries.items()}
        self._rules[name.value] = RulePlace(Place(file, name.mark, number), keys, globs)


def _texts(node: Node) -> list[Text]:
    items = node.items if isinstance(node, List) else [node]
    return [item for item in items if isinstance(item, Text)]
