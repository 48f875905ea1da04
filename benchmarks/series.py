"""What is measured: variants, each taken once a round, and series, each a ratio of two of them.

To add a series, write its variants, or use those that are there, and a line in SERIES.
"""

from __future__ import annotations

import gc
import os
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from benchmarks import workers
from benchmarks.brokers import CLIENT_UID, STRANGER_UID, make_many_rules, make_wildcard_rules, pin
from benchmarks.clamav import check_alone, compare, verdicts_of_clamdscan, verdicts_of_fdbroker
from benchmarks.errors import BenchmarkError
from benchmarks.native import Request, client_command, measure, walk_command
from benchmarks.tree import DIRECTORIES
from fdbroker.policy.decide import Policy
from fdbroker.policy.rules import ClientFacts, read_policy

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.stage import BrokerName, Stage

_WALK_CLIENT = Path(__file__).resolve().parent / "walk_client.py"
_LIBRARY = _WALK_CLIENT.with_name("libclamav_alone.py")
_SOURCES = _WALK_CLIENT.parent.parent / "src"
_BATCH1_OPENS = 10_000
_BATCH64_OPENS = 32_000
_CLIENTS_OPENS = 64_000
_PYTHON_OPENS = 3_200
_PYTHON_BATCH64_OPENS = 16_000
_TRANSFERS = 1_000
_STARTS = 20
_PARTS = 40  # with 2,000 files
_PINGS = 2_000
_COPIES = 7  # files of 4 KiB that a reply has room for


class Variant(Protocol):
    """Something that yields one figure a round."""

    @property
    def unit(self) -> str:
        """What the figure counts."""

    def measure(self, stage: Stage) -> float:
        """Return the figure."""


@dataclass(frozen=True)
class Opens:
    """The client in C on a broker: microseconds a path.

    One connection: both ends on one CPU. Several: both ends on two CPUs.
    """

    broker: BrokerName
    batch: int
    opens: int
    connections: int = 1
    unit: str = "us/path"

    def measure(self, stage: Stage) -> float:
        """Return the microseconds that a path took."""
        broker = stage.broker(self.broker)
        cpus = stage.one_cpu if self.connections == 1 else stage.two_cpus
        audited = self.broker == "fdbroker-audit"
        opens = stage.opens(self.opens)
        pin(broker.pid, cpus)
        if audited:
            # It is opened for appending, so the broker goes on at the new end.
            os.truncate(stage.audit_file, 0)
        request = Request(broker.socket, stage.tree.everything, self.batch, opens, self.connections, cpus)
        found = measure(client_command(stage.client_program, CLIENT_UID, request))
        if audited and stage.audit_file.read_bytes().count(b"\n") < opens // self.batch:
            raise BenchmarkError("the audit does not have every request")
        return found.microseconds


@dataclass(frozen=True)
class Reads:
    """The client in Python that opens and reads: microseconds a file, all on one CPU."""

    by: Literal["privsep", "fdbroker", "copies"]
    batch: int
    opens: int
    unit: str = "us/file"

    def measure(self, stage: Stage) -> float:
        """Return the microseconds that a file took."""
        socket = "-"
        if self.by != "privsep":
            # For the comparison of both kinds one broker delivers both.
            broker = stage.broker("fdbroker-copies" if self.batch == _COPIES else "fdbroker")
            pin(broker.pid, stage.one_cpu)
            socket = str(broker.socket)
        command = [stage.python, "-m", "benchmarks.python_client", self.by, socket]
        command += [str(stage.tree.exact), str(self.batch), str(stage.opens(self.opens))]
        command += [str(stage.one_cpu[0]), str(CLIENT_UID)]
        return measure(command, stage.environment).microseconds


@dataclass(frozen=True)
class Transfers:
    """Large files that are read whole: microseconds a file, all on one CPU."""

    by: Literal["fdbroker", "tcp"]
    files: int
    unit: str = "us/file"

    def measure(self, stage: Stage) -> float:
        """Return the microseconds that a file took."""
        socket = "-"
        if self.by == "fdbroker":
            broker = stage.broker("fdbroker-large")
            pin(broker.pid, stage.one_cpu)
            socket = str(broker.socket)
        command = [stage.python, "-m", "benchmarks.transfer_client", self.by, socket, str(stage.large[1])]
        command += [str(stage.opens(self.files)), str(stage.one_cpu[0]), str(CLIENT_UID)]
        return measure(command, stage.environment).microseconds


