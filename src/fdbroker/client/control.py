"""The control socket: ask for status or explanations, hand over a policy, or a file for the audit.

    with fdbroker.client.control.connect() as control:
        print(control.explain("open", "/srv/file"))

Everybody may ask for explanations about themselves; the whole status is for
root and the policy's `admins`, another policy is taken from root alone.
"""

from __future__ import annotations

import errno
import json
import os
from typing import TYPE_CHECKING

from fdbroker.client.connection import Connection
from fdbroker.client.engine import AskStatus, AskWhy, BringFile, HandOver, sendable
from fdbroker.client.errors import (
    ReloadRefusedError,
    disconnected,
    error_in_its_words,
    error_of_reply,
    protocol_error,
)
from fdbroker.client.link import Call, ConnectionLost, Deadline, connect_socket, not_greeted
from fdbroker.wire.client import ExplainReply, ReloadReply, ReopenReply, StatusReply, for_broker
from fdbroker.wire.format import ACTIONS, HEADER, MAX_POLICY, PIECE, STATUS_PARTS, Reason
from fdbroker.wire.messages import ErrorReply

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from fdbroker.client.engine import Question, StrOrBytesPath
    from fdbroker.wire.client import Reply

__all__ = ["DEFAULT_CONTROL", "DEFAULT_TIMEOUT", "Control", "ReloadRefusedError", "connect"]

DEFAULT_CONTROL = "/run/fdbroker/control"
DEFAULT_TIMEOUT = 30.0


def connect(path: StrOrBytesPath = DEFAULT_CONTROL, *, timeout: float | None = DEFAULT_TIMEOUT) -> Control:
    """Connect to the control socket of a broker; the caller should close what is returned.

    Args:
        path: the control socket.
        timeout: seconds that connecting, and then each method, may take; None: no limit.

    Raises:
        UnavailableError: the socket is not there, nobody listens, or this user may not connect.
        BrokerTimeoutError: no welcome in time.
        BrokerError: the broker refused the connection, or is none.

    """
    deadline = Deadline.after(timeout)
    sock = connect_socket(os.fsencode(path), deadline)
    try:
        return Control(Connection.greet(sock, deadline), timeout)
    except ConnectionLost as lost:
        raise not_greeted(lost) from lost


