"""Walks by themselves, step by step, on real trees that are what they are or change meanwhile."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import inspect
import itertools
import os
import resource
import signal
import stat
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdbroker.broker import walking
from fdbroker.broker.dispatch import Asker
from fdbroker.broker.walking import MOST_ENTRIES
from fdbroker.kernel import files
from fdbroker.kernel.errors import SyscallError
from fdbroker.policy.decide import decide_object
from fdbroker.policy.globs import compile_glob
from fdbroker.wire.format import Incomplete, Reason, Status, WalkKind
from fdbroker.wire.messages import WalkFilter
from tests.broker.conftest import no_descriptor_left
from tests.broker.walks import UID, finish, ground, take
from tests.descriptors.mounting import bound, mounted
from tests.races.attacking import exchange
from tests.running_broker import OTHER_UID, OWNER_UID, policy, rule

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fdbroker.broker.walking import Walk
    from fdbroker.policy.decide import NameDecision, ObjectDecision
    from fdbroker.policy.globs import Glob

ALL_KINDS = WalkKind.REGULAR | WalkKind.DIRECTORY | WalkKind.SYMLINK | WalkKind.OTHER
ALL = WalkFilter(kinds=ALL_KINDS)
COMPLETE = Incomplete(0)


def owned_by(uid: int) -> dict[str, Any]:
    """Return the condition that a file is somebody's."""
    return {"owner": {"uids": [uid], "client": False, "on_behalf_of": False}}


@pytest.fixture(autouse=True)
def closed_again() -> Iterator[None]:
    with no_descriptor_left():
        yield


def in_order(tree: Path, below: bytes = b"") -> Iterator[bytes]:
    """Yield all paths below a directory in the file system's order, contents behind their directory."""
    with os.scandir(os.path.join(bytes(tree), below)) as scan:
        entries = list(scan)
    for entry in entries:
        path = below + b"/" + entry.name if below else entry.name
        yield path
        if entry.is_dir(follow_symlinks=False):
            yield from in_order(tree, path)


def bushy(tree: Path, sizes: tuple[int, int, int] = (4, 5, 6)) -> Path:
    """Make directories within directories, with files."""
    for a in range(sizes[0]):
        for b in range(sizes[1]):
            directory = tree / f"a{a}" / f"b{b}"
            directory.mkdir(parents=True)
            for c in range(sizes[2]):
                (directory / f"c{c}").write_bytes(f"{a} {b} {c}".encode())
        (tree / f"a{a}" / "empty").mkdir()
    return tree


@pytest.fixture
def bush(tmp_path: Path) -> Path:
    (tmp_path / "bush").mkdir()
    return bushy(tmp_path / "bush")


# what is found, and in which order


@pytest.mark.parametrize("room", [1, 2, 7, 64, 253])
def test_a_walk_names_everything_in_the_file_systems_order_with_contents_behind_their_directory(
    tree: Path, room: int
) -> None:
    bushy(tree)
    with ground(tree) as here:
        found = here.find(ALL, room=room, most=253)
    assert found.paths == list(in_order(tree))
    assert found.end == (len(found.paths), 0, 30, COMPLETE)


def test_a_walk_describes_what_it_names_as_stat_does(tree: Path) -> None:
    with ground(tree) as here:
        for entry in here.find(ALL).entries:
            facts = (tree / os.fsdecode(entry.path)).lstat()
            assert entry.kind == facts.st_mode >> 12
            assert entry.stat == (
                facts.st_dev,
                facts.st_ino,
                facts.st_mode,
                facts.st_nlink,
                facts.st_uid,
                facts.st_gid,
                facts.st_size,
                facts.st_mtime_ns,
                facts.st_ctime_ns,
            )


def test_a_walk_opens_regular_files_and_nothing_else(tree: Path) -> None:
    bushy(tree)
    with ground(tree) as here:
        found = here.find(ALL, descriptors=True)
    files_there = {path for path in in_order(tree) if (tree / os.fsdecode(path)).lstat().st_mode >> 12 == 8}
    assert found.contents == {path: (tree / os.fsdecode(path)).read_bytes() for path in files_there}
    assert found.end.descriptors == len(files_there) == 4 * 5 * 6 + 3


@pytest.mark.parametrize("rules", [[rule("all")], [rule("all", where={"size": {"max": 10}})]])
def test_descriptors_are_the_same_where_something_is_asked_of_the_files(
    bush: Path, rules: list[dict[str, Any]]
) -> None:
    with ground(bush, *rules) as here:
        found = here.find(descriptors=True)
    assert found.contents == {
        bytes(path.relative_to(bush)): path.read_bytes() for path in bush.rglob("*") if path.is_file()
    }
    assert found.end.incomplete == COMPLETE


@pytest.mark.parametrize("where", [{}, {"size": {"min": 0, "max": 100}}], ids=["plain", "judged"])
def test_a_file_of_the_year_1589_is_walked_unless_later_ones_are_asked_for(where: dict[str, Any]) -> None:
    # On a tmpfs, which keeps such times.
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        early = Path(directory) / "early"
        early.write_bytes(b"early")
        os.utime(early, ns=(0, -12_000_000_000 * 1_000_000_000))
        with ground(Path(directory), rule("all", where=where)) as made:
            assert made.find(ALL, descriptors=True).contents == {b"early": b"early"}
            later = WalkFilter(newer_than=-(1 << 63) + 1)
            assert made.find(later, descriptors=True).contents == {}


@pytest.mark.parametrize("where", [{}, {"size": {"min": 0, "max": 100}}], ids=["plain", "judged"])
def test_a_file_of_the_year_2264_is_walked_as_others_are(tmp_path: Path, where: dict[str, Any]) -> None:
    (tmp_path / "late").write_bytes(b"late")
    os.utime(tmp_path / "late", ns=(0, 9_300_000_000 * 1_000_000_000))
    with ground(tmp_path, rule("all", where=where)) as made:
        found = made.find(ALL, descriptors=True)
    assert found.contents == {b"late": b"late"}
    assert found.entries[0].stat.mtime_ns == 9_300_000_000 * 1_000_000_000