@dataclass(frozen=True)
class Walks:
    """The client in C that has a whole tree handed over: microseconds a file, both ends on one CPU."""

    broker: Literal["floor-walk", "fdbroker-walk"]
    unit: str = "us/file"

    def measure(self, stage: Stage) -> float:
        """Return the microseconds that a file took."""
        broker = stage.broker(self.broker)
        pin(broker.pid, stage.one_cpu)
        command = walk_command(
            stage.client_program, CLIENT_UID, broker.socket, stage.walked.root, stage.one_cpu
        )
        found = measure(command)
        if found.opens != stage.walked.files:
            raise BenchmarkError(f"{self.broker} gave {found.opens} of {stage.walked.files} files")
        return found.microseconds


@dataclass(frozen=True)
class Hashes:
    """Every file of a tree hashed: seconds from the start of the first program to the end of the last.

    By a worker without privileges that a broker walks for, or by root's own programs. All have two CPUs, and
    write the same lines, which are compared one by one.
    """

    by: Literal["fdbroker", "floor", "sha256sum", "openssl dgst -sha256 -r"]
    unit: str = "s"

    def measure(self, stage: Stage) -> float:
        """Return the seconds."""
        root = stage.walked.root
        walks_by: dict[str, BrokerName] = {"fdbroker": "fdbroker-walk", "floor": "floor-walk"}
        if self.by in walks_by:
            broker = stage.broker(walks_by[self.by])
            pin(broker.pid, stage.two_cpus)
            command = [stage.python, "-I", "-S", str(_WALK_CLIENT), str(_SOURCES), str(broker.socket)]
            command += [str(root), str(CLIENT_UID)]
        else:
            command = ["sh", "-c", f"find {root} -type f -print0 | xargs -0 {self.by}"]
        command = ["taskset", "-c", ",".join(map(str, stage.two_cpus)), *command]
        output = stage.directory / "hashes"
        with output.open("wb") as lines:
            began = time.perf_counter()
            done = subprocess.run(command, stdout=lines, stdin=subprocess.DEVNULL, check=False)
            seconds = time.perf_counter() - began
        if done.returncode != 0:
            raise BenchmarkError(f"{' '.join(command)} ended with {done.returncode}")
        # openssl marks files that it read as binary ones, as all here are.
        hashes = output.read_bytes().replace(b" *", b"  ").splitlines()
        if len(hashes) != stage.walked.files or frozenset(hashes) != stage.walked.hashes:
            raise BenchmarkError(f"{self.by} did not hash every file once, or not rightly")
        return seconds


@dataclass(frozen=True)
class Scans:
    """A tree scanned with ClamAV's engine: seconds from the start of the command to its end.

    By `fdbroker scan` with workers, which load the library and its database as well; by `fdbroker scan` or
    root's clamdscan through a clamd that has them loaded; or by the bare library. Every verdict is compared
    with the other's last one, when the clock has stopped.
    """

    by: Literal["fdbroker", "fildes", "--fdpass", "--multiscan", "library"]
    large: bool = False
    unit: str = "s"

    def measure(self, stage: Stage) -> float:
        """Return the seconds."""
        command = self._command(stage)
        output = stage.directory / "verdicts"
        # As installed programs have it, fdbroker finds its bytecode ready; in round 0 it is made.
        environment = {**stage.environment, "PYTHONPYCACHEPREFIX": str(stage.directory / "bytecode")}
        del environment["PYTHONDONTWRITEBYTECODE"]
        with output.open("wb") as lines:
            began = time.perf_counter()
            subprocess.run(command, env=environment, stdout=lines, stdin=subprocess.DEVNULL, check=False)
            seconds = time.perf_counter() - began
        self._compare(stage, output.read_text())
        return seconds

    def _command(self, stage: Stage) -> list[str]:
        root = str(stage.walked.root)
        database = stage.large_database if self.large else stage.small_database
        if self.by == "library":
            return [stage.python, "-P", str(_LIBRARY), str(database), root, str(len(os.sched_getaffinity(0)))]
        if self.by in {"fdbroker", "fildes"}:
            command = [stage.python, "-P", "-m", "fdbroker.cli", "scan", "--json"]
            command += ["--socket", str(stage.broker("fdbroker-scan").socket)]
            if self.by == "fdbroker":
                command += ["--worker-uid", str(STRANGER_UID), "--engine", f"libclamav:database={database}"]
            else:
                command += ["--engine", f"clamd:socket={self._clamd(stage).with_name('clamd.socket')}"]
            return [*command, root]
        command = ["clamdscan", "--config-file", str(self._clamd(stage)), "--no-summary", "--fdpass"]
        return [*command, root] if self.by == "--fdpass" else [*command, self.by, root]

    def _clamd(self, stage: Stage) -> Path:
        return (stage.large_clamd if self.large else stage.small_clamd).configuration

    def _compare(self, stage: Stage, text: str) -> None:
        files = stage.walked.files
        if self.by == "library":
            check_alone(text, files)
            return
        ours = self.by in {"fdbroker", "fildes"}
        verdicts = verdicts_of_fdbroker(text) if ours else verdicts_of_clamdscan(text)
        stage.scanned["fdbroker" if ours else "clamd", self.large] = verdicts
        both = [stage.scanned.get((side, self.large)) for side in ("fdbroker", "clamd")]
        if both[0] is not None and both[1] is not None:
            compare(both[0], both[1], files)


