"""Numbers, sizes, durations, modes and booleans have one spelling each."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdbroker.config.scalars import (
    MAX_SIZE,
    ScalarError,
    parse_boolean,
    parse_count,
    parse_duration,
    parse_mode,
    parse_path,
    parse_size,
)

if TYPE_CHECKING:
    from collections.abc import Callable

PARSERS: list[Callable[[str], object]] = [
    parse_boolean,
    parse_count,
    parse_duration,
    parse_mode,
    parse_path,
    parse_size,
]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("7B", 7),
        ("64KiB", 65536),
        ("1MiB", 2**20),
        ("2GiB", 2**31),
        ("1TiB", 2**40),
        ("1kB", 1000),
        ("1KB", 1000),
        ("100MB", 10**8),
        ("1GB", 10**9),
        ("1TB", 10**12),
        (str(MAX_SIZE), MAX_SIZE),
    ],
)
def test_a_size_is_bytes_or_digits_with_a_unit(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "seconds"), [("0s", 0), ("30s", 30), ("5min", 300), ("2h", 7200), ("7d", 604800)]
)
def test_a_duration_has_a_unit(text: str, seconds: int) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(("text", "mode"), [("00", 0), ("022", 0o22), ("0640", 0o640), ("04755", 0o4755)])
def test_a_mode_is_octal_with_a_leading_zero(text: str, mode: int) -> None:
    assert parse_mode(text) == mode


def test_a_boolean_is_true_or_false() -> None:
    assert parse_boolean("true") is True
    assert parse_boolean("false") is False


@pytest.mark.parametrize("text", ["/", "/a", "/a b/é", "/..a/.b"])
def test_a_path_in_its_normal_spelling_is_taken(text: str) -> None:
    assert parse_path(text) == text


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        *[
            (parse_size, text)
            for text in ("", "G", "2G", "2 GiB", "2gib", "2GIB", "1e3", "٤", "04", "1" * 20, "2GiB\n")
        ],
        *[
            (parse_count, text)
            for text in ("", "+1", "-1", "1.0", "1_000", "0x10", "01", "1KiB", "²", "1" * 20, "1\n")
        ],
        *[(parse_duration, text) for text in ("", "30", "5m", "1.5h", "-1s", "5 min", "22:30", "1w")],
        *[
            (parse_mode, text)
            for text in ("", "0", "640", "0o640", "0888", "0123456", "-0640", "u=r", "0640\n")
        ],
        *[
            (parse_boolean, text)
            for text in ("", "yes", "no", "on", "off", "True", "TRUE", "1", "0", "y", "~", "true ")
        ],
        *[
            (parse_path, text)
            for text in ("", "a", "/a/", "//", "/a//b", "/.", "/a/..", "/" + "x" * 256, "/x" * 2048)
        ],
    ],
)
def test_any_other_spelling_is_refused(parse: Callable[[str], object], text: str) -> None:
    with pytest.raises(ScalarError) as caught:
        parse(text)
    assert caught.value.message
    assert caught.value.cure


@given(st.sampled_from(PARSERS), st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_is_parsed_or_refused(parse: Callable[[str], object], text: str) -> None:
    with contextlib.suppress(ScalarError):
        assert isinstance(parse(text), int | str)
