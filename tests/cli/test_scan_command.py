from __future__ import annotations

import contextlib
import hashlib
import os
import pwd
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
import pytest

from fdbroker.cli.broker import DENIED
from fdbroker.cli.scan import WORKER_USER, worker_ids
from fdbroker.config.defaults import ADD_USER
from tests.cli.commands import (
    AS_ROOT,
    command,
    environment,
    lines,
    path_of,
    read_terminal,
    run,
    run_as,
    run_here,
    run_on_terminal,
    run_on_terminal_as,
    run_program,
    start,
    verdicts,
)
from tests.processes import children_of, has_ended, wait_until
from tests.running_broker import CLIENT_UID, policy, reachable_directory, rule, running_broker
from tests.sandbox.confined import WORKER_UID
from tests.scan.clamav import make_database, running_clamd
from tests.scan.descriptors import EICAR_NAME
from tests.scan.trees import Tree, make_tree

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.for_other_users import ForOtherUsers
    from tests.running_broker import RunningBroker

DENIED_PATHS = "home1/with spaces*"


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    with reachable_directory() as path:
        yield path


@pytest.fixture(scope="module")
def tree(directory: Path) -> Tree:
    return make_tree(directory / "tree")


@pytest.fixture(scope="module")
def broker(directory: Path, tree: Tree) -> Iterator[RunningBroker]:
    with running_broker(directory, policy(directory / "tree")) as running:
        yield running


def home(tree: Tree, number: int) -> str:
    return os.fsdecode(tree.root) + f"/home{number}"


@pytest.mark.root
def test_clean_files_give_status_0_and_only_a_summary(broker: RunningBroker, tree: Tree) -> None:
    result = run_program("scan", "--socket", str(broker.socket), *AS_ROOT, home(tree, 0) + "/big")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert result.stdout.startswith("1 file, 5242880 bytes, 0 infected, 0 errors, 0 skipped, ")
    _, engines = result.stdout.splitlines()
    assert engines == "Scanned by hashes (hashes 1, 3 digests), in workers of this command."


@pytest.mark.root
def test_infected_tree_gives_status_1_and_names_each_finding(broker: RunningBroker, tree: Tree) -> None:
    result = run("scan", "--socket", str(broker.socket), *AS_ROOT, tree.root)
    assert result.returncode == 1, result.stderr
    *findings, summary, _ = result.stdout.splitlines()
    assert len(findings) == len(tree.infected)
    assert all(line.endswith(f": infected: {EICAR_NAME}") for line in findings)
    assert home(tree, 2) + f"/hard link: infected: {EICAR_NAME}" in findings
    assert (
        rf"{home(tree, 1)}/a directory/\xff\xfe/new\x0aline/\xffeicar\xfe: infected: {EICAR_NAME}" in findings
    )
    files = len(tree.clean | tree.infected)
    assert summary.startswith(
        f"{files} files, {tree.size} bytes, {len(tree.infected)} infected, 0 errors,"
        f" {len(tree.skipped)} skipped, "
    )
    assert result.stdout.isascii()
    assert "\x1b" not in result.stdout + result.stderr


@pytest.mark.root
def test_error_beside_a_finding_gives_status_2_and_both_are_listed(directory: Path, tree: Tree) -> None:
    with reachable_directory() as other:
        rules = [rule("all"), rule("no", effect="deny", actions=["open"], paths=[DENIED_PATHS])]
        with running_broker(other, policy(directory / "tree", *rules)) as broker:
            result = run("scan", "--socket", str(broker.socket), *AS_ROOT, tree.root)
    assert result.returncode == 2, result.stderr
    assert result.stdout.count(f": infected: {EICAR_NAME}") == len(tree.infected)
    [error] = [line for line in result.stdout.splitlines() if ": error: " in line]
    assert error == f"{home(tree, 1)}/with spaces and 'quotes': error: {DENIED}"
    assert " 1 error, " in result.stdout
    quoted = shlex.quote(f"{home(tree, 1)}/with spaces and 'quotes'")
    assert result.stderr.endswith(f": fdbroker policy explain --policy FILE {quoted}\n")
    assert result.stderr.count("\n") == 1


