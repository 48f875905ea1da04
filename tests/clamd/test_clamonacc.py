"""clamonacc, which has each file scanned that somebody opens: it asks the scan service as it asks clamd."""

from __future__ import annotations

import contextlib
import os
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.processes import in_child, wait_until
from tests.scan.clamav import BAD, BAD_NAME
from tests.scan.running_scand import ANN, SCAND_UID, own

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.scan.running_scand import RunningScand

pytestmark = pytest.mark.root

# Whoever scans must not be asked about: here that is the service, by its uid.
_CONFIGURATION = """
LocalSocket {socket}
OnAccessIncludePath {watched}
OnAccessPrevention yes
OnAccessExcludeUID {scand}
OnAccessExcludeRootUID yes
OnAccessMaxFileSize 5M
"""


@contextlib.contextmanager
def clamonacc(directory: Path, socket: Path, watched: Path) -> Iterator[Path]:
    """Run it, with descriptors passed; give what it says."""
    configuration, said = directory / "clamonacc.conf", directory / "clamonacc.said"
    configuration.write_text(_CONFIGURATION.format(socket=socket, watched=watched, scand=SCAND_UID))
    with open(said, "wb") as output:
        process = subprocess.Popen(
            ["/usr/sbin/clamonacc", "--foreground", "--fdpass", f"--config-file={configuration}"],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        yield said
        assert process.poll() is None, said.read_text()
    finally:
        process.kill()
        process.wait()


def may_read(path: Path) -> bool:
    try:
        path.read_bytes()
    except PermissionError:
        return False
    return True


def test_a_file_in_which_something_is_found_can_not_be_opened(
    directory: Path, scand: RunningScand, ours: Path
) -> None:
    watched = directory / "watched"
    watched.mkdir()
    for name, content in (("clean", b"nothing bad"), ("bad", BAD)):
        (watched / name).write_bytes(content)
        own(watched / name, ANN, 0o644)
    assert in_child(lambda: may_read(watched / "bad"), uid=ANN)
    with clamonacc(directory, ours, watched) as said:
        wait_until(lambda: not in_child(lambda: may_read(watched / "bad"), uid=ANN), "it watches")
        assert in_child(lambda: may_read(watched / "clean"), uid=ANN)
        wait_until(lambda: f"{watched}/bad: {BAD_NAME} FOUND" in said.read_text(), "it says so")
    assert f"{watched}/bad: {BAD_NAME} FOUND" in scand.errors()
    assert in_child(lambda: may_read(watched / "bad"), uid=ANN)
    assert os.path.exists(watched / "bad")
