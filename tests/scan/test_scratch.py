"""A scratch directory is found empty by the next scan, wherever it is."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fdbroker.scan.engines.scratch import Scratch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture(params=["on tmpfs", "elsewhere"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    if request.param == "elsewhere":
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as made:
        yield Path(made)


def leave_file(directory: Path) -> None:
    (directory / "file").write_bytes(b"x")


def leave_empty_file(directory: Path) -> None:
    (directory / "-").touch()


def leave_tree(directory: Path) -> None:
    (directory / "a" / "b").mkdir(parents=True)
    (directory / "a" / "b" / "file").touch()


def leave_link(directory: Path) -> None:
    (directory / "link").symlink_to("/")


@pytest.mark.parametrize("leave", [leave_file, leave_empty_file, leave_tree, leave_link])
def test_whatever_was_left_is_removed(leave: Callable[[Path], None], directory: Path) -> None:
    leave(directory)
    scratch = Scratch(bytes(directory))
    assert list(directory.iterdir()) == []
    for _ in range(3):
        scratch.clear()
        leave(directory)
        scratch.clear()
        assert list(directory.iterdir()) == []


def test_on_tmpfs_an_empty_one_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as made:
        scratch = Scratch(os.fsencode(made))

        def refuse(_path: object) -> list[bytes]:
            raise AssertionError("it was read")

        monkeypatch.setattr(os, "listdir", refuse)
        scratch.clear()
        (Path(made) / "file").touch()
        with pytest.raises(AssertionError, match="it was read"):
            scratch.clear()
        monkeypatch.undo()


def test_what_can_not_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Scratch(bytes(tmp_path / "missing"))
