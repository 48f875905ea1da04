"""A client that reads whole large files: by a descriptor from fdbroker, or as a stream over loopback TCP.

    python -m benchmarks.transfer_client {fdbroker|tcp} SOCKET LIST FILES CPU UID

Both sides end with the same bytes in the same buffer, in a process of UID that could not have opened
the file. Started as root, since the server of the streams is forked from the process that asks it: it opens
what it is asked for and has the kernel send it (sendfile(2)), without asking who asks. Prints a line of JSON
as bench_client does.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.python_client import become, listed, measure
from benchmarks.tree import LARGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Reader = Callable[[bytes, memoryview], int]

_SIZE = struct.Struct("<Q")
_WARM_UP = 8


def main(arguments: list[str]) -> int:
    """Measure; return the exit status."""
    kind, broker, paths_name, files_text, cpu, uid = arguments
    os.sched_setaffinity(0, {int(cpu)})
    paths = listed(paths_name, int(files_text))
    buffer = memoryview(bytearray(LARGE_SIZE))
    with tcp_reader(int(uid)) if kind == "tcp" else fdbroker_reader(int(uid), Path(broker)) as read:
        return measure(lambda some: sum(read(path, buffer) for path in some), paths, _WARM_UP, LARGE_SIZE)


@contextmanager
def fdbroker_reader(uid: int, broker: Path) -> Iterator[Reader]:
    """Become `uid`, connect, give what reads a file by its descriptor."""
    from fdbroker.client import connect  # noqa: PLC0415 - the other side does not have it in memory

    become(uid)
    with connect(broker) as client:

        def read(path: bytes, buffer: memoryview) -> int:
            descriptor = client.open_descriptor(path)
            try:
                return _fill(buffer, lambda rest: os.readv(descriptor, [rest]))
            finally:
                os.close(descriptor)

        yield read


@contextmanager
def tcp_reader(uid: int) -> Iterator[Reader]:
    """Fork a server on loopback, become `uid`, give what asks it for a file."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        if os.fork() == 0:
            _serve(listener)
    become(uid)
    with socket.create_connection(address) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def read(path: bytes, buffer: memoryview) -> int:
            connection.sendall(path + b"\n")
            head = memoryview(bytearray(_SIZE.size))
            _fill(head, connection.recv_into)
            (size,) = _SIZE.unpack(head)
            return _fill(buffer[:size], connection.recv_into)

        yield read


def _fill(buffer: memoryview, read_into: Callable[[memoryview], int]) -> int:
    """Read until the buffer is full or there is no more; return how much it was."""
    at = 0
    while at < len(buffer) and (size := read_into(buffer[at:])):
        at += size
    return at


def _serve(listener: socket.socket) -> None:
    """Answer one connection until it ends, and end this process."""
    connection, _ = listener.accept()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with connection, connection.makefile("rb") as requests:
        for line in requests:
            with open(line.rstrip(b"\n"), "rb") as file:
                connection.sendall(_SIZE.pack(os.fstat(file.fileno()).st_size))
                connection.sendfile(file)
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
