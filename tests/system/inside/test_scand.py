"""The scan service by its unit, hardened as it is, and clients who come by the broker's sockets."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from fdbroker.scan.client import connect
from tests.clamd.talks import chunks
from tests.documentation.blocks import blocks
from tests.processes import in_child, wait_until
from tests.scan.descriptors import EICAR, EICAR_NAME
from tests.system.inside.system import (
    POLICY_FILE,
    become_user,
    drop_in,
    main_pid,
    messages,
    run,
    run_as,
    show,
)

SCAND, PORT = "fdbroker-scand.service", "fdbroker-clamd-tcp.socket"
BEGIN = f"systemctl enable {PORT}"
POLICY = """\
version: 1
roots:
  home: {path: /home}
listeners:
  scan: {service: {user: fdbroker-scand}, type: seqpacket}
  clamd: {service: {user: fdbroker-scand}}
rules:
  - name: own-files
    allow: [open, walk]
    client: {user: fdbroker-scand}
    on_behalf_of: any
    in: home
    paths: ["**"]
    where: {owner: on_behalf_of}
"""
CONFIGURATION = "version: 1\nlisteners:\n  scan: {protocol: scan}\n  clamd: {protocol: clamd}\n"


@pytest.fixture(scope="module", autouse=True)
def _files() -> None:
    Path("/etc/fdbroker/scand.yaml").write_text(CONFIGURATION)
    for user in ("alice", "mallory"):
        file = Path(f"/home/{user}/eicar")
        file.write_bytes(EICAR)
        file.chmod(0o600)
        run("chown", user, str(file))


@pytest.fixture(autouse=True)
def _served(_policy: None) -> None:
    POLICY_FILE.write_text(POLICY)
    run("systemctl", "start", "fdbroker-scan.socket", "fdbroker-clamd.socket")
    run("systemctl", "start", SCAND)
    wait_until(lambda: "serving" in show("StatusText", SCAND), "it serves")


def scan(user: str, path: str) -> str:
    """Return the verdict that a user gets on a path."""

    def ask() -> str:
        become_user(user)
        with connect("/run/fdbroker/scan", timeout=30.0) as connected:
            return connected.scan_path(os.fsencode(path)).verdict.verdict

    return in_child(ask)


def test_verdicts_come_from_fully_confined_workers_and_go_on_after_reloads_and_restarts() -> None:
    assert scan("alice", "/home/alice/eicar") == "infected"
    # Ids can be changed by root alone; everything else must be there.
    assert "its workers are confined, but for: ids" in [line.partition(": ")[2] for line in messages(SCAND)]
    assert scan("alice", "/home/mallory/eicar") == "error"
    assert scan("mallory", "/home/mallory/eicar") == "infected"  # who is in no group of clients
    run("systemctl", "reload", SCAND)
    assert scan("alice", "/home/alice/eicar") == "infected"
    # A reload is asked for by a signal, and takes its time.
    wait_until(lambda: any("the engines were loaded anew" in line for line in messages(SCAND)), "new engines")
    run("systemctl", "restart", "fdbroker.service")
    wait_until(lambda: scan("alice", "/home/alice/eicar") == "infected", "it serves again")
    run("systemctl", "stop", SCAND)
    assert show("Result", SCAND) == "success"


def test_devices_and_tmp_are_its_own() -> None:
    Path("/tmp/of-the-system").touch()
    root = Path(f"/proc/{main_pid(SCAND)}/root")
    assert not (root / "tmp/of-the-system").exists()
    assert {path.name for path in (root / "dev").iterdir() if path.is_block_device()} == set()
    assert (root / "dev").stat().st_dev != Path("/dev").stat().st_dev


def test_clients_of_clamav_are_served_by_the_commands_of_clamav() -> None:
    Path("/run/clamd.conf").write_text("LocalSocket /run/fdbroker/clamd\n")
    done = run_as("alice", "clamdscan", "--config-file=/run/clamd.conf", "/home/alice/eicar")
    assert done.returncode == 1, done
    assert "/home/alice/eicar: " in done.stdout
    assert " FOUND" in done.stdout


def test_a_service_without_a_network_serves_the_port_that_is_passed() -> None:
    [documented] = [block for block in blocks("docs/scand.md") if block.text.startswith(BEGIN)]
    log = Path("/var/log/fdbroker-scand.log")
    with drop_in(f"[Service]\nStandardError=append:{log}\n", SCAND):
        assert "PONG\n" in run("bash", "-e", "-c", documented.text).stdout
        with socket.create_connection(("127.0.0.1", 3310), timeout=60) as sock:
            sock.sendall(b"zINSTREAM\0" + chunks(EICAR))
            assert sock.makefile().read() == f"stream: {EICAR_NAME} FOUND\0"
        networks = {os.readlink(f"/proc/{pid}/ns/net") for pid in (1, main_pid(SCAND))}
        assert len(networks) == 2
        run("systemctl", "disable", "--now", PORT, SCAND)
    assert "listener tcp 127.0.0.1:3310: serving" in log.read_text()
    # What is found in somebody's files is nobody else's business.
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
