"""`fdbroker doctor`: what is there, what is missing, and what to do."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import pwd
import threading
from typing import TYPE_CHECKING, Any

import pytest

from fdbroker.cli.checks import (
    BROKEN,
    MISSING,
    OK,
    WEAKER,
    Check,
    Places,
    all_checks,
    broker,
    files,
    installation,
    kernel,
)
from fdbroker.cli.checks import check as check_module
from fdbroker.cli.checks import policy as policy_checks
from fdbroker.cli.checks.check import NotSeenError, in_child, in_time
from fdbroker.config.compile import compile_policy
from fdbroker.config.defaults import ADD_USER
from fdbroker.config.identities import SystemLookups
from fdbroker.kernel import landlock, namespaces, process, sockets
from fdbroker.kernel.errors import SyscallError
from fdbroker.launcher.mounts import ReadOnlyViewError
from tests.cli.commands import run_here, run_on_terminal, run_program_as
from tests.kernel.conftest import Children
from tests.running_broker import CLIENT_UID, policy, reachable_directory, running_broker

if TYPE_CHECKING:
    from pathlib import Path

    from tests.for_other_users import ForOtherUsers

NOWHERE = Places("/no/such/socket", "/no/such/control", "/no/such/policy.yaml")
KERNEL = [
    "openat2",
    "mount_setattr",
    "Landlock",
    "seccomp",
    "SO_PEERPIDFD",
    "PIDFD_GET_INFO",
    "SO_PASSRIGHTS",
]


def found(name: str, places: Places = NOWHERE) -> Check:
    [check] = [check for check in all_checks(places) if check.name == name]
    return check


def of_kernel(name: str) -> Check:
    [check] = [check for check in kernel.kernel_checks() if check.name == name]
    return check


def states(document: dict[str, Any]) -> dict[str, str]:
    return {check["name"]: check["state"] for check in document["checks"]}


def test_each_check_that_is_not_ok_has_a_cure_and_those_that_are_have_none() -> None:
    for check in all_checks(NOWHERE):
        assert bool(check.cure) is (check.state != OK), check
        assert check.found
        assert check.meaning


def test_what_can_not_be_looked_at_does_not_hide_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fdbroker.cli.checks.limit_checks", refuse(errno.EIO))
    check = found("limits")
    assert check.state == WEAKER
    assert "could not be looked at to the end" in check.found


def test_what_hangs_or_fails_does_not_hide_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_module, "_LONGEST_LOOK", 0.3)
    monkeypatch.setattr("fdbroker.cli.checks.root_checks", lambda _: threading.Event().wait())
    monkeypatch.setattr("fdbroker.cli.checks.policy_file", lambda _: threading.Event().wait())
    said: dict[str, object] = {}
    monkeypatch.setattr("fdbroker.cli.checks.file_checks", lambda *_: said["what a broker says"])
    by_name = {check.name: check for check in all_checks(NOWHERE)}
    for name in ("its roots", NOWHERE.policy):
        assert by_name[name].state == WEAKER
        assert "does not answer" in by_name[name].found
    assert "KeyError: 'what a broker says'" in by_name["its files"].found
    assert by_name["kernel settings"].state in {OK, WEAKER}
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_what_a_look_gives_is_told_whole_and_its_end_without_a_word_is() -> None:
    assert in_time(lambda: ["x" * 200_000, None]) == ["x" * 200_000, None]
    with pytest.raises(NotSeenError, match=r"^the process that tried it ended with 3$"):
        in_time(lambda: os._exit(3))


def test_nothing_stays_behind_from_trying(tmp_path: Path) -> None:
    def seen() -> list[list[str]]:
        with open("/proc/self/status") as file:
            privileges = [line for line in file if line.startswith(("Seccomp:", "NoNewPrivs:"))]
        with open("/proc/self/mountinfo") as file:
            return [os.listdir("/proc/self/fd"), privileges, list(file)]

    def child() -> list[list[list[str]]]:
        if os.geteuid() == 0:  # who is no root mounts nothing; and other tests mount while this one runs
            namespaces.unshare(namespaces.CLONE_NEWNS)
            namespaces.mount_setattr(b"/", attributes=0, propagation=namespaces.MS_PRIVATE, recursive=True)
        before = seen()
        all_checks(NOWHERE)
        after = seen()
        (tmp_path / "still").write_text("can be written")
        return [before, after]

    before, after = Children()(child)
    assert after[:2] == before[:2]
    # Another test's mount may be gone: who removes the directory below it takes it from every namespace.
    assert set(after[2]) <= set(before[2])


def test_missing_things_are_status_1_and_say_what_to_do() -> None:
    result = run_here(
        "doctor", "--socket", NOWHERE.socket, "--control", "/no/such/control", "--policy", NOWHERE.policy
    )
    assert (result.returncode, result.stderr) == (1, "")
    assert "missing  broker " in result.stdout
    assert "to do:    " in result.stdout
    assert "fdbroker policy check" in result.stdout
    assert "\x1b" not in result.stdout


@pytest.mark.root
def test_running_broker_is_looked_at_layer_by_layer(others: ForOtherUsers) -> None:
    with reachable_directory() as directory:
        (directory / "tree").mkdir()
        control = str(directory / "control")
        with running_broker(directory, policy(directory / "tree"), f"--control={control}") as running:
            options = ("--socket", str(running.socket), "--control", control, "--policy", NOWHERE.policy)
            as_root = states(json.loads(run_here("doctor", "--json", *options).stdout))
            as_other = states(
                json.loads(run_program_as(CLIENT_UID, others, "doctor", "--json", *options).stdout)
            )
            without = states(
                json.loads(
                    run_here("doctor", "--json", *options[:2], "--control", "/no", *options[4:]).stdout
                )
            )
    layers = ["its read-only view", "its Landlock domain", "its seccomp filter", "its audit"]
    for shown in (as_root, as_other, without):
        assert {shown[name] for name in (*layers, "broker", *KERNEL[:1])} == {OK}
    assert (as_root["control socket"], without["control socket"]) == (OK, WEAKER)


@pytest.mark.root
def test_broker_that_decides_by_another_policy_than_the_file_is_told() -> None:
    text = "version: 1\nroots: {{tree: {{path: {}}}}}\nrules: []\n"
    with reachable_directory() as directory:
        (directory / "tree").mkdir()
        control = str(directory / "control")
        with running_broker(directory, text.format(directory / "tree"), f"--control={control}") as running:
            places = Places(str(running.socket), control, str(directory / "policy.yaml"))
            with pytest.MonkeyPatch.context() as patch:
                # The directory is below /tmp.
                from fdbroker import config  # noqa: PLC0415 - patched here alone

                load = config.load_policy_file
                patch.setattr(config, "load_policy_file", lambda path: load(path, dev=True))
                shown = {check.name: check.state for check in all_checks(places)}
                assert shown[places.policy] == shown["its policy"] == OK
                with open(places.policy, "a") as file:
                    file.write("limits: {connections_per_uid: 5}\n")
                changed = found("its policy", places)
                with open(places.policy, "a") as file:
                    file.write("user: daemon\n")
                both = found("its policy", places)
                with open(places.policy, "w") as file:
                    file.write(text.format(directory / "tree") + "user: daemon\n")
                launchers = found("its policy", places)
    assert changed.state == both.state == launchers.state == WEAKER
    assert "fdbroker reload" in changed.cure
    assert "is not that of" in both.found
    assert both.cure == launchers.cure == "restart the broker: no reload changes user"
    assert launchers.found.endswith(", but for user, which changed since the broker was started")


def test_policy_that_others_can_write_is_broken_with_its_first_problem(tmp_path: Path) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text("version: 1\n")
    file.chmod(0o666)
    check = found(str(file), NOWHERE._replace(policy=str(file)))
    assert check.state == BROKEN
    assert "lets others write" in check.found
    assert str(file) not in check.found
    assert f"fdbroker policy check {file}" in check.cure


@pytest.mark.root
def test_directory_in_which_others_could_put_a_socket_is_missing() -> None:
    with reachable_directory() as directory:
        for mode, owner, state in ((0o755, 0, OK), (0o775, 0, MISSING), (0o755, CLIENT_UID, MISSING)):
            directory.chmod(mode)
            os.chown(directory, owner, 0)
            assert files.directory(str(directory)).state == state
        assert found(str(directory), NOWHERE._replace(socket=f"{directory}/broker")).state == MISSING
        os.chown(directory, 0, 0)
        (directory / "file").touch()
        assert files.directory(f"{directory}/file").state == MISSING


def test_user_that_exists_is_told_with_its_uid(monkeypatch: pytest.MonkeyPatch) -> None:
    root = pwd.getpwnam("root")
    monkeypatch.setattr(pwd, "getpwnam", lambda name: {"fdbroker": root}[name])
    shown = {check.name: check for check in all_checks(NOWHERE)}
    assert shown["user fdbroker"][:3] == ("user fdbroker", OK, "uid 0")
    worker = shown["user fdbroker-worker"]
    assert worker.state == WEAKER
    assert worker.cure == f"as root: {ADD_USER} fdbroker-worker"


def test_group_that_no_policy_needs_is_not_asked_for() -> None:
    assert "group fdbroker-admin" not in {check.name for check in all_checks(NOWHERE)}


def test_user_and_group_that_the_policy_names_by_number_need_no_name(tmp_path: Path) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text(
        f"version: 1\nroots: {{tree: {{path: {tmp_path}}}}}\nrules: []\n"
        "listeners: {seqpacket: {group: '54322'}}\n"
    )
    compiled = compile_policy(file.read_bytes(), str(file), SystemLookups())
    compiled["daemon"] |= {"uid": 54321, "gid": 54321}
    accounts = {check.name: check for check in installation.account_checks(compiled, otherwise=MISSING)}
    for name in ("user 54321", "group 54322"):
        assert accounts[name][1:3] == (OK, "a number without a name, as the policy has it")
        assert accounts[name].cure == ""


# ---- older kernels ----


def refuse(number: int) -> Any:  # noqa: ANN401 - stands for any of the calls
    def call(*_arguments: object, **_named: object) -> None:
        raise SyscallError(number, "call")

    return call


def test_kernel_without_openat2_is_missing_with_the_likely_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "open_path_beneath", refuse(errno.ENOSYS))
    check = of_kernel("openat2")
    assert check.state == MISSING
    assert "RestrictSUIDSGID=" in check.cure


@pytest.mark.parametrize(("number", "state"), [(errno.EPERM, OK), (errno.ENOSYS, MISSING)])
def test_mounts_are_asked_without_root_whether_they_could(
    monkeypatch: pytest.MonkeyPatch, number: int, state: str
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: CLIENT_UID)
    monkeypatch.setattr(namespaces, "mount_setattr", refuse(number))
    assert of_kernel("mount_setattr").state == state


def test_view_that_can_not_be_made_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ReadOnlyViewError("CAP_SYS_ADMIN is needed")

    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(kernel, "enter_read_only_view", fail)
    check = of_kernel("mount_setattr")
    assert (check.state, check.found) == (MISSING, "CAP_SYS_ADMIN is needed")


@pytest.mark.parametrize(
    ("abi", "state", "said"), [(0, MISSING, "has none"), (3, WEAKER, "lacks: TCP, "), (99, None, "ABI ")]
)
def test_landlock_is_what_can_be_enforced(
    monkeypatch: pytest.MonkeyPatch, abi: int, state: str | None, said: str
) -> None:
    has = landlock.abi_version()
    if has < 6:
        pytest.skip(f"Landlock of this kernel has ABI {has}")
    restrict = landlock.restrict_to
    monkeypatch.setattr(landlock, "restrict_to", lambda trees: restrict(trees, abi=abi))
    check = of_kernel("Landlock")
    assert check.state == (state or OK)
    assert said in check.found


def test_landlock_and_seccomp_that_are_refused_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "set_no_new_privs", refuse(errno.EPERM))
    for name in ("Landlock", "seccomp"):
        check = of_kernel(name)
        assert check.state == MISSING
        assert "EPERM" in check.found


@pytest.mark.parametrize(("level", "expected"), [(0, (WEAKER, WEAKER)), (1, (OK, WEAKER)), (2, (OK, OK))])
def test_identity_is_told_by_level(
    monkeypatch: pytest.MonkeyPatch, level: int, expected: tuple[str, str]
) -> None:
    monkeypatch.setattr(kernel, "probe_level", lambda: (level, "needs Linux 6.13"))
    assert (of_kernel("SO_PEERPIDFD").state, of_kernel("PIDFD_GET_INFO").state) == expected


def test_kernel_without_the_rest_is_weaker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "refuse_descriptors", lambda _sock: False)
    monkeypatch.setattr(kernel, "find_cgroup2", lambda: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert of_kernel("SO_PASSRIGHTS").state == WEAKER
    assert of_kernel("cgroup2").state == WEAKER
    assert "pip install 'fdbroker[daemon]'" in installation.modules().cure


def test_child_that_dies_is_told() -> None:
    assert in_child(lambda: os._exit(3)) == "the process that tried it ended with 3"
    assert in_child(lambda: "a\nb") == r"a\x0ab"


def test_layers_that_a_broker_lacks_are_told() -> None:
    weak = {"read_only_view": "off", "landlock": 0, "identity_level": 1, "audit": "off", "seccomp": False}
    shown = {check.name: check.state for check in broker.layers(weak)}
    assert shown == {
        "its read-only view": WEAKER,
        "its Landlock domain": MISSING,
        "its seccomp filter": MISSING,
        "its identity level": WEAKER,
        "its audit": WEAKER,
    }


def test_states_have_colours_on_a_terminal_alone() -> None:
    options = ("doctor", "--socket", NOWHERE.socket, "--policy", NOWHERE.policy)
    status, shown = run_on_terminal(*options)
    assert status == 1
    assert b"\x1b[31mmissing" in shown
    assert b"\x1b[32mok" in shown
    _, shown = run_on_terminal(*options, NO_COLOR="1")
    assert b"\x1b" not in shown


def test_verbose_says_what_each_means() -> None:
    options = ("--socket", NOWHERE.socket, "--policy", NOWHERE.policy)
    count = len(all_checks(NOWHERE))
    assert run_here("doctor", "-v", *options).stdout.count("it means: ") == count
    assert run_here("doctor", *options).stdout.count("it means: ") < count


def test_socket_with_a_full_stop_and_a_space_in_its_path_is_told_whole() -> None:
    places = NOWHERE._replace(socket="/no/a. b/socket", control="/no/a. b/control")
    check = found("broker", places)
    assert check.found == "/no/a. b/socket: no broker has its socket there"
    assert "fdbrokerd --daemon" in check.cure


# ---- the program, and what the policy asks for ----


def test_program_that_only_some_can_run_is_weaker_with_the_place(monkeypatch: pytest.MonkeyPatch) -> None:
    with reachable_directory() as directory:
        package = directory / "package"
        part, module = package / "part", package / "part" / "module.py"
        part.mkdir(parents=True)
        module.touch()
        monkeypatch.setattr("fdbroker.__file__", str(package / "__init__.py"))
        monkeypatch.setattr("sys.prefix", str(directory))  # the venv may be out of reach for others
        modes = {module: 0o644, part: 0o755, package: 0o755}
        for place, mode in modes.items():
            place.chmod(mode)
        assert installation.program().state == OK
        for place, mode in ((module, 0o640), (part, 0o751), (package, 0o750)):
            place.chmod(mode)
            check = installation.program()
            place.chmod(modes[place])
            assert check.state == WEAKER
            assert check.found == f"is not for everybody: {place} has mode 0{mode:03o}"
            assert check.cure.endswith(str(place))


@pytest.mark.parametrize(
    ("rules", "level", "labels", "said"),
    [
        ("[]\nidentity: strict\n", 1, False, "'identity: strict'"),
        ("[{name: a, deny: open, in: r, client: {label: x_t}, paths: x}]", 2, False, "rules for labels"),
        ("[{name: a, deny: open, in: r, client: {label: x_t}, paths: x}]\nidentity: strict", 2, True, None),
    ],
)  # fmt: skip
def test_policy_that_asks_more_of_the_kernel_than_it_tells_is_missing_something(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, rules: str, level: int, labels: bool, said: str | None
) -> None:
    monkeypatch.setattr(policy_checks, "probe_level", lambda: (level, "PIDFD_GET_INFO needs Linux 6.13"))
    monkeypatch.setattr(policy_checks, "gives_labels", lambda: labels)
    whole = f"version: 1\nroots: {{r: {{path: {tmp_path}}}}}\nrules: {rules}\n"
    compiled = compile_policy(whole.encode(), "policy.yaml", SystemLookups())
    needs = {check.name: check for check in policy_checks.needs(compiled)}
    assert needs["labels"].state == OK
    assert ("identity" in needs) == (said is not None)
    if said is not None:
        assert needs["identity"].state == MISSING
        assert said in needs["identity"].found


def test_limits_by_rate_are_told(tmp_path: Path) -> None:
    said = []
    for limits in ("", "limits: {requests_per_second: 7, opens_per_second: 8, opens_burst: 9}\n"):
        text = f"version: 1\nroots: {{r: {{path: {tmp_path}}}}}\nrules: []\n{limits}"
        compiled = compile_policy(text.encode(), "policy.yaml", SystemLookups())
        said.append(policy_checks.needs(compiled)[-1].found)
    assert said[0].startswith("none ")
    assert said[1] == "requests_per_second 7, opens_per_second 8"
