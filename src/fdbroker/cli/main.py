"""The group that all commands belong to, and the way in."""

from __future__ import annotations

import importlib
import signal
import sys
from typing import TYPE_CHECKING

import click

import fdbroker
from fdbroker.cli import streams
from fdbroker.cli.broker import CONTROL_VARIABLE, SOCKET_VARIABLE, descriptors_option
from fdbroker.cli.failure import EXIT_ERROR, Failure
from fdbroker.cli.group import SuggestingGroup
from fdbroker.cli.output import (
    OutputError,
    ReaderGoneError,
    complain,
    complain_of_bug,
    complain_printable,
)
from fdbroker.config.names import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

# As a shell shows a program that SIGPIPE ended.
EXIT_READER_GONE = 128 + signal.SIGPIPE

# Each is in the module of its name here, as `command`: what one command needs the others do not load.
COMMANDS = (
    "scan",
    "cat",
    "ls",
    "walk",
    "exec",
    "policy",
    "reload",
    "status",
    "top",
    "audit",
    "doctor",
    "sandbox",
)
_EXTRAS = {"rich": "cli", "yaml": "daemon", "prometheus_client": "metrics"}


class _Commands(SuggestingGroup):
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
@descriptors_option
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
def cli(socket_path: str | None, descriptors: tuple[int, ...] | None, control_path: str | None) -> None:
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
    streams.prepare()
    status = _run(arguments)
    try:
        sys.stdout.flush()
    except OSError:
        # Told already, or of less weight than what was.
        streams.give_up(sys.stdout)
    return status


def _run(arguments: Sequence[str] | None) -> int:
    try:
        status = cli.main(arguments, prog_name="fdbroker", standalone_mode=False)
        sys.stdout.flush()
    except Failure as error:
        error.show()
        return error.status
    except click.ClickException as error:
        streams.write_error(_wrong_use(error))
    except (click.Abort, KeyboardInterrupt):
        complain_printable("interrupted")
    except ReaderGoneError:
        return EXIT_READER_GONE
    except (OutputError, BrokenPipeError) as error:
        complain(f"the output could not be written: {error}")
    except ModuleNotFoundError as missing:
        extra = missing_extra(missing)
        if extra is None:
            complain_of_bug()
        else:
            complain_printable(extra)
    except OSError as error:
        # Of what click writes itself: the help. All else is dealt with where it can be told what it is about.
        complain(str(error))
    except Exception:  # noqa: BLE001 - shown, and never taken for a verdict
        complain_of_bug()
    else:
        return status if isinstance(status, int) else 0
    return EXIT_ERROR


def _wrong_use(error: click.ClickException) -> str:
    """Return what click says of wrong use. Older versions show arguments in it as they are."""
    text = f"Error: {printable(error.format_message())}\n"
    context = getattr(error, "ctx", None)
    if context is None:
        return text
    if error.message == context.get_help():
        return f"{error.message}\n"  # nothing was asked for
    return f"{context.get_usage()}\nTry '{context.command_path} --help' for help.\n\n{text}"


def missing_extra(missing: ModuleNotFoundError) -> str | None:
    """Return what to install for a module that is not there, None if it belongs to no extra."""
    package = (missing.name or "").partition(".")[0]
    extra = _EXTRAS.get(package)
    if extra is None:
        return None
    return f"the command needs {package}: pip install 'fdbroker[{extra}]'"
