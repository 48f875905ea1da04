"""Standard streams that are closed or full: exit statuses hold, and nothing ends in a traceback."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from typing import TYPE_CHECKING

import pytest

from fdbroker.testing import FakeBroker
from tests.cli.commands import AS_ROOT, command, environment, run
from tests.forked import CLOSED
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
    """Run the command as a shell does with these redirections, each of which closes a stream or fills it."""
    with open("/dev/full", "wb") as full:
        streams = {
            _STREAMS[each]: CLOSED if each in _CLOSING else full.fileno() for each in redirections.split()
        }
        return run(*arguments, **streams)


def run_by_shell(redirections: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Have a shell run it by its command line."""
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {redirections}', "sh", *command(*arguments)],
        env=environment(),
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        cwd="/",
        check=False,
    )


_CLOSING = {"<&-", ">&-", "2>&-"}
_STREAMS = {
    "<&-": "stdin",
    ">&-": "stdout",
    "2>&-": "stderr",
    ">/dev/full": "stdout",
    "2>/dev/full": "stderr",
}

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


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full", "<&- >&- 2>&-", "<&- 2>&-"])
def test_it_is_the_same_for_a_shell(redirection: str) -> None:
    result = run_by_shell(redirection, "exec", *NOWHERE, "/x", "--", "true")
    assert (result.returncode, result.stdout, result.stderr) == (125, "", "")


OUTPUTS: list[tuple[tuple[str, ...], int]] = [
    (("--help",), 2),
    (("policy", "schema"), 2),
    (("exec", "--help"), 125),
    (("--version",), 2),
    (("scan", "--help"), 2),
    (("policy", "check", "--help"), 2),
    (("doctor", *NOWHERE), 2),
]


@pytest.mark.parametrize(
    ("redirection", "arguments", "status"),
    [*[(">/dev/full", *each) for each in OUTPUTS], *[(">&-", *each) for each in OUTPUTS[:3]]],
)
def test_output_that_can_not_be_written_is_told_in_a_line(
    redirection: str, arguments: tuple[str, ...], status: int
) -> None:
    is_told_in_a_line(run_with(redirection, *arguments), redirection, status)


@pytest.mark.parametrize("redirection", [">/dev/full", ">&-"])
def test_that_it_can_not_be_written_is_told_by_a_shell_s_command_alike(redirection: str) -> None:
    is_told_in_a_line(run_by_shell(redirection, "--version"), redirection, 2)


def test_output_is_held_back_no_longer_than_to_the_end() -> None:
    with tempfile.TemporaryFile() as lines, open("/dev/full", "wb") as full:
        lines.write(b'{"event":"x"}\n')
        lines.seek(0)
        result = run("audit", "/dev/stdin", stdin=lines.fileno(), stdout=full.fileno())
    is_told_in_a_line(result, ">/dev/full", 2)


def is_told_in_a_line(result: subprocess.CompletedProcess[str], redirection: str, status: int) -> None:
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
    given = run_by_shell(
        "<&- 2>&-", "--socket", broker, "exec", "--connect", "--", sys.executable, "-c", program
    )
    # 0 and 2 are closed as before; what the listing opens takes the first of them.
    assert given.stdout == "['0', '1']\n"
    assert (
        "3"
        in run_with(
            "<&- 2>&-", "--socket", broker, "exec", "--connect", "--", "sh", "-c", "echo $FDBROKER_FD"
        ).stdout
    )


def test_closed_input_can_not_be_read() -> None:
    result = run_by_shell("<&-", "audit", "-")
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