@pytest.mark.root
def test_json_has_every_file_with_its_bytes_recoverable(broker: RunningBroker, tree: Tree) -> None:
    result = run("scan", "--json", "--socket", str(broker.socket), *AS_ROOT, tree.root)
    assert result.returncode == 1, result.stderr
    files = lines(result.stdout, "file")
    assert verdicts(files) == dict.fromkeys(tree.clean, "clean") | dict.fromkeys(tree.infected, "infected")
    assert {line["name"] for line in files if line["verdict"] == "infected"} == {EICAR_NAME}
    assert {path_of(line): line["size"] for line in files} == {
        path: os.stat(path).st_size for path in tree.clean | tree.infected
    }
    skipped = lines(result.stdout, "skipped")
    assert {path_of(line): line["kind"] for line in skipped} == tree.skipped
    [confinement] = lines(result.stdout, "worker")
    assert all(layer["enforced"] for layer in confinement["layers"])
    [summary] = lines(result.stdout, "summary")
    assert summary.pop("seconds") > 0
    assert summary == {
        "type": "summary",
        "files": len(files),
        "bytes": tree.size,
        "infected": len(tree.infected),
        "errors": 0,
        "skipped": len(tree.skipped),
        "complete": True,
        "exit_status": 1,
    }


@pytest.mark.root
def test_unprivileged_user_scans_files_that_only_the_broker_can_open(
    broker: RunningBroker, tree: Tree, others: ForOtherUsers
) -> None:
    result = run_as(CLIENT_UID, others, "scan", "--json", "--socket", str(broker.socket), tree.root)
    assert result.returncode == 1, result.stderr
    assert verdicts(lines(result.stdout, "file")).keys() == tree.clean | tree.infected
    [confinement] = lines(result.stdout, "worker")
    missing = {layer["name"]: layer["note"] for layer in confinement["layers"] if not layer["enforced"]}
    assert missing == {"ids": f"unchanged: uid {CLIENT_UID}, as who started it"}


@pytest.mark.root
def test_unprivileged_scan_in_which_nothing_is_wrong_says_so_by_silence(
    broker: RunningBroker, tree: Tree, others: ForOtherUsers
) -> None:
    result = run_as(CLIENT_UID, others, "scan", "--socket", str(broker.socket), home(tree, 1) + "/empty")
    assert (result.returncode, result.stderr) == (0, "")
    result = run_as(
        CLIENT_UID, others, "scan", "-v", "--socket", str(broker.socket), home(tree, 1) + "/empty"
    )
    assert (
        "worker: ids stay those of who started it: only root can change them, and the other layers hold"
        in result.stderr
    )


@pytest.mark.root
def test_verbose_lists_clean_and_skipped_and_the_confinement(broker: RunningBroker, tree: Tree) -> None:
    result = run("scan", "-v", "--socket", str(broker.socket), *AS_ROOT, home(tree, 1))
    assert f"{home(tree, 1)}/empty: clean\n" in result.stdout
    assert f"{home(tree, 1)}/fifo: skipped: fifo\n" in result.stdout
    assert f"{home(tree, 1)}/link to shadow: skipped: symbolic link\n" in result.stdout
    assert r"/new\x0aline/\x1b[31mred: clean" in result.stdout
    assert "fdbroker: worker: seccomp in force: " in result.stderr
    assert "\x1b" not in result.stdout + result.stderr


@pytest.mark.root
def test_file_below_several_arguments_is_scanned_once(broker: RunningBroker, tree: Tree) -> None:
    arguments = (
        home(tree, 1) + "/empty",
        home(tree, 1),
        os.fsdecode(tree.root),
        home(tree, 1),
        home(tree, 0),
    )
    result = run("scan", "--json", "--socket", str(broker.socket), *AS_ROOT, *arguments)
    whole = run("scan", "--json", "--socket", str(broker.socket), *AS_ROOT, tree.root)
    paths = [path_of(line) for line in lines(result.stdout, "file")]
    assert sorted(paths) == sorted(path_of(line) for line in lines(whole.stdout, "file"))
    [once], [alone] = lines(result.stdout, "summary"), lines(whole.stdout, "summary")
    assert once | {"seconds": 0} == alone | {"seconds": 0}


