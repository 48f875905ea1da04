"""The tests of the launcher change the state of processes as those of the system calls do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.kernel.conftest import in_child
from tests.launcher.starting import lay_out
from tests.running_broker import reachable_directory

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["directory", "in_child"]


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory that other users reach, with what a start needs laid out in it."""
    with reachable_directory() as path:
        lay_out(path)
        yield path
