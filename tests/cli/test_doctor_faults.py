"""`fdbroker doctor` finds what goes wrong around a broker that runs: each fault is made for real."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import pwd
import re
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

import pytest

import fdbroker
from fdbroker.cli.broker import how_to_restart
from fdbroker.cli.checks import BROKEN, OK, WEAKER, Check, Places, on_access, scanning
from fdbroker.cli.checks.broker import broker_checks, its_code
from fdbroker.cli.checks.check import Running, in_time
from fdbroker.cli.checks.denials import denials
from fdbroker.cli.checks.files import audit_file, pidfile, sockets
from fdbroker.cli.checks.limits import clock, open_files, settings, tasks
from fdbroker.cli.checks.on_access import on_access_checks
from fdbroker.cli.checks.policy import warnings
from fdbroker.cli.checks.roots import root_checks
from fdbroker.cli.checks.scanning import scan_checks
from fdbroker.config.check import check as check_policy
from fdbroker.config.compile import compile_policy
from fdbroker.config.identities import SystemLookups
from fdbroker.launcher.start import find_cgroup2
from fdbroker.scan.messages import Welcome
from tests.descriptors.mounting import mounted, shared_tmpfs
from tests.hanging.fanotify import held_opens
from tests.hanging.fuse import Operation, abort, fuse_mounted
from tests.processes import in_child, wait_until
from tests.running_broker import BROKER_UID, CLIENT_UID, reachable_directory, running_broker
from tests.scan.running_scand import policy_text, scand_and_broker

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fdbroker.config import CompiledPolicy
    from tests.for_other_users import ForOtherUsers
    from tests.running_broker import RunningBroker

pytestmark = pytest.mark.root

_POLICY = """
version: 1
roots:
  kept: {path: HERE/kept}
  moved: {path: HERE/moved}
  crossed: {path: HERE/crossed, cross_mounts: true}
  helped: {path: HERE/helped, opens: helpers}
rules: []
audit: {to: HERE/audit.jsonl}
listeners:
  seqpacket: {path: HERE/broker.seqpacket, group: 'GROUP', mode: "0660"}
  control: {path: HERE/control}
