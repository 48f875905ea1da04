"""The demonstration: what it shows is what happens, and nothing is left however it ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.processes import children_of, has_ended, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

CHECKOUT = Path(__file__).resolve().parent.parent
DEMO = CHECKOUT / "scripts" / "demo.py"
README = CHECKOUT / "README.md"
# What is said last before a signal: nothing, its beginning, the broker starts, it runs, it works, it ends.
AT_ONCE = ""
MOMENTS = [
    AT_ONCE,
    "fdbroker lets a program",
    "root# fdbrokerd --daemon",
    "root# grep -E",
    "scanner$ fdbroker scan",
    "root# kill",
]
BROKER_RUNS = ["root# grep -E", "scanner$ fdbroker scan"]
ENDINGS = [
    *[(moment, signal.SIGTERM) for moment in MOMENTS],
    # The kernel's doing, whatever was under way; and handled as SIGTERM is.
    *[(moment, signal.SIGKILL) for moment in (AT_ONCE, *BROKER_RUNS)],
    *[(BROKER_RUNS[-1], number) for number in (signal.SIGINT, signal.SIGHUP)],
]

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: run `sudo make test`")


def traces() -> dict[str, object]:
    """Return what the demonstration could change of this machine."""
    places = ["/run/.stage", "/run/fdbroker", "/etc/fdbroker", "/opt/fdbroker", "/var/log/fdbroker"]
    return {
        # Others may be mounting meanwhile.
        "mounts": [line for line in Path("/proc/self/mounts").read_text().splitlines() if "demo " in line],
        "passwd": Path("/etc/passwd").read_bytes(),
        "group": Path("/etc/group").read_bytes(),
        "places": [place for place in places if Path(place).exists()],
        "homes": sorted(os.listdir("/home")),
        "checkout": sorted(
            str(path) for path in CHECKOUT.iterdir() if path.name not in {"build", ".git", ".hypothesis"}
        ),
        "scripts": sorted(os.listdir(CHECKOUT / "scripts")),
    }


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = traces()
    yield
    assert traces() == before


def environment(**more: str) -> dict[str, str]:
    """Return an environment in which make knows of no make above it."""
    outside = {name: value for name, value in os.environ.items() if name not in {"MAKEFLAGS", "MAKELEVEL"}}
    return outside | more


def demonstrate(script: Path = DEMO, umask: int = 0o022) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-I", script],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # all that matters is on standard output, in its order
        text=True,
        errors="surrogateescape",
        check=False,
        umask=umask,
    )


class Members:
    """The processes of a demonstration, which `pid` is, or has started."""

    def __init__(self, pid: int) -> None:
        """Wait until it has its pid namespace."""
        self.namespace = ""
        wait_until(lambda: self._find(pid), "the demonstration has a pid namespace of its own")

    def _find(self, parent: int) -> bool:
        with contextlib.suppress(OSError):
            for pid in children_of(parent):
                namespace = os.readlink(f"/proc/{pid}/ns/pid")
                if namespace != os.readlink("/proc/self/ns/pid"):
                    self.namespace = namespace
                    return True
                if self._find(pid):
                    return True
        return False

    def pids(self) -> set[int]:
        """Return the processes that are in its pid namespace now."""
        found = set()
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if os.readlink(process / "ns/pid") == self.namespace:
                    found.add(int(process.name))
        return found

    def have_ended(self) -> bool:
        """Return whether all have, be it that the machine's init has not waited for the first one yet."""
        return all(map(has_ended, self.pids()))


def is_broker(pid: int) -> bool:
    """Return whether a process has the broker's one capability."""
    with contextlib.suppress(OSError):
        return "CapEff:\t0000000000000004\n" in Path(f"/proc/{pid}/status").read_text()
    return False


def read_until(descriptor: int, text: str) -> None:
    """Read what a demonstration says until it has said `text`."""
    said = b""
    while text.encode() not in said:
        chunk = os.read(descriptor, 64)
        assert chunk, f"no {text!r} in:\n{said.decode(errors='replace')}"
        said += chunk


@pytest.fixture(scope="module")
def shown() -> str:
    """Return what one demonstration has said, in the time that it may take."""
    began = time.monotonic()
    done = demonstrate()
    seconds = time.monotonic() - began
    assert done.returncode == 0, done.stdout
    assert seconds < 10
    return done.stdout


