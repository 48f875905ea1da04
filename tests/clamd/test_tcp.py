"""clamd's clients by TCP: of the loopback alone, and with no right to anything but what they send."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import re
import select
import socket
import struct
import subprocess
import time
from typing import TYPE_CHECKING, cast

import clamd
import pytest

from fdbroker.launcher.errors import LaunchError
from fdbroker.scan.service import tcp
from fdbroker.scan.service.configuration import Tcp
from fdbroker.scan.service.tcp import TcpClient, TcpListener, is_loopback, listening_socket
from tests.clamd.talks import chunks
from tests.for_other_users import copy_systemd
from tests.processes import wait_until
from tests.running_broker import reachable_directory
from tests.scan.running_scand import SCAND_UID, copy_treacherous_engine, running_scand

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from fdbroker.scan.service.core import Core
    from tests.for_other_users import ForOtherUsers
    from tests.scan.running_scand import RunningScand

pytestmark = pytest.mark.root

_CONFIGURATION = """
engines: {{treacherous: {{word: {directory}/word}}}}
listeners: {{clamd: {{protocol: clamd}}}}
tcp: {{port: {port}, connections: 3, max_stream: 1MiB, command_timeout: 1s}}
workers: 1
spare_workers: 1
"""
FOUND = b"stream: Word FOUND\0"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    with reachable_directory() as path:
        copy_treacherous_engine(path)
        (path / "word").write_bytes(b"Smoke")
        copy_systemd(path)
        yield path


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def scand(others: ForOtherUsers, directory: Path, port: int) -> Iterator[RunningScand]:
    """Run the service without a broker: nobody who comes by TCP needs one."""
    configuration = _CONFIGURATION.format(directory=directory, port=port)
    with running_scand(others, directory, configuration, str(directory / "engines")) as running:
        wait_until(lambda: f"listener tcp 127.0.0.1:{port}: serving" in running.errors(), "it serves")
        yield running


def connected(port: int) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", port), timeout=20)
    sock.settimeout(20)
    return sock


def asked(port: int, *parts: bytes) -> bytes:
    with connected(port) as sock:
        sock.sendall(b"".join(parts))
        said = b""
        with contextlib.suppress(ConnectionResetError):
            while more := sock.recv(65536):
                said += more
        return said


@pytest.mark.usefixtures("scand")
def test_clamdscan_streams_to_it_by_changing_its_configuration(port: int, directory: Path) -> None:
    configuration = directory / "client.conf"
    configuration.write_text(f"TCPSocket {port}\nTCPAddr 127.0.0.1\n")
    (directory / "bad").write_bytes(b"Smoke")
    (directory / "fine").write_bytes(b"fine")

    def run(*arguments: str) -> tuple[int, str]:
        command = ["clamdscan", f"--config-file={configuration}", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        return done.returncode, done.stdout + done.stderr

    for more in ([], ["--multiscan"]):
        said = run("--no-summary", "--stream", *more, str(directory / "bad"), str(directory / "fine"))
        assert said == (1, f"{directory}/bad: Word FOUND\n{directory}/fine: OK\n")
    assert run("--ping", "1") == (0, "PONG\n")
    assert run("--version") == (0, "ClamAV 0\n")
    # It takes an address of this machine for a clamd that can open its files.
    assert run("--no-summary", str(directory / "bad")) == (
        2,
        'Failed to parse reply: "COMMAND UNAVAILABLE"\n',
    )
    status, text = run("--reload")
    assert (status, "did not reload" in text) == (2, True)


@pytest.mark.usefixtures("scand")
def test_the_client_of_pypi_streams_to_it(port: int, directory: Path) -> None:
    client = clamd.ClamdNetworkSocket("127.0.0.1", port, timeout=20)
    assert client.ping() == "PONG"
    (directory / "bad").write_bytes(b"Smoke")
    with open(directory / "bad", "rb") as file:
        assert client.instream(file) == {"stream": ("FOUND", "Word")}


@pytest.mark.usefixtures("scand")
@pytest.mark.parametrize(
    "command",
    b"SCAN /word|CONTSCAN /|MULTISCAN /|ALLMATCHSCAN /|FILDES|RELOAD|SHUTDOWN|STATS|VERSIONCOMMANDS".split(
        b"|"
    ),
)
def test_whoever_is_there_may_ask_for_nothing_else(port: int, command: bytes) -> None:
    assert asked(port, b"z" + command + b"\0") == b"COMMAND UNAVAILABLE\0"


def test_a_file_in_one_connection_changes_no_verdict_in_another(port: int, scand: RunningScand) -> None:
    """Here nobody knows whether two connections are one client's."""
    with connected(port) as sock:
        for number, (content, answer) in enumerate(
            [(b"Smoke", b"Word FOUND"), (b"turn", b"OK"), (b"Smoke", b"OK")], 1
        ):
            sock.sendall((b"zIDSESSION\0" if number == 1 else b"") + b"zINSTREAM\0" + chunks(content))
            # Within one it may: the engine was turned.
            assert sock.recv(100) == b"%d: stream: " % number + answer + b"\0"
        assert asked(port, b"zINSTREAM\0", chunks(b"Smoke")) == FOUND
        sock.sendall(b"zINSTREAM\0" + chunks(b"Smoke"))
        assert sock.recv(100) == b"4: stream: Word FOUND\0", "the other one had its worker"
    assert re.search(
        r"fdbroker-scand: tcp 127\.0\.0\.1:[0-9]+: instream\(local\): Word FOUND", scand.errors()
    )


