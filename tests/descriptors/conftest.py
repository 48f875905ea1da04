"""What these tests share: a broker for a tree, and a client that keeps what it is given."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import pytest

from tests.descriptors.mounting import shared_tmpfs
from tests.running_broker import policy, reachable_directory, running_broker

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.running_broker import RunningBroker


class Served(NamedTuple):
    """A running broker and the tree that it serves."""

    broker: RunningBroker
    tree: Path


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """Return a broker that everybody may ask for everything in its tree."""
    with reachable_directory() as directory:
        tree = directory / "tree"
        tree.mkdir()
        tree.chmod(0o755)
        with running_broker(directory, policy(tree)) as broker:
            yield Served(broker, tree)


@pytest.fixture
def space() -> Iterator[Path]:
    """Return a file system, with `tree/below`, whose later mounts reach brokers that were started before."""
    with reachable_directory() as directory:
        space = directory / "space"
        space.mkdir()
        with shared_tmpfs(space):
            (space / "tree" / "below").mkdir(parents=True)
            yield space
