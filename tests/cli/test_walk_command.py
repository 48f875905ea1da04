"""`fdbroker walk`: what it names, how, and what it says of what is missing."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import time
from typing import TYPE_CHECKING, Any

import pytest

from fdbroker import Client, DisconnectedError, UnavailableError, WalkInterrupted
from fdbroker.cli import walk as walk_module
from fdbroker.cli.broker import DENIED
from fdbroker.client import FileStat, WalkedFile
from fdbroker.testing import FakeBroker
from fdbroker.wire.format import Incomplete
from fdbroker.wire.messages import WalkEnd, WalkEntry
from tests.cli.commands import command, environment, path_of, run_as, run_bytes, run_here, run_on_terminal
from tests.running_broker import CLIENT_UID, policy, reachable_directory, rule, running_broker

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import Self

    from tests.for_other_users import ForOtherUsers

ODD = b"/data/new\nline and \xff"
FILES: dict[bytes, Any] = {
    b"/data/a.c": b"first\n",
    b"/data/sub/b.c": b"x" * 5000,
    b"/data/sub/deep/c.txt": b"",
    ODD: b"odd",
}


@pytest.fixture(scope="module")
def fake() -> Iterator[str]:
    with reachable_directory() as directory, FakeBroker(FILES, socket_path=str(directory / "fake")):
        yield str(directory / "fake")


def paths(output: bytes) -> set[bytes]:
    assert output.endswith(b"\0")
    return set(output.split(b"\0")[:-1])


def documents(output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.splitlines()]


def test_it_names_the_regular_files_below_a_directory(fake: str) -> None:
    result = run_here("walk", "--socket", fake, "/data")
    assert (result.returncode, result.stderr) == (0, "")
    assert set(result.stdout.splitlines()) == {
        "/data/a.c",
        "/data/sub/b.c",
        "/data/sub/deep/c.txt",
        "/data/new\\x0aline and \\xff",
    }


def test_print0_has_the_very_bytes(fake: str) -> None:
    result = run_bytes("walk", "-0", "--socket", fake, "/data")
    assert (result.returncode, result.stderr) == (0, b"")
    assert paths(result.stdout) == set(FILES)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (("--glob", "*.c"), {b"/data/a.c"}),
        (("--glob", "**/*.c"), {b"/data/a.c", b"/data/sub/b.c"}),
        (("--glob", "*.c", "--glob", "**/*.txt"), {b"/data/a.c", b"/data/sub/deep/c.txt"}),
        (("--type", "d"), {b"/data/sub", b"/data/sub/deep"}),
        (("--type", "d,f", "--glob", "sub/*"), {b"/data/sub/deep", b"/data/sub/b.c"}),
        (("--type", "l,o"), set()),
        (("--min-size", "1kB"), {b"/data/sub/b.c"}),
        (("--min-size", "3", "--max-size", "3"), {ODD}),
        (("--max-size", "0"), {b"/data/sub/deep/c.txt"}),
        (("--newer-than", "1969-12-31"), set(FILES)),  # of a fake broker all are of 1970
        (("--newer-than", "1h"), set()),
    ],
)
def test_options_choose_what_is_named(fake: str, options: tuple[str, ...], found: set[bytes]) -> None:
    result = run_bytes("walk", "-0", *options, "--socket", fake, "/data")
    assert (result.returncode, result.stderr) == (0, b"")
    assert (paths(result.stdout) if result.stdout else set()) == found


def test_long_lines_have_the_stat_record_before_the_path(fake: str) -> None:
    result = run_here("walk", "-l", "--glob", "a.c", "--socket", fake, "/data")
    [line] = result.stdout.splitlines()
    words = line.split()
    assert words[0].startswith("-r")
    assert words[4] == "6"
    assert line.endswith(" /data/a.c")


def test_the_contents_come_with_the_walk(fake: str) -> None:
    result = run_bytes("walk", "--sha256", "-0", "--socket", fake, "/data")
    assert (result.returncode, result.stderr) == (0, b"")
    expected = {
        hashlib.sha256(content).hexdigest().encode() + b"  " + path for path, content in FILES.items()
    }
    assert paths(result.stdout) == expected


def test_sums_are_lines_that_sha256sum_checks(fake: str, tmp_path: Path) -> None:
    (tmp_path / "data" / "sub").mkdir(parents=True)
    (tmp_path / "data" / "a.c").write_bytes(FILES[b"/data/a.c"])
    (tmp_path / "data" / "sub" / "b.c").write_bytes(FILES[b"/data/sub/b.c"])
    result = run_here("walk", "--sha256", "--glob", "**/*.c", "--socket", fake, "/data")
    checked = subprocess.run(
        ["sha256sum", "--check", "--strict"],
        input=result.stdout.replace("  /", "  "),
        cwd=tmp_path,
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    assert checked.stdout.count(": OK\n") == 2


def test_json_has_an_object_for_each_entry_and_the_end(fake: str) -> None:
    result = run_here("walk", "--json", "--sha256", "--socket", fake, "/data", "/data/sub/deep")
    assert (result.returncode, result.stderr) == (0, "")
    told = documents(result.stdout)
    assert [document["type"] for document in told] == ["entry"] * 4 + ["end", "entry", "end"]
    entries = {path_of(document): document for document in told[:4]}
    assert entries.keys() == FILES.keys()
    for path, document in entries.items():
        assert document["kind"] == "file"
        assert document["size"] == len(FILES[path])
        assert document["sha256"] == hashlib.sha256(FILES[path]).hexdigest()
    assert told[4] == {
        "type": "end",
        "path": "/data",
        "entries": 4,
        "descriptors": 4,
        "directories": told[4]["directories"],
        "incomplete": [],
        "exit_status": 0,
    }
    assert told[6]["path"] == "/data/sub/deep"


def test_without_hashes_no_file_is_opened(fake: str) -> None:
    told = documents(run_here("walk", "--json", "--socket", fake, "/data").stdout)
    assert told[-1]["descriptors"] == 0
    assert not any("sha256" in document for document in told)


def test_a_start_that_is_not_given_is_told_and_the_others_follow(fake: str) -> None:
    result = run_here("walk", "--json", "--socket", fake, "/none", "/data/a.c", "/data/sub")
    assert result.returncode == 1
    none, file = result.stderr.splitlines()
    assert none.startswith("fdbroker: /none: ")
    assert file.startswith("fdbroker: /data/a.c: ")
    told = documents(result.stdout)
    assert [document["type"] for document in told] == ["end", "end", "entry", "entry", "end"]
    assert [document["exit_status"] for document in told if document["type"] == "end"] == [1, 1, 0]
    assert told[0] == {
        "type": "end",
        "path": "/none",
        "entries": None,
        "descriptors": None,
        "directories": None,
        "incomplete": None,
        "exit_status": 1,
    }


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--type", "x", "/"), "'x' is none of f (regular files), d (directories)"),
        (("--type", "", "/"), "is none of f"),
        (("--type", "f,", "/"), "is none of f"),
        (("--min-size", "2G", "/"), "is not a size"),
        (("--max-size", "-1", "/"), "is not a size"),
        (("--min-size", "2", "--max-size", "1", "/"), "nothing has such a size"),
        (("--newer-than", "yesterday", "/"), "yesterday is no time; write a duration"),
        (("--newer-than", "5", "/"), "is not a duration"),
        (("--newer-than", "3w", "/"), "is not a duration"),
        (("--newer-than", "9000-01-01", "/"), "beyond the times that files have"),
        (("--newer-than", "0001-01-01", "/"), "beyond the times that files have"),
        (("--newer-than", "9999999999999999999h", "/"), "beyond the times that files have"),
        (("--glob", "", "/"), "the glob is empty"),
        (("--glob", "/etc/*", "/"), "the glob starts with '/'"),
        (("--glob", "a\x1b[", "/"), "a\\x1b[: the glob has a '['"),
        (("--glob", "x" * 1025, "/"), "longer than 1024 bytes"),
        ((*("--glob", "x") * 17, "/"), "at most 16 can be given, not 17"),
        (("--sha256", "--type", "f,d", "/"), "leave --type away"),
        (("--json", "-0", "/"), "leave -l and -0 away"),
        (("",), "a path is empty"),
        ((), "Missing argument"),
    ],
)
def test_wrong_use_is_told_before_a_broker_is_asked(arguments: tuple[str, ...], said: str) -> None:
    result = run_here("walk", "--socket", "/nowhere", *arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert said in result.stderr.replace("\n", " ")


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("1970-01-02", 86400 * 10**9),
        ("1970-01-01T00:00:01", 10**9),
        ("1970-01-01T01:00:01+01:00", 10**9),
        ("1969-12-31T23:59:59", -(10**9)),
        ("2023-11-14T22:13:20.123456Z", 1700000000123456000),
    ],
)
def test_dates_are_in_utc_to_the_last_digit(text: str, moment: int) -> None:
    assert walk_module._moment(text) == moment


def test_a_duration_is_before_now() -> None:
    before = time.time_ns()
    moment = walk_module._moment("2h")
    assert before <= moment + 7200 * 10**9 <= time.time_ns()


class _Walk:
    """Stands in for a walk of the client that ends as it is told."""

    def __init__(
        self, end: WalkEnd | BaseException | None = None, entries: tuple[WalkedFile, ...] = ()
    ) -> None:
        self.end = end if isinstance(end, WalkEnd) else None
        self._error = end if isinstance(end, BaseException) else None
        self._entries = entries

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_about: object) -> None:
        pass

    def __iter__(self) -> Iterator[WalkedFile]:
        yield from self._entries
        if self._error is not None:
            raise self._error


def entry(descriptor: int = -1) -> WalkedFile:
    facts = FileStat(1, 2, 0o100600, 1, 0, 0, 3, 0, 0)
    given = WalkEntry(b"x", 8, facts.encode(), descriptor=descriptor >= 0)
    return WalkedFile(b"/data/x", b"x", given, descriptor)


def stand_in(monkeypatch: pytest.MonkeyPatch, *walks: _Walk) -> None:
    waiting = list(walks)
    monkeypatch.setattr(Client, "walk", lambda *_positional, **_named: waiting.pop(0))


def test_each_kind_of_thing_that_is_missing_is_told_and_is_status_3(
    fake: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in Incomplete:
        stand_in(monkeypatch, _Walk(WalkEnd(1, 0, 1, kind), (entry(),)))
        result = run_here("walk", "--json", "--socket", fake, "/data")
        assert result.returncode == 3
        assert result.stderr.startswith("fdbroker: /data: the walk is incomplete: ")
        assert documents(result.stdout)[-1]["incomplete"] == [str(kind.name).lower()]
        assert documents(result.stdout)[-1]["exit_status"] == 3
    stand_in(monkeypatch, _Walk(WalkEnd(1, 0, 1, Incomplete(sum(Incomplete)))))
    result = run_here("walk", "--socket", fake, "/data")
    assert result.stderr.count("; ") == len(Incomplete) - 1
    assert "the policy does not let you see" in result.stderr


def test_a_start_that_is_refused_is_told_before_what_is_missing_elsewhere(
    fake: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = DisconnectedError(104, "gone")
    for walks, status in (
        ((_Walk(WalkEnd(0, 0, 1, Incomplete.REFUSED)), _Walk(WalkEnd(0, 0, 1, Incomplete(0)))), 3),
        ((_Walk(WalkEnd(0, 0, 1, Incomplete(0))), _Walk(WalkEnd(0, 0, 1, Incomplete.REFUSED))), 3),
        ((_Walk(WalkEnd(0, 0, 1, Incomplete.REFUSED)), _Walk(refused)), 2),
    ):
        stand_in(monkeypatch, *walks)
        assert run_here("walk", "--socket", fake, "/data", "/other").returncode == status


@pytest.mark.parametrize(
    "error",
    [
        WalkInterrupted(104, "the walk was cut off"),
        DisconnectedError(104, "the walk was cut off"),
        UnavailableError(111, "the walk was cut off"),
    ],
)
def test_a_walk_that_was_cut_off_is_no_complete_one(
    fake: str, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    stand_in(monkeypatch, _Walk(error, (entry(),)))
    result = run_here("walk", "--json", "--socket", fake, "/data", "/other")
    assert result.returncode == 2
    assert result.stderr == "fdbroker: /data: the walk is incomplete: the walk was cut off\n"
    told = documents(result.stdout)
    assert [document["type"] for document in told] == ["entry", "end"]
    assert told[-1]["incomplete"] is None
    assert told[-1]["exit_status"] == 2


def test_ctrl_c_is_told_and_what_was_found_stays(fake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, _Walk(KeyboardInterrupt(), (entry(),)))
    result = run_here("walk", "--socket", fake, "/data")
    assert (result.returncode, result.stdout) == (2, "/data/x\n")
    assert result.stderr == "fdbroker: /data: interrupted, so the walk is incomplete\n"


def test_a_file_that_may_be_seen_and_not_opened_has_no_sum(
    fake: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, _Walk(WalkEnd(1, 0, 1, Incomplete(0)), (entry(),)))
    result = run_here("walk", "--json", "--sha256", "--socket", fake, "/data")
    assert result.returncode == 1
    assert "/data/x: can't be read: the policy lets you see it, but not open it" in result.stderr
    assert "sha256" not in documents(result.stdout)[0]


def test_a_file_that_can_not_be_read_to_its_end_has_no_sum(
    fake: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, _Walk(WalkEnd(1, 1, 1, Incomplete(0)), (entry(os.open("/", os.O_RDONLY)),)))
    result = run_here("walk", "--sha256", "--socket", fake, "/data")
    assert result.returncode == 1
    assert "/data/x: can't be read: Is a directory" in result.stderr
    assert result.stdout == ""


def test_a_pipe_that_nobody_reads_ends_it_as_others(fake: str) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    with open(write_end, "wb") as pipe:
        result = subprocess.run(
            command("walk", "-0", "--socket", fake, "/data"),
            env=environment(),
            stdout=pipe,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert (result.returncode, result.stderr) == (128 + 13, b"")


def test_there_is_no_bar_on_a_terminal_that_gets_the_paths(fake: str) -> None:
    status, shown = run_on_terminal("walk", "--socket", fake, "/data")
    assert status == 0
    assert b"/data/a.c" in shown
    assert b"\x1b" not in shown


def test_a_bar_tells_how_much_was_found_if_the_paths_go_elsewhere(fake: str) -> None:
    master, terminal = os.openpty()
    with open(master, "rb", buffering=0) as shown_end:
        process = subprocess.Popen(
            command("walk", "--socket", fake, "/data"),
            env=environment(TERM="xterm", COLUMNS="100"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=terminal,
            cwd="/",
        )
        os.close(terminal)
        shown = b""
        try:
            while data := shown_end.read(65536):
                shown += data
        except OSError:  # EIO: the last one has closed it
            pass
        assert process.wait(timeout=60) == 0
    assert b"1 file, " in shown


# ---- a real broker ----


@pytest.mark.root
def test_a_user_without_rights_finds_and_reads_what_the_policy_lets_him(others: ForOtherUsers) -> None:
    with reachable_directory() as directory:
        tree = directory / "tree"
        for number in range(150):
            file = tree / f"d{number % 7}" / f"f{number}"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(os.urandom(number))
            file.chmod(0o600)
        (tree / "link").symlink_to("d0")
        (tree / "hidden").mkdir()
        (tree / "hidden" / "f").write_bytes(b"no")
        allowed = rule("all", **{"except": ["hidden/**"]})
        with running_broker(directory, policy(tree, allowed)) as broker:
            arguments = ("walk", "--socket", str(broker.socket), "--json", "--sha256", str(tree))
            result = run_as(CLIENT_UID, others, *arguments)
            told = documents(result.stdout)
            *entries, end = told
            files = set(tree.glob("d*/f*"))
            assert {path_of(document) for document in entries} == set(map(os.fsencode, files))
            for document in entries:
                with open(document["path"], "rb") as opened:
                    assert document["sha256"] == hashlib.sha256(opened.read()).hexdigest()
            assert (end["entries"], end["descriptors"]) == (150, 150)
            assert end["incomplete"] == ["refused"]
            assert result.returncode == 3
            assert "the policy does not let you see or enter something" in result.stderr
            shown = run_as(CLIENT_UID, others, "walk", "--socket", str(broker.socket), str(tree / "hidden"))
            assert shown.returncode == 1
            assert DENIED in shown.stderr
            assert "--action walk" in shown.stderr
            whole = run_as(CLIENT_UID, others, "walk", "--socket", str(broker.socket), str(tree / "d1"))
            assert (whole.returncode, whole.stderr) == (0, "")
            new = run_as(CLIENT_UID, others, *arguments[:3], "-0", "--newer-than", "1h", str(tree / "d1"))
            assert paths(os.fsencode(new.stdout)) == set(map(os.fsencode, tree.glob("d1/f*")))
