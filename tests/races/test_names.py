"""Whatever is renamed, linked or mounted meanwhile, the broker gives nothing that the policy does not."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

import pytest

from tests.descriptors.mounting import MS_BIND, mount, unmount
from tests.descriptors.watching import IN_ATTRIB, watched
from tests.races.attacking import exchanging, resting
from tests.races.careless import (
    hold_then_count_links,
    lists_only,
    look_then_open,
    realpath_then_open,
    step_by_step,
)
from tests.races.racing import (
    GOOD,
    LEAST_LISTS,
    LEAST_STEPS,
    SECRET,
    Place,
    Race,
    asking_to_list,
    asking_to_open,
    is_right,
    put,
    run,
)
from tests.running_broker import OWNER_UID, rule

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.races.racing import Inode, Outcome

    Show = Callable[[Outcome], None]

pytestmark = pytest.mark.root
OWNED = rule("owned", where={"owner": {"uids": [OWNER_UID], "client": False, "on_behalf_of": False}})
ONE_LINK = rule("one-link", where={"links": {"max": 1}})
NOT_PRIVATE = rule("not-private", effect="deny", paths=["private/**"])


def right(good: set[Inode]) -> Callable[[int], bool]:
    """Return what looks at a file."""
    return lambda descriptor: is_right(descriptor, good)


def directory(path: Path, uid: int, content: bytes | None = None) -> Inode:
    """Make a directory with a file `file` in it, if it has a content, and return that file's inode."""
    path.mkdir(mode=0o755)
    os.chown(path, uid, uid)
    return (0, 0) if content is None else put(path / "file", content, uid)


# symbolic links


def test_file_that_changes_places_with_a_link_to_a_secret(place: Place, show: Show) -> None:
    path, link = place.tree / "file", place.tree / "link"
    put(place.outside / "secret", SECRET, 0)
    good = {put(path, GOOD, OWNER_UID)}
    link.symlink_to(place.outside / "secret")
    outcome = run(
        place,
        Race(
            steps=[exchanging(path, link)],
            attacker=OWNER_UID,
            ask=asking_to_open(good, path),
            careless=realpath_then_open(place.tree, path, right(good)),
        ),
    )
    assert outcome.broker.refused.keys() == {"symlink"}
    show(outcome)


def test_directory_that_changes_places_with_a_link_to_a_secret_one(place: Place, show: Show) -> None:
    path, link = place.tree / "directory", place.tree / "link"
    directory(place.outside / "secrets", 0, SECRET)
    good = {directory(path, OWNER_UID, GOOD)}
    link.symlink_to(place.outside / "secrets")
    outcome = run(
        place,
        Race(
            steps=[exchanging(path, link)],
            attacker=OWNER_UID,
            ask=asking_to_open(good, path / "file"),
            careless=realpath_then_open(place.tree, path / "file", right(good)),
        ),
    )
    assert outcome.broker.refused.keys() == {"symlink"}
    show(outcome)


@pytest.mark.parametrize("end", ["file", "directory/file"])
def test_link_that_is_followed_changes_places_with_links_to_secrets(
    place: Place, show: Show, end: str
) -> None:
    names = [place.tree / name for name in ("good", "to-private", "to-outside", "absolute")]
    good = {directory(place.tree / "public", OWNER_UID, GOOD)}
    directory(place.tree / "private", OWNER_UID, SECRET)
    directory(place.outside / "secrets", 0, SECRET)
    for name, target in zip(
        names, ("public", "private", "../outside/secrets", str(place.outside / "secrets")), strict=True
    ):
        name.symlink_to(f"{target}/file" if end == "file" else target)
    asked = names[0] if end == "file" else names[0] / "file"
    outcome = run(
        place,
        Race(
            rules=[rule("follows", symlinks="within-root"), NOT_PRIVATE],
            steps=[exchanging(names[0], name) for name in names[1:]],
            attacker=OWNER_UID,
            ask=asking_to_open(good, asked),
            careless=realpath_then_open(place.tree / "public", asked, right(good)),
        ),
    )
    assert outcome.broker.refused.keys() <= {"symlink", "denied", "busy"}
    assert {"link_leaves_root", "deny_rule"} <= outcome.reasons.keys()
    show(outcome)


def test_directory_on_the_way_of_a_link_changes_places_with_a_private_one(place: Place, show: Show) -> None:
    public, private = place.tree / "public", place.tree / "other"
    good = {directory(public, OWNER_UID, GOOD)}
    directory(private, 0, SECRET)
    link = place.tree / "link"
    link.symlink_to("public/file")
    outcome = run(
        place,
        Race(
            rules=[OWNED | {"symlinks": "within-root"}],
            steps=[exchanging(public, private)],
            attacker=OWNER_UID,
            ask=asking_to_open(good, link),
            careless=look_then_open(public / "file", lambda facts: facts.st_uid == OWNER_UID, right(good)),
        ),
    )
    assert outcome.broker.refused.keys() <= {"denied"}
    show(outcome)


