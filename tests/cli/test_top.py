"""`fdbroker top`: rates are what clients did, and the terminal is given back however it ends."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from fdbroker.cli.top import Client, Sample, _difference, _order, _Seen, _sorted, _unit_of, _write_plain
from fdbroker.wire.client import encode_open
from tests.broker.speaking import Speaker
from tests.cli.commands import command, environment, run_as, run_here, run_on_terminal, start
from tests.running_broker import CLIENT_UID, policy, reachable_directory, running_broker

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.for_other_users import ForOtherUsers
    from tests.running_broker import RunningBroker

root = pytest.mark.root
OTHER_SCREEN, FIRST_SCREEN = b"\x1b[?1049h", b"\x1b[?1049l"
HIDE_CURSOR, SHOW_CURSOR = b"\x1b[?25l", b"\x1b[?25h"


class Served(NamedTuple):
    """A running broker, its control socket and its tree."""

    broker: RunningBroker
    control: str
    tree: Path

    def top(self, *options: str) -> tuple[str, ...]:
        """Return the command's arguments."""
        return ("top", "--interval", "0.05", "--control", self.control, *options)


@contextlib.contextmanager
def serving(*, stop: bool = True) -> Iterator[Served]:
    """Run a broker; with `stop` False it may have been killed at the end."""
    with reachable_directory() as directory:
        tree = directory / "tree"
        tree.mkdir()
        (tree / "file").write_bytes(b"x")
        control = str(directory / "control")
        with running_broker(directory, policy(tree), f"--control={control}", stop=stop) as broker:
            yield Served(broker, control, tree)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as made:
        yield made


@contextlib.contextmanager
def asking(served: Served) -> Iterator[None]:
    """Have a client that asks all the time for two files, one of which there is not."""
    enough = threading.Event()

    def ask() -> None:
        with Speaker.connect(served.broker.socket) as speaker:
            while not enough.is_set():
                speaker.open(bytes(served.tree / "file"), bytes(served.tree / "missing"))

    client = threading.Thread(target=ask)
    client.start()
    try:
        yield
    finally:
        enough.set()
        client.join()


@root
def test_json_has_a_line_for_each_sample_with_what_each_client_did(served: Served) -> None:
    with asking(served):
        result = run_here(*served.top("--count", "3", "--json"))
    assert (result.returncode, result.stderr) == (0, "")
    samples = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(samples) == 3
    sample = samples[-1]
    assert sample.keys() == {
        "time", "seconds", "pid", "generation", "connections", "in_flight", "walks", "requests_per_s",
        "given_per_s", "denied_per_s", "limits_hit", "clients",
    }  # fmt: skip
    [client] = sample["clients"]
    assert client.keys() == {
        "connection", "pid", "uid", "user", "unit", "transport", "requests_per_s", "given_per_s",
        "denied_per_s", "in_flight", "walks", "unsent_replies",
    }  # fmt: skip
    assert (client["pid"], client["user"], client["transport"]) == (os.getpid(), "root", "seqpacket")
    assert client["requests_per_s"] > 0
    # Each request is for one file that is given and one that is not.
    assert client["given_per_s"] == client["denied_per_s"] == client["requests_per_s"]
    assert sample["given_per_s"] > 0
    assert sample["denied_per_s"] > 0


@root
def test_without_a_terminal_samples_are_written_one_below_the_other(served: Served) -> None:
    with asking(served):
        result = run_here(*served.top("--count", "2"))
    assert (result.returncode, result.stderr) == (0, "")
    assert "\x1b" not in result.stdout
    first, second, rest = result.stdout.split("\n\n")
    assert rest == ""
    for text in (first, second):
        lines = text.splitlines()
        assert lines[0].startswith(f"broker {served.broker.pid}, generation 1, ")
        assert lines[3].split() == [
            "USER", "PID", "UNIT", "TRANSPORT", "REQ/S", "GIVEN/S", "DENIED/S", "IN", "FLIGHT", "WALKS",
        ]  # fmt: skip
        assert lines[4].split()[:2] == ["root", str(os.getpid())]


