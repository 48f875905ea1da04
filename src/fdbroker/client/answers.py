"""What the answers mean to a caller: results for each path, errors, documents. No I/O but reading files."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

from fdbroker.client.engine import Limits
from fdbroker.client.errors import error_of_reply, error_of_result, error_of_serving, protocol_error
from fdbroker.client.results import DescribedFile, OpenedFile, ReadFile
from fdbroker.kernel.descriptors import Descriptors
from fdbroker.wire.client import ListReply, OpenReply, ServeReply, StatReply, StatusReply
from fdbroker.wire.format import MAX_PATHS, Reason, Status
from fdbroker.wire.messages import GIVEN, ErrorReply

if TYPE_CHECKING:
    from collections.abc import Generator
    from types import TracebackType
    from typing import Self

    from fdbroker.client.engine import Answer, Batch, StrOrBytesPath
    from fdbroker.client.errors import BrokerError
    from fdbroker.wire.messages import FileStat, Welcome

_READ_SIZE = 1 << 16  # bytes; small enough not to cost a page fault for each small file


def check_many(paths: object, batch: int) -> None:
    """Check the arguments of a request for many paths.

    Raises:
        TypeError: a single path.
        ValueError: an impossible batch.

    """
    if isinstance(paths, str | bytes):
        raise TypeError(f"many paths are wanted, not one: {paths!r}")
    if not 1 <= batch <= MAX_PATHS:
        raise ValueError(f"a batch has 1 to {MAX_PATHS} paths, not {batch}")


def limits_of(said: Welcome) -> Limits:
    """Return what one request may hold, so that all of its descriptors may be under way."""
    return Limits(max(1, min(said.max_paths, said.in_flight)), said.max_frame)


def error_of(answer: Answer, at: int, path: bytes) -> BrokerError:
    """Return the exception for what was not given: the whole request's, or that of its result `at`."""
    reply = answer.reply
    if isinstance(reply, ErrorReply):
        return error_of_reply(reply, path)
    if isinstance(reply, StatReply):
        result = reply.results[at][0]
    elif isinstance(reply, ListReply):
        result = reply.result
    else:
        assert isinstance(reply, OpenReply)  # noqa: S101 - for the type checker; the engine matched it
        result = reply.results[at]
    return error_of_result(result, path, answer.id)


def descriptor_of(answer: Answer, path: bytes) -> int:
    """Return the descriptor of the one path that was asked for; the caller owns it.

    Raises:
        BrokerError: there is none.

    """
    if answer.descriptors:  # one for each that is given, and one was asked for
        return answer.descriptors.take()
    raise error_of(answer, 0, path)


def content_of(answer: Answer, path: bytes) -> bytes:
    """Return all that is in the one file that was asked for, as a copy or to be read.

    Raises:
        BrokerError: it was not given.
        OSError: reading failed.

    """
    if isinstance(answer.reply, OpenReply) and answer.reply.copies:
        return answer.reply.copies[0]
    return read_all(descriptor_of(answer, path))


def read_all(descriptor: int) -> bytes:
    """Return what is in a file from where it stands to its end; the descriptor is closed."""
    try:
        parts = []
        while data := os.read(descriptor, _READ_SIZE):
            parts.append(data)
        return b"".join(parts)
    finally:
        os.close(descriptor)


def stat_of(answer: Answer, path: bytes) -> FileStat:
    """Return the stat record of the one path that was asked for, or raise BrokerError."""
    if isinstance(answer.reply, StatReply):
        facts = answer.reply.results[0][1]
        if facts is not None:
            return facts
    raise error_of(answer, 0, path)


def page_of(answer: Answer, path: bytes) -> ListReply:
    """Return a page of a directory, or raise BrokerError."""
    if isinstance(answer.reply, ListReply) and answer.reply.result is GIVEN:
        return answer.reply
    raise error_of(answer, 0, path)


def status_of(answer: Answer) -> dict[str, object]:
    """Return the document of a status, or raise BrokerError."""
    reply = answer.reply
    if isinstance(reply, ErrorReply):
        raise error_of_reply(reply)
    try:
        document = json.loads(reply.document) if isinstance(reply, StatusReply) else None
    except (ValueError, RecursionError) as error:
        raise protocol_error(f"a status that is not JSON: {error}", reply.id) from error
    if not isinstance(document, dict):
        raise protocol_error("a status that is no JSON object", reply.id)
    return document


