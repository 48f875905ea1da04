"""The server's side of clamd's protocol without I/O: bytes in, events out, replies as bytes.

One `Conversation` is one connection. Its owner reads from the socket, hands in
what came with `receive`, pulls events until there is none, sends what the
events and `answer` give, and closes when `is_over`:

    conversation.receive(data, len(descriptors), now)
    while (event := conversation.next_event(now)) is not None: ...

Nothing is read on while events are left, so an owner that has enough under way
just stops pulling; what waits here is never more than one read and a command.

The dialect is that of clamd 1.4, and docs/clamd.md has it, with a table of the
differences. How many parts the bytes came in makes none: what
is said of a plain command without a line end, there, is said with the clock.

Descriptors stay their owner's; here they are counted. The kernel ends a read
behind the part of a message that descriptors came with, so those that came
with a read belong to its *last* byte: to the FILDES command which that byte is
in, from its first byte to the one that follows its terminator. Where
`Asked` has the kind FILDES, the first that the owner has is its one. Where a
`Refusal` is given, or `next_event` gives None and `descriptors_wanted` is
false, whatever descriptor is left is nobody's: close it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import Enum, IntEnum, auto
from typing import NamedTuple

from fdbroker.clamd.replies import escaped

# PATH_MAX and what stands around a path, as clamd has room for; with prefix and terminator.
LONGEST_COMMAND = 4096 + 8
_NEWLINE = b"\n"
_NUL = b"\0"
_SIZE_OF_LENGTH = 4


class Kind(Enum):
    """What can be asked, by its name on the wire."""

    PING = b"PING"
    VERSION = b"VERSION"
    VERSIONCOMMANDS = b"VERSIONCOMMANDS"
    STATS = b"STATS"
    RELOAD = b"RELOAD"
    SHUTDOWN = b"SHUTDOWN"
    SCAN = b"SCAN"
    CONTSCAN = b"CONTSCAN"
    MULTISCAN = b"MULTISCAN"
    ALLMATCHSCAN = b"ALLMATCHSCAN"
    FILDES = b"FILDES"
    INSTREAM = b"INSTREAM"
    IDSESSION = b"IDSESSION"
    END = b"END"


class _Rule(NamedTuple):
    kind: Kind
    # A path follows, behind a space.
    path: bool
    # It may be said without `n` or `z`.
    plain: bool
    # It may be said inside IDSESSION.
    session: bool


# What is not in this table does not exist. QUIT is clamd's other name for SHUTDOWN.
COMMANDS = {
    b"SCAN": _Rule(Kind.SCAN, path=True, plain=True, session=True),
    b"QUIT": _Rule(Kind.SHUTDOWN, path=False, plain=True, session=False),
    b"RELOAD": _Rule(Kind.RELOAD, path=False, plain=True, session=False),
    b"PING": _Rule(Kind.PING, path=False, plain=True, session=True),
    b"CONTSCAN": _Rule(Kind.CONTSCAN, path=True, plain=True, session=False),
    b"VERSIONCOMMANDS": _Rule(Kind.VERSIONCOMMANDS, path=False, plain=False, session=True),
    b"VERSION": _Rule(Kind.VERSION, path=False, plain=True, session=True),
    b"END": _Rule(Kind.END, path=False, plain=False, session=True),
    b"SHUTDOWN": _Rule(Kind.SHUTDOWN, path=False, plain=True, session=False),
    b"MULTISCAN": _Rule(Kind.MULTISCAN, path=True, plain=True, session=False),
    b"FILDES": _Rule(Kind.FILDES, path=False, plain=True, session=True),
    b"STATS": _Rule(Kind.STATS, path=False, plain=False, session=True),
    b"IDSESSION": _Rule(Kind.IDSESSION, path=False, plain=False, session=False),
    b"INSTREAM": _Rule(Kind.INSTREAM, path=False, plain=False, session=True),
    b"ALLMATCHSCAN": _Rule(Kind.ALLMATCHSCAN, path=True, plain=False, session=False),
}
EVERYTHING = frozenset(Kind)
# What needs no path and no descriptor, and changes nothing: for whoever can't be asked who it is.
FOR_STRANGERS = frozenset({Kind.PING, Kind.VERSION, Kind.INSTREAM, Kind.IDSESSION, Kind.END})

PONG = b"PONG"
RELOADING = b"RELOADING"
UNAVAILABLE = b"COMMAND UNAVAILABLE"
_UNKNOWN = b"UNKNOWN COMMAND"
_INVALID_IN_SESSION = b"Command invalid inside IDSESSION. ERROR"
# These backslashes are what clamd sends.
_PLAIN_IN_SESSION = rb"Only nCMDS\n and zCMDS\0 are accepted inside IDSESSION. ERROR"
_STREAM_TOO_LONG = b"INSTREAM size limit exceeded. ERROR"
_COMMAND_TOO_LONG = b"Command too long. ERROR"
TIMED_OUT = b"COMMAND READ TIMED OUT"
_NO_DESCRIPTOR = b"No file descriptor received. ERROR"
_SEVERAL_DESCRIPTORS = b"FILDES: several descriptors received, one is needed. ERROR"
_STRAY_DESCRIPTOR = b"PROTOCOL ERROR: ancillary data sent without FILDES. ERROR"


# Reads that are all of what some connections have to say, each with all that is answered.
WHOLE_CONVERSATIONS = {
    b"zPING\0": PONG + _NUL,
    b"nPING\n": PONG + _NEWLINE,
    b"PING\n": PONG + _NEWLINE,
}
# Reads of a session that are a command which is answered on the spot, with the end of it.
_PINGS = {b"zPING\0": _NUL, b"nPING\n": _NEWLINE}
# FILDES as clients say it, with the byte that the descriptor comes with, and how the answer ends. Without a
# session nothing is read behind it.
FILDES_ALONE = {b"zFILDES\0\0": _NUL, b"nFILDES\n\0": _NEWLINE}


@dataclass(frozen=True)
class Limits:
    """What one connection may do.

    Times are in seconds. `command_timeout`: until the first command is there; `read_timeout`: from then on,
    while nothing is under way, until the next one or more of a stream. `plain_pause`: after so long without a
    byte, a plain command without a line end is whole. `stream_length`: most bytes of one INSTREAM.
    """

    stream_length: int = 100 * 1024 * 1024
    command_timeout: float = 30.0
    read_timeout: float = 120.0
    plain_pause: float = 0.1


class Asked(NamedTuple):
    """A command that somebody else has to answer: by `answer`, as often as needed, and then `finish`.

    `number` counts the commands of an IDSESSION from 1, and is 0 outside one. Behind INSTREAM follow
    `Chunk`s, and then `Streamed`, which wants the answer, or `Abandoned`, which wants none.
    """

    kind: Kind
    number: int
    path: bytes = b""


class Chunk(NamedTuple):
    """The next bytes of the INSTREAM with this number; never more in all than `Limits.stream_length`."""

    number: int
    data: bytes


class Streamed(NamedTuple):
    """The INSTREAM with this number is there whole."""

    number: int


class Abandoned(NamedTuple):
    """The INSTREAM with this number will never be whole: what was kept of it can go."""

    number: int


class Reply(NamedTuple):
    """Send this. Nothing else is to be done about it."""

    data: bytes


class Refusal(NamedTuple):
    """Send this; nothing that comes after it is read. What is under way is still to be answered."""

    data: bytes


Event = Asked | Chunk | Streamed | Abandoned | Reply | Refusal


class _State(IntEnum):
    COMMAND = auto()  # a command begins, or goes on
    CARRIER = auto()  # FILDES is there, and not yet the byte that its descriptor comes with
    LENGTH = auto()  # of a chunk
    CHUNK = auto()
    LAST = auto()  # no more is read; answers may be due


_STREAMING = frozenset({_State.LENGTH, _State.CHUNK})
# To look up a member of an Enum takes as long as the rest of a short command.
_COMMAND, _KIND_FILDES = _State.COMMAND, Kind.FILDES


class Conversation:
    """One connection of a client. `now` is always the same clock of its owner's, in seconds."""

    def __init__(self, limits: Limits, now: float, commands: frozenset[Kind] = EVERYTHING) -> None:
        self._limits = limits
        self._commands = commands
        self._may_ping = Kind.PING in commands
        self._may_hand_in = Kind.FILDES in commands
        self._state = _State.COMMAND
        self._data = bytearray()
        self._events: deque[Event] = deque()
        # No event can be made of what is there.
        self._dry = True
        self._ended = False
        # A plain command is whole, since nothing came behind it.
        self._paused = False
        # Descriptors: those of the last read, and those of the command that is not yet there whole.
        self._arrived = 0
        self._held = 0
        self._in_session = False
        self._number = 0
        self._terminator = _NEWLINE
        # Numbers of what is under way, and how the answers to each end.
        self._due: dict[int, bytes] = {}
        # Of a stream: bytes that may come, and those of them that are left of a chunk.
        self._quota = 0
        self._chunk = 0
        self._heard_at = now
        self._out_of_time_at = now + limits.command_timeout

    @property
    def is_over(self) -> bool:
        """Whether all is answered that ever will be: send what is left, shut down, and close.

        What still comes is to be read and dropped for a moment: the kernel makes a reset of unread bytes, and
        a client that meets it may not look at the reply.
        """
        return self._state is _State.LAST and not self._due and not self._events

    @property
    def reads_more(self) -> bool:
        """Whether anything that is received can still mean something."""
        return self._state is not _State.LAST

    @property
    def under_way(self) -> int:
        """How many commands wait for `finish`."""
        return len(self._due)

    @property
    def descriptors_wanted(self) -> bool:
        """Whether what came of descriptors belongs to a command that is not yet there whole."""
        return self._held > 0

    @property
    def deadline(self) -> float | None:
        """When to call `expire`, unless more is received before; None while nothing is waited for.

        Not waited for is a client whose commands are under way; its time begins when the last is answered.
        """
        if self._state is _State.LAST or (self._due and self._state not in _STREAMING):
            return None
        if self._is_plain():
            return min(self._heard_at + self._limits.plain_pause, self._out_of_time_at)
        return self._out_of_time_at

    def receive(self, data: bytes, descriptors: int, now: float) -> None:
        """Take what was read, and the number of descriptors that came with it. An empty read is the end.

        Raises:
            RuntimeError: not all events of what was received before were taken.

        """
        if not self._dry:
            raise RuntimeError("take all events before more is received")
        if self._state is _State.LAST:
            return
        self._dry = False
        self._ended = not data
        self._data += data
        self._arrived = descriptors
        self._heard_at = now
        if self._state in _STREAMING:
            self._out_of_time_at = now + self._limits.read_timeout

    def answer_at_once(self, data: bytes, now: float) -> bytes | None:
        """Return the reply to a read without descriptors if that is a PING in a session, and nothing else.

        It is then settled. None: `receive` it. For an owner that would do so and pull events until there is
        none: that comes to the same, and takes much longer.
        """
        terminator = _PINGS.get(data)
        if terminator is None or not self._in_session or not self._may_ping or not self._is_between_commands:
            return None
        self._begin_at_once(terminator, now)
        return _framed(self._number, PONG, terminator)

    def asked_at_once(self, data: bytes, now: float) -> Asked | None:
        """Return the FILDES that a read with one descriptor is, if it is that and nothing else.

        None: `receive` it; as `answer_at_once`.
        """
        terminator = FILDES_ALONE.get(data)
        if terminator is None or not self._may_hand_in or not self._is_between_commands:
            return None
        self._begin_at_once(terminator, now)
        number = self._number
        self._due[number] = terminator
        if not self._in_session:
            self._read_no_more()
        return Asked(_KIND_FILDES, number)

    @property
    def _is_between_commands(self) -> bool:
        """Whether nothing is there of a command, and nothing is left of what was received."""
        return self._dry and self._state is _COMMAND and not self._data and not self._held

    def _begin_at_once(self, terminator: bytes, now: float) -> None:
        self._terminator = terminator
        self._number += self._in_session
        self._heard_at = now
        self._out_of_time_at = now + self._limits.read_timeout

    def expire(self, now: float) -> None:
        """Do what is due at the `deadline`: there are events then. Before it nothing is."""
        deadline = self.deadline
        if deadline is None or now < deadline:
            return
        self._dry = False
        if now < self._out_of_time_at:
            self._paused = True
        else:
            # clamd knows neither number nor terminator here.
            self._refuse(TIMED_OUT + _NEWLINE)

    def next_event(self, now: float) -> Event | None:
        """Return the next event, or None: then more has to be received."""
        while not self._events and self._state is not _State.LAST:
            if not self._step(now):
                break
        if self._events:
            return self._events.popleft()
        self._dry = True
        return None

    def answer(self, number: int, text: bytes, name: bytes | None = None) -> bytes:
        """Return one reply to the command with this number: `name: text`, or the text alone.

        It is to be sent whole: some clients take what one read gives for a reply. In one that ends with a
        newline, the name is `escaped`; in one that ends with NUL it stands as it is.

        Raises:
            RuntimeError: no such command is under way.

        """
        terminator = self._due.get(number)
        if terminator is None:
            raise RuntimeError(f"command {number} is not under way")
        if name is not None:
            text = (escaped(name) if terminator == _NEWLINE else name) + b": " + text
        return _framed(number, text, terminator)

    def finish(self, number: int, now: float) -> None:
        """Take note that the command with this number has had all its replies.

        Raises:
            RuntimeError: no such command is under way.

        """
        if self._due.pop(number, None) is None:
            raise RuntimeError(f"command {number} is not under way")
        if not self._due and self._state not in _STREAMING:
            self._out_of_time_at = now + self._limits.read_timeout

    def _step(self, now: float) -> bool:
        """Read what comes next, and return whether it was there."""
        match self._state:
            case _State.COMMAND:
                return self._read_command(now)
            case _State.CARRIER:
                return self._read_carrier(now)
            case _State.LENGTH:
                return self._read_length(now)
            case _:
                return self._read_chunk()

    def _is_plain(self) -> bool:
        return (
            self._state is _State.COMMAND
            and not self._in_session
            and bool(self._data)
            and self._data[0] not in b"nz"
        )

    def _read_command(self, now: float) -> bool:
        """Read a command; return whether one was there."""
        data = self._data
        if not data:
            return self._wait(possible=False)
        prefix = bytes(data[:1])
        if self._in_session and prefix not in {b"n", b"z"}:
            self._number += 1
            return self._refuse_with(_PLAIN_IN_SESSION)
        self._terminator = terminator = _NUL if prefix == b"z" else _NEWLINE
        end = data.find(terminator)
        is_plain = self._is_plain()
        if end < 0 and is_plain and (self._ended or self._paused):
            end = len(data)
        if end >= LONGEST_COMMAND or (end < 0 and len(data) >= LONGEST_COMMAND):
            self._number += self._in_session
            return self._refuse_with(_COMMAND_TOO_LONG)
        begin = 0 if is_plain else 1
        if end < 0:
            fildes = Kind.FILDES.value + terminator
            return self._wait(possible=fildes.startswith(data[begin:]))
        self._paused = False
        self._number += self._in_session
        text = bytes(data[begin:end])
        del data[: end + 1]
        self._out_of_time_at = now + self._limits.read_timeout
        if is_plain:
            text = text.removesuffix(_NUL)  # freshclam sends the end of its string along
        self._take(text if terminator == _NUL else text.rstrip(b"\r"), is_plain=is_plain)
        return True

    def _take(self, text: bytes, *, is_plain: bool) -> None:
        """Take a command, without prefix and terminator."""
        name, space, path = text.partition(b" ")
        rule = COMMANDS.get(name)
        # A path has no NUL in it. What clamd makes of one is the part before.
        if rule and (rule.path != bool(path) or rule.path != bool(space) or _NUL in path):
            rule = None
        if rule and rule.kind is Kind.FILDES and rule.kind in self._commands:
            self._state = _State.CARRIER
            return
        if self._descriptors_of_command():
            self._refuse_with(_STRAY_DESCRIPTOR)
        elif rule is None or (is_plain and not rule.plain):
            self._refuse_with(_INVALID_IN_SESSION if self._in_session else _UNKNOWN)
        elif self._in_session and not rule.session:
            self._refuse_with(_INVALID_IN_SESSION)
        elif rule.kind not in self._commands:
            self._refuse_with(UNAVAILABLE)
        else:
            self._begin(rule.kind, path)

    def _begin(self, kind: Kind, path: bytes) -> None:
        """Do what a valid command asks for, or have it done."""
        if kind is Kind.IDSESSION:
            self._in_session = True
        elif kind is Kind.END and not self._in_session:
            self._refuse_with(_UNKNOWN)
        elif kind is Kind.END:
            self._read_no_more()
        elif kind is Kind.INSTREAM:
            self._quota = self._limits.stream_length
            self._state = _State.LENGTH
            self._events.append(Asked(kind, self._number))
        elif kind is Kind.PING:
            self._events.append(Reply(_framed(self._number, PONG, self._terminator)))
            self._end_outside_session()
        else:
            self._due[self._number] = self._terminator
            self._events.append(Asked(kind, self._number, path))
            self._end_outside_session()

    def _read_carrier(self, now: float) -> bool:
        """Read the byte behind FILDES; return whether it was there."""
        if not self._data:
            return self._wait(possible=True)
        del self._data[:1]
        self._out_of_time_at = now + self._limits.read_timeout
        count = self._descriptors_of_command()
        if count == 1:
            self._state = _State.COMMAND
            self._begin(Kind.FILDES, b"")
        else:
            self._refuse_with(_SEVERAL_DESCRIPTORS if count else _NO_DESCRIPTOR)
        return True

    def _read_length(self, now: float) -> bool:
        """Read the length of a chunk; return whether it was there."""
        if len(self._data) < _SIZE_OF_LENGTH:
            return self._wait(possible=False)
        length = int.from_bytes(self._data[:_SIZE_OF_LENGTH], "big")
        del self._data[:_SIZE_OF_LENGTH]
        if length > self._quota:
            return self._refuse_with(_STREAM_TOO_LONG)
        self._chunk = length
        self._quota -= length
        if length:
            self._state = _State.CHUNK
            return True
        self._state = _State.COMMAND
        self._out_of_time_at = now + self._limits.read_timeout
        self._due[self._number] = self._terminator
        self._events.append(Streamed(self._number))
        self._end_outside_session()
        return True

    def _read_chunk(self) -> bool:
        """Read what is there of a chunk; return whether there was anything."""
        if not self._data:
            return self._wait(possible=False)
        part = bytes(self._data[: self._chunk])
        del self._data[: self._chunk]
        self._chunk -= len(part)
        if not self._chunk:
            self._state = _State.LENGTH
        self._events.append(Chunk(self._number, part))
        return True

    def _wait(self, *, possible: bool) -> bool:
        """Settle what is to be settled where more bytes are needed. `possible`: this may become FILDES."""
        self._held += self._arrived
        self._arrived = 0
        if self._held and not possible:
            if self._state not in _STREAMING:
                self._number += self._in_session
            return self._refuse_with(_STRAY_DESCRIPTOR)
        if self._held > 1:
            self._number += self._in_session and self._state is _State.COMMAND
            return self._refuse_with(_SEVERAL_DESCRIPTORS)
        if self._ended:
            self._read_no_more()
        return False

    def _descriptors_of_command(self) -> int:
        """Return how many came with a command that is now there whole; they are settled by that."""
        count = self._held
        self._held = 0
        if not self._data:
            count += self._arrived
            self._arrived = 0
        return count

    def _end_outside_session(self) -> None:
        if not self._in_session:
            self._read_no_more()

    def _refuse_with(self, text: bytes) -> bool:
        self._refuse(_framed(self._number, text, self._terminator))
        return True

    def _refuse(self, reply: bytes) -> None:
        self._read_no_more()
        self._events.append(Refusal(reply))

    def _read_no_more(self) -> None:
        """Forget what was received and not understood yet."""
        if self._state in _STREAMING:
            self._events.append(Abandoned(self._number))
        self._data.clear()
        self._held = self._arrived = 0
        self._state = _State.LAST


def _framed(number: int, text: bytes, terminator: bytes) -> bytes:
    return b"%d: %b%b" % (number, text, terminator) if number else text + terminator
