"""Two trees that differ only in files a client may not have answer alike, byte for byte."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from fdbroker.wire.client import encode_list, encode_open, encode_stat
from tests.broker.stepping import SteppedBroker
from tests.running_broker import OWNER_UID, policy, rule

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

UID = os.getuid()
BIG = 5000
# What the client may not have, by each rule: everything big.
SMALL = {"where": {"size": {"max": 100}}}


def linked(path: Path) -> None:
    path.write_bytes(bytes(BIG))
    os.link(path, f"{path}.hidden-link")


MAKERS: dict[str, Callable[[Path], Any]] = {
    "a file": lambda path: path.write_bytes(bytes(BIG)),
    "a bigger file": lambda path: path.write_bytes(bytes(BIG + 1)),
    "a linked file": linked,
}


@pytest.fixture
def twins(tmp_path: Path) -> Iterator[Callable[[dict[str, Any]], tuple[SteppedBroker, SteppedBroker]]]:
    """Return what starts two brokers on trees that are alike but for what is then made in the first."""
    made: list[SteppedBroker] = []

    def start(changes: dict[str, Any]) -> tuple[SteppedBroker, SteppedBroker]:
        for name in ("one", "two"):
            # The same path for both, so that requests are the same bytes: a directory that is exchanged.
            tree = tmp_path / name / "tree"
            tree.mkdir(parents=True)
            compiled = policy(tree, rule("some", **changes))
            made.append(SteppedBroker(tree, compiled, audit=tmp_path / f"audit-{name}"))
        return made[0], made[1]

    yield start
    for broker in made:
        broker.close()


def replies(broker: SteppedBroker, make: Callable[[int, bytes], bytes]) -> list[bytes]:
    """Return the raw replies to requests for names that may or may not be there."""
    speaker = broker.join()
    found = []
    for number, name in enumerate(
        (
            b"secret",
            b"secret/x",
            b"secret/x/y",
            b"directory/secret",
            b"directory/secret/x",
            b"never",
            b"shown",
        )
    ):
        answer = speaker.ask(make(number, bytes(broker.tree) + b"/" + name))
        answer.descriptors.close()
        found.append(answer.raw)
    return found


def without_facts(frames: list[bytes]) -> list[bytes]:
    """Leave out what differs for a file that may be had: inode and times of `shown`, asked for last."""
    return frames[:-1]


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("action", ["open", "stat", "list"])
def test_file_that_may_not_be_had_answers_like_one_that_is_not_there(
    twins: Callable[[dict[str, Any]], tuple[SteppedBroker, SteppedBroker]], action: str, kind: str
) -> None:
    one, two = twins(SMALL)
    for broker in (one, two):
        (broker.tree / "shown").write_bytes(b"small")
        (broker.tree / "directory").mkdir()
    MAKERS[kind](one.tree / "secret")
    MAKERS[kind](one.tree / "directory" / "secret")

    def make(number: int, path: bytes) -> bytes:
        if action == "open":
            return encode_open(number, [path])
        return encode_stat(number, [path]) if action == "stat" else encode_list(number, path)

    assert without_facts(replies(one, make)) == without_facts(replies(two, make))
    # The audit knows better.
    assert set(one.reasons()) != set(two.reasons())


@pytest.mark.root
@pytest.mark.parametrize("what", ["a file", "a directory", "a link", "a fifo"])
@pytest.mark.parametrize("action", ["open", "stat", "list"])
def test_whatever_somebody_else_owns_answers_like_nothing(
    twins: Callable[[dict[str, Any]], tuple[SteppedBroker, SteppedBroker]], action: str, what: str
) -> None:
    one, two = twins({"where": {"owner": {"uids": [], "client": True, "on_behalf_of": False}}})
    for broker in (one, two):
        (broker.tree / "shown").write_bytes(b"small")
        (broker.tree / "directory").mkdir()
    for path in (one.tree / "secret", one.tree / "directory" / "secret"):
        if what == "a file":
            path.write_bytes(b"secret")
        elif what == "a directory":
            path.mkdir()
        elif what == "a link":
            path.symlink_to("shown")
        else:
            os.mkfifo(path)
        os.chown(path, OWNER_UID, OWNER_UID, follow_symlinks=False)

    def make(number: int, path: bytes) -> bytes:
        if action == "open":
            return encode_open(number, [path])
        return encode_stat(number, [path]) if action == "stat" else encode_list(number, path)

    assert without_facts(replies(one, make)) == without_facts(replies(two, make))


@pytest.mark.parametrize("hidden", [1, 5])
@pytest.mark.parametrize("shown", [0, 1, 3])
def test_list_of_a_directory_tells_nothing_of_what_it_leaves_out(
    twins: Callable[[dict[str, Any]], tuple[SteppedBroker, SteppedBroker]], hidden: int, shown: int
) -> None:
    one, two = twins(SMALL | {"actions": ["list"]})
    for broker in (one, two):
        for number in range(shown):
            (broker.tree / f"shown-{number}").write_bytes(b"small")
    for number in range(hidden):
        (one.tree / f"secret-{number}").write_bytes(bytes(BIG))

    def page(broker: SteppedBroker) -> tuple[bytes, list[bytes]]:
        speaker = broker.join()
        raw = speaker.ask(encode_list(5, bytes(broker.tree))).raw
        # The entries come in the order of the file system, which hashes names with a secret of its own.
        return raw[:28], sorted(speaker.list_all(bytes(broker.tree)))

    assert page(one) == page(two)
