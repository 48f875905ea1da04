"""A service that speaks clamd's protocol by `Conversation`, with a scanner that looks for one byte string."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import threading
import time
from typing import TYPE_CHECKING, Self

from fdbroker.clamd.protocol import (
    COMMANDS,
    RELOADING,
    Abandoned,
    Asked,
    Chunk,
    Conversation,
    Kind,
    Limits,
    Refusal,
    Reply,
    Streamed,
)
from fdbroker.clamd.replies import STREAM, commands, said, statistics, version
from fdbroker.kernel import sockets
from fdbroker.kernel.descriptors import Descriptors
from fdbroker.scan.verdict import Clean, Error, Infected, Reason, Verdict
from tests.scan.clamav import BAD, BAD_NAME

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

CLAMAV = "1.4.6"


class Service:
    """Serves any number of connections, each by a thread."""

    def __init__(self, path: Path, limits: Limits) -> None:
        self._limits = limits
        self._threads: list[threading.Thread] = []
        self._stopping, self._stop = socket.socketpair()
        self.failures: list[BaseException] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(bytes(path))
        self._listener.listen(64)
        self._accepting = threading.Thread(target=self._accept)
        self._accepting.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._accepting.join()
        self._listener.close()
        for thread in self._threads:
            thread.join()
        for end in (self._stopping, self._stop):
            end.close()
        assert not self.failures

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                thread = threading.Thread(target=self._serve, args=(sock,))
                self._threads.append(thread)
                thread.start()

    def _serve(self, sock: socket.socket) -> None:
        try:
            with sock:
                _Connection(sock, self._limits).run()
        except BaseException as error:
            self.failures.append(error)
            raise


class _Connection:
    """One connection: what the owner of a `Conversation` does."""

    def __init__(self, sock: socket.socket, limits: Limits) -> None:
        self._sock = sock
        self._conversation = Conversation(limits, time.monotonic())
        self._streams: dict[int, bytes] = {}

    def run(self) -> None:
        conversation = self._conversation
        with contextlib.suppress(BrokenPipeError, ConnectionResetError), Descriptors() as owned:
            while not conversation.is_over:
                deadline = conversation.deadline
                now = time.monotonic()
                self._sock.settimeout(None if deadline is None else max(deadline - now, 0.0001))
                try:
                    received = sockets.receive(self._sock, 65536)
                except TimeoutError:
                    conversation.expire(time.monotonic())
                else:
                    with received.descriptors as came:
                        count = len(came)
                        for descriptor in came.take_all():
                            owned.add(descriptor)
                    conversation.receive(received.data, count, time.monotonic())
                self._answer_all(owned)
                if not conversation.descriptors_wanted:
                    owned.close()
            self._sock.shutdown(socket.SHUT_WR)
            self._sock.settimeout(1.0)
            with contextlib.suppress(TimeoutError):
                while self._sock.recv(65536):
                    pass

    def _answer_all(self, owned: Descriptors) -> None:
        conversation = self._conversation
        while (event := conversation.next_event(time.monotonic())) is not None:
            match event:
                case Reply(data) | Refusal(data):
                    self._sock.sendall(data)
                case Asked(Kind.INSTREAM, number):
                    self._streams[number] = b""
                case Chunk(number, data):
                    self._streams[number] += data
                case Abandoned(number):
                    del self._streams[number]
                case Streamed(number):
                    self._say(number, said(_verdict(self._streams.pop(number))), STREAM)
                case Asked(Kind.FILDES, number):
                    with Descriptors([owned.take()]) as taken:
                        [descriptor] = taken.numbers()
                        self._say(number, said(_of_descriptor(descriptor)), b"fd[%d]" % descriptor)
                case Asked(kind, number, path):
                    self._answer(kind, number, path)

    def _say(self, number: int, texts: list[bytes], name: bytes | None = None) -> None:
        for text in texts:
            self._sock.sendall(self._conversation.answer(number, text, name))
        self._conversation.finish(number, time.monotonic())

    def _answer(self, kind: Kind, number: int, path: bytes) -> None:
        clamav = version(CLAMAV, 0, "")
        match kind:
            case Kind.VERSION:
                self._say(number, [clamav])
            case Kind.VERSIONCOMMANDS:
                self._say(number, [commands(clamav, list(COMMANDS))])
            case Kind.STATS:
                self._say(number, [statistics(live=1, idle=0, most=10, queued=0)])
            case Kind.RELOAD:
                self._say(number, [RELOADING])
            case Kind.SHUTDOWN:
                self._say(number, [])
            case _:
                self._scan(kind, number, path)

    def _scan(self, kind: Kind, number: int, path: bytes) -> None:
        found = list(_of_tree(path))
        bad: list[tuple[bytes, Verdict]] = [one for one in found if not isinstance(one[1], Clean)]
        if kind in {Kind.SCAN, Kind.ALLMATCHSCAN}:
            bad = bad[:1]
        for name, verdict in bad or [(path, Clean())]:
            for text in said(verdict):
                self._sock.sendall(self._conversation.answer(number, text, name))
        self._conversation.finish(number, time.monotonic())


def _of_tree(path: bytes) -> list[tuple[bytes, Verdict]]:
    if not os.path.isdir(path) or os.path.islink(path):
        return [(path, _of_path(path))]
    names = [path.rstrip(b"/") + b"/" + name for name in os.listdir(path)]
    return [
        found
        for name in names
        if os.path.isdir(name) or os.path.isfile(name)
        for found in _of_tree(name)
        if not os.path.islink(name)
    ]


def _of_path(path: bytes) -> Verdict:
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return Error(Reason.NOT_FOUND, "it is not there")
    if stat.S_ISLNK(mode):
        return Error(Reason.SYMLINK, "it is a symbolic link")
    if not stat.S_ISREG(mode):
        return Error(Reason.NOT_REGULAR, "it is not a regular file")
    with open(path, "rb") as file:
        return _verdict(file.read())


def _of_descriptor(descriptor: int) -> Verdict:
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return Error(Reason.NOT_REGULAR, "it is not a regular file")
        return _verdict(os.pread(descriptor, 1 << 20, 0))
    except OSError:
        return Error(Reason.NOT_READABLE, "the descriptor is not open for reading")


def _verdict(contents: bytes) -> Verdict:
    return Infected(BAD_NAME) if BAD in contents else Clean()
