"""The progress bar: on standard error, on a terminal, without a thread (workers are forked)."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from fdbroker.config.names import counted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType
    from typing import Self

    from rich.progress import Task

    from fdbroker.cli.ahead import Ahead
    from fdbroker.cli.scan_output import Totals

_INTERVAL = 0.1  # seconds
_UNITS = ("bytes", "kB", "MB", "GB", "TB")


class _Left(TextColumn):
    """The time that is left, where it is known."""

    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: Task) -> Text:
        """Return it as text."""
        left = task.time_remaining
        if task.total is None or left is None:
            return Text("")
        minutes, seconds = divmod(int(left), 60)
        hours, minutes = divmod(minutes, 60)
        return Text(f"{hours}:{minutes:02}:{seconds:02} left")


class _Bar(Progress):
    """Does nothing where it is disabled. Of itself, older rich ends it with an empty line nevertheless."""

    def start(self) -> None:
        """Begin to draw."""
        if not self.disable:
            super().start()

    def stop(self) -> None:
        """Remove what was drawn."""
        if not self.disable:
            super().stop()


def _bar(*columns: ProgressColumn, wanted: bool) -> _Bar:
    """Return a bar that is drawn when it is told to, and nowhere if it is not wanted or can't be."""
    console = Console(stderr=True)
    return _Bar(
        SpinnerColumn(),
        TextColumn("{task.fields[words]}", markup=False),
        *columns,
        console=console,
        auto_refresh=False,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
        disable=not (wanted and console.is_terminal and os.environ.get("TERM") != "dumb"),
    )


class WalkProgress:
    """Shows how much a walk has found; nothing where standard error is no terminal, or `wanted` is False."""

    def __init__(self, *, wanted: bool, words: str = "walking") -> None:
        self._progress = _bar(TimeElapsedColumn(), wanted=wanted)
        self._task = self._progress.add_task("", total=None, words=words)
        self._bytes = 0
        self._next = 0.0

    def __enter__(self) -> Self:
        """Show it."""
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove it."""
        self._progress.stop()

    def update(self, found: int, size: int) -> None:
        """Count `size` bytes more, and show how much there is a few times a second."""
        self._bytes += size
        self.show(lambda: f"{counted(found, 'file')}, {_size(self._bytes)}")

    def show(self, words: Callable[[], str], *, at_once: bool = False) -> None:
        """Show what `words` returns, a few times a second; `at_once`: now, as nothing may follow."""
        now = time.monotonic()
        if self._progress.disable or (now < self._next and not at_once):
            return
        self._next = now + _INTERVAL
        self._progress.update(self._task, words=words(), refresh=True)


class ScanProgress:
    """Shows how far a scan is; nothing where standard error is no terminal."""

    def __init__(self) -> None:
        self._progress = _bar(
            BarColumn(bar_width=20),
            TextColumn("{task.fields[rate]}", markup=False),
            TimeElapsedColumn(),
            _Left(),
            wanted=True,
        )
        self._task = self._progress.add_task("", total=None, words="scanning", rate="")
        self._began = time.monotonic()
        self._next = 0.0

    def __enter__(self) -> Self:
        """Show it."""
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove it."""
        self._progress.stop()

    def update(self, totals: Totals, ahead: Ahead) -> None:
        """Show the counts, a few times a second."""
        if time.monotonic() >= self._next:
            self.refresh(totals, ahead)

    def refresh(self, totals: Totals, ahead: Ahead) -> None:
        """Show the counts now, as before a finding: the bar beside it must not say that there is none."""
        if self._progress.disable:
            return
        now = time.monotonic()
        self._next = now + _INTERVAL
        seconds = max(now - self._began, 0.001)
        self._progress.update(
            self._task,
            completed=totals.files,
            total=ahead.files if ahead.complete else None,
            words=_words(totals, ahead),
            rate=f"{totals.files / seconds:.0f} files/s, {_size(totals.bytes / seconds)}/s",
            refresh=True,
        )

    @contextlib.contextmanager
    def out_of_the_way(self) -> Iterator[None]:
        """Take the bar away while a line is written to the same terminal."""
        if self._progress.disable or not sys.stdout.isatty():
            yield
            return
        self._progress.stop()
        try:
            yield
        finally:
            self._progress.start()


def _words(totals: Totals, ahead: Ahead) -> str:
    of = f"{ahead.files}" if ahead.complete else f"{ahead.files}+"
    files = f"{totals.files}/{of} files" if ahead.files else counted(totals.files, "file")
    return f"{files}, {totals.infected} infected, {counted(totals.errors, 'error')}"


def _size(count: float) -> str:
    for unit in _UNITS[:-1]:
        if count < 1000:  # noqa: PLR2004 - a power of it is the next unit
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.0f} {_UNITS[-1]}"
