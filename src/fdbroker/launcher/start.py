"""The last steps before the broker: view, ids, handover, execve. Nothing here comes back.

Whatever has to be done as root and with rich libraries was done before: the
policy is compiled, the sockets listen, the audit is open.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from fdbroker.kernel import capabilities, process
from fdbroker.launcher.broker_seccomp import broker_filter
from fdbroker.launcher.errors import LaunchError
from fdbroker.launcher.helper_seccomp import helper_filter, starter_filter
from fdbroker.launcher.inherited import close_terminals_to_reading
from fdbroker.launcher.mounts import check_read_only_view, enter_read_only_view, read_mounts
from fdbroker.launcher.privileges import become_broker
from fdbroker.launcher.roots import open_roots_that_may_hang
from fdbroker.launcher.version import installed_version

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}


class Start(NamedTuple):
    """What a broker is started with. Descriptors are passed on; the policy is compiled.

    A descriptor that is None: there is none. `held` stay open and are not used,
    as a locked pidfile is. `dev`: sources that others can write are accepted,
    for trying things out from a checkout. `launcher_fingerprint`: of the
    policy's part for the launcher, None if it has none. A listener comes with its
    name, and with that of the service whose clients come there, None: the broker's.
    """

    uid: int
    gid: int
    policy: dict[str, Any]
    listeners: Sequence[tuple[int, str, str | None]] = ()
    connections: Sequence[tuple[int, str]] = ()
    control: int | None = None
    audit: int | None = None
    ready: int | None = None
    notify: int | None = None
    watchdog_usec: int | None = None
    held: Sequence[int] = ()
    dev: bool = False
    launcher_fingerprint: str | None = None
    python: str = sys.executable


def descriptors_of(start: Start) -> list[int]:
    """Return every descriptor that goes to the broker."""
    single = (start.control, start.audit, start.ready, start.notify)
    listeners = (number for number, _, _ in start.listeners)
    connections = (number for number, _ in start.connections)
    return [*listeners, *connections, *start.held, *(number for number in single if number is not None)]


def names_and_paths(policy: Mapping[str, Any]) -> list[tuple[str, str, bool]]:
    """Return name and path of each root of a compiled policy, and whether helpers open there."""
    return [(root["name"], root["path"], root["opens"] == "helpers") for root in policy["roots"]]


def start_broker(start: Start) -> NoReturn:
    """Turn this process into the broker.

    Raises:
        LaunchError, OSError: it can't; the process is
            something in between then and must end.

    """
    boot_id = _read_boot_id()
    version = installed_version()
    cgroup_root = find_cgroup2()
    # A renamed or replaced package must not be what execve meets: resolved before anything changes.
    entry = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "broker", "entry.py")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    # Whatever root had there (a terminal, a secret) is none of the broker's business.
    nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    os.dup2(nothing, 0)
    os.close(nothing)
    close_terminals_to_reading()
    for number in (0, 1, 2):
        # One that is missing after execve is the number of the next file that is opened.
        os.set_inheritable(number, True)
    os.chdir("/")
    os.umask(0o777)
    if start.policy["read_only_view"] == "required":
        if capabilities.capget().effective >> capabilities.CAP_SYS_ADMIN & 1:
            enter_read_only_view()
        else:
            check_read_only_view(names_and_paths(start.policy))
    become_broker(start.uid, start.gid)
    # As the broker, and through its view of the files.
    roots = open_roots_that_may_hang(names_and_paths(start.policy))
    handover = os.memfd_create("fdbroker-handover", os.MFD_CLOEXEC)
    document = {
        "uid": start.uid,
        "gid": start.gid,
        "policy": start.policy,
        "listeners": start.listeners,
        "connections": start.connections,
        "control": start.control,
        "audit": start.audit,
        "ready": start.ready,
        "notify": start.notify,
        "watchdog_usec": start.watchdog_usec,
        "held": start.held,
        "roots": roots,
        "cgroup_root": cgroup_root,
        "boot_id": boot_id,
        "version": version,
        "launcher_fingerprint": start.launcher_fingerprint,
        "seccomp": broker_filter().hex(),
        "helper_seccomp": [starter_filter().hex(), helper_filter().hex()],
    }
    with open(handover, "wb", closefd=False) as file:
        file.write(json.dumps(document).encode())
    os.lseek(handover, 0, os.SEEK_SET)
    process.close_range(3, cloexec=True)
    for number in (handover, *descriptors_of(start), *(number for _, number in roots)):
        os.set_inheritable(number, True)
    options = ["--dev"] if start.dev else []
    try:
        os.execve(  # noqa: S606 - this is the point of the launcher; no shell, a fixed environment
            start.python,
            [start.python, "-I", "-S", "-B", entry, str(handover), *options],
            _ENVIRONMENT,
        )
    except OSError as error:
        raise LaunchError(
            f"the broker's interpreter {start.python} can't be run: {error.strerror}; install it where every"
            " user can reach and execute it"
        ) from error


def find_cgroup2() -> str | None:
    """Return where cgroup2 is mounted, None if it is not."""
    points = (mount.point for mount in read_mounts() if mount.type == b"cgroup2")
    return next(map(os.fsdecode, points), None)


def _read_boot_id() -> str:
    """Return what tells one boot from another in the audit; ProcSubset=pid of systemd hides it."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except FileNotFoundError:
        return "unknown"
