"""Clients that say what they are told to, byte by byte, good or bad; and the reader of the audit."""

from __future__ import annotations

import json
import os
import re
import select
import socket
import struct
from typing import TYPE_CHECKING, Any, NamedTuple

from fdbroker.kernel import sockets
from fdbroker.kernel.descriptors import Descriptors
from fdbroker.kernel.peers import read_ucred
from fdbroker.wire.client import (
    ExplainReply,
    ListReply,
    OpenReply,
    ReloadReply,
    StatReply,
    StatusReply,
    WalkReply,
    decode_reply,
    encode_explain,
    encode_hello,
    encode_list,
    encode_open,
    encode_reload,
    encode_stat,
    encode_status,
    encode_walk,
)
from fdbroker.wire.format import LENGTH, MAX_FRAME, Status
from fdbroker.wire.messages import ErrorReply, WalkEnd, WalkFilter, Welcome
from fdbroker.wire.stream import framed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path
    from types import TracebackType
    from typing import Self

    from fdbroker.wire.client import Reply

_REGULAR_FILES = WalkFilter()
SECONDS = 30  # after which a test fails that waits for an answer


class Answer(NamedTuple):
    """One frame: its bytes, what they say, and the descriptors that came with it."""

    raw: bytes
    reply: Reply
    descriptors: Descriptors


class Opened(NamedTuple):
    """What became of one path: the reason's name (`ok`: given), errno, content."""

    reason: str
    errno: int
    content: bytes | None