@pytest.mark.root
def test_help_and_documents_say_that_what_is_hidden_is_not_scanned() -> None:
    help_text = " ".join(run_here("scan", "--help").stdout.split())
    assert "What the policy hides from listing is not seen, so it is not scanned" in help_text
    for name in ("README.md", "docs/quick-start.md", "docs/scanning.md"):
        text = " ".join((Path(__file__).parents[2] / name).read_text().split())
        assert "hat the policy hides from listing is not seen, so it is not scanned" in text, name


@pytest.mark.root
def test_relative_path_is_made_absolute(broker: RunningBroker, tree: Tree) -> None:
    relative = os.path.relpath(home(tree, 1), "/") + "/./empty"
    result = run("scan", "--json", "--socket", str(broker.socket), *AS_ROOT, relative)
    assert verdicts(lines(result.stdout, "file")) == {tree.root + b"/home1/empty": "clean"}


@pytest.mark.root
def test_added_list_is_used(broker: RunningBroker, tree: Tree, tmp_path: Path) -> None:
    added = tmp_path / "list"
    added.write_text(f"{hashlib.sha256(b'fine').hexdigest()}  Fine.But.Listed\n")
    target = home(tree, 1) + "/with spaces and 'quotes'"
    result = run("scan", "--hashes", str(added), "--socket", str(broker.socket), *AS_ROOT, target)
    assert result.returncode == 1
    assert f"{target}: infected: Fine.But.Listed\n" in result.stdout


def test_wrong_list_is_an_error_with_its_place(tmp_path: Path) -> None:
    wrong = tmp_path / "list"
    wrong.write_text("\nnonsense\n")
    arguments = AS_ROOT if os.geteuid() == 0 else ()
    result = run_here("scan", "--hashes", str(wrong), *arguments, "/")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith(f"fdbroker: {wrong}:2: not a digest")


def test_missing_broker_is_told_with_what_to_do(tmp_path: Path) -> None:
    arguments = AS_ROOT if os.geteuid() == 0 else ()
    result = run_here("scan", "--json", "--socket", str(tmp_path / "none"), *arguments, "/")
    assert result.returncode == 2
    assert result.stdout == ""
    assert str(tmp_path / "none") in result.stderr
    assert "fdbrokerd --daemon" in result.stderr
    assert "--socket" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.root
def test_socket_that_this_user_may_not_use_is_told_with_what_to_do(
    broker: RunningBroker, others: ForOtherUsers
) -> None:
    broker.socket.chmod(0o600)
    try:
        result = run_as(CLIENT_UID, others, "scan", "--socket", str(broker.socket), "/")
    finally:
        broker.socket.chmod(0o666)
    assert result.returncode == 2
    assert result.stdout == ""
    assert "may not connect" in result.stderr
    assert "mode 0600" in result.stderr


@pytest.mark.root
def test_full_disk_behind_the_output_is_an_error_not_a_finding(broker: RunningBroker, tree: Tree) -> None:
    with open("/dev/full", "wb") as full:
        result = run("scan", "--socket", str(broker.socket), *AS_ROOT, tree.root, stdout=full.fileno())
    assert result.returncode == 2
    assert result.stderr == "fdbroker: the output could not be written: No space left on device\n"


@pytest.mark.root
def test_pipe_that_nobody_reads_is_an_error_not_a_finding(broker: RunningBroker, tree: Tree) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    result = run("scan", "--json", "--socket", str(broker.socket), *AS_ROOT, tree.root, stdout=write_end)
    os.close(write_end)
    assert result.returncode == 2
    assert result.stderr == "fdbroker: the output could not be written: Broken pipe\n"


@pytest.mark.root
def test_interrupted_scan_ends_with_a_summary_that_says_so(broker: RunningBroker, tree: Tree) -> None:
    endless = home(tree, 2) + "/endless"
    with open(endless, "wb") as file:
        file.truncate(1 << 40)
    process = subprocess.Popen(
        command(
            "scan", "--json", "--socket", str(broker.socket), *AS_ROOT, home(tree, 2) + "/empty", endless
        ),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    try:
        assert process.stdout is not None
        early = "".join(process.stdout.readline() for _ in range(3))
        assert verdicts(lines(early, "file")) == {tree.root + b"/home2/empty": "clean"}
        workers = children_of(process.pid)
        assert len(workers) == 1
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=30)
    finally:
        os.unlink(endless)
    assert process.returncode == 2
    assert errors == "fdbroker: interrupted, so the scan is incomplete\n"
    [summary] = lines(output, "summary")
    assert (summary["complete"], summary["exit_status"]) == (False, 2)
    wait_until(lambda: has_ended(workers[0]), "the worker is gone")


