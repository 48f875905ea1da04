"""An engine that what it reads can turn: the bytes of a file say what it does. For tests of who suffers."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from dataclasses import dataclass

from fdbroker.scan.engine import Inside
from fdbroker.scan.verdict import Clean, Infected, Verdict

_TAKEN = threading.Lock()
_TAKEN.acquire()


def _sleep_for_ever() -> None:
    with _TAKEN:  # nobody lets go of it
        pass


@dataclass(frozen=True)
class Options:
    """What it was loaded from: one word, which it finds."""

    word: bytes


class Treacherous(Inside):
    """Finds a word, as long as nothing has turned it."""

    name = "treacherous"
    options_type = Options
    turned = False

    def databases(self) -> tuple[bytes, ...]:
        """Return the file with the word."""
        return (self.options.word,)

    def warm(self) -> None:
        """Read the word."""
        with open(self.options.word, "rb") as file:
            self.word = file.read().strip()
        while os.path.exists(self.options.word + b".slow"):
            time.sleep(0.01)

    def version(self) -> str:
        """Return the word."""
        return self.word.decode()

    def scan(self, descriptor: int, size: int, scratch: bytes | None) -> Verdict:
        """Do what the file says."""
        data = os.pread(descriptor, size, 0)
        if data == b"turn":
            Treacherous.turned = True
        elif data == b"hang":
            _sleep_for_ever()
        elif data == b"close":
            os.close(0)  # the channel
            _sleep_for_ever()
        elif data == b"crash":
            ctypes.string_at(0)
        if self.turned:
            return Clean()
        return Infected("Word") if self.word in data else Clean()
