"""Conditions that ask more than fstat(2) tells: when an object was looked at, and on what file system."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import pytest

from fdbroker.wire.format import Reason, Status
from fdbroker.wire.messages import WalkFilter
from tests.broker.conftest import no_descriptor_left
from tests.broker.stepping import SteppedBroker
from tests.descriptors.mounting import mounted
from tests.running_broker import policy, rule

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.broker.speaking import Speaker

MINUTE, TMPFS, RAMFS = 60, 0x01021994, 0x858458F6


def walked(speaker: Speaker, start: Path) -> set[bytes]:
    """Return the regular files that a walk hands over."""
    speaker.begin_walk(bytes(start), credit=100, asked=WalkFilter())
    found: set[bytes] = set()
    while True:
        answer = speaker.receive()
        assert answer is not None
        answer.descriptors.close()
        found |= {entry.path for entry in answer.reply.entries}  # type: ignore[union-attr]
        if answer.reply.end is not None:  # type: ignore[union-attr]
            return found


def what_is_had(speaker: Speaker, tree: Path, names: list[str]) -> list[set[str]]:
    """Return which of the names are opened, described, listed with a description and walked to."""
    paths = [bytes(tree / name) for name in names]
    opened = {
        name for name, each in zip(names, speaker.open(*paths), strict=True) if each.content is not None
    }
    described = {
        name
        for name, (result, _) in zip(names, speaker.stat(*paths).results, strict=True)
        if result.status is Status.GIVEN
    }
    listed = {
        f"{directory}{entry.name.decode()}"
        for directory in {name[: name.rfind("/") + 1] for name in names}
        for entry in speaker.page(bytes(tree / directory)).entries
        if entry.stat is not None
    } & set(names)
    return [opened, described, listed, {name.decode() for name in walked(speaker, tree)} & set(names)]


@pytest.mark.parametrize("deny", [False, True])
def test_age_of_a_file_is_a_condition_for_whatever_is_done_with_it(
    tree: Path, tmp_path: Path, *, deny: bool
) -> None:
    ages = {"old": 10 * MINUTE, "middle": 3 * MINUTE, "new": 0, "future": -10 * MINUTE}
    for name, age in ages.items():
        (tree / name).write_bytes(b"x")
        os.utime(tree / name, (0, time.time() - age))
    between = {"age": {"min": MINUTE, "max": 5 * MINUTE}}
    rules = [rule("between", where=between)]
    if deny:
        rules = [rule("all"), rule("between", where=between, effect="deny")]
    with no_descriptor_left(), SteppedBroker(tree, policy(tree, *rules), audit=tmp_path / "audit") as broker:
        expected = ages.keys() - {"middle"} if deny else {"middle"}
        assert what_is_had(broker.join(), tree, list(ages)) == [expected] * 4
        # Whatever is modified meanwhile: the age is that of the moment in which it is asked for.
        os.utime(tree / "middle")
        assert (broker.join().open_one(bytes(tree / "middle")).content is None) is not deny
        assert broker.reasons()[-1] == ("ok" if deny else "where_age")


@pytest.fixture
def on_two(tmp_path: Path) -> Iterator[Path]:
    """Return a tree on a tmpfs with a ramfs below it, and a file on each."""
    tree = tmp_path / "on-two"
    tree.mkdir()
    with mounted("tmpfs", tree):
        (tree / "below").mkdir()
        with mounted("ramfs", tree / "below"):
            for name in ("here", "below/there"):
                (tree / name).write_bytes(b"x")
            yield tree


@pytest.mark.root
@pytest.mark.parametrize(
    ("types", "expected"),
    [
        ([TMPFS], {"here"}),
        ([RAMFS], {"below/there"}),
        ([TMPFS, RAMFS], {"here", "below/there"}),
        ([1], set()),
    ],
)
def test_file_system_is_asked_for_of_each_file_where_mounts_are_crossed(
    on_two: Path, tmp_path: Path, types: list[int], expected: set[str]
) -> None:
    roots = [{"name": "tree", "path": str(on_two), "cross_mounts": True, "opens": "loop"}]
    some = rule("some", paths=["here", "*/*"], where={"filesystem": {"types": types}})
    directories = rule("directories", actions=["list", "walk"], paths=["**"], **{"except": ["here", "*/*"]})
    compiled = policy(on_two, some, directories, roots=roots, read_only_view="off")
    with no_descriptor_left(), SteppedBroker(on_two, compiled, audit=tmp_path / "audit") as broker:
        assert what_is_had(broker.join(), on_two, ["here", "below/there"]) == [expected] * 4


@pytest.mark.root
@pytest.mark.parametrize("types", [[TMPFS], [RAMFS]])
def test_file_system_of_a_root_without_crossing_is_that_of_its_start(
    on_two: Path, tmp_path: Path, types: list[int]
) -> None:
    compiled = policy(on_two, rule("some", where={"filesystem": {"types": types}}))
    with no_descriptor_left(), SteppedBroker(on_two, compiled, audit=tmp_path / "audit") as broker:
        speaker = broker.join()
        assert speaker.open_one(bytes(on_two / "here")).reason == ("ok" if types == [TMPFS] else "denied")
        # The other file system is not reached at all.
        assert speaker.open_one(bytes(on_two / "below/there")).reason == "denied"
        assert broker.reasons()[-1] == "crosses_mount"
        reply = speaker.stat(bytes(on_two / "here"))
        assert reply.results[0][0].reason == (Reason.NONE if types == [TMPFS] else Reason.DENIED)
