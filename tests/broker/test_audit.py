"""The record of decisions: nothing is missing, nothing is forged, without it nothing is given."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import resource
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fdbroker.broker import audit
from fdbroker.broker.audit import Audit, decision_members, member_text, quoted_path
from tests.broker.conftest import fill
from tests.broker.speaking import Speaker, check_audit, path_of, read_audit
from tests.broker.stepping import SteppedBroker
from tests.processes import in_child
from tests.running_broker import policy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PIECES = [
    b'"',
    b"\\",
    b"\n",
    b"\r",
    b"\x1b[2J",
    b"\x7f",
    b"\0",
    b"\xe2\x80\xae",
    b"a",
    b"\xff",
    b"\xed\xa0\x80",
]
PIECES += [b'","decision":"allow', b"}\n{"]
paths = st.one_of(
    st.binary(max_size=300),
    st.text(max_size=100).map(lambda text: text.encode(errors="surrogatepass")),
    st.lists(
        st.sampled_from(PIECES)
    ).map(b"".join),
)  # fmt: skip


@given(paths)
@example(b"x" * 4096)
@example(b"\xff" * 4096)
def test_every_path_can_be_read_back_from_plain_ascii(path: bytes) -> None:
    text = "{" + quoted_path(path) + "}"
    assert re.fullmatch(r"[ -~]*", text)
    assert path_of(json.loads(text)) == path


@pytest.mark.parametrize("byte", [b"x", b"\xff", "ä".encode()])
def test_endless_path_is_recorded_by_its_beginning_and_length(byte: bytes) -> None:
    path = byte * 5000
    record = json.loads("{" + quoted_path(path) + "}")
    assert path_of(record) == path[:4096]
    assert record["path_length"] == len(path)


@given(st.text(max_size=50), st.text(max_size=50))
def test_names_of_rules_and_sockets_can_not_forge_anything(name: str, rule: str) -> None:
    text = "{" + member_text(socket=name, n=5, none=None) + "," + decision_members("ok", rule) + "}"
    assert re.fullmatch(r"[ -~]*", text)
    assert json.loads(text) == {
        "socket": name, "n": 5, "none": None, "decision": "allow", "reason": "ok", "rule": rule,
    }  # fmt: skip


def test_only_ok_is_recorded_as_allowed() -> None:
    assert '"decision":"allow"' in decision_members("ok", "r")
    for reason in ("no_rule", "OK", "ok ", "", "where_owner"):
        assert '"decision":"deny"' in decision_members(reason, None)


class Record:
    """An audit on a pipe."""

    def __init__(self, *, deny: bool = True) -> None:
        self.read_end, self.write_end = os.pipe()
        os.set_blocking(self.read_end, False)
        self.audit = Audit(self.write_end, deny_on_failure=deny)

    def text(self) -> bytes:
        try:
            return os.read(self.read_end, 1 << 20)
        except BlockingIOError:
            return b""

    def decide(self, *decided: bytes) -> bool:
        records = [decision_members("ok", "rule")] * len(decided)
        return self.audit.decisions('"uid":1', "open", decided, records)


@pytest.fixture
def record() -> Iterator[Record]:
    made = Record()
    yield made
    os.close(made.read_end)
    os.close(made.write_end)


def test_records_of_one_request_are_one_write_and_are_numbered_through(
    record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes = []
    write = os.write

    def counting(descriptor: int, data: bytes) -> int:
        writes.append(data)
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", counting)
    assert record.decide(b"/a", b"/b")
    assert record.audit.event("some", member_text(n=1))
    assert record.audit.event("none")
    assert record.decide(b"/c")
    assert len(writes) == 4
    records = [json.loads(line) for line in record.text().splitlines()]
    check_audit(records)
    assert [entry["event"] for entry in records] == ["open", "open", "some", "none", "open"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", records[0]["time"])
    assert re.fullmatch("[0-9a-f]{16}", records[0]["run"])


def test_times_are_those_of_the_clock(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    moments = [0, 999_999_999, 1_000_000_000, 1_700_000_000_123_456_789, 999]
    for moment in moments:
        monkeypatch.setattr(audit, "time_ns", lambda moment=moment: moment)
        record.audit.event("tick")
    assert [entry["time"] for entry in read_audit(record.text())] == [
        "1970-01-01T00:00:00.000Z",
        "1970-01-01T00:00:00.999Z",
        "1970-01-01T00:00:01.000Z",
        "2023-11-14T22:13:20.123Z",
        "1970-01-01T00:00:00.000Z",
    ]


def test_two_runs_can_be_told_apart() -> None:
    assert Audit(None, deny_on_failure=True).run != Audit(None, deny_on_failure=True).run


def test_without_a_descriptor_nothing_is_recorded_and_nothing_denied() -> None:
    nowhere = Audit(None, deny_on_failure=True)
    assert nowhere.decisions("", "open", [b"/a"], [""])
    assert nowhere.event("started")
    assert not nowhere.on
    assert nowhere.failures == 0


@pytest.mark.parametrize("deny", [True, False])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EAGAIN, errno.EIO, errno.EPIPE, errno.EDQUOT])
def test_write_that_fails_is_a_denial_unless_the_policy_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    deny: bool,  # noqa: FBT001
) -> None:
    record = Record(deny=deny)

    def fail(_descriptor: int, _data: bytes) -> int:
        raise OSError(number, "it failed")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", fail)
        assert record.decide(b"/a") is not deny
        assert not record.audit.event("some")
    assert record.audit.failures == 2
    assert record.decide(b"/b")
    # The gap shows, and no line was begun that would have to be ended.
    text = record.text()
    assert text.startswith(b"{")
    # The second write that failed had its own report, which is number 2.
    assert [entry["seq"] for entry in read_audit(text)] == [3, 4]
    assert failures_told(read_audit(text)) == [(0, 2, int(not deny))]
    os.close(record.read_end)
    os.close(record.write_end)


@pytest.mark.parametrize("short", [1, 10, 100])
def test_record_after_a_short_write_starts_on_its_own_line(
    record: Record, monkeypatch: pytest.MonkeyPatch, short: int
) -> None:
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:short]))
        assert not record.decide(b"/cut")
        # Nothing but the line's end gets through, and then nothing at all.
        patch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:1]))
        assert not record.decide(b"/cut")
        patch.setattr(os, "write", lambda descriptor, data: 0)
        assert not record.decide(b"/cut")
    assert record.decide(b"/whole")
    assert record.decide(b"/whole too")
    records = read_audit(record.text())
    assert [path_of(entry) for entry in records if "path" in entry] == [b"/whole", b"/whole too"]
    # Three decisions, and the two reports with which the second and the third went.
    assert [(entry["seq"], entry["event"]) for entry in records] == [
        (5, "open"), (6, "audit_failed"), (7, "open"),
    ]  # fmt: skip
    assert failures_told(records) == [(0, 4, 0)]
    assert record.audit.failures == 3


@contextlib.contextmanager
def failing(cut: int | None = None) -> Iterator[None]:
    """Let every write fail, or stop after `cut` bytes."""
    write = os.write

    def write_less(descriptor: int, data: bytes) -> int:
        if cut is None:
            raise OSError(errno.ENOSPC, "no space")
        return write(descriptor, data[:cut])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "write", write_less)
        yield


def failures_told(records: list[dict[str, Any]]) -> list[tuple[int, int, int]]:
    """Return what the records of failures say: first and last number, and whether it was given."""
    return [(told["from"], told["to"], told["given"]) for told in records if told["event"] == "audit_failed"]


def test_without_a_failure_there_is_no_record_of_one(record: Record) -> None:
    for _ in range(3):
        assert record.decide(b"/a", b"/b")
    assert failures_told(read_audit(record.text())) == []


def test_write_that_failed_is_told_once_by_the_next_one_that_succeeds(record: Record) -> None:
    assert record.decide(b"/before")
    with failing():
        assert not record.decide(b"/a", b"/b", b"/c")
    assert record.decide(b"/after", b"/too")
    assert record.decide(b"/later")
    records = read_audit(record.text())
    assert [(entry["seq"], entry["event"]) for entry in records] == [
        (0, "open"), (4, "open"), (5, "open"), (6, "audit_failed"), (7, "open"),
    ]  # fmt: skip
    assert failures_told(records) == [(1, 3, 0)]
    [told] = [entry for entry in records if entry["event"] == "audit_failed"]
    assert set(told) == {"run", "seq", "time", "event", "from", "to", "given"}


def test_event_that_failed_is_told_like_a_decision(record: Record) -> None:
    with failing():
        assert not record.audit.event("malformed")
    assert record.audit.event("stopped")
    records = read_audit(record.text())
    assert [entry["event"] for entry in records] == ["stopped", "audit_failed"]
    assert failures_told(records) == [(0, 0, 0)]


def test_several_writes_that_failed_in_a_row_are_told_as_one_range(record: Record) -> None:
    with failing():
        for _ in range(4):
            assert not record.decide(b"/a", b"/b")
    assert record.decide(b"/after")
    # The first had two numbers, the others one more each for a report that failed as well.
    assert failures_told(read_audit(record.text())) == [(0, 2 + 3 * 3 - 1, 0)]
    assert record.audit.failures == 4


def test_failing_again_while_it_is_told_keeps_the_first_number(record: Record) -> None:
    assert record.decide(b"/before")
    with failing():
        assert not record.decide(b"/a")
    whole = len(record.text())
    # The record is written, its report is cut: the record stands there, and nothing was given.
    with failing(cut=whole + 10):
        assert not record.decide(b"/stands there")
    assert record.decide(b"/after")
    records = read_audit(record.text())
    assert [(entry["seq"], entry["event"]) for entry in records] == [
        (2, "open"), (4, "open"), (5, "audit_failed"),
    ]  # fmt: skip
    assert path_of(records[0]) == b"/stands there"
    assert failures_told(records) == [(1, 3, 0)]


def test_two_failures_with_a_success_between_them_are_two_ranges(record: Record) -> None:
    for _ in range(2):
        with failing():
            assert not record.decide(b"/a")
        assert record.decide(b"/b")
    assert failures_told(read_audit(record.text())) == [(0, 0, 0), (3, 3, 0)]


def test_record_of_a_failure_says_that_all_was_given_where_the_policy_says_so() -> None:
    record = Record(deny=False)
    with failing():
        assert record.decide(b"/a")
    assert record.decide(b"/b")
    assert failures_told(read_audit(record.text())) == [(0, 0, 1)]
    os.close(record.read_end)
    os.close(record.write_end)


# How many paths are decided on, and after how many bytes the write ends: all (None), or it fails (-1).
writes = st.tuples(st.integers(1, 3), st.one_of(st.none(), st.just(-1), st.integers(0, 700)))


@given(st.lists(writes, max_size=8))
@example([(2, 300), (1, 300), (3, -1), (1, None)])
def test_reader_of_the_audit_knows_what_was_given_whatever_fails(asked: list[tuple[int, int | None]]) -> None:
    record = Record()
    given_: set[bytes] = set()
    denied: set[bytes] = set()
    text = b""
    for number, (count, cut) in enumerate([*asked, (1, None)]):
        paths_ = {b"/%d/%d" % (number, at) for at in range(count)}
        with contextlib.nullcontext() if cut is None else failing(None if cut < 0 else cut):
            (given_ if record.decide(*paths_) else denied).update(paths_)
        text += record.text()
    os.close(record.read_end)
    os.close(record.write_end)
    records = read_audit(text)
    doubtful = [number for first, last, _ in failures_told(records) for number in range(first, last + 1)]
    certain = [entry for entry in records if entry["seq"] not in doubtful]
    assert {path_of(entry) for entry in certain if "path" in entry} == given_
    assert {path_of(entry) for entry in records if "path" in entry} <= given_ | denied
    # Every number is there or accounted for, and none is told of twice.
    assert sorted([*doubtful, *(entry["seq"] for entry in certain)]) == list(range(records[-1]["seq"] + 1))


# With a broker


@pytest.mark.parametrize("action", ["open", "stat", "list"])
@pytest.mark.parametrize("on_failure", ["deny", "allow"])
def test_nothing_is_given_that_can_not_be_recorded(
    tree: Path, tmp_path: Path, action: str, on_failure: str
) -> None:
    del tmp_path
    compiled = policy(tree, audit={"on_failure": on_failure})
    with SteppedBroker(tree, compiled, audit=Path("/dev/full")) as broker:
        speaker = broker.join()
        told = ask(speaker, action, bytes(tree if action == "list" else tree / "file"))
        assert told == (("audit", errno.EIO) if on_failure == "deny" else ("none", 0))
        assert ask(speaker, action, b"/etc/passwd") == (
            ("audit", errno.EIO) if on_failure == "deny" else ("denied", errno.EACCES)
        )
        assert broker.audit.failures == 2


def ask(speaker: Speaker, action: str, path: bytes) -> tuple[str, int]:
    if action == "open":
        opened = speaker.open_one(path)
        return opened.reason.replace("ok", "none"), opened.errno
    if action == "stat":
        result, facts = speaker.stat(path).results[0]
        assert (facts is None) is bool(result.status)
    else:
        page = speaker.page(path)
        result = page.result
        assert not (result.status and page.entries)
    return result.reason.name.lower(), result.errno


@pytest.mark.root
@pytest.mark.parametrize("on_failure", ["deny", "allow"])
def test_what_can_not_be_recorded_counts_as_allowed_only_if_it_is_given(tree: Path, on_failure: str) -> None:
    with SteppedBroker(
        tree, policy(tree, audit={"on_failure": on_failure}), audit=Path("/dev/full")
    ) as broker:
        speaker = broker.join()
        for action in ("open", "stat", "list"):
            ask(speaker, action, bytes(tree if action == "list" else tree / "file"))
        speaker.open(bytes(tree / "file"), b"/etc/passwd", bytes(tree / "empty"))
        totals = speaker.status()["totals"]
    # Three one by one and three at once, of which one is refused anyway.
    expected = (0, 6) if on_failure == "deny" else (5, 1)
    assert (totals["allowed"], totals["denied"], totals["audit_failures"]) == (*expected, 4)


def test_descriptors_that_can_not_be_recorded_are_closed(tree: Path) -> None:
    with SteppedBroker(tree, audit=Path("/dev/full")) as broker:
        speaker = broker.join()
        before = len(os.listdir("/proc/self/fd"))
        assert {entry.reason for entry in speaker.open(*[bytes(tree / "file")] * 253)} == {"audit"}
        assert len(os.listdir("/proc/self/fd")) == before


def exhausted(until: Callable[[], str], most: int = 2000) -> int:
    """Ask until the answer is a denial for want of a record; return how often it was given."""
    for given_ in range(most):
        if until() == "audit":
            return given_
    pytest.fail("there was always room")


def test_service_resumes_when_the_file_may_grow_again(tree: Path, tmp_path: Path) -> None:
    """By RLIMIT_FSIZE, in a child: the file has its end in the middle of a record."""

    def child() -> list[str]:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        with SteppedBroker(tree, audit=tmp_path / "audit") as broker:
            speaker = broker.join()
            file = bytes(tree / "file")
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
            given_ = exhausted(lambda: speaker.open_one(file).reason)
            assert 1 <= given_ <= 4
            assert (tmp_path / "audit").stat().st_size == 1000
            assert {entry.reason for entry in speaker.open(file, b"/", b"")} == {"audit"}
            assert speaker.open_one(file).reason == "audit"
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            assert speaker.open_one(file).reason == "ok"
            assert speaker.open_one(file).reason == "ok"
            records = broker.records()
            # What was not recorded is a gap in the numbers: the cut record, three paths, and one; the last
            # two with a report.
            numbers = [record["seq"] for record in records]
            assert numbers == [*range(given_), given_ + 7, given_ + 8, given_ + 9]
            assert failures_told(records) == [(given_, given_ + 6, 0)]
            return [line.decode()[:2] for line in (tmp_path / "audit").read_bytes().split(b"\n") if line]

    starts = in_child(child)
    assert set(starts) == {'{"'}


def fill_up(disk: Path) -> None:
    """Leave no room: nothing but what is left of pages that are in use."""
    with open(disk / "filling", "wb", buffering=0) as filling, contextlib.suppress(OSError):
        while filling.write(bytes(4096)):
            pass


@pytest.mark.root
def test_service_resumes_when_a_full_disk_has_room_again(tree: Path, reachable: Path) -> None:
    disk = reachable / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", disk], check=True)
    try:
        with SteppedBroker(tree, audit=disk / "audit") as broker:
            speaker = broker.join()
            file = bytes(tree / "file")
            assert speaker.open_one(file).reason == "ok"
            fill_up(disk)
            # The rest of the page that the file has.
            given_ = exhausted(lambda: speaker.open_one(file).reason)
            assert given_ < 40
            assert {entry.reason for entry in speaker.open(file, b"/", b"")} == {"audit"}
            assert speaker.status()["totals"]["audit_failures"] >= 2
            (disk / "filling").unlink()
            assert speaker.open_one(file).content == b"content"
            lines = broker.audit_file.read_bytes().split(b"\n") if broker.audit_file else []
            last = json.loads(lines[-3])
            assert last["reason"] == "ok"
            # The one that failed, three paths, and the report that went with these.
            assert last["seq"] == given_ + 1 + 1 + 3 + 1
            numbers = [record["seq"] for record in broker.records()]
            assert numbers == [*range(given_ + 1), last["seq"], last["seq"] + 1]
            assert failures_told(broker.records()) == [(given_ + 1, last["seq"] - 1, 0)]
    finally:
        subprocess.run(["umount", disk], check=True)


def test_file_names_of_any_bytes_come_back_from_the_audit(stepped: SteppedBroker) -> None:
    fill_directory = stepped.tree / "names"
    fill_directory.mkdir()
    names = [bytes([byte]) * length for byte in range(1, 256) if byte != 0x2F for length in (1, 255)]
    names.remove(b".")
    asked = [bytes(fill_directory) + b"/" + name for name in names]
    speaker = stepped.join()
    for start in range(0, len(asked), 250):
        speaker.open(*asked[start : start + 250])
    records = stepped.records()
    check_audit(records)
    assert [path_of(record) for record in records] == asked


def test_tree_for_the_tests_is_made_alike_everywhere(reachable: Path) -> None:
    fill(reachable)
    assert {entry.name for entry in reachable.iterdir()} == {"file", "empty", "directory", "link", "fifo"}
