"""What a glob means, said a second time: patterns as values, matching by tables over bytes and components.

Nothing here is taken from fdbroker.policy: the patterns are made as values and
only then written down, so that a test compares the reading of the text as well.
"""

from __future__ import annotations

from typing import NamedTuple

from hypothesis import strategies as st

ALPHABET = b"ab*?[]\\!^-.\n~\x7f\xff"


class Byte(NamedTuple):
    """One byte; `quoted`: written with a backslash though it need not be."""

    value: int
    quoted: bool = False

    def text(self) -> bytes:
        byte = bytes([self.value])
        return b"\\" + byte if self.quoted or byte in (b"*", b"?", b"[", b"\\") else byte

    def holds(self, byte: int) -> bool:
        return byte == self.value


class AnyByte(NamedTuple):
    """`?`."""

    def text(self) -> bytes:
        return b"?"

    def holds(self, byte: int) -> bool:
        return True


class ByteClass(NamedTuple):
    """`[...]`: pairs of first and last byte. `sign` is what negates, or nothing."""

    sign: bytes
    ranges: tuple[tuple[int, int], ...]

    def text(self) -> bytes:
        inside = b"".join(
            self._one(low) if low == high else self._one(low) + b"-" + self._one(high)
            for low, high in self.ranges
        )
        return b"[" + self.sign + inside + b"]"

    def holds(self, byte: int) -> bool:
        return any(low <= byte <= high for low, high in self.ranges) is not bool(self.sign)

    @staticmethod
    def _one(value: int) -> bytes:
        byte = bytes([value])
        return b"\\" + byte if byte in b"]\\-!^" else byte


class Star(NamedTuple):
    """`*`."""

    def text(self) -> bytes:
        return b"*"


Token = Byte | AnyByte | ByteClass | Star
# None is `**`.
Component = tuple[Token, ...] | None
Pattern = tuple[Component, ...]


def written(pattern: Pattern) -> bytes:
    """Return the pattern as text."""
    return b"/".join(
        b"**" if component is None else b"".join(token.text() for token in component) for component in pattern
    )


def component_matches(tokens: tuple[Token, ...], name: bytes) -> bool:
    """Say whether tokens match a name: row by row, `reached[i]` says that the first i bytes are used up."""
    reached = [True] + [False] * len(name)
    for token in tokens:
        if isinstance(token, Star):
            for i in range(1, len(name) + 1):
                reached[i] = reached[i] or reached[i - 1]
        else:
            reached = [False] + [reached[i] and token.holds(byte) for i, byte in enumerate(name)]
    return reached[-1]


def matches(pattern: Pattern, path: list[bytes]) -> bool:
    """Say whether a pattern matches a path: the same table, over components."""
    reached = [True] + [False] * len(path)
    for component in pattern:
        if component is None:
            for i in range(1, len(path) + 1):
                reached[i] = reached[i] or reached[i - 1]
        else:
            reached = [False] + [
                reached[i] and component_matches(component, name) for i, name in enumerate(path)
            ]
    return reached[-1]


def _without_neighbouring_stars(tokens: list[Token]) -> tuple[Token, ...]:
    return tuple(
        token
        for i, token in enumerate(tokens)
        if not (i and isinstance(token, Star) and isinstance(tokens[i - 1], Star))
    )


_bytes = st.sampled_from(list(ALPHABET))
_ranges = st.tuples(_bytes, _bytes).map(lambda pair: (min(pair), max(pair)))
tokens = st.one_of(
    st.builds(Byte, _bytes, st.booleans()),
    st.builds(Star),
    st.builds(AnyByte),
    st.builds(ByteClass, st.sampled_from([b"", b"!", b"^"]), st.lists(_ranges, min_size=1).map(tuple)),
)
components = st.one_of(
    st.none(),
    st.lists(tokens, min_size=1, max_size=6)
    .map(_without_neighbouring_stars)
    .filter(lambda made: written((made,)) not in {b".", b".."}),
)
patterns = st.lists(components, min_size=1, max_size=5).map(tuple)
names = st.binary(min_size=1, max_size=8).map(
    lambda raw: bytes(ALPHABET[byte % len(ALPHABET)] for byte in raw)
)
paths = st.lists(names, max_size=5)


@st.composite
def matching_pairs(draw: st.DrawFn) -> tuple[Pattern, list[bytes]]:
    """Give a pattern and a path made to match it."""
    pattern = draw(patterns)
    path = []
    for component in pattern:
        if component is None:
            path += draw(st.lists(names, max_size=2))
            continue
        name = b""
        for token in component:
            if isinstance(token, Star):
                name += draw(st.one_of(st.just(b""), names))
            else:
                choices = [byte for byte in ALPHABET if token.holds(byte)]
                if choices:
                    name += bytes([draw(st.sampled_from(choices))])
        path.append(name or b"a")
    return pattern, path
