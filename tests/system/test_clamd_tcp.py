"""The port for clients of clamd, by a real systemd: it passes the socket to a service that has no network."""

from __future__ import annotations

import shlex
import shutil
from typing import TYPE_CHECKING

import pytest

from tests.documentation.blocks import blocks
from tests.for_other_users import copy_systemd
from tests.running_broker import reachable_directory
from tests.scan.descriptors import EICAR_NAME
from tests.scan.running_scand import SCAND_UID
from tests.system.booted import REPOSITORY, UNITS, run_booted

if TYPE_CHECKING:
    from tests.for_other_users import ForOtherUsers

pytestmark = pytest.mark.booting

BEGIN = "systemctl enable fdbroker-clamd-tcp.socket"


def test_service_without_a_network_serves_the_port_that_is_passed(others: ForOtherUsers) -> None:
    with reachable_directory() as shared, reachable_directory() as files:
        packages = copy_systemd(shared)
        (shared / "scand.yaml").write_text(f"version: 1\nbroker: {shared}/none\n")
        [documented] = [block for block in blocks("docs/scand.md") if block.text.startswith(BEGIN)]
        (shared / "commands").write_text(documented.text)
        units = files / UNITS
        (units / "fdbroker-scand.service.d").mkdir(parents=True)
        for name in ("fdbroker-scand.service", "fdbroker-clamd-tcp.socket"):
            shutil.copy(REPOSITORY / "systemd" / name, units)
        scand = [others.python, "-P", "-m", "fdbroker.scan.service", "--dev"]
        command = shlex.join([*scand, "--config", f"{shared}/scand.yaml"])
        (units / "fdbroker-scand.service.d" / "test.conf").write_text(
            "[Unit]\nDefaultDependencies=no\n[Service]\n"
            "PrivateTmp=no\nStandardError=append:/var/log/fdbroker-scand.log\n"
            f"Environment=PYTHONPATH={others.directory}:{packages}\nExecStart=\nExecStart={command}\n"
        )
        seen = run_booted(
            "clamd_tcp_inside.py", shared, SCAND_UID, files=(files,), places=(others.directory,)
        )
    assert seen["status"] == 0, seen
    assert "PONG\n" in seen["output"]
    assert seen["ping"] == "PONG\0"
    assert seen["stream"] == f"stream: {EICAR_NAME} FOUND\0"
    everybodys, its_own = seen["networks"]
    assert everybodys != its_own
    assert "listener tcp 127.0.0.1:3310: serving" in seen["log"]
    # What is found in somebody's files is nobody else's business.
    assert seen["mode"] == 0o600
