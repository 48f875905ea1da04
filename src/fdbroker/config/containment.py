r"""Whether all that one glob matches is matched by others, or nothing is by both: proven from them alone.

For who reads a policy before it is in force. An answer is a proof: `covers` is
False where no proof was found, `disjoint` likewise. That happens where only
several patterns together leave no name out, as `[ab]` and `[!ab]` do.

A glob is taken apart anew, into sets of bytes, since what `fdbroker.policy.globs`
makes of it can match and no more; a property test holds the two together.
Both questions are walks over pairs of states, of the one glob and of the
others, first within a component and then over components.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeAlias

# A set of bytes, bit n for byte n. No name has a NUL or a slash in it.
_ANY_BYTE = (1 << 256) - 1 & ~(1 << 0) & ~(1 << ord("/"))
_STAR = 0  # stands for any number of bytes; no set of bytes is empty but one that matches nothing
_NOTHING = -1  # the place of an empty set, as of [!\x01-\xff]
# A component: what its bytes may be, in order. None: `**`, any number of components.
Component: TypeAlias = tuple[int, ...] | None
Components: TypeAlias = tuple[Component, ...]
_ANY_NAME: tuple[int, ...] = (_STAR,)
# Beyond so many pairs of states no proof is looked for: nobody writes such globs.
_MOST_STATES = 4096


def parse(pattern: bytes) -> Components:
    """Return the components of a glob that `compile_glob` accepts."""
    components: list[Component] = []
    for text in pattern.split(b"/"):
        component = None if text == b"**" else _component(text)
        if component is not None or components[-1:] != [None]:
            components.append(component)
    return tuple(components)


def matches_all_of_a_depth(components: Components) -> bool:
    """Return whether no component leaves out any name: only how many there are decides what is matched."""
    return all(component is None or component == _ANY_NAME for component in components)


def literal(names: Iterable[bytes]) -> Components:
    """Return the components that match just these names, one after another."""
    return tuple(tuple(1 << byte for byte in name) for name in names)


def leading_names(components: Components) -> tuple[bytes, ...]:
    """Return the names that all paths begin with that the components match."""
    names: list[bytes] = []
    for component in components:
        if component is None or not all(item > 0 and item & (item - 1) == 0 for item in component):
            break
        names.append(bytes(item.bit_length() - 1 for item in component))
    return tuple(names)


def covers(wide: Sequence[Components], narrow: Components) -> bool:
    """Return whether every path that `narrow` matches is proven to be matched by one of `wide`."""
    # Of `wide` those states are kept that are reached whatever names stand in the path. More may be, never
    # fewer, so that if these accept, the globs do.
    start = _close(wide, frozenset((index, 0) for index in range(len(wide))))
    waiting = [(0, start)]
    seen = set(waiting)
    while waiting:
        at, states = waiting.pop()
        if at == len(narrow):
            if not any(place == len(wide[index]) for index, place in states):
                return False
            continue
        component = narrow[at]
        if component is None:
            nexts = [(at + 1, states), (at, _close(wide, _step(wide, states, _ANY_NAME)))]
        elif not _matches_any_name(component):
            continue
        else:
            nexts = [(at + 1, _close(wide, _step(wide, states, component)))]
        for following in nexts:
            if following not in seen:
                if len(seen) >= _MOST_STATES:
                    return False
                seen.add(following)
                waiting.append(following)
    return True


def disjoint(one: Components, other: Components) -> bool:
    """Return whether no path is matched by both, which is proven if it is said."""
    waiting = [(0, 0)]
    seen = set(waiting)
    while waiting:
        here, there = waiting.pop()
        if (here, there) == (len(one), len(other)):
            return False
        for following in _both_go_on(one, here, other, there):
            if following not in seen:
                seen.add(following)
                waiting.append(following)
    return True


def _both_go_on(one: Components, here: int, other: Components, there: int) -> Iterator[tuple[int, int]]:
    ours = one[here] if here < len(one) else ()
    theirs = other[there] if there < len(other) else ()
    if ours is None:
        yield here + 1, there
    if theirs is None:
        yield here, there + 1
    if ours == () or theirs == ():
        return
    if _share_a_name(_ANY_NAME if ours is None else ours, _ANY_NAME if theirs is None else theirs):
        yield here + (ours is not None), there + (theirs is not None)


_States: TypeAlias = frozenset[tuple[int, int]]


def _close(wide: Sequence[Components], states: _States) -> _States:
    """Add what `**` reaches by standing for nothing. No two of them are in a row."""
    return states | {
        (index, place + 1)
        for index, place in states
        if place < len(wide[index]) and wide[index][place] is None
    }


def _step(wide: Sequence[Components], states: _States, narrow: tuple[int, ...]) -> _States:
    after = set()
    for index, place in states:
        if place == len(wide[index]):
            continue
        component = wide[index][place]
        if component is None:
            after.add((index, place))
        elif _component_covers(component, narrow):
            after.add((index, place + 1))
    return frozenset(after)


# ---- within a component ----


@functools.lru_cache(maxsize=65536)
def _component_covers(wide: tuple[int, ...], narrow: tuple[int, ...]) -> bool:
    """Return whether every name that `narrow` matches, `wide` does."""
    waiting = [(places, _close_component(wide, {0}), False) for places in _places(narrow, 0)]
    seen = set(waiting)
    while waiting:
        at, states, begun = waiting.pop()
        if at == len(narrow):
            if begun and len(wide) not in states:  # no name is empty
                return False
            continue
        item = narrow[at]
        allowed = _ANY_BYTE if item == _STAR else item
        after = [at] if item == _STAR else [at + 1]
        for piece in _pieces(allowed, [wide[place] for place in states if place < len(wide)]):
            moved = set()
            for place in states:
                if place == len(wide):
                    continue
                if wide[place] == _STAR:
                    moved.add(place)
                elif wide[place] > 0 and wide[place] & piece:
                    moved.add(place + 1)
            closed = _close_component(wide, moved)
            for place in {place for start in after for place in _places(narrow, start)}:
                following = (place, closed, True)
                if following not in seen:
                    if len(seen) >= _MOST_STATES:
                        return False
                    seen.add(following)
                    waiting.append(following)
    return True


def _pieces(allowed: int, items: Iterable[int]) -> list[int]:
    """Cut a set of bytes into parts that each of `items` has whole or not at all."""
    if allowed == _NOTHING:
        return []
    pieces = [allowed]
    for item in {item for item in items if item > 0}:
        pieces = [part for piece in pieces for part in (piece & item, piece & ~item) if part]
    return pieces


def _places(component: tuple[int, ...], at: int) -> list[int]:
    """Return `at` and the places behind it that stars reach by standing for nothing."""
    places = [at]
    while at < len(component) and component[at] == _STAR:
        at += 1
        places.append(at)
    return places


def _close_component(component: tuple[int, ...], states: Iterable[int]) -> frozenset[int]:
    return frozenset(place for state in states for place in _places(component, state))


@functools.lru_cache(maxsize=65536)
def _share_a_name(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Return whether some name is matched by both."""
    waiting = [(here, there, False) for here in _places(one, 0) for there in _places(other, 0)]
    seen = set(waiting)
    while waiting:
        here, there, begun = waiting.pop()
        if (here, there) == (len(one), len(other)):
            if begun:
                return True
            continue
        if here == len(one) or there == len(other):
            continue
        ours, theirs = one[here], other[there]
        if _NOTHING in (ours, theirs):
            continue
        if not (ours or _ANY_BYTE) & (theirs or _ANY_BYTE):
            continue
        nexts = [
            (place, elsewhere, True)
            for place in _places(one, here + (ours != _STAR))
            for elsewhere in _places(other, there + (theirs != _STAR))
        ]
        for following in nexts:
            if following not in seen:
                seen.add(following)
                waiting.append(following)
    return False


