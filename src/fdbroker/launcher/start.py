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

from fdbroker.kernel import process
from fdbroker.launcher.broker_seccomp import broker_filter
from fdbroker.launcher.mounts import enter_read_only_view
from fdbroker.launcher.privileges import become_broker

if TYPE_CHECKING:
    from collections.abc import Sequence

_ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}


class Start(NamedTuple):
    """What a broker is started with. Descriptors are passed on; the policy is compiled.

    `audit` and `ready` None: none. `dev`: sources that others can write are
    accepted, for trying things out from a checkout.
    """

    uid: int
    gid: int
    policy: dict[str, Any]
    listeners: Sequence[tuple[int, str]] = ()
    connections: Sequence[tuple[int, str]] = ()
    audit: int | None = None
    ready: int | None = None
    dev: bool = False
    python: str = sys.executable


def start_broker(start: Start) -> NoReturn:
    """Turn this process into the broker.

    Raises:
        ReadOnlyViewError, PrivilegeError, OSError: it can't; the process is
            something in between then and must end.

    """
    boot_id = _read_boot_id()
    cgroup_root = find_cgroup2()
    # A renamed or replaced package must not be what execve meets: resolved before anything changes.
    entry = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "broker", "entry.py")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    # Whatever root had there (a terminal, a secret) is none of the broker's business.
    nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.chdir("/")
    os.umask(0o777)
    if start.policy["read_only_view"] == "required":
        enter_read_only_view()
    become_broker(start.uid, start.gid)
    handover = os.memfd_create("fdbroker-handover", os.MFD_CLOEXEC)
    document = {
        "uid": start.uid,
        "gid": start.gid,
        "policy": start.policy,
        "listeners": start.listeners,
        "connections": start.connections,
        "audit": start.audit,
        "ready": start.ready,
        "cgroup_root": cgroup_root,
        "boot_id": boot_id,
        "seccomp": broker_filter().hex(),
    }
    with open(handover, "wb", closefd=False) as file:
        file.write(json.dumps(document).encode())
    os.lseek(handover, 0, os.SEEK_SET)
    process.close_range(3, cloexec=True)
    passed = [number for number, _ in (*start.listeners, *start.connections)]
    for number in (handover, start.audit, start.ready, *passed):
        if number is not None:
            os.set_inheritable(number, True)
    options = ["--dev"] if start.dev else []
    os.execve(  # noqa: S606 - this is the point of the launcher; no shell, a fixed environment
        start.python,
        [start.python, "-I", "-S", "-B", entry, str(handover), *options],
        _ENVIRONMENT,
    )


def find_cgroup2() -> str | None:
    """Return where cgroup2 is mounted, None if it is not."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            before, _, after = line.partition(" - ")
            if after.startswith("cgroup2 "):
                return before.split(" ")[4]
    return None


def _read_boot_id() -> str:
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()
