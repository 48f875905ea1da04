"""Files for an outside engine: handed over, answered once, whatever becomes of the sessions.

A session that is lost can't say which of its files that was due to. So each of
them goes to a session of its own, alone, and the one that loses that as well is
the one: it has an error, and the others have their answers.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from fdbroker.sandbox.waiting import any_is_readable
from fdbroker.scan.contract import admit, confirm
from fdbroker.scan.engine import EngineError, Progress, SessionLostError
from fdbroker.scan.verdict import Error, Reason

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from fdbroker.scan.engine import Outside, Session
    from fdbroker.scan.stamps import Stamp
    from fdbroker.scan.verdict import Verdict


_new = tuple.__new__  # what a NamedTuple does itself, by a function in Python; there are two for each file


class _File(NamedTuple):
    descriptor: int
    before: Stamp


class Handover:
    """Gives files to one outside engine. No call waits, except `wait` and `finish`.

    As a context manager it ends the session. Descriptors stay the caller's, who
    closes each after its answer.

    Args:
        engine: it is connected to at the first file, and again whenever its session was lost.

    """

    def __init__(self, engine: Outside) -> None:
        self._engine = engine
        self._session: Session | None = None
        self._files: dict[int, _File] = {}
        # Given to the session and not answered yet. What is in `_files` is here, `_again` or `_waiting`.
        self._under_way: set[int] = set()
        self._waiting: deque[int] = deque()
        self._again: deque[int] = deque()
        self._alone = False
        self._done: list[Progress] = []

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    def room(self) -> int:
        """Return how many files can be submitted now without being queued here."""
        if self._again or self._waiting or self._alone:
            return 0
        return 1 if self._session is None else self._session.room()

    def submit(self, number: int, descriptor: int, before: Stamp | None = None) -> None:
        """Hand in a file; its answer comes from `answers`.

        `before` is what `fdbroker.scan.contract.admit` said of it, where that was asked already.

        Raises:
            ValueError: a file with this number is under way.

        """
        if number in self._files:
            raise ValueError(f"file {number} is under way")
        stamp = admit(descriptor) if before is None else before
        if isinstance(stamp, Error):
            self._done.append(Progress(number, stamp))
            return
        self._files[number] = _new(_File, (descriptor, stamp))
        session = self._session
        if session is None or self.room() < 1:
            self._waiting.append(number)
            self._go_on()
            return
        # As `_go_on` would do with it, since none waits and there is room.
        try:
            taken = session.submit(number, descriptor, stamp.size)
        except SessionLostError as error:
            self._lost(error)
            self._again.append(number)
            self._go_on()
            return
        if taken:
            self._under_way.add(number)
            return
        self._waiting.append(number)
        if not self._under_way:
            self._go_on()

    def filenos(self) -> list[int]:
        """Return the descriptors that become readable when there may be an answer."""
        return [] if self._session is None else list(self._session.filenos())

    def deadline(self) -> float | None:
        """Return when (time.monotonic) `answers` must be called at the latest."""
        if self._done:
            return 0.0
        return None if self._session is None or not self._under_way else self._session.deadline()

    def answers(self) -> list[Progress]:
        """Return what was answered since the last call: each file once."""
        if self._session is not None:
            try:
                for number, verdict in self._session.answers():
                    if number not in self._under_way:
                        raise SessionLostError(
                            Reason.UNKNOWN_ANSWER, "an answer for a file that it does not have"
                        )
                    self._answered(number, verdict)
            except SessionLostError as error:
                self._lost(error)
        self._go_on()
        done, self._done = self._done, []
        return done

    def wait(self) -> list[Progress]:
        """Wait until there is an answer and return what there is; nothing if no file is under way."""
        while True:
            done = self.answers()
            if done or not self._files:
                return done
            deadline = self.deadline()
            any_is_readable(self.filenos(), None if deadline is None else deadline - time.monotonic())

    def finish(self) -> list[Progress]:
        """Wait for the answers of all files that are under way."""
        done = self.answers()
        while self._files:
            done += self.wait()
        return done

    def close(self) -> None:
        """End the session. Files under way have no answer."""
        if self._session is not None:
            self._session.close()
            self._session = None
        self._files.clear()
        self._under_way.clear()
        self._waiting.clear()
        self._again.clear()
        self._alone = False

    def _answered(self, number: int, verdict: Verdict) -> None:
        file = self._files.pop(number)
        self._under_way.discard(number)
        self._alone = False
        self._done.append(_new(Progress, (number, confirm(verdict, file.descriptor, file.before))))

    def _lost(self, error: SessionLostError) -> None:
        """Give up the session; what it had is tried again, alone, unless it was alone already."""
        if self._session is not None:
            self._session.close()
            self._session = None
        if self._alone:
            for number in list(self._under_way):
                self._answered(number, Error(error.reason, error.text))
        self._again.extend(sorted(self._under_way))
        self._under_way.clear()
        self._alone = False

    def _go_on(self) -> None:
        """Submit what waits and has room."""
        while self._waiting or self._again:
            queue = self._again or self._waiting
            if self._alone or (self._again and self._under_way):
                return
            session = self._connected()
            if session is None or (session.room() < 1 and self._under_way):
                return
            number = queue[0]
            file = self._files[number]
            try:
                taken = session.submit(number, file.descriptor, file.before.size)
            except SessionLostError as error:
                self._refused(number, queue, error)
                continue
            if not taken:
                if self._under_way:
                    return
                queue.popleft()
                self._answered(number, Error(Reason.ENGINE_FAILED, "the engine takes no file"))
                continue
            self._alone = queue is self._again
            queue.popleft()
            self._under_way.add(number)

    def _refused(self, number: int, queue: deque[int], error: SessionLostError) -> None:
        """Deal with a session that was lost when a file should be handed in.

        It may have been lost long before (a daemon closes what is idle), so the file is tried again;
        once, alone.
        """
        queue.popleft()
        had = queue is self._again
        self._lost(error)
        if had:
            self._answered(number, Error(error.reason, error.text))
        else:
            self._again.append(number)

    def _connected(self) -> Session | None:
        if self._session is None:
            try:
                self._session = self._engine.connect()
            except EngineError as error:
                for number in (*self._again, *self._waiting):
                    self._answered(number, Error(Reason.NOT_LOADED, str(error)))
                self._again.clear()
                self._waiting.clear()
        return self._session
