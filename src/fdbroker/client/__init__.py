"""The client: ask the broker for files by path, get open descriptors.

It uses the standard library only, and may run in a process that has nothing
but a socket.
"""

from __future__ import annotations

from fdbroker.client.blocking import DEFAULT_SOCKET, DEFAULT_TIMEOUT, Client, connect
from fdbroker.client.errors import (
    BrokenError,
    BrokerError,
    BrokerTimeoutError,
    BusyError,
    DeniedError,
    DirectoryError,
    DisconnectedError,
    LimitError,
    MissingError,
    NotDirectoryError,
    NotRegularError,
    PathInvalidError,
    ProtocolError,
    ReadOnlyError,
    ReloadRefusedError,
    SymlinkError,
    TooManyFilesError,
    UnavailableError,
    UnservedError,
)
from fdbroker.client.results import DescribedFile, OpenedFile, Results
from fdbroker.wire.format import Reason
from fdbroker.wire.messages import FileStat, ListEntry, Welcome

__all__ = [
    "DEFAULT_SOCKET",
    "DEFAULT_TIMEOUT",
    "BrokenError",
    "BrokerError",
    "BrokerTimeoutError",
    "BusyError",
    "Client",
    "DeniedError",
    "DescribedFile",
    "DirectoryError",
    "DisconnectedError",
    "FileStat",
    "LimitError",
    "ListEntry",
    "MissingError",
    "NotDirectoryError",
    "NotRegularError",
    "OpenedFile",
    "PathInvalidError",
    "ProtocolError",
    "ReadOnlyError",
    "Reason",
    "ReloadRefusedError",
    "Results",
    "SymlinkError",
    "TooManyFilesError",
    "UnavailableError",
    "UnservedError",
    "Welcome",
    "connect",
]
