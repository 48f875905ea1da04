"""`command`: any program that reads a file on standard input and says by its exit status what it thinks.

It runs as who runs this, outside the worker's confinement: only the service's
own unprivileged user stands between it and the rest. It has an empty
environment but for PATH and LANG, no descriptor but its three, and a session of its own,
all of which is killed when its time is up or its answer is there.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fdbroker.scan.engine import EngineError, Outside, Progress, Session
from fdbroker.scan.options import Bytes, Seconds
from fdbroker.scan.verdict import Clean, Error, Reason, Verdict, found

if TYPE_CHECKING:
    from collections.abc import Sequence

_CHUNK = 64 * 1024
_ENVIRONMENT = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8"}
_LAST_STATUS = 255


@dataclass(frozen=True)
class CommandOptions:
    """`argv`: the program, by its absolute path, and its arguments; no shell.

    `clean`, `infected`: exit statuses that mean that; every other one, and a signal, is an error. `name`: a
    regular expression that finds the name in the output, in its one group; without it the name is that of
    the program. `reads_all`: clean counts only if standard input was read to its end (a program that maps
    the file or reads by position has not: false for such a one). `timeout`: for one file. `max_output`:
    bytes; more is an error. `window`: how many run at a time. `version`: what is told as its version.
    """

    argv: tuple[str, ...]
    clean: tuple[int, ...] = (0,)
    infected: tuple[int, ...] = (1,)
    name: str | None = None
    reads_all: bool = True
    timeout: Seconds = 60.0
    max_output: Bytes = 64 * 1024
    window: int = 2
    version: str = ""

    def __post_init__(self) -> None:
        """Refuse what could not be run, or whose answer could be read in two ways."""
        if not self.argv or not self.argv[0].startswith("/"):
            raise ValueError("argv: the program's absolute path comes first")
        if any("\0" in argument for argument in self.argv):
            raise ValueError("argv: an argument has a NUL in it")
        if not self.clean or any(status > _LAST_STATUS for status in (*self.clean, *self.infected)):
            raise ValueError("clean, infected: exit statuses are 0 to 255, and one must be clean")
        if both := sorted(set(self.clean) & set(self.infected)):
            raise ValueError(f"the exit status {both[0]} can't be both clean and infected")
        if not self.timeout or not 1 <= self.window <= 64:  # noqa: PLR2004 - processes
            raise ValueError("timeout: more than 0; window: 1 to 64")
        if self.name is not None:
            try:
                pattern = re.compile(self.name, re.MULTILINE)
            except re.error as error:
                raise ValueError(f"name: {error}") from error
            if pattern.groups != 1:
                raise ValueError("name: one group is needed, around the name")


class Command(Outside):
    """Runs a program for each file."""

    name = "command"
    options_type = CommandOptions
    options: CommandOptions

    def databases(self) -> Sequence[bytes]:
        """Return the program: when it is replaced, answers are of another engine."""
        return (os.fsencode(self.options.argv[0]),)

    def version(self) -> str:
        """Return what was configured, else the program's path."""
        return self.options.version or self.options.argv[0]

    def connect(self) -> Session:
        """Return a session.

        Raises:
            EngineError: there is no such program, or it can't be run.

        """
        program = self.options.argv[0]
        if not os.path.isfile(program) or not os.access(program, os.X_OK):
            raise EngineError(
                f"command: {ascii(program)[1:-1]} is no program that can be run here (option argv)"
            )
        return CommandSession(self.options)


