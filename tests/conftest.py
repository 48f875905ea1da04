"""What every test shares: the marker for root, and how hypothesis looks for examples."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis.configuration import set_hypothesis_home_dir
from hypothesis.database import DirectoryBasedExampleDatabase

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs root, and say so, where the run has none."""
    if os.geteuid() == 0:
        return
    skip = pytest.mark.skip(reason="needs root: run `sudo make test`")
    for item in items:
        if item.get_closest_marker("root"):
            item.add_marker(skip)
