"""`fdbroker exec`: a program with a file, or with a connection, and nothing else."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import click
import pytest

from fdbroker import Client, Reason
from fdbroker.cli.exec import command
from fdbroker.testing import FakeBroker
from tests.cli.commands import command as command_line
from tests.cli.commands import environment, run, run_as
from tests.running_broker import CLIENT_UID, policy, reachable_directory, running_broker

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.for_other_users import ForOtherUsers

FILES: dict[str, bytes | Reason | OSError] = {"/data/a": b"first\n", "/data/secret": Reason.DENIED}


@pytest.fixture(scope="module")
def broker() -> Iterator[str]:
    with reachable_directory() as directory, FakeBroker(FILES, socket_path=str(directory / "fake")):
        yield str(directory / "fake")


def test_program_reads_the_file_from_its_standard_input(broker: str) -> None:
    result = run("exec", "--socket", broker, "/data/a", "--", "cat", "-n")
    assert (result.returncode, result.stdout, result.stderr) == (0, "     1\tfirst\n", "")


def test_program_gets_the_file_as_the_descriptor_that_was_asked_for(broker: str) -> None:
    result = run("exec", "--socket", broker, "--fd", "7", "/data/a", "--", "sh", "-c", "cat <&7; cat")
    assert (result.returncode, result.stdout) == (0, "first\n")


def test_program_takes_the_place_of_the_command_and_has_nothing_more(broker: str) -> None:
    # Not Python, which would ignore signals itself: the shell says what it was given.
    # No pipes within: the shell has their ends open for a moment.
    shell = "echo $$; ls /proc/$$/fd; echo ${FDBROKER_FD-none}; grep SigIgn /proc/$$/status"
    process = subprocess.Popen(
        command_line("exec", "--socket", broker, "/data/a", "--", "sh", "-c", shell),
        env=environment(FDBROKER_FD="99"),
        stdout=subprocess.PIPE,
        encoding="utf-8",
    )
    output, _ = process.communicate(timeout=60)
    pid, *descriptors, variable, ignored = output.splitlines()
    assert int(pid) == process.pid
    assert descriptors == ["0", "1", "2"]
    assert variable == "none"
    assert int(ignored.split()[1], 16) & (1 << signal.SIGPIPE - 1 | 1 << signal.SIGXFSZ - 1) == 0


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("/data/a", "--", "sh", "-c", "exit 7"), 7, ""),
        (("/data/a", "--", "no-such-program"), 127, "no-such-program: No such file or directory"),
        (("/data/a", "--", "/etc/passwd"), 126, "/etc/passwd: Permission denied"),
        (("/data/secret", "--", "true"), 125, "fdbroker policy explain --policy FILE /data/secret"),
        (("/data/none", "--", "true"), 125, "there is no such file"),
        (("/data/a",), 125, "which PROGRAM?"),
        ((), 125, "which PATH"),
        (("--connect",), 125, "fdbroker exec --connect -- PROGRAM"),
        (("/data/a", "cat", "-n"), 125, "Write -- before PROGRAM"),
        (("--fd", "x", "/data/a", "--", "cat"), 125, "--fd"),
        (("--fd", "1023", "/data/a", "--", "true"), 0, ""),
    ],
)
def test_exit_status_tells_the_program_from_the_command(
    broker: str, arguments: tuple[str, ...], status: int, said: str
) -> None:
    # A directory of PATH that is closed to this user would make "not found" a "may not be run".
    result = run("exec", "--socket", broker, *arguments, env=environment(PATH="/usr/bin:/bin"))
    assert result.returncode == status, result.stderr
    assert said in result.stderr
    assert "Traceback" not in result.stderr


def test_descriptor_beyond_the_limit_is_told(broker: str) -> None:
    result = subprocess.run(
        [
            *("sh", "-c", 'ulimit -n 64; exec "$@"', "sh"),
            *command_line("exec", "--socket", broker, "--fd", "100", "/data/a", "--", "true"),
        ],
        env=environment(),
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert result.returncode == 125
    assert result.stderr == (
        "fdbroker: descriptor 100 can't be used: Bad file descriptor; give a lower one with --fd, or"
        " allow more open files (ulimit -n)\n"
    )


def test_unforeseen_failure_is_not_taken_for_a_status_of_the_program(broker: str) -> None:
    program = (
        "import sys; from fdbroker.cli import exec as e, main as m\n"
        "e._give_file = lambda *arguments: 1 / 0\n"
        f"sys.exit(m.main(['exec', '--socket', {broker!r}, '/data/a', '--', 'true']))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, encoding="utf-8", check=False
    )
    assert result.returncode == 125
    assert "ZeroDivisionError" in result.stderr


class Became(Exception):
    """Raised instead of execve."""


@pytest.fixture
def became(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Have the command stop where it would become the program, and return what it would be."""
    seen: dict[str, Any] = {"restored": []}

    def execute(program: str, arguments: list[str], environment: dict[str, str]) -> None:
        seen.update(program=program, arguments=arguments, environment=environment)
        raise Became

    monkeypatch.setattr(os, "execvpe", execute)
    monkeypatch.setattr(signal, "signal", lambda number, _how: seen["restored"].append(number))
    return seen


