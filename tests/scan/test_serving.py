"""The scan service in this process, with a fake broker: what those who come by it, and by TCP, are told.

Nothing here needs root, and what it reaches is measured: the service is another process elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import io
import os
import signal
import socket
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import pytest

from fdbroker import aio
from fdbroker.broker.notify import Notifier
from fdbroker.client import DeniedError
from fdbroker.scan.client import ScanService, ServiceGoneError, ServiceRefusedError
from fdbroker.scan.plugins import configure
from fdbroker.scan.pool import Pool
from fdbroker.scan.service import serving
from fdbroker.scan.service.configuration import Listener, read_configuration
from fdbroker.scan.service.serving import serve
from fdbroker.scan.service.tcp import listening_socket
from fdbroker.scan.service.watch import run
from fdbroker.testing import FakeBroker
from fdbroker.wire import messages
from tests.clamd.talks import chunks
from tests.config.fake_lookups import FakeLookups
from tests.processes import wait_until
from tests.sandbox.confined import started_ids
from tests.scan.descriptors import EICAR, EICAR_NAME
from tests.scan.running_scand import reasons

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

CONFIGURATION = """
version: 1
broker: {directory}/broker
listeners: {{scan: {{protocol: scan}}, clamd: {{protocol: clamd}}}}
tcp: {{port: {port}}}
workers: 1
spare_workers: 0
"""
FILES = {"/tree/bad": EICAR, "/tree/sub/clean": b"nothing bad", "/tree/sub/empty": b""}
FOUND = f"{EICAR_NAME} FOUND"


class Served(NamedTuple):
    """What a client may use: the broker, to be handed over by it, and the port."""

    broker: FakeBroker
    port: int

    def clamd(self, *parts: bytes, uid: int = 1000) -> str:
        """Return all that a client of clamd hears that says this."""
        with self.broker.hand_over("clamd", uid=uid) as sock:
            return said(sock, *parts)

    def scan(self, uid: int = 1000) -> ScanService:
        """Return a connection of a client of the service's own protocol."""
        return ScanService(self.broker.hand_over("scan", uid=uid, kind=socket.SOCK_SEQPACKET), 20.0)


def said(sock: socket.socket, *parts: bytes) -> str:
    """Say it, and return what is said until the other side closes."""
    sock.settimeout(20)
    for part in parts:
        sock.sendall(part)
    heard = b""
    while more := sock.recv(65536):
        heard += more
    return heard.decode()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool([configure("hashes")], ids=started_ids(), in_background=True) as started:
        started.start()
        yield started


def serve_while(client: Callable[[Served], None], pool: Pool, directory: Path) -> list[str]:
    """Run the service while a client in another thread does something, and return what its manager was told.

    It ends by SIGTERM, as a service does.
    """
    port = free_port()
    text = CONFIGURATION.format(directory=directory, port=port)
    configuration = read_configuration(text.encode(), "scand.yaml", FakeLookups())
    manager, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    tcp = listening_socket(configuration.tcp, {})
    assert tcp is not None

    def act(broker: FakeBroker) -> None:
        try:
            client(Served(broker, port))
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    async def play(notifier: Notifier, broker: FakeBroker) -> None:
        service = serve(configuration, pool, pool.versions(), notifier, tcp)
        await asyncio.gather(service, asyncio.to_thread(act, broker))

    with manager, tcp, FakeBroker(FILES, socket_path=directory / "broker") as broker:
        with contextlib.closing(Notifier(ours.detach())) as notifier:
            run(play(notifier, broker))
        told = []
        while message := manager.recv(4096).decode():
            told += message.splitlines()
    return told


def test_clients_of_clamd_hear_what_clamd_would_say(pool: Pool, tmp_path: Path) -> None:
    def client(served: Served) -> None:
        assert served.clamd(b"zPING\0") == "PONG\0"
        assert served.clamd(b"nVERSION\n") == "ClamAV 0\n"
        assert served.clamd(b"zSCAN /tree/bad\0") == f"/tree/bad: {FOUND}\0"
        assert served.clamd(b"zSCAN /tree/sub/clean\0") == "/tree/sub/clean: OK\0"
        assert served.clamd(b"zCONTSCAN /tree\0") == f"/tree/bad: {FOUND}\0"
        assert served.clamd(b"nMULTISCAN /tree/sub\n") == "/tree/sub: OK\n"
        assert served.clamd(b"zSCAN /none\0") == (
            "/none: File path check failure: No such file or directory. ERROR\0"
        )
        assert served.clamd(b"zINSTREAM\0", chunks(EICAR[:9], EICAR[9:])) == f"stream: {FOUND}\0"
        session = served.clamd(b"zIDSESSION\0zSCAN /tree/bad\0zPING\0zINSTREAM\0" + chunks(b"x") + b"zEND\0")
        assert sorted(session.split("\0")) == ["", f"1: /tree/bad: {FOUND}", "2: PONG", "3: stream: OK"]
        assert "THREADS" in served.clamd(b"zSTATS\0")
        assert served.clamd(b"zNONSENSE\0") == "UNKNOWN COMMAND\0"

    serve_while(client, pool, tmp_path)


