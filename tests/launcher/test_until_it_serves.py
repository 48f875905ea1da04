"""Between the fork and "ready": whose the sockets and the pidfile are, whatever ends when."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

import fdbroker
from fdbroker.launcher.until_ready import READY, Made, start_watcher
from tests.launcher.starting import command, run, started
from tests.processes import wait_until, whose_command_line_names
from tests.running_broker import launcher_environment, policy

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.root

# Runs in the launcher before its first line; holds or ends it at its last step, where root is given up.
HOOK = """
import os
def execve(*arguments, become=os.execve):
    if "entry.py" not in str(arguments):
        return become(*arguments)
    {before}
    become(*arguments)
os.execve = execve
"""
HOLD = 'open("{0}/held", "w").write(str(os.getpid())); open("{0}/go", "rb").read()'
MISSING = 'raise FileNotFoundError(2, "No such file or directory", arguments[0])'
BUG = 'raise RuntimeError("a bug")'


def hooked(directory: Path, before: str) -> dict[str, str]:
    """Return the environment in which the launcher does this before it becomes the broker."""
    (directory / "hooks").mkdir()
    (directory / "hooks/sitecustomize.py").write_text(HOOK.format(before=before.format(directory)))
    for name in ("held", "go"):
        os.mkfifo(directory / name)
        (directory / name).chmod(0o666)
    environment = launcher_environment()
    return {**environment, "PYTHONPATH": f"{directory}/hooks:{environment['PYTHONPATH']}"}


def background_options(directory: Path) -> list[str]:
    return ["--daemon", f"--audit={directory}/audit", f"--pidfile={directory}/run/pid"]


def content(directory: Path) -> bytes:
    with (
        fdbroker.connect(directory / "run/requests") as client,
        client.open(directory / "tree/file") as file,
    ):
        return bytes(file.read())


def stop(directory: Path) -> None:
    done = run(directory / "policy.yaml", "--stop", f"--pidfile={directory}/run/pid")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_caller_whose_reader_of_ready_has_gone_leaves_the_daemon_its_sockets(directory: Path) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    options = [*background_options(directory), f"--ready-fd={write_end}"]
    done = run(directory / "policy.yaml", *options, pass_fds=[write_end])
    os.close(write_end)
    assert (done.returncode, done.stderr) == (0, "")
    assert content(directory) == b"content"
    stop(directory)


def test_who_waits_for_ready_is_told_when_the_broker_has_closed_its_end() -> None:
    """So what it finds open then is what the broker keeps."""
    nothing: Any = SimpleNamespace(descriptors=list, remove=lambda: None)
    told, ready = os.pipe()
    watcher = start_watcher(Made(nothing, None), ready)
    os.close(ready)
    os.write(watcher.word, READY)
    assert not select.select([told], [], [], 0.1)[0]
    os.close(watcher.word)
    assert os.read(told, 99) == READY
    for descriptor in (told, watcher.done):
        os.close(descriptor)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_caller_that_is_interrupted_ends_the_daemon_before_it_removes_anything(
    directory: Path, number: signal.Signals
) -> None:
    environment = hooked(directory, HOLD)
    with subprocess.Popen(
        command(directory / "policy.yaml", *background_options(directory)),
        env=environment,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as caller:
        daemon = os.pidfd_open(int((directory / "held").read_text()))
        assert sorted(os.listdir(directory / "run")) == ["control", "pid", "requests"]
        caller.send_signal(number)
        _, text = caller.communicate(timeout=20)
    assert caller.returncode == 2
    assert text == "fdbroker: interrupted before it served, so it was ended\n"
    with pytest.raises(ProcessLookupError):
        signal.pidfd_send_signal(daemon, 0)
    os.close(daemon)
    assert os.listdir(directory / "run") == ["pid"]
    assert (directory / "run/pid").read_text() == ""


def test_a_caller_that_is_killed_while_it_waits_leaves_a_daemon_that_serves(directory: Path) -> None:
    environment = hooked(directory, HOLD)
    with subprocess.Popen(
        command(directory / "policy.yaml", *background_options(directory)), env=environment
    ) as caller:
        (directory / "held").read_text()
        caller.kill()
    assert caller.returncode == -signal.SIGKILL
    (directory / "go").write_text("")
    wait_until(lambda: b'"started"' in (directory / "audit").read_bytes(), "the broker has started")
    wait_until(lambda: not whose_command_line_names(directory), "no process waits for nobody")
    assert content(directory) == b"content"
    stop(directory)


@pytest.mark.parametrize("how", ["--foreground", "--daemon"])
@pytest.mark.parametrize(("before", "status"), [(MISSING, 2), (BUG, 1)])
def test_a_start_that_fails_after_it_gave_up_root_leaves_nothing_and_has_its_status(
    directory: Path, how: str, before: str, status: int
) -> None:
    options = [how, f"--audit={directory}/audit", f"--pidfile={directory}/run/pid"]
    done = run(directory / "policy.yaml", *options, env=hooked(directory, before))
    assert done.returncode == status, done.stderr
    if before == BUG:
        assert "RuntimeError: a bug" in done.stderr
    else:
        assert done.stderr.startswith("fdbroker: the broker's interpreter /")
        assert "can't be run: No such file or directory; install it where every user can reach" in done.stderr
    assert os.listdir(directory / "run") == ["pid"]
    assert (directory / "run/pid").read_text() == ""


@pytest.mark.parametrize("how", ["--foreground", "--daemon"])
def test_a_limit_of_the_system_is_named_with_where_to_look(directory: Path, how: str) -> None:
    few = ["sh", "-c", 'ulimit -n 9; exec "$@"', "sh"]
    options = [how, f"--audit={directory}/audit", f"--pidfile={directory}/run/pid"]
    (directory / "policy.json").write_text(json.dumps(policy(directory / "tree")))
    done = run(directory / "policy.json", *options, f"--socket={directory}/run/requests", prefix=few)
    assert done.returncode == 2
    assert "Too many open files" in done.stderr
    assert "; " in done.stderr


@pytest.mark.parametrize("how", ["--foreground", "--daemon"])
def test_a_broker_that_can_not_go_on_leaves_nothing(directory: Path, how: str) -> None:
    few = ["sh", "-c", 'ulimit -n 200; exec "$@"', "sh"]
    options = [how, f"--audit={directory}/audit", f"--pidfile={directory}/run/pid"]
    done = run(directory / "policy.yaml", *options, prefix=few)
    assert done.returncode == 2
    assert "the broker may have 200 descriptors open (RLIMIT_NOFILE) and needs 1024" in done.stderr
    # In the foreground by a process that outlives it for a moment.
    wait_until(lambda: not whose_command_line_names(directory), "the sockets are removed")
    assert os.listdir(directory / "run") == ["pid"]
    assert (directory / "run/pid").read_text() == ""


def test_a_broker_that_is_killed_before_it_serves_leaves_nothing(directory: Path) -> None:
    environment = hooked(directory, HOLD)
    words = command(directory / "policy.yaml", "--audit=none")
    with subprocess.Popen(words, env=environment, start_new_session=True) as process:
        assert int((directory / "held").read_text()) == process.pid
        # Ctrl-C reaches all processes of the foreground: who sees to the sockets must outlive the others.
        os.killpg(process.pid, signal.SIGINT)
        process.kill()
    wait_until(lambda: not whose_command_line_names(directory), "the sockets are removed")
    assert os.listdir(directory / "run") == []


def test_a_broker_that_serves_has_no_process_beside_it(directory: Path) -> None:
    with started(directory / "policy.yaml", "--audit=none"):
        wait_until(lambda: not whose_command_line_names(directory), "the one that watched has ended")
