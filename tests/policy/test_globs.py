"""Globs, against a second description of what they mean, and their limits."""

from __future__ import annotations

import resource

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fdbroker.policy import globs
from fdbroker.policy.globs import MAX_PATTERN_BYTES, Glob, compile_glob
from tests.policy import glob_model
from tests.policy.glob_model import (
    Byte,
    ByteClass,
    Component,
    Pattern,
    Star,
    matching_pairs,
    paths,
    patterns,
    written,
)
from tests.processes import in_child

CPU_SECONDS = 20  # hours would be needed by a matcher that goes back


def split(path: bytes) -> list[bytes]:
    return path.split(b"/") if path else []


@given(patterns, paths)
@example(((Star(), Byte(ord("*")), Star()),), [b"a*b"])
@example(((ByteClass(b"", ((42, 42), (42, 42))),),), [b"*"])
@example(((Byte(ord("\\")), Star()),), [b"\\x"])
@example((None, None), [])
def test_glob_matches_what_the_tables_say(pattern: Pattern, path: list[bytes]) -> None:
    assert compile_glob(written(pattern)).matches(path) is glob_model.matches(pattern, path)


@given(matching_pairs())
def test_glob_matches_what_was_made_to_match_it_and_such_begins_and_ends_with_what_is_spelled_out(
    pair: tuple[Pattern, list[bytes]],
) -> None:
    pattern, path = pair
    glob = compile_glob(written(pattern))
    assert glob.matches(path) is glob_model.matches(pattern, path)
    if None in glob.components or not glob.matches(path):
        return  # components and names do not go together one by one
    for component, name in zip(glob.components, path, strict=True):
        if isinstance(component, globs.Pattern):
            assert name.startswith(component.head)
            assert name.endswith(component.tail)


@pytest.mark.parametrize(
    ("pattern", "components"),
    [
        (b"**", 1),
        (b"**/**", 1),
        (b"/".join([b"**"] * 1300), 1),
        (b"a/**/**/**/b", 3),
        (b"**/**/a/**/**", 3),
        (b"**/*/**", 3),
        (rb"**/\*\*/**", 3),
    ],
)
def test_double_stars_in_a_row_are_one_component_to_look_at(pattern: bytes, components: int) -> None:
    glob = compile_glob(pattern)
    assert len(glob.components) == components
    # One state before each component and one behind them all.
    assert glob.start.bit_length() <= components + 1
    assert glob.pattern == pattern


def states_after(glob: Glob, directory: list[bytes]) -> int:
    states = glob.start
    for component in directory:
        states = glob.step(states, component)
    return states


@given(matching_pairs(), paths, st.integers(1, 5))
def test_any_number_of_double_stars_in_a_row_is_one_and_what_is_left_for_the_last_component_agrees(
    pair: tuple[Pattern, list[bytes]], other: list[bytes], number: int
) -> None:
    pattern, path = pair
    repeated: list[Component] = []
    for component in pattern:
        repeated += [component] * (1 if component is not None else number)
    more, glob = compile_glob(written(tuple(repeated))), compile_glob(written(pattern))
    assert more.components == glob.components
    assert more.start == glob.start
    for tried in (path, other, path[:-1], [*path, b"a"]):
        expected = glob_model.matches(tuple(repeated), tried)
        assert more.matches(tried) is glob.matches(tried) is expected
        assert glob.accepts(states_after(glob, tried)) is expected
        if tried:
            rest = glob.remainder(states_after(glob, tried[:-1]))
            assert rest.matches(tried[-1]) is expected


@pytest.mark.parametrize(
    ("component", "head", "tail"),
    [
        (b"*", b"", b""),
        (b"a*", b"a", b""),
        (b"*.log", b"", b".log"),
        (b"a?b[x-z]c*d", b"a", b"d"),
        (rb"\*a*\*\b", b"*a", b"*b"),
        (b"[a]b", b"", b"b"),
        (b"a*?", b"a", b""),
    ],
)
def test_what_a_component_with_wildcards_begins_and_ends_with(
    component: bytes, head: bytes, tail: bytes
) -> None:
    [compiled] = compile_glob(component).components
    assert isinstance(compiled, globs.Pattern)
    assert (compiled.head, compiled.tail) == (head, tail)


