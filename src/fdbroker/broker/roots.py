"""The trees that can be reached, opened once at start, and what may be served of them."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, NamedTuple

from fdbroker.kernel.files import FilesystemFacts, filesystem_of
from fdbroker.policy.rules import Surroundings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fdbroker.policy.rules import Root

# linux/magic.h. A type that is not listed is not served: files of kernel file
# systems look regular, and reading one can do anything. Missing are vfat, exfat,
# ntfs and jfs, since they take several spellings for one name, and a deny rule
# knows one.
SERVED_FILESYSTEMS = {
    0xEF53: "ext2/ext3/ext4",
    0x58465342: "xfs",
    0x9123683E: "btrfs",
    0x01021994: "tmpfs",
    0xF2F52010: "f2fs",
    0x794C7630: "overlay",
    0x2FC12FC1: "zfs",
    0xCA451A4E: "bcachefs",
    0x73717368: "squashfs",
    0xE0F5E1E2: "erofs",
    0x9660: "iso9660",
    0x15013346: "udf",
    0x52654973: "reiserfs",
    0x858458F6: "ramfs",
}

# Opening, looking at or closing a file there may wait for somebody else, so they are served by helpers alone.
HELPED_FILESYSTEMS = {
    0x65735546: "fuse",
    0x6969: "nfs",
    0xFF534D42: "cifs",
    0xFE534D42: "smb3",
    0x517B: "smb",
    0x0187: "autofs",
    0x01021997: "9p",
}


class RootError(Exception):
    """A configured root can't be served; the text names it, the reason and the cure."""


class HeldRoot(NamedTuple):
    """A root with its O_PATH descriptor; `skip` and `helpers` as in `Root`.

    `filesystem`: the magic number of its type, which is that of all that is reached where mounts are not
    crossed; 0 where `helpers` look.
    """

    descriptor: int
    skip: int
    cross_mounts: bool
    read_only_required: bool
    helpers: bool = False
    filesystem: int = 0

    def surroundings(self, held: int) -> Surroundings:
        """Return what conditions ask about when and where an object behind this root was looked at: now."""
        return Surroundings(
            time.time_ns(), filesystem_of(held).type if self.cross_mounts else self.filesystem
        )

    def objection(self, held: int) -> str | None:
        """Return why an object behind this root's mounts is not to be served, or None.

        Only where mounts are crossed: elsewhere openat2 keeps to the root's
        file system and mount, and those were looked at once, at start.
        """
        if not self.cross_mounts:
            return None
        return objection_to_filesystem(filesystem_of(held), read_only_required=self.read_only_required)

    def objection_to(self, facts: FilesystemFacts) -> str | None:
        """Return why an object that a helper found is not to be served, or None. Pure."""
        return objection_to_filesystem(
            facts, read_only_required=self.read_only_required, helpers=self.helpers
        )


def objection_to_filesystem(
    facts: FilesystemFacts, *, read_only_required: bool, helpers: bool = False
) -> str | None:
    """Return `filesystem`, `mount_not_read_only` or None. Pure. `helpers`: they open there."""
    if facts.type not in SERVED_FILESYSTEMS and not (helpers and facts.type in HELPED_FILESYSTEMS):
        return "filesystem"
    if read_only_required and not facts.read_only:
        return "mount_not_read_only"
    return None


def hold_roots(
    roots: Sequence[Root], opened: Mapping[str, int] | None = None, *, read_only_required: bool
) -> list[HeldRoot]:
    """Open every root with O_PATH; the caller owns the descriptors, for good.

    `opened`: by the names of roots, descriptors of those that are open already.

    Raises:
        RootError: a root is missing, no directory, reached by a symbolic
            link, on a file system that is not served, or writable where the
            read-only view is required. What was opened is closed.

    """
    held: list[HeldRoot] = []
    try:
        for root in roots:
            descriptor = (opened or {}).get(root.name, -1)
            if descriptor < 0:
                descriptor = open_root(root.name, root.path)
            kept = HeldRoot(descriptor, root.skip, root.cross_mounts, read_only_required, root.helpers)
            held.append(kept)
            if root.helpers:
                continue  # even fstatfs(2) asks the server; helpers look, at each file
            facts = filesystem_of(descriptor)
            held[-1] = kept._replace(filesystem=facts.type)
            objection = objection_to_filesystem(facts, read_only_required=read_only_required)
            where = f"root {root.name!r} ({os.fsdecode(root.path)})"
            if objection == "filesystem":
                raise RootError(
                    f"{where} is on a file system of type {facts.type:#x}, which is not served:"
                    " choose a directory on a local disk or tmpfs, or say 'opens: helpers' of it if others"
                    " answer for it (FUSE, NFS, CIFS, 9p)"
                )
            if objection is not None:
                raise RootError(
                    f"{where} is writable in the broker's view: start it with a read-only view"
                    " (the launcher makes one; with systemd, ReadOnlyPaths=/) or say 'read_only_view: off'"
                )
    except BaseException:
        for entry in held:
            os.close(entry.descriptor)
        raise
    return held


def open_root(name: str, path: bytes) -> int:
    """Return an O_PATH descriptor of a root, the caller's: opened component by component, following no link.

    It waits for whoever answers for what is on the way. The root of a mount is not asked for.

    Raises:
        RootError: it is missing, or no directory reached without symbolic links.

    """
    flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    here = os.open("/", flags)
    for component in path.split(b"/"):
        if not component:
            continue
        try:
            below = os.open(component, flags, dir_fd=here)
        except OSError as error:
            raise RootError(
                f"root {name!r} ({os.fsdecode(path)}) can't be opened at"
                f" {os.fsdecode(component)!r}: {error.strerror};"
                " it must be a directory, reached without symbolic links"
            ) from None
        finally:
            os.close(here)
        here = below
    return here
