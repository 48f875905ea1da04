"""The process that all workers are forked from. `Zygote` starts it as a fresh interpreter.

It loads what the workers need, gives up what it does not need for starting them, and then
does two things: fork a confined worker when its parent asks, and say how a worker ended. Its
workers talk to its parent, never to it: it reads nothing that a hostile file had a
part in.

Two processes: the first one enters a pid namespace by forking the second one, the zygote
proper, waits for its end and passes it on. The first process of a namespace takes all
others in there with it when it ends, and so the workers.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import mmap
import os
import resource
import select
import signal
import socket
import struct
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from fdbroker.kernel import capabilities, children, dumpable, namespaces, process, sockets
from fdbroker.kernel.capabilities import CAP_SETGID, CAP_SETUID, CAP_SYS_ADMIN, Capabilities
from fdbroker.kernel.descriptors import Descriptors
from fdbroker.sandbox.confine import LAST_OF_ITS_OWN, Given, confine
from fdbroker.sandbox.confinement import SCRATCH, Confinement, Profile
from fdbroker.sandbox.errors import ConfinementError
from fdbroker.sandbox.filters import CHANNEL, filter_for
from fdbroker.sandbox.names import find
from fdbroker.sandbox.report import Layer
from fdbroker.sandbox.surroundings import (
    Gaps,
    enter_user_and_pid_namespace,
    loader_of,
    readable_places,
    surround,
)
from fdbroker.sandbox.waiting import is_readable

if TYPE_CHECKING:
    from collections.abc import Callable


# The first byte of a message of the zygote, and of the first message of a worker.
GOOD = b"\1"
FAILED = b"\0"
# Of the zygote alone: the function that loads says why it can't, in words that need no others.
SAYS_WHY = b"\2"
# What the parent says.
SPAWN = b"spawn"
# How a worker ended: si_code and si_status of waitid(2), on the pipe that the parent was given with it.
END = struct.Struct("=ii")
LONGEST_TEXT = 4000


class _Ground(NamedTuple):
    """What all workers start from."""

    wanted: Confinement
    given: Given
    pid_namespace: int | None  # to come back to from a worker's; None: workers have none
    state: object
    work: Callable[[Any, socket.socket, bytes | None], object]


def main() -> NoReturn:
    """Be the process; descriptor 0 is the socket to the parent."""
    status = 1
    try:
        status = _first_process()
    finally:
        os._exit(status)


def _first_process() -> int:
    process.close_range(LAST_OF_ITS_OWN + 1)
    os.chdir("/")
    control = socket.socket(fileno=CHANNEL)
    with sockets.receive(control, 1).descriptors as owned:
        with open(owned.take(), "rb") as file:
            setup = json.loads(file.read())
        parent = owned.take()
    wanted = Confinement.from_json(setup["confinement"])
    gaps = enter_user_and_pid_namespace(wanted)
    pidfd = os.pidfd_open(os.getpid())
    pid = os.fork()
    if pid:
        # The parent shall see the end of the socket when the zygote ends.
        control.close()
        return _wait_for(pid, parent)
    children.set_parent_death_signal(signal.SIGKILL)
    if is_readable(pidfd, 0.0):
        return 1
    os.close(pidfd)
    os.close(parent)
    _be_the_zygote(control, setup, wanted, gaps)
    return 0


def _wait_for(pid: int, parent: int) -> int:
    """Wait for the zygote's end, and bring it about when the parent ends; return the status to pass on.

    By a pidfd, since PR_SET_PDEATHSIG would mean the end of the *thread* that started this process.
    """
    ended = os.pidfd_open(pid)
    either = select.poll()
    either.register(parent, select.POLLIN)
    either.register(ended, select.POLLIN)
    if ended not in {descriptor for descriptor, _ in either.poll()}:
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)


def _be_the_zygote(control: socket.socket, setup: dict[str, Any], wanted: Confinement, gaps: Gaps) -> None:
    try:
        ground = _prepare(setup, wanted, gaps)
    except BaseException as error:  # noqa: BLE001 - whatever it was, the parent is told
        if getattr(error, "says_why", False):
            _tell_failure(control, str(error), SAYS_WHY)
        else:
            _tell_failure(control, f"{type(error).__name__}: {error}")
        return
    sockets.send(control, GOOD)
    _Spawner(control, ground).serve()


def _tell_failure(channel: socket.socket, text: str, how: bytes = FAILED) -> None:
    with contextlib.suppress(OSError):
        sockets.send(channel, how + text.encode("ascii", "backslashreplace")[:LONGEST_TEXT])


def _prepare(setup: dict[str, Any], wanted: Confinement, gaps: Gaps) -> _Ground:
    """Load all that workers need, then leave everything behind that can be opened by a name."""
    work = find(setup["work"])
    program = filter_for(wanted)
    state = find(setup["warm"])(**setup["arguments"]) if setup["warm"] is not None else None
    _warm_up()
    threads = len(os.listdir("/proc/self/task"))
    if threads != 1:
        raise ConfinementError(
            f"{threads} threads are running after {setup['warm']}, and a fork has but one of them: end them"
        )
    given = Given(
        filter=program,
        ids=None,
        zygote=os.pidfd_open(os.getpid()),
        mapped=_mapped_bytes(),
        surroundings=(),
    )
    if wanted.program is not None:
        path = os.path.realpath(wanted.program)
        given = given._replace(
            program=os.open(path, os.O_PATH | os.O_CLOEXEC),
            loader=loader_of(path),
            readable=readable_places(wanted),
        )
    home = None if gaps.processes else os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    # What libraries print shall not go to a file that happens to get that number.
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for number in range(CHANNEL + 1, LAST_OF_ITS_OWN + 1):
        os.dup2(null, number, inheritable=wanted.profile is Profile.PROGRAM)
    os.close(null)
    given = given._replace(surroundings=surround(wanted, gaps))
    _keep_what_starts_workers()
    return _Ground(wanted, given, home, state, work)


def _warm_up() -> None:
    """Use once what a worker uses, so that whatever loads lazily is loaded."""
    for number in (signal.SIGXFSZ, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    faulthandler.disable()
    json.dumps(json.loads('{"loaded": [1.5, "text"]}'))
    try:
        os.fstat(-1)
    except OSError as error:
        str(error).encode("ascii", "backslashreplace")


def _mapped_bytes() -> int:
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[0]) * mmap.PAGESIZE


def _keep_what_starts_workers() -> None:
    """Give up the capabilities that starting workers does not need, of root or of a user namespace."""
    wanted = 1 << CAP_SETUID | 1 << CAP_SETGID | 1 << CAP_SYS_ADMIN
    kept = capabilities.capget().permitted & wanted
    capabilities.capset(Capabilities(kept, kept, 0))
    process.set_no_new_privs()
    os.umask(0o077)
    dumpable.set_dumpable(False)
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))
    # Nothing that is there by now is garbage: looking through it would copy its pages in each worker.
    gc.collect()
    gc.disable()
    gc.freeze()


class _Running(NamedTuple):
    pipe: int  # the end that is written to
    uid: int | None


class _Spawner:
    """Forks workers when the parent asks, and tells how they ended."""

    def __init__(self, control: socket.socket, ground: _Ground) -> None:
        self._control = control
        self._ground = ground
        self._running: dict[int, _Running] = {}  # by pidfd
        self._events = select.poll()
        self._events.register(control, select.POLLIN)

    def serve(self) -> None:
        """Go on until the parent closes its end. The workers end with this process."""
        while True:
            for descriptor, _ in self._events.poll():
                if descriptor in self._running:
                    self._reap(descriptor)
                elif not self._answer():
                    return

    def _answer(self) -> bool:
        """Do what the parent asks; return False if it is gone."""
        try:
            message = sockets.receive(self._control, len(SPAWN) + 1)
        except ConnectionResetError:
            return False
        with message.descriptors as owned:
            if message.data != SPAWN or len(owned) != 1:
                return False
            try:
                self._spawn(owned.numbers()[0])
            except (ConfinementError, OSError) as error:
                _tell_failure(self._control, str(error))
        return True

    def _spawn(self, channel: int) -> None:
        """Fork a worker and pass a pidfd of it and the pipe on."""
        ids = self._free_ids()
        read_end, write_end = os.pipe()
        with Descriptors([read_end]):
            try:
                pidfd = self._fork(channel, ids)
            except OSError:
                os.close(write_end)
                raise
            self._running[pidfd] = _Running(write_end, None if ids is None else ids[0])
            self._events.register(pidfd, select.POLLIN)
            sockets.send(self._control, GOOD, [pidfd, read_end])

    def _free_ids(self) -> tuple[int, int] | None:
        uids, gid = self._ground.wanted.uids, self._ground.wanted.gid
        if not uids:
            return None
        taken = {running.uid for running in self._running.values()} if len(uids) > 1 else set()
        for uid in uids:
            if uid not in taken:
                return uid, uid if gid is None else gid
        raise ConfinementError(f"ids: all {len(uids)} uids are those of living workers")

    def _fork(self, channel: int, ids: tuple[int, int] | None) -> int:
        """Fork into a pid namespace of its own, and come back; return a pidfd."""
        home = self._ground.pid_namespace
        if home is not None:
            namespaces.unshare(namespaces.CLONE_NEWPID)
        try:
            pid = os.fork()
            if pid == 0:
                _live(self._ground, channel, ids)
        finally:
            if home is not None:
                namespaces.setns(home, namespaces.CLONE_NEWPID)
        try:
            # Not waited for yet, so the number is its own.
            return os.pidfd_open(pid)
        except OSError:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise

    def _reap(self, pidfd: int) -> None:
        running = self._running.pop(pidfd)
        ended = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
        if ended is None:
            raise RuntimeError("it was waited for, without WNOHANG, and there is nothing")
        self._events.unregister(pidfd)
        os.close(pidfd)
        # The parent may have closed its end: it does not want to know.
        with contextlib.suppress(BrokenPipeError):
            os.write(running.pipe, END.pack(ended.si_code, ended.si_status))
        os.close(running.pipe)


def _live(ground: _Ground, descriptor: int, ids: tuple[int, int] | None) -> NoReturn:
    """Be a worker. Nothing of the zygote's is cleaned up here, and no frame of it is returned to."""
    status = 1
    channel = None
    try:
        os.dup2(descriptor, CHANNEL, inheritable=False)
        # Before the filter: making the object asks the kernel what it is.
        channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, fileno=CHANNEL)
        os.setsid()
        report = confine(ground.wanted, ground.given._replace(ids=ids))
        sockets.send(channel, GOOD + report.encode())
        # What the zygote had is frozen, so this looks at what the worker makes alone.
        gc.enable()
        has_scratch = ground.wanted.profile is Profile.SCRATCH and report.state(Layer.EMPTY_ROOT).enforced
        ground.work(ground.state, channel, SCRATCH if has_scratch else None)
        status = 0
    except ConfinementError as error:
        if channel is not None:
            _tell_failure(channel, str(error))
    finally:
        os._exit(status)
