"""Limits of the machine and of the broker's process that are too low for it, and the clock of the audit."""

from __future__ import annotations

import datetime as dt
import os
import time
from typing import TYPE_CHECKING, NamedTuple

from fdbroker.cli.broker import systemd_runs
from fdbroker.cli.checks.check import BROKEN, OK, WEAKER, Check, output_of

if TYPE_CHECKING:
    from fdbroker.cli.checks.check import Running

LEAST_OPEN_FILES = 1024  # as docs/fdbrokerd.md says
LEAST_TASKS = 40  # likewise, with open helpers
_SET_BY = 2.0  # seconds
_STARTING = 10.0  # seconds at most that a start takes


class _Setting(NamedTuple):
    """A value below /proc/sys that has to be at least, or at most, so much; `for_what` it is needed."""

    name: str
    at_least: int | None
    at_most: int | None
    for_what: str

    def objection(self, value: int) -> str | None:
        """Return what to set it to, None if it is right."""
        if self.at_least is not None and value < self.at_least:
            return f"at least {self.at_least}"
        if self.at_most is not None and value > self.at_most:
            return f"{self.at_most}"
        return None


_SETTINGS = (
    _Setting("net/core/somaxconn", 128, None, "so many clients can wait until they are accepted"),
    _Setting("net/core/wmem_max", 32768, None, "a reply with many results fits into a socket's queue"),
    _Setting("fs/pipe-max-size", 1 << 20, None, "the audit can wait in a pipe for whoever reads it"),
    _Setting("user/max_user_namespaces", 1, None, "workers of the scan have namespaces of their own"),
    _Setting("kernel/unprivileged_userns_clone", 1, None, "workers of the scan have namespaces of their own"),
    _Setting(
        "kernel/apparmor_restrict_unprivileged_userns",
        None,
        0,
        "workers of the scan have namespaces of their own",
    ),
)


def limit_checks(running: Running | None) -> list[Check]:
    """Check the settings of the kernel, and what the broker's process may have."""
    checks = [settings()]
    if running is not None:
        checks += [open_files(running), *tasks(running)]
    return [*checks, clock(running)]


def settings(below: str = "/proc/sys") -> Check:
    """Check settings of the kernel; those that it does not have are right."""
    wrong = []
    for setting in _SETTINGS:
        try:
            with open(os.path.join(below, setting.name), encoding="ascii") as file:
                value = int(file.read())
        except (OSError, ValueError):
            continue
        wanted = setting.objection(value)
        if wanted is not None:
            wrong.append((setting, value, wanted))
    if not wrong:
        return Check("kernel settings", OK, "none is in the way", "clients can wait, workers can be confined")
    names = ", ".join(f"{_dotted(setting)} is {value}" for setting, value, _ in wrong)
    meaning = "; ".join(dict.fromkeys(setting.for_what for setting, _, _ in wrong))
    cure = "; ".join(f"set {_dotted(setting)} to {wanted}" for setting, _, wanted in wrong)
    return Check("kernel settings", WEAKER, names, meaning, f"by sysctl: {cure}")


def _dotted(setting: _Setting) -> str:
    return setting.name.replace("/", ".")


def open_files(running: Running) -> Check:
    """Check how many descriptors the broker may have."""
    name, meaning = "its open files", "it can serve many clients, each with many files on the way"
    try:
        with open(running.proc("limits"), encoding="ascii") as file:
            [line] = [line for line in file if line.startswith("Max open files")]
    except OSError as error:
        return Check(name, WEAKER, f"can't be seen: {error.strerror}", meaning, "run this as root")
    soft = line.split()[3]
    if soft != "unlimited" and int(soft) < LEAST_OPEN_FILES:
        cure = f"LimitNOFILE= of its unit, or ulimit -Hn of who starts it: at least {LEAST_OPEN_FILES}"
        return Check(name, BROKEN, f"at most {soft}", meaning, cure)
    return Check(name, OK, f"at most {soft}", meaning)


def tasks(running: Running) -> list[Check]:
    """Check how many processes the broker's control group may have, where open helpers must be replaced."""
    roots = running.status.get("roots")
    if not isinstance(roots, list) or not any(root["opens"] == "helpers" for root in roots):
        return []
    name, meaning = "its tasks", "open helpers that hang can be given up and replaced"
    least = most_tasks(running.pid)
    if least is not None and least < LEAST_TASKS:
        cure = f"TasksMax= of its unit: at least {LEAST_TASKS}"
        return [Check(name, WEAKER, f"at most {least}", meaning, cure)]
    return [Check(name, OK, "no limit" if least is None else f"at most {least}", meaning)]


def most_tasks(pid: int, mounted: str = "/sys/fs/cgroup") -> int | None:
    """Return how many processes the control group of a process may have, None where nothing limits that."""
    try:
        with open(f"/proc/{pid}/cgroup", encoding="utf-8") as file:
            [group] = [line.rstrip("\n")[3:] for line in file if line.startswith("0::")]
        with open(f"{mounted}{group}/pids.max", encoding="ascii") as file:
            text = file.read().strip()
    except (OSError, ValueError):
        return None
    return None if text == "max" else int(text)


# ---- the clock ----


def clock(running: Running | None) -> Check:
    """Check whether times in the audit can be believed: the clock is synchronised, and was not set."""
    name, meaning = "clock", "times in the audit are true, and go with those of other machines"
    if running is not None:
        offset = _set_since(running)
        if offset is not None and abs(offset) > _SET_BY:
            way = "forward" if offset > 0 else "back"
            found = f"was set {way} by {abs(offset):.0f} s since the broker started"
            cure = "see that it is right now; of older records the numbers show the order, the times do not"
            return Check(name, WEAKER, found, meaning, cure)
    if _is_synchronised() is False:
        cure = "as root: timedatectl set-ntp true, or install chrony"
        return Check(name, WEAKER, "is not synchronised", meaning, cure)
    return Check(name, OK, f"{dt.datetime.now(dt.UTC):%Y-%m-%d %H:%M:%SZ}", meaning)


def _set_since(running: Running) -> float | None:
    """Return by how many seconds the clock was set since the broker's first record, as far as can be seen.

    The kernel counts the age of a process by another clock, which nobody sets.
    """
    started = running.status.get("started")
    try:
        age = running.age()
        then = dt.datetime.fromisoformat(str(started))
    except (OSError, ValueError):
        return None
    offset = time.time() - age - then.timestamp()
    # The process is older than that record by what the launcher took.
    return offset if offset > 0 else min(offset + _STARTING, 0.0)


def _is_synchronised() -> bool | None:
    """Ask systemd, where it runs; None: it can't be asked."""
    if not systemd_runs():
        return None
    said = output_of("timedatectl", "show", "--property=NTPSynchronized", "--value")
    return {"yes\n": True, "no\n": False}.get(said or "")
