"""`fdbroker doctor` where a real systemd runs: the broker's units, and drop-ins that break them."""

from __future__ import annotations

import json
import shlex
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from fdbroker.cli.checks import BROKEN, MISSING, OK, WEAKER
from tests.running_broker import BROKER_UID, reachable_directory
from tests.system.booted import REPOSITORY, UNITS, run_booted

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.for_other_users import ForOtherUsers

pytestmark = pytest.mark.booting

# Where the sources are, and /dev of this boot.
_OF_THE_TEST = """
[Unit]
DefaultDependencies=no
[Service]
Environment=PYTHONPATH={path}
ExecStartPre=
ExecStartPre=+{python} -P -m fdbroker.config compile --output {compiled} /etc/fdbroker/policy.yaml
ExecStart=
ExecStart={python} -P -m fdbroker.launcher --policy {compiled} --dev
PrivateDevices=no
"""
_POLICY = """
version: 1
roots: {home: {path: /home}, tmp: {path: /tmp}}
rules: []
listeners: {seqpacket: {group: fdbroker-clients}}
"""


@pytest.fixture(scope="module")
def seen(others: ForOtherUsers) -> Iterator[dict[str, Any]]:
    with reachable_directory() as shared:
        files = shared / "files"
        units, own = files / UNITS, files / UNITS / "fdbroker.service.d"
        own.mkdir(parents=True)
        for unit in ("fdbroker.service", "fdbroker-seqpacket.socket", "fdbroker-control.socket"):
            shutil.copy(REPOSITORY / "systemd" / unit, units)
        text = _OF_THE_TEST.format(
            path=others.directory,
            python=shlex.quote(str(others.python)),
            compiled="/run/fdbroker/policy.json",
        )
        (own / "test.conf").write_text(text)
        # Where it is beyond doubt that root alone has written it.
        (files / "etc/fdbroker").mkdir()
        (files / "etc/fdbroker/policy.yaml").write_text(_POLICY)
        yield run_booted("doctor_inside.py", shared, BROKER_UID, files=(files,), places=(others.directory,))


def states(checks: dict[str, Any], *names: str) -> list[str]:
    return [checks[name]["state"] for name in names]


def test_units_that_were_not_started_are_told(seen: dict[str, Any]) -> None:
    assert states(seen["before"], "fdbroker-seqpacket.socket", "broker") == [BROKEN, MISSING]
    assert "enable --now fdbroker-seqpacket.socket" in seen["before"]["fdbroker-seqpacket.socket"]["cure"]


def test_the_units_of_the_package_and_their_sockets_are_in_order(seen: dict[str, Any]) -> None:
    names = [
        *("fdbroker.service", "fdbroker.service options", "fdbroker-seqpacket.socket"),
        *("fdbroker-control.socket", "broker", "control socket", "its policy", "its roots", "its mounts"),
        *("socket seqpacket", "socket control", "its open files"),
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


def test_directory_of_the_sockets_that_systemd_gave_away_is_told(seen: dict[str, Any]) -> None:
    # While it runs it is the service's, and between two starts it is not there.
    check = seen["failed"]["/run/fdbroker"]
    assert (f"belongs to uid {BROKER_UID}" in check["found"], check["state"]) in {
        (True, MISSING),
        (False, WEAKER),
    }


def test_unit_that_does_not_start_any_more_is_told_with_where_the_reason_stands(seen: dict[str, Any]) -> None:
    check = seen["failed"]["fdbroker.service"]
    assert check["state"] == BROKEN
    assert "has failed" in check["found"] or "it ended by itself" in check["found"]
    assert "journalctl -u fdbroker.service" in check["cure"]
