"""A real clamd, and a false one that answers what no clamd should."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import threading
from typing import TYPE_CHECKING

import pytest

from fdbroker.kernel import sockets
from fdbroker.scan.engine import EngineError
from fdbroker.scan.engines.clamd import Clamd, ClamdOptions, verdict_of
from fdbroker.scan.outside import Handover
from fdbroker.scan.verdict import Clean, Error, Infected, Reason
from tests.scan import samples
from tests.scan.clamav import BAD, BAD_NAME, TEST_FILE_NAME, TEST_FILES, make_database, running_clamd
from tests.scan.descriptors import make_and_open, open_descriptors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from fdbroker.scan.verdict import Verdict

SOUND = ("AlertExceedsMax yes", "AlertEncrypted yes")


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_database(tmp_path_factory.mktemp("clamd") / "database")


@pytest.fixture(scope="module")
def clamd(tmp_path_factory: pytest.TempPathFactory, database: Path) -> Iterator[Path]:
    with running_clamd(tmp_path_factory.mktemp("clamd"), database, *SOUND) as socket_path:
        yield socket_path


def scan(engine: Clamd, directory: Path, files: Mapping[str, bytes]) -> dict[str, Verdict]:
    names = list(files)
    with contextlib.ExitStack() as opened, Handover(engine) as handover:
        for number, name in enumerate(names):
            descriptor = make_and_open(directory / f"sample{number}", files[name])
            opened.callback(os.close, descriptor)
            handover.submit(number, descriptor)
        return {names[number]: verdict for number, verdict in handover.finish()}


def reason_of(verdict: Verdict) -> str:
    return verdict.reason if isinstance(verdict, Error) else verdict.verdict


def test_many_files_of_all_kinds_have_their_own_verdict(clamd: Path, tmp_path: Path) -> None:
    before = open_descriptors()
    engine = Clamd(ClamdOptions(bytes(clamd)))
    bad = {f"bad {name}": make(BAD) for name, make in samples.CONTAINERS.items() if name != "nested 8 times"}
    fine = {f"fine {number}": b"fine %d" % number for number in range(100)}
    real = {path.name: path.read_bytes() for path in sorted(TEST_FILES.iterdir())}
    verdicts = scan(engine, tmp_path, {**bad, **fine, **real})
    assert verdicts == {
        **dict.fromkeys(bad, Infected(BAD_NAME)),
        **dict.fromkeys(fine, Clean()),
        **dict.fromkeys(real, Infected(TEST_FILE_NAME)),
    }
    assert open_descriptors() == before


def test_what_clamd_can_not_look_into_is_an_error(clamd: Path, tmp_path: Path) -> None:
    engine = Clamd(ClamdOptions(bytes(clamd), max_file_size=100_000))
    files = {
        "limit_exceeded": samples.nested(b"x" * 1000, 30),
        "unscannable_encrypted": samples.encrypted_in_name_only(b"x" * 1000),
        "unscannable_container": samples.RAR5,
        "too_large": bytes(100_001),
    }
    verdicts = scan(engine, tmp_path, files)
    assert {name: reason_of(verdict) for name, verdict in verdicts.items()} == {name: name for name in files}


def test_its_version_is_told(clamd: Path) -> None:
    assert Clamd(ClamdOptions(bytes(clamd))).version().startswith("ClamAV 1.4.")


@pytest.mark.parametrize(
    ("settings", "accept", "problem"),
    [
        ((), (), "clamd says OK to limits that it does not look into; in clamd.conf: AlertExceedsMax yes"),
        (
            SOUND[:1],
            (),
            "says OK to encrypted files that it does not look into; in clamd.conf: AlertEncrypted",
        ),
        (SOUND[:1], ("encrypted",), None),
    ],
)
def test_a_clamd_that_calls_clean_what_it_did_not_look_into_is_refused(
    settings: tuple[str, ...], accept: tuple[str, ...], problem: str | None, database: Path, tmp_path: Path
) -> None:
    with running_clamd(tmp_path, database, *settings) as socket_path:
        engine = Clamd(ClamdOptions(bytes(socket_path), accept=accept))
        if problem is None:
            engine.connect().close()
        else:
            with pytest.raises(EngineError, match=problem):
                engine.connect()


def test_a_clamd_that_dies_makes_errors_and_the_next_one_is_used(database: Path, tmp_path: Path) -> None:
    engine = Clamd(ClamdOptions(bytes(tmp_path / "clamd.socket")))
    with Handover(engine) as handover:
        with running_clamd(tmp_path, database, *SOUND):
            first = make_and_open(tmp_path / "first")
            handover.submit(1, first)
            assert handover.finish() == [(1, Clean())]
        os.unlink(tmp_path / "clamd.socket")
        handover.submit(2, first)
        [(_, verdict)] = handover.finish()
        assert reason_of(verdict) == "not_loaded"
        with running_clamd(tmp_path, database, *SOUND):
            handover.submit(3, first)
            assert handover.finish() == [(3, Clean())]
    os.close(first)


@contextlib.contextmanager
def false_clamd(directory: Path, answer: Callable[[int], bytes | None]) -> Iterator[Clamd]:
    """Be a clamd that passes the probes, and answers to file `n` of a connection what `answer` gives.

    None: it closes the connection.
    """
    path = directory / "false.socket"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = listener.accept()
                with sock:
                    converse(sock)

    def converse(sock: socket.socket) -> None:
        count = 0
        while True:
            with (message := sockets.receive(sock, 4096)).descriptors:
                if not message.data:
                    return
                for _ in range(message.data.count(b"zFILDES\0")):
                    count += 1
                    probes = {1: b"Heuristics.Limits.Exceeded.X FOUND", 2: b"Heuristics.Encrypted.Zip FOUND"}
                    said = probes.get(count)
                    whole = b"%d: fd[9]: %s\0" % (count, said) if said else answer(count - 2)
                    if whole is None:
                        return
                    sock.sendall(whole)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield Clamd(ClamdOptions(bytes(path), timeout=1.0))
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"OK\0", "unknown_answer"),
        (b"3: OK\0", "unknown_answer"),
        (b"4: fd[9]: OK\0", "unknown_answer"),
        (b"2: fd[9]: OK\0", "unknown_answer"),
        (b"3: fd[9]: OKAY\0", "unknown_answer"),
        (b"3: fd[9]: ok\0", "unknown_answer"),
        (b"3: fd[9]: OK\n\0", "unknown_answer"),
        (b"3: fd[9]: OK OK\0", "unknown_answer"),
        (b"3: fd[9]:  FOUND\0", "unknown_answer"),
        (b"3: fd[x]: OK\0", "unknown_answer"),
        (b"03: fd[9]: OK\0", "unknown_answer"),
        (b"\0", "unknown_answer"),
        (b"UNKNOWN COMMAND\0", "unknown_answer"),
        (b"3: fd[9]: Can't allocate memory ERROR\0", "engine_failed"),
        (b"3: fd[9]: OK", "timed_out"),
        (b"", "timed_out"),
        (None, "crashed"),
    ],
)
def test_no_answer_but_the_right_one_is_clean(answer: bytes | None, reason: str, tmp_path: Path) -> None:
    with false_clamd(tmp_path, lambda _number: answer) as engine:
        verdicts = scan(engine, tmp_path, {"file": b"x"})
    assert reason_of(verdicts["file"]) == reason


def test_answers_in_any_order_and_in_pieces_find_their_files(tmp_path: Path) -> None:
    def answer(number: int) -> bytes:
        # Of two files nothing is said but with the third.
        if number % 3:
            return b""
        lines = [b"%d: fd[9]: B%d FOUND\0" % (each + 2, each) for each in (number, number - 2, number - 1)]
        return b"".join(lines)

    with false_clamd(tmp_path, answer) as engine:
        verdicts = scan(engine, tmp_path, {str(number): b"x" for number in range(1, 10)})
    assert verdicts == {str(number): Infected(f"B{number}") for number in range(1, 10)}


def test_a_socket_that_is_not_there_is_an_error_with_the_cure(tmp_path: Path) -> None:
    engine = Clamd(ClamdOptions(bytes(tmp_path / "missing")))
    for ask in (engine.connect, engine.version):
        with pytest.raises(EngineError, match=r"missing: No such file or directory; does clamd run\?"):
            ask()


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (b"OK", None),
        (b"Heuristics.Limits.Exceeded.MaxFileSize FOUND", Reason.LIMIT_EXCEEDED),
        (b"Heuristics.Encrypted.RAR FOUND", Reason.UNSCANNABLE_ENCRYPTED),
        (b"lstat() failed. ERROR", Reason.ENGINE_FAILED),
        (b"", Reason.UNKNOWN_ANSWER),
        (b"\xff", Reason.UNKNOWN_ANSWER),
    ],
)
def test_what_clamd_says_has_its_verdict(said: bytes, reason: Reason | None) -> None:
    verdict = verdict_of(said)
    assert (verdict.reason if isinstance(verdict, Error) else None) is reason
    assert isinstance(verdict, Clean) == (reason is None)


def test_the_same_files_have_the_same_names_with_clamdscan(clamd: Path, tmp_path: Path) -> None:
    files = {f"f{number}": make(BAD) for number, make in enumerate(samples.CONTAINERS.values())}
    verdicts = scan(Clamd(ClamdOptions(bytes(clamd))), tmp_path, files)
    for name, contents in files.items():
        (tmp_path / name).write_bytes(contents)
    result = subprocess.run(
        ["clamdscan", "--config-file", clamd.parent / "clamd.conf", "--fdpass", "--no-summary", *files],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    said = dict(line.rsplit("/", 1)[-1].split(": ", 1) for line in result.stdout.splitlines())
    shown = {name: f"{v.name} FOUND" if isinstance(v, Infected) else "OK" for name, v in verdicts.items()}
    assert said == shown
