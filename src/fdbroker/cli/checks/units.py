"""The units of systemd, as it has them after every drop-in: options that break them, and sockets."""

from __future__ import annotations

import os
import re
import subprocess
from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

from fdbroker.cli.checks.check import BROKEN, OK, WEAKER, Check
from fdbroker.config.names import printable
from fdbroker.launcher.unit_options import is_at_or_above

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from fdbroker.cli.checks.check import Running
    from fdbroker.config import CompiledPolicy

SERVICE, SCAN_SERVICE = "fdbroker.service", "fdbroker-scand.service"
_CAPABILITY = "cap_dac_read_search"
# What the broker uses on itself and for each file; systemd's groups may not have it.
_NEEDED_CALLS = frozenset(
    [
        "openat2",
        "memfd_create",
        "seccomp",
        "capset",
        "landlock_create_ruleset",
        "landlock_add_rule",
        "landlock_restrict_self",
    ]
)
_LEAST_OPEN_FILES, _LEAST_TASKS = 1024, 40
_PROPERTIES = (
    *("LoadState", "LoadError", "ActiveState", "Result", "FragmentPath", "DropInPaths", "NeedDaemonReload"),
    *("Type", "NotifyAccess", "User", "TriggeredBy", "MainPID", "DynamicUser", "PrivateUsers", "PrivateTmp"),
    *("ProtectHome", "InaccessiblePaths", "TemporaryFileSystem", "RootDirectory", "RootImage"),
    *("RestrictSUIDSGID", "SystemCallFilter", "RestrictAddressFamilies", "RestrictNamespaces"),
    *("LimitNOFILE", "TasksMax", "NoNewPrivileges", "ReadOnlyPaths", "RuntimeDirectory", "ProcSubset"),
    *("AmbientCapabilities", "CapabilityBoundingSet", "NRestarts", "PrivateNetwork"),
)
_OF_SOCKETS = (
    *(
        "Listen",
        "FileDescriptorName",
        "ActiveState",
        "Result",
        "Accept",
        "PassCredentials",
        "LoadState",
        "UnitFileState",
    ),
)
_KIND_OF = {
    "seqpacket": "SequentialPacket",
    "control": "SequentialPacket",
    "stream": "Stream",
    "dgram": "Datagram",
}


class Unit(NamedTuple):
    """What systemd has of a unit, and the roots that must be seen in it; `values`: what systemctl shows."""

    name: str
    values: Mapping[str, list[str]]
    roots: Sequence[bytes] = ()
    helpers: bool = False

    def value(self, option: str) -> str:
        """Return what an option is; empty if this systemd does not know it."""
        return " ".join(self.values.get(option, []))

    def is_on(self, option: str) -> bool:
        """Return whether a switch is on."""
        return self.value(option) in {"yes", "true", "1"}

    def number(self, option: str) -> float:
        """Return a limit."""
        text = self.value(option)
        return int(text) if text.isdigit() else float("inf")

    def hidden(self) -> bytes | None:
        """Return a root that the unit hides, or from which it hides what is above."""
        places = [*self.value("InaccessiblePaths").split(), *self.value("TemporaryFileSystem").split()]
        hiding = [os.fsencode(place.lstrip("-+").partition(":")[0]) for place in places]
        if self.value("ProtectHome") in {"yes", "true", "1", "tmpfs"}:
            hiding += [b"/home", b"/root", b"/run/user"]
        return next(
            (root for root in self.roots for place in hiding if is_at_or_above(place, root)),
            next((place for place in hiding for root in self.roots if is_at_or_above(root, place)), None),
        )


class _Objection(NamedTuple):
    """What is wrong with options of a unit, what it does, and what to write instead."""

    options: tuple[str, ...]
    effect: str
    instead: str
    state: str = BROKEN


def read_units() -> list[Unit | None]:
    """Return the units of the broker and of the scan service, None for each that systemd does not have.

    To be asked before anything connects to a socket, which starts a service that has failed once more.
    """
    if not os.path.isdir("/run/systemd/system"):
        return [None, None]
    return [_read_unit(SERVICE), _read_unit(SCAN_SERVICE)]


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
        sockets = {
            name: _show(name, _OF_SOCKETS)
            for name in dict.fromkeys([*broker.value("TriggeredBy").split(), *usual])
        }
        objections = objections_to_broker(broker)
        if any(_takes_datagrams(values) for values in sockets.values()):
            objections += _about_datagrams(broker)
        checks += [_state_of(broker), *_options_of(broker, objections)]
        for name, values in sockets.items():
            checks += _socket(name, values, services)
        checks += _whose_broker(broker, running)
    if scand is not None:
        checks += [_state_of(scand), *_options_of(scand, _objections_to_scand(scand))]
    return checks


