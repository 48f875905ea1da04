"""The two brokers that are measured: how each is started, and with which policy.

Whatever the benchmarks know of fdbroker's launcher is in `start_fdbroker`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from benchmarks.errors import BenchmarkError
from benchmarks.tree import DIRECTORIES

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

CLIENT_UID = 23456
# Of their own, since the kernel counts descriptors under way by the sender's uid.
FLOOR_UID = 23457
BROKER_UID = 23459
STRANGER_UID = 23458
"""A uid that no rule of the policy names."""
_PATIENCE = 10.0
_SOURCES = str(Path(__file__).resolve().parent.parent / "src")


class Broker(NamedTuple):
    """A broker that runs and accepts connections."""

    socket: Path
    pid: int


def make_policy(root: Path, *, copies: bool = False) -> dict[str, object]:
    """Return a compiled policy of ten rules, as docs/compiled-policy.md describes it.

    `copies`: the client may also have contents in place of descriptors.

    It is meant to be like a real one: two denials that concern everybody and so
    are looked at for each path, seven rules for others, and the one that lets
    the client in, last.
    """
    others = [_rule(f"reader-{n}", "allow", {"uids": [40000 + n]}, [f"user{n}*/**"]) for n in range(7)]
    client = _rule("benchmark", "allow", {"uids": [CLIENT_UID]}, ["**"])
    if copies:
        client["deliver"] = ["descriptor", "copy"]
    return {
        "version": 1,
        "roots": [{"name": "tree", "path": str(root), "cross_mounts": False, "opens": "loop"}],
        "rules": [*_denials(), *others, client],
        # One client with 64 connections is what some of the series are about.
        "limits": {
            "connections_per_uid": 128,
            "in_flight_per_connection": 512,
            "message_within": 10.0,
        },
        "audit": {"on_failure": "deny"},
        "admins": {"uids": [], "gids": []},
        "services": [],
        "read_only_view": "required",
        "identity": "available",
    }


def make_policy_for_scans(root: Path) -> dict[str, object]:
    """Return the policy of `make_policy` with a last rule that lets everybody list and open."""
    policy = make_policy(root)
    rule = _rule("scan", "allow", {"any": True}, ["**"]) | {"actions": ["open", "list"]}
    return policy | {"rules": [*cast("list[object]", policy["rules"]), rule]}


def make_many_rules(root: Path, rules: int) -> dict[str, object]:
    """Return a compiled policy of so many rules, 10 or more, that allow the client some, and two denials.

    Each is about directories that no other one names. The first ten have all that is in the benchmarks' tree.
    """
    policy = make_policy(root)
    client: dict[str, object] = {"uids": [CLIENT_UID]}
    there = [
        _rule(f"rule-{n}", "allow", client, [f"user{number:02}/**" for number in range(n, DIRECTORIES, 10)])
        for n in range(10)
    ]
    beside = [_rule(f"rule-{n}", "allow", client, [f"user{n}/**"]) for n in range(100, 90 + rules)]
    return policy | {"rules": _denials() + there + beside}


def make_wildcard_rules(root: Path, rules: int) -> dict[str, object]:
    """Return a compiled policy that allows the client all but what so many rules deny.

    Their globs begin with wildcards, and match nothing of the benchmarks' tree.
    """
    globs = ("*/x%d/**", "**/x%d", "**/*.x%d", "**/x%d-*/**")
    denials = [_rule(f"never-{n}", "deny", {"any": True}, [globs[n % len(globs)] % n]) for n in range(rules)]
    return make_policy(root) | {"rules": [*denials, _rule("all", "allow", {"uids": [CLIENT_UID]}, ["**"])]}


def _denials() -> list[dict[str, object]]:
    return [
        _rule("never-ssh", "deny", {"any": True}, ["*/.ssh/**"]),
        _rule("never-gnupg", "deny", {"any": True}, ["*/.gnupg/**"]),
    ]


def _rule(name: str, effect: str, client: dict[str, object], paths: list[str]) -> dict[str, object]:
    return {
        "name": name,
        "effect": effect,
        "actions": ["open", "stat", "list", "walk"] if effect == "deny" else ["open", "walk"],
        "root": "tree",
        "clients": [client],
        "on_behalf_of": [],
        "paths": paths,
        "except": [],
        "where": {},
        "deliver": ["descriptor"],
        "symlinks": "refuse",
    }


def copy_sources(directory: Path) -> Path:
    """Return a copy of the sources without bytecode: where there is some, `--dev` lets the broker take it."""
    sources = directory / "sources"
    copy_for_all(_SOURCES, sources, "__pycache__")
    return sources


def copy_for_all(source: Path, target: Path, *left_out: str) -> None:
    """Copy a directory for everybody to read: a checkout's files may be readable for their owner alone."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(*left_out))
    subprocess.run(["chmod", "-R", "u=rwX,go=rX", target], check=True)


