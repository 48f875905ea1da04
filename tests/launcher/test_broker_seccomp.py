from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import select
import signal
import socket
import traceback
from typing import TYPE_CHECKING

import pytest

from fdbroker.kernel import bpf, files, process, seccomp
from fdbroker.kernel.libc import LIBC, MACHINE
from fdbroker.kernel.syscall_table import AUDIT_ARCH, SYSCALLS
from fdbroker.launcher.broker_seccomp import broker_filter
from tests.kernel.bpf_interpreter import Call, decide

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.kernel.conftest import Children

# Each would be a way out, or a way for more.
NEVER = """
open_by_handle_at name_to_handle_at execve execveat clone clone3 unshare setns ptrace process_vm_readv
process_vm_writev pidfd_getfd pidfd_open pidfd_send_signal kill tkill tgkill socket socketpair connect
bind listen linkat symlinkat renameat renameat2 unlinkat mkdirat mknodat fchmod fchmodat fchmodat2 fchown
fchownat truncate ftruncate fallocate utimensat setxattr fsetxattr removexattr setxattrat file_setattr
mount umount2 mount_setattr move_mount open_tree fsopen fsconfig fsmount pivot_root chroot chdir fchdir
prctl capset setuid setgid setresuid setresgid setgroups setfsuid seccomp landlock_restrict_self
io_uring_setup io_uring_enter bpf userfaultfd perf_event_open keyctl add_key request_key memfd_create
memfd_secret init_module finit_module kexec_load reboot pwrite64 pwritev copy_file_range splice tee
vmsplice sendfile pkey_mprotect shmat personality prlimit64 flock fanotify_init fanotify_mark
inotify_init1 inotify_add_watch quotactl acct swapon syslog sethostname settimeofday
""".split()  # noqa: SIM905 - a text of names is easier to read


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_what_would_be_a_way_out_kills_whatever_its_arguments(machine: str) -> None:
    program = broker_filter(machine)
    for name in NEVER:
        for word in (0, 1, 2**64 - 1):
            call = Call(SYSCALLS[machine][name], (word,) * 6, AUDIT_ARCH[machine])
            assert decide(program, call) == bpf.KILL_PROCESS, name


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize(
    ("name", "arguments", "allowed"),
    [
        ("openat", (3, 0, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC), True),
        ("openat", (3, 0, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC), True),
        ("openat", (3, 0, 0xFFFFFFFF00000000), True),  # what the kernel does not look at
        *(
            ("openat", (3, 0, flag), False)
            for flag in (os.O_WRONLY, os.O_RDWR, 3, os.O_CREAT, os.O_TRUNC, os.O_APPEND, os.O_TMPFILE)
        ),
        *(("fcntl", (3, command, 0), True) for command in (1, 2, 3, 1030)),
        # flags of the file (O_APPEND of the audit is one), locks, owner, signal, lease, notify, pipe size,
        # seals, and a plain dup
        *(
            ("fcntl", (3, command, 0), False)
            for command in (0, 4, 5, 6, 7, 8, 10, 37, 1024, 1026, 1031, 1033)
        ),
        ("ioctl", (3, 0xC048FF0B, 0), True),
        ("ioctl", (3, 0xC040FF0B, 0), True),
        ("ioctl", (3, 0xFFFFFFFFC050FF0B, 0), True),
        ("ioctl", (3, 0x5411, 0), True),
        ("ioctl", (3, 0x5421, 0), True),
        ("ioctl", (3, 0xFF0B, 0), False),  # the number, but not of that kind
        ("ioctl", (3, 0xFF01, 0), False),  # PIDFD_GET_CGROUP_NAMESPACE
        ("ioctl", (3, 0x5412, 0), False),  # TIOCSTI
        ("ioctl", (3, 0x5401, 0), True),
        ("ioctl", (3, 0x5402, 0), False),  # TCSETS
        ("getsockopt", (3, socket.SOL_SOCKET, 17), True),
        ("getsockopt", (3, socket.IPPROTO_IP, 17), False),
        ("setsockopt", (3, socket.IPPROTO_TCP, 1), False),
        ("setitimer", (signal.ITIMER_REAL, 0, 0), True),
        ("setitimer", (signal.ITIMER_VIRTUAL, 0, 0), False),
        ("setitimer", (signal.ITIMER_PROF, 0, 0), False),
        ("mmap", (0, 4096, mmap.PROT_READ | mmap.PROT_WRITE), True),
        ("mmap", (0, 4096, mmap.PROT_EXEC), False),
        ("mmap", (0, 4096, mmap.PROT_READ | mmap.PROT_EXEC), False),
        ("mprotect", (0, 4096, mmap.PROT_READ), True),
        ("mprotect", (0, 4096, mmap.PROT_READ | mmap.PROT_EXEC), False),
    ],
)
def test_arguments_decide_where_a_call_has_two_sides(
    machine: str, name: str, arguments: tuple[int, ...], *, allowed: bool
) -> None:
    # os.O_* are those of the machine that runs this; the ones that differ on aarch64 are not refused ones.
    call = Call(SYSCALLS[machine][name], (*arguments, 0, 0, 0), AUDIT_ARCH[machine])
    assert decide(broker_filter(machine), call) == (bpf.ALLOW if allowed else bpf.KILL_PROCESS)


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_program_is_short(machine: str) -> None:
    assert len(broker_filter(machine)) // 8 < 200


def test_the_default_action_can_be_another() -> None:
    program = broker_filter(MACHINE, default_action=bpf.LOG)
    call = Call(SYSCALLS[MACHINE]["execve"], architecture=AUDIT_ARCH[MACHINE])
    assert decide(program, call) == bpf.LOG


