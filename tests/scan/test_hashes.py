from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdbroker.scan.engines.hashes import Entry, HashList, HashListError, load, parse
from tests.scan.descriptors import EICAR, EICAR_NAME

if TYPE_CHECKING:
    from pathlib import Path

DIGEST = hashlib.sha256(b"bad").digest()
HEX = DIGEST.hex()
MD5 = hashlib.md5(b"bad", usedforsecurity=False).digest()
SHA1 = hashlib.sha1(b"bad", usedforsecurity=False).digest()


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_embedded_list_knows_the_eicar_file_and_its_usual_line_ends(end: bytes) -> None:
    contents = EICAR + end
    assert load().find(hashlib.sha256(contents).digest(), len(contents)) == EICAR_NAME


def test_file_adds_to_the_embedded_list(tmp_path: Path) -> None:
    path = tmp_path / "list"
    path.write_text(f"# ours\n\n{HEX} Bad.Thing\n")
    known = load([bytes(path)])
    assert len(known) == len(load()) + 1
    assert known.find(DIGEST, 3) == "Bad.Thing"


@pytest.mark.parametrize(
    ("line", "entry"),
    [
        (f"{HEX} Name", Entry(DIGEST, None, "Name")),
        (f"{HEX.upper()}\tName", Entry(DIGEST, None, "Name")),
        (f"  {HEX}  file name  \r", Entry(DIGEST, None, "file name")),
        (f"{HEX} *file:name", Entry(DIGEST, None, "file:name")),
        (HEX, Entry(DIGEST, None, f"sha256-{HEX[:16]}")),
        (f"{HEX} Käfer", Entry(DIGEST, None, "Käfer")),
        (f"{MD5.hex()}  bad", Entry(MD5, None, "bad")),
        (f"{SHA1.hex()}", Entry(SHA1, None, f"sha1-{SHA1.hex()[:16]}")),
        (f"{MD5.hex()}:3:Bad", Entry(MD5, 3, "Bad")),
        (f"{HEX}:3:Bad", Entry(DIGEST, 3, "Bad")),
        (f"{HEX}:*:Bad:73", Entry(DIGEST, None, "Bad")),
        (f"{HEX}:3:Bad:73:255", Entry(DIGEST, 3, "Bad")),
    ],
)
def test_line_is_read(line: str, entry: Entry) -> None:
    assert parse(line.encode(), "list") == [entry]


@pytest.mark.parametrize("levels", ["300", "300:301", "1:100"])
def test_entry_of_another_level_is_left_out(levels: str) -> None:
    assert parse(f"{HEX}:3:Bad:{levels}".encode(), "list") == []


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b"not a digest", "not a digest in hexadecimal digits"),
        (HEX[:-1].encode(), "not an MD5, SHA-1 or SHA-256"),
        (HEX.encode() + b"0 name", "not an MD5, SHA-1 or SHA-256"),
        (HEX.encode() + b"name", "not a digest"),
        (HEX.encode() + b" \xff", "not UTF-8"),
        (HEX.encode() + b" a\x1b[31mb", "can't be printed"),
        (HEX.encode() + b" " + b"x" * 256, "more than 255"),
        (HEX.encode() + b":3", "not digest:size:name"),
        (HEX.encode() + b":3:n:1:2:3", "not digest:size:name"),
        (HEX.encode() + b":x:name", "not a size, or *"),
        (HEX.encode() + b":-1:name", "not a size, or *"),
        (HEX.encode() + b":*:name", "needs a level after its name: 73"),
        (HEX.encode() + b":3::73", "there is no name"),
        (HEX.encode() + b":3:name:x", "not a level"),
        (b"abc:3:name", "not an MD5, SHA-1 or SHA-256"),
    ],
)
def test_wrong_line_is_an_error_with_its_place(line: bytes, what: str) -> None:
    with pytest.raises(HashListError, match=rf"^list:3: .*{re.escape(what)}"):
        parse(b"# first\n\n" + line + b"\n", "list")


def test_list_that_is_not_there_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(HashListError, match=r"missing\\nlist: No such file or directory"):
        load([bytes(tmp_path / "missing\nlist")])


def test_digest_keeps_the_name_that_came_first() -> None:
    known = HashList([Entry(DIGEST, None, "first"), Entry(DIGEST, None, "second")])
    assert len(known) == 1
    assert known.find(DIGEST, 3) == "first"


def test_digest_for_one_size_is_found_for_that_size_alone() -> None:
    known = HashList([Entry(DIGEST, 3, "three"), Entry(DIGEST, 4, "four"), Entry(MD5, 3, "md5")])
    assert [known.find(DIGEST, size) for size in (2, 3, 4)] == [None, "three", "four"]
    assert known.find(MD5, 3) == "md5"
    assert known.algorithms == ("sha256", "md5")


@given(st.binary(max_size=200))
def test_any_text_is_a_list_or_an_error(text: bytes) -> None:
    try:
        entries = parse(text, "list")
    except HashListError:
        return
    assert all(len(digest) in {16, 20, 32} and name.isprintable() for digest, _size, name in entries)


@given(st.binary(max_size=80).map(lambda tail: HEX.encode() + b":" + tail))
def test_any_entry_of_clamav_is_read_or_an_error(line: bytes) -> None:
    try:
        entries = parse(line, "list")
    except HashListError as error:
        assert str(error).startswith("list:1: ")  # noqa: PT017 - of any line
        return
    assert all(size is None or size >= 0 for _digest, size, _name in entries)