class Control:
    """A connection to the control socket, made by `connect`. For one thread; nothing is repeated."""

    def __init__(self, connection: Connection, timeout: float | None) -> None:
        self._connection = connection
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
        """Close the connection."""
        self._connection.close()

    def status(self) -> dict[str, object]:
        """Return what the broker tells of itself: to root and `admins` all, to others about themselves.

        Keys may be added in later versions.

        Raises:
            BrokerError: it did not answer, or not by the protocol.

        """
        return self._ask_status(AskStatus(), Deadline.after(self._timeout))

    def rows(self, part: str) -> list[dict[str, object]]:
        """Return a list that the status has no room for: to root and `admins` alone.

        Args:
            part: `decisions` (how often which rule decided what, and why), `clients` (what each uid did) or
                `connections` (those that ask most often). docs/metrics.md has their members.

        Raises:
            ValueError: no such part.
            DeniedError: this process may not see it.
            BrokerError: the broker did not answer, or not by the protocol.

        """
        if part not in STATUS_PARTS.values():
            raise ValueError(f"{part!r} is no part: choose {', '.join(STATUS_PARTS.values())}")
        deadline = Deadline.after(self._timeout)
        found: list[dict[str, object]] = []
        while True:
            document = self._ask_status(AskStatus(part, len(found)), deadline)
            rows, following = document.get("rows"), document.get("next")
            if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
                raise protocol_error(f"no rows of {part}", 0)
            found += rows
            if following is None:
                return found
            if not rows or following != len(found):
                raise protocol_error(f"rows of {part} that do not follow each other", 0)

    def _ask_status(self, question: AskStatus, deadline: Deadline) -> dict[str, object]:
        reply = self._ask(question, deadline)
        if isinstance(reply, StatusReply):
            return _object(reply.document, reply.id)
        raise _unexpected(reply)

    def explain(self, action: str, path: StrOrBytesPath) -> dict[str, object]:
        """Return what the *name* of a path decides for this process; no file is looked at.

        Keys: `path`, `action`, `generation`, `allowed`, `reason` (`ok` or why not), `root`, `rule` (the
        one that allows or refuses, where it is one), `asked_of_object` (the names of rules that allow it if
        the file is as they say) and `denies` (of those that forbid it if the file is as they say).

        Args:
            action: `open`, `stat`, `list` or `walk`.
            path: as it would be asked for.

        Raises:
            ValueError: no such action; a path that can't be sent (PathInvalidError).
            BrokerError: it did not answer, or not by the protocol.

        """
        if action not in ACTIONS.values():
            raise ValueError(f"{action!r} is no action: choose {', '.join(ACTIONS.values())}")
        asked = sendable(path)
        reply = self._ask(AskWhy(action, asked), Deadline.after(self._timeout))
        if isinstance(reply, ExplainReply):
            return _object(reply.document, reply.id)
        raise _unexpected(reply, asked)

    def reload(self, compiled: bytes) -> int:
        """Hand over a compiled policy and return its generation: from now on the broker decides by it.

        What is only for the launcher (its member `daemon`) is left out: another user, other sockets or
        another place of the audit need a restart.

        Raises:
            ReloadRefusedError: the broker does not take it and goes on as before; `strerror` has the cure.
            DeniedError: this process is not root's.
            BrokenError: the broker could not record it, or failed; nothing changed.
            BrokerError: the connection failed: ask `status` which policy is in force.

        """
        text = _for_broker(compiled)
        if not 0 < len(text) <= MAX_POLICY:
            why = f"a compiled policy has 1 to {MAX_POLICY} bytes, not {len(text)}"
            raise ReloadRefusedError(errno.EINVAL, why, None, Reason.POLICY)
        deadline = Deadline.after(self._timeout)
        size = self._connection.welcome.max_frame - HEADER.size - PIECE.size
        for offset in range(0, len(text), size):
            end = min(offset + size, len(text))
            reply = self._ask(HandOver(offset, text[offset:end], more=end < len(text)), deadline)
            if not isinstance(reply, ReloadReply):
                raise _unexpected(reply)
            if (reply.received, reply.more) != (end, end < len(text)):
                raise protocol_error(f"{reply.received} bytes received of {end} sent", reply.id)
            if not reply.more:
                return reply.generation
        raise AssertionError("the last piece has no more to follow")

    def reopen_audit(self, descriptor: int) -> None:
        """Have the audit go on in an open file: once this returns, nothing more is written to the one before.

        Args:
            descriptor: the file, open for appending and nothing else; it stays the caller's. It is a regular
                file of root's, with one name, that nobody else can write.

        Raises:
            DeniedError: this process is not root's, or the file is not as it has to be: `strerror` says it.
            BrokenError: the audit does not go to a file, or the new one can't be written to.
            BrokerError: the connection failed: the last records of both files tell which one is in use.

        """
        deadline = Deadline.after(self._timeout)
        reply = self._ask(BringFile(comes=False), deadline)
        if isinstance(reply, ReopenReply) and not reply.taken:
            reply = self._ask(BringFile(comes=True), deadline, descriptor)
            if isinstance(reply, ReopenReply) and reply.taken:
                return
        if isinstance(reply, ErrorReply):
            raise error_in_its_words(reply)
        raise _unexpected(reply)

    def _ask(self, question: Question, deadline: Deadline, descriptor: int | None = None) -> Reply:
        call = Call(question)
        try:
            if descriptor is None:
                self._connection.send(call, deadline)
            else:
                self._connection.send_at_once(call, descriptor)
            while not call.answers:
                self._connection.wait(deadline)
        except ConnectionLost as lost:
            raise disconnected(f"the broker closed the connection: {lost}") from lost
        answer = call.answers.pop()
        answer.descriptors.close()
        return answer.reply


def _for_broker(compiled: bytes) -> bytes:
    """Return what of a compiled policy is the broker's. What is none is left for the broker to say so."""
    try:
        document = json.loads(compiled)
    except (ValueError, RecursionError):
        return compiled
    if not isinstance(document, dict) or "daemon" not in document:
        return compiled
    return json.dumps(for_broker(document)).encode()


def _object(text: bytes, request_id: int) -> dict[str, object]:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise protocol_error(f"an answer that is not JSON: {error}", request_id) from error
    if not isinstance(document, dict):
        raise protocol_error("an answer that is no JSON object", request_id)
    return document


def _unexpected(reply: Reply, path: bytes | None = None) -> Exception:
    """Return the exception for an answer that is no answer of the kind that was asked for."""
    if isinstance(reply, ErrorReply):
        return error_of_reply(reply, path)
    return protocol_error(f"a {type(reply).__name__} that nobody asked for", reply.id)
