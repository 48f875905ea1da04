"""Confined workers from a warm zygote, seen from the process that wants them.

    with Zygote("engine:load", "engine:serve", {"database": "/var/lib/engine"}) as zygote:
        worker = zygote.spawn()

What the worker runs is told by name. The zygote is a fresh interpreter that imports it, so
no memory of this process, no environment and no descriptor of it get there.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from fdbroker.kernel import process_state, sockets
from fdbroker.kernel.descriptors import Descriptors
from fdbroker.sandbox.confinement import UNUSED_UIDS, Confinement
from fdbroker.sandbox.errors import ConfinementError, ZygoteError
from fdbroker.sandbox.names import name_of
from fdbroker.sandbox.report import LONGEST_REPORT, Layer, LayerReport, ReportError, decode_report
from fdbroker.sandbox.waiting import is_readable
from fdbroker.sandbox.zygote_process import END, FAILED, GOOD, LONGEST_TEXT, SAYS_WHY, SPAWN

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType
    from typing import Any, Self

DEFAULT_TIMEOUT = 20.0

_START = "import sys; sys.path[:] = sys.argv[1:]; from fdbroker.sandbox.zygote_process import main; main()"
_LONGEST_MESSAGE = max(LONGEST_REPORT, LONGEST_TEXT) + 2
_SECONDS_TO_DIE = 5.0
# Of the line Seccomp: in /proc/PID/status: a filter, and one that has killed the process.
_UNDER_A_FILTER = frozenset({2, 3})


class Ended(NamedTuple):
    """How a process ended: by itself with `status`, or by `signal_number`; both None: nobody could say.

    As text it is a sentence without a full stop.
    """

    status: int | None
    signal_number: int | None
    text: str

    def __str__(self) -> str:
        """Return the text."""
        return self.text


class Worker:
    """A confined process. Owns the channel to it and the process itself: call `stop`, or use it in `with`.

    `channel` is a SOCK_SEQPACKET socket that does not block; what comes from it is hostile
    from the first byte that the worker was given to read. `report` says what confines it.
    `pidfd` is readable when it has ended; `wait` knows how a moment later. `pid` is for looking
    at it; None: /proc does not say.
    """

    def __init__(self, channel: socket.socket, pidfd: int, end: int) -> None:
        self.channel = channel
        self.pidfd = pidfd
        self.pid = _pid_of(pidfd)
        self._owned = Descriptors([pidfd, end])
        self._end = end
        self._ended: Ended | None = None
        self._report: LayerReport | None = None

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it."""
        self.stop()

    @property
    def report(self) -> LayerReport:
        """What confines it; by the time that anybody has the worker, all strict layers are in force."""
        if self._report is None:
            raise RuntimeError("it has not reported yet")
        return self._report

    def kill(self) -> None:
        """Send SIGKILL. Does nothing if it has ended."""
        if self._ended is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> Ended | None:
        """Wait for its end, at most `timeout` seconds; return how it ended, None if it goes on."""
        if self._ended is None and is_readable(self._end, timeout):
            data = os.read(self._end, END.size)
            # Without an answer the zygote is gone, and what kills it kills its workers.
            code, status = END.unpack(data) if len(data) == END.size else (None, 0)
            self._ended = _how(code, status)
            self.channel.close()
            self._owned.close()
        return self._ended

    def stop(self, grace: float = 0.0) -> Ended:
        """Close the channel, kill it unless it ends by itself within `grace` seconds; return how it ended.

        A process that can't be killed, since it waits for a file system that
        hangs, is left behind; the text says so. May be called again.
        """
        self.channel.close()
        if self.wait(grace) is None:
            self.kill()
            if self.wait(_SECONDS_TO_DIE) is None:
                self._ended = Ended(None, None, "it can't be killed: does a file system hang?")
                self._owned.close()
        return self._ended or Ended(None, None, "")

    @property
    def end_fileno(self) -> int:
        """What is readable when `wait` knows how it ended; -1 when that is known."""
        return self._end if self._ended is None else -1

    def let_go(self) -> None:
        """Close the channel and kill it, and wait for nothing: nobody will know how it ended.

        For whoever has something else to do than to wait for a process that a file system holds. May be
        called again, and after `stop`.
        """
        self.channel.close()
        self.kill()
        if self._ended is None:
            self._ended = Ended(None, None, "it was let go of")
            self._owned.close()

    def confirm(self, wanted: Confinement, deadline: float) -> None:
        """Receive its report, and compare it with what is wanted and with the kernel's word.

        Raises:
            ConfinementError: it is not confined as it must be. Stop it.

        """
        if not is_readable(self.channel.fileno(), deadline - time.monotonic()):
            raise ConfinementError("the worker said nothing in time")
        try:
            with (message := sockets.receive(self.channel, _LONGEST_MESSAGE)).descriptors:
                data = message.data
        except OSError as error:
            raise ConfinementError(f"the worker ended before it was confined ({error})") from error
        if data[:1] == FAILED:
            raise ConfinementError(data[1:].decode("ascii", "backslashreplace"))
        if data[:1] != GOOD:
            raise ConfinementError(f"the worker ended before it was confined: {self.stop(grace=1.0)}")
        try:
            self._report = decode_report(data[1:])
        except ReportError as error:
            raise ConfinementError(str(error)) from error
        missing = [state.layer.value for state in self._report.missing() if wanted.insists_on(state.layer)]
        if missing:
            raise ConfinementError(f"missing: {', '.join(missing)}")
        self._check_by_the_kernel(wanted)

    def _check_by_the_kernel(self, wanted: Confinement) -> None:
        """Look at /proc whether the strict layers are there.

        Where /proc hides other processes (hidepid=) it is left at the worker's own word, which it
        gave before it had anything hostile to read.
        """
        if self.pid is None:
            return
        try:
            state = process_state.read_process_state(self.pid)
        except OSError:
            return
        uids, gids = {os.getuid()}, {os.getgid()}
        if wanted.uids:
            uids = set(wanted.uids)
            gids = set(wanted.uids) if wanted.gid is None else {wanted.gid}
        holds = {
            Layer.IDS: len(set(state.uids)) == len(set(state.gids)) == 1
            and state.uids[0] in uids
            and state.gids[0] in gids
            and not (wanted.uids and state.groups),
            Layer.CAPABILITIES: not state.permitted | state.effective | state.inheritable | state.ambient,
            Layer.NO_NEW_PRIVS: state.no_new_privs,
            Layer.SECCOMP: state.seccomp in _UNDER_A_FILTER,
        }
        wrong = [layer.value for layer, good in holds.items() if not good and layer in wanted.must_hold()]
        if state.threads != 1:
            wrong.append("one thread")
        if wrong:
            raise ConfinementError(f"the kernel says otherwise than the worker: {', '.join(wrong)}")


