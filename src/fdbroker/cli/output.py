"""How names are written, where lines go, and whether they may have colours."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import sys
import traceback
from typing import TYPE_CHECKING

import click

from fdbroker.cli import streams
from fdbroker.config.names import printable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


class OutputError(Exception):
    """Standard output took no more: a full disk, a pipe that nobody reads."""


class ReaderGoneError(OutputError):
    """Nobody reads what is written any more, as after `| head`."""


def shell_word(path: bytes) -> str:
    """Return a path as a word to paste into a shell: printable, and the same path again."""
    shown = printable(path)
    text = path.decode("utf-8", "surrogateescape")
    if shown == text:
        return shlex.quote(text)
    return "$'" + shown.replace("'", "\\'") + "'"


def path_members(path: bytes) -> dict[str, str]:
    """Return the JSON members of a path: `path`, and `path_hex` where `path` does not have all its bytes."""
    try:
        return {"path": path.decode()}
    except UnicodeDecodeError:
        return {"path": path.decode(errors="replace"), "path_hex": path.hex()}


def coloured(text: str, colour: str) -> str:
    """Return `text` in a colour where standard output is a terminal that is to have some (no NO_COLOR)."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not sys.stdout.isatty():
        return text
    return click.style(text, fg=colour)


def complain(text: str) -> None:
    """Write a line about the command itself to standard error."""
    complain_printable(printable(text))


def complain_printable(text: str) -> None:
    """Do the same with a text that is printable as it is: names in it went through `printable`."""
    streams.write_error(f"fdbroker: {text}\n")


def complain_of_bug() -> None:
    """Write the traceback of what is handled to standard error."""
    streams.write_error(traceback.format_exc())


def write_json(document: Mapping[str, object]) -> None:
    """Write one JSON object as a line to standard output, in ASCII."""
    write_line(json.dumps(document))


def write_line(line: str) -> None:
    """Write a line to standard output.

    Raises:
        OutputError: that failed.

    """
    write_text(f"{line}\n")


def write_text(text: str) -> None:
    """Write lines, or nothing, to standard output; raises as `write_line`."""
    # As `_told`, which would take longer than to write.
    try:
        sys.stdout.write(text)
    except BrokenPipeError as error:
        raise ReaderGoneError(error.strerror) from error
    except OSError as error:
        raise OutputError(error.strerror) from error


def write_bytes(data: bytes) -> None:
    """Write bytes to standard output; raises as `write_line`."""
    with _told():
        sys.stdout.buffer.write(data)


def flush() -> None:
    """See to it that all that was written has arrived; raises as `write_line`."""
    with _told():
        sys.stdout.flush()


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Hold back lines to what is no terminal, until there are many, `flush` is called, or the block ends.

    A write for each line would take longer than to make it.
    """
    stdout = sys.stdout
    if not isinstance(stdout, io.TextIOWrapper) or not stdout.line_buffering or stdout.isatty():
        yield
        return
    stdout.reconfigure(line_buffering=False)
    try:
        yield
        flush()
    finally:
        with _told():
            stdout.reconfigure(line_buffering=True)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError as error:
        raise ReaderGoneError(error.strerror) from error
    except OSError as error:
        raise OutputError(error.strerror) from error
