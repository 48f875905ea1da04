"""Runs within a systemd of its own: doctor looks at units, with drop-ins that break them, and sockets.

    python doctor_inside.py SHARED UID

UID is to be the broker's. What it said of each case is left in SHARED as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.cli.commands import run

DROP_IN = Path("/etc/systemd/system/fdbroker.service.d/admin.conf")


def main(shared: Path, uid: int) -> None:
    """Do it all and write what was seen."""
    for command in (
        ["groupadd", "--system", "fdbroker-clients"],
        ["groupadd", f"--gid={uid}", "fdbroker"],
        ["useradd", f"--uid={uid}", f"--gid={uid}", "--no-create-home", "fdbroker"],
    ):
        subprocess.run(command, check=True)

    def doctor() -> dict[str, Any]:
        done = run("doctor", "--json")
        assert not done.stderr, done.stderr
        return {check["name"]: check for check in json.loads(done.stdout)["checks"]}

    def systemctl(*arguments: str) -> None:
        subprocess.run(["systemctl", *arguments], check=True, capture_output=True)

    systemctl("enable", "fdbroker-seqpacket.socket", "fdbroker-control.socket")
    seen: dict[str, Any] = {"before": doctor()}
    systemctl("start", "fdbroker-seqpacket.socket", "fdbroker-control.socket")
    started = subprocess.run(["systemctl", "start", "fdbroker.service"], check=False, capture_output=True)
    assert started.returncode == 0, journal()
    seen["right"] = doctor()
    with open(DROP_IN.parents[1] / "fdbroker.service", "a") as file:
        file.write("# changed\n")
    seen["changed"] = doctor()
    DROP_IN.write_text(
        "[Service]\nProtectHome=yes\nPrivateTmp=yes\nRestrictSUIDSGID=yes\nPrivateUsers=yes\n"
        "SystemCallFilter=\nSystemCallFilter=@system-service\nLimitNOFILE=100\nReadOnlyPaths=\nRuntimeDirectory=fdbroker\n"
    )
    systemctl("daemon-reload")
    seen["broken"] = doctor()
    subprocess.run(["systemctl", "restart", "fdbroker.service"], check=False, capture_output=True)
    seen["failed"] = doctor()
    (shared / "seen").write_text(json.dumps(seen))


def journal() -> str:
    """Return what the broker's unit wrote."""
    command = ["journalctl", "--sync"], ["journalctl", "-u", "fdbroker.service", "-o", "cat", "--no-pager"]
    return [subprocess.run(each, check=True, capture_output=True, text=True).stdout for each in command][1]


if __name__ == "__main__":
    os.umask(0o022)
    main(Path(sys.argv[1]), int(sys.argv[2]))
