"""Ways to open a file that look careful and are not: each checks, and then opens what may be another by then.

Each runs as root, gives the descriptor to `look` and returns what that says,
or None where its check refused.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_T = TypeVar("_T")
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC


def _looking_at(descriptor: int, look: Callable[[int], _T]) -> _T:
    try:
        return look(descriptor)
    finally:
        os.close(descriptor)


def realpath_then_open(root: Path, path: Path, look: Callable[[int], bool]) -> Callable[[], bool | None]:
    """Resolve all links, see that the result lies below the root, open it by its first name."""
    prefix, name = f"{root}/", str(path)

    def attempt() -> bool | None:
        if not os.path.realpath(name, strict=True).startswith(prefix):
            return None
        return _looking_at(os.open(name, os.O_RDONLY | os.O_CLOEXEC), look)

    return attempt


def look_then_open(
    path: Path, allowed: Callable[[os.stat_result], bool], look: Callable[[int], bool]
) -> Callable[[], bool | None]:
    """Ask for owner, links and kind by name, then open by name."""
    name = str(path)

    def attempt() -> bool | None:
        facts = os.stat(name, follow_symlinks=False)
        if not stat.S_ISREG(facts.st_mode) or not allowed(facts):
            return None
        return _looking_at(os.open(name, _FILE), look)

    return attempt


def hold_then_count_links(path: Path, look: Callable[[int], bool]) -> Callable[[], bool | None]:
    """Count the links of the very file that is opened, but not look whether its name is still there."""
    name = str(path)

    def attempt() -> bool | None:
        held = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if os.fstat(held).st_nlink > 1:
                return None
            return _looking_at(os.open(f"/proc/self/fd/{held}", os.O_RDONLY | os.O_CLOEXEC), look)
        finally:
            os.close(held)

    return attempt


def step_by_step(
    root: Path, path: Path, look: Callable[[int], bool], *, directory: bool = False
) -> Callable[[], bool | None]:
    """Open one component after the other, no link followed, each below the one before, on one file system."""
    *above, last = path.relative_to(root).parts
    start, device = str(root), root.stat().st_dev

    def is_served(opened: int) -> bool:
        return os.fstat(opened).st_dev == device and not os.fstatvfs(opened).f_flag & os.ST_NOEXEC

    def attempt() -> bool | None:
        here = os.open(start, _DIRECTORY)
        try:
            for name in above:
                below = os.open(name, _DIRECTORY, dir_fd=here)
                os.close(here)
                here = below
                if not is_served(here):
                    return None
            opened = os.open(last, _DIRECTORY if directory else _FILE, dir_fd=here)
        finally:
            os.close(here)
        return _looking_at(opened, lambda opened: look(opened) if is_served(opened) else None)

    return attempt


def lists_only(good: set[bytes]) -> Callable[[int], bool]:
    """Return what looks at a directory: are all its names among the good ones?"""
    names = {os.fsdecode(name) for name in good}
    return lambda descriptor: set(os.listdir(descriptor)) <= names
