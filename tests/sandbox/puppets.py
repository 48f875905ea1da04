"""What the workers of these tests run, found by its name in the zygote; it imports little."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import signal
import threading
from typing import TYPE_CHECKING, Any

from fdbroker.kernel import sockets
from tests.sandbox import attacks

if TYPE_CHECKING:
    import socket

_TAKEN = threading.Lock()


def answer(state: dict[str, Any], channel: socket.socket, scratch: bytes | None) -> None:
    """Take descriptors, call the function that the state names, answer in JSON; and again."""
    while True:
        with (message := sockets.receive(channel, 4096)).descriptors as owned:
            if not message.data:
                return
            order = json.loads(message.data)
            function = globals()[order["function"]]
            said = function(*owned.numbers(), scratch=scratch, state=state, **order["arguments"])
        sockets.send(channel, json.dumps(said).encode())


def load(**state: object) -> dict[str, object]:
    """Be warm: what an attack uses must be loaded as well."""
    ctypes.string_at(ctypes.create_string_buffer(8), 8)
    return {**state, "environment": sorted(os.environ)}


def attempt_all(descriptor: int, *, scratch: bytes | None, parent: int, **_rest: object) -> dict[str, int]:
    return attacks.attempt_all(descriptor, parent)


def attempt(descriptor: int, *, name: str, parent: int, **_rest: object) -> int:
    return attacks.ATTACKS[name](descriptor, parent)


def use_as_meant(descriptor: int, **_rest: object) -> dict[str, int | str]:
    return attacks.use_as_meant(descriptor)


def use_scratch(*, scratch: bytes | None, **_rest: object) -> dict[str, object]:
    return attacks.use_scratch(scratch or b"/no-such-place")


def fill_scratch(*, scratch: bytes, **_rest: object) -> str:
    """Write until there is no room; return the error."""
    count = 0
    while True:
        count += 1
        try:
            with open(scratch + b"/%d" % count, "wb", buffering=0) as file:
                while file.write(bytes(1 << 20)):
                    pass
        except OSError as error:
            return os.strerror(error.errno or 0)


def scratch_names(*, scratch: bytes, **_rest: object) -> list[str]:
    """Return what is in the directory, and add to it."""
    names = sorted(map(os.fsdecode, os.listdir(scratch)))
    with open(scratch + b"/mine", "wb") as file:
        file.write(b"secret")
    return names


def told(*, state: dict[str, Any], **_rest: object) -> object:
    return state["word"]


def pid(**_rest: object) -> int:
    return os.getpid()


def environment(*, state: dict[str, Any], **_rest: object) -> list[list[str]]:
    return [state["environment"], sorted(os.environ)]


def talk_elsewhere(descriptor: int, **_rest: object) -> list[int]:
    """Send and receive on what was passed, which could have been a socket."""
    message = b"\0" * 56
    return [attacks.call(name, descriptor, message, 0) for name in ("sendmsg", "recvmsg")]


def look_at_a_path(*_descriptors: int, **_rest: object) -> int:
    return attacks.look_at_a_path()


def open_below(directory: int, *, scratch: bytes, **_rest: object) -> list[int]:
    """Use a directory's descriptor that was passed; and climb out of the own directory."""
    return [
        attacks.call("openat", directory, b"own", os.O_RDONLY, 0),
        attacks.call("openat", directory, b".", os.O_RDONLY, 0),
        attacks.call("openat", directory, b"made", os.O_WRONLY | os.O_CREAT, 0o600),
        attacks.call("mkdirat", directory, b"made", 0o700),
        attacks.call("unlinkat", directory, b"own", 0),
        attacks.call("renameat", directory, b"own", attacks.AT_FDCWD, scratch + b"/own"),
        attacks.call("openat", attacks.AT_FDCWD, scratch + b"/../../etc/passwd", os.O_RDONLY, 0),
    ]


def use_memory(*, size: int, **_rest: object) -> str:
    try:
        return f"{len(bytearray(size))} bytes"
    except MemoryError:
        return "MemoryError"


def make_cycles(*, megabytes: int, **_rest: object) -> str:
    """Make garbage that holds itself."""
    for _ in range(megabytes * 100):
        cycle: list[object] = [bytearray(10_000)]
        cycle.append(cycle)
    return "done"


def write_executable(**_rest: object) -> int:
    """Make memory writable and executable, as a JIT does."""
    return attacks.call("mmap", 0, 4096, mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC, 0x22, -1, 0)


# ---- others that are named as the work or the warming themselves ----


def be_told(state: dict[str, Any], channel: socket.socket, scratch: bytes | None) -> None:
    """Be what the first message names."""
    with (message := sockets.receive(channel, 100)).descriptors:
        name = message.data.decode()
    globals()[name](state, channel, scratch)


def wait_for_the_end(_state: object, channel: socket.socket, _scratch: bytes | None) -> None:
    sockets.receive(channel, 1)


def run_for_ever(_state: object, _channel: socket.socket, _scratch: bytes | None) -> None:
    while True:
        os.getpid()


def end_with_3(_state: object, _channel: socket.socket, _scratch: bytes | None) -> None:
    os._exit(3)


def return_at_once(_state: object, _channel: socket.socket, _scratch: bytes | None) -> None:
    return


def divide_by_zero(_state: object, _channel: socket.socket, _scratch: bytes | None) -> None:
    print(1 // 0)  # noqa: T201 - not reached


def open_a_file(_state: object, _channel: socket.socket, _scratch: bytes | None) -> None:
    os.open("/etc/passwd", os.O_RDONLY)


def crash(_state: object, _channel: socket.socket, _scratch: bytes | None) -> None:
    ctypes.string_at(8, 1)


def raise_an_error() -> None:
    raise RuntimeError("the database is not there")


class SaysWhyError(Exception):
    says_why = True


def say_why() -> None:
    raise SaysWhyError("the database is not there; put it there")


def end_the_zygote() -> None:
    os._exit(5)


def be_slow() -> None:
    signal.pause()


def tell_and_be_slow(told: str) -> None:
    """Say that it is here, and keep what it said it by open."""
    descriptor = os.open(told, os.O_WRONLY)
    os.write(descriptor, b".")
    signal.pause()


def leave_a_thread() -> None:
    threading.Thread(target=threading.Event().wait, daemon=True).start()


# ---- for run() ----


def count(descriptor: int, word: str = "e") -> dict[str, int]:
    return {
        "size": os.fstat(descriptor).st_size,
        "count": os.pread(descriptor, 1 << 16, 0).count(word.encode()),
    }


def many_bytes(number: int) -> bytes:
    return b"x" * number


def no_json() -> object:
    return {1, 2}


def raises() -> None:
    raise ValueError("this is no archive")


def opens() -> str:
    with open("/etc/passwd") as file:
        return file.read()


def sleeps() -> None:
    _TAKEN.acquire()
    with _TAKEN:  # nobody lets go of it
        pass
