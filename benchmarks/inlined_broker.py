"""The least that a broker in Python may do for one path: in one function, for one client, by one rule.

    python -I -S benchmarks/inlined_broker.py SOURCES SOCKET ROOT UID

It is no broker: it shows what is left of a bar when all is gone but the system calls, who asks, a look at
the rules and the reply: no tables, limits, counts, audit, streams, Landlock or seccomp. The system calls
are those of fdbroker, in its order. Writes `ready` when it accepts connections.
"""

# ruff: noqa: SLF001, PLC0415 - the parts of the functions that are written out; modules that are found only then

from __future__ import annotations

import array
import fcntl
import os
import select
import socket
import sys


def main(arguments: list[str]) -> None:
    """Serve the clients of one socket, one after the other, until the process is ended."""
    sources, name, root_path, uid = arguments
    sys.path.insert(0, sources)
    from fdbroker.kernel import files, peers, sockets
    from fdbroker.wire.client import encode_hello
    from fdbroker.wire.format import MAX_FRAME, MAX_PATHS, VERSION
    from fdbroker.wire.messages import Welcome
    from fdbroker.wire.replies import encode_welcome

    root = os.open(root_path, os.O_PATH | os.O_DIRECTORY)
    skip = len(os.fsencode(root_path)) + 1
    proc_self_fd = files.open_proc_self_fd()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(name)
        os.chmod(name, 0o666)  # noqa: S103 - as that of the others
        listener.listen()
        sockets.ask_for_credentials(listener)
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        while True:
            client, _ = listener.accept()
            with client:
                client.settimeout(0)
                credentials = peers.peer_credentials(client)
                pidfd = peers.peer_pidfd(client)
                assert pidfd is not None
                assert peers.read_ucred(credentials).uid == int(uid)
                before = peers.pidfd_info_raw(pidfd)
                with select.epoll() as epoll:
                    epoll.register(client, select.EPOLLIN)
                    epoll.poll()
                    if client.recv(MAX_FRAME)[0] == encode_hello()[0]:
                        welcome = Welcome(1, 1, VERSION, 2, 0, MAX_PATHS, MAX_FRAME, 512, 0)
                        client.send(encode_welcome(welcome))
                    _serve(client, epoll, credentials, pidfd, before, root, skip, proc_self_fd)
                os.close(pidfd)


def _serve(  # noqa: PLR0913, PLR0917 - once for each connection
    client: socket.socket,
    epoll: select.epoll,
    credentials: bytes,
    pidfd: int,
    before: bytes,
    root: int,
    skip: int,
    proc_self_fd: int,
) -> None:
    """Answer requests for one path each, until the client is gone."""
    from fdbroker.kernel import files, peers
    from fdbroker.wire.format import HEADER, MAX_FRAME
    from fdbroker.wire.replies import encode_open_given

    reply = encode_open_given(0, 1, 1)[HEADER.size :]
    kind_of_reply = encode_open_given(0, 1, 1)[0]
    openat2, number, within, size = files._openat2_at_once, files._OPENAT2, files._WITHIN, files._SIZE
    statx, no_path, empty_path = files._statx_at_once, files._NO_PATH, files._AT_EMPTY_PATH
    kind, room, known = files._STATX_TYPE, files._STATX_ROOM, files._statx_room
    read_at_once, unpack, pack = files._READ_AT_ONCE, HEADER.unpack_from, HEADER.pack
    wanted, get_info, ioctl = peers._PIDFD_REQUEST, peers.PIDFD_GET_INFO, fcntl.ioctl
    space, cloexec = socket.CMSG_SPACE(12), int(socket.MSG_CMSG_CLOEXEC)
    at_once = int(socket.MSG_NOSIGNAL) | int(socket.MSG_DONTWAIT)
    level, rights = socket.SOL_SOCKET, socket.SCM_RIGHTS
    opens, closes, set_blocking, numbers = os.open, os.close, os.set_blocking, array.array
    decided: dict[bytes, bool] = {}
    while True:
        epoll.poll(-1, 2)
        try:
            data, ancillary, flags, _ = client.recvmsg(MAX_FRAME + 1, space, cloexec)
        except OSError:
            return
        if not data or flags & ~cloexec or ancillary[0][2] != credentials:
            return
        now = bytearray(wanted)
        ioctl(pidfd, get_info, now)
        if now != before:
            return
        _, _, count, request_id, _ = unpack(data)
        paths = data[HEADER.size :].split(b"\0")
        if len(paths) != count or count != 1:
            return
        path = paths[0]
        directory, _, name = path.rpartition(b"/")
        allowed = decided.get(directory)
        if allowed is None:
            allowed = decided[directory] = b".." not in directory.split(b"/")
        if not allowed or name in {b"", b".", b".."} or 0 in path:
            return
        held = openat2(number, root, path[skip:], within, size)
        if held < 0 or statx(held, no_path, empty_path, kind, room) != 0 or known.mode >> 12 != 8:
            return
        opened = opens(str(held), read_at_once, dir_fd=proc_self_fd)
        closes(held)
        set_blocking(opened, True)
        frame = pack(kind_of_reply, 0, 1, request_id, 1) + reply
        client.sendmsg([frame], [(level, rights, numbers("i", (opened,)))], at_once)
        closes(opened)


if __name__ == "__main__":
    main(sys.argv[1:])
