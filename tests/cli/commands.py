"""Running the `fdbroker` command, as a process or within this one, as some user."""

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
from tests.for_other_users import import_from_copy
from tests.forked import fork_program, run_forked
from tests.processes import become_started
from tests.running_broker import launcher_environment
from tests.sandbox.confined import WORKER_UID

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from tests.for_other_users import ForOtherUsers
    from tests.forked import ForkedProcess

AS_ROOT = ("--worker-uid", str(WORKER_UID))


def command(*arguments: str | bytes, python: str = sys.executable) -> list[str | bytes]:
    return [python, "-P", "-m", "fdbroker.cli", *arguments]


def environment(**changes: str) -> dict[str, str]:
    return {**launcher_environment(), "LANG": "C.UTF-8", **changes}


def start(*arguments: str | bytes, stdout: int, stderr: int, **how: Any) -> ForkedProcess:  # noqa: ANN401 - see there
    """Start it in a forked child: all of it but for an interpreter's start and imports, ten times as long.

    `how`: other streams, and `pass_fds`, as `fork_program` has them; the rest as `_as_started`.
    """
    main, streams = _as_started(arguments, **how)
    return fork_program(main, "fdbroker", stdout=stdout, stderr=stderr, **streams)


def _as_started(
    arguments: Sequence[str | bytes],
    *,
    env: Mapping[str, str] | None = None,
    cwd: str = "/",
    uid: int | None = None,
    others: ForOtherUsers | None = None,
    **streams: Any,  # noqa: ANN401 - given back
) -> tuple[Callable[[], int], dict[str, Any]]:
    """Return what is the command, once it is run in a forked child, and `streams`.

    As `uid`, without any groups, it imports from the copy of `others`.
    """

    def be_the_command() -> int:
        os.environ.clear()
        os.environ.update(environment() if env is None else env)
        os.chdir(cwd)
        if others is not None:
            import_from_copy(others)
        if uid is not None:
            become_started(uid)
        return main([os.fsdecode(argument) for argument in arguments])

    return be_the_command, streams


def run(*arguments: str | bytes, **how: Any) -> subprocess.CompletedProcess[str]:  # noqa: ANN401 - as of `start`
    """Run it as `start` does, and return what it wrote."""
    done = run_bytes(*arguments, **how)
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def run_bytes(*arguments: str | bytes, **how: Any) -> subprocess.CompletedProcess[bytes]:  # noqa: ANN401 - likewise
    """Run it as `start` does, and return the very bytes that it wrote, but for a stream that is given."""
    main, streams = _as_started(arguments, **how)
    return run_forked(main, "fdbroker", **streams)


def run_program(
    *arguments: str | bytes, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run it by its command line, in an interpreter of its own, and return what it wrote."""
    return subprocess.run(
        command(*arguments),
        env=env or environment(),
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        cwd="/",
        check=False,
    )


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


def run_on_terminal(*arguments: str | bytes, **changes: str) -> tuple[int, bytes]:
    """Run it with standard output and error on a terminal; return its status and what it showed."""
    return _on_terminal(arguments, changes)


def run_on_terminal_as(uid: int, others: ForOtherUsers, *arguments: str | bytes) -> tuple[int, bytes]:
    """Do the same as another user without any groups."""
    return _on_terminal(arguments, {}, uid=uid, others=others)


def _on_terminal(
    arguments: Sequence[str | bytes],
    changes: Mapping[str, str],
    **how: Any,  # noqa: ANN401 - as of `start`
) -> tuple[int, bytes]:
    master, terminal = os.openpty()
    env = environment(**{"TERM": "xterm", "COLUMNS": "100", **changes})
    process = start(*arguments, env=env, stdout=terminal, stderr=terminal, **how)
    os.close(terminal)
    shown = read_terminal(master, process)
    os.close(master)
    return process.wait(), shown


def read_terminal(master: int, process: subprocess.Popen[bytes] | ForkedProcess) -> bytes:
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
    """Run it as `start` does, as another user without any groups, and return what it wrote."""
    env = environment(PYTHONPATH=str(others.directory), **changes)
    return run(*arguments, env=env, uid=uid, others=others)


def run_program_as(
    uid: int, others: ForOtherUsers, *arguments: str | bytes
) -> subprocess.CompletedProcess[str]:
    """Run it by its command line, as another user without any groups, and return what it wrote."""
    return subprocess.run(
        command(*arguments, python=others.python),
        env=environment(PYTHONPATH=str(others.directory)),
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        user=uid,
        group=uid,
        extra_groups=(),
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
