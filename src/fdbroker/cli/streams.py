"""Standard input, output and error, also where who started the command left one closed or full.

Nothing but the standard library: it is needed to tell that a package is missing.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import TextIO


def prepare() -> None:
    """Have all three descriptors and streams, as far as who started the command has closed them.

    What is opened later must not become 0, 1 or 2: a connection to the broker
    as standard error would be sent what is meant for people. What stands in
    for a closed one fails on use, as the closed one does, and is closed again
    in a program that this process becomes.
    """
    for number, flags in ((0, os.O_WRONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            # The lowest that is free, so this very number.
            os.open(os.devnull, flags | os.O_CLOEXEC)
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 - for as long as the process lives
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - likewise
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115 - likewise
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # What the terminal's encoding lacks is escaped, not an exception; and a finding is not held back.
            stream.reconfigure(errors="backslashreplace", line_buffering=True)


def write_error(text: str) -> None:
    """Write to standard error. That nobody can be told changes nothing: the exit status says it, too."""
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except OSError:
        give_up(sys.stderr)


def give_up(stream: TextIO) -> None:
    """Let what a stream still holds go nowhere, or the interpreter's last flush would choose the status."""
    with contextlib.suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
