from __future__ import annotations

import errno
import io
import os
import re
import sys
import time
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, NoReturn, cast

import pytest
import rich.console

from fdbroker.cli.ahead import Ahead
from fdbroker.cli.policy_diff import _shown_while
from fdbroker.cli.progress import ScanProgress, _Left, _size, _words
from fdbroker.cli.scan_output import Totals
from fdbroker.client import UnavailableError
from fdbroker.config.difference import Walked
from fdbroker.scan.tree import File, Found, NotAFile

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.progress import Task

FILES: list[Found] = [File(b"/%d" % number) for number in range(300)]


def test_everything_comes_in_order_however_far_it_looks_ahead() -> None:
    found = [*FILES[:10], NotAFile(b"/fifo", "fifo"), *FILES[10:]]
    for limit in (0, 1, 5, 1000):
        ahead = Ahead(found, limit)
        assert list(ahead) == found
        if limit:
            assert (ahead.files, ahead.complete) == (len(FILES), True)


def test_it_looks_ahead_step_by_step_and_no_further_than_it_may() -> None:
    taken = 0

    def walk() -> Iterator[Found]:
        nonlocal taken
        for file in FILES:
            taken += 1
            yield file

    ahead = Ahead(walk(), 100)
    assert taken == 0
    next(ahead)
    assert (taken, ahead.complete) == (65, False)
    next(ahead)
    assert taken == 101
    next(ahead)
    assert taken == 102
    alone = Ahead(iter(FILES), 0)
    next(alone)
    assert (alone.files, alone.complete) == (1, False)


def test_it_reads_ahead_for_who_waits_for_something_else_and_no_longer() -> None:
    ahead = Ahead(iter(FILES), 0)
    asked = iter([False, False, True])
    ahead.read_until(lambda: next(asked))
    assert (ahead.files, ahead.complete) == (128, False)
    ahead.read_until(lambda: False)
    assert (ahead.files, ahead.complete) == (300, True)
    assert list(ahead) == FILES


def test_error_of_the_walk_comes_behind_what_was_found_before() -> None:
    lost = UnavailableError(errno.ECONNREFUSED, "gone")

    def walk() -> Iterator[Found]:
        yield from FILES[:3]
        raise lost

    for limit, before in ((100, 0), (0, 0), (0, 64)):
        ahead = Ahead(walk(), limit)
        asked = iter([before == 0, True])
        ahead.read_until(asked.__next__)
        taken = iter(ahead)
        assert [next(taken), next(taken), next(taken)] == FILES[:3]
        with pytest.raises(UnavailableError):
            next(taken)


def test_words_say_of_how_many_and_whether_there_may_be_more() -> None:
    ahead = Ahead(FILES, 1000)
    totals = Totals(files=1, errors=1)
    next(ahead)
    assert _words(totals, ahead) == "1/65+ files, 0 infected, 1 error"
    list(ahead)
    assert _words(totals, ahead) == "1/300 files, 0 infected, 1 error"


@pytest.mark.parametrize(
    ("total", "left", "shown"),
    [(None, 5.0, ""), (10, None, ""), (10, 5.4, "0:00:05 left"), (10, 3723.0, "1:02:03 left")],
)
def test_time_that_is_left_is_told_where_it_is_known(
    total: int | None, left: float | None, shown: str
) -> None:
    task = cast("Task", SimpleNamespace(total=total, time_remaining=left))
    assert _Left().render(task).plain == shown


@pytest.mark.parametrize(
    ("count", "shown"), [(0, "0 bytes"), (999, "999 bytes"), (1500, "2 kB"), (2e6, "2 MB"), (3e15, "3000 TB")]
)
def test_size_is_told_with_a_unit(count: float, shown: str) -> None:
    assert _size(count) == shown


# ---- what is on the screen ----


_DRAWN = "<all that was drawn>"


