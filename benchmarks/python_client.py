"""A client in Python: read files of 4 KiB, by oslo.privsep or by fdbroker's library.

    python -m benchmarks.python_client {privsep|fdbroker|copies} SOCKET LIST BATCH OPENS CPU UID

`copies`: by fdbroker, which sends the contents in its replies.

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
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.tree import EXACT_SIZE, read_list

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Reader = Callable[[list[bytes]], int]

WARM_UP = 128


@contextmanager
def privsep_reader(uid: int) -> Iterator[Reader]:
    """Start the daemon, become `uid`, give what reads paths through it.

    It has no call for several files.
    """
    try:
        from benchmarks import privsep_calls  # noqa: PLC0415 - the other side does not have it in memory
    except ImportError as error:
        sys.exit(f"{error}; pip install 'fdbroker[bench]', or see --client-python")
    # Neither end formats a record for nobody.
    logging.disable(logging.CRITICAL)
    privsep_calls.start()
    become(uid)
    read_file = privsep_calls.read_file
    # The daemon ends with its channel, and that with this process.
    yield lambda paths: sum(len(read_file(path)) for path in paths)


@contextmanager
def fdbroker_reader(uid: int, socket: Path, batch: int, *, copies: bool) -> Iterator[Reader]:
    """Become `uid`, connect, give what reads paths by the client library."""
    from fdbroker.client import connect  # noqa: PLC0415 - the other side does not have it in memory

    # After all imports: the checkout may be out of reach for `uid`.
    become(uid)
    with connect(socket) as client:

        def read_one_by_one(paths: list[bytes]) -> int:
            return sum(len(client.read_bytes(path)) for path in paths)

        def read_many(paths: list[bytes]) -> int:
            size = 0
            with client.open_many(paths, batch) as results:
                for opened in results:
                    with opened:
                        size += len(os.read(opened.descriptor, EXACT_SIZE))
            return size

        def read_copies(paths: list[bytes]) -> int:
            with client.read_many(paths, batch) as results:
                return sum(len(result.content) for result in results)

        yield read_copies if copies else read_one_by_one if batch == 1 else read_many


def main(arguments: list[str]) -> int:
    """Measure; return the exit status."""
    kind, socket, paths_name, batch, opens_text, cpu, uid = arguments
    # Before anything is forked or connected.
    os.sched_setaffinity(0, {int(cpu)})
    paths = listed(paths_name, int(opens_text))
    with (
        privsep_reader(int(uid))
        if kind == "privsep"
        else fdbroker_reader(int(uid), Path(socket), int(batch), copies=kind == "copies")
    ) as read:
        return measure(read, paths, WARM_UP, EXACT_SIZE)


def listed(name: str, count: int) -> list[bytes]:
    """Return so many paths of a list, from its beginning again where it ends."""
    return list(itertools.islice(itertools.cycle(read_list(Path(name))), count))


def measure(read: Reader, paths: list[bytes], warm_up: int, size_of_each: int) -> int:
    """Have some files read, then all of them by the clock; write the line; return the exit status."""
    read(paths[:warm_up])
    began = time.perf_counter()
    size = read(paths)
    seconds = time.perf_counter() - began
    if size != len(paths) * size_of_each:
        sys.stderr.write(f"read {size} bytes of {len(paths)} files of {size_of_each}\n")
        return 1
    sys.stdout.write(json.dumps({"seconds": seconds, "opens": len(paths)}) + "\n")
    return 0


def become(uid: int) -> None:
    """Be `uid`, without groups, for good."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
