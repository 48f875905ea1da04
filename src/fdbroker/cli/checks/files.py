"""Files of the broker: sockets and their directory, audit, pidfile: whose they are, and who may do what."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from typing import TYPE_CHECKING

from fdbroker.cli.broker import how_to_restart, is_a_service
from fdbroker.cli.checks.check import BROKEN, MISSING, OK, WEAKER, Check
from fdbroker.config.directories import Sticky, UnsafeDirectoryError, open_directory
from fdbroker.config.names import counted, group_name, printable, user_text
from fdbroker.kernel import peers
from fdbroker.launcher.inherited import KINDS
from fdbroker.launcher.options import DEFAULT_PIDFILE

if TYPE_CHECKING:
    from fdbroker.cli.checks.check import Running
    from fdbroker.config import CompiledPolicy
    from fdbroker.config.compiled import CompiledListener

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_LITTLE_ROOM = 64 << 20  # bytes of a disk
_MOST_DIGITS = 32  # bytes of a pidfile


def file_checks(socket_path: str, compiled: CompiledPolicy | None, running: Running | None) -> list[Check]:
    """Check all of them."""
    return [
        *sockets(socket_path, compiled, running),
        *audit_file(compiled, running),
        *pidfile(DEFAULT_PIDFILE, running),
    ]


def directory(path: str) -> Check:
    """Check that a directory of sockets is root's alone to write."""
    meaning = "nobody but root can put a false broker's socket there"
    shown = printable(path or "/")
    try:
        status = os.lstat(path or "/")
    except OSError as error:
        return Check(
            shown, WEAKER, error.strerror or str(error), meaning, "fdbrokerd makes it when it starts"
        )
    if not stat.S_ISDIR(status.st_mode):
        return Check(
            shown, MISSING, "is no directory", meaning, "remove it; fdbrokerd makes it when it starts"
        )
    if status.st_uid or status.st_mode & _OTHERS_WRITE:
        found = f"belongs to uid {status.st_uid} and has mode 0{stat.S_IMODE(status.st_mode):03o}"
        return Check(shown, MISSING, found, meaning, f"as root: chown root:root {shown} && chmod 755 {shown}")
    return Check(shown, OK, "is root's alone to write", meaning)


# ---- sockets ----


def sockets(socket_path: str, compiled: CompiledPolicy | None, running: Running | None) -> list[Check]:
    """Check the sockets of the policy that the running broker has: are they there, whose, who listens.

    Of a broker whose sockets are others than the policy's (--socket) nothing is known but their names.
    """
    if compiled is None or running is None:
        return []
    listeners = compiled["daemon"]["listeners"]
    if socket_path not in {listener["path"] for listener in listeners.values()}:
        return []
    listed = running.status.get("listeners")
    names = {row["name"] for row in listed} if isinstance(listed, list) else set()
    return [_socket(name, listener) for name, listener in listeners.items() if name in names]


def _socket(name: str, listener: CompiledListener) -> Check:
    title, meaning = f"socket {name}", "whoever is meant to connects to the broker, and nobody else"
    shown = printable(listener["path"])
    try:
        status = os.lstat(listener["path"])
    except OSError as error:
        found = f"{shown}: {error.strerror}, though the broker listens: it was removed"
        return Check(title, BROKEN, found, meaning, f"the broker makes it again: {how_to_restart()}")
    mode = stat.S_IMODE(status.st_mode)
    whose = f"mode 0{mode:03o}, {user_text(status.st_uid)}:{group_name(status.st_gid)}"
    if not stat.S_ISSOCK(status.st_mode):
        cure = f"remove it; then the broker makes a socket again: {how_to_restart()}"
        return Check(title, BROKEN, f"{shown} is no socket ({whose})", meaning, cure)
    try:
        who = _who_listens(listener)
    except OSError as error:
        if error.errno in {errno.EACCES, errno.EPERM}:
            return Check(title, OK, f"{shown}, {whose}; you may not connect", meaning)
        found = f"{shown}, {whose}: {error.strerror}: it is another one than that of the broker"
        cure = f"remove it; the broker makes it again: {how_to_restart()}"
        return Check(title, BROKEN, found, meaning, cure)
    if status.st_uid:
        cure = f"as root: chown root {shown}; SocketUser=root in a unit"
        found = f"{shown} ({whose}) is not root's, so its owner says who may connect"
        return Check(title, WEAKER, found, meaning, cure)
    if mode != listener["mode"] or (listener["gid"] is not None and status.st_gid != listener["gid"]):
        wanted = f"mode 0{listener['mode']:03o}"
        if listener["gid"] is not None:
            wanted += f" and the group {group_name(listener['gid'])}"
        where = "SocketMode= and SocketGroup= of its unit" if who == _SYSTEMD else "listeners of the policy"
        cure = f"see {where}; then restart what made it"
        return Check(title, WEAKER, f"{shown}, {whose}; the policy says {wanted}", meaning, cure)
    return Check(title, OK, f"{shown}, {whose}, made by {who}", meaning)


