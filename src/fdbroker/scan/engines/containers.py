"""What can be told from the first bytes of a file: that it is a container of a kind few engines look into."""

from __future__ import annotations

import os

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


def kind_of(descriptor: int) -> str | None:
    """Return the kind of container that the file begins like, None for none of `MAGIC`.

    Raises:
        OSError: it can't be read.

    """
    head = os.pread(descriptor, _LONGEST, 0)
    for kind, (offset, magic) in MAGIC.items():
        if head.startswith(magic, offset):
            return kind
    return None
