"""A confined process and the one socket to it.

The child is a fork, so all that it needs is imported already and it has no use
for a file system. It is born with a copy of this process's memory: start it
before there is anything in there that it must not know.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import os
import select
import signal
import socket
import time
from typing import TYPE_CHECKING, NoReturn

from fdbroker.kernel import process_state, sockets
from fdbroker.sandbox.confine import CHANNEL, Confinement, ConfinementError, confine
from fdbroker.sandbox.report import LONGEST_REPORT, LayerReport, ReportError, decode_report

if TYPE_CHECKING:
    from collections.abc import Callable

# The first byte of the first message.
_CONFINED = b"\1"
_FAILED = b"\0"

_SECCOMP_FILTER = 2  # of the line Seccomp: in /proc/PID/status
_SECONDS_TO_START = 20.0
_SECONDS_TO_DIE = 5.0


class ConfinedProcess:
    """A child that is confined. Owns its end of the channel, and the process itself.

    `channel` is a SOCK_SEQPACKET socket that does not block. What comes from
    it is hostile from the first byte that the child was given to read.
    """

    def __init__(self, pid: int, channel: socket.socket) -> None:
        self.pid = pid
        self.channel = channel
        self._pidfd = os.pidfd_open(pid)
        self._ended: str | None = None

    def stop(self, grace: float = 0.0) -> str:
        """Kill it if it does not end by itself within `grace` seconds; return how it ended.

        A process that can't be killed, since it waits for a file system that
        hangs, is left behind; the text says so. May be called again.
        """
        if self._ended is None:
            self.channel.close()
            exited = select.poll()
            exited.register(self._pidfd, select.POLLIN)
            if not exited.poll(grace * 1000):
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            if exited.poll(_SECONDS_TO_DIE * 1000):
                self._ended = _describe_end(os.waitpid(self.pid, 0)[1])
            else:
                self._ended = "it can't be killed: does a file system hang?"
            os.close(self._pidfd)
        return self._ended


def start_confined(
    confinement: Confinement, main: Callable[[socket.socket], object]
) -> tuple[ConfinedProcess, LayerReport]:
    """Fork a child, confine it, and have it run `main` with its end of the channel.

    Call it in a process that has one thread. `main` must find all that it
    needs in memory.

    Raises:
        ConfinementError: a layer that must be there is not; there is no child then.
        OSError: no process or no descriptor to be had.

    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    parent = os.getpid()
    try:
        pid = os.fork()
    except OSError:
        ours.close()
        theirs.close()
        raise
    if pid == 0:
        _live(confinement, main, theirs, parent)
    theirs.close()
    ours.settimeout(0.0)
    try:
        child = ConfinedProcess(pid, ours)
    except OSError:
        ours.close()
        os.kill(pid, signal.SIGKILL)  # ours and not waited for, so the number is nobody else's
        os.waitpid(pid, 0)
        raise
    try:
        # It has nothing to pass to us; what an older kernel lets through is closed by who receives.
        sockets.refuse_descriptors(ours)
        report = _receive_report(child)
        _check_by_the_kernel(child, confinement)
    except BaseException:
        child.stop()
        raise
    return child, report


def _receive_report(child: ConfinedProcess) -> LayerReport:
    end = time.monotonic() + _SECONDS_TO_START
    readable = select.poll()
    readable.register(child.channel, select.POLLIN)
    if not readable.poll(max(0.0, end - time.monotonic()) * 1000):
        raise ConfinementError(f"the process said nothing within {_SECONDS_TO_START:g} s")
    try:
        with (message := sockets.receive(child.channel, LONGEST_REPORT + 2)).descriptors:
            data = message.data
    except OSError as error:
        raise ConfinementError(f"the process ended before it was confined ({error})") from error
    if data[:1] == _FAILED:
        raise ConfinementError(data[1:].decode("ascii", "backslashreplace"))
    if data[:1] != _CONFINED:
        raise ConfinementError(f"the process ended before it was confined: {child.stop(grace=1.0)}")
    try:
        return decode_report(data[1:])
    except ReportError as error:
        raise ConfinementError(str(error)) from error


def _check_by_the_kernel(child: ConfinedProcess, wanted: Confinement) -> None:
    """Look at /proc whether the strict layers are there.

    Where /proc hides other processes (hidepid=) it is left at the child's own word, which it
    gave before it had anything hostile to read.
    """
    try:
        state = process_state.read_process_state(child.pid)
    except OSError:
        return
    uid = os.getuid() if wanted.ids is None else wanted.ids[0]
    gid = os.getgid() if wanted.ids is None else wanted.ids[1]
    holds = {
        "ids": state.uids == (uid,) * 4 and state.gids == (gid,) * 4,
        "groups": wanted.ids is None or not state.groups,
        "capabilities": not state.permitted | state.effective | state.inheritable | state.ambient,
        "no_new_privs": state.no_new_privs,
        "seccomp": state.seccomp == _SECCOMP_FILTER,
        "one thread": state.threads == 1,
    }
    wrong = [name for name, good in holds.items() if not good]
    if wrong:
        raise ConfinementError(f"the kernel says otherwise than the process: {', '.join(wrong)}")


_ENDS = {
    signal.SIGSYS: "it made a system call that it may not make",
    signal.SIGXCPU: "it used up its CPU time",
    signal.SIGKILL: "it was killed",
}


def _describe_end(status: int) -> str:
    if os.WIFEXITED(status):
        return f"it ended with status {os.WEXITSTATUS(status)}"
    number = os.WTERMSIG(status)
    if number not in set(signal.Signals):
        return f"it was ended by signal {number}"
    by = signal.Signals(number)
    return f"{_ENDS.get(by, 'it crashed')} ({by.name})"


def _live(
    confinement: Confinement, main: Callable[[socket.socket], object], theirs: socket.socket, parent: int
) -> NoReturn:
    """Be the child. Nothing of the parent's is cleaned up here, and no frame of it is returned to."""
    status = 1
    channel = None
    try:
        # Objects of the parent own descriptors whose numbers will be others' soon: none may be collected.
        gc.disable()
        gc.freeze()
        # Signals end it; no handler of the parent runs in here.
        faulthandler.disable()
        for number in signal.valid_signals():
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.SIG_DFL)
        # Away from the terminal, and from the keys that signal all in the foreground.
        os.setsid()
        descriptor = theirs.detach()
        if descriptor != CHANNEL:
            os.dup2(descriptor, CHANNEL, inheritable=False)
        # Before the filter: making the object asks the kernel what it is.
        channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, fileno=CHANNEL)
        report = confine(confinement, parent=parent)
        sockets.send(channel, _CONFINED + report.encode())
        main(channel)
        status = 0
    except ConfinementError as error:
        if channel is not None:
            text = str(error).encode("ascii", "backslashreplace")[:LONGEST_REPORT]
            with contextlib.suppress(OSError):
                sockets.send(channel, _FAILED + text)
    finally:
        os._exit(status)
