"""Keeps a confined worker busy, and believes it as little as possible.

The worker's bytes are hostile: an answer belongs to the file that is oldest under
way, has a verdict of each engine, to the byte, and says that the file had all its
bytes; text in it is held to what can be shown. Whatever else
happens (a dead worker, one that is late, one that can't be started) is an error
of the file that it happened to. The other files under way go to a new worker:
their descriptors are still held here.

A worker is one process with one thread and answers in order, so the time of a
file runs from the moment it is the oldest one.
"""

from __future__ import annotations

import errno
import signal
import time
from collections import deque
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from fdbroker.kernel import sockets
from fdbroker.kernel.descriptors import Descriptors
from fdbroker.sandbox import Confinement, Ended, Limits, Profile, SandboxError, Worker, Zygote, ZygoteError
from fdbroker.sandbox.waiting import is_readable
from fdbroker.scan import worker
from fdbroker.scan.answers import LONGEST_ANSWER, MOST_ENGINES, AnswerError, decode
from fdbroker.scan.contract import admit, confirm
from fdbroker.scan.engine import EngineError, combined
from fdbroker.scan.plugins import make_inside, to_json
from fdbroker.scan.stamps import Databases
from fdbroker.scan.verdict import Answer, Error, Reason, Verdict, worst
from fdbroker.scan.versions import LONGEST_VERSIONS, decode_versions
from fdbroker.scan.worker import MOST_REQUESTS, REQUEST, VERSIONS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
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
# A worker that closed its channel is about to end.
_GRACE = 1.0
_REASONS: dict[int, Reason] = {
    signal.SIGSYS: Reason.FORBIDDEN_CALL,
    signal.SIGKILL: Reason.KILLED,
    signal.SIGXCPU: Reason.KILLED,
}
# After these nobody knows what state the engine is in.
_SPOILING = frozenset({Reason.MEMORY, Reason.ENGINE_FAILED, Reason.SCRATCH_FULL, Reason.UNKNOWN_ANSWER})
# The kernel's "not now": the socket is full, or too many descriptors of this user are under way.
_FULL = frozenset({errno.EAGAIN, errno.ETOOMANYREFS})


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
    ) -> None:
        if not 1 <= len(engines) <= MOST_ENGINES:
            raise EngineError(f"1 to {MOST_ENGINES} engines are needed, not {len(engines)}")
        made = [make_inside(one) for one in engines]
        needs = combined(one.needs() for one in made)
        self._engines = tuple(engines)
        self._made = made
        self._databases: Databases | None = None
        self._names = [one.name for one in engines]
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
        self._spawn = spawn or self.spawn_from_zygote
        self._files_per_worker = files_per_worker
        self._files_left = files_per_worker
        self._worker: Worker | None = None
        self._retire_at = 0.0
        self._number = 0
        self._oldest_since = 0.0
        self._unsent: deque[_Job] = deque()
        self._sent: deque[_Job] = deque()
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

    def start(self) -> LayerReport:
        """Start the worker and return what confines it. Later ones start by themselves.

        Raises:
            SandboxError: it can't be confined as it must be, or not be started.
            OSError: no process or descriptors to be had.

        """
        self._worker = self._spawn()
        self._retire_at = time.monotonic() + _SECONDS_OF_A_WORKER
        self._files_left = self._files_per_worker
        self.workers_started += 1
        return self._worker.report

    def versions(self) -> list[str]:
        """Return what each engine says of its version, in their order.

        A worker of its own is asked, which never has a file, so that nothing hostile answers.

        Raises:
            SandboxError: there is no such worker, or it does not answer.
            OSError: no process or descriptors to be had.

        """
        with self._spawn() as fresh:
            sockets.send(fresh.channel, VERSIONS)
            if not is_readable(fresh.channel.fileno(), _SECONDS_TO_TELL):
                raise SandboxError("the worker does not tell the versions of its engines")
            with (message := sockets.receive(fresh.channel, LONGEST_VERSIONS + 1)).descriptors:
                versions = decode_versions(message.data)
        if len(versions) != len(self._names):
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
        self.adopt(self.load())

    def adopt(self, loaded: Loaded) -> None:
        """Go on with workers of engines that `load` gave, which are the supervisor's from the call on."""
        outgoing, self._zygote, self._databases = self._zygote, *loaded
        self.replace_worker()
        if outgoing is not None:
            outgoing.close()

    def load(self) -> Loaded:
        """Return the engines, loaded anew; changes nothing here, so another thread may do it.

        Raises:
            SandboxError: they can't be loaded.
            OSError: no process or descriptors to be had.

        """
        # First the look, so that what changes while it is loaded counts as changed.
        databases = Databases(self._made)
        arguments = {"engines": to_json(self._engines)}
        zygote = Zygote(
            worker.load,
            worker.work,
            arguments,
            confinement=self._confinement,
            timeout=_SECONDS_TO_LOAD,
        )
        return Loaded(zygote, databases)

    def spawn_from_zygote(self) -> Worker:
        """Return a new worker that has the engines, which the caller ends.

        Raises:
            SandboxError: it can't be confined as it must be, or the engines can't be loaded.
            OSError: no process or descriptors to be had.

        """
        if self._zygote is None:
            self._zygote, self._databases = self.load()
        try:
            return self._zygote.spawn()
        except ZygoteError:
            # The next file gets a new one.
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
        self.enqueue(path, descriptor, before)
        return self._go_on()

    def enqueue(self, path: bytes, descriptor: int, before: Stamp) -> None:
        """Hand in a file, for a caller who looks after several supervisors: `advance` goes on with it.

        `descriptor` is the supervisor's from the call on. `before` is what
        `fdbroker.scan.contract.admit` said.
        """
        self._number += 1
        self._unsent.append(_Job(self._number, path, Descriptors([descriptor]), before))

    def advance(self, least: int = 1) -> list[Done]:
        """Go on as far as that is possible without waiting; return the verdicts that are there.

        Files go to a worker that has others when there are `least`.
        """
        done = []
        while (one := self._look(least)) is not None:
            done.append(one)
        return done

    def fileno(self) -> int | None:
        """Return what becomes readable when there is something to do, None while nothing is with a worker."""
        return None if self._worker is None or not self._sent else self._worker.channel.fileno()

    def deadline(self) -> float:
        """Return when (time.monotonic) the time of the oldest file under way is up."""
        return self._oldest_since + self._timeout

    def replace_worker(self) -> None:
        """End the worker; the next file gets a new one. What is under way goes to that, oldest first."""
        if self._worker is not None:
            self._worker.stop()
            self._worker = None
        self._unsent.extendleft(reversed(self._sent))
        self._sent.clear()

    def abandon(self) -> None:
        """End the worker and close the files that are under way; nobody wants their verdicts any more."""
        self.replace_worker()
        for job in self._unsent:
            job.file.close()
        self._unsent.clear()

    def finish(self) -> Iterator[Done]:
        """Yield the verdicts of all files that are under way."""
        while self.under_way:
            yield self._next()

    def close(self) -> None:
        """End the worker and close the files that are under way; their verdicts are lost."""
        if self._worker is not None:
            self._worker.stop()
            self._worker = None
        if self._zygote is not None:
            self._zygote.close()
            self._zygote = None
        self.abandon()

    def _go_on(self) -> Iterator[Done]:
        """Keep the worker busy with few messages; where the window is full, make room for a message."""
        if not self._sent or len(self._unsent) >= self._group:
            failed = self._send()
            if failed is not None:
                yield failed
        if self.under_way >= self._window:
            while self.under_way > self._window - self._group:
                yield self._next(self._group)

    def _next(self, least: int = 1) -> Done:
        """Wait for the verdict of the oldest file under way. Send others if there are at least `least`."""
        while (done := self._look(least)) is None:
            if self._worker is None or not self._sent:
                raise RuntimeError("nothing is under way")
            is_readable(self._worker.channel.fileno(), self.deadline() - time.monotonic())
        return done

    def _look(self, least: int) -> Done | None:
        """Return the verdict of the oldest file under way if it is there. Send others, as `_next`."""
        if not self._sent or len(self._unsent) >= least:
            failed = self._send()
            if failed is not None:
                return failed
        process = self._worker
        if process is None or not self._sent:
            return None
        result = self._receive(process, self._sent[0])
        if result is not None:
            return self._done(result)
        if time.monotonic() >= self.deadline():
            self.replace_worker()
            text = f"the worker did not answer within {self._timeout:g} s"
            return self._done(Error(Reason.TIMED_OUT, text))
        return None

    def _send(self) -> Done | None:
        """Send as many files as fit. Return the oldest one, failed, if there is no way to send it."""
        while self._unsent and len(self._sent) < self._window:
            if self._worker is None:
                try:
                    self.start()
                except (SandboxError, OSError) as error:
                    return self._done(Error(Reason.NOT_LOADED, f"no worker could be started: {error}"))
            jobs = [*islice(self._unsent, min(self._group, self._window - len(self._sent)))]
            try:
                self._send_one_message(jobs)
            except OSError as error:
                # Full, or dead: whoever reads the answers finds out, and knows which file is to blame.
                if self._sent:
                    return None
                if error.errno in _FULL:
                    text = f"the worker could not be given the file: {error.strerror}"
                    return self._done(Error(Reason.NOT_LOADED, text))
                ended = Ended(None, None, "") if self._worker is None else self._worker.stop(grace=_GRACE)
                self.replace_worker()
                text = f"the worker took no file ({error.strerror}): {ended}"
                return self._done(Error(_reason_of(ended), text))
            if not self._sent:
                self._oldest_since = time.monotonic()
            for _ in jobs:
                self._sent.append(self._unsent.popleft())
        return None

    def _send_one_message(self, jobs: list[_Job]) -> None:
        if self._worker is not None:
            requests = b"".join(REQUEST.pack(job.number, job.before.size) for job in jobs)
            descriptors = [number for job in jobs for number in job.file.numbers()]
            sockets.send(self._worker.channel, requests, descriptors, wait=False)

    def _receive(self, process: Worker, job: _Job) -> list[Answer] | Error | None:
        """Read one message of the worker; None: there was none after all."""
        try:
            message = sockets.receive(process.channel, LONGEST_ANSWER + 1)
        except BlockingIOError:
            return None
        except ConnectionResetError:
            # Reported once, ahead of what is queued, when it died with requests unread.
            return None
        except OSError as error:
            self.replace_worker()
            return Error(Reason.UNKNOWN_ANSWER, f"the worker's answer could not be received: {error}")
        with message.descriptors as sent_along:
            if not message.data and not sent_along:
                ended = process.stop(grace=_GRACE)
                self.replace_worker()
                return Error(_reason_of(ended), f"the worker ended while it had this file: {ended}")
            answers = None if sent_along else self._judge(message.data, job)
        if answers is None:
            self.replace_worker()
            return Error(Reason.UNKNOWN_ANSWER, "the worker's answer is none")
        if any(isinstance(verdict, Error) and verdict.reason in _SPOILING for _, verdict in answers):
            # What an engine did not survive unharmed must not scan on. The files behind it are scanned again.
            self._replace_after(job)
        return answers

    def _judge(self, data: bytes, job: _Job) -> list[Answer] | None:
        """Return the verdicts of an answer, None if it is no answer to this file."""
        try:
            number, size, answers = decode(data, self._names)
        except AnswerError:
            return None
        if number != job.number or size != job.before.size:
            return None
        descriptor = job.file.numbers()[0]
        return [Answer(name, confirm(verdict, descriptor, job.before)) for name, verdict in answers]

    def _replace_after(self, job: _Job) -> None:
        """End the worker; it is done with this file, and keeps the place of the oldest."""
        self.replace_worker()
        self._unsent.remove(job)
        self._sent.append(job)

    def _done(self, result: list[Answer] | Error) -> Done:
        """Take the oldest file out, with this result; the time of the next one begins."""
        job = self._sent.popleft() if self._sent else self._unsent.popleft()
        job.file.close()
        now = time.monotonic()
        self._oldest_since = now
        if self._files_left is not None:
            self._files_left -= 1
        if self._worker is not None and (now >= self._retire_at or self._files_left == 0):
            self.replace_worker()
        if isinstance(result, Error):
            return Done(job.path, job.before.size, result)
        return Done(job.path, job.before.size, worst(result), tuple(result))


def _reason_of(ended: Ended) -> Reason:
    if ended.signal_number is None:
        return Reason.CRASHED
    return _REASONS.get(ended.signal_number, Reason.CRASHED)
