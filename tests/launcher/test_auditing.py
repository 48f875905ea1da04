"""Where the audit goes: a directory that is root's alone, or an output that can't hold the broker."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import subprocess
import termios
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

import fdbroker
from fdbroker.client import control
from fdbroker.launcher.auditing import open_audit
from tests.launcher.starting import command, run
from tests.running_broker import OTHER_UID, launcher_environment

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.root


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        ("owner", f"it belongs to uid {OTHER_UID}"),
        ("group", "its mode is 0775"),
        ("sticky", "its mode is 01777"),
        ("link", "it is a symbolic link; use its real path"),
        ("above", f"it belongs to uid {OTHER_UID}"),
        ("missing", "No such file or directory; name a directory that exists, or make it, as root: mkdir -p"),
    ],
)
def test_an_audit_in_a_directory_that_is_not_roots_alone_is_refused(
    directory: Path, spoil: str, said: str
) -> None:
    place = directory / "above" / "log"
    place.mkdir(parents=True)
    if spoil == "link":
        place.rename(directory / "elsewhere")
        place.symlink_to(directory / "elsewhere")
    elif spoil == "missing":
        place.rmdir()
    else:
        os.chown(
            place.parent if spoil == "above" else place, 0 if spoil in {"group", "sticky"} else OTHER_UID, 0
        )
        place.chmod({"group": 0o775, "sticky": 0o1777}.get(spoil, 0o755))
    if spoil == "above":
        os.chown(place, 0, 0)
    done = run(directory / "policy.yaml", f"--audit={place}/audit")
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.startswith(
        f"fdbroker: audit {place}/audit can't be opened: directory '{directory}/above"
    )
    assert not (place / "audit").exists()
    assert not (directory / "elsewhere/audit").exists()


def test_an_audit_below_a_directory_of_a_group_is_written(directory: Path) -> None:
    """As /var/log/fdbroker is on Ubuntu, where /var/log is of the group syslog."""
    place = directory / "above" / "log"
    place.mkdir(parents=True)
    place.parent.chmod(0o775)
    os.chown(place.parent, 0, OTHER_UID)
    descriptor = open_audit(f"{place}/audit", OTHER_UID, OTHER_UID)
    assert descriptor is not None
    os.close(descriptor)
    assert (place / "audit").stat().st_uid == 0


class Terminal(NamedTuple):
    """A terminal and who runs on it. `theirs`: the description that the shell has as well."""

    ours: int
    theirs: int
    process: subprocess.Popen[bytes]


@pytest.fixture
def terminal(directory: Path) -> Iterator[Terminal]:
    """Run fdbrokerd as a person does, on a terminal; give the terminal's end and the process."""
    ours, theirs = os.openpty()
    ready, told = os.pipe()
    process = subprocess.Popen(
        [*command(directory / "policy.yaml"), f"--ready-fd={told}"],
        env=launcher_environment(),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        pass_fds=[told],
    )
    os.close(told)
    assert os.read(ready, 10) == b"ready\n"
    os.close(ready)
    try:
        yield Terminal(ours, theirs, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
    finally:
        process.kill()
        process.wait()
        os.close(theirs)
        os.close(ours)


def test_a_terminal_whose_output_is_stopped_holds_no_request(directory: Path, terminal: Terminal) -> None:
    ours, process = terminal.ours, terminal.process
    seen = b""
    while b"\n" not in seen:
        seen += os.read(ours, 4096)
    assert b'"event":"started"' in seen
    termios.tcflow(ours, termios.TCOOFF)  # Ctrl-S
    files = [directory / "tree/file"] * 64
    with fdbroker.connect(directory / "run/requests", timeout=20) as client:
        outcomes: list[fdbroker.BrokerError | None] = []
        while not any(outcomes):
            outcomes = [result.error for result in client.stat_many(files)]
        assert all(isinstance(error, fdbroker.BrokerError) for error in outcomes)
        assert {error.reason for error in outcomes if error is not None} == {fdbroker.Reason.AUDIT}
        with control.connect(directory / "run/control") as admin:
            assert admin.status()["pid"] == process.pid
        termios.tcflow(ours, termios.TCOON)
        while b"audit_failed" not in seen:
            seen = seen[-20:] + os.read(ours, 65536)
            list(client.stat_many(files[:1]))  # its record says what was lost, once there is room


def test_a_large_request_is_recorded_on_a_terminal_that_is_read(directory: Path, terminal: Terminal) -> None:
    """More at once than a terminal takes."""
    ours = terminal.ours
    seen = 0
    with fdbroker.connect(directory / "run/requests") as client:
        outcomes = [result.error for result in client.stat_many([directory / "tree/file"] * 200)]
    assert not any(outcomes)
    while seen < 201:
        seen += os.read(ours, 65536).count(b"\n")


def test_a_terminal_is_neither_readable_nor_the_callers_own_description(terminal: Terminal) -> None:
    theirs, process = terminal.theirs, terminal.process
    for number in (1, 2):
        text = Path(f"/proc/{process.pid}/fdinfo/{number}").read_text()
        flags = re.search(r"^flags:\s+(\d+)", text, re.MULTILINE)
        assert flags is not None
        assert int(flags[1], 8) & os.O_ACCMODE == os.O_WRONLY
    # The shell shares its description with all programs on this terminal: it must not become non-blocking.
    assert not fcntl.fcntl(theirs, fcntl.F_GETFL) & os.O_NONBLOCK
