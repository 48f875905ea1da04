from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdbroker.scan.hashes import HashList, HashListError, load, parse
from tests.scan.descriptors import EICAR, EICAR_NAME

if TYPE_CHECKING:
    from pathlib import Path

DIGEST = hashlib.sha256(b"bad").digest()
HEX = DIGEST.hex()


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_embedded_list_knows_the_eicar_file_and_its_usual_line_ends(end: bytes) -> None:
    known = load()
    index = known.find(hashlib.sha256(EICAR + end).digest())
    assert index is not None
    assert known.name(index) == EICAR_NAME


def test_file_adds_to_the_embedded_list(tmp_path: Path) -> None:
    path = tmp_path / "list"
    path.write_text(f"# ours\n\n{HEX} Bad.Thing\n")
    known = load([bytes(path)])
    assert len(known) == len(load()) + 1
    index = known.find(DIGEST)
    assert index is not None
    assert known.name(index) == "Bad.Thing"


@pytest.mark.parametrize(
    ("line", "name"),
    [
        (f"{HEX} Name", "Name"),
        (f"{HEX.upper()}\tName", "Name"),
        (f"  {HEX}  file name  \r", "file name"),
        (HEX, f"sha256-{HEX[:16]}"),
        (f"{HEX} Käfer", "Käfer"),
    ],
)
def test_line_is_read(line: str, name: str) -> None:
    assert parse(line.encode(), "list") == [(DIGEST, name)]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b"not a digest", "not a SHA-256"),
        (HEX[:-1].encode(), "not a SHA-256"),
        (HEX.encode() + b"0 name", "not a SHA-256"),
        (HEX.encode() + b"name", "not a SHA-256"),
        (b"d41d8cd98f00b204e9800998ecf8427e  md5", "not a SHA-256"),
        (HEX.encode() + b" \xff", "not UTF-8"),
        (HEX.encode() + b" a\x1b[31mb", "can't be printed"),
    ],
)
def test_wrong_line_is_an_error_with_its_place(line: bytes, what: str) -> None:
    with pytest.raises(HashListError, match=rf"^list:3: .*{re.escape(what)}"):
        parse(b"# first\n\n" + line + b"\n", "list")


def test_list_that_is_not_there_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(HashListError, match=r"missing\\nlist: No such file or directory"):
        load([bytes(tmp_path / "missing\nlist")])


def test_digest_keeps_the_name_that_came_first() -> None:
    known = HashList([(DIGEST, "first"), (DIGEST, "second")])
    assert len(known) == 1
    assert known.name(0) == "first"


@pytest.mark.parametrize("index", [-1, 1, 2**32 - 1])
def test_index_outside_the_list_is_an_error(index: int) -> None:
    with pytest.raises(IndexError):
        HashList([(DIGEST, "only")]).name(index)


@given(st.binary(max_size=200))
def test_any_text_is_a_list_or_an_error(text: bytes) -> None:
    try:
        entries = parse(text, "list")
    except HashListError:
        return
    assert all(len(digest) == 32 and name.isprintable() for digest, name in entries)
