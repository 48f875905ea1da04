"""A tree of files, a real clamd, and a scan service in its place."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.clamd.replacing import instead_of_clamd
from tests.clamd.talks import STREAM_LENGTH, make_tree
from tests.running_broker import reachable_directory
from tests.scan.clamav import make_database, running_clamd

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.for_other_users import ForOtherUsers
    from tests.scan.running_scand import RunningScand


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    with reachable_directory() as path:
        yield path


@pytest.fixture(scope="module")
def tree(directory: Path) -> Path:
    root = directory / "tree"
    make_tree(root)
    return root


@pytest.fixture(scope="module")
def database(directory: Path) -> Path:
    return make_database(directory / "database")


@pytest.fixture(scope="module")
def clamd(tmp_path_factory: pytest.TempPathFactory, database: Path) -> Iterator[Path]:
    with running_clamd(
        tmp_path_factory.mktemp("fast"), database, f"StreamMaxLength {STREAM_LENGTH}"
    ) as socket_path:
        yield socket_path


@pytest.fixture(scope="module")
def scand(others: ForOtherUsers, directory: Path, tree: Path, database: Path) -> Iterator[RunningScand]:
    listener = f", max_stream: {STREAM_LENGTH}"
    with instead_of_clamd(others, directory, tree, database, listener=listener) as running:
        yield running


@pytest.fixture(scope="module")
def ours(scand: RunningScand) -> Path:
    return scand.clamd
