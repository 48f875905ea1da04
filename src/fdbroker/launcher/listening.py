"""Sockets that are made by hand: nobody else can put something in their place, or connect too early.

The directory is root's alone, and is held open from the check to the last step.
The socket gets its group and its mode before it listens. What a broker that
is gone has left behind is replaced; everything else that is there is left alone.

Until it listens, a socket looks as one that was left behind, so starts go one
after the other here. Their lock is a file that root alone can open, since
whoever can open a file can hold its lock, and it is there for that long only.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
from typing import TYPE_CHECKING, NamedTuple

from fdbroker.kernel import sockets
from fdbroker.launcher.directories import open_directory_of_root
from fdbroker.launcher.errors import LaunchError
from fdbroker.launcher.inherited import KINDS

if TYPE_CHECKING:
    from collections.abc import Iterator

_BACKLOG = 128  # connections that nobody has accepted yet
_LOCK = ".fdbrokerd.lock"
_LOCK_FLAGS = os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY


class WantedSocket(NamedTuple):
    """A socket to be made. `name` is what the audit and the status call it.

    `kind`: `seqpacket`, `stream` or `dgram`. `service`: whose clients come there, None: the broker's.
    """

    path: str
    gid: int
    mode: int
    name: str
    kind: str = "seqpacket"
    service: str | None = None


class _Made(NamedTuple):
    """A socket that was made. `at` is its name's, held so that its inode's number is not given to another."""

    directory: int
    name: str
    at: int


class MadeSockets:
    """Makes sockets, and removes them again when the start fails after all."""

    def __init__(self) -> None:
        self._made: list[_Made] = []

    def make(self, wanted: WantedSocket) -> int:
        """Return a socket that listens at `wanted.path`, or takes datagrams there.

        Raises:
            LaunchError: something is in the way; the text says what.

        """
        directory = open_directory_of_root(os.path.dirname(wanted.path), make=True)
        name = os.path.basename(wanted.path)
        try:
            with _one_at_a_time(directory, wanted.path):
                return self._make(directory, name, wanted)
        except LaunchError:
            os.close(directory)
            raise
        except OSError as error:
            os.close(directory)
            cure = "free it, or choose another path"
            if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
                cure = "start as root; a service of systemd gets its sockets from .socket units"
            raise LaunchError(f"socket {wanted.path!r} can't be made: {error.strerror}; {cure}") from error

    def remove(self) -> None:
        """Remove the sockets that were made, as far as they are still what was made."""
        for directory, name, at in self._made:
            with contextlib.suppress(OSError, LaunchError), _one_at_a_time(directory, name):
                if os.path.samestat(os.stat(name, dir_fd=directory, follow_symlinks=False), os.fstat(at)):
                    os.unlink(name, dir_fd=directory)
            os.close(at)
            os.close(directory)
        self._made.clear()

    def descriptors(self) -> list[int]:
        """Return what has to stay open until `remove`; execve closes it."""
        return [descriptor for directory, _, at in self._made for descriptor in (directory, at)]

    def _make(self, directory: int, name: str, wanted: WantedSocket) -> int:
        of_type = KINDS[wanted.kind].type
        _clear_the_way(directory, name, wanted.path, of_type)
        listener = socket.socket(socket.AF_UNIX, of_type)
        at = None
        try:
            if of_type == socket.SOCK_DGRAM:
                # Before it can be reached: what is sent to it from now on says who its sender is.
                sockets.ask_for_credentials(listener)
            _bind_in(directory, name, listener)
            # By the descriptor of the name, which follows no link: fchmod(2) of the socket itself would not
            # reach its path.
            at = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
            os.chown(f"/proc/self/fd/{at}", -1, wanted.gid)
            os.chmod(f"/proc/self/fd/{at}", wanted.mode)
            # Who tried to connect until now was refused.
            if of_type != socket.SOCK_DGRAM:
                listener.listen(_BACKLOG)
        except BaseException:
            listener.close()
            if at is not None:
                os.unlink(name, dir_fd=directory)
                os.close(at)
            raise
        self._made.append(_Made(directory, name, at))
        return listener.detach()


@contextlib.contextmanager
def _one_at_a_time(directory: int, path: str) -> Iterator[None]:
    """Wait until no other start makes or removes sockets in this directory, and keep others waiting."""
    lock = _lock_of(directory, path)
    try:
        yield
    finally:
        # Who waits for it finds that its name is gone, and takes the next one.
        os.unlink(_LOCK, dir_fd=directory)
        os.close(lock)


def _lock_of(directory: int, path: str) -> int:
    while True:
        try:
            lock = os.open(_LOCK, _LOCK_FLAGS, 0o600, dir_fd=directory)
        except OSError as error:
            if error.errno in {errno.ELOOP, errno.EISDIR, errno.ENXIO}:
                raise _in_the_way(path) from error
            raise
        try:
            facts = os.fstat(lock)
            if not stat.S_ISREG(facts.st_mode) or facts.st_uid != 0 or stat.S_IMODE(facts.st_mode) & 0o077:
                raise _in_the_way(path)
            fcntl.flock(lock, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.stat(_LOCK, dir_fd=directory, follow_symlinks=False), facts):
                    return lock
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)


def _in_the_way(path: str) -> LaunchError:
    lock = os.path.join(os.path.dirname(path), _LOCK)
    return LaunchError(f"{lock!r} is in the way, which is no lock of fdbrokerd's; remove it")


def _bind_in(directory: int, name: str, listener: socket.socket) -> None:
    """Bind `listener` to `name` in the held directory, with no permission for anybody yet."""
    before = os.umask(0o777)
    back = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fchdir(directory)
        listener.bind(name)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise LaunchError(
                f"socket {name!r} was made by somebody else meanwhile; is another fdbrokerd being started?"
            ) from error
        raise
    finally:
        os.fchdir(back)
        os.close(back)
        os.umask(before)


def _clear_the_way(directory: int, name: str, path: str, of_type: int) -> None:
    """Remove the socket that a broker left behind at `name`.

    Raises:
        LaunchError: something else is there.

    """
    try:
        facts = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(facts.st_mode):
        kind = {stat.S_IFLNK: "a symbolic link", stat.S_IFDIR: "a directory", stat.S_IFIFO: "a named pipe"}
        what = kind.get(stat.S_IFMT(facts.st_mode), "a file")
        raise LaunchError(
            f"socket {path!r} can't be made: {what} is there; remove it, or choose another path"
        )
    with socket.socket(socket.AF_UNIX, of_type) as probe:
        probe.settimeout(0)  # a full queue must not hold us
        number = probe.connect_ex(f"/proc/self/fd/{directory}/{name}")
    if number == errno.ECONNREFUSED:
        os.unlink(name, dir_fd=directory)
    elif number == errno.EPROTOTYPE:
        raise LaunchError(
            f"socket {path!r} can't be made: a socket of another type is there, and in use;"
            " remove it, or choose another path"
        )
    elif number != errno.ENOENT:
        raise LaunchError(
            f"socket {path!r} can't be made: somebody listens there, so a broker runs already;"
            " stop it (fdbrokerd --stop, or systemctl stop fdbroker.service with its sockets), or choose"
            " another path"
        )