@contextmanager
def start_fdbroker(
    policy: dict[str, object], sources: Path, socket_dir: Path, audit: Path | None = None
) -> Iterator[Broker]:
    """Start fdbroker as it runs in earnest, with everything that it checks and confines.

    `sources`: what `copy_sources` made. `socket_dir` exists and is root's; `audit` is a file to be written,
    or None for no audit.
    """
    socket = socket_dir / "broker.seqpacket"
    policy_file = socket_dir / "policy.json"
    policy_file.write_text(json.dumps(policy), "ascii")
    options = ["--socket", str(socket), "--socket-mode", "666", "--audit", str(audit or "none")]
    with launched(policy_file, sources, *options) as pid:
        yield Broker(socket=socket, pid=pid)


@contextmanager
def launched(policy_file: Path, sources: Path, *options: str) -> Iterator[int]:
    """Run the launcher with these options, and give the broker's pid when that is ready."""
    ready, ready_there = os.pipe()
    command = [sys.executable, "-m", "fdbroker.launcher", "--dev", "--policy", str(policy_file), *options]
    command += ["--user", f"{BROKER_UID}:{BROKER_UID}", "--ready-fd", str(ready_there)]
    with subprocess.Popen(
        command,
        env={
            "PATH": os.defpath,
            "PYTHONPATH": str(sources),
            "PYTHONPYCACHEPREFIX": str(sources.with_suffix(".bytecode")),
        },
        stdin=subprocess.DEVNULL,
        pass_fds=[ready_there],
    ) as process:
        os.close(ready_there)
        with open(ready, "rb") as told:
            started = told.read() == b"ready\n"
        # The launcher becomes the broker by execve: one process, one pid.
        with _until_stopped("fdbroker", process, started=started):
            yield process.pid


@contextmanager
def start_floor(binary: Path, socket_dir: Path, root: Path) -> Iterator[Broker]:
    """Start the broker in C and wait until it accepts connections."""
    socket = socket_dir / "floor.seqpacket"
    with _start_and_read_ready("the floor broker", [binary, socket, root, str(FLOOR_UID)]) as pid:
        yield Broker(socket=socket, pid=pid)


@contextmanager
def start_inlined(python: str, socket_dir: Path, root: Path) -> Iterator[Broker]:
    """Start benchmarks/inlined_broker.py and wait until it accepts connections."""
    socket = socket_dir / "inlined.seqpacket"
    program = Path(__file__).resolve().with_name("inlined_broker.py")
    command: list[str | Path] = [python, "-I", "-S", program, _SOURCES, socket, root, str(CLIENT_UID)]
    with _start_and_read_ready("the inlined broker", command) as pid:
        yield Broker(socket=socket, pid=pid)


@contextmanager
def _start_and_read_ready(name: str, command: Sequence[str | Path]) -> Iterator[int]:
    """Start what writes `ready` on its standard output when it accepts connections; give its pid."""
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as process:
        started = process.stdout is not None and process.stdout.readline() == "ready\n"
        with _until_stopped(name, process, started=started):
            yield process.pid


@contextmanager
def _until_stopped(name: str, process: subprocess.Popen[Any], *, started: bool) -> Iterator[None]:
    """Stop `process` at the end; complain if it did not live so long."""
    try:
        if not started:
            raise BenchmarkError(f"{name} did not start")
        yield
        if process.poll() is not None:
            raise BenchmarkError(f"{name} ended with {process.returncode} while it was measured")
    finally:
        process.terminate()
        try:
            process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()


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
