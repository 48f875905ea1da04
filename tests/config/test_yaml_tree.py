"""The strict part of YAML: what is refused, where, and that nothing gets through as another type."""

# ruff: noqa: E501
# A case of a table is one line, with the message as it is printed.

from __future__ import annotations

import time

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fdbroker.config.errors import MAX_PROBLEMS, ConfigError, ProblemList
from fdbroker.config.sources import MAX_BYTES
from fdbroker.config.yaml_tree import MAX_DEPTH, List, Mapping, Node, Text, parse_yaml


def problems_of(text: bytes | str) -> list[str]:
    problems = ProblemList("f")
    parse_yaml(text.encode() if isinstance(text, str) else text, problems)
    try:
        problems.raise_if_any()
    except ConfigError as error:
        return str(error).splitlines()
    return []


def plain(node: Node) -> object:
    if isinstance(node, Text):
        return node.value
    if isinstance(node, List):
        return [plain(item) for item in node.items]
    assert isinstance(node, Mapping)
    return {key: plain(entry.value) for key, entry in node.entries.items()}


def tree_of(text: str) -> object:
    problems = ProblemList("f")
    tree = parse_yaml(text.encode(), problems)
    problems.raise_if_any()
    assert tree is not None
    return plain(tree)


@pytest.mark.parametrize(
    "text",
    [
        "no",
        "yes",
        "on",
        "off",
        "true",
        "null",
        "~",
        "0777",
        "0o777",
        "22:30",
        "1_000",
        "08",
        "1e3",
        ".inf",
        ".nan",
        "0x10",
        "2026-01-01",
        "=",
        "2001-12-14T21:59:43Z",
    ],
)
def test_every_scalar_stays_the_text_that_was_written(text: str) -> None:
    assert tree_of(f"key: {text}") == {"key": text}


def test_a_tree_keeps_order_and_places() -> None:
    tree = parse_yaml(b"b: [x, 'y']\na: {c: \"d\"}\n", ProblemList("f"))
    assert isinstance(tree, Mapping)
    assert list(tree.entries) == ["b", "a"]
    assert tree.entries["a"].key.mark == (2, 1, "f")
    inner = tree.entries["a"].value
    assert isinstance(inner, Mapping)
    value = inner.entries["c"].value
    assert value == Text((2, 8, "f"), "d", plain=False)  # type: ignore[arg-type]  # a Mark is a tuple


