"""The group that all commands belong to, and the way in."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import traceback
from typing import TYPE_CHECKING

import click

from fdbroker.cli.output import OutputError
from fdbroker.cli.scan import scan_command

if TYPE_CHECKING:
    from collections.abc import Sequence

EXIT_ERROR = 2


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def cli() -> None:
    """Read files through the fdbroker daemon, as far as its policy allows."""


cli.add_command(scan_command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status.

    Every failure is status 2, also one that nobody thought of: Python's own 1
    would mean "infected" to whoever runs a scan.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # What the terminal's encoding lacks is escaped, not an exception; and a finding is not held back.
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        status = cli.main(arguments, prog_name="fdbroker", standalone_mode=False)
        sys.stdout.flush()
    except click.ClickException as error:
        error.show()
    except (click.Abort, KeyboardInterrupt):
        sys.stderr.write("fdbroker: interrupted\n")
    except (OutputError, BrokenPipeError) as error:
        _give_up_output()
        sys.stderr.write(f"fdbroker: the output could not be written: {error}\n")
    except Exception:  # noqa: BLE001 - shown, and never taken for a verdict
        traceback.print_exc()
    else:
        return status if isinstance(status, int) else 0
    return EXIT_ERROR


def _give_up_output() -> None:
    """Let the interpreter's last flush go nowhere, or it would choose the exit status."""
    with contextlib.suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
