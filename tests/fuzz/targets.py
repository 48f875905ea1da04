"""What is fuzzed: functions of any bytes, which raise when something holds no more.

`make fuzz` runs them by atheris, guided by coverage; the tests run them by hypothesis for a moment.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Self

from fdbroker.clamd.protocol import LONGEST_COMMAND, Asked, Chunk, Conversation, Kind, Limits, Streamed
from fdbroker.wire.client import OpenReply, WalkReply, decode_reply
from fdbroker.wire.format import HEADER, LENGTH, MAX_FRAME, REPLY, WALK, Status, Type
from fdbroker.wire.messages import MalformedError
from fdbroker.wire.requests import decode_request
from fdbroker.wire.stream import FrameBuffer, framed
from tests.broker.conftest import fill
from tests.broker.speaking import Answer, DatagramSpeaker, Speaker, StreamSpeaker, check_audit, descriptors_of
from tests.broker.stepping import SteppedBroker

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

_KINDS = (Speaker, StreamSpeaker, DatagramSpeaker)
_TYPES = [kind for kind in Type if kind is not Type.ERROR]


class Choices:
    """Choices made by bytes; after their end, the first of each."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def __bool__(self) -> bool:
        """Return whether there are bytes left."""
        return self._at < len(self._data)

    def number(self, most: int) -> int:
        """Return a number up to `most`."""
        size = (most.bit_length() + 7) // 8
        return int.from_bytes(self.take(size), "little") % (most + 1)

    def take(self, size: int) -> bytes:
        """Return up to `size` bytes."""
        taken = self._data[self._at : self._at + size]
        self._at += size
        return taken


def request(data: bytes) -> None:
    """Decode a frame of a client: it is a request with the frame's id, or malformed, with that id or none."""
    try:
        decoded = decode_request(data).id
    except MalformedError as error:
        decoded = error.request_id
    own = HEADER.unpack_from(data)[3] if len(data) >= HEADER.size else 0
    assert decoded in {own, 0}


def stream(data: bytes) -> None:
    """Put frames together from parts: they are what was sent, in order, or it is no stream of frames."""
    choices = Choices(data)
    buffer = FrameBuffer()
    sent, found = b"", b""
    while choices:
        part = choices.take(1 + choices.number(255))
        sent += part
        buffer.add(part)
        try:
            while (frame := buffer.next_frame()) is not None:
                found += framed(frame)
                assert HEADER.size <= len(frame) <= MAX_FRAME
                request(frame)
        except MalformedError:
            (length,) = LENGTH.unpack_from(sent, len(found))
            assert not HEADER.size <= length <= MAX_FRAME
            return
        assert not buffer.has_frame
        assert found == sent[: len(found)]
        assert len(buffer) == len(sent) - len(found)


def reply(data: bytes) -> None:
    """Decode a frame of a broker, as a client does: it is a reply with the frame's id, or malformed."""
    try:
        decoded = decode_reply(data)
    except MalformedError:
        return
    assert decoded.id == HEADER.unpack_from(data)[3]


def clamd(data: bytes) -> None:
    """Say anything in clamd's protocol, with descriptors: each read is settled, little of it is kept."""
    choices = Choices(data)
    conversation = Conversation(Limits(stream_length=1000), 0.0)
    now, streamed, owed = 0.0, 0, set()
    while choices:
        size, count = choices.number(255), choices.number(3)
        conversation.receive(choices.take(size), count if size else 0, now)
        while (event := conversation.next_event(now)) is not None:
            if isinstance(event, Asked):
                streamed = 0
                owed |= {event.number} if event.kind is not Kind.INSTREAM else set()
            elif isinstance(event, Chunk):
                streamed += len(event.data)
                assert 0 < streamed <= 1000
            elif isinstance(event, Streamed):
                owed.add(event.number)
        assert conversation.under_way == len(owed)
        assert len(conversation._data) < LONGEST_COMMAND
        assert not (conversation.is_over and conversation.descriptors_wanted)
        if owed and choices.number(1):
            number = owed.pop()
            assert conversation.answer(number, b"OK", data[:9]).count(b": OK") >= 1
            conversation.finish(number, now)
        deadline = conversation.deadline
        if deadline is not None and choices.number(7) == 1:
            now = max(now, deadline)
            conversation.expire(now)
            while conversation.next_event(now) is not None:
                pass
    for number in owed:
        conversation.finish(number, now)


