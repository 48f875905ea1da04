"""What a descriptor is like when it arrives: for reading, at the beginning, nobody else's."""

from __future__ import annotations

import errno
import fcntl
import os
from typing import TYPE_CHECKING

import pytest

from tests.descriptors.receiving import received
from tests.processes import in_child, wait_until
from tests.running_broker import CLIENT_UID, OTHER_UID
from tests.sandbox.attacks import value

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.descriptors.conftest import Served

pytestmark = pytest.mark.root

_O_LARGEFILE = {"x86_64": 0o100000, "aarch64": 0o400000}[os.uname().machine]  # the kernel adds it
_KCMP_FILE = 0


@pytest.fixture
def file(served: Served) -> Iterator[Path]:
    """Return a file that only root can read."""
    path = served.tree / "file"
    path.write_bytes(b"content")
    path.chmod(0o600)
    yield path
    path.unlink()


def test_it_reads_what_the_receiver_could_not_open(served: Served, file: Path) -> None:
    def read() -> tuple[bytes, list[int]]:
        errors = []
        with received(served.broker.socket, file) as [descriptor]:
            for path in (str(file), f"/proc/self/fd/{descriptor}"):
                with pytest.raises(PermissionError) as caught:
                    os.open(path, os.O_RDONLY)
                errors.append(caught.value.errno or 0)
            return os.read(descriptor, 100), errors

    assert in_child(read, uid=CLIENT_UID) == (b"content", [errno.EACCES] * 2)


def test_it_is_open_for_reading_without_any_other_flag(served: Served, file: Path) -> None:
    with received(served.broker.socket, file, count=3) as descriptors:
        for descriptor in descriptors:
            # So O_NONBLOCK, with which the broker opened it, is gone as well.
            assert fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~_O_LARGEFILE == os.O_RDONLY
            assert fcntl.fcntl(descriptor, fcntl.F_GETFD) == fcntl.FD_CLOEXEC
            assert fcntl.fcntl(descriptor, fcntl.F_GETOWN) == 0
            assert fcntl.fcntl(descriptor, fcntl.F_GETLEASE) == fcntl.F_UNLCK


def test_it_is_gone_in_a_program_that_the_receiver_starts(served: Served, file: Path) -> None:
    with received(served.broker.socket, file) as [descriptor]:
        pid = os.posix_spawn("/bin/sh", ["sh", "-c", f"test ! -e /proc/self/fd/{descriptor}"], {})
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_each_receiver_starts_at_the_beginning_and_moves_alone(served: Served, file: Path) -> None:
    def read(count: int) -> tuple[int, bytes]:
        with received(served.broker.socket, file) as [descriptor]:
            return os.lseek(descriptor, 0, os.SEEK_CUR), os.read(descriptor, count)

    with received(served.broker.socket, file, count=2) as [one, other]:
        assert os.read(one, 3) == b"con"
        assert in_child(lambda: read(5), uid=CLIENT_UID) == (0, b"conte")
        assert in_child(lambda: read(7), uid=OTHER_UID) == (0, b"content")
        assert os.lseek(other, 0, os.SEEK_CUR) == 0
        assert os.read(one, 100) == b"tent"


def test_no_two_are_one_open_file_description(served: Served, file: Path) -> None:
    me = os.getpid()
    with (
        received(served.broker.socket, file, count=3) as [one, two, three],
        received(served.broker.socket, file) as [four],
    ):
        for other in (two, three, four):
            assert value("kcmp", me, me, _KCMP_FILE, one, other) > 0
        copy = os.dup(one)
        try:
            assert value("kcmp", me, me, _KCMP_FILE, one, copy) == 0
        finally:
            os.close(copy)


def test_broker_keeps_none_of_what_it_gave(served: Served, file: Path) -> None:
    with received(served.broker.socket, file, count=253):
        # It closes its own right after sending.
        wait_until(lambda: str(file) not in served.broker.descriptors().values(), "the broker closed its own")


def test_lock_ends_with_the_receiver(served: Served, file: Path) -> None:
    """A lock belongs to the open file description: a copy that somebody keeps would hold it on."""

    def lock_and_leave() -> None:
        with received(served.broker.socket, file) as [descriptor]:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with open(file, "rb") as own, pytest.raises(BlockingIOError):
                fcntl.flock(own, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def is_free() -> bool:
        with open(file, "rb") as own:
            try:
                fcntl.flock(own, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

    in_child(lock_and_leave, uid=0)
    wait_until(is_free, "the lock is gone")
