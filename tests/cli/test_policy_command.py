"""`fdbroker policy` without a broker."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from fdbroker.cli.explanation import lines_of_answer
from fdbroker.config.__main__ import main as config_main
from tests.cli.commands import environment, run, run_here, run_on_terminal
from tests.forked import run_forked

if TYPE_CHECKING:
    from pathlib import Path

TEXT = """\
version: 1
roots:
  tree: {path: /usr}
rules:
  - {name: all, allow: [open, stat, list], in: tree, client: any, paths: "**"}
  - {name: unit, allow: list, in: tree, client: {unit: a.service}, paths: "bin/*"}
  - {name: slice, deny: list, in: tree, client: {cgroup: /user.slice}, paths: "lib/**"}
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "policy.yaml"
    path.write_text(TEXT)
    return str(path)


def by_config(*arguments: str, **streams: int) -> subprocess.CompletedProcess[str]:
    done = run_forked(lambda: config_main(arguments), "fdbroker.config", **streams)
    return subprocess.CompletedProcess(arguments, done.returncode, done.stdout.decode(), done.stderr.decode())


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "--dev"),
        ("check", "--dev", "--strict", "--json"),
        ("check", "--dev", "--offline", "--ignore=anybody"),
        ("check",),
        ("compile", "--dev"),
        ("schema",),
    ],
)
def test_policy_command_does_what_the_module_does(file: str, arguments: tuple[str, ...]) -> None:
    files = () if arguments == ("schema",) else (file,)
    ours, theirs = run_here("policy", *arguments, *files), by_config(*arguments, *files)
    assert (ours.returncode, ours.stdout, ours.stderr) == (theirs.returncode, theirs.stdout, theirs.stderr)
    assert ours.stdout or ours.stderr


def test_module_is_run_by_its_name(file: str) -> None:
    words = [sys.executable, "-P", "-m", "fdbroker.config", "check", "--dev", file]
    result = subprocess.run(words, env=environment(), capture_output=True, encoding="utf-8", check=False)
    forked = by_config("check", "--dev", file)
    assert (result.returncode, result.stdout, result.stderr) == (0, forked.stdout, forked.stderr)


def test_problems_are_told_with_their_place(file: str) -> None:
    with open(file, "a") as opened:
        opened.write("limts: {}\n")
    result = run_here("policy", "check", "--dev", file)
    assert result.returncode == 2
    assert result.stderr == f"{file}:8:1: unknown key 'limts'; did you mean 'limits'?\n"


def test_compiled_policy_is_written_whole_and_can_be_explained(file: str, tmp_path: Path) -> None:
    output = str(tmp_path / "policy.json")
    assert run_here("policy", "compile", "--dev", "--output", output, file).returncode == 0
    assert json.loads((tmp_path / "policy.json").read_text())["version"] == 1
    result = run_here("policy", "explain", "--json", "--policy", output, "--as", "1000", "/usr/bin/env")
    assert result.returncode == 0
    assert json.loads(result.stdout)["rule"] == "all"


@pytest.mark.parametrize(
    "arguments", [("check", "--dev", "--ignore=anybody"), ("compile", "--dev"), ("schema",)]
)
def test_pipe_that_nobody_reads_ends_it_without_a_word(file: str, arguments: tuple[str, ...]) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    result = run("policy", *arguments, *(() if arguments == ("schema",) else (file,)), stdout=write_end)
    os.close(write_end)
    assert (result.returncode, result.stderr) == (141, "")


@pytest.mark.parametrize(
    "arguments", [("check", "--dev", "--ignore=anybody"), ("compile", "--dev"), ("schema",)]
)
def test_full_disk_behind_the_output_is_told(file: str, arguments: tuple[str, ...]) -> None:
    files = () if arguments == ("schema",) else (file,)
    with open("/dev/full", "wb") as full:
        result = run("policy", *arguments, *files, stdout=full.fileno())
        by_module = by_config(*arguments, *files, stdout=full.fileno())
    assert result.returncode == 2
    assert result.stderr == "fdbroker: the output could not be written: No space left on device\n"
    assert by_module.returncode == 2
    assert by_module.stderr == (
        "standard output: can't be written: No space left on device; make room, or write elsewhere\n"
    )


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("missing/policy.json", "No such file or directory; make its directory first"),
        ("directory", "Is a directory; name a file"),
        ("policy.yaml/x", "Not a directory; name a file in a directory that exists"),
    ],
)
def test_output_that_can_not_be_written_is_told_with_what_to_do(
    file: str, tmp_path: Path, output: str, said: str
) -> None:
    (tmp_path / "directory").mkdir()
    result = run_here("policy", "compile", "--dev", "--output", f"{tmp_path}/{output}", file)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"{tmp_path}/{output}: can't be written: {said}\n"


