"""A client of fdbroker with nothing but the standard library; written from docs/protocol.md, to be copied.

    python3 client.py [-s] SOCKET PATH...      (-s: the socket is a SOCK_STREAM one)

Files go to standard output, errors to standard error. Exit status: 0 all given, 1 not all, 2 no answer.
"""

import array
import os
import shutil
import socket
import struct
import sys

HEADER = struct.Struct("<BBHII")  # type, flags, count, id, generation
WELCOME = struct.Struct("<HHIHHIII")  # version, level, features, max_paths, -, max_frame, in_flight, copy_max
RESULT = struct.Struct("<BBHI")  # status, reason, errno, length
LENGTH = struct.Struct("<I")  # of a frame, before it on a stream
MAX_FRAME = 65536


class Connection:
    """A connection to the broker. `descriptors`: those that came, in their order."""

    def __init__(self, path: bytes, *, stream: bool) -> None:
        self.stream = stream
        self.descriptors = array.array("i")
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM if stream else socket.SOCK_SEQPACKET)
        self.socket.connect(path)
        # The hello tells who sends it also where a super-server has accepted, and no broker has begun yet.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self.send(0x01, 0, b"fdbroker" + struct.pack("<HHI", 1, 1, 0))
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 0)
        _, welcome = self.receive(0x81)
        self.max_paths = min(WELCOME.unpack(welcome)[3], WELCOME.unpack(welcome)[6])

    def send(self, kind: int, count: int, body: bytes) -> None:
        frame = HEADER.pack(kind, 0, count, 0, 0) + body
        self.socket.sendall(LENGTH.pack(len(frame)) + frame if self.stream else frame)

    def receive(self, wanted: int) -> tuple[int, bytes]:
        """Return count and body of the next frame, which must be of this type."""
        size = LENGTH.unpack(self._part(LENGTH.size))[0] if self.stream else MAX_FRAME
        frame = self._part(size)
        kind, _, count, _, _ = HEADER.unpack_from(frame)
        if kind == 0xFF:
            # Behind reason and errno there may be which limit it is, of 12 bytes.
            raise ConnectionError(frame[HEADER.size + 4 + 12 * count :].decode())
        if kind != wanted:
            raise ConnectionError(f"a reply of type {kind:#x} instead of {wanted:#x}")
        return count, frame[HEADER.size :]

    def _part(self, size: int) -> bytes:
        """Receive a part of a stream, or a message of up to `size` bytes, and keep its descriptors."""
        data = b""
        while len(data) < size:
            room = socket.CMSG_SPACE(253 * self.descriptors.itemsize)
            part, ancillary, flags, _ = self.socket.recvmsg(size - len(data), room, socket.MSG_CMSG_CLOEXEC)
            for level, kind, content in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    self.descriptors.frombytes(content[: len(content) // 4 * 4])
            if not part or flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise ConnectionError("no answer, or one that does not fit (see ulimit -n)")
            data += part
            if not self.stream:
                break
        return data


def complain(path: bytes, text: str) -> None:
    sys.stderr.buffer.write(b"client.py: " + path + f": {text}\n".encode())


def main() -> int:
    arguments = [os.fsencode(argument) for argument in sys.argv[1:]]
    stream = arguments[:1] == [b"-s"]
    path, *paths = arguments[stream:] or [b""]
    if not paths:
        print(__doc__, file=sys.stderr)
        return 2
    status = 0
    try:
        connection = Connection(path, stream=stream)
        if len(paths) > connection.max_paths:
            raise ValueError(f"more than {connection.max_paths} paths")
        connection.send(0x02, len(paths), b"\0".join(paths))
        # Behind them may be, for what is above a limit, which limit it is.
        results = connection.receive(0x82)[1][: RESULT.size * len(paths)]
    except (OSError, ValueError, struct.error) as error:
        complain(path, str(error))
        return 2
    descriptors = iter(connection.descriptors)
    for name, (given, reason, number, _) in zip(paths, RESULT.iter_unpack(results), strict=True):
        if given != 0:  # refused or broken: a reason and an errno of Linux
            complain(name, f"reason {reason}: {os.strerror(number)}")
            status = 1
            continue
        with open(next(descriptors), "rb") as file:
            shutil.copyfileobj(file, sys.stdout.buffer)
    return status


if __name__ == "__main__":
    sys.exit(main())
