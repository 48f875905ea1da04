"""What doctor makes of what systemd shows of units: each option that goes wrong, and no other."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import pytest

from fdbroker.cli.broker import SERVICE
from fdbroker.cli.checks import BROKEN, OK, WEAKER, systemd
from fdbroker.cli.checks.check import Check, Running
from fdbroker.cli.checks.systemd import SCAN_SERVICE, Unit
from fdbroker.cli.checks.unit_options import calls_refused, file_with, objections_to_broker
from fdbroker.cli.checks.units import unit_checks
from fdbroker.config.compile import compile_policy
from fdbroker.config.identities import SystemLookups

# As systemctl shows the unit of docs/fdbrokerd.md.
RIGHT = {
    "LoadState": "loaded",
    "ActiveState": "active",
    "Type": "notify",
    "NotifyAccess": "main",
    "User": "fdbroker",
    "MainPID": "7",
    "ProtectHome": "read-only",
    "AmbientCapabilities": "cap_dac_read_search",
    "CapabilityBoundingSet": "cap_dac_read_search",
    "NoNewPrivileges": "yes",
    "ReadOnlyPaths": "/",
    "LimitNOFILE": "16384",
    "TasksMax": "infinity",
    "ProcSubset": "all",
}
SOCKET = {
    "LoadState": "loaded",
    "ActiveState": "active",
    "FileDescriptorName": "seqpacket",
    "Listen": "/run/fdbroker/broker.seqpacket (SequentialPacket)",
}
AS_ROOT = {"User": "", "AmbientCapabilities": "", "ReadOnlyPaths": "", "NoNewPrivileges": "no"}


def unit(*roots: bytes, **changes: str) -> Unit:
    values = {key: [value] for key, value in (RIGHT | changes).items()}
    return Unit(SERVICE, values, roots or (b"/home", b"/srv/data"))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        AS_ROOT,
        {"PrivateTmp": "yes"},
        {"TasksMax": "10"},
        {"InaccessiblePaths": "/srv/other -/opt"},
        {"ReadOnlyPaths": "-/ /x"},
        {"RestrictAddressFamilies": "AF_UNIX AF_INET"},
        {"RestrictAddressFamilies": "~AF_INET"},
        {"SystemCallFilter": "~open_by_handle_at"},
        {"RuntimeDirectory": "other"},
    ],
)
def test_unit_that_serves_has_no_objection(changes: dict[str, str]) -> None:
    assert objections_to_broker(unit(**changes)) == []


@pytest.mark.parametrize(
    ("changes", "option", "state"),
    [
        ({"DynamicUser": "yes"}, "DynamicUser", BROKEN),
        ({"PrivateUsers": "yes"}, "PrivateUsers", BROKEN),
        ({"AmbientCapabilities": ""}, "AmbientCapabilities", BROKEN),
        ({"CapabilityBoundingSet": "cap_chown"}, "CapabilityBoundingSet", BROKEN),
        ({"NoNewPrivileges": "no"}, "NoNewPrivileges", BROKEN),
        ({"ReadOnlyPaths": "/etc"}, "ReadOnlyPaths", BROKEN),
        ({"RootDirectory": "/srv/tree"}, "RootDirectory", BROKEN),
        ({"ProtectHome": "tmpfs"}, "ProtectHome", BROKEN),
        ({"InaccessiblePaths": "-/srv"}, "InaccessiblePaths", BROKEN),
        ({"TemporaryFileSystem": "/srv/data/below:ro"}, "TemporaryFileSystem", BROKEN),
        ({"ProcSubset": "pid"}, "ProcSubset", WEAKER),
        ({"RestrictSUIDSGID": "yes"}, "RestrictSUIDSGID", BROKEN),
        ({"SystemCallFilter": "read write openat2"}, "SystemCallFilter", BROKEN),
        ({"RestrictAddressFamilies": "AF_INET"}, "RestrictAddressFamilies", BROKEN),
        ({"RestrictAddressFamilies": "~AF_UNIX"}, "RestrictAddressFamilies", BROKEN),
        ({"Type": "simple"}, "Type", WEAKER),
        ({"NotifyAccess": "none"}, "Type", WEAKER),
        ({"LimitNOFILE": "1023"}, "LimitNOFILE", BROKEN),
        ({"RuntimeDirectory": "fdbroker"}, "RuntimeDirectory", BROKEN),
    ],
)
def test_option_that_goes_wrong_is_the_one_that_is_named(
    changes: dict[str, str], option: str, state: str
) -> None:
    [objection] = objections_to_broker(unit(**changes))
    assert (objection.options[0], objection.state) == (option, state)


def test_options_go_wrong_where_something_is_served_that_they_are_about() -> None:
    [hidden] = objections_to_broker(unit(b"/tmp/upload", PrivateTmp="yes"))
    assert "/tmp/upload is another directory" in hidden.effect
    [few] = objections_to_broker(unit(TasksMax="10")._replace(helpers=True))
    assert few.options == ("TasksMax",)
    assert objections_to_broker(unit(b"/srv", ProtectHome="yes")) == []


@pytest.mark.parametrize(
    ("shown", "refused"),
    [
        ("", set()),
        ("~seccomp read", {"seccomp"}),
        (
            "openat2 memfd_create seccomp capset landlock_create_ruleset:1 landlock_add_rule",
            {"landlock_restrict_self"},
        ),
    ],
)
def test_calls_that_a_filter_refuses_are_those_that_the_broker_needs(shown: str, refused: set[str]) -> None:
    assert calls_refused(shown) == refused


def checked(
    monkeypatch: pytest.MonkeyPatch,
    of: dict[str, dict[str, str]],
    *,
    policy: bool = True,
    listeners: str = "{scan: {service: {user: root}, type: seqpacket}}",
) -> list[Check]:
    """Return the checks where systemctl shows this; without `policy` none can be read."""
    text = f"version: 1\nroots: {{srv: {{path: /srv}}}}\nrules: []\nlisteners: {listeners}\n".encode()
    compiled = compile_policy(text, "policy.yaml", SystemLookups()) if policy else None

    def show(name: str, _properties: object) -> dict[str, list[str]]:
        values = of.get(name, {"LoadState": "not-found"})
        return defaultdict(list, {key: value.split("|") for key, value in values.items()})

    monkeypatch.setattr(systemd, "_show", show)
    monkeypatch.setattr("os.path.isdir", lambda _path: True)
    return unit_checks(systemd.read_units(), compiled, Running(7, {}))


def shown(
    monkeypatch: pytest.MonkeyPatch, of: dict[str, dict[str, str]], *, policy: bool = True
) -> dict[str, tuple[str, str]]:
    """Return what the checks say, by name."""
    return {check.name: (check.state, check.found) for check in checked(monkeypatch, of, policy=policy)}


def test_machine_without_these_units_has_nothing_to_say_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, {}) == {}


@pytest.mark.parametrize(
    ("changes", "state", "said"),
    [
        ({}, OK, "active"),
        ({"LoadState": "masked"}, BROKEN, "is masked"),
        ({"LoadState": "bad-setting", "LoadError": "no ExecStart"}, BROKEN, "is bad-setting: no ExecStart"),
        ({"ActiveState": "failed", "Result": "start-limit-hit"}, BROKEN, "ended too often"),
        ({"NRestarts": "3"}, WEAKER, "active: it ended by itself, and systemd has started it 3 times again"),
        ({"NRestarts": "3", "ActiveState": "activating"}, BROKEN, "activating: it ended by itself"),
        ({"NRestarts": "0"}, OK, "active"),
        ({"NeedDaemonReload": "yes"}, WEAKER, "was changed since systemd has read it"),
        ({"DropInPaths": "/etc/x.conf"}, OK, "with /etc/x.conf"),
    ],
)
def test_state_of_the_unit_is_told(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], state: str, said: str
) -> None:
    told = shown(monkeypatch, {SERVICE: RIGHT | changes})
    assert told[SERVICE][0] == state
    assert said in told[SERVICE][1]


def test_broker_besides_that_of_the_unit_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert f"{SERVICE} process" not in shown(monkeypatch, {SERVICE: RIGHT})
    state, found = shown(monkeypatch, {SERVICE: RIGHT | {"MainPID": "8"}})[f"{SERVICE} process"]
    assert state == BROKEN
    assert "two brokers run" in found


@pytest.mark.parametrize(
    ("changes", "state"),
    [
        ({}, OK),
        ({"ActiveState": "failed", "Result": "service-start-limit-hit"}, BROKEN),
        ({"ActiveState": "inactive", "UnitFileState": "enabled"}, BROKEN),
        ({"ActiveState": "inactive", "UnitFileState": "disabled"}, None),
        ({"FileDescriptorName": "scan"}, OK),
        ({"FileDescriptorName": "fdbroker"}, BROKEN),
        ({"Listen": "/run/a (Stream)"}, BROKEN),
        ({"Accept": "yes"}, BROKEN),
        ({"FileDescriptorName": "dgram", "Listen": "/run/a (Datagram)", "PassCredentials": "no"}, WEAKER),
    ],
)
def test_sockets_of_the_unit_are_looked_at(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], state: str | None
) -> None:
    service = RIGHT | {"TriggeredBy": "own.socket"}
    told = shown(monkeypatch, {SERVICE: service, "own.socket": SOCKET | changes})
    assert told.get("own.socket", (None,))[0] == state


@pytest.mark.parametrize(("active", "stops"), [("active", True), ("inactive", False)])
def test_a_socket_of_a_broker_that_runs_is_started_after_it_was_stopped(
    monkeypatch: pytest.MonkeyPatch, active: str, *, stops: bool
) -> None:
    of = {
        SERVICE: RIGHT | {"ActiveState": active, "TriggeredBy": "own.socket"},
        "own.socket": SOCKET | {"ActiveState": "failed"},
    }
    [check] = [check for check in checked(monkeypatch, of) if check.name == "own.socket"]
    assert check.cure.startswith("systemctl stop fdbroker.service; ") is stops


@pytest.mark.parametrize(
    ("active", "listeners", "told"),
    [
        ("active", "{seqpacket: {}}", True),
        ("inactive", "{seqpacket: {}}", False),
        ("active", "{scan: {service: {user: root}, type: seqpacket}}", False),
    ],
)
def test_a_scan_service_that_runs_and_has_no_listener_is_told(
    monkeypatch: pytest.MonkeyPatch, active: str, listeners: str, *, told: bool
) -> None:
    of = {SERVICE: RIGHT, SCAN_SERVICE: RIGHT | {"ActiveState": active, "User": "fdbroker-scand"}}
    names = {check.name for check in checked(monkeypatch, of, listeners=listeners)}
    assert (f"{SCAN_SERVICE} listeners" in names) is told


def test_private_network_goes_wrong_with_datagrams_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    service = RIGHT | {"TriggeredBy": "own.socket", "PrivateNetwork": "yes"}
    datagrams = SOCKET | {"FileDescriptorName": "dgram", "Listen": "/run/a (Datagram)"}
    told = shown(monkeypatch, {SERVICE: service, "own.socket": datagrams})
    assert told[f"{SERVICE} PrivateNetwork="][0] == BROKEN
    for values in (datagrams | {"ActiveState": "inactive"}, SOCKET):
        assert shown(monkeypatch, {SERVICE: service, "own.socket": values})[f"{SERVICE} options"][0] == OK


def test_names_of_sockets_are_not_judged_where_the_policy_can_not_be_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    of = {SERVICE: RIGHT | {"TriggeredBy": "own.socket"}, "own.socket": SOCKET | {"FileDescriptorName": "x"}}
    assert shown(monkeypatch, of, policy=False)["own.socket"][0] == OK
    assert shown(monkeypatch, of)["own.socket"][0] == BROKEN


@pytest.mark.parametrize(
    ("changes", "state"),
    [
        ({"PrivateUsers": "yes"}, BROKEN),
        ({"RestrictNamespaces": "yes"}, BROKEN),
        ({"LimitNOFILE": "100"}, WEAKER),
    ],
)
def test_options_of_the_scan_service_are_looked_at(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], state: str
) -> None:
    told = shown(monkeypatch, {SCAN_SERVICE: {"LoadState": "loaded", "ActiveState": "active"} | changes})
    assert told[f"{SCAN_SERVICE} {next(iter(changes))}="][0] == state


def test_drop_in_that_has_the_option_last_is_named(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("unit", "first", "second", "third")]
    for file, text in zip(
        files, ("PrivateTmp=no", "PrivateTmp=yes", "PrivateTmp = yes", "#PrivateTmp=no"), strict=True
    ):
        file.write_text(f"[Service]\n{text}\n")
    named = unit(FragmentPath=str(files[0]), DropInPaths=" ".join(map(str, files[1:])))
    assert file_with(named, "PrivateTmp") == str(files[2])
    assert file_with(named, "ProtectHome") is None


def test_each_option_that_is_documented_to_go_wrong_is_looked_at() -> None:
    page = (Path(__file__).parents[2] / "docs" / "fdbrokerd.md").read_text()
    [table] = re.findall(r"\| option \| effect \| instead \|\n\|---.*\n((?:\|.*\n)+)", page)
    options = {option for row in table.splitlines() for option in re.findall(r"`(\w+)=", row.split(" | ")[0])}
    assert len(options) > 8
    assert options <= set(systemd._PROPERTIES)
