"""`fdbroker doctor`."""

from __future__ import annotations

import os

import click

from fdbroker.cli import broker
from fdbroker.cli.checks import BROKEN, MISSING, OK, WEAKER, Check, Places, all_checks
from fdbroker.cli.output import coloured, write_json, write_line
from fdbroker.config import DEFAULT_POLICY
from fdbroker.config.names import printable

_COLOURS = {OK: "green", WEAKER: "yellow", BROKEN: "red", MISSING: "red"}


@click.command("doctor", short_help="Check what this machine and its set-up can promise.")
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object (see docs/cli.md).")
@click.option("-v", "--verbose", is_flag=True, help="Say of what is in order, too, what it means.")
@click.option(
    "--policy",
    "policy_path",
    default=DEFAULT_POLICY,
    show_default=True,
    metavar="FILE",
    help="The policy file.",
)
@broker.control_option
@broker.socket_option
def command(
    socket_path: str, control_path: str | None, policy_path: str, *, as_json: bool, verbose: bool
) -> int:
    """Check what this kernel and this set-up can promise, layer by layer.

    Each line says what was found. "ok": in order. "weaker": it works, with one
    layer of protection or one convenience less. "broken": it is there, and wrong.
    "missing": it is not. With either the broker can't start, can't be reached or
    can't be trusted. What is not ok has what it means and what to do below it.
    Nothing is changed. As root more can be seen.

    \b
    Exit status: 0  nothing is missing or broken
                 1  something is
                 2  wrong use, or the output could not be written

    \b
    Examples:  fdbroker doctor
               fdbroker doctor --json | jq '.checks[] | select(.state != "ok")'
    """  # noqa: D301 - \b is click's mark for a paragraph that keeps its lines
    if broker.given_descriptors() is not None:
        raise click.UsageError("doctor looks at sockets and where they are: leave --fd away.")
    checks = all_checks(Places(socket_path, control_path, policy_path))
    counts = {state: sum(check.state == state for check in checks) for state in _COLOURS}
    status = 1 if counts[MISSING] or counts[BROKEN] else 0
    if as_json:
        write_json({"checks": [check._asdict() for check in checks], "exit_status": status})
        return status
    width = max(len(check.name) for check in checks)
    for check in checks:
        write_check(check, width, verbose=verbose)
    text = f"{len(checks)} checks: {', '.join(f'{count} {state}' for state, count in counts.items())}."
    write_line(f"{text}" if os.geteuid() == 0 else f"{text} As root more can be seen.")
    return status


def write_check(check: Check, width: int, *, verbose: bool) -> None:
    """Write what was found, and below it what that means and what to do; names take `width` columns."""
    state = coloured(check.state.ljust(len(MISSING)), _COLOURS[check.state])
    write_line(f"{state}  {check.name.ljust(width)}  {check.found}".rstrip())
    if check.state != OK or verbose:
        write_line(f"{' ' * len(MISSING)}    it means: {check.meaning}")
    if check.cure:
        write_line(f"{' ' * len(MISSING)}    to do:    {printable(check.cure)}")
