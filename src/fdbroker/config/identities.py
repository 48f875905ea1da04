"""Who is meant: users, groups and units by name, as the numbers and paths that the kernel knows."""

from __future__ import annotations

import functools
import grp
import os
import pwd
import re
from collections.abc import Iterable
from typing import NamedTuple, Protocol

from fdbroker.config.errors import quoted
from fdbroker.config.names import number_for_group, number_for_user
from fdbroker.config.scalars import ScalarError
from fdbroker.launcher.mounts import Mount, mounts_on_the_way, read_mounts

# What ids without a mapping show as: anybody's, seen from a user namespace.
OVERFLOW_ID = 65534
OVERFLOW_NAMES = frozenset({"nobody", "nogroup", "nfsnobody"})
# (uid_t)-1 means "no id" to the kernel.
MAX_ID = 2**32 - 2

_UNIT = re.compile(r"[A-Za-z0-9:_.\\@-]+")
_MAX_UNIT_NAME = 255
# Units that come with systemd and set a slice of their own; UID stands for a user's number.
_IN_OTHER_SLICES = (
    (re.compile(r"user(-runtime-dir)?@.*\.service"), "/user.slice/user-UID.slice"),
    (re.compile(r"session-.*\.scope"), "/user.slice/user-UID.slice"),
    (re.compile(r"systemd-nspawn@.*\.service|machine-.*\.scope"), "/machine.slice"),
    (re.compile(r"capsule@.*\.service"), "/capsule.slice"),
)
# Names of cgroup v1 files and prefixes of controller files, which systemd
# keeps free by a "_" before the unit's name.
_RESERVED_CGROUP_NAME = re.compile(
    r"[_.]|(notify_on_release|release_agent|tasks)$"
    r"|(cgroup|cpu|cpuacct|cpuset|io|blkio|memory|devices|pids"
    r"|bpf-firewall|bpf-devices|bpf-foreign|bpf-socket-bind|bpf-restrict-network-interfaces)\."
)


class Fault(NamedTuple):
    """Why a directory can't be a root, and the cure."""

    reason: str
    cure: str


class Lookups(Protocol):
    """What compiling a policy asks of the machine; all the rest of it is pure."""

    def user(self, name: str) -> int | None:
        """Return the uid of a user, or None if there is no such user."""

    def group(self, name: str) -> int | None:
        """Return the gid of a group, or None if there is no such group."""

    def account(self, name: str) -> tuple[int, int] | None:
        """Return the uid and the primary gid of a user, or None if there is no such user."""

    def user_names(self) -> Iterable[str]:
        """Return names to suggest from; asked for only when a name is unknown."""

    def group_names(self) -> Iterable[str]:
        """Return names to suggest from; asked for only when a name is unknown."""

    def directory(self, path: str) -> Fault | None:
        """Return why `path`, absolute and normal, is no directory reached without symbolic links."""


class SystemLookups:
    """The answers of this machine: its user database and its file system."""

    @functools.cached_property
    def _mounts(self) -> list[Mount]:
        try:
            return read_mounts()
        except OSError:
            return []

    def user(self, name: str) -> int | None:
        """Return the uid of a user, or None."""
        try:
            return pwd.getpwnam(name).pw_uid
        except KeyError:
            return None

    def group(self, name: str) -> int | None:
        """Return the gid of a group, or None."""
        try:
            return grp.getgrnam(name).gr_gid
        except KeyError:
            return None

    def account(self, name: str) -> tuple[int, int] | None:
        """Return the uid and the primary gid of a user, or None."""
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            return None
        return entry.pw_uid, entry.pw_gid

    def user_names(self) -> Iterable[str]:
        """Return the users that the database lists."""
        return [entry.pw_name for entry in pwd.getpwall()]

    def group_names(self) -> Iterable[str]:
        """Return the groups that the database lists."""
        return [entry.gr_name for entry in grp.getgrall()]

    def directory(self, path: str) -> Fault | None:
        """Look at every component of `path`, so that the message names the one that is wrong.

        What others answer for, who may never do so, is not looked at: the broker's start has a time limit.
        """
        way = mounts_on_the_way(os.fsencode(path), self._mounts)
        end = next((os.fsdecode(mount.point) for mount in way if mount.is_answered_by_others), None)
        at = ""
        for component in path.split("/")[1:]:
            at = f"{at}/{component}"
            if at == end:
                return None
            try:
                os.close(os.open(at, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC))
            except NotADirectoryError:
                if os.path.islink(at):
                    real = os.path.realpath(path)
                    return Fault(f"{at!r} is a symbolic link", f"write the real path, {real!r}")
                return Fault(f"{at!r} is not a directory", "name a directory")
            except OSError as error:
                return Fault(f"{at!r}: {error.strerror}", "name a directory that exists")
        return None


