"""clamonacc, which has each file scanned that somebody opens: it asks the scan service as it asks clamd."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from tests.clamd.replacing import instead_of_clamd
from tests.documentation.blocks import blocks
from tests.processes import in_child, wait_until
from tests.running_broker import BROKER_UID, reachable_directory
from tests.scan.clamav import BAD, BAD_NAME, make_database
from tests.scan.running_scand import ANN, SCAND_UID, own

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.for_other_users import ForOtherUsers
    from tests.scan.running_scand import RunningScand

pytestmark = pytest.mark.root

# As docs/from-clamd.md has it.
[_DOCUMENTED] = [
    block.text for block in blocks("docs/from-clamd.md") if block.text.startswith("OnAccessIncludePath")
]
_USERS = {"fdbroker": BROKER_UID, "fdbroker-scand": SCAND_UID}
_SECONDS_OF_WATCHDOG = 3.0


@contextlib.contextmanager
def clamonacc(
    directory: Path, socket: Path, watched: Path, *mode: str, excluded: tuple[int, ...]
) -> Iterator[Path]:
    """Run it; give what it says. Opens of those excluded, and of root, it lets pass without asking."""
    configuration, said = directory / "clamonacc.conf", directory / "clamonacc.said"
    lines = [f"LocalSocket {socket}", "OnAccessExcludeRootUID yes"]
    for option, value in (line.split() for line in _DOCUMENTED.splitlines()):
        if option == "OnAccessExcludeUname":
            lines += [f"OnAccessExcludeUID {uid}" for uid in [_USERS[value]] if uid in excluded]
        else:
            lines.append(f"{option} {watched if option == 'OnAccessIncludePath' else value}")
    configuration.write_text("\n".join(lines) + "\n")
    with open(said, "wb") as output:
        process = subprocess.Popen(
            ["/usr/sbin/clamonacc", "--foreground", *mode, f"--config-file={configuration}"],
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


@pytest.mark.parametrize("mode", ["--fdpass", "--stream", ""])
def test_a_file_in_which_something_is_found_can_not_be_opened(
    directory: Path, tree: Path, scand: RunningScand, ours: Path, mode: str
) -> None:
    """Without an option it names files, which the broker opens: then its opens are let pass as well."""
    watched = files_to_watch((directory if mode else tree) / f"watched{mode}")
    excluded = (SCAND_UID,) if mode else (SCAND_UID, BROKER_UID)
    assert in_child(lambda: may_read(watched / "bad"), uid=ANN)
    with clamonacc(directory, ours, watched, *filter(None, [mode]), excluded=excluded) as said:
        wait_until(lambda: not in_child(lambda: may_read(watched / "bad"), uid=ANN), "it watches")
        assert in_child(lambda: may_read(watched / "clean"), uid=ANN)
        wait_until(lambda: f"{watched}/bad: {BAD_NAME} FOUND" in said.read_text(), "it says so")
    logged = "instream(local)" if mode == "--stream" else f"{watched}/bad"
    assert f"{logged}: {BAD_NAME} FOUND" in scand.errors()
    assert in_child(lambda: may_read(watched / "bad"), uid=ANN)
    assert os.path.exists(watched / "bad")


def test_where_the_broker_is_not_excluded_the_watchdog_ends_it_and_nobody_waits_longer(
    others: ForOtherUsers,
) -> None:
    """Its open of the file asks clamonacc, which asks for the file to be scanned, and so on."""
    with reachable_directory() as directory:
        (directory / "tree").mkdir()
        watched = files_to_watch(directory / "tree" / "watched")
        database = make_database(directory / "database")
        with (
            instead_of_clamd(others, directory, directory / "tree", database, broker_may_end=True) as scand,
            clamonacc(directory, scand.clamd, watched, excluded=(SCAND_UID,)) as said,
        ):
            wait_until(lambda: "watching" in said.read_text(), "it watches")
            began = time.monotonic()

            def read_until_it_took_long() -> bool:
                assert may_read(watched / "clean")
                return time.monotonic() - began > _SECONDS_OF_WATCHDOG - 1

            wait_until(lambda: in_child(read_until_it_took_long, uid=ANN), "the broker was held")
            assert time.monotonic() - began < _SECONDS_OF_WATCHDOG + 15  # on a busy machine
            wait_until(lambda: "clamd: not served" in scand.errors(), "its watchdog has ended it")
            # Now that there is nobody to ask, clamonacc lets it pass.
            assert in_child(lambda: may_read(watched / "bad"), uid=ANN)
