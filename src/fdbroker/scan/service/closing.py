"""Connections of clients are closed, and nobody waits for that.

What a client has sent and nobody has read ends with its connection, descriptors among it. To close one of
these may take as long as its sender likes: a socket waits for its peer (SO_LINGER), a file for its server.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import socket
import struct
import termios
from typing import TYPE_CHECKING

from fdbroker.kernel import sockets
from fdbroker.kernel.descriptors import Descriptors
from fdbroker.scan.service.watch import READABLE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fdbroker.aio import ServedClient
    from fdbroker.scan.service.configuration import Listener
    from fdbroker.scan.service.core import Core

_DRAINING = 1.0  # seconds for a client to close, after all was said
MOST_BYTES = 1 << 16  # of one read
# Before others have their turn. Of short commands one read has ten thousand, of usual parts of a stream
# (1 KiB) no more than these.
READS_AT_ONCE = 16
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


class Farewell:
    """A client that was told all, and may be in the middle of a sentence; owns its connection.

    The kernel makes a reset of what is not read at the end, and a client that meets one may not look at the
    reply: so what such a client still says is read for a moment.
    """

    def __init__(self, core: Core, served: ServedClient, listener: Listener) -> None:
        self._core = core
        self._served = served
        self._fileno = served.socket.fileno()
        core.connections[self] = listener
        self._timer = asyncio.get_running_loop().call_later(_DRAINING, self._close)
        try:
            served.socket.shutdown(socket.SHUT_WR)
            core.watch.add(self._fileno, READABLE, self._read)
        except OSError:  # it is gone, or no more can be watched
            self._close()

    def _read(self, _events: int) -> None:
        for _ in range(READS_AT_ONCE):
            try:
                data, owned, _ = sockets.receive_unclosed(self._served.socket, MOST_BYTES)
            except BlockingIOError:
                return
            except OSError:
                self._close()
                return
            if len(owned):  # no sentence has them in its middle
                self._let_go()
                close_aside(self._core, self._served, owned.take_all())
                return
            if not data:
                self._close()
                return

    def _close(self) -> None:
        self._let_go()
        close_stream(self._core, self._served)

    def _let_go(self) -> None:
        self._timer.cancel()
        self._core.connections.pop(self, None)
        self._core.watch.let_go(self._fileno)

    def end(self, reason: str, text: str) -> None:  # noqa: ARG002 - it was told all
        """Close it."""
        self._close()
