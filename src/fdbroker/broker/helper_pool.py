"""Which open helper does what, for whom, until when. No input or output, no clock: pure bookkeeping.

A job is the paths of one request that may hang. It is done by one helper, path
by path; what the helper opened stays with it, until it is told to deliver or to
let go. Each step has a deadline, since each may never end: opening, but
closing as well (a FUSE server is asked at each close(2), and waited for).

A helper that misses a deadline is given up: it is killed and another one takes
its place at once, since a process that waits for a FUSE server which took its
request does not even end by SIGKILL. Such processes are counted per client
uid until the kernel says that they ended.

What is to be done comes out as effects, in order.
"""

from __future__ import annotations

import errno
from collections import deque
from enum import Enum, auto
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fdbroker.kernel.files import FilesystemFacts

HELPERS = 4
_MOST_PER_UID = HELPERS // 2  # at a time: one client can't have them all
STEP_SECONDS = 3.0  # for one path, for delivering, for closing
JOB_SECONDS = 10.0  # for all paths of a job
QUEUE_SECONDS = 10.0  # until a helper has time
_MOST_HUNG = 2  # paths of a job, until the rest of it is given up
_MOST_WAITING_PER_UID = 64  # jobs
_MOST_WAITING = 1024
# Processes that were killed and have not ended.
_MOST_STUCK_PER_UID = 8
_MOST_STUCK = 32


class ObjectFacts(NamedTuple):
    """What fstat(2) said in a helper: the names of `os.stat_result`, as conditions ask for them."""

    st_dev: int
    st_ino: int
    st_mode: int
    st_nlink: int
    st_uid: int
    st_gid: int
    st_size: int
    st_mtime_ns: int
    st_ctime_ns: int


class JobPath(NamedTuple):
    """One path. `root`: the descriptor of its held root. `check_name`: see `Report.lost_its_name`."""

    root: int
    path: bytes
    check_name: bool = False


class Job(NamedTuple):
    """What is asked for. `opens` False: the objects are only described.

    `owner` is who is told, for `cancel`; it is compared by identity. `done` is called once.
    """

    paths: Sequence[JobPath]
    opens: bool
    client_uid: int
    owner: object
    done: Callable[[JobAnswer], None]


class Report(NamedTuple):
    """What became of one path.

    `problem`: `timed_out`, `limit` (too much is asked for), `helper_ended`, or None: then `errno` says
    what the kernel said, and with 0 the rest is there. `opened`: the helper has it open; otherwise it is
    no regular file, of a file system that is not served, or was not to be opened. `lost_its_name`: it was
    not at its path any more after its links were counted. `place`: that of the path among those that the
    helper was given, by which it is delivered.
    """

    problem: str | None = None
    errno: int = 0
    facts: ObjectFacts | None = None
    filesystem: FilesystemFacts | None = None
    opened: bool = False
    lost_its_name: bool = False
    place: int = 0


class JobAnswer(NamedTuple):
    """The reports, in the order of the paths. Where something is `opened`, deliver or release `number`."""

    number: int
    reports: Sequence[Report]


class Delivery(NamedTuple):
    """How a delivery ended. `errno` 0: it was sent whole.

    `sent`: how many bytes were sent; None: nobody knows, and the connection is of no use any more.
    """

    errno: int
    sent: int | None


# Effects: what the caller has to do.


class Begin(NamedTuple):
    """Send paths of a job to a helper."""

    slot: int
    number: int
    job: Job
    paths: Sequence[JobPath]


class Release(NamedTuple):
    """Tell a helper to let go of what it opened."""

    slot: int
    number: int


class Replace(NamedTuple):
    """Have a helper killed, if it lives, and another one started; `serial` is the new one's."""

    slot: int
    serial: int


class Answer(NamedTuple):
    """Call `done`."""

    job: Job
    answer: JobAnswer


class Delivered(NamedTuple):
    """Call `done`. `owner`: the job's; None: of that job nothing is known any more."""

    done: Callable[[Delivery], None]
    delivery: Delivery
    owner: object


class GivenUp(NamedTuple):
    """Record that a helper was given up or ended. `path` None: it was not opening."""

    slot: int
    reason: str
    client_uid: int | None
    path: bytes | None


Effect = Begin | Release | Replace | Answer | Delivered | GivenUp


