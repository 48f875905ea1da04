"""A broker that serves a dictionary: the real protocol and real descriptors, no policy and no privilege."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import stat
import threading
from typing import TYPE_CHECKING, NamedTuple

from fdbroker.client import Client, connect
from fdbroker.kernel import sockets
from fdbroker.kernel.descriptors import Descriptors
from fdbroker.policy.paths import problem_with_path
from fdbroker.wire.format import (
    ERRNO_OF,
    MAX_FRAME,
    MAX_PATHS,
    MAX_REPLY,
    VERSION,
    Kind,
    Reason,
    Status,
)
from fdbroker.wire.messages import (
    GIVEN,
    ErrorReply,
    FileStat,
    Hello,
    ListEntry,
    ListRequest,
    MalformedError,
    OpenRequest,
    StatRequest,
    Welcome,
    broken,
    refused,
)
from fdbroker.wire.replies import (
    encode_error,
    encode_list_entry,
    encode_list_reply,
    encode_open_reply,
    encode_stat_reply,
    encode_status_reply,
    encode_welcome,
)
from fdbroker.wire.requests import decode_request

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType
    from typing import Self

    from fdbroker.wire.messages import Request, Result

    StrOrBytesPath = str | bytes | os.PathLike[str] | os.PathLike[bytes]
    Content = bytes | Reason | OSError

GENERATION = 1
_DEVICE = 1
_IN_FLIGHT = 256
_FILE, _DIRECTORY = 8, 4  # d_type
_REASON_OF = {
    errno.EACCES: Reason.DENIED,
    errno.EPERM: Reason.DENIED,
    errno.EINVAL: Reason.PATH_INVALID,
    errno.ENAMETOOLONG: Reason.PATH_INVALID,
    errno.ENOENT: Reason.NOT_FOUND,
    errno.ENOTDIR: Reason.NOT_DIRECTORY,
    errno.EISDIR: Reason.NOT_REGULAR,
    errno.ELOOP: Reason.SYMLINK,
    errno.EXDEV: Reason.CROSSES_MOUNT,
    errno.EROFS: Reason.MOUNT_NOT_READ_ONLY,
    errno.EOPNOTSUPP: Reason.FILESYSTEM,
    errno.EAGAIN: Reason.BUSY,
}


class _Object(NamedTuple):
    """What a path leads to: a result, and with a given one the content of a file or a directory's names."""

    result: Result
    content: bytes = b""
    names: tuple[bytes, ...] | None = None


