"""`fdbroker policy check`, `test` and `diff` as commands: what they write, and their exit status."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.cli.commands import environment, run, run_here, run_on_terminal
from tests.processes import in_child
from tests.running_broker import CLIENT_UID, reachable_directory

if TYPE_CHECKING:
    from pathlib import Path

POLICY = """\
version: 1
roots: {{tree: {{path: {tree}}}}}
rules:
  - {{name: never, deny: [open, stat], in: tree, paths: "*/keys/**"}}
  - {{name: all, allow: [open, stat, list], in: tree, client: {{user: "54321"}}, paths: "**", where: {{size: {{max: {size}}}}}}}
"""  # noqa: E501
TABLE = """\
version: 1
policy: policy.yaml
tests:
  - {{name: a file, as: "54321", path: {tree}/a, object: {{size: 1}}, expect: allowed}}
  - {{name: "keys #1", as: "54321", path: {tree}/b/keys/k, expect: {keys}, reason: deny_rule}}
"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    tree = tmp_path / "tree"
    (tree / "b" / "keys").mkdir(parents=True)
    (tree / "a").write_bytes(b"12345")
    (tree / "odd\n").write_bytes(b"")
    (tree / "b" / "keys" / "k").write_bytes(b"")
    (tmp_path / "policy.yaml").write_text(POLICY.format(tree=tree, size=10))
    (tmp_path / "new.yaml").write_text(POLICY.format(tree=tree, size=3))
    (tmp_path / "table.yaml").write_text(TABLE.format(tree=tree, keys="denied"))
    (tmp_path / "wrong.yaml").write_text(TABLE.format(tree=tree, keys="allowed"))
    return tmp_path


# ---- check ----


def test_strict_check_fails_for_a_warning_and_an_ignored_kind_is_none(directory: Path) -> None:
    file = directory / "policy.yaml"
    with open(file, "a") as opened:
        opened.write("read_only_view: off\n")
    for options, status, summary in (
        ((), 0, "1 root, 2 rules, 1 warning"),
        (("--strict",), 1, "1 root, 2 rules, 1 warning"),
        (("--strict", "--ignore", "weak-mode"), 0, "1 root, 2 rules, no problems"),
    ):
        result = run_here("policy", "check", "--dev", "--offline", *options, str(file))
        assert (result.returncode, result.stdout) == (status, f"{file}: {summary}\n")
        assert (f"{file}:6:1: warning: read_only_view: off" in result.stderr) is ("warning" in summary)
    wrong = run_here("policy", "check", "--ignore", "weak", str(file))
    assert wrong.returncode == 2
    assert "--ignore weak: the kinds are never-matches, " in wrong.stderr


# ---- test ----


def test_table_that_holds_is_said_in_a_line_and_more_when_asked(directory: Path) -> None:
    result = run_here("policy", "test", f"{directory}/table.yaml")
    assert (result.returncode, result.stdout, result.stderr) == (0, "2 tests, 0 failed\n", "")
    verbose = run_here("policy", "test", "-v", f"{directory}/table.yaml")
    assert verbose.stdout == "ok    a file\nok    keys #1\n2 tests, 0 failed\n"


def test_what_does_not_hold_is_shown_with_place_and_rules(directory: Path) -> None:
    result = run_here("policy", "test", f"{directory}/table.yaml", f"{directory}/wrong.yaml")
    assert result.returncode == 1
    lines = result.stdout.splitlines()
    assert lines[:2] == [
        "FAIL  keys #1",
        f"  {directory}/wrong.yaml:5:5: expected to be allowed, and is denied",
    ]
    assert "    + paths   matches */keys/**" in lines
    assert "  Denied: rule never denies it, and a deny rule always wins." in lines
    assert lines[-1] == "4 tests, 1 failed"


def test_results_come_as_tap_and_as_json(directory: Path) -> None:
    tap = run_here("policy", "test", "--tap", f"{directory}/wrong.yaml")
    assert tap.returncode == 1
    lines = tap.stdout.splitlines()
    assert lines[:4] == ["TAP version 14", "1..2", "ok 1 - a file", "not ok 2 - keys \\#1"]
    assert all(line.startswith("#") for line in lines[4:])
    result = run_here("policy", "test", "--json", f"{directory}/wrong.yaml")
    document = json.loads(result.stdout)
    assert (result.returncode, document["passed"], document["failed"]) == (1, 1, 1)
    assert document["untested_rules"] == {f"{directory}/policy.yaml": []}
    good, bad = document["tests"]
    assert (good["passed"], good["decision"], good["rule"], good["sentence"]) == (True, "allow", "all", "")
    assert (bad["expected"], bad["decision"], bad["reason"], bad["line"]) == ("allow", "deny", "deny_rule", 5)
    both = run_here("policy", "test", "--tap", "--json", f"{directory}/table.yaml")
    assert both.returncode == 2


