"""What systemd has of units, after every drop-in, as systemctl shows it."""

from __future__ import annotations

import os
from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

from fdbroker.cli.broker import SERVICE, systemd_runs
from fdbroker.cli.checks.check import output_of
from fdbroker.launcher.mounts import is_at_or_above

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

SCAN_SERVICE = "fdbroker-scand.service"
_PROPERTIES = (
    *("LoadState", "LoadError", "ActiveState", "Result", "FragmentPath", "DropInPaths", "NeedDaemonReload"),
    *("Type", "NotifyAccess", "User", "TriggeredBy", "MainPID", "DynamicUser", "PrivateUsers", "PrivateTmp"),
    *("ProtectHome", "InaccessiblePaths", "TemporaryFileSystem", "RootDirectory", "RootImage"),
    *("RestrictSUIDSGID", "SystemCallFilter", "RestrictAddressFamilies", "RestrictNamespaces"),
    *("LimitNOFILE", "TasksMax", "NoNewPrivileges", "ReadOnlyPaths", "RuntimeDirectory", "ProcSubset"),
    *("AmbientCapabilities", "CapabilityBoundingSet", "NRestarts", "PrivateNetwork"),
)
_OF_SOCKETS = (
    *("Listen", "FileDescriptorName", "ActiveState", "Result"),
    *("Accept", "PassCredentials", "LoadState", "UnitFileState"),
)


class Unit(NamedTuple):
    """What systemd has of a unit, as systemctl shows it (`values`), and what the policy wants of it.

    `roots`: what must be seen in it. `helpers`: one of them has `opens: helpers`.
    """

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
        """Return a limit, infinite if there is none."""
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


def read_units() -> list[Unit | None]:
    """Return the units of the broker and of the scan service, None for each that systemd does not have.

    To be asked before anything connects to a socket, which starts a service that has failed once more.
    """
    if not systemd_runs():
        return [None, None]
    return [_read_unit(SERVICE, _PROPERTIES), _read_unit(SCAN_SERVICE, _PROPERTIES)]


def read_socket(name: str) -> Unit | None:
    """Return a .socket unit, None where systemd does not have it, or can't be asked."""
    return _read_unit(name, _OF_SOCKETS)


def _read_unit(name: str, properties: Sequence[str]) -> Unit | None:
    values = _show(name, properties)
    if not values or values.get("LoadState") == ["not-found"]:
        return None
    return Unit(name, values)


def _show(name: str, properties: Sequence[str]) -> dict[str, list[str]]:
    shown = output_of("systemctl", "show", name, f"--property={','.join(properties)}")
    values = defaultdict(list)
    for line in (shown or "").splitlines():
        key, _, value = line.partition("=")
        values[key].append(value)
    return values