def test_a_symbolic_link_is_named_and_never_followed(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "up").symlink_to("..")
    (tree / "here").symlink_to(".")
    with ground(tree) as here:
        assert sorted(here.find(ALL).paths) == [b"here", b"up"]
        assert here.find().paths == []


@pytest.fixture
def with_no_mount_above() -> Iterator[Path]:
    """A directory on the file system of the root of all, which /tmp need not be on."""
    for place in ("/tmp", "/var/tmp", os.fspath(Path(__file__).parent)):
        if os.stat(place).st_dev == os.stat("/").st_dev:
            with tempfile.TemporaryDirectory(dir=place) as directory:
                yield Path(directory)
            return
    pytest.skip("neither /tmp nor /var/tmp nor this checkout is on the file system of /")


@pytest.mark.unmeasured
def test_the_root_of_all_can_be_walked(with_no_mount_above: Path) -> None:
    place = with_no_mount_above
    (place / "file").write_bytes(b"x")
    document = policy("/", rule("some", paths=["**"], root="tree"))
    shown = bytes(place).split(b"/")[1:]
    asked = WalkFilter(globs=(bytes(place)[1:] + b"/*",))
    # Everything else is refused, or it would be a walk of the whole machine.
    ways = ["/".join(os.fsdecode(name) for name in shown[:n]) for n in range(1, len(shown) + 1)]
    document["rules"] = [
        rule("way", paths=[*ways, f"{ways[-1]}/*"]),
        rule("start", paths=["**"], where=owned_by(0), actions=["walk"]),
        rule("not", effect="deny", paths=["*"], **{"except": [ways[0]]}),
        *(
            rule(f"nor {above}", effect="deny", paths=[f"{above}/*"], **{"except": [way]})
            for above, way in itertools.pairwise(ways)
        ),
    ]
    with ground(Path("/"), *document["rules"]) as here:
        found = here.find(asked, start=b"/", descriptors=True)
    assert found.contents == {bytes(place)[1:] + b"/file": b"x"}


def test_a_walk_may_begin_anywhere_below_the_root(bush: Path) -> None:
    with ground(bush) as here:
        found = here.find(start=bytes(bush / "a1" / "b2"))
        assert sorted(found.paths) == [b"c0", b"c1", b"c2", b"c3", b"c4", b"c5"]
        assert here.find(start=bytes(bush / "a1" / "empty")).end == (0, 0, 1, COMPLETE)


def test_names_may_be_any_bytes(tmp_path: Path) -> None:
    names = [b"\xff\xfe", b"new\nline", b" ", b"\x1b[0m", b"...", b"*"]
    for name in names:
        Path(os.fsdecode(bytes(tmp_path) + b"/" + name)).touch()
    with ground(tmp_path) as here:
        assert sorted(here.find().paths) == sorted(names)


def test_long_paths_fill_frames_up_to_their_limit_and_not_beyond(tmp_path: Path) -> None:
    directory = bytes(tmp_path)
    while len(directory) < 3500:
        directory += b"/" + b"d" * 200
    os.makedirs(directory)
    for number in range(50):
        os.mknod(directory + b"/%0100d" % number)
    with ground(tmp_path) as here:
        walk = here.walk()
        sizes = []
        while (reply := take(walk.step(253))).end is None:
            sizes.append(len(reply.entries))
        assert sum(sizes) + len(reply.entries) == 50
        assert max(sizes) == 32720 // (60 + len(directory) - len(bytes(tmp_path)) + 100)


# filters


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        (WalkFilter(), {"10", "20", "sub/10", "sub/30"}),
        (WalkFilter(kinds=WalkKind.DIRECTORY), {"sub"}),
        (WalkFilter(kinds=WalkKind.SYMLINK), {"link"}),
        (WalkFilter(kinds=WalkKind.OTHER), {"fifo"}),
        (WalkFilter(kinds=WalkKind.OTHER | WalkKind.DIRECTORY), {"sub", "fifo"}),
        (WalkFilter(least_size=11), {"20", "sub/30"}),
        (WalkFilter(most_size=10), {"10", "sub/10"}),
        (WalkFilter(kinds=ALL_KINDS, least_size=20, most_size=20), {"20", "sub", "link", "fifo"}),
        (WalkFilter(newer_than=999_999_999), {"10", "20", "sub/10", "sub/30"}),
        (WalkFilter(newer_than=1_000_000_000), {"20", "sub/10", "sub/30"}),
        (WalkFilter(globs=(b"*",)), {"10", "20"}),
        (WalkFilter(globs=(b"**/1?", b"sub/3*")), {"10", "sub/10", "sub/30"}),
        (WalkFilter(kinds=ALL_KINDS, globs=(b"s*/**",)), {"sub", "sub/10", "sub/30"}),
        (WalkFilter(globs=(b"none/**",)), set()),
    ],
)
@pytest.mark.parametrize("descriptors", [False, True])
def test_filters_say_what_is_named_and_leave_nothing_out(
    tmp_path: Path, asked: WalkFilter, wanted: set[str], *, descriptors: bool
) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("10", "20", "sub/10", "sub/30"):
        (tmp_path / name).write_bytes(bytes(int(name[-2:])))
    os.utime(tmp_path / "10", ns=(0, 1_000_000_000))
    (tmp_path / "link").symlink_to("10")
    os.mkfifo(tmp_path / "fifo")
    with ground(tmp_path) as here:
        found = here.find(asked, descriptors=descriptors)
    assert {os.fsdecode(path) for path in found.paths} == wanted
    assert found.end.incomplete == COMPLETE
    assert set(found.contents) == {entry.path for entry in found.entries if descriptors and entry.kind == 8}


