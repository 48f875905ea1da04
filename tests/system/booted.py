"""Programs that run in a real systemd, which boot.sh starts for them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.running_broker import launcher_environment

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
UNITS = "etc/systemd/system"


def boot_command(files: Iterable[Path], shared: Iterable[Path], command: Sequence[object]) -> list[str]:
    """Return the command that boots and runs `command` there.

    `files`: directories whose contents are put below /; units belong in `UNITS`.
    `shared`: directories that are the same inside.
    """
    return [
        str(HERE / "boot.sh"),
        *(":".join(map(str, each)) for each in (files, shared)),
        *map(str, command),
    ]


def run_booted(
    program: str,
    shared: Path,
    *arguments: object,
    files: tuple[Path, ...],
    places: tuple[Path, ...] = (),
) -> dict[str, Any]:
    """Boot, run a program of this folder there, and return what it wrote to `shared`/seen.

    The program is called with `shared` and the arguments. It sees the checkout, `shared` and `places`.
    """
    command = [sys.executable, HERE / program, shared, *arguments]
    done = subprocess.run(
        boot_command(files, (REPOSITORY, shared, *places), command),
        env={**os.environ, "PYTHONPATH": f"{REPOSITORY}:{launcher_environment()['PYTHONPATH']}"},
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    seen: dict[str, Any] = json.loads((shared / "seen").read_text())
    return seen
