"""`fdbroker policy`: check, compile, schema, explain."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import click

from fdbroker.cli import broker, policy_diff, policy_test
from fdbroker.cli.control import connected
from fdbroker.cli.explanation import (
    document_of_answer,
    lines_of,
    lines_of_answer,
    status_of,
    status_of_answer,
    to_document,
)
from fdbroker.cli.failure import EXIT_ERROR, Failure
from fdbroker.cli.group import SuggestingGroup
from fdbroker.cli.output import complain_printable, write_json, write_line, write_text
from fdbroker.cli.paths import absolute
from fdbroker.cli.policy_file import problems_as_failure
from fdbroker.cli.streams import write_error
from fdbroker.config import DEFAULT_POLICY
from fdbroker.config.names import id_of_number, is_number, printable

if TYPE_CHECKING:
    from fdbroker.config.explain import LoadedPolicy
    from fdbroker.policy.rules import ClientFacts

_dev_option = click.option(
    "--dev", is_flag=True, help="Accept a file of yours, also below /tmp; for development only."
)
_UNREADABLE = frozenset({errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR})


@click.group("policy", cls=SuggestingGroup, short_help="Check, compile and explain the policy.")
def command() -> None:
    """Check, compile and explain the policy: who may read what.

    docs/policy.md says how it is written.
    """


@command.command("check", short_help="Report every problem of a policy file, and what to think over.")
@click.argument("file", default=DEFAULT_POLICY)
@_dev_option
@click.option(
    "--offline",
    is_flag=True,
    help="The policy is for another machine: do not look for its directories, users and groups here.",
)
@click.option("--strict", is_flag=True, help="Exit with 1 if there are warnings.")
@click.option(
    "--ignore", multiple=True, metavar="KIND", help="Leave out a kind of warning, as in its brackets."
)
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object (see docs/policy-tools.md).")
def check(
    file: str, *, dev: bool, offline: bool, strict: bool, ignore: tuple[str, ...], as_json: bool
) -> int:
    """Report every problem of a policy file, each with its place and what to do. Changes nothing.

    Without FILE it is /etc/fdbroker/policy.yaml. Of a policy without errors it
    tells what can't have been meant: rules that never match, what deny rules
    hide, roots that others write to, and so on (docs/policy-tools.md).

    \b
    Exit status: 0  no error
                 1  with --strict: no error, but at least one warning
                 2  at least one error, or wrong use

    \b
    Examples:  fdbroker policy check
               fdbroker policy check --strict --ignore anybody
               fdbroker policy check --dev --offline draft.yaml
    """  # noqa: D301 - \b is click's mark for a paragraph that keeps its lines
    from fdbroker.config.findings import KINDS  # noqa: PLC0415 - another extra

    for kind in ignore:
        if kind not in KINDS:
            raise click.UsageError(f"--ignore {kind}: the kinds are {', '.join(KINDS)}")
    given = (("--dev", dev), ("--offline", offline), ("--strict", strict), ("--json", as_json))
    flags = [flag for flag, wanted in given if wanted]
    return _config("check", *flags, *(f"--ignore={kind}" for kind in ignore), "--", file)


@command.command("compile", short_help="Write the policy as the broker reads it.")
@click.argument("file", default=DEFAULT_POLICY)
@click.option(
    "--output",
    default="-",
    metavar="FILE",
    help="Where to write, as a whole or not at all.  [default: -, standard output]",
)
@_dev_option
def compile_(file: str, output: str, *, dev: bool) -> int:
    """Compile a policy file to what the broker reads: JSON in which names are numbers.

    Without FILE it is /etc/fdbroker/policy.yaml. If there is any problem nothing is written.

    \b
    Exit status: 0  written
                 2  the policy has problems, it could not be written, or wrong use

    \b
    Examples:  fdbroker policy compile
               fdbroker policy compile --output /run/fdbroker/policy.json
    """  # noqa: D301 - \b is click's mark for a paragraph that keeps its lines
    flags = ["--dev"] if dev else []
    return _config("compile", *flags, f"--output={output}", "--", file)


@command.command("schema", short_help="Write the JSON Schema of the policy file, for editors.")
def schema() -> int:
    """Write the JSON Schema of the policy file, with which editors complete and check.

    \b
    Exit status: 0  written
                 2  wrong use, or the output could not be written

    \b
    Example:  fdbroker policy schema > policy.schema.json
              then, first in policy.yaml: # yaml-language-server: $schema=policy.schema.json
    """  # noqa: D301 - \b is click's mark for a paragraph that keeps its lines
    return _config("schema")


def _config(*arguments: str) -> int:
    """Do what `python -m fdbroker.config` does: one command, two doors."""
    from fdbroker.config.__main__ import UnwrittenError, run  # noqa: PLC0415 - another extra

    try:
        result = run(arguments)
    except UnwrittenError as error:
        write_error(f"{error}\n")
        return EXIT_ERROR
    # As the compilers of other languages do: the line begins with the file, for editors.
    write_error(result.told)
    write_text(result.output)
    return result.status


@command.command("explain", short_help="Say why a user may or may not have a file.")
@click.argument("path", type=click.UNPROCESSED)
@click.option(
    "--policy",
    "policy_path",
    metavar="FILE",
    help=f"The policy file, or a compiled policy (.json).  [default: {DEFAULT_POLICY} if you may read it;"
    " else the running broker is asked about yourself]",
)
@click.option("--as", "user", metavar="USER", help="Whom to explain for, by name or number.  [default: you]")
@click.option(
    "--on-behalf-of",
    "acted_for",
    metavar="USER",
    help="Whom the one who asks, a service, acts for.  [default: nobody]",
)
@click.option(
    "--action",
    type=click.Choice(["open", "stat", "list", "walk"]),
    default="open",
    show_default=True,
    help="Reading it, asking for size, owner and so on, listing the directory, or being met by a walk.",
)
@click.option(
    "--unit", metavar="NAME", help="Explain for a process of this systemd unit, for rules about units."
)
@click.option(
    "--cgroup", metavar="PATH", help="Explain for a process in this control group, as in /user.slice."
)
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object (see docs/cli.md).")
@click.option("-v", "--verbose", is_flag=True, help="Show every rule, not only those that come near.")
@broker.control_option
def explain_command(  # noqa: PLR0913 - one for each option
    path: str,
    policy_path: str | None,
    user: str | None,
    action: str,
    unit: str | None,
    cgroup: str | None,
    control_path: str | None,
    *,
    acted_for: str | None,
    as_json: bool,
    verbose: bool,
) -> int:
    """Say why a user may or may not have a file: rule by rule, condition by condition, and in one sentence.

    It reads the policy file and needs no broker. The verdict is that of the
    broker's own code. If you may not read the policy, the running broker is
    asked about yourself, who tells less.

    \b
    Exit status: 0  allowed
                 1  denied
                 2  the policy can't be read, no broker to ask, or wrong use
                 3  it depends on the file, which can't be looked at from here

    \b
    Examples:  fdbroker policy explain /home/alice/.ssh/id_ed25519
               fdbroker policy explain --as scanner --action list /home/alice
               fdbroker policy explain --as scanner --on-behalf-of alice /home/alice/x
               fdbroker policy explain --policy draft.yaml --as 1000 /srv/x
    """  # noqa: D301 - \b is click's mark for a paragraph that keeps its lines
    asked = absolute(path)
    for_another = any(given is not None for given in (user, acted_for, unit, cgroup))
    loaded = _load(policy_path, may_ask=policy_path is None and not for_another)
    if loaded is None:
        with connected(control_path) as control:
            answer = control.explain(action, asked)
        if as_json:
            write_json(document_of_answer(answer, asked))
        else:
            for line in lines_of_answer(answer, asked):
                write_line(line)
        return status_of_answer(answer)
    from fdbroker.config.explain import Asker, explain, look_as_broker  # noqa: PLC0415 - another extra

    client = _client(loaded, user, unit, cgroup)
    asker = Asker(client, None if acted_for is None else _user(acted_for, "--on-behalf-of"))
    explanation = explain(loaded.rules, asker, action, asked, look_as_broker)
    source = DEFAULT_POLICY if policy_path is None else policy_path
    if as_json:
        write_json(to_document(explanation, source, loaded.notes))
    else:
        for note in loaded.notes:
            complain_printable(f"the broker would not take this file: {note}")
        for line in lines_of(explanation, source, verbose=verbose):
            write_line(line)
    return status_of(explanation)


def _load(policy_path: str | None, *, may_ask: bool) -> LoadedPolicy | None:
    """Return the policy; None if the broker is to be asked instead (`may_ask`)."""
    path = DEFAULT_POLICY if policy_path is None else policy_path
    try:
        with open(path, "rb"):
            pass
        return _read(path)
    except OSError as error:
        if may_ask and error.errno in _UNREADABLE:
            return None
        cure = "run it as root, or name another with --policy FILE"
        raise Failure(f"{printable(path)}: can't be read: {error.strerror}; {cure}") from error
    except ModuleNotFoundError:
        # Who only asks for files need not have what reads policies.
        if may_ask:
            return None
        raise


def _read(path: str) -> LoadedPolicy:
    from fdbroker.config.explain import load_for_explaining  # noqa: PLC0415 - another extra

    with problems_as_failure():
        return load_for_explaining(path)


def _client(loaded: LoadedPolicy, user: str | None, unit: str | None, cgroup: str | None) -> ClientFacts:
    from fdbroker.config import explain  # noqa: PLC0415 - another extra
    from fdbroker.config.identities import unit_cgroup  # noqa: PLC0415 - another extra
    from fdbroker.config.scalars import ScalarError  # noqa: PLC0415 - another extra

    if unit is not None and cgroup is not None:
        raise click.UsageError("a process is in one control group: give --unit or --cgroup, not both")
    group = cgroup if cgroup is not None or user is not None else explain.control_group_of_this_process()
    if unit is not None:
        try:
            group = unit_cgroup(unit)
        except ScalarError as error:
            raise click.UsageError(f"--unit: {error}") from error
    client = _checked(explain.client_of_this_process()) if user is None else _user(user, "--as")
    if group is not None and not group.startswith("/"):
        raise click.UsageError("--cgroup: write its whole path as below /sys/fs/cgroup, as in /user.slice")
    return explain.with_control_group(client, group, loaded.rules)


def _user(name: str, option: str) -> ClientFacts:
    from fdbroker.config.explain import client_of_user  # noqa: PLC0415 - another extra

    possible = not is_number(name) or id_of_number(name) is not None
    client = client_of_user(name) if possible else None
    if client is None:
        raise click.UsageError(f"{option} {name}: there is no such user")
    return _checked(client)


def _checked(client: ClientFacts) -> ClientFacts:
    from fdbroker.config.identities import OVERFLOW_ID  # noqa: PLC0415 - another extra

    if client.uid == OVERFLOW_ID:
        raise click.UsageError(
            f"the broker serves no process with uid {OVERFLOW_ID}: every id that a user namespace does not"
            " map shows as this one. Use a user of its own."
        )
    return client


command.add_command(policy_test.command)
command.add_command(policy_diff.command)
