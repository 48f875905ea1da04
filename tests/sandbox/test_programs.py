from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from fdbroker import sandbox
from fdbroker.sandbox import Layer, Limits, Programs, ZygoteError
from tests.running_broker import reachable_directory
from tests.sandbox.confined import WORKER_UID, confinement

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from fdbroker.sandbox import Confinement, Ended

PYTHON = os.path.realpath("/usr/bin/python3")
CONTENTS = b"what the file has in it\n" * 1000


@pytest.fixture
def directory() -> Iterator[Path]:
    with reachable_directory() as path:
        yield path


@pytest.fixture
def file(directory: Path) -> Iterator[int]:
    """Return a descriptor for reading of a file that the program's uid owns."""
    path = directory / "file"
    path.write_bytes(CONTENTS)
    if os.geteuid() == 0:
        os.chown(path, WORKER_UID, WORKER_UID)
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    yield descriptor
    os.close(descriptor)


def output_of(
    argv: list[str],
    file: int,
    environment: dict[str, str] | None = None,
    *,
    readable: Sequence[str | bytes] = (),
    wanted: Confinement | None = None,
) -> tuple[bytes, Ended]:
    """Run a program with a file as its standard input; return what it wrote, and how it ended."""
    read_end, write_end = os.pipe()
    with open(read_end, "rb") as pipe:
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, write_end)
            program = sandbox.spawn(
                argv,
                {0: file, 1: write_end, 2: write_end},
                environment,
                readable=readable,
                confinement=wanted or confinement(),
            )
        with program:
            output = pipe.read()
            ended = program.wait(20.0)
            assert ended is not None
            return output, ended


def without_directory(said: bytes) -> bytes:
    """Return what a program of the coreutils said, which name themselves by their path, or without it."""
    return said.replace(b"/usr/bin/", b"", 1)


def test_program_reads_its_standard_input_and_writes_its_output(file: int) -> None:
    digest = hashlib.sha256(CONTENTS).hexdigest()
    output, ended = output_of(["/usr/bin/sha256sum"], file)
    assert output == f"{digest}  -\n".encode()
    assert ended.status == 0


@pytest.mark.root
def test_program_of_an_unprivileged_user_is_confined_as_well(
    file: int, unprivileged: Callable[[Callable[[], Any]], Any]
) -> None:
    def start() -> tuple[bytes, str, set[str]]:
        output, ended = output_of(["/usr/bin/sha256sum", "/etc/passwd"], file)
        with sandbox.spawn(["/bin/true"], {}) as program:
            return output, str(ended), {state.layer.name for state in program.report.missing()}

    output, ended, gaps = unprivileged(start)
    assert without_directory(output) == b"sha256sum: /etc/passwd: No such file or directory\n"
    assert ended == "it ended with status 1"
    assert gaps == {"IDS"}


# Each is a program in Python, for want of another one that would try; it prints what worked.
ATTEMPTS = {
    "open a file": "open('/etc/passwd')",
    "list the root": "os.listdir('/')",
    "open its input again": "open('/proc/self/fd/0')",
    "open its input again by /dev": "open('/dev/stdin')",
    "make a file in the libraries": "open('/usr/lib/made', 'w')",
    "make a file": "open('/made', 'w')",
    "change the mode of its input": "os.fchmod(0, 0o777)",
    "write to its input": "os.write(0, b'x')",
    "truncate its input": "os.ftruncate(0, 0)",
    "change the times of its input": "os.utime(0)",
    "lock its input": "fcntl.flock(0, fcntl.LOCK_EX)",
    "lock a part of its input": "fcntl.lockf(0, fcntl.LOCK_SH)",
    "start a program": "subprocess.run(['/bin/true'])",
    "become another program": "os.execv('/lib64/ld-linux-x86-64.so.2', ['x'])",
    "become itself again": "os.execv('/usr/bin/python3', ['x'])",
    "fork": "os.fork() or os._exit(0)",
    "start a thread": "threading.Thread(target=int).start()",
    "make a socket": "socket.socket()",
    "make a Unix socket": "socket.socketpair()",
    "kill": "os.kill(-1, 0)",
    "be another user": "os.setuid(0)",
    "make a memfd": "os.memfd_create('x')",
    "look into a directory that libraries are beside": "os.listdir('/usr')",
    "enter a namespace": "ctypes.CDLL(None, use_errno=True).unshare(0x10000000) and 1/0",
    "change its root": "os.chroot('/usr')",
    "remove a library": "os.unlink('/usr/lib/os-release')",
    "raise its limits": "resource.setrlimit(resource.RLIMIT_NOFILE, (99, 99))",
}


@pytest.mark.skipif(not PYTHON.startswith("/usr/bin/"), reason="needs the system's Python for attempts")
def test_program_can_do_nothing_but_read_its_input_and_its_libraries(file: int) -> None:
    lines = ["import ctypes, fcntl, os, resource, socket, subprocess, threading"]
    for name, attempt in ATTEMPTS.items():
        lines += ["try:", f"    {attempt}", f"    print({name!r})", "except BaseException: pass"]
    output, ended = output_of(
        [PYTHON, "-I", "-c", "\n".join([*lines, "print('that is all', os.environ)"])], file
    )
    assert output == b"that is all environ({'LC_CTYPE': 'C.UTF-8'})\n"
    assert ended.status == 0
    assert os.pread(file, len(CONTENTS) + 1, 0) == CONTENTS


