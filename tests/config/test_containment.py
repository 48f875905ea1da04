"""Proofs about globs: what is said to be covered is, path for path, and what is apart has none in common."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fdbroker.config.containment import Components, covers, disjoint, leading_names, literal, parse
from fdbroker.policy.globs import compile_glob

NAMES = [b"a", b"b", b"c", b"ab", b"ba", b"aa", b"-", b"]", b"*", b"\\", b"\xff", b".a"]
PATHS = [path for length in range(3) for path in itertools.product(NAMES[:7], repeat=length)]
PATHS += itertools.product(NAMES[:5], repeat=3)
PATHS += [(name,) for name in NAMES[7:]]

pieces = st.sampled_from(
    ["a", "b", "*", "?", "[ab]", "[!a]", "[^b]", "[a-c]", "[]a]", "[a-]", "\\*", "\\a", "-"]
)
components = st.one_of(
    st.just("**"),
    st.sampled_from(["a", "b", "*", "?", "??", "a*", "*a", "[ab]", "[!a]*", "*a*", "?*", "ab"]),
    st.lists(pieces, min_size=1, max_size=3).map("".join).filter(lambda text: "**" not in text),
)
globs = st.lists(components, min_size=1, max_size=4).map("/".join)


def matches(components: Components, path: tuple[bytes, ...]) -> bool:
    return covers([components], literal(path))


@given(globs, st.sampled_from(PATHS))
def test_glob_taken_apart_matches_what_the_policys_matcher_matches(
    glob: str, path: tuple[bytes, ...]
) -> None:
    expected = compile_glob(glob.encode()).matches(path)
    assert matches(parse(glob.encode()), path) is expected
    assert disjoint(parse(glob.encode()), literal(path)) is not expected


@pytest.fixture
def reached() -> set[object]:
    """Return a set for what the examples come to: without it nobody sees that nothing is ever covered."""
    return set()


@pytest.mark.unmeasured
def test_what_is_covered_is_matched_path_for_path(reached: set[object]) -> None:
    @settings(max_examples=200, deadline=None)
    @given(st.lists(globs, min_size=1, max_size=3), globs)
    def check(wide: list[str], narrow: str) -> None:
        proven = covers([parse(glob.encode()) for glob in wide], parse(narrow.encode()))
        reached.add(proven)
        if proven:
            compiled = [compile_glob(glob.encode()) for glob in wide]
            only = compile_glob(narrow.encode())
            matched = [path for path in PATHS if only.matches(path)]
            reached.add(("several", len(wide) > 1 and bool(matched)))
            assert all(any(glob.matches(path) for glob in compiled) for path in matched)

    check()
    assert {True, False, ("several", True)} <= reached


@pytest.mark.unmeasured
def test_what_is_disjoint_has_no_path_in_common(reached: set[object]) -> None:
    @settings(max_examples=200, deadline=None)
    @given(globs, globs)
    def check(one: str, other: str) -> None:
        proven = disjoint(parse(one.encode()), parse(other.encode()))
        reached.add(proven)
        both = [compile_glob(glob.encode()) for glob in (one, other)]
        common = [path for path in PATHS if all(glob.matches(path) for glob in both)]
        if proven:
            assert not common
        assert disjoint(parse(other.encode()), parse(one.encode())) is proven

    check()
    assert reached == {True, False}


@given(globs)
def test_every_glob_covers_itself_and_is_covered_by_two_stars(glob: str) -> None:
    components = parse(glob.encode())
    assert covers([components], components)
    assert covers([parse(b"**")], components)


@pytest.mark.parametrize(
    ("wide", "narrow"),
    [
        (["*/.ssh/**"], "*/.ssh/id"),
        (["*/.ssh/**"], "*/.ssh"),
        (["**/.ssh/**"], "*/.ssh/**"),
        (["**/*.log"], "nginx/*.log"),
        (["**/*.log"], "**/access.log"),
        (["a*"], "ab*"),
        (["*"], "?"),
        (["?*"], "*"),
        (["[a-z]"], "[b-y]"),
        (["[!a]"], "b"),
        (["*a*"], "*ba"),
        (["**/x/**"], "**/y/x/**"),
        (["a/**/b"], "a/b"),
        (["x", "a/**", "b/**"], "b/c"),
        (["a/**", "**/a/**"], "**/a/*"),
        (["**/*"], "*/**/*"),
        (["a/**"], "a/**/b/**"),
    ],
)
def test_what_is_plainly_covered_is_found_to_be(wide: list[str], narrow: str) -> None:
    assert covers([parse(glob.encode()) for glob in wide], parse(narrow.encode()))


@pytest.mark.parametrize(
    ("wide", "narrow"),
    [
        (["*/.ssh/**"], "**/.ssh/**"),
        (["*"], "**"),
        (["**/*"], "**"),
        (["a/*"], "a"),
        (["[!a]*"], "*"),
        (["a", "b"], "c"),
        (["*a"], "*"),
        (["a*b"], "a*"),
        (["a/**"], "*/**"),
    ],
)
def test_what_is_not_covered_is_not_said_to_be(wide: list[str], narrow: str) -> None:
    assert not covers([parse(glob.encode()) for glob in wide], parse(narrow.encode()))


def test_names_that_all_paths_begin_with_are_told() -> None:
    assert leading_names(parse(b"a/b\\*/*/c")) == (b"a", b"b*")
    assert leading_names(parse(b"**/a")) == ()
    assert leading_names(parse(b"a/b")) == (b"a", b"b")


def test_globs_that_are_made_to_take_long_are_given_up_on() -> None:
    long = "/".join(["**", "*a*b*"] * 40).encode()
    other = "/".join(["**", "*b*a*"] * 40).encode()
    assert not covers([parse(long)], parse(other))
    name = ("*" + "*".join("ab" * 60)).encode()
    assert isinstance(covers([parse(name)], parse(name[:-2] + b"[ab]*")), bool)
