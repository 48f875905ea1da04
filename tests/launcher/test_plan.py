"""What is served, from command line, policy and what systemd passed: never nothing, never something else."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

import fdbroker
from fdbroker.client import control
from tests.launcher.starting import command, lay_out, started
from tests.running_broker import launcher_environment, reachable_directory

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.root

# Becomes what follows with a socket on 3, passed as a service manager passes it.
PASSING = """
import os, sys
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1", "LISTEN_FDNAMES": sys.argv[1]}
os.dup2(int(sys.argv[2]), 3)
os.execv(sys.argv[3], sys.argv[3:])
"""


@pytest.fixture
def directory() -> Iterator[Path]:
    with reachable_directory() as path:
        lay_out(path)
        (path / "run").mkdir()
        yield path


@pytest.fixture
def listener(directory: Path) -> Iterator[socket.socket]:
    """Return the socket `passed`, where systemd would listen."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.bind(str(directory / "run/passed"))
        sock.listen()
        yield sock


def passing(name: str, listener: socket.socket) -> list[str]:
    return [sys.executable, "-c", PASSING, name, str(listener.fileno())]


def refused(directory: Path, listener: socket.socket, name: str, *options: str) -> str:
    with listener:
        done = subprocess.run(
            [*passing(name, listener), *command(directory / "policy.yaml", "--audit=none", *options)],
            env=launcher_environment(),
            pass_fds=[listener.fileno()],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=20,
        )
    assert done.returncode == 2, done.stderr
    assert os.listdir(directory / "run") == ["passed"]
    return done.stderr


def test_a_control_socket_alone_is_nothing_to_serve(directory: Path, listener: socket.socket) -> None:
    text = refused(directory, listener, "control")
    assert text == (
        "fdbroker: there is nothing to serve: systemd passed no socket for requests; start the .socket unit"
        " with FileDescriptorName=seqpacket as well, or give --socket\n"
    )


@pytest.mark.parametrize("option", ["--control=none", "--control={}/run/other"])
def test_another_control_socket_than_the_one_that_was_passed_is_refused(
    directory: Path, listener: socket.socket, option: str
) -> None:
    text = refused(directory, listener, "control", f"--socket={directory}/run/s", option.format(directory))
    assert text == (
        "fdbroker: systemd passed a control socket, and --control says otherwise; leave --control out, or"
        " stop and disable that .socket unit\n"
    )


def test_a_socket_that_is_named_is_served_besides_a_control_socket_that_was_passed(
    directory: Path, listener: socket.socket
) -> None:
    options = ["--audit=none", f"--socket={directory}/run/s", "--socket-mode=666"]
    number = listener.fileno()
    with (
        listener,
        started(
            directory / "policy.yaml", *options, prefix=passing("control", listener), pass_fds=[number]
        ) as process,
    ):
        with control.connect(directory / "run/passed") as client:
            assert client.status()["pid"] == process.pid
        with (
            fdbroker.connect(directory / "run/s") as requests,
            requests.open(directory / "tree/file") as file,
        ):
            assert file.read() == b"content"


@pytest.mark.parametrize("where", ["none", "other"])
def test_a_control_socket_that_is_named_is_made_besides_a_socket_for_requests_that_was_passed(
    directory: Path, listener: socket.socket, where: str
) -> None:
    path = where if where == "none" else str(directory / "run" / where)
    number = listener.fileno()
    with (
        listener,
        started(
            directory / "policy.yaml",
            "--audit=none",
            f"--control={path}",
            prefix=passing("seqpacket", listener),
            pass_fds=[number],
        ),
        fdbroker.connect(directory / "run/passed") as client,
        client.open(directory / "tree/file") as file,
    ):
        assert file.read() == b"content"
        assert (directory / "run/other").exists() == (where == "other")
