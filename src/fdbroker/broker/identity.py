"""Who is asking: the kernel's word at connect, and whether it still holds now.

Levels: 0: SO_PEERCRED, SO_PEERGROUPS at connect, and SCM_CREDENTIALS of each
message that must be those of the process that connected. 1 (Linux 6.5): and
that process has not exited, so its pid can't be somebody else's. 2 (Linux
6.13): and its ids and control group of now are those of connect.

The message must carry the very ids of connect: the kernel puts the *real* ids
there, and the *effective* ones into SO_PEERCRED, so a set-user-ID program that
is made to write to a connection is refused, and so is one that made the
connection before it made its ids equal. Any doubt is a denial.
"""

from __future__ import annotations

import errno
import os
import socket
from array import array
from typing import TYPE_CHECKING, NamedTuple

from fdbroker.broker.watchdog import nothing
from fdbroker.kernel import peers
from fdbroker.policy.rules import ClientFacts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

HIGHEST_LEVEL = 2
_MAX_KNOWN_GROUPS = 4096
OVERFLOW_ID = 65534  # what an id without a mapping looks like; never anybody


class IdentityError(Exception):
    """The peer can't be identified; the text is the reason for the audit."""


class PeerAtConnect:
    """A peer as it was when it connected. Owns its pidfd, until `close`."""

    __slots__ = (
        "_groups",
        "_info",
        "_pidfd",
        "cgroup_id",
        "credentials",
        "gid",
        "has_other_real_ids",
        "label",
        "level",
        "pid",
        "uid",
    )

    def __init__(self, sock: socket.socket, level: int, *, labels: bool = False) -> None:
        """Ask the kernel who connected. `labels`: a security module of it gives them.

        Raises:
            IdentityError: the peer is gone, has no id that is known here, or
                the answers of the kernel contradict each other.

        """
        self._pidfd = -1
        self._info = b""
        self.cgroup_id = 0
        self.level = level
        self.label: bytes | None = None
        # Whether a set-user-ID program connected: no message of it carries the ids of connect. For those
        # who get no messages of it; below level 2 nobody knows.
        self.has_other_real_ids = False
        try:
            self.credentials = peers.peer_credentials(sock)
            self.pid, self.uid, self.gid = peers.read_ucred(self.credentials)
            # A process may have 65,536 (an owner of subordinate ids makes one): as a set of numbers they
            # would be 6 MB for each of its connections.
            self._groups = array("I", peers.peer_groups(sock))
            if labels:
                self.label = peers.peer_label(sock)
            if level >= 1:
                pidfd = peers.peer_pidfd(sock)
                if pidfd is None:
                    raise IdentityError("peer_without_pidfd")
                self._pidfd = pidfd
                if peers.has_exited(pidfd):
                    raise IdentityError("peer_has_exited")
            if level >= 2:  # noqa: PLR2004 - the levels are numbers
                self._info = peers.pidfd_info_raw(self._pidfd)
                now = peers.read_pidfd_info(self._info)
                if (now.tgid, now.effective_uid, now.effective_gid) != (self.pid, self.uid, self.gid):
                    raise IdentityError("identity_changed_since_connect")
                self.has_other_real_ids = (now.real_uid, now.real_gid) != (self.uid, self.gid)
                self.cgroup_id = now.cgroup_id
            if self.pid <= 0 or OVERFLOW_ID in (self.uid, self.gid):
                raise IdentityError("identity_without_mapping")
        except IdentityError:
            self.close()
            raise
        except OSError as error:
            self.close()
            raise IdentityError(_reason_of(error)) from error

    def close(self) -> None:
        """Close the pidfd."""
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    def objection(self, credentials: bytes | None) -> str | None:
        """Return why a message with these SCM_CREDENTIALS is not to be answered, or None.

        Call it after the message was received: a process that is alive then
        is the one that had the pid when the message was sent.
        """
        if credentials != self.credentials:
            if credentials is None:
                return "message_without_credentials"
            sender = peers.read_ucred(credentials)
            return "sent_by_another_process" if sender.pid != self.pid else "sent_with_other_ids"
        return self.present_objection()

    def present_objection(self) -> str | None:
        """Return why this is not, or not any more, the process that connected, or None."""
        try:
            if self._info:
                now = peers.pidfd_info_raw(self._pidfd)
                if now != self._info and not peers.same_process_now(now, self._info):
                    # Raises for a process that is gone; what is left is one that changed.
                    peers.read_pidfd_info(now)
                    return "identity_changed_since_connect"
            elif self._pidfd >= 0 and peers.has_exited(self._pidfd):
                return "peer_has_exited"
        except OSError as error:
            return _reason_of(error)
        return None

    @property
    def groups(self) -> frozenset[int]:
        """All groups that it was in: a set made for who asks."""
        return frozenset(self._groups) | {self.gid}

    def facts(self, cgroups: ControlGroups) -> ClientFacts:
        """Return what rules may ask. The overflow group is nobody's."""
        return ClientFacts(
            uid=self.uid,
            gids=self.groups - {OVERFLOW_ID},
            cgroups=cgroups.containing(self.cgroup_id) if self.cgroup_id else frozenset(),
            label=self.label,
        )