def decision(file: str, *options: str) -> tuple[str, str]:
    result = run_here("policy", "explain", "--json", "--policy", file, *options)
    document = json.loads(result.stdout)
    return document["decision"], document["reason"]


def test_unit_or_control_group_is_that_of_the_process_that_is_explained(file: str) -> None:
    asked = ("--action", "list", "--as", "1000", "/usr/lib")
    assert decision(file, *asked) == ("allow", "ok")
    assert decision(file, "--cgroup", "/user.slice/x", *asked) == ("deny", "deny_rule")
    assert decision(file, "--unit", "a.service", *asked) == ("allow", "ok")


def test_label_is_the_one_that_is_told_and_without_it_none_is_known(file: str) -> None:
    with open(file, "a") as opened:
        opened.write(
            "  - {name: labelled, deny: stat, in: tree, client: {label: x_t}, paths: 'bin/**'}\n"
            "  - {name: walker, allow: walk, in: tree, client: {label: x_t}, paths: '**'}\n"
        )
    labelled = ("--label", "x_t")
    described, met = ("--action", "stat", "/usr/bin/env"), ("--action", "walk", "/usr/bin/env")
    assert [decision(file, *labelled, *asked)[0] for asked in (described, met)] == ["deny", "allow"]
    assert [decision(file, "--label", "y_t", *asked)[0] for asked in (described, met)] == ["allow", "deny"]
    assert [decision(file, *asked)[0] for asked in (described, met)] == ["deny", "deny"]
    shown = run_here("policy", "explain", "--policy", file, *described).stdout
    assert "is about label x_t; the client is " in shown
    assert ", whose label is not known" in shown
    told = run_here("policy", "explain", "--policy", file, *labelled, *described).stdout
    assert "not known" not in told
    assert ", label x_t\n" in told


def test_service_is_explained_on_behalf_of_a_user(file: str) -> None:
    with open(file, "a") as opened:
        opened.write(
            "  - {name: for-others, allow: open, in: tree, client: any, on_behalf_of: {user: '1001'},"
            " where: {owner: [on_behalf_of, root]}, paths: '**'}\n"
        )
    asked = ("--as", "1000", "/usr/bin/env")
    assert decision(file, "--on-behalf-of", "1001", *asked) == ("allow", "ok")
    assert decision(file, "--on-behalf-of", "1002", *asked) == ("deny", "no_rule")
    result = run_here("policy", "explain", "--policy", file, "--on-behalf-of", "1001", *asked)
    assert "\nfor     user 1001, groups none\n" in result.stdout
    assert "must be 0 (root) or the client that is acted for; is 0 (root)" in result.stdout
    document = json.loads(
        run_here("policy", "explain", "--json", "--policy", file, "--on-behalf-of", "1001", *asked).stdout
    )
    assert document["on_behalf_of"] == {"uid": 1001, "gids": [], "cgroups": []}


def test_walk_that_is_allowed_is_told_to_say_nothing_of_what_it_meets(file: str) -> None:
    with open(file, "a") as opened:
        opened.write("  - {name: walk, allow: walk, in: tree, client: any, paths: '**', except: 'bin/*'}\n")

    def told(action: str, path: str) -> str:
        return run_here("policy", "explain", "--policy", file, "--action", action, path).stdout

    walk = told("walk", "/usr/bin")
    assert "\nAllowed: rule walk allows it.\nWhat lies below it is decided by itself, name by name: " in walk
    assert "'open' as well if files are to be given" in walk
    assert "What lies below" not in told("list", "/usr/bin") + told("walk", "/usr/bin/env")
    answer = {"action": "walk", "allowed": True, "reason": "ok", "rule": "walk"}
    assert any("What lies below" in line for line in lines_of_answer(answer, b"/usr"))
    assert not any("What lies below" in line for line in lines_of_answer({**answer, "allowed": False}, b"/u"))