@root
def test_on_a_terminal_the_screen_is_drawn_anew_and_given_back(served: Served) -> None:
    with asking(served):
        status, shown = run_on_terminal(*served.top("--count", "2"))
    assert status == 0
    assert shown.startswith(OTHER_SCREEN)
    assert shown.index(HIDE_CURSOR) < shown.index(b"DENIED/S") < shown.index(SHOW_CURSOR)
    assert shown.endswith(FIRST_SCREEN)


@root
@pytest.mark.parametrize("changes", [{"TERM": "dumb"}], ids=["dumb"])
def test_on_a_terminal_that_can_nothing_lines_are_written(served: Served, changes: dict[str, str]) -> None:
    status, shown = run_on_terminal(*served.top("--count", "1"), **changes)
    assert status == 0
    assert b"\x1b" not in shown
    assert b"USER" in shown


def interrupted(served: Served, number: int, *options: str) -> tuple[int, bytes]:
    """Run it on a terminal until the first sample is there, send a signal; return status and screen."""
    master, terminal = os.openpty()
    env = environment(TERM="xterm", COLUMNS="100")
    process = start(*served.top(*options), env=env, stdout=terminal, stderr=terminal)
    os.close(terminal)
    shown, sent = b"", False
    with contextlib.suppress(OSError):  # EIO: it has ended
        while select.select([master], [], [], 30)[0] and (data := os.read(master, 65536)):
            shown += data
            if not sent and b"DENIED/S" in shown:
                process.send_signal(number)
                sent = True
    os.close(master)
    assert sent
    return process.wait(timeout=30), shown


@root
@pytest.mark.parametrize(
    ("number", "options", "status"),
    [
        (signal.SIGINT, (), 0),
        (signal.SIGINT, ("--count", "100000"), 130),
        (signal.SIGTERM, (), 143),
        (signal.SIGHUP, (), 129),
    ],
)
def test_a_signal_ends_it_and_the_terminal_is_as_before(
    served: Served, number: int, options: tuple[str, ...], status: int
) -> None:
    ended, shown = interrupted(served, number, *options)
    assert ended == status
    assert shown.count(OTHER_SCREEN) == shown.count(FIRST_SCREEN) == 1
    assert shown.rindex(SHOW_CURSOR) > shown.rindex(HIDE_CURSOR)
    assert b"Traceback" not in shown


@root
def test_a_broker_that_ends_is_told_on_the_first_screen() -> None:
    with serving(stop=False) as served:
        ended, shown, said = killed_meanwhile(served)
    assert ended == 2
    assert shown.endswith(FIRST_SCREEN)
    assert "the broker closed the connection" in said


def killed_meanwhile(served: Served) -> tuple[int, bytes, str]:
    """Run it until the first sample is there, and kill the broker; return status, screen and errors."""
    master, terminal = os.openpty()
    process = subprocess.Popen(
        command(*served.top()),
        env=environment(TERM="xterm"),
        stdout=terminal,
        stderr=subprocess.PIPE,
        cwd="/",
    )
    os.close(terminal)
    shown, asked = b"", False
    with contextlib.suppress(OSError):
        while select.select([master], [], [], 30)[0] and (data := os.read(master, 65536)):
            shown += data
            if not asked and b"DENIED/S" in shown:
                served.broker.process.kill()
                asked = True
    os.close(master)
    assert process.stderr is not None
    said = process.stderr.read().decode()
    process.stderr.close()
    return process.wait(timeout=30), shown, said


@root
def test_others_than_admins_are_told_whom_it_is_for(served: Served, others: ForOtherUsers) -> None:
    result = run_as(CLIENT_UID, others, *served.top("--count", "1"))
    assert (result.returncode, result.stdout) == (2, "")
    assert "this is for root and those whom the policy names as admins" in result.stderr