class _Phase(Enum):
    IDLE = auto()
    OPENING = auto()
    HOLDING = auto()
    DELIVERING = auto()
    CLOSING = auto()
    STARTING = auto()
    ENDED = auto()  # by itself; another one is started when there is something to do


class _Work:
    """A job, and what is known of it already from a helper that was given up."""

    def __init__(self, job: Job, until: float) -> None:
        self.job = job
        # In the queue until then; once it has begun, the end of all of it.
        self.until = until
        self.begun = False
        self.hung = 0
        self.settled: dict[int, Report] = {}  # by the index of the path

    def rest(self) -> list[int]:
        """Return the indexes of the paths of which nothing is known."""
        return [index for index in range(len(self.job.paths)) if index not in self.settled]


class _Slot:
    """One helper."""

    def __init__(self, serial: int) -> None:
        self.phase = _Phase.IDLE
        self.serial = serial
        self.number = 0
        self.work: _Work | None = None
        self.canceled = False
        self.indexes: list[int] = []  # of the paths that it was given
        self.reports: list[Report] = []
        self.deadline = 0.0
        self.delivered: Callable[[Delivery], None] | None = None

    @property
    def busy(self) -> bool:
        return self.work is not None

    @property
    def job(self) -> Job | None:
        return None if self.work is None else self.work.job