@pytest.mark.root
@pytest.mark.parametrize("both", [False, True])
def test_progress_is_shown_on_a_terminal_alone(both: bool, broker: RunningBroker, tree: Tree) -> None:  # noqa: FBT001 - a parameter
    master, terminal = os.openpty()
    output = terminal if both else os.open(os.devnull, os.O_WRONLY)
    process = start(
        *("scan", "--socket", str(broker.socket), *AS_ROOT, home(tree, 1)),
        env=environment(TERM="xterm", COLUMNS="100"),
        stdout=output,
        stderr=terminal,
    )
    os.close(terminal)
    if not both:
        os.close(output)
    shown = read_terminal(master, process)
    os.close(master)
    assert process.returncode == 1
    drawn = re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]", b"", shown).decode()
    assert "scanning" in drawn
    assert re.search(r"\d+/\d+\+? files, \d infected, 0 errors", drawn)
    assert re.search(r"\d+ files/s, \d+ \w+/s", drawn)
    findings = [line for line in shown.split(b"\r\n") if line.endswith(b": infected: " + EICAR_NAME.encode())]
    assert len(findings) == (len(tree.infected) // 3 if both else 0)
    assert (b"errors, 5 skipped" in shown) is both


@pytest.mark.root
def test_bar_of_a_scan_that_takes_a_while_shows_what_is_left(
    broker: RunningBroker, tree: Tree, others: ForOtherUsers
) -> None:
    folder = Path(home(tree, 2)) / "many"
    folder.mkdir()
    try:
        for number in range(30):
            (folder / str(number)).touch()
        takes_a_while = (
            "--engine",
            "command:argv=/bin/sleep,argv=0.03",
            "--jobs",
            "1",
        )  # of which root has none
        scan = ("scan", "--socket", str(broker.socket), *takes_a_while, str(folder))
        status, shown = run_on_terminal_as(CLIENT_UID, others, *scan)
    finally:
        shutil.rmtree(folder)
    assert status == 0
    drawn = re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]", b"", shown).decode()
    rates = [
        int(files) for files in re.findall(r"/30 files, 0 infected, 0 errors [^\r]*?(\d+) files/s", drawn)
    ]
    assert max(rates) > 0
    left = re.findall(r"(\d+):(\d\d):(\d\d) left", drawn)
    assert left
    assert all(hours == "0" for hours, _, _ in left)


@pytest.mark.root
def test_json_on_a_terminal_is_json_alone(broker: RunningBroker, tree: Tree) -> None:
    status, shown = run_on_terminal("scan", "--json", "--socket", str(broker.socket), *AS_ROOT, home(tree, 1))
    assert status == 1
    assert b"\x1b" not in shown
    text = shown.replace(b"\r\n", b"\n").decode()
    assert [line["exit_status"] for line in lines(text, "summary")] == [1]


@pytest.mark.root
def test_bar_goes_with_json_that_goes_elsewhere(broker: RunningBroker, tree: Tree) -> None:
    master, terminal = os.openpty()
    process = start(
        *("scan", "--json", "--socket", str(broker.socket), *AS_ROOT, home(tree, 1)),
        env=environment(TERM="xterm", COLUMNS="100"),
        stdout=subprocess.DEVNULL,
        stderr=terminal,
    )
    os.close(terminal)
    shown = read_terminal(master, process)
    os.close(master)
    assert process.returncode == 1
    assert b"files/s" in shown


@pytest.mark.root
def test_root_must_say_who_the_worker_is_where_there_is_no_user_for_it(tree: Tree) -> None:
    with contextlib.suppress(KeyError):
        pwd.getpwnam(WORKER_USER)
        pytest.skip(f"this machine has a user {WORKER_USER}")
    result = run("scan", tree.root)
    assert result.returncode == 2
    assert f"Add one ({ADD_USER} {WORKER_USER}), or say who" in result.stderr
    assert "--worker-uid" in result.stderr


