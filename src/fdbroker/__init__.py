"""Unprivileged programs read exactly the files that a policy names, and nothing else.

    import fdbroker

    with fdbroker.connect() as client, client.open("/var/log/syslog") as file:
        ...

Nothing is imported before it is asked for: whoever wants a part of the package,
as the launcher and workers do, has no business with the client's code. (The
broker's own process does not load this file at all; see broker/entry.py.)
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from fdbroker.client import (
        BrokenError,
        BrokerError,
        BrokerTimeoutError,
        BusyError,
        ChangedError,
        Client,
        DeniedError,
        DescribedFile,
        DirectoryError,
        DisconnectedError,
        FileStat,
        FileTimeoutError,
        FileTooLargeError,
        Incomplete,
        LimitError,
        ListEntry,
        MissingError,
        NotDirectoryError,
        NotRegularError,
        OpenedFile,
        PathInvalidError,
        ProtocolError,
        ReadFile,
        ReadOnlyError,
        Reason,
        Results,
        ServedClient,
        Service,
        SymlinkError,
        TooManyFilesError,
        UnavailableError,
        UnservedError,
        Walk,
        WalkedFile,
        WalkEnd,
        WalkInterrupted,
        WalkKind,
        Welcome,
        connect,
    )

    __version__: str

__all__ = [
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
    "__version__",
    "connect",
]


def __getattr__(name: str) -> object:
    """Import what is asked for (PEP 562)."""
    if name == "__version__":
        # The version is said in pyproject.toml alone; sources that are not installed have none.
        from importlib import metadata  # noqa: PLC0415 - only when asked for

        try:
            return metadata.version("fdbroker")
        except metadata.PackageNotFoundError:
            return "0+unknown"
    if name in __all__:
        from fdbroker import client  # noqa: PLC0415 - only when asked for

        return getattr(client, name)
    raise AttributeError(f"module 'fdbroker' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
