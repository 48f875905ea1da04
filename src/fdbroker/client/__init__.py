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
    ChangedError,
    DeniedError,
    DirectoryError,
    DisconnectedError,
    FileTimeoutError,
    FileTooLargeError,
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
    WalkInterrupted,
)
from fdbroker.client.results import DescribedFile, OpenedFile, ReadFile, Results, WalkedFile
from fdbroker.client.service import ServedClient, Service
from fdbroker.client.walk import Walk
from fdbroker.wire.format import Incomplete, Reason, WalkKind
from fdbroker.wire.messages import FileStat, ListEntry, WalkEnd, Welcome

__all__ = [
    "DEFAULT_SOCKET",
    "DEFAULT_TIMEOUT",
    "BrokenError",
    "BrokerError",
    "BrokerTimeoutError",
    "BusyError",
    "ChangedError",
    "Client",
    "DeniedError",
    "DescribedFile",
    "DirectoryError",
    "DisconnectedError",
    "FileStat",
    "FileTimeoutError",
    "FileTooLargeError",
    "Incomplete",
    "LimitError",
    "ListEntry",
    "MissingError",
    "NotDirectoryError",
    "NotRegularError",
    "OpenedFile",
    "PathInvalidError",
    "ProtocolError",
    "ReadFile",
    "ReadOnlyError",
    "Reason",
    "ReloadRefusedError",
    "Results",
    "ServedClient",
    "Service",
    "SymlinkError",
    "TooManyFilesError",
    "UnavailableError",
    "UnservedError",
    "Walk",
    "WalkEnd",
    "WalkInterrupted",
    "WalkKind",
    "WalkedFile",
    "Welcome",
    "connect",
]
