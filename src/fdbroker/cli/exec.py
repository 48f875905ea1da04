"""`fdbroker exec`."""

from __future__ import annotations

import errno
import os
import signal
from typing import TYPE_CHECKING, Any, NoReturn

import click

from fdbroker.cli import broker
from fdbroker.cli.failure import Failure
from fdbroker.cli.output import complain_of_bug
from fdbroker.cli.paths import absolute
from fdbroker.client import BrokerError
from fdbroker.config.names import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

# As env(1), nice(1) and the shell have it: what PROGRAM returns must not be taken for these.
EXIT_FAILED = 125
EXIT_NOT_EXECUTABLE = 126
EXIT_NOT_FOUND = 127

ANNOUNCED = "FDBROKER_FD"
_IGNORED_BY_PYTHON = ("SIGPIPE", "SIGXFSZ")


class _ExecCommand(click.Command):
    """Ends with 125 where the command itself fails, also by wrong use."""

    def make_context(self, *arguments: Any, **named: Any) -> click.Context:  # noqa: ANN401 - click's
        try:
            return super().make_context(*arguments, **named)
        except click.ClickException as error:
            raise _wrong_use(error) from error
        except OSError as error:
            raise Failure(f"the help could not be written: {error.strerror}", EXIT_FAILED) from error

    def invoke(self, ctx: click.Context) -> Any:  # noqa: ANN401 - click's
        try:
            return super().invoke(ctx)
        except Failure:
            raise
        except click.ClickException as error:
            raise _wrong_use(error) from error
        except KeyboardInterrupt as error:
            raise Failure("interrupted", EXIT_FAILED) from error
        except Exception:  # noqa: BLE001 - shown, and never taken for PROGRAM's own status
            complain_of_bug()
            return EXIT_FAILED


def _wrong_use(error: click.ClickException) -> Failure:
    hint = ""
    if isinstance(error, click.NoSuchOption):
        hint = " Write -- before PROGRAM, so that its options are its own."
    text = f"{printable(error.format_message())}{hint}"
    return Failure(f"{text}\nSee fdbroker exec --help for how it is used.", EXIT_FAILED)


@click.command("exec", cls=_ExecCommand, short_help="Run a program on a file, or with a connection.")
@click.argument("words", metavar="[PATH] -- PROGRAM [ARGUMENT]...", nargs=-1, type=click.UNPROCESSED)
@click.option(
    "--fd",
    "number",
    type=click.IntRange(0, 1023),
    metavar="N",
    help="Give PROGRAM the file, or the connection, as descriptor N.  [default: 0, standard input, for a"
    " file; any free one for a connection]",
)
@click.option(
    "--connect",
    "connection",
    is_flag=True,
    help=f"Give PROGRAM a connection to the broker instead of a file; {ANNOUNCED} in its environment has the"
    " descriptor.",
)
@broker.socket_option
def command(words: Sequence[str], socket_path: str, number: int | None, *, connection: bool) -> None:
    """Run PROGRAM with a file that the broker opens, or with a connection to the broker.

    PROGRAM takes the place of this command: same process, same user, no
    privilege. It reads the file PATH from its standard input (or from
    descriptor N), without any right to its path.

    With --connect it gets a connection of its own on which nothing was said
    yet. The broker knows who connected: the connection serves PROGRAM and no
    process that it starts.

    \b
    In Python: number = int(os.environ["FDBROKER_FD"])
               client = fdbroker.Client.from_socket(socket.socket(fileno=number))

    \b
    Exit status: that of PROGRAM, or
                 125  this command failed: no broker, the file was not given,
                      wrong use
                 126  PROGRAM was found and can't be run
                 127  PROGRAM was not found

    \b
    Examples:  fdbroker exec /home/alice/archive.tar -- tar -t
               fdbroker exec --fd 3 /etc/mail/key.txt -- gpg --passphrase-fd 3 -d m.gpg
               fdbroker exec --connect -- python3 indexer.py
    """  # noqa: D301 - \b is click's mark for a paragraph that keeps its lines
    if connection:
        if not words:
            raise click.UsageError("which PROGRAM? fdbroker exec --connect -- PROGRAM ...")
        _become(words, _give_connection(socket_path, number))
    if len(words) < 2:  # noqa: PLR2004 - a path and a program
        raise click.UsageError("which PATH, and which PROGRAM? fdbroker exec PATH -- PROGRAM ...")
    _give_file(absolute(words[0]), socket_path, 0 if number is None else number)
    _become(words[1:], None)


def _give_file(path: bytes, socket_path: str, number: int) -> None:
    with broker.connect(socket_path, EXIT_FAILED) as connected:
        try:
            descriptor = connected.open_descriptor(path)
        except BrokerError as error:
            raise Failure(broker.refusal(path, error, socket_path), EXIT_FAILED) from error
    _move(descriptor, number)


def _give_connection(socket_path: str, number: int | None) -> int:
    descriptor = broker.connect_only(socket_path, EXIT_FAILED).detach()
    if number is None:
        os.set_inheritable(descriptor, True)
        return descriptor
    _move(descriptor, number)
    return number


def _move(descriptor: int, number: int) -> None:
    """Make a descriptor inheritable under a number; what had it before is closed."""
    if descriptor == number:
        os.set_inheritable(descriptor, True)
        return
    try:
        os.dup2(descriptor, number)
    except OSError as error:
        cure = "give a lower one with --fd, or allow more open files (ulimit -n)"
        text = f"descriptor {number} can't be used: {error.strerror}; {cure}"
        raise Failure(text, EXIT_FAILED) from error
    os.close(descriptor)


def _become(program: Sequence[str], announced: int | None) -> NoReturn:
    """Become PROGRAM.

    Raises:
        Failure: it can't be run.

    """
    environment = dict(os.environ)
    # One from outside would name a connection that is not this process's.
    environment.pop(ANNOUNCED, None)
    if announced is not None:
        environment[ANNOUNCED] = str(announced)
    for name in _IGNORED_BY_PYTHON:
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    try:
        os.execvpe(program[0], list(program), environment)  # noqa: S606 - what was asked for
    except (OSError, ValueError) as error:
        missing = isinstance(error, OSError) and error.errno in {errno.ENOENT, errno.ENOTDIR}
        text = error.strerror if isinstance(error, OSError) else str(error)
        status = EXIT_NOT_FOUND if missing else EXIT_NOT_EXECUTABLE
        raise Failure(f"{printable(program[0])}: {printable(text or str(error))}", status) from error
