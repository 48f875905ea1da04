"""What the worker of `run` does: call one function with the descriptors it is given, send what it returns."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from fdbroker.kernel import sockets
from fdbroker.sandbox.names import find

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Mapping

# The first byte of each message to the parent: there is more, or what the whole is.
MORE, IS_BYTES, IS_JSON, IS_ERROR = b"+", b"b", b"j", b"e"
PART = 1 << 16

_Call = tuple["Callable[..., object]", "Mapping[str, object]"]


def load(function: str, warm: str | None, arguments: Mapping[str, object]) -> _Call:
    """Import the function, and call what its user wants called beforehand."""
    found = find(function)
    if warm is not None:
        find(warm)()
    return found, arguments


def work(call: _Call, channel: socket.socket, _scratch: bytes | None) -> None:
    """Be the worker."""
    function, arguments = call
    descriptors = sockets.receive(channel, 1).descriptors.take_all()
    try:
        returned = function(*descriptors, **arguments)
        if isinstance(returned, bytes | bytearray | memoryview):
            kind, data = IS_BYTES, bytes(returned)
        else:
            kind, data = IS_JSON, json.dumps(returned).encode("ascii")
    except Exception as error:  # noqa: BLE001 - whatever it was, who called it is told
        kind, data = IS_ERROR, f"{type(error).__name__}: {error}".encode("ascii", "backslashreplace")[:PART]
    while len(data) > PART:
        sockets.send(channel, MORE + data[:PART])
        data = data[PART:]
    sockets.send(channel, kind + data)
