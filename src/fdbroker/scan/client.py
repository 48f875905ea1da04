"""The client of a scan service: what is asked, and the verdicts that come.

from fdbroker.scan import connect

with connect() as service:
    print(service.scan_path("/srv/upload/file").verdict)
    with service.scan_tree("/home/me") as scan:
        for result in scan:
            ...
        print(scan.end)
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections import deque
from typing import TYPE_CHECKING

from fdbroker.kernel import sockets
from fdbroker.sandbox.waiting import is_readable
from fdbroker.scan.messages import (
    LONGEST_MESSAGE,
    MOST_PATHS,
    VERSION,
    AskStatus,
    Cancel,
    End,
    Farewell,
    Hello,
    MessageError,
    Refused,
    Renew,
    Results,
    ScanDescriptor,
    ScanPaths,
    ScanTree,
    StatusReply,
    Welcome,
    decode_answer,
    encode_request,
)
from fdbroker.scan.run import Scanned

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from types import TracebackType
    from typing import Self

    from fdbroker.scan.messages import Request, ServiceAnswer
    from fdbroker.scan.run import Skipped

DEFAULT_SOCKET = "/run/fdbroker/scan"
DEFAULT_TIMEOUT = 600.0
_LAST_ID = 2**32 - 1
# Of one message of paths, so that it fits whatever they are.
_MOST_BYTES = LONGEST_MESSAGE // 8


class ScanServiceError(OSError):
    """Base of what goes wrong between a client and a scan service; an OSError with its `errno`."""


class ServiceUnavailableError(ScanServiceError, ConnectionError):
    """There is no way to the service: `errno` says why, `filename` is its socket."""


class ServiceGoneError(ScanServiceError, ConnectionResetError):
    """The service has ended the connection; `reason` is what it said: broker_gone, stopping, malformed."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(errno.ECONNRESET, text)
        self.reason = reason


class ServiceTimeoutError(ScanServiceError, TimeoutError):
    """The service said nothing for as long as it may."""


class ServiceRefusedError(ScanServiceError):
    """The service does not do what was asked; `reason` as in docs/scan-protocol.md."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(errno.EACCES if reason == "denied" else errno.EINVAL, text)
        self.reason = reason


def connect(
    path: str | bytes = DEFAULT_SOCKET,
    *,
    timeout: float | None = DEFAULT_TIMEOUT,
    greeted_within: float | None = None,
) -> ScanService:
    """Connect to a scan service and return it; the caller closes it.

    The broker listens on the socket also while no service runs, and keeps who connects until one does.

    Args:
        path: its socket.
        timeout: seconds of silence after which a request has failed; None: no limit.
        greeted_within: seconds after which nobody is taken to be there; None: those of `timeout`.

    Raises:
        ServiceUnavailableError: it is not there, or may not be used by this user.
        ServiceTimeoutError: it does not greet: it does not run, or hangs.
        ScanServiceError: what is there is no scan service of this version, or it refused.

    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        sock.connect(path)
    except OSError as error:
        sock.close()
        raise ServiceUnavailableError(
            error.errno, f"there is no way to the scan service: {error.strerror}", os.fsdecode(path)
        ) from error
    try:
        return ScanService(sock, timeout, greeted_within)
    except BaseException:
        sock.close()
        raise


