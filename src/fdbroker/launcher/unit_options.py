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
from fdbroker.launcher.mounts import read_mounts

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from fdbroker.launcher.mounts import Mount

# What containers map at least. PrivateUsers=yes maps root, the service's own user, and nobody else.
_LEAST_MAPPED = 65536
_INACCESSIBLE = b"/systemd/inaccessible/"
_PRIVATE = b"/systemd-private-"


def check_unit_options(roots: Sequence[tuple[str, str]]) -> None:
    """Check that the roots, given by name and path, are neither hidden nor anybody else's.

    Raises:
        LaunchError: they are; the text names the option.

    """
    check_user_namespace()
    check_system_calls()
    mounts = read_mounts()
    for name, path in roots:
        _check_root(name, os.fsencode(path), mounts)


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


def _check_root(name: str, path: bytes, mounts: Iterable[Mount]) -> None:
    shown = f"root {name!r} ({os.fsdecode(path)})"
    number = _number_of_mount(path)
    for mount in mounts:
        hidden = mount.root.startswith(_INACCESSIBLE)
        private = _PRIVATE in mount.root
        if not (hidden or private):
            continue
        if mount.number == number:
            option = "ProtectHome=yes or InaccessiblePaths=" if hidden else "PrivateTmp=yes"
            instead = "ProtectHome=read-only does no harm" if hidden else "set PrivateTmp=no"
            raise LaunchError(
                f"{shown} is {'hidden from' if hidden else 'another directory for'} this service, as {option}"
                f" does at {os.fsdecode(mount.point)}; {instead}"
            )
        if is_at_or_above(path, mount.point):
            where = os.fsdecode(mount.point)
            sys.stderr.write(f"fdbroker: {shown}: what is below {where} is not served: the unit hides it\n")


def _number_of_mount(path: bytes) -> int:
    """Return in which mount the way to `path` ends. What lies over what, only the kernel knows."""
    while not os.path.lexists(path):
        path = os.path.dirname(path)  # it is not there: who is above it may be hidden
    descriptor = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    with open(f"/proc/self/fdinfo/{descriptor}", encoding="ascii") as info:
        number = next(int(line.split()[1]) for line in info if line.startswith("mnt_id:"))
    os.close(descriptor)
    return number


def is_at_or_above(ancestor: bytes, path: bytes) -> bool:
    """Return whether `path` is `ancestor` or lies below it."""
    return ancestor in {b"/", path} or path.startswith(ancestor + b"/")
