"""The installed fdbrokerd script: what the environment names is not run by root."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

SCRIPT = Path(sysconfig.get_path("scripts"), "fdbrokerd")


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A directory with modules that leave a mark when they are imported."""
    mark = f"open({str(tmp_path / 'was-run')!r}, 'w').close()\n"
    (tmp_path / "fdbroker").mkdir()
    for name in ("sitecustomize.py", "usercustomize.py", "argparse.py", "fdbroker/__init__.py"):
        (tmp_path / name).write_text(mark, "utf-8")
    return tmp_path


def run(command: list[str | Path], hostile: Path) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(hostile), "PYTHONUSERBASE": str(hostile)}
    return subprocess.run(
        command, cwd=hostile, env=environment, capture_output=True, text=True, check=False, timeout=60
    )


def test_modules_that_pythonpath_names_are_not_run(hostile: Path) -> None:
    done = run([SCRIPT, "--help"], hostile)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: fdbrokerd")
    assert not (hostile / "was-run").exists()


def test_script_is_found_by_a_link(hostile: Path) -> None:
    link = hostile / "link"
    link.symlink_to(SCRIPT)
    done = run([link, "--help"], hostile)
    assert done.returncode == 0, done.stderr


def test_hostile_modules_would_be_run_by_an_ordinary_script(hostile: Path) -> None:
    # So that the test above can fail.
    python = shutil.which("python3", path=sysconfig.get_path("scripts"))
    assert python is not None
    run([python, "-c", "import fdbroker"], hostile)
    assert (hostile / "was-run").exists()