# directories. What is moved to an allowed name is what that name means, until it is moved away; so in each
# of these either the file is refused wherever it is, or the secret is never at the name that is asked for.


def test_directory_that_changes_places_with_one_outside_whose_files_are_refused(
    place: Place, show: Show
) -> None:
    path, secrets = place.tree / "directory", place.outside / "secrets"
    directory(secrets, 0, SECRET)
    good = {directory(path, OWNER_UID, GOOD)}
    outcome = run(
        place,
        Race(
            steps=[exchanging(path, secrets)],
            attacker=0,
            ask=asking_to_open(good, path / "file"),
            careless=look_then_open(path / "file", lambda facts: facts.st_uid == OWNER_UID, look=right(good)),
            rules=[OWNED],
        ),
    )
    # The kernel sees that it is not below the root any more: when openat2 ends, and by Landlock.
    assert outcome.reasons["where_owner"] > 0
    assert outcome.reasons.keys() <= {"ok", "where_owner", "crosses_mount", "kernel_denied"}
    show(outcome)


def moving_out_and_changing(listed: Path, elsewhere: Path, secrets: Path) -> list[Callable[[], None]]:
    """Move the parent of `listed` out, put `secrets` in the place of `listed` there, and all back again.

    `elsewhere` is a directory that takes the parent's place. At no time do the
    secrets have the name of `listed`.
    """
    out = exchanging(listed.parent, elsewhere)
    change = exchanging(elsewhere / listed.name, secrets)
    return [out, change, change, out]


def test_directory_that_is_moved_out_and_holds_a_secret_while_it_is_there(place: Place, show: Show) -> None:
    above, elsewhere, secrets = place.tree / "above", place.outside / "elsewhere", place.outside / "secrets"
    directory(above, OWNER_UID)
    directory(elsewhere, OWNER_UID)
    directory(secrets, 0, SECRET)
    good = {
        directory(above / "directory", OWNER_UID, GOOD),
        directory(elsewhere / "directory", OWNER_UID, GOOD),
    }
    path = above / "directory" / "file"
    outcome = run(
        place,
        Race(
            steps=moving_out_and_changing(above / "directory", elsewhere, secrets),
            attacker=0,
            ask=asking_to_open(good, path),
            careless=step_by_step(place.tree, path, right(good)),
        ),
    )
    show(outcome)


def test_public_directory_that_changes_places_with_a_private_one(place: Place, show: Show) -> None:
    public, private = place.tree / "public", place.tree / "private"
    directory(private, 0, SECRET)
    good = {directory(public, OWNER_UID, GOOD)}
    outcome = run(
        place,
        Race(
            steps=[exchanging(public, private)],
            attacker=0,
            ask=asking_to_open(good, public / "file", private / "file"),
            careless=look_then_open(
                public / "file", lambda facts: facts.st_uid == OWNER_UID, look=right(good)
            ),
            rules=[OWNED, NOT_PRIVATE],
        ),
    )
    # By its name each second one is refused, whatever is there; the others depend on the owner.
    assert outcome.reasons.keys() == {"ok", "where_owner", "deny_rule"}
    assert outcome.reasons["deny_rule"] == outcome.broker.tries / 2
    show(outcome)


def test_public_directory_that_is_moved_into_the_private_one_and_holds_a_secret_there(
    place: Place, show: Show
) -> None:
    above, private = place.tree / "above", place.tree / "private"
    directory(above, OWNER_UID)
    directory(private, 0)
    directory(private / "elsewhere", OWNER_UID)
    directory(private / "secrets", 0, SECRET)
    good = {
        directory(above / "directory", OWNER_UID, GOOD),
        directory(private / "elsewhere" / "directory", OWNER_UID, GOOD),
    }
    path = above / "directory" / "file"
    outcome = run(
        place,
        Race(
            steps=moving_out_and_changing(above / "directory", private / "elsewhere", private / "secrets"),
            attacker=0,
            ask=asking_to_open(good, path),
            careless=step_by_step(place.tree, path, right(good)),
            rules=[rule("all"), NOT_PRIVATE],
        ),
    )
    show(outcome)


# mounts


def test_directory_over_which_a_secret_one_is_mounted(place: Place, show: Show) -> None:
    path, secrets = place.tree / "directory", place.outside / "secrets"
    directory(secrets, 0, SECRET)
    good = {directory(path, OWNER_UID, GOOD)}
    source, target = bytes(secrets), bytes(path)
    outcome = run(
        place,
        Race(
            steps=[lambda: mount(source, target, flags=MS_BIND), lambda: unmount(target)],
            attacker=0,
            ask=asking_to_open(good, path / "file"),
            careless=realpath_then_open(place.tree, path / "file", right(good)),
            # The mounts reach the broker's namespace, or this would say nothing.
            meets="crosses_mount",
        ),
    )
    assert outcome.reasons.keys() == {"ok", "crosses_mount"}
    show(outcome)


# hard links