class HelperPool:
    """Jobs, those who do them, and those who wait. Times are monotonic seconds."""

    def __init__(self) -> None:
        # Those of the start have the number of their slot as serial.
        self._slots = [_Slot(slot) for slot in range(HELPERS)]
        # uid -> what waits; the uid that is first is next.
        self._waiting: dict[int, deque[_Work]] = {}
        self._waiting_count = 0
        self._stuck: dict[int, int] = {}  # serial -> client uid
        self._last_number = 0
        self._last_serial = HELPERS - 1
        self._gone = False
        self._effects: list[Effect] = []

    def take_effects(self) -> list[Effect]:
        """Return what is to be done since the last call."""
        effects, self._effects = self._effects, []
        return effects

    @property
    def stuck(self) -> int:
        """How many were given up and have not ended."""
        return len(self._stuck)

    def submit(self, job: Job, now: float) -> None:
        """Have a job done, now or later."""
        waiting = self._waiting.get(job.client_uid, ())
        stuck = list(self._stuck.values()).count(job.client_uid)
        if self._gone:
            self._answer_all(job, "helper_ended")
        elif (
            len(waiting) >= _MOST_WAITING_PER_UID
            or self._waiting_count >= _MOST_WAITING
            or stuck >= _MOST_STUCK_PER_UID
            or len(self._stuck) >= _MOST_STUCK
        ):
            self._answer_all(job, "limit")
        else:
            self._waiting.setdefault(job.client_uid, deque()).append(_Work(job, now + QUEUE_SECONDS))
            self._waiting_count += 1
            self._begin_jobs(now)

    def reported(self, slot: int, number: int, index: int, report: Report, now: float) -> None:
        """Note what a helper says of its next path."""
        entry = self._slots[slot]
        work = entry.work
        if work is None or entry.phase is not _Phase.OPENING or entry.number != number:
            return
        if index != len(entry.reports):
            return  # it is given up in time
        entry.reports.append(report._replace(place=index))
        if len(entry.reports) < len(entry.indexes):
            entry.deadline = min(now + STEP_SECONDS, work.until)
            return
        holds = any(report.opened for report in entry.reports)
        self._enter(entry, _Phase.HOLDING if holds else _Phase.CLOSING, now)
        if not entry.canceled:
            work.settled.update(zip(entry.indexes, entry.reports, strict=True))
            self._answer(work, number)
        elif holds:
            self._release(slot, now)

    def deliver(self, number: int, done: Callable[[Delivery], None], now: float) -> int | None:
        """Return which helper is to deliver what it holds; None: it was given up. `done` is called once."""
        for slot, entry in enumerate(self._slots):
            if entry.phase is _Phase.HOLDING and entry.number == number:
                self._enter(entry, _Phase.DELIVERING, now)
                entry.delivered = done
                return slot
        self._effects.append(Delivered(done, Delivery(errno.ETIMEDOUT, 0), None))
        return None

    def release(self, number: int, now: float) -> None:
        """Have a helper let go of what it holds; nothing if it was given up."""
        for slot, entry in enumerate(self._slots):
            if entry.phase is _Phase.HOLDING and entry.number == number:
                self._release(slot, now)

    def delivered(self, slot: int, number: int, delivery: Delivery, now: float) -> None:
        """Note how a delivery ended."""
        entry = self._slots[slot]
        if entry.phase is _Phase.DELIVERING and entry.number == number:
            self._end_delivery(entry, delivery)
            self._enter(entry, _Phase.CLOSING, now)

    def free(self, slot: int, number: int, now: float) -> None:
        """Note that a helper has closed all that it had open."""
        entry = self._slots[slot]
        if entry.phase is _Phase.CLOSING and entry.number == number:
            self._forget_job(entry, _Phase.IDLE)
            self._begin_jobs(now)

    def cancel(self, owner: object, now: float) -> None:
        """Drop what is for nobody any more."""
        for uid, waiting in list(self._waiting.items()):
            kept = deque(work for work in waiting if work.job.owner is not owner)
            self._waiting_count -= len(waiting) - len(kept)
            if kept:
                self._waiting[uid] = kept
            else:
                del self._waiting[uid]
        for slot, entry in enumerate(self._slots):
            if entry.job is not None and entry.job.owner is owner:
                entry.canceled = True
                entry.delivered = None
                if entry.phase is _Phase.HOLDING:
                    self._release(slot, now)

    def started(self, slot: int, serial: int, now: float) -> None:
        """Note that a helper takes jobs."""
        entry = self._slots[slot]
        if entry.phase is _Phase.STARTING and entry.serial == serial:
            entry.phase = _Phase.IDLE
            self._begin_jobs(now)

    def ended(self, slot: int, serial: int, now: float) -> None:
        """Note that the process of a helper is gone: one that was given up, or one that ended by itself."""
        if self._stuck.pop(serial, None) is not None:
            return
        entry = self._slots[slot]
        if entry.serial != serial or entry.phase in {_Phase.STARTING, _Phase.ENDED}:
            return
        self._give_up(slot, "helper_ended", errno.EIO)
        entry.phase = _Phase.ENDED
        self._begin_jobs(now)

    def all_ended(self) -> None:
        """Note that no helper will ever be there again."""
        self._gone = True
        for slot, entry in enumerate(self._slots):
            if entry.phase not in {_Phase.STARTING, _Phase.ENDED}:
                self._give_up(slot, "helper_ended", errno.EIO)
            entry.phase = _Phase.ENDED
        for waiting in self._waiting.values():
            for work in waiting:
                self._answer(work, 0, "helper_ended")
        self._waiting.clear()
        self._waiting_count = 0

    def next_deadline(self) -> float | None:
        """Return when `expire` has something to do, None: at no time."""
        times = [entry.deadline for entry in self._slots if entry.busy]
        times += [min(work.until for work in waiting) for waiting in self._waiting.values()]
        return min(times, default=None)

    def expire(self, now: float) -> None:
        """Give up whatever took too long."""
        for slot, entry in enumerate(self._slots):
            if not entry.busy or entry.deadline > now:
                continue
            if entry.phase is _Phase.HOLDING:
                self._release(slot, now)
                continue
            work = entry.work
            assert work is not None  # noqa: S101 - for the type checker: it is busy
            self._stuck[entry.serial] = work.job.client_uid
            again = entry.phase is _Phase.OPENING and not entry.canceled and self._goes_on(entry, work, now)
            self._give_up(slot, "timed_out", errno.ETIMEDOUT, answers=not again)
            self._replace(slot)
            if again:
                self._waiting.setdefault(work.job.client_uid, deque()).appendleft(work)
                self._waiting_count += 1
        for uid, waiting in list(self._waiting.items()):
            kept = deque(work for work in waiting if work.until > now)
            for work in waiting:
                if work.until <= now:
                    self._answer(work, 0, "timed_out")
            self._waiting_count -= len(waiting) - len(kept)
            if kept:
                self._waiting[uid] = kept
            else:
                del self._waiting[uid]
        self._begin_jobs(now)

    def _begin_jobs(self, now: float) -> None:
        """Give those who are idle something to do: a job of each uid in turn."""
        for uid in list(self._waiting):
            if not self._may_begin(uid):
                continue
            slot = self._find(_Phase.IDLE)
            if slot is None:
                slot = self._find(_Phase.ENDED)
                if slot is not None and not self._gone:
                    self._replace(slot)
                return
            waiting = self._waiting.pop(uid)
            work = waiting.popleft()
            self._waiting_count -= 1
            if waiting:
                self._waiting[uid] = waiting  # behind all others
            self._begin(slot, work, now)
        if self._find(_Phase.IDLE) is not None and any(self._may_begin(uid) for uid in self._waiting):
            self._begin_jobs(now)

    def _may_begin(self, uid: int) -> bool:
        return (
            sum(entry.job is not None and entry.job.client_uid == uid for entry in self._slots)
            < _MOST_PER_UID
        )

    def _find(self, phase: _Phase) -> int | None:
        return next((slot for slot, entry in enumerate(self._slots) if entry.phase is phase), None)

    def _begin(self, slot: int, work: _Work, now: float) -> None:
        entry = self._slots[slot]
        self._last_number += 1
        entry.number = self._last_number
        entry.work = work
        entry.canceled = False
        entry.indexes = work.rest()
        entry.reports = []
        if not work.begun:
            work.begun = True
            work.until = now + JOB_SECONDS
        self._enter(entry, _Phase.OPENING, now)
        paths = [work.job.paths[index] for index in entry.indexes]
        self._effects.append(Begin(slot, entry.number, work.job, paths))

    @staticmethod
    def _goes_on(entry: _Slot, work: _Work, now: float) -> bool:
        """Note which path hangs; return whether another helper is to go on with the others."""
        work.hung += 1
        for index, report in zip(entry.indexes, entry.reports, strict=False):
            if not report.opened:  # what it had opened is gone with it
                work.settled[index] = report
        work.settled[entry.indexes[len(entry.reports)]] = Report("timed_out")
        return work.hung < _MOST_HUNG and now < work.until and bool(work.rest())

    @staticmethod
    def _enter(entry: _Slot, phase: _Phase, now: float) -> None:
        entry.phase = phase
        entry.deadline = now + STEP_SECONDS

    def _release(self, slot: int, now: float) -> None:
        entry = self._slots[slot]
        self._enter(entry, _Phase.CLOSING, now)
        self._effects.append(Release(slot, entry.number))

    def _replace(self, slot: int) -> None:
        self._last_serial += 1
        entry = self._slots[slot]
        entry.serial = self._last_serial
        entry.phase = _Phase.STARTING
        self._effects.append(Replace(slot, entry.serial))

    def _give_up(self, slot: int, problem: str, number: int, *, answers: bool = True) -> None:
        """Answer for a helper of which nothing more is expected."""
        entry = self._slots[slot]
        work = entry.work
        uid = path = None
        if work is not None:
            uid = work.job.client_uid
            if entry.phase is _Phase.OPENING:
                path = work.job.paths[entry.indexes[len(entry.reports)]].path
        self._effects.append(GivenUp(slot, problem, uid, path))
        if work is not None and entry.phase is _Phase.OPENING and not entry.canceled and answers:
            for index, report in zip(entry.indexes, entry.reports, strict=False):
                if not report.opened:
                    work.settled[index] = report
            self._answer(work, 0, problem)
        elif entry.phase is _Phase.DELIVERING:
            self._end_delivery(entry, Delivery(number, None))
        self._forget_job(entry, entry.phase)

    def _end_delivery(self, entry: _Slot, delivery: Delivery) -> None:
        done, entry.delivered = entry.delivered, None
        if done is not None:
            self._effects.append(Delivered(done, delivery, None if entry.job is None else entry.job.owner))

    @staticmethod
    def _forget_job(entry: _Slot, phase: _Phase) -> None:
        entry.work = None
        entry.reports = []
        entry.phase = phase

    def _answer(self, work: _Work, number: int, problem: str | None = None) -> None:
        """Answer a job; `problem` is what there is to say of paths of which nothing is known."""
        rest = Report(problem)
        reports = [work.settled.get(index, rest) for index in range(len(work.job.paths))]
        self._effects.append(Answer(work.job, JobAnswer(number, reports)))

    def _answer_all(self, job: Job, problem: str) -> None:
        self._effects.append(Answer(job, JobAnswer(0, [Report(problem)] * len(job.paths))))
