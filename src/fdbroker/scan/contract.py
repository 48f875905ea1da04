"""What every verdict is held to, whichever engine gave it.

An engine can be wrong about what is bad; it must not be able to call a file
clean that it did not have, or that was another one by the time it was done.
"""

from __future__ import annotations

import fcntl
import os
import stat

from fdbroker.scan.stamps import Stamp
from fdbroker.scan.verdict import Clean, Error, Reason, Verdict


def admit(descriptor: int) -> Stamp | Error:
    """Return the stamp of a file that may be handed to an engine, or why it may not.

    Only regular files that are open for reading: a daemon that can't read what it was given may answer
    that there is nothing in it (clamd does).
    """
    try:
        facts = os.fstat(descriptor)
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    except OSError as error:
        return Error(Reason.READ_FAILED, f"the descriptor is of no use: {error.strerror}")
    if not stat.S_ISREG(facts.st_mode):
        return Error(Reason.NOT_REGULAR, "what was handed in is no regular file")
    # Of the four access modes two can read: 3 is for neither, and lets ioctl(2) alone; open(2).
    if flags & os.O_PATH or flags & os.O_ACCMODE not in {os.O_RDONLY, os.O_RDWR}:
        return Error(Reason.NOT_READABLE, "what was handed in is not open for reading")
    return Stamp.of(facts)


def confirm(verdict: object, descriptor: int, before: Stamp) -> Verdict:
    """Return the verdict that stands, after one more look at the file.

    Clean is not said of a file that changed since `before`. What is no verdict is an error. A finding
    stands, whatever became of the file.
    """
    if not isinstance(verdict, Clean):
        if isinstance(verdict, Verdict):
            return verdict
        return Error(Reason.UNKNOWN_ANSWER, f"the engine answered {ascii(verdict)[:80]}, which is no verdict")
    try:
        after = Stamp.of(os.fstat(descriptor))
    except OSError as error:
        return Error(Reason.READ_FAILED, f"fstat: {error.strerror}")
    if after != before:
        return Error(Reason.CHANGED, "the file changed while it was scanned")
    return verdict
