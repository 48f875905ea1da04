"""`clamd`: a clamd that runs, by FILDES: it is handed open files, many at a time.

One connection with IDSESSION, one sendmsg(2) per file, answers in any order.
What clamd answers OK to, though it did not look (a descriptor that it can't
read, limits, encryption), is kept from it or asked beforehand: `connect` has it
scan two probes, and refuses a clamd that calls them clean.
"""

from __future__ import annotations

import errno
import io
import os
import re
import socket
import time
import zipfile
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fdbroker.kernel import sockets
from fdbroker.sandbox.waiting import any_is_readable
from fdbroker.scan.engine import MEBIBYTE, EngineError, Outside, Progress, Session, SessionLostError, shown
from fdbroker.scan.engines.containers import MAGIC, kind_of
from fdbroker.scan.options import Bytes, Seconds
from fdbroker.scan.verdict import Clean, Error, Reason, Verdict, found

if TYPE_CHECKING:
    from collections.abc import Sequence

# Command and the one byte that carries the descriptor.
_FILDES = b"zFILDES\0\0"
_SESSION = b"zIDSESSION\0"
_VERSION = b"zVERSION\0"
_ANSWER = re.compile(rb"([1-9][0-9]{0,18}): fd\[[0-9]+\]: (.+)", re.DOTALL)
_LONGEST_ANSWER = 64 * 1024
_LONGEST_VERSION = 1024
_FULL = frozenset({errno.EAGAIN, errno.ETOOMANYREFS})
# clamd takes at most 100 as MaxRecursion.
_DEEPER_THAN_ANY_LIMIT = 110
_PROBE = -1
_CLEAN = Clean()
_SECONDS_FOR_A_PROBE = 30.0


