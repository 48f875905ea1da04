"""A small, strict part of YAML, read into a tree of text, lists and mappings with places.

PyYAML's parser finds the structure; its composer and constructors, which turn
text into objects, are never used. Nothing has an implicit type: `no`, `0777`
and `22:30` stay the text that the author wrote. What makes YAML surprising is
refused, each with its place: anchors, aliases, merge keys, tags, directives,
several documents, duplicate keys, values over several lines, and characters
that make a file read differently from what it says.

The parser in pure Python is chosen over libyaml on purpose: this runs as root,
and a policy is small enough that memory safety is worth more than speed.
"""

from __future__ import annotations

import itertools
import re
from typing import NamedTuple, NoReturn, TypeAlias

import yaml

from fdbroker.config.errors import Mark, ProblemList, quoted
from fdbroker.config.sources import MAX_BYTES

MAX_DEPTH = 32
# A file full of them is not a text file; looking up the place of each takes time.
_MAX_CHARACTERS_SHOWN = 20

# Line breaks that editors do not show as such, controls, and invisible or
# direction-changing characters: each can hide a rule from who reads the file.
_FORBIDDEN_RAW = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f"
    "\ufeff\ufff9-\ufffb\ufffe\uffff\U000e0000-\U000e007f]|\r(?!\n)"
)
# By escapes in double quotes, invisible characters are plain to see and so
# allowed; controls, line breaks and what is not a character are not.
_FORBIDDEN_VALUE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufffe\uffff]")

_QUOTE_IT = "a value that begins with one of * ? [ { & ! % @ ` must be in quotes"
_SYNTAX_CURE = f"check brackets, quotes and indentation here; {_QUOTE_IT}"


class Text(NamedTuple):
    """A scalar, as text. `plain`: written without quotes, so that plain and empty means no value."""

    mark: Mark
    value: str
    plain: bool


class List(NamedTuple):
    """A list."""

    mark: Mark
    items: list[Node]


class Mapping(NamedTuple):
    """A mapping; `entries` keeps the order of the file."""

    mark: Mark
    entries: dict[str, Entry]


class Unusable(NamedTuple):
    """Stands where something was refused; its problem is already noted, so readers skip it."""

    mark: Mark


class Entry(NamedTuple):
    """One key of a mapping with its value."""

    key: Text
    value: Node


Node: TypeAlias = Text | List | Mapping | Unusable


class _StopReadingError(Exception):
    """What follows can't be read; the problem is noted."""


def parse_yaml(text: bytes, problems: ProblemList) -> Node | None:
    """Parse `text`; every problem goes to `problems`.

    The tree is returned even when there were problems, as far as it is
    usable, so that its readers can report theirs in the same run; None when
    the structure itself can't be read.
    """
    try:
        return _parse(_decode(text, problems), problems)
    except _StopReadingError:
        return None


def _decode(text: bytes, problems: ProblemList) -> str:
    if len(text) > MAX_BYTES:
        _stop(problems, None, f"the file has more than {MAX_BYTES} bytes", "a policy is smaller: use globs")
    try:
        decoded = text.decode()
    except UnicodeDecodeError as error:
        before = text[: error.start].decode()
        _stop(
            problems,
            _mark_after(before, problems.file),
            f"byte 0x{text[error.start]:02x} is not UTF-8",
            "save the file as UTF-8; bytes of names that are not UTF-8 are matched by ? and *",
        )
    forbidden = list(itertools.islice(_FORBIDDEN_RAW.finditer(decoded), _MAX_CHARACTERS_SHOWN))
    for match in forbidden:
        problems.add(
            _mark_after(decoded[: match.start()], problems.file),
            f"character U+{ord(match[0]):04X} is not allowed: it can make the file read differently",
            "remove it; in a glob, match it by ?",
        )
    if forbidden:
        raise _StopReadingError
    return decoded


def _mark_after(before: str, file: str) -> Mark:
    line_start = before.rfind("\n") + 1
    return Mark(before.count("\n") + 1, len(before) - line_start + 1, file)


def _stop(problems: ProblemList, mark: Mark | None, message: str, cure: str) -> NoReturn:
    problems.add(mark, message, cure)
    raise _StopReadingError


def _mark(mark: object) -> Mark:
    # The stubs leave open whether a mark is there; the parser in Python always sets it.
    if not isinstance(mark, yaml.Mark):  # pragma: no cover
        return Mark(1, 1, "")
    return Mark(mark.line + 1, mark.column + 1, mark.name)


def _parse(text: str, problems: ProblemList) -> Node:
    # Of the loader only its scanner and parser run: get_event() constructs nothing.
    loader = yaml.SafeLoader(text)
    loader.name = problems.file
    builder = _Builder(problems)
    try:
        while (event := loader.get_event()) is not None:  # type: ignore[no-untyped-call]
            builder.take(event)
    except yaml.MarkedYAMLError as error:
        _note_syntax_error(error, _mark(loader.get_mark()), problems)
    except (yaml.YAMLError, ValueError, OverflowError):
        # PyYAML lets these out for escapes beyond Unicode and over-long numbers in directives.
        reason = "not valid YAML: an escape or number is out of range"
        _stop(problems, _mark(loader.get_mark()), reason, _SYNTAX_CURE)
    finally:
        loader.dispose()
    if builder.root is None:
        _stop(problems, Mark(1, 1, problems.file), "the file is empty", "begin with 'version: 1'")
    return builder.root


