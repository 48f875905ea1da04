"""`fdbroker policy`: check, compile, schema; explain, test and diff are in modules of their own."""

from __future__ import annotations

import click

from fdbroker.cli import policy_diff, policy_explain, policy_test
from fdbroker.cli.failure import EXIT_ERROR
from fdbroker.cli.group import SuggestingGroup
from fdbroker.cli.output import write_text
from fdbroker.cli.streams import write_error
from fdbroker.config import DEFAULT_POLICY

_dev_option = click.option(
    "--dev", is_flag=True, help="Accept a file of yours, also below /tmp; for development only."
)


@click.group("policy", cls=SuggestingGroup, short_help="Check, compile, explain, test and compare policies.")
def command() -> None:
    """Check, compile, explain, test and compare policies: who may read what.

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
@click.option(
    "--keep",
    is_flag=True,
    help="If the policy has problems and the output is there, tell them, leave it as it is, and exit with 0.",
)
@click.option(
    "--service",
    is_flag=True,
    help="It is for a service that is started as the broker's user, who can open no file for writing.",
)
@_dev_option
def compile_(file: str, output: str, *, keep: bool, service: bool, dev: bool) -> int:
    """Compile a policy file to what the broker reads: JSON in which names are numbers.

    Without FILE it is /etc/fdbroker/policy.yaml. If there is any problem nothing is written.

    \b
    Exit status: 0  written, or kept
                 2  the policy has problems, it could not be written, or wrong use

    \b
    Examples:  fdbroker policy compile
               fdbroker policy compile --output /etc/fdbroker/policy.json
    """  # noqa: D301 - \b is click's mark for a paragraph that keeps its lines
    given = (("--keep", keep), ("--service", service), ("--dev", dev))
    flags = [flag for flag, wanted in given if wanted]
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


for _each in (policy_explain, policy_test, policy_diff):
    command.add_command(_each.command)
