"""What the processes may do that open what may hang. That they can do their work: see tests/hanging."""

from __future__ import annotations

import os
import signal

import pytest

from fdbroker.kernel import bpf
from fdbroker.kernel.syscall_table import AUDIT_ARCH, SYSCALLS
from fdbroker.launcher.broker_seccomp import broker_filter
from fdbroker.launcher.helper_seccomp import helper_filter, starter_filter
from tests.kernel.bpf_interpreter import Call, decide

MACHINES = ["x86_64", "aarch64"]
FORK = 0x01200000 | signal.SIGCHLD
# Each would be a way out, or a way for more.
NEVER = """
open_by_handle_at name_to_handle_at execve execveat clone3 unshare setns ptrace process_vm_readv
process_vm_writev pidfd_getfd kill tkill tgkill socket socketpair connect bind listen accept accept4
linkat symlinkat renameat2 unlinkat mkdirat mknodat fchmod fchmodat fchown fchownat truncate ftruncate
utimensat setxattr fsetxattr mount umount2 mount_setattr move_mount open_tree fsopen pivot_root chroot
chdir fchdir capset setuid setgid setresuid setresgid setgroups landlock_restrict_self io_uring_setup bpf
userfaultfd perf_event_open keyctl memfd_create init_module reboot pwrite64 sendfile splice flock
fanotify_init inotify_init1 epoll_create1 epoll_ctl setitimer setsockopt
""".split()  # noqa: SIM905 - a text of names is easier to read
STARTING = ["clone", "prctl", "seccomp", "pidfd_open", "pidfd_send_signal", "wait4", "getppid"]


def verdict(program: bytes, machine: str, name: str, *arguments: int) -> int:
    words = (*arguments, *[0] * (6 - len(arguments)))
    return decide(program, Call(SYSCALLS[machine][name], words, AUDIT_ARCH[machine]))


@pytest.mark.parametrize("machine", MACHINES)
def test_what_would_be_a_way_out_kills_whatever_its_arguments(machine: str) -> None:
    for program in (starter_filter(machine), helper_filter(machine)):
        for name in NEVER:
            for word in (0, 1, 2**64 - 1):
                assert verdict(program, machine, name, *[word] * 6) == bpf.KILL_PROCESS, name


@pytest.mark.parametrize("machine", MACHINES)
def test_a_helper_starts_ends_and_confines_nobody(machine: str) -> None:
    for name in STARTING:
        for word in (0, 1, signal.SIGKILL, FORK):
            assert verdict(helper_filter(machine), machine, name, *[word] * 6) == bpf.KILL_PROCESS, name


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(
    ("name", "arguments", "allowed"),
    [
        ("clone", (FORK,), True),
        ("clone", (signal.SIGCHLD,), False),
        *(
            ("clone", (FORK | flag,), False)
            for flag in (0x100, 0x200, 0x400, 0x10000, 0x20000, 0x10000000, 0x20000000, 0x40000000, 1 << 33)
        ),
        ("pidfd_send_signal", (3, signal.SIGKILL), True),
        ("pidfd_send_signal", (3, signal.SIGSTOP), False),
        ("prctl", (1, signal.SIGKILL), True),  # PR_SET_PDEATHSIG
        *(("prctl", (option, 1), False) for option in (4, 8, 15, 22, 23, 24, 28, 38, 47)),
        ("seccomp", (1, 1), True),
        ("seccomp", (0, 0), False),
        ("seccomp", (3, 0), False),
        ("openat", (3, 0, os.O_PATH), True),
        ("openat", (3, 0, os.O_RDWR), False),
        ("openat", (3, 0, os.O_CREAT), False),
    ],
)
def test_arguments_decide_what_the_starter_may(
    machine: str, name: str, arguments: tuple[int, ...], *, allowed: bool
) -> None:
    wanted = bpf.ALLOW if allowed else bpf.KILL_PROCESS
    assert verdict(starter_filter(machine), machine, name, *arguments) == wanted


@pytest.mark.parametrize("machine", MACHINES)
def test_a_helper_may_do_nothing_that_the_broker_may_not_but_wait(machine: str) -> None:
    helper, broker = helper_filter(machine), broker_filter(machine)
    for name in SYSCALLS[machine].keys() - {"clock_nanosleep"}:
        for words in ((0,) * 6, (1,) * 6, (3, 0, os.O_RDWR, 0, 0, 0), (2**64 - 1,) * 6):
            if verdict(helper, machine, name, *words) == bpf.ALLOW:
                assert verdict(broker, machine, name, *words) == bpf.ALLOW, name


@pytest.mark.parametrize("machine", MACHINES)
def test_the_starter_may_do_all_that_its_helpers_may(machine: str) -> None:
    """Its filter stays on them: of two, the stricter one holds."""
    helper, starter = helper_filter(machine), starter_filter(machine)
    for name in SYSCALLS[machine]:
        for words in ((0,) * 6, (1,) * 6, (3, 0, os.O_RDWR, 0, 0, 0)):
            if verdict(helper, machine, name, *words) == bpf.ALLOW:
                assert verdict(starter, machine, name, *words) == bpf.ALLOW, name
