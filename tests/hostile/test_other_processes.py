"""What other processes try with the broker itself, or with what surrounds them, while it serves."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
from typing import TYPE_CHECKING

import pytest

from fdbroker.kernel.libc import LIBC, MACHINE
from fdbroker.kernel.syscall_table import SYSCALLS
from tests.broker.conftest import fill
from tests.broker.speaking import Opened, Speaker
from tests.processes import in_child
from tests.running_broker import (
    BROKER_UID,
    CLIENT_UID,
    RunningBroker,
    policy,
    reachable_directory,
    running_broker,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.root

CLONE_NEWNS = 0x20000  # linux/sched.h
MS_REC, MS_PRIVATE = 0x4000, 1 << 18  # linux/mount.h
PTRACE_ATTACH, PTRACE_SEIZE = 16, 0x4206  # linux/ptrace.h


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    with reachable_directory() as path:
        (path / "tree").mkdir()
        fill(path / "tree")
        yield path


@pytest.fixture(scope="module")
def running(directory: Path) -> Iterator[RunningBroker]:
    with running_broker(directory, policy(directory / "tree")) as broker:
        yield broker


def call(name: str, *arguments: int) -> int:
    """Make a system call; return its errno, 0 if it did what it was asked for."""
    words = [ctypes.c_long(word) for word in (SYSCALLS[MACHINE][name], *arguments, 0, 0, 0)]
    return ctypes.get_errno() if LIBC.syscall(*words) < 0 else 0


def opening(path: str, flags: int = os.O_RDONLY) -> int:
    """Return the errno of an open, 0 if it succeeded."""
    try:
        os.close(os.open(path, flags))
    except OSError as error:
        return error.errno or -1
    return 0


def attempts(pid: int, listener: int) -> dict[str, int]:
    """Try to see into a process, and to take what it has."""
    room = ctypes.create_string_buffer(64)
    part = (ctypes.c_size_t * 2)(ctypes.addressof(room), 8)
    pidfd = os.pidfd_open(pid)
    return {
        "attach to it": call("ptrace", PTRACE_ATTACH, pid),
        "seize it": call("ptrace", PTRACE_SEIZE, pid),
        "take a descriptor of it": call("pidfd_getfd", pidfd, listener, 0),
        "read its memory by a call": call(
            "process_vm_readv", pid, ctypes.addressof(part), 1, ctypes.addressof(part), 1
        ),
        "compare with it": call("kcmp", os.getpid(), pid, 2),
        **{
            f"open its {name}": opening(f"/proc/{pid}/{name}")
            for name in ("mem", "maps", "environ", "auxv", "syscall", "stack", "fd", "map_files")
        },
        "write to its memory": opening(f"/proc/{pid}/mem", os.O_RDWR),
        "open a descriptor of it": opening(f"/proc/{pid}/fd/{listener}"),
        "enter its root": opening(f"/proc/{pid}/root"),
    }


def test_process_of_the_brokers_own_user_gets_nothing_out_of_it(running: RunningBroker) -> None:
    roots = [number for number, what in running.descriptors().items() if what.endswith("/tree")]
    found = in_child(lambda: attempts(running.pid, roots[0]), uid=BROKER_UID)
    assert {what for what, number in found.items() if number not in {errno.EPERM, errno.EACCES}} == set()
    with Speaker.connect(running.socket) as speaker:
        assert speaker.open_one(bytes(running.socket.parent / "tree" / "file")).content == b"content"


def test_the_same_is_to_be_had_from_a_process_that_may_be_looked_into() -> None:
    """The attempts are such that they succeed where nothing keeps them from it."""
    pid = os.fork()
    if not pid:
        os.setresuid(BROKER_UID, BROKER_UID, BROKER_UID)
        LIBC.prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE, which the change of ids took away
        signal.pause()
        os._exit(0)
    try:
        found = in_child(lambda: attempts(pid, 2))
        assert [found[what] for what in ("take a descriptor of it", "open its mem", "open its fd")] == [
            0,
            0,
            0,
        ]
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_others_can_not_signal_it(running: RunningBroker) -> None:
    def end_it() -> int:
        try:
            os.kill(running.pid, signal.SIGKILL)
        except OSError as error:
            return error.errno or -1
        return 0

    assert in_child(end_it, uid=CLIENT_UID) == errno.EPERM
    assert running.is_alive()


def in_a_mount_namespace(function: Callable[[], Opened], over: Path) -> Opened:
    """Call a function in a mount namespace of its own, where something else lies over a directory."""

    def child() -> Opened:
        assert LIBC.unshare(CLONE_NEWNS) == 0
        assert LIBC.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None) == 0
        assert LIBC.mount(b"tmpfs", bytes(over), b"tmpfs", 0, None) == 0
        (over / "file").write_bytes(b"of the client")
        return function()

    return in_child(child)


def test_path_is_the_brokers_whatever_the_client_has_mounted_over_it(
    running: RunningBroker, directory: Path
) -> None:
    def ask() -> Opened:
        assert (directory / "tree" / "file").read_bytes() == b"of the client"
        with Speaker.connect(directory / "broker.seqpacket") as speaker:
            return speaker.open_one(bytes(directory / "tree" / "file"))

    assert in_a_mount_namespace(ask, directory / "tree").content == b"content"


def test_file_of_a_name_in_the_clients_root_alone_is_not_there(
    running: RunningBroker, directory: Path
) -> None:
    def ask() -> Opened:
        (directory / "tree" / "mine").write_bytes(b"of the client")
        with Speaker.connect(directory / "broker.seqpacket") as speaker:
            return speaker.open_one(bytes(directory / "tree" / "mine"))

    assert in_a_mount_namespace(ask, directory / "tree").reason == "not_found"
