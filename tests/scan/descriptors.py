"""Files to scan, and how many descriptors a process has open."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

# In two parts, so that no scanner finds it here.
EICAR = rb"X5O!P%@AP[4\PZX54(P^)7CC)7}$EICAR" + b"-STANDARD-ANTIVIRUS-TEST-FILE!$H+H*"
EICAR_NAME = "Eicar-Test-Signature"


def make_and_open(path: Path, contents: bytes = b"nothing bad") -> int:
    """Write a file and return a descriptor for reading, which the caller owns."""
    path.write_bytes(contents)
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def open_descriptors() -> list[str]:
    """Return the numbers of this process's open descriptors."""
    return sorted(os.listdir("/proc/self/fd"))


def lingering_socket(address: tuple[str, int]) -> socket.socket:
    """Return a socket whose bytes nobody reads: who closes it last waits for a minute."""
    lingering = socket.create_connection(address)
    lingering.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 60))
    lingering.settimeout(0)
    with contextlib.suppress(BlockingIOError):
        while True:
            lingering.send(bytes(1 << 16))
    return lingering
