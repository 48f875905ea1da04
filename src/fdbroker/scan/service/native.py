"""A client that speaks the protocol of docs/scan-protocol.md: its requests, and what it is told of them.

Nothing that it does holds up another one. What it asks is read as far as there is room for it, what it does
not read is kept for it, a little, and until it does so its files stop.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import deque
from functools import partial
from typing import TYPE_CHECKING

import fdbroker
from fdbroker.client import BrokerError
from fdbroker.kernel import sockets
from fdbroker.kernel.descriptors import Descriptors
from fdbroker.scan.messages import (
    LONGEST_MESSAGE,
    VERSION,
    AskStatus,
    Cancel,
    End,
    EngineState,
    Farewell,
    Hello,
    MessageError,
    Refused,
    Renew,
    ScanDescriptor,
    ScanPaths,
    ScanTree,
    StatusReply,
    Welcome,
    decode_request,
    encode_answer,
    encode_results,
)
from fdbroker.scan.run import Scanned, Skipped
from fdbroker.scan.service.aside import run_aside
from fdbroker.scan.service.closing import close_aside
from fdbroker.scan.service.copying import look, sealed_copy
from fdbroker.scan.service.filesystems import Sorted, sort_out
from fdbroker.scan.service.opening import FAILED, OneByOne, ToScan, TreeOfFiles, files_at
from fdbroker.scan.service.watch import IS_GONE, READABLE, SAYS_NO_MORE, WRITABLE
from fdbroker.scan.tree import Exclusions
from fdbroker.scan.verdict import Error, Infected

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from fdbroker.aio import ServedClient
    from fdbroker.scan.messages import Request
    from fdbroker.scan.service.configuration import Listener
    from fdbroker.scan.service.core import Core
    from fdbroker.scan.service.opening import Opened
    from fdbroker.scan.stamps import Stamp
    from fdbroker.scan.supervisor import Done

MOST_REQUESTS = 256  # of one connection under way
_MESSAGES_AT_ONCE = 16  # before others have their turn


class _Scan:
    """A request that scans, as far as it got."""

    def __init__(self, number: int, max_size: int | None) -> None:
        self.number = number
        self.max_size = max_size
        self.results: list[Scanned | Skipped] = []  # not told yet
        self.under_way = 0
        self.all_handed_in = False
        self.over = False
        self.missing: tuple[str, ...] = ()
        self.task: asyncio.Task[None] | None = None
        self.copy: asyncio.Future[None] | None = None  # done when no engine has it any more
        self._counts = dict.fromkeys(("files", "bytes", "infected", "errors", "skipped"), 0)

    def add(self, result: Scanned | Skipped) -> None:
        """Have it told, and counted."""
        self.results.append(result)
        counts = self._counts
        if isinstance(result, Skipped):
            counts["skipped"] += 1
            return
        counts["files"] += not result.directory
        counts["infected"] += isinstance(result.verdict, Infected)
        if isinstance(result.verdict, Error):
            counts["errors"] += 1
        else:
            counts["bytes"] += result.size or 0

    def let_go_of_copy(self) -> None:
        """Note that no engine has it any more."""
        if self.copy is not None and not self.copy.done():
            self.copy.set_result(None)

    def end(self) -> End:
        """Return what it came to."""
        return End(self.number, **self._counts, missing=self.missing)


class NativeClient:
    """A connection of a client; owns it. See `fdbroker.scan.service.core.Speaks`."""

    def __init__(self, core: Core, served: ServedClient, listener: Listener) -> None:
        self._core = core
        self._served = served
        self._sock = served.socket
        self._fileno = self._sock.fileno()
        core.watch.add(self._fileno, READABLE, self._on_event)
        self._waits_for = READABLE
        self._loop = asyncio.get_running_loop()
        self._files = core.hub.client(served.uid)
        self._files.on_room = self._read_again
        self._greeted = False
        self._closed = False
        self._reading = True
        self._sorting = False
        self._scans: dict[int, _Scan] = {}
        self._to_open = OneByOne()
        self._copying: set[asyncio.Task[None]] = set()
        self._copies = core.copies_of(served.uid)
        self._outbox: deque[bytes] = deque()
        self._is_due = False  # to tell what there is to tell
        core.connections[self] = listener
        try:
            self._read()
        except BaseException:
            self._close()
            raise

    # ---- the socket ----

    def _may_read(self) -> bool:
        return (
            not self._outbox
            and not self._sorting
            # Descriptors that came may have to be looked at there, and each message has up to 253.
            and self._core.aside.is_free_for(self._served.uid)
            and len(self._scans) < MOST_REQUESTS
            and len(self._copying) < MOST_REQUESTS
            and self._files.may_be_given()
        )

    def _read_again(self) -> None:
        if not self._reading and not self._closed and self._may_read():
            self._reading = True
            self._wait()

    def _read_no_more(self) -> None:
        self._reading = False
        self._wait()

    def _wait(self) -> None:
        """Be called for what can be done next; that it goes is heard of in any case."""
        wanted = (READABLE if self._reading else SAYS_NO_MORE) | (WRITABLE if self._outbox else 0)
        if wanted != self._waits_for:
            self._waits_for = wanted
            self._core.watch.change(self._fileno, wanted)

    def _on_event(self, events: int) -> None:
        if events & WRITABLE:
            self._write()
        if self._closed:
            return
        if self._reading:
            self._read()
        elif events & (SAYS_NO_MORE | IS_GONE):
            self._close()

    def _read(self) -> None:
        for _ in range(_MESSAGES_AT_ONCE):
            if self._closed:
                return
            if not self._may_read():
                self._read_no_more()
                return
            try:
                data, owned, dropped = sockets.receive_unclosed(self._sock, LONGEST_MESSAGE + 1)
            except BlockingIOError:
                return
            except ConnectionError:
                self._close()
                return
            except OSError as error:
                self.end("malformed", f"what came could not be received: {error.strerror}")
                return
            if not data and not owned:
                self._close()
                return
            if not all(map(self._core.mounted.have, owned.numbers())):
                self._sort_out(data, owned, dropped=dropped)
                return
            self._take_with(data, Sorted(owned), dropped=dropped)

    def _sort_out(self, data: bytes, owned: Descriptors, *, dropped: bool) -> None:
        """Go on with a message when it is known whether its descriptors are of use; read no other before."""
        self._sorting = True
        self._read_no_more()

        def known(over: asyncio.Future[Sorted]) -> None:
            self._sorting = False
            with over.result().kept:
                if not self._closed:
                    self._take_with(data, over.result(), dropped=dropped)
            self._read_again()
            # Its user's other connections may be read from, too.
            self._core.hub.make_room_known()

        descriptors = owned.take_all()
        self._core.aside.run(self._served.uid, lambda: sort_out(descriptors)).add_done_callback(known)

    def _take_with(self, data: bytes, came: Sorted, *, dropped: bool) -> None:
        with came.kept:
            try:
                if dropped:
                    raise MessageError(
                        "descriptors came with it that this process may not have: too many are open"
                    )
                self._take(data, came)
            except MessageError as error:
                self.end("malformed", str(error))

    def _send(self, *messages: bytes) -> None:
        if self._closed or not messages:
            return
        self._outbox.extend(messages)
        if len(self._outbox) == len(messages):
            self._write()

    def _write(self) -> None:
        while self._outbox:
            try:
                sockets.send(self._sock, self._outbox[0], wait=False)
            except BlockingIOError:
                self._files.hold(held=True)
                self._read_no_more()
                return
            except OSError:
                self._close()
                return
            self._outbox.popleft()
        self._files.hold(held=False)
        self._wait()
        self._flush_soon()
        self._read_again()

    def end(self, reason: str, text: str) -> None:
        """Tell a last time how far its requests are, and why there is no more; close."""
        if self._closed:
            return
        for scan in list(self._scans.values()):
            self._stop(scan, reason)
        messages = [*self._outbox, encode_answer(Farewell(reason, text))]
        with contextlib.suppress(OSError):
            for message in messages:
                sockets.send(self._sock, message, wait=False)
        self._close()

    def _close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._core.connections.pop(self, None)
        self._core.watch.let_go(self._fileno)
        self._to_open.close()
        for task in self._copying:
            task.cancel()
        for scan in self._scans.values():
            scan.over = True
        self._scans.clear()
        self._files.close()
        # Always: of messages that are empty nothing tells whether there are any.
        close_aside(self._core, self._served)

    # ---- requests ----

    def _take(self, data: bytes, came: Sorted) -> None:
        request = decode_request(data)
        wanted = 1 if isinstance(request, ScanDescriptor) else 0
        count = len(came.kept) + len(came.refused)
        if count != wanted:
            raise MessageError(f"{count} descriptors came with it, and it takes {wanted or 'none'}")
        if isinstance(request, Hello):
            self._greet(request)
            return
        if not self._greeted:
            raise MessageError("the first message is hello")
        self._answer(request, came)

    def _greet(self, request: Hello) -> None:
        if self._greeted:
            raise MessageError("hello is said once")
        if request.version != VERSION:
            raise MessageError(f"version {request.version} is not spoken here: {VERSION} is")
        self._greeted = True
        engines = tuple(EngineState(*one) for one in self._core.versions)
        service = f"fdbroker-scand {fdbroker.__version__}"
        self._send(encode_answer(Welcome(VERSION, service, engines, self._core.configuration.max_size)))

    def _answer(self, request: Request, came: Sorted) -> None:
        assert not isinstance(request, Hello)  # noqa: S101 - for the type checker
        if isinstance(request, Cancel):
            scan = self._scans.get(request.request)
            if scan is not None:
                self._stop(scan, "cancelled")
            self._send(encode_answer(_Scan(request.id, None).end()))
        elif isinstance(request, AskStatus):
            self._send(encode_answer(StatusReply(request.id, self._core.status())))
        elif isinstance(request, Renew):
            self._renew(request)
        elif request.id in self._scans:
            text = "another request of this id is under way"
            self._send(encode_answer(Refused(request.id, "id_in_use", text)))
        else:
            scan = self._scans[request.id] = _Scan(request.id, request.max_size)
            if isinstance(request, ScanDescriptor):
                self._scan_descriptor(scan, came)
            else:
                self._to_open.add(scan, partial(self._open, scan, request))

    def _renew(self, request: Renew) -> None:
        if self._served.uid not in self._core.configuration.may_renew:
            text = "this user may not have the engines loaded anew; see `may_renew` of the configuration"
            self._send(encode_answer(Refused(request.id, "denied", text)))
            return

        async def renew() -> None:
            failure = await self._core.renew()
            if failure is None:
                self._send(encode_answer(_Scan(request.id, None).end()))
            else:
                self._send(encode_answer(Refused(request.id, "not_loaded", failure)))

        self._keep(asyncio.create_task(renew()))

    def _keep(self, task: asyncio.Task[None]) -> None:
        def over(_: asyncio.Task[None]) -> None:
            self._copying.discard(task)
            self._read_again()

        self._copying.add(task)
        task.add_done_callback(over)

    # ---- descriptors that the client has opened ----

    def _scan_descriptor(self, scan: _Scan, came: Sorted) -> None:
        owned = came.kept
        if came.refused:
            self._tell(scan, Scanned(b"", came.refused[0]))
            self._all_handed_in(scan)
            return
        [descriptor] = owned.numbers()
        before, to_copy = look(descriptor, shared=self._core.hub.pool.has_outside_engines)
        if to_copy and not isinstance(before, Error):
            kept = Descriptors(owned.take_all())
            self._files.keep_waiting(1)
            task = asyncio.create_task(self._scan_copy(scan, kept, before.owner))
            self._keep(task)

            def over(_: asyncio.Task[None]) -> None:
                # Not in the task: one that is cancelled before its first step never runs.
                kept.close()
                self._files.keep_waiting(-1)

            task.add_done_callback(over)
            return
        self._hand_in(scan, b"", owned.take(), before=before)
        self._all_handed_in(scan)

    async def _scan_copy(self, scan: _Scan, kept: Descriptors, owner: int) -> None:
        """Scan a copy of the file, which nobody can change, of which a worker gets no way to write."""
        scan.missing = (FAILED,)  # until it is known otherwise, whatever happens here
        try:
            async with self._copies:
                if scan.over:
                    return
                configuration = self._core.configuration
                most = configuration.max_copy
                if scan.max_size is not None:
                    most = min(most, scan.max_size)
                [descriptor] = kept.numbers()
                copy = await sealed_copy(descriptor, most, configuration.timeout)
                kept.close()
                if not scan.over:
                    scan.missing = ()
                if isinstance(copy, Error):
                    self._tell(scan, Scanned(b"", copy))
                else:
                    scan.copy = self._loop.create_future()
                    self._hand_in(scan, b"", copy, owner=owner)
                    self._all_handed_in(scan)
                    await scan.copy
        finally:
            self._all_handed_in(scan)

    # ---- files that the broker opens ----

    async def _open(self, scan: _Scan, request: ScanPaths | ScanTree) -> None:
        tree = None
        scan.missing = (FAILED,)  # until it is known otherwise, whatever happens here
        try:
            async with self._core.openings_of(self._served.uid), self._core.openings:
                if isinstance(request, ScanPaths):
                    entries = files_at(self._served, request.paths)
                else:
                    globs = request.exclude
                    # Of many it takes a third of a second.
                    exclusions = await run_aside(lambda: Exclusions(globs)) if globs else Exclusions()
                    tree = TreeOfFiles(self._served, request.path, exclusions)
                    entries = tree.entries()
                await self._hand_in_all(scan, entries)
            if not scan.over:
                scan.missing = () if tree is None else tree.missing
        except BrokerError:
            if not scan.over:
                scan.missing = ("broker_gone",)
        except ValueError as error:
            # A glob that is none; or the client is closed, and nobody is told.
            self._scans.pop(scan.number, None)
            scan.over = True
            self._send(encode_answer(Refused(scan.number, "bad_glob", str(error))))
        finally:
            self._all_handed_in(scan)

    async def _hand_in_all(self, scan: _Scan, entries: AsyncGenerator[Opened, None]) -> None:
        async with contextlib.aclosing(entries):
            async for entry in entries:
                if isinstance(entry, ToScan):
                    self._hand_in(scan, entry.path, entry.descriptor)
                else:
                    self._tell(scan, entry)
                if not self._files.may_open():
                    await self._files.room()

    # ---- verdicts ----

    def _hand_in(
        self,
        scan: _Scan,
        path: bytes,
        descriptor: int,
        *,
        owner: int | None = None,
        before: Stamp | Error | None = None,
    ) -> None:
        """Have a file scanned; the descriptor is the pool's from now on."""

        def tell(done: Done) -> None:
            scan.under_way -= 1
            scan.let_go_of_copy()
            self._tell(scan, Scanned(path, done.verdict, done.size, answers=done.answers))

        if scan.over:
            os.close(descriptor)
            scan.let_go_of_copy()
            return
        scan.under_way += 1
        self._files.submit(scan, tell, path, descriptor, max_size=scan.max_size, owner=owner, before=before)

    def _tell(self, scan: _Scan, result: Scanned | Skipped) -> None:
        if not scan.over:
            scan.add(result)
            self._flush_soon()

    def _all_handed_in(self, scan: _Scan) -> None:
        scan.all_handed_in = True
        self._flush_soon()

    def _stop(self, scan: _Scan, why: str) -> None:
        """End a request now; what it has no verdict of by then has none."""
        self._to_open.drop(scan)
        scan.over = True  # what comes for it from now on is let go of
        self._files.cancel(scan)
        scan.let_go_of_copy()
        scan.missing = (why,)
        scan.under_way = 0
        scan.all_handed_in = True
        self._flush()

    def _flush_soon(self) -> None:
        if not self._is_due and not self._closed:
            self._is_due = True
            self._core.watch.soon(self._flush)

    def _flush(self) -> None:
        """Tell what there is to tell, unless something waits to be read: then it waits as well."""
        self._is_due = False
        if self._closed or self._outbox:
            return
        messages: list[bytes] = []
        for scan in list(self._scans.values()):
            if scan.results:
                messages += encode_results(scan.number, scan.results)
                scan.results = []
            if scan.all_handed_in and not scan.under_way:
                scan.over = True
                del self._scans[scan.number]
                messages.append(encode_answer(scan.end()))
        self._send(*messages)
        self._read_again()
