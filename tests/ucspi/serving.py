"""Super-servers of the UCSPI family with a broker for each connection, and who is beside them."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tests.processes import children_of, wait_until
from tests.running_broker import CLIENT_UID, launcher_command, launcher_environment, policy, rule

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_LISTENS = 0x10000  # __SO_ACCEPTCON, in the flags of /proc/net/unix
FILES = {b"a": b"first\n", b"secret": b"no\n", b"odd\xff\n": bytes(range(256)) * 1000}


class Place(NamedTuple):
    """A directory with a tree to serve, a policy for it, and the audit."""

    directory: Path

    @property
    def tree(self) -> bytes:
        """What is served: to CLIENT_UID, but for `secret`."""
        return os.fsencode(self.directory / "tree")

    @property
    def socket(self) -> Path:
        """Where the super-server listens."""
        return self.directory / "socket"

    @property
    def audit(self) -> Path:
        """Where all brokers write."""
        return self.directory / "audit.jsonl"

    @property
    def errors(self) -> str:
        """What the super-server and its brokers said."""
        return (self.directory / "errors").read_text()

    def path(self, name: bytes) -> bytes:
        """Return the path of a file."""
        return self.tree + b"/" + name

    def fdbrokerd(self, *options: str) -> list[str]:
        """Return the command that stands for fdbrokerd."""
        return launcher_command(self.directory / "policy.json", *options)

    def decisions(self) -> list[dict[str, Any]]:
        """Return the records of decisions so far, of all brokers."""
        if not self.audit.exists():
            return []
        records = [json.loads(line) for line in self.audit.read_bytes().splitlines()]
        return [record for record in records if "decision" in record]


def lay_out(directory: Path) -> Place:
    """Make the tree and its policy."""
    place = Place(directory)
    os.mkdir(place.tree)
    for name, content in FILES.items():
        with open(os.open(place.path(name), os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
            file.write(content)
    allowed = rule("theirs", clients=[{"uids": [CLIENT_UID]}], **{"except": ["secret"]})
    (directory / "policy.json").write_text(json.dumps(policy(directory / "tree", allowed)))
    return place


@contextlib.contextmanager
def serving(place: Place, command: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run a super-server; at the end no broker of it may be left."""
    with open(place.directory / "errors", "ab") as errors:
        server = subprocess.Popen(
            command, env=launcher_environment(), stdin=subprocess.DEVNULL, stdout=errors, stderr=errors
        )
    try:
        wait_until(lambda: is_listening(place.socket) or server.poll() is not None, "a listening socket")
        assert server.poll() is None, place.errors
        yield server
        wait_until(lambda: not children_of(server.pid), "the end of the last broker")
    finally:
        left = children_of(server.pid) if server.poll() is None else []
        server.terminate()
        server.wait(timeout=20)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
        place.socket.unlink(missing_ok=True)


def is_listening(path: Path) -> bool:
    """Return whether somebody listens on a Unix socket, without connecting to it."""
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[-1] == str(path) and int(fields[3], 16) & _LISTENS:
            return True
    return False
