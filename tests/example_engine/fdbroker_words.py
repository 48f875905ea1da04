"""An example of an engine for fdbroker: it finds files that have one of some words in them."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence  # noqa: TC003 - short, for whoever copies it
from dataclasses import dataclass

from fdbroker.scan.engine import MEBIBYTE, EngineError, Inside, Needs
from fdbroker.scan.options import Bytes  # noqa: TC001 - read when the options are
from fdbroker.scan.verdict import Clean, Error, Reason, Verdict, found


@dataclass(frozen=True)
class WordsOptions:
    """`list`: a file with a word in each line. `max_file_size`: larger files are errors."""

    list: bytes
    max_file_size: Bytes = 16 * MEBIBYTE


class Words(Inside):
    """Finds words."""

    name = "words"
    options_type = WordsOptions
    options: WordsOptions

    def __init__(self, options: WordsOptions) -> None:
        super().__init__(options)
        self._words: Sequence[bytes] = ()
        self._pattern: re.Pattern[bytes] | None = None

    def needs(self) -> Needs:
        """Return that a file, and a part of it that matched, must fit into memory."""
        return Needs(memory=2 * self.options.max_file_size + 64 * MEBIBYTE)

    def databases(self) -> Sequence[bytes]:
        """Return the list."""
        return (self.options.list,)

    def warm(self) -> None:
        """Read the list: nothing can be opened later."""
        try:
            with open(self.options.list, "rb") as file:
                self._words = file.read().split()
        except OSError as error:
            raise EngineError(f"words: {os.fsdecode(self.options.list)}: {error.strerror}") from error
        if not self._words:
            raise EngineError(f"words: {os.fsdecode(self.options.list)}: there is no word in it")
        self._pattern = re.compile(b"|".join(map(re.escape, self._words)))

    def version(self) -> str:
        """Return how many words it knows."""
        return f"words 1.0, {len(self._words)} words"

    def scan(self, descriptor: int, size: int, scratch: bytes | None) -> Verdict:
        """Read the whole file, by position, and look for the words."""
        if self._pattern is None:
            return Error(Reason.NOT_LOADED, "words: the list was not read")
        if size > self.options.max_file_size:
            return Error(Reason.TOO_LARGE, f"{size} bytes are more than max_file_size")
        contents = b""
        while len(contents) < size and (chunk := os.pread(descriptor, size - len(contents), len(contents))):
            contents += chunk
        if len(contents) < size:
            return Error(Reason.SHORT_READ, f"only {len(contents)} of {size} bytes could be read")
        names = [word.decode("utf-8", "replace") for word in self._pattern.findall(contents)]
        return found(names) if names else Clean()
