"""Start a broker in the foreground, as root: python -m fdbroker.launcher --policy FILE --socket PATH.

The policy is compiled by a child that ends; this process never parses YAML.
"""

from __future__ import annotations

import argparse
import json
import os
import pwd
import socket
import stat
import subprocess
import sys
from typing import Any

from fdbroker.launcher.mounts import ReadOnlyViewError
from fdbroker.launcher.privileges import PrivilegeError
from fdbroker.launcher.start import Start, start_broker
from fdbroker.policy.rules import PolicyError, read_policy

_EXIT_NOT_STARTED = 2
_BACKLOG = 128


class StartError(Exception):
    """What was given can't be used; the text says what and why."""


def main() -> int:
    """Start the broker; return only if it does not start."""
    options = _parse_arguments()
    if os.geteuid() != 0:
        sys.stderr.write("fdbroker: the broker is started as root, which it gives up at once\n")
        return _EXIT_NOT_STARTED
    try:
        policy = _compile(options.policy, dev=options.dev)
        start_broker(
            Start(
                uid=options.uid,
                gid=options.gid,
                policy=policy,
                listeners=[_listen(path, options.socket_mode) for path in options.socket],
                connections=options.inherited,
                audit=_open_audit(options.audit),
                ready=options.ready_fd,
                dev=options.dev,
            )
        )
    except subprocess.CalledProcessError as error:
        # The compiler has said why.
        return error.returncode
    except (OSError, StartError, ReadOnlyViewError, PrivilegeError) as error:
        sys.stderr.write(f"fdbroker: {error}\n")
        return _EXIT_NOT_STARTED


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fdbroker.launcher", description=__doc__)
    parser.add_argument("--policy", required=True, help="policy.yaml, or a compiled policy ending in .json")
    parser.add_argument("--socket", action="append", default=[], help="SOCK_SEQPACKET socket to make")
    parser.add_argument(
        "--socket-mode", type=lambda text: int(text, 8), default=0o660, help="octal, default 660"
    )
    parser.add_argument(
        "--inherited", action="append", default=[], metavar="FD=NAME", help="serve this connection"
    )
    parser.add_argument("--audit", default="-", help="file to append to, - for standard output, or none")
    parser.add_argument("--user", default="fdbroker", help="who the broker runs as: a name or uid:gid")
    parser.add_argument("--ready-fd", type=int, help="'ready' is written here once the broker serves")
    parser.add_argument("--dev", action="store_true", help="accept sources and policies of other owners")
    options = parser.parse_args()
    if not options.socket and not options.inherited:
        parser.error("a broker needs a --socket or an --inherited connection")
    try:
        options.uid, options.gid = _read_user(options.user)
    except (KeyError, ValueError):
        parser.error(f"--user {options.user!r} is neither a user of this system nor uid:gid")
    try:
        options.inherited = [_inherited(text) for text in options.inherited]
    except ValueError:
        parser.error("--inherited needs the number of a descriptor, as in 3=NAME")
    return options


def _read_user(text: str) -> tuple[int, int]:
    uid, colon, gid = text.partition(":")
    if colon:
        return int(uid), int(gid)
    entry = pwd.getpwnam(text)
    return entry.pw_uid, entry.pw_gid


def _compile(path: str, *, dev: bool) -> dict[str, Any]:
    if path.endswith(".json"):
        try:
            with open(path, "rb") as file:
                document = json.load(file)
        except ValueError as error:
            raise StartError(f"{path} is no JSON: {error}; compile the policy anew") from error
    else:
        command = [sys.executable, "-m", "fdbroker.config", "compile", path, *(["--dev"] if dev else [])]
        compiler = subprocess.run(command, check=True, stdout=subprocess.PIPE)  # noqa: S603 - ourselves
        document = json.loads(compiler.stdout)
    try:
        read_policy(document)
    except PolicyError as error:
        raise StartError(f"{path} is not a compiled policy: {error}; compile it anew") from error
    return dict(document)


def _listen(path: str, mode: int) -> tuple[int, str]:
    """Make a listening socket; what is there already is never removed or replaced."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    before = os.umask(0o777)
    try:
        listener.bind(path)
    except OSError as error:
        raise OSError(
            error.errno, f"{error.strerror}; if nothing listens there any more, remove it", path
        ) from None
    finally:
        os.umask(before)
    os.chmod(path, mode)  # ours: bind made it, in a directory that only root can write
    listener.listen(_BACKLOG)
    return listener.detach(), os.path.basename(path)


def _inherited(text: str) -> tuple[int, str]:
    number, _, name = text.partition("=")
    return int(number), name or f"inherited-{number}"


def _open_audit(path: str) -> int | None:
    if path == "none":
        return None
    if path == "-":
        mode = os.fstat(1).st_mode
        if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
            # A reader that is stuck must not stop the broker: what it has no room for is denied.
            os.set_blocking(1, False)
        return 1
    # O_NONBLOCK: the open of a FIFO must not wait for its reader; it means nothing to a regular file.
    flags = (
        os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
    )
    descriptor = os.open(path, flags, 0o640)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise StartError(f"--audit {path} is not a regular file; use - for standard output")
    return descriptor


if __name__ == "__main__":
    sys.exit(main())
