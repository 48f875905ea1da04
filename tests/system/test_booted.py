"""fdbroker as installed, in a real systemd: each file of inside/ runs in a system that was booted for it."""

from __future__ import annotations

import os
import re
import sys
from typing import TYPE_CHECKING

import pytest

from tests.system.booted import HERE, run_booted

if TYPE_CHECKING:
    from pathlib import Path

FILES = sorted(path.name for path in (HERE / "inside").glob("test_*.py"))


@pytest.mark.booting
@pytest.mark.parametrize("file", FILES)
def test_installed_package_does_all_of(file: str, package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = [sys.executable, "-m", "pytest", "-q", "-s", "-o", "cache_dir=/run/pytest", HERE / "inside" / file]
    said = run_booted(run, environment={**os.environ, "FDBROKER_BOOTED": "1"}, files=(package,))
    with capsys.disabled():
        for figure in re.findall("figure: (.*)", said):
            print(f"\n{file}: {figure}", end="")  # noqa: T201 - for whoever runs it
