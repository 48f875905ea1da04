"""Keeps a confined worker busy, and believes it as little as possible.

The worker's bytes are hostile: an answer belongs to the file that is oldest under
way, has a verdict of each engine, to the byte, and says that the file had all its
bytes; text in it is held to what can be shown. Whatever else
happens (a dead worker, one that is late, one that can't be started) is an error
of the file that it happened to. The other files under way go to a new worker:
their descriptors are still held here.

A worker has several files in one message, and answers them together. If it fails it was at one of
them, and nobody knows at which. So they go to a new worker, in a message each, and the one that
is the oldest when that fails as well is the one.

A worker is one process with one thread and answers in order, so the time of a
message runs from the moment it is the oldest one, and anew from each answer to it.
"""

from __future__ import annotations

import errno
import math
import signal
import threading
import time
from collections import deque
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from fdbroker.kernel import sockets
from fdbroker.kernel.descriptors import Descriptors
from fdbroker.sandbox import Confinement, Ended, Limits, Profile, SandboxError, Worker, Zygote, ZygoteError
from fdbroker.sandbox.waiting import is_readable
from fdbroker.scan import worker
from fdbroker.scan.answers import LONGEST_ANSWER, MOST_ENGINES, AnswerError, all_clean, decode
from fdbroker.scan.contract import admit, confirm
from fdbroker.scan.engine import EngineError, combined
from fdbroker.scan.plugins import make_inside, to_json
from fdbroker.scan.stamps import Databases
from fdbroker.scan.starting import Starting
from fdbroker.scan.verdict import Answer, Clean, Error, Reason, Verdict, worst
from fdbroker.scan.versions import LONGEST_VERSIONS, decode_versions
from fdbroker.scan.worker import MOST_REQUESTS, REQUEST, VERSIONS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from types import TracebackType
    from typing import Self

    from fdbroker.sandbox.report import LayerReport
    from fdbroker.scan.plugins import Configured
    from fdbroker.scan.stamps import Stamp

DEFAULT_TIMEOUT = 300.0
DEFAULT_WINDOW = 64

# A worker is replaced when it is this old, so that an honest one never meets its limit of CPU time.
_SECONDS_OF_A_WORKER = 600.0
# The whole database of ClamAV takes half a minute, from a slow disk more.
_SECONDS_TO_LOAD = 300.0
_SECONDS_TO_TELL = 20.0
# A worker that closed its channel is about to end; one that is killed too, unless a file system holds it.
_GRACE = 1.0
_SECONDS_TO_DIE = 5.0
_REASONS: dict[int, Reason] = {
    signal.SIGSYS: Reason.FORBIDDEN_CALL,
    signal.SIGKILL: Reason.KILLED,
    signal.SIGXCPU: Reason.KILLED,
}
# After these nobody knows what state the engine is in.
_SPOILING = frozenset({Reason.MEMORY, Reason.ENGINE_FAILED, Reason.SCRATCH_FULL, Reason.UNKNOWN_ANSWER})
# The kernel's "not now": the socket is full, or too many descriptors of this user are under way.
_FULL = frozenset({errno.EAGAIN, errno.ETOOMANYREFS})
_NO_ANSWER = Error(Reason.UNKNOWN_ANSWER, "the worker's answer is none")
_new = tuple.__new__  # what a NamedTuple does itself, by a function in Python; there are two for each file


class Done(NamedTuple):
    """A file with its verdict; `size` as it was when the file was handed in.

    `answers`: of each engine; empty if none had the file.
    """

    path: bytes
    size: int
    verdict: Verdict
    answers: tuple[Answer, ...] = ()


class Loaded(NamedTuple):
    """Engines, loaded: where workers come from that have them, and what they were loaded from."""

    zygote: Zygote
    databases: Databases


class _Ending(NamedTuple):
    """A worker that ended, or is about to: `what` it did says whose fault that is once it is known how.

    `until` then (time.monotonic) it is waited for; then it is `killed`.
    """

    worker: Worker
    what: str
    until: float
    killed: bool = False


class _Job(NamedTuple):
    number: int
    path: bytes
    file: Descriptors  # of one
    before: Stamp


