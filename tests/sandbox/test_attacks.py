from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest

from fdbroker.sandbox.confine import Confinement
from fdbroker.sandbox.process import start_confined
from tests.processes import in_child
from tests.running_broker import reachable_directory
from tests.sandbox.attacks import ATTACKS, attempt_all, call, look_at_a_path, use_as_meant
from tests.sandbox.confined import (
    IDS,
    KILLING,
    PERMISSIVE,
    WORKER_UID,
    answers_one,
    ask,
    run_confined,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.root

# What works for any process that owns the file and has its parent's uid, and so must be taken from a worker.
WORK_UNCONFINED = {
    "open a file",
    "open a file by openat2",
    "open the root directory",
    "make a file",
    "make a directory",
    "read a path's metadata",
    "reopen for reading",
    "reopen for writing",
    "change its mode",
    "change its owner",
    "change its times",
    "lock it",
    "lock it as POSIX does",
    "duplicate it",
    "map it executable",
    "map writable and executable memory",
    "make a memfd",
    "make a Unix socket",
    "make an Internet socket",
    "make a pair of sockets",
    "make a pipe",
    "fork",
    "ask whether the parent could be killed",
    "get a descriptor of the parent",
    "be dumpable again",
}

# What the layers beside the filter stop by themselves: empty root, Landlock, limits, no write-execute memory.
STOPPED_TWICE = {
    "open a file",
    "open a file by openat2",
    "open the root directory",
    "make a file",
    "make a directory",
    "read a path's metadata",
    "reopen for reading",
    "reopen for writing",
    "write",
    "truncate",
    "map writable and executable memory",
    "fork",
    "execute a program",
    "ask whether the parent could be killed",
    "trace the parent",
    "read the parent's memory",
    "be root",
    "leave the root",
}

MADE = (b"/tmp/fdbroker-test-made", b"/tmp/fdbroker-test-made-too")


@pytest.fixture
def own_file() -> Iterator[int]:
    """Return a descriptor for reading of a file that the worker's uid owns, on a writable mount."""
    with reachable_directory() as directory:
        path = directory / "own"
        path.write_text("contents")
        os.chown(path, WORKER_UID, WORKER_UID)
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield descriptor
        finally:
            os.close(descriptor)
            for made in MADE:
                if os.path.isdir(made):
                    os.rmdir(made)
                elif os.path.exists(made):
                    os.unlink(made)


def attempt_in_unconfined_child(descriptor: int) -> dict[str, int]:
    """Attack as an ordinary process does whose parent has the same uid."""
    os.setresuid(WORKER_UID, WORKER_UID, WORKER_UID)
    parent = os.getpid()
    return in_child(lambda: attempt_all(descriptor, parent))


def test_attacks_work_where_nothing_confines(own_file: int) -> None:
    results = in_child(lambda: attempt_in_unconfined_child(own_file))
    assert {name for name, number in results.items() if number == 0} >= WORK_UNCONFINED


def test_worker_that_root_started_can_do_nothing(own_file: int) -> None:
    parent = os.getpid()
    results = run_confined(lambda descriptor: attempt_all(descriptor, parent), own_file)
    assert results == dict.fromkeys(ATTACKS, errno.EPERM)
    assert os.fstat(own_file).st_size == 8


def test_worker_of_an_unprivileged_parent_can_do_nothing(own_file: int) -> None:
    def start() -> dict[str, int]:
        parent = os.getpid()
        return run_confined(lambda descriptor: attempt_all(descriptor, parent), own_file, ids=None)

    assert in_child(start, uid=WORKER_UID) == dict.fromkeys(ATTACKS, errno.EPERM)


def test_layers_beside_the_filter_stop_the_worst_by_themselves(own_file: int) -> None:
    parent = os.getpid()
    results = run_confined(lambda descriptor: attempt_all(descriptor, parent), own_file, program=PERMISSIVE)
    worked = {name for name, number in results.items() if number == 0}
    assert not worked & STOPPED_TWICE


def test_worker_can_use_the_descriptor_as_meant(own_file: int) -> None:
    assert run_confined(use_as_meant, own_file) == {
        "read": "cont",
        "pread": "ents",
        "lseek": 8,
        "fstat": 8,
        "mmap": "contents",
        "anonymous memory": 0,
        "metadata by a descriptor": 0,
    }


def test_metadata_call_with_the_flag_for_no_path_meets_an_empty_root(own_file: int) -> None:
    assert look_at_a_path() == 0
    # The worker may not even search its root: that belongs to who started it.
    assert run_confined(lambda _descriptor: look_at_a_path(), own_file) == errno.EACCES


@pytest.mark.parametrize(
    "name", ["open a file", "make a Unix socket", "fork", "lock it", "be dumpable again"]
)
def test_production_filter_kills_a_worker_that_tries(name: str, own_file: int) -> None:
    process, _ = start_confined(
        Confinement(KILLING, IDS), answers_one(lambda descriptor: ATTACKS[name](descriptor, 1))
    )
    assert ask(process, own_file) is None
    assert process.stop(grace=10.0) == "it made a system call that it may not make (SIGSYS)"


def test_worker_can_talk_on_its_channel_alone(own_file: int) -> None:
    # A message of no bytes on the descriptor that was passed, which could have been a socket.
    message = b"\0" * 56
    assert run_confined(lambda fd: call("sendmsg", fd, message, 0), own_file) == errno.EPERM
    assert run_confined(lambda fd: call("recvmsg", fd, message, 0), own_file) == errno.EPERM
