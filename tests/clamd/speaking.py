"""Conversations with whoever speaks clamd's protocol, over a real socket."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from enum import Enum, auto
from typing import TYPE_CHECKING, NamedTuple

from fdbroker.kernel import sockets

if TYPE_CHECKING:
    from pathlib import Path

SECONDS = 20.0


class Passed(NamedTuple):
    """Bytes that are sent in one message with these files, each a name and how to open it."""

    data: bytes
    files: tuple[tuple[bytes, int], ...]


class Until(NamedTuple):
    """Read until it was said."""

    said: bytes


class HalfClose(Enum):
    """The client says no more, and listens."""

    HALF_CLOSE = auto()


HALF_CLOSE = HalfClose.HALF_CLOSE
Step = bytes | Passed | Until | HalfClose


def converse(path: Path, steps: tuple[Step, ...]) -> bytes:
    """Do the steps, and return all that was said until the other side closed.

    Each step is made when the other side has read the one before.
    """
    said = b""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(SECONDS)
        sock.connect(bytes(path))
        # Who was refused may be hung up on before all is said.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for step in steps:
                if isinstance(step, Until):
                    while step.said not in said:
                        more = sock.recv(65536)
                        assert more, (step, said)
                        said += more
                    continue
                _make(sock, step)
                _wait_until_read(sock)
        with contextlib.suppress(ConnectionResetError):
            while more := sock.recv(65536):
                said += more
    return said


def _make(sock: socket.socket, step: bytes | Passed | HalfClose) -> None:
    if isinstance(step, HalfClose):
        sock.shutdown(socket.SHUT_WR)
    elif isinstance(step, Passed):
        opened: list[int] = []
        try:
            opened += [os.open(name, flags | os.O_CLOEXEC) for name, flags in step.files]
            socket.send_fds(sock, [step.data], opened)
        finally:
            for descriptor in opened:
                os.close(descriptor)
    else:
        sock.sendall(step)


def _wait_until_read(sock: socket.socket) -> None:
    """Wait until the other side has read everything, or hung up."""
    end = time.monotonic() + SECONDS
    sock.settimeout(0.0)
    while sockets.bytes_not_received(sock):
        assert time.monotonic() < end
        with contextlib.suppress(BlockingIOError):
            if not sock.recv(1, socket.MSG_PEEK):
                break
        time.sleep(0.0002)
    sock.settimeout(SECONDS)
