"""The unit of the scan service, by a real systemd: hardened, and its workers have every layer of theirs."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.running_broker import launcher_command, launcher_environment, reachable_directory
from tests.scan.descriptors import EICAR
from tests.scan.running_scand import ANN, SCAND_UID, own, policy_text
from tests.system.booted import REPOSITORY, run_booted

if TYPE_CHECKING:
    from tests.for_other_users import ForOtherUsers

pytestmark = pytest.mark.root

UNIT = REPOSITORY / "systemd" / "fdbroker-scand.service"


def test_unit_gives_verdicts_from_fully_confined_workers(others: ForOtherUsers) -> None:
    with reachable_directory() as shared:
        (shared / "tree").mkdir()
        (shared / "tree/file").write_bytes(EICAR)
        own(shared / "tree/file", ANN)
        (shared / "policy.yaml").write_text(policy_text(shared))
        (shared / "scand.yaml").write_text(f"version: 1\nbroker: {shared}/broker.seqpacket\n")
        units = shared / "units"
        (units / "fdbroker-scand.service.d").mkdir(parents=True)
        shutil.copy(UNIT, units)
        broker = shlex.join([*launcher_command(shared / "policy.yaml"), "--audit=none"])
        environment = f"Environment=PYTHONPATH={launcher_environment()['PYTHONPATH']}"
        (units / "fdbroker.service").write_text(
            f"[Unit]\nDefaultDependencies=no\n[Service]\nType=notify\n{environment}\nExecStart={broker}\n"
        )
        # Where the checkout is; and the /dev of this boot is too small to make a private one of.
        scand = [
            others.python,
            "-P",
            "-m",
            "fdbroker.scan.service",
            "--config",
            f"{shared}/scand.yaml",
            "--dev",
        ]
        (units / "fdbroker-scand.service.d" / "test.conf").write_text(
            "[Unit]\nDefaultDependencies=no\n[Service]\n"
            "PrivateTmp=no\nPrivateDevices=no\n"
            f"Environment=PYTHONPATH={others.directory}\nExecStart=\nExecStart={shlex.join(scand)}\n"
        )
        seen = run_booted("scand_inside.py", units, shared, ANN, SCAND_UID, places=(others.directory,))
    assert seen["started"] == 0, seen["journal"]
    assert (seen["first"], seen["second"]) == ("infected", "infected")
    # Ids can be changed by root alone; everything else must be there.
    assert "its workers are confined, but for: ids\n" in seen["journal"]
    assert seen["reloaded"] == 0
    assert "the engines were loaded anew" in seen["journal"]
    assert seen["result"] == "success"


def test_unit_leaves_little_exposed() -> None:
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=25", UNIT],
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert not done.stderr, "unknown keys are told there alone"
