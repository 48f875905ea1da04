"""Runs within a systemd of its own: the scan service, which has no network, with the port of its socket unit.

    python clamd_tcp_inside.py SHARED UID_OF_THE_SERVICE

What was seen is left in SHARED as JSON.
"""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

from tests.clamd.talks import chunks
from tests.scan.descriptors import EICAR

_LOG = "/var/log/fdbroker-scand.log"
_UNITS = ("fdbroker-clamd-tcp.socket", "fdbroker-scand.service")


def main(shared: Path, service: str) -> None:
    """Do it all and write what was seen."""
    for command in (
        ["groupadd", "--force", "--system", "fdbroker-clients"],
        ["groupadd", f"--gid={service}", "fdbroker-scand"],
        ["useradd", f"--uid={service}", f"--gid={service}", "--no-create-home", "fdbroker-scand"],
    ):
        subprocess.run(command, check=True)
    subprocess.run(["systemctl", "start", _UNITS[1]], check=True)
    done = subprocess.run(
        ["bash", "-e", str(shared / "commands")], check=False, capture_output=True, text=True
    )
    seen: dict[str, object] = {"status": done.returncode, "output": done.stdout + done.stderr}
    if not done.returncode:
        seen["ping"] = _ask(b"zPING\0")
        seen["stream"] = _ask(b"zINSTREAM\0" + chunks(EICAR))
        pid = _output("systemctl", "show", "--value", "-p", "MainPID", _UNITS[1]).strip()
        seen["networks"] = [os.readlink(f"/proc/{number}/ns/net") for number in ("1", pid)]
        subprocess.run(["systemctl", "stop", *_UNITS], check=True)
    log = Path(_LOG)
    seen["log"] = log.read_text()
    seen["mode"] = stat.S_IMODE(log.stat().st_mode)
    (shared / "seen").write_text(json.dumps(seen))


def _ask(command: bytes) -> str:
    with socket.create_connection(("127.0.0.1", 3310), timeout=60) as sock:
        sock.sendall(command)
        said = b""
        while more := sock.recv(4096):
            said += more
        return said.decode()


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


main(Path(sys.argv[1]), sys.argv[2])
