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

_CONFIGURATION = """
LocalSocket {socket}
OnAccessIncludePath {watched}
OnAccessPrevention yes
OnAccessExcludeUID {scand}
OnAccessExcludeRootUID yes
OnAccessMaxFileSize 5M
"""


@contextlib.contextmanager
def clamonacc(directory: Path, socket: Path, watched: Path, mode: str) -> Iterator[Path]:
    """Run it; give what it says. Opens of the service, and of root, it lets pass without asking."""
    configuration, said = directory / "clamonacc.conf", directory / "clamonacc.said"
    configuration.write_text(_CONFIGURATION.format(socket=socket, watched=watched, scand=SCAND_UID))
    with open(said, "wb") as output:
        process = subprocess.Popen(
            ["/usr/sbin/clamonacc", "--foreground", mode, f"--config-file={configuration}"],
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


def files_to_watch(directory: Path) -> Path:
    directory.mkdir()
    for name, content in (("clean", b"nothing bad"), ("bad", BAD)):
        (directory / name).write_bytes(content)
        own(directory / name, ANN, 0o644)
    return directory


def may_read(path: Path) -> bool:
    try:
        path.read_bytes()
    except PermissionError:
        return False
    return True


@pytest.mark.parametrize("mode", ["--fdpass", "--stream"])
def test_a_file_in_which_something_is_found_can_not_be_opened(
    directory: Path, scand: RunningScand, ours: Path, mode: str
) -> None:
    watched = files_to_watch(directory / f"watched{mode}")
    assert in_child(lambda: may_read(watched / "bad"), uid=ANN)
    with clamonacc(directory, ours, watched, mode) as said:
        wait_until(lambda: not in_child(lambda: may_read(watched / "bad"), uid=ANN), "it watches")
        assert in_child(lambda: may_read(watched / "clean"), uid=ANN)
        wait_until(lambda: f"{watched}/bad: {BAD_NAME} FOUND" in said.read_text(), "it says so")
    logged = f"{watched}/bad" if mode == "--fdpass" else "instream(local)"
    assert f"{logged}: {BAD_NAME} FOUND" in scand.errors()
    assert in_child(lambda: may_read(watched / "bad"), uid=ANN)
    assert os.path.exists(watched / "bad")
