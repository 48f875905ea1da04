"""What can be told from the first bytes of a file: that it is a container of a kind few engines look into."""

from __future__ import annotations

import os
import re

# kind -> (offset, bytes); libclamav is given the same as signatures, for what is inside of others too.
MAGIC = {
    "rar": (0, b"Rar!\x1a\x07"),
    "zstd": (0, b"\x28\xb5\x2f\xfd"),
    "lz4": (0, b"\x04\x22\x4d\x18"),
    "lzip": (0, b"LZIP\x01"),
    "lzop": (0, b"\x89LZO\x00\r\n\x1a\n"),
    "compress": (0, b"\x1f\x9d\x90"),
    "ace": (7, b"**ACE**"),
    "zoo": (20, b"\xdc\xa7\xc4\xfd"),
    "wim": (0, b"MSWIM\0\0\0"),
    "squashfs": (0, b"hsqs"),
}
_LONGEST = 24
# All at once: the file is asked about before each scan.
_BEGINNING = re.compile(
    b"|".join(
        b"(?s:.{%d})(?P<%s>%s)" % (at, kind.encode(), re.escape(magic)) for kind, (at, magic) in MAGIC.items()
    )
)


def kind_of(descriptor: int) -> str | None:
    """Return the kind of container that the file begins like, None for none of `MAGIC`.

    Raises:
        OSError: it can't be read.

    """
    match = _BEGINNING.match(os.pread(descriptor, _LONGEST, 0))
    return match.lastgroup if match else None
