"""Options of a systemd unit that would make a broker serve nothing, as they look from inside.

Each of them leaves a process that starts, and then denies or misses every file
without a word about why. What can be recognised is said here, with the option's name.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from fdbroker.kernel import landlock
from fdbroker.launcher.errors import LaunchError
from fdbroker.launcher.mounts import is_at_or_above, mount_at, read_mounts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fdbroker.launcher.mounts import Mount

# What containers map at least. PrivateUsers=yes maps root, the service's own user, and nobody else.
_LEAST_MAPPED = 65536
_INACCESSIBLE = b"/systemd/inaccessible/"
_PRIVATE = b"/systemd-private-"


def check_unit_options(roots: Sequence[tuple[str, str, bool]]) -> None:
    """Check that the roots are neither hidden nor anybody else's, without a look at what may never answer.

    `roots`: name, path, and whether helpers open there.

    Raises:
        LaunchError: they are, and the text names the option; or one is on a file system for which others
            answer, and helpers do not open there.

    """
    check_user_namespace()
    check_system_calls()
    mounts = read_mounts()
    for name, path, helpers in roots:
        _check_root(name, os.fsencode(path), mounts, helpers=helpers)


def check_user_namespace() -> None:
    """Check that this process sees the ids of other users as they are.

    Raises:
        LaunchError: it does not.

    """
    with open("/proc/self/uid_map", encoding="ascii") as file:
        mapped = sum(int(line.split()[2]) for line in file)
    if mapped < _LEAST_MAPPED:
        raise LaunchError(
            f"this user namespace has {mapped} user ids, so that all others look alike and their files can't"
            " be opened; set PrivateUsers=no (DynamicUser= does not go with it)"
        )


def check_system_calls() -> None:
    """Check that no filter takes away what the broker uses on itself; systemd's groups may not have it.

    Raises:
        LaunchError: one is refused.

    """
    call = "landlock_create_ruleset"
    try:
        landlock.abi_version()
        call = "memfd_create"
        os.close(os.memfd_create("fdbroker-probe", os.MFD_CLOEXEC))
    except OSError as error:
        raise LaunchError(
            f"{call} is refused ({error.strerror}); SystemCallFilter= must allow memfd_create, seccomp,"
            " capset, prctl, landlock_create_ruleset, landlock_add_rule and landlock_restrict_self, which"
            " the broker uses on itself"
        ) from error


def _check_root(name: str, path: bytes, mounts: Sequence[Mount], *, helpers: bool) -> None:
    shown = f"root {name!r} ({os.fsdecode(path)})"
    its_own = mount_at(path, mounts)
    kind = b"" if its_own is None or not its_own.is_answered_by_others else its_own.type
    # Behind autofs there may be any file system: to open the root has it mounted.
    if kind not in {b"", b"autofs"} and not helpers:
        raise LaunchError(
            f"{shown} is on a file system of type {os.fsdecode(kind)}, whose files others answer for"
            " and may hold; say 'opens: helpers' of it, or choose a directory on a local disk or tmpfs"
        )
    for mount in mounts:
        hidden = mount.root.startswith(_INACCESSIBLE)
        private = _PRIVATE in mount.root
        if not (hidden or private):
            continue
        if mount is its_own:
            option = "ProtectHome=yes or InaccessiblePaths=" if hidden else "PrivateTmp=yes"
            instead = "ProtectHome=read-only does no harm" if hidden else "set PrivateTmp=no"
            raise LaunchError(
                f"{shown} is {'hidden from' if hidden else 'another directory for'} this service, as {option}"
                f" does at {os.fsdecode(mount.point)}; {instead}"
            )
        if is_at_or_above(path, mount.point):
            where = os.fsdecode(mount.point)
            sys.stderr.write(f"fdbroker: {shown}: what is below {where} is not served: the unit hides it\n")
