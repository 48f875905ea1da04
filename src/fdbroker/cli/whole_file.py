"""Files that others see as they were before, or complete, and never half written."""

from __future__ import annotations

import contextlib
import os
import tempfile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO


@contextlib.contextmanager
def whole_file(path: str, mode: int) -> Iterator[BinaryIO]:
    """Give a file to write to; it takes the place of the one at `path` when the block ends without an error.

    Raises:
        OSError: that failed, and the old one is there as before.

    """
    directory, name = os.path.split(path)
    # In the same directory, to be renamed, and hidden from who looks for names like the other one.
    descriptor, temporary = tempfile.mkstemp(prefix=f".{name}.", dir=directory or ".")
    try:
        with open(descriptor, "wb") as file:
            os.fchmod(descriptor, mode)
            yield file
            file.flush()
            os.fsync(descriptor)
        os.rename(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    held = os.open(directory or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(held)
    finally:
        os.close(held)
