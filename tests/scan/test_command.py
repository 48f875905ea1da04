"""Real programs as engines."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

import pytest

from fdbroker.scan.engine import EngineError
from fdbroker.scan.engines.command import Command, CommandOptions
from fdbroker.scan.outside import Handover
from fdbroker.scan.verdict import Clean, Error, Infected, Reason
from tests.scan.descriptors import make_and_open, open_descriptors

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from fdbroker.scan.verdict import Verdict


def shell(script: str, **options: Any) -> Command:  # noqa: ANN401 - of different types
    return Command(CommandOptions(("/bin/sh", "-c", script), **options))


def scan(engine: Command, directory: Path, *files: bytes) -> list[Verdict]:
    descriptors = [make_and_open(directory / str(number), each) for number, each in enumerate(files)]
    with Handover(engine) as handover:
        for number, descriptor in enumerate(descriptors):
            handover.submit(number, descriptor)
        verdicts = dict(handover.finish())
    for descriptor in descriptors:
        os.close(descriptor)
    return [verdicts[number] for number in range(len(files))]


def test_the_exit_status_is_the_verdict_as_it_was_configured(tmp_path: Path) -> None:
    engine = shell('exit "$(cat)"', clean=(0, 3), infected=(1, 4), name=None)
    assert scan(engine, tmp_path, b"0", b"3", b"1", b"4") == [Clean(), Clean(), *[Infected("sh")] * 2]


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("cat >/dev/null; exit 2", Reason.ENGINE_FAILED),
        ("cat >/dev/null; kill -SEGV $$", Reason.CRASHED),
        ("cat >/dev/null; kill -KILL $$", Reason.KILLED),
        ("exit 0", Reason.SHORT_READ),
        ("head -c 3 >/dev/null; exit 0", Reason.SHORT_READ),
        ("cat; while :; do echo more than enough; done", Reason.UNKNOWN_ANSWER),
        ("cat >/dev/null; sleep 1000", Reason.TIMED_OUT),
        ("exec /no/such/program", Reason.ENGINE_FAILED),
    ],
)
def test_whatever_else_a_program_does_is_an_error(script: str, reason: Reason, tmp_path: Path) -> None:
    timeout = 1.0 if reason is Reason.TIMED_OUT else 60.0
    [verdict] = scan(shell(script, timeout=timeout, max_output=1000), tmp_path, b"x" * 100_000)
    assert isinstance(verdict, Error), verdict
    assert verdict.reason is reason


def test_the_name_is_found_in_the_output(tmp_path: Path) -> None:
    engine = shell("cat; exit 1", name=r"^found: (\S+)")
    assert scan(engine, tmp_path, b"hello\nfound: Bad.Thing here\n", b"nothing of it") == [
        Infected("Bad.Thing"),
        Infected("sh"),
    ]


def test_several_run_at_a_time_and_each_has_its_own_answer(tmp_path: Path) -> None:
    before = open_descriptors()
    engine = shell('exit "$(cat)"', window=4)
    files = [b"%d" % (number % 3) for number in range(30)]
    said = [verdict.verdict for verdict in scan(engine, tmp_path, *files)]
    assert said == ["clean", "infected", "error"] * 10
    assert open_descriptors() == before


def test_a_program_begins_at_the_beginning_wherever_the_offset_is(tmp_path: Path) -> None:
    descriptor = make_and_open(tmp_path / "file", b"1")
    os.lseek(descriptor, 1, os.SEEK_SET)
    with Handover(shell('exit "$(cat)"')) as handover:
        handover.submit(0, descriptor)
        assert handover.finish() == [(0, Infected("sh"))]
    os.close(descriptor)


def test_a_program_has_nothing_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "x")
    script = "cat >/dev/null; env | sort | tr '\\n' ' '; ls /proc/self/fd | tr '\\n' ' '; pwd; exit 1"
    [verdict] = scan(shell(script, name="(.*)"), tmp_path, b"x")
    assert isinstance(verdict, Infected)
    # ls has a fourth one, of the directory that it lists.
    assert verdict.name == "LANG=C.UTF-8 PATH=/usr/local/bin:/usr/bin:/bin PWD=/ 0 1 2 3 /"


def test_what_a_program_leaves_running_ends_with_it(tmp_path: Path) -> None:
    script = f"cat >/dev/null; sleep 1000 & echo $! >{tmp_path}/pid; exit 0"
    assert scan(shell(script), tmp_path, b"x") == [Clean()]
    pid = int((tmp_path / "pid").read_text())
    end = time.monotonic() + 10
    while is_running(pid):
        assert time.monotonic() < end


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b") ")[2][:1] != b"Z"
    except OSError:
        return False


def test_closing_ends_what_runs(tmp_path: Path) -> None:
    before = open_descriptors()
    descriptor = make_and_open(tmp_path / "file")
    with Handover(shell(f"echo $$ >{tmp_path}/pid; sleep 1000")) as handover:
        handover.submit(0, descriptor)
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            assert handover.answers() == []
    assert not is_running(int((tmp_path / "pid").read_text()))
    os.close(descriptor)
    assert open_descriptors() == before


def test_a_program_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    engine = Command(CommandOptions((str(tmp_path / "missing"),)))
    with pytest.raises(EngineError, match="missing is no program"):
        engine.connect()
    [verdict] = scan(engine, tmp_path, b"x")
    assert isinstance(verdict, Error)
    assert verdict.reason is Reason.NOT_LOADED


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"argv": ()}, "absolute path comes first"),
        ({"argv": ("cat",)}, "absolute path comes first"),
        ({"argv": ("/bin/cat", "a\0b")}, "NUL"),
        ({"argv": ("/bin/cat",), "clean": ()}, "one must be clean"),
        ({"argv": ("/bin/cat",), "infected": (256,)}, "0 to 255"),
        ({"argv": ("/bin/cat",), "infected": (0, 1)}, "0 can't be both"),
        ({"argv": ("/bin/cat",), "name": "("}, "name: "),
        ({"argv": ("/bin/cat",), "name": "x"}, "one group"),
        ({"argv": ("/bin/cat",), "window": 0}, "window"),
    ],
)
def test_options_that_could_be_read_in_two_ways_are_refused(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        CommandOptions(**options)


def test_its_version_is_what_was_configured_or_its_path() -> None:
    paths: Sequence[bytes] = shell("x").databases()
    assert paths == (b"/bin/sh",)
    assert shell("x").version() == "/bin/sh"
    assert shell("x", version="7").version() == "7"