class ScanService:
    """A connection to a scan service; for one thread at a time. Made by `connect`.

    Several scans may be under way; what comes for one while another is read is kept for it.
    """

    def __init__(
        self, sock: socket.socket, timeout: float | None, greeted_within: float | None = None
    ) -> None:
        self._sock = sock
        self._timeout = timeout if greeted_within is None else greeted_within
        self._last_id = 0
        self._scans: dict[int, Scan] = {}
        self._others: dict[int, StatusReply | Refused] = {}
        sock.settimeout(0.0)
        self._send(Hello(VERSION))
        answer = self._receive()
        if not isinstance(answer, Welcome):
            raise ServiceGoneError("malformed", "what is there does not greet as a scan service does")
        self.welcome: Welcome = answer
        self._timeout = timeout

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Close the connection; scans that are under way end at the service. May be called again."""
        self._sock.close()

    def scan_descriptor(self, descriptor: int, *, max_size: int | None = None) -> Scanned:
        """Return the verdict on what is open behind a descriptor, which stays the caller's.

        One for reading of a regular file. The path in the result is empty.

        Raises:
            ScanServiceError: there is no verdict.

        """
        scan = self.begin(ScanDescriptor(self._new_id(), max_size), descriptor)
        return _the_one(list(scan), scan.end)

    def scan_path(self, path: str | bytes, *, max_size: int | None = None) -> Scanned:
        """Return the verdict on a file, which the broker opens on behalf of this user. Raises as above."""
        return _the_one(list(self.scan_paths([path], max_size=max_size)), None)

    def scan_paths(
        self, paths: Iterable[str | bytes], *, max_size: int | None = None
    ) -> Iterator[Scanned | Skipped]:
        """Yield the verdicts on files, as they come.

        Raises:
            ScanServiceError: there are no more, and not all have come.

        """
        for some in _in_messages([os.fsencode(path) for path in paths]):
            with self.begin(ScanPaths(self._new_id(), some, max_size)) as scan:
                yield from scan
            if scan.end is not None and scan.end.missing:
                raise ServiceGoneError(
                    scan.end.missing[0], f"the scan was cut off: {', '.join(scan.end.missing)}"
                )

    def scan_tree(
        self, path: str | bytes, *, exclude: Sequence[str | bytes] = (), max_size: int | None = None
    ) -> Scan:
        """Return a scan of a file, or of all that is below a directory: an iterator of results.

        Its `end` says, behind the last one, whether that was all that there is. The globs of `exclude` are
        those of `fdbroker scan --exclude`.
        """
        globs = tuple(os.fsencode(glob) for glob in exclude)
        return self.begin(ScanTree(self._new_id(), os.fsencode(path), globs, max_size))

    def status(self) -> dict[str, object]:
        """Return how the service is. Raises ScanServiceError."""
        number = self._new_id()
        self._send(AskStatus(number))
        while number not in self._others:
            self._take_one()
        answer = self._others.pop(number)
        if isinstance(answer, Refused):
            raise ServiceRefusedError(answer.reason, answer.text)
        return answer.status

    def renew(self) -> None:
        """Have the engines loaded anew; returns when that is done.

        Raises:
            ServiceRefusedError: this user may not, or they can't be loaded (those from before go on).
            ScanServiceError: the service is gone.

        """
        for _ in self.begin(Renew(self._new_id())):
            pass

    def begin(
        self, request: ScanDescriptor | ScanPaths | ScanTree | Renew, descriptor: int | None = None
    ) -> Scan:
        """Send a request and return its scan, whose results are still to come."""
        scan = Scan(self, request.id)
        self._scans[request.id] = scan
        try:
            self._send(request, [] if descriptor is None else [descriptor])
        except BaseException:
            self._scans.pop(request.id, None)
            raise
        return scan

    def cancel(self, number: int) -> None:
        """Have a request end at the service."""
        with contextlib.suppress(ScanServiceError, ValueError):
            self._send(Cancel(self._new_id(), number))

    def take_for(self, scan: Scan) -> None:
        """Receive one message; whichever request it belongs to has it then."""
        if scan.number in self._scans:
            self._take_one()

    def _new_id(self) -> int:
        self._last_id = self._last_id % _LAST_ID + 1
        return self._last_id

    def _take_one(self) -> None:
        answer = self._receive()
        if isinstance(answer, Farewell):
            raise ServiceGoneError(answer.reason, answer.text)
        if isinstance(answer, Welcome):
            raise ServiceGoneError("malformed", "the service greets twice")
        scan = self._scans.get(answer.id)
        if scan is None:
            if isinstance(answer, StatusReply | Refused):
                self._others[answer.id] = answer
        else:
            scan.take(answer)
            if not isinstance(answer, Results):
                del self._scans[answer.id]

    def _send(self, request: Request, descriptors: Sequence[int] = ()) -> None:
        try:
            data = encode_request(request)
        except MessageError as error:
            raise ScanServiceError(errno.EMSGSIZE, str(error)) from error
        while True:
            try:
                sockets.send(self._sock, data, descriptors, wait=False)
            except BlockingIOError:
                # Its queue is full: it reads again when it has told what it has to tell.
                self._wait_to_send()
            except OSError as error:
                raise self._gone(error) from error
            else:
                return

    def _wait_to_send(self) -> None:
        if is_readable(self._sock.fileno(), 0.01):
            self._take_one()

    def _receive(self) -> ServiceAnswer:
        if not is_readable(self._sock.fileno(), self._timeout):
            raise ServiceTimeoutError(
                errno.ETIMEDOUT, f"the scan service said nothing for {self._timeout:g} s"
            )
        try:
            with (message := sockets.receive(self._sock, LONGEST_MESSAGE + 1)).descriptors:
                data = message.data
        except OSError as error:
            raise self._gone(error) from error
        if not data:
            raise ServiceGoneError("", "the scan service has closed the connection")
        try:
            return decode_answer(data)
        except MessageError as error:
            raise ServiceGoneError(
                "malformed", f"the scan service does not keep to the protocol: {error}"
            ) from error

    def _gone(self, error: OSError) -> ServiceGoneError:
        """Return why the connection is over: what the service said last, if it did."""
        with contextlib.suppress(OSError, MessageError):
            while data := sockets.receive(self._sock, LONGEST_MESSAGE + 1).data:
                answer = decode_answer(data)
                if isinstance(answer, Farewell):
                    return ServiceGoneError(answer.reason, answer.text)
        return ServiceGoneError("", f"the connection to the scan service is lost: {error.strerror}")


class Scan:
    """A request that is under way: an iterator over its results, in any order.

    As a context manager it is cancelled at the end, unless it has ended. `end` is what the service counted,
    and what is missing; None: it has not ended.
    """

    def __init__(self, service: ScanService, number: int) -> None:
        self.number = number
        self.end: End | None = None
        self._service = service
        self._results: deque[Scanned | Skipped] = deque()
        self._refused: Refused | None = None

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Cancel it."""
        self.cancel()

    def __iter__(self) -> Self:
        """Return itself."""
        return self

    def __next__(self) -> Scanned | Skipped:
        """Return the next result.

        Raises:
            ServiceRefusedError: it is not done.
            ScanServiceError: the service is gone, or silent.

        """
        while not self._results:
            if self._refused is not None:
                raise ServiceRefusedError(self._refused.reason, self._refused.text)
            if self.end is not None:
                raise StopIteration
            self._service.take_for(self)
        return self._results.popleft()

    def cancel(self) -> None:
        """Have it end at the service, unless it has. Results that have come can still be read."""
        if self.end is None and self._refused is None:
            self._service.cancel(self.number)

    def take(self, answer: Results | End | StatusReply | Refused) -> None:
        """Take what came for it."""
        if isinstance(answer, Results):
            self._results.extend(answer.results)
        elif isinstance(answer, End):
            self.end = answer
        elif isinstance(answer, Refused):
            self._refused = answer


def _the_one(results: list[Scanned | Skipped], end: End | None) -> Scanned:
    """Return the verdict on the one file that was asked for; ServiceGoneError."""
    if end is not None and end.missing:
        raise ServiceGoneError(end.missing[0], f"the scan was cut off: {', '.join(end.missing)}")
    if len(results) != 1 or not isinstance(results[0], Scanned):
        raise ServiceGoneError("malformed", f"the scan service has {len(results)} answers for one file")
    return results[0]


def _in_messages(paths: list[bytes]) -> Iterator[tuple[bytes, ...]]:
    """Yield so many of them at a time as fit into a message."""
    some: list[bytes] = []
    size = 0
    for path in paths:
        if some and (len(some) >= MOST_PATHS or size + len(path) > _MOST_BYTES):
            yield tuple(some)
            some, size = [], 0
        some.append(path)
        size += len(path)
    if some:
        yield tuple(some)
