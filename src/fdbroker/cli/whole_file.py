"""Files that others see as they were before, or complete, and never half written."""

from __future__ import annotations

import contextlib
import os
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
    # In the same directory, to be renamed, and hidden from who looks for names like the other one. As that of
    # tempfile would be, which takes long to import.
    temporary = os.path.join(directory, f".{name}.{os.urandom(8).hex()}")
    descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
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
