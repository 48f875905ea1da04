"""Where fdbrokerd begins. Nothing is imported here that the working directory or PYTHONPATH could replace."""

from __future__ import annotations

import sys

from fdbroker.launcher.isolation import isolate


def main() -> int:
    """Run fdbrokerd, isolated; return its exit status if this process does not become the broker."""
    isolate(sys.argv[1:])
    from fdbroker.launcher.launch import launch  # noqa: PLC0415 - only now is it ours

    return launch(sys.argv[1:])
