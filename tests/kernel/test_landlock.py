from __future__ import annotations

import errno
import os
import socket
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from fdbroker.kernel import files, landlock, process
from fdbroker.kernel.errors import SyscallError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.kernel.conftest import Children

ABI = landlock.abi_version()
NAMES = [
    "files",
    "rename and link between directories",
    "truncate",
    "TCP",
    "ioctl on devices",
    "abstract sockets",
    "signals",
]


def needs(abi: int) -> pytest.MarkDecorator:
    return pytest.mark.skipif(abi > ABI, reason=f"this kernel has Landlock ABI {ABI}, not {abi}")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("inside", "listed", "outside"):
        (tmp_path / name / "below").mkdir(parents=True)
        (tmp_path / name / "below" / "file").write_bytes(name.encode())
    return tmp_path


def path_descriptor(path: Path) -> int:
    return os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


def error_of(function: Callable[..., object], *arguments: object) -> int:
    """Return the errno with which a call fails, 0 if it does not; what it opened is closed."""
    try:
        result = function(*arguments)
    except OSError as error:
        return error.errno or -1
    if function is os.open:
        os.close(int(str(result)))
    return 0


def confine(
    *read: Path, list_only: tuple[Path, ...] = (), scratch: tuple[Path, ...] = (), abi: int | None = None
) -> landlock.LandlockReport:
    process.set_no_new_privs()
    return landlock.restrict_to(
        [path_descriptor(path) for path in read],
        [path_descriptor(path) for path in list_only],
        scratch_trees=[path_descriptor(path) for path in scratch],
        abi=abi,
    )


def test_the_report_says_what_each_abi_enforces(in_child: Children) -> None:
    counts = [0, 1, 2, 3, 4, 5, 7, 7]
    for abi in range(min(ABI, 7) + 1):

        def child(abi: int = abi) -> landlock.LandlockReport:
            return confine(abi=abi)

        used, enforced, missing = in_child(child)
        assert (used, enforced, missing) == (abi, NAMES[: counts[abi]], NAMES[counts[abi] :])


def test_without_landlock_the_report_says_that_nothing_is_enforced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for number in (errno.ENOSYS, errno.EOPNOTSUPP):

        def refuse(call: str, *_arguments: object, number: int = number, **_described: object) -> int:
            raise SyscallError(number, call)

        monkeypatch.setattr(landlock, "syscall", refuse)
        assert landlock.abi_version() == 0
        assert landlock.restrict_to([]) == (0, (), tuple(NAMES))