class FakeBroker:
    """Serves `files` to clients in this process (or another, with `socket_path`), until it is closed.

        with FakeBroker({"/data/a": b"hello", "/data/b": Reason.DENIED}) as fake, fake.connect() as client:
            with client.open("/data/a") as file:
                assert file.read() == b"hello"

    A value is the content of a file; or a `Reason` or an OSError, with which
    the path is refused (an errno without a reason of its own becomes a failure
    of the broker). The directories of all paths exist as well. Other paths
    are refused with `missing`. Each open gives a descriptor of its own, read-only,
    of a memory file; so real programs can be run on it.

    `files` may be changed at any time, by `fake["/path"] = ...` and `del`. `requests`
    has every request since the beginning, as values of `fdbroker.wire.messages`.

    Args:
        files: path -> content, `Reason` or OSError.
        socket_path: listen there, so that clients can `fdbroker.connect(socket_path)`, and connect anew.
        missing: why other paths are refused.
        max_paths: paths that one request may hold, to see that a program's batches are split.
        page: most entries of a directory in one reply.

    """

    def __init__(
        self,
        files: Mapping[str, Content] | Mapping[bytes, Content] | None = None,
        *,
        socket_path: StrOrBytesPath | None = None,
        missing: Reason = Reason.NOT_FOUND,
        max_paths: int = MAX_PATHS,
        page: int = 100,
    ) -> None:
        self.requests: list[Request] = []
        self._files: dict[bytes, Content] = {}
        self._missing = missing
        self._max_paths = max_paths
        self._page = page
        self._lock = threading.Lock()
        self._closed = False
        self._served: dict[socket.socket, threading.Thread] = {}
        self._listener: socket.socket | None = None
        self._acceptor: threading.Thread | None = None
        self._socket_path = None if socket_path is None else os.fsencode(socket_path)
        for path, content in (files or {}).items():
            self[path] = content
        if self._socket_path is not None:
            self._listen(self._socket_path)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    def __setitem__(self, path: StrOrBytesPath, content: Content) -> None:
        """Serve `content` as `path` from now on.

        Raises:
            ValueError: no client could ask for this path.
            TypeError: the content is neither bytes nor `Reason` nor OSError.

        """
        name = os.fsencode(path)
        problem = problem_with_path(name)
        if problem is not None:
            raise ValueError(f"a broker can't be asked for {path!r}: {problem}")
        if not isinstance(content, bytes | Reason | OSError):
            raise TypeError(f"{path!r} is served with bytes, a Reason or an OSError, not {content!r}")
        with self._lock:
            self._files[name] = content

    def __delitem__(self, path: StrOrBytesPath) -> None:
        """Serve it no more. Raises KeyError if it was not served."""
        with self._lock:
            del self._files[os.fsencode(path)]

    def connect(self, *, timeout: float | None = 30.0) -> Client:
        """Return a client of this broker; the caller closes it.

        Through the socket where there is one, else through a socketpair: that client can't connect anew.
        """
        if self._socket_path is not None:
            return connect(self._socket_path, timeout=timeout)
        return Client.from_socket(self.connect_socket(), timeout=timeout)

    def connect_socket(self) -> socket.socket:
        """Return one end of a socketpair whose other end is served; the caller owns it.

        Raises:
            ValueError: this broker is closed.

        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if not self._serve(ours):
            theirs.close()
            raise ValueError("this broker is closed")
        return theirs

    def disconnect(self) -> None:
        """Close all connections, as a restart of the broker does; it goes on listening."""
        with self._lock:
            served = dict(self._served)
        for sock, thread in served.items():
            _wake(sock)
            thread.join()

    def close(self) -> None:
        """Stop serving; close and remove all that was made. Waits for its threads. May be called again."""
        with self._lock:
            self._closed = True
        if self._listener is not None and self._acceptor is not None:
            _wake(self._listener)
            self._acceptor.join()
            self._listener = None
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._socket_path or b"")
        self.disconnect()

    # Connections

    def _listen(self, path: bytes) -> None:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            listener.bind(path)
            listener.listen()
        except BaseException:
            listener.close()
            raise
        self._listener = listener
        self._acceptor = threading.Thread(target=self._accept, args=(listener,), daemon=True)
        self._acceptor.start()

    def _accept(self, listener: socket.socket) -> None:
        # accept(2) on a listener that was shut down is EINVAL.
        with listener, contextlib.suppress(OSError):
            while True:
                self._serve(listener.accept()[0])

    def _serve(self, sock: socket.socket) -> bool:
        with self._lock:
            if self._closed:
                sock.close()
                return False
            thread = threading.Thread(target=self._talk, args=(sock,), daemon=True)
            self._served[sock] = thread
            thread.start()
        return True

    def _talk(self, sock: socket.socket) -> None:
        greeted = False
        try:
            # The client may go at any moment, or never receive until `disconnect`.
            with contextlib.suppress(OSError):
                while True:
                    message = sockets.receive(sock, MAX_FRAME + 1)
                    with message.descriptors as unwanted:
                        if not message.data:
                            return
                        try:
                            request = decode_request(message.data)
                            if unwanted or isinstance(request, Hello) is greeted:
                                raise MalformedError("descriptors, or not one hello, first", request.id)
                        except MalformedError as error:
                            _refuse(sock, error.request_id, Kind.MALFORMED, Reason.MALFORMED, str(error))
                            return
                    greeted = True
                    with self._lock:
                        self.requests.append(request)
                    self._answer(sock, request)
        finally:
            # In this order: who finds nothing served finds everything closed.
            sock.close()
            with self._lock:
                del self._served[sock]

    def _answer(self, sock: socket.socket, request: Request) -> None:
        if isinstance(request, Hello):
            self._greet(sock, request)
        elif isinstance(request, OpenRequest):
            self._open(sock, request)
        elif isinstance(request, StatRequest):
            found = [self._find(path) for path in request.paths]
            results = [
                (one.result, _describe(path, one) if one.result is GIVEN else None)
                for path, one in zip(request.paths, found, strict=True)
            ]
            sockets.send(sock, encode_stat_reply(request.id, GENERATION, results))
        elif isinstance(request, ListRequest):
            self._list(sock, request)
        else:
            document = {"generation": GENERATION, "identity_level": 0, "fake": True}
            sockets.send(sock, encode_status_reply(request.id, GENERATION, json.dumps(document).encode()))

    def _greet(self, sock: socket.socket, request: Hello) -> None:
        if not request.lowest <= VERSION <= request.highest:
            _refuse(sock, request.id, Kind.REFUSED, Reason.VERSION, f"only version {VERSION} is spoken here")
            return
        welcome = Welcome(
            request.id,
            GENERATION,
            version=VERSION,
            identity_level=0,
            features=0,
            max_paths=self._max_paths,
            max_frame=MAX_FRAME,
            in_flight=_IN_FLIGHT,
            copy_max=0,
        )
        sockets.send(sock, encode_welcome(welcome))

    def _open(self, sock: socket.socket, request: OpenRequest) -> None:
        if len(request.paths) > self._max_paths:
            text = f"a request has at most {self._max_paths} paths here"
            _refuse(sock, request.id, Kind.REFUSED, Reason.LIMIT, text)
            return
        results = []
        with Descriptors() as descriptors:
            for path in request.paths:
                found = self._find(path)
                result = found.result
                if found.names is not None:
                    result = refused(Reason.NOT_REGULAR, errno.EISDIR)
                elif result.status is Status.GIVEN:
                    descriptors.add(_memory_file(path, found.content))
                results.append(result)
            reply = encode_open_reply(request.id, GENERATION, results)
            sockets.send(sock, reply, descriptors.numbers())

    def _list(self, sock: socket.socket, request: ListRequest) -> None:
        found = self._find(request.path)
        result, names = found.result, found.names
        if result is GIVEN and names is None:
            result = refused(Reason.NOT_DIRECTORY)
        names = names or ()
        entries: list[bytes] = []
        size, at = 0, request.cookie
        most = min(request.most or self._page, self._page)
        while at < len(names) and len(entries) < most:
            path = request.path.rstrip(b"/") + b"/" + names[at]
            one = self._find(path)
            if one.result is GIVEN:
                kind = _FILE if one.names is None else _DIRECTORY
                entry = encode_list_entry(ListEntry(names[at], kind, _describe(path, one)))
                size += len(entry)
                if size > MAX_REPLY - 64:
                    break
                entries.append(entry)
            at += 1
        last = at >= len(names)
        sockets.send(sock, encode_list_reply(request.id, GENERATION, result, entries, at, last=last))

    def _find(self, path: bytes) -> _Object:
        if problem_with_path(path) is not None:
            return _Object(refused(Reason.PATH_INVALID))
        prefix = path.rstrip(b"/") + b"/"
        with self._lock:
            content = self._files.get(path)
            names = {
                other[len(prefix) :].split(b"/")[0]
                for other in self._files
                if content is None and other.startswith(prefix)
            }
        if isinstance(content, bytes):
            return _Object(GIVEN, content)
        if isinstance(content, Reason):
            return _Object(refused(content))
        if content is not None:
            number = content.errno or errno.EIO
            reason = _REASON_OF.get(number)
            return _Object(broken(number) if reason is None else refused(reason, number))
        if names:
            return _Object(GIVEN, names=tuple(sorted(names)))
        return _Object(refused(self._missing))


def _describe(path: bytes, found: _Object) -> FileStat:
    mode = stat.S_IFREG | 0o444 if found.names is None else stat.S_IFDIR | 0o555
    # Stable, and different for different paths as far as 63 bits go.
    inode = int.from_bytes(path, "big") % (2**63 - 25) + 1
    return FileStat(_DEVICE, inode, mode, 1, 0, 0, len(found.content), 0, 0)


def _memory_file(path: bytes, content: bytes) -> int:
    """Return a read-only descriptor of a memory file that nobody can change; the caller owns it."""
    name = os.fsdecode(path.rsplit(b"/", 1)[-1])[:64]
    writable = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with open(writable, "wb", closefd=False) as file:
            file.write(content)
        fcntl.fcntl(
            writable,
            fcntl.F_ADD_SEALS,
            fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL,
        )
        return os.open(f"/proc/self/fd/{writable}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(writable)


def _refuse(sock: socket.socket, request_id: int, kind: Kind, reason: Reason, text: str) -> None:
    error = ErrorReply(request_id, GENERATION, kind, reason, ERRNO_OF[reason], text)
    sockets.send(sock, encode_error(error))


def _wake(sock: socket.socket) -> None:
    """Make calls that wait on a socket return."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
