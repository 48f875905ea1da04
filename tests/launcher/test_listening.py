"""Starts at the same time: one of them gets the socket, and it is reached by its name."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from fdbroker.client import control
from fdbroker.launcher.errors import LaunchError
from fdbroker.launcher.listening import MadeSockets, WantedSocket
from tests.launcher.starting import command
from tests.processes import background, in_child, wait_until
from tests.running_broker import launcher_environment

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.root


def waits_for_a_lock(pid: int) -> bool:
    """Return whether a process is in the line for a lock of a file; proc_locks(5)."""
    with open("/proc/locks", encoding="ascii") as file:
        return any("->" in line and f" {pid} " in line for line in file)


def test_a_socket_that_is_bound_and_does_not_listen_yet_is_not_taken_for_one_left_behind(
    directory: Path,
) -> None:
    wanted = WantedSocket(str(directory / "run/requests"), 0, 0o600, "requests")
    bound, told = os.pipe()
    go_on, go = os.pipe()

    def first() -> None:
        """Stop between bind(2) and listen(2), then serve."""

        class Slow(socket.socket):
            def listen(self, *backlog: Any) -> None:  # noqa: ANN401 - as socket's
                os.write(told, b"x")
                os.read(go_on, 1)
                super().listen(*backlog)

        pytest.MonkeyPatch().setattr(socket, "socket", Slow)
        MadeSockets().make(wanted)
        os.write(told, b"x")
        signal.pause()

    def second() -> str:
        os.write(told, str(os.getpid()).encode())
        with pytest.raises(LaunchError) as caught:
            MadeSockets().make(wanted)
        return str(caught.value)

    with background(first):
        os.read(bound, 1)
        before = os.stat(wanted.path)
        outcome, write_end = os.pipe()

        def second_tells() -> None:
            os.write(write_end, second().encode())

        with background(second_tells):
            pid = int(os.read(bound, 10))
            wait_until(
                lambda: waits_for_a_lock(pid) or select.select([outcome], [], [], 0)[0], "the second is there"
            )
            os.write(go, b"x")
            os.read(bound, 1)
            assert "somebody listens there, so a broker runs already" in os.read(outcome, 1000).decode()
        assert os.path.samestat(os.stat(wanted.path), before)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
            client.connect(wanted.path)
    for number in (bound, told, go_on, go, outcome, write_end):
        os.close(number)


def test_of_starts_at_the_same_time_one_serves_and_has_the_sockets(directory: Path) -> None:
    for _ in range(3):  # later ones find what the one before left behind
        with contextlib.ExitStack() as stack:
            starts = []
            for _ in range(4):
                ready, told = os.pipe()
                stack.enter_context(open(ready, "rb", closefd=True))
                words = [*command(directory / "policy.yaml", "--audit=none"), f"--ready-fd={told}"]
                process = subprocess.Popen(
                    words,
                    env=launcher_environment(),
                    pass_fds=[told],
                    stdin=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    text=True,
                )
                os.close(told)
                starts.append((process, ready))
            serving = [process for process, ready in starts if os.read(ready, 10) == b"ready\n"]
            for process, _ in starts:
                if process not in serving:
                    _, text = process.communicate(timeout=20)
                    assert (process.returncode, "somebody listens there" in text) == (2, True), text
            [one] = serving
            with control.connect(directory / "run/control") as client:
                assert client.status()["pid"] == one.pid
            assert sorted(os.listdir(directory / "run")) == ["control", "requests"]
            one.terminate()
            _, text = one.communicate(timeout=20)
            assert (one.returncode, text) == (0, "")


def test_a_lock_that_somebody_left_behind_does_not_matter_and_goes_away(directory: Path) -> None:
    (directory / "run").mkdir()
    (directory / "run/.fdbrokerd.lock").touch(0o600)

    def make() -> list[str]:
        MadeSockets().make(WantedSocket(str(directory / "run/requests"), 0, 0o600, "requests"))
        return os.listdir(directory / "run")

    assert in_child(make) == ["requests"]


@pytest.mark.parametrize("kind", ["link", "readable by all", "directory"])
def test_a_lock_that_is_not_roots_alone_is_not_waited_for(directory: Path, kind: str) -> None:
    (directory / "run").mkdir()
    lock = directory / "run/.fdbrokerd.lock"
    if kind == "link":
        lock.symlink_to(directory / "elsewhere")
    elif kind == "directory":
        lock.mkdir()
    else:
        lock.touch(0o644)
    with pytest.raises(LaunchError, match=r"/run/\.fdbrokerd\.lock' is in the way.*remove it"):
        MadeSockets().make(WantedSocket(str(directory / "run/requests"), 0, 0o600, "requests"))
    assert sorted(os.listdir(directory / "run")) == [".fdbrokerd.lock"]
    assert not (directory / "elsewhere").exists()


@pytest.mark.parametrize("kind", ["seqpacket", "stream", "dgram"])
def test_a_socket_is_of_the_kind_that_is_wanted_and_replaces_one_of_any_kind(
    directory: Path, kind: str
) -> None:
    types = {
        "seqpacket": socket.SOCK_SEQPACKET,
        "stream": socket.SOCK_STREAM,
        "dgram": socket.SOCK_DGRAM,
    }
    (directory / "run").mkdir()
    path = str(directory / "run/requests")
    wanted = WantedSocket(path, 0, 0o600, "requests", kind)
    for of_type in types.values():
        with socket.socket(socket.AF_UNIX, of_type) as left_behind:
            left_behind.bind(path)
            if of_type != socket.SOCK_DGRAM:
                left_behind.listen()
            with pytest.raises(LaunchError, match=r"somebody listens there|of another type is there, and in"):
                MadeSockets().make(wanted)
        made = MadeSockets()
        with socket.socket(fileno=made.make(wanted)) as sock:
            assert sock.type == types[kind]
            listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            assert bool(listens) is (kind != "dgram")
            # What is sent to it before there is a broker tells who sent it.
            tells = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED)
            assert bool(tells) is (kind == "dgram")
        made.remove()
        assert os.listdir(directory / "run") == []
