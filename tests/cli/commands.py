"""Running the `fdbroker` command as a process, as some user."""

from __future__ import annotations

import contextlib
import io
import json
import os
import select
import subprocess
import sys
from typing import TYPE_CHECKING, Any
from unittest import mock

from fdbroker.cli.main import main
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


def run_here(*arguments: str | bytes, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run it within this process, which is faster and is seen by the measuring of coverage."""
    try:
        here = os.open(".", os.O_PATH)
    except PermissionError:
        here = -1  # a child that is somebody else by now: it does not come back here
    buffers = io.BytesIO(), io.BytesIO()
    output, errors = (io.TextIOWrapper(buffer, "utf-8", write_through=True) for buffer in buffers)
    with (
        mock.patch.dict(os.environ, env or environment(), clear=True),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
    ):
        os.chdir("/")
        try:
            status = main([os.fsdecode(argument) for argument in arguments])
        finally:
            if here >= 0:
                os.fchdir(here)
                os.close(here)
    told = [buffer.getvalue().decode() for buffer in buffers]
    return subprocess.CompletedProcess(arguments, status, *told)


def run_bytes(*arguments: str | bytes) -> subprocess.CompletedProcess[bytes]:
    """Run it and return the very bytes that it wrote."""
    return subprocess.run(
        command(*arguments), env=environment(), capture_output=True, timeout=60, cwd="/", check=False
    )


def run_on_terminal(*arguments: str | bytes, **changes: str) -> tuple[int, bytes]:
    """Run it with standard output and error on a terminal; return its status and what it showed."""
    master, terminal = os.openpty()
    process = subprocess.Popen(
        command(*arguments),
        env=environment(**{"TERM": "xterm", "COLUMNS": "100", **changes}),
        stdin=subprocess.DEVNULL,
        stdout=terminal,
        stderr=terminal,
        cwd="/",
    )
    os.close(terminal)
    shown = read_terminal(master, process)
    os.close(master)
    return process.returncode, shown


def read_terminal(master: int, process: subprocess.Popen[bytes]) -> bytes:
    """Return all that a process writes to its terminal until it ends."""
    shown = b""
    with contextlib.suppress(OSError):  # EIO: the last one has closed it
        while select.select([master], [], [], 30)[0] and (data := os.read(master, 65536)):
            shown += data
    process.wait(timeout=30)
    return shown


def run_as(
    uid: int, others: ForOtherUsers, *arguments: str | bytes, **changes: str
) -> subprocess.CompletedProcess[str]:
    """Run it as another user without any groups and return what it wrote."""
    env = environment(PYTHONPATH=str(others.directory), **changes)
    return _run(command(*arguments, python=others.python), env, uid)


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
    """Return the bytes of a path, as docs/scanning.md says they are to be had."""
    if "path_hex" in line:
        return bytes.fromhex(line["path_hex"])
    path: str = line["path"]
    return path.encode()


def verdicts(document: Sequence[dict[str, Any]]) -> dict[bytes, str]:
    return {path_of(line): line["verdict"] for line in document}
