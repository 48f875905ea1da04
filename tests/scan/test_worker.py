from __future__ import annotations

import errno
import os
import socket
from typing import TYPE_CHECKING

import pytest

from fdbroker.kernel import sockets
from fdbroker.scan import worker as worker_module
from fdbroker.scan.answers import LONGEST_ANSWER, all_clean, decode
from fdbroker.scan.engine import EngineError
from fdbroker.scan.engines.hashes import Hashes, HashesOptions
from fdbroker.scan.examine import examine
from fdbroker.scan.plugins import Configured, configure, to_json
from fdbroker.scan.verdict import LONGEST_NAME, MOST_NAMES, Answer, Clean, Error, Infected, Reason
from fdbroker.scan.worker import MOST_REQUESTS, REQUEST, load, work
from tests.scan.descriptors import EICAR, EICAR_NAME, make_and_open, open_descriptors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from fdbroker.scan.verdict import Verdict

CHUNK = 128 * 1024
CLEAN = all_clean(["hashes"])


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


@pytest.fixture(scope="module")
def engine() -> Hashes:
    made = Hashes(HashesOptions())
    made.warm()
    return made


def verdict_of(engine: Hashes, descriptor: int, size: int) -> Verdict:
    [answer] = examine([engine], descriptor, size, None)
    assert answer.engine == "hashes"
    return answer.verdict


def reason_of(engine: Hashes, descriptor: int, size: int) -> Reason | None:
    verdict = verdict_of(engine, descriptor, size)
    return verdict.reason if isinstance(verdict, Error) else None


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK])
def test_whole_file_is_read(size: int, engine: Hashes, opened: Callable[[bytes], int]) -> None:
    assert verdict_of(engine, opened(b"x" * size), size) == Clean()


def test_known_file_is_found_wherever_the_offset_is(engine: Hashes, opened: Callable[[bytes], int]) -> None:
    descriptor = opened(EICAR)
    os.lseek(descriptor, 5, os.SEEK_SET)
    assert verdict_of(engine, descriptor, len(EICAR)) == Infected(EICAR_NAME)


@pytest.mark.parametrize("expected", [0, 67, 69])
def test_file_of_another_size_than_expected_has_changed(
    expected: int, engine: Hashes, opened: Callable[[bytes], int]
) -> None:
    assert reason_of(engine, opened(EICAR), expected) is Reason.CHANGED


