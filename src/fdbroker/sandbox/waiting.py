"""Waiting for descriptors: channels, pidfds, pipes; at most so long."""

from __future__ import annotations

import math
import select
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


def is_readable(descriptor: int, timeout: float | None) -> bool:
    """Return whether there is something to read, or the end, within `timeout` seconds (None: for ever)."""
    return any_is_readable((descriptor,), timeout)


def any_is_readable(descriptors: Iterable[int], timeout: float | None) -> bool:
    """Return whether one of them is, as `is_readable`; of none it is the time to wait."""
    readable = select.poll()
    for descriptor in descriptors:
        readable.register(descriptor, select.POLLIN)
    return bool(readable.poll(None if timeout is None else math.ceil(max(0.0, timeout) * 1000)))
