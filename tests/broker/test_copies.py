"""Copies: the contents of small files in the reply, whole and as they were at one moment."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fdbroker.broker import copying
from fdbroker.kernel.files import open_regular_entries
from fdbroker.wire.client import OpenReply, encode_open
from fdbroker.wire.format import MAX_COPY, MAX_REPLY, Status
from tests.broker.conftest import fill, no_descriptor_left
from tests.broker.speaking import check_audit, descriptors_of
from tests.broker.stepping import SteppedBroker
from tests.broker.test_loop import few_left
from tests.running_broker import policy, rule

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from tests.broker.speaking import Speaker

UID = os.getuid()
DELIVERIES: dict[str, list[str]] = {
    "copies": ["copy"],
    "both": ["descriptor", "copy"],
    "descriptors": ["descriptor"],
}


class Had(NamedTuple):
    """What became of one path: `copied`, `given` or the reason; and its contents."""

    how: str
    content: bytes | None


def ask(speaker: Speaker, paths: Sequence[bytes], *, copy: bool = True) -> list[Had]:
    """Ask for the contents of files; check the reply's size and take apart what came."""
    answer = speaker.ask(encode_open(7, paths, copy=copy))
    assert len(answer.raw) <= MAX_REPLY
    reply = answer.reply
    assert isinstance(reply, OpenReply)
    assert reply.id == 7
    copies = list(reply.copies)
    found = []
    with answer.descriptors as descriptors:
        for result in reply.results:
            if result.status is Status.COPIED:
                found.append(Had("copied", copies.pop(0)))
            elif result.status is Status.GIVEN:
                with open(descriptors.take(), "rb") as file:
                    found.append(Had("given", file.read()))
            else:
                found.append(Had(result.reason.name.lower(), None))
        assert not descriptors
    assert not copies
    return found


class Delivering:
    """A broker with a root for each way to deliver: `copies`, `both`, `descriptors`."""

    def __init__(self, directory: Path, *more: dict[str, Any]) -> None:
        self.trees = {name: directory / name for name in DELIVERIES}
        for tree in self.trees.values():
            tree.mkdir()
            fill(tree)
        roots = [{**policy(tree)["roots"][0], "name": name} for name, tree in self.trees.items()]
        rules = [rule(name, root=name, deliver=deliver) for name, deliver in DELIVERIES.items()]
        compiled = policy(directory, *rules, *more, roots=roots)
        self.broker = SteppedBroker(directory, compiled, audit=directory / "audit")
        self.speaker = self.broker.join()

    def make(self, name: str, size: int, tree: str = "copies") -> bytes:
        """Make a file of `size` bytes that differ; return its path."""
        path = self.trees[tree] / name
        path.write_bytes(contents(size))
        return bytes(path)


