"""Hand-made brokers, which say exactly what a test wants them to say."""

from __future__ import annotations

import os
import socket
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from fdbroker.client import Client
from fdbroker.kernel import sockets
from fdbroker.wire.format import MAX_FRAME
from fdbroker.wire.messages import GIVEN, Hello, OpenRequest, Welcome
from fdbroker.wire.replies import encode_open_reply, encode_welcome
from fdbroker.wire.requests import decode_request

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Self

    from fdbroker.wire.messages import Request, Result

# The engine numbers requests from 1; the first is the hello.
HELLO, FIRST, SECOND, THIRD = 1, 2, 3, 4
GENERATION = 7


def welcome(request_id: int = HELLO, **changed: int) -> bytes:
    usual = Welcome(request_id, GENERATION, 1, 2, 0, 253, MAX_FRAME, 256, 0)
    return encode_welcome(usual._replace(**changed))


def given(request_id: int, results: Sequence[Result] = (GIVEN,)) -> bytes:
    return encode_open_reply(request_id, GENERATION, results)


def say(sock: socket.socket, frame: bytes, descriptors: int = 0) -> None:
    """Send a frame with so many descriptors of /dev/null."""
    numbers = [os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC) for _ in range(descriptors)]
    try:
        sockets.send(sock, frame, numbers)
    finally:
        for number in numbers:
            os.close(number)


def hear(sock: socket.socket) -> Request | None:
    """Receive a request, None at the end."""
    data = sock.recv(MAX_FRAME + 1)
    return decode_request(data) if data else None


@contextmanager
def broker_saying(
    *frames: tuple[bytes, int], end: bool = False, timeout: float = 30.0
) -> Iterator[tuple[Client, socket.socket]]:
    """Give a greeted client of a broker that has said `frames` in advance; and the broker's end."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        say(ours, welcome())
        with Client.from_socket(theirs, timeout=timeout) as client:
            assert isinstance(hear(ours), Hello)
            for frame, descriptors in frames:
                say(ours, frame, descriptors)
            if end:
                ours.close()
            yield client, ours


class ThreadedBroker:
    """Listens, and hands each connection to the next of `turns`, on a thread; the last takes the rest."""

    def __init__(self, path: str, *turns: Callable[[socket.socket], None]) -> None:
        self.connections = 0
        self._turns = turns
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(path)
        self._listener.listen()
        self._failures: list[BaseException] = []
        self._open: list[socket.socket] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        for sock in tuple(self._open):
            with suppress(OSError):  # the client has gone, or this end has
                sock.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        if self._failures:
            raise self._failures[0]

    def _run(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            turn = self._turns[min(self.connections, len(self._turns) - 1)]
            self.connections += 1
            with sock:
                self._open.append(sock)
                try:
                    turn(sock)
                except BaseException as error:  # noqa: BLE001 - raised in the test
                    self._failures.append(error)
                self._open.remove(sock)


def answer_one(sock: socket.socket) -> None:
    """Greet and answer one open; then go."""
    hello = hear(sock)
    assert isinstance(hello, Hello)
    say(sock, welcome(hello.id))
    request = hear(sock)
    assert isinstance(request, OpenRequest)
    say(sock, given(request.id, [GIVEN] * len(request.paths)), len(request.paths))


def answer_all(sock: socket.socket) -> None:
    hello = hear(sock)
    assert isinstance(hello, Hello)
    say(sock, welcome(hello.id, max_paths=4))
    while request := hear(sock):
        assert isinstance(request, OpenRequest)
        say(sock, given(request.id, [GIVEN] * len(request.paths)), len(request.paths))


def die_with_the_request(sock: socket.socket) -> None:
    hello = hear(sock)
    assert isinstance(hello, Hello)
    say(sock, welcome(hello.id))
    hear(sock)


def die_at_once(_sock: socket.socket) -> None:
    return
