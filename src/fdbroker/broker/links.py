"""Symbolic links, for rules that follow them: a link is nothing but another name to be asked for.

The kernel follows none for us. The first link on the way of a name is read,
the name that it leads to is put together from texts, and that name is decided
on before anything is looked at there, as if the client had asked for it. So
nothing comes by a link that would not come by its own name, whoever made the
link and whatever is exchanged meanwhile; and no name is touched that the rules
do not allow. (If the kernel went there, a link to `../x/..` would tell whoever
makes links whether there is a directory x, anywhere below the root.)
"""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING

from fdbroker.kernel.errors import renamed
from fdbroker.kernel.files import open_path_beneath
from fdbroker.policy.paths import problem_with_path

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fdbroker.broker.roots import HeldRoot

# Of one name, one after the other. The kernel's limit is 40; whoever may make links makes us look at each.
MOST_LINKS = 8


class LinkRefusedError(Exception):
    """A link leads nowhere where the broker goes; the text is the reason for the audit."""


def name_behind_link(root: HeldRoot, path: bytes) -> bytes:
    """Return the name that `path`, in which there is a link, stands for by its first link.

    Raises:
        LinkRefusedError: `link_leaves_root`: the link is absolute or goes above the root;
            `link_not_normal`: it has `.` or `..` behind a name, or its name is too long;
            `moved`: there is no link any more.
        SyscallError: as `open_path_beneath`.

    """
    components = path[root.skip :].split(b"/")
    # How many components there are before the first link is behind them: any more, and openat2 says ELOOP.
    without, with_one = 0, len(components)
    while with_one - without > 1:
        middle = (without + with_one) // 2
        if _read_link(root, components[:middle]) is None:
            without = middle
        else:
            with_one = middle
    target = _read_link(root, components[:with_one])
    if not target:  # in the middle now, or no link
        raise LinkRefusedError("moved")
    below = _join(components[:without], target, components[with_one:])
    name = path[: root.skip] + below if below else path[: root.skip].rstrip(b"/") or b"/"
    if problem_with_path(name) is not None:
        raise LinkRefusedError("link_not_normal")
    return name


def _read_link(root: HeldRoot, components: Sequence[bytes]) -> bytes | None:
    """Return what the last of `components` links to, None if it is no link; b"" if one before it is."""
    try:
        held = open_path_beneath(root.descriptor, b"/".join(components), root.cross_mounts)
    except OSError as error:
        if error.errno == errno.ELOOP:
            return b""
        raise
    try:
        if not stat.S_ISLNK(os.fstat(held).st_mode):
            return None
        # Of the link that is held, whatever has its name by now; Linux 2.6.39. No link is empty.
        return os.readlink(b"", dir_fd=held)
    except OSError as error:
        raise renamed(error, "readlinkat", directory=held, path=b"") from None
    finally:
        os.close(held)


def _join(directory: Sequence[bytes], target: bytes, rest: Sequence[bytes]) -> bytes:
    """Return what `target`, of a link in `directory`, stands for, with `rest` behind it; below the root.

    There is no link in `directory`, so that `..` is what stands before its last component. Behind a name in
    the target it would be another thing if that name is a link, and so is left to be refused.
    """
    if target.startswith(b"/"):
        raise LinkRefusedError("link_leaves_root")
    here, names = list(directory), target.rstrip(b"/").split(b"/")
    while names and names[0] in (b".", b".."):
        if names.pop(0) == b"..":
            if not here:
                raise LinkRefusedError("link_leaves_root")
            here.pop()
    return b"/".join([*here, *names, *rest])
