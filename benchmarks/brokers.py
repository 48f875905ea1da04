"""The two brokers that are measured: how each is started, and with which policy.

Whatever the benchmarks know of fdbroker's launcher is in `start_fdbroker`.
"""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.errors import BenchmarkError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

FLOOR_UID = 23457
CLIENT_UID = 23456
STRANGER_UID = 23458
"""A uid that no rule of the policy names."""
_PATIENCE = 10.0


class Broker(NamedTuple):
    """A broker that runs and accepts connections."""

    socket: Path
    pid: int


def make_policy(root: Path) -> dict[str, object]:
    """Return a compiled policy of ten rules, as docs/compiled-policy.md describes it.

    It is meant to be like a real one: two denials that concern everybody and so
    are looked at for each path, seven rules for others, and the one that lets
    the client in, last.
    """
    denials = [
        _rule("never-ssh", "deny", {"any": True}, ["*/.ssh/**"]),
        _rule("never-gnupg", "deny", {"any": True}, ["*/.gnupg/**"]),
    ]
    others = [
        _rule(f"reader-{n}", "allow", {"uids": [40000 + n]}, [f"user{n}*/**"]) for n in range(7)
    ]
    client = _rule("benchmark", "allow", {"uids": [CLIENT_UID]}, ["**"])
    return {
        "version": 1,
        "roots": [{"name": "tree", "path": str(root), "cross_mounts": False}],
        "rules": [*denials, *others, client],
        # One client with 64 connections is what some of the series are about.
        "limits": {"connections_per_uid": 128, "in_flight_per_connection": 512},
        "audit": {"on_failure": "deny"},
        "read_only_view": "required",
    }


def _rule(name: str, effect: str, client: dict[str, object], paths: list[str]) -> dict[str, object]:
    return {
        "name": name,
        "effect": effect,
        "actions": ["open", "stat", "list", "walk"] if effect == "deny" else ["open"],
        "root": "tree",
        "clients": [client],
        "paths": paths,
        "except": [],
        "where": {},
        "deliver": ["descriptor"],
    }


@contextmanager
def start_fdbroker(
    policy: dict[str, object], socket_dir: Path, audit: Path | None = None
) -> Iterator[Broker]:
    """Start fdbroker as it runs in earnest, with everything that it checks and confines.

    `socket_dir` exists and is root's; `audit` is a file to be written, or None for no audit.
    """
    # Here, since the figures of the floor alone need no fdbroker.
    from fdbroker.launcher.start import run_broker  # noqa: PLC0415

    with run_broker(policy=policy, socket_dir=socket_dir, audit=audit) as running:
        yield Broker(socket=Path(running.socket), pid=running.pid)


@contextmanager
def start_floor(binary: Path, socket_dir: Path, root: Path) -> Iterator[Broker]:
    """Start the broker in C and wait until it accepts connections."""
    socket = socket_dir / "floor.seqpacket"
    with subprocess.Popen(
        [binary, socket, root, str(FLOOR_UID)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            if process.stdout is None or process.stdout.readline() != "ready\n":
                raise BenchmarkError("the floor broker did not start")
            yield Broker(socket=socket, pid=process.pid)
            if process.poll() is not None:
                raise BenchmarkError(f"the floor broker ended with {process.returncode}")
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(_PATIENCE)


def pin(pid: int, cpus: Iterable[int]) -> None:
    """Let every thread of `pid`, and those it will start, run on `cpus` only."""
    chosen = set(cpus)
    for thread in Path(f"/proc/{pid}/task").iterdir():
        try:
            os.sched_setaffinity(int(thread.name), chosen)
        except ProcessLookupError:
            continue  # a thread of a connection that has just ended


def resident_mib(pid: int) -> float:
    """Return VmRSS of `pid` in MiB."""
    for line in Path(f"/proc/{pid}/status").read_text("ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise BenchmarkError(f"process {pid} has no VmRSS")
