"""Scanning: files come open from the broker, a confined worker reads them, a verdict comes back.

`connect` gives a connection to the scan service of this machine. Nothing is imported before it is asked
for: a worker, which imports parts of this package, has no business with the rest.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from fdbroker.scan.client import ScanService, ScanServiceError, connect

__all__ = ["ScanService", "ScanServiceError", "connect"]


def __getattr__(name: str) -> object:
    """Import what is asked for (PEP 562)."""
    if name in __all__:
        from fdbroker.scan import client  # noqa: PLC0415 - only when asked for

        return getattr(client, name)
    raise AttributeError(f"module 'fdbroker.scan' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
