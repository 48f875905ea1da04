"""The broker's side of the open helpers: jobs go out, reports and the ends of deliveries come in.

For the loop: register `descriptors`, call `on_ready` for those that are, and
`expire` when `next_deadline` has passed. Nothing here waits.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import time
from collections import deque
from typing import TYPE_CHECKING, Self

from fdbroker.broker import helper_messages as messages
from fdbroker.broker.audit import member_text, quoted_path
from fdbroker.broker.helper_pool import (
    HELPERS,
    Answer,
    Begin,
    Delivered,
    Delivery,
    GivenUp,
    HelperPool,
    Release,
    Replace,
)
from fdbroker.broker.helper_process import run_starter
from fdbroker.kernel import children, sockets

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fdbroker.broker.helper_pool import Effect, Job
    from fdbroker.broker.helper_process import Filters
    from fdbroker.broker.roots import HeldRoot
    from fdbroker.kernel.children import Child


class OpenHelpers:
    """Owns the sockets to the starter and to the helpers. `record` is `Audit.event`."""

    def __init__(
        self,
        starter: Child,
        control: socket.socket,
        ends: Sequence[socket.socket],
        record: Callable[[str, str], object],
    ) -> None:
        self._starter = starter
        self._control = control
        self._ends = list(ends)
        self._slots = {end.fileno(): slot for slot, end in enumerate(ends)}
        self._record = record
        self._pool = HelperPool()
        self._performing = False
        self._effects: deque[Effect] = deque()
        for sock in (control, *ends):
            sock.setblocking(False)  # noqa: FBT003 - the name says what is false
            sockets.refuse_descriptors(sock)

    @classmethod
    def start(
        cls, roots: Sequence[HeldRoot], filters: Filters | None, record: Callable[[str, str], object]
    ) -> Self:
        """Fork the starter, which forks the helpers. Once, after Landlock and before seccomp.

        `roots`: those that helpers serve. Nothing else of what this process
        has open goes to them.

        Raises:
            SyscallError: there are too many processes or descriptors.

        """
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(1 + HELPERS)]
        (control, theirs), *others = pairs
        try:
            child = children.fork_tied()
        except BaseException:
            for pair in pairs:
                for sock in pair:
                    sock.close()
            raise
        if child is None:
            run_starter(theirs, [end for _, end in others], roots, filters)
        for _, end in pairs:
            end.close()
        return cls(child, control, [end for end, _ in others], record)

    def descriptors(self) -> list[int]:
        """Return what to watch for reading."""
        return [self._control.fileno(), *self._slots] if self._control.fileno() >= 0 else []

    @property
    def stuck(self) -> int:
        """How many were killed and have not ended."""
        return self._pool.stuck

    def submit(self, job: Job) -> None:
        """Have paths looked at or opened; `job.done` is called later, or at once where it is refused."""
        self._pool.submit(job, time.monotonic())
        self._perform()

    def deliver(
        self,
        number: int,
        sock: socket.socket,
        frame: bytes,
        places: Sequence[int],
        others: Sequence[int],
        done: Callable[[Delivery], None],
    ) -> None:
        """Have the helper that holds the files of answer `number` send a reply with them, then close them.

        `places`: see `helper_messages.encode_deliver`; `others` stay the
        caller's, who may close them when this returns. On a stream nothing
        else may be sent on `sock` until `done` is called, always once. Record
        before: what is delivered can't be taken back.
        """
        slot = self._pool.deliver(number, done, time.monotonic())
        if slot is not None:
            message = messages.encode_deliver(number, places, frame)
            try:
                sockets.send(self._ends[slot], message, [sock.fileno(), *others], wait=False)
            except OSError as error:
                # ETOOMANYREFS, as with any reply; or the helper is gone, of which we are told.
                delivery = Delivery(error.errno or errno.EIO, 0)
                self._pool.delivered(slot, number, delivery, time.monotonic())
                self._send(slot, messages.encode_release(number))
        self._perform()

    def release(self, number: int) -> None:
        """Have the files of answer `number` closed, of which nothing is to be given."""
        self._pool.release(number, time.monotonic())
        self._perform()

    def on_ready(self, descriptor: int) -> None:
        """Take in what came on one of `descriptors`."""
        if descriptor == self._control.fileno():
            self._take_from_starter()
        else:
            self._take_from_helper(self._slots[descriptor])
        self._perform()

    def next_deadline(self) -> float | None:
        """Return when to call `expire`, in monotonic seconds; None: nothing is under way."""
        return self._pool.next_deadline()

    def expire(self, now: float) -> None:
        """Give up what has taken too long."""
        self._pool.expire(now)
        self._perform()

    def cancel(self, owner: object) -> None:
        """Drop the jobs of an owner that is gone; nothing of it is called any more."""
        self._pool.cancel(owner, time.monotonic())
        # It may have ended by one of several answers, with the others on their way.
        self._effects += self._pool.take_effects()
        self._effects = deque(effect for effect in self._effects if not _is_told(effect, owner))
        self._perform()

    def close(self) -> None:
        """Close the sockets, by which all of them end that can."""
        for sock in (self._control, *self._ends):
            sock.close()
        if self._starter.pidfd >= 0:
            os.close(self._starter.pidfd)
            self._starter = self._starter._replace(pidfd=-1)

    def _take_from_starter(self) -> None:
        try:
            data, _, _ = sockets.receive_data(self._control, messages.LONGEST_TO_STARTER)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            # Nobody can start one any more; what needs none goes on.
            self._record("helpers_gone", "")
            self._pool.all_ended()
            self._perform()
            self.close()
            return
        what, slot, serial = messages.decode_slot(data)
        if what == messages.STARTED:
            self._pool.started(slot, serial, time.monotonic())
        else:
            self._pool.ended(slot, serial, time.monotonic())

    def _take_from_helper(self, slot: int) -> None:
        # Its end is told by the starter; what says nonsense is given up in time.
        with contextlib.suppress(OSError, ValueError, struct.error):
            data, _, _ = sockets.receive_data(self._ends[slot], messages.LONGEST_FROM_HELPER)
            if not data:
                return
            told, now = messages.decode_told(data), time.monotonic()
            if told.what == messages.REPORT:
                self._pool.reported(slot, told.number, told.place, told.report, now)
            elif told.what == messages.DELIVERED:
                self._pool.delivered(slot, told.number, Delivery(told.errno, told.sent), now)
            else:
                self._pool.free(slot, told.number, now)

    def _perform(self) -> None:
        """Do what the pool wants done. What is called back may ask for more, which is done in its turn."""
        if self._performing:
            return
        self._performing = True
        try:
            self._effects += self._pool.take_effects()
            while self._effects:
                self._do(self._effects.popleft())
                self._effects += self._pool.take_effects()
        finally:
            self._performing = False

    def _do(self, effect: Effect) -> None:
        if isinstance(effect, Begin):
            message = messages.encode_job(effect.number, effect.paths, opens=effect.job.opens)
            self._send(effect.slot, message)
        elif isinstance(effect, Release):
            self._send(effect.slot, messages.encode_release(effect.number))
        elif isinstance(effect, Replace):
            with contextlib.suppress(OSError):  # if it is gone, its end is told
                start = messages.encode_slot(messages.START, effect.slot, effect.serial)
                sockets.send(self._control, start, wait=False)
        elif isinstance(effect, Answer):
            effect.job.done(effect.answer)
        elif isinstance(effect, Delivered):
            effect.done(effect.delivery)
        elif isinstance(effect, GivenUp):
            members = member_text(helper=effect.slot, reason=effect.reason, uid=effect.client_uid)
            path = "" if effect.path is None else f",{quoted_path(effect.path)}"
            self._record("helper_ended", members + path)

    def _send(self, slot: int, message: bytes) -> None:
        """Send to a helper. One that is gone, or does not take it, is given up in time."""
        with contextlib.suppress(OSError):
            sockets.send(self._ends[slot], message, wait=False)


def _is_told(effect: Effect, owner: object) -> bool:
    """Return whether something is called for `owner`."""
    if isinstance(effect, Answer):
        return effect.job.owner is owner
    return isinstance(effect, Delivered) and effect.owner is owner
