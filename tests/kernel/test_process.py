from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import signal
from typing import TYPE_CHECKING, Any

import pytest

from fdbroker.kernel import capabilities, children, dumpable, process
from fdbroker.kernel.errors import SyscallError
from fdbroker.kernel.libc import SYS_PRCTL, syscall
from fdbroker.kernel.process_state import CAP_DAC_READ_SEARCH, read_process_state

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.kernel.conftest import Children

PR_GET_PDEATHSIG = 2
PR_GET_DUMPABLE = 3
PR_GET_KEEPCAPS = 7


def test_no_new_privs_is_set_for_good(in_child: Children) -> None:
    def child() -> list[bool]:
        before = read_process_state().no_new_privs
        process.set_no_new_privs()
        process.set_no_new_privs()
        return [before, read_process_state().no_new_privs]

    assert in_child(child) == [False, True]


def test_dumpable_is_as_set(in_child: Children) -> None:
    def child() -> list[int]:
        seen = []
        for wanted in (False, True, False):
            dumpable.set_dumpable(wanted)
            seen.append(syscall("prctl", SYS_PRCTL, PR_GET_DUMPABLE, 0, 0, 0, 0))
        return seen

    assert in_child(child) == [0, 1, 0]


def test_the_end_of_the_parent_ends_the_child() -> None:
    # Everybody holds the writing end; it is closed when the last of them ends.
    alive, held = os.pipe()
    ready, tell = os.pipe()
    middle = os.fork()
    if middle == 0:
        os.close(alive)
        if os.fork() == 0:
            children.set_parent_death_signal(signal.SIGKILL)
            os.write(tell, b"x")
            while True:
                signal.pause()
        os.read(ready, 1)  # the grandchild has asked for the signal
        os._exit(0)
    os.close(held)
    assert os.read(alive, 1) == b""
    os.waitpid(middle, 0)
    for descriptor in (alive, ready, tell):
        os.close(descriptor)


def test_a_change_of_ids_clears_the_parent_death_signal_as_documented(in_child: Children) -> None:
    def child() -> list[int]:
        seen = []
        room = ctypes.c_int()
        children.set_parent_death_signal(signal.SIGTERM)
        for _ in range(2):
            syscall("prctl", SYS_PRCTL, PR_GET_PDEATHSIG, ctypes.byref(room), 0, 0, 0)
            seen.append(room.value)
            if os.geteuid() == 0:
                process.change_ids(65533, 65533)
        return seen

    assert in_child(child) == [signal.SIGTERM, 0 if os.geteuid() == 0 else signal.SIGTERM]


def test_an_unknown_signal_is_an_error_that_names_the_call() -> None:
    with pytest.raises(SyscallError, match=r"prctl\(option='PR_SET_PDEATHSIG', signal=4711\): EINVAL"):
        children.set_parent_death_signal(4711)


def test_keepcaps_is_as_set(in_child: Children) -> None:
    def child() -> list[int]:
        seen = []
        for wanted in (True, False):
            process.set_keepcaps(wanted)
            seen.append(syscall("prctl", SYS_PRCTL, PR_GET_KEEPCAPS, 0, 0, 0, 0))
        return seen

    assert in_child(child) == [1, 0]


@pytest.mark.root
def test_securebits_are_as_set_and_locked_ones_stay(in_child: Children) -> None:
    def child() -> list[object]:
        wanted = process.SECBIT_NOROOT | process.SECBIT_NOROOT_LOCKED | process.SECBIT_KEEP_CAPS_LOCKED
        process.set_securebits(wanted)
        answers: list[object] = [process.get_securebits() == wanted]
        attempts: list[tuple[Callable[[Any], None], object]] = [
            (process.set_securebits, 0),
            (process.set_keepcaps, True),
        ]
        for call, argument in attempts:
            with pytest.raises(SyscallError) as caught:
                call(argument)
            answers.append(caught.value.errno)
        return answers

    assert in_child(child) == [True, errno.EPERM, errno.EPERM]


def test_without_the_capability_the_error_names_it(in_child: Children) -> None:
    def child() -> list[str]:
        capabilities.capset(capabilities.Capabilities(0, 0, 0))
        texts = []
        for call in (process.set_securebits, process.drop_from_bounding_set):
            with pytest.raises(SyscallError) as caught:
                call(1)
            texts.append(str(caught.value))
        return texts

    for text in in_child(child):
        assert "EPERM" in text
        assert "needs='CAP_SETPCAP'" in text


def test_memory_does_not_become_executable_once_denied(in_child: Children) -> None:
    both = mmap.PROT_WRITE | mmap.PROT_EXEC

    def child() -> bool:
        mmap.mmap(-1, 4096, prot=both).close()
        if not process.deny_write_execute():
            return False
        with pytest.raises(OSError) as caught:
            mmap.mmap(-1, 4096, prot=both)
        assert caught.value.errno in {errno.EACCES, errno.EPERM}
        return process.deny_write_execute()

    if not in_child(child):
        pytest.skip("PR_SET_MDWE came with Linux 6.3")


