"""Fuzz one target by atheris, in this process, which that ends: `python -m tests.fuzz.by_atheris TARGET ...`.

What is behind the target is for libFuzzer: a directory, or one file that broke it.
"""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["fdbroker"]):
    from tests.fuzz.targets import PURE, EndToEnd


def main() -> None:
    """Fuzz until the time is over, or something broke."""
    target = sys.argv.pop(1)
    if target in PURE:
        atheris.Setup(sys.argv, PURE[target])
        atheris.Fuzz()
        return
    with EndToEnd() as end_to_end:
        atheris.Setup(sys.argv, end_to_end)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
