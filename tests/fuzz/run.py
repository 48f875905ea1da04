"""Fuzz each target for a part of the time: `make fuzz DURATION=60`.

What was found to reach more of the code is kept in build/fuzz/, for the next run, and so is what breaks
a target: `build/venv/bin/python -m tests.fuzz.by_atheris TARGET build/fuzz/TARGET-crash-...` shows how.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.fuzz.targets import PURE
from tests.wire.frames import vectors

TARGETS = [*PURE, "end-to-end"]
KEPT = Path("build/fuzz")


def main() -> int:
    """Return 0 if nothing broke."""
    seconds = int(sys.argv[1])
    KEPT.mkdir(parents=True, exist_ok=True)
    broken = [target for target in TARGETS if not run(target, max(seconds // len(TARGETS), 1))]
    sys.stdout.write(f"fuzz: broken: {', '.join(broken)}\n" if broken else "fuzz: nothing broke\n")
    return bool(broken)


def run(target: str, seconds: int) -> bool:
    """Fuzz one target, beginning with the frames that docs/protocol.md has; return whether it held."""
    corpus = KEPT / target
    corpus.mkdir(exist_ok=True)
    for number, vector in enumerate(vectors()):
        (corpus / f"vector-{number}").write_bytes(vector.frame)
    command = [sys.executable, "-m", "tests.fuzz.by_atheris", target, str(corpus)]
    command += [f"-max_total_time={seconds}", "-max_len=4096", "-timeout=20"]
    command.append(f"-artifact_prefix={KEPT}/{target}-")
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    done = [line for line in found.stderr.splitlines() if line.startswith("Done ")]
    held = found.returncode == 0 and bool(done)
    sys.stdout.write(f"fuzz: {target}: {done[-1] if held else found.stderr[-8000:]}\n")
    sys.stdout.flush()
    return held


if __name__ == "__main__":
    sys.exit(main())
