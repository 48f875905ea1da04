"""The user ids of this process of the tests, which no other process of tests on this machine has meanwhile.

The kernel counts the descriptors under way and the processes of a uid, whoever
they belong to: two brokers of one uid would take room from each other. So each
process that runs tests (a worker of pytest-xdist, a second run beside the
first) has a block of ids for itself.
"""

from __future__ import annotations

import re
import socket

_FIRST, _SIZE, _BLOCKS = 23400, 100, 64


def _take_block() -> tuple[int, socket.socket]:
    """Return the first id of the first free block, and the socket whose abstract name says that it is taken.

    The name is free again when no process has the socket: forked children that
    are left of a test keep the block as well.
    """
    taken = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    for first in range(_FIRST, _FIRST + _SIZE * _BLOCKS, _SIZE):
        try:
            taken.bind(f"\0fdbroker-tests-{first}")
        except OSError:
            continue
        return first, taken
    raise RuntimeError(f"{_BLOCKS} processes run tests of fdbroker already")


FIRST_UID, _TAKEN = _take_block()


def with_uids_of_first_block(text: str) -> str:
    """Return `text` with the uids of this process as those of whoever takes the first block."""

    def moved(digits: re.Match[str]) -> str:
        number = int(digits[0]) - FIRST_UID
        return str(_FIRST + number) if 0 <= number < _SIZE else digits[0]

    return re.sub(r"\d{5,6}", moved, text)
