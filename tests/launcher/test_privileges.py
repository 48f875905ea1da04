from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fdbroker.kernel import capabilities, process
from fdbroker.kernel.capabilities import Capabilities
from fdbroker.kernel.process_state import CAP_DAC_READ_SEARCH, ProcessState, parse_process_state
from fdbroker.launcher import privileges
from fdbroker.launcher.privileges import (
    PrivilegeError,
    Privileges,
    WantedPrivileges,
    become_broker,
    differences,
)

if TYPE_CHECKING:
    from tests.kernel.conftest import Children

UID, GID = 23457, 23458
ONE = 1 << CAP_DAC_READ_SEARCH
SOURCE = Path(privileges.__file__).parents[2]

RIGHT = ProcessState(
    uids=(UID,) * 4,
    gids=(GID,) * 4,
    groups=(),
    inheritable=ONE,
    permitted=ONE,
    effective=ONE,
    bounding=ONE,
    ambient=ONE,
    no_new_privs=True,
    seccomp=0,
    threads=1,
)


def test_the_wanted_state_has_no_differences() -> None:
    assert differences(Privileges(RIGHT, 0x2F), WantedPrivileges(UID, GID)) == []
    # What initgroups() of systemd gives, and securebits that say more.
    assert differences(Privileges(RIGHT._replace(groups=(GID,)), 0xEF), WantedPrivileges(UID, GID)) == []
    # A filter of systemd's is none of this module's business.
    assert differences(Privileges(RIGHT._replace(seccomp=2), 0x2F), WantedPrivileges(UID, GID)) == []


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"uids": (UID, UID, 0, UID)}, "user ids are"),
        ({"uids": (UID, UID, UID, 0)}, "user ids are"),
        ({"gids": (0, GID, GID, GID)}, "group ids are"),
        ({"groups": (GID, 27)}, "supplementary groups are"),
        ({"groups": (27,)}, "supplementary groups are"),
        ({"permitted": ONE | 1}, "permitted capabilities are 0x5, not 0x4"),
        ({"permitted": 0}, "permitted"),
        ({"effective": 0}, "effective"),
        ({"inheritable": 0}, "inheritable"),
        ({"ambient": 0}, "ambient"),
        ({"bounding": 0x1FFFFFFFFFF}, "bounding capabilities are 0x1ffffffffff"),
        ({"no_new_privs": False}, "no_new_privs is not set"),
    ],
)
def test_each_difference_is_named_alone(change: dict[str, Any], text: str) -> None:
    [found] = differences(Privileges(RIGHT._replace(**change), 0x2F), WantedPrivileges(UID, GID))
    assert text in found


@pytest.mark.parametrize("securebits", [0, 0xF & ~1, 0xF & ~2, 0xF & ~4, 0xF & ~8, 0x1F, 0x3F])
def test_securebits_that_are_less_or_keep_capabilities_are_a_difference(securebits: int) -> None:
    [found] = differences(Privileges(RIGHT, securebits), WantedPrivileges(UID, GID))
    assert "securebits are" in found


@pytest.mark.root
def test_the_state_outlives_execve() -> None:
    show = "print(open('/proc/self/status').read())"
    program = (
        f"import sys, os; sys.path.append({str(SOURCE)!r})\n"
        "from fdbroker.launcher.privileges import become_broker\n"
        f"become_broker({UID}, {GID})\n"
        f"os.execv('/usr/bin/python3', ['python3', '-I', '-S', '-c', {show!r}])\n"
    )
    output = subprocess.run(
        ["/usr/bin/python3", "-I", "-S", "-B", "-c", program], check=True, capture_output=True
    ).stdout
    assert parse_process_state(output) == RIGHT


