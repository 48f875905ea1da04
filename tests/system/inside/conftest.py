"""What tests find in the booted system: the sockets listen, as after every boot, and there are users."""

from __future__ import annotations

from pathlib import Path

import pytest

# What `fdbroker` imports when it is asked for: a child that became another user may not read a checkout.
import fdbroker.client
import fdbroker.scan.client  # noqa: F401
from tests.system.inside.system import POLICY, POLICY_FILE, run, sync_journal


@pytest.fixture(scope="session", autouse=True)
def _prepared() -> None:
    run("useradd", "--create-home", "--groups=fdbroker-clients", "alice")
    run("useradd", "--create-home", "mallory")
    run("fdbrokerd", "--precompile")
    Path("/srv/data").mkdir(parents=True)
    for place in ("/srv/data", "/home/mallory", "/tmp"):
        file = Path(place, "file")
        file.write_text(f"what is in {place}\n")
        file.chmod(0o600)
    Path("/srv/data").chmod(0o700)


@pytest.fixture(autouse=True)
def _policy() -> None:
    """Begin each test with this policy and a service that does not run, and its sockets that listen."""
    run("systemctl", "stop", "fdbroker.service")
    run("systemctl", "reset-failed")
    POLICY_FILE.write_text(POLICY)
    run(
        "systemctl", "start", "fdbroker-seqpacket.socket", "fdbroker-stream.socket", "fdbroker-control.socket"
    )
    sync_journal()
