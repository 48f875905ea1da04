"""A real scan service: another uid's process, confined workers, clients that come by a real broker."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdbroker.scan.client import ScanService, connect
from fdbroker.scan.service import main as service
from tests.for_other_users import import_from_copy
from tests.forked import fork_program
from tests.processes import become_started
from tests.running_broker import running_broker
from tests.uids import FIRST_UID

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.for_other_users import ForOtherUsers
    from tests.forked import ForkedProcess
    from tests.running_broker import RunningBroker

SCAND_UID = FIRST_UID + 80
ANN, BOB = FIRST_UID + 81, FIRST_UID + 82

_POLICY = """
version: 1
roots:
  tree: {path: DIRECTORY/tree}
rules:
  - name: own-files
    allow: [open, walk]
    client: {user: SCAND}
    on_behalf_of: {user: [ANN, BOB]}
    in: tree
    paths: ["**"]
    where: {owner: on_behalf_of}
limits: {connections_per_uid: 256}
listeners:
  seqpacket: {path: DIRECTORY/broker.seqpacket, group: SCAND}
  control: {path: DIRECTORY/control}
  scan: {path: DIRECTORY/scan, service: {user: SCAND}, type: seqpacket}
  clamd: {path: DIRECTORY/clamd, service: {user: SCAND}}
"""

_CONFIGURATION = """
version: 1
broker: DIRECTORY/broker.seqpacket
"""


def copy_treacherous_engine(directory: Path) -> Path:
    """Return a copy of an engine that lies, which others may import whatever modes the checkout has."""
    to = shutil.copytree(Path(__file__).parent / "treacherous", directory / "engines")
    for path in (to, *to.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return to


def policy_text(directory: Path) -> str:
    """Return the policy: each of the two users may have what is theirs scanned."""
    text = _POLICY
    for name, value in {"DIRECTORY": directory, "SCAND": SCAND_UID, "ANN": ANN, "BOB": BOB}.items():
        text = text.replace(name, str(value))
    return text


# Descriptors of one more worker, which is started where there is more to do. They stay; those of clients go.
OF_A_WORKER = 3


class RunningScand:
    """The process of a service. `socket` is that of its clients, `said` what its manager was told."""

    def __init__(
        self, process: subprocess.Popen[bytes] | ForkedProcess, manager: socket.socket, directory: Path
    ) -> None:
        self.process = process
        self.pid = process.pid
        self.socket = str(directory / "scan")
        self.clamd = directory / "clamd"  # the socket of clamd's clients
        self.said: list[str] = []
        self.stopped = False  # by a test
        self._manager = manager
        self._errors = directory / "scand.errors"

    def errors(self) -> str:
        """Return what it wrote to standard error."""
        return self._errors.read_text()

    def wait_for(self, text: str) -> None:
        """Wait until its manager is told this."""
        while True:
            try:
                line = self._manager.recv(4096).decode()
            except TimeoutError:
                raise AssertionError(f"it does not say {text}: {self.said}, {self.errors()}") from None
            self.said.append(line)
            if text in line:
                return

    def descriptors(self) -> int:
        """Return how many descriptors it has."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def stop(self) -> int:
        """Stop it as a service manager does, and return its exit status."""
        self.stopped = True
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=20)


def _start(
    others: ForOtherUsers, path: Path, manager: str, also_import_from: str, errors: int
) -> subprocess.Popen[bytes]:
    """Start the service in an interpreter of its own."""
    return subprocess.Popen(
        [others.python, "-P", "-m", "fdbroker.scan.service", "--config", path, "--dev"],
        env={
            "PYTHONPATH": f"{others.directory}:{also_import_from}".rstrip(":"),
            "PATH": os.environ["PATH"],
            "NOTIFY_SOCKET": manager,
        },
        stdin=subprocess.DEVNULL,
        stderr=errors,
        user=SCAND_UID,
        group=SCAND_UID,
        extra_groups=[],
    )


def _fork(
    others: ForOtherUsers, path: Path, manager: str, also_import_from: str, errors: int
) -> ForkedProcess:
    """Start it in a child of the tests, which have its imports: a third of what a start costs."""

    def be_the_service() -> int:
        os.environ.clear()
        os.environ.update({"PATH": os.defpath, "NOTIFY_SOCKET": manager})
        import_from_copy(others)
        if also_import_from:
            sys.path.insert(1, also_import_from)
        become_started(SCAND_UID)
        return service.main(["--config", str(path), "--dev"])

    return fork_program(be_the_service, "fdbroker-scand", stdout=subprocess.DEVNULL, stderr=errors)


@contextlib.contextmanager
def running_scand(
    others: ForOtherUsers,
    directory: Path,
    configuration: str = "",
    also_import_from: str = "",
    *,
    by_command_line: bool = False,
) -> Iterator[RunningScand]:
    """Run a service of the broker in `directory`, until the block ends; `configuration`: further lines.

    It is forked from here, or started `by_command_line`.
    """
    path = directory / "scand.yaml"
    path.write_text(_CONFIGURATION.replace("DIRECTORY", str(directory)) + configuration)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("")
        manager.settimeout(60)
        name = manager.getsockname()
        with open(directory / "scand.errors", "wb") as errors:
            start = _start if by_command_line else _fork
            process = start(others, path, f"@{name[1:].decode()}", also_import_from, errors.fileno())
        scand = RunningScand(process, manager, directory)
        try:
            scand.wait_for("READY=1")
            yield scand
            if not scand.stopped:
                assert process.poll() is None, f"it died: {scand.errors()}"
                assert scand.stop() == 0, scand.errors()
            assert "Traceback" not in scand.errors(), scand.errors()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


@contextlib.contextmanager
def scand_and_broker(
    others: ForOtherUsers,
    directory: Path,
    configuration: str = "",
    also_import_from: str = "",
    *,
    by_command_line: bool = False,
) -> Iterator[tuple[RunningScand, RunningBroker]]:
    """Run both, and wait until clients can come; those of clamd as well where they are configured."""
    with (
        running_broker(
            directory, policy_text(directory), "--socket-group=" + str(SCAND_UID), own_socket=False
        ) as broker,
        running_scand(
            others, directory, configuration, also_import_from, by_command_line=by_command_line
        ) as scand,
    ):
        scand.wait_for("scan: serving")
        if "protocol: clamd" in configuration and "clamd: serving" not in scand.said[-1]:
            scand.wait_for("clamd: serving")
        yield scand, broker


def client_of(path: str, timeout: float = 60.0) -> ScanService:
    """Return a connection of this process."""
    return connect(path, timeout=timeout)


def own(path: Path, uid: int, mode: int = 0o600) -> None:
    """Give a file away."""
    os.chown(path, uid, uid)
    path.chmod(mode)


def reasons(results: Any) -> dict[bytes, str]:  # noqa: ANN401 - results of any kind
    """Return for each path what was said of it: a verdict, the reason of an error, or what was skipped."""
    told = {}
    for result in results:
        verdict = getattr(result, "verdict", None)
        said = getattr(result, "kind", "") if verdict is None else getattr(verdict, "reason", verdict.verdict)
        assert result.path not in told, "each file has one verdict"
        told[result.path] = str(said)
    return told


def run_as_ann(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a program as one of the users; return what it wrote."""
    return subprocess.run(
        command,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        user=ANN,
        group=ANN,
        extra_groups=[],
        timeout=60,
        check=False,
    )
