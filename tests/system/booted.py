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
UNITS = "etc/systemd/system"


def run_booted(
    program: str,
    shared: Path,
    *arguments: object,
    files: tuple[Path, ...],
    places: tuple[Path, ...] = (),
) -> dict[str, Any]:
    """Boot, run a program of this folder there, and return what it wrote to `shared`/seen.

    The program is called with `shared` and the arguments. It sees the checkout, `shared` and `places`.
    `files`: directories whose contents are put below /; units belong in `UNITS`.
    """
    done = subprocess.run(
        [
            HERE / "boot.sh",
            ":".join(map(str, files)),
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
