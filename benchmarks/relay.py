"""What a scan of a descriptor takes at least where three processes of Python have a part in it.

    python benchmarks/relay.py DATABASE DIRECTORY

As root, with an empty directory, in which it makes its socket. One process accepts and hands each
connection over, one reads FILDES and sends the descriptor to a worker, which has ClamAV's library scan it;
the answer goes back the same way. So it is with fdbroker-scand, but here nobody asks who connected, what
the descriptor is, what the library passed over, or whether an answer is one; nobody is confined, nothing
has a limit, and of each there is one. Prints `ready` when it listens.
"""

from __future__ import annotations

import ctypes
import os
import select
import socket
import struct
import sys
from typing import NoReturn

from fdbroker.kernel import namespaces, sockets
from fdbroker.scan.engines.libclamav import LibClamAV, LibClamAVOptions

_TMPDIR = 13  # of enum cl_engine_field
_FOUND = 1  # CL_VIRUS
_NUMBER = struct.Struct("=I")
_MOST = 4096


def main(arguments: list[str]) -> int:
    """Serve until it is killed; its other processes end with it."""
    database, directory = arguments
    scratch = os.path.join(os.fsencode(directory), b"scratch")
    os.mkdir(scratch)
    to_relay, from_acceptor = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    to_worker, from_relay = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    engine = LibClamAV(LibClamAVOptions(database=os.fsencode(database)))
    engine.warm()
    if os.fork() == 0:
        to_relay.close()
        from_acceptor.close()
        to_worker.close()
        _work(engine, from_relay, scratch)
    from_relay.close()
    if os.fork() == 0:
        to_relay.close()
        _relay(from_acceptor, to_worker)
    from_acceptor.close()
    to_worker.close()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.join(directory, "socket"))
        listener.listen(100)
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        _accept(listener, to_relay)
    return 0


def _accept(listener: socket.socket, to_relay: socket.socket) -> None:
    """Hand over who comes; what is said of those that are gone is read, as by a broker."""
    epoll = select.epoll()
    epoll.register(listener, select.EPOLLIN)
    epoll.register(to_relay, select.EPOLLIN)
    while True:
        for ready, _ in epoll.poll():
            if ready == to_relay.fileno():
                if not to_relay.recv(_MOST):
                    return
                continue
            accepted, _ = listener.accept()
            with accepted:
                sockets.send(to_relay, b"accepted", [accepted.fileno()])


def _relay(acceptor: socket.socket, worker: socket.socket) -> NoReturn:
    """Give descriptors of clients to the worker, and its answers to them."""
    epoll = select.epoll()
    epoll.register(acceptor, select.EPOLLIN)
    epoll.register(worker, select.EPOLLIN)
    clients: dict[int, socket.socket] = {}
    asked_in_session: dict[int, int] = {}
    while True:
        for ready, _ in epoll.poll():
            if ready == acceptor.fileno():
                came = sockets.receive(acceptor, _MOST)
                if not came.data:
                    os._exit(0)
                number = came.descriptors.take()
                client = clients[number] = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, fileno=number)
                asked = sockets.receive(client, _MOST)
                if asked.data == b"zPING\0":
                    client.send(b"PONG\0")
                    clients.pop(number).close()
                    acceptor.send(b"released")
                    continue
                if asked.data.startswith(b"zIDSESSION\0"):
                    asked_in_session[number] = 0
                    epoll.register(number, select.EPOLLIN)
                    _pong(client, asked.data.removeprefix(b"zIDSESSION\0"), number, asked_in_session)
                    continue
                # It may send the command first, and the descriptor behind it.
                while not len(asked.descriptors):
                    asked = sockets.receive(client, _MOST)
                with asked.descriptors as files:
                    sockets.send(worker, _NUMBER.pack(number), files.numbers())
            elif ready in asked_in_session:
                said = clients[ready].recv(_MOST)
                _pong(clients[ready], said, ready, asked_in_session)
                if not said:
                    del asked_in_session[ready]
                    clients.pop(ready).close()
                    acceptor.send(b"released")
            else:
                answer = worker.recv(_MOST)
                with clients.pop(*_NUMBER.unpack_from(answer)) as client:
                    client.send(b"fd: " + answer[_NUMBER.size :] + b"\0")
                acceptor.send(b"released")


def _pong(client: socket.socket, said: bytes, number: int, asked: dict[int, int]) -> None:
    """Answer what may be a PING in a session."""
    if said == b"zPING\0":
        asked[number] += 1
        client.send(b"%d: PONG\0" % asked[number])


def _work(engine: LibClamAV, relay: socket.socket, scratch: bytes) -> NoReturn:
    """Scan what comes. `scratch` is an empty directory."""
    namespaces.unshare(namespaces.CLONE_NEWNS)
    namespaces.mount_setattr(b"/", attributes=0, propagation=namespaces.MS_PRIVATE, recursive=True)
    namespaces.mount_tmpfs(scratch, b"size=1g")
    library, pointer = engine._library, engine._engine  # noqa: SLF001 - the bare library
    library.cl_engine_set_str(pointer, _TMPDIR, scratch)
    scan, options = engine._scan_descriptor, engine._options_pointer  # noqa: SLF001
    found = ctypes.c_char_p()
    name = ctypes.byref(found)
    while True:
        came = sockets.receive(relay, _MOST)
        if not came.data:
            os._exit(0)
        with came.descriptors as files:
            status = scan(files.numbers()[0], None, name, None, pointer, options, None)
        said = (found.value or b"") + b" FOUND" if status == _FOUND else b"OK"
        relay.send(came.data + said)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
