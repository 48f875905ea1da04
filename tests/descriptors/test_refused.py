"""Only regular files on read-only mounts of known file systems are given; the rest is not even touched."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import signal
import socket
import stat
import time
from typing import TYPE_CHECKING

import pytest

from tests.broker.speaking import Speaker
from tests.descriptors.mounting import MS_RDONLY, MS_REMOUNT, bound, mount, mounted
from tests.descriptors.receiving import received
from tests.descriptors.watching import IN_OPEN, has_news, watched
from tests.processes import background, in_child, wait_until
from tests.running_broker import CLIENT_UID, OWNER_UID, policy, running_broker
from tests.sandbox.attacks import call

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.descriptors.conftest import Served
    from tests.running_broker import RunningBroker

pytestmark = pytest.mark.root

_LEASE_BREAK_SECONDS = 45  # /proc/sys/fs/lease-break-time


def ask(broker: RunningBroker, path: Path) -> tuple[str, int]:
    """Return reason and errno that a client gets."""

    def client() -> tuple[str, int]:
        with Speaker.connect(broker.socket) as speaker:
            return speaker.open_one(bytes(path))[:2]

    return in_child(client, uid=CLIENT_UID)


# kinds


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))


KINDS: dict[str, tuple[Callable[[Path], None], str, int]] = {
    "directory": (lambda path: path.mkdir(), "not_regular", errno.EISDIR),
    "fifo": (os.mkfifo, "not_regular", errno.EINVAL),
    "character device": (
        lambda path: os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3)),
        "not_regular",
        errno.EINVAL,
    ),
    "block device": (
        lambda path: os.mknod(path, stat.S_IFBLK | 0o666, os.makedev(7, 250)),
        "not_regular",
        errno.EINVAL,
    ),
    "socket": (make_socket, "not_regular", errno.EINVAL),
    "link to a file": (lambda path: path.symlink_to("regular"), "symlink", errno.ELOOP),
    "link to a file elsewhere": (lambda path: path.symlink_to("/etc/passwd"), "symlink", errno.ELOOP),
    "link to nothing": (lambda path: path.symlink_to("missing"), "symlink", errno.ELOOP),
    "magic link": (lambda path: path.symlink_to("/proc/self/fd/0"), "symlink", errno.ELOOP),
}


@pytest.mark.parametrize("kind", KINDS)
def test_only_regular_files_are_given(served: Served, kind: str) -> None:
    make, reason, number = KINDS[kind]
    directory = served.tree / f"a {kind}"
    directory.mkdir()
    (directory / "regular").write_bytes(b"content")
    path = directory / "it"
    make(path)
    with watched(path, IN_OPEN) as opened:
        assert ask(served.broker, path) == (reason, number)
        assert not has_news(opened)
        if kind in {"directory", "fifo", "character device"}:
            # It would have been seen.
            os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY))
            assert has_news(opened)
    assert ask(served.broker, directory / "regular") == ("ok", 0)


def test_link_on_the_way_is_refused(served: Served) -> None:
    (served.tree / "real").mkdir()
    (served.tree / "real" / "file").write_bytes(b"content")
    (served.tree / "linked").symlink_to("real")
    assert ask(served.broker, served.tree / "real" / "file") == ("ok", 0)
    assert ask(served.broker, served.tree / "linked" / "file") == ("symlink", errno.ELOOP)


def test_writer_of_a_fifo_is_not_woken(served: Served) -> None:
    fifo = served.tree / "fifo"
    os.mkfifo(fifo)
    read_end, write_end = os.pipe()

    def write() -> None:
        os.write(write_end, b"1")
        descriptor = os.open(fifo, os.O_WRONLY)  # waits for a reader
        os.write(write_end, b"2")
        os.close(descriptor)

    def is_asleep(pid: int) -> bool:
        with open(f"/proc/{pid}/stat", encoding="ascii") as file:
            return file.read().rpartition(")")[2].split()[0] == "S"

    try:
        with background(write) as pid:
            assert os.read(read_end, 1) == b"1"
            wait_until(lambda: is_asleep(pid), "the writer waits")
            for _ in range(20):
                assert ask(served.broker, fifo) == ("not_regular", errno.EINVAL)
            assert select.select([read_end], [], [], 0)[0] == []
            assert is_asleep(pid)
            # This is what wakes it.
            reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
            assert os.read(read_end, 1) == b"2"
            os.close(reader)
    finally:
        os.close(read_end)
        os.close(write_end)


# leases


def test_file_with_a_lease_is_busy_at_once(served: Served) -> None:
    path = served.tree / "leased"
    path.write_bytes(b"content")
    os.chown(path, OWNER_UID, OWNER_UID)
    read_end, write_end = os.pipe()

    def hold() -> None:
        signal.signal(signal.SIGIO, signal.SIG_IGN)  # sent when somebody wants to open it; we stay
        descriptor = os.open(path, os.O_RDWR)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        os.write(write_end, b"1")
        signal.pause()

    try:
        with background(hold, uid=OWNER_UID):
            assert os.read(read_end, 1) == b"1"
            with pytest.raises(BlockingIOError):
                os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            start = time.monotonic()
            answers = {ask(served.broker, path) for _ in range(10)}
            # Each would have taken the time that the kernel gives the holder.
            assert time.monotonic() - start < _LEASE_BREAK_SECONDS / 3
            assert answers == {("busy", errno.EAGAIN)}
        assert ask(served.broker, path) == ("ok", 0)
    finally:
        os.close(read_end)
        os.close(write_end)


# mounts


@contextlib.contextmanager
def broker_for(space: Path, *, cross_mounts: bool) -> Iterator[RunningBroker]:
    """Run a broker for `tree` in the shared file system."""
    tree = space / "tree"
    roots = [{"name": "tree", "path": str(tree), "cross_mounts": cross_mounts, "opens": "loop"}]
    with running_broker(space.parent, policy(tree, roots=roots)) as broker:
        yield broker


def fill(directory: Path) -> Path:
    """Make a file that OWNER_UID may change."""
    path = directory / "file"
    path.write_bytes(b"content")
    os.chown(path, OWNER_UID, OWNER_UID)
    return path


@pytest.mark.parametrize(
    ("cross_mounts", "answer"),
    [(True, ("mount_not_read_only", errno.EROFS)), (False, ("crosses_mount", errno.EXDEV))],
)
def test_what_is_mounted_writable_after_the_start_is_refused(
    space: Path,
    cross_mounts: bool,  # noqa: FBT001
    answer: tuple[str, int],
) -> None:
    below = space / "tree" / "below"
    path = fill(below)
    with broker_for(space, cross_mounts=cross_mounts) as broker:
        assert ask(broker, path) == ("ok", 0)
        with mounted("tmpfs", below):
            fill(below)
            assert ask(broker, path) == answer
            fill(space)
            with bound(space, below):
                assert ask(broker, path) == answer
        assert ask(broker, path) == ("ok", 0)


def test_what_was_mounted_before_the_start_is_read_only(space: Path) -> None:
    below = space / "tree" / "below"
    with mounted("tmpfs", below):
        path = fill(below)
        with broker_for(space, cross_mounts=True) as broker:
            assert ask(broker, path) == ("ok", 0)
            assert reopening(broker, path) == errno.EROFS
        with broker_for(space, cross_mounts=False) as broker:
            assert ask(broker, path) == ("crosses_mount", errno.EXDEV)


def reopening(broker: RunningBroker, path: Path) -> int:
    """Return what the owner's attempt to write comes to."""

    def attempt() -> int:
        with received(broker.socket, path) as [descriptor]:
            return call("openat", -100, b"/proc/self/fd/%d" % descriptor, os.O_RDWR, 0)

    return in_child(attempt, uid=OWNER_UID)