class Zygote:
    """A process that loaded what workers need, and forks them. Owns it: call `close`, or use it in `with`.

    Its workers end with it. May be used by several threads.

    Args:
        warm: what the zygote calls once before anything is confined, with `arguments` as
            keyword arguments; what it returns is the first argument of `work`. `module:function`, or a
            function that can be imported so. It may open what it likes, and must leave no thread
            behind, nor rely on a descriptor that it leaves open. None: there is nothing to load. What it
            raises is told by its text alone if it has a true attribute `says_why`, else with its type.
        work: what each worker runs once it is confined: `work(state, channel, scratch)`, with the
            worker's end of the channel, a socket that blocks, and the path of its own directory (profile
            `scratch`; None otherwise). The worker ends when it returns.
        arguments: values that JSON has.
        confinement: of each worker.
        timeout: seconds for starting it, `warm` included.
        wait: until it has started; otherwise the first `spawn` does, and raises what this would.

    Raises:
        ZygoteError: it did not start; the text has what `warm` raised.
        ValueError: a function without a name, arguments that JSON does not have, ids not ours to give.
        OSError: no process or descriptor to be had.

    """

    def __init__(
        self,
        warm: str | Callable[..., object] | None,
        work: str | Callable[[Any, socket.socket, bytes | None], object],
        arguments: Mapping[str, object] | None = None,
        *,
        confinement: Confinement | None = None,
        timeout: float = 60.0,
        wait: bool = True,
    ) -> None:
        self.confinement = _with_ids(confinement or Confinement())
        setup = {
            "warm": None if warm is None else name_of(warm),
            "work": name_of(work),
            "arguments": dict(arguments or {}),
            "confinement": self.confinement.to_json(),
        }
        self._lock = threading.Lock()
        self._pid: int | None = None
        self._started_by: float | None = None  # when it must have started, until it has
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                _send_setup(self._control, json.dumps(setup))
                self._pid = _start_interpreter(theirs.fileno())
            self._started_by = time.monotonic() + timeout
            if wait:
                self._wait_for_start()
        except BaseException:
            # It has no workers yet, and may be loading something for long.
            self._end()
            raise

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    @property
    def pid(self) -> int | None:
        """The process that this one started, which lives as long as the zygote; None if closed."""
        return self._pid

    @property
    def has_started(self) -> bool:
        """Whether `spawn` would not wait for its start, but for the worker alone."""
        return self._started_by is None or self._pid is None or is_readable(self._control.fileno(), 0.0)

    def spawn(self, *, timeout: float = DEFAULT_TIMEOUT) -> Worker:
        """Return a new worker, confined, with its report received and checked.

        Raises:
            ConfinementError: a layer that must be there is not; there is no worker then.
            ZygoteError: the zygote is gone, or did not answer within `timeout` seconds, and so was ended.
            OSError: no descriptors to be had.

        """
        with self._lock:
            self._wait_for_start()
        deadline = time.monotonic() + timeout
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.settimeout(0.0)
        try:
            # It has nothing to pass to us; what an older kernel lets through is closed by who receives.
            sockets.refuse_descriptors(ours)
            with theirs, self._lock:
                worker = self._ask(ours, theirs.fileno(), deadline)
        except BaseException:
            ours.close()
            raise
        try:
            worker.confirm(self.confinement, deadline)
        except BaseException:
            worker.stop()
            raise
        return worker

    def close(self) -> None:
        """End it, and all its workers. May be called again."""
        if self._started_by is not None:
            # It may be loading something for long, and would not see that the channel is closed.
            self._started_by = None
            self._end()
            return
        self._control.close()
        pid, self._pid = self._pid, None
        if pid is None:
            return
        with contextlib.suppress(ChildProcessError, ProcessLookupError):
            pidfd = os.pidfd_open(pid)
            try:
                if not is_readable(pidfd, _SECONDS_TO_DIE):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                    is_readable(pidfd, _SECONDS_TO_DIE)
            finally:
                os.close(pidfd)
            os.waitpid(pid, os.WNOHANG)

    def _wait_for_start(self) -> None:
        if self._started_by is None or self._pid is None:
            return
        try:
            answer = self._receive(self._started_by)
            answer.descriptors.close()
            if answer.data[:1] != GOOD:
                said = answer.data[1:].decode("ascii", "backslashreplace")
                if answer.data[:1] == SAYS_WHY:
                    raise ZygoteError(said)
                raise ZygoteError(f"the zygote did not start: {said or 'it ended'}")
        except BaseException:
            # It has no workers yet, and may be loading something for long.
            self._end()
            raise
        self._started_by = None

    def _ask(self, ours: socket.socket, theirs: int, deadline: float) -> Worker:
        if self._pid is None:
            raise ZygoteError("the zygote is closed")
        try:
            sockets.send(self._control, SPAWN, [theirs], wait=False)
        except OSError as error:
            self._end()
            raise ZygoteError(f"the zygote is gone: {error}") from error
        answer = self._receive(deadline)
        with answer.descriptors as owned:
            if answer.data == GOOD and len(owned) == 2:  # noqa: PLR2004 - a pidfd and a pipe
                return Worker(ours, owned.take(), owned.take())
        if answer.data[:1] == FAILED:
            raise ConfinementError(answer.data[1:].decode("ascii", "backslashreplace"))
        self._end()
        raise ZygoteError("the zygote is gone")

    def _receive(self, deadline: float) -> sockets.Received:
        if not is_readable(self._control.fileno(), deadline - time.monotonic()):
            # What it says later would be taken for the answer to something else.
            self._end()
            raise ZygoteError("the zygote did not answer in time, so it was ended")
        try:
            return sockets.receive(self._control, LONGEST_TEXT + 2)
        except OSError as error:
            self._end()
            raise ZygoteError(f"the zygote is gone: {error}") from error

    def _end(self) -> None:
        if self._pid is not None:
            # Ours and not waited for, so the number is nobody else's.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
        self.close()


