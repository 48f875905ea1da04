"""Programs that run in a real systemd, which boot.sh starts for them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.running_broker import launcher_environment

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]


def run_booted(
    program: str, units: Path, shared: Path, *arguments: object, places: tuple[Path, ...] = ()
) -> dict[str, Any]:
    """Boot with some units, run a program of this folder there, and return what it wrote to `shared`/seen.

    The program is called with `shared` and the arguments. It sees the checkout, `shared` and `places`.
    """
    done = subprocess.run(
        [
            HERE / "boot.sh",
            units,
            ":".join(map(str, (REPOSITORY, shared, *places))),
            sys.executable,
            HERE / program,
            shared,
            *map(str, arguments),
        ],
        env={**os.environ, "PYTHONPATH": f"{REPOSITORY}:{launcher_environment()['PYTHONPATH']}"},
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    seen: dict[str, Any] = json.loads((shared / "seen").read_text())
    return seen