@pytest.mark.parametrize(
    ("pattern", "matching", "others"),
    [
        (b"a", [b"a"], [b"", b"b", b"aa", b"a/a", b"A"]),
        (b"*", [b"a", b".a", b"a\nb", b"\xff"], [b"", b"a/b"]),
        (b"**", [b"", b"a", b"a/b", b"a/b/c"], []),
        (b"a/**", [b"a", b"a/b", b"a/b/c"], [b"", b"b", b"b/a"]),
        (b"**/a", [b"a", b"b/a", b"b/c/a"], [b"", b"b", b"a/b"]),
        (b"a/**/b", [b"a/b", b"a/x/b", b"a/b/b", b"a/x/y/b"], [b"a", b"b", b"a/b/c"]),
        (b"**/a/**", [b"a", b"a/b", b"b/a", b"b/a/c"], [b"", b"b", b"b/c"]),
        (b"*.log", [b".log", b"a.log", b".a.log"], [b"log", b"a.log.1", b"d/a.log"]),
        (b"a*b*c", [b"abc", b"axbxc", b"abbcc", b"abcbc"], [b"ab", b"acb", b"abcd"]),
        (b"?", [b"a", b"\n", b"\xff"], [b"", b"ab", b"\xc3\xa4"]),
        (b"[abc]", [b"a", b"c"], [b"d", b"ab", b"A"]),
        (b"[a-c]", [b"a", b"b", b"c"], [b"-", b"d"]),
        (b"[!a-c]", [b"d", b"-", b"\n", b"\xff"], [b"a", b"b"]),
        (b"[^a-c]", [b"d", b"^"], [b"a", b"b"]),
        (b"[a^]", [b"a", b"^"], [b"b"]),
        (b"[a!]", [b"a", b"!"], [b"b"]),
        (b"[]a]", [b"]", b"a"], [b"b"]),
        (b"[!]a]", [b"b", b"["], [b"]", b"a"]),
        (b"[a-]", [b"a", b"-"], [b"b"]),
        (b"[-a]", [b"a", b"-"], [b"b"]),
        (rb"[\]]", [b"]"], [b"\\"]),
        (rb"[a\-c]", [b"a", b"-", b"c"], [b"b"]),
        (rb"[+-\]]", [b"+", b"A", b"]"], [b"*", b"^"]),
        (b"[--0]", [b"-", b".", b"0"], [b",", b"1"]),
        (b"[[]", [b"["], [b"]"]),
        (b"[[:alpha:]]", [b"[]", b":]", b"a]"], [b"b", b"a"]),
        (b"[a&&b]", [b"a", b"b", b"&"], [b"c"]),
        (b"[a||b~~c]", [b"a", b"|", b"~"], [b"d"]),
        (b"[*?]", [b"*", b"?"], [b"a"]),
        (b"[**]x", [b"*x"], [b"x", b"ax"]),
        (rb"[\d]", [b"d"], [b"1", b"\\"]),
        (rb"\*", [b"*"], [b"a", b"\\*"]),
        (rb"\a\[\]", [b"a[]"], [b"a"]),
        (rb"*\**", [b"*", b"a*", b"*b", b"a*b"], [b"a", b""]),
        (rb"\\*", [b"\\", b"\\a"], [b"a", b"*"]),
        (b"a]", [b"a]"], [b"a"]),
        (b"{a,b}", [b"{a,b}"], [b"a", b"b"]),
        (b"(a|b)+$", [b"(a|b)+$"], [b"a"]),
        ("ä?".encode(), ["äb".encode()], ["ää".encode()]),
        (b"...", [b"..."], [b"..", b"a.."]),
        (b"\xff*", [b"\xff", b"\xff\xfe"], [b"\xfe"]),
    ],
)
def test_glob_means_what_the_documentation_says(
    pattern: bytes, matching: list[bytes], others: list[bytes]
) -> None:
    glob = compile_glob(pattern)
    assert [path for path in matching if not glob.matches(split(path))] == []
    assert [path for path in others if glob.matches(split(path))] == []


def test_no_byte_class_and_no_wildcard_ever_spans_two_components() -> None:
    for pattern in (b"a?b", b"a*b", b"a[!x]b", b"a[.-0]b"):
        glob = compile_glob(pattern)
        assert not glob.matches([b"a", b"b"])
        # No component holds a slash; where one did, at least nothing is taken for a boundary.
        assert glob.matches([b"a.b"])


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        (b"", "empty"),
        (b"/a", "starts with '/'"),
        (b"a//b", "empty component"),
        (b"a/", "empty component"),
        (b"a/./b", "'.'"),
        (b"..", "'..'"),
        (b"a**", "whole components"),
        (b"**a", "whole components"),
        (b"***", "whole components"),
        (b"a/b**/c", "whole components"),
        (rb"\\**", "whole components"),
        (b"[a", "without its ']'"),
        (b"[]", "without its ']'"),
        (b"[!]", "without its ']'"),
        (b"[a/b]", "without its ']'"),
        (rb"[a\]", "without its ']'"),
        (rb"[+-\]", "without its ']'"),
        (b"[a\\", "without its ']'"),
        (b"[b-a]", "range"),
        (b"a\\", "lone backslash"),
        (b"a\\/b", "lone backslash"),
        (b"a\0b", "NUL"),
        (b"a" * (MAX_PATTERN_BYTES + 1), "longer than"),
    ],
)
def test_glob_that_says_nothing_clear_is_refused_with_the_reason(pattern: bytes, said: str) -> None:
    with pytest.raises(ValueError, match=said.replace("*", r"\*").replace(".", r"\.")):
        compile_glob(pattern)


@pytest.mark.unmeasured
@pytest.mark.parametrize(
    ("pattern", "path"),
    [
        (b"*a" * 2000 + b"*b", [b"a" * 255]),
        (b"*a" * 100 + b"*b", [b"a" * 255]),
        (b"*[ab]" * 800 + b"c", [b"ab" * 127]),
        (b"*?" * 120 + b"*b", [b"a" * 255]),
        (b"*a?" * 80 + b"[!a]", [b"a" * 255]),
        (b"/".join([b"**", b"a"] * 300) + b"/b", [b"a"] * 1000),
        (b"/".join([b"**"] * 1300) + b"/b", [b"a"] * 2000),
        (b"/".join([b"**", b"*a*a*a*b"] * 300), [b"a" * 200] * 20),
    ],
    ids=["stars", "fewer stars", "classes", "question marks", "mixed", "a in **", "only **", "both"],
)
def test_no_pattern_makes_matching_go_back_and_forth(pattern: bytes, path: list[bytes]) -> None:
    """A matcher that backtracks needs more than the age of the universe; the kernel would end it."""

    def match() -> bool:
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
        glob = compile_glob(pattern)
        rest = glob.remainder(states_after(glob, path[:-1]))
        return glob.matches(path) or rest.matches(path[-1])

    assert in_child(match) is False
