"""The command within this process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import click
import pytest

import fdbroker
from fdbroker import client
from fdbroker.cli import main as main_module
from fdbroker.cli.broker import DENIED
from fdbroker.cli.main import main
from fdbroker.cli.output import OutputError, ReaderGoneError
from fdbroker.cli.paths import absolute
from fdbroker.cli.scan_output import JsonOutput, Totals
from fdbroker.client import Client, connect
from fdbroker.sandbox import ConfinementError
from fdbroker.scan.supervisor import Supervisor
from tests.cli.commands import AS_ROOT, environment, lines, run, verdicts
from tests.running_broker import policy, reachable_directory, rule, running_broker
from tests.scan.descriptors import EICAR_NAME
from tests.scan.trees import Tree, make_tree

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.running_broker import RunningBroker

UNLISTED = "home2"


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    with reachable_directory() as path:
        yield path


@pytest.fixture(scope="module")
def tree(directory: Path) -> Tree:
    return make_tree(directory / "tree")


@pytest.fixture(scope="module")
def broker(directory: Path, tree: Tree) -> Iterator[RunningBroker]:
    rules = [rule("all"), rule("no", effect="deny", actions=["list"], paths=[UNLISTED])]
    with running_broker(directory, policy(directory / "tree", *rules)) as running:
        yield running


def scan_arguments(broker: RunningBroker, *arguments: str) -> list[str]:
    return ["scan", "--socket", str(broker.socket), *AS_ROOT, *arguments]


def homes(tree: Tree) -> list[str]:
    return [os.fsdecode(tree.root) + f"/home{number}" for number in range(3)]


@pytest.mark.root
def test_directory_that_may_not_be_listed_is_listed_as_an_error(
    broker: RunningBroker, tree: Tree, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(scan_arguments(broker, *homes(tree))) == 2
    shown = capsys.readouterr()
    assert f"/{UNLISTED}: error: {DENIED}\n" in shown.out
    assert shown.out.count(f": infected: {EICAR_NAME}\n") == len(tree.infected) * 2 // 3
    path = os.fsdecode(tree.root) + f"/{UNLISTED}"
    assert shown.err == (
        f"fdbroker: See why (FILE: the policy of the broker on {broker.socket}):"
        f" fdbroker policy explain --action list --policy FILE {path}\n"
    )


@pytest.mark.root
def test_json_tells_files_from_directories(
    broker: RunningBroker, tree: Tree, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(scan_arguments(broker, "--json", *homes(tree))) == 2
    output = capsys.readouterr().out
    assert verdicts(lines(output, "directory")) == {tree.root + b"/" + UNLISTED.encode(): "error"}
    assert "error" not in verdicts(lines(output, "file")).values()
    [summary] = lines(output, "summary")
    assert summary["errors"] == 1
    assert summary["files"] == len(lines(output, "file"))


@pytest.mark.root
def test_verbose_shows_everything(
    broker: RunningBroker, tree: Tree, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(scan_arguments(broker, "-v", os.fsdecode(tree.root) + "/home1")) == 1
    shown = capsys.readouterr()
    assert "/home1/socket: skipped: socket\n" in shown.out
    assert "/home1/empty: clean\n" in shown.out
    assert "worker: landlock in force: ABI " in shown.err


@pytest.mark.root
def test_broker_that_goes_away_makes_the_scan_incomplete(
    tree: Tree, directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        reachable_directory() as other,
        running_broker(other, policy(directory / "tree"), stop=False) as broker,
    ):

        def connect_and_lose(path: bytes) -> Client:
            connected = connect(path, timeout=1.0)
            broker.process.kill()
            broker.process.wait()
            return connected

        monkeypatch.setattr(client, "connect", connect_and_lose)
        assert main(scan_arguments(broker, "--json", os.fsdecode(tree.root))) == 2
    shown = capsys.readouterr()
    [summary] = lines(shown.out, "summary")
    assert (summary["complete"], summary["exit_status"]) == (False, 2)
    assert "the scan is incomplete" in shown.err


@pytest.mark.parametrize(
    ("raised", "shown"),
    [
        (click.ClickException("wrong"), "wrong"),
        (click.Abort(), "fdbroker: interrupted"),
        (KeyboardInterrupt(), "fdbroker: interrupted"),
        (OutputError("full"), "fdbroker: the output could not be written: full"),
        (BrokenPipeError(32, "broken"), "the output could not be written"),
        (ModuleNotFoundError("No module named 'rich'", name="rich.console"), "pip install 'fdbroker[cli]'"),
        (ModuleNotFoundError("No module named 'yaml'", name="yaml"), "pip install 'fdbroker[daemon]'"),
        (ModuleNotFoundError("No module named 'fdbroker.x'", name="fdbroker.x"), "Traceback"),
        (ValueError("unforeseen"), "ValueError: unforeseen"),
    ],
)
def test_every_failure_is_status_2_and_told(
    raised: BaseException,
    shown: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_arguments: object, **_named: object) -> None:
        raise raised

    monkeypatch.setattr(main_module.cli, "main", fail)
    assert main([]) == 2
    assert shown in capsys.readouterr().err


def test_reader_that_is_gone_is_told_by_the_status_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_arguments: object, **_named: object) -> None:
        raise ReaderGoneError("Broken pipe")

    monkeypatch.setattr(main_module.cli, "main", fail)
    assert main([]) == 141
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", main_module.COMMANDS)
def test_each_command_has_help_that_a_newcomer_can_work_from(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([name, "--help"]) == 0
    shown = capsys.readouterr().out
    if name not in {"policy", "audit", "sandbox"}:
        assert "Exit status: " in shown
        assert "Examples:  fdbroker " in shown
    assert main(["--help"]) == 0
    assert f"\n  {name} " in capsys.readouterr().out


@pytest.mark.parametrize("name", ["check", "compile", "schema", "explain"])
def test_each_policy_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["policy", name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert "Exit status: " in shown
    assert f"fdbroker policy {name}" in shown


def test_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fdbroker {fdbroker.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["no"], ["--no"], ["policy"], ["policy", "no"]])
def test_wrong_use_is_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert "Usage: fdbroker" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ("cat", "--\x1b]0;X\a"),
        ("\x1b]0;X\a",),
        ("policy", "\x1b]0;X\a"),
        ("exec", "--\x1b]0;X\a"),
        ("scan", "--timeout", "\x1b]0;X\a", "/"),
        ("audit", "--uid", "\x1b]0;X\a", "/dev/null"),
        ("policy", "explain", "--action", "\x1b]0;X\a", "/"),
    ],
)
def test_wrong_argument_does_not_play_with_the_terminal(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == (125 if arguments[0] == "exec" else 2)
    shown = capsys.readouterr().err
    assert "]0;X" in shown
    assert shown.replace("\n", "").isprintable()


def test_message_of_an_older_click_is_shown_escaped_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_arguments: object, **_named: object) -> None:
        raise click.NoSuchOption("--\x1b]0;X\a", ctx=click.Context(main_module.cli, info_name="fdbroker"))

    monkeypatch.setattr(main_module.cli, "main", fail)
    assert main([]) == 2
    *usage, said = capsys.readouterr().err.splitlines()
    assert usage == [
        "Usage: fdbroker [OPTIONS] COMMAND [ARGS]...",
        "Try 'fdbroker --help' for help.",
        "",
    ]
    assert "--\x1b]0;X\a" not in said
    assert "]0;X" in said


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (("scna", "/"), "scan"),
        (("statsu",), "status"),
        (("policy", "explian", "/"), "explain"),
        (("explain",), "policy explain"),
    ],
)
def test_command_that_is_misspelt_is_told_what_was_meant(
    arguments: tuple[str, ...], meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    shown = capsys.readouterr().err
    assert f"No such command '{arguments[-2] if len(arguments) > 1 else arguments[0]}'" in shown
    assert shown.rstrip("\n").endswith(f"Did you mean {meant}?")
    assert shown.count("Did you mean") == 1


def test_command_that_is_like_no_other_is_told_as_such(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["xyzzy"]) == 2
    assert "Did you mean" not in capsys.readouterr().err


def test_command_without_arguments_shows_its_help_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    shown = capsys.readouterr()
    assert "\n  scan " in shown.out + shown.err
    assert "Error" not in shown.err


def test_shell_completes_commands_and_options() -> None:
    asked = {"_FDBROKER_COMPLETE": "bash_complete", "COMP_CWORD": "1"}
    commands = run(env=environment(**asked, COMP_WORDS="fdbroker s"))
    assert {line.partition(",")[2] for line in commands.stdout.splitlines()} == {"scan", "status", "sandbox"}
    options = run(env=environment(**{**asked, "COMP_CWORD": "2"}, COMP_WORDS="fdbroker audit --d"))
    assert options.stdout == "plain,--denied\nplain,--decision\n"
    assert "_FDBROKER_COMPLETE=bash_complete" in run(env=environment(_FDBROKER_COMPLETE="bash_source")).stdout


def test_click_that_is_missing_is_told_with_what_to_install() -> None:
    program = (
        "import sys, runpy; sys.modules['click'] = None\n"
        "runpy.run_module('fdbroker.cli', run_name='__main__')"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, encoding="utf-8", check=False
    )
    assert result.returncode == 2
    assert result.stderr == "fdbroker: the command needs click: pip install 'fdbroker[cli]'\n"


def test_what_one_command_needs_the_others_do_not_load() -> None:
    program = (
        "import sys; sys.modules.update(rich=None, yaml=None)\n"
        "from fdbroker.cli.main import main\n"
        "for words in ('cat --help', 'scan --help', 'top --help', 'policy check /x'):\n"
        "    print(main(words.split()), file=sys.stderr)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, encoding="utf-8", check=True
    )
    assert re.fullmatch(
        r"0\n0\n.*needs rich: pip install 'fdbroker\[cli\]'\n2\n.*pip install 'fdbroker\[daemon\]'\n2\n",
        result.stderr,
    )


def test_help_is_status_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scan", "--help"]) == 0
    assert "Exit status: 0" in capsys.readouterr().out


def test_worker_that_can_not_be_confined_stops_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_supervisor: object) -> None:
        raise ConfinementError("seccomp: not here")

    monkeypatch.setattr(Supervisor, "start", fail)
    assert main(["scan", *(AS_ROOT if os.geteuid() == 0 else ()), "/"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == "fdbroker: no worker could be started, so nothing was scanned: seccomp: not here\n"


def test_error_in_the_stream_is_told_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def write(self, _text: str) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    with pytest.raises(OutputError, match="No space left"):
        JsonOutput().totals(Totals())


def test_a_relative_path_without_a_working_directory_is_wrong_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(click.UsageError, match=r"^a\\x0a is relative, and the working directory can't be"):
        absolute("a\n")
    assert absolute("/a/../b") == b"/b"