"""


class Around(NamedTuple):
    """A broker, and what doctor knows of it."""

    directory: Path
    broker: RunningBroker
    compiled: CompiledPolicy
    running: Running

    def places(self) -> Places:
        """Return where it is."""
        return Places(str(self.directory / "broker.seqpacket"), str(self.directory / "control"), "/no/policy")


@pytest.fixture(scope="module")
def around() -> Iterator[Around]:
    # Mounts of later reach the broker's view only if they are made below a mount that is shared.
    with reachable_directory() as outside, shared_tmpfs(outside) as directory:
        text = _POLICY.replace("HERE", str(directory)).replace("GROUP", str(CLIENT_UID))
        for name in ("kept", "moved", "crossed", "helped"):
            (directory / name).mkdir()
        for name in ("crossed", "moved"):
            (directory / name / "below").mkdir()
        (directory / "kept" / "file").touch()
        with running_broker(directory, text, f"--pidfile={directory}/pid", own_socket=False) as broker:
            compiled = compile_policy(text.encode(), "policy.yaml", SystemLookups())
            # As the tests' broker has it (--socket-mode=666, --user).
            compiled["daemon"]["listeners"]["seqpacket"]["mode"] = 0o666
            places = Places(str(directory / "broker.seqpacket"), str(directory / "control"), "/no/policy")
            _, running = broker_checks(places, None)
            assert running is not None
            yield Around(directory, broker, compiled, running)


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def test_broker_around_which_nothing_is_wrong_has_no_fault(around: Around) -> None:
    found = [
        *root_checks(around.running),
        *sockets(around.places().socket, around.compiled, around.running),
        *audit_file(around.compiled, around.running),
        *pidfile(str(around.directory / "pid"), around.running),
        *on_access_checks(around.running),
        open_files(around.running),
        *tasks(around.running),
        its_code(around.running),
    ]
    assert {check.state for check in found} == {OK}, found
    names = ["its roots", "its mounts", "socket seqpacket", "socket control", "audit file", "pidfile"]
    assert [check.name for check in found][: len(names)] == names
    assert "1 root with 'opens: helpers' not looked at" in found[0].found


# ---- roots and mounts ----


def test_root_that_was_renamed_and_made_anew_is_told(around: Around) -> None:
    place, aside = around.directory / "moved", around.directory / "aside"
    place.rename(aside)
    missing = by_name(root_checks(around.running))["its roots"]
    place.mkdir()
    other = by_name(root_checks(around.running))["its roots"]
    place.rmdir()
    aside.rename(place)
    assert missing.state == other.state == BROKEN
    assert f"root moved ({place}) is not there any more" in missing.found
    assert f"root moved ({place}) is another directory" in other.found
    assert "was renamed" in other.found
    assert "restart" in other.cure
    assert by_name(root_checks(around.running))["its roots"].state == OK


def test_what_is_mounted_over_a_root_is_told(around: Around) -> None:
    with mounted("tmpfs", around.directory / "kept"):
        check = by_name(root_checks(around.running))["its roots"]
    assert check.state == BROKEN
    assert "something was mounted there since" in check.found


def test_file_system_that_was_mounted_later_is_told_where_mounts_are_crossed(around: Around) -> None:
    below = around.directory / "crossed" / "below"
    with mounted("tmpfs", below):
        check = by_name(root_checks(around.running))["its mounts"]
    assert check.state == WEAKER
    assert f"writable in its view: {below};" in check.found
    with mounted("tmpfs", around.directory / "moved" / "below"):
        check = by_name(root_checks(around.running))["its mounts"]
    assert check.state == OK


def test_root_that_somebody_made_writable_in_the_brokers_view_is_told(around: Around) -> None:
    def remount(how: str) -> None:
        inside = ["nsenter", "--mount", f"--target={around.running.pid}"]
        subprocess.run([*inside, "mount", "-o", f"remount,bind,{how}", around.directory], check=True)

    remount("rw,nosuid,nodev")
    check = by_name(root_checks(around.running))["its mounts"]
    remount("ro,nosuid,nodev")
    assert check.state == BROKEN
    assert "a root is writable in the broker's view" in check.found
    assert by_name(root_checks(around.running))["its mounts"].state == OK


def test_process_that_can_not_be_looked_at_is_told() -> None:
    gone = Running(2**22 + 1, {"roots": []})
    [check] = root_checks(gone)
    assert check.state == WEAKER
    assert "can't be looked at" in check.found
    assert open_files(gone).state == WEAKER
    assert its_code(gone._replace(status={"version": fdbroker.__version__})).state == WEAKER


def test_root_whose_file_system_does_not_answer_any_more_holds_nothing_up() -> None:
    with reachable_directory() as directory:
        (directory / "far").mkdir()
        text = _POLICY.replace("HERE", str(directory)).replace("GROUP", str(CLIENT_UID))
        text = re.sub(
            "roots:.*rules", "roots: {far: {path: FAR, opens: helpers}}\nrules", text, flags=re.DOTALL
        )
        text = text.replace("FAR", str(directory / "far"))
        with (
            fuse_mounted(directory / "far", {}) as server,
            running_broker(directory, text, own_socket=False),
        ):
            compiled = compile_policy(text.encode(), "policy.yaml", SystemLookups())
            places = Places(str(directory / "broker.seqpacket"), str(directory / "control"), "/no/policy")
            _, running = broker_checks(places, None)
            server.never |= {(Operation.GETATTR, ""), (Operation.STATFS, "")}
            try:
                # So that another policy can be put in force.
                again = in_time(
                    lambda: len(compile_policy(text.encode(), "policy.yaml", SystemLookups())["roots"]), 5.0
                )
                found = in_time(
                    lambda: [
                        *root_checks(running),
                        *audit_file(compiled, running),
                        *on_access_checks(running),
                    ],
                    5.0,
                )
            finally:
                abort(directory / "far")
    assert again == 1
    assert isinstance(found, list)
    assert {state for _, state, *_ in found} == {OK}
    assert "1 root with 'opens: helpers' not looked at" in found[0][2]


# ---- sockets, audit, pidfile ----


def test_socket_that_was_changed_replaced_or_removed_is_told(around: Around) -> None:
    path = around.directory / "broker.seqpacket"

    def look() -> Check:
        return by_name(sockets(str(path), around.compiled, around.running))["socket seqpacket"]

    path.chmod(0o600)
    changed = look()
    path.chmod(0o666)
    os.chown(path, CLIENT_UID, CLIENT_UID)
    foreign = look()
    os.chown(path, 0, CLIENT_UID)
    aside = path.rename(path.with_name("aside"))
    removed = look()
    path.touch()
    file = look()
    path.unlink()
    aside.rename(path)
    assert (changed.state, foreign.state, removed.state, file.state) == (WEAKER, WEAKER, BROKEN, BROKEN)
    assert "mode 0600" in changed.found
    assert "the policy says mode 0666" in changed.found
    assert "is not root's" in foreign.found
    assert "it was removed" in removed.found
    assert "is no socket" in file.found
    assert look().state == OK


def test_sockets_of_another_name_than_the_policy_has_are_not_judged_by_it(around: Around) -> None:
    assert sockets("/elsewhere", around.compiled, around.running) == []


def test_audit_that_was_rotated_without_the_broker_is_told(around: Around) -> None:
    path = around.directory / "audit.jsonl"
    aside = path.rename(path.with_name("audit.jsonl.1"))
    [missing] = audit_file(around.compiled, around.running)
    path.touch(0o640)
    [rotated] = audit_file(around.compiled, around.running)
    path.chmod(0o666)
    [writable] = audit_file(around.compiled, around.running)
    aside.rename(path)
    [right] = audit_file(around.compiled, around.running)
    assert [check.state for check in (missing, rotated, writable, right)] == [BROKEN, WEAKER, BROKEN, OK]
    assert "is not there" in missing.found
    assert "fdbroker audit reopen" in rotated.cure
    assert "others can write records" in writable.found


@pytest.mark.parametrize(("fill", "state"), [(0, WEAKER), (1 << 20, BROKEN)])
def test_audit_whose_disk_has_little_room_or_none_is_told(around: Around, fill: int, state: str) -> None:
    small = around.directory / "small"
    small.mkdir(exist_ok=True)
    with mounted("tmpfs", small, data="mode=755,size=1m"):
        (small / "audit").touch(0o640)
        with contextlib.suppress(OSError):  # it is full
            (small / "others").write_bytes(bytes(fill))
        around.compiled["daemon"]["audit"] = str(small / "audit")
        [check] = audit_file(around.compiled, None)
    around.compiled["daemon"]["audit"] = str(around.directory / "audit.jsonl")
    assert check.state == state
    assert "are free on its disk" in check.found


def test_pidfile_that_others_can_open_or_that_names_somebody_else_is_told(around: Around) -> None:
    path = around.directory / "pid"

    def look() -> Check:
        [check] = pidfile(str(path), around.running)
        return check

    path.chmod(0o644)
    open_to_all = look()
    path.chmod(0o600)
    text = path.read_text()
    path.write_text("1\n")
    other = look()
    path.write_text(text)
    assert open_to_all.state == other.state == BROKEN
    assert "no broker starts" in open_to_all.found
    assert f"names 1, and the broker, process {around.running.pid}, has its lock" in other.found
    assert look().found.endswith(f"process {around.running.pid} holds its lock")
    assert pidfile(str(path.with_name("none")), around.running) == []


def test_lock_that_was_taken_by_a_process_that_has_ended_is_still_its_childs(around: Around) -> None:
    path = around.directory / "left"
    path.touch(0o600)
    path.write_text(f"{os.getpid()}\n")
    [nobody] = pidfile(str(path), around.running)
    with open(path, "rb") as file:
        assert in_child(lambda: fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)) is None
        [held] = pidfile(str(path), around.running)
    assert nobody.found.endswith("no process holds its lock")
    assert held.found.endswith(f"process {os.getpid()} holds its lock")


# ---- on-access scanners ----


def test_listener_that_may_hold_an_open_is_told_and_so_is_how_to_leave_the_broker_out(
    around: Around, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_end, write_end = os.pipe()
    go_on, ended = os.pipe()
    if not (child := os.fork()):  # pragma: no cover - the child writes no report
        os.close(ended)
        with held_opens(around.directory / "kept" / "file"):
            Path("/proc/self/comm").write_text("clamonacc")
            os.write(write_end, b"x")
            os.read(go_on, 1)
        os._exit(0)
    try:
        os.read(read_end, 1)
        configuration = around.directory / "clamd.conf"
        monkeypatch.setattr(on_access, "_configuration_of", lambda _: str(configuration))
        scanned, excluded_not = on_access_checks(around.running)
        configuration.write_text(f"OnAccessExcludeUID {BROKER_UID}\n")
        left = on_access_checks(around.running)
    finally:
        os.close(ended)
        os.waitpid(child, 0)
        for descriptor in (read_end, write_end, go_on):
            os.close(descriptor)
    assert scanned.state == excluded_not.state == WEAKER
    assert scanned.found.startswith(f"clamonacc (process {child}) may be asked")
    assert "kept, moved, crossed" in scanned.found
    assert "helped" not in scanned.found
    assert "say 'opens: helpers' of" in scanned.cure
    assert "OnAccessExcludeUname" in excluded_not.cure
    assert left == [scanned]
    [nobody] = on_access_checks(around.running)
    assert nobody.state == OK


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "fanotify mnt_id:1f mflags:40 mask:10020 ignored_mask:40000003",
            (frozenset({31}), frozenset(), frozenset()),
        ),
        (
            "fanotify sdev:800013 mflags:0 mask:100000 ignored_mask:0",
            (frozenset(), frozenset({0x800013}), frozenset()),
        ),
        (
            "fanotify ino:4f969 sdev:800013 mflags:0 mask:20000 ignored_mask:0",
            (frozenset(), frozenset(), frozenset({0x800013})),
        ),
        ("fanotify ino:4f969 sdev:800013 mflags:0 mask:3b ignored_mask:10000", None),
        ("fanotify flags:10 event-flags:0", None),
    ],
)
def test_only_marks_that_ask_for_permission_count(
    line: str, expected: tuple[frozenset[int], ...] | None
) -> None:
    listener = on_access._listener(os.getpid(), [line])
    marks = None if listener is None else (listener.mounts, listener.filesystems, listener.singles)
    assert marks == expected


def test_configuration_of_clamonacc_is_that_of_its_command_line(tmp_path: Path) -> None:
    for options, expected in (
        (["-c", "/a"], "/a"),
        (["--config-file=/b"], "/b"),
        ([], "/etc/clamav/clamd.conf"),
    ):
        arguments = ["cat", "-", "--", *options]
        with subprocess.Popen(arguments, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            cmdline = Path(f"/proc/{process.pid}/cmdline")
            wait_until(
                cmdline.read_bytes, "its arguments are there: the kernel has them a moment after execve"
            )
            assert on_access._configuration_of(process.pid) == expected
            process.kill()
    file = tmp_path / "clamd.conf"
    file.write_text("OnAccessExcludeUname clamav\nOnAccessExcludeUID 7\n#OnAccessExcludeUname no\n")
    assert on_access.excluded_users(str(file)) == ({"clamav"}, {7})


# ---- code, limits, clock, denials ----


def test_broker_of_another_version_or_of_replaced_sources_is_told(
    around: Around, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(fdbroker, "__version__", "99.0")
    other = its_code(around.running)
    monkeypatch.undo()
    assert other.state == WEAKER
    assert "installed here is 99.0" in other.found
    for folder in ("broker", "kernel"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "new.py").touch()
    monkeypatch.setattr(fdbroker, "__file__", str(tmp_path / "__init__.py"))
    replaced = its_code(around.running)
    assert replaced.state == WEAKER
    assert "installed anew since the broker was started" in replaced.found
    assert how_to_restart() in replaced.cure


def in_namespaces(script: str, check: str) -> str:
    """Run a shell script in a network and user namespace of its own, then show a check of the settings."""
    code = f"from fdbroker.cli.checks.limits import settings; print({check})"
    done = subprocess.run(
        [
            *("unshare", "--net", "--user", "--map-root-user"),
            *("sh", "-ec", f'{script}; exec "$@"', "sh", sys.executable, "-P", "-c", code),
        ],
        env={**os.environ, "PYTHONPATH": str(Path(fdbroker.__file__).parents[1])},
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    return done.stdout


def test_settings_of_the_kernel_that_are_too_low_are_told() -> None:
    script = "echo 16 >/proc/sys/net/core/somaxconn; echo 0 >/proc/sys/user/max_user_namespaces"
    shown = in_namespaces(script, "settings().state, settings().found, settings().cure")
    assert "weaker" in shown
    assert "net.core.somaxconn is 16, user.max_user_namespaces is 0" in shown
    assert "set net.core.somaxconn to at least 128; set user.max_user_namespaces to at least 1" in shown


def test_settings_that_a_kernel_does_not_have_are_right(tmp_path: Path) -> None:
    assert settings(str(tmp_path)).state == OK
    (tmp_path / "kernel").mkdir()
    (tmp_path / "kernel" / "apparmor_restrict_unprivileged_userns").write_text("1\n")
    check = settings(str(tmp_path))
    assert check.cure == "by sysctl: set kernel.apparmor_restrict_unprivileged_userns to 0"


def test_broker_with_few_descriptors_or_tasks_is_told(around: Around) -> None:
    with subprocess.Popen(["sh", "-c", "ulimit -n 100; exec cat"], stdin=subprocess.PIPE) as process:
        wait_until(lambda: Path(f"/proc/{process.pid}/comm").read_text() == "cat\n", "the shell became cat")
        low = Running(process.pid, around.running.status)
        check = open_files(low)
        mounted_on = find_cgroup2()
        assert mounted_on is not None
        group = Path(mounted_on) / f"fdbroker-test-{os.getpid()}"
        group.mkdir()
        limited = (group / "pids.max").exists()
        (group / "cgroup.procs").write_text(f"{process.pid}\n")
        if limited:
            (group / "pids.max").write_text("10\n")
        at_most = tasks(low)
        process.kill()
    group.rmdir()
    assert check.state == BROKEN
    assert check.found == "at most 100"
    assert "LimitNOFILE=" in check.cure
    assert [one.state for one in at_most] == [WEAKER if limited else OK]


def test_clock_that_was_set_since_the_start_is_told(around: Around, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    told = {}
    for by in (0, 3600, -3600):
        monkeypatch.setattr(time, "time", lambda by=by: now + by)
        told[by] = clock(around.running)
    assert told[0].state == OK
    assert told[3600].state == told[-3600].state == WEAKER
    assert "was set forward by 3" in told[3600].found
    assert "was set back by 3" in told[-3600].found


def test_denials_are_those_of_fdbroker_alone(around: Around) -> None:
    ours = [
        'audit: type=1400 audit(1.0:1): apparmor="DENIED" operation="open" profile="fdbrokerd" name="/x"',
        f'type=AVC msg=audit(1.0:2): avc:  denied  {{ read }} for  pid={around.running.pid} comm="python3"',
    ]
    others = [
        'audit: apparmor="DENIED" operation="open" profile="cups" name="/x" pid=1',
        'audit: apparmor="ALLOWED" operation="open" profile="fdbrokerd" name="/x" pid=1',
        "avc:  granted { read } for comm=fdbroker",
    ]
    assert denials([*others, *ours], around.running) == ours
    assert denials(others, None) == []


# ---- the scan service ----


def test_scan_service_that_does_not_run_or_may_not_connect_is_told(
    others: ForOtherUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scanning, "_GREETED_WITHIN", 0.2)
    with reachable_directory() as directory:
        (directory / "tree").mkdir()
        compiled = compile_policy(policy_text(directory).encode(), "policy.yaml", SystemLookups())
        with scand_and_broker(others, directory) as (scand, _broker):
            running = by_name(scan_checks(compiled))
            scand.stop()
            [stopped] = scanning._service(scand.socket)
    [gone] = scanning._service(scand.socket)
    assert (running["scan service"].state, running["scan workers"].state) == (OK, OK)
    assert "answers on" in running["scan service"].found
    assert "hashes" in running["scan service"].found
    assert stopped.state == gone.state == WEAKER
    assert "it does not run" in stopped.found
    assert "systemctl start fdbroker-scand" in stopped.cure
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: pwd.struct_passwd(("scand", "x", uid, uid, "", "/", "")))
    monkeypatch.setattr(os, "getgrouplist", lambda _name, gid: [gid, 1])
    compiled["daemon"]["listeners"]["seqpacket"]["gid"] = CLIENT_UID
    [check] = scanning._membership(compiled)
    assert (check.name, check.state) == ("group of scand", WEAKER)
    assert "usermod -aG" in check.cure


def test_clients_of_clamav_that_nobody_takes_are_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scanning, "_GREETED_WITHIN", 0.2)
    path = str(tmp_path / "clamd")
    missing = scanning._clamd(path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        waiting = scanning._clamd(path)

        def answered(answer: bytes) -> Check:
            def answer_one() -> None:
                client, _ = listener.accept()
                with client:
                    client.sendall(answer if client.recv(16) == b"zPING\0" else b"")

            with ThreadPoolExecutor(1) as pool:
                pool.submit(answer_one)
                return scanning._clamd(path)

        listener.accept()[0].close()  # who waited
        right, wrong = answered(b"PONG\0"), answered(b"no")
    assert [check.state for check in (missing, waiting, right, wrong)] == [WEAKER, WEAKER, OK, WEAKER]
    assert "No such file" in missing.found
    assert "it does not run" in waiting.found
    assert "systemctl start fdbroker-scand" in waiting.cure
    assert "protocol: clamd" in wrong.cure


def test_database_that_is_old_is_told_with_its_age(monkeypatch: pytest.MonkeyPatch) -> None:
    made = time.strftime("%a %b %e %H:%M:%S %Y", time.gmtime(time.time() - 30 * 86400 - 60))
    old = f"ClamAV 1.4.3/27800/{made}, 8700000 signatures"
    assert scanning.days_of_database(old) == 30
    assert scanning.days_of_database("hashes 1, 3 digests") is None
    assert scanning.days_of_database("ClamAV 1.4.3/27800/some day, 1 signatures") is None

    class Service:
        welcome = Welcome(1, "fdbroker-scand 0.0", (), None)

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None: ...

        def status(self) -> dict[str, object]:
            # What was turned by a hostile file may say anything.
            return {"engines": [{"version": old}, {"version": 7}, {}, None], "outdated": True}

    monkeypatch.setattr(scanning, "connect", lambda *_arguments, **_named: Service())
    answers, version, age, outdated = scanning._service("/run/scan")
    assert [check.state for check in (answers, version, age, outdated)] == [OK, WEAKER, WEAKER, WEAKER]
    assert "is fdbroker-scand 0.0; installed here is" in version.found
    assert age.found == "of 30 days ago"
    assert "freshclam" in age.cure
    assert "reload" in outdated.cure


def test_policy_without_a_scan_service_asks_for_none(around: Around) -> None:
    assert scan_checks(around.compiled) == scan_checks(None) == []


def test_warnings_of_the_policy_are_counted_with_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text(f"version: 1\nroots: {{tree: {{path: {tmp_path}}}}}\nrules: []\nread_only_view: off\n")
    compiled = compile_policy(file.read_bytes(), str(file), SystemLookups())
    monkeypatch.setattr("fdbroker.config.check.check", functools.partial(check_policy, dev=True))
    [told] = warnings(str(file), compiled)
    assert told.state == WEAKER
    assert told.found.startswith("1 warning; the first: ")
    assert "[weak-mode]" in told.found
    assert f"fdbroker policy check {file}" in told.cure
    file.write_text(f"version: 1\nroots: {{tree: {{path: {tmp_path}}}}}\nrules: []\n")
    assert warnings(str(file), compiled)[0].state == OK
    file.write_text("")
    assert warnings(str(file), compiled) == []
