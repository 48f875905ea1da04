"""fdbrokerd as an administrator or a service manager starts it, and what can be seen of it from outside."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdbroker.launcher.launch import launch
from tests.forked import run_forked
from tests.running_broker import BROKER_UID, launcher_environment

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

# As root would have it in /etc/fdbroker/policy.yaml, for one tree and everybody.
POLICY = """\
version: 1
roots: {{tree: {{path: {directory}/tree}}}}
rules:
  - {{name: all, allow: [open, stat], client: any, in: tree, paths: "**"}}
listeners:
  seqpacket: {{path: {directory}/run/requests, mode: "0666"}}
  control: {{path: {directory}/run/control, mode: "0666"}}
"""


def lay_out(directory: Path) -> Path:
    """Make a tree with one file, and a policy for it; return the policy file."""
    (directory / "tree").mkdir()
    (directory / "tree" / "file").write_text("content")
    (directory / "tree" / "file").chmod(0o600)
    policy = directory / "policy.yaml"
    policy.write_text(POLICY.format(directory=directory))
    return policy


def command(
    policy: Path, *options: str, python: str = sys.executable, installation: Path | None = None
) -> list[str]:
    """Return the command line of fdbrokerd, from this checkout or of an installation."""
    user = (
        []
        if any(option.startswith("--user") for option in options)
        else [f"--user={BROKER_UID}:{BROKER_UID}"]
    )
    how = [python, "-P", "-m", "fdbroker.launcher", "--dev"]
    if installation is not None:
        how = [str(installation / "fdbrokerd")]
    return [*how, f"--policy={policy}", *user, *options]


def run(policy: Path, *options: str, **changes: Any) -> subprocess.CompletedProcess[str]:  # noqa: ANN401 - as Popen's
    """Run fdbrokerd to its end, which is near: it does not start, or goes into the background.

    It is forked from here unless it is to be run in another way.
    """
    if not changes:
        return _run_forked(command(policy, *options))
    return subprocess.run(
        [
            *changes.pop("prefix", ()),
            *command(
                policy,
                *options,
                python=changes.pop("python", sys.executable),
                installation=changes.pop("installation", None),
            ),
        ],
        env=launcher_environment() | changes.pop("env", {}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        **changes,
    )


def _run_forked(words: list[str]) -> subprocess.CompletedProcess[str]:
    arguments = words[words.index("--dev") :]
    done = run_forked(lambda: launch(arguments), "fdbrokerd")
    return subprocess.CompletedProcess(words, done.returncode, done.stdout.decode(), done.stderr.decode())


@contextlib.contextmanager
def started(
    policy: Path,
    *options: str,
    prefix: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
    stop: bool = True,
    installation: Path | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """Run fdbrokerd in the foreground until the end of the block, where it must still run.

    With `stop` False the block ends it.
    """
    errors = policy.parent / "errors"
    ready, told = os.pipe()
    with open(errors, "ab") as error_file:
        process = subprocess.Popen(
            [*prefix, *command(policy, *options, installation=installation), f"--ready-fd={told}"],
            env={**launcher_environment(), **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=error_file,
            pass_fds=[told, *pass_fds],
        )
    os.close(told)
    try:
        with open(ready, "rb") as pipe:
            assert pipe.read() == b"ready\n", errors.read_text()
        yield process
        if stop:
            assert process.poll() is None, errors.read_text()
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=20) == 0, errors.read_text()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def state_of(pid: int, directory: Path) -> str:
    """Return what a process is, in lines that are the same wherever and whenever it is started."""
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line
    )
    names = "Uid Gid Groups CapInh CapPrm CapEff CapBnd CapAmb NoNewPrivs Seccomp Threads Umask SigBlk SigIgn"
    # Signals 32 and 33 are glibc's own; who ignores them was told so by whoever started the tests.
    status["SigIgn"] = f"{int(status['SigIgn'], 16) & 0x7FFFFFFF:016x}"
    lines = [f"{name}: {' '.join(status[name].split())}".strip() for name in names.split()]
    mounts = [line.split()[5].split(",") for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines()]
    lines += [
        f"mounts that are not {option}: {sum(option not in mount for mount in mounts)}"
        for option in ("ro", "nosuid", "nodev")
    ]
    same_view = os.readlink(f"/proc/{pid}/ns/mnt") == os.readlink("/proc/self/ns/mnt")
    lines.append(f"mount namespace: {'that of the test' if same_view else 'its own'}")
    core = re.search(
        r"^Max core file size +(\S+) +(\S+)", Path(f"/proc/{pid}/limits").read_text(), re.MULTILINE
    )
    lines.append(f"core file size: {core[1]} {core[2]}" if core else "core file size: ?")
    lines.append(f"cwd: {os.readlink(f'/proc/{pid}/cwd')}")
    environment = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    lines += [f"environment: {variable}" for variable in sorted(environment) if variable]
    arguments = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")[1:-1]
    arguments[3] = "/".join(arguments[3].split("/")[-3:])
    lines.append(f"arguments: {re.sub(r'[0-9]+', 'N', ' '.join(arguments))}")
    lines += sorted(descriptors_of(pid, directory))
    return "\n".join(lines) + "\n"


def descriptors_of(pid: int, directory: Path) -> list[str]:
    """Return what the descriptors are: the standard ones by number, the others by what they are."""
    sockets = _unix_sockets()
    found = []
    for number in sorted(map(int, os.listdir(f"/proc/{pid}/fd"))):
        try:
            what = os.readlink(f"/proc/{pid}/fd/{number}")
            facts = Path(f"/proc/{pid}/fdinfo/{number}").read_text()
        except FileNotFoundError:
            continue  # it was closed meanwhile
        flags = re.search(r"^flags:\s+(\d+)", facts, re.MULTILINE)
        assert flags is not None
        mode = int(flags[1], 8)
        access = "path" if mode & os.O_PATH else ("read", "write", "both")[mode & os.O_ACCMODE]
        if what.startswith("socket:"):
            what = sockets[what]
        what = re.sub(r"\d+", "N", what.replace(str(directory), "{directory}"))
        label = f"descriptor {number}" if number < 3 else "descriptor"
        found.append(f"{label}: {what} ({access})")
    return found


def _unix_sockets() -> dict[str, str]:
    """Return what /proc/net/unix says of each socket, by the text of its link."""
    # Those of others as well, of which one that is being made or closed has no kind.
    kinds = {"0001": "stream", "0002": "dgram", "0005": "seqpacket"}
    found = {}
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        _, _, _, flags, kind, _, inode, *path = line.split()
        listening = "listening " if flags == "00010000" else ""
        found[f"socket:[{inode}]"] = (
            f"{listening}{kinds.get(kind, kind)} {os.path.basename(path[0]) if path else ''}".strip()
        )
    return found