class EndToEnd:
    """A broker in this process, that is sent any messages by any transport."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="fdbroker-fuzz-")
        directory = Path(self._directory.name)
        tree = directory / "tree"
        tree.mkdir()
        fill(tree)
        self._audit = directory / "audit"
        self._broker = SteppedBroker(tree, audit=self._audit)
        self._paths = {kind: self._broker.listen(directory, kind=kind, name=kind.__name__) for kind in _KINDS}
        self._names = [
            *(bytes(tree / name) for name in ("file", "link", "directory", "")),
            b"/etc/passwd",
            b"",
        ]
        self._idle = descriptors_of()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._broker.close()
        self._directory.cleanup()

    def __call__(self, data: bytes) -> None:
        """Send messages made of `data`; see that what comes back was asked for, and that nothing is left."""
        choices = Choices(data)
        kind = _KINDS[choices.number(2)]
        # Most of what comes before a hello is refused for that.
        greeted = kind is DatagramSpeaker or choices.number(3) > 0
        broker = self._broker
        if kind is not DatagramSpeaker and choices.number(1):
            speaker = broker.join(kind, hello=greeted)
        else:
            speaker = broker.call(self._paths[kind], kind, hello=greeted)
        asked = _Asked()
        with speaker:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                while choices:
                    self._say(speaker, choices, asked)
            self._receive(speaker, asked)
        broker._speakers.clear()
        broker.serve()
        assert descriptors_of() == self._idle
        assert broker.connections == 0
        records = broker.records()
        check_audit(record | {"seq": record["seq"] - records[0]["seq"]} for record in records)
        assert "failed" not in {record["event"] for record in records}, records
        os.truncate(self._audit, 0)

    def _say(self, speaker: Speaker, choices: Choices, asked: _Asked) -> None:
        """Send a message, and note what it asks for."""
        message = self._message(choices)
        if isinstance(speaker, StreamSpeaker):
            # A part of one makes others of those behind it.
            message = framed(message) if choices.number(7) else message
            part = message[: choices.number(4 * len(message)) or None]
            asked.note_part(part)
            speaker.send_raw(part)
        else:
            asked.note(message)
            speaker.send(message)

    def _message(self, choices: Choices) -> bytes:
        """Return a message that is nearly right, or not at all."""
        shape = choices.number(3)
        if shape == 0:
            return choices.take(choices.number(300))
        kind = _TYPES[choices.number(len(_TYPES) - 1)]
        names = [self._names[choices.number(len(self._names) - 1)] for _ in range(1 + choices.number(5))]
        body, count = b"\0".join(names), len(names)
        if kind is Type.STATUS:
            body, count = b"", 0
        elif kind is Type.LIST:
            body, count = bytes(8) + names[0], choices.number(20)
        elif kind is Type.WALK:
            body = WALK.pack(1 + choices.number(9), 15, choices.number(1), 0, 1 << 60, -(1 << 60))
            body, count = body + names[0] + b"\0" + choices.take(choices.number(9)), choices.number(20)
        if shape == 1:
            body += choices.take(choices.number(40))
        flags = choices.number(255) if choices.number(7) == 1 else 0
        return HEADER.pack(kind, flags, count, choices.number(200), 0) + body

    def _receive(self, speaker: Speaker, asked: _Asked) -> None:
        """Receive what there is, to the last."""
        speaker.sock.settimeout(0)
        for _ in range(2000):
            self._broker.serve()
            try:
                answer = speaker.receive()
            except BlockingIOError:
                return
            if answer is None:
                return
            with answer.descriptors:
                asked.check(answer)
        raise AssertionError("it answers without end")


class _Asked:
    """What was asked, as types and ids of answers that there may be."""

    def __init__(self) -> None:
        self._expected = {(int(Type.ERROR), 0)}
        self._parts = FrameBuffer()
        self._is_stream = True

    def note(self, message: bytes) -> None:
        """Note what a message asks for."""
        if len(message) >= HEADER.size:
            kind, _, _, request_id, _ = HEADER.unpack_from(message)
            self._expected |= {(kind | REPLY, request_id), (int(Type.ERROR), request_id)}

    def note_part(self, part: bytes) -> None:
        """Note the same of a part of a stream; nothing is asked behind what is no frame."""
        self._parts.add(part)
        try:
            while self._is_stream and (frame := self._parts.next_frame()) is not None:
                self.note(frame)
        except MalformedError:
            self._is_stream = False

    def check(self, answer: Answer) -> None:
        """Check that it was asked for, and that its descriptors are as many as it says, and for reading."""
        kind, _, _, request_id, _ = HEADER.unpack_from(answer.raw)
        assert (kind, request_id) in self._expected, answer
        given = 0
        if isinstance(answer.reply, OpenReply):
            given = sum(result.status == Status.GIVEN for result in answer.reply.results)
        elif isinstance(answer.reply, WalkReply):
            given = sum(entry.descriptor for entry in answer.reply.entries)
        assert len(answer.descriptors) == given
        for number in answer.descriptors.numbers():
            assert fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY


# Those of bytes alone.
PURE: dict[str, Callable[[bytes], None]] = {
    "request": request,
    "stream": stream,
    "reply": reply,
    "clamd": clamd,
}