@pytest.mark.parametrize("pattern", [b"/absolute", b"a//b", b"**x", b"[", b"..", b"a\\"])
def test_a_glob_that_is_none_refuses_the_walk(tmp_path: Path, pattern: bytes) -> None:
    with ground(tmp_path) as here:
        found = here.find(WalkFilter(globs=(b"*", pattern)))
    assert (found.result.status, found.result.reason) == (Status.REFUSED, Reason.PATH_INVALID)
    assert found.end == (0, 0, 0, COMPLETE)


_NAMES = st.sampled_from([b"a", b"b", b"c.txt", b"d.txt"])
_TREES = st.recursive(
    st.integers(0, 3),
    lambda below: st.dictionaries(_NAMES, below, max_size=4),
    max_leaves=12,
).map(lambda made: made if isinstance(made, dict) else {})
_FILTERS = st.builds(
    WalkFilter,
    kinds=st.integers(1, 15).map(WalkKind),
    least_size=st.integers(0, 2),
    most_size=st.integers(1, 3),
    newer_than=st.sampled_from([-(1 << 63), 1, 2]),
    globs=st.lists(st.sampled_from([b"**", b"*", b"a/**", b"**/*.txt", b"*/b", b"c.txt"]), max_size=3).map(
        tuple
    ),
)


def plant(directory: bytes, plan: dict[bytes, Any]) -> None:
    """Make a tree: a number is a file of that size and time, but 0 a link."""
    os.mkdir(directory)
    for name, what in plan.items():
        path = directory + b"/" + name
        if isinstance(what, dict):
            plant(path, what)
        elif what == 0:
            os.symlink(b"a", path)
        else:
            Path(os.fsdecode(path)).write_bytes(bytes(what))
            os.utime(path, ns=(what, what))


def is_named(tree: Path, path: bytes, asked: WalkFilter) -> bool:
    """Return what the protocol says of a filter."""
    facts = os.lstat(bytes(tree) + b"/" + path)
    kind = {8: WalkKind.REGULAR, 4: WalkKind.DIRECTORY, 10: WalkKind.SYMLINK}[facts.st_mode >> 12]
    components = path.split(b"/")
    return (
        bool(kind & asked.kinds)
        and (kind != WalkKind.REGULAR or asked.least_size <= facts.st_size <= asked.most_size)
        and facts.st_mtime_ns > asked.newer_than
        and (not asked.globs or any(compile_glob(glob).matches(components) for glob in asked.globs))
    )


