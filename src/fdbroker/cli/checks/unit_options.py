"""Options of units that take away what a service needs; docs/fdbrokerd.md has the table."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from fdbroker.cli.checks.check import BROKEN, OK, WEAKER, Check
from fdbroker.cli.checks.limits import LEAST_OPEN_FILES, LEAST_TASKS
from fdbroker.config.names import printable
from fdbroker.launcher.mounts import is_at_or_above

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from fdbroker.cli.checks.systemd import Unit

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


class Objection(NamedTuple):
    """What is wrong with options of a unit, what it does, and what to write instead."""

    options: tuple[str, ...]
    effect: str
    instead: str
    state: str = BROKEN


def options_of(unit: Unit, objections: Sequence[Objection]) -> list[Check]:
    """Return a check for each objection, with the file that has the option; else one that is OK."""
    meaning = "no option of the unit takes away what the service needs"
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
                meaning,
                cure,
            )
        )
    return checks or [Check(f"{unit.name} options", OK, "none is in the way", meaning)]


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


def objections_to_broker(unit: Unit) -> list[Objection]:
    """Return what goes wrong with a broker in this unit."""
    return [
        *_about_its_user(unit),
        *_about_what_it_sees(unit),
        *_about_what_it_may_do(unit),
        *_about_how_it_is_run(unit),
    ]


def _about_its_user(unit: Unit) -> Iterator[Objection]:
    for option in ("DynamicUser", "PrivateUsers"):
        if unit.is_on(option):
            yield Objection((option,), "the capability reaches nobody's files", f"{option}=no")
    if unit.value("User") in {"", "root", "0"}:
        return  # it becomes its user by itself, and asks for all that it lacks
    for option in ("AmbientCapabilities", "CapabilityBoundingSet"):
        if _CAPABILITY not in unit.value(option):
            effect = "the broker opens no file of others, and does not start"
            yield Objection((option,), effect, f"{option}=CAP_DAC_READ_SEARCH")
    if not unit.is_on("NoNewPrivileges"):
        effect = "the mounts of the service are not nosuid, and the broker does not start"
        yield Objection(("NoNewPrivileges",), effect, "NoNewPrivileges=yes")
    if "/" not in unit.value("ReadOnlyPaths").replace("-/", "/").replace("+/", "/").split():
        effect = (
            "the broker has no read-only view of the files, and does not start unless read_only_view is off"
        )
        yield Objection(("ReadOnlyPaths",), effect, "ReadOnlyPaths=/")


def _about_what_it_sees(unit: Unit) -> Iterator[Objection]:
    for option in ("RootDirectory", "RootImage"):
        if unit.value(option):
            yield Objection((option,), "the roots are those of another tree", f"{option}=")
    hidden = unit.hidden()
    if hidden is not None:
        options = tuple(
            option
            for option in ("ProtectHome", "InaccessiblePaths", "TemporaryFileSystem")
            if unit.value(option) not in {"", "no", "read-only"}
        )
        effect = f"what is served is not there, at {printable(hidden)}"
        yield Objection(options, effect, "ProtectHome=read-only, and the others without it")
    temporary = [root for root in unit.roots for at in (b"/tmp", b"/var/tmp") if is_at_or_above(at, root)]
    if unit.is_on("PrivateTmp") and temporary:
        effect = f"{printable(temporary[0])} is another directory for it"
        yield Objection(("PrivateTmp",), effect, "PrivateTmp=no")
    if unit.value("ProcSubset") == "pid":
        effect = "the audit can't tell one boot from another"
        yield Objection(("ProcSubset",), effect, "ProcSubset=all", WEAKER)


def _about_what_it_may_do(unit: Unit) -> Iterator[Objection]:
    if unit.is_on("RestrictSUIDSGID"):
        yield Objection(("RestrictSUIDSGID",), "openat2 is refused to it", "RestrictSUIDSGID=no")
    lacking = calls_refused(unit.value("SystemCallFilter"))
    if lacking:
        names = " ".join(sorted(lacking))
        effect = f"the broker can't restrict itself: {names}"
        yield Objection(("SystemCallFilter",), effect, f"SystemCallFilter={names} besides")
    families = unit.value("RestrictAddressFamilies")
    if families and ("AF_UNIX" in families) == families.startswith("~"):
        yield Objection(("RestrictAddressFamilies",), "it has no sockets", "RestrictAddressFamilies=AF_UNIX")


def calls_refused(text: str) -> set[str]:
    """Return which of the calls that the broker needs a SystemCallFilter= refuses, as systemctl shows one."""
    listed = {word.partition(":")[0] for word in text.lstrip("~").split()}
    if not listed:
        return set()
    return set(_NEEDED_CALLS & listed if text.startswith("~") else _NEEDED_CALLS - listed)


def _about_how_it_is_run(unit: Unit) -> Iterator[Objection]:
    if unit.value("Type") not in {"notify", "notify-reload"} or unit.value("NotifyAccess") == "none":
        effect = "systemd does not know when it serves, and who waits for it goes on too early"
        yield Objection(("Type", "NotifyAccess"), effect, "Type=notify", WEAKER)
    if unit.number("LimitNOFILE") < LEAST_OPEN_FILES:
        yield Objection(("LimitNOFILE",), "too few descriptors", f"LimitNOFILE={LEAST_OPEN_FILES} at least")
    if unit.helpers and unit.number("TasksMax") < LEAST_TASKS:
        effect = "open helpers that are given up can't be replaced"
        yield Objection(("TasksMax",), effect, f"TasksMax={LEAST_TASKS} at least", WEAKER)
    if "fdbroker" in unit.value("RuntimeDirectory").split():
        effect = "systemd gives the directory of the sockets away, and removes it when the service stops"
        yield Objection(("RuntimeDirectory",), effect, "RuntimeDirectory= and tmpfiles.d instead")


def about_datagrams(unit: Unit) -> list[Objection]:
    """Return what keeps answers from reaching who sends datagrams, by addresses of the network namespace."""
    if not unit.is_on("PrivateNetwork"):
        return []
    effect = "who sends a datagram can't be answered from another network namespace, so it does not start"
    instead = "PrivateNetwork=no, or the .socket unit of datagrams stopped and disabled"
    return [Objection(("PrivateNetwork",), effect, instead)]


def objections_to_scand(unit: Unit) -> list[Objection]:
    """Return what goes wrong with a scan service in this unit."""
    found = []
    if unit.is_on("PrivateUsers"):
        effect = "its workers can make no namespaces of their own, and the broker does not know it"
        found.append(Objection(("PrivateUsers",), effect, "PrivateUsers=no"))
    if unit.is_on("RestrictNamespaces"):
        effect = "its workers can make no namespaces of their own, so none starts"
        found.append(Objection(("RestrictNamespaces",), effect, "RestrictNamespaces=no"))
    if unit.number("LimitNOFILE") < LEAST_OPEN_FILES:
        found.append(Objection(("LimitNOFILE",), "too few descriptors", "LimitNOFILE=16384", WEAKER))
    return found
