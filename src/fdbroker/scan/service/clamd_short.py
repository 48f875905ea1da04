"""clamd's clients that say all they want in one breath: PING, or one file. They need no conversation.

As clamdscan does for each file, and whoever looks whether the service is there. All others become a
`ClamdClient`.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from fdbroker.clamd.protocol import FILDES_ALONE, WHOLE_CONVERSATIONS
from fdbroker.clamd.replies import OK, said
from fdbroker.kernel import sockets
from fdbroker.scan.service.clamd import ClamdClient, log_reply, path_of
from fdbroker.scan.service.closing import MOST_BYTES, Farewell, close_stream, ends_read
from fdbroker.scan.service.copying import look
from fdbroker.scan.verdict import Clean, Error

if TYPE_CHECKING:
    import socket

    from fdbroker.aio import ServedClient
    from fdbroker.kernel.descriptors import Descriptors
    from fdbroker.scan.service.configuration import Listener
    from fdbroker.scan.service.core import Core
    from fdbroker.scan.service.hub import ClientFiles
    from fdbroker.scan.stamps import Stamp
    from fdbroker.scan.supervisor import Done


def serve_client(core: Core, served: ServedClient, listener: Listener) -> None:
    """Serve a client. See `fdbroker.scan.service.core.Speaks`.

    Mostly it has said by now what it wants. Who wants nothing but an answer to a PING is gone before anything
    is made for him, and who hands in one file needs no conversation.
    """
    came = None
    if core.aside.is_free_for(served.uid):
        with contextlib.suppress(OSError):  # it is read from again
            came = sockets.receive_unclosed(served.socket, MOST_BYTES)
    if came is not None and not came[2]:
        data, owned, _ = came
        if not len(owned):
            reply = WHOLE_CONVERSATIONS.get(data)
            if reply is not None and _answer_if_all_is_said(served.socket, reply):
                served.close()
                return
        elif data in FILDES_ALONE and _serve_one_file(core, served, listener, owned, FILDES_ALONE[data]):
            return
    ClamdClient(core, served, listener, came)


def _answer_if_all_is_said(sock: socket.socket, reply: bytes) -> bool:
    """Answer a client, unless it says more; return whether it was answered."""
    if not ends_read(sock):
        return False
    try:
        sockets.send_at_once(sock, reply)  # nothing was sent there yet, so there is room
    except OSError:  # who it is for is gone
        return True
    return True


def _serve_one_file(
    core: Core, served: ServedClient, listener: Listener, owned: Descriptors, terminator: bytes
) -> bool:
    """Have a file scanned that is all a client wants; return whether it is one that can be scanned at once.

    If not, `owned` is still the caller's.
    """
    if len(owned) != 1:
        return False
    [descriptor] = owned.numbers()
    if not core.mounted.have(descriptor):
        return False
    before, to_copy = look(descriptor, shared=core.hub.pool.has_outside_engines)
    if to_copy or isinstance(before, Error):
        return False
    files = core.hub.client(served.uid)
    if not files.may_be_given():
        files.close()
        return False
    _OneFile(core, served, listener, files, owned.take(), before, terminator)
    return True


class _OneFile:
    """A client that has handed in one file, and of whom no more is read; owns its connection.

    As clamdscan has each file scanned. What a `ClamdClient` does besides is for those who say more.
    """

    def __init__(
        self,
        core: Core,
        served: ServedClient,
        listener: Listener,
        files: ClientFiles,
        descriptor: int,
        before: Stamp,
        terminator: bytes,
    ) -> None:
        """Have it scanned. `files`: of this client, and `descriptor`: owned from now on."""
        self._core = core
        self._served = served
        self._listener = listener
        self._files = files
        self._fileno = served.socket.fileno()
        self._name = b"fd[%d]" % descriptor
        self._shown = path_of(descriptor) or self._name
        self._terminator = terminator
        core.connections[self] = listener
        try:
            files.submit(self, self._tell, b"", descriptor, before=before)
            core.watch.add(self._fileno, 0, self._on_gone, later=True)
        except BaseException:
            self._let_go()
            files.close()
            raise

    def _tell(self, done: Done) -> None:
        text = OK
        if not isinstance(done.verdict, Clean):
            text = said(done.verdict, self._listener.unscanned)[0]
            if text != OK:
                log_reply(self._core, f"uid {self._served.uid}", self._shown, text)
        self._answer(text)
        self._let_go()
        if ends_read(self._served.socket):
            self._served.close()
        else:
            Farewell(self._core, self._served, self._listener)
        self._files.close()

    def _answer(self, text: bytes) -> None:
        try:  # it is all that is sent there, so there is room
            sockets.send_at_once(self._served.socket, b"%b: %b%b" % (self._name, text, self._terminator))
        except OSError:  # who it is for is gone
            return

    def _on_gone(self, _events: int) -> None:
        self._let_go()
        close_stream(self._core, self._served)
        self._files.close()

    def _let_go(self) -> None:
        self._core.connections.pop(self, None)
        self._core.watch.let_go(self._fileno)

    def end(self, reason: str, text: str) -> None:  # noqa: ARG002 - clamd's clients know no reasons
        """Answer with an error, and close."""
        self._answer(f"{text}. ERROR".encode())
        self._on_gone(0)
