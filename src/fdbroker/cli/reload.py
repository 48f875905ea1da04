"""`fdbroker reload`."""

from __future__ import annotations

import json
import os

import click

from fdbroker.cli import broker
from fdbroker.cli.control import connected
from fdbroker.cli.failure import Failure
from fdbroker.cli.output import printable, write_line
from fdbroker.cli.policy_file import DEFAULT_POLICY, load
from fdbroker.client.errors import ReloadRefusedError


@click.command("reload", short_help="Put a changed policy in force, as root.")
@click.option(
    "--policy",
    "policy_path",
    default=DEFAULT_POLICY,
    show_default=True,
    metavar="FILE",
    help="The policy file.",
)
@click.option("--dev", is_flag=True, help="Accept a file of yours, also below /tmp; for development only.")
@broker.control_option
def command(policy_path: str, control_path: str, *, dev: bool) -> int:
    """Compile the policy file and have the running broker decide by it, as root.

    All or nothing: if anything is wrong with it, each problem is shown with its
    place and the old policy stays in force. Connections live on; their next
    request meets the new policy. What can't change without a restart of the
    broker: its roots (one may be left out), read_only_view, user, listeners and
    where the audit goes.

    \b
    Exit status: 0  the new policy is in force
                 2  the old one still is: something is wrong with the policy, the
                    broker refused it, there is no broker, you are not root

    \b
    Examples:  fdbroker reload
               fdbroker policy check new.yaml && fdbroker reload --policy new.yaml
    """  # noqa: D301 - \b is click's mark for a paragraph that keeps its lines
    if os.geteuid() != 0:
        raise Failure("only root changes the policy: run this as root")
    compiled = load(policy_path, dev=dev)
    with connected(control_path) as control:
        try:
            generation = control.reload(json.dumps(compiled).encode())
        except ReloadRefusedError as error:
            why = printable(error.strerror or str(error))
            raise Failure(f"the broker keeps its old policy: {why}") from error
    counts = f"{len(compiled['roots'])} roots, {len(compiled['rules'])} rules"
    write_line(f"{printable(policy_path)} is in force: generation {generation}, {counts}")
    return 0
