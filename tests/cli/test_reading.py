"""`fdbroker cat` and `fdbroker ls`, and what is said where the broker gives nothing."""

from __future__ import annotations

import errno
import io
import json
import os
import socket
import stat
import subprocess
from typing import TYPE_CHECKING, Any, cast

import pytest

from fdbroker import Client, Reason, UnavailableError
from fdbroker.cli import cat
from fdbroker.cli.broker import DENIED
from fdbroker.testing import FakeBroker
from tests.cli.commands import command, environment, path_of, run_as, run_bytes, run_here
from tests.running_broker import CLIENT_UID, policy, reachable_directory, rule, running_broker
from tests.scan.trees import make_tree

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.for_other_users import ForOtherUsers

ODD = b"/data/new\nline and \xff quote'"
FILES: dict[bytes, Any] = {
    b"/data/a": b"first\n",
    b"/data/b": bytes(range(256)) * 5000,
    ODD: b"odd",
    b"/data/secret": Reason.DENIED,
    b"/data/bad": OSError(errno.EIO, "bad disk"),
    b"/data/deep/x": b"",
}


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    with reachable_directory() as path:
        yield path


@pytest.fixture(scope="module")
def broker(directory: Path) -> Iterator[str]:
    path = str(directory / "fake")
    with FakeBroker(FILES, socket_path=path):
        os.chmod(path, 0o666)
        yield path


# ---- cat ----


def test_cat_writes_the_very_bytes_of_several_files(broker: str) -> None:
    result = run_bytes("cat", "--socket", broker, "/data/a", "/data/b", ODD)
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout == FILES[b"/data/a"] + FILES[b"/data/b"] + FILES[ODD]


def test_cat_goes_on_after_a_file_that_is_not_given_and_tells_why(broker: str) -> None:
    result = run_here(
        "cat", "--socket", broker, "/data/secret", "/data/a", "/data/none", "/data/bad", "/data/deep"
    )
    assert result.returncode == 1
    assert result.stdout == "first\n"
    denied, missing, broken, directory = result.stderr.splitlines()
    assert denied == (
        f"fdbroker: /data/secret: {DENIED}. See why (FILE: the policy of the broker on {broker}):"
        " fdbroker policy explain --policy FILE /data/secret"
    )
    assert missing.startswith("fdbroker: /data/none: the policy allows it, but there is no such file")
    assert broken.startswith("fdbroker: /data/bad: the broker failed")
    assert directory.startswith("fdbroker: /data/deep: a directory")


def test_command_that_shows_why_can_be_pasted_whatever_the_name(directory: Path) -> None:
    path = str(directory / "odd")
    with FakeBroker({ODD: Reason.DENIED}, socket_path=path):
        result = run_bytes("cat", "--socket", path, ODD)
    assert result.stderr.isascii()
    word = result.stderr.rstrip(b"\n").partition(b"--policy FILE ")[2]
    shown = subprocess.run(["bash", "-c", b"printf %s " + word], capture_output=True, check=True)
    assert shown.stdout == ODD


