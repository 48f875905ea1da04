r"""Globs over whole path components, in bytes, without backtracking.

`*`, `?` and `[...]` stand for bytes of one component and never for `/`; a
component `**` stands for zero or more whole components; `\` takes the next
byte literally. A leading dot is nothing special: a policy that means hidden
files must not have to say so twice.

A glob is a small automaton over components. `Glob.start` is its set of states
before the first component and `Glob.step` moves it over one; both are called
once per directory, not once per file, since what is left for the last
component (`Glob.remainder`) is kept by the caller. Sets of states are int bit
sets. Matching one component is linear in practice and at worst the product of
both lengths: every `*` is atomic, which is right because the earliest match of
what follows it leaves the most for the rest.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_PATTERN_BYTES = 4096
_DOUBLE_STAR = None
_WILDCARDS = (b"*", b"?", b"[")


class Pattern(NamedTuple):
    """A component with wildcards: what matches it whole begins with `head` and ends with `tail`."""

    expression: re.Pattern[bytes]
    head: bytes
    tail: bytes


# Bytes: a name that is spelled out. None: `**`.
Component: TypeAlias = Pattern | bytes | None


class Remainder(NamedTuple):
    """What a glob still asks of the last component of a path.

    `anything`: every name matches. Otherwise a name matches when it is one of
    `names` or one of `patterns` matches it whole.
    """

    anything: bool
    names: tuple[bytes, ...]
    patterns: tuple[re.Pattern[bytes], ...]

    def matches(self, name: bytes) -> bool:
        """Return whether the path that ends with `name` matches the glob."""
        return (
            self.anything or name in self.names or any(pattern.fullmatch(name) for pattern in self.patterns)
        )


NOTHING = Remainder(anything=False, names=(), patterns=())


class Glob:
    """One compiled glob; immutable. Made by `compile_glob`. No two of its `components` in a row are `**`."""

    __slots__ = ("_loops", "components", "pattern")

    def __init__(self, pattern: bytes, components: Sequence[bytes]) -> None:
        self.pattern = pattern
        self.components = tuple(_compile_component(component) for component in components)
        # Bit i: component i is `**`, so state i stays where it is on any input.
        self._loops = sum(1 << i for i, component in enumerate(self.components) if component is _DOUBLE_STAR)

    @property
    def start(self) -> int:
        """The states before the first component."""
        return self._close(1)

    def step(self, states: int, component: bytes) -> int:
        """Return the states after `component`; 0 when nothing can match any more."""
        after = states & self._loops
        for i, wanted in enumerate(self.components):
            if states >> i & 1 and wanted is not _DOUBLE_STAR and _component_matches(wanted, component):
                after |= 1 << (i + 1)
        return self._close(after)

    def accepts(self, states: int) -> bool:
        """Return whether a path that ends here matches."""
        return bool(states >> len(self.components) & 1)

    def remainder(self, states: int) -> Remainder:
        """Return what one more, last component must be."""
        names: list[bytes] = []
        patterns: list[re.Pattern[bytes]] = []
        for i, wanted in enumerate(self.components):
            if not states >> i & 1:
                continue
            if wanted is _DOUBLE_STAR:
                if self.accepts(self._close(1 << i)):
                    return Remainder(anything=True, names=(), patterns=())
            elif self.accepts(self._close(1 << (i + 1))):
                if isinstance(wanted, bytes):
                    names.append(wanted)
                else:
                    patterns.append(wanted.expression)
        if not names and not patterns:
            return NOTHING
        return Remainder(anything=False, names=tuple(names), patterns=tuple(patterns))

    def matches(self, components: Sequence[bytes]) -> bool:
        """Return whether the path made of `components` matches; () is the root itself."""
        states = self.start
        for component in components:
            states = self.step(states, component)
            if not states:
                return False
        return self.accepts(states)

    def _close(self, states: int) -> int:
        """Add the states that `**` reaches by standing for nothing."""
        while True:
            more = states | (states & self._loops) << 1
            if more == states:
                return states
            states = more


def compile_glob(pattern: bytes) -> Glob:
    """Compile a glob that is relative to a root.

    Raises:
        ValueError: the pattern is empty, absolute, too long, has an empty,
            `.` or `..` component, a `**` that is not a whole component, an
            unclosed or empty `[`, a range that ends before it starts, or ends
            in a lone backslash. The text says which.

    """
    if not pattern:
        raise ValueError("the glob is empty")
    if len(pattern) > MAX_PATTERN_BYTES:
        raise ValueError(f"the glob is longer than {MAX_PATTERN_BYTES} bytes")
    if b"\0" in pattern:
        raise ValueError("the glob has a NUL byte, which no path can have")
    if pattern.startswith(b"/"):
        raise ValueError("the glob starts with '/', but globs are relative to the root")
    components = pattern.split(b"/")
    for component in components:
        if not component:
            raise ValueError("the glob has an empty component ('//' or a '/' at its end)")
        if component in (b".", b".."):
            raise ValueError(
                f"the glob has the component {component.decode()!r}, which no path here can have"
            )
    # Two `**` in a row mean what one does, and each would be a state to look at.
    doubled = {i for i in range(1, len(components)) if components[i - 1 : i + 1] == [b"**", b"**"]}
    return Glob(pattern, [component for i, component in enumerate(components) if i not in doubled])


def _component_matches(wanted: Component, component: bytes) -> bool:
    if isinstance(wanted, bytes):
        return wanted == component
    return wanted is not None and wanted.expression.fullmatch(component) is not None


def _compile_component(component: bytes) -> Component:
    if component == b"**":
        return _DOUBLE_STAR
    pieces: list[bytes] = [b""]  # regular expressions between the stars
    head: bytes | None = None  # what is literal before the first wildcard, once there was one
    literal = b""  # since the last
    at = 0
    while at < len(component):
        byte = component[at : at + 1]
        at += 1
        if byte in _WILDCARDS:
            head, literal = literal if head is None else head, b""
            if byte == b"[":
                character_class, at = _character_class(component, at)
                pieces[-1] += character_class
            elif byte == b"?":
                pieces[-1] += b"."
            elif component[at : at + 1] == b"*":
                raise ValueError("'**' stands for whole components: write it between slashes, or use '*'")
            else:
                pieces.append(b"")
            continue
        if byte == b"\\":
            byte = component[at : at + 1]
            at += 1
            if not byte:
                raise ValueError("the glob ends in a lone backslash")
        literal += byte
        pieces[-1] += re.escape(byte)
    if head is None:
        return literal
    first, *others = pieces
    if others:
        # (?>.*?X): the earliest X, never reconsidered. Only the last `.*` gives
        # bytes back, until the rest, which is of fixed length, ends at the end.
        *middle, last = others
        first += b"".join(b"(?>.*?" + piece + b")" for piece in middle if piece) + b".*" + last
    return Pattern(re.compile(first, re.DOTALL), head, literal)


def _character_class(component: bytes, at: int) -> tuple[bytes, int]:
    """Translate `[...]`; `at` is behind the bracket. Return the expression and what follows."""
    negated = component[at : at + 1] in (b"!", b"^")
    at += negated
    inside = b""
    first = True
    while True:
        byte = component[at : at + 1]
        at += 1
        if not byte:
            raise ValueError("the glob has a '[' without its ']'")
        if byte == b"]" and not first:
            break
        first = False
        if byte == b"\\":
            byte = component[at : at + 1]
            at += 1
            if not byte:
                raise ValueError("the glob has a '[' without its ']'")
        low = byte
        if component[at : at + 1] == b"-" and component[at + 1 : at + 2] not in (b"]", b""):
            high = component[at + 1 : at + 2]
            at += 2
            if high == b"\\":
                high = component[at : at + 1]
                at += 1
            if not high or high < low:
                raise ValueError("the glob has a range in '[...]' that ends before it starts")
            inside += re.escape(low) + b"-" + re.escape(high)
        else:
            inside += re.escape(low)
    return b"[" + (b"^" if negated else b"") + inside + b"]", at