def test_connections_have_limits_and_more_of_them_wait(port: int, scand: RunningScand) -> None:
    idle = scand.descriptors()
    too_long = asked(port, b"zINSTREAM\0" + struct.pack("!I", (1 << 20) + 1))
    assert too_long == b"INSTREAM size limit exceeded. ERROR\0"
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(connected(port)) for _ in range(3)]
        began = time.monotonic()
        # A fourth has its turn when one of these is told that it is too late.
        assert asked(port, b"zPING\0") == b"PONG\0"
        assert time.monotonic() - began > 0.5
        assert {sock.recv(100) for sock in silent} == {b"COMMAND READ TIMED OUT\n"}
    wait_until(lambda: scand.descriptors() <= idle, "its descriptors are closed")


def test_who_is_quiet_longest_gives_way_where_all_connections_are_taken(
    others: ForOtherUsers, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tcp, "_SECONDS_OF_GRACE", 0.3)
    port = free_port()
    configuration = _CONFIGURATION.format(directory=directory, port=port)
    configuration = configuration.replace("command_timeout: 1s", "command_timeout: 60s")
    with (
        running_scand(others, directory, configuration, str(directory / "engines")),
        contextlib.ExitStack() as stack,
    ):
        busy, in_a_stream, silent = (stack.enter_context(connected(port)) for _ in range(3))
        busy.sendall(b"zINSTREAM\0" + chunks(b"hang"))
        in_a_stream.sendall(b"zIDSESSION\0zPING\0")
        assert in_a_stream.recv(100) == b"1: PONG\0"
        in_a_stream.sendall(b"zINSTREAM\0" + struct.pack("!I", 100))
        # It came before, and has said nothing since; then it is the other one's turn.
        for sock in (silent, in_a_stream):
            assert asked(port, b"zPING\0") == b"PONG\0"
            stack.enter_context(connected(port))
            assert sock.recv(100) == b"COMMAND READ TIMED OUT\n"
        assert not select.select([busy], [], [], 0)[0], "who waits for the service was sent away"


@pytest.mark.parametrize(
    ("state", "its_turn"),
    [
        ({}, True),
        ({"_commands": {1: None}}, False),  # a file is scanned
        ({"_reading": False}, False),  # there is no room for more of a stream
        ({"_commands": {1: None}, "_write_timer": 1}, True),  # it does not read what it was told
        # It was told all: a moment later it is closed, whether it closes or not.
        ({"_reading": False, "_closed": True}, False),
    ],
)
def test_who_gives_way_is_waited_for(state: dict[str, object], *, its_turn: bool) -> None:
    client = TcpClient.__new__(TcpClient)
    usual = {"_last_moved": 5.0, "_reading": True, "_commands": {}, "_write_timer": None, "_closed": False}
    for name, value in (usual | state).items():
        setattr(client, name, value)
    assert client.waits_for_it_since == (5.0 if its_turn else None)


# ---- the socket ----


def passed_to(others: ForOtherUsers, directory: Path, listener: socket.socket) -> tuple[int, str]:
    """Start the service as systemd does with a socket, and ask it; return its status and what it said."""
    (directory / "with-socket.yaml").write_text(
        f"version: 1\nbroker: {directory}/none\nengines: {{hashes: {{}}}}\ntcp: {{}}\n"
    )
    number = listener.fileno()
    # The number that systemd begins with, and the pid that only the process itself knows.
    start = (
        f"import os, sys; os.dup2({number}, 3); os.environ['LISTEN_PID'] = str(os.getpid());"
        " os.execv(sys.argv[1], sys.argv[1:])"
    )
    configuration = str(directory / "with-socket.yaml")
    command = [others.python, "-P", "-m", "fdbroker.scan.service", "--config", configuration, "--dev"]
    process = subprocess.Popen(
        [others.python, "-I", "-c", start, *command],
        env={
            "PYTHONPATH": f"{others.directory}:{directory}/packages",
            "PATH": os.environ["PATH"],
            "LISTEN_FDS": "1",
            "LISTEN_FDNAMES": "clamd-tcp",
        },
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        pass_fds=[number],
        user=SCAND_UID,
        group=SCAND_UID,
        extra_groups=[],
        text=True,
    )
    try:
        try:
            assert asked(int(listener.getsockname()[1]), b"zPING\0") == b"PONG\0"
        finally:
            process.terminate()
        _, said = process.communicate(timeout=20)
    finally:
        process.kill()
        process.wait()
    return process.returncode, said


