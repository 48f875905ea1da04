"""`fdbroker status`."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from typing import Any

import click

from fdbroker.cli import broker
from fdbroker.cli.control import connected
from fdbroker.cli.failure import Failure
from fdbroker.cli.output import complain_printable, write_json, write_line, write_text
from fdbroker.client import BrokerError, UnavailableError, control
from fdbroker.config.names import printable

_MOST_SHOWN = 20  # decisions, to people


@click.command("status", short_help="Show what the running broker does, and how it is protected.")
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object (see docs/metrics.md).")
@click.option("--openmetrics", is_flag=True, help="Write metrics, as Prometheus reads them.")
@click.option(
    "--textfile",
    type=click.UNPROCESSED,
    metavar="PATH",
    help="Write metrics to a file *.prom, for the textfile collector of node_exporter.",
)
@broker.control_option
@broker.socket_option
def command(
    control_path: str | None, socket_path: str, textfile: str | None, *, as_json: bool, openmetrics: bool
) -> int:
    """Show the state of the running broker: its policy's generation, limits, layers of protection.

    Root and administrators (admins in the policy file) see all of it: counts,
    connections, roots, decisions by rule, the state of the audit. Others see
    what concerns their own connection. Where the control socket can't be used,
    the other one is asked, which tells less; so it is where --socket names
    another broker than the usual one and nothing says where its control socket
    is. Metrics are for root and administrators alone (docs/metrics.md). If no
    broker answers, the file of --textfile says that it is not up.

    \b
    Exit status: 0  the broker answered
                 2  no broker, wrong use, or the output could not be written

    \b
    Examples:  fdbroker status
               fdbroker status --json | jq .generation
               fdbroker status --textfile /var/lib/node_exporter/fdbroker.prom
    """  # noqa: D301 - \b is click's mark for a paragraph that keeps its lines
    if as_json + openmetrics + (textfile is not None) > 1:
        raise click.UsageError("--json, --openmetrics and --textfile are three forms: choose one")
    if textfile is not None:
        return _write_textfile(control_path, textfile)
    if openmetrics:
        # Not before it is wanted: it belongs to another extra.
        from fdbroker.cli.openmetrics import openmetrics_text  # noqa: PLC0415

        with connected(control_path) as connection:
            document = _whole(connection)
        write_text(openmetrics_text(_for_metrics(document)))
        return 0
    document = _ask(control_path, socket_path)
    if as_json:
        write_json(document)
    else:
        for line in _lines(_for_people(document)):
            write_line(line)
    return 0


def _write_textfile(control_path: str | None, path: str) -> int:
    from fdbroker.cli.openmetrics import classic_text, write_textfile  # noqa: PLC0415 - as above

    if not path.endswith(".prom"):
        raise click.UsageError(f"{printable(path)}: the textfile collector reads files named *.prom alone")
    failed = document = None
    try:
        with connected(control_path) as connection:
            document = _whole(connection)
    except Failure as error:
        failed = error
    try:
        write_textfile(path, classic_text(None if document is None else _for_metrics(document)))
    except OSError as error:
        raise Failure(f"{printable(path)}: the file could not be written: {error.strerror}") from error
    if failed is not None:
        raise failed
    return 0


def _for_metrics(document: dict[str, object]) -> dict[str, object]:
    if "totals" not in document:
        raise Failure("metrics are for root and those whom the policy names as admins: run it as one of them")
    return document


def _whole(connection: control.Control) -> dict[str, object]:
    """Return the status; where it is the whole one, with the lists that are asked for apart."""
    document = connection.status()
    if "totals" in document:
        document |= {part: connection.rows(part) for part in ("decisions", "clients")}
    return document


def _ask(control_path: str | None, socket_path: str) -> dict[str, object]:
    shown = printable(socket_path)
    if control_path is None:
        document = _ask_without_control(socket_path)
        complain_printable(
            f"only {shown} was asked: --control PATH names the control socket of the same broker, which tells"
            " more."
        )
        return document
    try:
        with control.connect(os.fsencode(control_path)) as connection:
            return _whole(connection)
    except UnavailableError as error:
        why = broker.obstacle(control_path, error, "--control")
    except BrokerError as error:
        raise Failure(str(broker.obstacle(control_path, error, "--control"))) from error
    document = _ask_without_control(socket_path, f"{why}\n")
    complain_printable(f"{why} So {shown} was asked, which tells less.")
    return document


def _ask_without_control(socket_path: str, before: str = "") -> dict[str, object]:
    """Return what the other socket tells; `before` is what to say first if that one is not there either."""
    try:
        with broker.open_client(socket_path) as asked:
            return asked.status()
    except UnavailableError as error:
        raise Failure(f"{before}{broker.obstacle(socket_path, error)}") from error
    except BrokerError as error:
        raise Failure(str(broker.obstacle(socket_path, error))) from error


def _for_people(document: dict[str, object]) -> dict[str, object]:
    """Return a status with durations in words, and of the decisions those that were made most often."""
    requests, decisions = document.get("requests"), document.get("decisions")
    if not isinstance(requests, list) or not isinstance(decisions, list):
        return document
    most = sorted(decisions, key=lambda row: -row["count"])
    left_out = len(most) - _MOST_SHOWN
    more = [{"others": left_out}] if left_out > 0 else []
    shown = {
        "requests": [_in_words(row) for row in requests],
        "decisions": [*most[:_MOST_SHOWN], *more],
    }
    return document | shown


def _in_words(row: Mapping[str, Any]) -> dict[str, object]:
    words: dict[str, object] = {
        "transport": row["transport"],
        "type": row["type"],
        "requests": row["requests"],
    }
    timed = row["timed"]
    if timed:
        words["mean"] = _duration(row["nanoseconds"] / timed)
        for share in (50, 99):
            words[f"{share} % within"] = _duration(1 << _bits_within(row["by_bits"], timed * share / 100))
    return words


def _bits_within(by_bits: Mapping[str, int], wanted: float) -> int:
    """Return the bucket in which the first `wanted` requests end."""
    buckets = sorted((int(bits), count) for bits, count in by_bits.items())
    ends = itertools.accumulate(count for _, count in buckets)
    return next(bits for (bits, _), end in zip(buckets, ends, strict=True) if end >= wanted)


def _duration(nanoseconds: float) -> str:
    for unit, size in (("s", 1e9), ("ms", 1e6)):
        if nanoseconds >= size:
            return f"{nanoseconds / size:.1f} {unit}"
    return f"{nanoseconds / 1e3:.0f} us"


def _lines(document: Mapping[str, object], indent: str = "") -> list[str]:
    """Return a document as aligned lines; what is within is indented."""
    width = max((len(_label(key)) for key in document), default=0)
    lines = []
    for key, value in document.items():
        label = f"{indent}{_label(key)}"
        if isinstance(value, Mapping) and value:
            lines.append(f"{label}:")
            lines += _lines(value, indent + "  ")
        elif isinstance(value, list) and any(isinstance(entry, Mapping) for entry in value):
            lines.append(f"{label}:")
            lines += [f"{indent}  {_entry(entry)}" for entry in value]
        else:
            lines.append(f"{label.ljust(len(indent) + width)}  {_text(value)}")
    return lines


def _label(key: str) -> str:
    return printable(key.replace("_", " "))


def _entry(entry: object) -> str:
    if isinstance(entry, Mapping):
        return ", ".join(f"{_label(key)} {_text(value)}" for key, value in entry.items())
    return _text(entry)


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "-"
    if isinstance(value, list):
        return ", ".join(map(_text, value)) or "none"
    return printable(str(value))
