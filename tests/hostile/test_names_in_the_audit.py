"""Random byte names through a broker and its audit and back: all equal, and none forges anything."""

from __future__ import annotations

import json
import os
import random
import re
from typing import TYPE_CHECKING

import pytest

from fdbroker.cli.audit_records import Line, path_of, read_record
from fdbroker.cli.audit_verify import Verifier
from tests.broker.speaking import check_audit
from tests.broker.stepping import SteppedBroker
from tests.cli.commands import run_here

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

COUNT = 100_000 if os.environ.get("FDBROKER_HOSTILE") else 10_000
BATCH = 250
# What would end a line, a string or a record, colour a terminal, turn a text round, hide it; half characters.
FORGING = [
    b'"', b"\\", b"\n", b"\r", b"\t", b"\x1b[2J", b"\x1b]0;x\x07", b"\x7f", b"\x9b31m", b"\b", b"\v", b"\f",
    b'","decision":"allow","reason":"ok","rule":"all"}\n{"run":"', b'\\"', b"\\u0022", b"\\x0a", b"}{", b"'",
    *(character.encode() for character in "\u202e\u2066\u200b\u2028\u0085\ufeff\U0001f600\ufffd"),
    b"\xff", b"\xed\xa0\x80", b"\xed\xb2\x80", b"\xc0\xaf", b"\xe2\x80",
    b"\xf4\x90\x80\x80", b"%s", b"$(id)", b"<script>", b"a", "ä".encode(), b" ", b".", b"-",
]  # fmt: skip


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    path = tmp_path / "tree"
    path.mkdir()
    return path


def names(seed: int) -> Iterator[bytes]:
    chance = random.Random(seed)  # noqa: S311 - what is tried, not a secret
    while True:
        kind = chance.randrange(4)
        if kind == 0:
            name = chance.randbytes(chance.randint(1, 255))
        elif kind == 1:
            name = b"".join(chance.choices(FORGING, k=chance.randint(1, 8)))
        elif kind == 2:
            name = "".join(chr(chance.randrange(1, 0xD800)) for _ in range(chance.randint(1, 60))).encode()
        else:
            name = bytes(chance.choices(range(1, 128), k=chance.randint(1, 40)))
        name = name.replace(b"\0", b"0").replace(b"/", b"_")[:255]
        if name not in {b".", b".."}:
            yield name


def unescaped(shown: str) -> bytes:
    """Return the bytes that printf %b makes of what was shown."""
    return re.sub(
        rb"\\(?:x([0-9a-f]{2})|(\\))",
        lambda found: bytes.fromhex(found[1].decode()) if found[1] else b"\\",
        shown.encode(),
    )


@pytest.mark.unmeasured
def test_random_byte_names_come_back_from_the_audit(tree: Path, tmp_path: Path) -> None:
    every = names(1)
    asked = [bytes(tree) + b"/" + next(every) for _ in range(COUNT)]
    file = tmp_path / "audit"
    with SteppedBroker(tree, audit=file) as broker:
        speaker = broker.join()
        for start in range(0, COUNT, BATCH):
            answers = speaker.open(*asked[start : start + BATCH])
            assert {answer.reason for answer in answers} <= {"not_found", "ok", "not_regular", "symlink"}
    data = file.read_bytes()
    assert not re.search(rb"[^ -~\n]", data)
    lines = data.split(b"\n")
    assert lines.pop() == b""
    records = [read_record(Line(number, line)) for number, line in enumerate(lines)]
    assert [path_of(record) for record in records] == asked
    check_audit(map(dict, records))
    verifier = Verifier()
    for number, line in enumerate(lines):
        verifier.add(Line(number, line))
    assert verifier.findings() == []


@pytest.mark.unmeasured
def test_names_come_back_from_what_is_shown_and_from_json(tree: Path, tmp_path: Path) -> None:
    every = names(2)
    asked = [bytes(tree) + b"/" + next(every) for _ in range(COUNT // 5)]
    file = tmp_path / "audit"
    with SteppedBroker(tree, audit=file) as broker:
        speaker = broker.join()
        for start in range(0, len(asked), BATCH):
            speaker.open(*asked[start : start + BATCH])
    passed = run_here("audit", "--json", str(file))
    assert (passed.returncode, passed.stderr) == (0, "")
    lines = passed.stdout.split("\n")[:-1]
    assert [path_of(json.loads(line)) for line in lines] == asked
    shown = run_here("audit", str(file))
    assert (shown.returncode, shown.stderr) == (0, "")
    lines = shown.stdout.split("\n")[:-1]
    assert len(lines) == len(asked)
    assert all(line.isprintable() for line in lines)
    for line, path in zip(lines, asked, strict=True):
        assert bytes(tree) in (raw := unescaped(line))
        assert path in raw


def test_a_name_can_not_add_a_record_or_change_a_member(tree: Path, tmp_path: Path) -> None:
    file = tmp_path / "audit"
    with SteppedBroker(tree, audit=file) as broker:
        speaker = broker.join()
        forged = json.dumps(
            {"run": broker.audit.run, "seq": 9, "time": "2026-11-24T00:00:00.000Z", "event": "open", "uid": 0}
        ).encode()
        asked = [
            b"/x\n" + forged,
            b'/x","decision":"allow","reason":"ok","rule":"all"}\n' + forged + b"\n",
            b'/x\\","decision":"allow',
            b"/x" + b"\\" * 7 + b'"',
            b"/\xff\n" + forged,
            b'/\xff","path_hex":"2f6f6b',
        ]
        for path in asked:
            assert speaker.open_one(path).reason == "denied"
        records = broker.records()
    check_audit(records)
    assert [path_of(record) for record in records] == asked
    assert {(record["decision"], record["reason"], record["rule"]) for record in records} == {
        ("deny", "outside_roots", None)
    }
