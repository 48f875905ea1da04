"""An engine with one thing wrong, which the check of engines must find."""

from __future__ import annotations

import os

from fdbroker.scan.engine import Needs
from fdbroker.scan.engines.hashes import Hashes
from fdbroker.scan.verdict import Clean, Error, Infected, Verdict


class Careless(Hashes):
    """`wrong` says what."""

    name = "careless"
    wrong = ""

    def needs(self) -> Needs:
        return Needs(profile="scratch") if self.wrong == "litter" else Needs()

    def scan(self, descriptor: int, size: int, scratch: bytes | None) -> Verdict:
        if self.wrong == "never loaded":
            return Clean()
        verdict = super().scan(descriptor, size, scratch)
        if isinstance(verdict, Error):
            return verdict
        if self.wrong == "offset" and not os.read(descriptor, 1):
            return Clean()
        if self.wrong == "closes":
            os.close(descriptor)
        elif self.wrong == "leaks":
            os.dup(descriptor)
        elif self.wrong == "blind":
            return Clean()
        elif self.wrong == "trigger-happy":
            return Infected("x")
        elif self.wrong == "text":
            return "clean"  # type: ignore[return-value]
        elif self.wrong == "litter" and scratch is not None:
            os.close(os.open(scratch + b"/left", os.O_CREAT | os.O_WRONLY, 0o600))
        return verdict