def _with_ids(confinement: Confinement) -> Confinement:
    if os.geteuid() == 0:
        return confinement if confinement.uids else replace(confinement, uids=UNUSED_UIDS)
    if confinement.uids:
        raise ValueError("uids: only root can start workers of other users")
    return confinement


def _bytecode_options() -> list[str]:
    """Return what has another interpreter find and leave its bytecode where this one does."""
    options = ["-B"] if sys.dont_write_bytecode else []
    return options if sys.pycache_prefix is None else [*options, "-X", f"pycache_prefix={sys.pycache_prefix}"]


def _start_interpreter(channel: int) -> int:
    """Start the zygote with this descriptor as its standard input; return the pid.

    By posix_spawn(3), so it does not matter how many threads there are. It gets
    nothing of the environment, and imports from where this process does, but for
    relative places. What it prints on standard error is ours.
    """
    if not sys.executable:
        raise ZygoteError("this interpreter does not know where it is (sys.executable)")
    places = [place for place in sys.path if os.path.isabs(place)]
    return os.posix_spawn(
        sys.executable,
        [sys.executable, "-I", *_bytecode_options(), "-c", _START, *places],
        {},
        file_actions=[
            (os.POSIX_SPAWN_DUP2, channel, 0),
            (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_RDWR, 0),
        ],
        setsid=True,
        setsigmask=(),
        setsigdef=(signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD),
    )