def test_columns_count_characters_and_not_bytes() -> None:
    assert problems_of("ключ: &a x")[0].startswith("f:1:7: anchors")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: &x 1", "f:1:4: anchors are not allowed, and '&' begins one: '&x'; remove it, or put the whole value in quotes"),
        ("a: *x", "f:1:4: aliases are not allowed, and '*' begins one: '*x'; for a glob, write it in quotes: \"*x\"; otherwise write the value out"),
        ("- */.ssh", "f:1:4: not valid YAML: while scanning an alias: expected alphabetic or numeric character, but found '/'; a value that begins with one of * ? [ { & ! % @ ` must be in quotes"),
        ("<<: {a: 1}", "f:1:1: merge keys ('<<') are not allowed; write the keys out"),
        ("a: !!str x", "f:1:4: tags are not allowed, and '!' begins one: 'tag:yaml.org,2002:str'; remove it, or put the whole value in quotes"),
        ("a: !x {}", "f:1:4: tags are not allowed, and '!' begins one: '!x'; remove it, or put the whole value in quotes"),
        ("a: !!python/object/apply:os.system [id]", "f:1:4: tags are not allowed, and '!' begins one: 'tag:yaml.org,2002:python/object/apply:os.system'; remove it, or put the whole value in quotes"),
        ("%YAML 1.1\n---\na: b", "f:1:1: directives ('%YAML', '%TAG') are not allowed; remove the line"),
        ("%TAG ! x:\n---\na: b", "f:1:1: directives ('%YAML', '%TAG') are not allowed; remove the line"),
        ("a: 1\n---\nb: 2", "f:2:1: a second document begins here; keep one document in a file"),
        ("a: 1\n...\nb: 2", "f:3:1: not valid YAML: expected '<document start>', but found '<block mapping start>'; check brackets, quotes and indentation here; a value that begins with one of * ? [ { & ! % @ ` must be in quotes"),
        ("a: 1\nb: 2\na: 3", "f:3:1: key 'a' is given twice, first in line 1; keep one of the two"),
        ("{a: 1, 'a': 2}", "f:1:8: key 'a' is given twice, first in line 1; keep one of the two"),
        ("? [a]\n: b", "f:1:3: a key must be text, not a list or a mapping; write 'key: value'"),
        ("'': b", "f:1:1: a key is empty; write 'key: value'"),
        ("", "f:1:1: the file is empty; begin with 'version: 1'"),
        ("# nothing\n", "f:1:1: the file is empty; begin with 'version: 1'"),
        ("a: x\n  y", "f:1:4: a value goes over several lines; write it on one line; check that no '-' or ':' is missing in the next"),
        ('a: "x\n  y"', "f:1:4: a value goes over several lines; write it on one line; check that no '-' or ':' is missing in the next"),
        ("a: |\n  x", "f:1:4: a value goes over several lines; write it on one line; check that no '-' or ':' is missing in the next"),
        ("a: >-\n  x", "f:1:4: a value goes over several lines; write it on one line; check that no '-' or ':' is missing in the next"),
        ("a:\n\t- b", "f:2:1: not valid YAML: while scanning for the next token: found character '\\t' that cannot start any token; indent with spaces, not with tabs"),
        ("a: b: c", "f:1:5: not valid YAML: mapping values are not allowed here; check the indentation, and put a value that has ': ' in it in quotes"),
        (r'a: "\0"', "f:1:4: the value has the character U+0000, which is not allowed; remove it; in a glob, match it by ?"),
        (r'a: "\e[2J"', "f:1:4: the value has the character U+001B, which is not allowed; remove it; in a glob, match it by ?"),
        (r'a: "\n"', "f:1:4: the value has the character U+000A, which is not allowed; remove it; in a glob, match it by ?"),
        (r'a: "\ud800"', "f:1:4: the value has the character U+D800, which is not allowed; remove it; in a glob, match it by ?"),
        (r'a: "\L"', "f:1:4: the value has the character U+2028, which is not allowed; remove it; in a glob, match it by ?"),
        (r'a: "\UFFFFFFFF"', "f:1:7: not valid YAML: an escape or number is out of range; check brackets, quotes and indentation here; a value that begins with one of * ? [ { & ! % @ ` must be in quotes"),
        (b"a: b\nc: x\xff", "f:2:5: byte 0xff is not UTF-8; save the file as UTF-8; bytes of names that are not UTF-8 are matched by ? and *"),
        ("a: b".encode("utf-16"), "f:1:1: byte 0xff is not UTF-8; save the file as UTF-8; bytes of names that are not UTF-8 are matched by ? and *"),
        ("\ufeffa: b", "f:1:1: character U+FEFF is not allowed: it can make the file read differently; remove it; in a glob, match it by ?"),
        ("a: b\x00", "f:1:5: character U+0000 is not allowed: it can make the file read differently; remove it; in a glob, match it by ?"),
        ("# x\u2028a: b", "f:1:4: character U+2028 is not allowed: it can make the file read differently; remove it; in a glob, match it by ?"),
        ("# x\ra: b", "f:1:4: character U+000D is not allowed: it can make the file read differently; remove it; in a glob, match it by ?"),
        ("# x\x85a: b", "f:1:4: character U+0085 is not allowed: it can make the file read differently; remove it; in a glob, match it by ?"),
        ("a: \u202eb", "f:1:4: character U+202E is not allowed: it can make the file read differently; remove it; in a glob, match it by ?"),
    ],
)  # fmt: skip
def test_what_is_refused_is_refused_with_place_reason_and_cure(text: str | bytes, problem: str) -> None:
    assert problems_of(text) == [problem]


def test_line_ends_of_other_systems_are_read() -> None:
    assert tree_of("a: b\r\nc:\r\n- d\r\n") == {"a": "b", "c": ["d"]}


def test_an_invisible_character_is_allowed_where_an_escape_shows_it() -> None:
    assert tree_of(r'a: "x\u200cy"') == {"a": "x\u200cy"}


def test_all_problems_of_a_file_come_at_once_and_in_order() -> None:
    found = problems_of("a: &x 1\nb: *x\nc: !t 2\na: 3\nd: |\n  x\n")
    assert [line.split(":")[1] for line in found] == ["1", "2", "3", "4", "5"]


def test_a_syntax_error_does_not_hide_what_was_found_before_it() -> None:
    assert [line.split(":")[1] for line in problems_of("a: &x 1\nb: {\n")] == ["1", "3"]


