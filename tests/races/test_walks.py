"""Whatever is moved meanwhile, a walk gives nothing that the policy does not.

The walk is driven here, without a broker, so that its steps come one after the other as fast as
they can. The careless walk is the same one without its look whether the directories that it
holds are where they were.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from fdbroker.broker.walking import Walk
from fdbroker.kernel.descriptors import close_all
from tests.broker.walks import ground
from tests.processes import in_child
from tests.races.attacking import VICTIMS_CPU, attacking, exchanging, resting
from tests.races.careless import look_then_open
from tests.races.racing import (
    GOOD,
    LEAST_OPENS,
    LEAST_STEPS,
    SECONDS,
    SECRET,
    Outcome,
    Place,
    Tally,
    is_right,
    put,
    try_often,
)
from tests.running_broker import OWNER_UID, rule

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path
    from typing import Any

    from tests.broker.walks import Ground
    from tests.races.attacking import Attack
    from tests.races.racing import Inode

    Show = Callable[[Outcome], None]

pytestmark = pytest.mark.root
OWNED = rule("owned", where={"owner": {"uids": [OWNER_UID], "client": False, "on_behalf_of": False}})


class CarelessWalk(Walk):
    """Trusts the directories that it holds."""

    def _is_as_it_was(self, _step: object) -> bool:
        return True


def walk_once(here: Ground, kind: type[Walk], good: set[Inode], tally: Tally) -> None:
    """Walk to the end and look at every descriptor."""
    walk = here.walk(descriptors=True)
    walk.__class__ = kind
    while True:
        batch = walk.step(64)
        for descriptor in batch.descriptors:
            if is_right(descriptor, good):
                tally.good += 1
            else:
                tally.wrong += 1
        tally.tries += len(batch.descriptors)
        close_all(batch.descriptors)
        if batch.end is not None:
            tally.refused.update((batch.end.incomplete.name or "complete",))
            return


def walk_often(
    place: Place,
    rules: Sequence[dict[str, Any]],
    good: set[Inode],
    attack: Attack,
    enough: Callable[[Tally], bool],
    kind: type[Walk],
) -> Tally:
    os.sched_setaffinity(0, {VICTIMS_CPU})
    tally = Tally()
    before = attack.steps
    end = time.monotonic() + SECONDS
    with ground(place.tree, *rules) as here:
        while not enough(tally):
            walk_once(here, kind, good, tally)
            tally.steps = attack.steps - before
            assert time.monotonic() < end, tally
    return tally


def asked_often(tally: Tally) -> bool:
    return tally.tries >= LEAST_OPENS and tally.steps >= LEAST_STEPS and tally.good > 0


def run(
    place: Place,
    steps: Sequence[Callable[[], None]],
    good: set[Inode],
    rules: Sequence[dict[str, Any]] = (),
) -> Outcome:
    """Race both walks against the same attack and check what has to hold."""
    with attacking(*steps, uid=0) as attack:
        careful = in_child(lambda: walk_often(place, rules, good, attack, asked_often, Walk))
        careless = in_child(
            lambda: walk_often(place, rules, good, attack, lambda tally: tally.wrong > 0, CarelessWalk)
        )
    outcome = Outcome(careful, careless, Counter())
    assert careful.wrong == 0, outcome
    assert careful.good == careful.tries > 0, outcome
    assert careless.wrong > 0, outcome
    # What is moved is seen, and a walk that was not disturbed is complete.
    assert {"CHANGED", "complete"} & careful.refused.keys(), outcome
    return outcome


def directory(path: Path, uid: int, content: bytes, files: int = 10) -> set[Inode]:
    """Make a directory with files of these contents, and return their inodes."""
    path.mkdir(mode=0o755)
    os.chown(path, uid, uid)
    return {put(path / f"file{number}", content, uid) for number in range(files)}


def test_walked_directory_that_is_moved_out_with_its_parent_and_replaced_there(
    place: Place, show: Show
) -> None:
    above, elsewhere, secrets = place.tree / "above", place.outside / "elsewhere", place.outside / "secrets"
    above.mkdir()
    good = directory(above / "directory", OWNER_UID, GOOD)
    good |= {put(above / f"beside{number}", GOOD, OWNER_UID) for number in range(20)}
    elsewhere.mkdir()
    good |= directory(elsewhere / "directory", OWNER_UID, GOOD)
    directory(secrets, 0, SECRET)
    out = exchanging(above, elsewhere)
    # At no time do the secrets have a name in the tree.
    change = exchanging(elsewhere / "directory", secrets)
    show(run(place, [resting(above, 20), out, change, change, out], good))


def test_walked_directory_that_is_moved_out_and_gets_a_secret_while_it_is_there(
    place: Place, show: Show
) -> None:
    path, elsewhere = place.tree / "directory", place.outside / "elsewhere"
    good = directory(path, OWNER_UID, GOOD, files=30)
    good |= directory(elsewhere, OWNER_UID, GOOD, files=30)
    put(place.outside / "secret", SECRET, 0)
    change = exchanging(elsewhere / "file5", place.outside / "secret")
    out = exchanging(path, elsewhere)
    show(run(place, [resting(path, 20), out, change, change, out], good))


def test_walked_directory_that_changes_places_with_one_outside_whose_files_are_refused(
    place: Place, show: Show
) -> None:
    path, secrets = place.tree / "directory", place.outside / "secrets"
    good = directory(path, OWNER_UID, GOOD, files=30)
    directory(secrets, 0, SECRET, files=30)
    rules = [OWNED, rule("start", actions=["walk"])]
    # What a rule asks is asked of the file that is held: careless is who asks by name and opens by name.
    one = path / "file5"
    asking_by_name = look_then_open(
        one, lambda facts: facts.st_uid == OWNER_UID, lambda descriptor: is_right(descriptor, good)
    )
    with attacking(resting(path, 20), exchanging(path, secrets), uid=0) as attack:
        careful = in_child(lambda: walk_often(place, rules, good, attack, asked_often, Walk))
        careless = in_child(lambda: try_often(asking_by_name, attack))
    outcome = Outcome(careful, careless, Counter())
    assert (careful.wrong, careful.good) == (0, careful.tries), outcome
    assert careless.wrong > 0, outcome
    show(outcome)
