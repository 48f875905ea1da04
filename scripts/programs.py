"""What the programs say of themselves, of which manual pages and completions are made."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click

from fdbroker.cli.main import cli
from fdbroker.launcher.options import option_parser
from fdbroker.scan.service.main import command as scand

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Mapping

# Click's mark for a paragraph that keeps its lines.
_KEPT = "\b\n"


class Option(NamedTuple):
    """An option.

    `value`: what follows it, as the help names it, "" if nothing does; `choices`: all that may; `again`: it
    may be given several times.
    """

    names: tuple[str, ...]
    value: str
    choices: tuple[str, ...]
    help: str
    again: bool


class Command(NamedTuple):
    """A program, or a command of one.

    `words`: what is typed for it. `texts`: paragraphs of its help. `statuses`: of its exit, each with what it
    means; what is said before them is in `statuses_are`. `arguments`: as the help names them. `commands`:
    those below it, of which `default` is meant where none is named.
    """

    words: tuple[str, ...]
    usage: str
    summary: str
    texts: tuple[str, ...]
    statuses: tuple[tuple[str, str], ...]
    statuses_are: str
    examples: tuple[str, ...]
    options: tuple[Option, ...]
    arguments: tuple[str, ...]
    commands: tuple[Command, ...]
    default: str | None = None

    def all_commands(self) -> Iterator[Command]:
        """Yield it, and all below it."""
        yield self
        for each in self.commands:
            yield from each.all_commands()


def write_files(files: Mapping[str, str], directory: str) -> None:
    """Write files below a directory, by their names there."""
    for name, text in files.items():
        path = Path(directory, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def programs() -> tuple[Command, ...]:
    """Return all programs of the package."""
    return _of_click(cli, ("fdbroker",)), _of_argparse(option_parser()), _of_click(scand, ("fdbroker-scand",))


def _of_click(command: click.Command, words: tuple[str, ...], above: click.Context | None = None) -> Command:
    context = click.Context(command, parent=above, info_name=words[-1], **command.context_settings)
    texts: list[str] = []
    said = ""
    statuses: tuple[tuple[str, str], ...] = ()
    examples: tuple[str, ...] = ()
    for text in inspect.cleandoc(command.help or "").split("\n\n"):
        kept = text.removeprefix(_KEPT)
        title, colon, rest = kept.partition(":")
        # What stands behind the title is moved to the left, with what is below it.
        block = inspect.cleandoc("\n" + " " * len(title + colon) + rest)
        if kept == text:
            texts.append(" ".join(text.split()))
        elif title == "Exit status":
            said, statuses = _statuses(block)
        elif title in {"Example", "Examples"}:
            examples = tuple(block.splitlines())
        else:
            texts.append(text)
    below: list[Command] = []
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            assert found is not None  # noqa: S101 - it is of the list
            below.append(_of_click(found, (*words, name), context))
    parameters = command.get_params(context)
    return Command(
        words=words,
        usage=" ".join(command.collect_usage_pieces(context)),
        summary=command.get_short_help_str(200).rstrip("."),
        texts=tuple(texts),
        statuses=statuses,
        statuses_are=said,
        examples=examples,
        options=tuple(_option(each, context) for each in parameters if isinstance(each, click.Option)),
        arguments=tuple(
            " ".join(each.get_usage_pieces(context))
            for each in parameters
            if isinstance(each, click.Argument)
        ),
        commands=tuple(below),
        default=getattr(command, "default_command", None),
    )


def _option(option: click.Option, context: click.Context) -> Option:
    shown, told = option.get_help_record(context) or ("", "")
    names = tuple(option.opts + option.secondary_opts)
    value = re.sub(r"^--?[\w-]+(, --?[\w-]+)* ?", "", shown)
    choices = tuple(map(str, option.type.choices)) if isinstance(option.type, click.Choice) else ()
    return Option(names, value, choices, " ".join(told.split()), again=option.multiple)


def _statuses(block: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    """Return what is said before the statuses, and each with what it means, which may go on on more lines."""
    said: list[str] = []
    found: list[tuple[str, str]] = []
    for line in block.splitlines():
        begins = re.fullmatch(r" *(\d+)  (.*)", line)
        if begins:
            found.append((begins[1], begins[2]))
        elif found:
            found[-1] = (found[-1][0], f"{found[-1][1]} {line.strip()}")
        else:
            said.append(line.strip())
    return " ".join(said), tuple(found)


def _of_argparse(parser: argparse.ArgumentParser) -> Command:
    formatter = parser._get_formatter()  # noqa: SLF001 - argparse has no other way to its texts
    summary, _, description = (parser.description or "").partition("\n\n")
    # In the epilogue each title stands on a line of its own, with what it is about below it.
    below = {
        title: inspect.cleandoc("\n" + text)
        for title, text in re.findall(r"^(\w[^\n]*):\n((?: .*\n|\n)+)", parser.epilog or "", re.MULTILINE)
    }
    options = []
    for each in parser._actions:  # noqa: SLF001 - likewise
        value = "" if each.nargs == 0 else str(each.metavar or each.dest.upper())
        told = " ".join(formatter._expand_help(each).split())  # noqa: SLF001 - likewise
        options.append(Option(tuple(each.option_strings), value, (), told, again=each.default == []))
    said, statuses = _statuses(below["exit status"])
    return Command(
        words=(parser.prog,),
        usage=" ".join(parser.format_usage().split()[2:]),
        summary=" ".join(summary.split()).rstrip("."),
        texts=(" ".join(description.split()),),
        statuses=statuses,
        statuses_are=said,
        examples=tuple(below["examples"].splitlines()),
        options=tuple(options),
        arguments=(),
        commands=(),
    )
