"""Reading whole files by position, for engines: the offset is shared with others."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from fdbroker.scan.verdict import Error, Reason

if TYPE_CHECKING:
    from collections.abc import Iterator

_CHUNK = 128 * 1024


def chunks(descriptor: int, size: int) -> Iterator[bytes]:
    """Yield the file from its beginning, and one byte more than `size` if there are more.

    So growth shows, and a file that goes on growing is not read for ever. `wrong_size` says what it means.

    Raises:
        OSError: it can't be read.

    """
    read = 0
    while read <= size and (chunk := os.pread(descriptor, min(_CHUNK, size - read + 1), read)):
        read += len(chunk)
        yield chunk


def wrong_size(read: int, size: int) -> Error | None:
    """Return the verdict on a file of which `chunks` gave so many bytes, None if that are `size`."""
    if read > size:
        return Error(Reason.CHANGED, f"the file has more than its {size} bytes")
    if read < size:
        return Error(Reason.SHORT_READ, f"only {read} of {size} bytes could be read")
    return None
