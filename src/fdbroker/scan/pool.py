"""Files for any engines: those that run in workers, on several CPUs, and those that run elsewhere.

An outside engine has a file first, one after the other, and then a worker with all inside engines: a
program that reads the file as its standard input shares the offset with whoever has the descriptor, and
nobody else may move it meanwhile.

A worker serves one domain: files that one user has handed in and that have one owner (st_uid). One that was
turned by a hostile file can lie about later files of that domain, and has none of another one.

Users take turns (`fdbroker.scan.turns`). There are more workers to be had than work at a time for one user:
who has nothing under way gets one at once, as long as there are some. Where there are none, one that has
had a window of files takes no more of its user, and goes to who has none.
"""

from __future__ import annotations

import math
import time
from collections import deque
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

from fdbroker.kernel.descriptors import Descriptors
from fdbroker.sandbox.waiting import any_is_readable
from fdbroker.scan.contract import admit
from fdbroker.scan.engine import EngineError, Inside, Outside
from fdbroker.scan.outside import Handover
from fdbroker.scan.plugins import make
from fdbroker.scan.supervisor import DEFAULT_TIMEOUT, DEFAULT_WINDOW, Done, Supervisor
from fdbroker.scan.turns import Source, Turns
from fdbroker.scan.verdict import Answer, Error, Reason, worst
from fdbroker.scan.versions import one_line

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Iterator, Sequence
    from types import TracebackType
    from typing import Self

    from fdbroker.sandbox import Zygote
    from fdbroker.sandbox.report import LayerReport
    from fdbroker.scan.plugins import Configured
    from fdbroker.scan.stamps import Stamp
    from fdbroker.scan.supervisor import Loaded

MOST_JOBS = 256
# Of the files that are with one worker. Small ones are handed over many at a time; of large ones so few that
# another worker has the next one.
_MOST_BYTES = 16 << 20
_new = tuple.__new__  # what a NamedTuple does itself, by a function in Python; there are two for each file


class Version(NamedTuple):
    """An engine and what it says of its version, in one line that can be shown; `inside`: in workers."""

    engine: str
    version: str
    inside: bool


class Domain(NamedTuple):
    """Whose files a worker has: who handed them in, and who owns them."""

    user: int
    owner: int


class Finished(NamedTuple):
    """A file of a client, with its verdict; `ticket` is what it was handed in with."""

    source: Source
    ticket: object
    done: Done


class _File(NamedTuple):
    """A file, with the answers of the outside engines that are done with it. `number`: each has another."""

    number: int
    source: Source
    ticket: object
    path: bytes
    owned: Descriptors  # of one
    before: Stamp
    owner: int
    answers: tuple[Answer, ...] = ()


class _Lane:
    """A worker, by way of its supervisor, and what it has."""

    def __init__(self, supervisor: Supervisor, window: int) -> None:
        self.supervisor = supervisor
        self.window = window
        self.group = supervisor.group
        self.domain: Domain | None = None  # of its files; None: it had none yet
        self.files: deque[_File] = deque()  # that it has; answered in this order
        self.bytes = 0
        self.gathered = 0  # files that were handed in since it was last seen to
        self.taken = 0  # files of this domain since it had those of another one
        self.promised: int | None = None  # the user who has it next

    def takes(self, domain: Domain) -> bool:
        """Return whether it may have one more file, of this domain."""
        if not self.files:
            return self.promised is None or self.promised == domain.user
        if self.promised is not None and self.taken >= self.window:
            return False
        return domain == self.domain and len(self.files) < self.window and self.bytes < _MOST_BYTES

    def gathers_more(self, file: _File) -> bool:
        """Return whether it is busy, can have this file too, and waits for more before they are sent."""
        return (
            0 < self.gathered < self.group - 1
            # As in `takes`, of one that has files.
            and self.domain == (file.source.user, file.owner)
            and len(self.files) < self.window
            and self.bytes + file.before.size < _MOST_BYTES
            and (self.promised is None or self.taken < self.window)
        )

    def gather(self, file: _File) -> None:
        """Hand in a file, which is not sent yet; its descriptor is the supervisor's from then on."""
        self.files.append(file)
        self.bytes += file.before.size
        self.gathered += 1
        self.taken += 1
        self.supervisor.enqueue(file.path, file.owned, file.before)

    def load(self, domain: Domain) -> int:
        """Return how many files it has; as if it had some if it is still to be started for this domain."""
        ready = self.domain is None and self.supervisor.workers_started > 0
        return len(self.files) if domain == self.domain or ready else self.group


