"""What the races share: a place to run them, and a table of their counts at the end of the run."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tests.descriptors.mounting import shared_tmpfs
from tests.races.racing import LONG, Place
from tests.running_broker import OWNER_UID, reachable_directory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.races.racing import Outcome

_COUNTS = pytest.StashKey[list[str]]()


@pytest.fixture
def place() -> Iterator[Place]:
    """Return an empty tree of OWNER_UID and a directory outside of it, on a file system of their own."""
    with reachable_directory() as directory:
        space, broker = directory / "space", directory / "broker"
        for path in (space, broker):
            path.mkdir()
            path.chmod(0o755)  # whatever the umask is
        with shared_tmpfs(space):
            made = Place(tree=space / "tree", outside=space / "outside", broker=broker)
            made.tree.mkdir()
            made.tree.chmod(0o755)
            made.outside.mkdir(mode=0o700)
            os.chown(made.tree, OWNER_UID, OWNER_UID)
            yield made


@pytest.fixture
def show(request: pytest.FixtureRequest) -> Callable[[Outcome], None]:
    """Return what puts an outcome into the table."""
    counts = request.config.stash.setdefault(_COUNTS, [])
    return lambda outcome: counts.append(f"{request.node.name}: {outcome}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the counts after a long run."""
    if LONG and config.stash.get(_COUNTS, []):
        terminalreporter.section("races")
        for line in config.stash[_COUNTS]:
            terminalreporter.write_line(line)