@given(plan=_TREES, asked=_FILTERS, room=st.integers(1, 5), data=st.data())
def test_any_filter_of_any_tree_gives_the_same_sequence_wherever_the_walk_was_taken_up_again(
    plan: dict[bytes, Any], asked: WalkFilter, room: int, data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        tree = Path(directory) / "tree"
        plant(bytes(tree), plan)
        everything = list(in_order(tree))
        with ground(tree) as here:
            found = here.find(asked, room=room)
            assert found.paths == [path for path in everything if is_named(tree, path, asked)]
            if everything:
                at = data.draw(st.integers(0, len(everything) - 1))
                rest = here.find(asked, room=room, behind=everything[at])
                assert rest.result.status is Status.GIVEN
                assert rest.paths == [path for path in everything[at + 1 :] if is_named(tree, path, asked)]


# where it begins, and begins again


@pytest.mark.parametrize(
    ("start", "reason"),
    [
        (b"/missing", Reason.NOT_FOUND),
        (b"/file", Reason.NOT_DIRECTORY),
        (b"/fifo", Reason.NOT_DIRECTORY),
        (b"/file/below", Reason.NOT_DIRECTORY),
        (b"/link", Reason.SYMLINK),
        (b"/link/below", Reason.SYMLINK),
        (b"/..", Reason.PATH_INVALID),
        (b"/directory/", Reason.PATH_INVALID),
        (b"/" + b"x" * 256, Reason.PATH_INVALID),
    ],
)
def test_a_start_that_is_none_is_refused_with_its_reason(tree: Path, start: bytes, reason: Reason) -> None:
    with ground(tree) as here:
        found = here.find(start=bytes(tree) + start)
    assert (found.result.status, found.result.reason, found.paths) == (Status.REFUSED, reason, [])
    assert found.end == (0, 0, 0, COMPLETE)
    assert len(found.records) == 1
    assert '"decision":"deny"' in found.records[0][1]


def test_a_start_outside_the_policy_is_denied_whatever_is_there(tree: Path) -> None:
    with ground(tree, rule("some", paths=["directory/**"])) as here:
        for name in ("", "/file", "/missing"):
            found = here.find(start=bytes(tree) + name.encode())
            assert found.result.reason is Reason.DENIED
        assert here.find(start=bytes(tree / "directory")).paths == [b"inner"]


def test_where_something_is_asked_of_the_start_not_there_and_refused_are_one_answer(tree: Path) -> None:
    asks = rule("asks", where=owned_by(OTHER_UID))
    with ground(tree, asks) as here:
        results = {here.find(start=bytes(tree) + name).result for name in (b"", b"/missing", b"/file")}
    assert len(results) == 1
    assert results.pop().reason is Reason.DENIED


@pytest.mark.unmeasured
@pytest.mark.parametrize("room", [2, 64])
def test_a_walk_that_is_taken_up_behind_any_path_goes_on_as_the_first_one_did(bush: Path, room: int) -> None:
    everything = list(in_order(bush))
    with ground(bush) as here:
        for at, path in enumerate(everything):
            assert here.find(ALL, room=room, behind=path).paths == everything[at + 1 :]


@pytest.mark.parametrize(
    "behind", [b"missing", b"a1/missing", b"a1/b1/c1/below", b"missing/a", b"a1//b1", b"../bush", b"a1/"]
)
def test_what_is_not_there_can_not_be_gone_on_behind(bush: Path, behind: bytes) -> None:
    with ground(bush) as here:
        found = here.find(behind=behind)
    assert (found.result.status, found.result.reason) == (Status.REFUSED, Reason.NOT_FOUND)
    assert found.end == (0, 0, 0, COMPLETE)


@pytest.mark.parametrize("changes", [{"paths": ["a1/**"]}, {"where": owned_by(OTHER_UID)}])
def test_what_is_refused_and_what_is_not_there_are_one_answer_to_who_would_go_on_behind_it(
    bush: Path, changes: dict[str, Any]
) -> None:
    os.chown(bush, OTHER_UID, -1)
    (bush / "a2").rename(bush / "hidden")
    with ground(
        bush, rule("start", paths=["**"], **{"except": ["*", "*/**"]}), rule("some", **changes)
    ) as here:
        results = {here.find(behind=path).result for path in (b"hidden", b"hidden/b1", b"missing")}
    assert len(results) == 1
    assert results.pop().reason is Reason.NOT_FOUND


# what the policy says


def test_what_is_refused_by_name_or_object_is_neither_named_nor_entered_and_the_end_says_so(
    tmp_path: Path,
) -> None:
    for name in ("open", "secret", "owned"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
        os.chown(tmp_path / name, UID, UID)
    (tmp_path / "big").write_bytes(bytes(100))
    (tmp_path / "small").write_bytes(bytes(10))
    os.chown(tmp_path / "owned", OTHER_UID, OTHER_UID)
    rules = [
        rule("no-secrets", effect="deny", paths=["secret"]),
        rule("not-theirs", effect="deny", where=owned_by(OTHER_UID)),
        rule("small", where={"size": {"max": 10}}),
    ]
    with ground(tmp_path, *rules) as here:
        walk = here.walk(ALL)
        found = finish(walk)
    assert sorted(found.paths) == [b"open", b"open/file", b"small"]
    assert found.end.incomplete == Incomplete.REFUSED
    assert walk.left_out == {Incomplete.REFUSED: 3}


def test_a_file_that_may_be_named_but_not_opened_is_left_out_of_a_walk_that_opens(tmp_path: Path) -> None:
    for name in ("both", "named", "linked"):
        (tmp_path / name).touch()
    os.link(tmp_path / "linked", tmp_path.parent / "other-name")
    rules = [
        rule("named", actions=["walk"]),
        rule("opened", actions=["open"], paths=["both", "linked"], where={"links": {"max": 1}}),
    ]
    with ground(tmp_path, *rules) as here:
        assert sorted(here.find().paths) == [b"both", b"linked", b"named"]
        assert here.find().end.incomplete == COMPLETE
        found = here.find(descriptors=True)
    assert found.paths == [b"both"]
    assert found.end.incomplete == Incomplete.REFUSED


@pytest.mark.parametrize("action", ["walk", "open"])
def test_a_file_that_a_rule_denies_by_name_is_left_out_of_those_that_are_opened_in_a_row(
    tmp_path: Path, action: str
) -> None:
    for name in "abcdef":
        (tmp_path / name).write_text(name)
    denied = rule("denied", effect="deny", actions=[action], paths=["c"])
    with ground(tmp_path, rule("all"), denied) as here:
        found = here.find(descriptors=True)
    assert found.contents == {name.encode(): name.encode() for name in "abdef"}
    assert found.end.incomplete == Incomplete.REFUSED


def test_the_audit_is_told_of_the_start_first_and_then_of_each_entry_and_its_rule(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with ground(tmp_path, rule("walkers", actions=["walk"]), rule("openers", actions=["open"])) as here:
        found = here.find(descriptors=True)
    assert found.records == [
        (bytes(tmp_path), '"decision":"allow","reason":"ok","rule":"walkers"'),
        (bytes(tmp_path / "file"), '"decision":"allow","reason":"ok","rule":"openers"'),
    ]


def test_conditions_on_size_and_links_do_not_keep_a_walk_out_of_directories(bush: Path) -> None:
    with ground(bush, rule("small", where={"size": {"max": 5}, "links": {"max": 1}})) as here:
        found = here.find(descriptors=True)
    assert found.end == (120, 120, 29, COMPLETE)


def test_a_newer_policy_holds_from_the_next_step_on(bush: Path) -> None:
    with ground(bush) as here, ground(bush, rule("not-b", paths=["**"], **{"except": ["*/b*/**"]})) as newer:
        walk = here.walk(ALL)
        met = 0
        while met < 3:  # a step that has taken its time names fewer
            met += len(take(walk.step(3 - met)).entries)
        walk.decide_by(Asker(newer.view, UID, None, ""), here.roots)
        rest = finish(walk)
    assert not any(b"/b" in path for path in rest.paths)
    assert rest.end.incomplete == Incomplete.REFUSED


def test_a_root_within_a_root_is_walked_by_its_own_rules(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "file").write_bytes(b"inner")
    (tmp_path / "file").write_bytes(b"outer")
    roots = [
        {"name": "tree", "path": str(tmp_path), "cross_mounts": False, "opens": "loop"},
        {"name": "inner", "path": str(tmp_path / "inner"), "cross_mounts": False, "opens": "loop"},
    ]
    with ground(tmp_path, rule("outer"), roots=roots) as here:
        found = here.find(ALL)
        assert (found.paths, found.end.incomplete) == ([b"file"], Incomplete.REFUSED)
    with ground(tmp_path, rule("outer"), rule("inner", root="inner"), roots=roots) as here:
        found = here.find(ALL, descriptors=True)
        assert found.contents == {b"file": b"outer", b"inner/file": b"inner"}


@pytest.mark.root
def test_a_root_within_a_root_is_entered_as_it_was_opened_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    roots = [
        {"name": "tree", "path": str(tmp_path), "cross_mounts": False, "opens": "loop"},
        {"name": "inner", "path": str(tmp_path / "inner"), "cross_mounts": False, "opens": "loop"},
    ]
    with mounted("tmpfs", tmp_path / "inner") as held:
        (held / "file").write_bytes(b"held")
        with ground(tmp_path, rule("outer"), rule("inner", root="inner"), roots=roots) as here:
            assert here.find(descriptors=True).contents == {b"inner/file": b"held"}
            with mounted("tmpfs", tmp_path / "inner") as later:
                (later / "file").write_bytes(b"later")
                found = here.find(descriptors=True)
            assert found.contents == {b"inner/file": b"held"}
            assert found.end.incomplete == COMPLETE


# other mounts


@pytest.mark.root
def test_another_mount_is_not_entered_and_the_end_says_so(tree: Path) -> None:
    with mounted("tmpfs", tree / "directory") as other:
        (other / "hidden").touch()
        with ground(tree) as here:
            found = here.find(ALL)
        assert sorted(found.paths) == [b"empty", b"fifo", b"file", b"link"]
        assert found.end.incomplete == Incomplete.CROSSES_MOUNT


def crossing(tree: Path) -> dict[str, Any]:
    return {"roots": [{"name": "tree", "path": str(tree), "cross_mounts": True, "opens": "loop"}]}


@pytest.mark.root
def test_mounts_are_crossed_where_the_root_says_so_but_not_to_what_is_never_served(tree: Path) -> None:
    (tree / "kernel").mkdir()
    with mounted("tmpfs", tree / "directory") as other, mounted("proc", tree / "kernel"):
        (other / "there").write_bytes(b"there")
        with ground(tree, **crossing(tree)) as here:
            found = here.find(descriptors=True)
        assert found.contents == {b"directory/there": b"there", b"file": b"content", b"empty": b""}
        assert found.end.incomplete == Incomplete.CROSSES_MOUNT


@pytest.mark.root
def test_files_of_a_writable_mount_are_named_and_not_opened_where_the_view_is_to_be_read_only(
    tmp_path: Path,
) -> None:
    tree = tmp_path / "tree"
    (tree / "writable").mkdir(parents=True)
    with bound(tree, tree, read_only=True), mounted("tmpfs", tree / "writable") as other:
        (other / "file").touch()
        with ground(tree, read_only_view="required", **crossing(tree)) as here:
            named, opened = here.find(), here.find(descriptors=True)
    assert (named.paths, named.end.incomplete) == ([b"writable/file"], COMPLETE)
    assert (opened.paths, opened.end.incomplete) == ([], Incomplete.CROSSES_MOUNT)


@pytest.mark.root
def test_a_mount_of_what_is_above_it_is_no_way_to_walk_for_ever(tree: Path) -> None:
    with bound(tree, tree / "directory"), ground(tree, **crossing(tree)) as here:
        found = here.find(ALL)
    assert b"directory" not in found.paths
    assert found.end.incomplete == Incomplete.CROSSES_MOUNT
    assert found.end.entries == 4


# what is large


@pytest.fixture
def large(tmp_path: Path) -> Iterator[Path]:
    """Return an empty directory whose contents are gone at once."""
    with mounted("tmpfs", tmp_path, data="size=1g,nr_inodes=0") as path:
        yield path


@pytest.mark.unmeasured
@pytest.mark.root
@pytest.mark.parametrize(("make", "count"), [(os.mknod, 100_000), (os.mkdir, 9_000)])
def test_a_large_directory_is_walked_in_bounded_steps_and_memory(
    large: Path, make: Callable[[bytes], None], count: int
) -> None:
    for number in range(count):
        make(bytes(large) + b"/%06d" % number)
    with ground(large) as here:
        walk = here.walk(ALL, most=253)
        tracemalloc.start()
        for _ in range(30):
            assert walk.step(253).end is None
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        while (end := walk.step(253).end) is None:
            pass
        assert end == (count, 0, walk.directories, COMPLETE)
        assert peak < 400_000  # of some 7,500 entries
        last = b"%06d" % (count // 2)
        walk = here.walk(ALL, behind=last)
        while not (reply := take(walk.step(64))).entries:
            pass
        assert last not in [entry.path for entry in reply.entries]


@pytest.mark.unmeasured
@pytest.mark.root
def test_a_step_looks_at_so_many_entries_and_no_more(large: Path) -> None:
    for number in range(10 * MOST_ENTRIES):
        os.mknod(bytes(large) + b"/%06d" % number)
    with ground(large) as here:
        walk = here.walk(WalkFilter(least_size=1))
        steps = 1
        while walk.step(64).end is None:
            steps += 1
        assert 10 <= steps <= 12
        walk = here.walk(ALL, behind=b"none")
        steps = 1
        while walk.step(64).end is None:
            steps += 1
        assert 10 <= steps <= 12


def test_globs_are_compiled_in_as_many_steps_as_they_take_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    now = 0.0

    def compile_slowly(pattern: bytes) -> Glob:
        nonlocal now
        now += 0.006
        return compile_glob(pattern)

    monkeypatch.setattr(walking, "compile_glob", compile_slowly)
    with ground(tmp_path) as made, monkeypatch.context() as patched:
        patched.setattr(time, "monotonic", lambda: now)
        walk = made.walk(WalkFilter(globs=(b"1", b"2", b"3", b"4", b"file")))
        for compiled in (2, 4):
            batch = walk.step(64)
            assert not batch.paths
            assert batch.end is None
            assert now == pytest.approx(0.006 * compiled)
        assert finish(walk).paths == [b"file"]


@pytest.mark.parametrize("descriptors", [True, False])
def test_a_step_takes_no_longer_where_the_clients_globs_are_slow(
    tmp_path: Path, *, descriptors: bool
) -> None:
    for number in range(100):
        (tmp_path / f"{'a' * 250}{number:05}").touch()
    # Some 0.2 ms each for one name: at each of its bytes some hundred others are looked at.
    slow = tuple(b"*" + b"[!-~]" * 120 + b"%d" % number + b"x" for number in range(16))
    with ground(tmp_path) as made:
        walk = made.walk(WalkFilter(globs=slow), descriptors=descriptors)
        longest, steps = 0.0, 0
        while True:
            began = time.thread_time()
            batch = walk.step(64)
            longest = max(longest, time.thread_time() - began)
            steps += 1
            if take(batch).end is not None:
                break
    assert steps > 8
    assert longest < 0.1


def test_40_levels_of_200_byte_names_are_walked_as_far_as_paths_reach(tmp_path: Path) -> None:
    name, long_name = b"n" * 200, b"l" * 200
    here_fd = os.open(tmp_path, os.O_RDONLY)
    for _ in range(40):
        for file in (b"file", long_name):
            os.close(os.open(file, os.O_CREAT | os.O_WRONLY, dir_fd=here_fd))
        os.mkdir(name, dir_fd=here_fd)
        below = os.open(name, os.O_RDONLY, dir_fd=here_fd)
        os.close(here_fd)
        here_fd = below
    os.close(here_fd)
    levels = (4095 - len(bytes(tmp_path))) // 201
    with ground(tmp_path) as here:
        walk = here.walk(ALL, descriptors=True)
        found = finish(walk)
    assert sorted(found.paths) == sorted(
        b"/".join([name] * deep + [last]) for deep in range(levels) for last in (b"file", name, long_name)
    ) + ([b"/".join([name] * levels + [b"file"])] if (4095 - len(bytes(tmp_path))) % 201 >= 5 else [])
    assert found.end.incomplete == Incomplete.TOO_LONG


@contextlib.contextmanager
def calling_less_deep(calls: int) -> Iterator[None]:
    """Let Python call only so many functions within each other from here."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(0)) + calls)
    try:
        yield
    finally:
        sys.setrecursionlimit(before)


@pytest.mark.unmeasured
@pytest.mark.root
def test_depth_costs_little_memory_and_no_recursion(large: Path) -> None:
    deep = 400  # more than Python may call deep below
    here_fd = os.open(large, os.O_RDONLY)
    for _ in range(deep):
        for name in "abcefghi":
            os.close(os.open(name, os.O_CREAT | os.O_WRONLY, dir_fd=here_fd))
        os.mkdir("d", dir_fd=here_fd)
        below = os.open("d", os.O_RDONLY, dir_fd=here_fd)
        os.close(here_fd)
        here_fd = below
    os.close(here_fd)
    asked = WalkFilter(globs=(b"**/[a-c]", b"d/d/d/[e-f]"))
    with ground(large) as here, calling_less_deep(200):
        walk = here.walk(asked)
        tracemalloc.start()
        while len(walk._levels) < deep - 100:
            assert walk.step(64).end is None
        # What the policy remembers of directories is not the walk's.
        held = tracemalloc.take_snapshot().filter_traces(
            [
                tracemalloc.Filter(inclusive=True, filename_pattern=f"*/{name}.py")
                for name in ("walking", "files")
            ]
        )
        tracemalloc.stop()
        assert sum(statistic.size for statistic in held.statistics("filename")) < 250_000
        assert finish(walk).end.entries == 3 * deep + 2
        last = b"/".join([b"d"] * (deep - 1) + [b"i"])
        assert here.find(asked, behind=last).result.status is Status.GIVEN


# what changes between two steps


def until_in(walk: Walk, directory: bytes) -> list[bytes]:
    """Go on until the first file of a directory was named; return all that was."""
    paths: list[bytes] = []
    while not any(path.startswith(directory + b"/") for path in paths):
        paths += [entry.path for entry in take(walk.step(1)).entries]
    return paths


def test_a_directory_that_was_moved_away_is_left_and_the_end_says_so(bush: Path, tmp_path: Path) -> None:
    with ground(bush) as here:
        walk = here.walk()
        paths = until_in(walk, b"a2/b3")
        (bush / "a2" / "b3").rename(tmp_path / "elsewhere")
        rest = finish(walk)
    assert not any(path.startswith(b"a2/b3/") for path in rest.paths)
    assert len(paths + rest.paths) == 120 - 5
    assert rest.end.incomplete == Incomplete.CHANGED


def test_a_directory_that_was_replaced_is_gone_on_in_by_what_is_there_now(bush: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for name in ("c0", "c1", "c2", "c3", "c4", "c5"):
        (other / name).write_bytes(b"other")
    with ground(bush) as here:
        walk = here.walk(descriptors=True)
        until_in(walk, b"a2/b3")
        exchange(bytes(bush / "a2" / "b3"), bytes(other))
        rest = finish(walk)
    there = {path: content for path, content in rest.contents.items() if path.startswith(b"a2/b3/")}
    assert set(there.values()) <= {b"other"}
    assert rest.end.incomplete == Incomplete.CHANGED
    assert not any(content == b"other" for path, content in rest.contents.items() if path not in there)


def test_a_directory_above_that_was_moved_away_takes_what_is_in_it_along(bush: Path, tmp_path: Path) -> None:
    with ground(bush) as here:
        walk = here.walk()
        until_in(walk, b"a2/b3")
        (bush / "a2").rename(tmp_path / "elsewhere")
        rest = finish(walk)
    assert not any(path.startswith(b"a2/") for path in rest.paths)
    assert rest.end.incomplete == Incomplete.CHANGED


def test_a_directory_that_became_a_link_or_a_file_is_left(bush: Path, tmp_path: Path) -> None:
    for make in (lambda path: path.symlink_to(tmp_path), Path.touch):
        with ground(bush) as here:
            walk = here.walk()
            until_in(walk, b"a2")
            (bush / "a2").rename(tmp_path / "elsewhere")
            make(bush / "a2")
            rest = finish(walk)
        assert not any(path.startswith(b"a2/") for path in rest.paths)
        assert rest.end.incomplete == Incomplete.CHANGED
        (bush / "a2").unlink()
        (tmp_path / "elsewhere").rename(bush / "a2")


def test_directories_that_are_exchanged_before_each_step_do_not_keep_a_walk_for_ever(
    tmp_path: Path,
) -> None:
    tree, other = tmp_path / "tree", tmp_path / "other"
    for directory in (tree / "d", other):
        directory.mkdir(parents=True)
        for number in range(300):
            (directory / f"{number:03}").touch()
    with ground(tree) as here:
        walk = here.walk()
        for _ in range(1000):
            exchange(bytes(tree / "d"), bytes(other))
            if take(walk.step(1)).end is not None:
                break
        else:
            pytest.fail("it goes on and on")
    assert walk.entries <= 600


def test_files_that_come_and_go_between_steps_are_no_failure(bush: Path) -> None:
    with ground(bush) as here:
        walk = here.walk(ALL, descriptors=True)
        until_in(walk, b"a2/b3")
        for path in list(bush.rglob("c[1-4]")):
            path.unlink()
        rest = finish(walk)
    assert not rest.end.incomplete & ~Incomplete.CHANGED


# what changes within a step


def at_the(call: int, function: Callable[..., Any], then: Callable[[], object]) -> Callable[..., Any]:
    """Return a stand-in that does something after so many calls."""
    calls = 0

    def stand_in(*arguments: object) -> object:
        nonlocal calls
        result = function(*arguments)
        calls += 1
        if calls == call:
            then()
        return result

    return stand_in


@pytest.mark.parametrize("call", [1, 2, 3, 5])
def test_a_directory_that_is_away_and_holds_secrets_for_a_moment_gives_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    tree, away = tmp_path / "tree", tmp_path / "away"
    (tree / "d").mkdir(parents=True)
    for name in "abcdef":
        (tree / "d" / name).write_bytes(b"good")
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")

    def go_away_with_a_secret() -> None:
        (tree / "d").rename(away)
        for name in "abcdef":
            (away / name).rename(tmp_path / f"kept-{name}")
            os.link(secret, away / name)

    def come_back() -> None:
        for name in "abcdef":
            (away / name).unlink()
            (tmp_path / f"kept-{name}").rename(away / name)
        away.rename(tree / "d")

    # Between two names of one directory.
    monkeypatch.setattr(
        files, "_openat2_at_once", at_the(call, files._openat2_at_once, go_away_with_a_secret)
    )
    checked = walking.Walk._is_as_it_was

    def check(walk: Walk, step: walking._Step) -> bool:
        come_back()
        return checked(walk, step)

    monkeypatch.setattr(walking.Walk, "_is_as_it_was", check)
    with ground(tree) as here:
        walk = here.walk(descriptors=True)
        contents: dict[bytes, bytes] = {}
        take(walk.step(64), contents)
    assert contents == {b"d/" + name.encode(): b"good" for name in "abcdef"}


def test_a_step_that_is_made_again_resolves_each_entry_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree, away = tmp_path / "tree", tmp_path / "away"
    (tree / "d").mkdir(parents=True)
    (tree / "d" / "name").write_bytes(b"good")
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    made_again = False

    def look_again(_walk: Walk, _step: walking._Step) -> bool:
        nonlocal made_again
        made_again = True
        return False

    def read(directory: int) -> bytes:
        # What is read then holds elsewhere: nothing looks at the directory once more behind this step.
        chunk = files.read_directory_chunk(directory)
        if made_again and b"name" in chunk:
            (tree / "d").rename(away)
            (away / "name").unlink()
            os.link(secret, away / "name")
        return chunk

    monkeypatch.setattr(walking.Walk, "_is_as_it_was", look_again)
    monkeypatch.setattr(walking, "read_directory_chunk", read)
    with ground(tree) as here:
        found = here.find(descriptors=True)
    assert away.is_dir()
    assert (found.contents, found.end.incomplete) == ({}, Incomplete.CHANGED)


@pytest.mark.parametrize("with_conditions", [False, True])
def test_a_directory_that_is_exchanged_within_a_step_is_walked_as_what_is_there_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, with_conditions: bool
) -> None:
    tree, secrets = tmp_path / "tree", tmp_path / "secrets"
    for directory, owner in ((tree / "d", OWNER_UID), (secrets, 0)):
        directory.mkdir(parents=True)
        for name in "abcdef":
            (directory / name).write_bytes(str(owner).encode())
            os.chown(directory / name, owner, owner)
    of, name = (walking, "file_stat") if with_conditions else (files, "_openat2_at_once")
    swap = at_the(4, getattr(of, name), lambda: exchange(bytes(tree / "d"), bytes(secrets)))
    monkeypatch.setattr(of, name, swap)
    monkeypatch.setattr(walking, "_SECONDS", 60.0)  # one step, however busy the machine is
    start, owned = rule("start", **{"except": ["d/*"]}), rule("owned", where=owned_by(OWNER_UID))
    with ground(tree, *([start, owned] if with_conditions else [])) as here:
        found = here.find(descriptors=True)
    if with_conditions:
        assert found.contents == {}
        assert found.end.incomplete == Incomplete.REFUSED
    else:
        assert set(found.contents.values()) == {b"0"}


def test_files_that_are_made_and_removed_within_each_step_keep_nothing_from_getting_on(
    bush: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disturb(*arguments: int) -> int:
        for directory in (bush, bush / "a1", bush / "a1" / "b1"):
            (directory / "new").touch()
            (directory / "new").unlink()
        return files.reopen_for_reading(*arguments)

    monkeypatch.setattr(walking, "reopen_for_reading", disturb)
    with ground(bush) as here:
        found = here.find(descriptors=True)
    assert len(found.contents) == 120
    assert not found.end.incomplete & ~Incomplete.CHANGED


def test_a_file_whose_name_is_taken_away_after_its_links_were_counted_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tmp_path / "secret").write_bytes(b"secret")
    os.link(tmp_path / "secret", tree / "file")

    def count_one_and_remove(decision: NameDecision, facts: os.stat_result, *others: int) -> ObjectDecision:
        if stat.S_ISREG(facts.st_mode):
            (tree / "file").unlink(missing_ok=True)
            facts = os.stat_result((*facts[:3], 1, *facts[4:]))
        return decide_object(decision, facts, others[0])

    monkeypatch.setattr(walking, "decide_object", count_one_and_remove)
    # Of the two guards the one that is looked at here.
    monkeypatch.setattr(walking.Walk, "_is_as_it_was", lambda walk, step: True)
    with ground(tree, rule("one", where={"links": {"max": 1}})) as here:
        found = here.find(descriptors=True)
    assert (found.paths, found.end.incomplete) == ([], Incomplete.CHANGED)


# what fails


def test_a_lease_on_a_file_leaves_it_out(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with open(tmp_path / "file", "wb") as held, ground(tmp_path) as here:
        fcntl.fcntl(held, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        # The holder is asked to let go by this signal, whose default is the end of the process.
        fcntl.fcntl(held, fcntl.F_SETSIG, signal.SIGCHLD)
        found = here.find(descriptors=True)
        fcntl.fcntl(held, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    assert (found.paths, found.end.incomplete) == ([], Incomplete.FAILED)


def test_a_walk_without_descriptors_left_ends_by_the_limit(bush: Path) -> None:
    with ground(bush) as here:
        walk = here.walk(descriptors=True)
        first = take(walk.step(3))
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        lowest = os.dup(0)
        os.close(lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 10, hard))
        try:
            batch = walk.step(64)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert (batch.entries, batch.descriptors) == ([], [])
        assert batch.end == (len(first.entries), len(first.entries), walk.directories, Incomplete.LIMIT)


@pytest.mark.unmeasured
@pytest.mark.parametrize(
    ("number", "allowed"),
    [
        (errno.EIO, Incomplete.FAILED),
        (errno.EACCES, Incomplete.FAILED),
        (errno.ENOENT, Incomplete.CHANGED),
        (errno.EXDEV, Incomplete.CROSSES_MOUNT),
        (errno.ENAMETOOLONG, Incomplete.TOO_LONG),
        (errno.EMFILE, Incomplete.LIMIT),
        (errno.ENOMEM, Incomplete.FAILED),
    ],
)
@pytest.mark.parametrize("where", [{}, {"size": {"max": 100}, "links": {"max": 1}}])
def test_whichever_system_call_fails_the_walk_ends_and_tells(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    allowed: Incomplete,
    where: dict[str, Any],
) -> None:
    left = 0

    def failing(function: Callable[..., Any]) -> Callable[..., Any]:
        def stand_in(*arguments: object) -> object:
            nonlocal left
            left -= 1
            if left == 0:
                raise SyscallError(number, "stand-in")
            return function(*arguments)

        return stand_in

    for name in ("open_path_beneath", "reopen_for_reading", "read_directory_chunk"):
        monkeypatch.setattr(walking, name, failing(getattr(walking, name)))
    # Files that nothing is asked of: whichever of the calls fails, by its own error or by the next attempt's.
    monkeypatch.setattr(files, "_openat2_at_once", lambda *arguments: -1)
    monkeypatch.setattr(files, "_openat_at_once", lambda *arguments: -1)
    for name in ("open_path_beneath", "reopen_for_reading"):
        monkeypatch.setattr(files, name, failing(getattr(files, name)))
    call = 1
    told = COMPLETE
    (tmp_path / "bush").mkdir()
    with ground(bushy(tmp_path / "bush", (2, 2, 3)), rule("asks", where=where)) as here:
        while True:
            left = call
            found = here.find(ALL, descriptors=True)
            if left > 0:
                break
            if found.result.status is Status.GIVEN:
                assert not found.end.incomplete & ~allowed
                told |= found.end.incomplete
                assert found.end.entries == len(found.paths)
            else:
                assert found.end.entries == 0
            call += 1
    assert told == allowed


# its end


def test_a_walk_that_is_cancelled_ends_at_once_and_stays_so(bush: Path) -> None:
    with ground(bush) as here:
        walk = here.walk(descriptors=True)
        first = take(walk.step(5))
        end = walk.cancel()
        assert end == (len(first.entries), len(first.entries), walk.directories, Incomplete.CANCELLED)
        assert take(walk.step(5)).end == end
        assert walk.cancel() == end


def test_the_end_of_a_walk_can_not_be_changed_by_cancelling_it(bush: Path) -> None:
    with ground(bush) as here:
        walk = here.walk()
        end = finish(walk).end
        assert walk.cancel() == end
        assert walk.step(5).end == end


def test_without_room_nothing_is_done(bush: Path) -> None:
    with ground(bush) as here:
        walk = here.walk()
        assert walk.step(0) == walk.step(-1)
        assert not walk.step(0).paths


def test_no_descriptor_is_held_between_two_steps(bush: Path) -> None:
    with ground(bush) as here, no_descriptor_left():
        walk = here.walk(descriptors=True)
        while True:
            with no_descriptor_left():
                if take(walk.step(3)).end is not None:
                    break


@pytest.mark.root
def test_a_step_holds_so_many_directories_and_no_more(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(1000):
        os.mkdir(large / f"{number}")
    most = 0

    def count(*arguments: int) -> int:
        nonlocal most
        most = max(most, len(os.listdir("/proc/self/fd")))
        return files.reopen_for_reading(*arguments)

    monkeypatch.setattr(walking, "reopen_for_reading", count)
    with ground(large) as here:
        before = len(os.listdir("/proc/self/fd"))
        assert here.find(ALL).end.directories == 1001
    assert most - before <= walking.MOST_DIRECTORIES + 1
