"""What can be asked about files: by a client for itself, and by a service for one of its clients."""

from __future__ import annotations

import errno
import os
import time
from typing import TYPE_CHECKING

from fdbroker.client.answers import (
    Contents,
    check_many,
    content_of,
    described,
    descriptor_of,
    opened,
    page_of,
    stat_of,
)
from fdbroker.client.engine import DEFAULT_BATCH, DEFAULT_WALK_BATCH, ListPage, OpenPaths, StatPaths, sendable
from fdbroker.client.errors import ReadOnlyError
from fdbroker.client.requester import Requester
from fdbroker.client.results import Results, file_from
from fdbroker.client.sealed import SEAL_LIMIT, seal
from fdbroker.client.session import Session
from fdbroker.client.walk import Walk
from fdbroker.client.walk_call import WalkCall, walk_filter
from fdbroker.wire.format import MAX_PATHS, WalkKind

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator
    from io import BufferedReader

    from fdbroker.client.engine import Answer, Batch, StrOrBytesPath
    from fdbroker.client.results import DescribedFile, OpenedFile, ReadFile
    from fdbroker.wire.client import ListReply
    from fdbroker.wire.messages import FileStat, ListEntry

# What may be asked for besides reading, since it changes nothing here.
_HARMLESS_FLAGS = os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK | os.O_NOFOLLOW | getattr(os, "O_LARGEFILE", 0)


def check_flags(path: StrOrBytesPath, flags: int) -> None:
    """Raise ReadOnlyError if `flags` of open(2) ask for anything but reading."""
    if flags & ~_HARMLESS_FLAGS:
        text = "the broker opens files for reading only; use mode 'r' or 'rb'"
        raise ReadOnlyError(errno.EACCES, text, os.fsencode(path))


