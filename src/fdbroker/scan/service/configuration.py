"""What scand.yaml says, read as strictly as a policy: each problem with its place and its cure."""

from __future__ import annotations

import ipaddress
import os
import re
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, cast, get_args

from fdbroker.clamd.replies import Unscanned
from fdbroker.client.blocking import DEFAULT_SOCKET
from fdbroker.config.clients import ClientReader
from fdbroker.config.errors import ProblemList, quoted
from fdbroker.config.identities import Lookups, SystemLookups
from fdbroker.config.reader import Reader
from fdbroker.config.scalars import (
    ScalarError,
    parse_count,
    parse_duration,
    parse_path,
    parse_size,
)
from fdbroker.config.schema import NAME_PATTERN
from fdbroker.config.sources import read_policy_file
from fdbroker.config.structures import UNSET, Meta, Structure, UnsetType
from fdbroker.config.yaml_tree import List, Mapping, Node, Text, parse_yaml
from fdbroker.scan.engine import EngineError
from fdbroker.scan.options import OptionsError, values_of_words
from fdbroker.scan.plugins import Configured, configure, options_type
from fdbroker.scan.pool import MOST_JOBS

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Mapping as AnyMapping

DEFAULT_CONFIGURATION = "/etc/fdbroker/scand.yaml"
VERSION = 1

Protocol = Literal["clamd", "scan"]
Log = Literal["plain", "clamd"]

_NAME = re.compile(NAME_PATTERN)


class _File(Structure):
    version: int
    broker: str | UnsetType = UNSET
    listeners: dict[str, Any] | UnsetType = UNSET
    engines: dict[str, Any] | UnsetType = UNSET
    accept: list[str] | UnsetType = UNSET
    workers: int | UnsetType = UNSET
    spare_workers: int | UnsetType = UNSET
    files_per_worker: int | UnsetType = UNSET
    timeout: str | UnsetType = UNSET
    max_size: str | UnsetType = UNSET
    max_copy: str | UnsetType = UNSET
    stream_memory: str | UnsetType = UNSET
    queue: dict[str, Any] | UnsetType = UNSET
    check_databases: str | UnsetType = UNSET
    may_renew: dict[str, Any] | UnsetType = UNSET
    may_stop: dict[str, Any] | UnsetType = UNSET
    log: str | UnsetType = UNSET
    tcp: dict[str, Any] | UnsetType = UNSET


class _Clamd(Structure):
    max_stream: str | UnsetType = UNSET
    command_timeout: str | UnsetType = UNSET
    read_timeout: str | UnsetType = UNSET
    write_timeout: str | UnsetType = UNSET
    unscanned: str | UnsetType = UNSET


class _Listener(_Clamd):
    protocol: Annotated[str, Meta(description="What its clients speak.")]


class _Tcp(_Clamd):
    address: str | UnsetType = UNSET
    port: int | UnsetType = UNSET
    connections: int | UnsetType = UNSET


class _Queue(Structure):
    per_client: int | UnsetType = UNSET
    total: int | UnsetType = UNSET


class _Users(Structure):
    user: list[str] | UnsetType = UNSET


class Limits(NamedTuple):
    """Of files that wait or are under way: `per_client` of one connection, `total` of all."""

    per_client: int = 256
    total: int = 4096


class Listener(NamedTuple):
    """What is spoken on a listener. Sizes in bytes, times in seconds; all but the first are clamd's alone.

    `max_stream`: of one INSTREAM. `command_timeout`: until the first command is there; `read_timeout`: until
    the next one, or more of a stream. `write_timeout`: for a client that does not read what it was told.
    `unscanned`: what is said of what exceeds a limit, is encrypted or can't be unpacked.
    """

    protocol: str = "scan"
    max_stream: int = 100 << 20
    command_timeout: float = 30.0
    read_timeout: float = 120.0
    write_timeout: float = 600.0
    unscanned: Unscanned = "error"


class Tcp(NamedTuple):
    """A TCP port for clients of clamd, of this machine alone.

    `port`: None: the service manager passes the socket, and `address` counts for nothing. `connections`: most
    at a time.
    """

    address: str = "127.0.0.1"
    port: int | None = None
    connections: int = 64
    speaks: Listener = Listener("clamd")


class Configuration(NamedTuple):
    """What the service is to do. Sizes in bytes, times in seconds.

    `listeners`: by their names in the policy. `accept` is in the options of the engines. `stream_memory`: of
    all that clients stream. `may_renew`, `may_stop`: uids.
    """

    engines: tuple[Configured, ...]
    broker: str = DEFAULT_SOCKET
    listeners: AnyMapping[str, Listener] = {"scan": Listener()}
    workers: int = 1
    spare_workers: int = 1
    files_per_worker: int = 1000
    timeout: float = 300.0
    max_size: int | None = None
    max_copy: int = 64 << 20
    stream_memory: int = 512 << 20
    limits: Limits = Limits()
    check_databases: float = 60.0
    may_renew: frozenset[int] = frozenset({0})
    may_stop: frozenset[int] = frozenset()
    log: str = "plain"
    tcp: Tcp | None = None
    openings: int = 32  # requests whose files are opened at a time; follows from the descriptors there may be


