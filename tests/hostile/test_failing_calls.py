"""Each system call on the way to an answer fails in turn, in a broker that runs, and nothing wrong is given.

strace makes one call of the confined process fail, with an errno that the kernel
would give; the client then hears a denial, an error, or the end of its
connection, the audit has it, nothing stays open, and the next client is served
as ever. A few of them by default; `make hostile` takes all.
"""

from __future__ import annotations

import collections
import itertools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from tests.broker.speaking import path_of
from tests.hostile.sessions import CONTENT, DESCRIBED, NEVER, SESSIONS, Served, Session, served
from tests.hostile.tracing import INJECTED, calls, failing, traced
from tests.processes import children_of, wait_until
from tests.running_broker import reachable_directory

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.root, pytest.mark.unmeasured]

IN_FULL = bool(os.environ.get("FDBROKER_HOSTILE"))
ERRNOS = ("EIO", "ENOMEM", "EMFILE", "EINTR", "EACCES", "ENOSPC")
# What a call can fail with where it is not any of these, by the kernel's own sources.
ONLY = {
    "epoll_wait": ("EINTR",),  # else: EBADF, EFAULT, EINVAL
    "poll": ("EINTR", "ENOMEM"),
    "ppoll": ("EINTR", "ENOMEM"),
    "epoll_ctl": ("ENOMEM", "ENOSPC"),
    "mmap": ("ENOMEM", "EAGAIN"),
    "mremap": ("ENOMEM", "EAGAIN"),
    "brk": ("ENOMEM",),
}
# Never a failure, but of an argument that is wrong. Closing says what flushing gave: there is none of an
# O_PATH descriptor, nor of a file of a local file system; others are opened and closed by helpers.
NEVER_FAIL = frozenset(
    "setitimer munmap madvise shutdown gettid getpid exit_group close close_range TIOCOUTQ".split()  # noqa: SIM905
)
# The first one adds a connection; the others change what is waited for, which takes nothing that runs out.
FIRST_ALONE = {"epoll_ctl"}
# Members of a record that say what became of a request.
TOLD = ("decision", "reason", "rule", "entries", "descriptors", "incomplete")
# By these, what may be named is found, or described, though nothing of it may be opened.
NAMES_OF_ANY_KIND = {b"plain/link", b"plain/fifo", b"plain"}


class Case(NamedTuple):
    """The `nth` call of this name, from 1, of the broker or of its helpers."""

    call: str
    error: str
    nth: int


@pytest.fixture
def place() -> Iterator[Served]:
    with reachable_directory() as directory, served(directory) as made:
        made.broker.starter_and_helpers()  # all of them are there
        yield made


def helpers_of(place: Served) -> list[int]:
    """Return the helpers that are there: one that has ended is replaced when it is needed."""
    [starter] = children_of(place.broker.pid)
    return children_of(starter)


def cases(found: list[str], *, full: bool) -> Iterator[Case]:
    """Yield what is to fail, of the calls that were found."""
    turn = itertools.count()
    # The kernel's word on what was received is an ioctl that can't fail, and strace counts it with others.
    names = ["ioctl" if call == "TIOCOUTQ" else call for call in found]
    places: dict[str, list[int]] = {}
    for at, call in enumerate(found):
        # How often it is asked depends on when the client receives: behind it the count of ioctls shifts.
        if call not in NEVER_FAIL and not (call == "ioctl" and "TIOCOUTQ" in found[:at]):
            places.setdefault(call, []).append(names[: at + 1].count(names[at]))
    for call, nths in places.items():
        errors = ONLY.get(call, ERRNOS)
        chosen = nths[:1] if call in FIRST_ALONE else nths
        for nth in chosen if full else sorted({chosen[0], chosen[-1]}):
            for error in errors if full else [errors[next(turn) % len(errors)]]:
                yield Case(call, error, nth)


def check_that_nothing_is_given(session: Session) -> None:
    """Check that what was given is what may be had."""
    for got in session.got:
        if got.content is not None:
            assert CONTENT.get(got.path) == got.content, got
        if got.given and got.path in NEVER:
            assert got.path in NAMES_OF_ANY_KIND, got
            assert got.action in {"stat", "list", "named", "walk"}, got


def what_is_said(records: list[dict[str, Any]], place: Served) -> collections.Counter[str]:
    """Return what records say, without who asked and when: twice the same where the same becomes of it."""
    return collections.Counter(
        f"{record['event']} {place.name(path_of(record)) if 'path' in record else b''!r} "
        f"{[record.get(name) for name in TOLD]} {[name for name in record if name.startswith('left_out')]}"
        for record in records
    )


class Ordinary(NamedTuple):
    """What a client hears, and what is on record of it, where nothing fails."""

    session: Session
    said: collections.Counter[str]


def ordinary_of(place: Served, name: str) -> Ordinary:
    """Have a client ask, and return what comes of it."""
    recorded = place.broker.recorded()
    session = SESSIONS[name](place)
    return Ordinary(session, what_is_said(recorded_since(place, name, recorded), place))


def recorded_since(place: Served, name: str, recorded: int) -> list[dict[str, Any]]:
    """Return the records about a session, behind so many bytes of others."""
    new = place.broker.records(recorded)
    if name == "send_datagrams":  # a description is asked for to see that there is no answer before it
        # Its own answer may find nobody any more.
        return [record for record in new if record.get("request") != DESCRIBED]
    return new