def _read_unit(name: str) -> Unit | None:
    values = _show(name, _PROPERTIES)
    if not values or values.get("LoadState") == ["not-found"]:
        return None
    return Unit(name, values)


def _show(name: str, properties: Sequence[str]) -> dict[str, list[str]]:
    command = ["systemctl", "show", name, f"--property={','.join(properties)}"]
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=10, check=False)  # noqa: S603 - a fixed command
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = defaultdict(list)
    for line in done.stdout.splitlines():
        key, _, value = line.partition("=")
        values[key].append(value)
    return values


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


# ---- its options ----


def _options_of(unit: Unit, objections: Sequence[_Objection]) -> list[Check]:
    checks = []
    for objection in objections:
        option = objection.options[0]
        shown = ", ".join(f"{each}={_short(unit.value(each))}" for each in objection.options)
        place = file_with(unit, option)
        where = "" if place is None else f" (in {printable(place)})"
        cure = f"{objection.instead}: systemctl edit {unit.name}; then systemctl restart {unit.name}"
        checks.append(
            Check(
                f"{unit.name} {option}=",
                objection.state,
                f"{shown}{where}: {objection.effect}",
                "no option of the unit takes away what the service needs",
                cure,
            )
        )
    if checks:
        return checks
    meaning = "no option of the unit takes away what the service needs"
    return [Check(f"{unit.name} options", OK, "none is in the way", meaning)]


def _short(value: str) -> str:
    longest = 60
    return printable(value) if len(value) <= longest else f"{printable(value[:longest])} ..."


def file_with(unit: Unit, option: str) -> str | None:
    """Return the file that sets an option last, as systemd reads them: the unit, then its drop-ins."""
    for path in reversed([unit.value("FragmentPath"), *unit.value("DropInPaths").split()]):
        try:
            with open(path, encoding="utf-8", errors="surrogateescape") as file:
                if re.search(rf"^\s*{option}\s*=", file.read(), re.MULTILINE):
                    return path
        except OSError:
            continue
    return None


def objections_to_broker(unit: Unit) -> list[_Objection]:
    """Return what goes wrong with a broker in this unit; docs/fdbrokerd.md has the table. Pure."""
    return [
        *_about_its_user(unit),
        *_about_what_it_sees(unit),
        *_about_what_it_may_do(unit),
        *_about_how_it_is_run(unit),
    ]


def _about_its_user(unit: Unit) -> Iterator[_Objection]:
    for option in ("DynamicUser", "PrivateUsers"):
        if unit.is_on(option):
            yield _Objection((option,), "the capability reaches nobody's files", f"{option}=no")
    if unit.value("User") in {"", "root", "0"}:
        return  # it becomes its user by itself, and asks for all that it lacks
    for option in ("AmbientCapabilities", "CapabilityBoundingSet"):
        if _CAPABILITY not in unit.value(option):
            effect = "the broker opens no file of others, and does not start"
            yield _Objection((option,), effect, f"{option}=CAP_DAC_READ_SEARCH")
    if not unit.is_on("NoNewPrivileges"):
        effect = "the mounts of the service are not nosuid, and the broker does not start"
        yield _Objection(("NoNewPrivileges",), effect, "NoNewPrivileges=yes")
    if "/" not in unit.value("ReadOnlyPaths").replace("-/", "/").replace("+/", "/").split():
        effect = (
            "the broker has no read-only view of the files, and does not start unless read_only_view is off"
        )
        yield _Objection(("ReadOnlyPaths",), effect, "ReadOnlyPaths=/")


def _about_what_it_sees(unit: Unit) -> Iterator[_Objection]:
    for option in ("RootDirectory", "RootImage"):
        if unit.value(option):
            yield _Objection((option,), "the roots are those of another tree", f"{option}=")
    hidden = unit.hidden()
    if hidden is not None:
        options = tuple(
            option
            for option in ("ProtectHome", "InaccessiblePaths", "TemporaryFileSystem")
            if unit.value(option) not in {"", "no", "read-only"}
        )
        effect = f"what is served is not there, at {printable(hidden)}"
        yield _Objection(options, effect, "ProtectHome=read-only, and the others without it")
    temporary = [root for root in unit.roots for at in (b"/tmp", b"/var/tmp") if is_at_or_above(at, root)]
    if unit.is_on("PrivateTmp") and temporary:
        effect = f"{printable(temporary[0])} is another directory for it"
        yield _Objection(("PrivateTmp",), effect, "PrivateTmp=no")
    if unit.value("ProcSubset") == "pid":
        effect = "the audit can't tell one boot from another"
        yield _Objection(("ProcSubset",), effect, "ProcSubset=all", WEAKER)


