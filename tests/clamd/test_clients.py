"""ClamAV's own clients say the same, and end the same, whoever they talk to."""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.processes import wait_until
from tests.scan.clamav import BAD

if TYPE_CHECKING:
    from pathlib import Path

    from tests.scan.running_scand import RunningScand

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


# Of databases freshclam gets a file of this machine alone; it asks for a mirror that does not exist.
_FRESHCLAM = """
DatabaseDirectory {directory}/databases
DatabaseOwner root
DatabaseMirror database.invalid
DNSDatabaseInfo version.invalid
DatabaseCustomURL file://{directory}/new.hdb
NotifyClamd {directory}/clamd.conf
"""


@pytest.mark.skipif(shutil.which("freshclam") is None, reason="there is no freshclam")
def test_freshclams_notification_has_the_databases_loaded_anew(
    scand: RunningScand, ours: Path, tmp_path: Path, database: Path
) -> None:
    (tmp_path / "databases").mkdir()
    (tmp_path / "new.hdb").write_bytes((database / "test.hdb").read_bytes())
    (tmp_path / "clamd.conf").write_text(f"LocalSocket {ours}\n")
    configuration = tmp_path / "freshclam.conf"
    configuration.write_text(_FRESHCLAM.format(directory=tmp_path))
    before = scand.errors().count("loaded anew")
    command = ["freshclam", f"--config-file={configuration}", "--update-db=custom", "--stdout"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert "Clamd successfully notified about the update." in done.stdout, done.stdout + done.stderr
    assert done.returncode == 0
    wait_until(lambda: scand.errors().count("loaded anew") > before, "they are loaded anew")
