from __future__ import annotations

import errno
import io
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest

from fdbroker.cli.progress import Ahead, ScanProgress, _Left, _size, _words
from fdbroker.cli.scan_output import Totals
from fdbroker.client import UnavailableError
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


def test_error_of_the_walk_comes_behind_what_was_found_before() -> None:
    lost = UnavailableError(errno.ECONNREFUSED, "gone")

    def walk() -> Iterator[Found]:
        yield from FILES[:3]
        raise lost

    ahead = Ahead(walk(), 100)
    assert [next(ahead), next(ahead), next(ahead)] == FILES[:3]
    with pytest.raises(UnavailableError):
        next(ahead)


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


def test_bar_shows_a_finding_before_its_line_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    ahead = Ahead(FILES, 1000)
    list(ahead)
    with ScanProgress(wanted=True) as progress:
        progress.update(Totals(files=1), ahead)
        progress.update(Totals(files=2, infected=1), ahead)
        assert "2/300" not in shown.getvalue()  # too soon
        progress.refresh(Totals(files=3, infected=1), ahead)
        assert "3/300 files, 1 infected" in shown.getvalue()