class PeerOfMessage:
    """The sender of a datagram, as it was when it sent it; nothing is kept open.

    Its supplementary groups and its label are not known: rules that allow groups see
    its primary one alone, and rules that deny groups or labels hold, since it may have any.
    """

    __slots__ = ("cgroup_id", "gid", "level", "pid", "uid")

    def __init__(self, credentials: bytes | None, pidfd: int, level: int) -> None:
        """Read what came with the datagram; `pidfd` stays the caller's.

        Raises:
            IdentityError: the sender is gone, has no id that is known here, or real and effective ids differ.

        """
        self.cgroup_id = 0
        self.level = level
        if credentials is None:
            raise IdentityError("message_without_credentials")
        try:
            self.pid, self.uid, self.gid = peers.read_ucred(credentials)
            if self.pid <= 0 or OVERFLOW_ID in (self.uid, self.gid):
                raise IdentityError("identity_without_mapping")
            if level >= 1 and (pidfd < 0 or peers.has_exited(pidfd)):
                raise IdentityError("message_without_pidfd" if pidfd < 0 else "peer_has_exited")
            if level >= 2:  # noqa: PLR2004 - the levels are numbers
                now = peers.read_pidfd_info(peers.pidfd_info_raw(pidfd))
                # A program with set-user-ID may name either of its ids, so they must be one.
                ids = {(now.real_uid, now.real_gid), (now.effective_uid, now.effective_gid)}
                if now.tgid != self.pid or ids != {(self.uid, self.gid)}:
                    raise IdentityError("sent_with_other_ids")
                self.cgroup_id = now.cgroup_id
        except OSError as error:
            raise IdentityError(_reason_of(error)) from error

    def facts(self, cgroups: ControlGroups) -> ClientFacts:
        """Return what rules may ask."""
        named = cgroups.containing(self.cgroup_id) if self.cgroup_id else frozenset()
        return ClientFacts(self.uid, frozenset({self.gid}), named, groups_known=False)


Peer = PeerAtConnect | PeerOfMessage


def _reason_of(error: OSError) -> str:
    """Return why the kernel did not say who it is: mostly because that process is gone."""
    if error.errno in {errno.ESRCH, errno.EINVAL, errno.ENODATA, errno.ECONNRESET, errno.ENOTCONN}:
        return "peer_has_exited"
    return f"identity_unavailable_{errno.errorcode.get(error.errno or 0, 'unknown')}"


class ControlGroups:
    """Which of the control groups that the policy names holds a given cgroup id.

    An id is the inode number of the group's directory. Ids are looked up with
    stat(2), which Landlock leaves alone, and, for groups below a named one, by
    listing its subtree, for which the domain has a rule that lists and can't
    read. Ids are not used twice while the system runs.
    """

    def __init__(
        self, mount_point: str | None, named: Iterable[str], ping: Callable[[], None] = nothing
    ) -> None:
        """`ping`: what tells the watchdog that a long look goes on."""
        self._ping = ping
        self._mount_point = mount_point
        self._named = tuple(sorted(named))
        self._known: dict[int, frozenset[str]] = {}

    def containing(self, cgroup_id: int) -> frozenset[str]:
        """Return the named groups that are the group `cgroup_id` or above it."""
        if self._mount_point is None:
            return frozenset()
        known = self._known.get(cgroup_id)
        if known is None:
            if len(self._known) >= _MAX_KNOWN_GROUPS:
                self._known.clear()
            known = self._known[cgroup_id] = frozenset(
                name for name in self._named if self._contains(self._mount_point + name, cgroup_id)
            )
        return known

    def _contains(self, directory: str, cgroup_id: int) -> bool:
        waiting = [directory]
        while waiting:
            here = waiting.pop()
            self._ping()
            try:
                if os.stat(here, follow_symlinks=False).st_ino == cgroup_id:
                    return True
                with os.scandir(here) as entries:
                    waiting.extend(entry.path for entry in entries if entry.is_dir(follow_symlinks=False))
            except OSError:
                # A group that went away holds nobody.
                continue
        return False


class LevelProbe(NamedTuple):
    """What this kernel can say of peers, and why not more."""

    level: int
    reason: str


def probe_level() -> LevelProbe:
    """Find the highest identity level by asking about ourselves."""
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with left, right:
        try:
            pidfd = peers.peer_pidfd(left)
        except OSError as error:
            return LevelProbe(0, f"SO_PEERPIDFD: {error.strerror}")
        if pidfd is None:
            return LevelProbe(0, "SO_PEERPIDFD needs Linux 6.5")
        try:
            peers.read_pidfd_info(peers.pidfd_info_raw(pidfd))
        except OSError as error:
            return LevelProbe(1, f"PIDFD_GET_INFO needs Linux 6.13: {error.strerror}")
        finally:
            os.close(pidfd)
    return LevelProbe(2, "")


def gives_labels() -> bool:
    """Return whether a security module of this kernel labels those who connect, by connecting to ourselves.

    Not by a socket pair, of which some kernels tell no label though they do of connections.
    """
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connecting,
    ):
        listener.bind("")  # an abstract name that the kernel chooses; unix(7)
        listener.listen(1)
        connecting.connect(listener.getsockname())
        accepted, _ = listener.accept()
        with accepted:
            return peers.peer_label(accepted) is not None
