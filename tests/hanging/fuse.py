"""A FUSE file system of a few files that answers, or never does: the kernel's own protocol, without libfuse.

It is served by a thread of the test. What it never answers hangs until the
connection is aborted, which happens at the end of the block in any case: so no
test leaves a process behind that can't go on.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import struct
import threading
from enum import IntEnum
from typing import TYPE_CHECKING

from tests.descriptors.mounting import mount, unmount

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path


class Operation(IntEnum):
    """Of linux/fuse.h, as far as they are answered."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    OPEN = 14
    READ = 15
    STATFS = 17
    RELEASE = 18
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    INTERRUPT = 36
    DESTROY = 38
    BATCH_FORGET = 42


_REQUEST = struct.Struct("=IIQQIIII")  # struct fuse_in_header
_ANSWER = struct.Struct("=IiQ")  # struct fuse_out_header
_ATTRIBUTES = struct.Struct("=6Q10I")  # struct fuse_attr
_ROOT = 1
_LONGEST = 1 << 17
_SILENT = {Operation.FORGET, Operation.BATCH_FORGET, Operation.INTERRUPT}
_MS_NOSUID_NODEV = 2 | 4
_PARALLEL = 1 << 18  # FUSE_PARALLEL_DIROPS: a look-up that hangs does not hold up others of its directory


class FuseServer:
    """Serves `files` in one directory; what is in `never` is not answered.

    `never` holds (operation, name): the name is that of the file, "" that of the root.
    """

    def __init__(self, files: Mapping[str, bytes], device: int, owner: int = 0) -> None:
        self.never: set[tuple[Operation, str]] = set()
        self._names = ["", *files]  # number of a node - 1
        self._contents = [b"", *files.values()]
        self._device = device
        self._owner = owner
        self._asked = threading.Condition()
        self._log: list[tuple[Operation, str]] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def wait_until_asked(self, operation: Operation, name: str, times: int = 1, seconds: float = 30) -> None:
        """Return when the kernel has asked so often for this; whether it is answered is another question."""
        with self._asked:
            asked = self._asked.wait_for(lambda: self._log.count((operation, name)) >= times, seconds)
        assert asked, (operation, name, self._log)

    def asked(self, operation: Operation, name: str) -> int:
        """Return how often the kernel asked for this."""
        with self._asked:
            return self._log.count((operation, name))

    def join(self) -> None:
        """Wait until the kernel has ended the connection."""
        self._thread.join()

    def _serve(self) -> None:
        while True:
            try:
                request = os.read(self._device, _LONGEST)
            except OSError as error:
                if error.errno in {errno.EINTR, errno.EAGAIN, errno.ENOENT}:
                    continue
                return  # ENODEV: unmounted or aborted
            _, number, unique, node, *_ = _REQUEST.unpack_from(request)
            try:
                operation = Operation(number)
            except ValueError:
                self._reply(unique, errno.ENOSYS)
                continue
            self._answer(operation, unique, node, request[_REQUEST.size :])

    def _answer(self, operation: Operation, unique: int, node: int, body: bytes) -> None:
        name = body.split(b"\0", 1)[0].decode() if operation is Operation.LOOKUP else self._name_of(node)
        # Decided before it is told: whoever waits for it to be asked may then change what is answered.
        never = (operation, name) in self.never
        with self._asked:
            self._log.append((operation, name))
            self._asked.notify_all()
        if never or operation in _SILENT:
            return
        if operation is Operation.LOOKUP and name not in self._names:
            self._reply(unique, errno.ENOENT)
            return
        self._reply(unique, 0, self._content_of(operation, name, node, body))

    def _name_of(self, node: int) -> str:
        return self._names[node - 1] if 0 < node <= len(self._names) else ""

    def _content_of(self, operation: Operation, name: str, node: int, body: bytes) -> bytes:
        if operation is Operation.INIT:
            return struct.pack("=IIIIHHIIHHI28x", 7, 31, 65536, _PARALLEL, 12, 9, 65536, 1, 0, 0, 0)
        if operation is Operation.LOOKUP:
            number = self._names.index(name) + 1
            return struct.pack("=QQQQII", number, 0, 0, 0, 0, 0) + self._attributes(number)
        if operation is Operation.GETATTR:
            return struct.pack("=QII", 0, 0, 0) + self._attributes(node)
        if operation in {Operation.OPEN, Operation.OPENDIR}:
            return struct.pack("=QII", 0, 0, 0)
        if operation is Operation.STATFS:
            return struct.pack("=5Q10I", 0, 0, 0, 0, 0, 4096, 255, 4096, *([0] * 7))
        if operation is Operation.READ:
            _, offset, size = struct.unpack_from("=QQI", body)
            return self._contents[node - 1][offset : offset + size]
        if operation is Operation.READDIR:
            _, offset = struct.unpack_from("=QQ", body)
            return b"".join(
                struct.pack(f"=QQII{-(-len(entry) // 8) * 8}s", i + 2, i + 1, len(entry), 8, entry.encode())
                for i, entry in enumerate(self._names[1:])
                if i >= offset
            )
        return b""

    def _attributes(self, node: int) -> bytes:
        size = len(self._contents[node - 1])
        mode = stat.S_IFDIR | 0o755 if node == _ROOT else stat.S_IFREG | 0o600
        owner = self._owner
        return _ATTRIBUTES.pack(node, size, 1, 0, 0, 0, 0, 0, 0, mode, 1, owner, owner, 0, 4096, 0)

    def _reply(self, unique: int, number: int, body: bytes = b"") -> None:
        with contextlib.suppress(OSError):  # ENOENT: whoever asked was killed meanwhile
            os.write(self._device, _ANSWER.pack(_ANSWER.size + len(body), -number, unique) + body)


@contextlib.contextmanager
def fuse_mounted(target: Path, files: Mapping[str, bytes], owner: int = 0) -> Iterator[FuseServer]:
    """Mount a FUSE file system at `target` for all users; abort its connection at the end."""
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    server = None
    try:
        options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions"
        mount(b"fdbroker-test", bytes(target), b"fuse", _MS_NOSUID_NODEV, options.encode())
        try:
            server = FuseServer(files, device, owner)
            yield server
        finally:
            abort(target)
            with contextlib.suppress(OSError):  # EINVAL: it is unmounted, since it was not in use
                unmount(bytes(target))
    finally:
        # Whatever becomes of the above: without its device the connection is over.
        if server is not None:
            server.join()
        os.close(device)


def abort(target: Path) -> None:
    """End the connection to the server, so that everything fails that waits for an answer.

    umount2(MNT_FORCE) does, also where the mount is in use and stays. A signal would not: what the server
    has read and not answered is waited for by a process that SIGKILL does not end.
    """
    with contextlib.suppress(OSError):  # EBUSY: it is in use
        unmount(bytes(target), force=True)
