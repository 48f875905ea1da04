"""Who is at the other end of a Unix socket, by the kernel's word alone.

What a call returns says *when* it was true: SO_PEERCRED, SO_PEERGROUPS and
SO_PEERPIDFD speak of the moment of connect(), listen() or socketpair();
SCM_CREDENTIALS of the moment of the send; PIDFD_GET_INFO of now.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import select
import socket
import struct
from array import array
from typing import NamedTuple

from fdbroker.kernel.errors import SyscallError, renamed
from fdbroker.kernel.libc import LIBC

SO_PEERSEC = 31  # Linux 2.6.2
SO_PEERGROUPS = 59  # Linux 4.13
SO_PEERPIDFD = 77  # Linux 6.5

# _IOWR(0xFF, 11, struct pidfd_info) with the structure's first size, 64 bytes; Linux 6.13.
PIDFD_GET_INFO = 0xC040FF0B
PIDFD_INFO_PID = 1
PIDFD_INFO_CREDS = 2
PIDFD_INFO_CGROUPID = 4
_PIDFD_WANTED = PIDFD_INFO_PID | PIDFD_INFO_CREDS | PIDFD_INFO_CGROUPID
_PIDFD_INFO = struct.Struct("=QQ11Ii")
_PIDFD_REQUEST = _PIDFD_INFO.pack(_PIDFD_WANTED, *([0] * 13))

_UCRED = struct.Struct("=iII")
_MOST_OF_GETSOCKOPT = 1024  # bytes; above it is a ValueError of Python
_new = tuple.__new__  # what a NamedTuple does itself, by a function in Python


class Ucred(NamedTuple):
    """struct ucred: a process and its effective ids at connect, or real ids at a send."""

    pid: int
    uid: int
    gid: int


class PidfdInfo(NamedTuple):
    """What PIDFD_GET_INFO says of a process that exists now."""

    cgroup_id: int
    pid: int
    tgid: int
    real_uid: int
    real_gid: int
    effective_uid: int
    effective_gid: int


def peer_credentials(sock: socket.socket) -> bytes:
    """Return SO_PEERCRED as the raw 12 bytes, which compare with SCM_CREDENTIALS; see `read_ucred`."""
    try:
        return sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    except OSError as error:
        raise renamed(error, "getsockopt", descriptor=sock.fileno(), option="SO_PEERCRED") from None


def read_ucred(raw: bytes) -> Ucred:
    """Return a raw struct ucred as numbers.

    Raises:
        SyscallError: EBADMSG: it has not 12 bytes.

    """
    if len(raw) != _UCRED.size:
        raise SyscallError(errno.EBADMSG, "struct ucred", length=len(raw))
    return _new(Ucred, _UCRED.unpack(raw))


def peer_groups(sock: socket.socket) -> array[int]:
    """Return the supplementary groups of the peer at connect (SO_PEERGROUPS, Linux 4.13).

    A process may have 65,536, `socket.getsockopt` has room for 256.
    """
    try:
        raw = sock.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, _MOST_OF_GETSOCKOPT)
    except OSError:  # ERANGE; of any other error there is another one
        raw = _whole_option(sock, SO_PEERGROUPS, "SO_PEERGROUPS")
    return array("I", raw)


def peer_label(sock: socket.socket) -> bytes | None:
    """Return the label that the security module gave the peer at connect, None where there is none.

    SO_PEERSEC, socket(7). As the module writes it: `system_u:system_r:backup_t:s0` of SELinux (which counts
    a NUL at the end, left out here), `backup (enforce)` of AppArmor, which has the mode of the profile.
    Connections of datagrams have none. Of socket pairs it came later than of sockets that connect.

    Raises:
        SyscallError: it can't be told.

    """
    try:
        return _whole_option(sock, SO_PEERSEC, "SO_PEERSEC").removesuffix(b"\0") or None
    except SyscallError as error:
        if error.errno == errno.ENOPROTOOPT:
            return None
        raise


def _whole_option(sock: socket.socket, option: int, name: str) -> bytes:
    size = ctypes.c_uint32(1024)
    while True:
        room = ctypes.create_string_buffer(size.value)
        result = LIBC.getsockopt(
            sock.fileno(), socket.SOL_SOCKET, option, ctypes.byref(room), ctypes.byref(size)
        )
        if result == 0:
            return room.raw[: size.value]
        number = ctypes.get_errno()
        # ERANGE comes with the size that would do.
        if number != errno.ERANGE or size.value <= len(room):
            raise SyscallError(number, "getsockopt", option=name, room=len(room))


def peer_pidfd(sock: socket.socket) -> int | None:
    """Return a descriptor of the peer's process (SO_PEERPIDFD), None where Linux is older than 6.5.

    The caller owns it; it is close-on-exec.

    Raises:
        SyscallError: the peer is gone (ESRCH, EINVAL, by kernel), or there was none (ENODATA).

    """
    try:
        return sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
    except OSError as error:
        if error.errno == errno.ENOPROTOOPT:
            return None
        raise renamed(error, "getsockopt", descriptor=sock.fileno(), option="SO_PEERPIDFD") from None


def has_exited(pidfd: int) -> bool:
    """Return whether the process of `pidfd` has exited, reaped or not (pidfd_open(2))."""
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(0))


def pidfd_info_raw(pidfd: int) -> bytes:
    """Return the 64 bytes of PIDFD_GET_INFO (Linux 6.13); see `read_pidfd_info`.

    Raises:
        SyscallError: ENOTTY, EINVAL: the kernel is older; ESRCH: the process is gone.

    """
    # Room that can be written: of bytes, ioctl() first finds out by an exception that it can't.
    room = bytearray(_PIDFD_REQUEST)
    try:
        fcntl.ioctl(pidfd, PIDFD_GET_INFO, room)
    except OSError as error:
        raise renamed(error, "ioctl", descriptor=pidfd, request="PIDFD_GET_INFO") from None
    return bytes(room)


def same_process_now(now: bytes, before: bytes) -> bool:
    """Return whether two raw answers agree in mask, cgroup, pid and every id.

    The parent's pid (bytes 24 to 28) is left out: it changes when the parent
    dies, which says nothing about the process.
    """
    return now[:24] == before[:24] and now[28:60] == before[28:60]


def read_pidfd_info(raw: bytes) -> PidfdInfo:
    """Return a raw answer as numbers.

    Raises:
        SyscallError: ESRCH: the mask lacks what was asked for. That is how
            the kernel answers for a peer that was reaped: with success, and
            uid 0 in the structure.

    """
    mask, cgroup_id, pid, tgid, _, ruid, rgid, euid, egid, *_rest = _PIDFD_INFO.unpack(raw)
    if mask & _PIDFD_WANTED != _PIDFD_WANTED:
        raise SyscallError(errno.ESRCH, "ioctl", request="PIDFD_GET_INFO", mask=mask)
    return _new(PidfdInfo, (cgroup_id, pid, tgid, ruid, rgid, euid, egid))
