"""One broker at a time: who may hold the lock, whom a message names, and how the holder is stopped."""

from __future__ import annotations

import fcntl
import os
import subprocess
from typing import TYPE_CHECKING

import pytest

from fdbroker.launcher.errors import AlreadyRunningError
from fdbroker.launcher.locking import PidFile
from tests.launcher.starting import command, run, started
from tests.processes import ChildError, in_child
from tests.running_broker import OTHER_UID, launcher_environment

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.root


def lock(pidfile: Path) -> int:
    """Do what any program can do with a file that it may open for reading."""
    descriptor = os.open(pidfile, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def test_a_user_without_privilege_can_not_hold_the_lock(directory: Path) -> None:
    pidfile = directory / "run/pid"
    with started(directory / "policy.yaml", "--audit=none", f"--pidfile={pidfile}"):
        pass
    with pytest.raises(ChildError, match="PermissionError"):
        in_child(lambda: lock(pidfile), uid=OTHER_UID)
    with (
        started(directory / "policy.yaml", "--audit=none", f"--pidfile={pidfile}"),
        pytest.raises(ChildError, match="PermissionError"),
    ):
        in_child(lambda: lock(pidfile), uid=OTHER_UID)


def test_a_pidfile_that_others_can_read_and_so_lock_is_refused(directory: Path) -> None:
    pidfile = directory / "run/pid"
    pidfile.parent.mkdir()
    pidfile.touch(0o644)
    done = run(directory / "policy.yaml", "--audit=none", f"--pidfile={pidfile}")
    assert done.returncode == 2
    assert f"pidfile '{pidfile}' is not a regular file of root's" in done.stderr
    assert "that nobody else can open; remove it" in done.stderr


def test_a_process_that_only_stands_in_the_file_is_not_named_and_not_stopped(directory: Path) -> None:
    pidfile = directory / "run/pid"
    pidfile.parent.mkdir(mode=0o755)
    pidfile.touch(0o600)
    holder = lock(pidfile)
    # It has the file open as well; what it lacks is the lock.
    with open(pidfile, "rb") as same, subprocess.Popen(["sleep", "60"], stdin=same) as bystander:
        pidfile.write_text(f"{bystander.pid}\n")
        for option, status in (("--foreground", 3), ("--stop", 2)):
            done = run(directory / "policy.yaml", option, "--audit=none", f"--pidfile={pidfile}")
            assert done.returncode == status
            assert f"somebody holds the lock of '{pidfile}'" in done.stderr
            assert str(bystander.pid) not in done.stderr
            assert bystander.poll() is None
        bystander.kill()
    os.close(holder)


@pytest.mark.parametrize("text", ["", "x", "0", "-1", "999999999999999999999999", "4194305", "\xb2"])
def test_a_pidfile_that_names_no_process_names_nobody(directory: Path, text: str) -> None:
    pidfile = directory / "pid"
    pidfile.touch(0o600)
    holder = lock(pidfile)
    pidfile.write_text(text)
    with pytest.raises(AlreadyRunningError, match="somebody holds the lock"):
        PidFile(str(pidfile))
    os.close(holder)


def test_stop_ends_the_broker_that_holds_the_lock_and_returns_when_it_is_gone(directory: Path) -> None:
    pidfile = f"--pidfile={directory}/run/pid"
    done = run(directory / "policy.yaml", "--daemon", f"--audit={directory}/audit", pidfile)
    assert done.returncode == 0, done.stderr
    done = run(directory / "policy.yaml", "--stop", pidfile)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    os.close(lock(directory / "run/pid"))
    assert '"event":"stopped"' in (directory / "audit").read_text()


@pytest.mark.parametrize("there", [False, True])
def test_stop_without_a_broker_says_so_and_makes_nothing(directory: Path, there: bool) -> None:  # noqa: FBT001
    pidfile = directory / "run/pid"
    if there:
        with started(directory / "policy.yaml", "--audit=none", f"--pidfile={pidfile}"):
            pass
    done = run(directory / "policy.yaml", "--stop", f"--pidfile={pidfile}")
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == f"fdbroker: no broker holds the lock of '{pidfile}'\n"
    assert pidfile.exists() == there


def test_stop_needs_no_policy_and_goes_with_nothing_but_a_pidfile(directory: Path) -> None:
    (directory / "policy.yaml").unlink()
    words = command(directory / "policy.yaml", "--stop", f"--pidfile={directory}/run/pid")
    done = subprocess.run(words, env=launcher_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "no broker holds the lock" in done.stderr
    done = run(directory / "policy.yaml", "--stop", "--daemon")
    assert done.returncode == 2
    assert "not allowed with argument" in done.stderr