@pytest.mark.root
@pytest.mark.parametrize(
    ("wanted", "what"),
    [
        ("0", "must not be root's"),
        ("root", "must not be root's"),
        ("no-such-user", "no such user"),
        ("4294967295", "no such"),
    ],
)
def test_worker_is_never_root_or_nobody_known(wanted: str, what: str) -> None:
    with pytest.raises(click.UsageError, match=what):
        worker_ids(wanted)


@pytest.mark.root
def test_worker_user_is_taken_by_name_or_number(monkeypatch: pytest.MonkeyPatch) -> None:
    nobody = pwd.getpwnam("nobody")
    assert worker_ids("nobody") == worker_ids(str(nobody.pw_uid)) == (nobody.pw_uid, nobody.pw_gid)
    assert worker_ids(str(WORKER_UID)) == (WORKER_UID, WORKER_UID)
    monkeypatch.setattr(pwd, "getpwnam", lambda name: {WORKER_USER: nobody}[name])
    assert worker_ids(None) == (nobody.pw_uid, nobody.pw_gid)


@pytest.mark.root
def test_only_root_chooses_the_worker(others: ForOtherUsers) -> None:
    result = run_as(CLIENT_UID, others, "scan", "--worker-uid", str(WORKER_UID), "/")
    assert result.returncode == 2
    assert "--worker-uid is for root" in result.stderr
    result = run_as(CLIENT_UID, others, "scan", "/")
    assert "worker-uid" not in result.stderr


@pytest.mark.parametrize(
    "arguments", [("scan",), ("scan", "--no-such-option", "/"), ("scan", "--timeout", "0", "/"), ("no",)]
)
def test_wrong_use_gives_status_2(arguments: tuple[str, ...]) -> None:
    result = run_here(*arguments)
    assert result.returncode == 2
    assert result.stdout == ""
    assert "Error: " in result.stderr


def test_help_tells_what_a_newcomer_needs() -> None:
    result = run_here("scan", "--help")
    assert result.returncode == 0
    for expected in (
        "Exit status: 0",
        "Examples:",
        "--socket",
        "--hashes",
        "--json",
        "/run/fdbroker/broker.seqpacket",
    ):
        assert expected in result.stdout
    assert "scan" in run_here("--help").stdout


def test_unforeseen_failure_is_status_2_with_a_traceback() -> None:
    program = (
        "import sys; from fdbroker.cli import main as m; from fdbroker.scan.engines import hashes\n"
        "hashes.load = lambda files: 1 / 0\n"
        f"sys.exit(m.main(['scan', *{AS_ROOT if os.geteuid() == 0 else ()!r}, '/']))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, encoding="utf-8", check=False
    )
    assert result.returncode == 2
    assert "ZeroDivisionError" in result.stderr


def test_empty_path_is_wrong_use_and_not_the_working_directory() -> None:
    arguments = AS_ROOT if os.geteuid() == 0 else ()
    result = run_here("scan", *arguments, "")
    assert result.returncode == 2
    assert "a path is empty" in result.stderr


@pytest.mark.root
def test_each_of_several_engines_is_named(broker: RunningBroker, tree: Tree, tmp_path: Path) -> None:
    rules = tmp_path / "rules.yar"
    rules.write_text('rule fine { strings: $a = "fine" condition: $a }')
    paths = [home(tree, 1) + "/empty", home(tree, 1) + "/with spaces and 'quotes'"]
    engines = ("--engine", "hashes", "--engine", f"yara-x:rules={rules}")
    result = run("scan", *engines, "--json", "--socket", str(broker.socket), *AS_ROOT, *paths)
    assert result.returncode == 1, result.stderr
    [line] = lines(result.stdout, "engines")
    assert line["via"] == "self"
    assert [(one["engine"], one["where"]) for one in line["engines"]] == [
        ("hashes", "worker"),
        ("yara-x", "worker"),
    ]
    assert all(one["version"] for one in line["engines"])
    said = {path_of(one): one for one in lines(result.stdout, "file")}
    assert said[os.fsencode(paths[1])]["engines"] == [
        {"engine": "hashes", "verdict": "clean"},
        {"engine": "yara-x", "verdict": "infected", "name": "fine"},
    ]
    result = run("scan", *engines, "--socket", str(broker.socket), *AS_ROOT, *paths)
    assert f"{paths[1]}: infected: fine (hashes: clean, yara-x: fine)\n" in result.stdout


