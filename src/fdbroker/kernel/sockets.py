"""Unix sockets: messages with ancillary data, sent and received whole or not at all.

`socket.recv_fds` is not used: it ignores its flags, so that what it receives
is inheritable, and it hides MSG_CTRUNC, by which the kernel says that it threw
descriptors away.
"""

from __future__ import annotations

import array
import errno
import fcntl
import os
import socket
import struct
import sys
from typing import TYPE_CHECKING, NamedTuple

from fdbroker.kernel.descriptors import Descriptors
from fdbroker.kernel.errors import SyscallError, renamed

if TYPE_CHECKING:
    from collections.abc import Sequence

SCM_MAX_FD = 253  # include/net/scm.h
SO_PASSRIGHTS = 83  # Linux 6.16; not in Python's socket module
SO_PASSPIDFD = 76  # Linux 6.5, and the message it asks for:
SCM_PIDFD = 4
SIOCOUTQ = 0x5411  # bytes sent and not yet received; unix(7) does not say it, af_unix.c does
DRAINED = (
    1  # what it says when all was received: the buffer of a message that is just being freed counts as 1
)

_SPACE_FOR_CREDENTIALS = socket.CMSG_SPACE(12)  # struct ucred
_NUMBER = 4  # bytes of a descriptor
_SPACE_FOR_PIDFD = socket.CMSG_SPACE(_NUMBER)
_SPACE_FOR_RIGHTS = socket.CMSG_SPACE(SCM_MAX_FD * 4)
_ANCILLARY_SPACE = _SPACE_FOR_CREDENTIALS + _SPACE_FOR_RIGHTS
# As plain numbers: the arithmetic of Python's enumerations costs more than a system call.
_RECEIVE_FLAGS = int(socket.MSG_CMSG_CLOEXEC)
_SOL_SOCKET, _SCM_RIGHTS, _SCM_CREDENTIALS = socket.SOL_SOCKET, socket.SCM_RIGHTS, socket.SCM_CREDENTIALS
CONTROL_TRUNCATED = int(socket.MSG_CTRUNC)
DATA_TRUNCATED = int(socket.MSG_TRUNC)
_TRUNCATED = CONTROL_TRUNCATED | DATA_TRUNCATED
_SEND_WAITING = int(socket.MSG_NOSIGNAL)
_SEND_AT_ONCE = int(socket.MSG_NOSIGNAL) | int(socket.MSG_DONTWAIT)


_new = tuple.__new__  # what a NamedTuple does itself, by a function in Python
_NONE = Descriptors()  # what nearly every message comes with; nobody adds to what was received


class Received(NamedTuple):
    """One message. `credentials`: the raw struct ucred of its sender, where asked for.

    `descriptors` are owned by the receiver of this value, also when the
    message turns out to be nonsense. `truncated`: the message was longer than
    the room given for it; the rest of it is lost.
    """

    data: bytes
    descriptors: Descriptors
    credentials: bytes | None
    truncated: bool


def accept(listener: socket.socket, kind: int) -> socket.socket:
    """Accept a connection to a Unix socket that listens; the caller owns it. `kind`: the listener's type.

    Close-on-exec, and blocking whatever the listener is; accept(2). `socket.accept` makes enumerations of
    what it asks the listener for each time, which takes longer than all else.

    Raises:
        BlockingIOError: nobody is there, and the listener does not wait.
        OSError: as it is: EMFILE, ENFILE, ECONNABORTED.

    """
    # What `socket.accept` is made of; it forces SOCK_CLOEXEC.
    number, _ = listener._accept()  # type: ignore[attr-defined]  # noqa: SLF001
    try:
        return socket.socket(socket.AF_UNIX, kind, 0, number)
    except BaseException:
        os.close(number)
        raise


def receive(sock: socket.socket, size: int) -> Received:
    """Receive one message (SEQPACKET, DGRAM) or what is there (STREAM).

    Descriptors are close-on-exec. Blocks, or raises BlockingIOError, as the
    socket is set.

    Raises:
        SyscallError: EMFILE: the kernel dropped descriptors (MSG_CTRUNC),
            mostly because this process may have no more; those that did come
            were closed.
        SyscallError: from recvmsg(2): ECONNRESET and others.
        BlockingIOError: nothing is there.

    """
    try:
        data, ancillary, flags, _ = sock.recvmsg(size, _ANCILLARY_SPACE, _RECEIVE_FLAGS)
    except BlockingIOError:
        raise
    except OSError as error:
        raise renamed(error, "recvmsg", descriptor=sock.fileno(), size=size) from None
    descriptors = _NONE
    credentials = None
    for level, kind, content in ancillary:
        if kind == _SCM_RIGHTS and level == _SOL_SOCKET:
            numbers = _numbers(content)
            if descriptors is _NONE:
                descriptors = Descriptors(numbers)
            else:
                descriptors = Descriptors([*descriptors.take_all(), *numbers])
        elif kind == _SCM_CREDENTIALS and level == _SOL_SOCKET:
            credentials = content
    if flags & CONTROL_TRUNCATED:
        arrived = len(descriptors)
        descriptors.close()
        raise SyscallError(errno.EMFILE, "recvmsg", flags="MSG_CTRUNC", descriptors_that_arrived=arrived)
    return _new(Received, (data, descriptors, credentials, bool(flags & DATA_TRUNCATED)))


