"""docs/cli.md says what the command does: its commands, options and exit statuses."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from fdbroker.cli.main import cli

DOCS = Path(__file__).resolve().parents[2] / "docs"
TEXT = (DOCS / "cli.md").read_text()
TOOLS = (DOCS / "policy-tools.md").read_text()
DESCRIBED_AS_TOOLS = {f"policy {name}" for name in ("check", "test", "diff", "schema")}


def commands() -> dict[str, click.Command]:
    """Return all commands by their whole name."""
    context = click.Context(cli)
    found = {}
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            found.update({f"{name} {below}": inner for below, inner in command.commands.items()})
        else:
            found[name] = command
    return found


def section(name: str) -> str:
    """Return what is said of a command, or a group of them."""
    if name in DESCRIBED_AS_TOOLS:
        whole, heading = TOOLS, name.partition(" ")[2]
    else:
        whole, heading = TEXT, name.partition(" ")[0]
    [text] = re.findall(rf"^## {heading}\n(.*?)(?=^## )", whole, re.MULTILINE | re.DOTALL)
    return text


@pytest.mark.parametrize("name", commands())
def test_each_option_is_documented(name: str) -> None:
    text = section(name)
    assert f"fdbroker {name}" in text
    elsewhere = (
        section(name) if name != "scan" else (Path(__file__).parents[2] / "docs" / "scanning.md").read_text()
    )
    for parameter in commands()[name].params:
        if isinstance(parameter, click.Option) and "--socket" not in parameter.opts:
            longest = max(parameter.opts, key=len)
            general = longest == "--control" and "`--control PATH`" in TEXT
            said = any(f"{option}" in elsewhere for option in parameter.opts)
            assert said or general, f"docs/cli.md does not name {longest} of {name}"


@pytest.mark.parametrize(
    "name", [name for name in commands() if name not in {"policy compile", "policy schema"}]
)
def test_exit_statuses_are_those_of_the_help(name: str) -> None:
    command = commands()[name]
    assert command.help is not None
    _, _, told = command.help.partition("Exit status:")
    of_help = re.findall(r"^ *(\d+)  ", told.partition("Example")[0], re.MULTILINE)
    own = re.findall(rf"^### {name}\n(.*?)(?=^###? )", TEXT, re.MULTILINE | re.DOTALL)
    of_text = re.findall(r"^\| (\d+) \|", own[0] if own else section(name), re.MULTILINE)
    assert of_help == of_text
    assert of_help


def test_nothing_is_documented_that_is_not_there() -> None:
    known = {
        option for command in commands().values() for parameter in command.params for option in parameter.opts
    } | {"--help", "--version", "--daemon", "--passphrase-fd"}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", TEXT + TOOLS))
    assert named <= known
    for name in re.findall(r"fdbroker (policy [a-z]+|sandbox [a-z]+|[a-z]+)", TEXT + TOOLS):
        assert name in commands() or name in {"policy", "audit", "reads", "sandbox"}, name
