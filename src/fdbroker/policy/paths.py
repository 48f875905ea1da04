"""What a path may look like before any rule is read, and how it is taken apart.

Paths are bytes, absolute and already normal: the broker never cleans a path
up, since two spellings of one name are how a check and its use come to mean
different files.
"""

from __future__ import annotations

MAX_PATH_BYTES = 4095  # PATH_MAX counts the NUL
MAX_NAME_BYTES = 255  # NAME_MAX
_DOTS = (b".", b"..")


def problem_with_path(path: bytes) -> str | None:
    """Return why `path` can't be asked for, or None. Pure; never raises."""
    if not path:
        return "empty"
    if len(path) > MAX_PATH_BYTES:
        return "path_too_long"
    if 0 in path:
        return "nul"
    if not path.startswith(b"/"):
        return "relative"
    if path == b"/":
        return None
    if path.endswith(b"/"):
        return "trailing_slash"
    for component in path[1:].split(b"/"):
        if not component:
            return "empty_component"
        if component in _DOTS:
            return "dot_component"
        if len(component) > MAX_NAME_BYTES:
            return "name_too_long"
    return None


def components_below(root: bytes, path: bytes) -> list[bytes] | None:
    """Return the components of `path` below `root`, [] for the root itself, None outside it."""
    if path == root:
        return []
    prefix = root if root == b"/" else root + b"/"
    if not path.startswith(prefix):
        return None
    return path[len(prefix) :].split(b"/")
