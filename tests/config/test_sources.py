"""The policy file is believed only if nobody but root can have written it."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fdbroker.config import ConfigError, SystemLookups, load_policy_file, read_policy_file
from fdbroker.config.sources import MAX_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

STRANGER = 54321
TEXT = b"version: 1\nroots: {etc: {path: /etc}}\nrules: []\n"


def problem_with(path: Path | str, *, dev: bool = False) -> str:
    with pytest.raises(ConfigError) as caught:
        read_policy_file(str(path), dev=dev)
    return str(caught.value)


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory of root's whose parents are root's as well, which /tmp is not."""
    with tempfile.TemporaryDirectory(dir="/root" if os.geteuid() == 0 else None) as name:
        yield Path(name)


@pytest.fixture
def policy(directory: Path) -> Path:
    file = directory / "policy.yaml"
    file.write_bytes(TEXT)
    file.chmod(0o644)
    return file


@pytest.mark.root
def test_a_file_of_roots_in_directories_of_roots_is_read(policy: Path) -> None:
    assert read_policy_file(str(policy)) == TEXT
    assert load_policy_file(str(policy))["roots"] == [
        {"name": "etc", "path": "/etc", "cross_mounts": False, "opens": "loop"}
    ]


@pytest.mark.root
def test_a_relative_name_is_checked_up_to_the_top(policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(policy.parent)
    assert read_policy_file("policy.yaml") == TEXT
    policy.parent.chmod(0o777)
    assert "has mode 0777" in problem_with("policy.yaml")


@pytest.mark.root
@pytest.mark.parametrize("dev", [False, True])
def test_a_file_of_somebody_elses_is_refused(policy: Path, dev: bool) -> None:  # noqa: FBT001
    os.chown(policy, STRANGER, 0)
    assert problem_with(policy, dev=dev) == f"{policy}: belongs to uid 54321, not to root; chown it to root"


@pytest.mark.root
@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_can_write_is_refused(policy: Path, mode: int) -> None:
    policy.chmod(mode)
    assert problem_with(policy) == f"{policy}: has mode 0{mode:o}, which lets others write; chmod go-w it"


@pytest.mark.root
def test_a_file_that_an_acl_lets_somebody_write_is_refused(policy: Path) -> None:
    try:
        done = subprocess.run(["setfacl", "-m", f"u:{STRANGER}:rw", policy], check=False, capture_output=True)
    except FileNotFoundError:
        # Without the tool: the attribute as the kernel takes it, entries (tag, bits, id) after the version.
        acl = bytes.fromhex("02000000 01000600ffffffff 02000600") + STRANGER.to_bytes(4, "little")
        acl += bytes.fromhex("04000400ffffffff 10000600ffffffff 20000400ffffffff")
        os.setxattr(policy, "system.posix_acl_access", acl)
    else:
        assert done.returncode == 0
    assert stat.S_IMODE(policy.stat().st_mode) == 0o664
    assert "which lets others write" in problem_with(policy)


@pytest.mark.root
def test_a_file_with_a_second_name_is_refused(policy: Path) -> None:
    os.link(policy, policy.with_suffix(".2"))
    assert "has 2 names (hard links)" in problem_with(policy)


@pytest.mark.root
def test_a_directory_of_somebody_elses_anywhere_above_is_refused(policy: Path) -> None:
    below = policy.parent / "a" / "b"
    below.mkdir(parents=True)
    moved = policy.rename(below / "policy.yaml")
    os.chown(policy.parent, STRANGER, 0)
    (policy.parent / "a").chmod(0o775)
    assert problem_with(moved).splitlines() == [
        (
            f"{policy.parent}: this directory above the policy file belongs to uid 54321, not to root; "
            "keep the file in a directory of root's"
        ),
        (
            f"{policy.parent}/a: this directory above the policy file has mode 0775, which lets others "
            "write; keep the file in a directory that only root can write to"
        ),
    ]


@pytest.mark.root
def test_all_that_is_wrong_with_a_file_is_said_at_once(policy: Path) -> None:
    os.link(policy, policy.with_suffix(".2"))
    os.chown(policy, STRANGER, 0)
    policy.chmod(0o666)
    assert len(problem_with(policy).splitlines()) == 3


@pytest.mark.root
def test_a_sticky_directory_that_all_can_write_is_for_development_only(policy: Path) -> None:
    policy.parent.chmod(0o1777)
    assert "has mode 01777" in problem_with(policy)
    assert read_policy_file(str(policy), dev=True) == TEXT
    policy.parent.chmod(0o777)
    assert "has mode 0777" in problem_with(policy, dev=True)


def test_development_takes_a_file_of_the_user_who_runs_this(tmp_path: Path) -> None:
    file = tmp_path / "policy.yaml"
    file.write_bytes(TEXT)
    file.chmod(0o600)
    assert read_policy_file(str(file), dev=True) == TEXT
    if os.geteuid() != 0 or stat.S_IMODE(Path("/tmp").stat().st_mode) & 0o002:
        assert "this directory above the policy file" in problem_with(file)


def test_a_symbolic_link_is_refused_as_the_file_and_on_the_way(policy: Path) -> None:
    link = policy.parent / "link.yaml"
    link.symlink_to("policy.yaml")
    assert (
        problem_with(link, dev=True)
        == f"{link}: is a symbolic link; name the file by its real path, '{policy}'"
    )
    around = policy.parent / "around"
    around.symlink_to(".")
    assert problem_with(around / "policy.yaml", dev=True) == (
        f"{around}: is a symbolic link; name the file by its real path, '{policy}'"
    )


def test_what_is_no_regular_file_is_refused_without_waiting(directory: Path) -> None:
    fifo = directory / "fifo"
    os.mkfifo(fifo, 0o600)
    assert problem_with(fifo, dev=True) == f"{fifo}: is not a regular file; name the policy file"
    assert "is not a regular file" in problem_with(directory, dev=True)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(directory / "socket"))
        assert "can't be opened" in problem_with(directory / "socket", dev=True)
    assert "is not a regular file" in problem_with("/dev/null", dev=True)


