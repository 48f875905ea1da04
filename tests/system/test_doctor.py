"""`fdbroker doctor` where a real systemd runs: the broker's units, and drop-ins that break them."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING, Any

import pytest

from fdbroker.cli.checks import BROKEN, MISSING, OK, WEAKER
from tests.running_broker import BROKER_UID, reachable_directory
from tests.system.booted import UNITS, run_booted

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.for_other_users import ForOtherUsers

pytestmark = pytest.mark.booting

_SERVICE = """
[Unit]
DefaultDependencies=no
[Service]
Type=notify
Environment=PYTHONPATH={path}
ExecStart={command}
User={uid}
Group={uid}
AmbientCapabilities=CAP_DAC_READ_SEARCH
CapabilityBoundingSet=CAP_DAC_READ_SEARCH
SecureBits=noroot noroot-locked no-setuid-fixup no-setuid-fixup-locked keep-caps-locked
NoNewPrivileges=yes
ReadOnlyPaths=/
"""
_SOCKET = """
[Unit]
DefaultDependencies=no
[Socket]
ListenSequentialPacket={path}
FileDescriptorName={name}
SocketGroup={group}
SocketMode=0666
Service=fdbroker.service
[Install]
WantedBy=sockets.target
"""


@pytest.fixture(scope="module")
def seen(others: ForOtherUsers) -> Iterator[dict[str, Any]]:
    with reachable_directory() as shared:
        text = (
            f"version: 1\nroots: {{home: {{path: /home}}, tmp: {{path: /tmp}}}}\nrules: []\n"
            f"listeners:\n  seqpacket: {{path: {shared}/requests, group: fdbroker-clients, mode: '0666'}}\n"
            f"  control: {{path: {shared}/control}}\n"
        )
        (shared / "policy.yaml").write_text(text)
        units = shared / "files" / UNITS
        units.mkdir(parents=True)
        command = [others.python, "-P", "-m", "fdbroker.launcher"]
        command += ["--policy", "/etc/fdbroker/policy.json", "--dev"]
        (units / "fdbroker.service").write_text(
            _SERVICE.format(path=others.directory, command=shlex.join(command), uid=BROKER_UID)
        )
        for name, path in (("seqpacket", shared / "requests"), ("control", shared / "control")):
            (units / f"fdbroker-{name}.socket").write_text(
                _SOCKET.format(
                    path=path, name=name, group="fdbroker-clients" if name == "seqpacket" else "root"
                )
            )
        files = (shared / "files",)
        yield run_booted("doctor_inside.py", shared, BROKER_UID, files=files, places=(others.directory,))


def states(checks: dict[str, Any], *names: str) -> list[str]:
    return [checks[name]["state"] for name in names]


def test_units_that_were_not_started_are_told(seen: dict[str, Any]) -> None:
    assert states(seen["before"], "fdbroker-seqpacket.socket", "broker") == [BROKEN, MISSING]
    assert "enable --now fdbroker-seqpacket.socket" in seen["before"]["fdbroker-seqpacket.socket"]["cure"]


def test_unit_as_documented_and_its_sockets_are_in_order(seen: dict[str, Any]) -> None:
    names = [
        *("fdbroker.service", "fdbroker.service options", "fdbroker-seqpacket.socket"),
        *("fdbroker-control.socket", "broker", "control socket", "its policy", "its roots", "its mounts"),
    ]
    shown = {name: seen["right"][name] for name in names}
    assert {check["state"] for check in shown.values()} == {OK}, json.dumps(shown, indent=1)
    assert "made by systemd" in seen["right"]["socket seqpacket"]["found"]


def test_unit_that_was_changed_since_systemd_read_it_is_told(seen: dict[str, Any]) -> None:
    assert states(seen["changed"], "fdbroker.service", "fdbroker.service options") == [WEAKER, OK]
    assert "daemon-reload" in seen["changed"]["fdbroker.service"]["cure"]


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("PrivateUsers", "reaches nobody's files"),
        ("ProtectHome", "not there, at /home"),
        ("PrivateTmp", "/tmp is another directory"),
        ("RestrictSUIDSGID", "openat2 is refused"),
        ("SystemCallFilter", "can't restrict itself: landlock_add_rule landlock_create"),
        ("LimitNOFILE", "too few descriptors"),
        ("ReadOnlyPaths", "no read-only view"),
        ("RuntimeDirectory", "removes it when the service stops"),
    ],
)
def test_each_option_that_breaks_the_broker_is_told_with_the_drop_in_that_has_it(
    seen: dict[str, Any], option: str, said: str
) -> None:
    check = seen["broken"][f"fdbroker.service {option}="]
    assert check["state"] == BROKEN
    assert said in check["found"]
    assert "(in /etc/systemd/system/fdbroker.service.d/admin.conf)" in check["found"]
    assert "systemctl edit fdbroker.service" in check["cure"]


def test_unit_that_does_not_start_any_more_is_told_with_where_the_reason_stands(seen: dict[str, Any]) -> None:
    check = seen["failed"]["fdbroker.service"]
    assert check["state"] == BROKEN
    assert "has failed" in check["found"]
    assert "journalctl -u fdbroker.service" in check["cure"]