def test_a_thousand_problems_are_counted_and_not_all_shown() -> None:
    found = problems_of("a: 1\n" * 1000)
    assert len(found) == MAX_PROBLEMS + 1
    assert (
        found[-1] == f"f: {999 - MAX_PROBLEMS} more problems are not shown; mend these first and check again"
    )


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ("{a: ", "}")])
def test_nesting_ends_at_the_limit(opening: str, closing: str) -> None:
    assert problems_of(opening * MAX_DEPTH + closing * MAX_DEPTH) == []
    [problem] = problems_of(opening * 500 + closing * 500)
    assert problem == (
        f"f:1:{len(opening) * MAX_DEPTH + 1}: lists and mappings are nested deeper than 32; "
        "no setting is that deep: check the brackets"
    )


def test_block_nesting_ends_at_the_limit() -> None:
    text = "\n".join("  " * depth + "a:" for depth in range(500))
    assert problems_of(text) == [
        "f:33:65: lists and mappings are nested deeper than 32; no setting is that deep: check the brackets"
    ]


def test_an_alias_bomb_is_refused_before_it_grows() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    began = time.monotonic()
    found = problems_of("\n".join(lines))
    assert time.monotonic() - began < 2
    assert any("anchors are not allowed" in line for line in found)
    assert all(len(line) < 200 for line in found)


@pytest.mark.unmeasured
def test_a_file_of_a_mebibyte_is_read_and_one_byte_more_is_not() -> None:
    text = b"a: b\n" + b"#" * (MAX_BYTES - 5)
    assert problems_of(text) == []
    assert problems_of(text + b"#") == [
        "f: the file has more than 1048576 bytes; a policy is smaller: use globs"
    ]


@pytest.mark.unmeasured
@pytest.mark.parametrize(
    ("piece", "most"),
    [
        *((piece, MAX_BYTES) for piece in "[{'\"\x85"),
        *((piece, MAX_BYTES) for piece in ("- ", "? ", ": ", "a: ", "&a ", "!!", "*a ", "|\n")),
        ("a\n", MAX_BYTES // 4),  # of which each is looked at, and no sooner refused
    ],
)
def test_a_mebibyte_of_one_piece_is_answered_soon(piece: str, most: int) -> None:
    text = piece.encode() * (most // len(piece.encode()))
    began = time.process_time()
    problems_of(text)
    assert time.process_time() - began < 20 * most / MAX_BYTES


def test_messages_carry_no_character_that_could_steer_a_terminal() -> None:
    problems = ProblemList("f\x1b[2J\n.yaml")
    parse_yaml(b'"\\e]0;x\\a": 1', problems)
    parse_yaml("a: \u202e".encode(), problems)
    with pytest.raises(ConfigError) as caught:
        problems.raise_if_any()
    assert str(caught.value).replace("\n", "").isprintable()
    assert str(caught.value).count("\n") == len(caught.value.problems) - 1


YAML_PIECES = st.sampled_from(
    [
        "a",
        "b: ",
        "- ",
        "\n",
        "  ",
        "[",
        "]",
        "{",
        "}",
        ",",
        "&a",
        "*a",
        "!",
        "!!str ",
        "%YAML 1.2\n",
        "---\n",
        "...",
        "'",
        '"',
        "\\",
        "\\x",
        "\\UFFFFFFFF",
        "|",
        ">",
        "|9-\n",
        "? ",
        ": ",
        "#",
        "\t",
        "\r\n",
        "<<: ",
        "\x00",
        "é",
        "\u2028",
        "~",
    ]
)


@given(st.lists(YAML_PIECES).map("".join) | st.text())
def test_any_text_is_read_or_refused_and_nothing_else_is_raised(text: str) -> None:
    problems_of(text.encode("utf-8", "surrogatepass"))


@given(st.binary())
def test_any_bytes_are_read_or_refused_and_nothing_else_is_raised(text: bytes) -> None:
    problems_of(text)


SIMPLE_TREES = st.recursive(
    st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=1, max_size=20),
    lambda inner: (
        st.lists(inner, min_size=1, max_size=4)
        | st.dictionaries(st.text("abcxyz_-", min_size=1), inner, min_size=1)
    ),
    max_leaves=10,
)


@given(SIMPLE_TREES, st.booleans())
def test_what_pyyaml_writes_is_read_back_as_the_same_text(tree: object, flow: bool) -> None:  # noqa: FBT001
    text = yaml.safe_dump(tree, default_style="'", default_flow_style=flow, allow_unicode=True, width=10**6)
    assert tree_of(text) == tree
