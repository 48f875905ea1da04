"""Workers that do not do what they should, found by their names in the zygote."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from typing import TYPE_CHECKING

from fdbroker.kernel import sockets
from fdbroker.scan.answers import encode
from fdbroker.scan.verdict import Answer, Clean, Error, Infected, Reason, Verdict
from fdbroker.scan.worker import REQUEST

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from pathlib import Path

_libc = ctypes.CDLL(None)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)

SHORT = Error(Reason.SHORT_READ, "only 3 of 11 bytes could be read")
FOUND = Infected("Bad", ("Worse",))


# What all workers of a zygote look at when they begin: which function they run, and how.
LONGEST_ORDER = 200


def order(file: Path, work: Callable[..., object], mode: str) -> None:
    """Say what workers do that begin from now on; `work`: a function of this module."""
    with open(file, "r+b") as opened:
        opened.write(f"{work.__name__}\n{mode}".encode().ljust(LONGEST_ORDER, b"\0"))


def load(orders: str) -> mmap.mmap:
    """Return the orders, which are seen without an open file."""
    with open(orders, "rb") as file:
        return mmap.mmap(file.fileno(), LONGEST_ORDER, prot=mmap.PROT_READ)


def obey(orders: mmap.mmap, channel: socket.socket, _scratch: bytes | None) -> None:
    """Do as it is ordered."""
    work, mode = orders[:].rstrip(b"\0").decode().split("\n")
    globals()[work](mode, channel)


def clean(number: int, size: int) -> bytes:
    return encode(number, size, [Answer("hashes", Clean())])


def _answer_of(verdict: Verdict) -> Callable[[int, int], bytes]:
    return lambda number, size: encode(number, size, [Answer("hashes", verdict)])


GARBAGE: dict[str, Callable[[int, int], bytes]] = {
    "too short": lambda number, size: clean(number, size)[:-1],
    "too long": lambda number, size: clean(number, size) + b"\0",
    "far too long": lambda number, size: b"\0" * 60_000,
    "text": lambda number, size: b"clean",
    "of no file": lambda number, size: clean(number + 1000, size),
    "of a later file": lambda number, size: clean(number + 1, size),
    "of no engine": lambda number, size: encode(number, size, []),
    "of two engines": lambda number, size: encode(number, size, [Answer("hashes", Clean())] * 2),
    "clean after half of it": lambda number, size: clean(number, size // 2),
    "clean after more than it": lambda number, size: clean(number, size + 1),
    "infected after half of it": lambda number, size: encode(number, size // 2, [Answer("hashes", FOUND)]),
    "of an unknown kind": lambda number, size: clean(number, size)[:-4] + b"\4\0\0\0",
    "of kind 0": lambda number, size: clean(number, size)[:-4] + b"\0\0\0\0",
    "clean with a reason": lambda number, size: clean(number, size)[:-4] + b"\1\1\0\0",
    "clean with a text": lambda number, size: clean(number, size)[:-4] + b"\1\0\1\0x",
    "infected without a name": lambda number, size: clean(number, size)[:-4] + b"\2\0\0\0",
    "infected with a name that plays with terminals": lambda number, size: (
        clean(number, size)[:-4] + b"\2\0\2\0\x1bX"
    ),
    "infected with an empty second name": lambda number, size: clean(number, size)[:-4] + b"\2\0\2\0x\0",
    "an error of an unknown reason": lambda number, size: clean(number, size)[:-4] + b"\3\xff\0\0",
    "a text that is not UTF-8": lambda number, size: clean(number, size)[:-4] + b"\3\0\1\0\xff",
}
_TAKEN = threading.Lock()
_TAKEN.acquire()
ANSWERS = {"short": _answer_of(SHORT), "found": _answer_of(FOUND), "clean": clean, **GARBAGE}


def take(channel: socket.socket) -> list[tuple[int, int]]:
    """Take a message: return number and size of its requests."""
    with (message := sockets.receive(channel, 1024)).descriptors:
        return list(REQUEST.iter_unpack(message.data))


def answer_once(mode: str, channel: socket.socket) -> None:
    """Answer the first file, and take what else comes."""
    [(number, size), *_] = take(channel)
    sockets.send(channel, ANSWERS[mode](number, size))
    take(channel)
    take(channel)


def map_and_read(_mode: str, channel: socket.socket) -> None:
    """Be an engine that maps the file, and reads its end again and again."""
    with sockets.receive(channel, 1024).descriptors as owned:
        # Not by the module mmap: it duplicates the descriptor, which the filter of `sealed` does not let it.
        size = os.fstat(owned.numbers()[0]).st_size
        address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, owned.numbers()[0], 0)
        while True:
            ctypes.string_at(address, size)


def crash_at_a_file(_mode: str, channel: socket.socket) -> None:
    """Answer the files of a message together; crash, or wait, at each that begins with that word."""
    while True:
        with (message := sockets.receive(channel, 1024)).descriptors as owned:
            if not message.data:
                return
            answers = b""
            for descriptor, (number, size) in zip(
                owned.numbers(), REQUEST.iter_unpack(message.data), strict=True
            ):
                head = os.pread(descriptor, 5, 0)
                if head == b"crash":
                    ctypes.string_at(0)
                if head == b"wait":
                    with _TAKEN:  # nobody lets go of it
                        pass
                verdict = FOUND if head == b"found" else Clean()
                if head == b"spoil":
                    answers += encode(number, size, [Answer("hashes", Error(Reason.MEMORY, "used up"))])
                else:
                    answers += encode(number, size, [Answer("hashes", verdict)])
            sockets.send(channel, answers)


def misbehave(mode: str, channel: socket.socket) -> None:
    if mode == "end at once":
        return
    requests = take(channel)
    number, size = requests[0]
    match mode:
        case "take and end":
            return
        case "loop":
            while True:
                os.getpid()
        case "open":
            os.open("/etc/passwd", os.O_RDONLY)
        case "crash":
            ctypes.string_at(0)
        case "descriptor":
            sockets.send(channel, clean(number, size), [0])
        case "early":
            sockets.send(channel, clean(number, size))
            sockets.send(channel, clean(number + 1, 999))
            take(channel)
        case "answer and end":
            # With requests left unread, the kernel reports a reset first.
            sockets.send(channel, clean(number, size))
        case "pairs":
            while True:
                while len(requests) < 2:
                    requests += take(channel)
                for one in requests[:2]:
                    sockets.send(channel, clean(*one))
                del requests[:2]
