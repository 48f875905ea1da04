"""Sealed copies of files that lie still, grow, shrink, change or have holes; and their limits."""

from __future__ import annotations

import fcntl
import os
import time
from collections import deque
from typing import TYPE_CHECKING

import pytest

from fdbroker.client import ChangedError, FileTimeoutError, FileTooLargeError
from fdbroker.client.sealed import SEAL_LIMIT, _just_changed, seal, seal_in_steps

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

MIB = 1 << 20


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    """Give a file that nobody changes, of a few MiB, open for reading and writing."""
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        for number in range(3):
            os.write(descriptor, bytes([65 + number]) * MIB)
        os.write(descriptor, b"end")
        yield descriptor
    finally:
        os.close(descriptor)


def content(descriptor: int) -> bytes:
    with open(descriptor, "rb") as copy:
        return copy.read()


def test_a_copy_has_all_seals_and_stands_at_its_beginning(file: int) -> None:
    os.lseek(file, 100, os.SEEK_SET)
    copy = seal(file)
    assert os.lseek(copy, 0, os.SEEK_CUR) == 0
    assert os.lseek(file, 0, os.SEEK_CUR) == 100
    assert not os.get_inheritable(copy)
    seals = fcntl.fcntl(copy, fcntl.F_GET_SEALS)
    for one in (fcntl.F_SEAL_SEAL, fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_GROW, fcntl.F_SEAL_WRITE):
        assert seals & one
    for change in (
        lambda: os.write(copy, b"x"),
        lambda: os.ftruncate(copy, 1),
        lambda: os.ftruncate(copy, 10 * MIB),
        lambda: os.fchmod(copy, 0o700),
    ):
        with pytest.raises(PermissionError):
            change()
    os.pwrite(file, b"changed", 0)
    assert content(copy) == b"A" * MIB + b"B" * MIB + b"C" * MIB + b"end"


def test_an_empty_file_has_an_empty_copy(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with (tmp_path / "empty").open("rb") as empty:
        assert content(seal(empty.fileno())) == b""


def test_a_file_with_holes_is_copied_with_zeros_and_counts_in_full(file: int) -> None:
    os.ftruncate(file, 0)
    os.ftruncate(file, 2 * MIB)
    os.pwrite(file, b"end", 2 * MIB)
    assert content(seal(file, 2 * MIB + 3)) == bytes(2 * MIB) + b"end"
    with pytest.raises(FileTooLargeError, match="2097155 bytes"):
        seal(file, 2 * MIB + 2)
    # Far more than there is memory: refused before anything is copied.
    os.ftruncate(file, 1 << 40)
    began = time.monotonic()
    with pytest.raises(FileTooLargeError, match=str(SEAL_LIMIT)):
        seal(file, path=b"/f")
    assert time.monotonic() - began < 1


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda file: os.pwrite(file, b"x", 3 * MIB + 3), id="grows"),
        pytest.param(lambda file: os.ftruncate(file, 1 << 40), id="grows without end"),
        pytest.param(lambda file: os.ftruncate(file, 10), id="shrinks to less than was copied"),
        pytest.param(lambda file: os.ftruncate(file, 2 * MIB + 5), id="shrinks to more than was copied"),
        pytest.param(lambda file: os.pwrite(file, b"x", 5), id="changes where it was copied"),
        pytest.param(lambda file: os.pwrite(file, b"x", 2 * MIB), id="changes where it was not copied yet"),
        pytest.param(lambda file: os.utime(file, (1, 1)), id="gets another time"),
        pytest.param(lambda file: os.fchmod(file, 0o644), id="gets another mode"),
    ],
)
def test_a_file_that_changes_meanwhile_has_no_copy(file: int, change: Callable[[int], object]) -> None:
    steps = seal_in_steps(file, SEAL_LIMIT, None, b"/f")
    while pause := next(steps):  # until its last change is a tick ago, and one piece is copied
        time.sleep(pause)
    change(file)
    with pytest.raises(ChangedError, match="changed while") as caught:
        deque(steps, maxlen=0)
    assert isinstance(caught.value, BlockingIOError)
    assert caught.value.filename == b"/f"


def test_a_change_within_the_tick_of_the_last_one_is_seen(file: int) -> None:
    """File times come from a clock that moves every few milliseconds: copying begins in a later tick."""
    for number in range(20):
        os.pwrite(file, b"%3d" % number, 0)
        steps = seal_in_steps(file, SEAL_LIMIT, None, None)
        while pause := next(steps):
            time.sleep(pause)
        # Linux 6.13 has times that tell any two changes apart, and would see it without waiting.
        assert not _just_changed(os.fstat(file))
        os.pwrite(file, b"abc", 0)
        with pytest.raises(ChangedError):
            deque(steps, maxlen=0)


def test_a_file_that_never_rests_is_not_waited_for(file: int) -> None:
    steps = seal_in_steps(file, SEAL_LIMIT, None, b"/f")

    def change_between_steps() -> None:
        for _ in range(1000):  # each time a tick that is not over
            ahead = time.clock_gettime_ns(time.CLOCK_REALTIME) + 10_000_000
            os.utime(file, ns=(ahead, ahead))
            next(steps)

    with pytest.raises(ChangedError):
        change_between_steps()


def test_a_time_in_the_future_is_not_waited_for(file: int) -> None:
    later = time.time() + 3600
    os.utime(file, (later, later))
    began = time.monotonic()
    os.close(seal(file))
    assert time.monotonic() - began < 5


def test_a_copy_that_takes_too_long_is_given_up(file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    deadline = time.monotonic() + 3600
    steps = seal_in_steps(file, SEAL_LIMIT, deadline, b"/f")
    while pause := next(steps):
        time.sleep(pause)
    monkeypatch.setattr(time, "monotonic", lambda: deadline)
    with pytest.raises(FileTimeoutError, match="1048576 of 3145731 bytes") as caught:
        next(steps)
    assert isinstance(caught.value, TimeoutError)
    with pytest.raises(FileTimeoutError):
        seal(file, deadline=deadline)


def test_a_copy_that_is_left_unfinished_is_closed(file: int) -> None:
    steps = seal_in_steps(file, SEAL_LIMIT, None, None)
    while next(steps):
        pass
    steps.close()


def test_a_kernel_without_sealing_of_execution_makes_copies_all_the_same(
    file: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = os.memfd_create

    def as_before_6_3(name: str, flags: int) -> int:
        if flags & 8:
            raise OSError(22, "Invalid argument")
        return create(name, flags)

    with monkeypatch.context() as patched:
        patched.setattr(os, "memfd_create", as_before_6_3)
        copy = seal(file)
    assert len(content(copy)) == 3 * MIB + 3


def test_an_error_of_the_system_is_raised_as_it_is(file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: object) -> int:
        raise OSError(28, "No space left on device")

    for call in ("memfd_create", "sendfile"):
        with monkeypatch.context() as patched:
            patched.setattr(os, call, fail)
            with pytest.raises(OSError, match="No space"):
                seal(file)


def test_only_regular_files_are_copied() -> None:
    reading, writing = os.pipe()
    try:
        with pytest.raises(ValueError, match="no regular file"):
            seal(reading)
    finally:
        os.close(reading)
        os.close(writing)
