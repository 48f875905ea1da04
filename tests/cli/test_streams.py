"""Standard streams that are closed or full: exit statuses hold, and nothing ends in a traceback."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from fdbroker.testing import FakeBroker
from tests.cli.commands import AS_ROOT, command, environment
from tests.running_broker import reachable_directory

if TYPE_CHECKING:
    from collections.abc import Iterator

NOWHERE = ("--socket", "/nonexistent")


@pytest.fixture(scope="module")
def broker() -> Iterator[str]:
    with reachable_directory() as directory:
        path = str(directory / "fake")
        with FakeBroker({b"/data/a": b"first\n"}, socket_path=path):
            yield path


def run_with(redirections: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command with redirections of the shell."""
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {redirections}', "sh", *command(*arguments)],
        env=environment(),
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        cwd="/",
        check=False,
    )


ERRORS: list[tuple[tuple[str, ...], int]] = [
    (("scan", *NOWHERE, *AS_ROOT, "/home/x"), 2),
    (("scan", "--no-such-option"), 2),
    (("exec", *NOWHERE, "/x", "--", "true"), 125),
    (("cat", *NOWHERE, "/x"), 2),
    (("policy", "check", "/nonexistent"), 2),
    (("status", *NOWHERE, "--control", "/nonexistent"), 2),
    (("exec", "/nonexistent", "--", "true"), 125),
    (("exec", "--no-such-option"), 125),
]


# However the streams are, it is found out before any command begins: a few commands with each are enough.
@pytest.mark.parametrize(
    ("redirection", "arguments", "status"),
    [
        *[("2>&-", *each) for each in ERRORS],
        *[(how, *each) for how in ("2>/dev/full", "<&- >&- 2>&-", "<&- 2>&-") for each in ERRORS[:3]],
    ],
)
def test_status_is_the_documented_one_where_errors_can_not_be_told(
    redirection: str, arguments: tuple[str, ...], status: int
) -> None:
    result = run_with(redirection, *arguments)
    assert (result.returncode, result.stdout, result.stderr) == (status, "", "")


OUTPUTS: list[tuple[tuple[str, ...], int]] = [
    (("--help",), 2),
    (("policy", "schema"), 2),
    (("exec", "--help"), 125),
    (("--version",), 2),
    (("scan", "--help"), 2),
    (("policy", "check", "--help"), 2),
    (("doctor", *NOWHERE), 2),
    (("audit", "/dev/stdin"), 2),
]


@pytest.mark.parametrize(
    ("redirection", "arguments", "status"),
    [*[(">/dev/full", *each) for each in OUTPUTS], *[(">&-", *each) for each in OUTPUTS[:3]]],
)
def test_output_that_can_not_be_written_is_told_in_a_line(
    redirection: str, arguments: tuple[str, ...], status: int
) -> None:
    result = subprocess.run(
        ["sh", "-c", f'echo \'{{"event":"x"}}\' | "$@" {redirection}', "sh", *command(*arguments)],
        env=environment(),
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert result.returncode == status
    why = "Bad file descriptor" if redirection == ">&-" else "No space left on device"
    assert why in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [("cat", "/data/a"), ("ls", "/data"), ("status", "--json")])
def test_closed_output_of_what_the_broker_gives_is_told_in_a_line(
    broker: str, arguments: tuple[str, ...]
) -> None:
    result = run_with(">&-", "--socket", broker, *arguments)
    assert result.returncode == 2
    assert result.stderr.endswith("fdbroker: the output could not be written: Bad file descriptor\n")
    assert "Traceback" not in result.stderr


def test_files_and_connections_never_become_standard_streams(broker: str) -> None:
    shown = "os.listdir('/proc/self/fd')"
    program = f"import os; print(sorted(n for n in {shown} if n in {{'0', '1', '2'}}))"
    given = run_with("<&- 2>&-", "--socket", broker, "exec", "--connect", "--", sys.executable, "-c", program)
    # 0 and 2 are closed as before; what the listing opens takes the first of them.
    assert given.stdout == "['0', '1']\n"
    assert (
        "3"
        in run_with(
            "<&- 2>&-", "--socket", broker, "exec", "--connect", "--", "sh", "-c", "echo $FDBROKER_FD"
        ).stdout
    )


def test_closed_input_can_not_be_read() -> None:
    result = run_with("<&-", "audit", "-")
    assert result.returncode == 2
    assert "Bad file descriptor" in result.stderr
    assert "Traceback" not in result.stderr


def test_package_that_is_missing_is_status_2_where_nobody_can_be_told() -> None:
    program = (
        "import sys, runpy; sys.modules['click'] = None\n"
        "runpy.run_module('fdbroker.cli', run_name='__main__')"
    )
    result = subprocess.run(
        ["sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, "-c", program], env=environment(), check=False
    )
    assert result.returncode == 2
