"""Workers that do not do what they should, found by their names in a zygote. Their state is an argument."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from fdbroker.kernel import sockets
from fdbroker.scan.worker import ANSWER, REQUEST, Code

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

# An index that no list has.
NO_INDEX = 1_000_000

GARBAGE: dict[str, Callable[[int, int], bytes]] = {
    "too short": lambda number, size: ANSWER.pack(number, Code.CLEAN, 0, size)[:-1],
    "too long": lambda number, size: ANSWER.pack(number, Code.CLEAN, 0, size) + b"\0",
    "far too long": lambda number, size: b"\0" * 60_000,
    "text": lambda number, size: b"clean",
    "of no file": lambda number, size: ANSWER.pack(number + 1000, Code.CLEAN, 0, size),
    "of a later file": lambda number, size: ANSWER.pack(number + 1, Code.CLEAN, 0, size),
    "of an unknown code": lambda number, size: ANSWER.pack(number, 6, 0, size),
    "of code 0": lambda number, size: ANSWER.pack(number, 0, 0, size),
    "clean with a detail": lambda number, size: ANSWER.pack(number, Code.CLEAN, 1, size),
    "clean after half of it": lambda number, size: ANSWER.pack(number, Code.CLEAN, 0, size // 2),
    "clean after more than it": lambda number, size: ANSWER.pack(number, Code.CLEAN, 0, size + 1),
    "infected with an unknown name": lambda number, size: ANSWER.pack(number, Code.INFECTED, NO_INDEX, size),
    "infected with the last number": lambda number, size: ANSWER.pack(
        number, Code.INFECTED, 0xFFFFFFFF, size
    ),
    "infected after half of it": lambda number, size: ANSWER.pack(number, Code.INFECTED, 0, size // 2),
    "failed without an errno": lambda number, size: ANSWER.pack(number, Code.READ_FAILED, 0, 0),
    "failed with a strange errno": lambda number, size: ANSWER.pack(number, Code.READ_FAILED, 4096, 0),
    "short after all of it": lambda number, size: ANSWER.pack(number, Code.SHORT_READ, 0, size),
    "changed with a detail": lambda number, size: ANSWER.pack(number, Code.CHANGED, 1, 0),
}


def load(**state: object) -> dict[str, object]:
    return state


def take(channel: socket.socket) -> tuple[int, int]:
    """Take a message: return number and size of its first request."""
    with (message := sockets.receive(channel, 1024)).descriptors:
        number, size = REQUEST.unpack_from(message.data)
        return number, size


def take_and_end(_state: object, channel: socket.socket, _scratch: bytes | None) -> None:
    take(channel)


def end_at_once(_state: object, _channel: socket.socket, _scratch: bytes | None) -> None:
    return


def wait(_state: object, channel: socket.socket, _scratch: bytes | None) -> None:
    channel.recv(1)


def talk_garbage(state: dict[str, Any], channel: socket.socket, _scratch: bytes | None) -> None:
    sockets.send(channel, GARBAGE[state["which"]](*take(channel)))
    sockets.receive(channel, 64).descriptors.close()
    sockets.receive(channel, 64).descriptors.close()


def pass_a_descriptor(_state: object, channel: socket.socket, _scratch: bytes | None) -> None:
    number, size = take(channel)
    sockets.send(channel, ANSWER.pack(number, Code.CLEAN, 0, size), [0])


def answer_too_early(_state: object, channel: socket.socket, _scratch: bytes | None) -> None:
    number, size = take(channel)
    sockets.send(channel, ANSWER.pack(number, Code.CLEAN, 0, size))
    sockets.send(channel, ANSWER.pack(number + 1, Code.CLEAN, 0, 999))
    sockets.receive(channel, 64).descriptors.close()


def be_stuck(_state: object, channel: socket.socket, _scratch: bytes | None) -> None:
    take(channel)
    while True:
        os.getpid()


def answer_one_and_end(_state: object, channel: socket.socket, _scratch: bytes | None) -> None:
    number, size = take(channel)
    # With requests left unread, the kernel reports a reset first.
    sockets.send(channel, ANSWER.pack(number, Code.CLEAN, 0, size))


def open_a_file(_state: object, channel: socket.socket, _scratch: bytes | None) -> None:
    take(channel)
    os.open("/etc/passwd", os.O_RDONLY)


def answer_as_told(state: dict[str, Any], channel: socket.socket, _scratch: bytes | None) -> None:
    sockets.send(channel, ANSWER.pack(take(channel)[0], state["code"], state["detail"], state["read"]))


def answer_in_pairs(_state: object, channel: socket.socket, _scratch: bytes | None) -> None:
    while True:
        for number, size in [take(channel), take(channel)]:
            sockets.send(channel, ANSWER.pack(number, Code.CLEAN, 0, size))