def receive_data(sock: socket.socket, size: int) -> tuple[bytes, bytes | None, int]:
    """Receive one message for whom nobody may send descriptors: data, raw struct ucred, MSG_* flags.

    Of a socket that asks for credentials (`ask_for_credentials`): there is room
    for these alone, so descriptors get no number here, the kernel closes them
    and says MSG_CTRUNC. MSG_TRUNC: the message was longer than `size`; the rest
    of it is lost. Otherwise as `receive`.
    """
    try:
        data, ancillary, flags, _ = sock.recvmsg(size, _SPACE_FOR_CREDENTIALS, _RECEIVE_FLAGS)
    except BlockingIOError:
        raise
    except OSError as error:
        raise renamed(error, "recvmsg", descriptor=sock.fileno(), size=size) from None
    credentials = None
    for level, kind, content in ancillary:
        if kind == _SCM_CREDENTIALS and level == _SOL_SOCKET:
            credentials = content
        elif kind == _SCM_RIGHTS and level == _SOL_SOCKET:
            # It did not ask for credentials, so some of them had room.
            Descriptors(_numbers(content)).close()
            flags |= CONTROL_TRUNCATED
    return data, credentials, flags & _TRUNCATED


def receive_unclosed(sock: socket.socket, size: int) -> tuple[bytes, Descriptors, bool]:
    """Receive one message; return data, descriptors, and whether the kernel dropped some.

    As `receive`, but that none is closed here: close(2) may have to wait for a
    file system of the sender's, or a socket that lingers. It drops those that
    this process may not have.
    """
    try:
        data, ancillary, flags, _ = sock.recvmsg(size, _ANCILLARY_SPACE, _RECEIVE_FLAGS)
    except BlockingIOError:
        raise
    except OSError as error:
        raise renamed(error, "recvmsg", descriptor=sock.fileno(), size=size) from None
    descriptors = _NONE
    for level, kind, content in ancillary:
        if kind == _SCM_RIGHTS and level == _SOL_SOCKET:
            descriptors = Descriptors([*descriptors.take_all(), *_numbers(content)])
    return data, descriptors, bool(flags & CONTROL_TRUNCATED)


