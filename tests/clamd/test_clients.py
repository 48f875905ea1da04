"""ClamAV's own client says the same, and ends the same, whoever it talks to."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.scan.clamav import BAD

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.root

MODES = [
    (),
    ("--multiscan",),
    ("--fdpass",),
    ("--stream",),
    ("--fdpass", "--multiscan"),
    ("--infected",),
]


def run(socket_path: Path, directory: Path, *arguments: str) -> tuple[int, list[str]]:
    """Run clamdscan with a socket, and return how it ended and its lines, sorted."""
    configuration = directory / "client.conf"
    configuration.write_text(f"LocalSocket {socket_path}\n")
    command = ["clamdscan", "--config-file", str(configuration), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return done.returncode, sorted((done.stdout + done.stderr).splitlines())


@pytest.mark.parametrize("mode", MODES, ids=" ".join)
@pytest.mark.parametrize("name", ["clean", "bad", "sub", "clean-directory", "none"])
def test_clamdscan_says_the_same(
    clamd: Path, ours: Path, tree: Path, tmp_path: Path, name: str, mode: tuple[str, ...]
) -> None:
    arguments = ("--no-summary", *mode, str(tree / name))
    status, lines = run(ours, tmp_path, *arguments)
    assert (status, lines) == run(clamd, tmp_path, *arguments)
    assert lines or "--infected" in mode


@pytest.mark.parametrize("question", [("--ping", "1"), ("--version",), ("--reload",)], ids=" ".join)
def test_clamdscan_is_answered_the_same(
    clamd: Path, ours: Path, tmp_path: Path, question: tuple[str, ...]
) -> None:
    status, lines = run(ours, tmp_path, *question)
    assert (status, lines) == run(clamd, tmp_path, *question)
    assert status == 0


def test_clamdscan_moves_a_file_whose_name_has_a_newline(ours: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    (source / "a: OK\nb").write_bytes(BAD)
    status, _ = run(ours, tmp_path, "--no-summary", f"--move={target}", str(source))
    assert status == 1
    assert [path.name for path in target.iterdir()] == ["a: OK\nb"]
