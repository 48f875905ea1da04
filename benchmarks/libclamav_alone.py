"""What a scan takes at least: ClamAV's library in forked processes, and nothing else.

    python benchmarks/libclamav_alone.py DATABASE START PROCESSES

As root. The library is loaded and warmed up as by `fdbroker scan`, with the same options. Then each process
opens its share of the files by name and hands them to the library, one after the other: no broker, no
confinement, none of the callbacks by which fdbroker sees what the library passes over, no verdicts. Prints
how many files were scanned, and of how many the library says that something is in them.
"""

from __future__ import annotations

import ctypes
import os
import struct
import subprocess
import sys
import tempfile

from fdbroker.kernel import namespaces
from fdbroker.scan.engines import libclamav
from fdbroker.scan.engines.libclamav import LibClamAV, LibClamAVOptions

_TMPDIR = 13  # of enum cl_engine_field
_FOUND = 1  # CL_VIRUS
_COUNTS = struct.Struct("=QQ")


def main(arguments: list[str]) -> int:
    """Scan and return the exit status."""
    database, start, processes = arguments[0], arguments[1], int(arguments[2])
    engine = LibClamAV(LibClamAVOptions(database=os.fsencode(database)))
    engine.warm()
    library, pointer = engine._library, engine._engine  # noqa: SLF001 - the bare library
    library.cl_engine_set_clcb_file_inspection(pointer, ctypes.cast(None, libclamav._OnPart))  # noqa: SLF001
    library.cl_engine_set_clcb_virus_found(pointer, ctypes.cast(None, libclamav._OnFound))  # noqa: SLF001
    paths = [os.path.join(directory, name) for directory, _, names in os.walk(start) for name in names]
    with tempfile.TemporaryDirectory(prefix="fdbroker-bench-") as scratch:
        namespaces.unshare(namespaces.CLONE_NEWNS)
        namespaces.mount_setattr(b"/", attributes=0, propagation=namespaces.MS_PRIVATE, recursive=True)
        namespaces.mount_tmpfs(os.fsencode(scratch), b"size=1g")
        reader, writer = os.pipe()
        for number in range(processes):
            if os.fork() == 0:
                own = os.path.join(os.fsencode(scratch), b"%d" % number)
                os.mkdir(own)
                library.cl_engine_set_str(pointer, _TMPDIR, own)
                share = paths[number::processes]
                os.write(writer, _COUNTS.pack(len(share), _scan(engine, share)))
                os._exit(0)
        os.close(writer)
        counts = [_COUNTS.unpack(os.read(reader, _COUNTS.size)) for _ in range(processes)]
        for _ in range(processes):
            os.wait()
        # The directory below it is the one to be removed.
        subprocess.run(["umount", "--lazy", scratch], check=True)
    sys.stdout.write(f"{sum(count[0] for count in counts)} {sum(count[1] for count in counts)}\n")
    return 0


def _scan(engine: LibClamAV, paths: list[str]) -> int:
    """Return of how many the library says that something is in them."""
    scan, pointer = engine._scan_descriptor, engine._engine  # noqa: SLF001
    name = ctypes.byref(ctypes.c_char_p())
    options = engine._options_pointer  # noqa: SLF001
    found = 0
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        found += scan(descriptor, None, name, None, pointer, options, None) == _FOUND
        os.close(descriptor)
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
