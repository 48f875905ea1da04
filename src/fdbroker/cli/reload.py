"""`fdbroker reload`."""

from __future__ import annotations

import contextlib
import json
import os
from typing import TYPE_CHECKING

import click

from fdbroker.cli import broker
from fdbroker.cli.control import connected
from fdbroker.cli.failure import Failure
from fdbroker.cli.output import complain_printable, write_line
from fdbroker.cli.policy_file import changes_for_restart, load
from fdbroker.cli.whole_file import whole_file
from fdbroker.client import BrokerError, Reason
from fdbroker.client.control import DEFAULT_CONTROL
from fdbroker.config import DEFAULT_POLICY
from fdbroker.config.defaults import COMPILED_POLICY
from fdbroker.config.names import counted, printable
from fdbroker.wire.client import for_broker

if TYPE_CHECKING:
    from fdbroker.client.control import Control
    from fdbroker.config import CompiledPolicy

EXIT_NOT_KNOWN = 3
# Of answers that say that nothing was changed.
_REFUSALS = frozenset({Reason.POLICY, Reason.DENIED, Reason.IDENTITY, Reason.AUDIT})


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
def command(policy_path: str, control_path: str | None, *, dev: bool) -> int:
    """Compile the policy file and have the running broker decide by it, as root.

    All or nothing: if anything is wrong with it, each problem is shown with its
    place and the old policy stays in force. Connections live on; their next
    request meets the new policy. What can't change without a restart of the
    broker: its roots (one may be left out), read_only_view, user, listeners and
    where the audit goes. A change of the last three does not keep the rest from
    being put in force, and is told.

    \b
    Exit status: 0  the new policy is in force
                 2  the old one still is: something is wrong with the policy, the
                    broker refused it, there is no broker, you are not root
                 3  not known: the broker's answer was lost, and it can't be asked

    \b
    Examples:  fdbroker reload
               fdbroker policy check new.yaml && fdbroker reload --policy new.yaml
    """  # noqa: D301 - \b is click's mark for a paragraph that keeps its lines
    if os.geteuid() != 0:
        raise Failure("only root changes the policy: run this as root")
    compiled = load(policy_path, dev=dev)
    generation: object = None
    lost = ""
    with connected(control_path) as control:
        before = control.status()
        try:
            generation = _hand_over(control, compiled)
        except (BrokerError, KeyboardInterrupt) as error:
            lost = printable(getattr(error, "strerror", None) or "interrupted")
    if lost:
        # By now the broker has done what it had to do on that connection: it sees that one end before it
        # sees another one begin.
        generation = _generation_in_force(policy_path, compiled, control_path, before, lost)
        complain_printable(f"the broker's answer was lost ({lost}), so it was asked what is in force")
    if control_path == DEFAULT_CONTROL:
        _keep_for_a_crash(compiled)
    counts = f"{counted(len(compiled['roots']), 'root')}, {counted(len(compiled['rules']), 'rule')}"
    write_line(f"{printable(policy_path)} is in force: generation {generation}, {counts}")
    changes = changes_for_restart(compiled, before)
    if changes:
        which = f"the change of {', '.join(changes)}"
        complain_printable(f"{printable(policy_path)}: {which} is not in force: restart the broker")
    return 0


def _keep_for_a_crash(compiled: CompiledPolicy) -> None:
    """See that the broker goes on with what is in force now, if systemd starts it again with a broken file.

    Where systemd did not start it nothing is there, and nothing is made.
    """
    from fdbroker.config import dumps  # noqa: PLC0415 - another extra

    if not os.path.exists(COMPILED_POLICY):
        return
    try:
        with whole_file(COMPILED_POLICY, 0o600) as file:
            file.write(dumps(compiled).encode())
    except OSError as error:
        # Rather none than an older one, by which somebody may have what was taken away.
        with contextlib.suppress(OSError):
            os.unlink(COMPILED_POLICY)
        complain_printable(
            f"{COMPILED_POLICY} can't be written: {error.strerror}; make room, and reload again"
        )


def _hand_over(control: Control, compiled: CompiledPolicy) -> int:
    """Return the generation that the policy is.

    Raises:
        Failure: the broker keeps its old one.
        BrokerError: there is no telling.

    """
    try:
        return control.reload(json.dumps(compiled).encode())
    except BrokerError as error:
        if error.reason not in _REFUSALS:
            raise
        why = printable(error.strerror or str(error))
        cure = f": {broker.how_to_restart()}" if why.endswith("restart the broker") else ""
        raise Failure(f"the broker keeps its old policy: {why}{cure}") from error


def _generation_in_force(
    policy_path: str, compiled: CompiledPolicy, control_path: str | None, before: dict[str, object], lost: str
) -> object:
    """Return the generation of this policy, if the broker decides by it.

    Raises:
        Failure: it does not, or it can't be asked.

    """
    from fdbroker.policy.rules import read_policy  # noqa: PLC0415 - only here

    shown = printable(policy_path)
    try:
        with connected(control_path) as control:
            status = control.status()
            generation, fingerprint = status["generation"], status["fingerprint"]
    except (Failure, KeyError) as error:
        also = error.message if isinstance(error, Failure) else "its status has no fingerprint."
        raise Failure(
            f"{shown}: whether it is in force is not known: the broker's answer was lost ({lost}), and it"
            f" can't be asked: {also}\nWhen it answers again: fdbroker doctor compares policy and file.",
            EXIT_NOT_KNOWN,
        ) from error
    if fingerprint == read_policy(for_broker(compiled)).fingerprint:
        return generation
    same = (generation, fingerprint) == (before.get("generation"), before.get("fingerprint"))
    which = "keeps its old policy" if same else "decides by another policy"
    raise Failure(
        f"{shown} is not in force: the answer was lost ({lost}), and the broker {which}, generation"
        f" {printable(str(generation))}. Its log may say more; then try again: fdbroker reload"
    )
