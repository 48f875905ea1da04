"""What the running process is, what it has loaded, and what it can't do even when it is made to try."""

from __future__ import annotations

import errno
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fdbroker.kernel.libc import MACHINE
from fdbroker.kernel.syscall_table import SYSCALLS
from tests.broker.conftest import fill
from tests.broker.probing import probe, use_everything
from tests.broker.speaking import Speaker
from tests.running_broker import (
    BROKER_UID,
    CLIENT_UID,
    RunningBroker,
    policy,
    reachable_directory,
    running_broker,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.root

HERE = Path(__file__).parent
MODULES = HERE / "expected_modules.txt"
LIBRARIES = HERE / "expected_libraries.txt"


def lines_of(file: Path) -> list[str]:
    return [line for line in file.read_text().splitlines() if line and not line.startswith("#")]


@pytest.fixture(scope="module")
def running(shared_directory: Path) -> Iterator[RunningBroker]:
    with running_broker(shared_directory, policy(shared_directory / "tree")) as broker:
        yield broker


# What it is


def test_process_has_its_user_its_one_capability_and_its_filter(running: RunningBroker) -> None:
    status = running.status()
    assert status["Uid"].split() == [str(BROKER_UID)] * 4
    assert status["Gid"].split() == [str(BROKER_UID)] * 4
    assert status["Groups"].split() in ([], [str(BROKER_UID)])
    one = f"{1 << 2:016x}"  # CAP_DAC_READ_SEARCH
    assert [status[name] for name in ("CapPrm", "CapEff", "CapBnd", "CapAmb", "CapInh")] == [one] * 5
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    assert status["Threads"] == "1"


def test_process_has_nothing_of_the_environment_it_was_started_from(running: RunningBroker) -> None:
    environment = Path(f"/proc/{running.pid}/environ").read_bytes().rstrip(b"\0").split(b"\0")
    assert sorted(environment) == [b"LANG=C.UTF-8", b"PATH=/usr/bin:/bin"]
    assert os.readlink(f"/proc/{running.pid}/cwd") == "/"
    arguments = Path(f"/proc/{running.pid}/cmdline").read_bytes().split(b"\0")
    assert arguments[1:4] == [b"-I", b"-S", b"-B"]


def test_process_can_not_be_traced_or_dumped_by_others_of_its_user(running: RunningBroker) -> None:
    # The files of a process that is not dumpable belong to root.
    assert Path(f"/proc/{running.pid}/mem").stat().st_uid == 0
    limits = Path(f"/proc/{running.pid}/limits").read_text()
    assert re.search(r"^Max core file size +0 +0 ", limits, re.MULTILINE)


def test_every_mount_of_its_view_is_read_only(running: RunningBroker) -> None:
    mounts = [line.split() for line in Path(f"/proc/{running.pid}/mountinfo").read_text().splitlines()]
    assert mounts
    for mount in mounts:
        assert {"ro", "nosuid", "nodev"} <= set(mount[5].split(",")), mount
    assert os.readlink(f"/proc/{running.pid}/ns/mnt") != os.readlink("/proc/self/ns/mnt")


def test_idle_process_holds_what_it_serves_and_no_more(running: RunningBroker) -> None:
    kinds = sorted(re.sub(r"\d+", "N", what) for what in running.descriptors().values())
    directory = re.sub(r"\d+", "N", str(running.socket.parent))
    assert kinds == sorted(
        [
            "/",  # the reserve for connections when descriptors run out
            "/proc/N/fd",
            f"{directory}/tree",
            f"{directory}/audit.jsonl",
            f"{directory}/errors",
            "/dev/null",
            "/dev/null",
            "anon_inode:[eventpoll]",
            "pipe:[N]",
            "pipe:[N]",
            "socket:[N]",
        ]
    )


# What it has loaded


def told(tree: Path) -> dict[str, Any]:
    with reachable_directory() as directory:
        return probe(directory, policy(tree), use=use_everything(tree))["modules"]


def test_modules_are_the_reviewed_ones_from_start_to_end(shared_directory: Path) -> None:
    """The list is of the process after start-up under the true launcher; see probing_entry.py.

    The names of fdbroker must be equal everywhere. Those of the standard library
    depend on the version of Python, so they are compared on the one that the list
    was made with.
    """
    modules = told(shared_directory / "tree")
    assert modules["begin"] == modules["end"], "something was imported while it served"
    expected = lines_of(MODULES)
    assert expected == sorted(expected)

    def ours(names: list[str]) -> list[str]:
        return [name for name in names if name.partition(".")[0] == "fdbroker"]

    assert ours(modules["begin"]) == ours(expected)
    [version] = re.findall(r"^# Python (\d+\.\d+)$", MODULES.read_text(), re.MULTILINE)
    if f"{sys.version_info[0]}.{sys.version_info[1]}" == version:
        assert modules["begin"] == expected
    else:
        foreign = {name.partition(".")[0] for name in modules["begin"]} - sys.stdlib_module_names
        assert foreign == {"fdbroker", "__main__"}


def library_names(pid: int) -> set[str]:
    """Return what is mapped with the right to execute, without directories, versions and ABI tags."""
    names = set()
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        rights, path = line.split()[1], line.partition("/")[2]
        if "x" in rights and path:
            name = path.rpartition("/")[2]
            name = re.sub(r"\.cpython-[\w-]+\.so$|\.abi3\.so$|\.so[\d.]*$|-[\d.]+\.so$", "", name)
            names.add(re.sub(r"^(ld-linux).*", r"\1", re.sub(r"(?<=python)[\d.]+$", "", name)))
    return names


def test_mapped_libraries_are_the_reviewed_ones(running: RunningBroker) -> None:
    """A `?` behind a name: only where Python was built so, as a library or a module of its own."""
    expected = lines_of(LIBRARIES)
    needed = {line for line in expected if not line.endswith("?")}
    possible = {line.rstrip(" ?") for line in expected}
    mapped = library_names(running.pid)
    assert needed <= mapped <= possible
    for unwanted in (
        "yaml",
        "systemd",
        "crypto",
        "ssl",
        "hash",
        "pickle",
        "expat_",
        "sqlite",
        "lzma",
        "libcap",
    ):
        assert not [name for name in mapped if unwanted in name]


# What it can't do

OUTSIDE = {
    "os.open('/etc/passwd', os.O_RDONLY)": errno.EACCES,
    "os.open('/etc/shadow', os.O_RDONLY)": errno.EACCES,
    "os.open('/etc', os.O_RDONLY | os.O_DIRECTORY)": errno.EACCES,
    "os.open('/', os.O_RDONLY | os.O_DIRECTORY)": errno.EACCES,
    "os.listdir('/')": errno.EACCES,
    "os.open('/dev/null', os.O_RDONLY)": errno.EACCES,
    "os.open('/proc/self/status', os.O_RDONLY)": errno.EACCES,
    "os.open('/proc/self/mem', os.O_RDONLY)": errno.EACCES,
    "os.open('/proc/1/environ', os.O_RDONLY)": errno.EACCES,
    "os.open('../environ', os.O_RDONLY, dir_fd=proc)": errno.EACCES,
    "os.open('../mem', os.O_RDONLY, dir_fd=proc)": errno.EACCES,
    "os.open('../../1/environ', os.O_RDONLY, dir_fd=proc)": errno.EACCES,
    "os.open('../root/etc/passwd', os.O_RDONLY, dir_fd=proc)": errno.EACCES,
    "os.open('.', os.O_RDONLY, dir_fd=proc)": errno.EACCES,
    # A name is not access: what is held by O_PATH can't be opened again.
    "os.open(str(os.open('/etc/passwd', os.O_PATH)), os.O_RDONLY, dir_fd=proc)": errno.EACCES,
    "os.open('..', os.O_RDONLY, dir_fd=roots[0])": errno.EACCES,
    # Nor what others have open, and what it writes to itself: not to be written over.
    "os.listdir('/proc/1/fd')": errno.EACCES,
    "os.readlink('/proc/1/exe', dir_fd=proc)": errno.EACCES,
    "os.readlink('/proc/1/fd/0', dir_fd=proc)": errno.EACCES,
    "os.open('1', os.O_RDONLY, dir_fd=proc)": errno.EACCES,
    "libc.syscall('openat2', 437, proc, b'1', (1).to_bytes(24, 'little'), 24)": errno.EACCES,
    "libc.syscall('openat2', 437, proc, b'1', (0o1002).to_bytes(24, 'little'), 24)": errno.EACCES,
    "os.open('../../../../../etc/passwd', os.O_RDONLY, dir_fd=roots[0])": errno.EACCES,
    "os.open('out', os.O_RDONLY, dir_fd=roots[0])": errno.EACCES,
    "main.open_path_beneath(roots[0], b'../x')": errno.EXDEV,
    "main.open_path_beneath(roots[0], b'out')": None,  # the link itself
    "main.open_path_beneath(roots[0], b'/etc/passwd')": errno.EXDEV,
    # Its descriptors for reading can't become ones for writing: a filter does not see flags of openat2.
    "libc.syscall('openat2', 437, roots[0], b'file', (2).to_bytes(24, 'little'), 24)": errno.EACCES,
    "libc.syscall('openat2', 437, roots[0], b'new', (0o101).to_bytes(8, 'little')"
    " + (0o600).to_bytes(8, 'little') + bytes(8), 24)": errno.EROFS,
    "libc.syscall('openat2', 437, -100, b'/etc/passwd', bytes(24), 24)": errno.EACCES,
}
INSIDE = {
    "os.read(os.open('file', os.O_RDONLY, dir_fd=roots[0]), 100).decode()": "content",
    "os.read(os.open('directory/inner', os.O_RDONLY, dir_fd=roots[0]), 100).decode()": "inner",
    "sorted(os.listdir(os.open(str(roots[0]), os.O_RDONLY, dir_fd=proc)))": [
        "directory",
        "empty",
        "fifo",
        "file",
        "link",
        "out",
        "private",
    ],
    # The one capability: it belongs to root, and nobody else may read it.
    "os.read(os.open('private', os.O_RDONLY, dir_fd=roots[0]), 100).decode()": "private",
}


def call(name: str, *arguments: str) -> str:
    return f"libc.syscall({name!r}, {SYSCALLS[MACHINE][name]}, {', '.join(arguments or ('0',) * 6)})"


DEADLY = [
    # Any file by its number: what CAP_DAC_READ_SEARCH would allow.
    call("open_by_handle_at", "0", "bytes(64)", "0"),
    call("name_to_handle_at"),
    # Programs and processes.
    "os.execv('/bin/true', ['true'])",
    call("execveat"),
    "os.fork()",
    call("clone"),
    call("clone3"),
    call("kill", "1", "0"),
    call("tgkill"),
    call("pidfd_send_signal"),
    call("pidfd_open", "1", "0"),
    call("pidfd_getfd"),
    call("ptrace"),
    call("process_vm_readv"),
    call("process_vm_writev"),
    call("process_madvise"),
    call("kcmp"),
    # Other connections than those it was given.
    "socket.socket(socket.AF_INET)",
    "socket.socket(socket.AF_UNIX)",
    "socket.socketpair()",
    call("connect"),
    call("bind"),
    call("listen"),
    # Files: writing, making, removing, changing.
    "os.open('/tmp/x', os.O_WRONLY)",
    "os.open('/tmp/x', os.O_RDWR)",
    "os.open('/tmp/x', os.O_RDONLY | os.O_CREAT)",
    "os.open('/tmp/x', os.O_RDONLY | os.O_TRUNC)",
    "os.open('/tmp', os.O_TMPFILE | os.O_RDWR)",
    "os.unlink('/tmp/x')",
    "os.rename('/tmp/x', '/tmp/y')",
    "os.link('/tmp/x', '/tmp/y')",
    "os.symlink('/tmp/x', '/tmp/y')",
    "os.mkdir('/tmp/x')",
    "os.rmdir('/tmp/x')",
    "os.mkfifo('/tmp/x')",
    "os.chmod('/tmp/x', 0)",
    "os.chown('/tmp/x', 0, 0)",
    "os.truncate('/tmp/x', 0)",
    "os.utime('/tmp/x')",
    "os.setxattr('/tmp/x', 'user.x', b'')",
    "os.chdir('/')",
    "os.chroot('/')",
    call("mount"),
    call("umount2"),
    call("open_tree"),
    call("move_mount"),
    call("fsopen"),
    call("mount_setattr"),
    call("pivot_root"),
    call("fanotify_init"),
    call("inotify_init1"),
    call("flock"),
    # What it is, it stays.
    "os.setuid(0)",
    "os.setgid(0)",
    "os.setgroups([])",
    call("capset"),
    call("prctl"),
    call("unshare"),
    call("setns"),
    call("seccomp"),
    call("landlock_restrict_self"),
    call("prlimit64"),
    "os.umask(0)",
    "os.setsid()",
    # Much kernel, no use.
    call("io_uring_setup"),
    call("bpf"),
    call("userfaultfd"),
    call("perf_event_open"),
    call("keyctl"),
    call("add_key"),
    call("memfd_create"),
    call("process_mrelease"),
    call("personality"),
    call("init_module"),
    call("kexec_load"),
    call("reboot"),
    # Allowed calls with arguments that are not.
    call("fcntl", "0", "1024", "0"),  # F_SETLEASE
    call("fcntl", "0", "8", "1"),  # F_SETOWN
    call("fcntl", "0", "0", "9"),  # F_DUPFD, without close-on-exec
    call("fcntl", "0", "4", "0"),  # F_SETFL, without O_APPEND: the audit could be written over
    call("pwrite64", "1", "b'x'", "1", "0"),
    call("ioctl", "0", "0x5412", "0"),  # TIOCSTI
    call("mmap", "0", "4096", "5", "0x22", "-1", "0"),  # PROT_READ | PROT_EXEC
    call("mprotect", "0", "4096", "4"),  # PROT_EXEC
    call("setsockopt", "0", "0", "1", "0", "0"),  # IPPROTO_IP
    call("setitimer", "1", "0", "0"),  # ITIMER_VIRTUAL
    call("personality", "0xffffffff"),
]


def test_code_inside_it_opens_nothing_outside_the_roots_and_does_nothing_else(
    shared_directory: Path,
) -> None:
    with reachable_directory() as directory:
        tree = directory / "tree"
        tree.mkdir()
        fill(tree)
        (tree / "out").symlink_to("/etc/passwd")
        (tree / "private").write_text("private")
        (tree / "private").chmod(0o600)
        answers = probe(directory, policy(tree), tries=[*OUTSIDE, *INSIDE], deadly=DEADLY)
    expected = {text: {"errno": number} for text, number in OUTSIDE.items() if number is not None}
    assert {text: answers["tries"][text] for text in expected} == expected
    assert {text: answers["tries"][text] for text in INSIDE} == INSIDE
    survived = {text: end for text, end in answers["deadly"].items() if end != "signal 31"}
    assert not survived
    assert len(answers["deadly"]) == len(set(DEADLY))


def test_answers_do_not_depend_on_what_the_files_allow_the_broker(running: RunningBroker) -> None:
    """The one capability reads what no permission bit gives."""
    tree = running.socket.parent / "tree"
    private = tree / "private"
    private.write_bytes(b"private")
    private.chmod(0)
    os.chown(private, CLIENT_UID, CLIENT_UID)
    try:
        with Speaker.connect(running.socket) as speaker:
            assert speaker.open_one(bytes(private)).content == b"private"
    finally:
        private.unlink()