@dataclass(frozen=True)
class ClamdOptions:
    """`socket`: clamd's LocalSocket. `window`: files under way at a time. `timeout`: without an answer.

    `max_file_size`: larger files are errors; it must be at most clamd's own MaxFileSize, StreamMaxLength does
    not matter. `accept`: kinds that may be clean though clamd can't look into them: `encrypted` (clamd need
    not have AlertEncrypted then), `rar` (it has the library for it, or you don't mind), `zstd`, ...
    """

    socket: bytes = b"/run/clamav/clamd.ctl"
    window: int = 48
    timeout: Seconds = 300.0
    max_file_size: Bytes = 100 * MEBIBYTE
    accept: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what would never scan."""
        if not 1 <= self.window <= 250:  # noqa: PLR2004 - descriptors in flight, far below RLIMIT_NOFILE
            raise ValueError("window: 1 to 250")
        if not self.timeout:
            raise ValueError("timeout: more than 0 is needed")
        for kind in self.accept:
            if kind != "encrypted" and kind not in MAGIC:
                raise ValueError(f"accept: {kind!a} is none of: {', '.join(('encrypted', *MAGIC))}")


class Clamd(Outside):
    """A running clamd."""

    name = "clamd"
    options_type = ClamdOptions
    options: ClamdOptions

    def version(self) -> str:
        """Return what clamd says: `ClamAV 1.4.6/27800/Wed Oct 22 ...`."""
        with _connect(self.options) as sock:
            answer = b""
            try:
                sock.sendall(_VERSION)
                while (chunk := sock.recv(_LONGEST_VERSION)) and len(answer) < _LONGEST_VERSION:
                    answer += chunk
            except OSError as error:
                raise EngineError(f"clamd: VERSION: {error}") from error
        text = answer.rstrip(b"\0").decode("ascii", "replace")
        if not answer.endswith(b"\0") or not text.isprintable() or not text:
            raise EngineError("clamd: VERSION: no answer that could be read")
        return text

    def connect(self) -> Session:
        """Return a session with a clamd that says so when it could not look into something."""
        sock = _connect(self.options)
        session = ClamdSession(sock, self.options)
        try:
            sock.sendall(_SESSION)
            sock.settimeout(0.0)
            _probe(session, _deeply_nested(), "limits", "AlertExceedsMax yes")
            if "encrypted" not in self.options.accept:
                cure = "AlertEncrypted yes, or accept `encrypted`"
                _probe(session, _encrypted(), "encrypted files", cure)
        except OSError as error:
            session.close()
            raise EngineError(f"clamd: {error}") from error
        except BaseException:
            session.close()
            raise
        return session


class ClamdSession(Session):
    """One connection to clamd. Owns the socket."""

    def __init__(self, sock: socket.socket, options: ClamdOptions) -> None:
        self._socket = sock
        self._options = options
        # clamd counts the commands of a session from 1.
        self._sent = 0
        self._numbers: dict[int, int] = {}
        self._unread = b""
        self._last = time.monotonic()
        self._done: list[Progress] = []

    def room(self) -> int:
        """Return how many fit into the window."""
        return self._options.window - len(self._numbers)

    def submit(self, number: int, descriptor: int, size: int) -> bool:
        """Send the file in one message."""
        kept = self._not_for_clamd(descriptor, size)
        if kept is not None:
            self._done.append(Progress(number, kept))
            return True
        try:
            sent = sockets.send_part(self._socket, _FILDES, [descriptor], wait=False)
        except OSError as error:
            if error.errno in _FULL:
                return False
            raise SessionLostError(Reason.CRASHED, f"clamd took no file: {error.strerror}") from error
        if sent != len(_FILDES):
            raise SessionLostError(Reason.CRASHED, "clamd took a part of a command")
        if not self._numbers:
            self._last = time.monotonic()
        self._sent += 1
        self._numbers[self._sent] = number
        return True

    def filenos(self) -> Sequence[int]:
        """Return the connection."""
        return [self._socket.fileno()]

    def deadline(self) -> float | None:
        """Return when clamd has been silent for too long."""
        if self._done:
            return 0.0
        return self._last + self._options.timeout if self._numbers else None

    def answers(self) -> list[Progress]:
        """Read what clamd has sent."""
        try:
            while True:
                chunk = self._socket.recv(_LONGEST_ANSWER)
                if not chunk:
                    raise SessionLostError(Reason.CRASHED, "clamd closed the connection")
                *complete, self._unread = (self._unread + chunk).split(b"\0")
                for answer in complete:
                    self._take(answer)
                if complete:
                    self._last = time.monotonic()
                if len(self._unread) > _LONGEST_ANSWER:
                    raise SessionLostError(Reason.UNKNOWN_ANSWER, "clamd's answer has no end")
        except BlockingIOError:
            pass
        except OSError as error:
            raise SessionLostError(Reason.CRASHED, f"clamd: {error.strerror}") from error
        if self._numbers and not self._done and time.monotonic() >= self._last + self._options.timeout:
            raise SessionLostError(
                Reason.TIMED_OUT, f"clamd did not answer within {self._options.timeout:g} s"
            )
        done, self._done = self._done, []
        return done

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def _take(self, answer: bytes) -> None:
        match = _ANSWER.fullmatch(answer)
        number = self._numbers.pop(int(match[1]), None) if match else None
        if match is None or number is None:
            text = answer[:80].decode("utf-8", "backslashreplace")
            raise SessionLostError(Reason.UNKNOWN_ANSWER, f"clamd answered {text!a}")
        self._done.append(Progress(number, verdict_of(match[2])))

    def _not_for_clamd(self, descriptor: int, size: int) -> Error | None:
        if size > self._options.max_file_size:
            return Error(Reason.TOO_LARGE, f"{size} bytes are more than max_file_size")
        try:
            kind = kind_of(descriptor)
        except OSError as error:
            return Error(Reason.READ_FAILED, f"reading failed: {error.strerror}")
        if kind is not None and kind not in self._options.accept:
            return Error(Reason.UNSCANNABLE_CONTAINER, f"clamd: it can't look into {kind}")
        return None


def verdict_of(said: bytes) -> Verdict:
    """Return the verdict of an answer without what stands before it: `OK`, `NAME FOUND`, `TEXT. ERROR`."""
    if said == b"OK":
        return _CLEAN
    text = said.decode("utf-8", "backslashreplace")
    if text.endswith(" FOUND"):
        name = text.removesuffix(" FOUND")
        if name.startswith("Heuristics.Limits.Exceeded"):
            return Error(Reason.LIMIT_EXCEEDED, f"clamd: {name}")
        if name.startswith("Heuristics.Encrypted"):
            return Error(Reason.UNSCANNABLE_ENCRYPTED, f"clamd: {name}")
        return found([name])
    if text.endswith(" ERROR"):
        return Error(Reason.ENGINE_FAILED, f"clamd: {text.removesuffix(' ERROR')}")
    return Error(Reason.UNKNOWN_ANSWER, f"clamd answered {text[:80]!a}")


def _connect(options: ClamdOptions) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(min(options.timeout, _SECONDS_FOR_A_PROBE))
        sock.connect(options.socket)
    except OSError as error:
        sock.close()
        text = f"clamd: {shown(options.socket)}: {error.strerror or error}; does clamd run? (option socket)"
        raise EngineError(text) from error
    return sock


def _probe(session: ClamdSession, contents: bytes, what: str, cure: str) -> None:
    """Have clamd scan what it can't get through.

    Raises:
        EngineError: it calls that clean, or gives no answer.

    """
    descriptor = os.memfd_create("fdbroker-probe")
    try:
        os.write(descriptor, contents)
        session.submit(_PROBE, descriptor, len(contents))
        any_is_readable(session.filenos(), _SECONDS_FOR_A_PROBE)
        answers = session.answers()
    except SessionLostError as error:
        raise EngineError(f"clamd: {error.text}") from error
    finally:
        os.close(descriptor)
    if [answer.number for answer in answers] != [_PROBE]:
        raise EngineError("clamd: no answer for a probe")
    if isinstance(answers[0].verdict, Clean):
        raise EngineError(f"clamd says OK to {what} that it does not look into; in clamd.conf: {cure}")


def _deeply_nested() -> bytes:
    inner = b"text"
    for _ in range(_DEEPER_THAN_ANY_LIMIT):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(zipfile.ZipInfo("a"), inner)
        inner = file.getvalue()
    return inner


def _encrypted() -> bytes:
    """Return a zip archive with a member whose bytes can't be told from encrypted ones."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(zipfile.ZipInfo("a"), bytes(range(64)))
    data = bytearray(file.getvalue())
    # The flag of encryption, in the local header and in the directory.
    data[6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1
    return bytes(data)
