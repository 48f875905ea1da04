"""What `doctor` looks at: each check tries one thing and says what it found, what it means, what helps."""

from __future__ import annotations

import os

from fdbroker.cli.checks.broker import broker_checks
from fdbroker.cli.checks.check import BROKEN, MISSING, OK, WEAKER, Check, Places
from fdbroker.cli.checks.denials import denial_checks
from fdbroker.cli.checks.files import directory, file_checks
from fdbroker.cli.checks.installation import account_checks, modules, program
from fdbroker.cli.checks.kernel import kernel_checks
from fdbroker.cli.checks.limits import limit_checks
from fdbroker.cli.checks.on_access import on_access_checks
from fdbroker.cli.checks.policy import needs, policy_file, warnings
from fdbroker.cli.checks.roots import root_checks
from fdbroker.cli.checks.scanning import scan_checks
from fdbroker.cli.checks.units import read_units, unit_checks

__all__ = ["BROKEN", "MISSING", "OK", "WEAKER", "Check", "Places", "all_checks"]


def all_checks(places: Places) -> list[Check]:
    """Try everything, in the order in which a broker would meet it."""
    units = read_units()
    policy, compiled = policy_file(places.policy)
    broker, running = broker_checks(places, compiled)
    return [
        *kernel_checks(),
        *account_checks(compiled, otherwise=WEAKER if broker[0].state == OK else MISSING),
        modules(),
        program(),
        directory(os.path.dirname(places.socket)),
        policy,
        *warnings(places.policy, compiled),
        *needs(compiled),
        *unit_checks(units, compiled, running),
        *broker,
        *file_checks(places.socket, compiled, running),
        *root_checks(running),
        *on_access_checks(running),
        *limit_checks(running),
        *denial_checks(running),
        *scan_checks(compiled),
    ]
