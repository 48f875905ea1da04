"""Files for any engines: those that run in workers, on several CPUs, and those that run elsewhere.

An outside engine has a file first, one after the other, and then a worker with all inside engines: a
program that reads the file as its standard input shares the offset with whoever has the descriptor, and
nobody else may move it meanwhile.

A worker has files of one owner (st_uid). One that was turned by a hostile file can lie about later files of
that owner, and has none of another one.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from fdbroker.kernel.descriptors import Descriptors
from fdbroker.sandbox.waiting import any_is_readable
from fdbroker.scan.contract import admit
from fdbroker.scan.engine import EngineError, Inside, Outside
from fdbroker.scan.outside import Handover
from fdbroker.scan.plugins import make
from fdbroker.scan.supervisor import DEFAULT_TIMEOUT, DEFAULT_WINDOW, Done, Supervisor
from fdbroker.scan.verdict import Answer, Error, Reason, worst
from fdbroker.scan.versions import one_line

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import TracebackType
    from typing import Self

    from fdbroker.sandbox.report import LayerReport
    from fdbroker.scan.plugins import Configured
    from fdbroker.scan.stamps import Stamp

MOST_JOBS = 256
# Of the files that are with one worker. Small ones are handed over many at a time; of large ones so few that
# another worker has the next one.
_MOST_BYTES = 16 << 20


class Version(NamedTuple):
    """An engine and what it says of its version, in one line that can be shown; `inside`: in workers."""

    engine: str
    version: str
    inside: bool


class _File(NamedTuple):
    """A file, with the answers of the outside engines that are done with it."""

    path: bytes
    owned: Descriptors  # of one
    before: Stamp
    answers: tuple[Answer, ...] = ()


class _Lane:
    """A worker, by way of its supervisor, and what it has."""

    def __init__(self, supervisor: Supervisor, window: int) -> None:
        self.supervisor = supervisor
        self.window = window
        self.owner: int | None = None  # of its files; None: it had none yet
        self.bytes = 0
        self.gathered = 0  # files that were handed in since it was last seen to

    def takes(self, owner: int) -> bool:
        """Return whether it may have one more file, of this owner."""
        under_way = self.supervisor.under_way
        if not under_way:
            return True
        return owner == self.owner and under_way < self.window and self.bytes < _MOST_BYTES

    def gathers_more(self, file: Stamp) -> bool:
        """Return whether it can have this file too, and waits for more before they are sent."""
        gathered = self.gathered
        return (
            0 < gathered < self.supervisor.group - 1
            and self.takes(file.owner)
            and self.bytes + file.size < _MOST_BYTES
            and self.supervisor.fileno() is not None
        )

    def gather(self, name: bytes, owned: Descriptors, file: Stamp) -> None:
        """Hand in a file, which is not sent yet."""
        self.bytes += file.size
        self.gathered += 1
        self.supervisor.enqueue(name, owned.take(), file)

    def load(self, owner: int) -> int:
        """Return how many files it has; as if it had some if it is still to be started for this owner."""
        ready = self.owner is None and self.supervisor.workers_started > 0
        return self.supervisor.under_way if owner == self.owner or ready else self.supervisor.group


class Pool:
    """Gives files to engines and returns verdicts, in any order.

    As a context manager it ends all workers and sessions, and closes what is under way.

    Args:
        engines: whose verdicts are wanted, of either kind, each once.
        jobs: most workers at a time; they are started as they are needed.
        ids: uid and gid of the workers; needed as root, impossible otherwise.
        timeout: seconds for one file in a worker.
        max_size: bytes; a file that is larger is an error, and no engine has it. None: no limit but theirs.
        isolate: a new worker for each file.

    Raises:
        EngineError: an engine can't be had as it is configured, or is there twice.

    """

    def __init__(
        self,
        engines: Sequence[Configured],
        *,
        jobs: int = 1,
        ids: tuple[int, int] | None = None,
        timeout: float = DEFAULT_TIMEOUT,
        max_size: int | None = None,
        isolate: bool = False,
    ) -> None:
        names = [one.name for one in engines]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise EngineError(f"engine {twice[0]}: it is asked for twice")
        made = [make(one) for one in engines]
        self._names = names
        self._max_size = max_size
        self._handovers = [(one.name, Handover(one)) for one in made if isinstance(one, Outside)]
        self._outside = [one for one in made if isinstance(one, Outside)]
        inside = [one for one, engine in zip(engines, made, strict=True) if isinstance(engine, Inside)]
        self._inside = [one.name for one in inside]
        # The first one has the zygote, from which all workers come.
        self._lanes: list[_Lane] = []
        window = 1 if isolate else DEFAULT_WINDOW
        for _ in range(jobs if inside else 0):
            supervisor = Supervisor(
                inside,
                ids=ids,
                timeout=timeout,
                window=window,
                files_per_worker=1 if isolate else None,
                spawn=self._lanes[0].supervisor.spawn_from_zygote if self._lanes else None,
            )
            self._lanes.append(_Lane(supervisor, window))
        self._last: _Lane | None = None
        # By numbers: what outside engines have, and, where there are such, what workers have.
        self._files: dict[int, _File] = {}
        self._number = 0
        # For a worker, as soon as one may have it.
        self._ready: deque[_File] = deque()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    @property
    def workers(self) -> int:
        """Most workers that there are at a time; 0 where all engines are outside ones."""
        return len(self._lanes)

    def begin(self) -> None:
        """Begin to load the engines of workers, for a caller who has something to do meanwhile.

        Raises:
            SandboxError, OSError: as `start`, of what is known by now.

        """
        if self._lanes:
            self._lanes[0].supervisor.begin()

    @property
    def is_loaded(self) -> bool:
        """Whether the loading that `begin` has begun is over, well or not."""
        return not self._lanes or self._lanes[0].supervisor.is_loaded

    def start(self) -> LayerReport | None:
        """Load the engines, start the first worker and return what confines it; None: there are no workers.

        Raises:
            SandboxError: the engines can't be loaded, or a worker can't be confined as it must be.
            OSError: no process or descriptors to be had.

        """
        return self._lanes[0].supervisor.start() if self._lanes else None

    def versions(self) -> list[Version]:
        """Return the versions of all engines, in the order in which they were given.

        Raises:
            EngineError: an outside engine is not there.
            SandboxError: no worker could tell them.
            OSError: no process or descriptors to be had.

        """
        told = {engine.name: one_line(engine.version()) for engine in self._outside}
        if self._lanes:
            told |= zip(self._inside, self._lanes[0].supervisor.versions(), strict=True)
        return [Version(name, told[name], name in self._inside) for name in self._names]

    def submit(self, path: bytes, descriptor: int) -> Iterator[Done]:
        """Hand in a file; yield verdicts of whatever files, as many as it takes to have room for more.

        `descriptor` is the pool's from the call on, also if nobody iterates.
        """
        owned = Descriptors([descriptor])
        before = admit(descriptor)
        if not isinstance(before, Error) and self._max_size is not None and before.size > self._max_size:
            text = f"{before.size} bytes are more than the {self._max_size} that are asked for"
            before = Error(Reason.TOO_LARGE, text)
        if isinstance(before, Error):
            owned.close()
            return iter((Done(path, 0, before),))
        lane = self._last
        if lane is not None and not self._handovers and not self._ready and lane.gathers_more(before):
            # As `_to_workers` would do with it, without asking which worker, or for verdicts.
            lane.gather(path, owned, before)
            return iter(())
        file = _File(path, owned, before)
        if self._handovers:
            self._hand_over(file)
        else:
            self._ready.append(file)
        return self._make_room()

    def finish(self) -> Iterator[Done]:
        """Yield the verdicts of all files that are under way."""
        while self._files or self._ready or any(lane.supervisor.under_way for lane in self._lanes):
            yield from self._go_on(1)

    def close(self) -> None:
        """End all workers and sessions and close the files that are under way; their verdicts are lost."""
        for _, handover in self._handovers:
            handover.close()
        # Of what a worker has, its supervisor has the descriptor.
        for file in (*self._files.values(), *self._ready):
            file.owned.close()
        self._files.clear()
        self._ready.clear()
        # The first one last: it has the zygote, with which all workers end.
        for lane in reversed(self._lanes):
            lane.supervisor.close()

    def _hand_over(self, file: _File) -> None:
        """Give a file to the outside engine whose turn it is."""
        _, handover = self._handovers[len(file.answers)]
        handover.submit(self._remembered(file), file.owned.numbers()[0], file.before)

    def _remembered(self, file: _File) -> int:
        """Keep a file for its answer; return the number by which it is found."""
        self._number += 1
        self._files[self._number] = file
        return self._number

    def _make_room(self) -> Iterator[Done]:
        """Go on until whoever has files has room for more."""
        yield from self._to_workers()
        while self._ready or any(handover.room() < 1 for _, handover in self._handovers):
            yield from self._go_on(self._lanes[0].supervisor.group if self._lanes else 1)

    def _to_workers(self) -> Iterator[Done]:
        """Give workers the files that are ready, as far as they may have them."""
        while self._ready:
            owner = self._ready[0].before.owner
            lane = self._last
            if lane is None or not lane.gathered or not lane.takes(owner):
                lane = self._choose(owner)
                if lane is None:
                    return
                self._last = lane
            if lane.owner != owner:
                if lane.owner is not None:
                    lane.supervisor.replace_worker()
                lane.owner = owner
            file = self._ready.popleft()
            name = file.path
            if self._handovers:
                name = b"%d" % self._remembered(file)
            lane.gather(name, file.owned, file.before)
            # Few messages to who is busy, and none that waits for others where nobody is.
            if (
                lane.gathered >= lane.supervisor.group
                or lane.bytes >= _MOST_BYTES
                or lane.supervisor.fileno() is None
            ):
                yield from self._advance(lane, 1)

    def _choose(self, owner: int) -> _Lane | None:
        """Return the worker that should have the next files of this owner; None: all are busy."""
        able = [lane for lane in self._lanes if lane.takes(owner)]
        return min(able, key=lambda lane: lane.load(owner), default=None)

    def _advance(self, lane: _Lane, least: int) -> Iterator[Done]:
        lane.gathered = 0
        for done in lane.supervisor.advance(least):
            lane.bytes -= done.size
            yield self._combined(done) if self._handovers else done

    def _combined(self, done: Done) -> Done:
        """Return the verdict of a worker with what outside engines had said, in the order of the engines."""
        file = self._files.pop(int(done.path))
        inside = done.answers or tuple(Answer(name, done.verdict) for name in self._inside)
        return self._all_said(file, (*file.answers, *inside))

    def _all_said(self, file: _File, answers: tuple[Answer, ...]) -> Done:
        if len(answers) == 1:
            return Done(file.path, file.before.size, answers[0].verdict, answers)
        by_name = {answer.engine: answer for answer in answers}
        ordered = tuple(by_name[name] for name in self._names)
        return Done(file.path, file.before.size, worst(ordered), ordered)

    def _collect(self) -> Iterator[Done]:
        """Take what outside engines have answered, and pass those files on."""
        for name, handover in self._handovers:
            for number, verdict in handover.answers():
                file = self._files.pop(number)
                answers = (*file.answers, Answer(name, verdict))
                if len(answers) < len(self._handovers):
                    self._hand_over(file._replace(answers=answers))
                elif self._lanes:
                    self._ready.append(file._replace(answers=answers))
                else:
                    file.owned.close()
                    yield self._all_said(file, answers)

    def _go_on(self, least: int) -> Iterator[Done]:
        """Yield the verdicts that are there; if there is none, wait until there may be one.

        Workers that have files are given more when there are `least`.
        """
        found = False
        for lane in self._lanes:
            for done in self._advance(lane, least):
                found = True
                yield done
        for done in self._collect():
            found = True
            yield done
        if self._ready:
            before = len(self._ready)
            yield from self._to_workers()
            found = found or len(self._ready) < before
        if not found:
            self._wait()

    def _wait(self) -> None:
        descriptors = []
        deadlines = []
        for lane in self._lanes:
            fileno = lane.supervisor.fileno()
            if fileno is not None:
                descriptors.append(fileno)
                deadlines.append(lane.supervisor.deadline())
        for _, handover in self._handovers:
            descriptors += handover.filenos()
            deadline = handover.deadline()
            if deadline is not None:
                deadlines.append(deadline)
        left = min(deadlines, default=None)
        any_is_readable(descriptors, None if left is None else left - time.monotonic())
