"""Which engines a scan asks, from words of a command line."""

from __future__ import annotations

import dataclasses
import os
import re
from typing import TYPE_CHECKING

import click

from fdbroker.cli.failure import Failure
from fdbroker.cli.paths import absolute
from fdbroker.config.names import printable
from fdbroker.scan.engine import EngineError
from fdbroker.scan.options import OptionsError, values_of_words
from fdbroker.scan.plugins import configure, options_type

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fdbroker.scan.plugins import Configured

DEFAULT = "hashes"
_FORM = "write NAME, or NAME:option=value,option=value"
_COMMA = re.compile(r"(?<!\\),")


def configured_engines(texts: Sequence[str], lists: Sequence[str], accept: Sequence[str]) -> list[Configured]:
    """Return the engines of `--engine`, with what `--hashes` and `--accept` add.

    Raises:
        UsageError: that is no engine, it is there twice, or nobody knows what is to be accepted.
        Failure: an engine or its options are not as they must be.

    """
    try:
        named = [_read(text) for text in texts] or [(DEFAULT, [])]
        wanted = dict(named)
        if len(wanted) < len(named):
            names = [name for name, _ in named]
            twice = next(name for name in names if names.count(name) > 1)
            raise click.UsageError(
                f"--engine {printable(twice)} is given twice: give all its options at once"
            )
        if lists:
            wanted.setdefault("hashes", [])
        kinds = {name: options_type(name) for name in wanted}
        values = {
            name: values_of_words(kinds[name], words, where=f"engine {name}", relative=True)
            for name, words in wanted.items()
        }
        for path in lists:
            _append(values["hashes"], "lists", os.fsdecode(absolute(path)))
        accepting = [
            name
            for name, kind in kinds.items()
            if "accept" in {field.name for field in dataclasses.fields(kind)}
        ]
        if accept and not accepting:
            asked = ", ".join(wanted)
            raise click.UsageError(
                f"--accept {printable(accept[0])}: no engine that is asked ({asked}) looks into containers"
            )
        for name in accepting:
            for kind in accept:
                _append(values[name], "accept", kind)
        engines = [configure(name, options) for name, options in values.items()]
        if "command" in values and os.geteuid() == 0:
            raise click.UsageError(
                "--engine command runs its program unconfined, as who starts the scan, and root does not read"
                " hostile files itself: start the scan as another user"
            )
        # Here too, so that what is wrong with a list is told as that, and before a worker is started.
        if "hashes" in values:
            from fdbroker.scan.engines import hashes  # noqa: PLC0415 - other engines can do without hashlib

            hashes.load([os.fsencode(str(path)) for path in _items(values["hashes"], "lists")])
    except (EngineError, OptionsError) as error:
        raise Failure(printable(str(error))) from error
    return engines


def _read(text: str) -> tuple[str, list[tuple[str, str]]]:
    r"""Return the name and the options of `NAME:option=value,...`; `\,` is a comma in a value."""
    name, colon, rest = text.partition(":")
    words = []
    for part in _COMMA.split(rest) if rest else []:
        option, equals, value = part.partition("=")
        if not equals or not option:
            raise click.UsageError(f"--engine {printable(text)}: {printable(part)!r} is no option; {_FORM}")
        words.append((option, value.replace("\\,", ",")))
    if not name or (colon and not rest):
        raise click.UsageError(f"--engine {printable(text)}: {_FORM}")
    return name, words


def _append(values: dict[str, object], name: str, item: str) -> None:
    values[name] = [*_items(values, name), item]


def _items(values: dict[str, object], name: str) -> list[object]:
    items = values.get(name, [])
    return items if isinstance(items, list) else [items]
