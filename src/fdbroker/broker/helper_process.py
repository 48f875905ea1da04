"""The processes that open what may hang: a starter, and the helpers that it forks.

They are forks of the broker at its start, before its filter: the same uid and
capability, the same Landlock domain and mount view, and nothing of its
sockets, its audit or its clients. They know no policy. The starter waits for
the broker to ask for helpers; helpers wait for jobs. All of them end with the
broker.

The invariant: what a helper opened never comes into the broker. Closing it may
hang as well as opening it: close(2) asks a FUSE server, and waits. So the
helper that opened also sends to the client, and closes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import select
import signal
import socket
import stat
import time
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from fdbroker.broker import helper_messages as messages
from fdbroker.broker.audit import failure_text
from fdbroker.broker.helper_pool import STEP_SECONDS, ObjectFacts, Report
from fdbroker.broker.judging import name_is_lost
from fdbroker.kernel import children, seccomp, sockets
from fdbroker.kernel.descriptors import close_all
from fdbroker.kernel.files import filesystem_of, open_path_beneath, open_proc_self_fd, reopen_for_reading

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from fdbroker.broker.helper_pool import JobPath
    from fdbroker.broker.roots import HeldRoot
    from fdbroker.kernel.children import Child

# Until a helper that was given up is thought to be unable to end; the kernel tells of most at once.
_TO_END = 50  # milliseconds
_STANDARD = frozenset({0, 1, 2})


class Filters(NamedTuple):
    """The seccomp programs, as the launcher assembled them. None: not confined, for tests in one process."""

    starter: bytes
    helper: bytes


def run_starter(
    control: socket.socket, ends: Sequence[socket.socket], roots: Sequence[HeldRoot], filters: Filters | None
) -> NoReturn:
    """Be the starter: in a fork of the broker. Owns the sockets; closes everything else; never returns."""
    status = 1
    try:
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # the broker ends in its own time, and they with it
        os.dup2(2, 1)  # where the audit may have been
        kept = [control, *ends]
        behind, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        _close_all_but({*(sock.fileno() for sock in kept), *(root.descriptor for root in roots)}, behind)
        if filters is not None:
            seccomp.install(filters.starter)
        _Starter(control, ends, roots, None if filters is None else filters.helper).run()
        status = 0
    except (BrokenPipeError, ConnectionResetError):
        status = 0  # the broker is gone
    except BaseException as error:  # noqa: BLE001 - nothing of it may come out into what was forked
        _report_bug(error)
    finally:
        os._exit(status)


def _report_bug(error: BaseException) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"fdbroker: an open helper failed: {failure_text(error)}\n".encode())


def _close_all_but(kept: Collection[int], behind: int) -> None:
    """Close every descriptor below `behind` that is not standard and not `kept`."""
    at = 0
    for number in [*sorted(_STANDARD | {*kept}), behind]:
        if at < number:  # os.closerange(0, 0) closes all there are
            os.closerange(at, number)
        at = number + 1


class _Starter:
    """Forks helpers, kills those that are given up, and tells of those that ended."""

    def __init__(
        self,
        control: socket.socket,
        ends: Sequence[socket.socket],
        roots: Sequence[HeldRoot],
        helper_filter: bytes | None,
    ) -> None:
        self._control = control
        self._ends = ends
        self._roots = {root.descriptor: root for root in roots}
        self._filter = helper_filter
        # By pidfd: who was started and has not ended. Those given up may stay for long.
        self._living: dict[int, tuple[Child, int, int]] = {}
        self._current: dict[int, Child] = {}
        self._poll = select.poll()
        self._poll.register(control, select.POLLIN)

    def run(self) -> None:
        """Start those of the beginning, and serve until the broker is gone."""
        for slot in range(len(self._ends)):
            self._start(slot, slot)
        while True:
            for descriptor, _ in self._poll.poll():
                if descriptor != self._control.fileno():
                    self._note_end(descriptor)
                    continue
                data = self._control.recv(messages.LONGEST_TO_STARTER)
                if not data:
                    return  # the broker is gone; by PR_SET_PDEATHSIG, so are the helpers
                _, slot, serial = messages.decode_slot(data)
                self._replace(slot, serial)

    def _note_end(self, pidfd: int) -> None:
        entry = self._living.pop(pidfd, None)
        if entry is None:
            return
        child, slot, serial = entry
        self._poll.unregister(pidfd)
        children.reap(child)
        if self._current.get(slot) is child:
            del self._current[slot]
        self._tell(messages.ENDED, slot, serial)

    def _replace(self, slot: int, serial: int) -> None:
        child = self._current.pop(slot, None)
        if child is not None:
            children.kill(child)
            # One that can end ends now, and takes nothing more from its socket; one that can't end does not
            # come back from the kernel.
            ended = select.poll()
            ended.register(child.pidfd, select.POLLIN)
            if ended.poll(_TO_END):
                self._note_end(child.pidfd)
        with contextlib.suppress(BlockingIOError):
            while self._ends[slot].recv(1, socket.MSG_DONTWAIT):
                pass  # what it was sent and did not take
        self._start(slot, serial)

    def _start(self, slot: int, serial: int) -> None:
        try:
            child = children.fork_tied()
        except OSError as error:
            os.write(2, f"fdbroker: no open helper: {error}\n".encode())
            self._tell(messages.ENDED, slot, serial)
            return
        if child is None:
            self._become_helper(slot)
        self._current[slot] = child
        self._living[child.pidfd] = child, slot, serial
        self._poll.register(child.pidfd, select.POLLIN)
        self._tell(messages.STARTED, slot, serial)

    def _become_helper(self, slot: int) -> NoReturn:
        status = 1
        try:
            end = self._ends[slot]
            # Nothing that the starter has opened is behind the pidfds.
            behind = max((*self._living, self._control.fileno(), *(sock.fileno() for sock in self._ends)))
            _close_all_but({end.fileno(), *self._roots}, behind + 1)
            helper = Helper(end, self._roots)
            if self._filter is not None:
                seccomp.install(self._filter)
            helper.run()
            status = 0
        except (BrokenPipeError, ConnectionResetError):
            status = 0
        except BaseException as error:  # noqa: BLE001 - as above
            _report_bug(error)
        finally:
            os._exit(status)

    def _tell(self, what: int, slot: int, serial: int) -> None:
        sockets.send(self._control, messages.encode_slot(what, slot, serial))


class Helper:
    """Does one job after the other. Owns what it opens, not the socket or the roots."""

    def __init__(self, sock: socket.socket, roots: Mapping[int, HeldRoot]) -> None:
        self._sock = sock
        self._roots = roots
        self._proc_self_fd = open_proc_self_fd()
        self._number = 0
        self._opened: dict[int, int] = {}

    def run(self) -> None:
        """Do jobs until the broker is gone."""
        while self.step():
            pass

    def step(self) -> bool:
        """Do what comes next; return whether there can be more."""
        received = sockets.receive(self._sock, messages.LONGEST_TO_HELPER)
        with received.descriptors as descriptors:
            if not received.data:
                return False
            order = messages.decode_order(received.data)
            if order.what in {messages.OPEN, messages.LOOK}:
                self._begin(order)
                if self._opened:
                    return True
            elif order.number != self._number:
                return True
            elif order.what == messages.DELIVER:
                sock = socket.socket(fileno=descriptors.take())
                with sock:  # closed before what may hang is closed: the client waits for the end of it
                    error, sent = self._deliver(sock, order, descriptors.numbers())
                self._tell(messages.encode_delivered(order.number, error, sent))
        close_all(list(self._opened.values()))
        self._opened.clear()
        self._tell(messages.encode_free(order.number))
        return True

    def _begin(self, order: messages.Order) -> None:
        self._number = order.number
        for index, path in enumerate(order.paths):
            try:
                report = self._report(index, path, opens=order.what == messages.OPEN)
            except OSError as error:
                report = Report(errno=error.errno or errno.EIO)
            self._tell(messages.encode_report(order.number, index, report))

    def _report(self, index: int, asked: JobPath, *, opens: bool) -> Report:
        """Look, and open if it is a regular file on a file system that is served: the broker's safe order."""
        root, path = self._roots[asked.root], asked.path
        held = open_path_beneath(root.descriptor, path[root.skip :] or b".", root.cross_mounts)
        try:
            found, filesystem = os.fstat(held), filesystem_of(held)
            regular = stat.S_ISREG(found.st_mode)
            lost = asked.check_name and regular and name_is_lost(root, path, held, self._proc_self_fd)
            opens = opens and regular and not lost and root.objection_to(filesystem) is None
            if opens:
                self._opened[index] = reopen_for_reading(self._proc_self_fd, held)
        finally:
            os.close(held)
        return Report(
            facts=ObjectFacts(
                found.st_dev,
                found.st_ino,
                found.st_mode,
                found.st_nlink,
                found.st_uid,
                found.st_gid,
                found.st_size,
                found.st_mtime_ns,
                found.st_ctime_ns,
            ),
            filesystem=filesystem,
            opened=opens,
            lost_its_name=lost,
        )

    def _deliver(self, sock: socket.socket, order: messages.Order, others: Sequence[int]) -> tuple[int, int]:
        """Send a frame whole, as long as the client receives; return errno and how much was sent."""
        descriptors = [self._opened[place] if place >= 0 else others[-1 - place] for place in order.places]
        until = time.monotonic() + STEP_SECONDS / 2
        room = select.poll()
        room.register(sock, select.POLLOUT)
        sent = 0
        while sent < len(order.frame):
            try:
                sent += sockets.send_part(sock, order.frame[sent:], descriptors, wait=False)
                descriptors = []
            except BlockingIOError:
                left = until - time.monotonic()
                if left <= 0:
                    return errno.ETIMEDOUT, sent
                room.poll(1000 * left)
                # A datagram of this length may find no room where a shorter one would.
                time.sleep(min(left, 0.005))
            except OSError as error:
                return error.errno or errno.EIO, sent
        return 0, sent

    def _tell(self, message: bytes) -> None:
        sockets.send(self._sock, message)