def contents(size: int) -> bytes:
    return (b"%d of so many, " % size * (size // 8 + 1))[:size]


@pytest.fixture
def delivering(tmp_path: Path) -> Iterator[Delivering]:
    with no_descriptor_left():
        made = Delivering(tmp_path)
        with made.broker:
            yield made


@pytest.mark.parametrize(
    ("tree", "how"), [("copies", "copied"), ("both", "copied"), ("descriptors", "given")]
)
def test_file_is_delivered_as_its_rule_says(delivering: Delivering, tree: str, how: str) -> None:
    path = bytes(delivering.trees[tree] / "file")
    assert ask(delivering.speaker, [path]) == [Had(how, b"content")]
    [record] = [record for record in delivering.broker.records() if "decision" in record]
    assert (record["event"], record["decision"], record["rule"]) == ("open", "allow", tree)


def test_nothing_stays_open_where_the_files_of_a_second_root_break_the_broker(
    delivering: Delivering, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def break_at_the_second(*arguments: Any, **named: Any) -> Any:  # noqa: ANN401 - as what it stands for
        asked.append(arguments)
        if len(asked) == 2:
            raise MemoryError
        return open_regular_entries(*arguments, **named)

    paths = [bytes(delivering.trees[tree] / "file") for tree in ("copies", "both")]
    assert [had.how for had in ask(delivering.speaker, paths)] == ["copied", "copied"]
    monkeypatch.setattr(copying, "open_regular_entries", break_at_the_second)
    before = set(os.listdir("/proc/self/fd"))
    answer = delivering.speaker.ask(encode_open(8, paths, copy=True))
    assert not isinstance(answer.reply, OpenReply)
    left = set(os.listdir("/proc/self/fd")) - before
    assert len(asked) == 2
    assert not left


def test_who_asks_for_no_copy_gets_none(delivering: Delivering) -> None:
    paths = [bytes(tree / "file") for tree in delivering.trees.values()]
    found = [had.how for had in ask(delivering.speaker, paths, copy=False)]
    assert found == ["denied", "given", "given"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(
    sizes=st.lists(st.integers(0, MAX_COPY + 2), min_size=1, max_size=12),
    tree=st.sampled_from(list(DELIVERIES)),
)
@example(sizes=[0, 1, MAX_COPY - 1, MAX_COPY, MAX_COPY + 1], tree="copies")
@example(sizes=[MAX_COPY, MAX_COPY - 100, 200, 10], tree="both")
def test_contents_are_right_whatever_the_sizes_are(
    delivering: Delivering, sizes: list[int], tree: str
) -> None:
    paths = [delivering.make(f"n{number}", size, tree) for number, size in enumerate(sizes)]
    room = MAX_REPLY - 12 - 8 * len(sizes)
    expected = []
    for size in sizes:
        if tree == "descriptors":
            expected.append(Had("given", contents(size)))
        elif size <= min(room, MAX_COPY):
            room -= size
            expected.append(Had("copied", contents(size)))
        elif tree == "both":
            expected.append(Had("given", contents(size)))
        else:
            expected.append(Had("too_large" if size > MAX_COPY else "limit", None))
    assert ask(delivering.speaker, paths) == expected


def test_what_had_no_room_is_there_when_it_is_asked_for_again(delivering: Delivering) -> None:
    paths = [delivering.make(f"n{number}", 1000) for number in range(100)]
    asked, rounds = list(paths), 0
    found: dict[bytes, bytes | None] = {}
    while asked:
        rounds += 1
        had = dict(zip(asked, ask(delivering.speaker, asked), strict=True))
        found |= {path: one.content for path, one in had.items() if one.how == "copied"}
        assert {one.how for one in had.values()} <= {"copied", "limit"}
        asked = [path for path in asked if had[path].how == "limit"]
    assert found == dict.fromkeys(paths, contents(1000))
    assert rounds == 4
    assert "reply_full" in delivering.broker.reasons()


def test_253_empty_files_are_253_copies(delivering: Delivering) -> None:
    path = bytes(delivering.trees["copies"] / "empty")
    assert ask(delivering.speaker, [path] * 253) == [Had("copied", b"")] * 253


def test_sparse_file_is_copied_with_its_holes(delivering: Delivering) -> None:
    path = delivering.trees["copies"] / "sparse"
    with path.open("wb") as file:
        file.truncate(10_000)
        file.seek(5_000)
        file.write(b"x")
    assert ask(delivering.speaker, [bytes(path)]) == [Had("copied", bytes(5_000) + b"x" + bytes(4_999))]
    os.truncate(path, 1 << 40)
    assert ask(delivering.speaker, [bytes(path)]) == [Had("too_large", None)]
    assert delivering.broker.reasons()[-1] == "too_large"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing", "not_found"),
        ("fifo", "not_regular"),
        ("directory", "not_regular"),
        ("link", "symlink"),
        ("file/x", "not_directory"),
        ("../x", "path_invalid"),
    ],
)
@pytest.mark.parametrize("tree", DELIVERIES)
def test_what_is_no_file_is_refused_for_the_same_reason_however_it_is_delivered(
    delivering: Delivering, tree: str, name: str, reason: str
) -> None:
    path = bytes(delivering.trees[tree]) + b"/" + name.encode()
    assert ask(delivering.speaker, [path]) == [Had(reason, None)]


def test_conditions_hold_for_copies(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    fill(tree)
    (tree / "large").write_bytes(contents(2_000))
    rules = [
        rule("small", deliver=["copy"], where={"size": {"max": 1000}}),
        rule("never", effect="deny", paths=["empty"]),
    ]
    with no_descriptor_left(), SteppedBroker(tree, policy(tree, *rules), audit=tmp_path / "audit") as broker:
        paths = [bytes(tree / name) for name in ("file", "large", "missing", "fifo", "empty")]
        found = ask(broker.join(), paths)
        # Nothing tells what is not there from what may not be had.
        assert found == [Had("copied", b"content"), *[Had("denied", None)] * 4]
        assert broker.reasons() == ["ok", "where_size", "not_found", "not_regular", "deny_rule"]


def test_rule_that_copies_small_files_beside_one_that_gives_descriptors(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    fill(tree)
    (tree / "large").write_bytes(contents(20_000))
    rules = [
        rule("copies", deliver=["copy"], where={"size": {"max": 1000}}),
        rule("descriptors", paths=["large"]),
    ]
    with no_descriptor_left(), SteppedBroker(tree, policy(tree, *rules), audit=tmp_path / "audit") as broker:
        found = ask(broker.join(), [bytes(tree / "file"), bytes(tree / "large"), bytes(tree / "link")])
        assert found == [Had("copied", b"content"), Had("given", contents(20_000)), Had("denied", None)]
        assert broker.reasons() == ["ok", "ok", "symlink"]


# While it is read


@pytest.mark.parametrize("tree", ["copies", "both"])
@pytest.mark.parametrize("change", ["grows", "shrinks", "is written", "is replaced"])
def test_file_that_changes_while_it_is_copied_is_busy_and_never_a_mixture(
    delivering: Delivering, monkeypatch: pytest.MonkeyPatch, tree: str, change: str
) -> None:
    path = delivering.trees[tree] / "file"
    read = os.pread

    def read_slowly(descriptor: int, size: int, at: int) -> bytes:
        data = read(descriptor, size, at)
        if change == "is replaced":
            (path.parent / "new").write_bytes(b"another")
            (path.parent / "new").rename(path)
        else:
            path.write_bytes(
                {"grows": b"content and more", "shrinks": b"c", "is written": b"CONTENT"}[change]
            )
        return data

    before = descriptors_of()
    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", read_slowly)
        assert ask(delivering.speaker, [bytes(path)]) == [Had("busy", None)]
    assert delivering.broker.reasons() == ["changed"]
    assert descriptors_of() == before
    assert ask(delivering.speaker, [bytes(path)])[0].how == "copied"


def test_file_that_grew_before_it_is_read_is_busy(
    delivering: Delivering, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was small when it was looked at: one byte more of it is read, which tells."""
    path = delivering.trees["copies"] / "file"
    read = os.pread
    small, sizes = path.stat().st_size, []

    def grow_first(descriptor: int, size: int, at: int) -> bytes:
        os.truncate(path, 1 << 30)
        sizes.append(size)
        return read(descriptor, size, at)

    monkeypatch.setattr(os, "pread", grow_first)
    assert ask(delivering.speaker, [bytes(path)]) == [Had("busy", None)]
    assert sizes == [small + 1]


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE])
def test_error_of_reading_is_no_copy_and_leaves_nothing_open(
    delivering: Delivering, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(*_arguments: int) -> bytes:
        raise OSError(number, "no")

    before = descriptors_of()
    path = bytes(delivering.trees["copies"] / "file")
    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", fail)
        assert ask(delivering.speaker, [path]) == [Had("broken", None)]
    assert descriptors_of() == before
    assert delivering.broker.reasons() == [errno.errorcode[number]]


def test_out_of_descriptors_nothing_is_copied_and_it_is_said(delivering: Delivering) -> None:
    path = bytes(delivering.trees["both"] / "file")
    with few_left(1):
        delivering.speaker.send(encode_open(7, [path], copy=True))
    answer = delivering.speaker.receive()
    assert answer is not None
    assert isinstance(answer.reply, OpenReply)
    assert [result.reason.name for result in answer.reply.results] == ["BROKEN"]
    assert ask(delivering.speaker, [path])[0].how == "copied"


def test_copy_that_can_not_be_recorded_is_not_given(
    delivering: Delivering, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(_descriptor: int, _data: bytes) -> int:
        raise OSError(errno.ENOSPC, "no space")

    paths = [bytes(delivering.trees[tree] / "file") for tree in DELIVERIES]
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", no_space)
        assert ask(delivering.speaker, paths) == [Had("audit", None)] * 3
    assert [had.how for had in ask(delivering.speaker, paths)] == ["copied", "copied", "given"]


def test_copies_are_counted_as_allowed(delivering: Delivering) -> None:
    ask(
        delivering.speaker,
        [bytes(delivering.trees["copies"] / name) for name in ("file", "empty", "missing")],
    )
    totals = delivering.broker.broker._dispatch.totals()
    assert (totals["allowed"], totals["denied"], totals["in_flight"]) == (2, 1, 0)
    check_audit(delivering.broker.records())


def test_copy_has_the_place_of_no_descriptor(delivering: Delivering) -> None:
    path = bytes(delivering.trees["copies"] / "file")
    delivering.speaker.send(encode_open(7, [path] * 100, copy=True))
    assert delivering.broker.in_flight == 0
    assert len(delivering.speaker.arrived()) == 1


def test_errno_of_a_file_that_is_too_large_is_efbig(delivering: Delivering) -> None:
    path = delivering.make("large", MAX_COPY + 1)
    answer = delivering.speaker.ask(encode_open(7, [path], copy=True))
    assert isinstance(answer.reply, OpenReply)
    assert answer.reply.results[0].errno == errno.EFBIG


def test_uid_of_the_owner_is_asked_for_copies(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    fill(tree)
    where = {"owner": {"uids": [UID + 1], "client": False, "on_behalf_of": False}}
    with SteppedBroker(tree, policy(tree, rule("mine", deliver=["copy"], where=where))) as broker:
        assert ask(broker.join(), [bytes(tree / "file")]) == [Had("denied", None)]
