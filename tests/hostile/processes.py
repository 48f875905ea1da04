"""Which processes there are of a broker."""

from __future__ import annotations

from pathlib import Path


def children_of(pid: int) -> list[int]:
    """Return the processes that a process with one thread has forked."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