class Speaker:
    """One connection. `serve` lets the broker work, where it is stepped by the test."""

    kind = socket.SOCK_SEQPACKET

    def __init__(self, sock: socket.socket, serve: Callable[[], None] | None = None) -> None:
        self.sock = sock
        self._serve = serve
        sock.settimeout(SECONDS)

    @classmethod
    def connect(cls, path: Path, *, hello: bool = True) -> Self:
        """Connect to a broker that runs by itself, and greet it."""
        sock = socket.socket(socket.AF_UNIX, cls.kind)
        try:
            speaker = cls(sock)
            speaker.reach(path)
            if hello:
                speaker.greet()
        except BaseException:
            sock.close()
            raise
        return speaker

    def reach(self, path: Path) -> None:
        """Connect to a listener, waiting while others are before us: with a timeout that is an error."""
        self.sock.settimeout(None)
        self.sock.connect(str(path))
        self.sock.settimeout(SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the socket."""
        self.discard()
        if self._serve is not None:
            self._serve()

    def discard(self) -> None:
        """Do so without the broker's hearing of it."""
        self.sock.close()

    def send(self, frame: bytes) -> None:
        """Send a frame, and let the broker work."""
        self.sock.send(frame)
        if self._serve is not None:
            self._serve()

    def receive(self) -> Answer | None:
        """Return the next frame, None at the end of the connection."""
        try:
            received = sockets.receive(self.sock, MAX_FRAME + 1)
        except ConnectionResetError:
            # It closed with something of ours unread.
            return None
        if not received.data:
            return None
        assert not received.truncated
        return Answer(received.data, decode_reply(received.data), received.descriptors)

    def arrived(self) -> list[Answer]:
        """Return the frames that are there already, without waiting or letting the broker work."""
        answers = []
        while select.select([self.sock], [], [], 0)[0]:
            answer = self.receive()
            if answer is None:
                break
            answers.append(answer)
        return answers

    def ask(self, frame: bytes) -> Answer:
        """Send a frame and return what comes back."""
        self.send(frame)
        answer = self.receive()
        assert answer is not None, "the connection was closed"
        return answer

    def greet(self) -> Welcome:
        """Say hello."""
        reply = self.ask(encode_hello(1)).reply
        assert isinstance(reply, Welcome), reply
        return reply

    def open(self, *paths: bytes, request_id: int = 7) -> list[Opened]:
        """Open paths, read what is given and close it."""
        answer = self.ask(encode_open(request_id, paths))
        return read_opened(answer, request_id)

    def open_one(self, path: bytes) -> Opened:
        """Open one path and read it."""
        [opened] = self.open(path)
        return opened

    def stat(self, *paths: bytes) -> StatReply:
        """Describe paths."""
        reply = self.ask(encode_stat(8, paths)).reply
        assert isinstance(reply, StatReply), reply
        return reply

    def page(self, path: bytes, cookie: int = 0, most: int = 0) -> ListReply:
        """Return one page of a directory."""
        reply = self.ask(encode_list(9, path, cookie, most)).reply
        assert isinstance(reply, ListReply), reply
        return reply

    def list_all(self, path: bytes, most: int = 0) -> list[bytes]:
        """Return the names in a directory, page by page."""
        names: list[bytes] = []
        cookie = 0
        while True:
            page = self.page(path, cookie, most)
            assert page.result.status == Status.GIVEN, page
            names += [entry.name for entry in page.entries]
            if page.last:
                return names
            cookie = page.cookie

    def begin_walk(
        self,
        path: bytes,
        *,
        credit: int,
        request_id: int = 20,
        asked: WalkFilter = _REGULAR_FILES,
        behind: bytes = b"",
        descriptors: bool = True,
        most: int = 0,
        client: int | None = None,
    ) -> None:
        """Ask for a walk."""
        self.send(
            encode_walk(
                request_id,
                path,
                asked,
                credit=credit,
                behind=behind,
                descriptors=descriptors,
                most=most,
                client=client,
            )
        )

    def status(self) -> dict[str, Any]:
        """Return how the broker sees this connection."""
        reply = self.ask(encode_status(10)).reply
        assert isinstance(reply, StatusReply), reply
        document: dict[str, Any] = json.loads(reply.document)
        return document

    def rows(self, part: str) -> list[dict[str, Any]]:
        """Return all rows of a part of the status; on a control socket."""
        rows: list[dict[str, Any]] = []
        while True:
            reply = self.ask(encode_status(13, part, len(rows))).reply
            assert isinstance(reply, StatusReply), reply
            document = json.loads(reply.document)
            assert document["rows"] or not rows
            rows += document["rows"]
            if document["next"] is None:
                return rows
            assert document["next"] == len(rows)

    def explain(self, action: str, path: bytes) -> dict[str, Any]:
        """Return what the name of a path decides; on a control socket."""
        reply = self.ask(encode_explain(11, action, path)).reply
        assert isinstance(reply, ExplainReply), reply
        document: dict[str, Any] = json.loads(reply.document)
        return document

    def reload(self, policy: dict[str, Any] | bytes, size: int = 60_000) -> ReloadReply | ErrorReply:
        """Hand a policy over in pieces of `size` bytes, to its end or a refusal; return what is said."""
        text = policy if isinstance(policy, bytes) else json.dumps(policy).encode()
        received = 0
        while True:
            piece = text[received : received + size]
            more = received + len(piece) < len(text)
            reply = self.ask(encode_reload(12, received, piece, more=more)).reply
            assert isinstance(reply, ReloadReply | ErrorReply), reply
            if isinstance(reply, ErrorReply):
                return reply
            received += len(piece)
            assert (reply.received, reply.more) == (received, more)
            if not more:
                return reply

    def error(self, frame: bytes) -> ErrorReply:
        """Send a frame that gets an error frame back."""
        reply = self.ask(frame).reply
        assert isinstance(reply, ErrorReply), reply
        return reply

    def is_closed(self) -> bool:
        """Return whether nothing more comes."""
        return self.receive() is None


class StreamSpeaker(Speaker):
    """A connection by SOCK_STREAM. It sees which frame each descriptor came with."""

    kind = socket.SOCK_STREAM

    def __init__(self, sock: socket.socket, serve: Callable[[], None] | None = None) -> None:
        super().__init__(sock, serve)
        self.at_once = MAX_FRAME  # the most bytes to receive with one call
        self._data = b""
        # What came with the part that ended after so many bytes of `_data`.
        self._came_with: list[tuple[int, Descriptors]] = []

    def discard(self) -> None:
        """Close the socket, and descriptors that came and that nobody took."""
        for _, descriptors in self._came_with:
            descriptors.close()
        super().discard()

    def send(self, frame: bytes) -> None:
        """Send a frame behind its length, and let the broker work."""
        self.send_raw(framed(frame))

    def send_raw(self, data: bytes) -> None:
        """Send bytes, frames or not, and let the broker work."""
        self.sock.sendall(data)
        if self._serve is not None:
            self._serve()

    def receive(self) -> Answer | None:
        """Return the next frame, None at the end of the connection; its descriptors are those of its part."""
        while (size := self._size()) is None or len(self._data) < size:
            try:
                part = sockets.receive(self.sock, self.at_once)
            except ConnectionResetError:
                return None
            if not part.data:
                assert not self._data, "the connection ended in the middle of a frame"
                return None
            self._data += part.data
            if part.descriptors:
                self._came_with.append((len(self._data), part.descriptors))
        descriptors = Descriptors()
        for end, came in self._came_with:
            if end <= size:
                for number in came.take_all():
                    descriptors.add(number)
        raw, self._data = self._data[LENGTH.size : size], self._data[size:]
        self._came_with = [(end - size, came) for end, came in self._came_with if end > size]
        return Answer(raw, decode_reply(raw), descriptors)

    def _size(self) -> int | None:
        """Return the size of the next frame with its length; None: that is not there yet."""
        if len(self._data) < LENGTH.size:
            return None
        (length,) = LENGTH.unpack_from(self._data)
        assert length <= MAX_FRAME
        return LENGTH.size + int(length)


class DatagramSpeaker(Speaker):
    """A socket of its own address, as the kernel gives it: no hello, and answers from another address."""

    kind = socket.SOCK_DGRAM

    def __init__(
        self, sock: socket.socket, serve: Callable[[], None] | None = None, *, broker_uid: int | None = None
    ) -> None:
        super().__init__(sock, serve)
        self._broker_uid = broker_uid
        self._path = ""
        sockets.ask_for_credentials(sock)
        if not sock.getsockname():
            sock.bind("")

    @classmethod
    def to(cls, path: Path, *, broker_uid: int) -> Self:
        """Return a client of a broker that runs by itself."""
        speaker = cls(socket.socket(socket.AF_UNIX, cls.kind), broker_uid=broker_uid)
        speaker.reach(path)
        return speaker

    def reach(self, path: Path) -> None:
        """Note where requests go to: whoever connects here could not be answered."""
        self._path = str(path)

    def send(self, frame: bytes) -> None:
        """Send a frame, and let the broker work."""
        self.sock.sendto(frame, self._path)
        if self._serve is not None:
            self._serve()

    def receive(self) -> Answer | None:
        """Return the next frame, of the broker's uid where that is known."""
        received = sockets.receive(self.sock, MAX_FRAME + 1)
        assert not received.truncated
        assert received.credentials is not None
        if self._broker_uid is not None:
            assert read_ucred(received.credentials).uid == self._broker_uid
        return Answer(received.data, decode_reply(received.data), received.descriptors)

    def greet(self) -> Welcome:
        """Say nothing: every datagram is a request by itself."""
        return Welcome(0, 0, 0, 0, 0, 0, 0, 0, 0)

    def is_silent(self) -> bool:
        """Return whether nothing is there, now that the broker has worked."""
        return not select.select([self.sock], [], [], 0)[0]


def read_opened(answer: Answer, request_id: int = 7) -> list[Opened]:
    """Return what an open reply gives, with every file read and closed. Each descriptor is looked at."""
    reply = answer.reply
    assert isinstance(reply, OpenReply), reply
    assert reply.id == request_id
    found = []
    with answer.descriptors as descriptors:
        assert len(descriptors) == sum(result.status == Status.GIVEN for result in reply.results)
        for result in reply.results:
            if result.status != Status.GIVEN:
                found.append(Opened(result.reason.name.lower(), result.errno, None))
                continue
            with open(descriptors.take(), "rb") as file:
                found.append(Opened("ok", 0, file.read()))
    return found


class Walked(NamedTuple):
    """One frame of a walk: what became of it, the paths with the content of those opened, and the end."""

    id: int
    reason: str
    entries: list[tuple[bytes, bytes | None]]
    end: WalkEnd | None


def read_walked(answer: Answer) -> Walked:
    """Return a frame of a walk, with every file read and closed."""
    reply = answer.reply
    assert isinstance(reply, WalkReply), reply
    entries: list[tuple[bytes, bytes | None]] = []
    with answer.descriptors as descriptors:
        assert len(descriptors) == sum(entry.descriptor for entry in reply.entries)
        for entry in reply.entries:
            content = None
            if entry.descriptor:
                with open(descriptors.take(), "rb") as file:
                    content = file.read()
            entries.append((entry.path, content))
    reason = "ok" if reply.result.status == Status.GIVEN else reply.result.reason.name.lower()
    return Walked(reply.id, reason, entries, reply.end)


def frame(kind: int, flags: int = 0, count: int = 0, generation: int = 0, body: bytes = b"") -> bytes:
    """Return a frame of any kind, with id 77, whether it makes sense or not."""
    return struct.pack("<BBHII", kind, flags, count, 77, generation) + body


def path_of(record: dict[str, Any]) -> bytes:
    """Return the exact path that an audit record is about."""
    return bytes.fromhex(record["path_hex"]) if "path_hex" in record else record["path"].encode()


def read_audit(data: bytes) -> list[dict[str, Any]]:
    """Return the records; broken lines, which an interrupted write leaves, are left out."""
    records = []
    for line in data.split(b"\n"):
        try:
            record = json.loads(line.decode("ascii"))
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def check_audit(records: Iterable[dict[str, Any]]) -> None:
    """Check that nothing is missing and nothing is there twice: `seq` counts, in one run."""
    listed = list(records)
    assert len({record["run"] for record in listed}) <= 1
    assert [record["seq"] for record in listed] == list(range(len(listed)))


def check_long_audit(data: bytes) -> None:
    """Check the same of what a flood left in an audit, all of which would take long to read."""
    found = re.findall(rb'^\{"run":"(\w+)","seq":(\d+),', data, re.MULTILINE)
    assert len({run for run, _ in found}) <= 1
    assert [int(seq) for _, seq in found] == list(range(data.count(b"\n")))


def descriptors_of(pid: int | str = "self") -> dict[int, str]:
    """Return the open descriptors of a process and what they are."""
    directory = f"/proc/{pid}/fd"
    found = {}
    for name in os.listdir(directory):
        try:
            found[int(name)] = os.readlink(f"{directory}/{name}")
        except FileNotFoundError:
            continue  # the listing's own
    return found
