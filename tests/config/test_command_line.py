"""`python -m fdbroker.config`: status 2 on any problem, and then nothing is written."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from fdbroker.config.__main__ import main
from tests.forked import run_forked

if TYPE_CHECKING:
    from pathlib import Path

GOOD = "version: 1\nroots: {etc: {path: /etc}}\nrules: []\n"
BAD = "version: 1\nroots: {etc: {path: /nowhere}}\nrules: [{name: r}]\n"


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    file = tmp_path / "policy.yaml"
    file.write_text(GOOD)
    file.chmod(0o600)
    return file


def test_compile_writes_to_standard_output(policy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compile", str(policy), "--dev"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["roots"] == [
        {"name": "etc", "path": "/etc", "cross_mounts": False, "opens": "loop"}
    ]
    assert err == ""


def test_compile_replaces_a_file_whole(policy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = policy.parent / "policy.json"
    target = policy.parent / "target"
    target.write_text("old")
    output.symlink_to(target)
    assert main(["compile", str(policy), "--dev", "--output", str(output)]) == 0
    assert json.loads(output.read_text())["version"] == 1
    assert not output.is_symlink()
    assert target.read_text() == "old"
    assert stat.S_IMODE(output.stat().st_mode) == 0o600
    assert sorted(os.listdir(policy.parent)) == ["policy.json", "policy.yaml", "target"]
    assert capsys.readouterr() == ("", "")


def test_compile_writes_nothing_when_there_is_a_problem(
    policy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy.write_text(BAD)
    output = policy.parent / "policy.json"
    output.write_text("old")
    assert main(["compile", str(policy), "--dev", "--output", str(output)]) == 2
    assert output.read_text() == "old"
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        (
            f"{policy}:2:21: root 'etc': path: '/nowhere': No such file or directory; "
            "name a directory that exists"
        ),
        f"{policy}:3:9: rule 'r': key 'in' is missing; add 'in: ...'",
        f"{policy}:3:9: rule 'r': key 'paths' is missing; add 'paths: ...'",
        f"{policy}:3:9: rule 'r' has neither 'allow' nor 'deny'; add one of them with a list of actions",
    ]


def test_what_was_compiled_before_is_kept_where_that_is_asked_for_and_there_is_such_a_file(
    policy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = policy.parent / "policy.json"
    keep = ["compile", str(policy), "--dev", "--keep", "--output", str(output)]
    good = policy.read_text()
    policy.write_text(BAD)
    assert main(keep) == 2
    assert not output.exists()
    output.write_text("old")
    capsys.readouterr()
    assert main(keep) == 0
    assert output.read_text() == "old"
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 5
    assert told[-1] == f"{output} stays as it was: the policy that was in force"
    policy.write_text(good)
    assert main(keep) == 0
    assert json.loads(output.read_text())["version"] == 1


def test_a_file_for_the_audit_is_a_problem_of_a_policy_for_a_service_with_its_place(
    policy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part = policy.with_suffix(".d") / "site.yaml"
    part.parent.mkdir()
    part.write_text("version: 1\naudit:\n  to: /var/log/fdbroker/audit.jsonl\n")
    assert main(["compile", str(policy), "--dev", "--service"]) == 2
    assert capsys.readouterr().err == (
        f"{part}:3:7: audit: to: the broker's service is not root, and can open no file for writing; leave it"
        " out, and have systemd open the file: StandardOutput=append:/var/log/fdbroker/audit.jsonl of the"
        " unit\n"
    )
    assert main(["compile", str(policy), "--dev"]) == 0
    assert json.loads(capsys.readouterr().out)["daemon"]["audit"] == "/var/log/fdbroker/audit.jsonl"
    part.write_text("version: 1\naudit: {on_failure: allow}\n")
    assert main(["compile", str(policy), "--dev", "--service"]) == 0


def test_an_output_that_can_not_be_written_is_a_problem(
    policy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = policy.parent / "missing" / "policy.json"
    assert main(["compile", str(policy), "--dev", "--output", str(output)]) == 2
    said = f"{output}: can't be written: No such file or directory; make its directory first\n"
    assert capsys.readouterr().err == said
    directory = policy.parent / "d"
    directory.mkdir()
    assert main(["compile", str(policy), "--dev", "--output", str(directory)]) == 2
    assert sorted(os.listdir(policy.parent)) == ["d", "policy.yaml"]


@pytest.mark.parametrize(
    ("where", "why"),
    [
        ("/dev/full", "No space left on device; make room, or write elsewhere"),
        ("a pipe that nobody reads", "Broken pipe; write elsewhere"),
    ],
)
def test_a_standard_output_that_can_not_be_written_is_a_problem_and_nothing_else_is_said(
    policy: Path, where: str, why: str
) -> None:
    if where == "/dev/full":
        output = os.open(where, os.O_WRONLY)
    else:
        read_end, output = os.pipe()
        os.close(read_end)
    done = run_forked(lambda: main(["compile", str(policy), "--dev"]), "fdbroker.config", stdout=output)
    os.close(output)
    assert (done.returncode, done.stderr.decode()) == (2, f"standard output: can't be written: {why}\n")


def test_check_says_that_there_is_no_problem(policy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(policy), "--dev"]) == 0
    assert capsys.readouterr() == (f"{policy}: 1 root, 0 rules, no problems\n", "")


def test_check_of_a_policy_for_another_machine_looks_at_nothing_here(
    policy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rule = "{name: r, allow: open, client: {user: zz}, in: etc, paths: x}"
    policy.write_text(f"version: 1\nroots: {{etc: {{path: /nowhere}}}}\nrules: [{rule}]\n")
    assert main(["check", str(policy), "--dev"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2
    assert main(["check", str(policy), "--dev", "--offline"]) == 0


def test_compile_can_not_be_offline(policy: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["compile", str(policy), "--dev", "--offline"])
    assert caught.value.code == 2


def test_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out)["$ref"] == "#/$defs/Policy"


def test_it_runs_as_a_program_and_escapes_a_hostile_file_name(tmp_path: Path) -> None:
    name = b"\xff\x1b[2J\n.yaml"
    done = subprocess.run(
        [sys.executable, "-m", "fdbroker.config", "check", os.fsencode(tmp_path) + b"/" + name],
        check=False,
        capture_output=True,
        env={**os.environ, "PYTHONUTF8": "1"},
    )
    assert done.returncode == 2
    assert done.stdout == b""
    assert b"\x1b" not in done.stderr
    assert b"Traceback" not in done.stderr
