"""What tests in the booted system do and ask: commands, units, the journal, clients under way."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import pwd
import select
import subprocess
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fdbroker
from tests.processes import become, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

POLICY_FILE = Path("/etc/fdbroker/policy.yaml")
COMPILED = Path("/run/fdbroker/policy.json")
SEQPACKET = Path("/run/fdbroker/broker.seqpacket")
SERVICE = "fdbroker.service"
# In force when a test begins.
POLICY = """\
version: 1
roots:
  data: {path: /srv/data}
  home: {path: /home}
  tmp: {path: /tmp}
rules:
  - name: alice-reads-data
    allow: [open, stat, list, walk]
    client: {user: alice}
    in: data
    paths: ["**"]
  - name: a-unit-reads-data
    allow: open
    client: [{unit: reader.service}, {unit: fdbroker-worker@.service}]
    in: data
    paths: ["**"]
  - name: alice-reads-homes-and-tmp
    allow: open
    client: {user: alice}
    in: home
    paths: ["**"]
  - name: alice-reads-tmp
    allow: open
    client: {user: alice}
    in: tmp
    paths: ["**"]
"""


def run(*command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command, and have its output with the failure if it fails."""
    done = subprocess.run(command, check=False, capture_output=True, encoding="utf-8")
    assert not check or done.returncode == 0, (command, done.returncode, done.stdout, done.stderr)
    return done


def show(name: str, unit: str = SERVICE) -> str:
    """Return a property of a unit."""
    return run("systemctl", "show", "--value", "-p", name, unit).stdout.strip()


def main_pid(unit: str = SERVICE) -> int:
    """Return the process of a service, 0 if it does not run."""
    return int(show("MainPID", unit))


def signal_service(number: int) -> None:
    """Send the service a signal by which it ends, and wait until systemd has started it again."""
    pid = main_pid()
    os.kill(pid, number)
    wait_until(lambda: main_pid() not in {0, pid}, "another process")


def wait_for(state: str, unit: str = SERVICE) -> None:
    """Wait until a unit is in this state (ActiveState/SubState)."""
    wait_until(lambda: f"{show('ActiveState', unit)}/{show('SubState', unit)}" == state, state)


def sync_journal() -> None:
    """Have all that was logged until now in the journal."""
    run("journalctl", "--sync")


def messages(unit: str = SERVICE, *, since: str | None = None) -> list[str]:
    """Return what the unit wrote, of its start with this invocation id or of all."""
    sync_journal()
    which = [f"_SYSTEMD_INVOCATION_ID={since}"] if since else [f"--unit={unit}"]
    return run("journalctl", "-o", "cat", "--no-pager", *which).stdout.splitlines()


def records(*options: str) -> list[dict[str, Any]]:
    """Return the audit, as the command reads it from the journal."""
    sync_journal()
    done = run("fdbroker", "audit", "--journal", "--json", *options)
    return [json.loads(line) for line in done.stdout.splitlines()]


@contextlib.contextmanager
def drop_in(text: str, unit: str = SERVICE) -> Iterator[None]:
    """Have lines in a drop-in of a unit."""
    file = Path(f"/run/systemd/system/{unit}.d/test.conf")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    run("systemctl", "daemon-reload")
    try:
        yield
    finally:
        file.unlink()
        run("systemctl", "daemon-reload")


def become_user(name: str) -> None:
    """Become a user with all groups, in this process."""
    entry = pwd.getpwnam(name)
    become(entry.pw_uid, entry.pw_gid, tuple(os.getgrouplist(name, entry.pw_gid)))


def run_as(user: str, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command as a user with all groups, whatever becomes of it."""
    return run("setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups", *command, check=False)


def cat(path: str, user: str = "alice", *options: str) -> subprocess.CompletedProcess[str]:
    """Run `fdbroker cat` as a user."""
    return run_as(user, "fdbroker", *options, "cat", path)


class Load:
    """Clients that go on asking by the library while something is done to the service.

    Half of them keep their connection, the others make a new one for each question. None may see an error.
    """

    def __init__(self, clients: int = 4, path: str = "/srv/data/file") -> None:
        # Shared with the children: whether to stop, and how many answers each got.
        self._shared = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("Q")
        self._path = path
        self._children: list[tuple[int, int]] = []
        for number in range(1, clients + 1):
            results, write_end = os.pipe()
            pid = os.fork()
            if not pid:
                self._ask(number, write_end)
            os.close(write_end)
            self._children.append((pid, results))

    def answers(self) -> int:
        """Return the least number of answers that a client got."""
        return min(self._shared[1 : len(self._children) + 1])

    def go_on(self, least: int = 20) -> None:
        """Wait until each client has so many more answers, or has failed."""
        wanted = self.answers() + least
        wait_until(
            lambda: self.answers() >= wanted or self._has_failed(), f"{wanted} answers for each client"
        )

    def end(self) -> int:
        """End it, and return how many answers there were.

        Raises:
            AssertionError: a client had none, or an error.

        """
        self._shared[0] = 1
        errors = []
        for pid, results in self._children:
            with open(results, encoding="utf-8") as pipe:
                errors.append(pipe.read())
            os.waitpid(pid, 0)
        assert not any(errors), errors
        assert self.answers(), "a client had no answer"
        return sum(self._shared[1 : len(self._children) + 1])

    def _has_failed(self) -> bool:
        return bool(select.select([results for _, results in self._children], [], [], 0)[0])

    def _ask(self, number: int, results: int) -> None:
        """Ask until told to stop; write the error, if there is one, and end."""
        error = ""
        try:
            become_user("alice")
            with fdbroker.connect() as kept:
                while not self._shared[0]:
                    if number % 2:
                        kept.open(self._path).close()
                    else:
                        with fdbroker.connect() as client:
                            client.open(self._path).close()
                    self._shared[number] += 1
        except BaseException:  # noqa: BLE001 - told
            error = traceback.format_exc()
        with open(results, "w", encoding="utf-8") as pipe:
            pipe.write(error)
        os._exit(0)


@contextlib.contextmanager
def load() -> Iterator[Load]:
    """Have it for the length of the block, in which no client may see an error."""
    clients = Load()
    try:
        clients.go_on()
        yield clients
        clients.go_on()
    finally:
        clients.end()
