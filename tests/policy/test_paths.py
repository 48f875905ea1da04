"""What may be asked for at all, before any rule is read."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdbroker.policy.paths import MAX_NAME_BYTES, MAX_PATH_BYTES, components_below, problem_with_path

LONGEST_NAME = b"n" * MAX_NAME_BYTES
LONGEST_PATH = (b"/" + b"d" * 99) * 40 + b"/" + b"x" * 94


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        (b"/", None),
        (b"/a", None),
        (b"/a/b", None),
        (b"/.a", None),
        (b"/a.", None),
        (b"/...", None),
        (b"/..a", None),
        (b"/ ", None),
        (b"/\n", None),
        (b"/\xff\xfe", None),
        (b"/a\\", None),
        (b"/*", None),
        (b"/" + LONGEST_NAME, None),
        (b"/" + LONGEST_NAME + b"/a", None),
        (LONGEST_PATH, None),
        (b"", "empty"),
        (b"a", "relative"),
        (b"a/b", "relative"),
        (b"./a", "relative"),
        (b"../a", "relative"),
        (b"~/a", "relative"),
        (b"/a/", "trailing_slash"),
        (b"//", "trailing_slash"),
        (b"/a//", "trailing_slash"),
        (b"//a", "empty_component"),
        (b"/a//b", "empty_component"),
        (b"/.", "dot_component"),
        (b"/..", "dot_component"),
        (b"/./a", "dot_component"),
        (b"/a/../b", "dot_component"),
        (b"/a/..", "dot_component"),
        (b"/a/.", "dot_component"),
        (b"/" + LONGEST_NAME + b"n", "name_too_long"),
        (b"/a/" + LONGEST_NAME + b"n/b", "name_too_long"),
        (LONGEST_PATH + b"x", "path_too_long"),
        (b"/a\0b", "nul"),
        (b"\0", "nul"),
    ],
)
def test_path_is_taken_or_refused_with_its_reason(path: bytes, problem: str | None) -> None:
    assert problem_with_path(path) == problem


def test_limits_are_those_of_the_kernel() -> None:
    assert len(LONGEST_PATH) == MAX_PATH_BYTES == os.pathconf("/", "PC_PATH_MAX") - 1
    assert os.pathconf("/", "PC_NAME_MAX") == MAX_NAME_BYTES


@given(st.binary(max_size=40) | st.lists(st.sampled_from([b"/", b".", b"a", b"\0"])).map(b"".join))
def test_path_that_is_taken_has_one_spelling(path: bytes) -> None:
    if problem_with_path(path) is None:
        assert os.path.normpath(path) == path
        assert os.path.isabs(path)
        assert b"\0" not in path


@pytest.mark.parametrize(
    ("root", "path", "components"),
    [
        (b"/", b"/", []),
        (b"/", b"/a", [b"a"]),
        (b"/", b"/a/b", [b"a", b"b"]),
        (b"/a", b"/a", []),
        (b"/a", b"/a/b/c", [b"b", b"c"]),
        (b"/a", b"/ab", None),
        (b"/a", b"/", None),
        (b"/a", b"/b/a", None),
        (b"/a/b", b"/a", None),
    ],
)
def test_components_below_a_root_are_told(root: bytes, path: bytes, components: list[bytes] | None) -> None:
    assert components_below(root, path) == components
