"""The C programs: how they are built, and how the client is run."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.errors import BenchmarkError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

_FLAGS = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread")
_DEADLINE = 300.0


class Measurement(NamedTuple):
    """One line of a client's JSON."""

    seconds: float
    opens: int
    checksum: int

    @property
    def microseconds(self) -> float:
        """Time for one path."""
        return self.seconds / self.opens * 1e6


@dataclass(frozen=True)
class Request:
    """What the client in C is to do."""

    socket: Path
    paths: Path
    batch: int
    opens: int
    connections: int = 1
    cpus: tuple[int, ...] = ()
    read: bool = False


def build(source_dir: Path, build_dir: Path) -> tuple[Path, Path]:
    """Compile the floor and the client; return the two programs."""
    build_dir.mkdir(parents=True, exist_ok=True)
    programs = build_dir / "floor_broker", build_dir / "bench_client"
    for program in programs:
        source = source_dir / f"{program.name}.c"
        command = [os.environ.get("CC", "gcc"), *_FLAGS, "-o", str(program), str(source)]
        try:
            subprocess.run(command, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise BenchmarkError(f"can't build {source.name}: {error}") from error
    return programs


def client_command(program: Path, uid: int, request: Request) -> list[str]:
    """Return the command line of the client in C."""
    command = [str(program), "--uid", str(uid)]
    for cpu in request.cpus:
        command += ["--cpu", str(cpu)]
    if request.read:
        command.append("--read")
    command += [str(request.socket), str(request.paths)]
    return [*command, str(request.batch), str(request.opens), str(request.connections)]


def walk_command(
    program: Path, uid: int, socket: Path, start: Path, cpus: tuple[int, ...] = (), *, read: bool = False
) -> list[str]:
    """Return the command line of the client in C that has everything below `start` handed over."""
    command = [str(program), "--uid", str(uid), "--walk", str(start)]
    for cpu in cpus:
        command += ["--cpu", str(cpu)]
    return [*command, *(["--read"] if read else []), str(socket)]


def measure(command: list[str], environment: dict[str, str] | None = None) -> Measurement:
    """Run a client, of whatever language, and return what it measured."""
    done = _run(command, environment)
    if done.returncode != 0:
        raise BenchmarkError(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stderr}")
    figures = json.loads(done.stdout)
    return Measurement(figures["seconds"], figures["opens"], figures.get("checksum", 0))


def is_refused(command: list[str]) -> bool:
    """Return whether the client in C was refused a path, as it must be."""
    done = _run(command, None)
    return done.returncode == 1 and "status 1, reason 1," in done.stderr


def _run(command: Iterable[str], environment: dict[str, str] | None) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            list(command),
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_DEADLINE,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BenchmarkError(str(error)) from error
