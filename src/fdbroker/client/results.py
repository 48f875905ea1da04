"""What the client gives: one object per path, which owns what it holds."""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING, Generic, TypeVar

from fdbroker.wire.messages import FileStat

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator
    from types import TracebackType
    from typing import Self

    from fdbroker.client.engine import StrOrBytesPath
    from fdbroker.client.errors import BrokerError
    from fdbroker.wire.messages import WalkEntry

_Result = TypeVar("_Result")


def file_from(descriptor: int, path: StrOrBytesPath) -> io.BufferedReader:
    """Return a binary file object that owns `descriptor`, with `path` as its name.

    The descriptor is closed if that fails.
    """
    try:
        # Not by open(), which would ask whether it is a terminal.
        raw = io.FileIO(descriptor)
    except BaseException:
        os.close(descriptor)
        raise
    raw.name = os.fspath(path)
    return io.BufferedReader(raw)


class OpenedFile:
    """What became of one path of `open_many`: a file, or the error that says why not.

    It owns its descriptor until `file` or `detach` hands it over; `close`, the
    end of a `with` block and the end of the object's life close it. What
    `file` returned is closed by `close` and by the `with` block as well, but
    not when the object dies: it may be in use.
    """

    __slots__ = ("_descriptor", "_file", "error", "path")

    def __init__(self, path: StrOrBytesPath, descriptor: int = -1, error: BrokerError | None = None) -> None:
        # As the caller wrote it.
        self.path = path
        # None: the file was given.
        self.error = error
        self._descriptor = descriptor
        self._file: io.BufferedReader | None = None

    def __repr__(self) -> str:
        """Return the path and what became of it."""
        state = "closed or taken"
        if self.error is not None:
            state = f"error={self.error!r}"
        elif self._file is not None:
            state = f"file={self._file!r}"
        elif self._descriptor >= 0:
            state = f"descriptor={self._descriptor}"
        return f"<OpenedFile {self.path!r} {state}>"

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close what is left."""
        descriptor = self._descriptor
        if descriptor >= 0:  # the short way: then there is no file object
            self._descriptor = -1
            os.close(descriptor)
        else:
            self.close()

    def __del__(self) -> None:
        """Close the descriptor if nobody took it."""
        if self._descriptor >= 0:
            self._close_descriptor()

    @property
    def file(self) -> io.BufferedReader:
        """A binary file object, the same each time. It owns the descriptor; close it, or this object.

        Raises:
            BrokerError: `error`, if the file was not given.
            ValueError: it was closed or detached.

        """
        if self._file is None:
            self._file = file_from(self.detach(), self.path)
        return self._file

    @property
    def descriptor(self) -> int:
        """The descriptor's number; the ownership stays here. Raises as `file` does."""
        if self._descriptor >= 0:
            return self._descriptor
        if self._file is not None:
            return self._file.fileno()
        self._check()
        return self._descriptor

    def detach(self) -> int:
        """Give the descriptor to the caller, who has to close it. Raises as `file` does.

        Raises:
            ValueError: `file` has it already, or it was closed or detached.

        """
        descriptor = self._descriptor
        if descriptor < 0:
            if self._file is not None:
                raise ValueError(f"a file object has the descriptor of {self.path!r} already")
            self._check()
        self._descriptor = -1
        return descriptor

    def close(self) -> None:
        """Close the descriptor and the file object made of it. May be called again."""
        if self._file is not None:
            self._file.close()
        self._close_descriptor()

    def _check(self) -> None:
        if self.error is not None:
            raise self.error
        if self._descriptor < 0:
            raise ValueError(f"{self.path!r} was closed or detached")

    def _close_descriptor(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


class WalkedFile(OpenedFile):
    """What a walk met: where, what it is, and (if the walk opens files and may open this one) the file.

    Otherwise as `OpenedFile`; what came without its descriptor raises ValueError where one is wanted.
    """

    __slots__ = ("_record", "is_open", "kind", "relative")

    def __init__(
        self, path: str | bytes, relative: str | bytes, entry: WalkEntry, descriptor: int = -1
    ) -> None:
        super().__init__(path, descriptor)
        # Below the walk's start, as text or bytes like the start.
        self.relative = relative
        # d_type of readdir(3): 4 directory, 8 regular, 10 symbolic link, ...
        self.kind = entry.kind
        self._record = entry.record
        # Whether it came with its descriptor.
        self.is_open = descriptor >= 0

    @property
    def stat(self) -> FileStat:
        """What it is, as of when it was met."""
        return FileStat.decode(self._record)

    def __repr__(self) -> str:
        """Return the path and what became of it."""
        if not self.is_open:
            return f"<WalkedFile {self.path!r} kind={self.kind}>"
        return super().__repr__().replace("OpenedFile", "WalkedFile", 1)

    def _check(self) -> None:
        if not self.is_open:
            raise ValueError(f"{self.path!r} came without its descriptor")
        super()._check()


class ReadFile:
    """What became of one path of `read_many`: all that is in the file, or the error that says why not."""

    __slots__ = ("_content", "error", "path")

    def __init__(
        self, path: StrOrBytesPath, content: bytes | None = None, error: OSError | None = None
    ) -> None:
        # As the caller wrote it.
        self.path = path
        # None: it was read. Mostly a BrokerError; another OSError where reading what was opened failed.
        self.error = error
        self._content = content

    def __repr__(self) -> str:
        """Return the path and what became of it."""
        state = f"error={self.error!r}" if self._content is None else f"{len(self._content)} bytes"
        return f"<ReadFile {self.path!r} {state}>"

    @property
    def content(self) -> bytes:
        """The bytes of the file.

        Raises:
            OSError: `error`, if it was not read.

        """
        if self._content is None:
            raise self.error or ValueError(f"{self.path!r} was not read")
        return self._content


class DescribedFile:
    """What became of one path of `stat_many`: its stat record, or the error that says why not."""

    __slots__ = ("_stat", "error", "path")

    def __init__(
        self, path: StrOrBytesPath, stat: FileStat | None = None, error: BrokerError | None = None
    ) -> None:
        # As the caller wrote it.
        self.path = path
        # None: it was described.
        self.error = error
        self._stat = stat

    def __repr__(self) -> str:
        """Return the path and what became of it."""
        return f"<DescribedFile {self.path!r} {self.error or self._stat!r}>"

    @property
    def stat(self) -> FileStat:
        """The stat record.

        Raises:
            BrokerError: `error`, if it was not given.

        """
        if self._stat is None:
            raise self.error or ValueError(f"{self.path!r} was not described")
        return self._stat


class Results(Generic[_Result]):
    """Results one after the other, in the order of the paths; an iterator that should be closed.

    `close` (or the end of a `with` block, or of the iterator's life) closes
    the descriptors that were not delivered. Delivered ones belong to their
    results. To be used by one thread at a time.
    """

    def __init__(self, steps: Generator[_Result, None, None]) -> None:
        self._steps = steps

    def __iter__(self) -> Iterator[_Result]:
        """Return what a loop asks: the same results, without a call of `__next__` for each."""
        return self._steps

    def __next__(self) -> _Result:
        """Return the next result.

        Raises:
            BrokerError: the request as a whole failed. Then there are no more.

        """
        return next(self._steps)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """End it: nothing more is asked for, and what was not delivered is closed."""
        self._steps.close()
