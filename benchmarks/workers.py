"""How soon a confined worker is there, how much memory it adds, how soon an interpreter would be there."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.errors import BenchmarkError
from fdbroker.sandbox import Worker, Zygote
from fdbroker.scan import worker
from fdbroker.scan.plugins import configure, to_json

if TYPE_CHECKING:
    from collections.abc import Iterator

# What the zygote has imported by the time that it forks, and says so.
_IMPORTS = (
    "import sys; sys.path[:] = sys.argv[1:];"
    "import fdbroker.sandbox.zygote_process; from fdbroker.scan import worker;"
    "from fdbroker.scan.plugins import configure, to_json; worker.load(to_json([configure('hashes')]));"
    "import os; os.write(1, b'.')"
)


@contextmanager
def zygote() -> Iterator[Zygote]:
    """Have a zygote of the scan's workers, that of the built-in list."""
    engines = {"engines": to_json([configure("hashes")])}
    with Zygote(worker.load, worker.work, engines) as started:
        yield started


def milliseconds_of_a_worker(started: Zygote, count: int) -> float:
    """Return how long it takes until a worker is there, confined and checked."""
    taken = 0.0
    for _ in range(count):
        begin = time.perf_counter()
        each = started.spawn()
        taken += time.perf_counter() - begin
        if each.report.missing():
            raise BenchmarkError(f"layers of the worker are missing: {each.report.missing()}")
        each.stop()
    return taken / count * 1000


def milliseconds_of_an_interpreter(count: int) -> float:
    """Return how long it takes until an interpreter has imported the same; nothing confines it."""
    places = [place for place in sys.path if os.path.isabs(place)]
    taken = 0.0
    for _ in range(count):
        begin = time.perf_counter()
        with subprocess.Popen(
            [sys.executable, "-I", "-c", _IMPORTS, *places], stdout=subprocess.PIPE, env={}
        ) as process:
            if process.stdout is None or os.read(process.stdout.fileno(), 1) != b".":
                raise BenchmarkError("an interpreter did not import what a worker has")
            taken += time.perf_counter() - begin
    return taken / count * 1000


def private_mib_of_a_further_worker(started: Zygote) -> float:
    """Return the memory that a worker has for itself, beside another one, in MiB; proc_pid_smaps(5)."""
    with started.spawn(), started.spawn() as second:
        return _private_mib(second)


def _private_mib(measured: Worker) -> float:
    lines = Path(f"/proc/{measured.pid}/smaps_rollup").read_text("ascii").splitlines()
    private = [
        int(line.split()[1]) for line in lines if line.startswith(("Private_Clean:", "Private_Dirty:"))
    ]
    if len(private) != 2:
        raise BenchmarkError("/proc does not say how much memory a worker has for itself")
    return sum(private) / 1024