@pytest.mark.root
def test_infected_leaves_out_all_else(broker: RunningBroker, tree: Tree) -> None:
    result = run("scan", "--infected", "--socket", str(broker.socket), *AS_ROOT, home(tree, 1))
    assert result.returncode == 1
    assert len(result.stdout.splitlines()) == 3
    assert all(": infected: " in line for line in result.stdout.splitlines())
    result = run("scan", "-i", "--json", "--socket", str(broker.socket), *AS_ROOT, home(tree, 1))
    assert {line["verdict"] for line in lines(result.stdout, "file")} == {"infected"}
    assert lines(result.stdout, "skipped") == []
    assert len(lines(result.stdout, "summary")) == 1
    result = run("scan", "-i", "--socket", str(broker.socket), *AS_ROOT, home(tree, 1) + "/empty")
    assert (result.returncode, result.stdout) == (0, "")


@pytest.mark.root
def test_excluded_and_too_large_files_are_not_scanned(broker: RunningBroker, tree: Tree) -> None:
    options = ("--exclude", "a directory", "--exclude", "*eicar*", "--exclude", "hard*", "--max-size", "1MiB")
    result = run("scan", "--json", *options, "--socket", str(broker.socket), *AS_ROOT, home(tree, 0))
    assert result.returncode == 2
    files = verdicts(lines(result.stdout, "file"))
    root = tree.root + b"/home0/"
    assert files == {
        root + b"empty": "clean",
        root + b"with spaces and 'quotes'": "clean",
        root + b"big": "error",
    }
    [error] = [line for line in lines(result.stdout, "file") if line["verdict"] == "error"]
    assert error["reason"] == "too_large"
    excluded = {path_of(line) for line in lines(result.stdout, "skipped") if line["kind"] == "excluded"}
    assert excluded == {
        root + name for name in (b"a directory", b"nearly eicar", b"eicar with line end", b"hard link")
    }


@pytest.mark.root
def test_isolated_files_and_many_workers_give_the_same_verdicts(broker: RunningBroker, tree: Tree) -> None:
    for options in (("--isolate", "file"), ("--jobs", "3"), ("--jobs", "1")):
        result = run("scan", "--json", *options, "--socket", str(broker.socket), *AS_ROOT, tree.root)
        expected = dict.fromkeys(tree.clean, "clean") | dict.fromkeys(tree.infected, "infected")
        assert verdicts(lines(result.stdout, "file")) == expected, options


@pytest.mark.root
def test_report_has_everything_and_is_there_at_once(
    broker: RunningBroker, tree: Tree, tmp_path: Path
) -> None:
    report = tmp_path / "report.jsonl"
    report.write_text("the last one")
    socket = ("--socket", str(broker.socket))
    result = run("scan", "-i", "--report", str(report), *socket, *AS_ROOT, tree.root)
    assert result.returncode == 1
    text = report.read_text()
    expected = dict.fromkeys(tree.clean, "clean") | dict.fromkeys(tree.infected, "infected")
    assert verdicts(lines(text, "file")) == expected
    assert [line["exit_status"] for line in lines(text, "summary")] == [1]
    assert report.stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["report.jsonl"]
    # One that can't be complete does not take the place of the last one.
    result = run("scan", "--report", str(report), "--socket", str(tmp_path / "none"), *AS_ROOT, tree.root)
    assert result.returncode == 2
    assert report.read_text() == text
    assert os.listdir(tmp_path) == ["report.jsonl"]
    result = run("scan", "--report", str(tmp_path / "no" / "x"), *socket, *AS_ROOT, tree.root)
    assert result.returncode == 2
    assert f"the report {tmp_path}/no/x could not be written: No such file or directory" in result.stderr


