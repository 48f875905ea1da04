"""Contract tests for scan engines: what every engine must keep, tried out on one of them."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
import time
from typing import TYPE_CHECKING, NamedTuple

from fdbroker.scan.engine import Inside, Outside
from fdbroker.scan.examine import examine
from fdbroker.scan.options import OptionsError, read_options
from fdbroker.scan.outside import Handover
from fdbroker.scan.plugins import Configured, from_json, make, to_json
from fdbroker.scan.supervisor import Done, Supervisor
from fdbroker.scan.verdict import Clean, Error, Infected, Verdict

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_MANY = 100
_THREAD_ENDS = 1.0  # seconds, at most, from when it was joined


class Samples(NamedTuple):
    """Contents of files, not empty. `infected` must be found, `clean` must not."""

    infected: Sequence[bytes]
    clean: Sequence[bytes]


def check_engine(
    configured: Configured, samples: Samples, *, confined: bool = True, ids: tuple[int, int] | None = None
) -> None:
    """Try whether an engine keeps the contract of docs/scanning.md; return if it does.

    Nothing is mocked: an inside engine is warmed up in this process and scans here, and then (unless
    `confined` is False) in a real worker; an outside engine is connected to. So call it in a process of a
    test.

    Args:
        configured: the engine, as `fdbroker.scan.plugins.configure` gives it.
        samples: at least one of each.
        confined: an inside engine scans in a confined worker as well.
        ids: uid and gid of that worker, needed as root.

    Raises:
        AssertionError: the sentence says what does not hold.
        EngineError: the engine can't be had as it is configured.

    """
    if not samples.infected or not samples.clean:
        raise ValueError("samples of both kinds are needed")
    _check_configuration(configured)
    engine = make(configured)
    if isinstance(engine, Inside):
        _check_inside(engine, samples)
        if confined:
            _check_confined(configured, samples, ids)
    else:
        _check_outside(engine, samples)


def _check_configuration(configured: Configured) -> None:
    _hold(from_json(to_json([configured])) == [configured], "its options are values of JSON")
    engine = make(configured)
    kind = engine.options_type
    _hold(dataclasses.is_dataclass(kind), "options_type is a dataclass")
    with contextlib.suppress(dataclasses.FrozenInstanceError):
        for field in dataclasses.fields(kind)[:1]:
            setattr(engine.options, field.name, getattr(engine.options, field.name))
            _hold(False, "its options are frozen")  # noqa: FBT003 - it was not refused
    try:
        read_options(kind, {**configured.options, "no such option": 1}, where="the engine")
    except OptionsError:
        pass
    else:
        _hold(False, "an unknown option is an error")  # noqa: FBT003 - it was not refused
    _hold(all(isinstance(path, bytes) for path in engine.databases()), "databases are paths, as bytes")
    _hold(all(os.path.exists(path) for path in engine.databases()), "databases are there")


def _check_inside(engine: Inside, samples: Samples) -> None:
    with tempfile.TemporaryDirectory(prefix="fdbroker-check-") as directory:
        scratch = os.fsencode(directory) if engine.needs().profile == "scratch" else None
        with _file(samples.clean[0]) as descriptor:
            [answer] = examine([engine], descriptor, len(samples.clean[0]), scratch)
            _hold(not isinstance(answer.verdict, Clean), "it calls nothing clean before it was warmed up")
        threads = _threads()
        engine.warm()
        _hold(_ends_at(threads), "it leaves no thread behind after warm")
        _check_version(engine.version())
        for contents in samples.clean:
            _hold_clean(_scan(engine, contents, scratch))
        for contents in samples.infected:
            _hold_infected(_scan(engine, contents, scratch))
        for contents in samples.clean:
            _hold_clean(_scan(engine, contents, scratch))
        _hold(isinstance(_scan(engine, b"", scratch), Verdict), "an empty file has a verdict")
        _hold(_ends_at(threads), "it leaves no thread behind after a scan")
        _check_wrong_files(engine, samples.clean[0], scratch)
        _hold(scratch is None or not os.listdir(scratch), "it leaves its scratch directory empty")


def _scan(engine: Inside, contents: bytes, scratch: bytes | None) -> Verdict:
    """Scan, and look at what a scan must leave as it was."""
    with _file(contents) as descriptor:
        before = _descriptors()
        os.lseek(descriptor, len(contents), os.SEEK_SET)
        verdict = engine.scan(descriptor, len(contents), scratch)
        _hold(isinstance(verdict, Verdict), "it answers with a verdict")
        _hold(_descriptors() == before, "it leaves the descriptor open, and no other")
        for offset in (0, len(contents) // 2):
            os.lseek(descriptor, offset, os.SEEK_SET)
            again = engine.scan(descriptor, len(contents), scratch)
            _hold(again == verdict, "its verdict does not depend on the offset, which others share")
    return verdict


def _check_wrong_files(engine: Inside, contents: bytes, scratch: bytes | None) -> None:
    """Hand in what can't be clean: a file of another size than was said, and one that can't be read."""
    with _file(contents) as descriptor:
        for size in (len(contents) + 1, len(contents) - 1):
            [answer] = examine([engine], descriptor, size, scratch)
            _hold(isinstance(answer.verdict, Error), "a file of another size than was said is an error")
        with open(f"/proc/self/fd/{descriptor}", "ab", buffering=0) as unreadable:
            [answer] = examine([engine], unreadable.fileno(), len(contents), scratch)
            _hold(isinstance(answer.verdict, Error), "a file that can't be read is an error")


def _check_confined(configured: Configured, samples: Samples, ids: tuple[int, int] | None) -> None:
    every = [*samples.clean, *samples.infected] * 3
    with contextlib.ExitStack() as opened, Supervisor([configured], ids=ids) as supervisor:
        done: list[Done] = []
        for number, contents in enumerate(every):
            done += supervisor.submit(b"%d" % number, os.dup(opened.enter_context(_file(contents))))
        done += supervisor.finish()
        verdicts = {int(one.path): one.verdict for one in done}
        _hold(supervisor.workers_started == 1, f"one worker scans all samples: {verdicts}")
    for number, contents in enumerate(every):
        check = _hold_clean if contents in samples.clean else _hold_infected
        check(verdicts[number], "in a confined worker: ")


def _check_outside(engine: Outside, samples: Samples) -> None:
    _check_version(engine.version())
    before = _descriptors()
    session = engine.connect()
    try:
        _hold(session.room() >= 1, "a new session has room")
        _hold(not session.answers(), "a new session has no answer")
        for descriptor in session.filenos():
            _hold(os.get_inheritable(descriptor) is False, "its descriptors are close-on-exec")
    finally:
        session.close()
        session.close()
    _hold(_descriptors() == before, "close closes what connect opened")
    every = [*samples.clean, *samples.infected]
    for contents in every:
        check = _hold_clean if contents in samples.clean else _hold_infected
        check(_hand_over(engine, [contents])[0])
    many = [every[number % len(every)] for number in range(_MANY)]
    for contents, verdict in zip(many, _hand_over(engine, many), strict=True):
        (_hold_clean if contents in samples.clean else _hold_infected)(verdict, "of many: ")
    _check_wrong_descriptors(engine, samples.clean[0])
    _hold(_descriptors() == before, "it leaves no descriptor open")


def _hand_over(engine: Outside, files: Sequence[bytes]) -> list[Verdict]:
    verdicts: dict[int, Verdict] = {}
    with contextlib.ExitStack() as opened, Handover(engine) as handover:
        for number, contents in enumerate(files):
            handover.submit(number, opened.enter_context(_file(contents)))
        for number, verdict in handover.finish():
            _hold(number not in verdicts, "each file is answered once")
            verdicts[number] = verdict
    _hold(len(verdicts) == len(files), "each file is answered")
    return [verdicts[number] for number in range(len(files))]


def _check_wrong_descriptors(engine: Outside, contents: bytes) -> None:
    with _file(contents) as descriptor, Handover(engine) as handover:
        path = f"/proc/self/fd/{descriptor}"
        for number, flags in enumerate((os.O_WRONLY, os.O_PATH)):
            other = os.open(path, flags | os.O_CLOEXEC)
            try:
                handover.submit(number, other)
                [(_, verdict)] = handover.finish()
            finally:
                os.close(other)
            _hold(isinstance(verdict, Error), "what can't be read is an error")


def _check_version(text: str) -> None:
    _hold(bool(text) and text.isprintable(), f"its version is one line that can be shown: {text!r}")


def _hold_clean(verdict: Verdict, where: str = "") -> None:
    _hold(isinstance(verdict, Clean), f"{where}a clean sample is clean: {verdict}")


def _hold_infected(verdict: Verdict, where: str = "") -> None:
    _hold(isinstance(verdict, Infected), f"{where}an infected sample is found: {verdict}")


def _hold(holds: bool, sentence: str) -> None:  # noqa: FBT001 - as assert, which python -O leaves out
    if not holds:
        raise AssertionError(f"this does not hold: {sentence}")


@contextlib.contextmanager
def _file(contents: bytes) -> Iterator[int]:
    """Open a file with these contents for reading."""
    with tempfile.NamedTemporaryFile(prefix="fdbroker-check-") as file:
        file.write(contents)
        file.flush()
        descriptor = os.open(file.name, os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield descriptor
        finally:
            with contextlib.suppress(OSError):  # an engine may have closed it, which is told by then
                os.close(descriptor)


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def _ends_at(threads: int) -> bool:
    """Return whether there are no more threads, or soon: one that was joined is listed for a moment."""
    end = time.monotonic() + _THREAD_ENDS
    while _threads() > threads:
        if time.monotonic() > end:
            return False
        time.sleep(0.001)
    return True


def _threads() -> int:
    return len(os.listdir("/proc/self/task"))
