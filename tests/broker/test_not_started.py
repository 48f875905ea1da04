"""What stops the start: exit status 2, a sentence that says why and what helps, and nothing that listens."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from fdbroker.kernel import capabilities, process
from fdbroker.kernel.process_state import CAP_DAC_READ_SEARCH
from fdbroker.launcher import start as start_module
from fdbroker.launcher.broker_seccomp import broker_filter
from fdbroker.launcher.privileges import become_broker
from fdbroker.launcher.start import Start, start_broker
from tests.broker.speaking import Speaker
from tests.processes import in_child
from tests.running_broker import (
    BROKER_UID,
    OTHER_UID,
    launcher_command,
    launcher_environment,
    policy,
    rule,
    running_broker,
    start_that_fails,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.for_other_users import ForOtherUsers

pytestmark = pytest.mark.root


@pytest.fixture
def served(reachable: Path) -> Path:
    """Return a tree to serve."""
    path = reachable / "tree"
    path.mkdir()
    return path


def check_nothing_listens(directory: Path) -> None:
    for path in directory.glob("*.seqpacket"):
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock,
            pytest.raises(ConnectionRefusedError),
        ):
            sock.connect(str(path))


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("{tree}/missing", "can't be opened at 'missing': No such file or directory"),
        ("{tree}/link", "can't be opened at 'link': Not a directory"),
        ("{tree}/link/below", "can't be opened at 'link': Not a directory"),
        ("{tree}/file", "can't be opened at 'file': Not a directory"),
        ("/proc", "is not served: choose a directory on a local disk or tmpfs"),
        ("/proc/1", "is not served"),
        ("/sys", "is not served"),
    ],
)
def test_root_that_can_not_be_served_stops_the_start(
    reachable: Path, served: Path, path: str, said: str
) -> None:
    (served / "real" / "below").mkdir(parents=True)
    (served / "link").symlink_to("real")
    (served / "file").touch()
    text = start_that_fails(reachable, policy(path.replace("{tree}", str(served))))
    assert text.startswith("fdbroker: root 'tree'")
    assert said in text
    if "can't" in said:
        assert "it must be a directory, reached without symbolic links" in text


@pytest.mark.parametrize("user", ["0:0", f"0:{BROKER_UID}", f"{BROKER_UID}:0"])
def test_broker_as_root_is_not_started(reachable: Path, served: Path, user: str) -> None:
    text = start_that_fails(reachable, policy(served), f"--user={user}")
    assert "must not be root's" in text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rules": [rule("x", root="nowhere")]}, "rules[0].root is 'nowhere', which is not among the roots"),
        ({"rules": [rule("x", paths=["/abs"])]}, "rules[0].paths[0]: the glob starts with '/'"),
        ({"version": 2}, "policy.version is not 1"),
        ({"surprise": 1}, "unknown keys: surprise"),
        ({"limits": {"connections": 1}}, "limits has missing or unknown keys"),
    ],
)
def test_compiled_policy_that_is_none_stops_the_start_and_names_the_place(
    reachable: Path, served: Path, changes: dict[str, Any], said: str
) -> None:
    text = start_that_fails(reachable, policy(served, **changes))
    assert text.startswith(f"fdbroker: {reachable}/policy.json is not a compiled policy: ")
    assert said in text
    assert text.endswith("; compile it anew\n")
    # It is checked before anything else is made.
    assert not (reachable / "broker.seqpacket").exists()


@pytest.mark.parametrize("document", [b"{}", b"[]", b"null", b"1", b'"text"'])
def test_json_that_is_no_policy_at_all_stops_the_start(reachable: Path, document: bytes) -> None:
    text = start_that_fails(reachable, document)
    assert text.startswith(f"fdbroker: {reachable}/policy.json is not a compiled policy: ")
    assert text.count("\n") == 1


@pytest.mark.parametrize(
    "document", [b"", b"version: 1\nrules: []\n", b'{"version": 1', b"\xff\xfe\x00", b"\0"]
)
def test_compiled_policy_that_is_no_json_stops_the_start(reachable: Path, document: bytes) -> None:
    text = start_that_fails(reachable, document)
    assert text.startswith(f"fdbroker: {reachable}/policy.json is no JSON: ")
    assert text.endswith("; compile the policy anew\n")
    assert text.count("\n") == 1


def test_broken_policy_that_a_wrong_launcher_hands_over_is_refused_by_the_broker_itself(
    reachable: Path, served: Path
) -> None:
    text = launched(reachable, policy(served, version=2), lambda: None)
    assert text.startswith("fdbroker: the compiled policy can't be used: ")
    assert "policy.version is not 1" in text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "version: 1\nroots: {home: {path: /home}}\nrules:\n  - allow: [opne]\n    in: home\n",
            ["4:", "opne"],
        ),
        ("version: 1\nroots: {home: {path: home}}\nrules: []\n", ["2:"]),
        ("version: 1\n\tbad", ["2:"]),
        ("version: 1\nversion: 1\n", ["2:"]),
        ("", []),
        ("version: 1\nroots: {home: {path: /home}}\nrulez: []\n", ["3:", "rulez"]),
    ],
)
def test_policy_file_with_an_error_stops_the_start_and_names_line_and_reason(
    reachable: Path, text: str, said: list[str]
) -> None:
    answer = start_that_fails(reachable, text)
    assert "policy.yaml" in answer
    for part in said:
        assert part in answer
    # The policy is compiled before anything else is made.
    assert not (reachable / "broker.seqpacket").exists()


def test_audit_that_can_not_be_written_stops_the_start(reachable: Path, served: Path) -> None:
    with open("/dev/full", "wb") as full:
        text = start_that_fails(reachable, policy(served), "--audit=-", stdout=full.fileno())
    assert "the audit can't be written; free its disk or choose another place" in text


@pytest.mark.parametrize("kind", ["device", "named pipe", "terminal"])
def test_audit_that_is_no_regular_file_stops_the_start(reachable: Path, served: Path, kind: str) -> None:
    with contextlib.ExitStack() as opened:
        if kind == "device":
            path = "/dev/full"
        elif kind == "named pipe":
            path = str(reachable / "pipe")
            os.mkfifo(path)
            # Somebody reads it, so that it can be opened.
            opened.callback(os.close, os.open(path, os.O_RDONLY | os.O_NONBLOCK))
        else:
            for descriptor in (pair := os.openpty()):
                opened.callback(os.close, descriptor)
            path = os.ttyname(pair[1])
        text = start_that_fails(reachable, policy(served), f"--audit={path}")
    assert text == f"fdbroker: audit {path} is not a regular file; use - for standard output\n"


@pytest.mark.parametrize("kind", ["link", "pipe without a reader", "directory", "socket"])
def test_audit_that_can_not_be_opened_as_a_file_stops_the_start(
    reachable: Path, served: Path, kind: str
) -> None:
    path, target = reachable / "audit", reachable / "target"
    target.touch()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        if kind == "link":
            path.symlink_to(target)
        elif kind == "pipe without a reader":
            os.mkfifo(path)
        elif kind == "directory":
            path.mkdir()
        else:
            sock.bind(str(path))
        text = start_that_fails(reachable, policy(served), f"--audit={path}")
    assert text.startswith("fdbroker: ")
    assert str(path) in text
    assert target.read_bytes() == b""


@pytest.mark.parametrize("given", ["zz", "zz=name", "", "=name", "3.5=name", "0x3"])
def test_inherited_connection_without_a_number_stops_the_start(
    reachable: Path, served: Path, given: str
) -> None:
    text = start_that_fails(reachable, policy(served), f"--inherited={given}")
    assert "--inherited needs the number of a descriptor, as in 3=NAME" in text
    assert not (reachable / "broker.seqpacket").exists()


@pytest.mark.parametrize("most", [100, 1023])
def test_too_few_descriptors_stop_the_start(reachable: Path, served: Path, most: int) -> None:
    prefix = ["sh", "-c", f'ulimit -n {most}; exec "$@"', "sh"]
    text = start_that_fails(reachable, policy(served), prefix=prefix)
    assert f"the broker may have {most} descriptors open (RLIMIT_NOFILE) and needs 1024" in text
    assert "LimitNOFILE=" in text


def test_socket_that_is_there_already_is_left_alone(reachable: Path, served: Path) -> None:
    there = reachable / "there"
    there.write_text("mine")
    text = start_that_fails(reachable, policy(served), f"--socket={there}")
    assert "a file is there; remove it, or choose another path" in text
    assert there.read_text() == "mine"


def test_socket_that_a_broker_left_behind_is_replaced(reachable: Path, served: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as left:
        left.bind(str(reachable / "broker.seqpacket"))
        left.listen()
    with running_broker(reachable, policy(served)) as broker, Speaker.connect(broker.socket) as speaker:
        assert speaker.status()["generation"] == 1


def test_socket_of_a_broker_that_runs_is_left_alone(reachable: Path, served: Path) -> None:
    with running_broker(reachable, policy(served)) as broker:
        file = reachable / "policy.json"
        command = launcher_command(file, f"--socket={broker.socket}", "--audit=none")
        done = subprocess.run(
            command, env=launcher_environment(), capture_output=True, text=True, check=False
        )
        assert done.returncode == 2
        assert "so a broker runs already; stop it (fdbrokerd --stop, or systemctl" in done.stderr
        with Speaker.connect(broker.socket) as speaker:
            assert speaker.status()["generation"] == 1


def test_compiled_policy_that_somebody_else_could_change_stops_the_start(
    reachable: Path, served: Path
) -> None:
    file = reachable / "policy.json"
    file.write_text(json.dumps(policy(served)))
    os.chown(file, OTHER_UID, OTHER_UID)
    command = [sys.executable, "-P", "-m", "fdbroker.launcher", "--policy", str(file), "--user", "1:1"]
    command += ["--audit", "none", "--socket", str(reachable / "socket")]
    done = subprocess.run(command, env=launcher_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    # /tmp above it is the first thing that is wrong; which one is named is not the point.
    assert "lets others write" in done.stderr
    assert not (reachable / "socket").exists()


def test_code_in_the_working_directory_is_not_run(reachable: Path, served: Path) -> None:
    for name in ("yaml", "json"):
        (reachable / f"{name}.py").write_text(f"open({str(reachable / 'ran')!r}, 'w').close()")
    file = reachable / "policy.yaml"
    file.write_text(f"version: 1\nroots:\n  tree: {{path: {served}}}\nrules: []\nnonsense: 1\n")
    command = [
        sys.executable,
        "-P",
        "-m",
        "fdbroker.launcher",
        "--policy",
        str(file),
        "--user",
        "1:1",
        "--dev",
    ]
    command += ["--audit", "none", "--socket", str(reachable / "socket")]
    done = subprocess.run(
        command, env=launcher_environment(), cwd=reachable, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "nonsense" in done.stderr
    assert not (reachable / "ran").exists()


# What only a wrong launcher could do: the broker looks for itself


def launched(
    reachable: Path,
    compiled: dict[str, Any],
    wrong: Callable[[], None],
    stray: int | None = None,
    python: str = sys.executable,
) -> str:
    """Start a broker by a launcher in which something is wrong; return what the broker says."""
    read_end, write_end = os.pipe()
    path = reachable / "wrong.seqpacket"
    pid = os.fork()
    if not pid:
        try:
            os.dup2(os.open("/dev/null", os.O_RDWR), 0)
            os.dup2(write_end, 1)
            os.dup2(write_end, 2)
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            listener.bind(str(path))
            listener.listen(5)
            wrong()
            if stray is not None:
                os.set_inheritable(stray, True)
            start_broker(
                Start(
                    uid=BROKER_UID,
                    gid=BROKER_UID,
                    policy=compiled,
                    listeners=[(listener.fileno(), "wrong", None)],
                    dev=True,
                    python=python,
                )
            )
        except BaseException as error:  # noqa: BLE001 - the parent reads it
            os.write(2, f"the launcher itself: {error!r}\n".encode())
        finally:
            os._exit(3)
    os.close(write_end)
    with open(read_end, "rb") as pipe:
        text = pipe.read().decode()
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 2, text
    check_nothing_listens(reachable)
    assert text.startswith("fdbroker: ")
    assert "Traceback" not in text
    return text


def patch(name: str, value: Callable[..., object] | str) -> None:
    """Exchange a part of the launcher, in a child that is given up afterwards."""
    pytest.MonkeyPatch().setattr(start_module, name, value)


def test_view_that_is_writable_stops_the_start(reachable: Path, served: Path) -> None:
    def no_view() -> None:
        patch("enter_read_only_view", lambda: None)

    text = launched(reachable, policy(served), no_view)
    assert f"root 'tree' ({served}) is writable in the broker's view" in text
    assert "ReadOnlyPaths=/" in text
    assert "read_only_view: off" in text


def test_descriptor_that_nobody_promised_stops_the_start(reachable: Path, served: Path) -> None:
    def no_closing() -> None:
        pytest.MonkeyPatch().setattr(process, "close_range", lambda *_arguments, **_more: None)

    with open("/etc/passwd", "rb") as stray:
        text = launched(reachable, policy(served), no_closing, stray.fileno())
    assert "whoever starts it must close all others" in text


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("root", "uid 0, which never opens a file"),
        ("too much", "permitted capabilities '0x104'"),
        ("too little", "permitted capabilities '0x0'"),
        ("more to gain", "no_new_privs False"),
        ("another user", f"uids ({BROKER_UID + 9},"),
    ],
)
def test_process_with_other_privileges_stops_the_start(
    reachable: Path, served: Path, others: ForOtherUsers, what: str, said: str
) -> None:
    def become(uid: int, gid: int) -> None:
        if what == "root":
            return
        if what in {"too much", "more to gain"}:
            if what == "too much":
                process.set_no_new_privs()
                process.set_securebits(process.SECBIT_NO_SETUID_FIXUP)
            os.setgroups([])
            os.setresgid(gid, gid, gid)
            os.setresuid(uid, uid, uid)
            if what == "too much":
                now = capabilities.capget()
                capabilities.capset(now._replace(inheritable=0x104))
                for number in (CAP_DAC_READ_SEARCH, capabilities.CAP_SETPCAP):
                    process.raise_ambient_capability(number)
            return
        become_broker(uid + 9 if what == "another user" else uid, gid)
        if what == "too little":
            process.clear_ambient_capabilities()

    def other_privileges() -> None:
        patch("become_broker", become)
        # The start reads entry.py from the launcher's package. Who can't pass over modes needs one in reach.
        patch("__file__", str(others.directory / "fdbroker" / "launcher" / "start.py"))

    text = launched(reachable, policy(served), other_privileges, python=others.python)
    assert "the process is not in the broker's state" in text
    assert "start it by its launcher" in text
    assert said in text


def test_rules_for_control_groups_without_any_stop_the_start(reachable: Path, served: Path) -> None:
    def no_cgroup() -> None:
        patch("find_cgroup2", lambda: None)

    compiled = policy(served, rule("unit", clients=[{"cgroups": ["/system.slice/x.service"]}]))
    text = launched(reachable, compiled, no_cgroup)
    assert "rules for units or control groups, but" in text


@pytest.mark.parametrize("program", [b"", b"\0" * 7, b"\xff" * 8])
def test_filter_that_the_kernel_does_not_take_stops_the_start(
    reachable: Path, served: Path, program: bytes
) -> None:
    def other_filter() -> None:
        patch("broker_filter", lambda: program)

    text = launched(reachable, policy(served), other_filter)
    assert "seccomp(" in text
    assert "EINVAL" in text


def test_filter_for_these_tests_is_the_real_one() -> None:
    assert len(in_child(broker_filter)) % 8 == 0
