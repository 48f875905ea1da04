"""Where the figures are taken: the tree, the programs, and the brokers that run meanwhile."""

from __future__ import annotations

import tempfile
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from benchmarks import clamav, scand, workers
from benchmarks.brokers import (
    CLIENT_UID,
    STRANGER_UID,
    Broker,
    copy_sources,
    make_many_rules,
    make_policy,
    make_policy_for_scans,
    resident_mib,
    start_fdbroker,
    start_floor,
    start_inlined,
)
from benchmarks.errors import BenchmarkError
from benchmarks.native import Request, client_command, is_refused, measure, walk_command
from benchmarks.tree import make_large_files, make_walked_tree

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from benchmarks.tree import Tree, WalkedTree
    from fdbroker.sandbox import Zygote

BrokerName = Literal[
    "floor",
    "inlined",
    "fdbroker",
    "fdbroker-audit",
    "floor-walk",
    "fdbroker-walk",
    "fdbroker-large",
    "fdbroker-copies",
    "fdbroker-rules-10",
    "fdbroker-rules-10000",
    "fdbroker-scan",
]
_CHECK_BATCH = 64


@dataclass
class Stage:
    """Everything that the variants share.

    A broker is started and checked when a variant first asks for it, and lives
    until the stage is left.
    """

    directory: Path
    tree: Tree
    floor_program: Path
    client_program: Path
    one_cpu: tuple[int, ...]
    two_cpus: tuple[int, ...]
    python: str
    environment: dict[str, str]
    scale: float = 1.0
    scanned: dict[tuple[str, bool], clamav.Verdicts] = field(default_factory=dict)
    """What the last scan by fdbroker, and by clamd, said of each file; True: with the large database."""
    _running: dict[BrokerName, Broker] = field(default_factory=dict)
    _stack: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> Self:
        """Start nothing yet."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop every broker."""
        self._stack.__exit__(kind, error, trace)

    @property
    def audit_file(self) -> Path:
        """Where the broker with an audit writes it."""
        return self.directory / "audit.jsonl"

    @cached_property
    def walked(self) -> WalkedTree:
        """The tree that is walked, made when it is first asked for."""
        return make_walked_tree(self.directory)

    @cached_property
    def large(self) -> tuple[Path, Path]:
        """The directory of the large files and the list of them, made when they are first asked for."""
        return make_large_files(self.directory)

    @cached_property
    def zygote(self) -> Zygote:
        """A zygote of the scan's workers, started when it is first asked for."""
        return self._stack.enter_context(workers.zygote())

    @cached_property
    def small_database(self) -> Path:
        """A database of ClamAV, which has some files of the walked tree."""
        return clamav.make_database(self.directory / "database", self.walked.root)

    @cached_property
    def large_database(self) -> Path:
        """The same with very much else in it."""
        return clamav.make_database(self.directory / "large-database", self.walked.root, large=True)

    @cached_property
    def small_clamd(self) -> clamav.Daemon:
        """A clamd that runs with the small database."""
        return self._stack.enter_context(clamav.running_clamd(self.directory / "clamd", self.small_database))

    @cached_property
    def large_clamd(self) -> clamav.Daemon:
        """A clamd that runs with the large database."""
        directory = self.directory / "large-clamd"
        return self._stack.enter_context(clamav.running_clamd(directory, self.large_database))

    @cached_property
    def scand(self) -> clamav.Daemon:
        """A scan service, in clamd's place, that runs with the small database."""
        running = scand.running_scand(
            self.directory / "scand", self.sources, self.walked.root, self.small_database
        )
        return self._stack.enter_context(running)

    @cached_property
    def large_scand(self) -> clamav.Daemon:
        """The same with the large database."""
        running = scand.running_scand(
            self.directory / "large-scand", self.sources, self.walked.root, self.large_database
        )
        return self._stack.enter_context(running)

    @cached_property
    def mails(self) -> Path:
        """A directory of files that are as large as mails, made when it is first asked for."""
        return clamav.make_mails(self.directory / "mails")

    @cached_property
    def relay(self) -> clamav.Daemon:
        """The least that three processes of Python can be in clamd's place, with the small database."""
        running = clamav.running_relay(self.python, self.directory / "relay", self.small_database)
        return self._stack.enter_context(running)

    @cached_property
    def relay_who(self) -> clamav.Daemon:
        """The same, but that it asks who connects."""
        directory = self.directory / "relay-who"
        running = clamav.running_relay(self.python, directory, self.small_database, "--who")
        return self._stack.enter_context(running)

    def opens(self, wanted: int) -> int:
        """Return how many opens to make where `wanted` is right for a full run."""
        return max(int(wanted * self.scale), 256)

    def broker(self, name: BrokerName) -> Broker:
        """Return a running broker."""
        if name not in self._running:
            broker = self._stack.enter_context(self._start(name))
            self._check(name, broker)
            self._running[name] = broker
        return self._running[name]

    def idle_mib(self, name: BrokerName) -> float:
        """Start one more broker, ask nothing of it, return its size."""
        with self._start(name) as broker:
            return resident_mib(broker.pid)

    def start_seconds(self, name: BrokerName) -> float:
        """Start one more broker, return how long it took until it was ready."""
        began = time.perf_counter()
        with self._start(name):
            return time.perf_counter() - began

    @cached_property
    def sources(self) -> Path:
        """What brokers run from."""
        return copy_sources(self.directory)

    @contextmanager
    def _start(self, name: BrokerName) -> Iterator[Broker]:
        with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=self.directory) as sockets:
            socket_dir = Path(sockets)
            socket_dir.chmod(0o755)
            root = self._root_of(name)
            if name in {"floor", "floor-walk"}:
                with start_floor(self.floor_program, socket_dir, root) as broker:
                    yield broker
            elif name == "inlined":
                with start_inlined(self.python, socket_dir, root) as broker:
                    yield broker
            else:
                if name in {"fdbroker-rules-10", "fdbroker-rules-10000"}:
                    policy = make_many_rules(root, int(name.rpartition("-")[2]))
                elif name == "fdbroker-scan":
                    policy = make_policy_for_scans(root)
                else:
                    policy = make_policy(root, copies=name == "fdbroker-copies")
                audit = self.audit_file if name == "fdbroker-audit" else None
                with start_fdbroker(policy, self.sources, socket_dir, audit) as broker:
                    yield broker

    def _root_of(self, name: BrokerName) -> Path:
        if name == "fdbroker-large":
            return self.large[0]
        walks = {"floor-walk", "fdbroker-walk", "fdbroker-scan"}
        return self.walked.root if name in walks else self.tree.root

    def _check(self, name: BrokerName, broker: Broker) -> None:
        """See that a broker gives the right files, and fdbroker those of its policy only.

        A broker that hands out the wrong ones, or anything to anybody, can be very fast.
        """
        if name in {"floor-walk", "fdbroker-walk"}:
            self._check_walk(name, broker)
            return
        if name in {"fdbroker-large", "fdbroker-scan"}:  # its clients look at what they get
            return
        batch = 1 if name == "inlined" else _CHECK_BATCH
        every = Request(broker.socket, self.tree.everything, batch, self.tree.files, read=True)
        found = measure(client_command(self.client_program, CLIENT_UID, every))
        if found.checksum != self.tree.checksum:
            raise BenchmarkError(f"{name} gave other files than it was asked for")
        if name in {"floor", "inlined"}:
            return
        for uid, paths, what in (
            (STRANGER_UID, self.tree.everything, "a file to a uid that no rule names"),
            (CLIENT_UID, self.tree.forbidden, "a file that a rule denies"),
        ):
            one = Request(broker.socket, paths, batch=1, opens=1)
            if not is_refused(client_command(self.client_program, uid, one)):
                raise BenchmarkError(f"{name} did not refuse {what}")

    def _check_walk(self, name: BrokerName, broker: Broker) -> None:
        """See that a walk hands over all files, and fdbroker none to whom its policy does not name."""
        start = self.walked.root
        found = measure(walk_command(self.client_program, CLIENT_UID, broker.socket, start, read=True))
        if (found.opens, found.checksum) != (self.walked.files, self.walked.checksum):
            raise BenchmarkError(f"{name} gave other files than there are")
        stranger = walk_command(self.client_program, STRANGER_UID, broker.socket, start)
        if name == "fdbroker-walk" and not is_refused(stranger):
            raise BenchmarkError(f"{name} did not refuse a walk to a uid that no rule names")
