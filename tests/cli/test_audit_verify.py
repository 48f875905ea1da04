"""`fdbroker audit verify` and the rest of reading: what is missing is found, and who accounts for it."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import random
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdbroker.broker.audit import Audit, decision_members
from fdbroker.cli.audit_file import with_rotated
from fdbroker.cli.audit_records import Filter, Line, moment
from fdbroker.cli.audit_verify import Finding, Verifier
from tests.cli.commands import run_here

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

RUN, OTHER = "a33c4ee4498e32b1", "b" * 16


def record(number: int, event: str = "open", run: str = RUN, **members: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON
    time = f"2026-11-23T21:56:43.{number % 1000:03d}Z"
    return {"run": run, "seq": number, "time": time, "event": event} | members


def started(boot: str = "boot-1", run: str = RUN) -> dict[str, Any]:
    return record(0, "started", run, boot=boot)


def lines_of(records: Iterable[dict[str, Any] | bytes]) -> list[bytes]:
    return [one if isinstance(one, bytes) else json.dumps(one).encode() for one in records]


def verify(*records: dict[str, Any] | bytes) -> tuple[list[Finding], Verifier]:
    verifier = Verifier()
    for number, text in enumerate(lines_of(records), 1):
        verifier.add(Line(number, text))
    return verifier.findings(), verifier


def found(*records: dict[str, Any] | bytes) -> list[tuple[str, str, int | None, int | None, bool]]:
    return [(one.kind, one.place, one.first, one.last, one.told) for one in verify(*records)[0]]


def test_nothing_is_wrong_with_what_a_broker_writes() -> None:
    assert found(started(), record(1), b"", record(2), record(3, "stopped"), started(run=OTHER)) == []


def test_several_brokers_may_write_to_one_file() -> None:
    mixed = [started(), started(run=OTHER), record(1), record(1, run=OTHER), record(2, run=OTHER), record(2)]
    findings, verifier = verify(*mixed)
    assert (findings, verifier.notes) == ([], [])


def test_a_run_without_an_end_before_another_is_told_of() -> None:
    findings, verifier = verify(started(), record(1), started(run=OTHER), record(1, "stopped", OTHER))
    assert findings == []
    assert verifier.notes == [
        f"3: run {RUN} has no end before this: its broker was killed, or its last records were removed"
    ]


def test_a_record_of_failed_writes_does_not_account_for_what_comes_behind_it() -> None:
    failed = record(1, "audit_failed") | {"from": 2, "to": 100, "given": 0}
    assert found(started(), failed, record(50)) == [("missing", "3", 2, 49, False)]


def test_records_that_are_missing_are_found() -> None:
    assert found(started(), record(1), record(5), record(6)) == [("missing", "3", 2, 4, False)]


def test_records_that_the_broker_could_not_write_are_told_apart() -> None:
    failed = record(6, "audit_failed") | {"from": 2, "to": 4, "given": 0}
    assert found(started(), record(1), record(5), failed) == [("missing", "3", 2, 4, True)]
    # More is missing than it says.
    failed["from"] = 3
    assert found(started(), record(1), record(5), failed) == [
        ("missing", "3", 2, 2, False),
        ("missing", "3", 3, 4, True),
    ]


@given(st.sets(st.integers(1, 30)), st.lists(st.tuples(st.integers(1, 30), st.integers(0, 5)), max_size=4))
def test_each_missing_number_is_found_once_and_accounted_for_where_the_broker_does(
    missing: set[int], told: list[tuple[int, int]]
) -> None:
    kept = [record(number) for number in range(1, 32) if number not in missing]
    telling = [
        record(32 + place, "audit_failed", to=first + more) | {"from": first}
        for place, (first, more) in enumerate(told)
    ]
    numbers = [
        (number, accounted_for)
        for kind, _, first, last, accounted_for in found(started(), *kept, *telling)
        if kind == "missing" and first is not None and last is not None
        for number in range(first, last + 1)
    ]
    assert sorted(numbers) == [
        (number, any(first <= number <= first + more for first, more in told)) for number in sorted(missing)
    ]


def test_a_run_that_does_not_begin_at_its_beginning_is_a_gap_unless_it_is_the_first() -> None:
    findings, verifier = verify(record(7), record(8))
    assert (findings, len(verifier.notes)) == ([], 1)
    assert found(started(), record(7, run=OTHER)) == [("missing", "2", 0, 6, False)]


def test_records_out_of_order_and_twice_are_found() -> None:
    assert found(started(), record(2), record(1), record(3)) == [("order", "3", 1, 1, False)]
    assert found(started(), record(1), record(1)) == [("twice", "3", 1, 1, False)]
    assert found(record(5), record(6), record(3)) == [("order", "3", 3, 3, False)]


def test_records_behind_the_end_of_a_run_are_found() -> None:
    assert found(started(), record(1, "stopped"), record(2)) == [("order", "3", 2, 2, False)]


def test_mixed_boots_are_found() -> None:
    later = started("boot-2", OTHER)
    assert found(started(), record(1), later) == []
    assert found(started(), later, record(1)) == [("boots", "3", 1, 1, False)]


def test_a_clock_that_goes_back_is_noted_and_is_nothing_wrong() -> None:
    findings, verifier = verify(started(), record(1), record(2) | {"time": "2020-01-01T00:00:00.000Z"})
    assert findings == []
    assert verifier.notes == [
        "3: the clock went back, from 2026-11-23T21:56:43.001Z to 2020-01-01T00:00:00.000Z"
    ]


@pytest.mark.parametrize(
    "damaged",
    [
        b"{",
        b"[]",
        b"\x00",
        b'{"run":"a","seq":1,"time":"2026-11-23T21:56:43.000Z","event":"open"}',
        b'{"seq":1,"run":"a33c4ee4498e32b1","time":"2026-11-23T21:56:43.000Z","event":"open"}',
        b'{"run":"a33c4ee4498e32b1","seq":true,"time":"2026-11-23T21:56:43.000Z","event":"open"}',
        b'{"run":"a33c4ee4498e32b1","seq":1,"time":"now","event":"open"}',
        b'{"run":"a33c4ee4498e32b1","seq":1,"time":"2026-11-23T21:56:43.000Z","event":"open","uid":0,"uid":1}',
        '{"run":"a33c4ee4498e32b1","seq":1,"time":"2026-11-23T21:56:43.000Z","event":"ä"}'.encode(),
    ],
)
def test_a_line_that_no_broker_writes_is_damage(damaged: bytes) -> None:
    findings, _ = verify(started(), damaged)
    assert [(one.kind, one.place, one.told) for one in findings] == [("damaged", "2", False)]


def test_a_line_that_a_failed_write_cut_is_told_by_the_broker() -> None:
    failed = record(3, "audit_failed") | {"from": 1, "to": 1, "given": 0}
    whole = json.dumps(record(1), separators=(",", ":")).encode()
    for length in range(1, len(whole)):
        findings, _ = verify(started(), whole[:length], record(2), failed)
        assert {one.kind for one in findings} == {"missing", "damaged"}
        assert all(one.told for one in findings), (length, findings)


# What the broker's own code writes while writes fail, against what is found in it.


class Sink:
    """Where an Audit writes, which takes only so many bytes of a write."""

    def __init__(self) -> None:
        self.text = b""
        self.room: int | None = None

    def write(self, _descriptor: int, data: bytes) -> int:
        taken = data if self.room is None else data[: self.room]
        self.text += taken
        return len(taken)


@given(st.lists(st.tuples(st.integers(1, 3), st.none() | st.integers(0, 400)), max_size=10))
def test_all_that_the_broker_could_not_write_is_accounted_for(asked: list[tuple[int, int | None]]) -> None:
    sink = Sink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "write", sink.write)
        audit = Audit(5, deny_on_failure=True)
        audit.event("started")
        for count, room in [*asked, (1, None)]:
            sink.room = room
            audit.decisions('"uid":1', "open", [b"/a"] * count, [decision_members("ok", "r")] * count)
    findings, verifier = verify(*sink.text.split(b"\n"))
    assert all(one.told for one in findings), findings
    assert bool(findings) or verifier.records == audit.sequence


@given(st.integers(0, 2**32))
def test_no_change_of_a_whole_audit_goes_unseen_but_at_its_ends(seed: int) -> None:
    chance = random.Random(seed)  # noqa: S311 - what is tried, not a secret
    records = [started(), *(record(number) for number in range(1, 30))]
    lines = lines_of(records)
    at = chance.randrange(1, len(lines) - 1)
    kind = chance.choice(["remove", "swap", "repeat", "cut", "change", "join"])
    if kind == "remove":
        del lines[at]
    elif kind == "swap":
        lines[at], lines[at - 1] = lines[at - 1], lines[at]
    elif kind == "repeat":
        lines.insert(chance.randrange(at, len(lines)), lines[at])
    elif kind == "cut":
        lines[at] = lines[at][: chance.randrange(1, len(lines[at]))]
    elif kind == "join":
        lines[at : at + 2] = [lines[at] + lines[at + 1]]
    else:
        lines[at] = lines[at].replace(b'"seq": %d' % at, b'"seq": %d' % (at + chance.choice([-1, 1, 100])))
    assert verify(*lines)[0]


# The command


@pytest.fixture
def rotated(tmp_path: Path) -> str:
    records = lines_of([started(), *(record(number, uid=number) for number in range(1, 8))])
    parts = [records[:2], records[2:4], records[4:6], records[6:]]
    for name, part in zip(("audit.10.gz", "audit.2.gz", "audit.1", "audit"), parts, strict=True):
        data = b"".join(line + b"\n" for line in part)
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    (tmp_path / "audit.jsonl.1").write_bytes(b"another's")
    (tmp_path / "audit.bak").write_bytes(b"nobody's")
    return str(tmp_path / "audit")


def test_rotated_files_are_read_the_oldest_first(rotated: str) -> None:
    assert [os.path.basename(path) for path in with_rotated(rotated)] == [
        "audit.10.gz", "audit.2.gz", "audit.1", "audit",
    ]  # fmt: skip
    result = run_here("audit", "--json", "--rotated", rotated)
    assert (result.returncode, result.stderr) == (0, "")
    assert [json.loads(line)["seq"] for line in result.stdout.splitlines()] == list(range(8))
    result = run_here("audit", "verify", "--rotated", rotated)
    assert (result.returncode, result.stdout) == (0, "8 records of 1 run: nothing is wrong\n")


def test_rotated_files_with_dates_are_in_the_order_of_their_dates(tmp_path: Path) -> None:
    names = ["audit-20251231.gz", "audit-20260101", "audit-20260101-1200", "audit"]
    for name in names:
        (tmp_path / name).touch()
    assert [os.path.basename(path) for path in with_rotated(str(tmp_path / "audit"))] == names


def test_files_in_the_wrong_order_are_out_of_order(rotated: str) -> None:
    result = run_here("audit", "verify", rotated, f"{rotated}.1")
    assert result.returncode == 3
    assert f"ORDER    {rotated}.1:1  number 4 of run {RUN} is out of order" in result.stdout


def test_a_rotated_file_that_is_missing_is_found(rotated: str) -> None:
    os.unlink(f"{rotated}.1")
    result = run_here("audit", "verify", "--json", "--rotated", rotated)
    document = json.loads(result.stdout)
    assert (result.returncode, document["exit_status"]) == (3, 3)
    [finding] = document["findings"]
    assert (finding["kind"], finding["first"], finding["last"]) == ("missing", 4, 5)


def test_what_the_broker_tells_itself_is_another_exit_status(tmp_path: Path) -> None:
    failed = record(3, "audit_failed") | {"from": 1, "to": 1, "given": 0}
    (tmp_path / "audit").write_bytes(
        b"".join(line + b"\n" for line in lines_of([started(), record(2), failed]))
    )
    result = run_here("audit", "verify", str(tmp_path / "audit"))
    assert result.returncode == 1
    assert result.stdout.splitlines()[-1] == "3 records of 1 run: all that is wrong is told by the broker"


def test_a_damaged_compressed_file_can_not_be_read(tmp_path: Path) -> None:
    data = gzip.compress(b'{"event":"x"}\n' * 1000)
    (tmp_path / "audit.gz").write_bytes(data[:-20])
    for command in ("read", "verify"):
        result = run_here("audit", command, str(tmp_path / "audit.gz"))
        assert result.returncode == 2
        assert "damaged" in result.stderr


def test_files_and_the_journal_are_not_read_at_once(rotated: str) -> None:
    for options in (("--journal", rotated), ("--unit", "a.service", "--rotated")):
        assert run_here("audit", *options).returncode == 2


@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        (("--decision", "allow"), [1]),
        (("--event", "list"), [2]),
        (("--rule", "r"), [1, 2]),
        (("--reason", "no_rule"), [2]),
        (("--below", "/srv/a"), [1, 2]),
        (("--below", "/srv/a/"), [1, 2]),
        (("--for", "77"), [3]),
        (("--request", "9", "--connection", "2"), [3]),
        (("--since", "2026-11-23 21:56:43.002"), [2, 3]),
        (("--until", "2026-11-23T22:56:43.002+01:00"), [1]),
        (("--since", "2026-11-24"), []),
        (("--since", "1s"), []),
    ],
)
def test_more_that_is_asked_for_is_picked(
    tmp_path: Path, options: tuple[str, ...], numbers: list[int]
) -> None:
    records = [
        record(1, decision="allow", rule="r", path="/srv/a"),
        record(2, "list", decision="deny", rule="r", reason="no_rule", path="/srv/a/b"),
        record(3, for_uid=77, request=9, connection=2, path="/srv/ab"),
    ]
    (tmp_path / "audit").write_bytes(b"".join(line + b"\n" for line in lines_of(records)))
    result = run_here("audit", "--json", *options, str(tmp_path / "audit"))
    assert (result.returncode, result.stderr) == (0, "")
    assert [json.loads(line)["seq"] for line in result.stdout.splitlines()] == numbers


@pytest.mark.parametrize("time", ["yesterday", "", "5", "2026-13-01", "9999999m", "0001-01-01T00:00+23:00"])
def test_a_time_that_is_none_is_wrong_use(rotated: str, time: str) -> None:
    result = run_here("audit", "--since", time, rotated)
    assert result.returncode == 2
    assert "write how long ago" in result.stderr


def test_an_event_that_no_version_had_yet_is_asked_for_and_told(rotated: str) -> None:
    result = run_here("audit", "--event", "opne", rotated)
    assert (result.returncode, result.stdout) == (0, "")
    assert "--event opne: this version knows no such event; did you mean 'open'?" in result.stderr
    assert run_here("audit", "--event", "reload_refused", rotated).stderr == ""


def test_how_long_ago_is_counted_from_now() -> None:
    moments = [moment(text) for text in ("1w", "2d", "3h", "4min", "3m", "5s")]
    assert moments == sorted(moments)
    for earlier, later in itertools.pairwise(moments):
        assert Filter(since=earlier).wants({"event": "x", "time": later})
        assert not Filter(until=earlier).wants({"event": "x", "time": later})


def test_the_schema_is_written() -> None:
    for options, events in (((), True), (("--closed",), False)):
        result = run_here("audit", "schema", *options)
        document = json.loads(result.stdout)
        titles = [variant["title"] for variant in document["oneOf"]]
        assert "open" in titles
        assert ("of a later version" in titles) is events
