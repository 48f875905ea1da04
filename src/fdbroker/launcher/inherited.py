"""Descriptors that were open before us: what each is, said in words where it is not what it should be."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import sys
from typing import TYPE_CHECKING, NamedTuple

from fdbroker.kernel import sockets
from fdbroker.launcher.errors import LaunchError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_FIRST_FREE = 3
# Numbers as large as any that a kernel allows (fs.nr_open); the system call takes a C int.
_MOST = 2**30


class Kind(NamedTuple):
    """A type of socket that the broker serves, and how systemd makes one."""

    type: int
    option: str


# By what the policy and systemd call them.
KINDS = {
    "seqpacket": Kind(socket.SOCK_SEQPACKET, "ListenSequentialPacket="),
    "stream": Kind(socket.SOCK_STREAM, "ListenStream="),
    "dgram": Kind(socket.SOCK_DGRAM, "ListenDatagram="),
}
_CONNECTION = ("seqpacket", "stream")


def fill_standard_descriptors() -> None:
    """Put /dev/null where descriptor 0, 1 or 2 is closed.

    Else the next file that is opened gets that number: a message on standard
    error would then be written into it.
    """
    for number, name, flags in (
        (0, "stdin", os.O_RDONLY),
        (1, "stdout", os.O_WRONLY),
        (2, "stderr", os.O_WRONLY),
    ):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, flags)  # the lowest number that is free, which is this one
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))  # noqa: SIM115 - as Python's own


def check_connection(number: int, option: str) -> None:
    """Check that `number` is a connection that a broker can serve, and let its messages tell who sends them.

    Raises:
        LaunchError: it is not; the text says what it is instead.

    """
    with _unix_socket(number, option, _CONNECTION) as sock:
        if _listens(sock):
            raise LaunchError(
                f"{option}: descriptor {number} is a listening socket, not a connection;"
                " use --socket, or pass it as systemd passes sockets"
            )
        try:
            sock.getpeername()
        except OSError as error:
            raise LaunchError(
                f"{option}: descriptor {number} is a socket without a peer ({error.strerror});"
                " pass one end of a connection"
            ) from error
        # As early as can be: a message that was sent before does not tell who its sender is, and is refused.
        sockets.ask_for_credentials(sock)


def check_listener(number: int, what: str, kind: str) -> None:
    """Check that `number` is a socket of this kind that listens; one for datagrams has a name.

    Raises:
        LaunchError: it is not; the text says what it is instead.

    """
    with _unix_socket(number, what, (kind,)) as sock:
        if sock.type == socket.SOCK_DGRAM:
            if not sock.getsockname():
                raise LaunchError(
                    f"{what}: descriptor {number} is a socket without a name, so nobody can send anything"
                    " there; bind it"
                )
            # As early as can be: what was sent before does not tell who its sender is, and is refused.
            sockets.ask_for_credentials(sock)
            _check_network(sock, what)
        elif not _listens(sock):
            raise LaunchError(f"{what}: descriptor {number} is a socket that does not listen; set Accept=no")


def _check_network(listener: socket.socket, what: str) -> None:
    """Check that senders of `listener` can be answered by sockets of this process.

    Their abstract addresses are of the network namespace that they and the
    listener are in.

    Raises:
        LaunchError: they can't be.

    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ours:
        ours.bind(b"\0fdbroker-" + os.urandom(8).hex().encode())
        try:
            listener.sendto(b"", socket.MSG_DONTWAIT, ours.getsockname())
        except ConnectionRefusedError as error:
            raise LaunchError(
                f"{what} is of another network namespace, so that answers can't reach who sends a datagram;"
                " set PrivateNetwork=no, or stop and disable that .socket unit"
            ) from error


def check_ready(number: int) -> None:
    """Check that `number` can be written to, and is none of the standard descriptors.

    Raises:
        LaunchError: it is not so.

    """
    if number < _FIRST_FREE:
        raise LaunchError(f"--ready-fd: {number} is a standard descriptor; pass a pipe on 3 or more")
    if _flags(number, "--ready-fd") & os.O_ACCMODE == os.O_RDONLY:
        raise LaunchError(f"--ready-fd: descriptor {number} is not open for writing; pass that end of a pipe")


def leave_standard_descriptors(connections: Sequence[tuple[int, str]]) -> list[tuple[int, str]]:
    """Return the connections with numbers from 3 on; /dev/null takes the place of what is moved.

    A super-server puts the connection on 0, 1 and 2. Whatever is written there
    later, the audit or an error, would go to the client: so wherever a
    standard descriptor is one of the connections, it is replaced.
    """
    moved = []
    for number, name in connections:
        there = number
        if number < _FIRST_FREE:
            there = fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, _FIRST_FREE)
        moved.append((there, name))
    for standard in range(_FIRST_FREE):
        facts = os.fstat(standard)
        if any(os.path.samestat(facts, os.fstat(number)) for number, _ in moved):
            _open_null_as(standard)
    return moved


def close_terminals_to_reading() -> None:
    """Open a terminal on 1 or 2 anew, for writing only and without waiting for it.

    The one that was inherited is open for reading as well, and its description
    is shared with the shell, which would not expect it to become non-blocking.
    """
    for number in (1, 2):
        if os.isatty(number):
            try:
                anew = os.open(
                    f"/proc/self/fd/{number}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
                )
            except OSError as error:
                raise LaunchError(
                    f"the terminal on descriptor {number} can't be opened for writing: {error.strerror};"
                    " redirect it to a file or to /dev/null"
                ) from error
            os.dup2(anew, number)
            os.close(anew)


def _open_null_as(number: int) -> None:
    nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    os.dup2(nothing, number)
    os.close(nothing)


def _flags(number: int, option: str) -> int:
    try:
        if number > _MOST:
            raise OverflowError
        return fcntl.fcntl(number, fcntl.F_GETFL)
    except (OSError, OverflowError):
        raise LaunchError(
            f"{option}: descriptor {number} is not open; whoever starts fdbrokerd must pass it"
        ) from None


@contextlib.contextmanager
def _unix_socket(number: int, what: str, kinds: Sequence[str]) -> Iterator[socket.socket]:
    """Give the socket `number`, which is of one of these kinds and stays open."""
    if _flags(number, what) & os.O_PATH:
        raise LaunchError(f"{what}: descriptor {number} is opened with O_PATH; pass a socket")
    try:
        sock = socket.socket(fileno=number)
    except OSError:
        raise LaunchError(f"{what}: descriptor {number} is not a socket; pass a Unix socket") from None
    try:
        if sock.family != socket.AF_UNIX:
            raise LaunchError(
                f"{what}: descriptor {number} is a socket of family {int(sock.family)}, not a Unix socket;"
                " the kernel says who is at its other end only for those"
            )
        if sock.type not in {KINDS[kind].type for kind in kinds}:
            kind = getattr(sock.type, "name", sock.type)
            cures = [f"{socket.SocketKind(KINDS[kind].type).name} ({KINDS[kind].option})" for kind in kinds]
            raise LaunchError(
                f"{what}: descriptor {number} is a {kind} socket, which is not what is served there;"
                f" make it {' or '.join(cures)}"
            )
        yield sock
    finally:
        sock.detach()


def _listens(sock: socket.socket) -> bool:
    return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