@pytest.mark.root
@pytest.mark.parametrize("left_out", [Layer.EMPTY_ROOT, Layer.NAMESPACES])
def test_landlock_and_the_filter_hold_a_program_where_there_are_no_namespaces(
    left_out: Layer, file: int
) -> None:
    output, ended = output_of(
        ["/usr/bin/cat", "/etc/passwd"], file, wanted=confinement(unsafe_without=frozenset({left_out}))
    )
    assert without_directory(output) in {
        b"cat: /etc/passwd: Permission denied\n",
        b"cat: /etc/passwd: No such file or directory\n",
    }
    assert ended.status == 1


def test_what_is_named_readable_can_be_read(directory: Path, file: int) -> None:
    (directory / "data").mkdir()
    (directory / "data" / "one").write_text("1")
    (directory / "single").write_text("2")
    (directory / "other").write_text("3")
    paths = [str(directory / name) for name in ("data/one", "single", "other")]
    for path in (directory, directory / "data"):
        path.chmod(0o755)
    paths_of_data = [str(directory / "data"), paths[1]]
    output, _ = output_of(["/usr/bin/cat", *paths], file, readable=paths_of_data)
    assert without_directory(output) == f"12cat: {paths[2]}: No such file or directory\n".encode()


def test_program_gets_the_environment_that_it_is_given_and_no_other(file: int) -> None:
    output, _ = output_of(["/usr/bin/env"], file, environment={"LC_ALL": "C.UTF-8", "A": "=b"})
    assert output == b"LC_ALL=C.UTF-8\nA==b\n"


def test_what_is_not_given_is_dev_null(file: int) -> None:
    with sandbox.spawn(["/usr/bin/cat"], {}, confinement=confinement()) as program:
        assert str(program.wait(20.0)) == "it ended with status 0"


def test_program_is_started_many_times_from_one_zygote(file: int) -> None:
    with Programs("/usr/bin/head", confinement=confinement()) as programs:
        for number in range(5):
            read_end, write_end = os.pipe()
            os.lseek(file, 0, os.SEEK_SET)
            with (
                programs.start(["head", f"-c{number}"], {0: file, 1: write_end}) as worker,
                open(read_end, "rb") as pipe,
            ):
                os.close(write_end)
                assert pipe.read() == CONTENTS[:number]
                assert str(worker.wait(20.0)) == "it ended with status 0"


def test_program_that_can_not_be_executed_ends_with_127(directory: Path, file: int) -> None:
    path = directory / "program"
    shutil.copy("/bin/true", path)
    path.chmod(0o644)
    _, ended = output_of([str(path)], file)
    assert ended.status == 127


def test_script_is_refused_with_what_to_do(directory: Path) -> None:
    path = directory / "script"
    path.write_text("#!/bin/sh\n" + "true\n" * 100)
    path.chmod(0o755)
    with pytest.raises(ZygoteError, match="no 64-bit ELF file; of a script, start the interpreter"):
        sandbox.spawn([str(path)], {}, confinement=confinement())


def test_program_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ZygoteError, match="FileNotFoundError"):
        sandbox.spawn(["/usr/bin/no-such-program"], {}, confinement=confinement())


@pytest.mark.parametrize(
    ("argv", "fds", "text"),
    [
        ([], {}, "the program's path comes first"),
        (["true"], {}, "no absolute path"),
        (["/bin/true"], {3: 0}, "only 0, 1 and 2"),
        (["/bin/true", "a\0b"], {}, "has a NUL"),
        (["/bin/true", "x" * 70_000], {}, "at most 65536 bytes"),
    ],
)
def test_start_that_means_nothing_is_refused(argv: list[str], fds: dict[int, int], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        sandbox.spawn(argv, fds, confinement=confinement())


def test_program_that_goes_on_is_killed_at_the_end() -> None:
    read_end, write_end = os.pipe()
    with sandbox.spawn(["/usr/bin/cat"], {0: read_end}, confinement=confinement()) as program:
        assert program.wait(0.0) is None
        assert str(program.stop()) == "it was killed (SIGKILL)"
    os.close(read_end)
    os.close(write_end)


def test_program_has_its_limits(file: int) -> None:
    wanted = confinement(limits=Limits(extra_memory=32 << 20, cpu_seconds=1))
    output, _ = output_of([PYTHON, "-I", "-S", "-c", "bytearray(64 << 20)"], file, wanted=wanted)
    assert b"MemoryError" in output
    # How a process ends at that one has its test among those of workers.
    asked = "import resource; print(resource.getrlimit(resource.RLIMIT_CPU))"
    output, _ = output_of([PYTHON, "-I", "-S", "-c", asked], file, wanted=wanted)
    assert output == b"(1, 1)\n"