class Screen:
    """A terminal, as standard error is one, and a clock that goes when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.master, terminal = os.openpty()
        self._stream = os.fdopen(terminal, "w", encoding="utf-8")
        self.now = 1000.0
        for module in (time, rich.console):
            monkeypatch.setattr(module, "monotonic", lambda: self.now)
        monkeypatch.setattr(sys, "stderr", self._stream)
        for name, value in {"TERM": "xterm", "COLUMNS": "120", "LINES": "25"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("NO_COLOR", raising=False)

    def drawn(self) -> str:
        """Return what was drawn since the last call, without what moves the cursor or gives colours."""
        self._stream.write(_DRAWN)
        self._stream.flush()
        shown = b""
        # What was written comes out at the other end some time later.
        while not shown.endswith(_DRAWN.encode()):
            shown += os.read(self.master, 65536)
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode()).removesuffix(_DRAWN)

    def close(self) -> None:
        self._stream.close()
        os.close(self.master)


@contextmanager
def screen_of_ours(monkeypatch: pytest.MonkeyPatch) -> Iterator[Screen]:
    # Within the test: pytest puts its own standard error in place before each phase.
    screen = Screen(monkeypatch)
    try:
        yield screen
    finally:
        screen.close()


def test_rate_and_time_that_is_left_are_on_the_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    ahead = Ahead(FILES, 1000)
    totals = Totals()
    next(ahead)
    next(ahead)
    with screen_of_ours(monkeypatch) as screen, ScanProgress() as progress:
        for _ in range(5):
            screen.now += 1
            totals.files += 20
            totals.bytes += 40_000_000
            progress.update(totals, ahead)
        assert not ahead.complete
        early = screen.drawn()
        list(ahead)
        for _ in range(5):
            screen.now += 1
            totals.files += 20
            totals.bytes += 40_000_000
            progress.update(totals, ahead)
        late = screen.drawn()
    assert re.findall(r"(\d+)/(\d+\+?) files, 0 infected, 0 errors", early)[-1] == ("100", "129+")
    assert "20 files/s, 40 MB/s" in early
    assert " left" not in early
    assert re.findall(r"(\d+)/(\d+\+?) files, 0 infected, 0 errors", late)[-1] == ("200", "300")
    # 100 files at 20 a second; ten seconds have gone.
    assert re.findall(r"([\d:]+) left", late)[-1] == "0:00:05"
    assert re.findall(r"(\d+:\d\d:\d\d) 0:00:05 left", late)[-1] == "0:00:10"
    assert "20 files/s, 40 MB/s" in late


def test_bar_is_drawn_a_few_times_a_second_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    ahead = Ahead(FILES, 1000)
    with screen_of_ours(monkeypatch) as screen, ScanProgress() as progress:
        screen.drawn()
        progress.update(Totals(files=1), ahead)
        assert "1 file," in screen.drawn()
        screen.now += 0.06
        progress.update(Totals(files=2), ahead)
        assert screen.drawn() == ""
        screen.now += 0.06
        progress.update(Totals(files=3), ahead)
        assert "3 files," in screen.drawn()


def test_comparison_of_policies_shows_what_it_waits_for_without_delay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    walked = Walked()

    def found() -> Iterator[NoReturn]:
        screen.drawn()
        walked.entries = 1
        walked.watch(b"/a")
        assert "1 path compared, in /a" in screen.drawn()
        walked.watch(b"/a/b")
        assert screen.drawn() == "", "so soon after"
        walked.waits_for(b"/a/far\n")
        assert r"1 path compared, waiting for /a/far\x0a" in screen.drawn()
        yield from ()

    with screen_of_ours(monkeypatch) as screen:
        assert list(_shown_while(found(), walked)) == []


def test_bar_shows_a_finding_before_its_line_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    ahead = Ahead(FILES, 1000)
    list(ahead)
    with ScanProgress() as progress:
        progress.update(Totals(files=1), ahead)
        progress.update(Totals(files=2, infected=1), ahead)
        assert "2/300" not in shown.getvalue()  # too soon
        progress.refresh(Totals(files=3, infected=1), ahead)
        assert "3/300 files, 1 infected" in shown.getvalue()