def test_program_is_found_by_the_path_with_its_arguments_and_the_environment(
    broker: str, became: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FDBROKER_FD", "99")
    monkeypatch.setenv("KEPT", "yes")
    with pytest.raises(Became):
        _exec("--socket", broker, "--fd", "70", "/data/a", "--", "program", "-x", "--connect")
    try:
        assert os.read(70, 100) == b"first\n"
        assert os.get_inheritable(70)
    finally:
        os.close(70)
    assert became["program"] == "program"
    assert became["arguments"] == ["program", "-x", "--connect"]
    assert became["environment"]["KEPT"] == "yes"
    assert "FDBROKER_FD" not in became["environment"]
    assert became["restored"] == [signal.SIGPIPE, signal.SIGXFSZ]


@pytest.mark.parametrize("options", [(), ("--fd", "71")])
def test_connection_is_announced_and_nothing_was_said_on_it(
    broker: str, became: dict[str, Any], options: tuple[str, ...]
) -> None:
    with pytest.raises(Became):
        _exec("--connect", *options, "--socket", broker, "--", "program")
    number = int(became["environment"]["FDBROKER_FD"])
    with socket.socket(fileno=number) as connection:
        assert connection.get_inheritable()
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, 16) == b"\0" * 16
        with Client.from_socket(connection) as client, client.open("/data/a") as file:
            assert file.read() == b"first\n"
    assert not options or number == 71


def _exec(*arguments: str) -> None:
    """Call the command itself: its group would take the exception for a failure."""
    context = command.make_context("exec", list(arguments))
    with context:
        click.Command.invoke(command, context)


INDEXER = """
import os, socket, subprocess, sys
import fdbroker
connection = socket.socket(fileno=int(os.environ["FDBROKER_FD"]))
if len(sys.argv) > 2:
    child = subprocess.run([sys.executable, *sys.argv[:2]], pass_fds=[connection.fileno()])
    connection.detach()
    sys.exit(child.returncode)
with fdbroker.Client.from_socket(connection) as client, client.open(sys.argv[1]) as file:
    print(file.read().decode(), os.getppid())
"""


@pytest.mark.root
def test_program_of_an_unprivileged_user_gets_its_own_connection(others: ForOtherUsers) -> None:
    with reachable_directory() as directory:
        (directory / "tree").mkdir(mode=0o700)
        (directory / "tree" / "file").write_bytes(b"contents")
        script = directory / "indexer.py"
        script.write_text(INDEXER)
        file = str(directory / "tree" / "file")
        arguments = ("--", others.python, "-P", str(script), file)
        with running_broker(directory, policy(directory / "tree")) as running:
            socket_option = ("--socket", str(running.socket))
            result = run_as(CLIENT_UID, others, "exec", "--connect", *socket_option, *arguments)
            numbered = run_as(
                CLIENT_UID, others, "exec", "--connect", "--fd", "9", *socket_option, *arguments
            )
            other = run_as(CLIENT_UID, others, "exec", "--connect", *socket_option, *arguments, "in a child")
            decisions = running.decisions()
        # Without the broker's help it may not even look.
        refused = run_as(CLIENT_UID, others, "exec", "--connect", *socket_option, *arguments)
    assert (result.returncode, result.stdout) == (0, f"contents {os.getpid()}\n"), result.stderr
    assert (numbered.returncode, numbered.stdout) == (0, f"contents {os.getpid()}\n"), numbered.stderr
    assert other.returncode == 1
    assert "connect anew" in other.stderr
    assert [(record["uid"], record["decision"]) for record in decisions] == [(CLIENT_UID, "allow")] * 2
    assert refused.returncode == 125
