"""A symbolic link is another name that is asked for, where a rule says so, and nothing else."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any

import pytest

from fdbroker.broker import opening
from fdbroker.broker.links import MOST_BEHIND_LINKS, MOST_LINKS
from fdbroker.kernel.errors import SyscallError
from fdbroker.policy.rules import PolicyError, read_policy
from fdbroker.wire.client import OpenReply, encode_open
from fdbroker.wire.format import MAX_FRAME, MAX_PATHS, Reason, Status
from tests.broker.conftest import no_descriptor_left
from tests.broker.stepping import SteppedBroker
from tests.running_broker import policy, rule

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FOLLOWS = rule("follows", symlinks="within-root")


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """Return a tree with links of every kind."""
    tree = tmp_path / "tree"
    for name in ("data/deep", "private", "links/deep"):
        (tree / name).mkdir(parents=True)
    (tree / "data/file").write_bytes(b"content")
    (tree / "data/deep/inner").write_bytes(b"inner")
    (tree / "private/secret").write_bytes(b"secret")
    (tmp_path / "outside").write_bytes(b"outside")
    for name, target in {
        "file": "../data/file",
        "directory": "../data",
        "with-slash": "../data/",
        "with-dots": ".././data/file",
        "here": ".",
        "deep/up": "../../data/deep",
        "to-root": "..",
        "chain": "file",
        "broken": "../data/missing",
        "secret": "../private/secret",
        "private": "../private",
        "missing-secret": "../private/missing",
        "absolute": str(tree / "data/file"),
        "outside": "../../outside",
        "roundabout": "../private/../data/file",
        "roundabout-missing": "../private/missing/../../data/file",
        "doubled": "../data//file",
        "loop": "loop",
        "long": "a" * 255 + "/" + "b" * 256,
    }.items():
        (tree / "links" / name).symlink_to(target)
    return tree


def serving(tree: Path, *rules: dict[str, Any], **changes: object) -> SteppedBroker:
    return SteppedBroker(tree, policy(tree, *rules) | changes, audit=tree.parent / "audit")


@pytest.fixture
def following(linked: Path) -> Iterator[SteppedBroker]:
    """Return a broker that follows links everywhere, but gives nothing that is private."""
    private = rule("private", effect="deny", paths=["private/**"])
    with no_descriptor_left(), serving(linked, FOLLOWS, private) as broker:
        yield broker


def path_of(broker: SteppedBroker, name: str) -> bytes:
    return bytes(broker.tree / "links" / name)


def last_record(broker: SteppedBroker) -> dict[str, Any]:
    return [record for record in broker.records() if "decision" in record][-1]


@pytest.mark.parametrize(
    ("name", "content", "resolved"),
    [
        ("file", b"content", "data/file"),
        ("directory/file", b"content", "data/file"),
        ("with-slash/deep/inner", b"inner", "data/deep/inner"),
        ("with-dots", b"content", "data/file"),
        ("here/here/file", b"content", "data/file"),
        ("deep/up/inner", b"inner", "data/deep/inner"),
        ("to-root/data/file", b"content", "data/file"),
        ("chain", b"content", "data/file"),
    ],
)
def test_link_that_stays_below_the_root_is_followed_and_the_audit_says_where_to(
    following: SteppedBroker, name: str, content: bytes, resolved: str
) -> None:
    opened = following.join().open_one(path_of(following, name))
    assert (opened.reason, opened.content) == ("ok", content)
    record = last_record(following)
    assert record["path"] == os.fsdecode(path_of(following, name))
    assert record["resolved"] == str(following.tree / resolved)
    assert (record["decision"], record["rule"]) == ("allow", "follows")


@pytest.mark.parametrize(
    ("name", "reason", "told"),
    [
        ("broken", "not_found", ("not_found", errno.ENOENT)),
        ("secret", "deny_rule", ("denied", errno.EACCES)),
        ("missing-secret", "deny_rule", ("denied", errno.EACCES)),
        ("private/secret", "deny_rule", ("denied", errno.EACCES)),
        ("absolute", "link_leaves_root", ("symlink", errno.ELOOP)),
        ("outside", "link_leaves_root", ("symlink", errno.ELOOP)),
        ("roundabout", "link_not_normal", ("symlink", errno.ELOOP)),
        ("roundabout-missing", "link_not_normal", ("symlink", errno.ELOOP)),
        ("doubled", "link_not_normal", ("symlink", errno.ELOOP)),
        ("long", "link_not_normal", ("symlink", errno.ELOOP)),
        ("loop", "too_many_links", ("symlink", errno.ELOOP)),
        ("file/below", "not_directory", ("not_directory", errno.ENOTDIR)),
        ("directory", "is_directory", ("not_regular", errno.EISDIR)),
    ],
)
def test_link_that_leads_elsewhere_is_refused_with_the_reason(
    following: SteppedBroker, name: str, reason: str, told: tuple[str, int]
) -> None:
    opened = following.join().open_one(path_of(following, name))
    assert (opened.reason, opened.errno) == told
    assert last_record(following)["reason"] == reason


def test_names_without_links_are_recorded_as_they_are(following: SteppedBroker) -> None:
    assert following.join().open_one(bytes(following.tree / "data/file")).content == b"content"
    assert "resolved" not in last_record(following)


@pytest.mark.parametrize("before", range(4))
@pytest.mark.parametrize("behind", range(5))
def test_link_is_found_whatever_number_of_names_is_before_and_behind_it(
    following: SteppedBroker, before: int, behind: int
) -> None:
    rest = "wxyz"[:behind]
    target = following.tree.joinpath("there", *rest)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(b"content")
    link = following.tree.joinpath(*"abc"[:before], "link")
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to("../" * before + "there")
    assert following.join().open_one(bytes(link.joinpath(*rest))).content == b"content"
    assert last_record(following)["resolved"] == str(target)


def test_links_in_a_row_are_followed_up_to_a_number(following: SteppedBroker) -> None:
    last = "file"
    assert MOST_LINKS == 8  # as docs/policy.md says
    for number in range(MOST_LINKS):
        (following.tree / "links" / f"step{number}").symlink_to(last)
        last = f"step{number}"
    speaker = following.join()
    assert speaker.open_one(path_of(following, f"step{MOST_LINKS - 2}")).content == b"content"
    assert speaker.open_one(path_of(following, f"step{MOST_LINKS - 1}")).reason == "symlink"


def test_links_of_one_request_lead_to_no_more_names_than_it_has_room_for(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    long = "/".join(["d" * 250] * 3)
    (tree / long).mkdir(parents=True)
    (tree / long / "file").write_bytes(b"content")
    (tree / "link").symlink_to(f"{long}/again")
    (tree / long / "again").symlink_to("file")
    link, behind = bytes(tree / "link"), len(bytes(tree / long / "again")) + len(bytes(tree / long / "file"))
    given = MOST_BEHIND_LINKS // behind
    assert given < 64
    with no_descriptor_left(), serving(tree, FOLLOWS | {"deliver": ["descriptor", "copy"]}) as broker:
        speaker = broker.join()
        for _ in range(2):  # another request has room of its own
            contents = [opened.content for opened in speaker.open(*[link] * MAX_PATHS)]
            assert contents == [b"content"] * given + [None] * (MAX_PATHS - given)
            assert last_record(broker)["reason"] == "links_too_long"
            described = speaker.stat(*[link + b"/x"] * MAX_PATHS).results
            reasons = {result.reason for result, _ in described}
            assert reasons == {Reason.NOT_DIRECTORY, Reason.LIMIT}
            answer = speaker.ask(encode_open(9, [link] * MAX_PATHS, copy=True))
            assert isinstance(answer.reply, OpenReply)
            with answer.descriptors:
                statuses = [result.status for result in answer.reply.results]
            assert statuses.count(Status.REFUSED) == MAX_PATHS - given


def test_record_of_the_largest_request_has_room_in_a_pipe_also_where_links_lead_far(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    deep = b"/".join([b"\xff" * 250] * 3)
    os.makedirs(bytes(tree) + b"/" + deep)
    os.symlink(deep, bytes(tree) + b"/l")
    link = bytes(tree) + b"/l/"
    link += b"\xff" * ((MAX_FRAME - 64) // MAX_PATHS - len(link) - 1)
    with no_descriptor_left(), serving(tree, FOLLOWS) as broker:
        reasons = {opened.reason for opened in broker.join().open(*[link] * MAX_PATHS)}
        assert reasons == {"not_found", "limit"}
        assert (tmp_path / "audit").stat().st_size < 1 << 20


def test_link_is_followed_only_by_a_rule_that_says_so(linked: Path) -> None:
    follows = FOLLOWS | {"paths": ["links/file", "links/directory/**"]}
    with no_descriptor_left(), serving(linked, rule("all"), follows) as broker:
        speaker = broker.join()
        assert speaker.open_one(path_of(broker, "file")).content == b"content"
        assert speaker.open_one(path_of(broker, "directory/deep/inner")).content == b"inner"
        # Of the second link nobody says that it is followed.
        (linked / "links" / "directory-again").symlink_to("file")
        (linked / "data" / "link").symlink_to("file")
        assert speaker.open_one(path_of(broker, "directory-again")).reason == "symlink"
        assert speaker.open_one(path_of(broker, "directory/link")).reason == "symlink"


def test_name_that_a_link_leads_to_needs_a_rule_of_its_own(linked: Path) -> None:
    with no_descriptor_left(), serving(linked, FOLLOWS | {"paths": ["links/**"]}) as broker:
        opened = broker.join().open_one(path_of(broker, "file"))
        assert (opened.reason, last_record(broker)["reason"]) == ("denied", "no_rule")


def test_rules_of_the_deepest_root_decide_where_a_link_leads(linked: Path) -> None:
    roots = [
        {"name": name, "path": str(path), "cross_mounts": False, "opens": "loop"}
        for name, path in (("tree", linked), ("data", linked / "data"))
    ]
    deeper = rule("deeper", root="data", paths=["deep/**"])
    with no_descriptor_left(), serving(linked, FOLLOWS, deeper, roots=roots) as broker:
        speaker = broker.join()
        assert speaker.open_one(path_of(broker, "file")).reason == "denied"
        assert speaker.open_one(path_of(broker, "directory/deep/inner")).content == b"inner"
        # And out of a root nothing leads, though another root is above it.
        (linked / "data" / "deep" / "out").symlink_to("../../links/file")
        assert speaker.open_one(bytes(linked / "data/deep/out")).reason == "symlink"


UNIFORM = ["file", "broken", "directory", "loop", "absolute", "chain"]


def test_conditions_of_every_name_on_the_way_hold_and_none_tells_what_is_there(linked: Path) -> None:
    small = FOLLOWS | {"paths": ["links/**"], "where": {"size": {"max": 3}}}
    with no_descriptor_left(), serving(linked, small, rule("data", paths=["data/**"])) as broker:
        speaker = broker.join()
        (linked / "data" / "little").write_bytes(b"abc")
        (linked / "links" / "little").symlink_to("../data/little")
        assert speaker.open_one(path_of(broker, "little")).content == b"abc"
        opened = speaker.open(*(path_of(broker, name) for name in UNIFORM))
        assert {entry[:2] for entry in opened} == {("denied", errno.EACCES)}
        reasons = broker.reasons()[-len(UNIFORM) :]
        assert reasons[:4] == ["where_size", "not_found", "is_directory", "too_many_links"]
    large = rule("large", effect="deny", paths=["links/**"], where={"size": {"min": 5}})
    with no_descriptor_left(), serving(linked, FOLLOWS, large) as broker:
        speaker = broker.join()
        assert speaker.open_one(path_of(broker, "little")).content == b"abc"
        assert speaker.open_one(path_of(broker, "file")).reason == "denied"
        assert speaker.open_one(bytes(linked / "data/file")).content == b"content"


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (errno.EIO, ("denied", errno.EACCES)),
        (errno.ESTALE, ("denied", errno.EACCES)),
        # Of the broker's own it may be told: it says nothing of what is there.
        (errno.EMFILE, ("broken", errno.EMFILE)),
    ],
)
def test_failing_call_tells_nothing_where_a_name_on_the_way_has_a_condition(
    linked: Path, monkeypatch: pytest.MonkeyPatch, number: int, told: tuple[str, int]
) -> None:
    def fail(*_arguments: object) -> int:
        raise SyscallError(number, "openat")

    small = FOLLOWS | {"paths": ["links/**"], "where": {"size": {"max": 30}}}
    with no_descriptor_left(), serving(linked, small, rule("data", paths=["data/**"])) as broker:
        speaker = broker.join()
        assert speaker.open_one(path_of(broker, "file")).content == b"content"
        monkeypatch.setattr(opening, "reopen_for_reading", fail)
        assert speaker.open_one(path_of(broker, "file"))[:2] == told
        assert last_record(broker)["reason"] == errno.errorcode[number]


def test_what_links_lead_to_is_closed_where_it_can_not_be_looked_at(
    following: SteppedBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    inode, fstat = (following.tree / "data/file").stat().st_ino, os.fstat

    def fail_for_file(descriptor: int) -> os.stat_result:
        facts = fstat(descriptor)
        if facts.st_ino == inode:
            raise OSError(errno.EIO, "it failed")
        return facts

    speaker = following.join()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", fail_for_file)
        assert speaker.open_one(path_of(following, "file"))[:2] == ("broken", errno.EIO)


def test_number_of_links_is_a_condition_on_what_a_link_leads_to(linked: Path) -> None:
    one = FOLLOWS | {"where": {"links": {"max": 1}}}
    with no_descriptor_left(), serving(linked, one) as broker:
        speaker = broker.join()
        assert speaker.open_one(path_of(broker, "file")).content == b"content"
        os.link(linked / "data" / "file", linked / "data" / "other")
        assert speaker.open_one(path_of(broker, "file")).reason == "denied"


def test_description_follows_links_on_the_way_and_describes_the_last_one(
    following: SteppedBroker,
) -> None:
    reply = following.join().stat(
        *(path_of(following, name) for name in ("file", "directory/file", "private/secret", "broken/x"))
    )
    found = [(result.reason, facts and facts.inode) for result, facts in reply.results]
    link, file = (following.tree / "links/file").lstat(), (following.tree / "data/file").stat()
    assert found == [
        (Reason.NONE, link.st_ino),
        (Reason.NONE, file.st_ino),
        (Reason.DENIED, None),
        (Reason.NOT_FOUND, None),
    ]


def test_directory_is_listed_by_a_link_as_by_its_own_name(following: SteppedBroker) -> None:
    speaker = following.join()
    assert sorted(speaker.list_all(path_of(following, "directory"))) == [b"deep", b"file"]
    assert sorted(speaker.list_all(path_of(following, "directory"), most=1)) == [b"deep", b"file"]
    assert last_record(following)["resolved"] == str(following.tree / "data")
    assert speaker.page(path_of(following, "file")).result.reason == Reason.NOT_DIRECTORY
    page = speaker.page(path_of(following, "private"))
    assert (page.result.reason, list(page.entries)) == (Reason.DENIED, [])
    # By `to-root`, the private directory is left out as it is by the root's own name.
    assert sorted(speaker.list_all(path_of(following, "to-root"))) == [b"data", b"links"]


def test_directory_is_listed_by_a_link_that_does_not_itself_meet_the_conditions(linked: Path) -> None:
    strict = FOLLOWS | {"where": {"mode": {"none": 0o022}}}  # which every link has
    with no_descriptor_left(), serving(linked, strict) as broker:
        speaker = broker.join()
        assert sorted(speaker.list_all(path_of(broker, "directory"))) == [b"deep", b"file"]
        (linked / "data").chmod(0o777)
        assert speaker.page(path_of(broker, "directory")).result.reason == Reason.DENIED


def test_copy_comes_by_a_link_as_well(linked: Path) -> None:
    copies = FOLLOWS | {"deliver": ["copy"]}
    with no_descriptor_left(), serving(linked, copies) as broker:
        speaker = broker.join()
        paths = [path_of(broker, name) for name in ("file", "directory/file", "broken", "absolute")]
        reply = speaker.ask(encode_open(7, paths, copy=True)).reply
        assert isinstance(reply, OpenReply)
        assert [result.status for result in reply.results] == [Status.COPIED] * 2 + [Status.REFUSED] * 2
        assert reply.copies == (b"content",) * 2
    conditional = copies | {"where": {"size": {"max": 100}}}
    with no_descriptor_left(), serving(linked, conditional) as broker:
        reply = broker.join().ask(encode_open(7, paths, copy=True)).reply
        assert isinstance(reply, OpenReply)
        assert [result.status for result in reply.results] == [Status.COPIED] * 2 + [Status.REFUSED] * 2


@pytest.mark.parametrize("changes", [{"effect": "deny"}, {"symlinks": "yes"}, {"symlinks": True}], ids=str)
def test_rule_that_can_not_follow_links_is_no_rule(changes: dict[str, Any]) -> None:
    with pytest.raises(PolicyError, match=r"rules\[0\]\.symlinks"):
        read_policy(policy("/tree", FOLLOWS | changes))
    helped = [{"name": "tree", "path": "/tree", "cross_mounts": False, "opens": "helpers"}]
    with pytest.raises(PolicyError, match="helpers open in its root"):
        read_policy(policy("/tree", FOLLOWS, roots=helped))


def test_audit_has_the_bytes_of_a_name_that_is_no_text(following: SteppedBroker) -> None:
    name = bytes(following.tree) + b"/data/\xff"
    with open(name, "wb") as file:
        file.write(b"odd")
    os.symlink(b"../data/\xff", path_of(following, "odd"))
    assert following.join().open_one(path_of(following, "odd")).content == b"odd"
    record = last_record(following)
    assert bytes.fromhex(record["resolved_hex"]) == name
    assert record["path"] == os.fsdecode(path_of(following, "odd"))