@pytest.mark.root
def test_libclamav_and_clamd_scan_through_the_broker(
    tree: Tree, broker: RunningBroker, tmp_path: Path
) -> None:
    database = make_database(tmp_path / "database")
    target = home(tree, 1)
    expected = {path: "clean" for path in tree.clean if path.startswith(os.fsencode(target))}
    alerts = ("AlertExceedsMax yes", "AlertEncrypted yes")
    with running_clamd(tmp_path, database, *alerts) as clamd:
        for engine in (f"libclamav:database={database}", f"clamd:socket={clamd}"):
            result = run(
                "scan", "--json", "--engine", engine, "--socket", str(broker.socket), *AS_ROOT, target
            )
            files = verdicts(lines(result.stdout, "file"))
            assert {path: verdict for path, verdict in files.items() if path in expected} == expected, engine
            [line] = lines(result.stdout, "engines")
            assert "ClamAV 1." in line["engines"][0]["version"]
            assert line["engines"][0]["where"] == ("outside" if engine.startswith("clamd") else "worker")
        result = run(
            "scan", "--engine", f"clamd:socket={clamd}", "--socket", str(broker.socket), target + "/empty"
        )
        assert result.stdout.splitlines()[1].startswith("Scanned by clamd (ClamAV 1.")
        assert result.stdout.endswith(", handed over by this command.\n")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--engine", "libclamv"), "there is no engine 'libclamv'; did you mean"),
        (
            ("--engine", "libclamav:databse=/x"),
            "engine libclamav: there is no option 'databse'; did you mean",
        ),
        (("--engine", "libclamav:max_files=many"), "max_files: a whole number is wanted, not text"),
        (("--engine", "libclamav:max_files=1,max_files=2"), "max_files is given twice"),
        (("--engine", "libclamav:database"), "'database' is no option; write NAME, or NAME:option=value"),
        (("--engine", "hashes:"), "write NAME, or NAME:option=value"),
        (("--engine", "hashes", "--engine", "hashes"), "--engine hashes is given twice"),
        (("--accept", "rar"), "--accept rar: no engine that is asked (hashes) looks into containers"),
        (("--engine", "libclamav", "--accept", "rat"), "accept: 'rat' is none of: encrypted"),
        (("--exclude", "a//b"), "a//b: the glob has an empty component"),
        (("--max-size", "many"), "'many' is not a size"),
        (("--jobs", "0"), "--jobs"),
        (("--isolate", "tree"), "--isolate"),
        (("-i", "-v"), "--verbose wants more than is told"),
    ],
)
def test_what_is_wrong_with_an_option_is_told_with_the_cure(arguments: tuple[str, ...], told: str) -> None:
    result = run_here("scan", *arguments, *(AS_ROOT if os.geteuid() == 0 else ()), "/")
    assert result.returncode == 2
    assert result.stdout == ""
    assert told in result.stderr


@pytest.mark.root
def test_root_does_not_run_a_program_on_hostile_files() -> None:
    result = run_here("scan", "--engine", "command:argv=/bin/cat", "/")
    assert result.returncode == 2
    assert "--engine command runs its program unconfined" in result.stderr


@pytest.mark.root
def test_commas_lists_and_relative_paths_in_options(
    broker: RunningBroker, tree: Tree, others: ForOtherUsers
) -> None:
    engine = r"command:argv=/bin/sh,argv=-c,argv=cat >/dev/null; exit 3,clean=3,version=a\,b"
    arguments = ("--json", "--engine", engine, "--socket", str(broker.socket), home(tree, 1) + "/empty")
    result = run_as(CLIENT_UID, others, "scan", *arguments)
    assert result.returncode == 0, result.stderr
    [line] = lines(result.stdout, "engines")
    assert line["engines"] == [{"engine": "command", "version": "a,b", "where": "outside"}]


@pytest.mark.root
def test_interrupted_before_it_began_is_told_as_that(broker: RunningBroker, tmp_path: Path) -> None:
    fifo = tmp_path / "rules.yar"
    os.mkfifo(fifo)  # whoever loads it waits
    process = subprocess.Popen(
        command("scan", "--engine", f"yara-x:rules={fifo}", "--socket", str(broker.socket), *AS_ROOT, "/"),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    with open(fifo, "wb"):  # it is at that
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=30)
    assert process.returncode == 2
    assert errors == "fdbroker: interrupted, so the scan is incomplete\n"
    assert output.startswith("0 files, ")
    assert "The scan is INCOMPLETE." in output