@pytest.mark.parametrize(
    "options", [("--interval", "0"), ("--count", "0"), ("--sort", "age"), ("--rows", "0")]
)
def test_wrong_use_is_said(options: tuple[str, ...]) -> None:
    result = run_here("top", *options)
    assert (result.returncode, result.stdout) == (2, "")
    assert options[0] in result.stderr


@root
def test_no_more_clients_are_shown_than_asked_for_in_the_order_asked_for(served: Served) -> None:
    with contextlib.ExitStack() as stack:
        speakers = [stack.enter_context(Speaker.connect(served.broker.socket)) for _ in range(4)]
        speakers[2].sock.send(encode_open(7, [bytes(served.tree / "file")] * 5))
        result = run_here(*served.top("--count", "1", "--json", "--sort", "in-flight", "--rows", "2"))
        answer = speakers[2].receive()
        assert answer is not None
        answer.descriptors.close()
    clients = json.loads(result.stdout)["clients"]
    assert [client["in_flight"] for client in clients] == [5, 0]


# Rates, without a broker


def seen(at: float, *, allowed: int = 0, connections: dict[int, dict[str, Any]] | None = None) -> _Seen:
    status = {
        "pid": 1,
        "generation": 1,
        "walks": 0,
        "totals": {"allowed": allowed, "denied": 0, "connections": 1, "in_flight": 0},
        "requests": [
            {"transport": "stream", "requests": 2 * allowed},
            {"transport": "control", "requests": 9},
        ],
        "limits_hit": [{"limit": "connections", "rule": None, "count": allowed}],
    }
    return _Seen(at, status, connections or {})


def row(requests: int, age: int = 60_000, **changes: object) -> dict[str, Any]:
    return {
        "pid": 0,
        "uid": 0,
        "transport": "stream",
        "age": age,
        "requests": requests,
        "allowed": requests,
        "denied": 0,
        "in_flight": 0,
        "walks": 0,
        "unsent_replies": 0,
    } | changes


def test_rates_are_of_the_time_between_two_looks() -> None:
    before = seen(10.0, allowed=100, connections={1: row(100), 2: row(5)})
    now = seen(12.0, allowed=300, connections={1: row(300), 3: row(10, age=500), 4: row(60, age=30_000)})
    sample = _difference(before, now)
    assert (sample.seconds, sample.given_per_s, sample.requests_per_s, sample.limits_hit) == (
        2,
        100,
        200,
        200,
    )
    # 3 is new; 4 was there, but not among the busiest, and nothing is known of these two seconds alone.
    assert {one.connection: one.requests_per_s for one in sample.clients} == {1: 100, 3: 5, 4: 2}


def test_clients_of_equal_rates_keep_their_places() -> None:
    sample = _difference(seen(1), seen(2, connections={9: row(1), 3: row(1), 5: row(7)}))
    for by, order in (("requests", [5, 3, 9]), ("denied", [3, 5, 9]), ("pid", [3, 5, 9])):
        assert [one.connection for one in sorted(sample.clients, key=lambda one: _order(one, by))] == order


def test_the_unit_of_a_process_that_is_gone_is_not_known() -> None:
    assert _unit_of(1, 0) is None


def test_the_sample_of_the_document_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
    [shown] = re.findall(
        r"^# fdbroker top --count 1 --sort denied\n(.*?)^```$", text, re.MULTILINE | re.DOTALL
    )
    busy = Client(1, 1187, 990, "scanner", "scanner.service", "seqpacket", 5108.5, 81925, 0, 128, 0, 0)
    refused = Client(2, 1201, 989, "indexer", "indexer.service", "seqpacket", 12, 0, 12, 0, 0, 0)
    sample = Sample("2026-11-26T04:43:04Z", 2, 411, 2, 3, 128, 0, 5120.5, 81925, 12, 0, [busy, refused])
    _write_plain(_sorted(sample, "denied", None))
    assert capsys.readouterr().out == shown + "\n"