def _numbers(content: bytes) -> array.array[int]:
    """Return the descriptors of an SCM_RIGHTS message."""
    return array.array("i", content[: len(content) // _NUMBER * _NUMBER])


def send(sock: socket.socket, data: bytes, descriptors: Sequence[int] = (), *, wait: bool = True) -> None:
    """Send one message with copies of `descriptors`; the caller still owns its own.

    Never raises SIGPIPE. With `wait` False a full socket is a BlockingIOError.
    On a stream use `send_part`, or be ready for the error that a part was sent.

    Raises:
        ValueError: more than 253 descriptors, the kernel's limit.
        SyscallError: a message socket took only a part (can't happen on
            SEQPACKET and DGRAM by unix(7)).
        SyscallError: from sendmsg(2): EPIPE, ECONNRESET, EMSGSIZE, ETOOMANYREFS.
        BlockingIOError: there is no room.

    """
    sent = send_part(sock, data, descriptors, wait=wait)
    if sent != len(data):
        raise SyscallError(errno.EMSGSIZE, "sendmsg", length=len(data), sent=sent)


def send_at_once(sock: socket.socket, data: bytes | memoryview) -> int:
    """Send as much as there is room for, without descriptors; return how much that was. Never raises SIGPIPE.

    Raises:
        BlockingIOError: there is no room.
        OSError: from send(2), as it is: EPIPE, ECONNRESET, EMSGSIZE.

    """
    return sock.send(data, _SEND_AT_ONCE)


def send_part(
    sock: socket.socket,
    data: bytes,
    descriptors: Sequence[int] = (),
    *,
    wait: bool = True,
    address: bytes | None = None,
) -> int:
    """Send as much as there is room for, as `send`; return how much that was, at least 1 byte.

    The descriptors go with the first byte, so they are sent when this returns. `address` is for
    `send_datagram`.
    """
    if len(descriptors) > SCM_MAX_FD:
        raise ValueError(f"a message carries at most {SCM_MAX_FD} descriptors, not {len(descriptors)}")
    ancillary = [(_SOL_SOCKET, _SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
    try:
        return sock.sendmsg([data], ancillary, _SEND_WAITING if wait else _SEND_AT_ONCE, address)
    except BlockingIOError:
        raise
    except OSError as error:
        raise renamed(
            error, "sendmsg", descriptor=sock.fileno(), length=len(data), descriptors=len(descriptors)
        ) from None


class Datagram(NamedTuple):
    """One datagram and who sent it. `pidfd` (-1: the kernel has none) is owned by the receiver of this value.

    `address` is the sender's, as the kernel gives it: b"" without one, beginning with NUL if abstract.
    `flags`: MSG_CTRUNC, MSG_TRUNC.
    """

    data: bytes
    credentials: bytes | None
    pidfd: int
    address: bytes
    flags: int


def receive_datagram(sock: socket.socket, size: int) -> Datagram:
    """Receive one datagram of a socket with `ask_for_credentials` and `ask_for_pidfds`. Errors as `receive`.

    Descriptors that its sender added are closed, and flagged with MSG_CTRUNC.
    """
    room = _SPACE_FOR_CREDENTIALS + _SPACE_FOR_PIDFD
    try:
        data, ancillary, flags, address = sock.recvmsg(size, room, _RECEIVE_FLAGS)
    except BlockingIOError:
        raise
    except OSError as error:
        raise renamed(error, "recvmsg", descriptor=sock.fileno(), size=size) from None
    credentials, pidfd = None, -1
    for level, kind, content in ancillary:
        if level != _SOL_SOCKET:
            continue
        if kind == _SCM_CREDENTIALS:
            credentials = content
        elif kind == SCM_PIDFD and len(content) == _NUMBER:
            pidfd = int.from_bytes(content, sys.byteorder, signed=True)
        elif kind == _SCM_RIGHTS:
            Descriptors(_numbers(content)).close()
            flags |= CONTROL_TRUNCATED
    where = os.fsencode(address) if isinstance(address, str) else address or b""
    return Datagram(data, credentials, pidfd, where, flags & _TRUNCATED)


def send_datagram(sock: socket.socket, data: bytes, descriptors: Sequence[int], address: bytes) -> None:
    """Send one datagram at once, to an address as `receive_datagram` gave it; otherwise as `send`.

    Raises:
        SyscallError: ECONNREFUSED: nobody has that address any more; and those of `send`.
        BlockingIOError: the receiver's queue is full, or our own buffer.

    """
    send_part(sock, data, descriptors, wait=False, address=address)


def ask_for_pidfds(sock: socket.socket) -> bool:
    """Have each message carry a descriptor of its sender's process (SO_PASSPIDFD, Linux 6.5).

    Return whether the kernel has it.
    """
    return _set_if_known(sock, SO_PASSPIDFD, 1, "SO_PASSPIDFD")


def refuse_descriptors(sock: socket.socket, *, refuse: bool = True) -> bool:
    """Let the kernel refuse SCM_RIGHTS sent to this socket (SO_PASSRIGHTS=0, Linux 6.16), or not any more.

    On a listener it holds for what connects from now on, also before accept().
    Return whether the kernel has it; without it, what arrives must be closed.
    """
    return _set_if_known(sock, SO_PASSRIGHTS, int(not refuse), "SO_PASSRIGHTS")


def _set_if_known(sock: socket.socket, option: int, value: int, name: str) -> bool:
    """Set an option; return whether the kernel has it."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, option, value)
    except OSError as error:
        if error.errno == errno.ENOPROTOOPT:
            return False
        raise renamed(error, "setsockopt", descriptor=sock.fileno(), option=name) from None
    return True


def ask_for_credentials(sock: socket.socket) -> None:
    """Have each message carry its sender's credentials (SO_PASSCRED; accepted sockets inherit it).

    Hazard: a message that was queued before carries pid 0 and overflow ids.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)


def bytes_not_received(sock: socket.socket) -> int:
    """Return how much of what was sent the peer has not received (SIOCOUTQ), in the kernel's accounting.

    0 means that every descriptor that was sent is out of flight: the kernel's
    word, which needs no acknowledgement by the peer.
    """
    answer = bytearray(4)
    try:
        fcntl.ioctl(sock.fileno(), SIOCOUTQ, answer)
    except OSError as error:
        raise renamed(error, "ioctl", descriptor=sock.fileno(), request="SIOCOUTQ") from None
    return int(struct.unpack("=i", answer)[0])
