"""What the worker of `Programs` does: put descriptors where a program expects them, and become it."""

from __future__ import annotations

import json
import os
import signal
from typing import TYPE_CHECKING

from fdbroker.kernel import execution, process, sockets
from fdbroker.sandbox.filters import PROGRAM

if TYPE_CHECKING:
    import socket

LONGEST_ORDER = 1 << 17
NOT_STARTED = 127  # as a shell says it


def execute(_state: None, channel: socket.socket, _scratch: bytes | None) -> None:
    """Wait for the order, and do it. Returns, or ends with `NOT_STARTED`, if there was none."""
    message = sockets.receive(channel, LONGEST_ORDER)
    if not message.data:
        return
    order = json.loads(message.data)
    # The channel has number 0, and its numbers are above those of the program.
    given = dict(zip(order["numbers"], message.descriptors.numbers(), strict=True))
    for number in range(3):
        if number in given:
            os.dup2(given[number], number)
        elif number == 0:
            os.dup2(1, number)  # /dev/null, still
    process.close_range(PROGRAM + 1)
    # Python ignores these, and whom it executes would too.
    for ignored in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(ignored, signal.SIG_DFL)
    try:
        execution.execute(
            PROGRAM,
            [bytes.fromhex(text) for text in order["argv"]],
            [bytes.fromhex(text) for text in order["env"]],
        )
    finally:
        os._exit(NOT_STARTED)
