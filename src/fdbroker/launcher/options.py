"""The command line of fdbrokerd."""

from __future__ import annotations

import argparse
import grp
import os
import pwd
import re
from typing import NamedTuple

from fdbroker.config import DEFAULT_POLICY
from fdbroker.config.defaults import ALL_PERMISSIONS, FOR_REQUESTS
from fdbroker.config.errors import did_you_mean, quoted
from fdbroker.config.identities import MAX_ID, OVERFLOW_ID
from fdbroker.launcher.version import installed_version

DEFAULT_PIDFILE = "/run/fdbroker/fdbrokerd.pid"
NONE = "none"
STANDARD_OUTPUT = "-"
_MOST_DIGITS = 19  # of a number that is an id or is not; int() takes time by the square of them

_DESCRIPTION = """\
Start the broker: the process that opens files for unprivileged programs, as far as the policy allows.

Started by root it makes its sockets, gives up everything but one capability, and serves until SIGTERM.
Started by systemd it takes sockets and privileges from its units. docs/fdbrokerd.md describes both."""

_EPILOG = """\
examples:
  fdbrokerd                               in the foreground, with /etc/fdbroker/policy.yaml
  fdbrokerd --daemon --audit /var/log/fdbroker/audit.jsonl
                                          in the background; returns when it serves
  fdbrokerd --policy ./try.yaml --socket /tmp/try/broker --control none
                                          with another policy and a socket of its own
  fdbrokerd --stop                        stop the one in the background; returns when it is gone

exit status:
  0  it was stopped, or its last connection is gone (with --daemon: it serves; with --stop: none runs;
     with --precompile: done)
  1  a bug: there is a traceback
  2  it did not start; what is in the way is said on standard error
  3  it did not start, since one that runs already holds the lock of the pidfile
"""


class Options(NamedTuple):
    """What the command line says. None: what the policy file says.

    `sockets`: paths, each with the kind of socket: `seqpacket`, `stream`, `dgram`.
    """

    policy: str
    background: bool
    stop: bool
    precompile: bool
    pidfile: str | None
    sockets: list[tuple[str, str]]
    socket_gid: int | None
    socket_mode: int | None
    control: str | None
    audit: str | None
    user: tuple[int, int] | None
    inherited: list[tuple[int, str]]
    ready: int | None
    dev: bool


def read_options(arguments: list[str]) -> Options:
    """Read the command line; paths become absolute.

    Raises:
        SystemExit: it is wrong (status 2), or help was asked for (0).

    """
    parser = option_parser()
    given, unknown = parser.parse_known_args(arguments)
    if unknown:
        options = re.findall(r"--[a-z-]+", parser.format_usage())
        cure = did_you_mean(unknown[0].partition("=")[0], options, "fdbrokerd --help shows all options")
        parser.error(f"unknown argument {quoted(unknown[0])}; {cure}")
    try:
        inherited = [_inherited(text) for text in given.inherited]
    except ValueError:
        parser.error("--inherited needs the number of a descriptor, as in 3=NAME")
    pidfile = given.pidfile
    if (given.daemon or given.stop) and pidfile is None:
        pidfile = DEFAULT_PIDFILE
    return Options(
        policy=os.path.abspath(given.policy),
        background=given.daemon,
        stop=given.stop,
        precompile=given.precompile,
        pidfile=None if pidfile is None else os.path.abspath(pidfile),
        sockets=[(os.path.abspath(path), kind) for kind in FOR_REQUESTS for path in getattr(given, kind)],
        socket_gid=given.socket_group,
        socket_mode=given.socket_mode,
        control=given.control if given.control in {None, NONE} else os.path.abspath(given.control),
        audit=given.audit if given.audit in {None, NONE, STANDARD_OUTPUT} else os.path.abspath(given.audit),
        user=given.user,
        inherited=inherited,
        ready=given.ready_fd,
        dev=given.dev,
    )


