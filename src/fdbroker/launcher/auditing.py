"""Where the audit goes, opened before there is a broker: it can open nothing for writing."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat

from fdbroker.launcher.errors import StartError
from fdbroker.launcher.options import NONE, STANDARD_OUTPUT

_ROOM = 1 << 20  # bytes; what a process without privilege may have for a pipe (pipe-max-size)
# O_NONBLOCK: the open of a FIFO must not wait for its reader; it means nothing to a regular file.
_FLAGS = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK


def open_audit(where: str) -> int | None:
    """Return a descriptor to append to; None for no audit.

    Raises:
        StartError: it is a file that is not root's alone, or can't be opened.

    """
    if where == NONE:
        return None
    if where == STANDARD_OUTPUT:
        _make_room(1)
        return 1
    try:
        descriptor = os.open(where, _FLAGS, 0o640)
    except OSError as error:
        cure = "make its directory, or name another file"
        if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
            cure = f"a service of systemd leaves audit.to out and sets StandardOutput=append:{where}"
        elif error.errno == errno.ELOOP:
            cure = "it is a symbolic link: name the file itself"
        raise StartError(f"audit {where} can't be opened: {error.strerror}; {cure}") from error
    facts = os.fstat(descriptor)
    if not stat.S_ISREG(facts.st_mode):
        os.close(descriptor)
        raise StartError(f"audit {where} is not a regular file; use - for standard output")
    if facts.st_uid != 0 or facts.st_nlink != 1 or facts.st_mode & 0o022:
        os.close(descriptor)
        raise StartError(
            f"audit {where} must belong to root, have one name and be writable by nobody else: move it away"
        )
    return descriptor


def _make_room(output: int) -> None:
    """See that a reader who is stuck can't stop the broker: what it has no room for is denied.

    So there is room for the largest request, which a pipe of the usual size has not.
    """
    mode = os.fstat(output).st_mode
    if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
        os.set_blocking(output, False)
    if stat.S_ISFIFO(mode):
        fcntl.fcntl(output, fcntl.F_SETPIPE_SZ, _ROOM)
    elif stat.S_ISSOCK(mode):
        with socket.socket(fileno=os.dup(output)) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _ROOM)
