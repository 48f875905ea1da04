"""fdbroker as installed, in a real systemd: each file of inside/ runs in a system that was booted for it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.system.booted import HERE, REPOSITORY, boot_command

if TYPE_CHECKING:
    from pathlib import Path

FILES = sorted(path.name for path in (HERE / "inside").glob("test_*.py"))


@pytest.mark.booting
@pytest.mark.parametrize("file", FILES)
def test_installed_package_does_all_of(file: str, package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = [sys.executable, "-m", "pytest", "-q", "-s", "-o", "cache_dir=/run/pytest", HERE / "inside" / file]
    done = subprocess.run(
        boot_command((package,), (REPOSITORY,), run),
        cwd=REPOSITORY,
        env={**os.environ, "FDBROKER_BOOTED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    with capsys.disabled():
        for figure in re.findall("figure: (.*)", done.stdout):
            print(f"\n{file}: {figure}", end="")  # noqa: T201 - for whoever runs it
