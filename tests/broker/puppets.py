"""Processes of other uids that do what a test tells them, one thing after the other."""

from __future__ import annotations

import os
import pickle
import select
import signal
import socket
import traceback
from typing import TYPE_CHECKING, Any

from fdbroker.kernel import children
from tests.processes import ChildError, become

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Self

SECONDS = 30  # after which a test fails that waits for a puppet
_MOST = 1 << 20


class Puppet:
    """A forked process. `serve` lets the broker work while the test waits for it; None: it works by itself.

    What it is told to do are functions of a module, called with a dictionary that is its memory, and
    the arguments. It has none of the descriptors of the test.
    """

    def __init__(
        self, serve: Callable[[], None] | None = None, *, uid: int | None = None, groups: tuple[int, ...] = ()
    ) -> None:
        self._serve = serve
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._lives = True
        self.pid = os.fork()
        if not self.pid:
            try:
                _obey(theirs.fileno(), uid, groups)
            finally:
                os._exit(1)
        theirs.close()

    def do(self, function: Callable[..., Any], *arguments: object) -> Any:  # noqa: ANN401 - whatever it returns
        """Have a function called there; serve until it is done and return what it returns.

        Raises:
            ChildError: it raised, or the process is gone; the text says how.

        """
        self.begin(function, *arguments)
        return self.result()

    def begin(self, function: Callable[..., Any], *arguments: object) -> None:
        """Have a function called there, without waiting."""
        self._ours.send(pickle.dumps((function, arguments)))

    def result(self, seconds: int = SECONDS) -> Any:  # noqa: ANN401 - as above
        """Wait for what was begun, at most so long, and serve meanwhile."""
        if not self._is_there(seconds):
            raise ChildError(f"no answer in {seconds} s")
        data = self._ours.recv(_MOST)
        if not data:
            raise ChildError("the process is gone")
        good, value = pickle.loads(data)  # noqa: S301 - our own child wrote it
        if not good:
            raise ChildError(value)
        return value

    def _is_there(self, seconds: int) -> bool:
        """Return whether an answer comes in this time."""
        if self._serve is None:
            return bool(select.select([self._ours], [], [], seconds)[0])
        for _ in range(seconds * 1000):
            self._serve()
            if select.select([self._ours], [], [], 0.001)[0]:
                return True
        return False

    def end(self) -> None:
        """Kill it, if it was not, and wait for its end; `pid` is what it was."""
        if self._lives:
            self._lives = False
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()
        self._ours.close()


def _obey(descriptor: int, uid: int | None, groups: tuple[int, ...]) -> None:
    os.dup2(descriptor, 3)
    os.closerange(4, 65536)
    commands = socket.socket(fileno=3)
    children.set_parent_death_signal(signal.SIGKILL)
    if uid is not None:
        become(uid, groups=groups)
    memory: dict[str, Any] = {}
    while data := commands.recv(_MOST):
        try:
            function, arguments = pickle.loads(data)  # noqa: S301 - the test wrote it
            answer: tuple[bool, object] = (True, function(memory, *arguments))
        except BaseException:  # noqa: BLE001 - whatever it was is reported
            answer = (False, traceback.format_exc())
        commands.send(pickle.dumps(answer))
    os._exit(0)
