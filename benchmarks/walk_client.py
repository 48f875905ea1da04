"""A worker without privileges: walks, hashes every file that it is handed, and writes what sha256sum would.

    python -I -S benchmarks/walk_client.py SOURCES SOCKET START UID

SOURCES is where the package is. The lines go to standard output, which is a file. Ends with 1 if the
end record does not tell of as many descriptors as came, or of anything left out.
"""

from __future__ import annotations

import array
import hashlib
import os
import socket
import sys
from binascii import hexlify

TYPE_CHECKING = False  # as typing has it, which would be a fifth of the start
if TYPE_CHECKING:
    from collections.abc import Callable


def main(arguments: list[str]) -> int:
    """Walk and hash; return the exit status."""
    sources, name, start, uid = arguments
    sys.path.insert(0, sources)
    # Before it becomes somebody for whom the checkout may be out of reach.
    from fdbroker.kernel import descriptors  # noqa: F401, PLC0415 - found only now
    from fdbroker.wire import client, messages  # noqa: F401, PLC0415

    os.setgroups([])
    os.setresgid(int(uid), int(uid), int(uid))
    os.setresuid(int(uid), int(uid), int(uid))
    with (
        open(1, "wb", closefd=False) as lines,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as broker,
    ):
        broker.connect(name)
        return _hash_all(broker, os.fsencode(start), lines.write)


def _hash_all(broker: socket.socket, start: bytes, write: Callable[[bytes], object]) -> int:
    from fdbroker.kernel.descriptors import close_all  # noqa: PLC0415
    from fdbroker.wire.client import WalkReply, decode_reply, encode_hello, encode_walk  # noqa: PLC0415
    from fdbroker.wire.format import MAX_FRAME, MAX_PATHS, Incomplete  # noqa: PLC0415
    from fdbroker.wire.messages import WalkFilter  # noqa: PLC0415

    room_of_descriptors = socket.CMSG_SPACE(MAX_PATHS * 4)
    broker.send(encode_hello(1))
    broker.recv(MAX_FRAME)
    broker.send(encode_walk(2, start, WalkFilter(), credit=0xFFFFFFFF))
    room = [bytearray(1 << 16)]
    content = memoryview(room[0])
    came = 0
    while True:
        frame, ancillary, flags, _ = broker.recvmsg(MAX_FRAME, room_of_descriptors, socket.MSG_CMSG_CLOEXEC)
        reply = decode_reply(frame)
        if not isinstance(reply, WalkReply) or flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            sys.stderr.write(f"{reply}, flags {flags}\n")
            return 1
        descriptors = array.array("i")
        for _, _, data in ancillary:
            descriptors.frombytes(data)
        for entry, descriptor in zip(reply.entries, descriptors, strict=True):
            size = os.readv(descriptor, room)
            digest = hashlib.sha256(content[:size])
            while size == len(content):
                size = os.readv(descriptor, room)
                digest.update(content[:size])
            write(b"%s  %s/%s\n" % (hexlify(digest.digest()), start, entry.path))
        came += len(descriptors)
        close_all(descriptors.tolist())
        if reply.end is not None:
            right = reply.end.descriptors == came and reply.end.incomplete == Incomplete(0)
            if not right:
                sys.stderr.write(f"{came} descriptors came, and the end is {reply}\n")
            return int(not right)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
