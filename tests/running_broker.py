"""A real broker: started as root by the launcher, with its capability, mount view, Landlock and seccomp."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fdbroker.config.compile
import fdbroker.launcher.start
import fdbroker.launcher.unit_options  # noqa: F401
from fdbroker.broker.helper_pool import HELPERS
from fdbroker.launcher.launch import launch
from tests.audit_records import check_lines
from tests.forked import ForkedProcess, fork_program
from tests.processes import children_of, wait_until
from tests.uids import FIRST_UID

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

CLIENT_UID = FIRST_UID + 56
BROKER_UID = FIRST_UID + 57
OTHER_UID = FIRST_UID + 58
OWNER_UID = FIRST_UID + 64
_SOURCES = Path(__file__).resolve().parent.parent / "src"

ALL_ACTIONS = ["open", "stat", "list", "walk"]


def rule(name: str, **changes: object) -> dict[str, Any]:
    """Return a compiled rule that allows everybody everything in the root `tree`, with changes."""
    return {
        "name": name,
        "effect": "allow",
        "actions": ALL_ACTIONS,
        "root": "tree",
        "clients": [{"any": True}],
        "on_behalf_of": [],
        "paths": ["**"],
        "except": [],
        "where": {},
        "deliver": ["descriptor"],
        "symlinks": "refuse",
    } | changes


def policy(
    tree: Path | str, *rules: dict[str, Any], limits: dict[str, Any] | None = None, **changes: object
) -> dict[str, Any]:
    """Return a compiled policy with the one root `tree`; by default everybody may do everything there.

    `limits` may have some of them.
    """
    return {
        "version": 1,
        "roots": [{"name": "tree", "path": str(tree), "cross_mounts": False, "opens": "loop"}],
        "rules": list(rules) or [rule("all")],
        "limits": {"connections_per_uid": 64, "in_flight_per_connection": 512, "message_within": 10.0}
        | (limits or {}),
        "audit": {"on_failure": "deny"},
        "read_only_view": "required",
        "identity": "available",
        "admins": {"uids": [], "gids": []},
        "services": [],
    } | changes


@contextlib.contextmanager
def reachable_directory() -> Iterator[Path]:
    """Give a new directory that every uid can reach, unlike pytest's own; removed afterwards."""
    path = Path(tempfile.mkdtemp(prefix="fdbroker-test-"))
    path.chmod(0o755)
    try:
        yield path
    finally:
        shutil.rmtree(path)


class RunningBroker:
    """A broker process. `socket` is its SEQPACKET socket, `audit` the file it appends to."""

    def __init__(
        self, process: subprocess.Popen[bytes] | ForkedProcess, socket: Path, audit: Path, errors: Path
    ) -> None:
        self.process = process
        self.pid = process.pid
        self.socket = socket
        self.audit = audit
        self.control = socket.with_name("control")  # where it is started with `with_control`
        self._errors = errors

    def errors(self) -> str:
        """Return what it wrote to standard error."""
        return self._errors.read_text()

    def recorded(self) -> int:
        """Return how long the audit is."""
        return self.audit.stat().st_size

    def records(self, since: int = 0) -> list[dict[str, Any]]:
        """Return the audit so far, behind the first `since` bytes."""
        with open(self.audit, "rb") as file:
            file.seek(since)
            return [json.loads(line) for line in file]

    def decisions(self) -> list[dict[str, Any]]:
        """Return the records of decisions on paths."""
        return [record for record in self.records() if "decision" in record]

    def starter_and_helpers(self) -> tuple[int, list[int]]:
        """Return who starts the open helpers, and them: not all may be forked when the broker is ready."""
        [starter] = children_of(self.pid)
        wait_until(lambda: len(children_of(starter)) == HELPERS, "all helpers are there")
        return starter, children_of(starter)

    def descriptors(self) -> dict[int, str]:
        """Return its open descriptors and what they are."""
        directory = f"/proc/{self.pid}/fd"
        found = {}
        for name in os.listdir(directory):
            with contextlib.suppress(FileNotFoundError):
                found[int(name)] = os.readlink(f"{directory}/{name}")
        return found

    def status(self) -> dict[str, str]:
        """Return /proc/PID/status."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}

    def is_alive(self) -> bool:
        """Return whether it still runs."""
        return self.process.poll() is None

    def stop(self) -> int:
        """Stop it as an administrator would, and return its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=20)


def with_control(directory: Path) -> str:
    """Return the option by which a broker in `directory` has a control socket."""
    return f"--control={directory / 'control'}"


def launcher_command(policy_file: Path, *options: str) -> list[str]:
    """Return the command that starts a broker from this checkout."""
    return [
        sys.executable,
        "-m",
        "fdbroker.launcher",
        "--policy",
        str(policy_file),
        "--user",
        f"{BROKER_UID}:{BROKER_UID}",
        "--dev",
        *options,
    ]


