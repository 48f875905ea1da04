"""A small local database for ClamAV, and a clamd that uses it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from tests.processes import listens, wait_until
from tests.scan.descriptors import EICAR, EICAR_NAME

if TYPE_CHECKING:
    from collections.abc import Iterator

TEST_FILES = Path("/usr/share/clamav-testfiles")
# In no file but those that tests make.
BAD = b"fdbroker-test-" + b"marker-5d1f"
BAD_NAME = "Fdbroker-Test-Marker.UNOFFICIAL"
TEST_FILE_NAME = "ClamAV-Test-File.UNOFFICIAL"


def make_database(directory: Path) -> Path:
    """Write the signatures of EICAR, of `BAD` anywhere in a file, and of what is in ClamAV's test files."""
    directory.mkdir()
    program = (TEST_FILES / "clam.exe").read_bytes()
    (directory / "test.hdb").write_text(
        f"{_md5(EICAR)}:{len(EICAR)}:{EICAR_NAME}\n{_md5(program)}:{len(program)}:ClamAV-Test-File\n"
    )
    (directory / "test.ndb").write_text(f"Fdbroker-Test-Marker:0:*:{BAD.hex()}\n")
    return directory


def _md5(contents: bytes) -> str:
    return hashlib.md5(contents, usedforsecurity=False).hexdigest()


@contextlib.contextmanager
def running_clamd(directory: Path, database: Path, *settings: str) -> Iterator[Path]:
    """Run a clamd of its own, with these lines of configuration; give its socket."""
    socket_path = directory / "clamd.socket"
    configuration = directory / "clamd.conf"
    lines = [
        f"LocalSocket {socket_path}",
        f"DatabaseDirectory {database}",
        f"TemporaryDirectory {directory}",
        f"LogFile {directory / 'clamd.log'}",
        "Foreground yes",
        "DisableCache yes",
        *([] if os.geteuid() else ["User root"]),
        *settings,
    ]
    configuration.write_text("\n".join(lines) + "\n")
    process = subprocess.Popen(
        ["/usr/sbin/clamd", "--config-file", configuration],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: process.poll() is not None or listens(socket_path), "clamd listens", 60)
        assert process.poll() is None, (directory / "clamd.log").read_text()
        yield socket_path
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
