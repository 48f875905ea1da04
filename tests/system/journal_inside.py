"""Runs within a systemd of its own: a broker that writes to the journal, forgers, and what the command reads.

    python journal_inside.py SHARED UID

SHARED has the policy, UID is the client's; what was seen is left there as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.broker.speaking import Speaker
from tests.cli.commands import run
from tests.processes import in_child, wait_until


def main(shared: Path, uid: int) -> None:
    """Do it all and write what was seen."""
    subprocess.run(["systemctl", "start", "fdbroker.service"], check=True)

    def ask() -> list[str]:
        with Speaker.connect(shared / "requests") as speaker:
            odd = bytes(shared) + b'/tree/"},\n\xff\x1b[31m{"event":"open","decision":"allow"}'
            return [
                speaker.open_one(path).reason for path in (bytes(shared / "tree/file"), odd, b"/etc/shadow")
            ]

    seen: dict[str, Any] = {"reasons": in_child(ask, uid=uid)}
    # In units of their own, as anybody may log: by standard output, and by the native protocol.
    subprocess.run(["systemctl", "start", "forger.service"], check=True)
    _sync()
    seen["json"] = _lines(run("audit", "--journal", "--json"))
    seen["denied"] = _lines(run("audit", "--journal", "--json", "--denied"))
    seen["verified"] = json.loads(run("audit", "verify", "--journal", "--json").stdout)
    seen["forged"] = _lines(run("audit", "--unit", "forger.service", "--json"))
    seen["text"] = run("audit", "--journal").stdout
    seen["in_the_journal"] = _like_records()
    seen["followed"] = _follow(shared)
    done = run("audit", "reopen", "--control", str(shared / "control"))
    seen["reopen"] = [done.returncode, done.stderr]
    subprocess.run(["systemctl", "stop", "fdbroker.service"], check=True)
    _sync()
    seen["last"] = _lines(run("audit", "--journal", "--json", "-n", "1"))
    (shared / "seen").write_text(json.dumps(seen))


def _sync() -> None:
    subprocess.run(["journalctl", "--sync"], check=True)


def _lines(result: subprocess.CompletedProcess[str]) -> list[Any]:
    assert result.returncode == 0, result
    return [json.loads(line) for line in result.stdout.splitlines()]


def _like_records() -> int:
    """Return how many messages in the whole journal look like a record."""
    shown = subprocess.run(["journalctl", "-o", "json"], check=True, capture_output=True).stdout
    messages = [json.loads(line).get("MESSAGE") for line in shown.splitlines()]
    return sum(isinstance(message, str) and message.startswith('{"run"') for message in messages)


def _follow(shared: Path) -> list[Any]:
    output = shared / "followed"
    with open(output, "wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "fdbroker.cli", "audit", "--journal", "-f", "-n", "0", "--json"],
            stdout=file,
        )
    try:

        def ask() -> bool:
            with Speaker.connect(shared / "requests") as speaker:
                return speaker.open_one(bytes(shared / "tree/file")).reason == "ok"

        wait_until(lambda: ask() and output.stat().st_size, "a record that is followed")
    finally:
        process.kill()
        process.wait()
    return [json.loads(line) for line in output.read_bytes().splitlines()]


if __name__ == "__main__":
    os.umask(0o022)
    main(Path(sys.argv[1]), int(sys.argv[2]))
