from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fdbroker.kernel import capabilities
from fdbroker.kernel.capabilities import Capabilities
from fdbroker.kernel.errors import SyscallError
from fdbroker.kernel.libc import SYS_PRCTL, syscall
from fdbroker.kernel.process_state import (
    CAP_DAC_READ_SEARCH,
    ProcessState,
    parse_process_state,
    read_process_state,
)

if TYPE_CHECKING:
    from tests.kernel.conftest import Children

STATUS = b"""\
Name:	fdbroker
Umask:	0077
State:	S (sleeping)
Uid:	990	991	992	993
Gid:	980	981	982	983
FDSize:	64
Groups:	4 27 980 
Threads:	3
CapInh:	0000000000000004
CapPrm:	000001ffffffffff
CapEff:	0000010000000004
CapBnd:	0000000000000006
CapAmb:	0000000000000000
NoNewPrivs:	1
Seccomp:	2
Seccomp_filters:	17
Speculation_Store_Bypass:	thread vulnerable
"""  # noqa: W291 - the kernel ends the line of the groups with a space


def test_the_text_of_status_is_read() -> None:
    assert parse_process_state(STATUS) == ProcessState(
        uids=(990, 991, 992, 993),
        gids=(980, 981, 982, 983),
        groups=(4, 27, 980),
        inheritable=4,
        permitted=0x1FFFFFFFFFF,
        effective=0x10000000004,
        bounding=6,
        ambient=0,
        no_new_privs=True,
        seccomp=2,
        threads=3,
    )


def test_no_groups_are_none() -> None:
    assert parse_process_state(STATUS.replace(b"4 27 980 ", b" ")).groups == ()


@pytest.mark.parametrize(
    "key",
    [
        b"Uid",
        b"Gid",
        b"Groups",
        b"CapInh",
        b"CapPrm",
        b"CapEff",
        b"CapBnd",
        b"CapAmb",
        b"NoNewPrivs",
        b"Seccomp",
    ],
)
def test_a_missing_line_is_an_error_that_names_it(key: bytes) -> None:
    with pytest.raises(ValueError, match=f"no line {key.decode()}$"):
        parse_process_state(STATUS.replace(b"\n" + key + b":", b"\nX:"))


@pytest.mark.parametrize("text", [b"Uid:\t1 1 1", b"Uid:\t1 1 1 x", b"Uid:\t1 1 1 1 1"])
def test_a_strange_line_is_an_error(text: bytes) -> None:
    with pytest.raises(ValueError, match=r".+"):
        parse_process_state(STATUS.replace(b"Uid:\t990\t991\t992\t993", text))


@pytest.mark.parametrize("name", [b"\rSeccomp:\t0", b"a\nSeccomp:\t0", b"\x0bSeccomp:\t0", b"\\\nSeccomp: 0"])
def test_the_name_of_a_command_can_not_pass_for_another_line(in_child: Children, name: bytes) -> None:
    def child() -> list[int]:
        before = read_process_state().seccomp
        pr_set_name = 15
        syscall("prctl", SYS_PRCTL, pr_set_name, ctypes.c_char_p(name), 0, 0, 0)
        # Were the forged line taken, the number of threads would be 9.
        return [before, read_process_state().seccomp]

    before, after = in_child(child)
    assert before == after

    forged = name.replace(b"Seccomp:\t0", b"Threads:\t9").replace(b"Seccomp: 0", b"Threads: 9")

    def threads() -> int:
        syscall("prctl", SYS_PRCTL, 15, ctypes.c_char_p(forged), 0, 0, 0)
        return read_process_state().threads

    assert in_child(threads) == 1


def test_this_process_is_read() -> None:
    state = read_process_state()
    assert state.uids[:3] == os.getresuid()
    assert state.gids[:3] == os.getresgid()
    assert sorted(state.groups) == sorted(os.getgroups())
    # pytest's watchdog is a thread that comes and goes.
    assert read_process_state(os.getpid())._replace(threads=0) == state._replace(threads=0)


def test_the_sets_are_those_of_status() -> None:
    state = read_process_state()
    assert capabilities.capget() == Capabilities(state.effective, state.permitted, state.inheritable)


def test_the_last_capability_is_at_least_checkpoint_restore() -> None:
    assert capabilities.last_capability() >= 40


@pytest.mark.root
def test_sets_become_what_is_asked_in_both_halves(in_child: Children) -> None:
    low, high = 1 << CAP_DAC_READ_SEARCH, 1 << 40

    def child() -> list[object]:
        capabilities.capset(Capabilities(effective=high, permitted=low | high, inheritable=low))
        return [capabilities.capget(), read_process_state()[3:6]]

    assert in_child(child) == [[high, low | high, low], [low, low | high, high]]


def test_more_than_is_permitted_is_an_error_that_says_what_was_asked(in_child: Children) -> None:
    def child() -> list[object]:
        capabilities.capset(Capabilities(0, 0, 0))
        with pytest.raises(SyscallError) as caught:
            capabilities.capset(Capabilities(4, 4, 0))
        return [str(caught.value), caught.value.errno, capabilities.capget()]

    text, number, sets = in_child(child)
    assert text.startswith("capset(effective='0x4', permitted='0x4', inheritable='0x0')")
    assert (number, sets) == (errno.EPERM, [0, 0, 0])


def test_the_numbers_are_those_of_the_header() -> None:
    header = Path("/usr/include/linux/capability.h")
    if not header.exists():
        pytest.skip(f"{header} is not installed")
    numbers = dict(
        line.split()[1:3]
        for line in header.read_text().splitlines()
        if line.startswith("#define CAP_") and len(line.split()) > 2
    )
    ours = {name: value for name, value in vars(capabilities).items() if name.startswith("CAP_")}
    assert ours
    assert {name: int(numbers[name]) for name in ours} == ours