class OfflineLookups:
    """Takes every name and directory as given, to check a policy that is for another machine.

    Never put in force what was compiled with it: names are numbers below 0,
    which are no process's ids and so match nobody, in deny rules too.
    """

    def user(self, name: str) -> int | None:
        """Return a number below 0, another one for each name."""
        return number_for_user(name)

    def group(self, name: str) -> int | None:
        """Return a number below 0, another one for each name."""
        return number_for_group(name)

    def account(self, name: str) -> tuple[int, int] | None:  # noqa: ARG002
        """Return -1 twice."""
        return -1, -1

    def user_names(self) -> Iterable[str]:
        """Return nothing, as no name is unknown."""
        return ()

    def group_names(self) -> Iterable[str]:
        """Return nothing, as no name is unknown."""
        return ()

    def directory(self, path: str) -> Fault | None:  # noqa: ARG002
        """Return None."""
        return None


def unit_cgroup(name: str) -> str:
    r"""Return the control group in which the system's systemd puts a unit, where its `Slice=` is not set.

    Units of systemd's own of which it is known to be set are refused.

    `x.service` is in `/system.slice`; instances of a template are in a slice
    of their own, whose name has the template's with `-` and `\` escaped, since
    `-` in the name of a slice means nesting. A template stands for that slice,
    and so for all that is made by it.

    Raises:
        ScalarError: it is not the name of a service or scope, or of one that has another slice.

    """
    prefix, dot, suffix = name.rpartition(".")
    if not dot or suffix not in {"service", "scope"}:
        cure = f"write {quoted(name + '.service')}" if "." not in name else "write NAME.service or NAME.scope"
        if suffix == "slice":
            cure = "name the slice by its path: cgroup: /NAME.slice"
        raise ScalarError(f"{quoted(name)} is not the name of a service or scope", cure)
    if not prefix or not _UNIT.fullmatch(prefix) or len(name) > _MAX_UNIT_NAME:
        raise ScalarError(
            f"{quoted(name)} is not a name that a unit can have",
            r"write it as systemctl shows it; other characters are escaped there, as in a\x20b.service",
        )
    template, at, instance = prefix.partition("@")
    if at and not template:
        raise ScalarError(
            f"{quoted(name)} is no template and no unit",
            "write NAME@INSTANCE.service, or NAME@.service for all of them",
        )
    if name == "init.scope":
        return "/init.scope"
    for pattern, other in _IN_OTHER_SLICES:
        if pattern.fullmatch(name):
            raise ScalarError(
                f"{quoted(name)} is below {other}, and 'unit' means the default slice, system.slice",
                "write 'cgroup' with what 'systemctl show -P ControlGroup NAME' prints for it, or name users",
            )
    escaped = f"_{name}" if _RESERVED_CGROUP_NAME.match(name) else name
    if not at:
        return f"/system.slice/{escaped}"
    slice_name = template.replace("\\", r"\x5c").replace("-", r"\x2d")
    if slice_name.startswith("."):
        slice_name = rf"\x2e{slice_name[1:]}"
    slice_path = f"/system.slice/system-{slice_name}.slice"
    return f"{slice_path}/{escaped}" if instance else slice_path