def check_served(answer: Answer, listener: bytes) -> None:
    """Raise BrokerError unless the clients of a listener will be handed over."""
    reply = answer.reply
    if isinstance(reply, ErrorReply):
        raise error_of_reply(reply, listener)
    assert isinstance(reply, ServeReply)  # noqa: S101 - the engine matched it
    if reply.result is not GIVEN:
        raise error_of_serving(reply.result, listener, answer.id)


def opened(asked: Batch, answer: Answer | None) -> Generator[OpenedFile, None, None]:
    """Yield what became of each path of a batch; None: none of them could be sent."""
    if answer is not None and len(answer.descriptors) == len(asked.given):
        # As it mostly is: all were given.
        take = answer.descriptors.take
        for given in asked.given:
            yield OpenedFile(given, take())
        return
    reply = None if answer is None else answer.reply
    results = reply.results if isinstance(reply, OpenReply) else None
    at = 0
    for place, given in enumerate(asked.given):
        if answer is None or place in asked.errors:
            yield OpenedFile(given, error=asked.errors[place])
            continue
        if results is not None and results[at] is GIVEN:
            yield OpenedFile(given, answer.descriptors.take())
        else:
            yield OpenedFile(given, error=error_of(answer, at, asked.paths[at]))
        at += 1


def described(asked: Batch, answer: Answer | None) -> Generator[DescribedFile, None, None]:
    """Yield what became of each path of a batch; None: none of them could be sent."""
    reply = None if answer is None else answer.reply
    results = reply.results if isinstance(reply, StatReply) else None
    at = 0
    for place, given in enumerate(asked.given):
        if answer is None or place in asked.errors:
            yield DescribedFile(given, error=asked.errors[place])
            continue
        facts = None if results is None else results[at][1]
        error = None if facts is not None else error_of(answer, at, asked.paths[at])
        yield DescribedFile(given, facts, error)
        at += 1


class Contents:
    """What is in the files of one batch; owns the descriptors of those that are still to be read.

    A reply has room for so many copies: what it had none for is asked for
    again, see `missing`.
    """

    def __init__(self, asked: Batch) -> None:
        self._asked = asked
        # In the order of the paths that are sent: a copy, a descriptor with its owner, or an error.
        self._found: list[bytes | Descriptors | BrokerError | None] = [None] * len(asked.paths)
        # Places there.
        self._wanted = list(range(len(asked.paths)))
        # How many to ask for at once: in the end twice what there was room for.
        self._room = len(asked.paths)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close what was not read."""
        self.close()

    def close(self) -> None:
        """Close what was not read."""
        for found in self._found:
            if isinstance(found, Descriptors):
                found.close()

    def missing(self) -> list[bytes]:
        """Return the paths to ask for next; none: all is there."""
        return [self._asked.paths[place] for place in self._wanted[: self._room]]

    def take(self, answer: Answer) -> None:
        """Take the answer to what was `missing`."""
        places, rest = self._wanted[: self._room], self._wanted[self._room :]
        reply = answer.reply
        copies = reply.copies if isinstance(reply, OpenReply) else ()
        waiting = iter(copies)
        again = []
        for at, place in enumerate(places):
            result = reply.results[at] if isinstance(reply, OpenReply) else None
            if result is GIVEN:
                self._found[place] = Descriptors([answer.descriptors.take()])
            elif result is not None and result.status is Status.COPIED:
                self._found[place] = next(waiting)
            elif result is not None and result.reason is Reason.LIMIT and result.limit is None and copies:
                again.append(place)  # there was no room for it beside the others
            else:
                self._found[place] = error_of(answer, at, self._asked.paths[place])
        self._wanted = again + rest
        if again:
            self._room = 2 * len(copies)

    def results(self) -> Generator[ReadFile, None, None]:
        """Yield what became of each path of the batch, once nothing is `missing`; files are read here."""
        with self:
            sent = iter(self._found)
            for place, given in enumerate(self._asked.given):
                found = self._asked.errors[place] if place in self._asked.errors else next(sent)
                if isinstance(found, bytes):
                    yield ReadFile(given, found)
                elif isinstance(found, Descriptors):
                    yield _read(given, found.take())
                else:
                    yield ReadFile(given, error=found)


def _read(given: StrOrBytesPath, descriptor: int) -> ReadFile:
    try:
        return ReadFile(given, read_all(descriptor))
    except OSError as error:
        return ReadFile(given, error=error)
