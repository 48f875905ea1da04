"""The scratch directory of an engine, which each scan must find empty."""

from __future__ import annotations

import os

_PROBE = b"fdbroker-probe"


class Scratch:
    """A directory, and whether there is anything in it.

    It is looked at after each scan, and nearly always empty. On tmpfs the size of a directory grows with
    each entry, so that one stat(2) says so. Elsewhere it need not, which is tried once: then it is read.

    Raises:
        OSError: nothing can be made in it, or removed from it.

    """

    def __init__(self, path: bytes) -> None:
        self.path = path
        _empty(path)
        size = os.stat(path).st_size
        probe = os.path.join(path, _PROBE)
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        larger = os.stat(path).st_size
        os.unlink(probe)
        self._size_if_empty = size if larger > size == os.stat(path).st_size else None

    def clear(self) -> None:
        """Remove what there is.

        Raises:
            OSError: something can't be removed.

        """
        if self._size_if_empty is None or os.stat(self.path).st_size != self._size_if_empty:
            _empty(self.path)


def _empty(directory: bytes) -> None:
    for name in os.listdir(directory):
        path = os.path.join(directory, name)
        if os.path.isdir(path) and not os.path.islink(path):
            _empty(path)
            os.rmdir(path)
        else:
            os.unlink(path)
