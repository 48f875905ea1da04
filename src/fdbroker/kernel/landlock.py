"""Landlock: this process opens nothing but what is below given directories.

landlock(7), linux/landlock.h; Linux 5.13 with `CONFIG_SECURITY_LANDLOCK` and
`landlock` among the active security modules. A domain can be made narrower
later, never wider. It does not cover stat, chmod, chown, utime, flock, readlink
and chdir: other layers do.

Hazard: a domain binds the calling thread and what it forks; threads that run
already stay outside. Enter while there is one thread.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from typing import TYPE_CHECKING, NamedTuple

from fdbroker.kernel.errors import SyscallError
from fdbroker.kernel.libc import (
    SYS_LANDLOCK_ADD_RULE,
    SYS_LANDLOCK_CREATE_RULESET,
    SYS_LANDLOCK_RESTRICT_SELF,
    syscall,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

_CREATE_RULESET_VERSION = 1
_RULE_PATH_BENEATH = 1

_EXECUTE = 1 << 0
_READ_FILE = 1 << 2
_READ_DIR = 1 << 3
# EXECUTE, READ_*, WRITE_FILE, REMOVE_* and MAKE_*: all that the first ABI knows.
_FILES = (1 << 13) - 1
_REFER = 1 << 13
_TRUNCATE = 1 << 14
_IOCTL_DEV = 1 << 15
# What a scratch directory is for: files and directories, no devices, sockets, FIFOs or programs.
_SCRATCH = _READ_FILE | _READ_DIR | _REFER | _TRUNCATE | 1 << 1 | 1 << 4 | 1 << 5 | 1 << 7 | 1 << 8 | 1 << 12

_BIND_AND_CONNECT_TCP = 3
_SCOPE_ABSTRACT_UNIX_SOCKET = 1
_SCOPE_SIGNAL = 2


class _Layer(NamedTuple):
    """What one ABI brought: a name for the report, and the bits of the three fields."""

    abi: int
    name: str
    filesystem: int = 0
    network: int = 0
    scopes: int = 0


# linux/landlock.h of 6.18. ABI 7 (6.15) brought control over the audit log alone.
_LAYERS = (
    _Layer(1, "files", filesystem=_FILES),
    _Layer(2, "rename and link between directories", filesystem=_REFER),  # 5.19
    _Layer(3, "truncate", filesystem=_TRUNCATE),  # 6.2
    _Layer(4, "TCP", network=_BIND_AND_CONNECT_TCP),  # 6.7
    _Layer(5, "ioctl on devices", filesystem=_IOCTL_DEV),  # 6.10
    _Layer(6, "abstract sockets", scopes=_SCOPE_ABSTRACT_UNIX_SOCKET),  # 6.12
    _Layer(6, "signals", scopes=_SCOPE_SIGNAL),  # 6.12
)


class LandlockReport(NamedTuple):
    """What is enforced from now on. Nobody may take it for granted: look."""

    abi: int  # of the kernel, or the one asked for; 0: no Landlock, nothing is enforced
    enforced: tuple[str, ...]
    missing: tuple[str, ...]  # asked for, but the kernel is too old


def abi_version() -> int:
    """Return the kernel's Landlock ABI, 0 if it has none (not built in, or not enabled at boot).

    landlock_create_ruleset(2) with LANDLOCK_CREATE_RULESET_VERSION.
    """
    try:
        return syscall(
            "landlock_create_ruleset", SYS_LANDLOCK_CREATE_RULESET, None, 0, _CREATE_RULESET_VERSION
        )
    except SyscallError as error:
        if error.errno in {errno.ENOSYS, errno.EOPNOTSUPP}:
            return 0
        raise


def restrict_to(
    read_trees: Sequence[int],
    list_only: Sequence[int] = (),
    *,
    scratch_trees: Sequence[int] = (),
    programs: Sequence[int] = (),
    read_files: Sequence[int] = (),
    reach_abstract_sockets: bool = False,
    abi: int | None = None,
) -> LandlockReport:
    """Deny this process every access that Landlock knows, except as given, for ever.

    Trees are descriptors of directories (O_PATH will do), which stay
    the caller's: below `read_trees` files can be read and directories listed;
    below `list_only` directories can be listed; below `scratch_trees` files and
    directories can also be written, made, renamed and removed. `programs` and
    `read_files` are descriptors of files: all can be read, and the former executed.
    With none of them nothing can be opened at all.

    `reach_abstract_sockets` leaves sending and connecting to abstract Unix
    sockets of other processes alone: answers to SOCK_DGRAM clients need that.
    `abi` pretends to be on an older kernel; more than the kernel has is ignored.

    Raises:
        SyscallError: EPERM (no_new_privs is not set), EBADF, EBADFD or EINVAL (not
            a directory's descriptor), E2BIG (16 domains already). Nothing is
            enforced then.

    """
    kernel = abi_version()
    used = kernel if abi is None else min(abi, kernel)
    wanted = [layer for layer in _LAYERS if not (reach_abstract_sockets and layer.name == "abstract sockets")]
    layers = [layer for layer in wanted if layer.abi <= used]
    report = LandlockReport(
        used,
        tuple(layer.name for layer in layers),
        tuple(layer.name for layer in wanted if layer.abi > used),
    )
    if not layers:
        return report
    handled = sum(layer.filesystem for layer in layers)
    ruleset = _create_ruleset(
        handled, sum(layer.network for layer in layers), sum(layer.scopes for layer in layers)
    )
    try:
        for tree in read_trees:
            _allow_beneath(ruleset, tree, _READ_FILE | _READ_DIR)
        for tree in list_only:
            _allow_beneath(ruleset, tree, _READ_DIR)
        for tree in scratch_trees:
            _allow_beneath(ruleset, tree, _SCRATCH & handled)
        for file in programs:
            _allow_beneath(ruleset, file, _READ_FILE | _EXECUTE)
        for file in read_files:
            _allow_beneath(ruleset, file, _READ_FILE)
        syscall(
            "landlock_restrict_self", SYS_LANDLOCK_RESTRICT_SELF, ruleset, 0, abi=used, needs="no_new_privs"
        )
    finally:
        os.close(ruleset)
    return report


def _create_ruleset(filesystem: int, network: int, scopes: int) -> int:
    """Return a descriptor (always close-on-exec) of an empty ruleset that handles these rights."""
    attributes = struct.pack("=QQQ", filesystem, network, scopes)
    # An older kernel knows a shorter structure, and takes a longer one whose rest is zero.
    return syscall(
        "landlock_create_ruleset",
        SYS_LANDLOCK_CREATE_RULESET,
        ctypes.create_string_buffer(attributes, len(attributes)),
        len(attributes),
        0,
        filesystem=hex(filesystem),
        network=hex(network),
        scopes=hex(scopes),
    )


def _allow_beneath(ruleset: int, tree: int, access: int) -> None:
    """Add a LANDLOCK_RULE_PATH_BENEATH."""
    attributes = struct.pack("=Qi", access, tree)  # packed in the header as well: 12 bytes
    syscall(
        "landlock_add_rule",
        SYS_LANDLOCK_ADD_RULE,
        ruleset,
        _RULE_PATH_BENEATH,
        ctypes.create_string_buffer(attributes, len(attributes)),
        0,
        tree=tree,
        access=hex(access),
    )
