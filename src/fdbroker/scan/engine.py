"""What a scan engine is: the one interface, in two kinds.

An `Inside` engine runs in a confined worker: it is warmed up once, before the
worker is locked, and then given one open file at a time. An `Outside` engine
runs somewhere else, in a daemon or a program of its own, and is handed open
files through a `Session`. Both are made from options that were checked, have a
name, and answer with a `Verdict`. docs/scanning.md shows how to write one, and
`fdbroker.testing.check_engine` tries whether it keeps what is asked here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from fdbroker.scan.verdict import Reason, Verdict

MEBIBYTE = 1 << 20


class EngineError(Exception):
    """An engine can't be had as it is configured; the text names what is missing and the cure."""

    says_why = True  # so that a zygote tells its text alone


def shown(path: bytes) -> str:
    """Return a path as the text of an error has it: ASCII, the rest escaped."""
    return ascii(path.decode("utf-8", "backslashreplace"))[1:-1]


@dataclass(frozen=True)
class Needs:
    """What an inside engine needs of its worker.

    `profile`: `sealed` opens nothing at all; `scratch` has a directory of its own, on a file system of
    limited size. `jit`: it makes machine code after the lock, so memory may become executable. `memory`:
    bytes beyond what is there when the worker starts. `scratch_size`: bytes that the scratch directory must
    have room for, in any number of files. `descriptors`: how many it may have open. Threads can't be had: a
    worker has one.
    """

    profile: Literal["sealed", "scratch"] = "sealed"
    jit: bool = False
    memory: int = 64 * MEBIBYTE
    scratch_size: int = 0
    descriptors: int = 16


def combined(needs: Iterable[Needs]) -> Needs:
    """Return what a worker with several engines needs: of each thing the most."""
    every = [Needs(), *needs]
    return Needs(
        "scratch" if any(one.profile == "scratch" for one in every) else "sealed",
        any(one.jit for one in every),
        max(one.memory for one in every),
        max(one.scratch_size for one in every),
        max(one.descriptors for one in every),
    )


class Engine(ABC):
    """What both kinds have in common. Derive from `Inside` or `Outside`.

    `options_type` is a frozen dataclass, which `fdbroker.scan.options` fills, so that an unknown or ill-typed
    option is an error with its name. Making an engine is cheap and touches no file: what takes time, or may
    fail, belongs in `warm` or `connect`.

    Args:
        options: an instance of `options_type`.

    """

    name: ClassVar[str]
    options_type: ClassVar[type]

    def __init__(self, options: Any) -> None:  # noqa: ANN401 - each engine has its own dataclass
        self.options = options

    @abstractmethod
    def version(self) -> str:
        """Return the versions of the engine and of what it knows, in one line for people.

        An inside engine is asked after `warm`, an outside one at any time.

        Raises:
            EngineError: it can't be told, since there is no engine.

        """

    def databases(self) -> Sequence[bytes]:
        """Return the files and directories that it is loaded from.

        Asked without `warm`. When one of them changes, the workers are to be started anew
        (`fdbroker.scan.stamps`).
        """
        return ()


class Inside(Engine):
    """An engine that runs in a confined worker."""

    def needs(self) -> Needs:
        """Return what it needs of its worker."""
        return Needs()

    @abstractmethod
    def warm(self) -> None:
        """Load all that a scan will use: libraries, databases, what comes with a first use.

        Called once, in the process that workers are forked from, before it has any hostile byte. May take
        seconds. It must leave no thread behind. Nothing can be opened afterwards.

        Raises:
            EngineError: no database, no library; nothing is scanned then.

        """

    @abstractmethod
    def scan(self, descriptor: int, size: int, scratch: bytes | None) -> Verdict:
        """Return the verdict on one file.

        Called in the worker. `Clean` says that the whole file was looked at, all `size` bytes of it, and
        within the engine's limits. Whatever is raised counts as an error of this file, and so does what is
        no verdict.

        Args:
            descriptor: open for reading; the caller's, before and after. Read by position (`os.pread`): the
                offset is shared with others.
            size: bytes that the file has.
            scratch: the worker's own directory; None in the profile `sealed`. What is left there is
                still there at the next scan.

        """


class Progress(NamedTuple):
    """What a session has to say: `number` of a file that was submitted, and the verdict."""

    number: int
    verdict: Verdict


class Outside(Engine):
    """An engine that runs somewhere else and is handed open files.

    Each is an open file that nobody else has: somebody who had it too could move its offset to the end, or
    set O_DIRECT, with which reads fail, and there are programs that take that for the end of the file.
    """

    @abstractmethod
    def connect(self) -> Session:
        """Return a session, which the caller closes.

        Raises:
            EngineError: it does not run, or not as it must.

        """


class SessionLostError(Exception):
    """The session is of no use any more, and can't tell which file that was due to.

    Whoever has files under way gives each of them to another session, one at a time, and once. `reason` and
    `text` are of the error that a file has that loses a session which it had alone.
    """

    def __init__(self, reason: Reason, text: str) -> None:
        self.reason = reason
        self.text = text
        super().__init__(text)


class Session(ABC):
    """Files under way to an outside engine. No call waits; `filenos` says what to wait for.

    Files are told apart by numbers that the caller chooses. Whatever is not answered is not clean.
    """

    @abstractmethod
    def room(self) -> int:
        """Return how many more files can be submitted now."""

    @abstractmethod
    def submit(self, number: int, descriptor: int, size: int) -> bool:
        """Hand in a file; return False if it was not taken and should be tried after the next answer.

        The descriptor stays the caller's, and must stay open until the answer.

        Raises:
            SessionLostError: it could not be handed in, and no other can be.

        """

    @abstractmethod
    def filenos(self) -> Sequence[int]:
        """Return the descriptors that become readable when there may be an answer."""

    @abstractmethod
    def deadline(self) -> float | None:
        """Return when (time.monotonic) `answers` must be called even if nothing became readable."""

    @abstractmethod
    def answers(self) -> list[Progress]:
        """Return what was answered since the last call. Each file is answered at most once.

        Raises:
            SessionLostError: files that are under way will have no answer here.

        """

    @abstractmethod
    def close(self) -> None:
        """End it, and what runs for it. May be called again."""