@pytest.mark.root
def test_the_broker_reads_what_it_may_not_and_can_do_nothing_else(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("read by the capability")
    secret.chmod(0o600)
    attempts = (
        "import ctypes, os\n"
        f"print(open({str(secret)!r}).read())\n"
        f"for attempt in (lambda: open({str(secret)!r}, 'a'), lambda: os.chmod({str(secret)!r}, 0o666),\n"
        f"    lambda: os.setuid(0), lambda: os.setgroups([0]), lambda: os.kill({os.getpid()}, 0),\n"
        "    lambda: os.chroot('/')):\n"
        "    try: attempt()\n"
        "    except PermissionError: print('refused')\n"
        "print(ctypes.CDLL(None).prctl(47, 2, 21, 0, 0))\n"  # raise CAP_SYS_ADMIN to ambient
    )
    program = (
        f"import sys, os; sys.path.append({str(SOURCE)!r})\n"
        "from fdbroker.launcher.privileges import become_broker\n"
        f"become_broker({UID}, {GID})\n"
        f"os.execv('/usr/bin/python3', ['python3', '-I', '-S', '-c', {attempts!r}])\n"
    )
    output = subprocess.run(
        [sys.executable, "-I", "-S", "-B", "-c", program], check=True, capture_output=True, text=True
    ).stdout
    assert output.splitlines() == ["read by the capability", *["refused"] * 6, "-1"]


@pytest.mark.root
def test_the_state_is_returned_as_verified_and_a_second_time_changes_nothing(in_child: Children) -> None:
    def child() -> list[object]:
        first = become_broker(UID, GID)
        process.drop_from_bounding_set = None  # type: ignore[assignment]
        process.change_ids = None  # type: ignore[assignment]
        capabilities.capset = None  # type: ignore[assignment]
        return [first == become_broker(UID, GID), first.status == RIGHT, first.securebits]

    assert in_child(child) == [True, True, 0x0F]


@pytest.mark.root
def test_only_what_differs_is_changed(in_child: Children) -> None:
    # As systemd leaves it without NoNewPrivileges=: all else is there, and no right to change it.
    def child() -> list[object]:
        set_no_new_privs = process.set_no_new_privs
        process.set_no_new_privs = lambda: None
        with pytest.raises(PrivilegeError, match="after changing all: no_new_privs is not set") as caught:
            become_broker(UID, GID)
        process.set_no_new_privs = set_no_new_privs
        return [become_broker(UID, GID).status == RIGHT, "NoNewPrivileges=yes" in str(caught.value)]

    assert in_child(child) == [True, True]


@pytest.mark.root
def test_capabilities_that_can_not_be_dropped_are_an_error_with_its_cure(in_child: Children) -> None:
    # As systemd leaves it without CapabilityBoundingSet=.
    def child() -> str:
        process.set_keepcaps(True)
        process.change_ids(UID, GID)
        capabilities.capset(Capabilities(ONE, ONE, ONE))
        process.raise_ambient_capability(CAP_DAC_READ_SEARCH)
        with pytest.raises(PrivilegeError) as caught:
            become_broker(UID, GID)
        return str(caught.value)

    text = in_child(child)
    assert "prctl(option='PR_CAPBSET_DROP', dropped=0, needs='CAP_SETPCAP'): EPERM" in text
    assert "bounding capabilities are" in text
    assert "CapabilityBoundingSet=CAP_DAC_READ_SEARCH" in text


def test_without_any_privilege_the_error_says_what_to_do(in_child: Children) -> None:
    def child() -> str:
        if os.geteuid() == 0:
            process.change_ids(UID, GID)
        with pytest.raises(PrivilegeError) as caught:
            become_broker(UID + 1, GID + 1)
        return str(caught.value)

    text = in_child(child)
    assert "Start it as root" in text
    assert f"not {UID + 1}" in text


@pytest.mark.root
@pytest.mark.parametrize("call", ["set_securebits", "clear_ambient_capabilities", "raise_ambient_capability"])
def test_a_step_that_did_nothing_is_noticed(in_child: Children, call: str) -> None:
    def child() -> bool:
        capabilities.capset(capabilities.capget()._replace(inheritable=ONE | 1))
        process.raise_ambient_capability(0)
        setattr(process, call, lambda *_arguments: None)
        try:
            become_broker(UID, GID)
        except PrivilegeError:
            return True
        return False

    # Clearing is the second of two ways: dropping a capability takes it from the ambient set as well.
    assert in_child(child) is (call != "clear_ambient_capabilities")


@pytest.mark.parametrize(("uid", "gid"), [(0, GID), (UID, 0), (0, 0)])
def test_root_is_no_user_for_the_broker(uid: int, gid: int) -> None:
    with pytest.raises(PrivilegeError, match="must not be root"):
        become_broker(uid, gid)


def test_more_than_one_thread_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(privileges, "read_privileges", lambda: Privileges(RIGHT._replace(threads=2), 0x2F))
    with pytest.raises(PrivilegeError, match="2 threads"):
        become_broker(UID, GID)
