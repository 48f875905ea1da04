"""Where fdbrokerd begins: isolated, or to be started again so before anything else is imported."""

from __future__ import annotations

import sys

from fdbroker.launcher.isolation import isolate


def main() -> int:
    """Run fdbrokerd, isolated; return its exit status if this process does not become the broker."""
    isolate(sys.argv[1:])
    from fdbroker.launcher.launch import launch  # noqa: PLC0415 - only now is it ours

    return launch(sys.argv[1:])
