"""`python -m fdbroker.config compile|check|schema`: problems to standard error, exit status 2 on any."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Sequence

from fdbroker.config.compile import compile_policy
from fdbroker.config.compiled import dumps
from fdbroker.config.errors import ConfigError, printable
from fdbroker.config.identities import Lookups, OfflineLookups, SystemLookups
from fdbroker.config.schema import json_schema
from fdbroker.config.sources import read_policy_file

EXIT_OK = 0
EXIT_REFUSED = 2
_DEV_HELP = "accept a file of the user who runs this, also below /tmp; for development only"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status.

    Raises:
        SystemExit: the command line is wrong (status 2), or help was asked for (0).

    """
    options = _parser().parse_args(arguments)
    if options.command == "schema":
        sys.stdout.write(json.dumps(json_schema(), indent=2) + "\n")
        return EXIT_OK
    lookups: Lookups = OfflineLookups() if options.command == "check" and options.offline else SystemLookups()
    try:
        compiled = compile_policy(read_policy_file(options.file, dev=options.dev), options.file, lookups)
        if options.command == "check":
            counts = f"{len(compiled['roots'])} roots, {len(compiled['rules'])} rules"
            sys.stdout.write(f"{printable(options.file)}: {counts}, no problems\n")
        elif options.output == "-":
            sys.stdout.write(dumps(compiled))
        else:
            _replace(options.output, dumps(compiled).encode())
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_REFUSED
    except OSError as error:
        sys.stderr.write(f"{printable(options.output)}: can't be written: {error.strerror}\n")
        return EXIT_REFUSED
    return EXIT_OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fdbroker.config",
        description="Check a policy of fdbroker, or compile it to what the broker reads.",
        epilog="Exit status: 0 when there is no problem, 2 otherwise; then nothing is written.",
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
    compiling.add_argument("--dev", action="store_true", help=_DEV_HELP)
    checking = commands.add_parser("check", help="report every problem, write nothing")
    checking.add_argument("file", metavar="FILE")
    checking.add_argument("--dev", action="store_true", help=_DEV_HELP)
    checking.add_argument(
        "--offline",
        action="store_true",
        help="the policy is for another machine: do not look for its directories, users and groups here",
    )
    commands.add_parser("schema", help="write the JSON Schema of the policy file, for editors")
    return parser


def _replace(path: str, text: bytes) -> None:
    """Write a file so that whoever reads it meets the old or the new one, whole.

    Raises:
        OSError: it can't be written; the old file is as it was.

    """
    # mkstemp: a new name, never followed, mode 0600. Nobody but root needs to read a compiled policy.
    descriptor, temporary = tempfile.mkstemp(prefix=".policy-", dir=os.path.dirname(path) or ".")
    try:
        with open(descriptor, "wb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


if __name__ == "__main__":
    sys.exit(main())
