"""Why the client has nothing to give: one class each, below the OSError that a caller knows already.

Two kinds must never be confused: *the file* is missing or refused
(FileNotFoundError, PermissionError, ...), and *the broker* can't be reached
(ConnectionError). A program that takes "no broker" for "no such file" would
skip what it has to read.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any

from fdbroker.wire.format import ERRNO_OF, Limit, Reason

if TYPE_CHECKING:
    from fdbroker.wire.messages import ErrorReply, LimitReached, Result


class BrokerError(OSError):
    """Anything that keeps the client from doing what it was asked to do.

    `errno` and `strerror` are as in each OSError. `filename` is the path that
    was asked for, as bytes (or the broker's socket, for `UnavailableError`);
    None where the error is about no path. `reason` is the code of
    docs/protocol.md, `Reason.NONE` where the error arose in this process.
    `request_id` is the number under which the broker's audit has the request,
    0 where none was sent.
    """

    def __init__(
        self,
        number: int,
        text: str,
        filename: bytes | None = None,
        reason: Reason = Reason.NONE,
        request_id: int = 0,
    ) -> None:
        super().__init__(number, text, filename)
        self.reason = reason
        self.request_id = request_id

    def __reduce__(self) -> tuple[type[BrokerError], tuple[Any, ...]]:
        """Say how to make it again: what crosses to another process keeps all its parts."""
        return type(self), (self.errno, self.strerror, self.filename, self.reason, self.request_id)


class DeniedError(BrokerError, PermissionError):
    """The policy does not allow it, or the broker does not take the sender for who connected."""


class MissingError(BrokerError, FileNotFoundError):
    """Allowed, and not there."""


class PathInvalidError(BrokerError, ValueError):
    """Not a path that can be asked for."""


class NotDirectoryError(BrokerError, NotADirectoryError):
    """A component of the path, or what was to be listed, is no directory."""


class NotRegularError(BrokerError):
    """Only regular files are handed out."""


class DirectoryError(NotRegularError, IsADirectoryError):
    """Only regular files are handed out, and this is a directory."""


class SymlinkError(BrokerError):
    """A component of the path is a symbolic link, and no rule says that it may be one."""


class UnservedError(BrokerError):
    """The file is where the broker never serves any: another mount, a writable view, a kernel file system."""


class BusyError(BrokerError, BlockingIOError):
    """Not now: a lease is held on the file, or it was moved while it was looked up. Try again."""


class ChangedError(BrokerError, BlockingIOError):
    """Not now: the file changed while it was copied, so the copy is of no one moment. Try again."""


class LimitError(BrokerError, BlockingIOError):
    """Not now: a limit of the broker is reached. Try again.

    `limit` is its name in docs/protocol.md and `value` what it is, both None
    where the broker does not say. `retry_after`: seconds until there is room
    for one more; None: it is not time that helps, but to receive or to close
    something, or the broker does not say.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - those of every error, and which limit it is
        self,
        number: int,
        text: str,
        filename: bytes | None = None,
        reason: Reason = Reason.NONE,
        request_id: int = 0,
        limit: str | None = None,
        value: int | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(number, text, filename, reason, request_id)
        self.limit = limit
        self.value = value
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[type[BrokerError], tuple[Any, ...]]:
        """Say how to make it again, with which limit it is."""
        kind, arguments = super().__reduce__()
        return kind, (*arguments, self.limit, self.value, self.retry_after)


class FileTooLargeError(BrokerError):
    """The file is larger than a copy of it may be (EFBIG)."""


class FileTimeoutError(BrokerError, TimeoutError):
    """The file could not be opened or copied in time. It is about this file: the connection goes on."""


class BrokenError(BrokerError):
    """The broker failed: not a decision about the file. Its operator has to look."""


class ReloadRefusedError(BrokerError):
    """The broker did not take a policy, and goes on with the one it has. `strerror`: why, and the cure."""


class BrokerTimeoutError(BrokerError, TimeoutError):
    """The broker did not answer in time. The connection was given up, since a late answer could come."""


class UnavailableError(BrokerError, ConnectionError):
    """There is no way to the broker: `filename` is its socket, `errno` says what is wrong with it."""


class DisconnectedError(BrokerError, ConnectionResetError):
    """The connection ended, and the request could not be repeated on another one."""


class WalkInterrupted(BrokerError):
    """A walk was cut off and could not go on: the connection was lost, or the place where it was is gone.

    `filename` is the walk's start, `last` the path below it (relative, bytes)
    that was delivered last, empty if none was; `entries` and `descriptors`
    were delivered in all. `__cause__` is what went wrong.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - those of every error, and how far it got
        self,
        number: int,
        text: str,
        filename: bytes | None = None,
        reason: Reason = Reason.NONE,
        request_id: int = 0,
        last: bytes = b"",
        entries: int = 0,
        descriptors: int = 0,
    ) -> None:
        super().__init__(number, text, filename, reason, request_id)
        self.last = last
        self.entries = entries
        self.descriptors = descriptors

    def __reduce__(self) -> tuple[type[BrokerError], tuple[Any, ...]]:
        """Say how to make it again, with how far it got."""
        kind, arguments = super().__reduce__()
        return kind, (*arguments, self.last, self.entries, self.descriptors)


class ProtocolError(BrokerError, ConnectionError):
    """One side did not keep to docs/protocol.md. The connection was given up, descriptors were closed."""


class TooManyFilesError(BrokerError):
    """This process has no room for the descriptors that came (EMFILE). The connection was given up."""


class ReadOnlyError(BrokerError, PermissionError):
    """The file was to be opened for something else than reading."""


_CLASSES: dict[Reason, type[BrokerError]] = {
    Reason.DENIED: DeniedError,
    Reason.PATH_INVALID: PathInvalidError,
    Reason.NOT_FOUND: MissingError,
    Reason.NOT_DIRECTORY: NotDirectoryError,
    Reason.NOT_REGULAR: NotRegularError,
    Reason.SYMLINK: SymlinkError,
    Reason.CROSSES_MOUNT: UnservedError,
    Reason.MOUNT_NOT_READ_ONLY: UnservedError,
    Reason.FILESYSTEM: UnservedError,
    Reason.BUSY: BusyError,
    Reason.IDENTITY: DeniedError,
    Reason.LIMIT: LimitError,
    Reason.AUDIT: BrokenError,
    Reason.BROKEN: BrokenError,
    Reason.MALFORMED: ProtocolError,
    Reason.VERSION: ProtocolError,
    Reason.POLICY: ReloadRefusedError,
    Reason.TOO_LARGE: FileTooLargeError,
    Reason.TIMED_OUT: FileTimeoutError,
}

_TEXTS: dict[Reason, str] = {
    Reason.DENIED: "the broker's policy does not allow it (or it is not there, where a rule asks about the"
    " file); who administers the broker finds the rule in its audit",
    Reason.PATH_INVALID: "not a path that the broker takes: it must be absolute and in normal form, without"
    " '.', '..', '//' or a '/' at its end",
    Reason.NOT_FOUND: "the policy allows it, but there is no such file",
    Reason.NOT_DIRECTORY: "a component of the path, or what was to be listed or walked, is not a directory",
    Reason.NOT_REGULAR: "not a regular file, and the broker hands out nothing else",
    Reason.SYMLINK: "a component is a symbolic link; ask for the path that it leads to",
    Reason.CROSSES_MOUNT: "on another mount than the root that the policy names; it needs a root of its own,"
    " or 'cross_mounts' in the broker's policy",
    Reason.MOUNT_NOT_READ_ONLY: "its mount is writable in the broker's view; restart the broker, so that the"
    " mount becomes part of its read-only view",
    Reason.FILESYSTEM: "on a file system that the broker never serves, or does not list and walk ('opens:"
    " helpers' in its policy)",
    Reason.BUSY: "somebody holds a lease on the file, or it was moved while it was looked up; try again",
    Reason.IDENTITY: "the broker does not take the sender for who connected; connect anew",
    Reason.LIMIT: "a limit of the broker is reached (connections, walks, descriptors under way, files that"
    " others keep waiting); receive or close some, then try again",
    Reason.AUDIT: "the broker could not record its decision, so it gave nothing; its operator has to look at"
    " the audit's disk or journal",
    Reason.BROKEN: "the broker failed; its operator has to look at its log",
    Reason.MALFORMED: "the broker could not read the request; client and broker do not fit together",
    Reason.VERSION: "client and broker have no version of the protocol in common; update the older one",
    Reason.POLICY: "the broker does not take this policy and goes on with the one it has",
    Reason.TOO_LARGE: "the policy delivers it as a copy alone, and it is larger than a copy may be",
    Reason.TIMED_OUT: "its file system, or who watches it, did not answer the broker in time; try again, or"
    " have its operator look at the mount",
}
# Of a listener there is another thing to say than of a file.
_TEXTS_OF_LISTENERS: dict[Reason, str] = {
    Reason.DENIED: "the broker's policy has no listener of this name whose clients this process may have"
    " ('listeners: {NAME: {service: ...}}')",
    Reason.BUSY: "this connection serves the listener already",
}
_RECEIVE = "receive or close some of what was opened, then try again"
# Of limits by rate there is none but to wait, for so long as the broker says.
_CURES_OF_LIMITS: dict[Limit, str] = {
    Limit.CONNECTIONS: "try again when others have closed theirs",
    Limit.CONNECTIONS_PER_UID: "close some connections of this user, then try again",
    Limit.MESSAGE_WITHIN: "connect anew, and send what was begun",
    Limit.IN_FLIGHT_PER_UID: _RECEIVE,
    Limit.RULE_IN_FLIGHT: _RECEIVE,
}
_BAD_GLOB = (
    "a glob is none of the policy's (relative, '**' a whole component, no '//'), or the start is no path"
)


def error_of_result(result: Result, path: bytes, request_id: int) -> BrokerError:
    """Return the exception for a path that was refused or broke."""
    if result.limit is not None:
        return _error_of_limit(result.limit, result.errno, path, request_id)
    return _error(result.reason, result.errno, path, request_id)


def error_of_serving(result: Result, listener: bytes, request_id: int) -> BrokerError:
    """Return the exception for a listener that may not be served, or not again."""
    text = _TEXTS_OF_LISTENERS.get(result.reason)
    return _error(result.reason, result.errno, listener, request_id, text=text)


def error_of_walk(result: Result, start: bytes, request_id: int, *, has_globs: bool) -> BrokerError:
    """Return the exception for a walk that was refused; an invalid path may be one of its globs."""
    of_glob = has_globs and result.reason is Reason.PATH_INVALID
    return _error(result.reason, result.errno, start, request_id, text=_BAD_GLOB if of_glob else None)


def error_of_reply(reply: ErrorReply, path: bytes | None = None) -> BrokerError:
    """Return the exception for an error frame; what the broker says of it comes last."""
    if reply.limit is not None:
        return _error_of_limit(reply.limit, reply.errno, path, reply.id)
    return _error(reply.reason, reply.errno, path, reply.id, reply.text)


def error_in_its_words(reply: ErrorReply) -> BrokerError:
    """Return the exception for an error frame whose own sentence says what is wrong, and the cure."""
    return _error(reply.reason, reply.errno, None, reply.id, text=reply.text)


def _error_of_limit(reached: LimitReached, number: int, path: bytes | None, request_id: int) -> LimitError:
    """Return the exception for a limit of which the broker said which one it is."""
    name, seconds = reached.limit.name.lower(), reached.retry_after / 1000 or None
    cure = (
        _CURES_OF_LIMITS.get(reached.limit, "try again") if seconds is None else f"try again in {seconds:g} s"
    )
    text = f"the broker's limit {name} is reached, which is {reached.value}; {cure}"
    number = number or ERRNO_OF[Reason.LIMIT]
    return LimitError(number, text, path, Reason.LIMIT, request_id, name, reached.value, seconds)


def _error(
    reason: Reason,
    number: int,
    path: bytes | None,
    request_id: int,
    said: str = "",
    text: str | None = None,
) -> BrokerError:
    # A reason without a class (0, which says nothing) is no verdict about the file.
    kind = _CLASSES.get(reason, BrokenError)
    number = number or ERRNO_OF[reason] or errno.EIO
    if text is not None:
        return kind(number, text, path, reason, request_id)
    text = _TEXTS.get(reason, "the broker gave no reason")
    if reason is Reason.NOT_REGULAR and number == errno.EISDIR:
        kind, text = DirectoryError, "a directory, and the broker hands out regular files only"
    elif reason is Reason.PATH_INVALID and path is not None and path[:1] != b"/":
        text = "the broker takes absolute paths only" if path else "the path is empty"
    elif reason is Reason.BROKEN:
        text = f"{text} ({os.strerror(number)})"
    elif reason in {Reason.POLICY, Reason.AUDIT} and said:
        text, said = said, ""  # it knows better, and has the cure
    if said:
        text = f"{text}: {said}"
    return kind(number, text, path, reason, request_id)


def path_not_sendable(path: bytes, number: int, why: str) -> PathInvalidError:
    """Return the exception for a path that no frame can carry, so that it was not sent."""
    return PathInvalidError(number, f"not a path: {why}", path, Reason.PATH_INVALID)


def unavailable(socket_path: bytes | None, error: OSError) -> UnavailableError:
    """Return the exception for a broker's socket that can't be connected to or used, with the cure."""
    number = error.errno or errno.EIO
    cures = {
        errno.ENOENT: "the broker's socket is not there; start the broker, or give connect() the path of its"
        " socket",
        errno.ECONNREFUSED: "nobody listens on the broker's socket; start the broker",
        errno.EACCES: "this user may not connect to the broker's socket; whoever administers the machine can"
        " add it to the group that may (fdbroker-clients)",
        errno.EPROTOTYPE: "the socket is of another type; the client needs SOCK_SEQPACKET or SOCK_STREAM",
        errno.EAGAIN: "the queue of the broker's socket is full; the broker is overloaded or stuck",
    }
    text = cures.get(number) or f"the broker's socket can't be used: {error.strerror or error}"
    return UnavailableError(number, text, socket_path)


def changed(path: bytes | None) -> ChangedError:
    """Return the exception for a file that changed while it was copied."""
    return ChangedError(errno.EAGAIN, "the file changed while it was copied; try again", path)


def too_large(path: bytes | None, size: int, most: int) -> FileTooLargeError:
    """Return the exception for a file that is larger than the copy that is wanted of it."""
    text = f"the file has {size} bytes, and a sealed copy may have {most}; raise max_size, or do without one"
    return FileTooLargeError(errno.EFBIG, text, path)


def copying_timed_out(path: bytes | None, copied: int, size: int) -> FileTimeoutError:
    """Return the exception for a file that could not be copied in time."""
    text = f"{copied} of {size} bytes were copied when the time was up; give the client a longer time-out"
    return FileTimeoutError(errno.ETIMEDOUT, text, path)


def timed_out(seconds: float, what: str) -> BrokerTimeoutError:
    """Return the exception for an answer that did not come in time."""
    causes = "is the broker overloaded, its file system stuck, or the socket that of a service?"
    return BrokerTimeoutError(errno.ETIMEDOUT, f"{what} within {seconds:g} s; {causes}")


def disconnected(why: str) -> DisconnectedError:
    """Return the exception for a connection that ended and can't be replaced."""
    return DisconnectedError(errno.ECONNRESET, why)


def protocol_error(why: str, request_id: int = 0) -> ProtocolError:
    """Return the exception for a broker that did not keep to the protocol."""
    text = f"the broker does not keep to the protocol: {why}"
    return ProtocolError(errno.EPROTO, text, None, Reason.NONE, request_id)


def too_many_files() -> TooManyFilesError:
    """Return the exception for descriptors that this process had no room for."""
    text = (
        "this process may not have the descriptors that the broker sent; close some, raise RLIMIT_NOFILE,"
        " or ask for fewer at once"
    )
    return TooManyFilesError(errno.EMFILE, text)