def test_that_nobody_reads_its_log_keeps_no_answer_from_a_client(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NobodyReads(io.StringIO):
        def write(self, _text: str) -> int:
            raise BrokenPipeError

    def client(served: Served) -> None:
        monkeypatch.setattr(sys, "stderr", NobodyReads())
        try:
            for _ in range(2):
                assert served.clamd(b"zSCAN /tree/bad\0") == f"/tree/bad: {FOUND}\0"
            assert served.clamd(b"zINSTREAM\0", chunks(EICAR)) == f"stream: {FOUND}\0"
        finally:
            monkeypatch.undo()

    serve_while(client, pool, tmp_path)


def test_a_descriptor_is_scanned_whoever_may_open_the_file_by_its_name(pool: Pool, tmp_path: Path) -> None:
    (tmp_path / "bad").write_bytes(EICAR)

    def client(served: Served) -> None:
        for mode in ("rb", "r+b"):  # to be copied first, as it could be written meanwhile
            with open(tmp_path / "bad", mode) as file, served.scan() as service:
                scanned = service.scan_descriptor(file.fileno())
                assert scanned.verdict.verdict == "infected", mode
            with open(tmp_path / "bad", mode) as file, served.broker.hand_over("clamd") as sock:
                socket.send_fds(sock, [b"zFILDES\0\0"], [file.fileno()])
                assert said(sock).endswith(f": {FOUND}\0")

    serve_while(client, pool, tmp_path)


def test_clients_of_its_own_protocol_have_paths_and_trees_scanned(pool: Pool, tmp_path: Path) -> None:
    def client(served: Served) -> None:
        with served.scan() as service:
            assert service.scan_path("/tree/bad").verdict.verdict == "infected"
            assert reasons(service.scan_paths([b"/tree/bad", b"/tree/sub/clean", b"/none"])) == {
                b"/tree/bad": "infected",
                b"/tree/sub/clean": "clean",
                b"/none": "not_found",
            }
            assert reasons(service.scan_tree(b"/tree")) == {
                b"/tree/bad": "infected",
                b"/tree/sub/clean": "clean",
                b"/tree/sub/empty": "clean",
            }
            status = service.status()
            assert status["files_scanned"] == 6
            assert status["listeners"] == {
                "scan": "serving",
                "clamd": "serving",
                f"tcp 127.0.0.1:{served.port}": "serving",
            }

    serve_while(client, pool, tmp_path)


def test_who_comes_by_tcp_has_streams_scanned_and_nothing_opened(pool: Pool, tmp_path: Path) -> None:
    def client(served: Served) -> None:
        def ask(*parts: bytes) -> str:
            with socket.create_connection(("127.0.0.1", served.port)) as sock:
                return said(sock, *parts)

        assert ask(b"zPING\0") == "PONG\0"
        assert ask(b"zINSTREAM\0", chunks(EICAR)) == f"stream: {FOUND}\0"
        assert ask(b"zSCAN /tree/bad\0") == "COMMAND UNAVAILABLE\0"
        asked = {type(request) for request in served.broker.requests}
        assert asked <= {messages.Hello, messages.ServeRequest}  # other listeners may just be being made

    serve_while(client, pool, tmp_path)


def test_clients_of_a_broker_that_goes_are_told_and_its_successor_is_served(
    pool: Pool, tmp_path: Path
) -> None:
    def client(served: Served) -> None:
        with served.scan() as service:
            served.broker.disconnect()
            with pytest.raises(ServiceGoneError, match="connect again"):
                wait_until(lambda: not service.status(), "it is told")
        assert served.clamd(b"zPING\0") == "PONG\0"

    serve_while(client, pool, tmp_path)


def test_its_manager_is_told_when_it_is_ready_loads_anew_and_stops(pool: Pool, tmp_path: Path) -> None:
    def client(served: Served) -> None:
        with served.scan(uid=0) as service:
            os.kill(os.getpid(), signal.SIGHUP)
            wait_until(lambda: service.status()["renewed"] == 1, "the engines are loaded anew")
            assert service.scan_path("/tree/bad").verdict.verdict == "infected"
            service.renew()
        with served.scan() as service, pytest.raises(ServiceRefusedError, match="see `may_renew`"):
            service.renew()

    told = serve_while(client, pool, tmp_path)
    states = [line for line in told if line in {"READY=1", "RELOADING=1", "STOPPING=1"}]
    assert states == ["READY=1", "RELOADING=1", "READY=1", "STOPPING=1"]


def test_a_socket_of_the_wrong_type_is_told_with_its_cure(
    pool: Pool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def client(served: Served) -> None:
        with served.broker.hand_over("scan") as sock:
            assert said(sock) == ""

    serve_while(client, pool, tmp_path)
    assert "scan is not spoken on this type of socket; write type: seqpacket" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "pauses"),
    [
        (ConnectionRefusedError("of a test"), [0.1, 0.2, 0.5, 1.0, 2.0, 2.0, 2.0, 2.0]),
        (DeniedError(errno.EACCES, "of a test", b"scan"), [0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 10.0]),
    ],
    ids=["can't be reached", "refuses"],
)
def test_a_broker_that_refuses_is_asked_less_often_than_one_that_is_gone(
    monkeypatch: pytest.MonkeyPatch, error: OSError, pauses: list[float]
) -> None:
    """Each refusal is on record."""
    paused: list[float] = []

    async def connect(_path: str) -> NoReturn:
        raise error

    async def sleep(seconds: float) -> None:
        paused.append(seconds)
        if len(paused) == len(pauses):
            raise asyncio.CancelledError

    monkeypatch.setattr(aio, "connect", connect)
    monkeypatch.setattr(asyncio, "sleep", sleep)
    monkeypatch.setattr(serving, "say", lambda _: None)
    core = SimpleNamespace(configuration=SimpleNamespace(broker="broker"), connections={}, listeners={})
    with contextlib.closing(Notifier(None, None)) as notifier, pytest.raises(asyncio.CancelledError):
        asyncio.run(serving._serve_listener(core, "scan", Listener("scan"), notifier))  # type: ignore[arg-type]
    assert paused == pauses
