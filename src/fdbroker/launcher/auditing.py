"""Where the audit goes, opened before there is a broker: it can open nothing for writing."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import socket
import stat

from fdbroker.broker.audit import objection_to_file
from fdbroker.kernel import process
from fdbroker.launcher.directories import open_directory_of_root
from fdbroker.launcher.errors import LaunchError
from fdbroker.launcher.options import NONE, STANDARD_OUTPUT

_ROOM = 1 << 20  # bytes; what a process without privilege may have for a pipe (pipe-max-size)
# O_NONBLOCK: the open of a FIFO must not wait for its reader; it means nothing to a regular file.
_FLAGS = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
_CAT = "/bin/cat"
# What a terminal sends to all that is in its foreground: what is on the way to it shall still arrive.
_FROM_TERMINALS = (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP)


def open_audit(where: str, uid: int, gid: int) -> int | None:
    """Return a descriptor to append to, which is the caller's, or standard output; None for no audit.

    `uid` and `gid` are the broker's: a process that writes to a terminal for it has them, too.

    Raises:
        LaunchError: it is a file that is not root's alone, or can't be opened.

    """
    if where == NONE:
        return None
    if where == STANDARD_OUTPUT:
        _prepare_standard_output(uid, gid)
        return 1
    return open_audit_file(where)


def open_audit_file(where: str) -> int:
    """Return a descriptor, the caller's, to append records to a file, which is made if it is missing.

    What is there ends with a whole line: a record that was cut, as a crash may leave one, is ended.

    Raises:
        LaunchError: as above.

    """
    try:
        # /var/log itself is a group's to write on some systems (syslog's on Ubuntu).
        directory = open_directory_of_root(os.path.dirname(where), group_above=True)
    except LaunchError as error:
        raise LaunchError(f"audit {where} can't be opened: {error}") from error
    try:
        descriptor = os.open(os.path.basename(where), _FLAGS, 0o640, dir_fd=directory)
    except OSError as error:
        cure = "name another file"
        if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
            cure = f"a service of systemd leaves audit.to out and sets StandardOutput=append:{where}"
        elif error.errno == errno.ELOOP:
            cure = "it is a symbolic link: name the file itself"
        raise LaunchError(f"audit {where} can't be opened: {error.strerror}; {cure}") from error
    finally:
        os.close(directory)
    try:
        objection = objection_to_file(descriptor)
        if objection is not None:
            cure = "; use - for standard output" if not stat.S_ISREG(os.fstat(descriptor).st_mode) else ""
            raise LaunchError(f"audit {where} {objection}{cure}")
        _end_the_last_line(descriptor)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _end_the_last_line(descriptor: int) -> None:
    """See that the next record begins on a line of its own, in a regular file that is open for appending.

    What can't be read or written is left: the first record shows whether there is room.
    """
    with contextlib.suppress(OSError):
        size = os.fstat(descriptor).st_size
        reading = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            whole = not size or os.pread(reading, 1, size - 1) == b"\n"
        finally:
            os.close(reading)
        if not whole:
            os.write(descriptor, b"\n")


def _prepare_standard_output(uid: int, gid: int) -> None:
    """See that a reader who is stuck can't stop the broker: what it has no room for is denied.

    So there is room for the largest request, which a pipe of the usual size has
    not, and a terminal less: whose output is stopped (Ctrl-S), or who is just
    slow, is written to by a process in between.
    """
    mode = os.fstat(1).st_mode
    try:
        if os.isatty(1):
            _put_a_pipe_before_the_terminal(uid, gid)
        elif stat.S_ISFIFO(mode):
            os.set_blocking(1, False)
            fcntl.fcntl(1, fcntl.F_SETPIPE_SZ, _ROOM)
        elif stat.S_ISSOCK(mode):
            os.set_blocking(1, False)
            with socket.socket(fileno=os.dup(1)) as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _ROOM)
        elif stat.S_ISREG(mode):
            _end_the_last_line(1)
    except OSError as error:
        raise LaunchError(
            f"the audit can't go to standard output: {error.strerror or error}; raise fs.pipe-max-size to"
            f" {_ROOM} if it is lower, or name a file by --audit"
        ) from error


def _put_a_pipe_before_the_terminal(uid: int, gid: int) -> None:
    """Let cat(1), as the broker's user, copy to the terminal what is written to descriptor 1 from now on.

    It ends with the last writer.
    """
    if not os.access(_CAT, os.X_OK):
        raise FileNotFoundError(errno.ENOENT, f"a terminal needs {_CAT}, which is not there")
    read_end, write_end = os.pipe()
    fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, _ROOM)
    os.set_blocking(write_end, False)
    child = os.fork()
    if not child:
        _become_cat(read_end, uid, gid)
    os.waitpid(child, 0)
    os.dup2(write_end, 1)
    os.close(read_end)
    os.close(write_end)


def _become_cat(pipe: int, uid: int, gid: int) -> None:
    """Be it, and nobody's child, so that the broker has no zombie; never returns."""
    try:
        if os.fork():
            return
        for number in _FROM_TERMINALS:
            signal.signal(number, signal.SIG_IGN)
        os.dup2(pipe, 0)
        process.close_range(3)
        process.change_ids(uid, gid)
        os.execve(_CAT, [_CAT], {})  # noqa: S606 - no shell, and descriptors 0 to 2 alone
    finally:
        os._exit(1)