_SYSTEMD = "systemd"


def _who_listens(listener: CompiledListener) -> str:
    """Connect, hang up, and return who made the socket; OSError: nobody has it, or this user may not."""
    kind = KINDS[listener["kind"]].type
    with socket.socket(socket.AF_UNIX, kind) as sock:
        sock.settimeout(1.0)
        sock.connect(os.fsencode(listener["path"]))
        if kind == socket.SOCK_DGRAM:
            return "whoever binds it"
        maker = peers.read_ucred(peers.peer_credentials(sock))
    return _SYSTEMD if maker.pid == 1 else "fdbrokerd"


# ---- the audit ----


def audit_file(compiled: CompiledPolicy | None, running: Running | None) -> list[Check]:
    """Check the file that the policy names for the audit: whose it is, its room, and who writes to it."""
    failures = 0 if running is None else running.status.get("audit_failures", 0)
    path = None if compiled is None else compiled["daemon"]["audit"]
    name, meaning = "audit file", "every decision can be recorded, and by the broker alone"
    shown = "" if path is None else printable(path)
    failed = []
    if failures:
        found = f"{printable(str(failures))} writes failed since the broker was started"
        cure = f"free its disk, then see which are missing: fdbroker audit verify {shown}".rstrip()
        failed = [Check(name, WEAKER, found, meaning, cure)]
    if path is None:
        return failed
    problem = _problem_with_audit(path)
    if problem is not None:
        return [Check(name, BROKEN, f"{shown} {problem[0]}", meaning, problem[1])]
    file = os.stat(path)
    if running is not None and running.status.get("audit") != "off":
        written = _is_open_for_writing(running, file)
        if written is False:
            found = f"the broker writes to another file than {shown}: it was rotated, or another was named"
            cure = f"as root: fdbroker audit reopen {shown}"
            return [Check(name, WEAKER, found, meaning, cure)]
    there = os.statvfs(path)
    room = there.f_bavail * there.f_frsize
    if room < _LITTLE_ROOM:
        found = f"{shown}: {room >> 20} MiB are free on its disk; without room everything is denied"
        state = WEAKER if there.f_bavail else BROKEN
        return [Check(name, state, found, meaning, "free some, or rotate the audit (docs/audit.md)")]
    return failed or [Check(name, OK, f"{shown}, {room >> 20} MiB free", meaning)]