def test_another_error_is_not_taken_for_a_kernel_without_landlock(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(call: str, *_arguments: object, **_described: object) -> int:
        raise SyscallError(errno.EPERM, call)

    monkeypatch.setattr(landlock, "syscall", refuse)
    with pytest.raises(SyscallError):
        landlock.abi_version()


@needs(1)
def test_files_are_read_below_the_trees_and_nowhere_else(tree: Path, in_child: Children) -> None:
    def child() -> dict[str, int]:
        confine(tree / "inside", list_only=(tree / "listed",))
        return {
            "read inside": error_of(os.open, tree / "inside/below/file", os.O_RDONLY),
            "list inside": error_of(os.listdir, tree / "inside/below"),
            "write inside": error_of(os.open, tree / "inside/below/file", os.O_WRONLY),
            "make inside": error_of(os.mkdir, tree / "inside/new"),
            "unlink inside": error_of(os.unlink, tree / "inside/below/file"),
            "list listed": error_of(os.listdir, tree / "listed/below"),
            "read listed": error_of(os.open, tree / "listed/below/file", os.O_RDONLY),
            "read outside": error_of(os.open, tree / "outside/below/file", os.O_RDONLY),
            "list outside": error_of(os.listdir, tree / "outside"),
            "out by dots": error_of(os.open, tree / "inside/../outside/below/file", os.O_RDONLY),
            "exec": error_of(os.execv, "/bin/true", ["true"]),
        }

    allowed = {"read inside", "list inside", "list listed"}
    assert in_child(child) == dict.fromkeys(allowed, 0) | {
        name: errno.EACCES for name in in_child(child) if name not in allowed
    }


@needs(1)
def test_without_any_tree_nothing_can_be_opened(tree: Path, in_child: Children) -> None:
    def child() -> list[int]:
        confine()
        return [
            error_of(os.open, path, os.O_RDONLY)
            for path in (tree / "inside/below/file", tree, "/", "/dev/null")
        ]

    assert in_child(child) == [errno.EACCES] * 4


@needs(1)
def test_what_is_opened_by_path_alone_is_read_only_if_it_lies_below_a_tree(
    tree: Path, in_child: Children
) -> None:
    # The order of the broker: O_PATH, look, open again through a held /proc/self/fd.
    def child() -> list[int]:
        inside, outside = path_descriptor(tree / "inside"), path_descriptor(tree / "outside")
        proc = files.open_proc_self_fd()
        confine(tree / "inside")
        return [
            error_of(files.reopen_for_reading, proc, files.open_path_beneath(root, b"below/file"))
            for root in (inside, outside)
        ]

    assert in_child(child) == [0, errno.EACCES]


@needs(1)
def test_a_descriptor_that_was_open_before_goes_on(tree: Path, in_child: Children) -> None:
    def child() -> int:
        descriptor = os.open(tree / "outside/below/file", os.O_RDWR)
        confine()
        return os.write(descriptor, b"x") + len(os.pread(descriptor, 100, 0))

    assert in_child(child) == 1 + len(b"outside")


@needs(1)
def test_a_second_domain_can_only_take_away(tree: Path, in_child: Children) -> None:
    def child() -> list[int]:
        inside, outside = path_descriptor(tree / "inside"), path_descriptor(tree / "outside")
        process.set_no_new_privs()
        landlock.restrict_to([inside])
        landlock.restrict_to([inside, outside])
        return [error_of(os.open, tree / name / "below/file", os.O_RDONLY) for name in ("inside", "outside")]

    assert in_child(child) == [0, errno.EACCES]


@needs(2)
def test_a_scratch_tree_can_be_worked_in_and_not_left(tree: Path, in_child: Children) -> None:
    def child() -> dict[str, int]:
        confine(tree / "inside", scratch=(tree / "listed",))
        below = tree / "listed/below"
        return {
            "make a directory": error_of(os.mkdir, below / "directory"),
            "make a file": error_of(os.open, below / "new", os.O_RDWR | os.O_CREAT, 0o600),
            "truncate": error_of(os.truncate, below / "new", 0),
            "move": error_of(os.rename, below / "new", below / "directory/new"),
            "symlink": error_of(os.symlink, "new", below / "link"),
            "remove": error_of(os.unlink, below / "directory/new"),
            "remove a directory": error_of(os.rmdir, below / "directory"),
            "make a FIFO": error_of(os.mkfifo, below / "fifo"),
            "read elsewhere": error_of(os.open, tree / "outside/below/file", os.O_RDONLY),
            "move in": error_of(os.rename, tree / "inside/below/file", below / "stolen"),
            "move out": error_of(os.rename, below / "file", tree / "inside/below/planted"),
        }

    refused = {"make a FIFO", "read elsewhere", "move in", "move out"}
    answers = in_child(child)
    assert {name for name, number in answers.items() if number} == refused
    assert {answers[name] for name in refused} <= {errno.EACCES, errno.EXDEV}


@needs(3)
@pytest.mark.parametrize(("abi", "answer"), [(2, 0), (3, errno.EACCES)])
def test_truncate_is_held_from_abi_3(tree: Path, in_child: Children, abi: int, answer: int) -> None:
    def child() -> int:
        confine(tree / "inside", abi=abi)
        return error_of(os.truncate, tree / "inside/below/file", 0)

    assert in_child(child) == answer


@needs(4)
@pytest.mark.parametrize(("abi", "answer"), [(3, errno.ECONNREFUSED), (4, errno.EACCES)])
def test_tcp_is_held_from_abi_4(in_child: Children, abi: int, answer: int) -> None:
    def child() -> list[int]:
        with socket.socket() as bound, socket.socket() as stream, socket.socket() as other:
            bound.bind(("127.0.0.1", 0))  # not listening, so nobody else is there
            confine(abi=abi)
            connecting = error_of(stream.connect, bound.getsockname())
            return [connecting, error_of(other.bind, ("127.0.0.1", 0))]

    assert in_child(child) == [answer, 0 if answer == errno.ECONNREFUSED else errno.EACCES]


@needs(6)
@pytest.mark.parametrize(("abi", "answer"), [(5, 0), (6, errno.EPERM)])
def test_signals_to_others_are_held_from_abi_6(in_child: Children, abi: int, answer: int) -> None:
    parent = os.getpid()

    def child() -> list[int]:
        confine(abi=abi)
        return [error_of(os.kill, parent, 0), error_of(os.kill, os.getpid(), 0)]

    assert in_child(child) == [answer, 0]


@needs(6)
@pytest.mark.parametrize("reach", [False, True])
def test_abstract_sockets_of_others_are_out_of_reach_unless_asked_for(
    in_child: Children, *, reach: bool
) -> None:
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as other:
        other.bind("")  # autobind: an abstract name

        def child() -> tuple[int, int, landlock.LandlockReport]:
            with (
                socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stranger,
                socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as friend,
            ):
                friend.connect(other.getsockname())
                process.set_no_new_privs()
                report = landlock.restrict_to([], reach_abstract_sockets=reach)
                # What was connected before goes on: a notification socket that is opened at start.
                return (
                    error_of(stranger.sendto, b"x", other.getsockname()),
                    error_of(friend.send, b"x"),
                    report,
                )

        by_name, connected, report = in_child(child)
        assert connected == 0
        assert by_name == (0 if reach else errno.EPERM)
        assert ("abstract sockets" in report[1]) is not reach
        assert report[2] == []


@needs(1)
def test_without_no_new_privs_the_error_says_so_and_nothing_is_enforced(
    tree: Path, in_child: Children
) -> None:
    def child() -> tuple[str, int, int]:
        if os.geteuid() == 0:  # CAP_SYS_ADMIN would do instead
            process.change_ids(65533, 65533)
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(SyscallError) as caught:
            landlock.restrict_to([])
        return str(caught.value), len(os.listdir("/proc/self/fd")) - before, error_of(os.listdir, "/")

    text, left_open, listing = in_child(child)
    assert "landlock_restrict_self" in text
    assert "EPERM" in text
    assert "needs='no_new_privs'" in text
    assert (left_open, listing) == (0, 0)


@needs(1)
def test_a_tree_that_is_none_is_an_error_that_leaves_nothing_open_and_nothing_enforced(
    tree: Path, in_child: Children
) -> None:
    def child() -> tuple[list[str], int, int]:
        process.set_no_new_privs()
        reading, writing = os.pipe()
        file = os.open(tree / "inside/below/file", os.O_PATH)
        before = len(os.listdir("/proc/self/fd"))
        texts = []
        for descriptor in (999, reading, writing, file):
            with pytest.raises(SyscallError) as caught:
                landlock.restrict_to([descriptor])
            texts.append(str(caught.value))
        return texts, len(os.listdir("/proc/self/fd")) - before, error_of(os.listdir, "/")

    texts, left_open, listing = in_child(child)
    assert (left_open, listing) == (0, 0)
    assert "landlock_add_rule(tree=999, access='0xc'): EBADF" in texts[0]
    assert [text.rpartition(": ")[2].partition(",")[0] for text in texts] == [
        "EBADF",
        "EBADFD",
        "EBADFD",
        "EINVAL",
    ]


@needs(1)
def test_the_trees_stay_open_and_nothing_else_does(tree: Path, in_child: Children) -> None:
    def child() -> list[int]:
        inside = path_descriptor(tree / "inside")
        process.set_no_new_privs()
        proc = os.open("/proc/self/fd", os.O_RDONLY | os.O_DIRECTORY)
        before = len(os.listdir(proc))
        landlock.restrict_to([inside])
        return [len(os.listdir(proc)) - before, error_of(os.fstat, inside)]

    assert in_child(child) == [0, 0]
