"""`fdbroker status`."""

from __future__ import annotations

import os
from collections.abc import Mapping

import click

from fdbroker.cli import broker
from fdbroker.cli.failure import Failure
from fdbroker.cli.output import complain_printable, write_json, write_line
from fdbroker.client import BrokerError, UnavailableError, control
from fdbroker.config.names import printable


@click.command("status", short_help="Show what the running broker does, and how it is protected.")
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object (see docs/cli.md).")
@broker.control_option
@broker.socket_option
def command(control_path: str | None, socket_path: str, *, as_json: bool) -> int:
    """Show the state of the running broker: its policy's generation, limits, layers of protection.

    Root and administrators (admins in the policy file) see all of it: counts,
    connections, roots, the state of the audit. Others see what concerns their
    own connection. Where the control socket can't be used, the other one is
    asked, which tells less; so it is where --socket names another broker than
    the usual one and nothing says where its control socket is.

    \b
    Exit status: 0  the broker answered
                 2  no broker, wrong use, or the output could not be written

    \b
    Examples:  fdbroker status
               fdbroker status --json | jq .generation
    """  # noqa: D301 - \b is click's mark for a paragraph that keeps its lines
    document = _ask(control_path, socket_path)
    if as_json:
        write_json(document)
    else:
        for line in _lines(document):
            write_line(line)
    return 0


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
            return connection.status()
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
        with broker.open_client(socket_path) as connected:
            return connected.status()
    except UnavailableError as error:
        raise Failure(f"{before}{broker.obstacle(socket_path, error)}") from error
    except BrokerError as error:
        raise Failure(str(broker.obstacle(socket_path, error))) from error


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
