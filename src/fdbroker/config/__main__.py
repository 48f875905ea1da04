"""`python -m fdbroker.config compile|check|schema`: problems to standard error, exit status 2 on any."""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

from fdbroker.cli.streams import give_up
from fdbroker.cli.whole_file import whole_file
from fdbroker.config.compile import compile_files
from fdbroker.config.compiled import dumps
from fdbroker.config.defaults import EXIT_OK, EXIT_REFUSED
from fdbroker.config.errors import ConfigError
from fdbroker.config.identities import SystemLookups
from fdbroker.config.names import printable
from fdbroker.config.sources import read_policy_files

_CURES = {
    errno.ENOENT: "make its directory first",
    errno.ENOTDIR: "name a file in a directory that exists",
    errno.EISDIR: "name a file",
    errno.EACCES: "run this as root, or write elsewhere",
    errno.EPERM: "run this as root, or write elsewhere",
    errno.ENOSPC: "make room, or write elsewhere",
}
_DEV_HELP = "accept a file of the user who runs this, also below /tmp; for development only"


class UnwrittenError(Exception):
    """What was made could not be written; the text, which is printable, names the file and the cure."""

    def __init__(self, where: str, error: OSError) -> None:
        cure = _CURES.get(error.errno or 0, "write elsewhere")
        super().__init__(f"{printable(where)}: can't be written: {error.strerror}; {cure}")


class Result(NamedTuple):
    """What belongs on standard output and standard error, and the exit status."""

    output: str
    told: str = ""
    status: int = EXIT_OK


def run(arguments: Sequence[str] | None = None) -> Result:
    """Do what the command line says and return what is to be written.

    Raises:
        UnwrittenError: the file that was to be made could not be.
        SystemExit: the command line is wrong (status 2), or help was asked for (0).

    """
    options = _parser().parse_args(arguments)
    if options.command == "schema":
        from fdbroker.config.schema import json_schema  # noqa: PLC0415 - a start compiles, and nothing else

        return Result(json.dumps(json_schema(), indent=2) + "\n")
    if options.command == "check":
        from fdbroker.config.check import check  # noqa: PLC0415 - likewise

        checked = check(options.file, dev=options.dev, offline=options.offline, ignored=options.ignore)
        status = checked.status(strict=options.strict)
        if options.json:
            return Result(checked.document(), status=status)
        return Result(checked.summary(), checked.told(), status)
    try:
        files = read_policy_files(options.file, dev=options.dev)
        compiled = compile_files(files, SystemLookups(), for_service=options.service)
    except ConfigError as error:
        if options.keep and os.path.isfile(options.output):
            kept = f"{printable(options.output)} stays as it was: the policy that was in force\n"
            return Result("", f"{error}\n{kept}")
        return Result("", f"{error}\n", EXIT_REFUSED)
    text = dumps(compiled)
    if options.output == "-":
        return Result(text)
    try:
        # Nobody but root needs to read a compiled policy.
        with whole_file(options.output, 0o600) as file:
            file.write(text.encode())
    except OSError as error:
        raise UnwrittenError(options.output, error) from error
    return Result("")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status.

    Raises:
        SystemExit: as `run`.

    """
    try:
        result = run(arguments)
        sys.stderr.write(result.told)
        try:
            sys.stdout.write(result.output)
            sys.stdout.flush()
        except OSError as error:
            give_up(sys.stdout)
            raise UnwrittenError("standard output", error) from error
    except UnwrittenError as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_REFUSED
    return result.status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fdbroker.config",
        description="Check a policy of fdbroker, or compile it to what the broker reads.",
        epilog="Exit status: 0 when there is no error, 2 otherwise, and then nothing is written."
        " check --strict: 1 if there are warnings.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    compiling = commands.add_parser("compile", help="write the compiled policy")
    compiling.add_argument("file", metavar="FILE")
    compiling.add_argument(
        "--output",
        metavar="FILE",
        default="-",
        help="where to write, as a whole or not at all (default: -, standard output)",
    )
    compiling.add_argument(
        "--keep",
        action="store_true",
        help="if the policy has problems and the output is there, tell them, leave it as it is, and exit 0",
    )
    compiling.add_argument(
        "--service",
        action="store_true",
        help="it is for a service that is started as the broker's user, who can open no file for writing",
    )
    compiling.add_argument("--dev", action="store_true", help=_DEV_HELP)
    checking = commands.add_parser("check", help="report every problem, write nothing")
    checking.add_argument("file", metavar="FILE")
    checking.add_argument("--dev", action="store_true", help=_DEV_HELP)
    checking.add_argument(
        "--offline",
        action="store_true",
        help="the policy is for another machine: do not look for its directories, users and groups here",
    )
    checking.add_argument("--strict", action="store_true", help="exit status 1 if there are warnings")
    checking.add_argument(
        "--ignore", action="append", default=[], type=_kind, help="a kind of finding to leave out"
    )
    checking.add_argument("--json", action="store_true", help="write one JSON object")
    commands.add_parser("schema", help="write the JSON Schema of the policy file, for editors")
    return parser


def _kind(text: str) -> str:
    from fdbroker.config.findings import KINDS  # noqa: PLC0415 - a start has none

    if text not in KINDS:
        raise argparse.ArgumentTypeError(f"--ignore {text}: the kinds are {', '.join(KINDS)}")
    return text


if __name__ == "__main__":
    sys.exit(main())
