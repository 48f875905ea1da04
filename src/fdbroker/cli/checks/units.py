"""The units of systemd: whether they run, with which options, and whether their sockets listen."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from fdbroker.cli.checks.check import BROKEN, OK, WEAKER, Check
from fdbroker.cli.checks.systemd import read_socket
from fdbroker.cli.checks.unit_options import (
    about_datagrams,
    objections_to_broker,
    objections_to_scand,
    options_of,
)
from fdbroker.config.names import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fdbroker.cli.checks.check import Running
    from fdbroker.cli.checks.systemd import Unit
    from fdbroker.config import CompiledPolicy

_KIND_OF = {
    "seqpacket": "SequentialPacket",
    "control": "SequentialPacket",
    "stream": "Stream",
    "dgram": "Datagram",
}


def unit_checks(
    units: Sequence[Unit | None], compiled: CompiledPolicy | None, running: Running | None
) -> list[Check]:
    """Check what `read_units` returned, and the sockets."""
    roots = [] if compiled is None else [os.fsencode(root["path"]) for root in compiled["roots"]]
    helpers = compiled is not None and any(root["opens"] == "helpers" for root in compiled["roots"])
    services = None if compiled is None else {service["name"] for service in compiled["services"]}
    checks = []
    broker, scand = units
    if broker is not None:
        broker = broker._replace(roots=roots, helpers=helpers)
        # One that was not started yet is not among those that systemd knows of.
        usual = [f"fdbroker-{name}.socket" for name in (*_KIND_OF, *sorted(services or ()))]
        names = dict.fromkeys([*broker.value("TriggeredBy").split(), *usual])
        sockets = [unit for unit in map(read_socket, names) if unit is not None]
        objections = objections_to_broker(broker)
        if any(map(_takes_datagrams, sockets)):
            objections += about_datagrams(broker)
        checks += [_state_of(broker), *options_of(broker, objections)]
        for unit in sockets:
            checks += _socket(unit, services, served=broker.value("ActiveState") == "active")
        checks += _whose_broker(broker, running)
    if scand is not None:
        checks += [_state_of(scand), *options_of(scand, objections_to_scand(scand))]
        checks += _listeners_of_scand(scand, services)
    return checks


# ---- its state ----


def _state_of(unit: Unit) -> Check:
    meaning = "systemd starts it when it is wanted"
    load, active, result = unit.value("LoadState"), unit.value("ActiveState"), unit.value("Result")
    drop_ins = unit.value("DropInPaths")
    files = f"{unit.value('FragmentPath')}{f' with {drop_ins}' if drop_ins else ''}"
    if load != "loaded":
        cure = f"systemctl unmask {unit.name}" if load == "masked" else f"systemd-analyze verify {unit.name}"
        found = f"is {load}: {printable(unit.value('LoadError'))}".rstrip(": ")
        return Check(unit.name, BROKEN, found, meaning, cure)
    if active == "failed":
        start = f"systemctl reset-failed {unit.name}; systemctl start {unit.name}"
        found = f"has failed ({result})"
        if result == "start-limit-hit":
            found += ": it ended too often in a short time, and systemd does not start it any more"
        return Check(unit.name, BROKEN, found, meaning, f"see why: journalctl -u {unit.name}; then {start}")
    again = unit.value("NRestarts")
    if again not in {"", "0"}:
        cure = f"see why: journalctl -u {unit.name}; then systemctl restart {unit.name}"
        found = f"{active}: it ended by itself, and systemd has started it {again} times again"
        return Check(unit.name, WEAKER if active == "active" else BROKEN, found, meaning, cure)
    if unit.is_on("NeedDaemonReload"):
        found = f"was changed since systemd has read it: {files}"
        cure = f"systemctl daemon-reload; systemctl restart {unit.name}"
        return Check(unit.name, WEAKER, found, meaning, cure)
    return Check(unit.name, OK, f"{active}, {files}", meaning)


def _whose_broker(unit: Unit, running: Running | None) -> list[Check]:
    """Check that the broker that answers is that of the unit, if the unit runs."""
    if running is None or unit.value("ActiveState") != "active":
        return []
    main = unit.value("MainPID")
    if main == str(running.pid):
        return []
    found = f"has process {main}, and process {running.pid} answers: two brokers run"
    cure = f"end the one that is not meant: fdbrokerd --stop, or systemctl stop {unit.name}"
    return [Check(f"{unit.name} process", BROKEN, found, "one broker serves, by one policy", cure)]


def _listeners_of_scand(unit: Unit, services: set[str] | None) -> list[Check]:
    """Check that the policy gives clients to a scan service that runs; `services`: None: not known."""
    if services is None or services or unit.value("ActiveState") != "active":
        return []
    found = "runs, and the policy has no listener of a service, so it has no clients"
    cure = (
        "name one in the policy, and start its socket (docs/scand.md); or systemctl disable --now "
        + unit.name
    )
    return [Check(f"{unit.name} listeners", WEAKER, found, "users reach the scan service", cure)]


# ---- sockets ----


def _takes_datagrams(unit: Unit) -> bool:
    return unit.value("ActiveState") == "active" and unit.value("FileDescriptorName") == "dgram"


def _socket(unit: Unit, services: set[str] | None, *, served: bool) -> list[Check]:
    """Check a socket unit of the broker.

    `services`: names that the policy has besides, None: not known; `served`: whether the broker's
    service runs.
    """
    name, meaning = unit.name, "clients reach the broker, also while it is not started yet"
    called = unit.value("FileDescriptorName")
    listening = unit.values.get("Listen", [])
    if unit.value("ActiveState") == "inactive" and unit.value("UnitFileState") != "enabled":
        return []  # it is not wanted
    if unit.value("ActiveState") != "active":
        found = f"is {unit.value('ActiveState')} ({unit.value('Result')})"
        cure = f"systemctl reset-failed {name}; systemctl enable --now {name}"
        if served:  # systemd passes sockets when a service starts, and starts none of one that runs
            cure = f"systemctl stop fdbroker.service; {cure}"
        return [Check(name, BROKEN, found, meaning, cure)]
    cure = f"systemctl edit {name}; then systemctl restart {name}"
    if called not in _KIND_OF and services is not None and called not in services:
        found = (
            f"FileDescriptorName={printable(called)} is no socket of fdbroker, so the broker does not start"
        )
        return [Check(name, BROKEN, found, meaning, f"FileDescriptorName=seqpacket, as may be: {cure}")]
    kind = _KIND_OF.get(called)
    wrong = [one for one in listening if kind is not None and not one.endswith(f"({kind})")]
    if wrong:
        found = f"{printable(wrong[0])} is another type than {called} says, so the broker does not start"
        return [Check(name, BROKEN, found, meaning, f"Listen{kind}=: {cure}")]
    if unit.value("Accept") == "yes":
        found = "Accept=yes: each connection would have a service of its own"
        return [Check(name, BROKEN, found, meaning, f"Accept=no: {cure}")]
    if called == "dgram" and unit.value("PassCredentials") != "yes":
        found = "PassCredentials=no: datagrams of before the broker's start are refused"
        return [Check(name, WEAKER, found, meaning, f"PassCredentials=yes: {cure}")]
    return [Check(name, OK, f"listens: {printable(', '.join(listening))}", meaning)]
