"""`fdbroker doctor` on the installed units: in order as they come, and with drop-ins that break them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from fdbroker.cli.checks import BROKEN, MISSING, OK, WEAKER
from tests.system.inside.system import SERVICE, drop_in, run

SOCKET = "fdbroker-seqpacket.socket"
UNIT_FILE = Path("/usr/lib/systemd/system", SERVICE)
# What each option of a drop-in that breaks the broker is said to do.
BREAKING = {
    "ProtectHome=yes": "not there, at /home",
    "PrivateTmp=yes": "/tmp is another directory",
    "RestrictSUIDSGID=yes": "openat2 is refused",
    "PrivateUsers=yes": "reaches nobody's files",
    "SystemCallFilter=\nSystemCallFilter=@system-service": (
        "can't restrict itself: landlock_add_rule landlock_create"
    ),
    "LimitNOFILE=100": "too few descriptors",
    "ReadOnlyPaths=": "no read-only view",
    "RuntimeDirectory=fdbroker": "removes it when the service stops",
}


def doctor() -> dict[str, dict[str, Any]]:
    """Return what it says, by the names of its checks."""
    done = run("fdbroker", "doctor", "--json", check=False)
    assert not done.stderr, done.stderr
    return {check["name"]: check for check in json.loads(done.stdout)["checks"]}


def test_an_installation_is_in_order() -> None:
    run("systemctl", "start", SERVICE)
    done = run("fdbroker", "doctor", check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert done.stdout.splitlines()[-1].endswith("0 broken, 0 missing.")
    # What is weaker is so for what this policy says, and for the machine.
    assert set(re.findall(r"^weaker +(.*?)  ", done.stdout, re.MULTILINE)) <= {"policy warnings", "clock"}
    checks = doctor()
    assert "made by systemd" in checks["socket seqpacket"]["found"]
    assert checks[f"{SERVICE} options"]["state"] == checks["its mounts"]["state"] == OK


def test_sockets_that_do_not_listen_are_told() -> None:
    run("systemctl", "stop", SOCKET)
    checks = doctor()
    assert (checks[SOCKET]["state"], checks["broker"]["state"]) == (BROKEN, MISSING)
    assert f"enable --now {SOCKET}" in checks[SOCKET]["cure"]


def test_a_unit_that_was_changed_since_systemd_read_it_is_told() -> None:
    run("systemctl", "start", SERVICE)
    with UNIT_FILE.open("a") as file:
        file.write("# changed\n")
    checks = doctor()
    assert (checks[SERVICE]["state"], checks[f"{SERVICE} options"]["state"]) == (WEAKER, OK)
    assert "daemon-reload" in checks[SERVICE]["cure"]
    run("systemctl", "daemon-reload")


def test_each_option_that_breaks_the_broker_is_told_with_its_drop_in_and_so_is_what_comes_of_it() -> None:
    run("systemctl", "start", SERVICE)
    with drop_in("\n".join(["[Service]", *BREAKING, ""])):
        checks = doctor()
        for line, said in BREAKING.items():
            check = checks[f"{SERVICE} {line.partition('=')[0]}="]
            assert check["state"] == BROKEN
            assert said in check["found"]
            assert f"(in /run/systemd/system/{SERVICE}.d/test.conf)" in check["found"]
            assert f"systemctl edit {SERVICE}" in check["cure"]
        run("systemctl", "restart", SERVICE, check=False)
        checks = doctor()
    unit = checks[SERVICE]
    assert unit["state"] == BROKEN
    assert "has failed" in unit["found"] or "it ended by itself" in unit["found"]
    assert f"journalctl -u {SERVICE}" in unit["cure"]
    # RuntimeDirectory= has it removed between two starts, and given to the broker's user while it runs.
    directory = checks["/run/fdbroker"]
    assert ("belongs to uid" in directory["found"], directory["state"]) in {(True, MISSING), (False, WEAKER)}
