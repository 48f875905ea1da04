"""Start programs that know nothing of confinement, confined: they read what they are given."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from typing import TYPE_CHECKING

from fdbroker.kernel import sockets
from fdbroker.sandbox.confinement import Confinement, Profile
from fdbroker.sandbox.errors import ZygoteError
from fdbroker.sandbox.program_worker import LONGEST_ORDER
from fdbroker.sandbox.zygote import DEFAULT_TIMEOUT, Worker, Zygote

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType
    from typing import Self

    from fdbroker.sandbox.report import LayerReport
    from fdbroker.sandbox.zygote import Ended

_STANDARD = frozenset({0, 1, 2})


class Programs:
    """Starts one program, many times. Owns the zygote for that: call `close`, or use it in `with`.

    Args:
        path: the program, absolute; a 64-bit ELF file. Of a script, start the interpreter.
        readable: absolute paths of files and directories that it may read besides its loader's places.
        confinement: the rest; its profile and program are replaced.

    Raises:
        ValueError: no absolute path.
        ZygoteError: there is no such program, or the zygote did not start.
        OSError: no process or descriptor to be had.

    """

    def __init__(
        self,
        path: str | bytes,
        *,
        readable: Sequence[str | bytes] = (),
        confinement: Confinement | None = None,
    ) -> None:
        wanted = replace(
            confinement or Confinement(),
            profile=Profile.PROGRAM,
            program=os.fsencode(path),
            readable=tuple(map(os.fsencode, readable)),
        )
        self.zygote = Zygote(None, "fdbroker.sandbox.program_worker:execute", confinement=wanted)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    def start(
        self,
        argv: Sequence[str | bytes],
        fds: Mapping[int, int],
        environment: Mapping[str, str] | None = None,
        *,
        timeout: float = DEFAULT_TIMEOUT,
    ) -> Worker:
        """Start it with these arguments, its own name first; return it when it is about to be executed.

        `fds`: number there -> descriptor here, which stays the caller's; 0, 1 and 2, each /dev/null if it is
        missing. They are what it can use, in each way for which they are open. `environment` is all
        that it gets. A program that could not be executed ends with status 127.

        Raises:
            ValueError: other numbers, arguments that are too long or none.
            SandboxError, OSError: as `Zygote.spawn`.

        """
        if not fds.keys() <= _STANDARD:
            raise ValueError(f"fds: only 0, 1 and 2 can be given, not {sorted(fds.keys() - _STANDARD)}")
        arguments = [os.fsencode(text) for text in argv]
        variables = [os.fsencode(f"{name}={value}") for name, value in (environment or {}).items()]
        if not arguments or any(0 in text for text in (*arguments, *variables)):
            raise ValueError("argv: the program's own name comes first, and no string has a NUL in it")
        order = json.dumps(
            {
                "argv": [text.hex() for text in arguments],
                "env": [text.hex() for text in variables],
                "numbers": list(fds),
            }
        ).encode("ascii")
        if len(order) >= LONGEST_ORDER:
            raise ValueError(f"argv and environment: at most {LONGEST_ORDER // 2} bytes together")
        worker = self.zygote.spawn(timeout=timeout)
        try:
            sockets.send(worker.channel, order, list(fds.values()))
        except OSError as error:
            raise ZygoteError(f"the program was not started: {worker.stop(grace=1.0)} ({error})") from error
        return worker

    def close(self) -> None:
        """End the zygote, and all programs that it started."""
        self.zygote.close()


class Program:
    """One confined program. Owns it: call `stop`, or use it in `with`."""

    def __init__(self, programs: Programs, worker: Worker) -> None:
        self._programs = programs
        self._worker = worker

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
        """What confines it."""
        return self._worker.report

    @property
    def pidfd(self) -> int:
        """A descriptor of it, readable when it has ended; open until `wait` or `stop` has said so."""
        return self._worker.pidfd

    def wait(self, timeout: float | None = None) -> Ended | None:
        """Wait for its end, at most `timeout` seconds; return how it ended, None if it goes on."""
        return self._worker.wait(timeout)

    def stop(self) -> Ended:
        """Kill it if it goes on, let go of everything, return how it ended. May be called again."""
        ended = self._worker.stop()
        self._programs.close()
        return ended


def spawn(
    argv: Sequence[str | bytes],
    fds: Mapping[int, int],
    environment: Mapping[str, str] | None = None,
    *,
    readable: Sequence[str | bytes] = (),
    confinement: Confinement | None = None,
) -> Program:
    """Start a program, whose absolute path comes first in `argv`, confined, once; see `Programs`.

    Raises:
        ValueError, SandboxError, OSError: as `Programs` and `Programs.start`.

    """
    if not argv:
        raise ValueError("argv: the program's path comes first")
    programs = Programs(argv[0], readable=readable, confinement=confinement)
    try:
        return Program(programs, programs.start(argv, fds, environment))
    except BaseException:
        programs.close()
        raise
