"""A client in Python: read files of 4 KiB, by oslo.privsep or by fdbroker's library.

    python -m benchmarks.python_client {privsep|fdbroker} SOCKET LIST BATCH OPENS CPU UID

Both sides do the same: each file's content ends up as one `bytes` in a process
of UID that could not have opened the file. Started as root, since oslo.privsep forks its
daemon from the process that is to use it. Prints a line of JSON as bench_client does.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.tree import EXACT_SIZE, read_list

if TYPE_CHECKING:
    from collections.abc import Callable

    Reader = Callable[[list[bytes]], int]


def privsep_reader(uid: int) -> Reader:
    """Start the daemon, become `uid`, return what reads paths through it.

    It has no call for several files; a batch is a loop.
    """
    from benchmarks import privsep_calls  # noqa: PLC0415 - needs oslo.privsep

    # Neither end formats a record for nobody.
    logging.disable(logging.CRITICAL)
    privsep_calls.start()
    _become(uid)

    def read(paths: list[bytes]) -> int:
        return sum(len(privsep_calls.read_file(os.fsdecode(path))) for path in paths)

    return read


def fdbroker_reader(uid: int, socket: Path, batch: int) -> Reader:
    """Become `uid`, connect, return what reads paths by the client library."""
    import fdbroker  # noqa: PLC0415 - the other side does not have it in memory

    _become(uid)
    client = fdbroker.connect(socket)

    def read_one(paths: list[bytes]) -> int:
        with client.open(paths[0]) as file:
            return len(file.read())

    def read_many(paths: list[bytes]) -> int:
        size = 0
        with client.open_many(paths) as files:
            for file in files:
                size += len(file.read())
        return size

    return read_one if batch == 1 else read_many


def main(arguments: list[str]) -> int:
    """Measure; return the exit status."""
    kind, socket, paths_name, batch_text, opens_text, cpu, uid = arguments
    batch = int(batch_text)
    # Before anything is forked or connected.
    os.sched_setaffinity(0, {int(cpu)})
    paths = read_list(Path(paths_name))
    around = itertools.islice(itertools.cycle(paths), int(opens_text))
    requests = [list(part) for part in iter(lambda: list(itertools.islice(around, batch)), [])]
    if kind == "privsep":
        read = privsep_reader(int(uid))
    else:
        read = fdbroker_reader(int(uid), Path(socket), batch)
    for request in requests[:10]:
        read(request)

    began = time.perf_counter()
    size = 0
    for request in requests:
        size += read(request)
    seconds = time.perf_counter() - began

    opens = sum(map(len, requests))
    if size != opens * EXACT_SIZE:
        sys.stderr.write(f"read {size} bytes of {opens} files of {EXACT_SIZE}\n")
        return 1
    sys.stdout.write(json.dumps({"seconds": seconds, "opens": opens}) + "\n")
    sys.stdout.flush()
    if kind == "privsep":
        from benchmarks import privsep_calls  # noqa: PLC0415

        privsep_calls.stop()
    return 0


def _become(uid: int) -> None:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
