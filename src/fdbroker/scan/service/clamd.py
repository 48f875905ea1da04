"""A client that speaks clamd's protocol (docs/clamd.md): an unmodified client of ClamAV.

What it names by paths the broker opens on its behalf; what it hands over it has opened itself, or sends. As
with `fdbroker.scan.service.native`, nothing that it does holds up another one: it is read from as far as
there is room, and while it does not read its answers, its files stop.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import time
from functools import partial
from typing import TYPE_CHECKING

from fdbroker.clamd.protocol import (
    COMMANDS,
    EVERYTHING,
    RELOADING,
    Abandoned,
    Asked,
    Chunk,
    Conversation,
    Kind,
    Limits,
    Refusal,
    Reply,
    Streamed,
)
from fdbroker.clamd.replies import OK, STREAM, commands, said, statistics, version_of
from fdbroker.client import BrokerError
from fdbroker.config.names import printable
from fdbroker.kernel import sockets
from fdbroker.kernel.descriptors import Descriptors
from fdbroker.scan.run import Scanned
from fdbroker.scan.service.closing import (
    MOST_BYTES,
    READS_AT_ONCE,
    Farewell,
    all_is_read,
    close_aside,
    close_stream,
)
from fdbroker.scan.service.copying import look, sealed_copy
from fdbroker.scan.service.core import write_line
from fdbroker.scan.service.filesystems import Sorted, sort_out
from fdbroker.scan.service.opening import FAILED, OneByOne, ToScan, TreeOfFiles
from fdbroker.scan.service.streams import Stream
from fdbroker.scan.service.watch import IS_GONE, READABLE, WRITABLE
from fdbroker.scan.tree import Exclusions
from fdbroker.scan.verdict import Clean, Error, Infected, Reason

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fdbroker.aio import ServedClient
    from fdbroker.clamd.protocol import Event
    from fdbroker.scan.service.configuration import Listener
    from fdbroker.scan.service.core import Core
    from fdbroker.scan.service.memory import Kept
    from fdbroker.scan.stamps import Stamp
    from fdbroker.scan.supervisor import Done
    from fdbroker.scan.verdict import Verdict

MOST_COMMANDS = 64  # of one session under way; then no more is read
_EVENTS_AT_ONCE = 80  # before others have their turn
_NOT_RECEIVED = b"File descriptors could not be received. ERROR\n"
_STOP_AT_A_FINDING = frozenset({Kind.SCAN, Kind.ALLMATCHSCAN})
_PATHS = frozenset({Kind.SCAN, Kind.CONTSCAN, Kind.MULTISCAN, Kind.ALLMATCHSCAN})
# Of these the broker's audit says who asked for what, and that it was refused.
_IN_THE_AUDIT = frozenset({Reason.DENIED, Reason.NOT_FOUND})


class _Command:
    """A command that scans, as far as it got. `name` is what replies name, `shown` what the log does."""

    def __init__(self, asked: Asked, name: bytes, shown: bytes) -> None:
        self.kind = asked.kind
        self.number = asked.number
        self.name = name
        self.shown = shown
        self.under_way = 0
        self.all_handed_in = False
        self.over = False
        self.anything_said = False
        self.missing: tuple[str, ...] = ()
        self.task: asyncio.Task[None] | None = None
        self.kept: Kept | None = None


class ClamdClient:
    """A connection of a client; owns it."""

    def __init__(
        self,
        core: Core,
        served: ServedClient,
        listener: Listener,
        came: tuple[bytes, Descriptors, bool] | None = None,
    ) -> None:
        """Serve it. `came`: what it has said already, as `receive_unclosed` gives it; owned from now on."""
        self._core = core
        self._served = served
        self._sock = served.socket
        # By number: of a socket that it does not know the loop makes a text, for an error that nobody sees.
        self._fileno = self._sock.fileno()
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self._files = core.hub.client(served.uid)
        self._files.on_room = self._on_room
        self._conversation = Conversation(
            _limits_of(listener),
            self._loop.time(),
            self._may_ask_for(),
        )
        self._owned = Descriptors()  # that came and were not asked about yet
        self._commands: dict[int, _Command] = {}
        self._stream: Stream | None = None
        self._to_open = OneByOne()
        self._copying: set[asyncio.Task[None]] = set()
        self._outbox = bytearray()
        self._is_due = False  # to go on, and say what there is to say
        self._resuming: asyncio.Handle | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._dry = True  # no event can be made of what was received
        self._pulling = False
        self._sorting = False  # descriptors are looked at aside
        self._reading = True  # what comes is wanted
        # Nothing but its end is waited for until it is read from: mostly all is there.
        self._waits_for = 0
        core.watch.add(self._fileno, 0, self._on_event, later=True)
        self._closed = False
        self._refused = False
        core.connections[self] = listener
        # Mostly it has said by now what it wants, and is answered and gone before anybody has to wait for it.
        try:
            self._read(came)
        except BaseException:
            self._close()
            raise

    # ---- who it is ----

    def _may_ask_for(self) -> frozenset[Kind]:
        return _commands_of(self._served.uid, self._core)

    def _owner_of_streams(self) -> int:
        """Return whose files streams are: workers have those of one owner."""
        return self._served.uid

    def _who(self) -> str:
        return f"uid {self._served.uid}"

    # ---- the socket ----

    def _may_go_on(self) -> bool:
        return (
            not self._closed
            and not self._sorting
            and self._write_timer is None
            and len(self._outbox) < MOST_BYTES
            and self._conversation.under_way < MOST_COMMANDS
            and self._files.may_be_given()
            and (self._stream is None or self._stream.kept.may_grow(MOST_BYTES))
        )

    def _wait(self, wanted: int) -> None:
        """Be called for these events, and when it goes."""
        if self._write_timer is not None:
            wanted |= WRITABLE
        if wanted != self._waits_for:
            self._waits_for = wanted
            self._core.watch.change(self._fileno, wanted)

    def _on_event(self, events: int) -> None:
        if self._write_timer is not None and events & (WRITABLE | IS_GONE):
            self._write()
        if self._closed:
            return
        if self._reading:
            self._read()
        elif events & IS_GONE:
            self._close()
        else:
            # Mostly a client says nothing while it waits, so this was left until it does.
            self._wait(0)

    def _read(self, came: tuple[bytes, Descriptors, bool] | None = None) -> None:
        """Read what is there, behind what `came` already, and do what can be done about it."""
        for _ in range(READS_AT_ONCE):
            if came is None and not self._may_receive():
                break
            try:
                data, owned, dropped = came or sockets.receive_unclosed(self._sock, MOST_BYTES)
            except BlockingIOError:
                break
            except ConnectionError:
                self._close()
                return
            except OSError:
                self._send_and_close(_NOT_RECEIVED)
                return
            if dropped:
                # By the kernel: what came with which command nobody can tell now.
                with contextlib.suppress(OSError):
                    sockets.send_at_once(self._sock, bytes(self._outbox) + _NOT_RECEIVED)
                self._let_go()
                close_aside(self._core, self._served, owned.take_all())
                return
            came = None
            if not len(owned):
                if self._answer_at_once(data):
                    return
            elif not all(map(self._core.mounted.have, owned.numbers())):
                self._sort_out(data, owned)
                break
            # A read ends at a descriptor, otherwise at the end of what is there.
            may_be_more = len(owned) > 0 or len(data) == MOST_BYTES
            if len(owned) != 1 or not self._begin_at_once(data, owned):
                self._receive(data, owned)
                self._pull()
            if not may_be_more or not self._wants_more():
                break
        if self._resuming is None:
            self._go_on()
        else:
            self._flush()

    def _answer_at_once(self, data: bytes) -> bool:
        """Answer what is all that a client says, where it is such a thing and nothing else is under way.

        Return whether that was so: then what was waited for before is waited for now.
        """
        if self._waits_for != READABLE or self._outbox or not self._dry or self._resuming is not None:
            return False
        reply = self._conversation.answer_at_once(data, self._loop.time())
        if reply is None:
            return False
        try:
            sent = sockets.send_at_once(self._sock, reply)
        except OSError:  # it waits, or who it is for is gone: what is done then is known elsewhere
            sent = 0
        if sent < len(reply):
            self._send(reply[sent:])
            self._flush()
        return True

    def _begin_at_once(self, data: bytes, descriptors: Descriptors) -> bool:
        """Have a file scanned, where all that is said is that; return whether it is so."""
        if not self._may_go_on():
            return False
        asked = self._conversation.asked_at_once(data, self._loop.time())
        if asked is None:
            return False
        self._pulling = True
        try:
            self._scan_descriptor(asked, descriptors.take())
        finally:
            self._pulling = False
        return True

    def _receive(self, data: bytes, descriptors: Descriptors) -> None:
        count = len(descriptors)
        for descriptor in descriptors.take_all():
            self._owned.add(descriptor)
        self._conversation.receive(data, count, self._loop.time())
        self._dry = False

    def _sort_out(self, data: bytes, descriptors: Descriptors) -> None:
        """Go on when it is known whether descriptors are of use; nothing is read before."""
        self._sorting = True
        numbers = descriptors.take_all()

        def known(over: asyncio.Future[Sorted]) -> None:
            self._sorting = False
            # Its user's other connections may be read from, too.
            self._core.hub.make_room_known()
            with over.result().kept as kept:
                if self._closed:
                    return
                refused = over.result().refused
                if not refused:
                    self._receive(data, kept)
                elif len(numbers) != 1 or not self._refuse_at_once(data, numbers[0], refused[0]):
                    self._send_and_close(said(refused[0])[0] + b"\n")
                    return
            self._go_on()

        self._core.aside.run(self._served.uid, lambda: sort_out(numbers)).add_done_callback(known)

    def _refuse_at_once(self, data: bytes, descriptor: int, why: Error) -> bool:
        """Answer that a file is not scanned, where all that is said is to scan it; return whether it is so.

        The descriptor is closed by now.
        """
        asked = self._conversation.asked_at_once(data, self._loop.time())
        if asked is None:
            return False
        name = b"fd[%d]" % descriptor
        command = self._commands[asked.number] = _Command(asked, name, name)
        command.all_handed_in = True
        self._tell(command, name, why)
        return True

    def _wants_more(self) -> bool:
        return self._dry and self._conversation.reads_more and self._may_go_on() and self._may_receive()

    def _may_receive(self) -> bool:
        # Descriptors that come may have to be looked at there, and each read has up to 253.
        return self._core.aside.is_free_for(self._served.uid)

    def _go_on(self) -> None:
        """Do what was asked, as far as there is room for it, and see what is to be waited for."""
        if self._pulling or self._closed:
            return
        while True:
            if not self._dry:
                self._pull()
            self._flush()
            if self._dry or self._resuming is not None or not self._may_go_on():
                return

    def _pull(self) -> None:
        self._pulling = True
        now = self._loop.time()
        try:
            for _ in range(_EVENTS_AT_ONCE):
                if self._dry or not self._may_go_on():
                    return
                event = self._conversation.next_event(now)
                if event is None:
                    self._dry = True
                    if not self._conversation.descriptors_wanted:
                        self._owned.close()
                else:
                    self._take(event)
            if self._resuming is None:
                self._resuming = self._loop.call_soon(self._resume)
        finally:
            self._pulling = False

    def _on_room(self) -> None:
        if not self._reading and (not self._dry or self._conversation.reads_more):
            self._go_on()

    def _resume(self) -> None:
        self._resuming = None
        self._go_on()

    def _on_memory(self) -> None:
        self._loop.call_soon(self._go_on)  # later: who makes room is not done yet

    def _settle(self) -> None:
        """Wait for the right thing: more of the client, or its end, or room."""
        if self._closed:
            return
        if self._conversation.is_over and not self._outbox:
            self._finish()
            return
        self._reading = self._wants_more()
        if self._reading:
            self._wait(READABLE)
        self._arm()

    def _arm(self) -> None:
        """Be called when a client that is read from is too late, or has paused."""
        deadline = self._conversation.deadline if self._reading else None
        if self._timer is not None:
            if deadline is not None and self._timer.when() <= deadline:
                return  # it looks again then
            self._timer.cancel()
            self._timer = None
        if deadline is not None:
            self._timer = self._loop.call_at(deadline, self._on_time)

    def _on_time(self) -> None:
        self._timer = None
        if self._reading:
            self._conversation.expire(self._loop.time())
            self._dry = False
            self._go_on()

    def _send(self, data: bytes) -> None:
        self._outbox += data
        if not self._pulling and not self._closed:
            self._go_on_soon()

    def _go_on_soon(self) -> None:
        if not self._is_due:
            self._is_due = True
            self._core.watch.soon(self._on_round_over)

    def _on_round_over(self) -> None:
        self._is_due = False
        if self._resuming is None:
            self._go_on()
        else:
            self._flush()

    def _flush(self) -> None:
        if not self._closed and self._write_timer is None:
            self._write()

    def _write(self) -> None:
        progress = False
        while self._outbox:
            try:
                sent = sockets.send_at_once(self._sock, bytes(self._outbox))
            except BlockingIOError:
                self._wait_to_write(progress=progress)
                return
            except OSError:
                self._close()
                return
            progress = True
            del self._outbox[:sent]
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
            self._wait(self._waits_for & ~WRITABLE)
            self._files.hold(held=False)
            self._go_on()
        self._settle()

    def _wait_to_write(self, *, progress: bool) -> None:
        """Wait for a client to read what it was told; its files stop until then."""
        if self._write_timer is None:
            self._files.hold(held=True)
        elif progress:
            self._write_timer.cancel()
        else:
            return
        self._write_timer = self._loop.call_later(self._listener.write_timeout, self._close)
        self._wait(self._waits_for)
        self._settle()

    def _finish(self) -> None:
        """Close, since this was all; who was refused may be in the middle of a sentence."""
        if not self._refused and all_is_read(self._sock):
            self._close()
            return
        self._let_go()
        Farewell(self._core, self._served, self._listener)

    def end(self, reason: str, text: str) -> None:  # noqa: ARG002 - clamd's clients know no reasons
        """Answer what is under way with an error, and close."""
        if self._closed:
            return
        answers = b""
        for command in list(self._commands.values()):
            self._stop(command)
            answers += self._conversation.answer(command.number, f"{text}. ERROR".encode(), command.name)
        self._send_and_close(answers)

    def _send_and_close(self, data: bytes) -> None:
        with contextlib.suppress(OSError):
            sockets.send_at_once(self._sock, bytes(self._outbox) + data)
        self._close()

    def _close(self) -> None:
        if not self._closed:
            self._let_go()
            close_stream(self._core, self._served)

    def _let_go(self) -> None:
        """Let go of all but the connection."""
        self._closed = True
        self._core.connections.pop(self, None)
        self._core.watch.let_go(self._fileno)
        self._reading = False
        for handle in (self._timer, self._write_timer, self._resuming):
            if handle is not None:
                handle.cancel()
        self._to_open.close()
        for task in self._copying:
            task.cancel()
        for command in self._commands.values():
            command.over = True
            _let_go(command)
        self._commands.clear()
        if self._stream is not None:
            self._stream.abandon()
        self._owned.close()
        self._files.close()

    # ---- commands ----

    def _take(self, event: Event) -> None:
        match event:
            case Reply(data) | Refusal(data):
                self._send(data)
                if isinstance(event, Refusal):
                    self._refused = True
                    self._owned.close()
            case Chunk(_, data):
                assert self._stream is not None  # noqa: S101 - of the protocol
                self._stream.add(data)
            case Streamed():
                self._scan_stream()
            case Abandoned():
                assert self._stream is not None  # noqa: S101 - likewise
                self._stream.abandon()
                self._stream = None
            case _:
                self._begin(event)

    def _begin(self, asked: Asked) -> None:
        kind, number = asked.kind, asked.number
        match kind:
            case Kind.INSTREAM:
                self._stream = Stream(number, self._core.memory.keep(self._served.uid, self._on_memory))
            case Kind.FILDES:
                self._scan_descriptor(asked, self._owned.take())
            case Kind.VERSION:
                self._say(number, version_of(self._engines()))
            case Kind.VERSIONCOMMANDS:
                self._say(number, commands(version_of(self._engines()), list(COMMANDS)))
            case Kind.STATS:
                self._say(number, self._statistics())
            case Kind.RELOAD:
                self._core.begin_renewal()
                self._say(number, RELOADING)
            case Kind.SHUTDOWN:
                self._conversation.finish(number, self._loop.time())
                self._core.stop.set()
            case _:
                command = self._commands[number] = _Command(asked, asked.path, asked.path)
                command.missing = (FAILED,)  # until it is known otherwise, whatever happens
                self._to_open.add(command, partial(self._open, command))

    def _say(self, number: int, text: bytes) -> None:
        self._send(self._conversation.answer(number, text))
        self._conversation.finish(number, self._loop.time())

    def _engines(self) -> Iterable[str]:
        return (one.version for one in self._core.versions)

    def _statistics(self) -> bytes:
        pool = self._core.hub.pool
        live = min(pool.under_way, pool.workers)
        return statistics(live=live, idle=pool.workers - live, most=pool.workers, queued=pool.waiting)

    # ---- what the client hands over ----

    def _scan_descriptor(self, asked: Asked, descriptor: int) -> None:
        name = b"fd[%d]" % descriptor
        command = self._commands[asked.number] = _Command(asked, name, path_of(descriptor) or name)
        before, to_copy = look(descriptor, shared=self._core.hub.pool.has_outside_engines)
        if to_copy and not isinstance(before, Error):
            owned = Descriptors([descriptor])
            task = command.task = asyncio.create_task(self._scan_copy(command, owned, before))
            task.add_done_callback(lambda _: owned.close())  # it may be cancelled before it begins
            self._copying.add(task)
            task.add_done_callback(self._copying.discard)
            return
        command.all_handed_in = True
        self._hand_in(command, b"", descriptor, before=before)

    async def _scan_copy(self, command: _Command, owned: Descriptors, stamp: Stamp) -> None:
        """Scan a copy, which nobody can change, when there is room for it. `owned`: of one."""
        with owned:
            room = asyncio.Event()
            kept = command.kept = self._core.memory.keep(self._served.uid, room.set)
            configuration = self._core.configuration
            most = configuration.max_copy
            while stamp.size <= most and not kept.may_grow(stamp.size):
                room.clear()
                await room.wait()
            kept.grow(min(stamp.size, most))
            copy = await sealed_copy(owned.numbers()[0], most, configuration.timeout)
            kept.end()
        command.all_handed_in = True
        if isinstance(copy, Error):
            self._tell(command, command.name, copy)
        else:
            self._hand_in(command, b"", copy, owner=stamp.owner)

    def _scan_stream(self) -> None:
        stream = self._stream
        assert stream is not None  # noqa: S101 - of the protocol
        self._stream = None
        asked = Asked(Kind.INSTREAM, stream.number)
        command = self._commands[stream.number] = _Command(asked, STREAM, b"instream(local)")
        command.kept = stream.kept
        command.all_handed_in = True
        whole = stream.whole()
        if isinstance(whole, Error):
            self._tell(command, STREAM, whole)
        else:
            self._hand_in(command, b"", whole, owner=self._owner_of_streams())

    # ---- files that the broker opens ----

    async def _open(self, command: _Command) -> None:
        try:
            tree = TreeOfFiles(self._served, _plain(command.name), Exclusions())
            async with (
                self._core.openings_of(self._served.uid),
                self._core.openings,
                contextlib.aclosing(tree.entries()) as entries,
            ):
                async for entry in entries:
                    if isinstance(entry, ToScan):
                        self._hand_in(command, entry.path, entry.descriptor)
                    elif isinstance(entry, Scanned):
                        self._tell(command, entry.path, entry.verdict)
                    # What is neither file nor directory is passed over below a directory, as clamd does.
                    if not self._files.may_open():
                        await self._files.room()
            command.missing = tree.missing
        except (BrokerError, ValueError):  # it is gone, or the client is
            command.missing = (FAILED,)
        finally:
            command.all_handed_in = True
            self._end_if_done(command)

    # ---- verdicts ----

    def _hand_in(
        self,
        command: _Command,
        path: bytes,
        descriptor: int,
        *,
        owner: int | None = None,
        before: Stamp | Error | None = None,
    ) -> None:
        """Have a file scanned; the descriptor is the pool's from now on. `path`: empty for the command's."""

        def tell(done: Done) -> None:
            command.under_way -= 1
            self._tell(command, path or command.name, done.verdict)

        if command.over:
            os.close(descriptor)
            return
        command.under_way += 1
        self._files.submit(command, tell, path, descriptor, owner=owner, before=before)

    def _tell(self, command: _Command, name: bytes, verdict: Verdict) -> None:
        """Say what there is to say of a file, and end the command if that was the last of it."""
        if command.over:
            return
        if not isinstance(verdict, Clean):
            texts = said(verdict, self._listener.unscanned)
            # Several replies to one file are asked for by one command alone.
            for text in texts if command.kind is Kind.ALLMATCHSCAN else texts[:1]:
                if text != OK:
                    command.anything_said = True
                    self._send(self._conversation.answer(command.number, text, name))
                    self._log(command, name, verdict, text)
            if isinstance(verdict, Infected) and command.kind in _STOP_AT_A_FINDING:
                self._stop(command)
                self._end(command)
                return
        self._end_if_done(command)

    def _end_if_done(self, command: _Command) -> None:
        if command.over or command.under_way or not command.all_handed_in:
            return
        if command.missing:
            self._tell_of_the_rest(command)
        elif not command.anything_said:
            self._send(self._conversation.answer(command.number, OK, command.name))
        command.over = True
        self._end(command)

    def _tell_of_the_rest(self, command: _Command) -> None:
        """Say that what was found below a path is not all that there is."""
        if "refused" in command.missing:
            verdict = Error(Reason.DENIED, "the policy left something out")
        else:
            why = ", ".join(command.missing).replace("_", " ")
            verdict = Error(Reason.READ_FAILED, f"Not all that is there could be scanned ({why})")
        [text] = said(verdict)
        self._send(self._conversation.answer(command.number, text, command.name))
        self._log(command, command.name, verdict, text)

    def _stop(self, command: _Command) -> None:
        """Let go of all that a command still has to do; nothing is said of it any more."""
        command.over = True
        self._to_open.drop(command)
        self._files.cancel(command)

    def _end(self, command: _Command) -> None:
        _let_go(command)
        del self._commands[command.number]
        self._conversation.finish(command.number, self._loop.time())
        if self._pulling:
            return
        if self._conversation.is_over:
            self._flush()
        else:
            self._go_on_soon()

    def _log(self, command: _Command, name: bytes, verdict: Verdict, text: bytes) -> None:
        if isinstance(verdict, Error) and verdict.reason in _IN_THE_AUDIT:
            return
        log_reply(self._core, self._who(), name if command.kind in _PATHS else command.shown, text)


def log_reply(core: Core, who: str, shown: bytes, text: bytes) -> None:
    """Have a reply in the log, of a file as it is `shown` to people; in the form that is configured."""
    line = f"{printable(shown)}: {text.decode()}"
    if core.configuration.log == "clamd":
        write_line(f"{time.strftime('%a %b %e %H:%M:%S %Y')} -> {line}")
    else:
        write_line(f"fdbroker-scand: {who}: {line}")


@functools.lru_cache
def _limits_of(listener: Listener) -> Limits:
    return Limits(listener.max_stream, listener.command_timeout, listener.read_timeout)


# By whether who asks may have the engines loaded anew, and the service stopped.
_COMMANDS = {
    (True, True): EVERYTHING,
    (True, False): EVERYTHING - {Kind.SHUTDOWN},
    (False, True): EVERYTHING - {Kind.RELOAD},
    (False, False): EVERYTHING - {Kind.RELOAD, Kind.SHUTDOWN},
}


def _commands_of(uid: int, core: Core) -> frozenset[Kind]:
    """Return what a user may ask for."""
    configuration = core.configuration
    return _COMMANDS[uid in configuration.may_renew, uid in configuration.may_stop]


def _let_go(command: _Command) -> None:
    if command.kept is not None:
        command.kept.let_go()


def _plain(path: bytes) -> bytes:
    """Return a path without slashes that mean nothing, which clients may leave in one."""
    return b"/" + b"/".join(filter(None, path.split(b"/"))) if path.startswith(b"/") else path


def path_of(descriptor: int) -> bytes | None:
    """Return where the kernel sees the file behind a descriptor: for people, and to decide nothing by."""
    try:
        return os.readlink(b"/proc/self/fd/%d" % descriptor)
    except OSError:
        return None
