"""The scan service in clamd's place, for root's clamdscan: same database and options, no cache."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.brokers import STRANGER_UID, copy_for_all, launched
from benchmarks.clamav import Daemon
from benchmarks.errors import BenchmarkError

if TYPE_CHECKING:
    from collections.abc import Iterator

_PATIENCE = 60.0
_PACKAGES = ("click", "yaml")  # what the service needs, where its user can reach it
_POLICY = """
version: 1
roots:
  tree: {{path: {root}}}
rules:
  - name: everything
    allow: [open, walk]
    client: {{user: {user}}}
    on_behalf_of: any
    in: tree
    paths: ["**"]
listeners:
  seqpacket: {{path: {directory}/broker.seqpacket, group: {user}}}
  control: {{path: {directory}/control}}
  clamd: {{path: {directory}/clamd, service: {{user: {user}}}}}
"""
_CONFIGURATION = """
version: 1
broker: {directory}/broker.seqpacket
engines: {{libclamav: {{database: {database}}}}}
listeners: {{clamd: {{protocol: clamd}}}}
"""


@contextmanager
def running_scand(directory: Path, sources: Path, root: Path, database: Path) -> Iterator[Daemon]:
    """Run a broker, and the service with workers of libclamav.

    `directory` is made. `sources`: what `copy_sources` made.
    """
    directory.mkdir(mode=0o755)
    for name in _PACKAGES:
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:
            raise BenchmarkError(f"there is no package {name}")
        copy_for_all(Path(found.origin).parent, directory / "packages" / name)
    policy, configuration = directory / "policy.yaml", directory / "scand.yaml"
    policy.write_text(_POLICY.format(root=root, user=STRANGER_UID, directory=directory), "utf-8")
    configuration.write_text(_CONFIGURATION.format(directory=directory, database=database), "utf-8")
    with launched(policy, sources, "--audit", "none") as broker_pid:
        errors = directory / "errors"
        command = [os.path.realpath(sys.executable), "-P", "-m", "fdbroker.scan.service", "--dev"]
        process = subprocess.Popen(
            [*command, "--config", str(configuration)],
            env={"PATH": os.defpath, "PYTHONPATH": f"{sources}:{directory / 'packages'}"},
            stdin=subprocess.DEVNULL,
            stderr=errors.open("wb"),
            user=STRANGER_UID,
            group=STRANGER_UID,
            extra_groups=[],
        )
        try:
            _wait_for_listener(process, errors)
            client = directory / "client.conf"
            client.write_text(f"LocalSocket {directory}/clamd\n", "utf-8")
            yield Daemon(client, directory / "clamd", (broker_pid, process.pid))
        finally:
            process.kill()
            process.wait()


def _wait_for_listener(process: subprocess.Popen[bytes], errors: Path) -> None:
    """Wait until the service says that it serves."""
    end = time.monotonic() + _PATIENCE
    while b"listener clamd: serving" not in errors.read_bytes():
        if process.poll() is not None or time.monotonic() > end:
            raise BenchmarkError(f"the scan service did not start: {errors.read_text()}")
        time.sleep(0.05)
