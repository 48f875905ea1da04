from __future__ import annotations

import ctypes
import errno
import os
import struct
import threading
from typing import TYPE_CHECKING

import pytest

from fdbroker.kernel import process, seccomp
from fdbroker.kernel.errors import SyscallError
from fdbroker.kernel.libc import LIBC, MACHINE
from fdbroker.kernel.process_state import read_process_state
from fdbroker.kernel.syscall_table import SYSCALLS

if TYPE_CHECKING:
    from tests.kernel.conftest import Children

GETPGID = SYSCALLS[MACHINE]["getpgid"]
ALLOW_ALL = struct.pack("=HBBI", 0x06, 0, 0, 0x7FFF0000)
# load the number; if it is getpgid's, fail with ENOTTY; else allow
NO_GETPGID = b"".join(
    struct.pack("=HBBI", *instruction)
    for instruction in [
        (0x20, 0, 0, 0),
        (0x15, 0, 1, GETPGID),
        (0x06, 0, 0, 0x00050000 | errno.ENOTTY),
        (0x06, 0, 0, 0x7FFF0000),
    ]
)


def getpgid_fails_with() -> int:
    ctypes.set_errno(0)
    LIBC.syscall(ctypes.c_long(GETPGID), ctypes.c_long(0))
    return ctypes.get_errno()


def test_a_program_is_in_force_once_installed(in_child: Children) -> None:
    def child() -> list[int]:
        process.set_no_new_privs()
        before = getpgid_fails_with()
        seccomp.install(NO_GETPGID)
        return [before, getpgid_fails_with(), read_process_state().seccomp]

    assert in_child(child) == [0, errno.ENOTTY, 2]


def test_a_program_binds_threads_that_ran_before_it(in_child: Children) -> None:
    def child() -> int:
        installed = threading.Event()
        seen = []

        def other() -> None:
            installed.wait()
            seen.append(getpgid_fails_with())

        thread = threading.Thread(target=other)
        thread.start()
        process.set_no_new_privs()
        seccomp.install(NO_GETPGID)
        installed.set()
        thread.join()
        return seen[0]

    assert in_child(child) == errno.ENOTTY


def test_a_second_program_can_only_take_away(in_child: Children) -> None:
    def child() -> int:
        process.set_no_new_privs()
        seccomp.install(NO_GETPGID)
        seccomp.install(ALLOW_ALL)
        return getpgid_fails_with()

    assert in_child(child) == errno.ENOTTY


@pytest.mark.parametrize(
    "program", [b"", ALLOW_ALL[:-1], ALLOW_ALL + b"\0", ALLOW_ALL * 4097, bytes(8 * 65537)]
)
def test_what_can_be_no_program_by_its_length_is_refused(program: bytes) -> None:
    with pytest.raises(SyscallError, match=r"seccomp.*EINVAL") as caught:
        seccomp.install(program)
    assert caught.value.arguments["bytes"] == len(program)


def test_a_program_that_the_kernel_rejects_is_an_error_and_not_in_force(in_child: Children) -> None:
    def child() -> list[object]:
        process.set_no_new_privs()
        with pytest.raises(SyscallError) as caught:
            seccomp.install(ALLOW_ALL[:-8] + struct.pack("=HBBI", 0x05, 0, 0, 100))  # a jump out of it
        return [caught.value.errno, read_process_state().seccomp]

    assert in_child(child) == [errno.EINVAL, 0]


def test_without_no_new_privs_the_error_says_so(in_child: Children) -> None:
    def child() -> str:
        if os.geteuid() == 0:  # CAP_SYS_ADMIN would do instead
            process.change_ids(65533, 65533)
        with pytest.raises(SyscallError) as caught:
            seccomp.install(ALLOW_ALL)
        return str(caught.value)

    text = in_child(child)
    assert "needs='no_new_privs'" in text
    assert "EACCES" in text


def test_a_thread_that_can_not_be_brought_under_the_filter_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The kernel answers with the thread's id, which is no error number.
    monkeypatch.setattr(seccomp, "syscall", lambda *_arguments, **_described: 4711)
    with pytest.raises(SyscallError, match=r"thread=4711.*EBUSY"):
        seccomp.install(ALLOW_ALL)