def test_a_file_that_is_not_there_is_said_to_be_so(directory: Path) -> None:
    assert problem_with(directory / "x", dev=True).endswith(
        "/x: can't be opened: No such file or directory; check the path and who runs this"
    )
    assert problem_with(directory / "x/y", dev=True).startswith(
        f"{directory}/x: can't be opened: No such file"
    )


@pytest.mark.parametrize("path", ["", "/", "a\0b"])
def test_what_is_no_file_name_is_refused(path: str) -> None:
    assert "is not the name of a file; name the policy file" in problem_with(path)


def test_a_mebibyte_is_the_limit(policy: Path) -> None:
    policy.write_bytes(b"#" * MAX_BYTES)
    assert len(read_policy_file(str(policy), dev=True)) == MAX_BYTES
    policy.write_bytes(b"#" * (MAX_BYTES + 1))
    assert (
        problem_with(policy, dev=True)
        == f"{policy}: has more than 1048576 bytes; a policy is smaller: use globs"
    )


@pytest.mark.parametrize("new", [TEXT + b"#", TEXT[:-2], b"#" * len(TEXT)])
def test_a_file_that_changes_while_it_is_read_is_refused(
    policy: Path, monkeypatch: pytest.MonkeyPatch, new: bytes
) -> None:
    os.utime(policy, (1, 1))
    read = os.read

    def read_and_change(descriptor: int, count: int) -> bytes:
        part = read(descriptor, count)
        if not part:
            policy.write_bytes(new)
        return part

    monkeypatch.setattr(os, "read", read_and_change)
    assert (
        problem_with(policy, dev=True) == f"{policy}: changed while it was read; try again when it is written"
    )


def test_no_descriptor_is_left_open(policy: Path) -> None:
    (policy.parent / "link").symlink_to("policy.yaml")
    before = os.listdir("/proc/self/fd")
    read_policy_file(str(policy), dev=True)
    for name in ("link", "missing", "missing/x", "."):
        problem_with(policy.parent / name, dev=True)
    assert os.listdir("/proc/self/fd") == before


# ---- what the machine is asked ----


def test_names_of_this_machine_are_found_and_others_are_not() -> None:
    lookups = SystemLookups()
    assert lookups.user("root") == 0
    assert lookups.group("root") == 0
    assert lookups.user("no such user") is None
    assert lookups.group("no such group") is None
    assert "root" in lookups.user_names()
    assert "root" in lookups.group_names()


def test_a_directory_is_one_all_the_way_down(tmp_path: Path) -> None:
    (tmp_path / "d/e").mkdir(parents=True)
    (tmp_path / "link").symlink_to("d")
    (tmp_path / "file").touch()
    lookups = SystemLookups()
    assert lookups.directory("/") is None
    assert lookups.directory(f"{tmp_path}/d/e") is None
    fault = lookups.directory(f"{tmp_path}/link/e")
    assert fault == (f"'{tmp_path}/link' is a symbolic link", f"write the real path, '{tmp_path}/d/e'")
    fault = lookups.directory(f"{tmp_path}/file")
    assert fault == (f"'{tmp_path}/file' is not a directory", "name a directory")
    fault = lookups.directory(f"{tmp_path}/x/y")
    assert fault == (f"'{tmp_path}/x': No such file or directory", "name a directory that exists")
