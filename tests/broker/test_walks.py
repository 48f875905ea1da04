"""Walks over the wire: credit, `more`, `cancel`, ends that count what came, and changes in the middle."""

from __future__ import annotations

import errno
import os
import resource
import select
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from fdbroker.broker import walking, walks
from fdbroker.broker.identity import probe_level
from fdbroker.kernel import sockets
from fdbroker.wire.client import encode_cancel, encode_more, encode_open, encode_stat, encode_walk
from fdbroker.wire.format import MAX_PATHS, Incomplete, Kind, WalkKind
from fdbroker.wire.messages import WalkFilter
from tests.broker.conftest import no_descriptor_left
from tests.broker.puppets import Puppet
from tests.broker.speaking import (
    Speaker,
    Walked,
    check_audit,
    descriptors_of,
    path_of,
    read_opened,
    read_walked,
)
from tests.broker.stepping import SteppedBroker
from tests.broker.test_loop import few_left
from tests.processes import become, in_child
from tests.running_broker import CLIENT_UID, policy, rule

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from fdbroker.wire.messages import WalkEnd

LEVELS = list(range(probe_level().level + 1))
BATCH = 250  # what the broker chooses
FILES = 5 * BATCH


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tree of directories of 250 files, each with its own name as contents; it stays as it is."""
    return make_tree(tmp_path_factory.mktemp("files") / "tree", FILES, BATCH)


@pytest.fixture
def empty(files: Path) -> Iterator[Path]:
    """Return an empty directory in the tree."""
    made = files / "empty"
    made.mkdir()
    yield made
    made.rmdir()


@pytest.fixture
def _link(files: Path) -> Iterator[None]:
    """Have a link in the tree, `link`."""
    made = files / "link"
    made.symlink_to("d0")
    yield
    made.unlink()


def make_tree(tree: Path, count: int, of_directory: int) -> Path:
    for number in range(count):
        directory = tree / f"d{number // of_directory}"
        if not number % of_directory:
            directory.mkdir(parents=True)
        file = os.open(f"{directory}/f{number}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        os.write(file, b"f%d" % number)
        os.close(file)
    return tree


@pytest.fixture
def walked(files: Path, tmp_path: Path) -> Iterator[SteppedBroker]:
    with no_descriptor_left(), SteppedBroker(files, audit=tmp_path / "audit") as broker:
        yield broker


def names_in(tree: Path) -> set[bytes]:
    return {bytes(path.relative_to(tree)) for path in tree.rglob("*") if path.is_file()}


class Whole(NamedTuple):
    """All frames of a walk together."""

    entries: list[tuple[bytes, bytes | None]]
    frames: int
    reason: str
    end: WalkEnd

    @property
    def paths(self) -> list[bytes]:
        return [path for path, _ in self.entries]


def frames_now(broker: SteppedBroker, speaker: Speaker, rounds: int = 40) -> list[Walked]:
    """Let the broker work; return the frames that come, read as they come."""
    frames = []
    for _ in range(rounds):
        broker.broker.step(0)
        frames += [read_walked(answer) for answer in speaker.arrived()]
    return frames


def rest_of_walk(broker: SteppedBroker, speaker: Speaker, request_id: int = 20) -> Whole:
    """Read a walk to its end, a frame for each credit; check the counts of its end."""
    entries: list[tuple[bytes, bytes | None]] = []
    frames = 0
    for _ in range(1000):
        for frame in frames_now(broker, speaker, 3):
            assert frame.id == request_id
            frames += 1
            entries += frame.entries
            if frame.end is not None:
                assert frame.end.entries == len(entries)
                assert frame.end.descriptors == sum(content is not None for _, content in entries)
                assert not speaker.arrived()
                return Whole(entries, frames, frame.reason, frame.end)
        speaker.send(encode_more(request_id, 1))
    raise AssertionError("the walk does not end")


def walk(broker: SteppedBroker, speaker: Speaker, path: Path | None = None, **asked: object) -> Whole:
    speaker.begin_walk(bytes(path or broker.tree), credit=1, **asked)  # type: ignore[arg-type]
    return rest_of_walk(broker, speaker)


def ended(broker: SteppedBroker) -> list[dict[str, object]]:
    return [record for record in broker.records() if record["event"] == "walk_ended"]


def given(broker: SteppedBroker) -> list[bytes]:
    """Return the paths that the audit says were named by walks, in order."""
    return [
        path_of(record)
        for record in broker.records()
        if record["event"] == "walk" and record.get("decision") == "allow"
    ]


def bystander_is_served(broker: SteppedBroker, speaker: Speaker) -> None:
    """Check that a request is answered within two rounds."""
    speaker.sock.send(encode_open(7, [bytes(broker.tree / "d0" / "f0")]))
    for _ in range(2):
        broker.broker.step(0)
    [answer] = speaker.arrived()
    assert read_opened(answer)[0].content == b"f0"


# What comes


def test_walk_gives_every_file_once_with_its_contents_and_counts_them(walked: SteppedBroker) -> None:
    whole = walk(walked, walked.join())
    assert sorted(whole.paths) == sorted(names_in(walked.tree))
    assert all(content == os.path.basename(path) for path, content in whole.entries)
    assert whole.end == (FILES, FILES, 6, Incomplete(0))
    assert whole.reason == "ok"


def test_each_entry_is_on_record_and_so_is_the_end_with_its_counts(walked: SteppedBroker) -> None:
    speaker = walked.join()
    whole = walk(walked, speaker)
    # The first is about the start.
    assert given(walked) == [bytes(walked.tree), *(bytes(walked.tree) + b"/" + path for path in whole.paths)]
    [end] = ended(walked)
    counts = {key: end[key] for key in ("request", "entries", "descriptors", "directories", "incomplete")}
    assert counts == {
        "request": 20,
        "entries": FILES,
        "descriptors": FILES,
        "directories": 6,
        "incomplete": 0,
    }
    check_audit(walked.records())
    assert walked.broker._dispatch.totals()["allowed"] == FILES + 1


def test_walk_without_descriptors_names_what_its_filter_asks_for(walked: SteppedBroker) -> None:
    asked = WalkFilter(WalkKind.DIRECTORY)
    whole = walk(walked, walked.join(), asked=asked, descriptors=False)
    assert sorted(whole.entries) == [(f"d{number}".encode(), None) for number in range(5)]
    assert walk(walked, walked.join(), asked=WalkFilter(globs=(b"d1/*",)), descriptors=False).end[:2] == (
        BATCH,
        0,
    )


def test_walk_of_nothing_ends_at_once(walked: SteppedBroker, empty: Path) -> None:
    whole = walk(walked, walked.join(), empty)
    assert (whole.frames, whole.end) == (1, (0, 0, 1, Incomplete(0)))


# Credit


def test_never_a_frame_more_than_was_granted(walked: SteppedBroker) -> None:
    speaker = walked.join()
    speaker.begin_walk(bytes(walked.tree), credit=0)
    assert frames_now(walked, speaker) == []
    speaker.send(encode_more(20, 2))
    assert [len(frame.entries) for frame in frames_now(walked, speaker)] == [BATCH, BATCH]
    speaker.send(encode_more(20, 1))
    assert len(frames_now(walked, speaker)) == 1
    speaker.send(encode_more(20, 65535))
    assert frames_now(walked, speaker)[-1].end is not None


def test_loop_waits_while_a_walk_has_no_credit(walked: SteppedBroker) -> None:
    speaker = walked.join()
    speaker.begin_walk(bytes(walked.tree), credit=1)
    assert len(frames_now(walked, speaker)) == 1
    assert not walked.broker._busy
    assert not walked.broker._resting


def test_most_entries_of_a_frame_are_as_asked(walked: SteppedBroker) -> None:
    speaker = walked.join()
    speaker.begin_walk(bytes(walked.tree), credit=3, most=5)
    assert [len(frame.entries) for frame in frames_now(walked, speaker)] == [5, 5, 5]


def test_more_and_cancel_of_no_walk_mean_nothing(walked: SteppedBroker) -> None:
    speaker = walked.join()
    walk(walked, speaker)
    for message in (encode_more(20, 5), encode_cancel(20), encode_more(99, 1), encode_cancel(99)):
        speaker.send(message)
    assert frames_now(walked, speaker) == []
    assert speaker.open_one(bytes(walked.tree / "d0" / "f0")).content == b"f0"
    assert len(ended(walked)) == 1


def test_credit_has_no_end_that_it_could_run_over(walked: SteppedBroker) -> None:
    speaker = walked.join()
    speaker.begin_walk(bytes(walked.tree), credit=0xFFFFFFFF)
    speaker.send(encode_more(20, 65535))
    assert frames_now(walked, speaker)[-1].end is not None


# cancel


def test_cancelled_walk_ends_at_once_and_counts_what_came(walked: SteppedBroker) -> None:
    speaker = walked.join()
    speaker.begin_walk(bytes(walked.tree), credit=2)
    came = sum(len(frame.entries) for frame in frames_now(walked, speaker))
    assert came == 2 * BATCH
    speaker.send(encode_cancel(20))
    [last] = frames_now(walked, speaker)
    assert (last.reason, last.entries) == ("ok", [])
    assert last.end is not None
    assert last.end[:2] == (came, came)
    assert last.end.incomplete == Incomplete.CANCELLED
    assert ended(walked)[0]["left_out_cancelled"] == 1
    # Its id is free again.
    assert len(walk(walked, speaker).entries) == FILES


def test_walk_that_has_credit_is_cancelled_among_its_frames(walked: SteppedBroker) -> None:
    speaker = walked.join()
    speaker.sock.send(encode_walk(20, bytes(walked.tree), WalkFilter(), credit=100))
    for _ in range(3):
        walked.broker.step(0)
    speaker.sock.send(encode_cancel(20))
    frames = frames_now(walked, speaker)
    came = sum(len(frame.entries) for frame in frames)
    assert 0 < came < FILES
    assert [frame.end is not None for frame in frames] == [False] * (len(frames) - 1) + [True]
    assert frames[-1].end is not None
    assert frames[-1].end.entries == came


# Refused


@pytest.mark.usefixtures("_link")
@pytest.mark.parametrize(
    ("path", "reason", "audited"),
    [
        (b"/etc", "denied", "outside_roots"),
        (b"%s/missing", "not_found", "not_found"),
        (b"%s/d0/f0", "not_directory", "not_directory"),
        (b"%s/link", "symlink", "symlink"),
        (b"%s/../x", "path_invalid", "dot_component"),
        (b"", "path_invalid", "empty"),
    ],
)
def test_walk_that_may_not_begin_is_refused_in_its_only_frame(
    walked: SteppedBroker, path: bytes, reason: str, audited: str
) -> None:
    speaker = walked.join()
    speaker.begin_walk(path.replace(b"%s", bytes(walked.tree)), credit=1)
    [frame] = frames_now(walked, speaker)
    assert (frame.reason, frame.entries) == (reason, [])
    assert frame.end is not None
    assert frame.end[:3] == (0, 0, 0)
    assert walked.reasons() == [audited]
    assert len(walk(walked, speaker).entries) == FILES


def test_rule_for_walks_is_asked_for_the_start(files: Path, tmp_path: Path) -> None:
    compiled = policy(files, rule("no walks", actions=["open", "stat", "list"]))
    with SteppedBroker(files, compiled, audit=tmp_path / "audit") as broker:
        speaker = broker.join()
        speaker.begin_walk(bytes(files), credit=1)
        assert [frame.reason for frame in frames_now(broker, speaker)] == ["denied"]
        assert broker.reasons() == ["no_rule"]


def test_fifth_walk_is_refused_and_the_four_go_on(walked: SteppedBroker) -> None:
    speaker = walked.join()
    for request_id in range(1, 6):
        speaker.begin_walk(bytes(walked.tree), credit=1, request_id=request_id)
    frames = frames_now(walked, speaker)
    by_id = {frame.id: frame for frame in frames}
    assert len(frames) == 5
    assert by_id[5].reason == "limit"
    assert by_id[5].end == (0, 0, 0, Incomplete.LIMIT)
    assert walked.reasons().count("walks") == 1
    for request_id in range(1, 5):
        assert len(by_id[request_id].entries) == BATCH
        whole = rest_of_rest(walked, speaker, request_id, by_id[request_id])
        assert sorted(whole) == sorted(names_in(walked.tree))
    # Now there is room again.
    assert len(walk(walked, speaker).entries) == FILES


@pytest.mark.parametrize("limit", ["MOST_WALKS_OF_UID", "MOST_WALKS_IN_ALL"])
def test_walks_are_limited_over_all_connections_and_each_end_makes_room(
    walked: SteppedBroker, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setattr(walks, limit, 3)
    one, other = walked.join(), walked.join()
    walked_of = walked.broker._walks

    def is_refused() -> bool:
        other.begin_walk(bytes(walked.tree), credit=0, request_id=99)
        frames = frames_now(walked, other, 2)
        if frames:
            assert [frame.reason for frame in frames] == ["limit"]
            return True
        other.send(encode_cancel(99))
        assert len(frames_now(walked, other, 2)) == 1
        return False

    for request_id in (1, 2, 3):
        assert not is_refused()
        one.begin_walk(bytes(walked.tree), credit=0, request_id=request_id)
    assert is_refused()
    # By its end, by being cancelled, refused or forgotten.
    one.send(encode_more(1, 100))
    frames_now(walked, one)
    assert not is_refused()
    one.send(encode_cancel(2))
    one.begin_walk(b"/nowhere", credit=1, request_id=4)
    frames_now(walked, one)
    assert walked_of.count == 1
    one.close()
    assert (walked_of.count, walked_of._counted, walked_of._counted_of) == (0, 0, {})


@pytest.mark.parametrize("limit", ["MOST_WALKS_OF_UID", "MOST_WALKS_IN_ALL"])
def test_a_walk_counts_once_more_for_each_1024_bytes_of_its_globs(
    walked: SteppedBroker, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setattr(walks, limit, 6)
    one = walked.join()

    def is_begun(request_id: int, *lengths: int) -> bool:
        asked = WalkFilter(globs=tuple(b"a" * length for length in lengths))
        one.begin_walk(bytes(walked.tree), asked=asked, credit=0, request_id=request_id)
        return not frames_now(walked, one, 2)

    assert is_begun(1, 1024, 1023, 1), "it counts for three"
    assert not is_begun(2, 1024, 1024, 1024)
    assert is_begun(2, 1024, 1023)
    assert is_begun(3, 1023), "it counts for one"
    assert not is_begun(4)
    one.send(encode_cancel(1))
    frames_now(walked, one)
    assert is_begun(4, 1024, 1024)
    assert not is_begun(5)
    one.close()
    assert (walked.broker._walks._counted, walked.broker._walks._counted_of) == (0, {})


def size_of_level(level: walking._Level) -> int:
    """Return about how many bytes are kept of a directory that the walk is below."""
    parts = (level, level.identity, *level.identity, level.position, level.globs, *level.globs)
    return sum(map(sys.getsizeof, parts))


def test_of_a_directory_half_a_kilobyte_is_kept_for_each_that_the_walk_counts_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a megabyte at most, 2,000 directories deep: without globs, and with all that there may be."""
    made: list[walking._Level] = []

    class KeptLevel(walking._Level):
        __slots__ = ()

        def __init__(self, *arguments: Any) -> None:  # noqa: ANN401 - those of its base class
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(walking, "_Level", KeptLevel)
    here = os.open(tmp_path, os.O_PATH)
    for _ in range(300):
        os.mkdir("a", dir_fd=here)
        below = os.open("a", os.O_PATH, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    glob = (b"**/a/" * 205)[:1024].rstrip(b"/*")
    for globs in ((), (glob,) * 16):
        made.clear()
        with SteppedBroker(tmp_path, policy(tmp_path, rule("all"))) as broker:
            one = broker.join()
            one.begin_walk(bytes(tmp_path), asked=WalkFilter(globs=globs), credit=100)
            frames_now(broker, one, 1)
            [connection] = broker.broker._connections.values()
            [active] = connection.walks.values()
            while not any(frame.end for frame in frames_now(broker, one, 1)):
                pass
        assert len(made) == 301
        sizes = list(map(size_of_level, made))
        assert 64 * len(globs) < max(sizes) < 512 * active.counts


def rest_of_rest(broker: SteppedBroker, speaker: Speaker, request_id: int, first: Walked) -> list[bytes]:
    speaker.send(encode_more(request_id, 100))
    frames = [first, *frames_now(broker, speaker)]
    end = frames[-1].end
    assert end is not None
    paths = [path for frame in frames for path, _ in frame.entries]
    assert {frame.id for frame in frames} == {request_id}
    assert end.entries == len(paths)
    return paths


def test_two_walks_take_turns(walked: SteppedBroker) -> None:
    speaker = walked.join()
    for request_id in (1, 2):
        speaker.sock.send(encode_walk(request_id, bytes(walked.tree), WalkFilter(), credit=100))
    order = [frame.id for frame in frames_now(walked, speaker)]
    assert order.count(1) == order.count(2)
    assert order[1:9] in ([1, 2] * 4, [2, 1] * 4)


def test_second_walk_with_the_id_of_one_that_goes_on_is_malformed(walked: SteppedBroker) -> None:
    speaker = walked.join()
    speaker.begin_walk(bytes(walked.tree), credit=0)
    error = speaker.error(encode_walk(20, bytes(walked.tree), WalkFilter(), credit=1))
    assert (error.kind, error.id) == (Kind.MALFORMED, 20)
    assert speaker.is_closed()
    assert walked.connections == 0


# Beside others


def test_other_requests_are_answered_between_two_frames(walked: SteppedBroker) -> None:
    speaker = walked.join()
    speaker.begin_walk(bytes(walked.tree), credit=1)
    [first] = frames_now(walked, speaker)
    assert speaker.open_one(bytes(walked.tree / "d0" / "f0")).content == b"f0"
    assert len(speaker.list_all(bytes(walked.tree))) == 5
    speaker.sock.send(encode_more(20, 100))
    speaker.sock.send(encode_open(7, [bytes(walked.tree / "d0" / "f0")]))
    came = [len(first.entries)]
    opened = 0
    for _ in range(40):
        walked.broker.step(0)
        for answer in speaker.arrived():
            if answer.raw[0] == 0x86:
                came.append(len(read_walked(answer).entries))
            else:
                opened += read_opened(answer)[0].content == b"f0"
                assert len(came) < 5  # not behind the walk
    assert opened == 1
    assert sum(came) == FILES


def test_client_that_does_not_read_stops_its_walk_alone(walked: SteppedBroker) -> None:
    bystander = walked.join()
    speaker = walked.join()
    speaker.sock.send(encode_walk(20, bytes(walked.tree), WalkFilter(), credit=100))
    for _ in range(40):
        walked.broker.step(0)
    # A full reply more has no place beside them.
    assert 512 - 253 < walked.in_flight <= 512
    bystander_is_served(walked, bystander)
    assert not walked.broker._busy
    assert not walked.broker._resting
    frames = frames_now(walked, speaker)
    assert sum(len(frame.entries) for frame in frames) == FILES
    assert frames[-1].end is not None
    walked.serve()
    assert walked.broker._totals()["connections"] == 2


def test_walk_is_kept_waiting_by_others_of_its_uid_and_goes_on_behind_them(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _which: (4096, 4096))  # 512 for each uid
    with no_descriptor_left(), SteppedBroker(files, audit=tmp_path / "audit") as broker:
        other, speaker = broker.join(), broker.join()
        many = [bytes(files / "d0" / "f0")] * 253
        other.sock.send(encode_open(1, many))
        speaker.sock.send(encode_walk(20, bytes(files), WalkFilter(), credit=100))
        for _ in range(20):
            broker.broker.step(0)
        assert broker.in_flight <= 512
        assert broker.broker._resting
        # It does not turn over and over meanwhile.
        assert not broker.broker._busy
        before = speaker.arrived()
        came = sum(len(read_walked(answer).entries) for answer in before)
        assert came < FILES
        [answer] = other.arrived()
        assert len(read_opened(answer, 1)) == 253
        came += sum(len(frame.entries) for frame in frames_now(broker, speaker))
        assert came == FILES


def test_walk_that_rests_gets_its_turn_although_another_asks_all_the_time(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _which: (4096, 4096))
    with SteppedBroker(files, audit=tmp_path / "audit") as broker:
        other, speaker, busy = broker.join(), broker.join(), broker.join()
        many = [bytes(files / "d0" / "f0")] * 253
        for request_id in (1, 2):
            other.sock.send(encode_open(request_id, many))
            broker.serve()
        speaker.sock.send(encode_walk(20, bytes(files), WalkFilter(), credit=100))
        for _ in range(5):
            broker.broker.step(0)
        assert broker.broker._resting
        assert len(other.arrived()) == 2
        for _ in range(20):
            # Nothing but its message is ready in this round.
            busy.sock.send(encode_stat(8, [b"/nowhere"]))
            broker.broker.step(0)
            assert len(busy.arrived()) == 1
        assert sum(len(read_walked(answer).entries) for answer in speaker.arrived()) > 0


def test_client_that_goes_in_the_middle_leaves_nothing_behind(walked: SteppedBroker) -> None:
    before = descriptors_of()
    for rounds in range(12):
        speaker = walked.join()
        for request_id in range(1, 5):
            speaker.sock.send(encode_walk(request_id, bytes(walked.tree), WalkFilter(), credit=100))
        for _ in range(rounds):
            walked.broker.step(0)
        speaker.sock.close()
        walked.serve()
        assert walked.connections == 0
        assert walked.in_flight == 0
        assert descriptors_of() == before
    # What they were sent is on record, whether they read it or not, and so is where they ended.
    assert len(ended(walked)) > 4 * 5  # in the first rounds not all began
    named = len(given(walked)) - sum(1 for path in given(walked) if path == bytes(walked.tree))
    assert sum(int(str(record["entries"])) for record in ended(walked)) == named


@pytest.mark.unmeasured
def test_four_walks_of_one_uid_keep_nobody_waiting(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree", 800, 400)
    with SteppedBroker(tree, audit=tmp_path / "audit") as broker:
        bystander = broker.join()
        walkers = [broker.join() for _ in range(4)]
        for walker in walkers:
            for request_id in range(4):
                walker.sock.send(encode_walk(request_id, bytes(tree), WalkFilter(), credit=10000))
        came = served = 0
        while came < 16 * 800:
            bystander_is_served(broker, bystander)
            served += 1
            for walker in walkers:
                came += sum(len(read_walked(answer).entries) for answer in walker.arrived())
        assert served > 20


# Something changes in the middle


def test_reload_in_the_middle_decides_from_the_next_frame_on(walked: SteppedBroker) -> None:
    speaker = walked.join()
    speaker.begin_walk(bytes(walked.tree), credit=1)
    [first] = frames_now(walked, speaker)
    walked.switch(policy(walked.tree, rule("all"), rule("no threes", effect="deny", paths=["*/*3*"])))
    whole = rest_of_rest(walked, speaker, 20, first)
    later = whole[len(first.entries) :]
    allowed = {name for name in names_in(walked.tree) if b"3" not in os.path.basename(name)}
    assert set(later) == allowed - set(whole[: len(first.entries)])
    assert ended(walked)[-1]["incomplete"] == Incomplete.REFUSED


def test_reload_without_the_root_ends_the_walk(files: Path, tmp_path: Path) -> None:
    [root] = policy(files)["roots"]
    roots = [root, {**root, "name": "other", "path": str(tmp_path)}]
    compiled = policy(files, rule("all"), roots=roots)
    with SteppedBroker(files, compiled, audit=tmp_path / "audit") as broker:
        speaker = broker.join()
        speaker.begin_walk(bytes(files), credit=1)
        [first] = frames_now(broker, speaker)
        broker.switch(policy(files, rule("other", root="other"), roots=roots[1:]))
        speaker.send(encode_more(20, 100))
        [last] = frames_now(broker, speaker)
        assert last.entries == []
        assert last.end is not None
        assert last.end.entries == len(first.entries)
        assert last.end.incomplete == Incomplete.REFUSED


def test_walk_without_credit_does_not_keep_the_policy_of_before(walked: SteppedBroker) -> None:
    speaker = walked.join()
    speaker.begin_walk(bytes(walked.tree), credit=1)
    assert len(frames_now(walked, speaker)) == 1
    [connection] = walked.broker._connections.values()
    active = connection.walks[20]
    before = active.walk.view
    walked.switch(policy(walked.tree))
    assert active.walk.view is not before


@pytest.mark.root
@pytest.mark.parametrize("level", LEVELS)
def test_walker_that_changes_its_ids_in_the_middle_gets_no_more(reachable: Path, level: int) -> None:
    """Each frame is decided for who the client is then, as far as the kernel tells."""
    tree = make_tree(reachable / "tree", 3 * MAX_PATHS, 3 * MAX_PATHS)
    # A full frame more has its place when the one before was read.
    compiled = policy(tree, limits={"connections_per_uid": 64, "in_flight_per_connection": 253})
    with SteppedBroker(tree, compiled, audit=reachable / "audit", level=level) as broker:
        path = broker.listen(reachable)
        with Puppet(broker.serve) as walker:
            walker.do(begin_walk, path, bytes(tree), 100, MAX_PATHS)
            walker.do(change_ids, CLIENT_UID)
            first = walker.do(next_frame)
            second = walker.do(next_frame)
            if level >= 2:
                walker.do(ask_for_more)
                broker.serve()
    assert (first.reason, len(first.entries), first.end) == ("ok", MAX_PATHS, None)
    if level >= 2:
        assert (second.reason, second.entries) == ("identity", [])
        assert second.end[:2] == (MAX_PATHS, MAX_PATHS)
        assert second.end.incomplete == Incomplete.REFUSED
        assert broker.reasons()[-1] == "identity_changed_since_connect"
        assert ended(broker)[-1]["entries"] == MAX_PATHS
        [refused] = [record for record in broker.records() if record["event"] == "more_refused"]
        assert (refused["request"], refused["reason"]) == (20, "sent_with_other_ids")
    else:
        assert second.reason == "ok"  # that ids of now are not those of connect, level 2 alone can tell


def begin_walk(memory: dict[str, Any], path: Path, start: bytes, credit: int, most: int = 0) -> None:
    memory["speaker"] = Speaker.connect(path)
    memory["speaker"].begin_walk(start, credit=credit, most=most)
    select.select([memory["speaker"].sock], [], [])


def change_ids(_memory: dict[str, Any], uid: int) -> None:
    become(uid)


def next_frame(memory: dict[str, Any]) -> Walked:
    answer = memory["speaker"].receive()
    assert answer is not None
    return read_walked(answer)


def ask_for_more(memory: dict[str, Any]) -> None:
    memory["speaker"].send(encode_more(20, 1))


@pytest.mark.parametrize("message", [encode_more(20, 1), encode_cancel(20)])
def test_message_of_another_process_means_nothing_to_a_walk(walked: SteppedBroker, message: bytes) -> None:
    speaker = walked.join()
    speaker.begin_walk(bytes(walked.tree), credit=1)
    [first] = frames_now(walked, speaker)
    in_child(lambda: speaker.sock.send(message))
    assert frames_now(walked, speaker) == []
    assert walked.events()[-1] == ("cancel_refused" if message[0] == 8 else "more_refused")
    assert walked.records()[-1]["reason"] == "sent_by_another_process"
    assert len(rest_of_rest(walked, speaker, 20, first)) == FILES


def test_walk_of_another_process_is_refused(walked: SteppedBroker) -> None:
    speaker = walked.join()
    in_child(lambda: speaker.sock.send(encode_walk(20, bytes(walked.tree), WalkFilter(), credit=1)))
    [frame] = frames_now(walked, speaker)
    assert (frame.reason, frame.end) == ("identity", (0, 0, 0, Incomplete.REFUSED))
    assert walked.reasons() == ["sent_by_another_process"]


# The audit, and what runs out


@pytest.mark.parametrize("after", [0, 1, 3])
def test_walk_ends_with_audit_when_it_can_not_be_recorded_and_counts_what_was_sent(
    walked: SteppedBroker, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    speaker = walked.join()
    speaker.begin_walk(bytes(walked.tree), credit=after)
    came = frames_now(walked, speaker)
    before = descriptors_of()
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", no_space)
        speaker.send(encode_more(20, 100))
        [last] = frames_now(walked, speaker)
    assert (last.reason, last.entries) == ("audit", [])
    assert last.end is not None
    assert last.end[:2] == (after * BATCH, after * BATCH)
    assert last.end.incomplete & Incomplete.FAILED
    assert descriptors_of() == before
    paths = [path for frame in came for path, _ in frame.entries]
    assert given(walked)[1:] == [bytes(walked.tree) + b"/" + path for path in paths]
    # It was the walk's end, not the connection's.
    assert len(walk(walked, speaker).entries) == FILES


def no_space(_descriptor: int, _data: bytes) -> int:
    raise OSError(errno.ENOSPC, "no space")


def test_walk_ends_with_audit_also_where_its_last_frame_can_not_be_recorded(
    walked: SteppedBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    speaker = walked.join()
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", no_space)
        speaker.begin_walk(bytes(walked.tree / "d0"), credit=1, most=253)
        [last] = frames_now(walked, speaker)
    assert (last.reason, last.entries) == ("audit", [])
    assert last.end == (0, 0, 1, Incomplete.FAILED)


def test_walk_out_of_descriptors_ends_with_what_it_has_and_says_so(walked: SteppedBroker) -> None:
    speaker = walked.join()
    speaker.begin_walk(bytes(walked.tree), credit=1)
    [first] = frames_now(walked, speaker)
    before = descriptors_of()
    with few_left(10):
        speaker.send(encode_more(20, 100))
        frames = frames_now(walked, speaker)
    assert frames[-1].end is not None
    assert frames[-1].end.entries == len(first.entries) + sum(len(frame.entries) for frame in frames)
    assert frames[-1].end.incomplete & Incomplete.LIMIT
    assert descriptors_of() == before
    assert len(walk(walked, speaker).entries) == FILES


# Going on behind a name


@pytest.mark.parametrize("frames", [1, 2, 4])
def test_walk_is_gone_on_with_by_another_connection_and_gives_every_name_once(
    walked: SteppedBroker, frames: int
) -> None:
    lost = walked.join()
    lost.begin_walk(bytes(walked.tree), credit=frames)
    first = [path for frame in frames_now(walked, lost) for path, _ in frame.entries]
    lost.close()
    rest = walk(walked, walked.join(), behind=first[-1])
    assert sorted(first + rest.paths) == sorted(names_in(walked.tree))
    assert rest.reason == "ok"


def test_walk_behind_a_name_that_is_gone_is_refused(walked: SteppedBroker) -> None:
    speaker = walked.join()
    speaker.begin_walk(bytes(walked.tree), credit=1, behind=b"d2/missing")
    [frame] = frames_now(walked, speaker)
    assert frame.reason == "not_found"
    assert frame.end is not None


def test_frame_that_never_reached_its_client_is_taken_back_by_the_number_of_its_request(
    walked: SteppedBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_arguments: object, **_more: object) -> int:
        raise OSError(errno.EPIPE, "gone")

    speaker = walked.join()
    with monkeypatch.context() as patch:
        patch.setattr(sockets, "send_part", gone)
        speaker.begin_walk(bytes(walked.tree), credit=1)
    [record] = [record for record in walked.records() if record["event"] == "undelivered"]
    assert record["request"] == 20