def test_demonstration_shows_refusal_scan_explanation_and_audit_in_this_order(shown: str) -> None:
    in_order = [
        r"drwx------ .* /home/alice\n",
        r"drwx------ .* /home/bob\n",
        r"drwx------ .* /home/carol\n",
        r"-rw------- .* alice .* caf\\351\\ \(latin-1\)\.txt\n",
        r"-rw------- .* alice .* contract\.pdf\n",
        r"-rw------- .* alice .* to\\ the\\ bank\.txt\n",
        r"prw------- .* bob .* fifo\n",
        r"-rw------- 2 alice .* harmless\.txt\n",
        r"lrwx.* bob .* passwords -> /etc/shadow\n",
        r"-rw------- .* bob .* two\\nlines\n",
        r"-rw------- .* carol .* notes\.tar\.gz\n",
        r"-rw------- .* carol .* notes\.zip\n",
        r"scanner\$ cat /home/alice/letters/contract\.pdf .*\n",
        r"cat: /home/alice/letters/contract\.pdf: Permission denied\n",
        r"cat: /home/bob/downloads/invoice\.pdf\.exe: Permission denied\n",
        r"cat: /home/carol/notes\.zip: Permission denied\n",
        r"CapEff:\t0000000000000004\n",
        r"NoNewPrivs:\t1\n",
        r"Seccomp:\t2\n",
        r"so it is the engine|so the built-in engine `hashes` scans",
        r"scanner\$ fdbroker scan .*/home\n",
        r"/home/bob/harmless\.txt: error: denied",
        r"/home/bob/downloads/invoice\.pdf\.exe: infected: Eicar-Test-Signature(\.UNOFFICIAL)?\n",
        r"\d+ files, \d+ bytes, 1 infected, 1 error, \d skipped",
        r"Scanned by (libclamav \(ClamAV|hashes \(hashes) 1.*, in workers of this command\.\n",
        r"scanner\$ fdbroker scan --verbose .*/home/alice /home/bob\n",
        r"worker: seccomp in force",
        r"id_ed25519: denied by the broker's policy",
        r"Denied: rule never-keys denies it",
        r"ALLOW  open  user \d+ \(scanner\) .*/home/bob/downloads/invoice\.pdf\.exe  ok",
        r"DENY   open  user \d+ \(scanner\) .*/home/bob/harmless\.txt  where_links",
        r'"path":"/home/bob/downloads/invoice\.pdf\.exe","decision":"allow"',
        r'"path":"/home/alice/\.ssh/id_ed25519","decision":"deny","reason":"deny_rule","rule":"never-keys"',
        r"root# kill",
        r"nothing is left",
    ]
    at = 0
    for pattern in in_order:
        found = re.compile(pattern).search(shown, at)
        assert found is not None, f"no {pattern!r} after this:\n{shown[:at][-400:]}\nbut:\n{shown[at:]}"
        at = found.end()
    assert "\x1b" not in shown


@pytest.mark.parametrize(
    "line",
    [
        "/home/alice/letters/contract.pdf: clean",
        "/home/alice/letters/to the bank.txt: clean",
        "/home/alice/letters/caf\\xe9 (latin-1).txt: clean",
        "/home/bob/downloads/two\\x0alines: clean",
        "/home/bob/fifo: skipped: fifo",
        "/home/bob/passwords: skipped: symbolic link",
    ],
)
def test_demonstration_gives_a_verdict_on_names_and_kinds_that_others_stumble_over(
    shown: str, line: str
) -> None:
    assert line in shown.splitlines()


def test_demonstration_has_a_device_where_one_can_be_made(shown: str, tmp_path: Path) -> None:
    try:
        os.mknod(tmp_path / "disk", 0o060600, os.makedev(8, 0))
    except PermissionError:
        pytest.skip("no device can be made here")
    assert "/home/bob/disk: skipped: block device" in shown.splitlines()


def test_demonstration_runs_on_a_terminal_by_make_from_a_checkout_that_only_root_can_reach() -> None:
    """With a progress bar, and nothing that is left of it."""
    with tempfile.TemporaryDirectory() as directory:  # mode 0700
        copy = Path(directory) / "fdbroker"
        shutil.copytree(CHECKOUT, copy, ignore=shutil.ignore_patterns("build", ".git", "__pycache__"))
        (copy / "build").symlink_to(CHECKOUT / "build")
        subprocess.run(["chmod", "-R", "go=", copy], check=True)  # as a clone under this umask
        began = time.monotonic()
        pid, terminal = pty.fork()
        if pid == 0:
            os.umask(0o077)
            variables = {"PATH": os.defpath, "TERM": "xterm"}
            os.execvpe("make", ["make", "-C", str(copy), "demo"], variables)  # noqa: S606 - no shell
        shown = b""
        while True:
            try:
                chunk = os.read(terminal, 65536)
            except OSError:  # EIO: the other end is closed
                break
            if not chunk:
                break
            shown += chunk
        os.close(terminal)
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0, shown
        assert time.monotonic() - began < 10
        assert b"nothing is left" in shown
        assert b"\x1b[1m" in shown
        assert "━".encode() in shown


