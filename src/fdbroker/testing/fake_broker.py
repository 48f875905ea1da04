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
from fdbroker.policy.globs import compile_glob
from fdbroker.policy.paths import problem_with_path
from fdbroker.wire.format import (
    ERRNO_OF,
    HEADER,
    MAX_COPY,
    MAX_FRAME,
    MAX_PATHS,
    MAX_REPLY,
    RESULT,
    STAT,
    VERSION,
    WALK_END,
    WALK_ENTRY,
    Incomplete,
    Kind,
    Reason,
    Status,
    WalkKind,
)
from fdbroker.wire.messages import (
    GIVEN,
    AcceptedClient,
    CancelRequest,
    ErrorReply,
    FileStat,
    Hello,
    LimitReached,
    ListEntry,
    ListRequest,
    MalformedError,
    MoreRequest,
    OpenRequest,
    ReleaseRequest,
    ServeRequest,
    StatRequest,
    StatusRequest,
    WalkEnd,
    WalkEntry,
    WalkRequest,
    Welcome,
    broken,
    copied,
    limited,
    refused,
)
from fdbroker.wire.replies import (
    encode_accepted,
    encode_error,
    encode_list_entry,
    encode_list_reply,
    encode_open_reply,
    encode_serve_reply,
    encode_stat_reply,
    encode_status_reply,
    encode_walk_entry,
    encode_walk_reply,
    encode_welcome,
)
from fdbroker.wire.requests import decode_request
from fdbroker.wire.stream import FrameBuffer, framed

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from types import TracebackType
    from typing import Self

    from fdbroker.wire.messages import Request, Result

    StrOrBytesPath = str | bytes | os.PathLike[str] | os.PathLike[bytes]
    Content = bytes | Reason | LimitReached | OSError

GENERATION = 1
_DEVICE = 1
_IN_FLIGHT = 256
_FILE, _DIRECTORY = 8, 4  # d_type
_MOST_WALKS = 4  # at a time on one connection
_ROOM_OF_WALK = MAX_REPLY - HEADER.size - RESULT.size - WALK_END.size
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
    limit: LimitReached | None = None


