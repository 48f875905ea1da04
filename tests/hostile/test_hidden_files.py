"""Two trees that differ only in files that a client may not have give byte-equal answers, on every transport.

Two brokers are started as they are, with all their confinement; what the
client may not have is made, in any shape, in the tree of one of them alone.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fdbroker.wire.client import (
    ListReply,
    WalkReply,
    encode_list,
    encode_open,
    encode_stat,
    encode_walk,
)
from fdbroker.wire.format import Incomplete, WalkKind
from fdbroker.wire.messages import WalkFilter
from tests.broker.speaking import Answer, DatagramSpeaker, Speaker, StreamSpeaker
from tests.processes import in_child
from tests.running_broker import (
    BROKER_UID,
    CLIENT_UID,
    OWNER_UID,
    RunningBroker,
    policy,
    reachable_directory,
    rule,
    running_broker,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.root, pytest.mark.unmeasured]

EXAMPLES = 100 if os.environ.get("FDBROKER_HOSTILE") else 8
NAMES = ["a", "b", "hidden"]
# Where links lead; what they lead to is not the client's either, where rules follow them.
LINKS = {
    "link": "hidden",
    "link to nothing": "nowhere",
    "link to itself": "itself",
    "link elsewhere": "/etc/passwd",
    "link above": "../../above",
}
KINDS = ["file", "big", "linked", "fifo", *LINKS, "directory", "full directory", "socket"]
# What the client may have is in both trees, and alike.
SHOWN = {"shown": b"shown", "place/shown": b"shown too"}
KIND_OF = WalkFilter(WalkKind.REGULAR | WalkKind.DIRECTORY | WalkKind.SYMLINK | WalkKind.OTHER)
OWN = {"owner": {"uids": [], "client": True, "on_behalf_of": False}}
# By each of them the client may have its own small files, and nothing of `OWNER_UID`.
RULES: dict[str, dict[str, Any]] = {
    "owner": {"where": OWN},
    "owner and size": {"where": OWN | {"size": {"max": 100}, "links": {"max": 1}}},
    "age and owner": {"where": OWN | {"age": {"max": 86_400}}},
    "owner, through links": {"where": OWN, "symlinks": "within-root"},
}


class Hidden(NamedTuple):
    """Something that is made where the client may not have it: of which kind, where."""

    kind: str
    directory: str
    name: str


hidden_things = st.lists(
    st.builds(Hidden, st.sampled_from(KINDS), st.sampled_from(["", "place"]), st.sampled_from(NAMES)),
    max_size=4,
    unique_by=lambda thing: (thing.directory, thing.name),
)


class Twin(NamedTuple):
    """A broker, and what is beside its tree."""

    broker: RunningBroker
    tree: Path

    def call(self, kind: type[Speaker]) -> Speaker:
        if kind is DatagramSpeaker:
            return DatagramSpeaker.to(self.tree.parent / "broker.dgram", broker_uid=BROKER_UID)
        if kind is StreamSpeaker:
            return StreamSpeaker.connect(self.tree.parent / "broker.stream")
        return Speaker.connect(self.broker.socket)


@contextlib.contextmanager
def twin(directory: Path, changes: dict[str, Any]) -> Iterator[Twin]:
    """Run a broker. Both have paths of one length, so that their answers can be compared."""
    tree = directory / "tree"
    (tree / "place").mkdir(parents=True)
    for name, content in SHOWN.items():
        (tree / name).write_bytes(content)
    for path in (tree, tree / "place", *(tree / name for name in SHOWN)):
        os.chown(path, CLIENT_UID, CLIENT_UID)
    some = rule("some", deliver=["descriptor", "copy"], **changes)
    sockets = [f"--{option}={directory / f'broker.{option}'}" for option in ("stream", "dgram")]
    with running_broker(directory, policy(tree, some), *sockets) as broker:
        yield Twin(broker, tree)


@pytest.fixture(scope="module", params=RULES)
def twins(request: pytest.FixtureRequest) -> Iterator[tuple[Twin, Twin]]:
    changes = RULES[request.param]
    with reachable_directory() as directory, contextlib.ExitStack() as stack:
        one, two = (stack.enter_context(twin(new(directory / name), changes)) for name in ("one", "two"))
        yield one, two


def new(directory: Path) -> Path:
    directory.mkdir(mode=0o755)
    return directory


def make(tree: Path, thing: Hidden) -> None:
    """Make it, of another owner than the client, or refused by what it is."""
    path = tree / thing.directory / thing.name
    if thing.kind == "directory":
        path.mkdir()
    elif thing.kind == "full directory":
        path.mkdir()
        (path / "a").write_bytes(b"secret")
        (path / "place").mkdir()
    elif thing.kind == "fifo":
        os.mkfifo(path)
    elif thing.kind == "socket":
        os.mknod(path, stat.S_IFSOCK | 0o666)
    elif thing.kind in LINKS:
        path.symlink_to(thing.name if thing.kind == "link to itself" else LINKS[thing.kind])
    else:
        path.write_bytes(bytes(5000) if thing.kind == "big" else b"secret")
        if thing.kind == "linked":
            os.link(path, f"{tree.parent}/linked-{thing.directory}-{thing.name}")
    for made in (path, *(path.iterdir() if thing.kind == "full directory" else ())):
        os.chown(made, OWNER_UID, OWNER_UID, follow_symlinks=False)


def clear(tree: Path) -> None:
    """Remove what was hidden."""
    for path in (*tree.iterdir(), *(tree / "place").iterdir()):
        if path.is_dir() and not path.is_symlink():
            if path.name != "place":
                shutil.rmtree(path)
        elif path.name != "shown":
            path.unlink()
    for path in tree.parent.glob("linked-*"):
        path.unlink()


def questions(tree: Path) -> list[bytes]:
    """Return requests about all there may be, below what there may be, and about what never is."""
    names = [*NAMES, "never"]
    paths = [*names, *(f"place/{name}" for name in names), "hidden/a", "place/a/place", "never/x", "shown"]
    asked = [bytes(tree / path) for path in paths]
    one_by_one = [
        *(encode_open(1, [path]) for path in asked),
        *(encode_open(2, [path], copy=True) for path in asked),
        *(encode_stat(3, [path]) for path in asked[:-1]),
    ]
    return [
        *one_by_one,
        encode_open(4, asked),
        encode_open(5, asked, copy=True),
        encode_stat(6, asked[:-1]),
    ]


def questions_of_directories(tree: Path) -> list[bytes]:
    """Return what only connections can ask: of directories that there are, may be, and never are."""
    asked = [bytes(tree / path) for path in ("", "place", "hidden", "place/a", "never")]
    walks = [
        encode_walk(8, path, kind, credit=1000, descriptors=opens)
        for path in asked
        for kind, opens in ((WalkFilter(), True), (KIND_OF, False))
    ]
    return [*(encode_list(7, path) for path in asked), *walks]


def heard(answer: Answer) -> object:
    """Return an answer for comparison: its bytes, but for what differs of files that are shown in two trees.

    What a list or a walk names stands in the file system's order, which is one of hashes with a secret of
    each directory; so names are sorted. A cookie is a place in that order.
    """
    count = len(answer.descriptors)
    answer.descriptors.close()
    reply = answer.reply
    if isinstance(reply, ListReply):
        return reply.result, sorted(entry.name for entry in reply.entries), reply.last, len(answer.raw)
    if isinstance(reply, WalkReply):
        # The one thing that a walk tells, by design: something was left out. A client must not take what it
        # got for all there is.
        end = reply.end
        if end is not None:
            assert end.incomplete in {Incomplete(0), Incomplete.REFUSED}
            end = end._replace(incomplete=Incomplete(0))
        return reply.result, sorted(entry.path for entry in reply.entries), end, count, len(answer.raw)
    return answer.raw, count


def all_heard(twin: Twin, kind: type[Speaker]) -> list[object]:
    """Ask everything; return what is heard."""
    found: list[object] = []
    with twin.call(kind) as speaker:
        found += [heard(speaker.ask(question)) for question in questions(twin.tree)]
        if kind is DatagramSpeaker:
            return found
        for question in questions_of_directories(twin.tree):
            answer = speaker.ask(question)
            found.append(heard(answer))
            while isinstance(answer.reply, WalkReply) and answer.reply.end is None:
                following = speaker.receive()
                assert following is not None
                answer = following
                found.append(heard(answer))
    return found


@settings(
    max_examples=EXAMPLES,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(one_hidden=hidden_things, two_hidden=hidden_things)
def test_answers_do_not_tell_what_is_there_that_may_not_be_had(
    twins: tuple[Twin, Twin], one_hidden: list[Hidden], two_hidden: list[Hidden]
) -> None:
    for twin_, hidden in zip(twins, (one_hidden, two_hidden), strict=True):
        clear(twin_.tree)
        for thing in hidden:
            make(twin_.tree, thing)
    kinds = (Speaker, StreamSpeaker, DatagramSpeaker)
    one, two = (
        in_child(lambda: [all_heard(twin_, kind) for kind in kinds], uid=CLIENT_UID)  # noqa: B023 - called at once
        for twin_ in twins
    )
    for kind, of_one, of_two in zip(kinds, one, two, strict=True):
        assert of_one == of_two, kind


def test_what_may_be_had_does_show(twins: tuple[Twin, Twin]) -> None:
    """The comparison above sees a difference where there is one."""
    one = twins[0]
    for twin_ in twins:
        clear(twin_.tree)
    (one.tree / "a").write_bytes(b"mine")
    os.chown(one.tree / "a", CLIENT_UID, CLIENT_UID)
    first, second = (in_child(lambda: all_heard(twin_, Speaker), uid=CLIENT_UID) for twin_ in twins)  # noqa: B023
    assert sum(of_one != of_two for of_one, of_two in zip(first, second, strict=False)) >= 5
