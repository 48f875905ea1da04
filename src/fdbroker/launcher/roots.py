"""Roots that may hang: opened by a child with a time limit, and handed over to the broker.

A look-up in a directory of a FUSE server, NFS or autofs waits until it is answered, and whoever waits so
can't always be ended: a FUSE server that has read a request has to answer it, whatever signal came. So
neither this process nor the broker looks. To have the descriptor of what was found asks for nothing.
"""

from __future__ import annotations

import os
import select
import socket
import time
from typing import TYPE_CHECKING, NoReturn

from fdbroker.kernel import children, process, sockets
from fdbroker.launcher.errors import LaunchError
from fdbroker.launcher.mounts import mounts_on_the_way, read_mounts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fdbroker.launcher.mounts import Mount

SECONDS = 10.0  # for all roots; systemd gives a start 30
_LONGEST = 1 << 16


def open_roots_that_may_hang(roots: Sequence[tuple[str, str, bool]]) -> list[tuple[str, int]]:
    """Return names and O_PATH descriptors, the caller's, of those roots that others have to be asked for.

    `roots`: name, path, and whether helpers open there, for which it is always done. Of roots at the very
    point of a mount nobody is asked, so that they are there even if nobody answers.

    Raises:
        LaunchError: a root can't be opened, or nobody answers in time; the text names it, and its mount. The
            process should end.

    """
    mounts = read_mounts()
    waited_for = []
    for name, text, helpers in roots:
        path = os.fsencode(text)
        way = mounts_on_the_way(path, mounts)
        if helpers or any(mount.is_answered_by_others for mount in way):
            waited_for.append((name, path, way))
    if not waited_for:
        return []
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with theirs:
            child = children.fork_tied()
            if child is None:
                _open_all([(name, path) for name, path, _ in waited_for], theirs)
        until = time.monotonic() + SECONDS
        answered = select.poll()
        answered.register(ours, select.POLLIN)
        opened = []
        for name, path, way in waited_for:
            if not answered.poll(max(0.0, 1000 * (until - time.monotonic()))):
                children.kill(child)  # it may wait on; it has nothing of ours
                raise LaunchError(_nobody_answers(name, path, way))
            with (received := sockets.receive(ours, _LONGEST)).descriptors as descriptors:
                if not descriptors:
                    raise LaunchError(received.data.decode() or f"root {name!r}: who opens it has ended")
                opened.append((name, descriptors.take()))
    children.reap(child)
    return opened


def _open_all(roots: Sequence[tuple[str, bytes]], channel: socket.socket) -> NoReturn:
    """Be the child: send a descriptor of each root, or why there is none.

    It has nothing but its channel: if it hangs for good, nobody waits for a socket, a pipe or a lock of it.
    """
    status = 1
    try:
        from fdbroker.broker.roots import RootError, open_root  # noqa: PLC0415 - most starts need none

        os.dup2(channel.fileno(), 0)
        process.close_range(1)
        with socket.socket(fileno=0) as sock:
            for name, path in roots:
                try:
                    sockets.send(sock, b"opened", [open_root(name, path)])
                except RootError as error:
                    sockets.send(sock, str(error).encode())
                    break
        status = 0
    finally:
        os._exit(status)


def _nobody_answers(name: str, path: bytes, way: Sequence[Mount]) -> str:
    others = [mount for mount in way if mount.is_answered_by_others]
    what = " and ".join(f"{os.fsdecode(one.type)} at {os.fsdecode(one.point)}" for one in others)
    return (
        f"root {name!r} ({os.fsdecode(path)}) can't be opened: {what or 'its file system'} did not answer"
        f" within {SECONDS:g} s; see to its server, or unmount it (umount -l), then start the broker again;"
        " or take the root out of the policy"
    )