def test_a_broker_can_do_its_work_under_the_filter(  # noqa: PLR0915 - all that a broker does
    tmp_path: Path, in_child: Children
) -> None:
    (tmp_path / "directory").mkdir()
    (tmp_path / "directory" / "file").write_bytes(b"contents")

    def serve(listener: socket.socket, proc: int) -> Iterator[object]:
        epoll.register(listener.fileno(), select.EPOLLIN)
        yield [event for _, event in epoll.poll(5)] == [select.EPOLLIN]
        server, _ = listener.accept()
        with server:
            server.setblocking(False)  # noqa: FBT003 - the name says what is false
            server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32768)
            yield len(server.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            yield server.recvmsg(4096, 1024, socket.MSG_CMSG_CLOEXEC)[0].decode()
            found = files.open_path_beneath(root, b"directory/file")
            yield os.fstat(found).st_size
            yield files.has_lost_its_name(proc, found, bytes(tmp_path / "directory" / "file"))
            yield files.filesystem_of(found).type != 0
            opened = files.reopen_for_reading(proc, found)
            yield fcntl.fcntl(opened, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
            yield os.write(audit, b"allowed\n")
            descriptor = opened.to_bytes(4, "little")
            yield server.sendmsg(
                [b"reply"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptor)], socket.MSG_DONTWAIT
            )
            os.close(opened)
            directory = files.reopen_for_reading(proc, files.open_path_beneath(root, b"directory"))
            yield os.listdir(directory)
            yield [entry.name.decode() for entry in files.read_directory(directory)]
            server.shutdown(socket.SHUT_RDWR)

    def receive(client: socket.socket) -> Iterator[object]:
        poll = select.poll()
        poll.register(client, select.POLLIN)
        yield len(poll.poll(0))
        data, ancillary, _, _ = client.recvmsg(100, 100)
        yield data.decode()
        yield os.pread(int.from_bytes(ancillary[0][2][:4], "little"), 100, 0).decode()

    def live() -> Iterator[object]:
        yield len([bytes(1 << 20) for _ in range(32)])  # taken from the kernel and given back
        yield len(os.urandom(8)) + len(os.getrandom(8))
        with pytest.raises(OSError) as caught:
            files.open_path_beneath(root, b"missing")
        # What shows a traceback opens the source, as text.
        yield "open_path_beneath" in "".join(traceback.format_exception(caught.value))

    def child() -> list[object]:
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener,
            socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client,
            epoll,
        ):
            listener.bind(b"\0fdbroker-test-%d" % os.getpid())
            listener.listen()
            client.connect(listener.getsockname())
            client.send(b"open")
            proc = files.open_proc_self_fd()
            process.set_no_new_privs()
            seccomp.install(broker_filter())
            return [*serve(listener, proc), *receive(client), *live()]

    epoll = select.epoll()
    audit = os.open(tmp_path / "audit", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    root = os.open(tmp_path, os.O_PATH | os.O_DIRECTORY)
    served = [True, 12, "open", 8, False, True, True, 8, 5, ["file"], ["file"]]
    assert in_child(child) == [*served, 1, "reply", "contents", 32, 16, True]
    assert (tmp_path / "audit").read_bytes() == b"allowed\n"
    os.close(audit)
    os.close(root)


def test_everything_else_is_refused_by_the_kernel(tmp_path: Path, in_child: Children) -> None:
    (tmp_path / "file").write_bytes(b"x")

    def child() -> dict[str, int]:
        process.set_no_new_privs()
        seccomp.install(broker_filter(default_action=bpf.errno_action(errno.EPERM)))
        attempts: dict[str, Callable[[], object]] = {
            "write": lambda: os.open(tmp_path / "file", os.O_WRONLY),
            "create": lambda: os.open(tmp_path / "new", os.O_RDONLY | os.O_CREAT),
            "link": lambda: os.link(tmp_path / "file", tmp_path / "link"),
            "unlink": lambda: os.unlink(tmp_path / "file"),
            "fork": os.fork,
            "exec": lambda: os.execv("/bin/true", ["true"]),  # noqa: S606 - it must not start
            "socket": lambda: socket.socket(socket.AF_UNIX),
            "socketpair": socket.socketpair,
            "kill": lambda: os.kill(os.getpid(), 0),
            "setuid": lambda: os.setuid(0),
            "executable memory": lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC),
            "lock": lambda: fcntl.flock(0, fcntl.LOCK_SH),
            "memfd": lambda: os.memfd_create("x"),
            "no_new_privs": process.set_no_new_privs,
        }
        answers = {}
        for name, attempt in attempts.items():
            try:
                attempt()
                answers[name] = 0
            except OSError as error:
                answers[name] = error.errno or -1
        return answers

    assert {name for name, number in in_child(child).items() if number != errno.EPERM} == set()
    assert sorted(os.listdir(tmp_path)) == ["file"]


@pytest.mark.parametrize(
    "name", ["open_by_handle_at", "name_to_handle_at", "execve", "socket", "linkat", "ptrace"]
)
def test_the_process_that_tries_is_killed(in_child: Children, name: str) -> None:
    def child() -> None:
        process.set_no_new_privs()
        seccomp.install(broker_filter())
        LIBC.syscall(*(ctypes.c_long(word) for word in (SYSCALLS[MACHINE][name], 0, 0, 0, 0, 0)))

    assert in_child.killed_by(child) == signal.SIGSYS