def _note_syntax_error(error: yaml.MarkedYAMLError, here: Mark, problems: ProblemList) -> NoReturn:
    mark = _mark(error.problem_mark) if error.problem_mark is not None else here
    reason = ": ".join(part for part in (error.context, error.problem) if part)
    cure = _SYNTAX_CURE
    if "alias" in reason or "anchor" in reason or "next token" in reason or "tag" in reason:
        cure = _QUOTE_IT
    if "'\\t'" in reason:
        cure = "indent with spaces, not with tabs"
    elif "mapping values are not allowed" in reason:
        cure = "check the indentation, and put a value that has ': ' in it in quotes"
    _stop(problems, mark, f"not valid YAML: {reason}", cure)


class _OpenSequence:
    def __init__(self, mark: Mark) -> None:
        self.node = List(mark, [])

    def add(self, node: Node, problems: ProblemList) -> None:  # noqa: ARG002 - as _OpenMapping.add
        self.node.items.append(node)


class _OpenMapping:
    def __init__(self, mark: Mark) -> None:
        self.node = Mapping(mark, {})
        self._key: Node | None = None

    def add(self, node: Node, problems: ProblemList) -> None:
        if self._key is None:
            self._key = node
            return
        key, self._key = self._key, None
        if self._is_good(key, problems) and isinstance(key, Text):
            self.node.entries[key.value] = Entry(key, node)

    def _is_good(self, key: Node, problems: ProblemList) -> bool:
        if isinstance(key, Unusable):
            return False
        if not isinstance(key, Text):
            problems.add(key.mark, "a key must be text, not a list or a mapping", "write 'key: value'")
        elif key.value == "<<" and key.plain:
            problems.add(key.mark, "merge keys ('<<') are not allowed", "write the keys out")
        elif not key.value:
            problems.add(key.mark, "a key is empty", "write 'key: value'")
        elif key.value in self.node.entries:
            first = self.node.entries[key.value].key.mark
            problems.add(
                key.mark,
                f"key {quoted(key.value)} is given twice, first {first.seen_from(key.mark)}",
                "keep one of the two",
            )
        else:
            return True
        return False


class _Builder:
    """Builds the tree from parser events, with a stack of its own instead of recursion."""

    def __init__(self, problems: ProblemList) -> None:
        self.root: Node | None = None
        self._problems = problems
        self._open: list[_OpenSequence | _OpenMapping] = []

    def take(self, event: yaml.Event) -> None:
        mark = _mark(event.start_mark)
        if isinstance(event, yaml.DocumentStartEvent):
            self._start_document(event, mark)
        elif isinstance(event, yaml.AliasEvent):
            self._problems.add(
                mark,
                f"aliases are not allowed, and '*' begins one: {quoted(f'*{event.anchor}')}",
                f'for a glob, write it in quotes: "*{event.anchor}"; otherwise write the value out',
            )
            self._place(Unusable(mark))
        elif isinstance(event, yaml.ScalarEvent):
            self._place(self._scalar(event, mark))
        elif isinstance(event, yaml.SequenceStartEvent):
            self._begin(_OpenSequence(mark), event)
        elif isinstance(event, yaml.MappingStartEvent):
            self._begin(_OpenMapping(mark), event)
        elif isinstance(event, yaml.CollectionEndEvent):
            self._place(self._open.pop().node)

    def _start_document(self, event: yaml.DocumentStartEvent, mark: Mark) -> None:
        if self.root is not None:
            _stop(self._problems, mark, "a second document begins here", "keep one document in a file")
        if event.version or event.tags:
            self._problems.add(mark, "directives ('%YAML', '%TAG') are not allowed", "remove the line")

    def _begin(self, collection: _OpenSequence | _OpenMapping, event: yaml.CollectionStartEvent) -> None:
        self._refuse_tag_and_anchor(event, collection.node.mark)
        self._open.append(collection)
        if len(self._open) > MAX_DEPTH:
            _stop(
                self._problems,
                collection.node.mark,
                f"lists and mappings are nested deeper than {MAX_DEPTH}",
                "no setting is that deep: check the brackets",
            )

    def _place(self, node: Node) -> None:
        if self._open:
            self._open[-1].add(node, self._problems)
        else:
            self.root = node

    def _scalar(self, event: yaml.ScalarEvent, mark: Mark) -> Node:
        if self._refuse_tag_and_anchor(event, mark):
            return Unusable(mark)
        if event.style in ("|", ">") or _mark(event.end_mark).line != mark.line:
            self._problems.add(
                mark,
                "a value goes over several lines",
                "write it on one line; check that no '-' or ':' is missing in the next",
            )
            return Unusable(mark)
        bad = _FORBIDDEN_VALUE.search(event.value)
        if bad:
            self._problems.add(
                mark,
                f"the value has the character U+{ord(bad[0]):04X}, which is not allowed",
                "remove it; in a glob, match it by ?",
            )
            return Unusable(mark)
        return Text(mark, event.value, plain=not event.style)

    def _refuse_tag_and_anchor(self, event: yaml.ScalarEvent | yaml.CollectionStartEvent, mark: Mark) -> bool:
        """Note a tag or an anchor; return whether there was one."""
        if event.tag is not None:
            self._problems.add(
                mark,
                f"tags are not allowed, and '!' begins one: {quoted(event.tag)}",
                "remove it, or put the whole value in quotes",
            )
        if event.anchor is not None:
            self._problems.add(
                mark,
                f"anchors are not allowed, and '&' begins one: {quoted('&' + event.anchor)}",
                "remove it, or put the whole value in quotes",
            )
        return event.tag is not None or event.anchor is not None
