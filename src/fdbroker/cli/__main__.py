"""Run the command: `fdbroker`, or python -m fdbroker.cli."""

from __future__ import annotations

import atexit
import gc
import sys

from fdbroker.cli import streams

try:
    from fdbroker.cli.main import main
except ModuleNotFoundError as missing:
    # click; what single commands need besides is told when they are asked for.
    package = (missing.name or "").partition(".")[0]
    if package != "click":
        raise
    streams.prepare()
    streams.write_error(f"fdbroker: the command needs {package}: pip install 'fdbroker[cli]'\n")
    sys.exit(2)

# What is left at the end goes with the process: nobody has to look through it for cycles, which takes a tenth
# of the time of a short command.
atexit.register(gc.freeze)

if __name__ == "__main__":
    sys.exit(main())
