from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fdbroker.cli.output import flush, held_back, path_members, shell_word, write_line
from fdbroker.cli.scan_output import JsonOutput, Totals
from fdbroker.config.names import counted, printable
from fdbroker.scan.run import Scanned
from fdbroker.scan.verdict import Answer, Clean, Error, Infected, Reason
from tests.cli.commands import path_of

if TYPE_CHECKING:
    from pathlib import Path

CLEAN = Scanned(b"/a", Clean(), 10)
INFECTED = Scanned(b"/b", Infected("Name"), 5)
FAILED = Scanned(b"/c", Error(Reason.DENIED, "no"))
CHANGED = Scanned(b"/d", Error(Reason.CHANGED, "changed"), 7)
UNLISTED = Scanned(b"/e", Error(Reason.DENIED, "no"), directory=True)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (b"plain name.txt", "plain name.txt"),
        ("Käse 文".encode(), "Käse 文"),
        (b"new\nline", r"new\x0aline"),
        (b"\x1b[31mred\x07", r"\x1b[31mred\x07"),
        (b"\xffodd\xfe", r"\xffodd\xfe"),
        (rb"back\slash", r"back\\slash"),
        ("right\u202eto left".encode(), r"right\xe2\x80\xaeto left"),
        ("\u2028".encode(), r"\xe2\x80\xa8"),
        ("c1 \x9b".encode(), r"c1 \xc2\x9b"),
    ],
)
def test_name_is_shown_without_what_plays_with_a_terminal(name: bytes, shown: str) -> None:
    assert printable(name) == shown


def test_half_of_a_surrogate_pair_as_json_may_have_it_is_shown_escaped() -> None:
    assert printable("a\ud800b\udcff") == r"a\xed\xa0\x80b\xff"


@pytest.mark.parametrize(("number", "shown"), [(0, "0 files"), (1, "1 file"), (2, "2 files")])
def test_one_thing_is_no_plural(number: int, shown: str) -> None:
    assert counted(number, "file") == shown


@given(st.binary())
def test_shown_name_is_printable_and_can_be_read_back(name: bytes) -> None:
    shown = printable(name)
    assert shown.isprintable()
    back = re.sub(
        rb"\\(\\|x[0-9a-f]{2})",
        lambda match: b"\\" if match[1] == b"\\" else bytes.fromhex(match[1][1:].decode()),
        shown.encode(),
    )
    assert back == name


@pytest.mark.parametrize(
    ("path", "word"),
    [
        (b"/a/b", "/a/b"),
        (b"/a b", "'/a b'"),
        ("/\u00e4'".encode(), """'/\u00e4'"'"''"""),
        (b"/new\nline", "$'/new\\x0aline'"),
        (b"/\xff'\\", "$'/\\xff\\'\\\\'"),
    ],
)
def test_path_is_shown_as_a_word_of_a_shell(path: bytes, word: str) -> None:
    assert shell_word(path) == word


@given(st.lists(st.binary().map(lambda name: b"/" + name.replace(b"\0", b"")), min_size=50, max_size=50))
@settings(max_examples=10)
def test_shell_reads_the_same_path_back(paths: list[bytes]) -> None:
    words = " ".join(map(shell_word, paths))
    assert words.isprintable()
    shown = subprocess.run(["bash", "-c", f"printf '%s\\0' {words}"], capture_output=True, check=True).stdout
    assert shown.split(b"\0")[:-1] == paths


@given(st.binary(), st.integers(0, 2**63), st.booleans())
def test_a_clean_file_is_told_in_json_as_all_others_are(path: bytes, size: int, infected: bool) -> None:  # noqa: FBT001 - drawn
    lines: list[str] = []
    clean = Scanned(path, Clean(), size, answers=(Answer("hashes", Clean()),))
    JsonOutput(lines.append, infected=infected).scanned(clean)
    document = {"type": "file", **path_members(path), "verdict": "clean", "size": size}
    assert lines == ([] if infected else [json.dumps(document)])


def test_lines_are_held_back_from_what_is_no_terminal_until_they_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lines"
    with path.open("w", buffering=1) as file:
        monkeypatch.setattr(sys, "stdout", file)
        write_line("before")
        assert path.read_text() == "before\n"
        with held_back():
            write_line("held back")
            assert path.read_text() == "before\n"
            flush()
            assert path.read_text() == "before\nheld back\n"
            write_line("the last")
        assert path.read_text() == "before\nheld back\nthe last\n"
        write_line("after")
        assert path.read_text().endswith("after\n")


@given(st.binary())
def test_path_can_be_had_back_from_json(path: bytes) -> None:
    assert path_of(path_members(path)) == path


def test_hexadecimal_form_is_there_only_where_it_is_needed() -> None:
    assert path_members("/ä".encode()) == {"path": "/ä"}
    assert path_members(b"/\xff") == {"path": "/\ufffd", "path_hex": "2fff"}


@pytest.mark.parametrize(
    ("events", "complete", "status"),
    [
        ([], True, 0),
        ([CLEAN], True, 0),
        ([CLEAN, INFECTED], True, 1),
        ([CLEAN, FAILED], True, 2),
        ([INFECTED, FAILED], True, 2),
        ([UNLISTED], True, 2),
        ([CLEAN], False, 2),
        ([INFECTED], False, 2),
    ],
)
def test_exit_status_says_the_worst(events: list[Scanned], complete: bool, status: int) -> None:  # noqa: FBT001 - a parameter of the table
    totals = Totals(complete=complete)
    for event in events:
        totals.add(event)
    assert totals.exit_status() == status


def test_totals_count_bytes_that_were_read_to_the_end() -> None:
    totals = Totals()
    for event in (CLEAN, INFECTED, FAILED, CHANGED, UNLISTED):
        totals.add(event)
    assert (totals.files, totals.bytes, totals.infected, totals.errors) == (4, 15, 1, 3)


def test_half_of_a_surrogate_pair_as_json_may_have_one_is_shown_and_no_failure() -> None:
    assert printable("a\ud800b") == r"a\xed\xa0\x80b"
