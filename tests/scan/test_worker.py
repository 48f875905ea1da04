from __future__ import annotations

import errno
import os
import socket
from typing import TYPE_CHECKING

import pytest

from fdbroker.kernel import sockets
from fdbroker.scan.hashes import load
from fdbroker.scan.worker import ANSWER, REQUEST, Code, examine, serve
from tests.scan.descriptors import EICAR, make_and_open, open_descriptors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

CHUNK = 128 * 1024


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[[bytes], int]]:
    """Return a function that makes a file of these contents and opens it."""
    descriptors: list[int] = []

    def make(contents: bytes) -> int:
        descriptors.append(make_and_open(tmp_path / f"file{len(descriptors)}", contents))
        return descriptors[-1]

    yield make
    for descriptor in descriptors:
        os.close(descriptor)


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK])
def test_whole_file_is_read(size: int, opened: Callable[[bytes], int]) -> None:
    assert examine(opened(b"x" * size), size, load()) == (Code.CLEAN, 0, size)


def test_known_file_is_found_wherever_the_offset_is(opened: Callable[[bytes], int]) -> None:
    descriptor = opened(EICAR)
    os.lseek(descriptor, 5, os.SEEK_SET)
    assert examine(descriptor, len(EICAR), load()) == (Code.INFECTED, 0, len(EICAR))


@pytest.mark.parametrize("expected", [0, 67, 69])
def test_file_of_another_size_than_expected_has_changed(
    expected: int, opened: Callable[[bytes], int]
) -> None:
    assert examine(opened(EICAR), expected, load()) == (Code.CHANGED, 0, 0)


def test_file_that_ends_early_is_a_short_read(
    opened: Callable[[bytes], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    descriptor = opened(b"x" * 10)
    reads = iter([b"x" * 4, b""])
    monkeypatch.setattr(os, "pread", lambda _fd, _length, _offset: next(reads))
    assert examine(descriptor, 10, load()) == (Code.SHORT_READ, 0, 4)


def test_file_that_grows_is_not_read_for_ever(
    opened: Callable[[bytes], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    descriptor = opened(b"x" * 10)
    monkeypatch.setattr(os, "pread", lambda _fd, length, _offset: b"x" * length)
    assert examine(descriptor, 10, load()) == (Code.CHANGED, 0, 11)


def test_file_that_is_rewritten_meanwhile_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    descriptor = make_and_open(path, b"x" * 10)
    pread = os.pread

    def read_then_rewrite(fd: int, length: int, offset: int) -> bytes:
        chunk = pread(fd, length, offset)
        os.utime(path, (1, 1))
        return chunk

    monkeypatch.setattr(os, "pread", read_then_rewrite)
    assert examine(descriptor, 10, load()) == (Code.CHANGED, 0, 10)
    os.close(descriptor)


def test_failed_read_gives_its_errno(opened: Callable[[bytes], int], monkeypatch: pytest.MonkeyPatch) -> None:
    descriptor = opened(b"x" * 10)

    def fail(_fd: int, _length: int, _offset: int) -> bytes:
        raise OSError(errno.EIO, "test")

    monkeypatch.setattr(os, "pread", fail)
    assert examine(descriptor, 10, load()) == (Code.READ_FAILED, errno.EIO, 0)


def test_requests_are_answered_in_order_until_the_other_end_closes(opened: Callable[[bytes], int]) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    clean, infected = opened(b"fine"), opened(EICAR)
    before = open_descriptors()
    with ours, theirs:
        sockets.send(ours, REQUEST.pack(7, 4), [clean])
        two = REQUEST.pack(2**64 - 1, len(EICAR)) + REQUEST.pack(8, 4)
        sockets.send(ours, two, [infected, clean])
        ours.shutdown(socket.SHUT_WR)
        serve(theirs, load())
        assert ANSWER.unpack(ours.recv(100)) == (7, Code.CLEAN, 0, 4)
        assert ANSWER.unpack(ours.recv(100)) == (2**64 - 1, Code.INFECTED, 0, len(EICAR))
        assert ANSWER.unpack(ours.recv(100)) == (8, Code.CLEAN, 0, 4)
        assert open_descriptors() == before


@pytest.mark.parametrize(
    ("length", "count"), [(1, 1), (15, 1), (17, 1), (16, 0), (16, 2), (32, 1), (100, 1), (17 * 16, 17)]
)
def test_what_is_no_request_ends_the_worker(length: int, count: int, opened: Callable[[bytes], int]) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        sockets.send(ours, b"\0" * length, [opened(b"")] * count)
        before = open_descriptors()
        with pytest.raises(ValueError, match="not a request"):
            serve(theirs, load())
        assert open_descriptors() == before
