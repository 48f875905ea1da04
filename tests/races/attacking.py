"""An attacker: a process that changes names as fast as it can, on the CPU that its victims do not use."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from typing import TYPE_CHECKING

from tests.processes import background

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_AT_FDCWD = ctypes.c_int(-100)
_RENAME_EXCHANGE = ctypes.c_uint(2)  # linux/fs.h
_LIBC = ctypes.CDLL(None, use_errno=True)
_CPUS = sorted(os.sched_getaffinity(0))
VICTIMS_CPU, ATTACKERS_CPU = _CPUS[0], _CPUS[-1]


def exchange(one: bytes, other: bytes) -> None:
    """Let two names change places in one step: renameat2(2), RENAME_EXCHANGE, Linux 3.15."""
    if _LIBC.renameat2(_AT_FDCWD, one, _AT_FDCWD, other, _RENAME_EXCHANGE) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), one, None, other)


def exchanging(one: os.PathLike[str], other: os.PathLike[str]) -> Callable[[], None]:
    """Return a step that exchanges two names."""
    first, second = os.fsencode(one), os.fsencode(other)
    return lambda: exchange(first, second)


def resting(path: os.PathLike[str], looks: int) -> Callable[[], None]:
    """Return a step that leaves everything as it is for a while, so that what is right has a chance too."""
    name = os.fsencode(path)

    def rest() -> None:
        for _ in range(looks):
            os.stat(name)

    return rest


class Attack:
    """A running attack. `steps` counts what it did so far; children that are forked see it as well."""

    def __init__(self, counter: memoryview) -> None:
        self._counter = counter

    @property
    def steps(self) -> int:
        """Return how many steps were made."""
        return self._counter[0]


@contextlib.contextmanager
def attacking(*steps: Callable[[], None], uid: int) -> Iterator[Attack]:
    """Repeat `steps`, one after the other, in a process of `uid` for the length of the block."""
    shared = mmap.mmap(-1, mmap.PAGESIZE)
    counter = memoryview(shared).cast("Q")

    def attack() -> None:
        os.sched_setaffinity(0, {ATTACKERS_CPU})
        while True:
            for step in steps:
                step()
                counter[0] += 1

    try:
        with background(attack, uid=uid):
            yield Attack(counter)
    finally:
        counter.release()
        shared.close()
