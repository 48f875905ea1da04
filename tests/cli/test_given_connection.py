"""`fdbroker --fd`: on a connection that was made before."""

from __future__ import annotations

import os
import socket
import subprocess
from typing import TYPE_CHECKING

import pytest

from fdbroker.testing import FakeBroker
from tests.cli.commands import command, environment, run, run_here
from tests.running_broker import reachable_directory

if TYPE_CHECKING:
    from collections.abc import Iterator

FILES = {"/data/a": b"first\n", "/data/b": b"second\n"}


@pytest.fixture(scope="module")
def broker() -> Iterator[str]:
    with reachable_directory() as directory, FakeBroker(FILES, socket_path=str(directory / "fake")):
        yield str(directory / "fake")


def connected(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.connect(path)
    return sock


def run_with(
    descriptors: tuple[int, ...], *arguments: str, **changes: str
) -> subprocess.CompletedProcess[str]:
    given = ("--fd", ",".join(map(str, descriptors)))
    return run(*given, *arguments, env=environment(**changes), pass_fds=descriptors)


@pytest.mark.parametrize(
    ("arguments", "output"),
    [
        (("cat", "/data/a", "/data/b"), "first\nsecond\n"),
        (("ls", "/data"), "a\nb\n"),
        (("exec", "/data/b", "--", "cat"), "second\n"),
    ],
)
@pytest.mark.parametrize("two", [False, True])
def test_commands_use_the_connection_that_is_there(
    broker: str, arguments: tuple[str, ...], output: str, *, two: bool
) -> None:
    with connected(broker) as sock, sock.dup() as same:
        descriptors = (sock.fileno(), same.fileno()) if two else (sock.fileno(),)
        # The environment names a broker that is meant where nothing else is said.
        result = run_with(descriptors, *arguments, FDBROKER_SOCKET="/nowhere")
    assert (result.returncode, result.stdout, result.stderr) == (0, output, "")


def test_status_is_that_of_the_connection(broker: str) -> None:
    with connected(broker) as sock:
        result = run_with((sock.fileno(),), "status", "--json", FDBROKER_CONTROL="/nowhere")
        number = sock.fileno()
    assert result.returncode == 0
    assert result.stdout.startswith("{")
    assert f"only descriptor {number} was asked" in result.stderr


def test_a_connection_on_standard_input_is_taken(broker: str) -> None:
    with connected(broker) as sock:
        result = subprocess.run(
            command("--fd", "0", "cat", "/data/a"),
            env=environment(),
            stdin=sock.fileno(),
            capture_output=True,
            timeout=60,
            check=False,
        )
    assert (result.returncode, result.stdout, result.stderr) == (0, b"first\n", b"")


def test_a_program_gets_the_file_alone_or_the_connection_alone(broker: str) -> None:
    # No pipe within: the shell has its ends open for a moment.
    shell = "ls /proc/$$/fd; readlink /proc/$$/fd/9"
    with connected(broker) as sock, sock.dup() as same:
        both = (sock.fileno(), same.fileno())
        result = run_with(both, "exec", "--fd", "9", "/data/a", "--", "sh", "-c", shell)
    assert result.stdout.split()[:4] == ["0", "1", "2", "9"]
    assert "socket" not in result.stdout
    with connected(broker) as sock, sock.dup() as same:
        both = (sock.fileno(), same.fileno())
        result = run_with(both, "exec", "--connect", "--fd", "9", "--", "sh", "-c", shell)
    assert result.stdout.split()[:4] == ["0", "1", "2", "9"]
    assert "socket:" in result.stdout


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not one number of a descriptor, or two"),
        ("6,7,8", "not one number of a descriptor, or two"),
        ("-1", "not one number of a descriptor, or two"),
        ("6,", "not one number of a descriptor, or two"),
        ("six", "not one number of a descriptor, or two"),
        ("²", "not one number of a descriptor, or two"),
        ("99999999999", "no descriptors of such numbers"),
        ("1023", "descriptor 1023 is not open (Bad file descriptor)"),
        ("9999999", "descriptor 9999999 is not open"),
    ],
)
def test_what_is_no_descriptor_is_told(text: str, said: str) -> None:
    result = run_here("--fd", text, "cat", "/data/a")
    assert (result.returncode, result.stdout) == (2, "")
    assert said in result.stderr


def test_what_is_no_socket_is_told() -> None:
    read_end, write_end = os.pipe()
    try:
        result = run_with((read_end,), "cat", "/data/a")
    finally:
        os.close(read_end)
        os.close(write_end)
    assert result.returncode == 2
    assert f"descriptor {read_end} is no socket" in result.stderr


def test_two_sockets_are_not_taken_for_one(broker: str) -> None:
    with connected(broker) as first, connected(broker) as second:
        result = run_with((first.fileno(), second.fileno()), "cat", "/data/a")
    assert result.returncode == 2
    assert "are two sockets" in result.stderr


def test_a_socket_of_another_family_is_told() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        result = run_with((sock.fileno(),), "cat", "/data/a")
        number = sock.fileno()
    assert result.returncode == 2
    assert f"--fd {number}: " in result.stderr
    assert "Traceback" not in result.stderr


def test_another_end_that_has_hung_up_is_told() -> None:
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    there.close()
    with here:
        result = run_with((here.fileno(),), "cat", "/data/a")
        number = here.fileno()
    assert result.returncode == 2
    assert f"fdbroker: descriptor {number}: " in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("--fd", "6", "--socket", "/nowhere", "cat", "/data/a"),
        ("--fd", "6", "cat", "--socket", "/nowhere", "/data/a"),
    ],
)
def test_a_socket_besides_the_connection_is_wrong_use(arguments: tuple[str, ...]) -> None:
    result = run_here(*arguments)
    assert result.returncode == 2
    assert "--fd has a connection, and --socket names where to make one" in result.stderr


def test_doctor_does_not_take_it() -> None:
    result = run_here("--fd", "6", "doctor")
    assert result.returncode == 2
    assert "leave --fd away" in result.stderr


def test_exec_tells_its_own_failure_from_the_program_s() -> None:
    result = run_here("--fd", "1023", "exec", "/data/a", "--", "true")
    assert result.returncode == 125
    assert "is not open" in result.stderr