def launcher_environment() -> dict[str, str]:
    """Return the environment in which that command finds the sources."""
    return {**os.environ, "PYTHONPATH": str(_SOURCES)}


def start_launcher(
    policy_file: Path,
    *options: str,
    prefix: Sequence[str] = (),
    stdout: int,
    stderr: int,
    pass_fds: Sequence[int] = (),
    most_descriptors: int | None = None,
) -> subprocess.Popen[bytes] | ForkedProcess:
    """Start a broker by the launcher: forked from here, or as a command behind `prefix`."""
    command = launcher_command(policy_file, *options)
    if prefix:
        return subprocess.Popen(
            [*prefix, *command],
            env=launcher_environment(),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            pass_fds=pass_fds,
        )

    def start() -> int:
        if most_descriptors is not None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most_descriptors, most_descriptors))
        return launch(command[command.index("--policy") :])

    return fork_program(start, "fdbrokerd", stdout=stdout, stderr=stderr, pass_fds=pass_fds)


def write_policy(directory: Path, compiled: dict[str, Any] | str | bytes) -> Path:
    """Write a compiled policy, what stands in its place (bytes), or the text of a policy.yaml."""
    file = directory / ("policy.yaml" if isinstance(compiled, str) else "policy.json")
    if isinstance(compiled, dict):
        compiled = json.dumps(compiled)
    file.write_bytes(compiled if isinstance(compiled, bytes) else compiled.encode())
    return file


def start_that_fails(
    directory: Path,
    compiled: dict[str, Any] | str | bytes,
    *options: str,
    prefix: Sequence[str] = (),
    stdout: int | None = None,
    pass_fds: Sequence[int] = (),
) -> str:
    """Start a broker as an administrator would; return what it says, once it did not start.

    `compiled` as for `write_policy`; `prefix` and `pass_fds` as for `start_launcher`.
    """
    policy_file = write_policy(directory, compiled)
    socket = directory / "broker.seqpacket"
    with open(directory / "said", "w+b") as said, open(directory / "shown", "w+b") as shown:
        process = start_launcher(
            policy_file,
            f"--socket={socket}",
            "--audit=none",
            *options,
            prefix=prefix,
            stdout=shown.fileno() if stdout is None else stdout,
            stderr=said.fileno(),
            pass_fds=pass_fds,
        )
        status = process.wait(timeout=60)
        text = (directory / "said").read_text()
        assert status == 2, text
        assert (directory / "shown").read_bytes() == b""
    assert "Traceback" not in text
    wait_until(lambda: not socket.exists(), "what was made is removed")
    return text


@contextlib.contextmanager
def running_broker(
    directory: Path,
    compiled: dict[str, Any] | str,
    *options: str,
    audit: str | None = None,
    prefix: Sequence[str] = (),
    pass_fds: Sequence[int] = (),
    stdout: int = subprocess.DEVNULL,
    stop: bool = True,
    own_socket: bool = True,
    most_descriptors: int | None = None,
) -> Iterator[RunningBroker]:
    """Run a broker with its socket and audit in `directory`; stop it at the end and check how it ended.

    `compiled` is a compiled policy, or the text of a policy.yaml. `audit` is
    another file than the usual one, `-` for the descriptor `stdout`, or `none`.
    `prefix` goes before the command (`taskset`, `strace`); without one the
    launcher is forked from here. With `stop` False it is killed, and may have
    died. `own_socket` False: the policy's listeners are made, and it names the same.
    `most_descriptors`: RLIMIT_NOFILE of who starts it, without a prefix.
    """
    socket, errors = directory / "broker.seqpacket", directory / "errors"
    records = directory / "audit.jsonl" if audit is None else Path(audit)
    policy_file = write_policy(directory, compiled)
    read_end, write_end = os.pipe()
    with open(errors, "wb") as error_file:
        process = start_launcher(
            policy_file,
            *options,
            *([f"--socket={socket}"] if own_socket else []),
            "--socket-mode=666",
            f"--audit={records}",
            f"--ready-fd={write_end}",
            prefix=prefix,
            stdout=stdout,
            stderr=error_file.fileno(),
            pass_fds=[write_end, *pass_fds],
            most_descriptors=most_descriptors,
        )
    os.close(write_end)
    with open(read_end, "rb") as ready:
        started = ready.read() == b"ready\n"
    broker = RunningBroker(process, socket, records, errors)
    try:
        if not started:
            process.wait(timeout=20)
            raise AssertionError(f"the broker did not start ({process.returncode}): {broker.errors()}")
        yield broker
        if stop:
            assert broker.is_alive(), f"the broker died: {broker.errors()}"
            assert broker.stop() == 0, broker.errors()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        socket.unlink(missing_ok=True)
    if records.is_file():
        check_lines(records.read_bytes().splitlines())
