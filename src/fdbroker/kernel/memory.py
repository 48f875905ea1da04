"""Memory of this process."""

from __future__ import annotations

import ctypes

from fdbroker.kernel.libc import LIBC


def release_free_memory() -> None:
    """Give back what malloc holds and nobody uses (malloc_trim(3), glibc; nothing elsewhere).

    What compiling the sources leaves behind is a tenth of the process.
    """
    trim = getattr(LIBC, "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))