@pytest.mark.parametrize(("number", "supported"), [(errno.EINVAL, False), (errno.EPERM, None)])
def test_only_einval_means_that_mdwe_is_not_there(
    monkeypatch: pytest.MonkeyPatch, *, number: int, supported: bool | None
) -> None:
    def refuse(call: str, *_arguments: object, **_described: object) -> int:
        raise SyscallError(number, call)

    monkeypatch.setattr(process, "syscall", refuse)
    if supported is None:
        with pytest.raises(SyscallError):
            process.deny_write_execute()
    else:
        assert process.deny_write_execute() is supported


@pytest.mark.root
def test_ambient_capabilities_are_raised_and_cleared(in_child: Children) -> None:
    def child() -> list[int]:
        one = 1 << CAP_DAC_READ_SEARCH
        seen = []
        with pytest.raises(SyscallError, match=r"PR_CAP_AMBIENT.*raised=2.*EPERM"):
            process.raise_ambient_capability(CAP_DAC_READ_SEARCH)  # not inheritable yet
        capabilities.capset(capabilities.capget()._replace(inheritable=one))
        process.raise_ambient_capability(CAP_DAC_READ_SEARCH)
        seen.append(read_process_state().ambient)
        process.clear_ambient_capabilities()
        seen.append(read_process_state().ambient)
        return seen

    assert in_child(child) == [1 << CAP_DAC_READ_SEARCH, 0]


@pytest.mark.root
def test_the_bounding_set_shrinks(in_child: Children) -> None:
    def child() -> list[bool]:
        seen = [process.in_bounding_set(capabilities.CAP_SETUID)]
        process.drop_from_bounding_set(capabilities.CAP_SETUID)
        seen.append(process.in_bounding_set(capabilities.CAP_SETUID))
        seen.append(bool(read_process_state().bounding >> capabilities.CAP_SETUID & 1))
        return seen

    assert in_child(child) == [True, False, False]


def test_a_capability_that_the_kernel_does_not_know_is_an_error() -> None:
    with pytest.raises(SyscallError, match=r"capability=4711.*EINVAL"):
        process.in_bounding_set(4711)


def test_a_range_of_descriptors_is_closed_and_no_other(in_child: Children) -> None:
    def child() -> list[bool]:
        opened = [fcntl.fcntl(0, fcntl.F_DUPFD, 100 + index) for index in range(4)]
        assert opened == [100, 101, 102, 103]
        process.close_range(101, 102)
        return [os.path.exists(f"/proc/self/fd/{number}") for number in opened]

    assert in_child(child) == [True, False, False, True]


def test_a_range_of_descriptors_to_the_last_one_is_set_to_close_on_exec(in_child: Children) -> None:
    def child() -> list[int]:
        opened = [fcntl.fcntl(0, fcntl.F_DUPFD, 100 + index) for index in range(3)]
        process.close_range(101, cloexec=True)
        return [fcntl.fcntl(number, fcntl.F_GETFD) for number in opened]

    assert in_child(child) == [0, fcntl.FD_CLOEXEC, fcntl.FD_CLOEXEC]


def test_a_range_that_ends_before_it_starts_is_an_error_with_both() -> None:
    with pytest.raises(SyscallError, match=r"close_range\(first=5, last=4, cloexec=False\): EINVAL"):
        process.close_range(5, 4)


@pytest.mark.root
@pytest.mark.parametrize("groups", [(), (23460,), (23462, 23460, 23461)])
def test_all_ids_change(in_child: Children, groups: tuple[int, ...]) -> None:
    def child() -> list[object]:
        os.setgroups([4711, 4712])
        process.change_ids(23457, 23458, groups)
        state = read_process_state()
        return [state.uids, state.gids, state.groups, state.permitted]

    assert in_child(child) == [[23457] * 4, [23458] * 4, sorted(groups), 0]


@pytest.mark.parametrize(
    ("uid", "gid", "groups"),
    [
        (-1, 1, ()),
        (1, -1, ()),
        (1, 1, (-1,)),
        (0xFFFFFFFF, 1, ()),
        (1, 0xFFFFFFFF, ()),
        (1, 1, (0xFFFFFFFF,)),
    ],
)
def test_an_id_that_means_unchanged_is_refused(
    in_child: Children, uid: int, gid: int, groups: tuple[int, ...]
) -> None:
    def child() -> list[object]:
        with pytest.raises(SyscallError, match=r"change_ids.*EINVAL"):
            process.change_ids(uid, gid, groups)
        return [os.getresuid(), os.getresgid()]

    assert in_child(child) == [list(os.getresuid()), list(os.getresgid())]


def test_without_the_right_the_error_names_the_call(in_child: Children) -> None:
    def child() -> str:
        if os.geteuid() == 0:
            process.change_ids(65533, 65533)
        with pytest.raises(SyscallError) as caught:
            process.change_ids(0, 0)
        return str(caught.value)

    assert in_child(child) == "setgroups(uid=0, gid=0, groups=()): EPERM, Operation not permitted"


@pytest.mark.root
@pytest.mark.parametrize("call", ["setgroups", "setresgid", "setresuid"])
def test_a_change_that_did_not_happen_is_noticed(in_child: Children, call: str) -> None:
    def child() -> str:
        setattr(os, call, lambda *_ids: None)
        with pytest.raises(RuntimeError) as caught:
            process.change_ids(23457, 23458, (23459,))
        return str(caught.value)

    assert in_child(child).startswith("ids are (")