class FileRequests(Requester[Session]):
    """Requests about files. Base of `Client` and `ServedClient`."""

    def open(
        self, path: StrOrBytesPath, *, sealed: bool = False, max_size: int = SEAL_LIMIT
    ) -> BufferedReader:
        """Return the file as a binary file object, like `open(path, "rb")`. The caller closes it.

        Paths are absolute and name what the *broker* sees under them.

        Args:
            path: the file.
            sealed: return a copy of it in the memory of this process, which nobody can change any more, as
                it was at one moment (`fdbroker.client.sealed`). Its time is the client's time-out.
            max_size: most bytes that such a copy may have.

        Raises:
            DeniedError: a PermissionError: the policy does not allow it.
            MissingError: a FileNotFoundError: allowed, and not there.
            NotDirectoryError, DirectoryError: as NotADirectoryError, IsADirectoryError.
            PathInvalidError: a ValueError too: relative, a NUL, `..` and the like.
            BusyError, LimitError: a BlockingIOError: try again.
            ChangedError: likewise: it changed while it was copied.
            FileTooLargeError: it is larger than its copy may be.
            FileTimeoutError: a TimeoutError: its file system did not answer, or copying took too long.
            BrokerTimeoutError: a TimeoutError: the broker did not answer.
            UnavailableError, DisconnectedError, ProtocolError: a ConnectionError: not about the file at all.
            BrokerError: any other reason; and the base of all of these.

        """
        if not sealed:
            return file_from(self.open_descriptor(path), path)
        timeout = self._session.timeout
        deadline = None if timeout is None else time.monotonic() + timeout
        descriptor = self.open_descriptor(path)
        try:
            copy = seal(descriptor, max_size, deadline, os.fsencode(path))
        finally:
            os.close(descriptor)
        return file_from(copy, path)

    def open_descriptor(self, path: StrOrBytesPath) -> int:
        """Return the file as a descriptor, which the caller has to close. Raises as `open` does."""
        asked = sendable(path)
        return descriptor_of(self._session.ask(OpenPaths([asked], self._acting_for), self._bound), asked)

    def read_bytes(self, path: StrOrBytesPath) -> bytes:
        """Return all that is in the file, as `pathlib.Path.read_bytes`; for files that fit into memory.

        A small one comes with the answer, where the policy delivers copies;
        then it is as the file was at one moment.

        Raises:
            OSError: reading failed. Otherwise as `open`.

        """
        asked = sendable(path)
        answer = self._session.ask(OpenPaths([asked], self._acting_for, copy=True), self._bound)
        return content_of(answer, asked)

    def opener(self, path: StrOrBytesPath, flags: int) -> int:
        """Open for the built-in: `open(path, "rb", opener=client.opener)`, text modes as well.

        Returns a descriptor, which the caller (that is, `open`) owns.

        Raises:
            ReadOnlyError: a PermissionError: a mode that writes, creates or truncates.
            BrokerError: as `open`.

        """
        check_flags(path, flags)
        return self.open_descriptor(path)

    def open_many(self, paths: Iterable[StrOrBytesPath], batch: int = DEFAULT_BATCH) -> Results[OpenedFile]:
        """Open many files with few messages; one result per path, in order, each a file or its error.

            with client.open_many(paths) as results:
                for result in results:
                    if result.error is None:
                        with result.file as file: ...

        A path that is refused does not stop the others. `paths` is read as
        needed, up to two batches ahead of what was delivered; at any time at
        most two batches of descriptors are under way or wait to be delivered.
        Close the iterator if you leave it early (`with` does).

        Args:
            paths: absolute paths; what can't be sent gets its error, too.
            batch: paths per message, 1 to 253; the broker's limits may make it less.

        Raises:
            TypeError: a single path instead of many.
            ValueError: `batch` is out of range.
            BrokerError: when iterated: there is no more to come (BrokerTimeoutError, UnavailableError,
                DisconnectedError, ProtocolError, TooManyFilesError). What was received was delivered before.

        """
        check_many(paths, batch)
        return Results(self._session.ask_many(paths, batch, self._open_paths, opened, self._bound))

    def read_many(self, paths: Iterable[StrOrBytesPath], batch: int = DEFAULT_BATCH) -> Results[ReadFile]:
        """Read many files, each as `read_bytes` does; otherwise as `open_many`.

        Files that come as descriptors are read when it is their turn. With files that fit into a reply
        (32 KiB) together this is the cheapest way to read them.
        """
        check_many(paths, batch)
        return Results(self._session.ask_many(paths, batch, self._read_paths, self._read_all_of, self._bound))

    def stat(self, path: StrOrBytesPath) -> FileStat:
        """Return the stat record of any kind of file; a symbolic link's own. Raises as `open` does."""
        asked = sendable(path)
        return stat_of(self._session.ask(StatPaths([asked], self._acting_for), self._bound), asked)

    def stat_many(self, paths: Iterable[StrOrBytesPath], batch: int = MAX_PATHS) -> Results[DescribedFile]:
        """Describe many files with few messages; otherwise as `open_many`."""
        check_many(paths, batch)
        return Results(self._session.ask_many(paths, batch, self._stat_paths, described, self._bound))

    def walk(  # noqa: PLR0913 - each filter is one
        self,
        path: StrOrBytesPath,
        *,
        globs: Iterable[str | bytes] = (),
        kinds: WalkKind = WalkKind.REGULAR,
        least_size: int = 0,
        most_size: int | None = None,
        newer_than: int | None = None,
        descriptors: bool = True,
        batch: int = DEFAULT_WALK_BATCH,
        ahead: int = 2,
    ) -> Walk:
        """Go through everything below a directory, as the broker meets it, and open its regular files.

            with client.walk("/srv") as walk:
                for entry in walk:
                    with entry, entry.file as file: ...
            if walk.end.incomplete: ...

        Filters say what is named, not where the walk goes. Other requests
        may be made between two entries. If the connection is lost, the walk
        goes on on another one behind the entry that was delivered last.

        Args:
            path: an absolute path; symbolic links below it are named, if wanted, and never followed.
            globs: of the path below `path`, as in a policy; where there are some, one must match.
            kinds: what to name.
            least_size: only regular files of at least so many bytes.
            most_size: only regular files of at most so many bytes; None: any.
            newer_than: only what was modified later than this, in nanoseconds since 1970; None: any time.
            descriptors: open regular files, where the policy allows it.
            batch: entries per message, 1 to 253.
            ahead: messages that may wait for their turn here: so many batches of descriptors at most.

        Raises:
            TypeError, ValueError: an argument is impossible.
            BrokerError: when iterated: the walk was refused, or fails; as `open`.
            WalkInterrupted: when iterated: it was cut off and can't go on.

        """
        asked = walk_filter(globs, kinds, least_size, most_size, newer_than)
        call = WalkCall(
            path,
            asked,
            descriptors=descriptors,
            batch=batch,
            ahead=ahead,
            acting_for=self._acting_for,
            bound=self._bound,
        )
        return Walk(self._session, call)

    # The name hides the built-in one in annotations of this class: no `list[...]` in them.
    def list(self, path: StrOrBytesPath, *, page: int = 0) -> Iterator[ListEntry]:
        """Return the entries of a directory that the policy lets this client see, in no order.

        The first page is fetched at once, so that a refusal is raised here; the
        others as the iterator gets there. Names that come or go meanwhile may
        be seen or not, as with readdir(3).

        Args:
            path: an absolute path.
            page: most entries to fetch at a time, up to 1,024; 0: as the broker likes.

        Raises:
            ValueError: `page` is out of range.
            NotDirectoryError: it is no directory.
            BrokerError: as `open`; from the iterator as well.

        """
        asked = sendable(path)
        return self._entries(asked, self._page(asked, 0, page), page)

    def _entries(self, path: bytes, first: ListReply, most: int) -> Generator[ListEntry, None, None]:
        reply = first
        yield from reply.entries
        while not reply.last:
            reply = self._page(path, reply.cookie, most)
            yield from reply.entries

    def _page(self, path: bytes, cookie: int, most: int) -> ListReply:
        question = ListPage(path, cookie, most, self._acting_for)
        return page_of(self._session.ask(question, self._bound), path)

    def _read_all_of(self, asked: Batch, answer: Answer | None) -> Generator[ReadFile, None, None]:
        with Contents(asked) as contents:
            if answer is not None:
                contents.take(answer)
            while paths := contents.missing():
                contents.take(self._session.ask(OpenPaths(paths, self._acting_for, copy=True), self._bound))
            yield from contents.results()
