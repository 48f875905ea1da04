"""The read-only view: a mount namespace of its own in which nothing can be written.

A descriptor that was opened through a read-only mount stays read-only for
whoever receives it: opening it again, truncate, chmod and the rest answer
EROFS, to the file's owner as well. So this is done before any root is opened.
What was opened earlier (sockets, the audit file) still belongs to the old
mounts and goes on as it was.

A file system that is mounted later comes in with its own flags, writable or
not: who opens files looks at each mount, or does not cross mounts.
"""

from __future__ import annotations

import errno
import os
import re
from typing import TYPE_CHECKING, NamedTuple

from fdbroker.kernel import namespaces
from fdbroker.kernel.errors import SyscallError
from fdbroker.launcher.errors import LaunchError

if TYPE_CHECKING:
    from collections.abc import Iterable

_ATTRIBUTES = namespaces.MOUNT_ATTR_RDONLY | namespaces.MOUNT_ATTR_NOSUID | namespaces.MOUNT_ATTR_NODEV
_OPTIONS = frozenset({b"ro", b"nosuid", b"nodev"})
_ESCAPED = re.compile(rb"\\([0-7]{3})")
_ANSWERED_BY_OTHERS = frozenset({b"nfs", b"nfs4", b"cifs", b"smb3", b"smbfs", b"autofs", b"9p", b"virtiofs"})


class ReadOnlyViewError(LaunchError):
    """The view could not be made; the text says why and what helps. The process should end."""


class Mount(NamedTuple):
    """Of a line of /proc/PID/mountinfo: its number, what of which type of file system is where, and how.

    `parent`: the number of the mount that `point` lies in, which may be one that is not to be seen.
    """

    number: int
    parent: int
    type: bytes
    root: bytes
    point: bytes
    options: frozenset[bytes]

    @property
    def is_answered_by_others(self) -> bool:
        """Whether its answers come from elsewhere (FUSE, NFS ...), and may never come.

        By the name of its type, since asking the file system itself is what may take for ever.
        """
        return self.type in _ANSWERED_BY_OTHERS or self.type.startswith(b"fuse")


def parse_mounts(text: bytes) -> list[Mount]:
    """Return what the text of /proc/PID/mountinfo says; proc_pid_mountinfo(5)."""
    mounts = []
    # Not splitlines(): the kernel escapes \n in a name but not \r.
    for line in text.removesuffix(b"\n").split(b"\n"):
        fields = line.split(b" ")
        kind = fields[fields.index(b"-", 6) + 1]  # after optional fields
        options = frozenset(fields[5].split(b","))
        number, parent, root, point = int(fields[0]), int(fields[1]), *map(_unescaped, fields[3:5])
        mounts.append(Mount(number, parent, kind, root, point, options))
    return mounts


def _unescaped(name: bytes) -> bytes:
    return _ESCAPED.sub(lambda match: bytes([int(match[1], 8)]), name)


def read_mounts() -> list[Mount]:
    """Return the mounts of this process."""
    with open("/proc/self/mountinfo", "rb") as file:
        return parse_mounts(file.read())


def mounts_on_the_way(path: bytes, mounts: Iterable[Mount]) -> list[Mount]:
    """Return the mounts through which a look-up of `path` goes, without a look at any file system.

    `path` is absolute and normal, and need not exist; the last mount is the one that has it, or would have.
    Symbolic links on the way are not looked for. Empty: nothing of it is among `mounts`.
    """
    left = [mount for mount in mounts if is_at_or_above(mount.point, path)]
    numbers = {mount.number for mount in left}
    # The uppermost ones have a parent that is not to be seen, or themselves.
    here = [mount for mount in left if mount.parent not in numbers - {mount.number}]
    way: list[Mount] = []
    while here:
        # What lies beyond the first one is on what that covers, and is not met.
        way.append(min(here, key=lambda mount: len(mount.point)))
        here = [mount for mount in left if mount.parent == way[-1].number and mount not in way]
    return way


def mount_at(path: bytes, mounts: Iterable[Mount]) -> Mount | None:
    """Return the last of `mounts_on_the_way`, None if there are none."""
    way = mounts_on_the_way(path, mounts)
    return way[-1] if way else None


def is_at_or_above(ancestor: bytes, path: bytes) -> bool:
    """Return whether `path` is `ancestor` or lies below it."""
    return ancestor in {b"/", path} or path.startswith(ancestor + b"/")


def not_read_only(mounts: Iterable[Mount]) -> list[bytes]:
    """Return where a mount is that lacks one of ro, nosuid, nodev."""
    return [mount.point for mount in mounts if not mount.options >= _OPTIONS]