def linking(name: Path, good: Path, secret: Path) -> list[Callable[[], None]]:
    """Let `name` be a good file, nothing, one more link to a secret, nothing, and so on."""
    here, aside, source = bytes(name), bytes(good), bytes(secret)
    return [
        resting(name, 20),
        lambda: os.rename(here, aside),
        lambda: os.link(source, here),
        lambda: os.unlink(here),
        lambda: os.rename(aside, here),
    ]


def test_secret_that_is_linked_into_the_tree_and_has_too_many_links(place: Place, show: Show) -> None:
    path, secret = place.tree / "file", place.outside / "secret"
    put(secret, SECRET, 0)
    good = {put(path, GOOD, OWNER_UID)}
    outcome = run(
        place,
        Race(
            steps=linking(path, place.tree / "aside", secret),
            attacker=0,
            ask=asking_to_open(good, path),
            careless=hold_then_count_links(path, right(good)),
            rules=[ONE_LINK],
        ),
    )
    assert outcome.reasons["where_links"] > 0
    assert outcome.reasons.keys() <= {"ok", "where_links", "not_found", "lost_its_name"}
    show(outcome)


@contextlib.contextmanager
def slow_to_remove(path: Path) -> Iterator[None]:
    """Have many be told of each link that the file loses, which the kernel does before the name is gone."""
    with contextlib.ExitStack() as stack:
        for _ in range(40):
            stack.enter_context(watched(path, IN_ATTRIB))
        yield


def test_secret_that_is_linked_into_the_tree_and_slowly_removed(place: Place, show: Show) -> None:
    path, secret = place.tree / "file", place.outside / "secret"
    put(secret, SECRET, 0)
    good = {put(path, GOOD, OWNER_UID)}
    with slow_to_remove(secret):
        outcome = run(
            place,
            Race(
                steps=linking(path, place.tree / "aside", secret),
                attacker=0,
                ask=asking_to_open(good, path),
                careless=hold_then_count_links(path, right(good)),
                rules=[ONE_LINK],
            ),
        )
    assert outcome.reasons["lost_its_name"] > 0
    show(outcome)


def test_secret_that_is_linked_into_the_tree_and_has_another_owner(place: Place, show: Show) -> None:
    path, secret = place.tree / "file", place.outside / "secret"
    put(secret, SECRET, 0)
    good = {put(path, GOOD, OWNER_UID)}
    outcome = run(
        place,
        Race(
            steps=linking(path, place.tree / "aside", secret),
            attacker=0,
            ask=asking_to_open(good, path),
            careless=look_then_open(path, lambda facts: facts.st_uid == OWNER_UID, look=right(good)),
            rules=[OWNED],
        ),
    )
    assert outcome.reasons.keys() == {"ok", "where_owner", "not_found"}
    show(outcome)


# lists


def test_listed_directory_that_is_moved_out_with_its_parent_and_replaced_there(
    place: Place, show: Show
) -> None:
    above, elsewhere, secrets = place.tree / "above", place.outside / "elsewhere", place.outside / "secrets"
    directory(above, OWNER_UID)
    directory(elsewhere, OWNER_UID)
    directory(above / "directory", OWNER_UID)
    directory(elsewhere / "directory", OWNER_UID)
    directory(secrets, 0)
    put(secrets / "secret", SECRET, 0)
    for number in range(10):
        put(above / "directory" / f"good{number}", GOOD, OWNER_UID)
        put(elsewhere / "directory" / f"good{number}", GOOD, OWNER_UID)
    good = {b"good%d" % number for number in range(10)}
    path = above / "directory"
    outcome = run(
        place,
        Race(
            steps=moving_out_and_changing(path, elsewhere, secrets),
            attacker=0,
            ask=asking_to_list(good, path),
            careless=step_by_step(place.tree, path, lists_only(good), directory=True),
            least=LEAST_LISTS,
        ),
    )
    show(outcome)


def test_listed_directory_that_is_moved_out_and_gets_a_secret_while_it_is_there(
    place: Place, show: Show
) -> None:
    path, elsewhere = place.tree / "directory", place.outside / "elsewhere"
    directory(path, OWNER_UID)
    directory(elsewhere, OWNER_UID)
    put(place.outside / "secret", SECRET, 0)
    for number in range(10):
        put(path / f"good{number}", GOOD, OWNER_UID)
        put(elsewhere / f"good{number}", GOOD, OWNER_UID)
    good = {b"good%d" % number for number in range(10)}
    here, there = bytes(place.outside / "secret"), bytes(elsewhere / "secret")
    out = exchanging(path, elsewhere)
    outcome = run(
        place,
        Race(
            # In a row, so that it is met, and then a while without, so that a list is given on any machine.
            steps=[
                *[
                    resting(path, 40),
                    out,
                    lambda: os.rename(here, there),
                    lambda: os.rename(there, here),
                    out,
                ]
                * 8,
                resting(path, 400),
            ],
            attacker=0,
            ask=asking_to_list(good, path),
            careless=step_by_step(place.tree, path, lists_only(good), directory=True),
            # Three moves have to fall between two looks: some do in two thousand steps.
            least=2 * LEAST_LISTS,
            least_steps=4 * LEAST_STEPS,
        ),
    )
    show(outcome)
