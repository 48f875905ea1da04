"""ClamAV's daemon, with which `fdbroker scan` is compared: same database and options, no cache."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.errors import BenchmarkError

if TYPE_CHECKING:
    from collections.abc import Iterator

Verdicts = dict[str, str]  # path -> OK, a name, or error
_PATIENCE = 60.0
_RELAY = Path(__file__).resolve().with_name("relay.py")
_EVERY = 97  # of the files, one in so many is in the database
_MANY_DIGESTS, _MANY_PATTERNS = 300_000, 20_000
_SIZES = (1024, 16384)  # those of the files: a digest is looked up among those of its size
_SEED = 1
_PATTERNS = [hashlib.sha256(bytes([number])).digest() for number in range(2)]
_MAILS, _SIZE_OF_MAIL = 200, 64 << 10


class Daemon(NamedTuple):
    """What clamdscan asks: its configuration file, the socket that this names, and who answers there."""

    configuration: Path
    socket: Path
    pids: tuple[int, ...]


def make_database(directory: Path, tree: Path, *, large: bool = False) -> Path:
    """Write a database into `directory`: digests of some files below `tree`, two patterns.

    A large one has 300,000 more digests and 20,000 more patterns, of nothing that is there.
    """
    directory.mkdir()
    lines = set()
    for path in sorted(tree.rglob("*.txt"))[::_EVERY]:
        data = path.read_bytes()
        digest = hashlib.md5(data, usedforsecurity=False).hexdigest()
        lines.add(f"{digest}:{len(data)}:Bench-{path.parent.name}-{path.stem}\n")
    (directory / "bench.hdb").write_text("".join(sorted(lines)), "ascii")
    (directory / "bench.ndb").write_text(
        "".join(f"Bench-Pattern-{n}:0:*:{pattern.hex()}\n" for n, pattern in enumerate(_PATTERNS)), "ascii"
    )
    if large:
        chance = random.Random(_SEED)  # noqa: S311 - to have the same ones again
        with (directory / "many.hdb").open("w", encoding="ascii") as file:
            for number in range(_MANY_DIGESTS):
                size = chance.randint(*_SIZES)
                file.write(f"{chance.getrandbits(128):032x}:{size}:Bench-Digest-{number}\n")
        with (directory / "many.ndb").open("w", encoding="ascii") as file:
            for number in range(_MANY_PATTERNS):
                file.write(f"Bench-Many-{number}:0:*:{chance.getrandbits(256):064x}\n")
    return directory


def make_mails(directory: Path) -> Path:
    """Write files of 64 KiB into `directory`, of letters as attachments are; in two is what is looked for."""
    directory.mkdir()
    chance = random.Random(_SEED)  # noqa: S311 - to have the same ones again
    for number in range(_MAILS):
        letters = base64.b64encode(chance.randbytes(_SIZE_OF_MAIL))
        found = _PATTERNS[number] if number < len(_PATTERNS) else b""
        (directory / f"mail-{number}").write_bytes(found + letters[: _SIZE_OF_MAIL - len(found)])
    return directory


@contextmanager
def running_clamd(directory: Path, database: Path) -> Iterator[Daemon]:
    """Run a clamd with a tmpfs for its temporary files."""
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "fdbroker-bench", directory], check=True)
    try:
        configuration, socket = directory / "clamd.conf", directory / "clamd.socket"
        configuration.write_text(
            f"LocalSocket {socket}\nDatabaseDirectory {database}\nTemporaryDirectory {directory}\n"
            "Foreground yes\nUser root\nDisableCache yes\nAlertExceedsMax yes\nAlertEncrypted yes\n"
        )
        try:
            process = subprocess.Popen(
                ["clamd", "--config-file", configuration],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        except FileNotFoundError as error:
            raise BenchmarkError("there is no clamd: install clamav-daemon and clamdscan") from error
        try:
            end = time.monotonic() + _PATIENCE
            while not socket.exists():
                if process.poll() is not None or time.monotonic() > end:
                    raise BenchmarkError("clamd did not start")
                time.sleep(0.05)
            yield Daemon(configuration, socket, (process.pid,))
        finally:
            process.kill()
            process.wait()
    finally:
        subprocess.run(["umount", "--lazy", directory], check=True)


@contextmanager
def running_relay(python: str, directory: Path, database: Path, *options: str) -> Iterator[Daemon]:
    """Run benchmarks/relay.py in clamd's place."""
    directory.mkdir()
    command = [python, "-P", str(_RELAY), str(database), str(directory), *options]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as process:
        try:
            if process.stdout is None or process.stdout.readline() != "ready\n":
                raise BenchmarkError("the relay did not start")
            configuration = directory / "client.conf"
            configuration.write_text(f"LocalSocket {directory}/socket\n", "utf-8")
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text("ascii")
            pids = (process.pid, *map(int, children.split()))
            yield Daemon(configuration, directory / "socket", pids)
        finally:
            process.kill()


def verdicts_of_clamdscan(output: str) -> Verdicts:
    """Return what clamdscan said of the files that it names: of a tree those that are not OK."""
    verdicts = {}
    for line in output.splitlines():
        path, separator, said = line.rpartition(": ")
        if separator and said.endswith((" FOUND", " ERROR")):
            verdicts[path] = "error" if said.endswith(" ERROR") else said.removesuffix(" FOUND")
    return verdicts


def verdicts_of_fdbroker(output: str) -> Verdicts:
    """Return what `fdbroker scan --json` said of each file."""
    files = [line for line in map(json.loads, output.splitlines()) if line["type"] == "file"]
    names = {"clean": "OK", "error": "error"}
    return {line["path"]: names.get(line["verdict"]) or line["name"] for line in files}


def check_alone(output: str, files: int) -> None:
    """See that the library alone had every file and found what it should.

    Raises:
        BenchmarkError: it did not.

    """
    scanned, found = map(int, output.split())
    if scanned != files or found < files // _EVERY:
        raise BenchmarkError(f"the library scanned {scanned} of {files} files and found {found}")


def compare(ours: Verdicts, theirs: Verdicts, files: int) -> None:
    """See that both had every file and say the same.

    One difference is known and meant: what can't be unpacked is an error here, and OK to clamd.

    Raises:
        BenchmarkError: they differ otherwise.

    """
    if len(ours) != files or not theirs.keys() <= ours.keys():
        raise BenchmarkError(f"fdbroker scanned {len(ours)} of {files} files, or others than clamd")
    different = [path for path, said in ours.items() if said != theirs.get(path, "OK")]
    wrong = [path for path in different if ours[path] != "error" or path in theirs]
    if wrong or len(different) > files // 1000:
        path = (wrong or different)[0]
        raise BenchmarkError(f"{path}: {ours[path]} by fdbroker, {theirs.get(path, 'OK')} by clamd")
    if sum(said not in {"OK", "error"} for said in ours.values()) < files // _EVERY:
        raise BenchmarkError("not everything was found that is in the database")
