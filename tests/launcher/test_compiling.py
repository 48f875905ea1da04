"""YAML is parsed by a child that ends: neither the launcher nor what it becomes ever has its libraries."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import fdbroker
from tests.launcher.starting import command, lay_out
from tests.running_broker import launcher_environment, reachable_directory

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.root

# Whoever imports it says so, and stays there until it may go on.
HOOK = """
import os, sys
class Finder:
    def find_spec(self, name, *_):
        if name == "yaml":
            with open("{0}/importing", "w") as told:
                told.write(str(os.getpid()))
            open("{0}/go", "rb").read()
sys.meta_path.insert(0, Finder())
"""


@pytest.fixture
def directory() -> Iterator[Path]:
    with reachable_directory() as path:
        lay_out(path)
        (path / "hooks").mkdir()
        (path / "hooks/sitecustomize.py").write_text(HOOK.format(path))
        os.mkfifo(path / "importing")
        os.mkfifo(path / "go")
        yield path


def mapped(pid: int) -> str:
    """Return the names of what is mapped into a process that come from the package."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return " ".join(line for line in lines if "yaml" in line)


def test_the_launcher_imports_no_yaml_and_the_child_that_does_is_gone_before_the_broker(
    directory: Path,
) -> None:
    environment = launcher_environment()
    environment["PYTHONPATH"] = f"{directory}/hooks:{environment['PYTHONPATH']}"
    ready, told = os.pipe()
    with subprocess.Popen(
        [*command(directory / "policy.yaml", "--audit=none"), f"--ready-fd={told}"],
        env=environment,
        pass_fds=[told],
    ) as launcher:
        os.close(told)
        child = int((directory / "importing").read_text())
        assert child != launcher.pid
        assert Path(f"/proc/{child}/stat").read_text().split()[3] == str(launcher.pid)
        # While it waits for that child it has what it will ever have.
        assert mapped(launcher.pid) == ""
        (directory / "go").write_text("")
        # A second one would stop here, with nobody to let it go on: the launcher itself, or anybody else.
        assert os.read(ready, 10) == b"ready\n"
        os.close(ready)
        assert mapped(launcher.pid) == ""
        assert not Path(f"/proc/{child}").exists()
        with fdbroker.connect(directory / "run/requests") as client:
            assert client.stat(directory / "tree/file").size == 7
        launcher.terminate()
    assert launcher.returncode == 0
