"""What a scan of a descriptor, or a PING, takes at least where processes of Python have a part in it.

    python benchmarks/relay.py DATABASE DIRECTORY [--who]

As root, with an empty directory, in which it makes its socket. One process accepts and hands each
connection over, one reads FILDES and sends the descriptor to a worker, which has ClamAV's library scan it;
the answer goes back the same way. So it is with fdbroker-scand, but here nobody asks who connected, what
the descriptor is, what the library passed over, or whether an answer is one; nobody is confined, nothing
has a limit, and of each there is one. PING is answered by the second process, with no part for the third.
`--who`: the first process asks the kernel who connects, as the broker does, with the broker's own code, and
keeps it until that connection has ended. Prints `ready` when it listens.
"""

from __future__ import annotations

import ctypes
import os
import select
import socket
import struct
import sys
from typing import NamedTuple, NoReturn

from fdbroker.broker.identity import PeerAtConnect, probe_level
from fdbroker.kernel import namespaces, sockets
from fdbroker.scan.engines.libclamav import LibClamAV, LibClamAVOptions

_TMPDIR = 13  # of enum cl_engine_field
_FOUND = 1  # CL_VIRUS
_NUMBER = struct.Struct("=I")
_MOST = 4096
_PING, _PONG, _SESSION = b"zPING\0", b"PONG\0", b"zIDSESSION\0"


def main(arguments: list[str]) -> int:
    """Serve until it is killed; its other processes end with it."""
    database, directory, *who = arguments
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
        if who == ["--who"]:
            _accept_and_ask_who(listener, to_relay)
        else:
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
                sockets.send(to_relay, _NUMBER.pack(0), [accepted.fileno()])


def _accept_and_ask_who(listener: socket.socket, to_relay: socket.socket) -> None:
    """Do so, and ask the kernel who comes; it is known until it is said that he is gone.

    And each time, whether those at the other end are still who they were.
    """
    level = probe_level().level
    relay = PeerAtConnect(to_relay, level)
    clients: dict[int, PeerAtConnect] = {}
    last = 0
    epoll = select.epoll()
    epoll.register(listener, select.EPOLLIN)
    epoll.register(to_relay, select.EPOLLIN)
    while True:
        for ready, _ in epoll.poll():
            if relay.present_objection() is not None:
                return
            if ready == to_relay.fileno():
                gone = to_relay.recv(_MOST)
                if not gone:
                    return
                clients.pop(*_NUMBER.unpack(gone)).close()
                continue
            accepted, _ = listener.accept()
            with accepted:
                last += 1
                clients[last] = PeerAtConnect(accepted, level)
                sockets.send(to_relay, _NUMBER.pack(last), [accepted.fileno()])


class _Client(NamedTuple):
    """Who was handed over, and the number that this was said with."""

    sock: socket.socket
    number: bytes


def _relay(acceptor: socket.socket, worker: socket.socket) -> NoReturn:
    """Give descriptors of clients to the worker, and its answers to them; answer PING, also in a session."""
    epoll = select.epoll()
    epoll.register(acceptor, select.EPOLLIN)
    epoll.register(worker, select.EPOLLIN)
    clients: dict[int, _Client] = {}
    pings: dict[int, int] = {}  # in sessions, by the descriptor

    def end(client: _Client) -> None:
        client.sock.close()
        acceptor.send(client.number)

    def pong(descriptor: int, said: bytes) -> None:
        if said == _PING:
            pings[descriptor] += 1
            clients[descriptor].sock.send(b"%d: " % pings[descriptor] + _PONG)

    while True:
        for ready, _ in epoll.poll():
            if ready == acceptor.fileno():
                came = sockets.receive(acceptor, _MOST)
                if not came.data:
                    os._exit(0)
                descriptor = came.descriptors.take()
                sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, fileno=descriptor)
                client = _Client(sock, came.data)
                asked = sockets.receive(sock, _MOST)
                if asked.data == _PING:
                    sock.send(_PONG)
                    end(client)
                    continue
                clients[descriptor] = client
                if asked.data.startswith(_SESSION):
                    pings[descriptor] = 0
                    epoll.register(descriptor, select.EPOLLIN)
                    pong(descriptor, asked.data.removeprefix(_SESSION))
                    continue
                # It may send the command first, and the descriptor behind it.
                while not len(asked.descriptors):
                    asked = sockets.receive(sock, _MOST)
                with asked.descriptors as files:
                    sockets.send(worker, _NUMBER.pack(descriptor), files.numbers())
            elif ready in pings:
                if said := clients[ready].sock.recv(_MOST):
                    pong(ready, said)
                else:
                    del pings[ready]
                    end(clients.pop(ready))
            else:
                answer = worker.recv(_MOST)
                client = clients.pop(*_NUMBER.unpack_from(answer))
                client.sock.send(b"fd: " + answer[_NUMBER.size :] + b"\0")
                end(client)


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
