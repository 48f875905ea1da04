"""Sealed copies of what clients have open for writing, made while others are served."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
from typing import TYPE_CHECKING, NamedTuple

from fdbroker.client import ChangedError, FileTooLargeError
from fdbroker.client.sealed import seal_in_steps
from fdbroker.scan.contract import admit
from fdbroker.scan.verdict import Error, Reason

if TYPE_CHECKING:
    from fdbroker.scan.stamps import Stamp


class Looked(NamedTuple):
    """What `fdbroker.scan.contract.admit` said of a file, and whether it may be scanned as a copy alone."""

    before: Stamp | Error
    to_copy: bool


def look(descriptor: int, *, shared: bool) -> Looked:
    """Return what there is to know of a file that a client has handed in.

    To be copied is one open for reading and writing: with it a worker could write, and who has opened it may
    go on doing so. `shared`: also one open for reading, as nobody may share its offset and flags.
    What can't be scanned at all has an error, also what can't even be looked at, as a file of somebody
    else's FUSE.
    """
    before = admit(descriptor)
    if isinstance(before, Error):
        return Looked(before, to_copy=False)
    return Looked(before, shared or fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR)


async def sealed_copy(descriptor: int, most: int, seconds: float) -> int | Error:
    """Return a sealed copy of a file, which the caller owns, or why there is none.

    The descriptor stays the caller's. `most`: bytes that the copy may have; `seconds`: that it may take.
    """
    steps = seal_in_steps(descriptor, most, asyncio.get_running_loop().time() + seconds, None)
    try:
        with contextlib.closing(steps):
            while True:
                try:
                    pause = next(steps)
                except StopIteration as end:
                    return int(end.value)
                await asyncio.sleep(pause)
    except FileTooLargeError as error:
        return Error(Reason.TOO_LARGE, f"{error.strerror}, for a descriptor that must be copied")
    except ChangedError as error:
        return Error(Reason.CHANGED, str(error.strerror))
    except (OSError, ValueError) as error:
        return Error(Reason.READ_FAILED, f"it could not be copied: {error}")