class Pool:
    """Gives files to engines and returns verdicts, in any order.

    As a context manager it ends all workers and sessions, and closes what is under way. Who has files of one
    user and can wait calls `submit` and `finish`. Who has clients and an event loop calls `enqueue` and
    `advance`, and waits for `filenos` until `deadline`.

    Args:
        engines: whose verdicts are wanted, of either kind, each once.
        jobs: most workers at a time of one user; they are started as they are needed.
        spare: workers besides, for users who have none.
        ids: uid and gid of the workers; needed as root, impossible otherwise.
        timeout: seconds for one file in a worker.
        max_size: bytes; a file that is larger is an error, and no engine has it. None: no limit but theirs.
        isolate: a new worker for each file.
        files_per_worker: after so many files a worker is replaced; None: by its age alone.
        in_background: as of `Supervisor`: `advance` and `cancel` wait for no process.

    Raises:
        EngineError: an engine can't be had as it is configured, or is there twice.

    """

    def __init__(  # noqa: PLR0913 - each is a choice of its own
        self,
        engines: Sequence[Configured],
        *,
        jobs: int = 1,
        spare: int = 0,
        ids: tuple[int, int] | None = None,
        timeout: float = DEFAULT_TIMEOUT,
        max_size: int | None = None,
        isolate: bool = False,
        files_per_worker: int | None = None,
        in_background: bool = False,
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
        self._jobs = jobs
        window = 1 if isolate else DEFAULT_WINDOW
        for _ in range(jobs + spare if inside else 0):
            supervisor = Supervisor(
                inside,
                ids=ids,
                timeout=timeout,
                window=window,
                files_per_worker=1 if isolate else files_per_worker,
                spawn=self._lanes[0].supervisor.spawn_from_zygote if self._lanes else None,
                in_background=in_background,
            )
            self._lanes.append(_Lane(supervisor, window))
        self._last: _Lane | None = None
        # What outside engines have, by number, and how many files workers have.
        self._outside_files: dict[int, _File] = {}
        self._with_workers = 0
        self._number = 0
        # For the first outside engine, and for a worker, as soon as one may have it.
        self._arrived: Turns[_File] = Turns()
        self._ready: Turns[_File] = Turns()
        # Verdicts that nobody has been told yet, and the numbers of files that nobody wants to be told of.
        self._finished: list[Finished] = []
        self._unwanted: set[int] = set()
        # Of `submit`, which has one user.
        self._own = Source(0)

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

    @property
    def has_outside_engines(self) -> bool:
        """Whether files must be open files that nobody else has (`fdbroker.scan.engine.Outside`)."""
        return bool(self._outside)

    @property
    def under_way(self) -> int:
        """How many files engines have."""
        return len(self._outside_files) + self._with_workers

    @property
    def waiting(self) -> int:
        """How many files wait for an engine."""
        return self._arrived.count + self._ready.count

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

    def versions(self, loaded: Loaded | None = None) -> list[Version]:
        """Return the versions of all engines, in the order in which they were given.

        `loaded`: what `load` gave, to ask that; takes its time, so another thread may do it.

        Raises:
            EngineError: an outside engine is not there.
            SandboxError: no worker could tell them.
            OSError: no process or descriptors to be had.

        """
        told = {engine.name: one_line(engine.version()) for engine in self._outside}
        if self._lanes:
            told |= zip(self._inside, self._lanes[0].supervisor.versions(loaded), strict=True)
        return [Version(name, told[name], name in self._inside) for name in self._names]

    def outdated(self) -> bool:
        """Return whether the databases of the engines changed since they were loaded."""
        return bool(self._lanes) and self._lanes[0].supervisor.outdated()

    def load(self) -> Loaded | None:
        """Return the inside engines, loaded anew, for `adopt`; takes its time, so another thread may do it.

        Raises:
            SandboxError: they can't be loaded. All goes on with what was loaded before.
            OSError: no process or descriptors to be had; likewise.

        """
        return self._lanes[0].supervisor.load() if self._lanes else None

    def adopt(self, loaded: Loaded | None) -> Zygote | None:
        """Go on with workers of engines that `load` gave. What is under way goes to them.

        Returned is what they came from before, which the caller closes; that takes its time.
        """
        if loaded is None:
            return None
        outgoing = self._lanes[0].supervisor.adopt(loaded)
        for lane in self._lanes[1:]:
            lane.supervisor.start_anew()
        return outgoing

    def submit(self, path: bytes, descriptor: int) -> Iterable[Done]:
        """Hand in a file; yield verdicts of whatever files, as many as it takes to have room for more.

        `descriptor` is the pool's from the call on, also if nobody iterates.
        """
        file = self._admitted(self._own, path, path, descriptor, self._max_size, None)
        if file is not None:
            if not self._arrived.count and not self._ready.count:
                # As `_make_room` would do with it, without asking who else waits, or for verdicts.
                lane = self._last
                if self._handovers:
                    if self._handovers[0][1].room() > 0 and not self._finished:
                        self._hand_over(file)
                        return ()
                elif lane is not None and lane.gathers_more(file):
                    lane.gather(file)
                    self._with_workers += 1
                    return ()
            self._queue(file)
        return self._make_room()

    def finish(self) -> Iterator[Done]:
        """Yield the verdicts of all files that are under way."""
        while self.under_way or self.waiting or self._finished:
            yield from self._go_on(1)

    def enqueue(
        self,
        source: Source,
        ticket: object,
        path: bytes,
        descriptor: int,
        *,
        max_size: int | None = None,
        owner: int | None = None,
        before: Stamp | Error | None = None,
    ) -> bool:
        """Hand in a file of a client; `advance` goes on with it, and returns its verdict with the ticket.

        Return whether it is under way by now, so that there is nothing to do until a worker answers.
        `descriptor` is the pool's from the call on. `max_size`: as that of the pool, for this file. `owner`:
        whose file it is, where the descriptor is that of a copy. `before`: what
        `fdbroker.scan.contract.admit` said of it, where that was asked already.
        """
        most = self._max_size
        if max_size is not None:
            most = max_size if most is None else min(most, max_size)
        file = self._admitted(source, ticket, path, descriptor, most, owner, before)
        if file is None:
            return False
        lane = self._last
        if (
            lane is None
            or lane.domain != (source.user, file.owner)
            or lane.promised is not None
            or source.held
            or self.under_way
            or self.waiting
            or self._handovers
        ):
            self._queue(file)
            return False
        # Nobody has anything here, so that it is nobody else's turn: as `_to_workers` would do with it.
        worker = lane.supervisor.watched()
        self._give(lane, file)
        return lane.supervisor.watched() == worker and not self._finished

    def _admitted(
        self,
        source: Source,
        ticket: object,
        path: bytes,
        descriptor: int,
        max_size: int | None,
        owner: int | None,
        before: Stamp | Error | None = None,
    ) -> _File | None:
        """Return a file that engines may have; None: its verdict, an error, is there."""
        owned = Descriptors([descriptor])
        if before is None:
            before = admit(descriptor)
        if isinstance(before, Error):
            error, size = before, 0
        elif max_size is not None and before.size > max_size:
            size = before.size
            error = Error(Reason.TOO_LARGE, f"{size} bytes are more than the {max_size} that are asked for")
        else:
            self._number += 1
            whose = before.owner if owner is None else owner
            return _new(_File, (self._number, source, ticket, path, owned, before, whose, ()))
        owned.close()
        self._finished.append(Finished(source, ticket, Done(path, size, error)))
        return None

    def _queue(self, file: _File) -> None:
        (self._arrived if self._handovers else self._ready).add(file.source, file)

    def advance(self, least: int = 1, ready: Container[int] | None = None) -> list[Finished]:
        """Go on as far as that is possible without waiting; return the verdicts that are there.

        Workers that have files are given more when there are `least`. `ready`: of which `workers_to_watch`
        there is something to be read, or that are late, where the caller knows; the others are not asked.
        """
        self._distribute()
        for number, lane in enumerate(self._lanes):
            if ready is None or lane.gathered or number in ready:
                if lane.files:
                    self._advance(lane, least)
                elif ready is not None:
                    lane.supervisor.let_go_if_gone()
        if self._handovers:
            self._collect()
        if self._arrived.count or self._ready.count:
            self._distribute()
        finished, self._finished = self._finished, []
        return finished

    def filenos(self) -> list[int]:
        """Return the descriptors that become readable when there is something to do."""
        descriptors = [fileno for lane in self._lanes if (fileno := lane.supervisor.fileno()) is not None]
        return descriptors + self.outside_filenos()

    def workers_to_watch(self) -> list[tuple[int, object]]:
        """Return, of each worker, what becomes readable when it has something to say, and whose that is.

        As long as it is the same one's it may be watched on; it is closed by calls of this pool alone. -1:
        there is nothing.
        """
        return [lane.supervisor.watched() for lane in self._lanes]

    def outside_filenos(self) -> list[int]:
        """Return the part of `filenos` that is of outside engines."""
        return [fileno for _, handover in self._handovers for fileno in handover.filenos()]

    def deadline(self) -> float | None:
        """Return when (time.monotonic) `advance` must be called even if nothing became readable."""
        if self._finished:
            return 0.0
        deadlines = [lane.supervisor.deadline() for lane in self._lanes if lane.files]
        deadlines += [left for _, handover in self._handovers if (left := handover.deadline()) is not None]
        first = min(deadlines, default=math.inf)
        return None if first == math.inf else first

    def cancel(self, source: Source, wanted: Callable[[object], bool] = lambda _: True) -> list[object]:
        """Drop files of a client, those whose ticket is `wanted`; return the tickets.

        No verdict of these comes any more. A worker all of whose files are dropped is ended.
        """

        def of_file(file: _File) -> bool:
            return wanted(file.ticket)

        dropped = self._arrived.remove(source, of_file) + self._ready.remove(source, of_file)
        for file in dropped:
            file.owned.close()
        tickets = [file.ticket for file in dropped]
        for file in chain(self._outside_files.values(), *[lane.files for lane in self._lanes]):
            if file.source is source and file.number not in self._unwanted and wanted(file.ticket):
                self._unwanted.add(file.number)
                tickets.append(file.ticket)
        for lane in self._lanes:
            numbers = {file.number for file in lane.files}
            if numbers and numbers <= self._unwanted:
                lane.supervisor.abandon()
                self._unwanted -= numbers
                self._with_workers -= len(numbers)
                lane.files.clear()
                lane.bytes = lane.gathered = 0
        kept = []
        for one in self._finished:
            if one.source is source and wanted(one.ticket):
                tickets.append(one.ticket)
            else:
                kept.append(one)
        self._finished = kept
        return tickets

    def close(self) -> None:
        """End all workers and sessions and close the files that are under way; their verdicts are lost."""
        for _, handover in self._handovers:
            handover.close()
        # Of what a worker has, its supervisor has the descriptor.
        for file in (*self._outside_files.values(), *self._arrived.clear(), *self._ready.clear()):
            file.owned.close()
        self._outside_files.clear()
        # The first one last: it has the zygote, with which all workers end.
        for lane in reversed(self._lanes):
            lane.supervisor.close()
            lane.files.clear()
        self._with_workers = 0

    def _make_room(self) -> Iterator[Done]:
        """Go on until whoever has files has room for more."""
        self._distribute()
        yield from self._told()
        while self.waiting:
            yield from self._go_on(self._lanes[0].group if self._lanes else 1)

    def _told(self) -> Iterator[Done]:
        finished, self._finished = self._finished, []
        for one in finished:
            yield one.done

    def _distribute(self) -> None:
        """Give engines the files that wait, as far as they may have them."""
        if self._arrived.count:
            self._to_outside()
        if self._ready.count:
            self._to_workers()

    def _to_outside(self) -> None:
        while self._arrived.count and self._handovers[0][1].room() > 0:
            users = self._arrived.users()
            if not users:
                return
            self._hand_over(self._arrived.take(users[0]))

    def _hand_over(self, file: _File) -> None:
        """Give a file to the outside engine whose turn it is."""
        _, handover = self._handovers[len(file.answers)]
        self._outside_files[file.number] = file
        handover.submit(file.number, file.owned.numbers()[0], file.before)

    def _to_workers(self) -> None:
        placed = True
        while placed and self._ready.count:
            placed = False
            for user in self._ready.users():
                file = self._ready.first(user)
                if file is None:
                    continue
                lane = self._lane_for(Domain(user, file.owner))
                if lane is not None:
                    self._ready.take(user)
                    self._give(lane, file)
                    placed = True
        if self._ready.count:
            self._promise()

    def _give(self, lane: _Lane, file: _File) -> None:
        domain = Domain(file.source.user, file.owner)
        if lane.domain != domain:
            if lane.domain is not None:
                lane.supervisor.replace_worker()
            lane.domain = domain
            lane.taken = 0
        if lane.promised == domain.user:
            lane.promised = None
            lane.taken = 0
        self._last = lane
        lane.gather(file)
        self._with_workers += 1
        # Few messages to who is busy, and none that waits for others where nobody is.
        if lane.gathered >= lane.group or lane.bytes >= _MOST_BYTES or lane.supervisor.fileno() is None:
            self._advance(lane, 1)

    def _lane_for(self, domain: Domain) -> _Lane | None:
        """Return the worker that should have the next file of this domain; None: it has to wait."""
        last = self._last
        if last is not None and last.gathered and last.domain == domain and last.takes(domain):
            return last
        able = [lane for lane in self._lanes if lane.takes(domain)]
        if not able:
            return None
        mine = busy = 0
        for lane in self._lanes:
            if lane.files:
                busy += 1
                mine += lane.domain is not None and lane.domain.user == domain.user
        if mine and busy >= self._jobs:
            # What is left is for those who have none.
            able = [lane for lane in able if lane.files]
        return min(able, key=lambda lane: lane.load(domain), default=None)

    def _promise(self) -> None:
        """See to it that whoever has no worker gets the next one."""
        waiting = self._ready.users()
        having: dict[int, int] = {}
        promised = set()
        for lane in self._lanes:
            if lane.promised is not None and lane.promised not in waiting:
                lane.promised = None
            if lane.promised is not None:
                promised.add(lane.promised)
            if lane.files and lane.domain is not None:
                having[lane.domain.user] = having.get(lane.domain.user, 0) + 1
        for user in waiting:
            if user in having or user in promised:
                continue
            free = [lane for lane in self._lanes if lane.promised is None and lane.domain is not None]
            if not free:
                return

            def cost(lane: _Lane) -> tuple[int, int]:
                held = having.get(lane.domain.user, 0) if lane.domain is not None else 0
                return -held, len(lane.files) + max(0, lane.window - lane.taken)

            min(free, key=cost).promised = user

    def _advance(self, lane: _Lane, least: int) -> None:
        lane.gathered = 0
        answered = lane.supervisor.advance(least)
        if len(answered) + lane.supervisor.under_way != len(lane.files):
            answered = _given_up(lane)
        # Before any of them is told.
        for done, file in zip(answered, lane.files, strict=False):
            if done.path is not file.path:
                answered = _given_up(lane)
                break
        for done in answered:
            file = lane.files.popleft()
            self._with_workers -= 1
            lane.bytes -= done.size
            if not self._handovers:
                self._tell(file, done)
            else:
                inside = done.answers or tuple(Answer(name, done.verdict) for name in self._inside)
                self._all_said(file, (*file.answers, *inside))

    def _tell(self, file: _File, done: Done) -> None:
        if file.number in self._unwanted:
            self._unwanted.discard(file.number)
            return
        self._finished.append(_new(Finished, (file.source, file.ticket, done)))

    def _all_said(self, file: _File, answers: tuple[Answer, ...]) -> None:
        """Tell what outside and inside engines had said, in the order of the engines."""
        if len(answers) == 1:
            self._tell(file, _new(Done, (file.path, file.before.size, answers[0].verdict, answers)))
            return
        by_name = {answer.engine: answer for answer in answers}
        ordered = tuple(by_name[name] for name in self._names)
        self._tell(file, Done(file.path, file.before.size, worst(ordered), ordered))

    def _collect(self) -> None:
        """Take what outside engines have answered, and pass those files on."""
        for name, handover in self._handovers:
            for number, verdict in handover.answers():
                file = self._outside_files.pop(number)
                answers = (*file.answers, _new(Answer, (name, verdict)))
                if number in self._unwanted:
                    self._unwanted.discard(number)
                    file.owned.close()
                elif len(answers) < len(self._handovers):
                    self._hand_over(file._replace(answers=answers))
                elif self._lanes:
                    self._ready.add(file.source, file._replace(answers=answers))
                else:
                    file.owned.close()
                    self._all_said(file, answers)

    def _go_on(self, least: int) -> Iterator[Done]:
        """Yield the verdicts that are there; if there is none, wait until there may be one.

        Workers that have files are given more when there are `least`.
        """
        before = self.waiting
        finished = self.advance(least)
        for one in finished:
            yield one.done
        if not finished and self.waiting >= before and (self.under_way or self.waiting):
            left = self.deadline()
            any_is_readable(self.filenos(), None if left is None else left - time.monotonic())


def _given_up(lane: _Lane) -> list[Done]:
    """End a worker whose verdicts are not as many as its files, or in another order: whose is which?

    Return an error for each of its files.
    """
    lane.supervisor.abandon()
    error = Error(Reason.UNKNOWN_ANSWER, "the verdicts are not as many as the files, or in another order")
    return [Done(file.path, file.before.size, error) for file in lane.files]
