"""`fdbroker reload`: a lost answer, a file that is not to be trusted, what needs a restart."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

from fdbroker.cli import reload as reload_module
from fdbroker.client import control
from fdbroker.config.compile import load_policy_file
from fdbroker.policy.rules import read_policy
from fdbroker.wire.client import for_broker
from fdbroker.wire.messages import ReloadRequest
from fdbroker.wire.replies import encode_reload_reply, encode_status_reply
from tests.cli.commands import run_here
from tests.client.brokers import ThreadedBroker, hear, say, welcome
from tests.running_broker import OWNER_UID, reachable_directory, running_broker, with_control

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator
    from subprocess import CompletedProcess

pytestmark = pytest.mark.root

POLICY = "version: 1\nroots: {{tree: {{path: {tree}}}}}\nrules: []\n"
LIMITS = "limits: {connections_per_uid: 5}\n"


@pytest.fixture
def directory() -> Iterator[Path]:
    with reachable_directory() as path:
        (path / "tree").mkdir()
        (path / "policy.yaml").write_text(POLICY.format(tree=path / "tree"))
        yield path


def reload(directory: Path) -> CompletedProcess[str]:
    control = str(directory / "control")
    return run_here("reload", "--dev", "--policy", str(directory / "policy.yaml"), "--control", control)


# ---- the answer is lost ----

OLD = {"generation": 4, "fingerprint": "01d01d01"}


def fingerprint_of(file: Path) -> str:
    return read_policy(for_broker(load_policy_file(str(file), dev=True))).fingerprint


def telling(status: dict[str, Any], *, loses: bool = False) -> Callable[[socket.socket], None]:
    """Return a broker's side: it tells this status, and hangs up (`loses`) when a whole policy is there."""

    def turn(sock: socket.socket) -> None:
        hear(sock)
        say(sock, welcome())
        while (request := hear(sock)) is not None:
            if isinstance(request, ReloadRequest):
                if loses:
                    return
                say(sock, encode_reload_reply(request.id, 5, len(request.piece), more=False))
            else:
                say(sock, encode_status_reply(request.id, status["generation"], json.dumps(status).encode()))

    return turn


def hanging_up(sock: socket.socket) -> None:
    """Be a broker that has no time to greet anybody."""


def test_lost_answer_of_a_broker_that_took_the_policy_is_told_as_success(directory: Path) -> None:
    new = {"generation": 5, "fingerprint": fingerprint_of(directory / "policy.yaml")}
    with ThreadedBroker(str(directory / "control"), telling(OLD, loses=True), telling(new)):
        result = reload(directory)
    assert result.returncode == 0
    assert result.stdout == f"{directory}/policy.yaml is in force: generation 5, 1 root, 0 rules\n"
    assert result.stderr.startswith("fdbroker: the broker's answer was lost (")


def test_lost_answer_of_a_broker_that_did_not_take_it_is_told_with_the_policy_in_force(
    directory: Path,
) -> None:
    with ThreadedBroker(str(directory / "control"), telling(OLD, loses=True), telling(OLD)):
        result = reload(directory)
    assert (result.returncode, result.stdout) == (2, "")
    assert f"{directory}/policy.yaml is not in force" in result.stderr
    assert "the broker keeps its old policy, generation 4" in result.stderr
    assert "try again" in result.stderr


def test_lost_answer_of_a_broker_that_has_yet_another_policy_names_its_generation(directory: Path) -> None:
    other = {"generation": 1, "fingerprint": "07e507e5"}
    with ThreadedBroker(str(directory / "control"), telling(OLD, loses=True), telling(other)):
        result = reload(directory)
    assert (result.returncode, result.stdout) == (2, "")
    assert "the broker decides by another policy, generation 1" in result.stderr


@pytest.mark.parametrize("second", [hanging_up, telling({"generation": 5})])
def test_what_is_in_force_is_not_known_where_the_broker_can_not_be_asked_either(
    directory: Path, second: Callable[[socket.socket], None]
) -> None:
    with ThreadedBroker(str(directory / "control"), telling(OLD, loses=True), second):
        result = reload(directory)
    assert (result.returncode, result.stdout) == (3, "")
    assert f"{directory}/policy.yaml: whether it is in force is not known" in result.stderr
    assert "fdbroker doctor" in result.stderr


def test_broker_that_is_lost_before_anything_was_handed_over_keeps_its_policy(directory: Path) -> None:
    with ThreadedBroker(str(directory / "control"), hanging_up):
        result = reload(directory)
    assert (result.returncode, result.stdout) == (2, "")
    assert str(directory / "control") in result.stderr


# ---- what only a restart changes ----

LAUNCHERS = "user: daemon\nlisteners: {{seqpacket: {{mode: '0{mode}'}}}}\naudit: {{to: {audit}}}\n"