def _send_setup(control: socket.socket, text: str) -> None:
    """Send it as a memfd, as it has any length, and a pidfd of this process, so that its end is seen."""
    with Descriptors([os.memfd_create("zygote", os.MFD_CLOEXEC)]) as owned:
        [setup] = owned.numbers()
        owned.add(os.pidfd_open(os.getpid()))
        with open(setup, "wb", closefd=False) as file:
            file.write(text.encode())
        os.lseek(setup, 0, os.SEEK_SET)
        sockets.send(control, b"\0", owned.numbers())


def _pid_of(pidfd: int) -> int | None:
    """Return the pid by which our /proc knows a process, as the kernel says; proc_pid_fdinfo(5)."""
    try:
        with open(f"/proc/self/fdinfo/{pidfd}", "rb") as file:
            lines = dict(line.split(b":\t", 1) for line in file.read().splitlines() if b":\t" in line)
        pid = int(lines[b"Pid"])
    except (OSError, KeyError, ValueError):
        return None
    return pid if pid > 0 else None


_ENDS = {
    signal.SIGSYS: "it made a system call that it may not make",
    signal.SIGXCPU: "it used up its CPU time",
    signal.SIGKILL: "it was killed",
}


def _how(code: int | None, status: int) -> Ended:
    """Return how a process ended, by si_code and si_status of waitid(2)."""
    if code is None:
        return Ended(None, None, "its zygote is gone, and so is it")
    if code == os.CLD_EXITED:
        return Ended(status, None, f"it ended with status {status}")
    if status not in set(signal.Signals):
        return Ended(None, status, f"it was ended by signal {status}")
    by = signal.Signals(status)
    return Ended(None, status, f"{_ENDS.get(by, 'it crashed')} ({by.name})")
