"""What a scan says of a file.

`Clean` needs the explicit answer of an engine that was given the whole file.
Everything else that is not `Infected` is an `Error`, and an error is never
shown or counted as clean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Clean:
    """The engine read the whole file and knows nothing against it."""

    verdict: Literal["clean"] = "clean"


@dataclass(frozen=True)
class Infected:
    """The engine found what is called `name`."""

    name: str
    verdict: Literal["infected"] = "infected"


@dataclass(frozen=True)
class Error:
    """Nobody knows. `reason` is a code (see docs/scan.md), `text` a sentence for people."""

    reason: str
    text: str
    verdict: Literal["error"] = "error"


Verdict = Clean | Infected | Error

# Reasons that arise in the scan; a file that the broker did not give has the broker's reason.
NOT_REGULAR = "not_regular"
READ_FAILED = "read_failed"
SHORT_READ = "short_read"
CHANGED = "changed"
TIMEOUT = "timeout"
WORKER_DIED = "worker_died"
WORKER_PROTOCOL = "worker_protocol"
NO_WORKER = "no_worker"
