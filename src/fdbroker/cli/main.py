"""The group that all commands belong to, and the way in."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import signal
import sys
import traceback
from typing import TYPE_CHECKING

import click

import fdbroker
from fdbroker.cli.broker import CONTROL_VARIABLE, SOCKET_VARIABLE
from fdbroker.cli.failure import EXIT_ERROR, Failure
from fdbroker.cli.output import OutputError, ReaderGoneError

if TYPE_CHECKING:
    from collections.abc import Sequence

# As a shell shows a program that SIGPIPE ended.
EXIT_READER_GONE = 128 + signal.SIGPIPE

# Each is in the module of its name here, as `command`: what one command needs the others do not load.
COMMANDS = ("scan", "cat", "ls", "exec", "policy", "reload", "status", "audit", "doctor")
_EXTRAS = {"rich": "cli", "msgspec": "daemon", "yaml": "daemon"}


class _Commands(click.Group):
    """Finds a command in its module when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - click's
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"fdbroker.cli.{cmd_name}")
        found: click.Command = module.command
        return found


def _show_version(context: click.Context, _parameter: click.Parameter, value: bool) -> None:  # noqa: FBT001 - click's
    if value:
        click.echo(f"fdbroker {fdbroker.__version__}")
        context.exit()


@click.group(
    cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.option(
    "--socket",
    "socket_path",
    envvar=SOCKET_VARIABLE,
    type=click.UNPROCESSED,
    metavar="PATH",
    help="The broker's socket, for the commands that need it; they take the option too."
    f"  [environment: {SOCKET_VARIABLE}]",
)
@click.option(
    "--control",
    "control_path",
    envvar=CONTROL_VARIABLE,
    type=click.UNPROCESSED,
    metavar="PATH",
    help=f"The broker's control socket, likewise.  [environment: {CONTROL_VARIABLE}]",
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_version,
    help="Show the version and exit.",
)
def cli(socket_path: str | None, control_path: str | None) -> None:
    """Read files through the fdbroker daemon, as far as its policy allows you to.

    The broker opens files that you have no right to and hands them to you, open
    for reading, if its policy says so. These commands ask it.

    \b
    First steps:  fdbroker doctor                 is everything there and in order?
                  fdbroker ls DIRECTORY           what may I see?
                  fdbroker cat FILE               may I read it?
                  fdbroker policy explain FILE    why not?

    Each command has its own help with examples and exit status: fdbroker cat --help.
    """  # noqa: D301 - \b is click's mark for a paragraph that keeps its lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status.

    Every failure is status 2 unless the command has another one for it, also a
    failure that nobody thought of: Python's own 1 would mean "infected" to
    whoever runs a scan.
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
        return error.status if isinstance(error, Failure) else EXIT_ERROR
    except (click.Abort, KeyboardInterrupt):
        sys.stderr.write("fdbroker: interrupted\n")
    except ReaderGoneError:
        _give_up_output()
        return EXIT_READER_GONE
    except (OutputError, BrokenPipeError) as error:
        _give_up_output()
        sys.stderr.write(f"fdbroker: the output could not be written: {error}\n")
    except ModuleNotFoundError as missing:
        extra = missing_extra(missing)
        if extra is None:
            traceback.print_exc()
        else:
            Failure(extra).show()
    except Exception:  # noqa: BLE001 - shown, and never taken for a verdict
        traceback.print_exc()
    else:
        return status if isinstance(status, int) else 0
    return EXIT_ERROR


def missing_extra(missing: ModuleNotFoundError) -> str | None:
    """Return what to install for a module that is not there, None if it belongs to no extra."""
    package = (missing.name or "").partition(".")[0]
    extra = _EXTRAS.get(package)
    if extra is None:
        return None
    return f"the command needs {package}: pip install 'fdbroker[{extra}]'"


def _give_up_output() -> None:
    """Let the interpreter's last flush go nowhere, or it would choose the exit status."""
    with contextlib.suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