def _problem_with_audit(path: str) -> tuple[str, str] | None:
    """Return what is wrong with the file, or its directory, and the cure; None: nothing is."""
    try:
        os.close(open_directory(os.path.dirname(path), sticky=Sticky.ABOVE, group_above=True))
    except UnsafeDirectoryError as error:
        problem = error.problems[0]
        found = f"is in {printable(problem.path)}, which is not root's alone ({printable(problem.detail)})"
        return found, f"as root: chown root {printable(problem.path)}; chmod go-w {printable(problem.path)}"
    except OSError as error:
        return f"can't be looked at: {error.strerror}", "run this as root"
    try:
        status = os.lstat(path)
    except OSError as error:
        cure = "fdbrokerd makes it when it starts: restart the broker"
        if is_a_service():
            cure = (
                "its service can't make it: leave audit.to out, and have systemd open it, by"
                f" StandardOutput=append:{printable(path)}"
            )
        return f"is not there: {error.strerror}", cure
    shown = printable(path)
    if not stat.S_ISREG(status.st_mode):
        return "is no regular file", f"remove it, and name another one in audit.to: {shown}"
    if status.st_uid or status.st_mode & _OTHERS_WRITE:
        found = f"belongs to uid {status.st_uid} and has mode 0{stat.S_IMODE(status.st_mode):03o}"
        return f"{found}: others can write records", f"as root: chown root {shown}; chmod 640 {shown}"
    return None


def _is_open_for_writing(running: Running, file: os.stat_result) -> bool | None:
    """Return whether the broker has the file; None: its descriptors can't be seen."""
    try:
        names = [name for name in os.listdir(running.proc("fd")) if _is_for_writing(running, name)]
        return any(os.path.samestat(os.stat(running.proc(f"fd/{name}")), file) for name in names)
    except OSError:
        return None


def _is_for_writing(running: Running, name: str) -> bool:
    """Return whether a descriptor is; the others may be of file systems that do not answer."""
    with open(running.proc(f"fdinfo/{name}"), encoding="ascii") as info:
        [flags] = [int(line.split()[1], 8) for line in info if line.startswith("flags:")]
    return flags & os.O_ACCMODE != os.O_RDONLY and not flags & os.O_PATH


# ---- the pidfile ----


def pidfile(path: str, running: Running | None) -> list[Check]:
    """Check the pidfile, if there is one: root alone can open it, and who is named there holds its lock."""
    name, meaning = "pidfile", "one broker runs at a time, and fdbrokerd --stop ends no other process"
    shown = printable(path)
    try:
        status = os.lstat(path)
    except OSError:
        return []
    if not stat.S_ISREG(status.st_mode) or status.st_uid or status.st_nlink != 1 or status.st_mode & 0o077:
        found = f"{shown} has mode 0{stat.S_IMODE(status.st_mode):03o} and belongs to uid {status.st_uid}"
        found += ": who can open it can hold its lock, and then no broker starts"
        return [Check(name, BROKEN, found, meaning, f"as root: rm {shown}; then restart the broker")]
    if os.geteuid() != 0:
        return [Check(name, OK, f"{shown} is root's alone", meaning)]
    holders = _holders_of_lock(status)
    with open(path, "rb") as file:
        named = file.read(_MOST_DIGITS).strip().decode("ascii", "replace")
    if not holders:
        return [Check(name, OK, f"{shown}: no process holds its lock", meaning)]
    if named in holders:
        return [Check(name, OK, f"{shown}: process {named} holds its lock", meaning)]
    who = counted(len(holders), "other process")
    if running is not None and str(running.pid) in holders:
        who = f"the broker, process {running.pid},"
    found = f"{shown} names {printable(named) or 'nobody'}, and {who} has its lock"
    return [Check(name, BROKEN, found, meaning, f"see who has it: fuser -v {shown}; end that process")]


def _holders_of_lock(file: os.stat_result) -> set[str]:
    """Return which processes have a lock of flock(2) on a file; proc_pid_fdinfo(5).

    Looked up, not tried: a lock that is held for a moment would stop a broker that starts just then. What
    /proc/locks shows is who took it, who may have ended and left it to a child.
    """
    device = f"{os.major(file.st_dev):02x}:{os.minor(file.st_dev):02x}:{file.st_ino}"
    holders = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it has ended
            for name in os.listdir(f"/proc/{pid}/fdinfo"):
                with contextlib.suppress(OSError), open(f"/proc/{pid}/fdinfo/{name}", "rb") as info:
                    locks = [line.split() for line in info if line.startswith(b"lock:")]
                    if any(b"FLOCK" in lock and device.encode() in lock for lock in locks):
                        holders.add(pid)
    return holders
