"""Running the `fdbroker` command as a process, as some user."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from tests.running_broker import launcher_environment
from tests.sandbox.confined import WORKER_UID

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.for_other_users import ForOtherUsers

AS_ROOT = ("--worker-uid", str(WORKER_UID))


def command(*arguments: str | bytes, python: str = sys.executable) -> list[str | bytes]:
    return [python, "-P", "-m", "fdbroker.cli", *arguments]


def environment(**changes: str) -> dict[str, str]:
    return {**launcher_environment(), "LANG": "C.UTF-8", **changes}


def run(*arguments: str | bytes, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run it and return what it wrote."""
    return _run(command(*arguments), env or environment())


def run_as(uid: int, others: ForOtherUsers, *arguments: str | bytes) -> subprocess.CompletedProcess[str]:
    """Run it as another user without any groups and return what it wrote."""
    return _run(command(*arguments, python=others.python), environment(PYTHONPATH=str(others.directory)), uid)


def _run(
    command: Sequence[str | bytes], env: dict[str, str], uid: int | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env=env,
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        user=uid,
        group=uid,
        extra_groups=None if uid is None else (),
        cwd="/",
        check=False,
    )


def lines(text: str, kind: str) -> list[dict[str, Any]]:
    """Return the JSON lines of one type."""
    return [line for line in map(json.loads, text.splitlines()) if line["type"] == kind]


def path_of(line: dict[str, Any]) -> bytes:
    """Return the bytes of a path, as docs/scan.md says they are to be had."""
    if "path_hex" in line:
        return bytes.fromhex(line["path_hex"])
    path: str = line["path"]
    return path.encode()


def verdicts(document: Sequence[dict[str, Any]]) -> dict[bytes, str]:
    return {path_of(line): line["verdict"] for line in document}
