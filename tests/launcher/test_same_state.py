"""By hand, in the background, by systemd as root or without: the broker is the same process in the end."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fdbroker.client import control
from tests.launcher.installed import directory_of_root, installed
from tests.launcher.starting import command, run, started, state_of
from tests.processes import has_ended, wait_until
from tests.running_broker import BROKER_UID, launcher_environment

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

pytestmark = pytest.mark.root

EXPECTED = (Path(__file__).parent / "expected_state.txt").read_text()
AS_A_SERVICE = str(Path(__file__).parent / "as_a_service.py")


@pytest.fixture
def directory() -> Iterator[Path]:
    with directory_of_root() as path:
        yield path


@pytest.fixture(scope="module")
def installation() -> Iterator[Path]:
    with installed() as programs:
        yield programs


def listen_for_notifications(directory: Path) -> socket.socket:
    """Return what NOTIFY_SOCKET names."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.settimeout(20)
    sock.bind(str(directory / "notify"))
    (directory / "notify").chmod(0o777)
    return sock


def differences(process: int, directory: Path) -> list[str]:
    """Return in what the process is other than committed: lines that are missing, and additional ones."""
    expected = Counter(EXPECTED.replace("{uid}", str(BROKER_UID)).splitlines())
    present = Counter(state_of(process, directory).splitlines())
    missing, more = expected - present, present - expected
    return [*(f"missing: {line}" for line in missing.elements()), *more.elements()]


def test_by_hand(directory: Path, installation: Path) -> None:
    environment = {
        "NOTIFY_SOCKET": str(directory / "notify"),
        "LD_LIBRARY_PATH": "/x",
        "PYTHONWARNINGS": "default",
    }
    options = [f"--audit={directory}/audit", f"--pidfile={directory}/run/pid"]
    with (
        listen_for_notifications(directory) as notify,
        started(directory / "policy.yaml", *options, env=environment, installation=installation) as process,
    ):
        assert notify.recv(1000).startswith(b"READY=1")
        assert differences(process.pid, directory) == [
            "descriptor 1: /dev/null (both)",
            "descriptor 2: {directory}/errors (write)",
            "descriptor: dgram (both)",
            "descriptor: {directory}/audit (write)",
            "descriptor: {directory}/run/pid (read)",
        ]


def test_in_the_background(directory: Path, installation: Path) -> None:
    options = ["--daemon", f"--audit={directory}/audit", f"--pidfile={directory}/run/pid"]
    done = run(directory / "policy.yaml", *options, installation=installation)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    pid = int((directory / "run" / "pid").read_text())
    try:
        assert differences(pid, directory) == [
            "descriptor 1: /dev/null (both)",
            "descriptor 2: pipe:[N] (write)",
            "descriptor: {directory}/audit (write)",
            "descriptor: {directory}/run/pid (read)",
        ]
        # Detached: in a session that it does not lead, so that it can't get a terminal.
        assert os.getsid(pid) not in {os.getsid(0), pid}
    finally:
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: has_ended(pid), "the broker has ended")


ORDERS = [("requests", "control"), ("control", "requests")]
NAMES = {"requests": "seqpacket", "control": "control"}


@contextlib.contextmanager
def activated(
    directory: Path, order: Sequence[str], program: Sequence[str], stdout: int
) -> Iterator[subprocess.Popen[bytes]]:
    """Run `program` by systemd-socket-activate, once somebody connects; check that it stops well."""
    run_directory = directory / "run"
    run_directory.mkdir()
    environment = launcher_environment()
    activate = [
        "systemd-socket-activate",
        "--seqpacket",
        f"--fdname={':'.join(NAMES[name] for name in order)}",
    ]
    activate += [f"--listen={run_directory}/{name}" for name in order]
    activate += [
        f"--setenv=PYTHONPATH={environment['PYTHONPATH']}",
        f"--setenv=NOTIFY_SOCKET={directory}/notify",
    ]
    with open(directory / "errors", "wb") as errors:
        process = subprocess.Popen(
            [*activate, *program],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=errors,
        )
    try:
        for name in order:
            wait_until(functools.partial(listens, run_directory / name), "systemd-socket-activate listens")
        yield process
    finally:
        process.terminate()
        status = process.wait(timeout=20)
    assert status == 0, (directory / "errors").read_text()


def listens(path: Path) -> bool:
    """Return whether a socket takes connections, which it does not as soon as it is bound."""
    lines = Path("/proc/net/unix").read_text().splitlines()
    return any(line.split()[3] == "00010000" and line.endswith(f" {path}") for line in lines[1:])


def start_by_connecting(directory: Path, pid: int) -> None:
    """Make a connection, which starts the broker, and wait until it is gone there as well."""
    with control.connect(directory / "run" / "control") as client:
        assert client.status()["pid"] == pid
    wait_until(lambda: "[pidfd]" not in state_of(pid, directory), "the connection is gone")


@pytest.mark.parametrize("order", ORDERS)
def test_by_systemd_as_root(directory: Path, installation: Path, order: Sequence[str]) -> None:
    program = command(directory / "policy.yaml", f"--audit={directory}/audit", installation=installation)
    with (
        listen_for_notifications(directory) as notify,
        activated(directory, order, program, subprocess.DEVNULL) as process,
    ):
        start_by_connecting(directory, process.pid)
        assert notify.recv(1000).startswith(b"READY=1")
        assert differences(process.pid, directory) == [
            "descriptor 1: /dev/null (both)",
            "descriptor 2: {directory}/errors (write)",
            "descriptor: dgram (both)",
            "descriptor: {directory}/audit (write)",
        ]


@pytest.mark.parametrize("order", ORDERS)
def test_by_systemd_as_the_user_of_the_broker(
    directory: Path, installation: Path, order: Sequence[str]
) -> None:
    compiled = directory / "policy.json"
    # As ExecStartPre=+ does: mode 0600, which the broker's user reads by the capability that it has.
    arguments = ["compile", str(directory / "policy.yaml"), "--output", str(compiled)]
    subprocess.run([installation / "python", "-I", "-m", "fdbroker.config", *arguments], check=True)
    assert compiled.stat().st_mode & 0o777 == 0o600
    program = [
        sys.executable,
        AS_A_SERVICE,
        str(BROKER_UID),
        "--",
        *command(compiled, "--audit=-", installation=installation),
    ]
    # StandardOutput=append: of a unit: the service itself could not open the file.
    audit = os.open(directory / "audit", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    with (
        listen_for_notifications(directory) as notify,
        activated(directory, order, program, audit) as process,
    ):
        os.close(audit)
        start_by_connecting(directory, process.pid)
        assert notify.recv(1000).startswith(b"READY=1")
        [nodev, *rest] = differences(process.pid, directory)
        assert rest == [
            next(line for line in rest if "not nodev" in line),
            "descriptor 1: {directory}/audit (write)",
            "descriptor 2: {directory}/errors (write)",
            "descriptor: dgram (both)",
        ]
        # Devices are never opened, and no option of a unit sets it: so nodev is not asked for.
        assert nodev == "missing: mounts that are not nodev: 0"