def _about_what_it_may_do(unit: Unit) -> Iterator[_Objection]:
    if unit.is_on("RestrictSUIDSGID"):
        yield _Objection(("RestrictSUIDSGID",), "openat2 is refused to it", "RestrictSUIDSGID=no")
    lacking = calls_refused(unit.value("SystemCallFilter"))
    if lacking:
        names = " ".join(sorted(lacking))
        effect = f"the broker can't restrict itself: {names}"
        yield _Objection(("SystemCallFilter",), effect, f"SystemCallFilter={names} besides")
    families = unit.value("RestrictAddressFamilies")
    if families and ("AF_UNIX" in families) == families.startswith("~"):
        yield _Objection(("RestrictAddressFamilies",), "it has no sockets", "RestrictAddressFamilies=AF_UNIX")


def calls_refused(text: str) -> set[str]:
    """Return which of the calls that the broker needs a SystemCallFilter= refuses, as systemctl shows one."""
    listed = {word.partition(":")[0] for word in text.lstrip("~").split()}
    if not listed:
        return set()
    return set(_NEEDED_CALLS & listed if text.startswith("~") else _NEEDED_CALLS - listed)


def _about_how_it_is_run(unit: Unit) -> Iterator[_Objection]:
    if unit.value("Type") not in {"notify", "notify-reload"} or unit.value("NotifyAccess") == "none":
        effect = "systemd does not know when it serves, and who waits for it goes on too early"
        yield _Objection(("Type", "NotifyAccess"), effect, "Type=notify", WEAKER)
    if unit.number("LimitNOFILE") < _LEAST_OPEN_FILES:
        yield _Objection(("LimitNOFILE",), "too few descriptors", f"LimitNOFILE={_LEAST_OPEN_FILES} at least")
    if unit.helpers and unit.number("TasksMax") < _LEAST_TASKS:
        effect = "open helpers that are given up can't be replaced"
        yield _Objection(("TasksMax",), effect, f"TasksMax={_LEAST_TASKS} at least", WEAKER)
    if "fdbroker" in unit.value("RuntimeDirectory").split():
        effect = "systemd gives the directory of the sockets away, and removes it when the service stops"
        yield _Objection(("RuntimeDirectory",), effect, "RuntimeDirectory= and tmpfiles.d instead")


def _about_datagrams(unit: Unit) -> list[_Objection]:
    """Return what keeps answers from reaching who sends datagrams, by addresses of the network namespace."""
    if not unit.is_on("PrivateNetwork"):
        return []
    effect = "who sends a datagram can't be answered from another network namespace, so it does not start"
    instead = "PrivateNetwork=no, or the .socket unit of datagrams stopped and disabled"
    return [_Objection(("PrivateNetwork",), effect, instead)]


def _objections_to_scand(unit: Unit) -> list[_Objection]:
    found = []
    if unit.is_on("PrivateUsers"):
        effect = "its workers can make no namespaces of their own, and the broker does not know it"
        found.append(_Objection(("PrivateUsers",), effect, "PrivateUsers=no"))
    if unit.is_on("RestrictNamespaces"):
        effect = "its workers can make no namespaces of their own, so none starts"
        found.append(_Objection(("RestrictNamespaces",), effect, "RestrictNamespaces=no"))
    if unit.number("LimitNOFILE") < _LEAST_OPEN_FILES:
        found.append(_Objection(("LimitNOFILE",), "too few descriptors", "LimitNOFILE=16384", WEAKER))
    return found


# ---- sockets ----


def _takes_datagrams(values: Mapping[str, list[str]]) -> bool:
    return values.get("ActiveState") == ["active"] and values.get("FileDescriptorName") == ["dgram"]


def _socket(name: str, values: Mapping[str, list[str]], services: set[str] | None) -> list[Check]:
    """Check a socket unit of the broker; `services`: names that the policy has besides, None: not known."""
    meaning = "clients reach the broker, also while it is not started yet"

    def value(option: str) -> str:
        return " ".join(values.get(option, []))

    if value("LoadState") in {"", "not-found"}:
        return []
    called = value("FileDescriptorName")
    listening = values.get("Listen", [])
    if value("ActiveState") == "inactive" and value("UnitFileState") != "enabled":
        return []  # it is not wanted
    if value("ActiveState") != "active":
        found = f"is {value('ActiveState')} ({value('Result')})"
        cure = f"systemctl reset-failed {name}; systemctl enable --now {name}"
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
    if value("Accept") == "yes":
        found = "Accept=yes: each connection would have a service of its own"
        return [Check(name, BROKEN, found, meaning, f"Accept=no: {cure}")]
    if called == "dgram" and value("PassCredentials") != "yes":
        found = "PassCredentials=no: datagrams of before the broker's start are refused"
        return [Check(name, WEAKER, found, meaning, f"PassCredentials=yes: {cure}")]
    return [Check(name, OK, f"listens: {printable(', '.join(listening))}", meaning)]
