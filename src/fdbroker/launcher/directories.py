"""Directories that root alone can write, held open so that what was checked is what is used."""

from __future__ import annotations

import errno
import os
import shlex

from fdbroker.config.directories import DirectoryProblem, Kind, Sticky, UnsafeDirectoryError, open_directory
from fdbroker.launcher.errors import LaunchError


def open_directory_of_root(path: str, *, make: bool = False, group_above: bool = False) -> int:
    """Return a descriptor, the caller's, of a directory in which only root can make or rename anything.

    Above the last component a sticky directory such as /tmp will do: there
    nobody can take away what is root's. With `make` the last one is made, mode
    0755, if it is missing. With `group_above` those above may be their group's to
    write, for files that are only written to once they are open.

    Raises:
        LaunchError: it is not so; the text names the component and the cure.

    """
    try:
        return open_directory(path, sticky=Sticky.ABOVE, make=make, group_above=group_above)
    except UnsafeDirectoryError as error:
        raise LaunchError(_text(error.problems[0], path)) from error


def _text(problem: DirectoryProblem, wanted: str) -> str:
    path, detail = problem.path, problem.detail
    missing = detail == os.strerror(errno.ENOENT)
    or_make = f", or make it, as root: mkdir -p {shlex.quote(wanted)}" if missing else ""
    if problem.kind is Kind.NOT_MADE:
        return f"directory {path!r} can't be made: {detail}; make it first, as root, mode 0755"
    reason = {
        Kind.FOREIGN: f"it belongs to uid {detail}, who could exchange what is made there; use one of root's",
        Kind.WRITABLE: f"its mode is {detail}, so that others than root could make or exchange things there;"
        " chmod go-w it, or use another",
        Kind.LINK: f"it is a symbolic link; use its real path, {detail!r}",
        Kind.UNREACHABLE: f"{detail}; name a directory that exists{or_make}",
    }[problem.kind]
    return f"directory {path!r} can't be used: {reason}"
