"""What this kernel has of what the broker and its workers use.

Where the kernel is asked to confine a process, a child does it and ends: what
was tried is what the broker will do, and not what a version number promises.
"""

from __future__ import annotations

import errno
import json
import os
import socket

from fdbroker.broker.identity import probe_level
from fdbroker.cli.checks.check import MISSING, OK, WEAKER, Check, in_child
from fdbroker.config.names import printable
from fdbroker.kernel import bpf, landlock, namespaces, process, seccomp, sockets
from fdbroker.kernel.errors import SyscallError
from fdbroker.kernel.files import open_path_beneath
from fdbroker.launcher.mounts import ReadOnlyViewError, enter_read_only_view
from fdbroker.launcher.start import find_cgroup2


def kernel_checks() -> list[Check]:
    """Try what the broker and its workers ask of the kernel, in a child where it can't be undone."""
    return [_openat2(), _read_only_view(), _landlock(), _seccomp(), *_identity(), _pass_rights(), _cgroup2()]


def _openat2() -> Check:
    meaning = "files are opened below their root and nowhere else, whatever happens to names meanwhile"
    here = os.open("/", os.O_PATH | os.O_CLOEXEC)
    try:
        os.close(open_path_beneath(here, b"."))
    except OSError as error:
        cure = "Linux 5.6 is needed, and no filter that takes it away (as RestrictSUIDSGID= of systemd does)"
        return Check("openat2", MISSING, str(error), meaning, cure)
    finally:
        os.close(here)
    return Check("openat2", OK, "works", meaning)


def _read_only_view() -> Check:
    name = "mount_setattr"
    meaning = "what is handed out can't be made writable again, not even by the file's owner"
    if os.geteuid() == 0:
        failure = in_child(_enter_read_only_view)
        if not failure:
            return Check(name, OK, "a read-only view of all mounts can be made", meaning)
        return Check(
            name, MISSING, failure, meaning, "start the broker by systemd with ReadOnlyPaths=/ instead"
        )
    try:
        # No attributes: changes nothing.
        namespaces.mount_setattr(b"/", attributes=0)
    except SyscallError as error:
        if error.errno != errno.EPERM:
            cure = (
                "Linux 5.12 is needed to start the broker by hand; by systemd ReadOnlyPaths=/ does the same"
            )
            return Check(name, MISSING, str(error), meaning, cure)
    return Check(name, OK, "the kernel has it (run this as root to see it work)", meaning)


def _enter_read_only_view() -> str:
    try:
        enter_read_only_view()
    except ReadOnlyViewError as error:
        return str(error)
    return ""


def _landlock() -> Check:
    meaning = "the kernel holds the broker to the configured trees, and workers to nothing at all"
    answer = in_child(_enter_landlock)
    try:
        abi, missing = json.loads(answer)
    except ValueError:
        return Check(
            "Landlock", MISSING, answer, meaning, "see which filter or policy of this machine refuses it"
        )
    if abi == 0:
        cure = "Linux 5.13 is needed, with 'landlock' among its security modules (lsm= at boot)"
        return Check("Landlock", MISSING, "the kernel has none", meaning, cure)
    if missing:
        cure = "a newer kernel has it; the broker's other layers do not depend on it"
        return Check("Landlock", WEAKER, f"ABI {abi}, which lacks: {', '.join(missing)}", meaning, cure)
    return Check("Landlock", OK, f"ABI {abi}, complete", meaning)


def _enter_landlock() -> str:
    process.set_no_new_privs()
    report = landlock.restrict_to([])
    return json.dumps([report.abi, report.missing])


def _seccomp() -> Check:
    meaning = "the broker and its workers can make the system calls that they need and no others"
    failure = in_child(_enter_seccomp)
    if failure:
        cure = "a kernel with CONFIG_SECCOMP_FILTER is needed, and no filter that refuses another one"
        return Check("seccomp", MISSING, failure, meaning, cure)
    return Check("seccomp", OK, "filters can be installed", meaning)


def _enter_seccomp() -> str:
    process.set_no_new_privs()
    seccomp.install(bpf.assemble({}, machine=os.uname().machine, otherwise=bpf.ALLOW))
    return ""


def _identity() -> list[Check]:
    level, why = probe_level()
    alive = "a client that has ended can't be mistaken for another process with its number"
    now = "a client's user and control group are those of now; needed by rules about units and control groups"
    cure = "a newer kernel has it; until then identity is what it was when the client connected"
    first = Check("SO_PEERPIDFD", OK, "works", alive)
    if level < 1:
        first = Check("SO_PEERPIDFD", WEAKER, why, alive, cure)
    second = Check("PIDFD_GET_INFO", OK, "works", now)
    if level < 2:  # noqa: PLR2004 - the levels are numbers
        second = Check("PIDFD_GET_INFO", WEAKER, why, now, cure)
    return [first, second]


def _pass_rights() -> Check:
    meaning = "the kernel itself keeps clients from handing descriptors to the broker"
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with left, right:
        if sockets.refuse_descriptors(left):
            return Check("SO_PASSRIGHTS", OK, "works", meaning)
    cure = "Linux 6.16 has it; until then the broker closes what it is handed, and hangs up"
    return Check("SO_PASSRIGHTS", WEAKER, "the kernel has none", meaning, cure)


def _cgroup2() -> Check:
    meaning = "rules can be about systemd units and control groups"
    mounted = find_cgroup2()
    if mounted is None:
        cure = "mount it, if the policy is to have such rules: mount -t cgroup2 none /sys/fs/cgroup"
        return Check("cgroup2", WEAKER, "is not mounted", meaning, cure)
    return Check("cgroup2", OK, f"is mounted on {printable(mounted)}", meaning)