def test_cat_into_a_pipe_that_nobody_reads_ends_as_cat_does(broker: str) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    with open(write_end, "wb") as pipe:
        result = subprocess.run(
            command("cat", "--socket", broker, "/data/b"),
            env=environment(),
            stdout=pipe,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert (result.returncode, result.stderr) == (128 + 13, b"")


@pytest.mark.parametrize("arguments", [("cat", "/data/a"), ("ls", "/data"), ("ls", "--json", "/data")])
def test_full_disk_is_told(broker: str, arguments: tuple[str, ...]) -> None:
    with open("/dev/full", "wb") as full:
        result = subprocess.run(
            command("--socket", broker, *arguments),
            env=environment(),
            stdout=full,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            check=False,
        )
    assert result.returncode == 2
    assert result.stderr == "fdbroker: the output could not be written: No space left on device\n"


@pytest.mark.parametrize("name", ["cat", "ls", "exec"])
def test_empty_path_is_wrong_use(broker: str, name: str) -> None:
    result = run_here(name, "--socket", broker, "", *(["true"] if name == "exec" else []))
    assert result.returncode == (125 if name == "exec" else 2)
    assert "a path is empty" in result.stderr


def test_file_that_can_not_be_read_to_its_end_is_told() -> None:
    class Failing(io.BytesIO):
        def read1(self, _size: int | None = -1) -> bytes:
            raise OSError(errno.EIO, "Input/output error")

    assert cat._write(cast("io.BufferedReader", Failing())) == "Input/output error"


@pytest.mark.parametrize("name", ["cat", "ls"])
def test_broker_that_goes_away_in_between_is_told(
    broker: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_arguments: object) -> None:
        raise UnavailableError(errno.ECONNREFUSED, "Connection refused")

    monkeypatch.setattr(Client, "open_many", gone)
    monkeypatch.setattr(Client, "list", gone)
    result = run_here(name, "--socket", broker, "/data/a")
    assert result.returncode == 2
    assert "no broker listens on it any more" in result.stderr


# ---- ls ----


def test_ls_shows_names_that_can_not_play_with_the_terminal(broker: str) -> None:
    result = run_here("ls", "--socket", broker, "/data")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [
        "a",
        "b",
        "deep",
        r"new\x0aline and \xff quote'",
    ]


def test_ls_of_several_has_a_heading_for_each_and_a_file_is_shown_itself(broker: str) -> None:
    result = run_here("ls", "--socket", broker, "/data/deep", "/data/a", "/data")
    assert result.returncode == 0
    assert result.stdout.startswith("/data/deep:\nx\n/data/a\n\n/data:\na\nb\n")


def test_ls_as_json_has_all_bytes_of_all_names(broker: str) -> None:
    result = run_here("ls", "--json", "--socket", broker, "/data")
    documents = [json.loads(line) for line in result.stdout.splitlines()]
    paths = {path_of(document) for document in documents}
    assert paths == {b"/data/a", b"/data/b", b"/data/deep", ODD}
    kinds = {path_of(document): document["kind"] for document in documents}
    assert kinds[b"/data/deep"] == "directory"
    assert kinds[ODD] == "file"
    [of_file] = map(json.loads, run_here("ls", "--json", "--socket", broker, ODD).stdout.splitlines())
    assert path_of(of_file) == ODD
    assert of_file["size"] == 3


def test_ls_goes_on_after_a_path_that_is_not_given(broker: str) -> None:
    result = run_here("ls", "--socket", broker, "/data/secret", "/data/deep", "/none")
    assert result.returncode == 1
    assert result.stdout.endswith("/data/deep:\nx\n")
    assert "fdbroker policy explain --action list --policy FILE /data/secret" in result.stderr
    assert "fdbroker: /none: " in result.stderr


@pytest.mark.root
def test_ls_of_a_file_that_may_not_be_described_recommends_to_explain_that(directory: Path) -> None:
    (directory / "file").write_bytes(b"")
    listing = rule("list", actions=["list"])
    with running_broker(directory, policy(directory, listing)) as running:
        result = run_here("ls", "--socket", str(running.socket), str(directory / "file"))
    assert (result.returncode, result.stdout) == (1, "")
    assert f"fdbroker policy explain --action stat --policy FILE {directory}/file" in result.stderr


@pytest.mark.root
def test_ls_long_shows_what_the_policy_lets_be_seen(directory: Path) -> None:
    tree = make_tree(directory / "tree")
    rules = [
        rule("list", actions=["list"]),
        rule("stat", actions=["stat"], paths=["home1/*", "home1"]),
        rule("hide", effect="deny", paths=["home1/with*"]),
    ]
    with running_broker(directory, policy(directory / "tree", *rules)) as running:
        result = run_here("ls", "-l", "--socket", str(running.socket), os.fsdecode(tree.root) + "/home1")
        names = run_here("ls", "-l", "--socket", str(running.socket), os.fsdecode(tree.root) + "/home2")
    rows = {line.rpartition(" ")[2]: line for line in result.stdout.splitlines()}
    modes = {name: line[:10] for name, line in rows.items()}
    assert modes["fifo"] == "prw-------"
    assert modes["device"] == "crw-------"
    assert modes["shadow"][0] == "l"
    assert "31002 31002 " in rows["empty"]
    assert "with spaces" not in result.stdout
    assert all(line[1:].startswith("?????????") for line in names.stdout.splitlines())
    assert {line[0] for line in names.stdout.splitlines()} == set("-dpcls")


def test_time_and_size_are_those_of_the_file(directory: Path) -> None:
    path = str(directory / "one")
    with FakeBroker({"/d/a": b"12345"}, socket_path=path):
        result = run_here("ls", "-l", "--socket", path, "/d/a")
    assert result.returncode == 0
    assert result.stdout.startswith(stat.filemode(stat.S_IFREG)[0])
    assert " 5 " in result.stdout


# ---- no broker ----


@pytest.mark.parametrize("arguments", [("cat", "/x"), ("ls", "/x"), ("exec", "/x", "true")])
def test_missing_broker_is_told_with_what_to_do(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    where = str(tmp_path / "none")
    result = run_here(arguments[0], "--socket", where, *arguments[1:])
    assert result.returncode == (125 if arguments[0] == "exec" else 2)
    assert result.stdout == ""
    for expected in (
        where,
        "no broker has its socket there",
        "fdbrokerd --daemon",
        "--socket",
        "FDBROKER_SOCKET",
    ):
        assert expected in result.stderr
    assert result.stderr.count("\n") == 1


def test_socket_that_nobody_listens_on_is_told(tmp_path: Path) -> None:
    where = str(tmp_path / "stale")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(where)
    result = run_here("cat", "--socket", where, "/x")
    assert result.returncode == 2
    assert "no broker listens on it any more" in result.stderr


def test_socket_of_another_kind_is_told(tmp_path: Path) -> None:
    where = str(tmp_path / "datagrams")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(where)
        result = run_here("cat", "--socket", where, "/x")
    assert result.returncode == 2
    assert "another type" in result.stderr


@pytest.mark.root
def test_user_who_may_not_connect_is_told_the_group_that_may(broker: str, others: ForOtherUsers) -> None:
    try:
        os.chown(broker, 0, 1)
        os.chmod(broker, 0o660)
        result = run_as(CLIENT_UID, others, "cat", "--socket", broker, "/data/a")
    finally:
        os.chown(broker, 0, 0)
        os.chmod(broker, 0o666)
    assert result.returncode == 2
    assert f"members of the group daemon may. As root: usermod -aG daemon {CLIENT_UID}" in result.stderr


@pytest.mark.root
def test_user_who_may_not_even_look_for_the_socket_is_told(others: ForOtherUsers, directory: Path) -> None:
    closed = directory / "closed"
    closed.mkdir(mode=0o700)
    result = run_as(CLIENT_UID, others, "cat", "--socket", str(closed / "broker"), "/data/a")
    assert result.returncode == 2
    assert f"no access to {closed}" in result.stderr


# ---- which socket ----


def test_socket_is_taken_from_the_command_then_the_group_then_the_environment(
    broker: str, tmp_path: Path
) -> None:
    wrong = str(tmp_path / "none")
    inside = environment(FDBROKER_SOCKET=broker)
    outside = environment(FDBROKER_SOCKET=wrong)
    assert run_here("cat", "/data/a", env=inside).returncode == 0
    assert run_here("cat", "/data/a", env=outside).returncode == 2
    assert run_here("--socket", broker, "cat", "/data/a", env=outside).returncode == 0
    assert run_here("--socket", wrong, "cat", "/data/a", env=inside).returncode == 2
    assert run_here("--socket", wrong, "cat", "--socket", broker, "/data/a", env=outside).returncode == 0
    default = run_here("cat", "/data/a", env=environment(FDBROKER_SOCKET=""))
    assert default.returncode in {0, 1} or "/run/fdbroker/broker.seqpacket" in default.stderr
