"""`fdbroker audit`: what people see of a record, what is picked, what is missing, and following a file."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from fdbroker.cli import audit, broker
from fdbroker.cli.audit_file import follow_lines
from fdbroker.cli.audit_records import Filter, Line, path_of
from fdbroker.cli.failure import Failure
from fdbroker.policy.globs import compile_glob
from tests.cli.commands import command, environment, run_as, run_here, run_on_terminal
from tests.running_broker import CLIENT_UID, policy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.for_other_users import ForOtherUsers

RUN = "a33c4ee4498e32b1"


def record(number: int, **members: object) -> dict[str, Any]:
    return {
        "run": RUN,
        "seq": number,
        "time": "2026-11-23T21:56:43.019306Z",
        "event": "open",
        "socket": "broker.seqpacket",
        "connection": 2,
        "pid": 10977,
        "uid": 54321,
        "gid": 54321,
        "identity": 2,
        "request": 3,
        "generation": 1,
        "path": f"/srv/{number}",
        "decision": "allow",
        "reason": "ok",
        "rule": "all",
    } | members


RECORDS = [
    {
        "run": RUN,
        "seq": 0,
        "time": "2026-11-23T21:56:40.000000Z",
        "event": "started",
        "boot": "b",
        "landlock": 7,
    },
    record(1),
    record(2, decision="deny", reason="deny_rule", rule="never-keys", path="/home/x/.ssh/id"),
    record(3, event="list", uid=0, entries=5),
    record(
        4,
        path="/srv/\ufffdodd",
        path_hex=b"/srv/\xffodd\n".hex(),
        decision="deny",
        reason="no_rule",
        rule=None,
    ),
    record(5, path="/long", path_length=9000),
    {
        "run": RUN,
        "seq": 6,
        "time": "2026-11-23T21:56:50.000000Z",
        "event": "reloaded",
        "uid": 0,
        "fingerprint": "f",
    },
]


def text_of(*records: dict[str, Any]) -> str:
    return "".join(json.dumps(one) + "\n" for one in records)


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "audit.jsonl"
    path.write_text(text_of(*RECORDS))
    return str(path)


def test_record_is_shown_with_time_who_what_path_decision_and_why(file: str) -> None:
    result = run_here("audit", file)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [
        "2026-11-23 21:56:40Z  started  boot=b  landlock=7",
        "2026-11-23 21:56:43Z  ALLOW  open  user 54321  pid 10977  /srv/1  ok  rule all",
        (
            "2026-11-23 21:56:43Z  DENY   open  user 54321  pid 10977  /home/x/.ssh/id"
            "  deny_rule  rule never-keys"
        ),
        "2026-11-23 21:56:43Z  ALLOW  list  user 0 (root)  pid 10977  /srv/3  ok  rule all  entries=5",
        r"2026-11-23 21:56:43Z  DENY   open  user 54321  pid 10977  /srv/\xffodd\x0a  no_rule",
        "2026-11-23 21:56:43Z  ALLOW  open  user 54321  pid 10977  /long...  ok  rule all",
        "2026-11-23 21:56:50Z  reloaded  user 0 (root)  fingerprint=f",
    ]


@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        ((), range(7)),
        (("--denied",), [2, 4]),
        (("--uid", "0"), [3, 6]),
        (("--uid", "root", "--denied"), []),
        (("--path", "/home/**"), [2]),
        (("--path", "/srv/*"), [1, 3, 4]),
        (("--path", "id"), [2]),
        (("--path", "*odd*"), [4]),
        (("-n", "2"), [5, 6]),
        (("-n", "1", "--denied"), [4]),
        (("-n", "0"), []),
    ],
)
def test_what_is_asked_for_is_picked(file: str, options: tuple[str, ...], numbers: list[int]) -> None:
    result = run_here("audit", "--json", *options, file)
    assert (result.returncode, result.stderr) == (0, "")
    assert [json.loads(line) for line in result.stdout.splitlines()] == [
        RECORDS[number] for number in numbers
    ]


def test_what_was_refused_before_any_decision_is_shown_as_denied(tmp_path: Path) -> None:
    path = tmp_path / "audit"
    refusals = [
        record(0, event="open_refused", decision=None, reason="sent_by_another_process"),
        record(1, event="datagram_refused", decision=None, reason="address_has_a_path"),
        record(2, event="client_refused", decision=None, reason="peer_has_exited"),
        record(3, event="serve", decision=None, reason="no_service"),
    ]
    others = [record(4, event="serve", decision=None, reason="ok"), record(5, event="stopped", decision=None)]
    path.write_text(text_of(*refusals, *others))
    result = run_here("audit", "--json", "--denied", str(path))
    assert [json.loads(line) for line in result.stdout.splitlines()] == refusals


def test_gap_in_the_numbers_is_told_and_another_run_is_none(tmp_path: Path) -> None:
    path = tmp_path / "audit"
    other = {"run": "b" * 16}
    path.write_text(text_of(record(5), record(6), record(0, **other), record(1, **other), record(9)))
    result = run_here("audit", "--denied", str(path))
    assert result.returncode == 1
    assert result.stderr == f"fdbroker: {path}:5: records 7 to 8 of run {RUN} are missing\n"


def test_line_that_is_no_record_is_told_with_its_place_and_the_others_are_shown(tmp_path: Path) -> None:
    path = tmp_path / "audit"
    path.write_text(text_of(record(0)) + '{"torn\n\n[]\n{"event": 1}\n' + text_of(record(1)) + '{"run"')
    result = run_here("audit", "--json", str(path))
    assert result.returncode == 1
    assert len(result.stdout.splitlines()) == 2
    places = [line.partition(": ")[2].partition(": ")[0] for line in result.stderr.splitlines()]
    assert places == [f"{path}:{number}" for number in (2, 4, 5, 7)]
    assert "the file ends in the middle of a record" in result.stderr


NINES = "9" * 4300


@pytest.mark.parametrize(
    "forged",
    [
        '{"event":"\\ud800","path":"/\\ud800","uid":5,"reason":"\\udfff","\\ud800":"x"}',
        f'{{"event":"x","run":"r","seq":0}}\n{{"event":"x","run":"r","seq":{NINES}}}\n{{"event":"x","run":"r","seq":1}}',
        f'{{"event":"x","uid":{NINES},"pid":-{NINES},"path_hex":"zz"}}',
        '{"event":"x","time":5,"gid":[],"rule":{},"path":[],"run":[],"seq":true}',
        "\n".join(f'{{"event":"x","y":{"[" * depth}{"]" * depth}}}' for depth in range(800, 1000)),
    ],
)
def test_record_behind_a_forged_line_is_shown(tmp_path: Path, forged: str) -> None:
    path = tmp_path / "audit"
    path.write_text(f"{forged}\n{text_of(record(1, path='/behind'))}")
    for options in ((), ("--json",), ("--path", "/**")):
        result = run_here("audit", *options, str(path))
        assert "/behind" in result.stdout.splitlines()[-1]
        assert result.returncode in {0, 1}
        assert "Traceback" not in result.stderr


@pytest.mark.root
@pytest.mark.parametrize("digits", ["9" * 5000, str(1 << 32), str((1 << 32) - 1)])
def test_number_that_no_user_can_have_is_no_such_user(tmp_path: Path, file: str, digits: str) -> None:
    policy_file = tmp_path / "policy.json"
    policy_file.write_text(json.dumps(policy(tmp_path)))
    for arguments in (
        ("audit", "--uid", digits, file),
        ("scan", "--worker-uid", digits, "/"),
        ("policy", "explain", "--policy", str(policy_file), "--as", digits, "/"),
    ):
        result = run_here(*arguments)
        assert result.returncode == 2
        assert result.stderr.rstrip("\n").rstrip(".").endswith(": there is no such user")


def test_user_is_named_by_number_with_zeros_in_front_as_well(file: str) -> None:
    assert run_here("audit", "--json", "--uid", "0" * 5000, file).stdout.count("\n") == 2


@pytest.mark.root
@pytest.mark.parametrize(
    ("owner", "mode", "said"),
    [
        (0, 0o640, ""),
        (CLIENT_UID, 0o600, f"belongs to {CLIENT_UID}"),
        (0, 0o660, "has mode 0660"),
        (0, 0o602, "has mode 0602"),
    ],
)
@pytest.mark.parametrize("options", [(), ("--follow",)])
def test_file_into_which_others_than_root_can_write_is_shown_with_a_warning(
    file: str,
    owner: int,
    mode: int,
    said: str,
    options: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(audit, "follow_lines", lambda _path: iter([None]))
    os.chmod(file, mode)
    os.chown(file, owner, 0)
    result = run_here("audit", *options, file)
    assert result.returncode == 0
    expected = (
        f"fdbroker: {file}: {said}, so others than root can have written what it says\n" if said else ""
    )
    assert result.stderr == expected


def test_standard_input_is_read(file: str) -> None:
    with open(file, "rb") as opened:
        result = subprocess.run(
            command("audit", "--denied", "-"),
            env=environment(),
            stdin=opened,
            capture_output=True,
            encoding="utf-8",
            check=False,
        )
    assert result.stdout.count("DENY") == 2
    assert run_here("audit", "--follow", "-").returncode == 2


def test_missing_file_is_told_with_where_the_audit_may_be(tmp_path: Path) -> None:
    result = run_here("audit", str(tmp_path / "none"))
    assert result.returncode == 2
    assert "audit: {to: FILE}" in result.stderr


@pytest.mark.root
def test_file_of_root_is_told_to_others_as_such(file: str, others: ForOtherUsers) -> None:
    result = run_as(CLIENT_UID, others, "audit", file)
    assert result.returncode == 2
    assert "run this as root" in result.stderr


@pytest.mark.parametrize(
    "options", [("--uid", "no-such-user"), ("--path", "a/b"), ("--path", "/a/["), ("-n", "-1")]
)
def test_wrong_filter_is_wrong_use(file: str, options: tuple[str, ...]) -> None:
    result = run_here("audit", *options, file)
    assert result.returncode == 2
    assert options[0] in result.stderr


def test_colours_are_for_terminals_and_not_where_they_are_not_wanted(file: str) -> None:
    status, shown = run_on_terminal("audit", file)
    assert status == 0
    assert b"\x1b[31mDENY " in shown
    assert b"\x1b[32mALLOW" in shown
    for changes in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        _, shown = run_on_terminal("audit", file, **changes)
        assert b"\x1b" not in shown
        assert b"DENY" in shown
    assert "\x1b" not in run_here("audit", file).stdout


def test_reader_that_is_gone_ends_it_without_a_word(file: str) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    with open(write_end, "wb") as pipe:
        result = subprocess.run(
            command("audit", file), env=environment(), stdout=pipe, stderr=subprocess.PIPE, check=False
        )
    assert (result.returncode, result.stderr) == (141, b"")


@pytest.mark.parametrize(
    ("members", "path"),
    [
        ({"path": "/a"}, b"/a"),
        ({"path": "/a\ufffd", "path_hex": "2f61ff"}, b"/a\xff"),
        ({"path": "/a", "path_hex": "no"}, None),
        ({"path": 5}, None),
        ({}, None),
    ],
)
def test_path_of_a_record_has_its_exact_bytes(members: dict[str, object], path: bytes | None) -> None:
    assert path_of(members) == path
    assert Filter(glob=compile_glob(b"**")).wants(members) is (path is not None)


# ---- following ----


class Following:
    """Does the next of some steps whenever the follower would wait; ends it behind the last."""

    def __init__(self, path: Path, *steps: Callable[[], object]) -> None:
        self._steps = list(steps)
        self._ended = False
        self._lines = follow_lines(str(path), pause=self._pause)

    def _pause(self) -> None:
        if self._steps:
            self._steps.pop(0)()
        else:
            self._ended = True

    def texts(self) -> list[tuple[bytes, bool]]:
        found = []
        with contextlib.closing(self._lines) as lines:
            for line in lines:
                if line is not None:
                    found.append((line.text, line.whole))
                elif self._ended:
                    break
        return found


def append(path: Path, text: bytes) -> None:
    with open(path, "ab") as file:
        file.write(text)


def test_file_is_followed_through_growth_rotation_and_truncation(tmp_path: Path) -> None:
    path, old = tmp_path / "audit", tmp_path / "audit.1"

    def rotate() -> None:
        append(path, b"last of old\n")
        path.rename(old)

    following = Following(
        path,
        lambda: append(path, b"one\ntwo"),
        lambda: append(path, b" whole\n"),
        rotate,
        lambda: append(old, b"later still\n"),
        lambda: append(path, b"first of new\n"),
        lambda: append(path, b"second\n"),
        lambda: path.write_bytes(b"cut\n"),
    )
    assert following.texts() == [
        (b"one", True),
        (b"two whole", True),
        (b"last of old", True),
        (b"later still", True),
        (b"first of new", True),
        (b"second", True),
        (b"cut", True),
    ]


def test_renamed_file_is_read_on_until_there_is_something_in_the_new_one(tmp_path: Path) -> None:
    """As `fdbroker audit reopen` makes the new file a moment before the broker goes there."""
    path, old = tmp_path / "audit", tmp_path / "audit.1"
    append(path, b"one\n")

    def rotate() -> None:
        path.rename(old)
        path.touch()

    following = Following(
        path, rotate, lambda: None, lambda: append(old, b"two\n"), lambda: append(path, b"three\n")
    )
    assert following.texts() == [(b"one", True), (b"two", True), (b"three", True)]


def test_line_that_was_torn_by_a_rotation_is_given_as_such(tmp_path: Path) -> None:
    path = tmp_path / "audit"
    append(path, b"one\ntorn")

    def rotate() -> None:
        path.rename(tmp_path / "old")
        append(path, b"two\n")

    assert Following(path, rotate).texts() == [(b"one", True), (b"torn", False), (b"two", True)]


def test_numbers_of_lines_are_those_of_their_file(tmp_path: Path) -> None:
    path = tmp_path / "audit"
    append(path, b"a\nb\n")
    with contextlib.closing(follow_lines(str(path), pause=lambda: None)) as lines:
        assert [next(lines), next(lines), next(lines)] == [Line(1, b"a"), Line(2, b"b"), None]
        path.rename(tmp_path / "old")
        append(path, b"c\n")
        assert next(line for line in lines if line is not None) == Line(1, b"c")


def test_interrupt_is_the_way_to_end_it_and_what_was_wrong_is_in_the_status(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def lines(_path: str) -> Iterator[Line | None]:
        for number, text in enumerate([json.dumps(record(1)), json.dumps(record(2)), "torn"], 1):
            yield Line(number, text.encode())
        yield None
        yield Line(4, json.dumps(record(3)).encode())
        raise KeyboardInterrupt

    monkeypatch.setattr(audit, "follow_lines", lines)
    result = run_here("audit", "-f", "-n", "1", "--json", "/x")
    assert result.returncode == 1
    assert [json.loads(line)["seq"] for line in result.stdout.splitlines()] == [2, 3]
    assert "/x:3: not JSON" in result.stderr


def test_followed_file_shows_its_last_records_then_each_new_one_until_the_interrupt(file: str) -> None:
    process = subprocess.Popen(
        command("audit", "--follow", "--denied", "-n", "1", file),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    assert process.stdout is not None
    assert r"/srv/\xffodd\x0a" in process.stdout.readline()
    with open(file, "a") as opened:
        opened.write(text_of(record(7), record(8, decision="deny", reason="no_rule", path="/new")))
    assert "/new" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=30)
    assert (process.returncode, output, errors) == (0, "", "")


# ---- where it is, where nobody says ----


def test_audit_of_a_service_is_read_from_the_journal_unless_there_is_a_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "audit.jsonl"
    monkeypatch.setattr(audit, "DEFAULT_POLICY", str(tmp_path / "none.yaml"))
    monkeypatch.setattr(audit, "DEFAULT_FILE", str(file))
    monkeypatch.setattr(broker, "is_a_service", lambda: True)

    def is_of_journal(*files: str, rotated: bool = False) -> bool:
        return audit._Source(files, None, None, rotated=rotated, journal=False).journal

    assert is_of_journal()
    assert (
        capsys.readouterr().err == f"fdbroker: there is no {file}; this is the journal of fdbroker.service\n"
    )
    assert not is_of_journal(str(file)), "one that is named is what is meant"
    file.touch()
    assert not is_of_journal()
    file.unlink()
    monkeypatch.setattr(broker, "is_a_service", lambda: False)
    assert not is_of_journal()
    assert capsys.readouterr().err == ""


def test_audit_is_where_the_policy_says_where_no_file_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    usual = tmp_path / "policy.yaml"
    usual.touch()
    monkeypatch.setattr(audit, "DEFAULT_POLICY", str(usual))

    def files(*, names: object) -> list[str]:
        def load(path: str) -> dict[str, Any]:
            assert path == str(usual)
            if isinstance(names, Exception):
                raise names
            return {"daemon": {"audit": names}}

        monkeypatch.setattr(audit, "load", load)
        return audit._Source((), None, None, rotated=False, journal=False).files

    assert files(names="/srv/log/audit.jsonl") == ["/srv/log/audit.jsonl"]
    assert files(names=None) == [audit.DEFAULT_FILE]
    assert files(names=ModuleNotFoundError("yaml")) == [audit.DEFAULT_FILE]
    assert capsys.readouterr().err == ""
    assert files(names=Failure("policy.yaml:1:1: wrong; mend it\nand more")) == [audit.DEFAULT_FILE]
    assert capsys.readouterr().err == (
        "fdbroker: where the policy has the audit go can't be read, so /var/log/fdbroker/audit.jsonl is"
        " taken: policy.yaml:1:1: wrong; mend it\n"
    )
    usual.unlink()
    assert files(names="/srv/log/audit.jsonl") == [audit.DEFAULT_FILE]
