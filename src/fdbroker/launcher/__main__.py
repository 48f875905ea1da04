"""Start a broker in the foreground, as root: python -m fdbroker.launcher --policy FILE --socket PATH.

The policy is compiled by a child that ends; this process never parses YAML.
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import json
import os
import pwd
import socket
import stat
import subprocess
import sys
from typing import Any

from fdbroker.config import ConfigError, read_policy_file
from fdbroker.launcher.mounts import ReadOnlyViewError
from fdbroker.launcher.privileges import PrivilegeError
from fdbroker.launcher.start import Start, start_broker
from fdbroker.policy.rules import PolicyError, read_policy

_EXIT_NOT_STARTED = 2
_BACKLOG = 128
_AUDIT_ROOM = 1 << 20  # bytes; what a process without privilege may have for a pipe (pipe-max-size)


class StartError(Exception):
    """What was given can't be used; the text says what and why."""


def main() -> int:
    """Start the broker; return only if it does not start."""
    options = _parse_arguments()
    if not (options.dev or sys.flags.safe_path):
        sys.stderr.write(
            "fdbroker: start it as `python -I -m fdbroker.launcher`: without -I the code of the\n"
        )
        sys.stderr.write("working directory and of PYTHONPATH would run as root (--dev allows it)\n")
        return _EXIT_NOT_STARTED
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
    parser.add_argument("--socket-mode", type=_read_mode, default=0o660, help="octal, default 660")
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


def _read_mode(text: str) -> int:
    mode = int(text, 8)
    if mode & ~0o777:
        raise ValueError(text)
    return mode


def _read_user(text: str) -> tuple[int, int]:
    uid, colon, gid = text.partition(":")
    if colon:
        return int(uid), int(gid)
    entry = pwd.getpwnam(text)
    return entry.pw_uid, entry.pw_gid


def _compile(path: str, *, dev: bool) -> dict[str, Any]:
    if path.endswith(".json"):
        try:
            document = json.loads(read_policy_file(path, dev=dev))
        except ConfigError as error:
            raise StartError(str(error)) from error
        except ValueError as error:
            raise StartError(f"{path} is no JSON: {error}; compile the policy anew") from error
    else:
        # Neither the working directory nor the environment may lead it to other code; --dev finds a checkout.
        command = [sys.executable, "-P" if dev else "-I", "-m", "fdbroker.config", "compile"]
        command += [os.path.abspath(path), *(["--dev"] if dev else [])]
        compiler = subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd="/")  # noqa: S603 - ourselves
        document = json.loads(compiler.stdout)
    try:
        read_policy(document)
    except PolicyError as error:
        raise StartError(f"{path} is not a compiled policy: {error}; compile it anew") from error
    return dict(document)


def _listen(path: str, mode: int) -> tuple[int, str]:
    """Make a listening socket. A socket that nobody listens on is replaced; nothing else is."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    # The mode comes with the name: bind(2) makes it 0777 without what is masked.
    before = os.umask(0o777 & ~mode)
    try:
        if _is_stale(path):
            os.unlink(path)
        listener.bind(path)
    except OSError as error:
        listener.close()
        cure = {
            errno.EADDRINUSE: "something is there: a broker that runs, or a file; stop or remove it",
            errno.ENOENT: "make its directory first",
        }.get(error.errno or 0, error.strerror or str(error))
        raise StartError(f"--socket {path!r} can't be made: {cure}") from error
    finally:
        os.umask(before)
    listener.listen(_BACKLOG)
    return listener.detach(), os.path.basename(path)


def _is_stale(path: str) -> bool:
    """Return whether `path` is a socket that a broker left behind: nobody accepts there."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return False
    except FileNotFoundError:
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        return probe.connect_ex(path) == errno.ECONNREFUSED


def _inherited(text: str) -> tuple[int, str]:
    number, _, name = text.partition("=")
    return int(number), name or f"inherited-{number}"


def _open_audit(path: str) -> int | None:
    if path == "none":
        return None
    if path == "-":
        mode = os.fstat(1).st_mode
        if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
            # A reader that is stuck must not stop the broker: what it has no room for is denied. So there is
            # room for the largest request, which a pipe of the usual size has not.
            os.set_blocking(1, False)
        if stat.S_ISFIFO(mode):
            fcntl.fcntl(1, fcntl.F_SETPIPE_SZ, _AUDIT_ROOM)
        elif stat.S_ISSOCK(mode):
            with socket.socket(fileno=os.dup(1)) as output:
                output.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _AUDIT_ROOM)
        return 1
    # O_NONBLOCK: the open of a FIFO must not wait for its reader; it means nothing to a regular file.
    flags = (
        os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
    )
    descriptor = os.open(path, flags, 0o640)
    facts = os.fstat(descriptor)
    if not stat.S_ISREG(facts.st_mode):
        os.close(descriptor)
        raise StartError(f"--audit {path} is not a regular file; use - for standard output")
    if facts.st_uid != 0 or facts.st_nlink != 1 or facts.st_mode & 0o022:
        os.close(descriptor)
        raise StartError(
            f"--audit {path} must belong to root, have one name and be writable by nobody else: move it away"
        )
    return descriptor


if __name__ == "__main__":
    sys.exit(main())