@pytest.mark.parametrize(("moment", "number"), ENDINGS)
def test_signal_that_ends_the_demonstration_ends_the_broker_and_all_else(
    moment: str, number: signal.Signals
) -> None:
    with subprocess.Popen(
        [sys.executable, "-I", DEMO],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as demo:
        assert demo.stdout is not None
        # So small that it can't go on, and end by itself, while nobody reads.
        fcntl.fcntl(demo.stdout, fcntl.F_SETPIPE_SZ, 4096)
        members = Members(demo.pid)
        assert members.pids()
        read_until(demo.stdout.fileno(), moment)
        if moment in BROKER_RUNS:
            assert any(map(is_broker, members.pids()))
        demo.send_signal(number)
        assert demo.wait(timeout=20) == -number
        if number != signal.SIGKILL and moment != AT_ONCE:  # it is there to wait for the others
            assert not members.pids()
        wait_until(members.have_ended, "all of the demonstration has ended", seconds=5)
        assert b"nothing is left" not in demo.stdout.read()


def test_closing_the_terminal_ends_the_demonstration_and_its_broker() -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(CHECKOUT)
        os.execvpe("make", ["make", "demo"], environment(TERM="xterm"))  # noqa: S606
    members = Members(pid)
    read_until(terminal, "root# grep -E")
    assert any(map(is_broker, members.pids()))
    os.close(terminal)
    os.waitpid(pid, 0)
    wait_until(members.have_ended, "all of the demonstration has ended", seconds=5)


def test_broker_that_does_not_end_is_told_of_and_is_not_left() -> None:
    with tempfile.TemporaryDirectory() as directory:
        for name in ("src", "build"):
            (Path(directory) / name).symlink_to(CHECKOUT / name)
        script = Path(directory) / "scripts" / "demo.py"
        script.parent.mkdir()
        told = DEMO.read_text()
        deaf = re.sub(
            r"^PATIENCE = .*", "PATIENCE = 0.2", told.replace('"kill $', '"kill -0 $'), flags=re.MULTILINE
        )
        assert deaf.count("kill -0") == told.count('"kill $') == 1
        script.write_text(deaf)
        with subprocess.Popen(
            [sys.executable, "-I", script],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as demo:
            members = Members(demo.pid)
            assert demo.stdout is not None
            said = demo.stdout.read()
            assert demo.wait(timeout=20) == 1
            assert not members.pids()
    assert "the broker still runs" in said
    assert "nothing is left" not in said


def test_demonstration_whose_reader_has_gone_ends_without_a_traceback() -> None:
    with subprocess.Popen(
        [sys.executable, "-I", DEMO],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as demo:
        assert demo.stdout is not None
        assert demo.stderr is not None
        members = Members(demo.pid)
        demo.stdout.close()
        assert "Traceback" not in demo.stderr.read()
        assert demo.wait(timeout=20) != 0
        assert not members.pids()


def test_demonstration_without_root_says_what_to_do() -> None:
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        script = shutil.copyfile(DEMO, Path(directory) / "demo.py")  # with the mode of the umask, 022
        done = subprocess.run(
            ["setpriv", "--reuid=65533", "--clear-groups", "/usr/bin/python3", "-I", script],
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 2
    assert "sudo make demo" in done.stderr


def test_demonstration_in_a_container_that_may_make_no_namespaces_says_what_to_do() -> None:
    done = subprocess.run(
        ["setpriv", "--bounding-set=-sys_admin", sys.executable, "-I", DEMO],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "--privileged" in done.stderr
    assert "Traceback" not in done.stderr


def without_numbers(text: str) -> list[str]:
    """Return the lines with times, numbers of processes, users and bytes made equal."""
    return [re.sub(r"\d+", "0", line).rstrip() for line in text.splitlines()]


def test_readme_shows_what_the_demonstration_says(shown: str) -> None:
    block = README.read_text().partition("Shortened:\n\n```console\n")[2].partition("```")[0]
    wanted = [line for line in without_numbers(block) if line]
    assert len(wanted) > 15
    said = iter(without_numbers(shown))
    for line in wanted:
        assert line in said, f"not what the demonstration says, or not there: {line}"
