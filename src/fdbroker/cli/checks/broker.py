"""The running broker: whether it answers, what it says of its protection, its policy and its code."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import fdbroker
from fdbroker import client
from fdbroker.broker.entry import TRUSTED_FOLDERS
from fdbroker.cli.broker import how_to_restart, obstacle
from fdbroker.cli.checks.check import BROKEN, MISSING, OK, WEAKER, Check, Places, Running
from fdbroker.cli.policy_file import changes_for_restart
from fdbroker.client import BrokerError, control
from fdbroker.config.names import printable
from fdbroker.wire.client import for_broker

if TYPE_CHECKING:
    from fdbroker.config import CompiledPolicy


def broker_checks(places: Places, compiled: CompiledPolicy | None) -> tuple[list[Check], Running | None]:
    """Ask the broker; return also what is needed to look at its process, None where it can't be had."""
    name = "broker"
    meaning = "answers you"
    try:
        with client.connect(os.fsencode(places.socket), timeout=5.0) as connected:
            status = connected.status()
    except BrokerError as error:
        found, cure = obstacle(places.socket, error)
        return [Check(name, MISSING, found, meaning, cure)], None
    found = (
        f"answers on {printable(places.socket)}, policy generation {printable(str(status.get('generation')))}"
    )
    checks = [Check(name, OK, found, meaning)]
    control_socket, whole = _control_socket(places, status)
    checks.append(control_socket)
    checks += [*layers(status), *_in_force(whole, compiled, places.policy)]
    pid = whole.get("pid")
    running = Running(pid, whole) if isinstance(pid, int) else None
    if running is not None:
        checks.append(its_code(running))
    return checks, running


def _control_socket(places: Places, status: dict[str, object]) -> tuple[Check, dict[str, object]]:
    """Return what the control socket of the broker with this status is worth, and the whole status."""
    name, meaning = "control socket", "reload, status and explain need it"
    if places.control is None:
        found = "not asked: nothing says where this broker has it"
        return Check(name, WEAKER, found, meaning, "name it: --control PATH"), {}
    shown = printable(places.control)
    try:
        with control.connect(os.fsencode(places.control), timeout=5.0) as connection:
            whole = connection.status()
    except BrokerError as error:
        found, cure = obstacle(places.control, error, "--control")
        return Check(name, WEAKER, found, meaning, cure), {}
    # Each start of a broker has its number, if it has an audit.
    if whole.get("audit") != status.get("audit"):
        found = f"{shown} is another broker's than {printable(places.socket)}"
        return Check(name, BROKEN, found, meaning, "name that of the same broker: --control PATH"), {}
    return Check(name, OK, f"answers on {shown}", meaning), whole


def layers(status: dict[str, object]) -> list[Check]:
    """Return what the broker says of its own protection."""
    view, abi, level = status.get("read_only_view"), status.get("landlock"), status.get("identity_level")
    meaning = "descriptors that it hands out stay read-only"
    checks = [Check("its read-only view", OK, "in force", meaning)]
    if view != "required":
        cure = "remove read_only_view from the policy and restart the broker"
        checks = [Check("its read-only view", WEAKER, f"{printable(str(view))}", meaning, cure)]
    meaning = "it opens nothing outside its roots"
    if abi:
        checks.append(Check("its Landlock domain", OK, f"in force, ABI {printable(str(abi))}", meaning))
    else:
        checks.append(Check("its Landlock domain", MISSING, "not in force", meaning, "see Landlock above"))
    meaning = "it makes no system call but those that it needs"
    if status.get("seccomp") is True:
        checks.append(Check("its seccomp filter", OK, "in force", meaning))
    else:
        checks.append(Check("its seccomp filter", MISSING, "not in force", meaning, "start it by fdbrokerd"))
    meaning = "how sure it is of who asks, from 0 to 2"
    state = OK if level == 2 else WEAKER  # noqa: PLR2004 - the levels are numbers
    cure = "" if state == OK else "see SO_PEERPIDFD and PIDFD_GET_INFO above"
    checks.append(Check("its identity level", state, printable(str(level)), meaning, cure))
    meaning = "every decision is recorded"
    if status.get("audit") == "off":
        cure = "start it with an audit (audit: {to: FILE} in the policy)"
        checks.append(Check("its audit", WEAKER, "off", meaning, cure))
    else:
        checks.append(Check("its audit", OK, f"run {printable(str(status.get('audit')))}", meaning))
    return checks


def _in_force(whole: dict[str, object], compiled: CompiledPolicy | None, path: str) -> list[Check]:
    """Return whether the broker decides by the policy file as it is now, where both can be seen."""
    fingerprint = whole.get("fingerprint")
    if compiled is None or fingerprint is None:
        return []
    from fdbroker.policy.rules import read_policy  # noqa: PLC0415 - only here

    meaning = "what the policy file says is what the broker does"
    changes = ", ".join(changes_for_restart(compiled, whole))
    same = read_policy(for_broker(compiled)).fingerprint == fingerprint
    if same and not changes:
        return [Check("its policy", OK, f"is that of {printable(path)}", meaning)]
    if same:
        found = f"is that of {printable(path)}, but for {changes}, which changed since the broker was started"
    else:
        found = f"is not that of {printable(path)}: the file was changed, or another one was loaded"
    cure = f"restart the broker: no reload changes {changes}" if changes else "as root: fdbroker reload"
    return [Check("its policy", WEAKER, found, meaning, cure)]


def its_code(running: Running) -> Check:
    """Check that the broker runs what is installed here: a package may have been replaced under it."""
    name = "its version"
    meaning = "what was mended in the installed version is mended in the broker that runs"
    cure = f"restart the broker: {how_to_restart()}"
    ours, its = fdbroker.__version__, running.status.get("version")
    if its != ours:
        found = f"{printable(str(its))}; installed here is {ours}"
        return Check(name, WEAKER, found, meaning, cure)
    try:
        began = time.time() - running.age()
        newest = max(os.stat(source).st_ctime for source in _its_sources())
    except OSError as error:
        found = f"{ours}; when it was installed can't be seen: {error.strerror}"
        return Check(name, WEAKER, found, meaning, "run this as root, where the broker runs")
    if newest > began:
        return Check(name, WEAKER, f"{ours}, installed anew since the broker was started", meaning, cure)
    return Check(name, OK, f"{ours}, as installed", meaning)


def _its_sources() -> list[Path]:
    package = Path(fdbroker.__file__).parent
    return [source for folder in TRUSTED_FOLDERS for source in (package / folder).glob("*.py")]