class _Connection:
    """One client's connection: framing, walks, whom it serves and acts for. Used by its thread alone.

    But for `send`, which others may call to hand a client over.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.walks: dict[int, _Walk] = {}
        # Listener -> id of the request to serve; numbers of clients that were handed over.
        self.services: dict[str, int] = {}
        self.clients: set[int] = set()
        self._lock = threading.Lock()
        self._frames = FrameBuffer() if sock.type == socket.SOCK_STREAM else None

    def receive(self) -> bytes:
        """Return the next frame, empty at the end.

        Raises:
            MalformedError: descriptors came, or what is no frame.

        """
        while True:
            if self._frames is not None:
                frame = self._frames.next_frame()
                if frame is not None:
                    return frame
            message = sockets.receive(self.sock, MAX_FRAME + 1)
            with message.descriptors as unwanted:
                if unwanted:
                    raise MalformedError("descriptors are not taken here")
            if self._frames is None or not message.data:
                return message.data
            self._frames.add(message.data)

    def send(self, frame: bytes, descriptors: Sequence[int] = ()) -> None:
        """Send a frame, whole, with copies of `descriptors`."""
        with self._lock:
            if self._frames is None:
                sockets.send(self.sock, frame, descriptors)
                return
            data = memoryview(framed(frame))
            first = data[:MAX_FRAME]
            sockets.send(self.sock, first.tobytes(), descriptors)
            if len(first) < len(data):
                self.sock.sendall(data[len(first) :])

    def refuse(
        self, request_id: int, kind: Kind, reason: Reason, text: str, limit: LimitReached | None = None
    ) -> None:
        """Send an error."""
        error = ErrorReply(request_id, GENERATION, kind, reason, ERRNO_OF[reason], text, limit)
        self.send(encode_error(error))


class _Walk:
    """A walk under way: what is still to be named, and how many frames may be sent."""

    def __init__(self, request: WalkRequest, found: Iterator[tuple[bytes, _Object]]) -> None:
        self.request = request
        self.found = found
        self.credit = request.credit
        self.incomplete = Incomplete(0)
        self.directories = 1
        self.entries = 0
        self.descriptors = 0
        # What had no room in the last frame.
        self.left_over: tuple[bytes, _Object] | None = None

    def end(self) -> WalkEnd:
        return WalkEnd(self.entries, self.descriptors, self.directories, self.incomplete)


class FakeBroker:
    """Serves `files` to clients in this process (or another, with `socket_path`), until it is closed.

        with FakeBroker({"/data/a": b"hello", "/data/b": Reason.DENIED}) as fake, fake.connect() as client:
            with client.open("/data/a") as file:
                assert file.read() == b"hello"

    A value is the content of a file; or a `Reason`, a `LimitReached` or an OSError,
    with which the path is refused (an errno without a reason of its own becomes a
    failure of the broker). The directories of all paths exist as well. Other paths
    are refused with `missing`. Each open gives a descriptor of its own, read-only,
    of a memory file; so real programs can be run on it. Whoever will do with
    a copy of the contents gets one, up to `copy_max` bytes. Walks name what is
    not refused, in the order of the names. `limit_requests` refuses whole requests.

    Any listener may be served; `hand_over` makes a client of one.

    `files` may be changed at any time, by `fake["/path"] = ...` and `del`. `requests`
    has every request since the beginning, as values of `fdbroker.wire.messages`.

    Args:
        files: path -> content, `Reason`, `LimitReached` or OSError.
        socket_path: listen there, so that clients can `fdbroker.connect(socket_path)`, and connect anew.
        missing: why other paths are refused.
        max_paths: paths that one request may hold, to see that a program's batches are split.
        page: most entries of a directory in one reply.
        copy_max: bytes of the largest file whose contents come in the reply, at most 16,384; 0: none do.
        only_copies: refuse what can't come as a copy, as a policy may say.
        kind: SOCK_SEQPACKET, or SOCK_STREAM, of its socket and of socketpairs.

    """

    def __init__(  # noqa: PLR0913 - what a test may want to be otherwise
        self,
        files: Mapping[str, Content] | Mapping[bytes, Content] | None = None,
        *,
        socket_path: StrOrBytesPath | None = None,
        missing: Reason = Reason.NOT_FOUND,
        max_paths: int = MAX_PATHS,
        page: int = 100,
        copy_max: int = MAX_COPY,
        only_copies: bool = False,
        kind: socket.SocketKind = socket.SOCK_SEQPACKET,
    ) -> None:
        self.requests: list[Request] = []
        self._files: dict[bytes, Content] = {}
        self._missing = missing
        self._max_paths = max_paths
        self._page = page
        self._copy_max = min(copy_max, MAX_COPY)
        self._only_copies = only_copies
        self._kind = kind
        self._last_number = 0
        self._limit: tuple[LimitReached, int] | None = None
        self._lock = threading.Lock()
        self._somebody_serves = threading.Condition(self._lock)
        self._closed = False
        self._served: dict[_Connection, threading.Thread] = {}
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
            TypeError: the content is neither bytes nor one of the reasons to refuse it.

        """
        name = os.fsencode(path)
        problem = problem_with_path(name)
        if problem is not None:
            raise ValueError(f"a broker can't be asked for {path!r}: {problem}")
        if not isinstance(content, bytes | Reason | LimitReached | OSError):
            raise TypeError(
                f"{path!r} is served with bytes, a Reason, a LimitReached or an OSError, not {content!r}"
            )
        with self._lock:
            self._files[name] = content

    def __delitem__(self, path: StrOrBytesPath) -> None:
        """Serve it no more. Raises KeyError if it was not served."""
        with self._lock:
            del self._files[os.fsencode(path)]

    def limit_requests(self, limit: LimitReached, count: int = 1) -> None:
        """Refuse the next `count` requests, since this limit is reached; never hello, more and cancel."""
        with self._lock:
            self._limit = limit, count

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
        ours, theirs = socket.socketpair(socket.AF_UNIX, self._kind)
        if not self._serve(ours):
            theirs.close()
            raise ValueError("this broker is closed")
        return theirs

    def hand_over(
        self,
        listener: str,
        *,
        pid: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        timeout: float = 5.0,
        kind: socket.SocketKind = socket.SOCK_STREAM,
    ) -> socket.socket:
        """Connect a client to a listener, once it is served; return its end, which the caller owns.

        The service gets the other end, and is told that it is this process, or whom the arguments name.
        `kind`: SOCK_STREAM or SOCK_SEQPACKET, as the policy has it of a listener (`type`).

        Raises:
            ValueError: nobody served this listener within `timeout` seconds.

        """
        with self._somebody_serves:
            self._somebody_serves.wait_for(lambda: self._serving(listener) is not None, timeout)
            connection = self._serving(listener)
            if connection is None:
                raise ValueError(f"nobody serves {listener!r}")
            self._last_number += 1
            number = self._last_number
            connection.clients.add(number)
            request_id = connection.services[listener]
        facts = AcceptedClient(
            number,
            os.getpid() if pid is None else pid,
            os.getuid() if uid is None else uid,
            os.getgid() if gid is None else gid,
            0,
        )
        ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
        with ours:
            try:
                connection.send(encode_accepted(request_id, GENERATION, facts), [ours.fileno()])
            except BaseException:
                theirs.close()
                raise
        return theirs

    def end_service(self, listener: str) -> None:
        """Take away the right to serve a listener, as a reload of the policy does; its clients stay.

        Raises:
            ValueError: nobody serves this listener.

        """
        with self._lock:
            connection = self._serving(listener)
            if connection is None:
                raise ValueError(f"nobody serves {listener!r}")
            request_id = connection.services.pop(listener)
        connection.send(encode_serve_reply(request_id, GENERATION, refused(Reason.DENIED)))

    def _serving(self, listener: str) -> _Connection | None:
        """Return the connection of who serves a listener. With the lock held."""
        return next((one for one in self._served if listener in one.services), None)

    def disconnect(self) -> None:
        """Close all connections, as a restart of the broker does; it goes on listening."""
        with self._lock:
            served = dict(self._served)
        for connection, thread in served.items():
            _wake(connection.sock)
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
        listener = socket.socket(socket.AF_UNIX, self._kind)
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
            connection = _Connection(sock)
            thread = threading.Thread(target=self._talk, args=(connection,), daemon=True)
            self._served[connection] = thread
            thread.start()
        return True

    def _talk(self, connection: _Connection) -> None:
        greeted = False
        try:
            # The client may go at any moment, or never receive until `disconnect`.
            with contextlib.suppress(OSError):
                while True:
                    try:
                        frame = connection.receive()
                        if not frame:
                            return
                        request = decode_request(frame)
                        if isinstance(request, Hello) is greeted:
                            raise MalformedError("not one hello, first", request.id)
                    except MalformedError as error:
                        connection.refuse(error.request_id, Kind.MALFORMED, Reason.MALFORMED, str(error))
                        return
                    greeted = True
                    with self._lock:
                        self.requests.append(request)
                    self._answer(connection, request)
        finally:
            # In this order: who finds nothing served finds everything closed.
            connection.sock.close()
            with self._lock:
                del self._served[connection]

    def _limit_reached(self, request: Request) -> LimitReached | None:
        """Return the limit that refuses this request, which counts as one of those."""
        with self._lock:
            if self._limit is None or isinstance(request, Hello | MoreRequest | CancelRequest):
                return None
            limit, count = self._limit
            self._limit = (limit, count - 1) if count > 1 else None
            return limit

    def _answer(self, connection: _Connection, request: Request) -> None:
        number = getattr(request, "client", None)
        limit = self._limit_reached(request)
        if limit is not None:
            connection.refuse(request.id, Kind.REFUSED, Reason.LIMIT, "too much at once", limit)
        elif (
            number is not None
            and not isinstance(request, ReleaseRequest)
            and number not in connection.clients
        ):
            text = f"there is no client {number} here"
            connection.refuse(request.id, Kind.REFUSED, Reason.IDENTITY, text)
        elif isinstance(request, Hello):
            self._greet(connection, request)
        elif isinstance(request, OpenRequest):
            self._open(connection, request)
        elif isinstance(request, StatRequest):
            found = [self._find(path) for path in request.paths]
            results = [
                (one.result, _describe(path, one) if one.result is GIVEN else None)
                for path, one in zip(request.paths, found, strict=True)
            ]
            connection.send(encode_stat_reply(request.id, GENERATION, results))
        elif isinstance(request, ListRequest):
            self._list(connection, request)
        elif isinstance(request, StatusRequest):
            document = {"generation": GENERATION, "identity_level": 0, "fake": True}
            connection.send(encode_status_reply(request.id, GENERATION, json.dumps(document).encode()))
        elif isinstance(request, ServeRequest):
            self._let_serve(connection, request)
        elif isinstance(request, ReleaseRequest):
            with self._lock:
                connection.clients.difference_update(request.clients)
        elif isinstance(request, WalkRequest | MoreRequest | CancelRequest):
            self._walk(connection, request)
        else:
            text = "this is no control socket"
            connection.refuse(request.id, Kind.MALFORMED, Reason.MALFORMED, text)
            _wake(connection.sock)

    def _greet(self, connection: _Connection, request: Hello) -> None:
        if not request.lowest <= VERSION <= request.highest:
            text = f"only version {VERSION} is spoken here"
            connection.refuse(request.id, Kind.REFUSED, Reason.VERSION, text)
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
            copy_max=self._copy_max,
        )
        connection.send(encode_welcome(welcome))

    def _open(self, connection: _Connection, request: OpenRequest) -> None:
        if len(request.paths) > self._max_paths:
            text = f"a request has at most {self._max_paths} paths here"
            connection.refuse(request.id, Kind.REFUSED, Reason.LIMIT, text)
            return
        results = []
        copies: list[bytes] = []
        room = MAX_REPLY - HEADER.size - len(request.paths) * RESULT.size
        with Descriptors() as descriptors:
            for path in request.paths:
                found = self._find(path)
                result, content = found.result, found.content
                if found.limit is not None:
                    result = limited(found.limit)
                elif found.names is not None:
                    result = refused(Reason.NOT_REGULAR, errno.EISDIR)
                elif result is GIVEN and request.copy and len(content) <= min(self._copy_max, room):
                    result = copied(len(content))
                    copies.append(content)
                    room -= len(content)
                elif result is GIVEN and self._only_copies:
                    fits = request.copy and len(content) <= self._copy_max
                    result = refused(Reason.LIMIT if fits else Reason.TOO_LARGE)
                elif result is GIVEN:
                    descriptors.add(_memory_file(path, content))
                results.append(result)
            reply = encode_open_reply(request.id, GENERATION, results, copies)
            connection.send(reply, descriptors.numbers())

    def _let_serve(self, connection: _Connection, request: ServeRequest) -> None:
        with self._somebody_serves:  # no client is handed over before, and one can be right behind
            connection.send(encode_serve_reply(request.id, GENERATION, GIVEN))
            connection.services[request.listener.decode(errors="replace")] = request.id
            self._somebody_serves.notify_all()

    # Walks

    def _walk(self, connection: _Connection, request: WalkRequest | MoreRequest | CancelRequest) -> None:
        walks = connection.walks
        if isinstance(request, WalkRequest):
            problem = self._problem_with_walk(connection, request)
            if problem is not None:
                last = WalkEnd(0, 0, 0, Incomplete(0))
                connection.send(encode_walk_reply(request.id, GENERATION, problem, [], last))
                return
            walks[request.id] = _Walk(request, self._below(request))
        walk = walks.get(request.id)
        if walk is None:
            return
        if isinstance(request, MoreRequest):
            walk.credit += request.credit
        elif isinstance(request, CancelRequest):
            walk.incomplete |= Incomplete.CANCELLED
            walk.found, walk.left_over = iter(()), None
            walk.credit += 1
        while walk.credit and request.id in walks:
            walk.credit -= 1
            if self._send_frame_of_walk(connection, walk):
                del walks[request.id]

    def _problem_with_walk(self, connection: _Connection, request: WalkRequest) -> Result | None:
        found = self._find(request.path)
        if found.result is not GIVEN:
            return found.result
        if found.names is None:
            return refused(Reason.NOT_DIRECTORY)
        if len(connection.walks) >= _MOST_WALKS:
            return refused(Reason.LIMIT)
        prefix = request.path.rstrip(b"/") + b"/"
        if request.behind and self._find(prefix + request.behind).result.reason is Reason.NOT_FOUND:
            return refused(Reason.NOT_FOUND)
        try:
            for glob in request.filter.globs:
                compile_glob(glob)
        except ValueError:
            return refused(Reason.PATH_INVALID)
        return None

    def _below(self, request: WalkRequest) -> Iterator[tuple[bytes, _Object]]:
        """Yield what is below the start, each directory before what is in it, with paths from the start."""
        prefix = request.path.rstrip(b"/") + b"/"
        # As components, so that what is in a directory comes directly behind it.
        behind = request.behind.split(b"/") if request.behind else []
        waiting: list[tuple[bytes, ...]] = [
            (name,) for name in reversed(self._find(request.path).names or ())
        ]
        while waiting:
            components = waiting.pop()
            path = b"/".join(components)
            found = self._find(prefix + path)
            waiting.extend((*components, name) for name in reversed(found.names or ()))
            if list(components) > behind:
                yield path, found

    def _send_frame_of_walk(self, connection: _Connection, walk: _Walk) -> bool:
        """Send the next frame; return whether it was the last."""
        request = walk.request
        prefix = request.path.rstrip(b"/") + b"/"
        entries: list[bytes] = []
        size, last = 0, False
        with Descriptors() as descriptors:
            while len(entries) < (request.most or MAX_PATHS):
                one = walk.left_over or next(walk.found, None)
                walk.left_over = None
                if one is None:
                    last = True
                    break
                path, found = one
                if found.names is not None:
                    walk.directories += 1
                if not _is_named(path, found, walk):
                    continue
                size += WALK_ENTRY.size + STAT.size + len(path)
                if size > _ROOM_OF_WALK:
                    walk.left_over = one
                    break
                is_open = request.descriptors and found.names is None
                if is_open:
                    descriptors.add(_memory_file(path, found.content))
                kind = _FILE if found.names is None else _DIRECTORY
                record = _describe(prefix + path, found).encode()
                entries.append(encode_walk_entry(WalkEntry(path, kind, record, is_open)))
            walk.entries += len(entries)
            walk.descriptors += len(descriptors)
            end = walk.end() if last else None
            frame = encode_walk_reply(request.id, GENERATION, GIVEN, entries, end)
            connection.send(frame, descriptors.numbers())
        return last

    def _list(self, connection: _Connection, request: ListRequest) -> None:
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
        connection.send(encode_list_reply(request.id, GENERATION, result, entries, at, last=last))

    def _find(self, path: bytes) -> _Object:
        if problem_with_path(path) is not None:
            return _Object(refused(Reason.PATH_INVALID))
        prefix = path.rstrip(b"/") + b"/"
        with self._lock:
            content = self._files.get(path)
            others = self._files if content is None else ()
            names = {other[len(prefix) :].split(b"/")[0] for other in others if other.startswith(prefix)}
        if isinstance(content, bytes):
            return _Object(GIVEN, content)
        if isinstance(content, Reason):
            return _Object(refused(content))
        if isinstance(content, LimitReached):
            return _Object(refused(Reason.LIMIT), limit=content)
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


def _is_named(path: bytes, found: _Object, walk: _Walk) -> bool:
    """Return whether a walk is to name this; note what it leaves out because it is refused."""
    asked = walk.request.filter
    if found.result is not GIVEN:
        failed = found.result.status is Status.BROKEN
        walk.incomplete |= Incomplete.FAILED if failed else Incomplete.REFUSED
        return False
    kind = WalkKind.REGULAR if found.names is None else WalkKind.DIRECTORY
    if not asked.kinds & kind or asked.newer_than >= 0:  # everything here is of 1970
        return False
    if found.names is None and not asked.least_size <= len(found.content) <= asked.most_size:
        return False
    components = path.split(b"/")
    return not asked.globs or any(compile_glob(glob).matches(components) for glob in asked.globs)


def _wake(sock: socket.socket) -> None:
    """Make calls that wait on a socket return."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
