"""Runs within a systemd of its own: the scan service by its unit, and a client of it.

    python scand_inside.py SHARED UID UID_OF_THE_SERVICE

What was seen is left in SHARED as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from fdbroker.scan.client import connect
from tests.processes import in_child, wait_until


def main(shared: Path, uid: int, service: str) -> None:
    """Do it all and write what was seen."""
    for command in (
        ["groupadd", "--system", "fdbroker-clients"],
        ["groupadd", f"--gid={service}", "fdbroker-scand"],
        ["useradd", f"--uid={service}", f"--gid={service}", "--no-create-home", "fdbroker-scand"],
    ):
        subprocess.run(command, check=True)
    subprocess.run(["systemctl", "start", "fdbroker.service"], check=True)
    started = subprocess.run(["systemctl", "start", "fdbroker-scand.service"], check=False).returncode
    file = os.fsencode(shared / "tree" / "file")

    def scan() -> str:
        with connect(str(shared / "scan"), timeout=30.0) as connected:
            return connected.scan_path(file).verdict.verdict

    seen: dict[str, object] = {"started": started}
    if not started:
        wait_until(lambda: "serving" in _show("StatusText"), "it serves")
        seen["first"] = in_child(scan, uid=uid)
        seen["reloaded"] = subprocess.run(["systemctl", "reload", "fdbroker-scand"], check=False).returncode
        seen["second"] = in_child(scan, uid=uid)
        subprocess.run(["systemctl", "stop", "fdbroker-scand"], check=True)
        seen["result"] = _show("Result")
    subprocess.run(["journalctl", "--sync"], check=True)
    journal = ["journalctl", "-u", "fdbroker-scand", "-o", "cat", "--no-pager"]
    seen["journal"] = subprocess.run(journal, check=True, capture_output=True, text=True).stdout
    (shared / "seen").write_text(json.dumps(seen))


def _show(name: str) -> str:
    command = ["systemctl", "show", "--value", "-p", name, "fdbroker-scand.service"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