def test_path_is_made_absolute_and_one_outside_the_roots_is_denied(file: str) -> None:
    assert decision(file, "usr/../usr/bin//env") == ("allow", "ok")
    assert decision(file, "/etc/passwd") == ("deny", "outside_roots")
    result = run_here("policy", "explain", "--policy", file, "/etc/passwd")
    assert result.stdout.splitlines()[-1].startswith("Denied: it lies in none of the trees")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--as", "no-such-user", "/usr"), "no such user"),
        (("--as", "nobody", "/usr"), "65534"),
        (("--on-behalf-of", "no-such-user", "/usr"), "--on-behalf-of no-such-user: there is no such user"),
        (("--on-behalf-of", "nobody", "/usr"), "65534"),
        (("--unit", "a.service", "--cgroup", "/x", "/usr"), "not both"),
        (("--unit", "a", "/usr"), "--unit"),
        (("--cgroup", "x", "/usr"), "/user.slice"),
        (("--action", "read", "/usr"), "--action"),
        (("",), "a path is empty"),
        ((), "PATH"),
    ],
)
def test_wrong_use_is_told(file: str, options: tuple[str, ...], said: str) -> None:
    result = run_here("policy", "explain", "--policy", file, *options)
    assert result.returncode == 2
    assert said in result.stderr
    assert "Traceback" not in result.stderr


def test_policy_that_the_broker_would_not_take_is_explained_with_a_warning(file: str) -> None:
    os.chmod(file, 0o666)
    result = run_here("policy", "explain", "--policy", file, "/usr/bin/env")
    assert result.returncode == 0
    assert "fdbroker: the broker would not take this file: " in result.stderr
    assert "lets others write" in result.stderr


def test_missing_and_broken_policies_are_told(file: str, tmp_path: Path) -> None:
    missing = run_here("policy", "explain", "--policy", str(tmp_path / "none"), "/x")
    assert missing.returncode == 2
    assert "can't be read: No such file or directory" in missing.stderr
    with open(file, "a") as opened:
        opened.write("rules: []\n")
    broken = run_here("policy", "explain", "--policy", file, "/x")
    assert broken.returncode == 2
    assert f"{file}:8:1: key 'rules' is given twice" in broken.stderr


def test_name_that_a_link_leads_to_is_explained_behind_the_first_one(tmp_path: Path) -> None:
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "key").touch()
    (tmp_path / "link").symlink_to("keys/key")
    file = tmp_path / "policy.yaml"
    file.write_text(
        f"version: 1\nroots: {{tree: {{path: {tmp_path}}}}}\nrules:\n"
        "  - {name: never, deny: open, in: tree, paths: 'keys/**'}\n"
        "  - {name: all, allow: open, in: tree, client: any, paths: '**', symlinks: within-root}\n"
    )
    command = ("policy", "explain", "--policy", str(file))
    result = run_here(*command, str(tmp_path / "link"))
    assert result.returncode == 1
    first, arrow, second = result.stdout.partition("\nA symbolic link leads to ")
    assert arrow
    assert "rule never (deny): does not apply" in first
    assert second.startswith(f"{tmp_path}/keys/key, which is asked for in its place.\n")
    assert "rule never (deny): applies" in second
    document = json.loads(run_here(*command, "--json", str(tmp_path / "link")).stdout)
    assert document["followed"]["path"] == f"{tmp_path}/keys/key"
    assert [rule["applies"] for rule in document["followed"]["rules"]] == [True, True]
    assert document["followed"]["followed"] is None
    assert json.loads(run_here(*command, "--json", str(tmp_path / "none")).stdout)["followed"] is None


def test_few_rules_are_all_shown_and_of_many_those_that_come_near(tmp_path: Path) -> None:
    far = "".join(
        f"  - {{name: far-{n}, allow: open, in: tree, client: {{user: 7}}, paths: 'x/{n}'}}\n"
        for n in range(20)
    )
    file = tmp_path / "many.yaml"
    file.write_text(TEXT + far)
    few = run_here("policy", "explain", "--policy", str(file), "/usr/bin/env").stdout
    every = run_here("policy", "explain", "-v", "--policy", str(file), "/usr/bin/env").stdout
    assert "rule all (allow): applies" in few
    assert "far-3" not in few
    assert "other rules are not about this at all (-v shows them)" in few
    assert "rule far-3 (allow): does not apply" in every


def test_verdict_has_a_colour_on_a_terminal_alone(file: str) -> None:
    _, allowed = run_on_terminal("policy", "explain", "--policy", file, "/usr/bin/env")
    _, denied = run_on_terminal("policy", "explain", "--policy", file, "/etc/passwd")
    assert b"\x1b[32mAllowed: " in allowed
    assert b"\x1b[31mDenied: " in denied
    _, plain = run_on_terminal("policy", "explain", "--policy", file, "/etc/passwd", NO_COLOR="1")
    assert b"\x1b" not in plain
