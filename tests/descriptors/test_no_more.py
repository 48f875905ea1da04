"""A descriptor that was received can't be turned into more, not by the file's owner and not by root."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.descriptors.attempts import ATTEMPTS, ATTRIBUTE, attempt_all
from tests.descriptors.receiving import received
from tests.processes import in_child
from tests.running_broker import CLIENT_UID, OTHER_UID, OWNER_UID
from tests.sandbox.attacks import call, value

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.descriptors.conftest import Served

pytestmark = pytest.mark.root

_CLONE_NEWUSER, _CLONE_NEWNS = 0x10000000, 0x20000
_AT_EMPTY_PATH, _OPEN_TREE_CLONE = 0x1000, 1


@pytest.fixture
def file(served: Served) -> Iterator[Path]:
    """Return a file of OWNER_UID, of two pages, that all may write, with an extended attribute."""
    path = served.tree / "file"
    path.write_bytes(b"content" * 1000)
    os.setxattr(path, ATTRIBUTE, b"value")
    os.chown(path, OWNER_UID, OWNER_UID)
    path.chmod(0o666)
    yield path
    path.unlink()


@pytest.fixture
def room(served: Served) -> Iterator[Path]:
    """Return a directory on the same file system where everybody may make names."""
    path = served.tree / "room"
    path.mkdir()
    path.chmod(0o777)
    yield path
    shutil.rmtree(path)


def unread(facts: os.stat_result) -> list[int]:
    """Return what reading does not change: all but atime."""
    wanted = "dev ino mode nlink uid gid size blocks mtime_ns ctime_ns"
    return [getattr(facts, f"st_{name}") for name in wanted.split()]


@pytest.mark.parametrize("uid", [OWNER_UID, CLIENT_UID, 0], ids=["owner", "anybody", "root"])
def test_nothing_that_is_tried_with_a_received_descriptor_works(
    served: Served, file: Path, room: Path, uid: int
) -> None:
    before = unread(file.stat())

    def attempt() -> dict[str, int]:
        with received(served.broker.socket, file) as [descriptor]:
            return attempt_all(descriptor, bytes(room / "name"))

    tried = in_child(attempt, uid=uid)
    wrong = {
        name: os.strerror(number) for name, number in tried.items() if number not in ATTEMPTS[name].answers
    }
    assert not wrong
    assert tried.keys() == ATTEMPTS.keys()
    assert file.read_bytes() == b"content" * 1000
    assert os.getxattr(file, ATTRIBUTE) == b"value"
    # Not even ctime, which moves whatever is changed.
    assert unread(file.stat()) == before
    assert list(room.iterdir()) == []


@pytest.mark.parametrize("uid", [OWNER_UID, CLIENT_UID, 0], ids=["owner", "anybody", "root"])
def test_all_of_it_works_with_a_descriptor_of_ones_own(file: Path, room: Path, uid: int) -> None:
    def attempt() -> dict[str, int]:
        descriptor = os.open(file, os.O_RDWR)
        try:
            return attempt_all(descriptor, bytes(room / "name"))
        finally:
            os.close(descriptor)

    for name, number in in_child(attempt, uid=uid).items():
        needs_owner = ATTEMPTS[name].by_owner and uid == CLIENT_UID
        assert number == (errno.EPERM if needs_owner else 0), name


def test_reopening_needs_no_more_than_the_mount_to_be_refused(served: Served, file: Path) -> None:
    """The owner opens his own file for reading only: what holds him back above is not the access mode."""

    def attempt() -> dict[str, int]:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            return attempt_all(descriptor, b"/fdbroker-test-no-directory/name")
        finally:
            os.close(descriptor)

    for name, number in in_child(attempt, uid=OWNER_UID).items():
        if ATTEMPTS[name].answers == {errno.EROFS}:
            assert number == 0, name


def test_access_mode_can_not_be_changed_afterwards(served: Served, file: Path) -> None:
    def attempt() -> tuple[int, int]:
        with received(served.broker.socket, file) as [descriptor]:
            fcntl.fcntl(descriptor, fcntl.F_SETFL, os.O_RDWR | os.O_APPEND)
            return fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE, call("write", descriptor, b"x", 1)

    assert in_child(attempt, uid=OWNER_UID) == (os.O_RDONLY, errno.EBADF)


def test_it_leads_to_no_directory(served: Served, file: Path) -> None:
    def attempt() -> list[int]:
        with received(served.broker.socket, file) as [descriptor]:
            return [
                call("openat", descriptor, b"..", os.O_RDONLY, 0),
                call("openat", descriptor, b".", os.O_PATH, 0),
                call("openat", -100, b"/proc/self/fd/%d/.." % descriptor, os.O_RDONLY, 0),
                call("fchdir", descriptor),
                call("chroot", b"/proc/self/fd/%d" % descriptor),
            ]

    assert in_child(attempt, uid=OWNER_UID) == [errno.ENOTDIR] * 5


def test_its_mount_can_not_be_copied_into_namespaces_of_ones_own(served: Served, file: Path) -> None:
    """Where somebody is root in a namespace, a copy of the mount could be made writable."""

    def attempt() -> tuple[int, int] | None:
        with received(served.broker.socket, file) as [descriptor]:
            if call("unshare", _CLONE_NEWUSER | _CLONE_NEWNS) != 0:
                return None
            own = os.open(file, os.O_RDONLY)
            flags = _AT_EMPTY_PATH | _OPEN_TREE_CLONE
            return value("open_tree", descriptor, b"", flags), value("open_tree", own, b"", flags)

    answers = in_child(attempt, uid=OWNER_UID)
    if answers is None:
        pytest.skip("user namespaces are switched off here")
    theirs, own = answers
    assert theirs == -errno.EINVAL
    assert own >= 0


def test_somebody_else_can_not_take_a_lease_on_it(served: Served, file: Path) -> None:
    def attempt() -> int:
        with received(served.broker.socket, file) as [descriptor]:
            return call("fcntl", descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)

    assert in_child(attempt, uid=CLIENT_UID) == errno.EACCES
    assert in_child(attempt, uid=OWNER_UID) == 0  # it is his file


def test_set_user_id_program_gives_no_other_user_id(served: Served) -> None:
    program = served.tree / "program"
    shutil.copyfile("/usr/bin/id", program)
    os.chown(program, OTHER_UID, OTHER_UID)
    program.chmod(0o4755)

    def run(path: str, *descriptors: int) -> int:
        answer = subprocess.run([path, "-u"], check=True, stdout=subprocess.PIPE, pass_fds=descriptors)
        return int(answer.stdout)

    def run_received() -> int:
        with received(served.broker.socket, program) as [descriptor]:
            return run(f"/proc/self/fd/{descriptor}", descriptor)

    assert in_child(lambda: run(str(program)), uid=CLIENT_UID) == OTHER_UID
    assert in_child(run_received, uid=CLIENT_UID) == CLIENT_UID
