"""What `doctor` looks at: each check tries one thing and says what it found, what it means, what helps."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, cast

from fdbroker.cli.checks.broker import broker_checks
from fdbroker.cli.checks.check import (
    BROKEN,
    MISSING,
    OK,
    WEAKER,
    Check,
    NotSeenError,
    Places,
    in_time,
)
from fdbroker.cli.checks.denials import denial_checks
from fdbroker.cli.checks.files import directory, file_checks
from fdbroker.cli.checks.installation import account_checks, modules, program
from fdbroker.cli.checks.kernel import kernel_checks
from fdbroker.cli.checks.limits import limit_checks
from fdbroker.cli.checks.on_access import on_access_checks
from fdbroker.cli.checks.policy import needs, policy_file, warnings
from fdbroker.cli.checks.roots import root_checks
from fdbroker.cli.checks.scanning import scan_checks
from fdbroker.cli.checks.systemd import read_units
from fdbroker.cli.checks.units import unit_checks
from fdbroker.config.names import printable

if TYPE_CHECKING:
    from collections.abc import Callable

    from fdbroker.config import CompiledPolicy

__all__ = ["BROKEN", "MISSING", "OK", "WEAKER", "Check", "Places", "all_checks"]


def all_checks(places: Places) -> list[Check]:
    """Try everything, in the order in which a broker would meet it."""
    units = read_units()
    policy, compiled = _policy(places.policy)
    broker, running = broker_checks(places, compiled)
    return [
        *kernel_checks(),
        *account_checks(compiled, otherwise=WEAKER if broker[0].state == OK else MISSING),
        modules(),
        program(),
        directory(os.path.dirname(places.socket)),
        *policy,
        *needs(compiled),
        *_of("units", lambda: unit_checks(units, compiled, running)),
        *broker,
        *_of("its files", lambda: file_checks(places.socket, compiled, running)),
        *_of("its roots", lambda: root_checks(running)),
        *_of("on-access scanners", lambda: on_access_checks(running)),
        *_of("limits", lambda: limit_checks(running)),
        *_of("denials", lambda: denial_checks(running)),
        *_of("scan service", lambda: scan_checks(compiled)),
    ]


def _policy(path: str) -> tuple[list[Check], CompiledPolicy | None]:
    """Return what there is to say of the policy file, and what it compiles to, None if it does not.

    It is compared with this machine's directories.
    """

    def look() -> object:
        check, compiled = policy_file(path)
        return [[check, *warnings(path, compiled)], compiled]

    try:
        rows, compiled = cast("tuple[list[list[str]], CompiledPolicy | None]", in_time(look))
    except NotSeenError as error:
        return [_not_seen(printable(path), error)], None
    return [Check(*row) for row in rows], compiled


def _of(name: str, look: Callable[[], list[Check]]) -> list[Check]:
    """Return what a look gives. What goes away or hangs, or lies to us, is not to hide all the rest."""
    try:
        return [Check(*row) for row in cast("list[list[str]]", in_time(look))]
    except NotSeenError as error:
        return [_not_seen(name, error)]


def _not_seen(name: str, error: NotSeenError) -> Check:
    found = f"could not be looked at to the end: {printable(str(error))}"
    cure = "see that all mounts answer (ls below each), then run this again"
    return Check(name, WEAKER, found, "what else is wrong there is not known", cure)
