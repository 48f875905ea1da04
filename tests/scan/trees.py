"""A tree of real files of three users, with whatever may be in one, and the broker that serves it."""

from __future__ import annotations

import os
import socket
import stat
from typing import TYPE_CHECKING, NamedTuple

from tests.scan.descriptors import EICAR

if TYPE_CHECKING:
    from pathlib import Path

OWNERS = (31001, 31002, 31003)
BIG = 5 << 20


class Tree(NamedTuple):
    """Paths by what a scan must say of them."""

    root: bytes
    clean: set[bytes]
    infected: set[bytes]
    skipped: dict[bytes, str]

    @property
    def size(self) -> int:
        """The bytes of all regular files."""
        return sum(os.stat(path).st_size for path in self.clean | self.infected)


def make_tree(root: Path) -> Tree:
    """Make it below `root`, which is made too. Files have mode 0600, directories 0700."""
    tree = Tree(bytes(root), set(), set(), {})
    root.mkdir()
    for number, owner in enumerate(OWNERS):
        home = tree.root + b"/home%d" % number
        deep = home + b"/a directory/\xff\xfe/new\nline"
        os.makedirs(deep)
        _write(tree.clean, home + b"/empty", b"")
        _write(tree.clean, home + b"/with spaces and 'quotes'", b"fine")
        _write(tree.clean, deep + b"/new\nline", b"fine")
        _write(tree.clean, deep + b"/\x1b[31mred", b"fine")
        _write(tree.clean, home + b"/nearly eicar", EICAR[:-1])
        _write(tree.infected, deep + b"/\xffeicar\xfe", EICAR)
        _write(tree.infected, home + b"/eicar with line end", EICAR + b"\n")
        os.link(home + b"/eicar with line end", home + b"/hard link")
        tree.infected.add(home + b"/hard link")
        os.mkfifo(home + b"/fifo")
        os.mknod(home + b"/device", stat.S_IFCHR | 0o600, os.makedev(1, 3))
        os.symlink("/etc/shadow", home + b"/link to shadow")
        os.symlink(".", home + b"/link to itself")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(home + b"/socket")
        tree.skipped.update(
            {
                home + b"/fifo": "fifo",
                home + b"/device": "character device",
                home + b"/link to shadow": "symbolic link",
                home + b"/link to itself": "symbolic link",
                home + b"/socket": "socket",
            }
        )
        if number == 0:
            _write(tree.clean, home + b"/big", os.urandom(BIG))
        _give(home, owner)
    root.chmod(0o755)
    return tree


def _write(group: set[bytes], path: bytes, contents: bytes) -> None:
    with open(path, "wb") as file:
        file.write(contents)
    group.add(path)


def _give(home: bytes, owner: int) -> None:
    for directory, _, names in os.walk(home, topdown=False):
        for name in names:
            path = directory + b"/" + name
            os.chown(path, owner, owner, follow_symlinks=False)
            if not os.path.islink(path):
                os.chmod(path, 0o600)
        os.chown(directory, owner, owner)
        os.chmod(directory, 0o700)
