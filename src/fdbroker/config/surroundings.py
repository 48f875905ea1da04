"""What there is to see on this machine of what a policy names: mounts, groups, who writes to directories."""

from __future__ import annotations

import functools
import grp
import os
import pwd
import stat
from collections.abc import Sequence

from fdbroker.broker.roots import HELPED_FILESYSTEMS, SERVED_FILESYSTEMS
from fdbroker.config.containment import leading_names, parse
from fdbroker.config.names import group_text, user_text
from fdbroker.kernel.files import filesystem_of
from fdbroker.launcher.mounts import Mount, mount_at, read_mounts
from fdbroker.policy.globs import NOTHING, Glob
from fdbroker.policy.paths import components_below

# Directories that are looked at, and how far below the names that a glob begins with. Most trees show in the
# first level whose they are, as /home does.
_MOST_DIRECTORIES = 500
_LEVELS = 1


class ThisMachine:
    """The answers of this machine. What can't be looked at is not told; nothing here raises."""

    @functools.cached_property
    def _mounts(self) -> list[Mount]:
        try:
            return read_mounts()
        except OSError:
            return []

    @functools.cached_property
    def _primary_gids(self) -> frozenset[int]:
        return frozenset(entry.pw_gid for entry in pwd.getpwall())

    def has_members(self, gid: int) -> bool:
        """Return whether any user that the system lists is in a group."""
        try:
            return bool(grp.getgrgid(gid).gr_mem) or gid in self._primary_gids
        except (KeyError, OverflowError):
            return gid in self._primary_gids

    def is_in(self, uid: int, gids: frozenset[int]) -> bool:
        """Return whether a user is in one of these groups; True where there is no such user to ask about."""
        try:
            user = pwd.getpwuid(uid)
        except (KeyError, OverflowError):
            return True
        return not gids.isdisjoint(os.getgrouplist(user.pw_name, user.pw_gid))

    def network_filesystem(self, path: bytes) -> str | None:
        """Return the type of the file system at `path` if its answers come from elsewhere."""
        found = mount_at(path, self._mounts)
        return None if found is None or not found.is_answered_by_others else os.fsdecode(found.type)

    def unserved_filesystem(self, path: bytes) -> str | None:
        """Return the type of the file system at `path` if the broker serves no file of it."""
        kind = type_of_filesystem(path)
        if kind is None or kind in SERVED_FILESYSTEMS or kind in HELPED_FILESYSTEMS:
            return None
        return f"{kind:#x}"

    def writers(
        self, root: bytes, glob: Glob, leaving_out: Sequence[tuple[bytes, Glob]]
    ) -> tuple[bytes, str] | None:
        """Return a directory in which a name may match and others than root make names, and who; or None."""
        states, directory = glob.start, root
        components = parse(glob.pattern)
        leading = leading_names(components)
        # A last name is one in its directory.
        for name in leading[: len(components) - 1]:
            states, directory = glob.step(states, name), os.path.join(directory, name)
        level = [(directory, states)]
        left = _MOST_DIRECTORIES
        for depth in range(_LEVELS + 1):
            below: list[tuple[bytes, int]] = []
            for directory, states in level:
                who = _writer(directory)
                if (
                    who is not None
                    and glob.remainder(states) is not NOTHING
                    and not any(_is_about_all_in(directory, *left_out) for left_out in leaving_out)
                ):
                    return directory, who
                if depth < _LEVELS:
                    names = _directories(directory, left)
                    left -= len(names)
                    steps = [(os.path.join(directory, name), glob.step(states, name)) for name in names]
                    below += [(path, after) for path, after in steps if after]
            level = below
        return None


def type_of_filesystem(path: bytes) -> int | None:
    """Return the magic number of the type of the file system at `path`, None if it can't be told."""
    try:
        descriptor = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return filesystem_of(descriptor).type
    except OSError:
        return None
    finally:
        os.close(descriptor)


def _is_about_all_in(directory: bytes, root: bytes, glob: Glob) -> bool:
    """Return whether a glob, relative to `root`, matches every name in a directory."""
    components = components_below(root, directory)
    if components is None:
        return False
    states = glob.start
    for name in components:
        states = glob.step(states, name)
    return glob.remainder(states).anything


def _writer(directory: bytes) -> str | None:
    """Return who besides root can make names in a directory, in words; None for nobody, or if it is none."""
    try:
        facts = os.lstat(directory)
    except OSError:
        return None
    if not stat.S_ISDIR(facts.st_mode):
        return None
    if facts.st_mode & stat.S_IWOTH:
        return "everybody"
    if facts.st_uid != 0:
        return f"user {user_text(facts.st_uid)}"
    if facts.st_mode & stat.S_IWGRP and facts.st_gid != 0:
        return f"group {group_text(facts.st_gid)}"
    return None


def _directories(directory: bytes, most: int) -> list[bytes]:
    names: list[bytes] = []
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                if len(names) >= most:
                    break
                if entry.is_dir(follow_symlinks=False):
                    names.append(entry.name)
    except OSError:
        return []
    return sorted(names)