class Supervisor:
    """Gives files to a worker and returns verdicts.

    As a context manager it ends the worker and closes what is under way.

    Args:
        engines: whose verdicts are wanted, all of kind `Inside`; 1 to 8.
        ids: uid and gid of the worker; needed as root, impossible otherwise.
        timeout: seconds for one file.
        window: most files under way to the worker.
        files_per_worker: after so many files a worker is replaced; None: by its age alone.
        spawn: gives workers; by default they come from a zygote that is started with the first one.
        in_background: workers after the first one are started by threads, so that `advance` never waits for
            one, nor for engines that are loaded anew since the zygote has ended. `spawn` must allow for that.

    Raises:
        EngineError: an engine can't be had as it is configured, or does not run in a worker.

    """

    def __init__(
        self,
        engines: Sequence[Configured],
        *,
        ids: tuple[int, int] | None = None,
        timeout: float = DEFAULT_TIMEOUT,
        window: int = DEFAULT_WINDOW,
        files_per_worker: int | None = None,
        spawn: Callable[[], Worker] | None = None,
        in_background: bool = False,
    ) -> None:
        if not 1 <= len(engines) <= MOST_ENGINES:
            raise EngineError(f"1 to {MOST_ENGINES} engines are needed, not {len(engines)}")
        made = [make_inside(one) for one in engines]
        needs = combined(one.needs() for one in made)
        self._engines = tuple(engines)
        self._made = made
        self._databases: Databases | None = None
        self._all_clean = all_clean(one.name for one in engines)
        self._timeout = timeout
        self._window = window
        self._group = max(1, min(MOST_REQUESTS, window // 4))
        cpu_seconds = int(_SECONDS_OF_A_WORKER + timeout) + 10
        limits = Limits(
            MOST_REQUESTS + worker.DESCRIPTORS + needs.descriptors,
            extra_memory=needs.memory,
            cpu_seconds=cpu_seconds,
            # A file that can't grow is a part that is not looked at, and not every engine says so.
            file_size=needs.scratch_size,
        )
        self._confinement = Confinement(
            profile=Profile(needs.profile),
            jit=needs.jit,
            limits=limits,
            scratch_size=max(1, needs.scratch_size),
            uids=() if ids is None else ids[:1],
            gid=None if ids is None else ids[1],
        )
        self._zygote: Zygote | None = None
        # Of several threads that want a worker one loads the engines. Held for as long as that takes; the
        # other one is for the moment in which the zygote is another.
        self._loading = threading.Lock()
        self._exchange = threading.Lock()
        self._in_background = in_background
        self._starting: Starting | None = None
        self._ending: _Ending | None = None
        self._spawn = spawn or self.spawn_from_zygote
        self._files_per_worker = files_per_worker
        self._files_left = files_per_worker
        self._worker: Worker | None = None
        self._has_had_files = False
        self._retire_at = 0.0
        self._number = 0
        self._oldest_since = 0.0
        self._unsent: deque[_Job] = deque()
        self._sent: deque[_Job] = deque()
        # Of each message under way the number of its last file.
        self._ends: deque[int] = deque()
        # Files up to this number go in a message each.
        self._alone_until = 0
        self.workers_started = 0

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    @property
    def worker_pid(self) -> int | None:
        """The pid of the worker that runs now, None if there is none."""
        return None if self._worker is None else self._worker.pid

    @property
    def under_way(self) -> int:
        """How many files were handed in and have no verdict yet."""
        return len(self._sent) + len(self._unsent)

    @property
    def group(self) -> int:
        """How many files go to the worker in one message, where there are so many."""
        return self._group

    def begin(self) -> None:
        """Begin to load the engines, for a caller who has something to do meanwhile; `start` waits for it.

        Raises:
            SandboxError, OSError: as `start`, of what is known by now.

        """
        if self._zygote is None:
            self._zygote, self._databases = self._load(wait=False)

    @property
    def is_loaded(self) -> bool:
        """Whether the loading that `begin` has begun is over, well or not."""
        return self._zygote is None or self._zygote.has_started

    def start(self) -> LayerReport:
        """Start the worker and return what confines it. Later ones start by themselves.

        Raises:
            SandboxError: it can't be confined as it must be, or not be started.
            OSError: no process or descriptors to be had.

        """
        self._take_over(self._spawn())
        assert self._worker is not None  # noqa: S101 - for the type checker
        return self._worker.report

    def _take_over(self, worker: Worker) -> None:
        self._worker = worker
        self._has_had_files = False
        self._retire_at = time.monotonic() + _SECONDS_OF_A_WORKER
        self._files_left = self._files_per_worker
        self.workers_started += 1

    def versions(self, loaded: Loaded | None = None) -> list[str]:
        """Return what each engine says of its version, in their order; of `loaded`, before it is adopted.

        A worker is asked that has had no file yet, so that nothing hostile answers: the one of `start`, or
        one of its own.

        Raises:
            SandboxError: there is no such worker, or it does not answer.
            OSError: no process or descriptors to be had.

        """
        if loaded is None and self._worker is not None and not self._has_had_files:
            try:
                return self._told_by(self._worker)
            except BaseException:
                # It may answer yet, and nobody would know to what.
                self.replace_worker()
                raise
        with self._spawn() if loaded is None else loaded.zygote.spawn() as fresh:
            return self._told_by(fresh)

    def _told_by(self, fresh: Worker) -> list[str]:
        """Return the versions that a worker tells which has had no file."""
        sockets.send(fresh.channel, VERSIONS)
        if not is_readable(fresh.channel.fileno(), _SECONDS_TO_TELL):
            raise SandboxError("the worker does not tell the versions of its engines")
        with (message := sockets.receive(fresh.channel, LONGEST_VERSIONS + 1)).descriptors:
            versions = decode_versions(message.data)
        if len(versions) != len(self._engines):
            raise SandboxError("the worker told something else than the versions of its engines")
        return versions

    def outdated(self) -> bool:
        """Return whether the databases of the engines changed since they were loaded."""
        return self._databases is not None and self._databases.changed()

    def renew(self) -> None:
        """Load the engines anew, from the databases as they are now, and go on with workers that have them.

        The worker goes on meanwhile. Files that are under way when it is done are scanned by a new one; none
        is missed, and none answered twice.

        Raises:
            SandboxError: they can't be loaded. All goes on with what was loaded before.
            OSError: no process or descriptors to be had; likewise.

        """
        outgoing = self.adopt(self.load())
        if outgoing is not None:
            outgoing.close()

    def adopt(self, loaded: Loaded) -> Zygote | None:
        """Go on with workers of engines that `load` gave, which are the supervisor's from the call on.

        Returned is the zygote from before, which the caller closes; that takes its time.
        """
        with self._exchange:
            outgoing, self._zygote, self._databases = self._zygote, *loaded
        self.start_anew()
        return outgoing

    def start_anew(self) -> None:
        """End the worker, and one that is being started: the next file gets one that is not begun yet."""
        self.replace_worker()
        if self._starting is not None:
            self._starting.give_up()
            self._starting = None

    def load(self) -> Loaded:
        """Return the engines, loaded anew; changes nothing here, so another thread may do it.

        Raises:
            SandboxError: they can't be loaded.
            OSError: no process or descriptors to be had.

        """
        return self._load(wait=True)

    def _load(self, *, wait: bool) -> Loaded:
        # First the look, so that what changes while it is loaded counts as changed.
        databases = Databases(self._made)
        arguments = {"engines": to_json(self._engines)}
        zygote = Zygote(
            worker.load,
            worker.work,
            arguments,
            confinement=self._confinement,
            timeout=_SECONDS_TO_LOAD,
            wait=wait,
        )
        return Loaded(zygote, databases)

    def spawn_from_zygote(self) -> Worker:
        """Return a new worker that has the engines, which the caller ends.

        Raises:
            SandboxError: it can't be confined as it must be, or the engines can't be loaded.
            OSError: no process or descriptors to be had.

        """
        with self._loading:
            zygote = self._zygote
            if zygote is None:
                loaded = self.load()
                with self._exchange:
                    if self._zygote is None:
                        self._zygote, self._databases = loaded
                    zygote = self._zygote
                if zygote is not loaded.zygote:
                    loaded.zygote.close()  # others were adopted meanwhile
        try:
            return zygote.spawn()
        except ZygoteError:
            # The next file gets a new one.
            with self._exchange:
                if self._zygote is zygote:
                    self._zygote = None
            raise

    def submit(self, path: bytes, descriptor: int) -> Iterator[Done]:
        """Hand in a file; yield verdicts of whatever files, as many as it takes to have room for more.

        `descriptor` is the supervisor's from the call on, also if nobody iterates.
        """
        before = admit(descriptor)
        if isinstance(before, Error):
            Descriptors([descriptor]).close()
            return iter((Done(path, 0, before),))
        self.enqueue(path, Descriptors([descriptor]), before)
        return self._go_on()

    def enqueue(self, path: bytes, file: Descriptors, before: Stamp) -> None:
        """Hand in a file, for a caller who looks after several supervisors: `advance` goes on with it.

        Files are answered in the order in which they are handed in. `file` has one descriptor, and is the
        supervisor's from the call on. `before` is what `fdbroker.scan.contract.admit` said.
        """
        self._number += 1
        self._unsent.append(_new(_Job, (self._number, path, file, before)))

    def advance(self, least: int = 1) -> list[Done]:
        """Go on as far as that is possible without waiting; return the verdicts that are there.

        Files go to a worker that has others when there are `least`.
        """
        done: list[Done] = []
        while (some := self._look(least)) is not None:
            done += some
        return done

    def fileno(self) -> int | None:
        """Return what becomes readable when there is something to do, None while nothing is with a worker."""
        if self._ending is not None:
            return self._ending.worker.end_fileno
        if self._worker is None:
            return None if self._starting is None or not self._unsent else self._starting.fileno()
        return None if not self._sent else self._worker.channel.fileno()

    def watched(self) -> tuple[int, object]:
        """Return as `fileno`, but also of a worker that has nothing, with whose that is; -1: there is nobody.

        As long as it is the same one's it is the same open file.
        """
        if self._ending is not None:
            return self._ending.worker.end_fileno, self._ending
        if self._worker is not None:
            return self._worker.channel.fileno(), self._worker
        if self._starting is not None and self._unsent:
            return self._starting.fileno(), self._starting
        return -1, None

    def let_go_if_gone(self) -> None:
        """Replace a worker that has no file, and has ended, or said something all the same."""
        if self._worker is None or self._ending is not None or self._sent:
            return
        try:
            with sockets.receive(self._worker.channel, LONGEST_ANSWER + 1).descriptors:
                pass
        except BlockingIOError:
            return
        except OSError:
            pass
        self.replace_worker()

    def deadline(self) -> float:
        """Return when (time.monotonic) there is something to do in any case; infinity: never.

        It is when the time of the oldest file under way is up, or that of a worker that should have ended.
        """
        if self._ending is not None:
            return self._ending.until
        return self._oldest_since + self._timeout if self._sent else math.inf

    def replace_worker(self) -> None:
        """End the worker; the next file gets a new one. What is under way goes to that, oldest first."""
        self._ending = None
        if self._worker is not None:
            self._worker.let_go()
            self._worker = None
        self._unsent.extendleft(reversed(self._sent))
        self._sent.clear()
        self._ends.clear()

    def abandon(self) -> None:
        """End the worker and close the files that are under way; nobody wants their verdicts any more."""
        self.replace_worker()
        for job in self._unsent:
            job.file.close()
        self._unsent.clear()

    def finish(self) -> Iterator[Done]:
        """Yield the verdicts of all files that are under way."""
        while self.under_way:
            yield from self._next()

    def close(self) -> None:
        """End the worker and close the files that are under way; their verdicts are lost."""
        self._ending = None
        if self._worker is not None:
            self._worker.stop()
            self._worker = None
        self.start_anew()
        if self._zygote is not None:
            self._zygote.close()
            self._zygote = None
        self.abandon()

    def _go_on(self) -> Iterator[Done]:
        """Keep the worker busy with few messages; where the window is full, make room for a message."""
        if not self._sent or len(self._unsent) >= self._group:
            yield from self._send()
        if self.under_way >= self._window:
            while self.under_way > self._window - self._group:
                yield from self._next(self._group)

    def _next(self, least: int = 1) -> list[Done]:
        """Wait for verdicts. Send others if there are at least `least`."""
        while not (done := self._look(least)):
            if done is None:
                fileno, left = self.fileno(), self.deadline() - time.monotonic()
                if fileno is None:
                    raise RuntimeError("nothing is under way")
                is_readable(fileno, None if left == math.inf else left)
        return done

    def _look(self, least: int) -> list[Done] | None:
        """Do one thing that can be done now; return the verdicts it gave. None: there is nothing to do."""
        if self._ending is not None:
            return self._see_it_end(self._ending)
        if self._unsent and (not self._sent or len(self._unsent) >= least):
            had_none = not self._sent
            failed = self._send()
            if failed:
                return failed
            if had_none and self._ending is None:
                return None  # it can't have answered yet, and whoever waits for it is woken up
        process = self._worker
        if process is None or not self._sent:
            return None
        done = self._receive(process)
        if done is None and time.monotonic() >= self.deadline():
            text = f"the worker did not answer within {self._timeout:g} s"
            return self._blame(Error(Reason.TIMED_OUT, text))
        return done

    def _send(self) -> list[Done]:
        """Send as many files as fit. Return the oldest one, failed, if there is no way to send it."""
        while self._unsent and len(self._sent) < self._window and self._ending is None:
            if self._worker is None:
                try:
                    if not self._have_started():
                        return []
                except (SandboxError, OSError) as error:
                    return self._failed(Error(Reason.NOT_LOADED, f"no worker could be started: {error}"))
            count = 1
            if self._unsent[0].number > self._alone_until:
                count = min(self._group, self._window - len(self._sent))
            jobs = [*islice(self._unsent, count)]
            try:
                self._send_one_message(jobs)
            except OSError as error:
                # Full, or dead: whoever reads the answers finds out, and knows which file is to blame.
                if self._sent:
                    return []
                if error.errno in _FULL:
                    text = f"the worker could not be given the file: {error.strerror}"
                    return self._failed(Error(Reason.NOT_LOADED, text))
                if self._has_had_files:
                    # It ended behind those, and never had this one.
                    self.replace_worker()
                    continue
                self._expect_its_end(f"the worker took no file ({error.strerror})")
                return []
            self._has_had_files = True
            if not self._sent:
                self._oldest_since = time.monotonic()
            self._ends.append(jobs[-1].number)
            for _ in jobs:
                self._sent.append(self._unsent.popleft())
        return []

    def _have_started(self) -> bool:
        """Start a worker; return False if that is still being done. Raises as `start`."""
        if not self._in_background:
            self.start()
            return True
        if self._starting is None:
            self._starting = Starting(self._spawn)
        if not self._starting.is_over:
            return False
        starting, self._starting = self._starting, None
        self._take_over(starting.result())
        return True

    def _expect_its_end(self, what: str) -> None:
        """Have the worker, which is of no use any more, end by itself, to know how it ended."""
        if self._worker is not None:
            self._worker.channel.close()
            self._ending = _Ending(self._worker, what, time.monotonic() + _GRACE)

    def _see_it_end(self, ending: _Ending) -> list[Done] | None:
        """Return the verdicts that the end of the worker gives; None: it has not ended."""
        now = time.monotonic()
        ended = ending.worker.wait(0.0)
        if ended is None and now < ending.until:
            return None
        if ended is None and not ending.killed:
            ending.worker.kill()
            self._ending = ending._replace(until=now + _SECONDS_TO_DIE, killed=True)
            return None
        if ended is None:
            ended = Ended(None, None, "it can't be killed: does a file system hang?")
        had_files = bool(self._sent)
        error = Error(_reason_of(ended), f"{ending.what}: {ended}")
        if had_files:
            return self._blame(error)
        self.replace_worker()
        return self._failed(error)

    def _send_one_message(self, jobs: list[_Job]) -> None:
        if self._worker is not None:
            requests = b"".join([REQUEST.pack(job.number, job.before.size) for job in jobs])
            descriptors = [number for job in jobs for number in job.file.numbers()]
            sockets.send(self._worker.channel, requests, descriptors, wait=False)

    def _receive(self, process: Worker) -> list[Done] | None:
        """Read one message of the worker and return the verdicts in it; None: there was none after all."""
        try:
            message = sockets.receive(process.channel, LONGEST_ANSWER + 1)
        except BlockingIOError:
            return None
        except ConnectionResetError:
            # Reported once, ahead of what is queued, when it died with requests unread.
            return []
        except OSError as error:
            return self._blame(
                Error(Reason.UNKNOWN_ANSWER, f"the worker's answer could not be received: {error}")
            )
        with message.descriptors as sent_along:
            if sent_along:
                return self._blame(_NO_ANSWER)
            if not message.data:
                self._expect_its_end("the worker ended while it had this file")
                return []
        return self._take(process, message.data)

    def _take(self, process: Worker, data: bytes) -> list[Done]:
        """Return the verdicts in a message, up to what can be none of this worker."""
        done: list[Done] = []
        try:
            received = decode(data, self._all_clean)
        except AnswerError:
            return self._blame(_NO_ANSWER)
        now = time.monotonic()
        # Descriptors of files that are done, closed with one call.
        with Descriptors() as spent:
            for number, size, said in received:
                # Otherwise another worker has the files by now, or none, and the rest is not about them.
                if self._worker is not process:
                    break
                job = self._sent[0] if self._sent else None
                if job is None or number != job.number or size != job.before.size:
                    done += self._blame(_NO_ANSWER)
                    break
                answers = _confirmed(said, job)
                # The short way for nearly all files.
                verdict = answers[0].verdict if answers is self._all_clean else worst(answers)
                if not isinstance(verdict, Clean) and _is_spoilt_by(answers):
                    # What an engine did not survive unharmed must not scan on. Files behind it are scanned
                    # again.
                    self._replace_after(job)
                self._take_out(spent, now)
                done.append(_new(Done, (job.path, size, verdict, answers)))
        return done

    def _blame(self, error: Error) -> list[Done]:
        """End the worker, which failed at a file of the oldest message: its error, if that has one file.

        Otherwise all of them are tried again, each alone.
        """
        if not self._sent:
            # It said something though it had nothing.
            self.replace_worker()
            return []
        number, end = self._sent[0].number, self._ends[0]
        self.replace_worker()
        if number == end:
            return self._failed(error)
        self._alone_until = max(self._alone_until, end)
        return []

    def _replace_after(self, job: _Job) -> None:
        """End the worker; it is done with this file, and keeps the place of the oldest."""
        self.replace_worker()
        self._unsent.remove(job)
        self._sent.append(job)
        self._ends.append(job.number)

    def _failed(self, error: Error) -> list[Done]:
        """Take the oldest file out; return its verdict, which no engine gave."""
        with Descriptors() as spent:
            job = self._take_out(spent, time.monotonic())
        return [Done(job.path, job.before.size, error)]

    def _take_out(self, spent: Descriptors, now: float) -> _Job:
        """Take the oldest file out, with its descriptor; the time of the next one begins (time.monotonic)."""
        if self._sent:
            job = self._sent.popleft()
            if self._ends[0] == job.number:
                self._ends.popleft()
        else:
            job = self._unsent.popleft()
        spent.add(job.file.take())
        self._oldest_since = now
        if self._files_left is not None:
            self._files_left -= 1
        if self._worker is not None and (now >= self._retire_at or self._files_left == 0):
            self.replace_worker()
        return job


def _confirmed(said: tuple[Answer, ...], job: _Job) -> tuple[Answer, ...]:
    """Return the answers that stand, after one more look at the file; mostly it is what was said."""
    [descriptor] = job.file.numbers()
    if len(said) == 1:
        verdict = said[0].verdict
        stands = confirm(verdict, descriptor, job.before)
        return said if stands is verdict else (Answer(said[0].engine, stands),)
    return tuple([Answer(name, confirm(verdict, descriptor, job.before)) for name, verdict in said])


def _is_spoilt_by(answers: Iterable[Answer]) -> bool:
    return any(isinstance(said, Error) and said.reason in _SPOILING for _, said in answers)


def _reason_of(ended: Ended) -> Reason:
    if ended.signal_number is None:
        return Reason.CRASHED
    return _REASONS.get(ended.signal_number, Reason.CRASHED)
