"""What a client streams, kept in memory until it is whole, and sealed then."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from fdbroker.client.sealed import memory_file, seal_memory_file
from fdbroker.scan.verdict import Error, Reason

if TYPE_CHECKING:
    from fdbroker.scan.service.memory import Kept

_BUFFERED = 1 << 16  # bytes; what is shorter, or never comes, costs no descriptor before it is whole


class Stream:
    """The contents of one stream. Has an account of memory, which stays when it is `whole`."""

    def __init__(self, number: int, kept: Kept) -> None:
        self.number = number
        self.kept = kept
        self._buffer = bytearray()
        self._file: int | None = None
        self._failure: Error | None = None

    def add(self, data: bytes) -> None:
        """Keep what comes next."""
        if self._failure is None:
            self.kept.grow(len(data))
            self._buffer += data
            if len(self._buffer) > _BUFFERED:
                self._spill()

    def whole(self) -> int | Error:
        """Return a sealed file of all that came, which the caller owns, or why there is none."""
        self._spill()
        self.kept.end()
        if self._failure is not None:
            return self._failure
        file, self._file = self._file, None
        assert file is not None  # noqa: S101 - for the type checker
        try:
            seal_memory_file(file)
        except OSError as error:
            os.close(file)
            return _failed(error)
        return file

    def abandon(self) -> None:
        """Let go of it; it will never be whole."""
        self._drop()
        self.kept.let_go()

    def _spill(self) -> None:
        if self._failure is not None:
            return
        try:
            if self._file is None:
                self._file = memory_file()
            with memoryview(self._buffer) as left:
                at = 0
                while at < len(left):
                    at += os.write(self._file, left[at:])
        except OSError as error:
            self._failure = _failed(error)
            self._drop()
        self._buffer.clear()

    def _drop(self) -> None:
        self._buffer.clear()
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _failed(error: OSError) -> Error:
    return Error(Reason.READ_FAILED, f"what was streamed could not be kept: {error.strerror}")