def enter_read_only_view() -> None:
    """Make every mount read-only, nosuid and nodev, for this process and its children alone.

    A new mount namespace that gets what the system mounts and unmounts later
    (MS_SLAVE) and gives nothing back. Needs CAP_SYS_ADMIN and Linux 5.12.

    Raises:
        ReadOnlyViewError: it failed. The mount namespace may be a new one then,
            and some mounts read-only: end the process.

    """
    try:
        namespaces.unshare(namespaces.CLONE_NEWNS)
    except SyscallError as error:
        raise ReadOnlyViewError(f"no mount namespace of its own: {error}. {_cure(error)}") from error
    try:
        # One call, all or nothing: the flags do not reach the mounts that these are copies of.
        namespaces.mount_setattr(
            b"/", attributes=_ATTRIBUTES, propagation=namespaces.MS_SLAVE, recursive=True
        )
    except SyscallError as error:
        raise ReadOnlyViewError(f"{error}. {_cure(error)}{_who_refuses()}") from error
    left = not_read_only(read_mounts())
    if left:
        raise ReadOnlyViewError(
            f"still not read-only, nosuid and nodev: {_names(left)}; unmount them, or start by systemd with"
            " ReadOnlyPaths=/ instead"
        )


def check_read_only_view(roots: Iterable[tuple[str, str, bool]]) -> None:
    """Check that the roots are read-only and nosuid already: nothing can be changed.

    For a start without CAP_SYS_ADMIN, as by systemd with ReadOnlyPaths=/. What is mounted below a root is
    looked at file by file, by the broker. `roots`: name, path, and whether helpers open there. Of those, and
    of a root that lies behind what others answer for, which may be never, the options of its mount are read,
    and nobody is asked.

    Raises:
        ReadOnlyViewError: one of them is not so, or is not there.

    """
    mounts = read_mounts()
    for name, path, helpers in roots:
        way = mounts_on_the_way(os.fsencode(path), mounts)
        # What is mounted on autofs is there, and nobody is asked for it any more.
        behind = any(mount.is_answered_by_others and mount.type != b"autofs" for mount in way[:-1])
        if helpers or behind:
            options = way[-1].options if way else frozenset()
            read_only, nosuid = b"ro" in options, b"nosuid" in options
        else:
            read_only, nosuid = _flags_of(name, path)
        lacking = [
            f"{word} ({cure})"
            for holds, word, cure in (
                (read_only, "read-only", "ReadOnlyPaths=/"),
                (nosuid, "nosuid", "NoNewPrivileges=yes"),
            )
            if not holds
        ]
        if lacking:
            raise ReadOnlyViewError(
                f"root {name!r} ({path}) is not {' and not '.join(lacking)} in the view of this process, and"
                " without CAP_SYS_ADMIN it can't make a view of its own; set these options in the unit, start"
                " as root with all capabilities, or say read_only_view: off in the policy"
            )


def _flags_of(name: str, path: str) -> tuple[bool, bool]:
    """Return whether what is at `path` is read-only, and nosuid: by its mount, or by its file system."""
    try:
        flags = os.statvfs(path).f_flag
    except OSError as error:
        raise ReadOnlyViewError(
            f"root {name!r} ({path}) can't be looked at: {error.strerror}; it must be a directory that"
            " exists in the view of this service"
        ) from error
    return bool(flags & os.ST_RDONLY), bool(flags & os.ST_NOSUID)


def _cure(error: SyscallError) -> str:
    if error.errno in {errno.EPERM, errno.EACCES}:
        return (
            "CAP_SYS_ADMIN is needed, and no filter against mounting: start as root, or by systemd with "
            "ReadOnlyPaths=/ instead."
        )
    if error.errno == errno.ENOSYS:
        return "Linux 5.12 is needed; by systemd, ReadOnlyPaths=/ does the same on older kernels."
    if error.errno == errno.EINVAL:
        return "The root directory of this process must be a mount point: not a bare chroot."
    if error.errno == errno.EBUSY:
        return "This process has a file open for writing in its new mount namespace: enter the view first."
    return "The kernel gives no closer reason."


def _who_refuses() -> str:
    """Return a sentence about the mounts that refuse the call when they are asked one by one."""
    try:
        present = read_mounts()
    except OSError:
        return ""  # no /proc here: the first error is the one to tell
    refusing = []
    for mount in present:
        try:
            namespaces.mount_setattr(mount.point, attributes=_ATTRIBUTES)
        except SyscallError as error:
            refusing.append(mount.point + b": " + os.fsencode(error.strerror or "refused"))
    return f" Refused by {_names(refusing)}" if refusing else " Each mount alone accepts it."


def _names(points: Iterable[bytes]) -> str:
    # A mount point's name may hold anything; what goes to a terminal or a log is ASCII.
    return ", ".join(point.decode("ascii", "backslashreplace") for point in points)