def check_the_record(new: list[dict[str, Any]], place: Served, session: Session, ordinary: Ordinary) -> None:
    """Check that the audit has what was given, and, where something went another way, something of that."""
    decided: collections.Counter[bytes] = collections.Counter()
    for record in new:
        if record.get("decision") == "allow":
            decided[place.name(path_of(record))] += 1
    given = collections.Counter(
        got.path for got in session.got if got.given and got.action in {"open", "stat", "list"}
    )
    assert not given - decided, f"given without a record: {given - decided}"
    if session == ordinary.session:
        return
    assert what_is_said(new, place) != ordinary.said, "something failed, and the audit does not have it"
    if not session.got and decided:
        # Decided, and then not sent.
        assert told_as_not_sent(new), new


def try_one(
    place: Served,
    name: str,
    ordinary: Ordinary,
    case: Case,
    written: Path,
    most: int,
    *,
    of_helpers: bool = False,
) -> bool:
    """Have one call fail while a client asks, and check all that is to be seen. Return whether it was made.

    `most`: descriptors that the broker has when nobody is connected.
    """
    ask = SESSIONS[name]
    helpers, recorded = helpers_of(place), place.broker.recorded()
    with failing(helpers if of_helpers else [place.broker.pid], written, *case):
        session = ask(place)
        # In the middle of a call strace would leave the result of what was made in its place.
        wait_until(lambda: is_asleep(place.broker.pid), "the broker waits for the next client")
    new = recorded_since(place, name, recorded)
    if INJECTED not in written.read_text():
        return False
    assert place.broker.is_alive(), f"it died: {place.broker.errors()}"
    check_that_nothing_is_given(session)
    if case.call != "write":
        check_the_record(new, place, session, ordinary)
    assert ask(place) == ordinary.session, "the next client is not served"
    if case.call == "write" and session != ordinary.session:
        assert (
            how_many_are_given(session) < how_many_are_given(ordinary.session)
            or name == "ask_the_control_socket"
        )
        # What could not be written is told by the next record.
        events = [record.get("event") for record in place.broker.records(recorded)]
        assert "audit_failed" in events
    wait_until(lambda: len(place.broker.descriptors()) <= most, "what was opened is closed", 5)
    assert place.broker.errors() == "" or of_helpers
    return True


def told_as_not_sent(records: list[dict[str, Any]]) -> bool:
    events = {record.get("event") for record in records}
    return bool(events & {"undelivered", "partly_delivered", "failed", "helper_ended"})


@pytest.mark.parametrize("name", SESSIONS)
def test_whichever_call_of_the_broker_fails_it_is_a_denial_on_record(
    place: Served, tmp_path: Path, name: str
) -> None:
    most = len(place.broker.descriptors())
    ordinary = ordinary_of(place, name)
    assert ordinary.session.answered
    with traced([place.broker.pid], tmp_path / "calls"):
        assert SESSIONS[name](place) == ordinary.session
    missed = tried = 0
    for case in cases(calls((tmp_path / "calls").read_text()), full=IN_FULL):
        try:
            made = try_one(place, name, ordinary, case, tmp_path / "failed", most)
        except AssertionError as error:
            raise AssertionError(f"{name}, {case}: {error}\n{(tmp_path / 'failed').read_text()}") from error
        tried += 1
        missed += not made
    assert tried > 10
    assert missed <= tried / 10, f"{missed} of {tried} calls were not made again"


def test_whichever_call_of_a_helper_fails_it_is_a_denial_on_record(place: Served, tmp_path: Path) -> None:
    name = "open_by_helpers"
    most = len(place.broker.descriptors())
    ordinary = ordinary_of(place, name)
    with traced(helpers_of(place), tmp_path / "calls"):
        assert SESSIONS[name](place) == ordinary.session
    by_pid: dict[str, str] = {}
    for line in (tmp_path / "calls").read_text().splitlines(keepends=True):
        pid = line.partition(" ")[0]
        by_pid[pid] = by_pid.get(pid, "") + line
    # Whichever of them it is that works, it makes these calls; the others wait.
    longest = max(map(calls, by_pid.values()), key=len)
    made = 0
    for case in cases(longest, full=IN_FULL):
        try:
            made += try_one(place, name, ordinary, case, tmp_path / "failed", most, of_helpers=True)
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}\n{(tmp_path / 'failed').read_text()}") from error
    assert made > 10


def test_client_whose_helper_ends_before_it_sends_hears_the_end(place: Served, tmp_path: Path) -> None:
    """What it was to send lies in its queue, with the client's socket: closing ours does not end that."""
    # Whether the call in which a helper waits is counted as one depends on when strace got to it: a helper
    # that has received nothing yet, or has answered by now, is replaced by another, and the client answered.
    session = Session([], answered=True)
    recorded = place.broker.recorded()
    for attempt in range(5):
        told = tmp_path / f"failed-{attempt}"
        with failing(helpers_of(place), told, "recvmsg", "EIO", 2):
            session = SESSIONS["open_by_helpers"](place)
        if not session.answered:
            assert INJECTED in told.read_text()
            break
    assert session == Session([], answered=False)
    assert "undelivered" in {record.get("event") for record in place.broker.records(recorded)}


def how_many_are_given(session: Session) -> int:
    return sum(got.given for got in session.got)


def is_asleep(pid: int) -> bool:
    """Return whether a process waits, or is no more."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "SZ"
    except FileNotFoundError:
        return True
