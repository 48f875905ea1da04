from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest

from fdbroker.kernel import execution, namespaces
from fdbroker.kernel.errors import SyscallError
from tests.processes import in_child

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.mark.parametrize(
    "call",
    [
        lambda: namespaces.mount_tmpfs(b"/tmp\0/x", b""),
        lambda: namespaces.bind(b"/tmp\0", b"/tmp"),
        lambda: namespaces.bind(b"/tmp", b"/tmp\0"),
        lambda: namespaces.mount_setattr(b"/\0", attributes=0),
        lambda: execution.execute(-1, [b"a\0b"], []),
        lambda: execution.execute(-1, [b"a"], [b"A=\0"]),
    ],
)
def test_nul_is_refused_before_the_kernel_is_asked(call: Callable[[], None]) -> None:
    with pytest.raises(SyscallError) as raised:
        call()
    assert raised.value.errno == errno.EINVAL


@pytest.mark.root
def test_tmpfs_has_its_size_and_neither_programs_nor_devices() -> None:
    def inside() -> list[str]:
        namespaces.unshare(namespaces.CLONE_NEWNS)
        namespaces.mount_setattr(b"/", attributes=0, propagation=namespaces.MS_PRIVATE, recursive=True)
        namespaces.mount_tmpfs(b"/proc/fs", b"size=64k,mode=0700")
        with open("/proc/self/mountinfo") as file:
            [line] = [line for line in file if " /proc/fs " in line]
        return [*sorted(line.split()[5].split(",")), line.split()[-1].split(",")[1]]

    assert in_child(inside) == ["nodev", "noexec", "nosuid", "relatime", "rw", "size=64k"]


@pytest.mark.root
def test_process_comes_back_from_a_namespace() -> None:
    def inside() -> bool:
        home = os.open("/proc/self/ns/uts", os.O_RDONLY | os.O_CLOEXEC)
        before = os.readlink("/proc/self/ns/uts")
        namespaces.unshare(namespaces.CLONE_NEWUTS)
        there = os.readlink("/proc/self/ns/uts")
        namespaces.setns(home, namespaces.CLONE_NEWUTS)
        return before == os.readlink("/proc/self/ns/uts") != there

    assert in_child(inside)


def test_execution_of_what_is_no_program_is_an_error() -> None:
    descriptor = os.open(__file__, os.O_PATH | os.O_CLOEXEC)
    with pytest.raises(SyscallError, match="execveat"):
        execution.execute(descriptor, [b"x"], [])
    os.close(descriptor)
