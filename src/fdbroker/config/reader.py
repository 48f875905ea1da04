"""Typed getters at the edge of the tree: a good value, or a noted problem and None.

Nothing here raises on bad input, so that one run finds every problem of a
file. A value that is missing because of a noted problem is None; callers skip
it without another word.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from fdbroker.config.errors import Mark, ProblemList, closest, did_you_mean, quoted
from fdbroker.config.scalars import ScalarError
from fdbroker.config.structures import Structure, keys_of
from fdbroker.config.yaml_tree import List, Mapping, Node, Text, Unusable

_T = TypeVar("_T")
_Kind = TypeVar("_Kind", Text, List, Mapping)
_WORDS = {Text: "text", List: "a list", Mapping: "a mapping"}


class Reader:
    """Reads nodes of one file's tree. `what` names the thing in messages: `rule 'x': paths`."""

    def __init__(self, problems: ProblemList) -> None:
        self._problems = problems

    def add(self, mark: Mark, message: str, cure: str | Callable[[], str]) -> None:
        """Note a problem that the caller found."""
        self._problems.add(mark, message, cure)

    def mapping(self, node: Node | None, what: str, cure: str) -> Mapping | None:
        """Return `node` if it is a mapping with at least one key."""
        mapping = self.mapping_or_empty(node, what, cure)
        if mapping is not None and not mapping.entries:
            self._problems.add(mapping.mark, f"{what} is empty", cure)
            return None
        return mapping

    def mapping_or_empty(self, node: Node | None, what: str, cure: str) -> Mapping | None:
        """Return `node` if it is a mapping, where {} has a meaning."""
        return self._of_kind(node, Mapping, what, cure)

    def entries(
        self,
        mapping: Mapping,
        what: str,
        structure: type[Structure],
        also_required: Sequence[str] = (),
    ) -> dict[str, Node]:
        """Return the values of a mapping that has the keys of `structure`.

        Unknown keys and missing ones are noted. A missing
        key is not noted when an unknown one looks like it: that is one
        mistake, not two.
        """
        keys = keys_of(structure)
        before = f"{what}: " if what else ""
        free = [name for name in keys if name not in mapping.entries]
        found: dict[str, Node] = {}
        meant: set[str | None] = set()
        for key, entry in mapping.entries.items():
            if key in keys:
                found[key] = entry.value
            else:
                first, colon, rest = key.partition(":")
                if colon and rest and first in free:  # no typo of the key, but of YAML
                    meant.add(first)
                    cure = f"write a space behind the colon: {quoted(f'{first}: {rest}')}"
                else:
                    meant.add(closest(key, free))
                    cure = did_you_mean(key, free, f"the keys here are {', '.join(keys)}")
                self._problems.add(entry.key.mark, f"{before}unknown key {quoted(key)}", cure)
        required = [name for name, needed in keys.items() if needed]
        for name in (*required, *also_required):
            if name not in mapping.entries and name not in meant:
                value = "1" if name == "version" else "..."  # the only one of every file that there is
                self._problems.add(
                    mapping.mark, f"{before}key {quoted(name)} is missing", f"add '{name}: {value}'"
                )
        return found

    def items(self, node: Node | None, what: str, cure: str) -> list[Node]:
        """Return the nodes of a list, which may be empty; [] if it is no list."""
        found = self._of_kind(node, List, what, cure)
        return [] if found is None else found.items

    def text(self, node: Node | None, what: str, cure: str) -> Text | None:
        """Return `node` if it is a text that is not empty."""
        text = self._of_kind(node, Text, what, cure)
        if text is not None and not text.value:
            self._problems.add(text.mark, f"{what} is empty", cure)
            return None
        return text

    def texts(self, node: Node | None, what: str, cure: str) -> list[Text]:
        """Return a single text, or the texts of a list without empty or repeated ones."""
        if not isinstance(node, List):
            single = self.text(node, what, cure)
            return [] if single is None else [single]
        if not node.items:
            self._problems.add(node.mark, f"{what}: the list is empty", cure)
        found: dict[str, Text] = {}
        for item in node.items:
            item_cure = cure if isinstance(item, Text) else "a text that begins with [ or { must be in quotes"
            text = self.text(item, f"{what}: an item", item_cure)
            if text is None:
                continue
            first = found.setdefault(text.value, text)
            if first is not text:
                self._problems.add(
                    text.mark,
                    f"{what}: {quoted(text.value)} is given twice, first {first.mark.seen_from(text.mark)}",
                    "keep one of the two",
                )
        return list(found.values())

    def parsed(self, node: Node | None, what: str, parse: Callable[[str], _T], cure: str) -> _T | None:
        """Return what `parse` makes of a text; `parse` raises ScalarError on a bad one."""
        text = self.text(node, what, cure)
        if text is None:
            return None
        try:
            return parse(text.value)
        except ScalarError as error:
            self._problems.add(text.mark, f"{what}: {error.message}", error.cure)
            return None

    def choice(self, node: Node | None, what: str, words: Sequence[str]) -> str | None:
        """Return a text that is one of `words`."""
        text = self.text(node, what, f"write {_or(words)}")
        return text.value if text is not None and self._is_one_of(text, what, words) else None

    def choices(self, node: Node | None, what: str, words: Sequence[str]) -> list[str]:
        """Return texts that are each one of `words`."""
        texts = self.texts(node, what, f"write some of {', '.join(words)}")
        return [text.value for text in texts if self._is_one_of(text, what, words)]

    def _is_one_of(self, text: Text, what: str, words: Sequence[str]) -> bool:
        if text.value in words:
            return True
        self._problems.add(
            text.mark,
            f"{what}: {quoted(text.value)} is not a choice here",
            lambda: did_you_mean(text.value, words, f"write {_or(words)}"),
        )
        return False

    def _of_kind(self, node: Node | None, kind: type[_Kind], what: str, cure: str) -> _Kind | None:
        """Return `node` if it is of that kind and has a value; note it otherwise, once."""
        if node is None or isinstance(node, Unusable):
            return None
        if isinstance(node, Text) and node.plain and not node.value:
            self._problems.add(node.mark, f"{what} has no value", cure)
            return None
        if not isinstance(node, kind):
            reason = f"{what} must be {_WORDS[kind]}, not {_WORDS[type(node)]}"
            self._problems.add(node.mark, reason, cure)
            return None
        return node


def _or(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
