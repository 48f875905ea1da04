"""A stuck loop is ended by the kernel; one that works, or has nothing to do, is not."""

from __future__ import annotations

import os
import select
import signal
import time
from functools import partial
from typing import TYPE_CHECKING

import pytest

from fdbroker.broker.opening import Opener
from fdbroker.broker.walking import Walk
from fdbroker.broker.watchdog import STUCK_SECONDS, Watchdog
from fdbroker.kernel.descriptors import close_all
from fdbroker.wire.client import encode_open
from fdbroker.wire.format import MAX_PATHS
from fdbroker.wire.messages import WalkFilter, WalkRequest
from tests.broker.speaking import Speaker
from tests.broker.stepping import SteppedBroker
from tests.hanging.fanotify import held_opens
from tests.running_broker import policy, reachable_directory, running_broker

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.kernel.conftest import Children


class Clock:
    """A clock that is set, and a timer that notes when it would go off."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.goes_off: float | None = None
        self.calls = 0

    def set_timer(self, seconds: float) -> None:
        self.calls += 1
        self.goes_off = self.now + seconds if seconds else None

    def nanoseconds(self) -> int:
        return round(self.now * 1e9)

    def watchdog(self) -> Watchdog:
        return Watchdog(STUCK_SECONDS, self.set_timer, self.nanoseconds)


def test_a_loop_that_is_stuck_after_any_round_is_ended_within_three_seconds() -> None:
    clock = Clock()
    watchdog = clock.watchdog()
    for round_of in range(400):
        watchdog.before_waiting(-1)
        clock.now += 0.01
        watchdog.after_waiting(1)
        clock.now += round_of % 7 / 100
        assert clock.goes_off is not None
        assert 2 <= clock.goes_off - clock.now <= STUCK_SECONDS


def test_a_busy_loop_sets_the_timer_twice_a_second() -> None:
    clock = Clock()
    watchdog = clock.watchdog()
    for _ in range(10_000):  # in one second
        watchdog.before_waiting(-1)
        clock.now += 0.0001
        watchdog.after_waiting(1)
    assert clock.calls <= 4


@pytest.mark.parametrize("timeout", [-1.0, 60.0])
def test_an_idle_loop_waits_as_long_as_it_wants_with_the_timer_off(timeout: float) -> None:
    clock = Clock()
    watchdog = clock.watchdog()
    assert watchdog.before_waiting(timeout) == timeout
    watchdog.after_waiting(1)
    # Something may come at once: it stays armed for a short while.
    wait = watchdog.before_waiting(timeout)
    assert 0 < wait <= 1
    clock.now += wait
    assert clock.goes_off is not None
    assert clock.goes_off > clock.now
    watchdog.after_waiting(0)
    assert watchdog.before_waiting(timeout) == timeout
    assert clock.goes_off is None
    calls = clock.calls
    clock.now += 3600
    watchdog.after_waiting(0)
    assert watchdog.before_waiting(timeout) == timeout
    assert clock.calls == calls
    watchdog.after_waiting(1)
    assert clock.goes_off == clock.now + STUCK_SECONDS


def test_the_timer_is_never_left_to_go_off_in_a_wait() -> None:
    """Whatever the waits ask for, and however long the rounds are."""
    clock = Clock()
    watchdog = clock.watchdog()
    for number in range(2000):
        wanted = (-1.0, 0.0, 0.1, 0.9, 1.0, 1.1, 2.0, 30.0)[number % 8]
        wait = watchdog.before_waiting(wanted)
        events = number % 3 == 0
        clock.now += 0.001 if events else (wait if wait >= 0 else 5.0)
        assert clock.goes_off is None or clock.goes_off > clock.now, (number, wanted, wait)
        watchdog.after_waiting(events)
        clock.now += number % 5 / 10


def test_what_is_to_be_done_often_is_done_twice_a_second_whether_it_is_on_or_off() -> None:
    clock = Clock()

    def note(times: list[float]) -> None:
        times.append(clock.now)

    for watchdog in (clock.watchdog(), Watchdog(None, clock.set_timer, clock.nanoseconds)):
        times: list[float] = []
        watchdog.often = partial(note, times)
        for _ in range(10_000):  # in one second
            watchdog.before_waiting(-1)
            clock.now += 0.0001
            watchdog.after_waiting(1)
        assert 2 <= len(times) <= 3


def test_the_time_that_was_looked_at_last_is_known_to_others() -> None:
    clock = Clock()
    watchdog = clock.watchdog()
    for look in (partial(watchdog.after_waiting, 1), watchdog.ping):
        clock.now += 7.5
        look()
        assert watchdog.now == clock.nanoseconds()


def test_none_of_it_happens_where_it_is_off() -> None:
    clock = Clock()
    watchdog = Watchdog(None, clock.set_timer, clock.nanoseconds)
    assert watchdog.before_waiting(-1) == -1
    watchdog.after_waiting(1)
    watchdog.ping()
    watchdog.stop()
    assert clock.calls == 0


def test_it_ends_a_process_whose_sigalrm_was_ignored_and_blocked(in_child: Children) -> None:
    def child() -> None:
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
        Watchdog.prepare()
        Watchdog(0.05).ping()
        select.poll().poll(20_000)

    assert in_child.killed_by(child) == signal.SIGALRM


@pytest.fixture
def directory() -> Iterator[Path]:
    with reachable_directory() as path:
        (path / "tree").mkdir()
        for name in ("file", "held"):
            (path / "tree" / name).write_bytes(name.encode())
        yield path


@pytest.mark.root
def test_a_broker_that_is_stuck_in_an_open_is_ended(directory: Path) -> None:
    tree = directory / "tree"
    with (
        running_broker(directory, policy(tree), stop=False) as broker,
        Speaker.connect(broker.socket) as other,
        Speaker.connect(broker.socket) as stuck,
        held_opens(tree / "held") as listener,
    ):
        assert other.open_one(bytes(tree / "file")).content == b"file"
        began = time.monotonic()
        stuck.send(encode_open(7, [bytes(tree / "held")]))
        assert listener.wait_until_asked() == broker.pid
        assert broker.process.wait(timeout=20) == -signal.SIGALRM
        assert 2 < time.monotonic() - began < 4


@pytest.mark.root
def test_an_idle_broker_lives_on_and_serves(directory: Path) -> None:
    tree = directory / "tree"
    with running_broker(directory, policy(tree)) as broker, Speaker.connect(broker.socket) as speaker:
        assert speaker.open_one(bytes(tree / "file")).content == b"file"
        ended = select.poll()
        pidfd = os.pidfd_open(broker.pid)
        ended.register(pidfd, select.POLLIN)
        assert not ended.poll((STUCK_SECONDS + 1.5) * 1000)
        os.close(pidfd)
        assert speaker.open_one(bytes(tree / "file")).content == b"file"


def test_a_long_request_tells_the_watchdog_that_it_goes_on(tmp_path: Path) -> None:
    """Each path may have to wait for a slow disk; many of them are no reason to be ended."""
    (tmp_path / "file").write_bytes(b"content")
    path = bytes(tmp_path / "file")
    pings: list[int] = []
    with SteppedBroker(tmp_path) as broker:
        proc_self_fd = broker.proc_self_fd
        opener = Opener(broker.roots, proc_self_fd, lambda: pings.append(len(descriptors)))
        speaker = broker.join()
        connection = next(iter(broker.broker._connections.values()))
        asker = broker.broker._dispatch.own_asker(connection)
        descriptors: list[int] = []
        assert len(opener.open(asker, [path] * MAX_PATHS, descriptors)) == MAX_PATHS
        assert pings == [64, 128, 192, MAX_PATHS]
        close_all(descriptors)
        opener.stat(asker, path)
        assert len(pings) == 5
        speaker.close()


def test_a_long_walk_tells_the_watchdog_that_it_goes_on(tmp_path: Path) -> None:
    for number in range(600):
        (tmp_path / f"{number}.txt").write_bytes(b"content")
    pings: list[int] = []
    with SteppedBroker(tmp_path) as broker:
        broker.join()
        connection = next(iter(broker.broker._connections.values()))
        asker = broker.broker._dispatch.own_asker(connection)
        request = WalkRequest(
            5, bytes(tmp_path), b"", WalkFilter(), descriptors=True, credit=1, most=MAX_PATHS
        )

        def ping() -> None:
            pings.append(1)

        walk = Walk(request, broker.roots, asker.view, asker.uid, broker.proc_self_fd, ping)
        given = 0
        while True:
            before = len(pings)
            batch = walk.step(MAX_PATHS)
            given += len(batch.descriptors)
            close_all(batch.descriptors)
            assert (len(pings) - before) * 64 >= len(batch.entries)
            if batch.end is not None:
                break
    assert given == 600
