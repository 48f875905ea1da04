"""What is said where there is no way to the broker, case by case."""

from __future__ import annotations

import errno
import grp
import os
import pwd
import shutil
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from fdbroker.cli import broker
from fdbroker.cli.checks import check
from fdbroker.client import DEFAULT_SOCKET, BrokerTimeoutError, UnavailableError
from fdbroker.client.control import DEFAULT_CONTROL
from fdbroker.config import names

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MAY_NOT = UnavailableError(errno.EACCES, "Permission denied")
MISSING = UnavailableError(errno.ENOENT, "No such file or directory")


@pytest.fixture(autouse=True)
def _names_are_looked_up_anew() -> Iterator[None]:
    for cached in (names.user_name, names.group_name):
        cached.cache_clear()
    yield
    for cached in (names.user_name, names.group_name):
        cached.cache_clear()


@pytest.fixture
def socket_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the path of something with mode 0660 of group 4242, which has a name."""
    path = tmp_path / "socket"
    path.touch()
    path.chmod(0o660)
    facts = SimpleNamespace(st_mode=0o140660, st_uid=0, st_gid=4242)
    monkeypatch.setattr(os, "stat", lambda _path: facts)
    monkeypatch.setattr(grp, "getgrgid", lambda gid: {4242: SimpleNamespace(gr_name="readers")}[gid])
    monkeypatch.setattr(pwd, "getpwuid", lambda _uid: SimpleNamespace(pw_name="alice"))
    monkeypatch.setattr(pwd, "getpwnam", lambda _name: SimpleNamespace(pw_gid=1000))
    return str(path)


def test_user_outside_the_group_is_told_the_command_that_adds_one(
    socket_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getgrouplist", lambda _user, gid: [gid])
    text = str(broker.obstacle(socket_path, MAY_NOT))
    assert "As root: usermod -aG readers alice; then log in again" in text


def test_user_who_joined_the_group_since_is_told_to_log_in_again(
    socket_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getgrouplist", lambda _user, gid: [gid, 4242])
    text = str(broker.obstacle(socket_path, MAY_NOT))
    assert "its group readers may, which you joined after this session began. Log in again." in text


@pytest.mark.parametrize("installed", [True, False])
def test_missing_broker_is_told_with_the_command_that_starts_it(
    monkeypatch: pytest.MonkeyPatch,
    installed: bool,  # noqa: FBT001 - a parameter
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _name, path: path if installed else None)
    text = str(broker.obstacle("/x", MISSING))
    assert "fdbrokerd --daemon" in text
    assert ("pip install 'fdbroker[daemon]'" in text) is not installed


def test_a_service_is_started_and_restarted_by_systemd(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"/run/systemd/system", "/usr/lib/systemd/system/fdbroker.service"}
    monkeypatch.setattr(os.path, "isdir", there.__contains__)
    monkeypatch.setattr(os.path, "exists", there.__contains__)
    text = str(broker.obstacle("/x", MISSING))
    assert "as root: systemctl start fdbroker.service. Why it ended says journalctl" in text
    assert broker.how_to_restart() == "systemctl restart fdbroker.service"
    for away in sorted(there):
        there.remove(away)
        assert "systemctl" not in str(broker.obstacle("/x", MISSING)) + broker.how_to_restart()
        there.add(away)


@pytest.mark.parametrize("error", [MISSING, UnavailableError(errno.ECONNREFUSED, "Connection refused")])
@pytest.mark.parametrize(
    ("path", "unit"),
    [(DEFAULT_SOCKET, "fdbroker-seqpacket.socket"), (DEFAULT_CONTROL, "fdbroker-control.socket")],
)
def test_service_that_runs_without_its_socket_is_stopped_before_the_socket_is_started(
    monkeypatch: pytest.MonkeyPatch, path: str, unit: str, error: UnavailableError
) -> None:
    monkeypatch.setattr(broker, "is_a_service", lambda: True)
    monkeypatch.setattr(broker, "service_runs", lambda: True)
    text = str(broker.obstacle(path, error))
    cure = "systemctl stop fdbroker.service; systemctl restart {}; systemctl start fdbroker.service."
    assert f"Its service runs without it. As root: {cure.format(unit)}" in text
    # Of another socket the service need know nothing.
    assert "Its service runs" not in str(broker.obstacle("/x", error))
    monkeypatch.setattr(broker, "service_runs", lambda: False)
    assert "as root: systemctl start fdbroker.service." in str(broker.obstacle(path, error))


@pytest.mark.parametrize(("said", "runs"), [("active\n", True), ("inactive\n", False), (None, False)])
def test_a_service_runs_if_systemd_says_so(
    monkeypatch: pytest.MonkeyPatch, *, said: str | None, runs: bool
) -> None:
    monkeypatch.setattr(check, "output_of", lambda *_command: said)
    assert broker.service_runs() is runs


def test_control_socket_is_named_by_its_own_option() -> None:
    text = str(broker.obstacle("/x\n", MISSING, "--control"))
    assert text.startswith(r"/x\x0a: ")
    assert "--control PATH, or FDBROKER_CONTROL" in text


def test_what_is_no_socket_and_what_is_slow_are_told() -> None:
    assert "no socket" in broker.obstacle("/x", UnavailableError(errno.ENOTSOCK, "not a socket")).found
    slow = broker.obstacle("/x", BrokerTimeoutError(errno.ETIMEDOUT, "too slow"))
    assert slow == ("/x: too slow", "The broker's log may say more.")


def test_path_with_a_full_stop_and_a_space_stays_in_what_was_found() -> None:
    found, cure = broker.obstacle("/run/a. b/x", MISSING)
    assert found == "/run/a. b/x: no broker has its socket there"
    assert "fdbrokerd --daemon" in cure


@pytest.mark.parametrize(
    ("uid", "socket_path", "action", "said"),
    [
        (0, DEFAULT_SOCKET, "open", "See why: fdbroker policy explain '/a b'"),
        (1, DEFAULT_SOCKET, "open", "See why, as root: fdbroker policy explain --as daemon '/a b'"),
        (
            4242424,
            "/x\n",
            "list",
            (
                "See why, as root (FILE: the policy of the broker on /x\\x0a):"
                " fdbroker policy explain --as 4242424 --action list --policy FILE '/a b'"
            ),
        ),
    ],
)
def test_who_is_denied_is_told_the_command_that_works_for_him(
    uid: int, socket_path: str, action: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    assert broker.see_why(b"/a b", socket_path, action) == said


def test_an_obstacle_that_is_a_question_is_one_sentence_and_its_cure_another() -> None:
    assert str(broker.Obstacle("is it stuck?", "Look.")) == "is it stuck? Look."
    assert str(broker.Obstacle("it is stuck", "Look.")) == "it is stuck. Look."