def load_configuration(path: str, *, dev: bool = False, lookups: Lookups | None = None) -> Configuration:
    """Read a configuration that only root can have written.

    With `dev` the user who runs this is as good as root.

    Raises:
        ConfigError: it can't be read, others may have written it, or it has problems: all that were found.

    """
    return read_configuration(read_policy_file(path, dev=dev), path, lookups or SystemLookups())


def read_configuration(text: bytes, filename: str, lookups: Lookups) -> Configuration:
    """Return what a text says. `filename` is for messages.

    Raises:
        ConfigError: it has problems; all that were found.

    """
    problems = ProblemList(filename)
    reader = Reader(problems)
    tree = parse_yaml(text, problems)
    configuration = None
    if tree is not None:
        mapping = reader.mapping(tree, "the configuration", "begin with 'version: 1'")
        if mapping is not None:
            configuration = _Whole(reader, mapping, ClientReader(reader, lookups)).read()
    problems.raise_if_any()
    if configuration is None:  # pragma: no cover - nothing is left out without a problem
        raise AssertionError("a configuration was not read and no problem was noted")
    return configuration


_ADDRESSES = "write 127.0.0.1 or ::1"


def _loopback(text: str) -> str:
    """Return an address that this machine alone can reach, as the kernel writes it."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        raise ScalarError(f"{quoted(text)} is no address", _ADDRESSES) from None
    if not address.is_loopback:
        raise ScalarError(
            f"{quoted(text)} is no loopback address, and nobody is asked who they are", _ADDRESSES
        )
    return str(address)


class _Whole:
    def __init__(self, reader: Reader, mapping: Mapping, clients: ClientReader) -> None:
        self._reader = reader
        self._mapping = mapping
        self._clients = clients
        self._found = reader.entries(mapping, "", _File)

    def read(self) -> Configuration:
        found = self._found
        version = self._reader.parsed(found.get("version"), "version", parse_count, "write version: 1")
        if version not in {None, VERSION}:
            self._reader.add(found["version"].mark, f"version {version} is not known", "write version: 1")
        usual = Configuration(())
        cpus = len(os.sched_getaffinity(0))
        workers = self._count("workers", range(1, MOST_JOBS + 1), cpus)
        return usual._replace(
            engines=self._engines(),
            broker=self._reader.parsed(found.get("broker"), "broker", parse_path, "write its socket's path")
            or usual.broker,
            listeners=self._listeners() or usual.listeners,
            workers=workers,
            spare_workers=self._count("spare_workers", range(MOST_JOBS + 1), workers),
            files_per_worker=self._count("files_per_worker", range(1, 1_000_001), usual.files_per_worker),
            timeout=float(self._duration("timeout", range(1, 86401), int(usual.timeout))),
            max_size=self._size("max_size"),
            max_copy=self._size("max_copy") or usual.max_copy,
            stream_memory=self._size("stream_memory") or usual.stream_memory,
            limits=self._limits(),
            check_databases=float(
                self._duration("check_databases", range(1, 86401), int(usual.check_databases))
            ),
            may_renew=usual.may_renew | self._users("may_renew"),
            may_stop=self._users("may_stop"),
            log=self._reader.choice(found.get("log"), "log", get_args(Log)) or usual.log,
            tcp=self._tcp(),
        )

    def _limits(self) -> Limits:
        mapping = self._reader.mapping(self._found.get("queue"), "queue", "write per_client, total or both")
        found = {} if mapping is None else self._reader.entries(mapping, "queue", _Queue)
        usual = Limits()
        return Limits(
            self._count("queue: per_client", range(2, 8193), usual.per_client, found.get("per_client")),
            self._count("queue: total", range(16, 1_000_001), usual.total, found.get("total")),
        )

    def _users(self, what: str) -> frozenset[int]:
        mapping = self._reader.mapping(self._found.get(what), what, "write {user: NAME}")
        if mapping is None:
            return frozenset()
        node = self._reader.entries(mapping, what, _Users).get("user")
        names = self._clients.names(node, f"{what}: user")
        return frozenset(self._clients.uids(names, f"{what}: user"))

    def _listeners(self) -> dict[str, Listener]:
        cure = "write names of the policy's listeners, as in 'scan: {protocol: scan}'"
        mapping = self._reader.mapping(self._found.get("listeners"), "listeners", cure)
        listeners = {}
        for name, entry in ({} if mapping is None else mapping.entries).items():
            what = f"listeners: {name}"
            if not _NAME.fullmatch(name):
                self._reader.add(entry.key.mark, f"{what}: {quoted(name)} is not a name of a listener", cure)
            inner = self._reader.mapping(entry.value, what, "write {protocol: scan} or {protocol: clamd}")
            if inner is not None:
                listeners[name] = self._listener(what, inner)
        return listeners

    def _listener(self, what: str, mapping: Mapping) -> Listener:
        found = self._reader.entries(mapping, what, _Listener)
        protocol = self._reader.choice(found.get("protocol"), f"{what}: protocol", get_args(Protocol))
        if protocol != "scan":
            # Also where it is neither: what else is there is for clamd, and the protocol is the one mistake.
            return self._clamd(what, found)
        for name in found:
            if name != "protocol":
                text = f"{what}: {name}: it is for the protocol clamd"
                self._reader.add(mapping.entries[name].key.mark, text, "remove it")
        return Listener(protocol)

    def _clamd(self, what: str, found: AnyMapping[str, Node]) -> Listener:
        usual = Listener("clamd")

        def seconds(name: str, fallback: float) -> float:
            node = found.get(name)
            return float(
                self._within(f"{what}: {name}", node, parse_duration, range(1, 86401), int(fallback))
            )

        unscanned = self._reader.choice(found.get("unscanned"), f"{what}: unscanned", get_args(Unscanned))
        return usual._replace(
            max_stream=self._reader.parsed(
                found.get("max_stream"), f"{what}: max_stream", parse_size, "write a size, as in 100MiB"
            )
            or usual.max_stream,
            command_timeout=seconds("command_timeout", usual.command_timeout),
            read_timeout=seconds("read_timeout", usual.read_timeout),
            write_timeout=seconds("write_timeout", usual.write_timeout),
            unscanned=cast("Unscanned", unscanned or usual.unscanned),
        )

    def _tcp(self) -> Tcp | None:
        node = self._found.get("tcp")
        cure = "write {} for the socket of fdbroker-clamd-tcp.socket, or a port, as in {port: 3310}"
        mapping = None if node is None else self._reader.mapping_or_empty(node, "tcp", cure)
        if mapping is None:
            return None
        found = self._reader.entries(mapping, "tcp", _Tcp)
        usual = Tcp()
        port = found.get("port")
        return Tcp(
            self._reader.parsed(found.get("address"), "tcp: address", _loopback, _ADDRESSES) or usual.address,
            None if port is None else self._count("tcp: port", range(1, 65536), 0, port),
            self._count("tcp: connections", range(1, 1025), usual.connections, found.get("connections")),
            self._clamd("tcp", found),
        )

    def _engines(self) -> tuple[Configured, ...]:
        cure = "write names with options, as in 'libclamav: {}'"
        mapping = self._reader.mapping(self._found.get("engines"), "engines", cure)
        node = self._found.get("accept")
        nothing = isinstance(node, List) and not node.items
        accept = self._reader.texts(None if nothing else node, "accept", "write kinds, as in [encrypted]")
        if mapping is None:
            if accept:
                self._reader.add(
                    accept[0].mark,
                    "accept: no engine here looks into containers",
                    "remove it, or add libclamav",
                )
            return () if "engines" in self._found else (configure("hashes"),)
        engines = []
        accepting = False
        for name, entry in mapping.entries.items():
            what = f"engines: {name}"
            options = self._reader.mapping_or_empty(entry.value, what, "write options, or {}")
            try:
                kind = options_type(name)
                words = [] if options is None else list(self._words(options, what))
                if "accept" in kind.__dataclass_fields__:  # type: ignore[attr-defined]
                    accepting = True
                    words += [("accept", text.value) for text in accept]
                engines.append(configure(name, values_of_words(kind, words, where=f"engine {name}")))
            except (EngineError, OptionsError) as error:
                reason, _, cure = str(error).partition("; did you mean")
                cure = f"did you mean{cure}" if cure else "see docs/scanning.md for its options"
                self._reader.add(entry.key.mark, reason, cure)
        if accept and not accepting:
            self._reader.add(
                accept[0].mark, "accept: no engine here looks into containers", "remove it, or add libclamav"
            )
        return tuple(engines)

    def _words(self, options: Mapping, what: str) -> list[tuple[str, str]]:
        words = []
        for name, entry in options.entries.items():
            node: Node = entry.value
            if isinstance(node, List):
                words += [
                    (name, text.value) for text in self._reader.texts(node, f"{what}: {name}", "write texts")
                ]
            elif isinstance(node, Text):
                words.append((name, node.value))
            else:
                self._reader.add(entry.key.mark, f"{what}: {name} is a mapping", "write a value, or a list")
        return words

    def _count(self, what: str, allowed: range, usual: int, node: Node | None = None) -> int:
        node = self._found.get(what) if node is None else node
        return self._within(what, node, parse_count, allowed, usual)

    def _duration(self, what: str, allowed: range, usual: int) -> int:
        return self._within(what, self._found.get(what), parse_duration, allowed, usual)

    def _size(self, what: str) -> int | None:
        return self._reader.parsed(self._found.get(what), what, parse_size, "write a size, as in 100MiB")

    def _within(
        self, what: str, node: Node | None, parse: Callable[[str], int], allowed: range, usual: int
    ) -> int:
        cure = f"write one from {allowed[0]} to {allowed[-1]}"
        value = self._reader.parsed(node, what, parse, cure)
        if value is None or node is None:
            return usual
        if value not in allowed:
            self._reader.add(node.mark, f"{what}: {value} is out of bounds", cure)
        return value