def _matches_any_name(component: tuple[int, ...]) -> bool:
    return _share_a_name(component, _ANY_NAME)


# ---- reading, as fdbroker.policy.globs does ----


def _component(text: bytes) -> tuple[int, ...]:
    items: list[int] = []
    at = 0
    while at < len(text):
        byte = text[at]
        at += 1
        if byte == ord("*"):
            items.append(_STAR)
        elif byte == ord("?"):
            items.append(_ANY_BYTE)
        elif byte == ord("["):
            item, at = _character_class(text, at)
            items.append(item or _NOTHING)
        else:
            if byte == ord("\\"):
                byte = text[at]
                at += 1
            items.append(1 << byte)
    return tuple(items)


def _character_class(text: bytes, at: int) -> tuple[int, int]:
    """Return the set of `[...]`, and what follows; `at` is behind the bracket."""
    negated = text[at] in b"!^"
    at += negated
    inside = 0
    first = True
    while first or text[at] != ord("]"):
        first = False
        low, at = _one_byte(text, at)
        high = low
        if text[at : at + 1] == b"-" and text[at + 1 : at + 2] not in (b"]", b""):
            high, at = _one_byte(text, at + 1)
        inside |= (1 << (high + 1)) - (1 << low)
    return (~inside if negated else inside) & _ANY_BYTE, at + 1


def _one_byte(text: bytes, at: int) -> tuple[int, int]:
    if text[at] == ord("\\"):
        at += 1
    return text[at], at + 1
