"""Opening below a directory: what is opened, what is not, and that no descriptor is left over."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import signal
import stat
from typing import TYPE_CHECKING

import pytest

from fdbroker.kernel import files
from fdbroker.kernel.descriptors import close_all
from fdbroker.kernel.errors import SyscallError
from fdbroker.wire.messages import FileStat

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[int]:
    """A held directory with a file of every kind."""
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "below").mkdir()
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "way").symlink_to("below")
    (tmp_path / "below" / "file").write_bytes(b"deeper")
    os.mkfifo(tmp_path / "fifo")
    descriptor = os.open(tmp_path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def proc() -> Iterator[int]:
    descriptor = files.open_proc_self_fd()
    yield descriptor
    os.close(descriptor)


def count_open() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_regular_file_is_opened_for_reading_blocking_and_close_on_exec(directory: int, proc: int) -> None:
    opened = files.open_regular_beneath(directory, b"below/file", proc)
    assert opened is not None
    with open(opened, "rb") as file:
        assert file.read() == b"deeper"
        flags = fcntl.fcntl(opened, fcntl.F_GETFL)
        assert flags & os.O_ACCMODE == os.O_RDONLY
        assert not flags & (os.O_NONBLOCK | os.O_PATH)
        assert not os.get_inheritable(opened)


@pytest.mark.parametrize("name", [b"below", b"fifo", b"link", b"."])
def test_what_is_no_regular_file_is_not_opened(directory: int, proc: int, name: bytes) -> None:
    before = count_open()
    assert files.open_regular_beneath(directory, name, proc) is None
    assert count_open() == before


def test_writer_of_a_fifo_is_not_woken(directory: int, proc: int, tmp_path: Path) -> None:
    assert files.open_regular_beneath(directory, b"fifo", proc) is None
    # ENXIO: no reader has the FIFO open, nor had it long enough for a writer to be let in.
    with pytest.raises(OSError) as caught:
        os.open(tmp_path / "fifo", os.O_WRONLY | os.O_NONBLOCK)
    assert caught.value.errno == errno.ENXIO


@pytest.mark.parametrize(
    ("path", "number"),
    [
        (b"missing", errno.ENOENT),
        (b"file/", errno.ENOTDIR),
        (b"file/x", errno.ENOTDIR),
        (b"way/file", errno.ELOOP),
        (b"../x", errno.EXDEV),
        (b"/etc/passwd", errno.EXDEV),
        (b"x" * 256, errno.ENAMETOOLONG),
        # ctypes would cut it at the NUL, and a file of that name is there.
        (b"file\0x", errno.EINVAL),
    ],
)
def test_failure_names_the_call_and_leaves_nothing_open(
    directory: int, proc: int, path: bytes, number: int
) -> None:
    before = count_open()
    with pytest.raises(SyscallError, match="openat2") as caught:
        files.open_regular_beneath(directory, path, proc)
    assert caught.value.errno == number
    assert count_open() == before


def test_lease_of_somebody_else_is_busy_at_once(directory: int, proc: int, tmp_path: Path) -> None:
    with open(tmp_path / "file", "rb+") as held:
        fcntl.fcntl(held, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        # The holder is asked to let go by this signal, whose default is the end of the process.
        fcntl.fcntl(held, fcntl.F_SETSIG, signal.SIGCHLD)
        before = count_open()
        with pytest.raises(OSError) as caught:
            files.open_regular_beneath(directory, b"file", proc)
        assert caught.value.errno == errno.EAGAIN
        assert count_open() == before
        fcntl.fcntl(held, fcntl.F_SETLEASE, fcntl.F_UNLCK)


@pytest.mark.parametrize("call", ["fstat", "open", "set_blocking"])
def test_failure_after_the_first_open_leaves_nothing_open(
    directory: int, proc: int, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def fail(*_arguments: object, **_more: object) -> int:
        raise OSError(errno.ENOMEM, "it failed")

    before = count_open()
    with monkeypatch.context() as patched:
        if call == "fstat":  # statx(2) has failed and is asked why
            patched.setattr(files, "_statx_at_once", lambda *_: -1)
        patched.setattr(os, call, fail)
        with pytest.raises(OSError) as caught:
            files.open_regular_beneath(directory, b"file", proc)
    assert caught.value.errno == errno.ENOMEM
    assert count_open() == before


def test_kind_that_the_kernel_does_not_tell_is_not_taken_for_regular(
    directory: int, proc: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = count_open()
    # The room still has the answer for the file before.
    opened = files.open_regular_beneath(directory, b"file", proc)
    assert opened is not None
    os.close(opened)
    monkeypatch.setattr(files, "_statx_at_once", lambda *_: -1)
    assert files.open_regular_beneath(directory, b"fifo", proc) is None
    assert count_open() == before


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EINTR])
@pytest.mark.parametrize("failures", [1, 5])
def test_tree_that_moves_meanwhile_is_tried_again(
    directory: int, proc: int, monkeypatch: pytest.MonkeyPatch, number: int, failures: int
) -> None:
    calls = 0
    real = files._syscall

    def flaky(*arguments: object) -> int:
        nonlocal calls
        calls += 1
        if calls <= failures:
            ctypes.set_errno(number)
            return -1
        return int(real(*arguments))

    monkeypatch.setattr(files, "_openat2_at_once", lambda *_: -1)
    monkeypatch.setattr(files, "_syscall", flaky)
    opened = files.open_regular_beneath(directory, b"file", proc)
    assert opened is not None
    assert stat.S_ISREG(os.fstat(opened).st_mode)
    os.close(opened)


def test_tree_that_never_rests_is_given_up(
    directory: int, proc: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def moving(*_arguments: object) -> int:
        nonlocal calls
        calls += 1
        ctypes.set_errno(errno.EAGAIN)
        return -1

    monkeypatch.setattr(files, "_openat2_at_once", lambda *_: -1)
    monkeypatch.setattr(files, "_syscall", moving)
    with pytest.raises(SyscallError) as caught:
        files.open_regular_beneath(directory, b"file", proc)
    assert caught.value.errno == errno.EAGAIN
    assert calls < 20


def test_files_that_are_opened_in_a_row_come_with_what_they_are_and_each_with_its_own_failure(
    directory: int, proc: int, tmp_path: Path
) -> None:
    (tmp_path / "small").write_bytes(b"1")
    (tmp_path / "large").write_bytes(b"12345")
    (tmp_path / "sub").mkdir()
    before = count_open()
    names = [b"small", b"missing", b"large", b"sub", b"small\0"]
    opened, found = files.open_regular_entries(directory, names, proc, 0, 4, -1)
    try:
        assert [descriptor >= 0 for descriptor in opened] == [True, False, False, False, False]
        assert os.read(opened[0], 10) == b"1"
        assert os.get_blocking(opened[0])
        numbers = [result.errno if isinstance(result, OSError) else None for result in found]
        assert numbers == [None, errno.ENOENT, None, None, errno.EINVAL]
        assert isinstance(found[2], bytes)
        assert_describes(found[2], (tmp_path / "large").stat())
        assert count_open() == before + 1
    finally:
        os.close(opened[0])


def test_no_more_files_than_there_is_room_for_are_opened_in_a_row(directory: int, proc: int) -> None:
    with pytest.raises(ValueError, match="257 names: at most 256"):
        files.open_regular_entries(directory, [b"file"] * 257, proc, 0, 4, -1)


def test_as_many_files_as_there_is_room_for_are_opened_in_a_row_each_with_its_own_facts(
    directory: int, proc: int, tmp_path: Path
) -> None:
    for size in range(files.MOST_ENTRIES):
        (tmp_path / f"{size}").write_bytes(bytes(size))
    names = [b"%d" % size for size in range(files.MOST_ENTRIES)]
    before = count_open()
    opened, found = files.open_regular_entries(directory, names, proc, 0, 1 << 63, -(1 << 63))
    try:
        assert count_open() == before + files.MOST_ENTRIES
        sizes = [os.fstat(descriptor).st_size for descriptor in opened]
        said = [FileStat.decode(record).size for record in found if isinstance(record, bytes)]
        assert sizes == said == list(range(files.MOST_ENTRIES))
    finally:
        close_all(opened)


@pytest.mark.parametrize("newer_than", [-(1 << 63), 0])
def test_nothing_but_regular_files_is_opened_in_a_row(
    directory: int, proc: int, tmp_path: Path, newer_than: int
) -> None:
    names = [b"link", b"fifo", b"below"]
    opened, found = files.open_regular_entries(directory, names, proc, 0, 1 << 63, newer_than)
    assert opened == [-1, -1, -1]
    for name, record in zip(names, found, strict=True):
        assert isinstance(record, bytes)
        assert_describes(record, (tmp_path / os.fsdecode(name)).lstat())


@pytest.mark.parametrize("call", ["_statx_at_once", "_openat_at_once"])
def test_of_files_in_a_row_those_fail_whose_call_does_and_no_descriptor_is_left(
    directory: int, proc: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).write_bytes(b"1")
    calls = 0
    function = getattr(files, call)

    def fails_once(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        return -1 if calls == 2 else function(*arguments)

    def fails(_proc: int, descriptor: int) -> int:
        raise SyscallError(errno.EIO, "stand-in", descriptor=descriptor)

    monkeypatch.setattr(files, call, fails_once)
    monkeypatch.setattr(files, "reopen_for_reading", fails)
    before = count_open()
    opened, found = files.open_regular_entries(directory, [b"a", b"b", b"c"], proc, 0, 4, -1)
    close_all([descriptor for descriptor in opened if descriptor >= 0])
    assert [descriptor >= 0 for descriptor in opened] == [True, False, True]
    assert [getattr(result, "errno", None) for result in found] == [None, errno.EIO, None]
    assert count_open() == before


def test_what_was_opened_in_a_row_is_closed_where_it_can_not_be_given_away(
    directory: int, proc: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(b"1")

    def fails(*_arguments: object) -> None:
        raise OSError(errno.EIO, "stand-in")

    monkeypatch.setattr(os, "set_blocking", fails)
    before = count_open()
    with pytest.raises(OSError, match="stand-in"):
        files.open_regular_entries(directory, [b"a", b"missing"], proc, 0, 4, -1)
    assert count_open() == before


def test_a_descriptor_of_any_number_has_its_name() -> None:
    assert [files._NAMES[number] for number in (0, 1023, 1024, 1 << 20)] == [
        b"0",
        b"1023",
        b"1024",
        b"1048576",
    ]


def assert_describes(record: bytes, facts: os.stat_result) -> None:
    said = FileStat.decode(record)
    for name, value in said._asdict().items():
        assert value == getattr(
            facts, {"links": "st_nlink", "device": "st_dev", "inode": "st_ino"}.get(name, f"st_{name}")
        )


@pytest.mark.parametrize("name", ["file", "sub", "link", "fifo", "late"])
def test_a_stat_record_says_what_fstat_does(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "sub":
        path.mkdir()
    elif name == "link":
        path.symlink_to("nowhere")
    elif name == "fifo":
        os.mkfifo(path)
    else:
        path.write_bytes(b"12345")
    if name == "late":
        os.utime(path, ns=(0, 9_300_000_000 * 1_000_000_000))  # of the year 2264
    descriptor = os.open(path, os.O_PATH | os.O_NOFOLLOW)
    try:
        assert_describes(files.stat_record(descriptor), os.fstat(descriptor))
    finally:
        os.close(descriptor)


def test_a_stat_record_of_nothing_is_the_error_of_fstat() -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        files.stat_record(-1)


def test_a_chunk_of_a_directory_is_parsed_in_parts_as_it_is_at_once(tmp_path: Path) -> None:
    for number in range(50):
        (tmp_path / f"{number:02}{'x' * number}").touch()
    descriptor = os.open(tmp_path, os.O_RDONLY)
    try:
        chunk = files.read_directory_chunk(descriptor)
        assert files.read_directory_chunk(descriptor) == b""
    finally:
        os.close(descriptor)
    whole, end = files.parse_directory_chunk(chunk, 0, len(chunk))
    parts, at = [], 0
    while at < len(chunk):
        entries, at = files.parse_directory_chunk(chunk, at, 100)
        parts += entries
    assert (parts, at) == (whole, end)
    assert sorted(os.fsdecode(name) for name, _, _ in whole) == sorted(os.listdir(tmp_path))