def test_the_service_manager_may_pass_the_socket(others: ForOtherUsers, directory: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        status, said = passed_to(others, directory, listener)
        assert (status, "listener tcp 127.0.0.1:" in said) == (0, True)


def refusal(tcp: Tcp | None, *passed: socket.socket, name: str = "clamd-tcp") -> str:
    numbers = {os.dup(sock.fileno()): name for sock in passed}
    with pytest.raises(LaunchError) as raised:
        listening_socket(tcp, numbers)
    for number in numbers:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(number)
    return str(raised.value)


def test_what_is_no_socket_of_the_loopback_is_refused(tmp_path: Path) -> None:
    with socket.create_server(("0.0.0.0", 0)) as everywhere, socket.create_server(("127.0.0.1", 0)) as ours:  # noqa: S104 - refused
        text = refusal(None, everywhere)
        assert re.search(
            r"0\.0\.0\.0:[0-9]+ is no loopback address, and nobody is asked who they are; write", text
        )
        text = refusal(Tcp(), ours, name="clamd")
        assert "socket 'clamd' of systemd: the scan service takes 'clamd-tcp' alone" in text
        assert "systemd passed 2 sockets 'clamd-tcp'" in refusal(Tcp(), ours, ours)
        assert "tcp: port: systemd has passed a socket" in refusal(Tcp(port=3310), ours)
        taken = int(ours.getsockname()[1])
        text = refusal(Tcp(port=taken))
        assert text == (
            f"tcp: it can't listen at 127.0.0.1:{taken}: Address already in use; is clamd still running?"
        )
    with socket.socket() as silent, socket.socket(socket.AF_UNIX) as local:
        silent.bind(("127.0.0.1", 0))
        assert "it does not listen; set Accept=no" in refusal(Tcp(), silent)
        assert "it is no TCP socket" in refusal(Tcp(), local)
    with open(tmp_path / "file", "wb") as file:
        number = os.dup(file.fileno())
        with pytest.raises(LaunchError, match="it is no socket"):
            listening_socket(Tcp(), {number: "clamd-tcp"})
    assert "enable and start fdbroker-clamd-tcp.socket, or write port: 3310" in refusal(Tcp())
    assert listening_socket(None, {}) is None


def test_the_second_of_two_answers_waits_for_no_acknowledgement() -> None:
    """It would take 40 ms each time. What is accepted has the option of the listener."""
    with socket.create_server(("127.0.0.1", 0)) as passed:
        for listener in (
            listening_socket(Tcp(port=free_port()), {}),
            listening_socket(Tcp(), {os.dup(passed.fileno()): "clamd-tcp"}),
        ):
            assert listener is not None
            with listener, socket.create_connection(listener.getsockname()):
                listener.settimeout(20)
                with listener.accept()[0] as accepted:
                    assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_where_the_unit_has_no_network_it_is_said_what_to_do() -> None:
    """Here by there being no such address, and not by RestrictAddressFamilies=."""
    with pytest.raises(LaunchError, match=r"remove address and port, and enable fdbroker-clamd-tcp\.socket"):
        listening_socket(Tcp(address="::2", port=free_port()), {})


# ---- accepting ----


class _Failing(socket.socket):
    """Has no descriptor for the first that comes."""

    failures = 1

    def accept(self) -> tuple[socket.socket, object]:
        if self.failures:
            self.failures -= 1
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return super().accept()


def said_to_who_is_not_ours(listening: socket.socket) -> bytes:
    """Listen by a socket for who is not on this machine, as far as can be told; return what is said."""

    async def listen() -> bytes:
        # Of the service nothing is needed before somebody is taken.
        listener = TcpListener(cast("Core", None), listening, Tcp())
        try:
            reader, writer = await asyncio.open_connection(*listening.getsockname())
            try:
                return await asyncio.wait_for(reader.read(), 20)
            finally:
                writer.close()
        finally:
            listener.close()

    with listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        listening.settimeout(0)
        return asyncio.run(listen())


def test_who_is_not_on_this_machine_is_sent_away(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the kernel lets others reach loopback addresses, by net.ipv4.conf.*.route_localnet."""
    monkeypatch.setattr(tcp, "is_loopback", lambda _: False)
    assert said_to_who_is_not_ours(socket.socket()) == b""
    assert re.search(r"refused: 127\.0\.0\.1:[0-9]+ is not on this machine", capsys.readouterr().err)


def test_who_comes_when_there_is_no_descriptor_waits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tcp, "is_loopback", lambda _: False)
    monkeypatch.setattr(tcp, "_SECONDS_WITHOUT_DESCRIPTORS", 0.01)
    assert said_to_who_is_not_ours(_Failing()) == b""
    said = capsys.readouterr().err
    assert said.index("could not be accepted: Too many open files") < said.index("is not on this machine")


def test_the_addresses_of_the_loopback_are_told_from_others() -> None:
    assert all(map(is_loopback, ["127.0.0.1", "127.8.8.8", "::1"]))
    assert not any(map(is_loopback, ["0.0.0.0", "::", "10.0.0.1", "fe80::1%lo", "192.0.2.1"]))  # noqa: S104