class _Run:
    """One process. Owns it, its pidfd and the pipe of its output."""

    def __init__(self, options: CommandOptions, descriptor: int, size: int) -> None:
        self.descriptor = descriptor
        self.size = size
        self.output = b""
        # The offset is shared with whoever else has this open file description.
        os.lseek(descriptor, 0, os.SEEK_SET)
        self._process = subprocess.Popen(  # noqa: S603 - what was configured, without a shell
            options.argv,
            stdin=descriptor,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
            close_fds=True,
            cwd="/",
            env=_ENVIRONMENT,
            start_new_session=True,
        )
        self.end = time.monotonic() + options.timeout
        try:
            self.pidfd = os.pidfd_open(self._process.pid)
        except OSError:
            self._kill()
            self._process.wait()
            raise
        if self._process.stdout is not None:
            os.set_blocking(self._process.stdout.fileno(), False)

    def filenos(self) -> list[int]:
        """Return what becomes readable at its end, or when it writes."""
        pipe = self._process.stdout
        return [self.pidfd] if pipe is None or pipe.closed else [self.pidfd, pipe.fileno()]

    def read(self, most: int) -> bool:
        """Read what it has written; return whether that is more than `most` bytes."""
        pipe = self._process.stdout
        try:
            while pipe is not None and not pipe.closed and len(self.output) <= most:
                chunk = os.read(pipe.fileno(), _CHUNK)
                if not chunk:
                    pipe.close()
                self.output += chunk
        except BlockingIOError:
            pass  # all that is there by now
        return len(self.output) > most

    def status(self) -> int | None:
        """Return the exit status, negative for a signal, None while it runs."""
        return self._process.poll()

    def read_to_end(self) -> bool:
        """Return whether the file was read to its end through the descriptor it had."""
        return os.lseek(self.descriptor, 0, os.SEEK_CUR) >= self.size

    def end_all(self) -> None:
        """Kill what is left of its session, wait for it, and close what is owned."""
        self._kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        os.close(self.pidfd)

    def _kill(self) -> None:
        # The number is not another's: it was not waited for if it still runs, and if it was, the number of
        # the group is taken as long as anybody is left in it.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)


class CommandSession(Session):
    """The processes that run now."""

    def __init__(self, options: CommandOptions) -> None:
        self._options = options
        self._name = None if options.name is None else re.compile(options.name, re.MULTILINE)
        self._runs: dict[int, _Run] = {}
        self._done: list[Progress] = []

    def room(self) -> int:
        """Return how many more may run."""
        return self._options.window - len(self._runs)

    def submit(self, number: int, descriptor: int, size: int) -> bool:
        """Start the program with the file as standard input."""
        try:
            self._runs[number] = _Run(self._options, descriptor, size)
        except OSError as error:
            text = f"command: it could not be started: {error.strerror}"
            self._done.append(Progress(number, Error(Reason.ENGINE_FAILED, text)))
        return True

    def filenos(self) -> Sequence[int]:
        """Return what belongs to the processes."""
        return [descriptor for run in self._runs.values() for descriptor in run.filenos()]

    def deadline(self) -> float | None:
        """Return when the time of the first one is up."""
        if self._done:
            return 0.0
        return min((run.end for run in self._runs.values()), default=None)

    def answers(self) -> list[Progress]:
        """Look after all processes."""
        for number, run in list(self._runs.items()):
            verdict = self._look(run)
            if verdict is not None:
                del self._runs[number]
                run.end_all()
                self._done.append(Progress(number, verdict))
        done, self._done = self._done, []
        return done

    def close(self) -> None:
        """Kill what runs."""
        for run in self._runs.values():
            run.end_all()
        self._runs.clear()

    def _look(self, run: _Run) -> Verdict | None:
        # First the status: what it wrote before its end is in the pipe then.
        status = run.status()
        if run.read(self._options.max_output):
            most = self._options.max_output
            return Error(Reason.UNKNOWN_ANSWER, f"command: it wrote more than {most} bytes")
        if status is not None:
            return self._verdict(status, run)
        if time.monotonic() >= run.end:
            return Error(Reason.TIMED_OUT, f"command: not done within {self._options.timeout:g} s")
        return None

    def _verdict(self, status: int, run: _Run) -> Verdict:
        output = run.output.decode("utf-8", "replace")
        if status in self._options.infected:
            match = None if self._name is None else self._name.search(output)
            return found([match[1] if match and match[1] else os.path.basename(self._options.argv[0])])
        if status in self._options.clean:
            if self._options.reads_all and not run.read_to_end():
                return Error(
                    Reason.SHORT_READ, "command: it did not read the file to its end (option reads_all)"
                )
            return Clean()
        said = output.strip().splitlines()[-1:] or ["nothing"]
        if status < 0:
            reason = Reason.KILLED if -status == signal.SIGKILL else Reason.CRASHED
            return Error(reason, f"command: it was ended by signal {-status}; it said: {said[0]}")
        return Error(Reason.ENGINE_FAILED, f"command: exit status {status}; it said: {said[0]}")
