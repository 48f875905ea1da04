"""What every test shares: the umask, the marker for root, a copy for other users, how hypothesis searches."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from coverage import Coverage
from hypothesis import settings
from hypothesis.configuration import set_hypothesis_home_dir
from hypothesis.database import DirectoryBasedExampleDatabase

from tests.for_other_users import ForOtherUsers, for_other_users
from tests.uids import with_uids_of_first_block

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

HYPOTHESIS_HOME = Path(__file__).resolve().parent.parent / "build" / "hypothesis"

set_hypothesis_home_dir(HYPOTHESIS_HOME)
# The default: the same examples in each run, so that a red run can be repeated. No deadline: machines differ.
settings.register_profile("ci", derandomize=True, deadline=None, database=None, print_blob=True)
# For looking further: pytest --hypothesis-profile=dev
settings.register_profile(
    "dev",
    deadline=None,
    max_examples=1000,
    database=DirectoryBasedExampleDatabase(HYPOTHESIS_HOME / "examples"),
)
settings.load_profile("ci")

# Many tests make what another uid, the broker or a client, has to reach. Under a stricter umask of whoever
# runs them (077 is not rare for root) it could not, as mkdir(mode=...), bind(2) and the like obey it.
os.umask(0o022)


@pytest.fixture(scope="session")
def others() -> Iterator[ForOtherUsers]:
    """Return an interpreter and the sources for processes of other uids."""
    with for_other_users() as made:
        yield made


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    """Measure no coverage where it is marked so.

    `no_cover` of pytest-cov does not do that in the workers of xdist.
    """
    stopped = []
    if item.get_closest_marker("unmeasured"):
        while measuring := Coverage.current():  # a worker has two, and stopping one resumes the other
            measuring.stop()
            stopped.append(measuring)
    try:
        yield
    finally:
        for measuring in reversed(stopped):
            measuring.start()


def pytest_make_parametrize_id(val: object) -> str | None:
    """Name a case alike in each process, though the uid in it is one of the process's own."""
    if not isinstance(val, int | str):
        return None
    named = with_uids_of_first_block(str(val))
    return None if named == str(val) else named


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs root, and say so, where the run has none."""
    if os.geteuid() == 0:
        return
    skip = pytest.mark.skip(reason="needs root: run `sudo make test`")
    for item in items:
        if item.get_closest_marker("root"):
            item.add_marker(skip)


def pytest_collection_finish() -> None:
    """Take what is there now out of the collector's sight: hundreds of tests collect what they have made.

    Looking through all of pytest and all tests would take a tenth of a second each time.
    """
    gc.collect()
    gc.freeze()