def test_what_is_mounted_read_only_after_the_start_is_given_and_stays_read_only(space: Path) -> None:
    below, stage = space / "tree" / "below", space / "stage"
    stage.mkdir()
    with broker_for(space, cross_mounts=True) as broker, mounted("tmpfs", stage):
        fill(stage)
        with bound(stage, stage, read_only=True), bound(stage, below):
            assert ask(broker, below / "file") == ("ok", 0)
            assert reopening(broker, below / "file") == errno.EROFS


@pytest.mark.xfail(reason="fstatfs(2) gives one flag for both, so this is taken for a read-only mount")
def test_file_system_that_is_read_only_for_a_while_behind_a_writable_mount_is_refused(space: Path) -> None:
    """Read-only is said of the file system and of the mount; the first can be taken back for all."""
    below = space / "tree" / "below"
    with broker_for(space, cross_mounts=True) as broker, mounted("tmpfs", below):
        path = fill(below)
        mount(b"none", bytes(below), flags=MS_REMOUNT | MS_RDONLY)
        assert ask(broker, path) == ("mount_not_read_only", errno.EROFS)


KERNEL_FILES = {
    "proc": ("version", "self/environ", "sys/kernel/hostname"),
    "sysfs": ("kernel/uevent_seqnum",),
    "cgroup2": ("cgroup.procs",),
    "debugfs": ("sleep_time",),
    "securityfs": ("lsm",),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", KERNEL_FILES)
def test_kernel_file_systems_are_never_served(space: Path, kind: str, when: str) -> None:
    below = space / "tree" / "below"
    with contextlib.ExitStack() as stack:
        broker = stack.enter_context(broker_for(space, cross_mounts=True)) if when == "after" else None
        try:
            stack.enter_context(mounted(kind, below))
        except OSError as error:
            pytest.skip(f"{kind} can't be mounted here: {error.strerror}")
        broker = broker or stack.enter_context(broker_for(space, cross_mounts=True))
        names = [name for name in KERNEL_FILES[kind] if (below / name).exists()]
        assert names or kind == "debugfs"
        for name in names:
            # `self` is a symbolic link.
            expected = ("symlink", errno.ELOOP) if "self" in name else ("filesystem", errno.EOPNOTSUPP)
            assert ask(broker, below / name) == expected
        assert ask(broker, below)[0] == "filesystem"
