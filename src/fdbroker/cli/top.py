"""`fdbroker top`."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import click
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fdbroker.cli import broker
from fdbroker.cli.control import connected
from fdbroker.cli.failure import Failure
from fdbroker.cli.output import flush, write_json, write_line
from fdbroker.config.names import counted, printable, user_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from fdbroker.client.control import Control

EXIT_INTERRUPTED = 128 + signal.SIGINT
_SORTED_BY = ("requests", "given", "denied", "in-flight", "user", "pid")
_LEAST_INTERVAL = 0.05  # seconds
_HEAD = 4  # lines above the clients


class Client(NamedTuple):
    """One connection. What ends in `_per_s` is of the last interval."""

    connection: int
    pid: int
    uid: int
    user: str
    unit: str | None
    transport: str
    requests_per_s: float
    given_per_s: float
    denied_per_s: float
    in_flight: int
    walks: int
    unsent_replies: int


class Sample(NamedTuple):
    """What happened in `seconds`, and what is now. `limits_hit`: how often in that time."""

    time: str
    seconds: float
    pid: int
    generation: int
    connections: int
    in_flight: int
    walks: int
    requests_per_s: float
    given_per_s: float
    denied_per_s: float
    limits_hit: int
    clients: list[Client]

    def as_document(self) -> dict[str, object]:
        """Return it as a JSON object."""
        return self._asdict() | {"clients": [client._asdict() for client in self.clients]}


@click.command("top", short_help="Watch who asks the broker for how much.")
@click.option(
    "--interval",
    type=click.FloatRange(_LEAST_INTERVAL, 3600),
    default=2.0,
    show_default=True,
    metavar="SECONDS",
    help="Time between two samples.",
)
@click.option("--count", type=click.IntRange(1), metavar="N", help="End after N samples.")
@click.option(
    "--sort",
    "sorted_by",
    type=click.Choice(_SORTED_BY),
    default="requests",
    show_default=True,
    help="Which clients come first.",
)
@click.option(
    "--rows",
    type=click.IntRange(1),
    metavar="N",
    help="Show N clients at most.  [default: a screenful; 20 without a terminal; with --json all]",
)
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object per sample (see docs/cli.md).")
@broker.control_option
@broker.socket_option
def command(
    control_path: str | None,
    socket_path: str,  # noqa: ARG001 - says whether the usual control socket is meant
    interval: float,
    count: int | None,
    sorted_by: str,
    rows: int | None,
    *,
    as_json: bool,
) -> int:
    """Watch the running broker: its clients, and requests, given and denied paths per second.

    For root and administrators (admins in the policy file). Each client is a
    connection; of more than 256, those are shown that asked most often since they
    connected. On a terminal the screen is drawn anew, until Ctrl-C; otherwise
    samples are written one below the other. The first comes after one interval.

    \b
    Exit status:   0  the samples were shown, or all until Ctrl-C
                   2  no broker any more, wrong use, or the output could not be written
                 130  interrupted before --count samples were there

    \b
    Examples:  fdbroker top --sort denied
               fdbroker top --interval 10 --count 6 --json | jq .requests_per_s
    """  # noqa: D301 - \b is click's mark for a paragraph that keeps its lines
    with _signals_kept() as signals:
        try:
            with connected(control_path) as connection:
                samples = _samples(connection, interval, count, signals)
                if as_json:
                    for sample in samples:
                        write_json(_sorted(sample, sorted_by, rows).as_document())
                        flush()
                elif sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
                    _show_live(samples, sorted_by, rows)
                else:
                    for sample in samples:
                        _write_plain(_sorted(sample, sorted_by, rows or 20))
        except KeyboardInterrupt:
            return 0 if count is None else EXIT_INTERRUPTED
    return 0


class _Signals:
    """What ends this, kept until it waits: raised anywhere it might be lost, in a finalizer for one.

    A second signal does not wait, so that a terminal or a broker that is stuck can be left.
    """

    def __init__(self) -> None:
        self._readable, self._writable = os.pipe()
        self._arrived: int | None = None

    def keep(self, number: int, _frame: object) -> None:
        """Take a signal."""
        if self._arrived is not None:
            _end_by(number)
        self._arrived = number
        os.write(self._writable, b"\0")

    def wait(self, seconds: float) -> None:
        """Wait; KeyboardInterrupt or SystemExit as soon as a signal has come."""
        select.select([self._readable], [], [], seconds)
        if self._arrived is not None:
            _end_by(self._arrived)

    def close(self) -> None:
        os.close(self._readable)
        os.close(self._writable)


def _end_by(number: int) -> NoReturn:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


@contextlib.contextmanager
def _signals_kept() -> Iterator[_Signals]:
    """Have SIGINT, SIGTERM and SIGHUP give the terminal back before they end this."""
    signals = _Signals()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signals.keep) for number in numbers}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signals.close()


class _Seen(NamedTuple):
    """What the broker said at one time."""

    at: float
    status: dict[str, Any]
    connections: dict[int, dict[str, Any]]

    @property
    def requests(self) -> int:
        """Return how many there were, without those of control sockets, such as ours."""
        return sum(row["requests"] for row in self.status["requests"] if row["transport"] != "control")

    @property
    def limits_hit(self) -> int:
        """Return how often a limit was reached."""
        return sum(row["count"] for row in self.status.get("limits_hit", ()))


def _look(control: Control) -> _Seen:
    status: dict[str, Any] = control.status()
    if "totals" not in status:
        raise Failure("this is for root and those whom the policy names as admins: run it as one of them")
    rows: list[dict[str, Any]] = control.rows("connections")
    ours = os.getpid()
    others = {row["connection"]: row for row in rows if (row["transport"], row["pid"]) != ("control", ours)}
    return _Seen(time.monotonic(), status, others)


def _samples(control: Control, interval: float, count: int | None, signals: _Signals) -> Iterator[Sample]:
    """Yield a sample after each interval."""
    before = _look(control)
    following = before.at
    made = 0
    while count is None or made < count:
        # The next one is not late because this one was.
        following = max(following + interval, time.monotonic())
        signals.wait(max(0.0, following - time.monotonic()))
        now = _look(control)
        yield _difference(before, now)
        before = now
        made += 1


def _difference(before: _Seen, now: _Seen) -> Sample:
    seconds = max(now.at - before.at, 1e-6)
    old, new = before.status["totals"], now.status["totals"]
    clients = []
    for number, row in now.connections.items():
        # One that was not seen before was made since then, or was not among the busiest: then
        # its counts are of its whole age.
        earlier = before.connections.get(number)
        over = seconds if earlier is not None else max(seconds, row["age"] / 1000)
        requests, given, denied = (
            round((row[what] - (0 if earlier is None else earlier[what])) / over, 1)
            for what in ("requests", "allowed", "denied")
        )
        clients.append(
            Client(
                number,
                row["pid"],
                row["uid"],
                user_name(row["uid"]),
                _unit_of(number, row["pid"]),
                row["transport"],
                requests,
                given,
                denied,
                row["in_flight"],
                row["walks"],
                row["unsent_replies"],
            )
        )
    return Sample(
        time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        round(seconds, 3),
        now.status["pid"],
        now.status["generation"],
        new["connections"],
        new["in_flight"],
        now.status["walks"],
        round((now.requests - before.requests) / seconds, 1),
        round((new["allowed"] - old["allowed"]) / seconds, 1),
        round((new["denied"] - old["denied"]) / seconds, 1),
        now.limits_hit - before.limits_hit,
        clients,
    )


@lru_cache(4096)
def _unit_of(_connection: int, pid: int) -> str | None:
    """Return the systemd unit that a process is in now, as far as it can be seen.

    Its pid may be another's by now; once found, it is kept for the connection.
    """
    try:
        with open(f"/proc/{pid}/cgroup", "rb") as file:
            groups = file.read().splitlines()
    except OSError:
        return None
    for group in groups:
        if group.startswith(b"0::"):
            names = [
                name for name in group[3:].split(b"/") if name.endswith((b".service", b".scope", b".socket"))
            ]
            return os.fsdecode(names[-1]) if names else None
    return None


def _sorted(sample: Sample, by: str, most: int | None) -> Sample:
    """Return a sample with the clients in this order, the first `most` of them."""
    return sample._replace(clients=sorted(sample.clients, key=lambda one: _order(one, by))[:most])


def _order(client: Client, by: str) -> tuple[object, int]:
    place = {
        "requests": -client.requests_per_s,
        "given": -client.given_per_s,
        "denied": -client.denied_per_s,
        "in-flight": -client.in_flight,
        "user": client.user,
        "pid": client.pid,
    }[by]
    return place, client.connection


def _head(sample: Sample) -> list[str]:
    asked = (f"{sample.requests_per_s:.1f} requests/s", f"{sample.given_per_s:.1f} given/s")
    not_given = (f"{sample.denied_per_s:.1f} denied/s", f"limits hit {sample.limits_hit}")
    in_flight = f"{counted(sample.in_flight, 'descriptor')} in flight"
    now = (counted(sample.connections, "connection"), in_flight, counted(sample.walks, "walk"))
    return [
        f"broker {sample.pid}, generation {sample.generation}, {sample.time}, over {sample.seconds:.1f} s",
        ", ".join(asked + not_given),
        ", ".join(now),
    ]


_COLUMNS = ("USER", "PID", "UNIT", "TRANSPORT", "REQ/S", "GIVEN/S", "DENIED/S", "IN FLIGHT", "WALKS")
_LEFT = 4  # columns of text; numbers stand to the right


def _cells(client: Client) -> tuple[str, ...]:
    return (
        printable(client.user),
        str(client.pid),
        "-" if client.unit is None else printable(client.unit),
        client.transport,
        f"{client.requests_per_s:.1f}",
        f"{client.given_per_s:.1f}",
        f"{client.denied_per_s:.1f}",
        str(client.in_flight),
        str(client.walks),
    )


def _write_plain(sample: Sample) -> None:
    """Write a sample as lines."""
    for line in _head(sample):
        write_line(line)
    rows = [_COLUMNS, *map(_cells, sample.clients)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.ljust(width) if place < _LEFT else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        write_line("  ".join(cells).rstrip())
    write_line("")
    flush()


def _show_live(samples: Iterator[Sample], by: str, rows: int | None) -> None:
    """Draw each sample on the terminal's other screen, which gives the first one back at the end."""
    console = Console(no_color=bool(os.environ.get("NO_COLOR")) or None)
    with Live(
        Text("waiting for the first sample"),
        console=console,
        screen=True,
        auto_refresh=False,
        redirect_stdout=False,
        redirect_stderr=False,
    ) as live:
        live.refresh()
        for sample in samples:
            room = max(1, console.size.height - _HEAD - 1)
            shown = _sorted(sample, by, min(room, rows or room))
            live.update(Group(*map(Text, _head(sample)), _table(shown.clients)), refresh=True)


def _table(clients: Sequence[Client]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for place, name in enumerate(_COLUMNS):
        table.add_column(name, justify="left" if place < _LEFT else "right", no_wrap=True)
    for client in clients:
        style = "red" if client.denied_per_s else ""
        table.add_row(*map(Text, _cells(client)), style=style)
    return table
