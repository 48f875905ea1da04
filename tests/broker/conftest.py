"""What the tests of the broker share: a tree to serve, and a broker that is stepped by the test."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

import pytest

from tests.broker.speaking import descriptors_of
from tests.broker.stepping import SteppedBroker
from tests.running_broker import reachable_directory

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Return a directory with a file, an empty one, a directory and a link."""
    path = tmp_path / "tree"
    path.mkdir()
    fill(path)
    return path


def fill(tree: Path) -> None:
    """Make what the tests ask for."""
    (tree / "file").write_bytes(b"content")
    (tree / "empty").touch()
    (tree / "directory").mkdir()
    (tree / "directory" / "inner").write_bytes(b"inner")
    (tree / "link").symlink_to("file")
    os.mkfifo(tree / "fifo")


@pytest.fixture
def stepped(tree: Path, tmp_path: Path) -> Iterator[SteppedBroker]:
    """Return a broker that everybody may ask for everything in `tree`; nothing is left open at the end."""
    with no_descriptor_left(), SteppedBroker(tree, audit=tmp_path / "audit") as broker:
        yield broker


@contextlib.contextmanager
def no_descriptor_left() -> Iterator[None]:
    """Check that what is open afterwards is what was open before."""
    before = descriptors_of()
    yield
    assert descriptors_of() == before


@pytest.fixture
def reachable() -> Iterator[Path]:
    """Return a directory that every uid can reach."""
    with reachable_directory() as path:
        yield path


@pytest.fixture(scope="module")
def shared_directory() -> Iterator[Path]:
    """Return the directory of the broker that the tests of a module share; its tree is `tree`."""
    with reachable_directory() as path:
        (path / "tree").mkdir(mode=0o755)
        fill(path / "tree")
        yield path