def test_reload_names_what_of_the_file_only_a_restart_changes(directory: Path) -> None:
    file = directory / "policy.yaml"
    text = file.read_text()
    first = text + LAUNCHERS.format(mode=660, audit="/var/log/a")
    with running_broker(directory, first, with_control(directory)):
        same = reload(directory)
        file.write_text(text + LAUNCHERS.format(mode=660, audit="/var/log/b") + LIMITS)
        one = reload(directory)
        file.write_text(text + LAUNCHERS.format(mode=600, audit="/var/log/b").replace("daemon", "bin"))
        every = reload(directory)
        file.write_text(first)
        back = reload(directory)
    in_force = f"{file} is in force: generation {{}}, 1 root, 0 rules\n"
    results = [same, one, every, back]
    assert [result.stdout for result in results] == [in_force.format(number) for number in (2, 3, 4, 5)]
    assert [result.returncode for result in results] == [0, 0, 0, 0]
    assert (same.stderr, back.stderr) == ("", "")
    assert one.stderr == f"fdbroker: {file}: the change of audit.to is not in force: restart the broker\n"
    changes = "user, listeners, audit.to"
    assert every.stderr == f"fdbroker: {file}: the change of {changes} is not in force: restart the broker\n"


def test_broker_that_was_started_without_a_launchers_part_is_not_compared(directory: Path) -> None:
    compiled = for_broker(load_policy_file(str(directory / "policy.yaml"), dev=True))
    with running_broker(directory, compiled, with_control(directory)):
        result = reload(directory)
    assert (result.returncode, result.stderr) == (0, "")


# ---- files that are not to be trusted ----


def spoil_by_owner(file: Path) -> None:
    os.chown(file, OWNER_UID, 0)


def spoil_by_mode(file: Path) -> None:
    file.chmod(0o664)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (spoil_by_owner, f"belongs to uid {OWNER_UID}, not to root; chown it to root"),
        (spoil_by_mode, "has mode 0664, which lets others write; chmod go-w it"),
        (
            Path.unlink,
            "can't be opened: No such file or directory; check the path and who runs this",
        ),
    ],
    ids=["owned by another", "writable by a group", "vanished"],
)
def test_reload_of_a_file_that_can_not_be_trusted_changes_nothing(
    directory: Path, spoil: Callable[[Path], None], said: str
) -> None:
    file = directory / "policy.yaml"
    with running_broker(directory, file.read_text(), with_control(directory)) as broker:
        file.write_text(file.read_text() + LIMITS)
        spoil(file)
        result = reload(directory)
        with control.connect(broker.control) as connection:
            status = connection.status()
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"fdbroker: {file}: {said}\n"
    assert status["generation"] == 1
    assert status["limits"] == {
        "connections_per_uid": 64,
        "in_flight_per_connection": 512,
        "message_within": 10.0,
    }
    assert all(record["event"] != "reloaded" for record in broker.records())


# ---- what systemd starts the broker with, if it crashes ----


@pytest.fixture
def compiled_beside(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the name of the compiled policy, and have the directory's broker be the usual one."""
    monkeypatch.setattr(reload_module, "DEFAULT_CONTROL", str(directory / "control"))
    monkeypatch.setattr(reload_module, "COMPILED_POLICY", str(directory / "compiled" / "policy.json"))
    (directory / "compiled").mkdir()
    return directory / "compiled" / "policy.json"


def test_reload_leaves_what_is_in_force_for_a_start_after_a_crash(
    directory: Path, compiled_beside: Path
) -> None:
    compiled_beside.write_text("old")
    with ThreadedBroker(str(directory / "control"), telling(OLD)):
        assert reload(directory).returncode == 0
    assert json.loads(compiled_beside.read_text()) == load_policy_file(
        str(directory / "policy.yaml"), dev=True
    )
    assert compiled_beside.stat().st_mode & 0o777 == 0o600


def test_reload_of_another_broker_leaves_what_the_usual_one_is_started_with(
    directory: Path, compiled_beside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reload_module, "DEFAULT_CONTROL", "/run/elsewhere")
    compiled_beside.write_text("old")
    with ThreadedBroker(str(directory / "control"), telling(OLD)):
        assert reload(directory).returncode == 0
    assert compiled_beside.read_text() == "old"


def test_reload_makes_no_compiled_policy_where_none_is(directory: Path, compiled_beside: Path) -> None:
    with ThreadedBroker(str(directory / "control"), telling(OLD)):
        assert reload(directory).returncode == 0
    assert not compiled_beside.exists()


def test_reload_rather_removes_the_older_one_than_leave_it_where_it_can_not_write(
    directory: Path, compiled_beside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled_beside.write_text("old")

    def no_room(_path: str, _mode: int) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(reload_module, "whole_file", no_room)
    with ThreadedBroker(str(directory / "control"), telling(OLD)):
        result = reload(directory)
    assert result.returncode == 0
    assert "can't be written: No space left on device; make room, and reload again" in result.stderr
    assert not compiled_beside.exists()