def option_parser() -> argparse.ArgumentParser:
    """Return what reads the command line, and has the text of --help. Manual pages are made of it."""
    parser = argparse.ArgumentParser(
        prog="fdbrokerd",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--policy",
        metavar="FILE",
        default=DEFAULT_POLICY,
        help="the policy, or a compiled policy whose name ends in .json (default: %(default)s)",
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--foreground", action="store_true", help="stay the caller's child (this is the default)"
    )
    how.add_argument("--daemon", action="store_true", help="go into the background; return when it serves")
    how.add_argument(
        "--stop",
        action="store_true",
        help="start nothing: end the broker that holds the lock of the pidfile, return when it is gone",
    )
    how.add_argument(
        "--precompile",
        action="store_true",
        help="start nothing: compile the broker's sources for later starts, as root, which are faster then",
    )
    parser.add_argument(
        "--pidfile",
        metavar="FILE",
        help=f"keep this file locked, with the process id in it (with --daemon, --stop: {DEFAULT_PIDFILE})",
    )
    _add_sockets(parser)
    parser.add_argument(
        "--audit",
        metavar="FILE",
        help="file to append the audit to, - for standard output, or none (default: audit.to of the policy)",
    )
    parser.add_argument(
        "--user",
        metavar="USER",
        type=_user,
        help="whom the broker runs as: a name, or UID:GID (default: user of the policy)",
    )
    parser.add_argument(
        "--ready-fd", metavar="FD", type=_descriptor, help="write 'ready' here when it serves, and close it"
    )
    parser.add_argument(
        "--dev",
        action="store_true",
        help="accept sources and policies that others than root can change; to try things out",
    )
    parser.add_argument("--version", action="version", version=f"fdbrokerd {installed_version()}")
    return parser


def _add_sockets(parser: argparse.ArgumentParser) -> None:
    for option, kind in (("--socket", "seqpacket"), ("--stream", "stream"), ("--dgram", "dgram")):
        parser.add_argument(
            option,
            dest=kind,
            metavar="PATH",
            action="append",
            default=[],
            help=f"make this SOCK_{kind.upper()} socket, and none of the policy's listeners; may be repeated",
        )
    parser.add_argument(
        "--socket-group",
        metavar="GROUP",
        type=_group,
        help="group of the sockets for requests (default: what the policy says; root's for --socket,"
        " --stream, --dgram)",
    )
    parser.add_argument(
        "--socket-mode",
        metavar="MODE",
        type=_mode,
        help="mode of the sockets for requests, in octal (default: what the policy says; 660 for --socket,"
        " --stream, --dgram)",
    )
    parser.add_argument(
        "--control",
        metavar="PATH",
        help="make the control socket here, or none (default: what the policy says; none with --socket,"
        " --stream, --dgram)",
    )
    parser.add_argument(
        "--inherited",
        metavar="FD[=NAME]",
        action="append",
        default=[],
        help="serve the connection on this descriptor, as inetd gives it on 0; ends with the last connection"
        " if nothing listens. May be repeated",
    )


def _mode(text: str) -> int:
    mode = int(text, 8)
    if mode & ~ALL_PERMISSIONS:
        raise argparse.ArgumentTypeError(f"{text!r} has more than permissions in it; write at most 777")
    return mode


def _group(text: str) -> int:
    try:
        number = int(text) if _is_number(text) else grp.getgrnam(text).gr_gid
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(f"there is no group {text!r} on this system; create it") from None
    return _usable(number, text)


def _user(text: str) -> tuple[int, int]:
    uid, colon, gid = text.partition(":")
    if colon and _is_number(uid) and _is_number(gid):
        return _usable(int(uid), text), _usable(int(gid), text)
    try:
        entry = pwd.getpwnam(text)
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a user of this system nor uid:gid") from None
    return _usable(entry.pw_uid, text), _usable(entry.pw_gid, text)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= _MOST_DIGITS


def _usable(number: int, text: str) -> int:
    """Return an id of a user or a group that stands for somebody."""
    if number > MAX_ID or number == OVERFLOW_ID:
        whose = "nobody's" if number > MAX_ID else "anybody's"
        raise argparse.ArgumentTypeError(f"{text!r}: id {number} is {whose}; name a user or group of its own")
    return number


def _descriptor(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not the number of a descriptor")
    return int(text)


def _inherited(text: str) -> tuple[int, str]:
    number, _, name = text.partition("=")
    if not (number.isascii() and number.isdigit()):
        raise ValueError(text)
    return int(number), name or f"inherited-{number}"