@dataclass(frozen=True)
class Clamdscans:
    """Root's clamdscan of the walked tree, which it names, by clamd or in its place: seconds.

    `parts`: of so many of its directories instead, each named by itself, which so is a command with a
    connection of its own. `mails`: of files of 64 KiB instead, with the large database. What each found is
    compared with the others' last ones, when the clock has stopped.
    """

    by: Literal["clamd", "scand", "relay"]
    options: tuple[str, ...]
    parts: int | None = None
    mails: bool = False
    unit: str = "s"

    def measure(self, stage: Stage) -> float:
        """Return the seconds."""
        name = "small_clamd" if self.by == "clamd" else self.by
        daemon = getattr(stage, f"large_{self.by}" if self.mails else name)
        named = [stage.mails if self.mails else stage.walked.root]
        if self.parts is not None:
            named = sorted(stage.walked.root.iterdir())[: self.parts]
        command = ["clamdscan", "--config-file", str(daemon.configuration), "--no-summary", *self.options]
        began = time.perf_counter()
        done = subprocess.run([*command, *named], capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - began
        verdicts = verdicts_of_clamdscan(done.stdout)
        found = {path: said for path, said in verdicts.items() if said != "error"}
        what = f"{self.options} {self.parts} {self.mails}"
        stage.scanned[f"{self.by} {what}", False] = found
        sides = [stage.scanned.get((f"{by} {what}", False)) for by in ("clamd", "scand", "relay")]
        if not found or any(side is not None and side != found for side in sides):
            raise BenchmarkError(f"clamdscan found other files by {self.by}: {done.stderr[:200]}")
        return seconds


@dataclass(frozen=True)
class Pings:
    """PING by root, again and again: microseconds. All processes are on one CPU.

    On a connection of its own until that has ended, or all in one session.
    """

    by: Literal["clamd", "scand", "relay", "relay_who"]
    session: bool = False
    unit: str = "us"

    def measure(self, stage: Stage) -> float:
        """Return the microseconds of one."""
        daemon = getattr(stage, "small_clamd" if self.by == "clamd" else self.by)
        count = stage.opens(_PINGS)
        usual = os.sched_getaffinity(0)
        pids = (*daemon.pids, os.getpid())
        for pid in pids:
            pin(pid, stage.one_cpu)
        try:
            began = time.perf_counter()
            (self._in_a_session if self.session else self._each_alone)(str(daemon.socket), count)
            return 1e6 * (time.perf_counter() - began) / count
        finally:
            for pid in pids:
                pin(pid, usual)

    def _each_alone(self, path: str, count: int) -> None:
        for _ in range(count):
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(path)
                sock.sendall(b"zPING\0")
                self._check(sock.recv(16), b"PONG\0")
                self._check(sock.recv(16), b"")

    def _in_a_session(self, path: str, count: int) -> None:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(path)
            sock.sendall(b"zIDSESSION\0")
            for number in range(1, count + 1):
                sock.sendall(b"zPING\0")
                self._check(sock.recv(32), b"%d: PONG\0" % number)

    def _check(self, said: bytes, expected: bytes) -> None:
        if said != expected:
            raise BenchmarkError(f"{self.by} answers PING by {said!r}")


@dataclass(frozen=True)
class IdleSize:
    """A broker that was started and asked nothing: its resident memory."""

    broker: BrokerName = "fdbroker"
    unit: str = "MiB"

    def measure(self, stage: Stage) -> float:
        """Return VmRSS in MiB."""
        return stage.idle_mib(self.broker)


@dataclass(frozen=True)
class Start:
    """A broker that is started with a compiled policy: the time until it is ready."""

    broker: BrokerName
    unit: str = "s"

    def measure(self, stage: Stage) -> float:
        """Return the seconds."""
        return stage.start_seconds(self.broker)


@dataclass(frozen=True)
class Decisions:
    """What the policy alone takes to decide on names in directories that it has not met yet, in this process.

    Those in which files are served are remembered, so with them the rules are not looked through at all.
    """

    rules: int
    make: Callable[[Path, int], dict[str, object]] = make_many_rules
    unit: str = "us/path"

    def measure(self, stage: Stage) -> float:
        """Return the microseconds that a decision took."""
        rule_set = read_policy(self.make(stage.tree.root, self.rules))
        view = Policy(rule_set).view(ClientFacts(CLIENT_UID, frozenset()))
        decide = view.actions["open"].decide
        paths = [
            b"%b/user%02d/%d/file" % (bytes(stage.tree.root), n % DIRECTORIES, n)
            for n in range(stage.opens(8_000))
        ]
        decide(paths[0])  # which makes what is made once
        gc.freeze()  # as a broker does: what it holds is not looked at again and again
        began = time.perf_counter()
        allowed = sum(decide(path).allowed for path in paths)
        seconds = time.perf_counter() - began
        gc.unfreeze()
        if allowed != len(paths):
            raise BenchmarkError(f"the policy of {self.rules} rules did not allow what it should")
        return 1e6 * seconds / len(paths)


@dataclass(frozen=True)
class Starts:
    """Milliseconds until a confined worker is there, or an interpreter with the same imports."""

    what: Literal["worker", "interpreter"]
    unit: str = "ms"

    def measure(self, stage: Stage) -> float:
        """Return the milliseconds that a start took."""
        count = max(int(_STARTS * stage.scale), 4)
        if self.what == "worker":
            return workers.milliseconds_of_a_worker(stage.zygote, count)
        return workers.milliseconds_of_an_interpreter(count)


@dataclass(frozen=True)
class PrivateMemory:
    """What a further worker has for itself, beside the pages that it shares with its zygote."""

    unit: str = "MiB"

    def measure(self, stage: Stage) -> float:
        """Return the MiB."""
        return workers.private_mib_of_a_further_worker(stage.zygote)


@dataclass(frozen=True)
class Series:
    """A figure and its bar: `above` divided by `below`, or `above` itself where that is None."""

    name: str
    above: str
    below: str | None
    better: Literal["lower", "higher"]
    bar: float

    def holds(self, value: float) -> bool:
        """Return whether `value` is on the right side of the bar."""
        return value <= self.bar if self.better == "lower" else value >= self.bar


# Variants that are compared stand next to each other, so that they run so too.
VARIANTS: dict[str, Variant] = {
    "floor_1": Opens("floor", 1, _BATCH1_OPENS),
    "inlined_1": Opens("inlined", 1, _BATCH1_OPENS),
    "fdbroker_1": Opens("fdbroker", 1, _BATCH1_OPENS),
    "fdbroker_audit_1": Opens("fdbroker-audit", 1, _BATCH1_OPENS),
    "floor_64": Opens("floor", 64, _BATCH64_OPENS),
    "fdbroker_64": Opens("fdbroker", 64, _BATCH64_OPENS),
    "fdbroker_audit_64": Opens("fdbroker-audit", 64, _BATCH64_OPENS),
    "floor_clients16": Opens("floor", 32, _CLIENTS_OPENS, 16),
    "fdbroker_clients16": Opens("fdbroker", 32, _CLIENTS_OPENS, 16),
    "floor_clients64": Opens("floor", 32, _CLIENTS_OPENS, 64),
    "fdbroker_clients64": Opens("fdbroker", 32, _CLIENTS_OPENS, 64),
    "fdbroker_clients4": Opens("fdbroker", 32, _CLIENTS_OPENS, 4),
    "privsep_read": Reads("privsep", 1, _PYTHON_OPENS),
    "fdbroker_read_1": Reads("fdbroker", 1, _PYTHON_OPENS),
    "fdbroker_read_64": Reads("fdbroker", 64, _PYTHON_BATCH64_OPENS),
    "fdbroker_read_7": Reads("fdbroker", _COPIES, _PYTHON_BATCH64_OPENS),
    "fdbroker_copy_7": Reads("copies", _COPIES, _PYTHON_BATCH64_OPENS),
    "tcp_stream": Transfers("tcp", _TRANSFERS),
    "fdbroker_stream": Transfers("fdbroker", _TRANSFERS),
    "floor_walk": Walks("floor-walk"),
    "fdbroker_walk": Walks("fdbroker-walk"),
    "fdbroker_hashes": Hashes("fdbroker"),
    "floor_hashes": Hashes("floor"),
    "sha256sum_hashes": Hashes("sha256sum"),
    "openssl_hashes": Hashes("openssl dgst -sha256 -r"),
    "fdbroker_idle": IdleSize(),
    "fdbroker_rules_10": Opens("fdbroker-rules-10", 64, _BATCH64_OPENS),
    "fdbroker_rules_10000": Opens("fdbroker-rules-10000", 64, _BATCH64_OPENS),
    "decide_10": Decisions(10),
    "decide_10000": Decisions(10_000),
    "decide_wildcards_10": Decisions(10, make_wildcard_rules),
    "decide_wildcards_1000": Decisions(1_000, make_wildcard_rules),
    "rules_10000_idle": IdleSize("fdbroker-rules-10000"),
    "rules_10000_start": Start("fdbroker-rules-10000"),
    "zygote_worker": Starts("worker"),
    "interpreter": Starts("interpreter"),
    "further_worker": PrivateMemory(),
    "clamdscan_fdpass": Scans("--fdpass"),
    "fdbroker_fildes": Scans("fildes"),
    "clamdscan_multiscan": Scans("--multiscan"),
    "fdbroker_scan": Scans("fdbroker"),
    "libclamav_alone": Scans("library"),
    "clamdscan_large_fdpass": Scans("--fdpass", large=True),
    "fdbroker_scan_large": Scans("fdbroker", large=True),
    "clamdscan_large_multiscan": Scans("--multiscan", large=True),
}
VARIANTS |= {
    "relay_fdpass": Clamdscans("relay", ("--fdpass",), _PARTS),
    "relay_ping": Pings("relay"),
    "relay_who_ping": Pings("relay_who"),
    "relay_ping_session": Pings("relay", session=True),
}
for _by in ("clamd", "scand"):
    VARIANTS |= {
        f"{_by}_ping": Pings(_by),
        f"{_by}_ping_session": Pings(_by, session=True),
        f"{_by}_fdpass": Clamdscans(_by, ("--fdpass",), _PARTS),
        f"{_by}_fdpass_mails": Clamdscans(_by, ("--fdpass",), mails=True),
        f"{_by}_stream": Clamdscans(_by, ("--stream",), _PARTS),
        f"{_by}_multiscan": Clamdscans(_by, ("--multiscan",)),
        f"{_by}_multiscan_parts": Clamdscans(_by, ("--multiscan",), _PARTS),
        f"{_by}_fdpass_multiscan": Clamdscans(_by, ("--fdpass", "--multiscan")),
        f"{_by}_stream_multiscan": Clamdscans(_by, ("--stream", "--multiscan")),
    }

SERIES = (
    Series("open_batch1", "fdbroker_1", "floor_1", "lower", 1.9),
    Series("open_batch1_vs_inlined", "fdbroker_1", "inlined_1", "lower", 2.0),
    Series("open_batch64", "fdbroker_64", "floor_64", "lower", 2.0),
    Series("open_batch1_audit", "fdbroker_audit_1", "floor_1", "lower", 2.2),
    Series("open_batch64_audit", "fdbroker_audit_64", "floor_64", "lower", 2.3),
    Series("clients16_batch32", "fdbroker_clients16", "floor_clients16", "lower", 3.0),
    Series("clients64_batch32", "fdbroker_clients64", "floor_clients64", "lower", 3.0),
    Series("convoy_64_over_4", "fdbroker_clients64", "fdbroker_clients4", "lower", 1.2),
    Series("privsep_batch1", "privsep_read", "fdbroker_read_1", "higher", 1.5),
    Series("privsep_batch64", "privsep_read", "fdbroker_read_64", "higher", 6.0),
    Series("copy_4k", "fdbroker_copy_7", "fdbroker_read_7", "lower", 1.6),
    Series("unix_vs_tcp", "tcp_stream", "fdbroker_stream", "higher", 1.0),
    Series("walk_pass", "fdbroker_walk", "floor_walk", "lower", 2.1),
    Series("walk_sha256_vs_sha256sum", "fdbroker_hashes", "sha256sum_hashes", "lower", 0.5),
    Series("walk_sha256_vs_openssl", "fdbroker_hashes", "openssl_hashes", "lower", 0.9),
    Series("walk_sha256_vs_floor", "fdbroker_hashes", "floor_hashes", "lower", 1.5),
    Series("idle_rss_mib", "fdbroker_idle", None, "lower", 16.0),
    Series("rules_10000_vs_10", "fdbroker_rules_10000", "fdbroker_rules_10", "lower", 2.0),
    Series("decide_10000_vs_10", "decide_10000", "decide_10", "lower", 2.0),
    Series("wildcard_rules_1000_vs_10", "decide_wildcards_1000", "decide_wildcards_10", "lower", 2.0),
    Series("rules_10000_rss_mib", "rules_10000_idle", None, "lower", 64.0),
    Series("rules_10000_start_s", "rules_10000_start", None, "lower", 5.0),
    Series("zygote_vs_exec", "zygote_worker", "interpreter", "lower", 0.1),
    Series("worker_private_mib", "further_worker", None, "lower", 4.0),
)

# With ClamAV installed, and of some minutes: not among those that are run when none is named.
SCAN_SERIES = (
    Series("scan_vs_fdpass", "fdbroker_scan", "clamdscan_fdpass", "lower", 0.4),
    Series("scan_vs_multiscan", "fdbroker_scan", "clamdscan_multiscan", "lower", 0.6),
    Series("scan_vs_libclamav", "fdbroker_scan", "libclamav_alone", "lower", 1.5),
    Series("scan_large_vs_fdpass", "fdbroker_scan_large", "clamdscan_large_fdpass", "lower", 0.55),
    Series("scan_large_vs_multiscan", "fdbroker_scan_large", "clamdscan_large_multiscan", "lower", 1.0),
    Series("fildes_vs_fdpass", "fdbroker_fildes", "clamdscan_fdpass", "lower", 0.65),
    Series("fildes_vs_multiscan", "fdbroker_fildes", "clamdscan_multiscan", "lower", 1.1),
    Series("ping_vs_clamd", "scand_ping", "clamd_ping", "lower", 3.0),
    Series("ping_session_vs_clamd", "scand_ping_session", "clamd_ping_session", "lower", 3.0),
    Series("ping_vs_relay", "scand_ping", "relay_ping", "lower", 4.5),
    Series("ping_vs_relay_who", "scand_ping", "relay_who_ping", "lower", 3.0),
    Series("ping_session_vs_relay", "scand_ping_session", "relay_ping_session", "lower", 2.5),
    Series("clamdscan_fdpass_vs_clamd", "scand_fdpass", "clamd_fdpass", "lower", 1.0),
    Series("clamdscan_fdpass_vs_relay", "scand_fdpass", "relay_fdpass", "lower", 2.5),
    Series("clamdscan_fdpass_mails_vs_clamd", "scand_fdpass_mails", "clamd_fdpass_mails", "lower", 1.5),
    Series("clamdscan_stream_vs_clamd", "scand_stream", "clamd_stream", "lower", 1.0),
    Series("clamdscan_multiscan_vs_clamd", "scand_multiscan", "clamd_multiscan", "lower", 1.0),
    Series(
        "clamdscan_multiscan_parts_vs_clamd", "scand_multiscan_parts", "clamd_multiscan_parts", "lower", 2.0
    ),
    Series(
        "clamdscan_fdpass_sessions_vs_clamd", "scand_fdpass_multiscan", "clamd_fdpass_multiscan", "lower", 1.0
    ),
    Series(
        "clamdscan_stream_sessions_vs_clamd", "scand_stream_multiscan", "clamd_stream_multiscan", "lower", 1.0
    ),
)