def test_file_that_ends_early_is_a_short_read(
    engine: Hashes, opened: Callable[[bytes], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    descriptor = opened(b"x" * 10)
    reads = iter([b"x" * 4, b""])
    monkeypatch.setattr(os, "pread", lambda _fd, _length, _offset: next(reads))
    assert verdict_of(engine, descriptor, 10) == Error(Reason.SHORT_READ, "only 4 of 10 bytes could be read")


def test_file_that_grows_is_not_read_for_ever(
    engine: Hashes, opened: Callable[[bytes], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    descriptor = opened(b"x" * 10)
    monkeypatch.setattr(os, "pread", lambda _fd, length, _offset: b"x" * length)
    assert reason_of(engine, descriptor, 10) is Reason.CHANGED


def test_file_that_is_rewritten_meanwhile_has_changed(
    engine: Hashes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    descriptor = make_and_open(path, b"x" * 10)
    pread = os.pread

    def read_then_rewrite(fd: int, length: int, offset: int) -> bytes:
        chunk = pread(fd, length, offset)
        os.utime(path, (1, 1))
        return chunk

    monkeypatch.setattr(os, "pread", read_then_rewrite)
    assert reason_of(engine, descriptor, 10) is Reason.CHANGED
    os.close(descriptor)


@pytest.mark.parametrize(
    ("raised", "reason"),
    [
        (OSError(errno.EIO, "test"), Reason.READ_FAILED),
        (MemoryError(), Reason.MEMORY),
        (ZeroDivisionError("test"), Reason.ENGINE_FAILED),
    ],
)
def test_whatever_an_engine_raises_is_an_error_and_the_next_one_is_asked(
    raised: Exception,
    reason: Reason,
    engine: Hashes,
    opened: Callable[[bytes], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(_descriptor: int, _size: int, _scratch: bytes | None) -> Verdict:
        raise raised

    failing = Hashes(HashesOptions())
    monkeypatch.setattr(failing, "scan", fail)
    first, second = examine([failing, engine], opened(b"x"), 1, None)
    assert isinstance(first.verdict, Error)
    assert first.verdict.reason is reason
    assert second.verdict == Clean()


@pytest.mark.parametrize("answer", [None, "clean", True, 0, Clean, Reason.MEMORY])
def test_what_is_no_verdict_is_an_error(
    answer: object, engine: Hashes, opened: Callable[[bytes], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    lying = Hashes(HashesOptions())
    monkeypatch.setattr(lying, "scan", lambda _descriptor, _size, _scratch: answer)
    assert reason_of(lying, opened(b"x"), 1) is Reason.UNKNOWN_ANSWER


def test_requests_are_answered_in_order_until_the_other_end_closes(
    engine: Hashes, opened: Callable[[bytes], int]
) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    clean, infected = opened(b"fine"), opened(EICAR)
    before = open_descriptors()
    with ours, theirs:
        sockets.send(ours, REQUEST.pack(7, 4), [clean])
        two = REQUEST.pack(2**64 - 1, len(EICAR)) + REQUEST.pack(8, 4)
        sockets.send(ours, two, [infected, clean])
        ours.shutdown(socket.SHUT_WR)
        work([engine], theirs, None)
        answers = [answer for _ in range(2) for answer in decode(ours.recv(1000), CLEAN)]
        assert open_descriptors() == before
    assert answers == [
        (7, 4, (Answer("hashes", Clean()),)),
        (2**64 - 1, len(EICAR), (Answer("hashes", Infected(EICAR_NAME)),)),
        (8, 4, (Answer("hashes", Clean()),)),
    ]


def answered(engine: Hashes, *opened: int) -> list[list[int]]:
    """Return the numbers of the files that each message of a worker answers, after one with all of these."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        requests = [REQUEST.pack(number, os.fstat(one).st_size) for number, one in enumerate(opened)]
        sockets.send(ours, b"".join(requests), opened)
        ours.shutdown(socket.SHUT_WR)
        work([engine], theirs, None)
        theirs.close()
        messages = []
        while data := ours.recv(LONGEST_ANSWER + 1):
            assert len(data) <= LONGEST_ANSWER
            messages.append([answer.number for answer in decode(data, CLEAN)])
    return messages


def test_files_of_one_message_are_answered_together(
    engine: Hashes, opened: Callable[[bytes], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [opened(b"fine") for _ in range(MOST_REQUESTS)]
    assert answered(engine, *files) == [[*range(MOST_REQUESTS)]]
    # Unless each takes long.
    monkeypatch.setattr(worker_module, "_SECONDS_HELD_BACK", 0.0)
    assert answered(engine, *files) == [[number] for number in range(MOST_REQUESTS)]


def test_no_message_of_answers_is_longer_than_it_may_be(
    engine: Hashes, opened: Callable[[bytes], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = tuple(chr(0x61 + number) * LONGEST_NAME for number in range(MOST_NAMES))
    monkeypatch.setattr(engine, "scan", lambda *_: Infected(names[0], names[1:]))
    messages = answered(engine, *[opened(b"x") for _ in range(MOST_REQUESTS)])
    assert 1 < len(messages) < MOST_REQUESTS
    assert [number for message in messages for number in message] == [*range(MOST_REQUESTS)]


@pytest.mark.parametrize(
    ("length", "count"), [(1, 1), (15, 1), (17, 1), (16, 0), (16, 2), (32, 1), (100, 1), (17 * 16, 17)]
)
def test_what_is_no_request_ends_the_worker(
    length: int, count: int, engine: Hashes, opened: Callable[[bytes], int]
) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        sockets.send(ours, b"\0" * length, [opened(b"")] * count)
        before = open_descriptors()
        with pytest.raises(ValueError, match="not a request"):
            work([engine], theirs, None)
        assert open_descriptors() == before


def test_engines_are_loaded_as_they_were_configured(tmp_path: Path) -> None:
    added = tmp_path / "list"
    added.write_text("0" * 64 + " Zeros\n")
    [made] = load(to_json([configure("hashes", {"lists": [str(added)]})]))
    assert made.version() == "hashes 1, 4 digests"


def test_engine_that_runs_elsewhere_is_not_loaded_in_a_worker() -> None:
    command = Configured("command", "fdbroker.scan.engines.command:Command", {"argv": ["/bin/true"]})
    with pytest.raises(EngineError, match="does not run in a worker"):
        load(to_json([command]))
