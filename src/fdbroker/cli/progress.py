"""The progress bar: on standard error, on a terminal, without a thread (workers are forked)."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType
    from typing import Self

    from fdbroker.cli.output import Totals

_INTERVAL = 0.1


class ScanProgress:
    """Shows how far a scan is; nothing where standard error is no terminal, or `wanted` is False."""

    def __init__(self, *, wanted: bool) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.fields[words]}", markup=False),
            DownloadColumn(),
            TimeElapsedColumn(),
            console=console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
            disable=not (wanted and console.is_terminal),
        )
        self._task = self._progress.add_task("", total=None, words="scanning")
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

    def update(self, totals: Totals) -> None:
        """Show the counts, a few times a second."""
        now = time.monotonic()
        if self._progress.disable or now < self._next:
            return
        self._next = now + _INTERVAL
        words = f"{totals.files} files, {totals.infected} infected, {totals.errors} errors"
        self._progress.update(self._task, completed=totals.bytes, words=words, refresh=True)

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
