"""Connections of clients are closed, and nobody waits for that.

What a client has sent and nobody has read ends with its connection, descriptors among it. To close one of
these may take as long as its sender likes: a socket waits for its peer (SO_LINGER), a file for its server.
"""

from __future__ import annotations

import contextlib
import fcntl
import socket
import struct
import termios
from typing import TYPE_CHECKING

from fdbroker.kernel.descriptors import Descriptors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fdbroker.aio import ServedClient
    from fdbroker.scan.service.core import Core

_NUMBER = struct.Struct("@i")
_NOTHING = _NUMBER.pack(0)


def all_is_read(sock: socket.socket) -> bool:
    """Return whether nothing waits to be read on a stream."""
    # FIONREAD, as unix(7) and tcp(7) have it; to look into what is there is an exception where nothing is.
    return fcntl.ioctl(sock, termios.FIONREAD, _NOTHING) == _NOTHING


def ends_read(sock: socket.socket) -> bool:
    """Have nothing more come on a Unix stream, and return whether all that came is read."""
    sock.shutdown(socket.SHUT_RD)  # before the look, so that nothing can come in between
    return all_is_read(sock)


def close_stream(core: Core, served: ServedClient) -> None:
    """Close the connection of a client, a stream."""
    # By TCP no descriptors come.
    if served.uid < 0 or ends_read(served.socket):
        served.close()
    else:
        close_aside(core, served)


def close_aside(core: Core, served: ServedClient, owned: Sequence[int] = ()) -> None:
    """Close the connection of a client, of any type, beside the loop, and descriptors that came by it.

    It is released then, so that the broker counts it until its descriptor is free: a user whose connections
    can't be closed gets no others.
    """
    with contextlib.suppress(OSError):
        served.socket.shutdown(socket.SHUT_RDWR)  # the other end sees it at once
    number = served.socket.detach()
    if number < 0:  # it is closed, or will be
        return
    closed = core.closings.run(served.uid, Descriptors([*owned, number]).close)
    closed.add_done_callback(lambda _: served.close())
