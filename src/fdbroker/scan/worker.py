"""What runs in the confined process: take a descriptor, hash the whole file, answer.

Every import and every first use happens before the confinement; `load` is
called for that in the zygote, which forks the workers.

A message has one or more requests, each a number and the size that the file is
expected to have, and as many descriptors for reading. Each file gets an answer of
its own, so that it is known which one a worker was at: the number, a code, a
detail and how many bytes were read.
"""

from __future__ import annotations

import hashlib
import os
import struct
from enum import IntEnum
from typing import TYPE_CHECKING

from fdbroker.kernel import sockets
from fdbroker.scan.hashes import HashList

if TYPE_CHECKING:
    import socket

REQUEST = struct.Struct("<QQ")  # number, size
ANSWER = struct.Struct("<QIIQ")  # number, code, detail, bytes read

MOST_REQUESTS = 16  # in one message; a worker must be allowed as many descriptors, and its own

DESCRIPTORS = 3  # of a worker itself: its channel, and /dev/null twice

_CHUNK = 128 * 1024


class Code(IntEnum):
    """The answers. What the detail means is said beside each."""

    CLEAN = 1  # 0
    INFECTED = 2  # index into the list
    READ_FAILED = 3  # errno
    SHORT_READ = 4  # 0: the file ended before its size
    CHANGED = 5  # 0: it is not what it was at the beginning, or not of the expected size


def load(digests: str) -> HashList:
    """Return the list of these digests, in hexadecimal without anything between; called in the zygote.

    The names are not needed here: an answer is an index. Also uses once what loads lazily.
    """
    hashlib.sha256(b"").hexdigest()
    return HashList((digest, "") for (digest,) in struct.iter_unpack("32s", bytes.fromhex(digests)))


def work(known: HashList, channel: socket.socket, _scratch: bytes | None) -> None:
    """Be a worker of the sandbox."""
    serve(channel, known)


def serve(channel: socket.socket, known: HashList) -> None:
    """Answer requests until the other end closes.

    Raises:
        ValueError: a request that is none; the process should end.

    """
    while True:
        message = sockets.receive(channel, MOST_REQUESTS * REQUEST.size + 1)
        with message.descriptors as owned:
            if not message.data:
                return
            count, rest = divmod(len(message.data), REQUEST.size)
            if rest or not 1 <= count <= MOST_REQUESTS or len(owned) != count:
                raise ValueError("not a request")
            for number, size in REQUEST.iter_unpack(message.data):
                descriptor = owned.take()
                try:
                    answer = ANSWER.pack(number, *examine(descriptor, size, known))
                finally:
                    os.close(descriptor)
                sockets.send(channel, answer)


def examine(descriptor: int, size: int, known: HashList) -> tuple[Code, int, int]:
    """Hash the file behind a descriptor; return code, detail and bytes read.

    By position, so that nobody who shares the offset can move it.
    """
    read = 0
    digest = hashlib.sha256()
    try:
        before = os.fstat(descriptor)
        if before.st_size != size:
            return Code.CHANGED, 0, 0
        # One byte more than there should be, so that growth shows; no further, since it may go on growing.
        while chunk := os.pread(descriptor, min(_CHUNK, size - read + 1), read):
            digest.update(chunk)
            read += len(chunk)
            if read > size:
                return Code.CHANGED, 0, read
        after = os.fstat(descriptor)
    except OSError as error:
        return Code.READ_FAILED, error.errno or 0, read
    if read < size:
        return Code.SHORT_READ, 0, read
    index = known.find(digest.digest())
    if index is not None:
        return Code.INFECTED, index, read
    if _stamp(before) != _stamp(after):
        return Code.CHANGED, 0, read
    return Code.CLEAN, 0, read


def _stamp(facts: os.stat_result) -> tuple[int, int, int]:
    return facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns
