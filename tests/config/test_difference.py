"""What another policy allows more and no more: nothing is missed and nothing made up, over real trees."""

from __future__ import annotations

import itertools
import json
import os
import time
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fdbroker.config import ConfigError, difference
from fdbroker.config.difference import (
    Change,
    ClientKind,
    GroupKey,
    Loaded,
    Walked,
    changes,
    compare,
    grouped,
    kind_of_user,
    kinds_of_clients,
    load,
    trees_of,
)
from fdbroker.config.explain import ALLOW, Asker, explain, judge, look_as_broker
from fdbroker.launcher.mounts import Mount
from fdbroker.policy.decide import Policy
from fdbroker.policy.rules import ACTIONS, ClientFacts, RuleSet, read_policy
from tests.descriptors.mounting import bound, mounted
from tests.policy.decision_cases import GID, OTHER, UID, documents
from tests.processes import in_child
from tests.running_broker import CLIENT_UID, policy, reachable_directory, rule

if TYPE_CHECKING:
    from pathlib import Path


NOBODY = Asker(ClientFacts(UID, frozenset()))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the tree that drawn policies are about, with files of several owners, links and a FIFO."""
    top = tmp_path_factory.mktemp("tree")
    for directory in ("a/b/c", "a/a", "ax", "b"):
        (top / directory).mkdir(parents=True)
    owners = itertools.cycle([(0, 0), (UID, GID), (OTHER, 0)])
    for directory in ("a", "a/b", "a/b/c", "ax"):
        for name in ("f", "c", ".b"):
            path = top / directory / name
            if not path.exists():
                path.write_bytes(b"xyz"[: len(directory) % 4])
                path.chmod(0o640 if name == "f" else 0o604)
                os.chown(path, *next(owners))
    # No age that a rule draws is reached while a test looks twice: an hour, or none for the future.
    for number, path in enumerate(sorted(path for path in top.rglob("*") if path.is_file())):
        moment = time.time() + (86400 if number % 2 else -3600)
        os.utime(path, (moment, moment))
    os.link(top / "a" / "f", top / "a" / "b" / "ax")
    (top / "a" / "link").symlink_to("b")
    os.mkfifo(top / "a" / "b" / "a")
    return top


def below(document: dict[str, Any], top: Path) -> RuleSet:
    """Return a drawn policy with its roots below a directory."""
    moved = [root | {"path": f"{top}{root['path']}".rstrip("/")} for root in document["roots"]]
    return read_policy(document | {"roots": moved})


def paths_in(top: Path) -> list[bytes]:
    found = [bytes(top)]
    for directory, directories, files in os.walk(bytes(top)):
        found += [os.path.join(directory, name) for name in (*directories, *files)]
    return found


@pytest.mark.unmeasured
@pytest.mark.root
def test_differences_are_those_that_explaining_every_path_shows(tree: Path) -> None:
    reached: set[bool] = set()
    every = paths_in(tree)

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    @given(documents, documents, st.sampled_from([None, OTHER]))
    def check(one: dict[str, Any], other: dict[str, Any], acted_for: int | None) -> None:
        old, new = below(one, tree), below(other, tree)
        asker = Asker(
            ClientFacts(UID, frozenset({GID}), frozenset({"/here"})),
            None if acted_for is None else ClientFacts(acted_for, frozenset()),
        )
        found = {
            (each.path, each.action, each.gained)
            for each in compare(old, new, [ClientKind("x", asker)], [bytes(tree)], Walked())
            if each.action != "copy"
        }
        expected = set()
        for path, action in itertools.product(every, ACTIONS):
            before, after = (
                explain(rules, asker, action, path, look_as_broker).verdict.decision == ALLOW
                for rules in (old, new)
            )
            if before is not after:
                expected.add((path, action, after))
        assert found == expected
        reached.update(gained for _, _, gained in found)

    check()
    assert reached == {True, False}


def loaded(document: dict[str, Any]) -> Loaded:
    return Loaded("x", read_policy(document), document)


def differences(old: dict[str, Any], new: dict[str, Any], top: Path) -> dict[tuple[str, str, bool], int]:
    one, other = read_policy(old), read_policy(new)
    found = compare(one, other, kinds_of_clients(one, other), [bytes(top)], Walked())
    return {(key.kind.title, key.action, key.gained): group.count for key, group in grouped(found, 1).items()}


def test_clients_are_those_that_the_rules_tell_apart() -> None:
    old = read_policy(policy("/x", rule("a", clients=[{"uids": [54321, 54322]}, {"gids": [54323]}])))
    new = read_policy(
        policy(
            "/x",
            rule("a", clients=[{"uids": [54321]}, {"cgroups": ["/a/b"]}]),
            rule("b", clients=[{"uids": [54324]}], on_behalf_of=[{"any": True}]),
        )
    )
    assert [kind.title for kind in kinds_of_clients(old, new)] == [
        "everybody else",
        "user 54321",
        "user 54322",
        "control group /a/b",
        "user 54324, for everybody",
    ]


def test_labels_are_clients_of_their_own_and_nobody_else_has_them(tree: Path) -> None:
    old = policy(tree, rule("a", actions=["open"]), rule("d", effect="deny", clients=[{"labels": ["x_t"]}]))
    new = policy(tree, rule("a", actions=["open"]))
    assert set(differences(old, new, tree)) == {("label x_t", "open", True)}
    assert set(differences(new, old, tree)) == {("label x_t", "open", False)}


def test_owner_of_a_file_is_a_client_of_its_own_where_rules_ask_for_him(tree: Path) -> None:
    owned = {"owner": {"uids": [], "client": True, "on_behalf_of": False}}
    old = policy(tree, rule("own", where=owned, actions=["open"]))
    new = policy(tree, rule("own", where=owned, actions=["open"], paths=["a/**"]))
    assert differences(old, new, tree) == {("everybody else, of his own files", "open", False): 3}


def test_policies_that_say_the_same_in_other_words_are_no_different(tree: Path) -> None:
    old = policy(tree, rule("a", paths=["a/**", "b"]), rule("b", effect="deny", paths=["a/b"]))
    new = policy(tree, rule("z", effect="deny", paths=["a/b"]), rule("y", paths=["b", "a/**"]))
    assert differences(old, new, tree) == {}
    assert {change.what for change in changes(loaded(old), loaded(new))} == {
        "rules.a",
        "rules.b",
        "rules.y",
        "rules.z",
    }


def test_copies_are_compared_where_a_policy_delivers_them(tree: Path) -> None:
    new = policy(tree, rule("all", deliver=["descriptor", "copy"]))
    assert {action for _, action, _ in differences(policy(tree), new, tree)} == {"copy"}


def test_root_that_is_given_to_helpers_lists_and_walks_no_more_and_opens_as_before(tree: Path) -> None:
    def opening(opens: str) -> dict[str, Any]:
        return policy(
            tree,
            rule("all", actions=list(ACTIONS)),
            roots=[{"name": "tree", "path": str(tree), "cross_mounts": False, "opens": opens}],
        )

    files = sum(os.path.isfile(path) and not os.path.islink(path) for path in paths_in(tree))
    directories = sum(os.path.isdir(path) and not os.path.islink(path) for path in paths_in(tree))
    lost = differences(opening("loop"), opening("helpers"), tree)
    assert lost == {
        ("everybody else", "list", False): directories,
        ("everybody else", "walk", False): len(paths_in(tree)),
    }
    assert differences(opening("helpers"), opening("loop"), tree) == {
        (who, action, True): count for (who, action, _), count in lost.items()
    }
    gone = differences(opening("helpers"), policy(tree, rule("none", effect="deny")), tree)
    assert gone["everybody else", "open", False] == files


def test_changed_settings_are_named_by_their_keys() -> None:
    old = policy("/x", rule("a", where={"size": {"max": 1}}))
    new = policy("/x", rule("a", where={"size": {"max": 2}}), limits={"connections_per_uid": 3})
    assert changes(loaded(old), loaded(new)) == [
        Change("rules.a.where.size.max", 1, 2),
        Change("limits.connections_per_uid", 64, 3),
    ]
    assert changes(loaded(old), loaded(old)) == []


def test_memory_is_that_of_examples_alone(tree: Path) -> None:
    new = policy(tree, rule("no", effect="deny"))
    one, other = read_policy(policy(tree)), read_policy(new)
    kinds = kinds_of_clients(one, other)
    groups = grouped(compare(one, other, kinds, [bytes(tree)], Walked()), 0)
    for most in (1, 3):
        groups = grouped(compare(one, other, kinds, [bytes(tree)], Walked()), most)
        assert all(len(group.examples) <= most < group.count for group in groups.values())
    key = GroupKey(kinds[0], "stat", gained=False, old="rule all", new="rule no")
    assert groups[key].count == len(paths_in(tree))


def test_roots_within_others_are_walked_once() -> None:
    roots = [
        {"name": name, "path": path, "cross_mounts": False, "opens": "loop"}
        for name, path in (("a", "/srv"), ("b", "/srv/in"), ("c", "/srvx"))
    ]
    one = read_policy(policy("/", rule("r", root="a"), roots=roots))
    assert trees_of(one, read_policy(policy("/etc"))) == [b"/etc", b"/srv", b"/srvx"]


@pytest.mark.root
def test_other_mounts_are_entered_only_where_a_root_crosses_them(tmp_path: Path) -> None:
    (tmp_path / "on").mkdir()
    with mounted("tmpfs", tmp_path / "on"):
        (tmp_path / "on" / "file").write_bytes(b"")
        denied = rule("all", effect="deny")
        counts = []
        for across in (False, True):
            roots = [{"name": "tree", "path": str(tmp_path), "cross_mounts": across, "opens": "loop"}]
            old, new = policy(tmp_path, roots=roots), policy(tmp_path, denied, roots=roots)
            walked = Walked()
            one, other = read_policy(old), read_policy(new)
            found = list(compare(one, other, kinds_of_clients(one, other)[:1], [bytes(tmp_path)], walked))
            counts.append((walked.entries, len({each.path for each in found})))
    assert counts == [(2, 1), (3, 3)]


@pytest.mark.root
def test_mounts_are_told_apart_as_the_broker_does_whatever_their_devices_are(tmp_path: Path) -> None:
    # Layers of several file systems: files and directories of the overlay have different devices. And a
    # mount of the same file system has the same device.
    with mounted("tmpfs", tmp_path):
        for name in ("lower", "upper", "tree"):
            (tmp_path / name).mkdir()
        with mounted("tmpfs", tmp_path / "lower"), mounted("tmpfs", tmp_path / "upper"):
            (tmp_path / "lower" / "file").touch()
            (tmp_path / "lower" / "bound").touch()
            (tmp_path / "lower" / "again").mkdir()
            for name in ("data", "work"):
                (tmp_path / "upper" / name).mkdir()
            layers = f"lowerdir={tmp_path}/lower,upperdir={tmp_path}/upper/data,workdir={tmp_path}/upper/work"
            top = tmp_path / "tree"
            with (
                mounted("overlay", top, data=layers),
                bound(top / "file", top / "bound"),
                bound(top / "again", top / "again"),
            ):
                assert top.stat().st_dev != (top / "file").stat().st_dev, "this overlay shows nothing"
                lost = found_lost(top)
                look = {
                    name: judge(Policy(read_policy(policy(top))), NOBODY, "stat", name, look_as_broker)
                    for name in (bytes(top), *map(bytes, top.iterdir()))
                }
    assert lost == {name for name, judged in look.items() if judged.verdict.decision == ALLOW}
    assert lost == {bytes(top), bytes(top / "file")}


def found_lost(top: Path) -> set[bytes]:
    """Return what may be described no more after a policy that allows everything to one that denies it."""
    one, other = read_policy(policy(top)), read_policy(policy(top, rule("all", effect="deny")))
    found = compare(one, other, [ClientKind("x", NOBODY)], [bytes(top)], Walked())
    return {each.path for each in found if each.action == "stat"}


@pytest.mark.root
def test_a_mount_that_may_never_answer_is_named_before_it_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "far").mkdir()
    here = Mount(1, 0, b"fuse.sshfs", b"/", bytes(tmp_path / "far"), frozenset())
    monkeypatch.setattr(difference, "read_mounts", lambda: [here, here._replace(type=b"ext4", point=b"/x")])
    looked: list[str] = []
    stat_of = os.stat

    def noting(path: Any, **options: Any) -> os.stat_result:  # noqa: ANN401 - of os.stat
        looked.append(f"stat {os.fsdecode(path)}")
        return stat_of(path, **options)

    monkeypatch.setattr(os, "stat", noting)
    walked = Walked()
    walked.waits_for = lambda mount: looked.append(f"waits for {os.fsdecode(mount)}")
    walked.watch = lambda directory: looked.append(f"in {os.fsdecode(directory)}")
    one, other = read_policy(policy(tmp_path)), read_policy(policy(tmp_path, rule("n", effect="deny")))
    list(compare(one, other, [ClientKind("x", NOBODY)], [bytes(tmp_path)], walked))
    far = str(tmp_path / "far")
    assert looked == [f"in {tmp_path}", f"waits for {far}", "stat far", f"in {far}"]


@pytest.mark.root
def test_what_can_not_be_read_is_counted_and_named() -> None:
    with reachable_directory() as directory:
        (directory / "closed").mkdir(mode=0o700)

        def look() -> tuple[int, tuple[bytes, str] | None]:
            walked = Walked()
            one, other = (
                read_policy(policy(directory)),
                read_policy(policy(directory, rule("n", effect="deny"))),
            )
            list(compare(one, other, kinds_of_clients(one, other), [bytes(directory)], walked))
            return walked.unread, walked.first_unread

        assert in_child(look, uid=CLIENT_UID) == (1, (bytes(directory / "closed"), "Permission denied"))
        assert look() == (0, None)


def test_policies_are_loaded_whatever_their_form_and_roots_need_not_exist(tmp_path: Path) -> None:
    text = "version: 1\nroots: {r: {path: /nowhere/to/be/found}}\nrules: []\n"
    (tmp_path / "p.yaml").write_text(text)
    one = load(str(tmp_path / "p.yaml"))
    (tmp_path / "p.json").write_text(json.dumps(one.document))
    assert changes(one, load(str(tmp_path / "p.json"))) == []
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(ConfigError, match="is no compiled policy"):
        load(str(tmp_path / "bad.json"))


def test_user_is_taken_with_his_groups() -> None:
    root = kind_of_user("root")
    assert root is not None
    assert root.asker.client.uid == 0
    assert 0 in root.asker.client.gids
    assert kind_of_user("no-such-user") is None