def test_tables_and_policies_that_can_not_be_used_are_told(directory: Path) -> None:
    table = directory / "table.yaml"
    table.write_text(table.read_text().replace("policy: policy.yaml\n", ""))
    result = run_here("policy", "test", str(table))
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"fdbroker: {table}: names no policy; add 'policy: FILE', or give --policy FILE\n"
    assert run_here("policy", "test", "--policy", f"{directory}/policy.yaml", str(table)).returncode == 0
    assert "can't be read" in run_here("policy", "test", "--policy", "/nowhere", str(table)).stderr
    assert "can't be read" in run_here("policy", "test", "/nowhere").stderr
    table.write_text("version: 1\ntests: [{}]\n")
    result = run_here("policy", "test", "--policy", f"{directory}/policy.yaml", str(table))
    assert result.returncode == 2
    assert f"{table}:2:9: test 1 is empty" in result.stderr


def test_names_are_this_machines_only_where_that_is_asked_for(directory: Path) -> None:
    table = directory / "here.yaml"
    table.write_text(
        "version: 1\npolicy: policy.yaml\n"
        f"tests: [{{as: zz-nobody, path: {directory}/tree/a, expect: denied}}]\n"
    )
    assert run_here("policy", "test", str(table)).returncode == 0
    here = run_here("policy", "test", "--here", str(table))
    assert here.returncode == 2
    assert "test 1: as: there is no 'zz-nobody' on this system" in here.stderr


# ---- diff ----


def test_difference_is_shown_by_setting_client_and_path(directory: Path) -> None:
    result = run_here("policy", "diff", f"{directory}/policy.yaml", f"{directory}/new.yaml")
    assert (result.returncode, result.stderr) == (1, "")
    assert result.stdout.splitlines() == [
        "~ rules.all.where.size.max: 10 -> 3",
        "",
        "user 54321",
        "  - open: 1 path (rule all -> rule all: where_size)",
        f"      {directory}/tree/a",
        "  - stat: 1 path (rule all -> rule all: where_size)",
        f"      {directory}/tree/a",
        "",
        "6 paths compared: 0 allowed more, 2 allowed no more",
    ]


def test_same_policies_are_no_difference_and_nothing_is_walked(directory: Path) -> None:
    result = run_here("policy", "diff", f"{directory}/policy.yaml", f"{directory}/policy.yaml")
    assert (result.returncode, result.stdout) == (0, "0 paths compared: 0 allowed more, 0 allowed no more\n")


def test_tree_and_users_can_be_chosen_and_the_answer_be_json(directory: Path) -> None:
    files = (f"{directory}/policy.yaml", f"{directory}/new.yaml")
    result = run_here("policy", "diff", "--json", "--examples", "0", *files)
    document = json.loads(result.stdout)
    assert (result.returncode, document["same"], document["complete"]) == (1, False, True)
    assert [
        (each["client"], each["action"], each["change"], each["count"]) for each in document["differences"]
    ] == [
        ("user 54321", "open", "lost", 1),
        ("user 54321", "stat", "lost", 1),
    ]
    assert document["differences"][0]["examples"] == []
    elsewhere = run_here("policy", "diff", "--json", "--tree", f"{directory}/tree/b", *files)
    assert json.loads(elsewhere.stdout)["differences"] == []
    # A setting differs all the same.
    assert elsewhere.returncode == 1
    other = run_here("policy", "diff", "--json", "--as", "54322", *files)
    assert json.loads(other.stdout)["clients"] == ["user 54322"]


def test_wrong_use_of_diff_is_told(directory: Path) -> None:
    files = (f"{directory}/policy.yaml", f"{directory}/new.yaml")
    for options, said in (
        (("--as", "no-such-user", *files), "there is no such user"),
        (("--as", "4294967295", *files), "there is no such user"),
        (("--tree", f"{directory}/none", *files), "is no directory"),
        (("/nowhere", files[1]), "/nowhere: can't be read: No such file or directory"),
        ((f"{directory}/table.yaml", files[1]), "unknown key 'tests'"),
    ):
        result = run_here("policy", "diff", *options)
        assert result.returncode == 2
        assert said in result.stderr


@pytest.mark.root
def test_part_that_could_not_be_read_is_an_error() -> None:
    with reachable_directory() as directory:
        (directory / "tree" / "closed").mkdir(parents=True, mode=0o700)
        files = []
        for name, size in (("old", 10), ("new", 3)):
            file = directory / f"{name}.yaml"
            file.write_text(POLICY.format(tree=directory / "tree", size=size))
            file.chmod(0o644)
            files.append(str(file))

        def compared() -> tuple[int, str]:
            result = run_here("policy", "diff", *files)
            return result.returncode, result.stderr

        assert compared() == (1, "")  # root may read it; and all that it needs is imported now
        told = f"fdbroker: {directory}/tree/closed: can't be read: Permission denied; run this as root\n"
        assert in_child(compared, uid=CLIENT_UID) == (2, told)


def test_progress_is_shown_on_a_terminal_alone(directory: Path) -> None:
    files = (f"{directory}/policy.yaml", f"{directory}/new.yaml")
    status, shown = run_on_terminal("policy", "diff", *files)
    assert status == 1
    assert b"comparing" in shown or b"compared" in shown
    assert b"\x1b[31m" in shown
    assert "\x1b" not in run("policy", "diff", *files, env=environment()).stderr
