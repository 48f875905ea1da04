"""Who is served by which helper, and when it is given up: with a clock that is set."""

from __future__ import annotations

import errno
from typing import TypeVar

from hypothesis import given
from hypothesis import strategies as st

from fdbroker.broker.helper_messages import (
    DELIVER,
    DELIVERED,
    FREE,
    LOOK,
    OPEN,
    RELEASE,
    REPORT,
    decode_order,
    decode_told,
    encode_deliver,
    encode_delivered,
    encode_free,
    encode_job,
    encode_release,
    encode_report,
)
from fdbroker.broker.helper_pool import (
    HELPERS,
    JOB_SECONDS,
    QUEUE_SECONDS,
    STEP_SECONDS,
    Answer,
    Begin,
    Delivered,
    Delivery,
    Effect,
    GivenUp,
    HelperPool,
    Job,
    JobAnswer,
    JobPath,
    ObjectFacts,
    Release,
    Replace,
    Report,
)
from fdbroker.kernel.files import FilesystemFacts

OPENED = Report(opened=True)
_Kind = TypeVar("_Kind")


class Pool:
    """A pool, its clock, and what came out of it."""

    def __init__(self) -> None:
        self.pool = HelperPool()
        self.now = 100.0
        self.answers: dict[str, JobAnswer] = {}
        self.effects: list[Effect] = []

    def submit(self, name: str, uid: int = 1, paths: int = 1, owner: object = None) -> None:
        def done(answer: JobAnswer) -> None:
            assert name not in self.answers, "it is answered once"
            self.answers[name] = answer

        asked = [JobPath(3, b"/%d" % number) for number in range(paths)]
        job = Job(asked, opens=True, client_uid=uid, owner=owner, done=done)
        self.pool.submit(job, self.now)
        self.collect()

    def collect(self) -> None:
        for effect in self.pool.take_effects():
            self.effects.append(effect)
            if isinstance(effect, Answer):
                effect.job.done(effect.answer)
            elif isinstance(effect, Delivered):
                effect.done(effect.delivery)

    def take(self, kind: type[_Kind]) -> list[_Kind]:
        taken: list[_Kind] = []
        kept: list[Effect] = []
        for effect in self.effects:
            if isinstance(effect, kind):
                taken.append(effect)
            else:
                kept.append(effect)
        self.effects = kept
        return taken

    def report(self, begun: Begin, *reports: Report) -> None:
        for index, report in enumerate(reports):
            self.pool.reported(begun.slot, begun.number, index, report, self.now)
        self.collect()

    def free(self, begun: Begin) -> None:
        self.pool.free(begun.slot, begun.number, self.now)
        self.collect()

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.pool.expire(self.now)
        self.collect()


def test_a_job_goes_to_a_helper_and_its_reports_come_back() -> None:
    pool = Pool()
    pool.submit("a", paths=2)
    [begun] = pool.take(Begin)
    pool.report(begun, OPENED, Report(errno=errno.ENOENT))
    assert pool.answers["a"] == JobAnswer(begun.number, [OPENED, Report(errno=errno.ENOENT, place=1)])
    deliveries: list[Delivery] = []
    assert pool.pool.deliver(begun.number, deliveries.append, pool.now) == begun.slot
    pool.pool.delivered(begun.slot, begun.number, Delivery(0, 12), pool.now)
    pool.collect()
    assert deliveries == [Delivery(0, 12)]
    pool.free(begun)
    assert pool.pool.next_deadline() is None


def test_one_client_has_at_most_half_of_the_helpers_and_the_rest_waits() -> None:
    pool = Pool()
    for number in range(5):
        pool.submit(f"greedy {number}", uid=1)
    assert len(pool.take(Begin)) == HELPERS // 2
    pool.submit("other", uid=2)
    [begun] = pool.take(Begin)
    assert begun.job.client_uid == 2


def test_those_who_wait_take_turns_by_uid() -> None:
    pool = Pool()
    begun = []
    for uid in (1, 2):
        for number in range(4):
            pool.submit(f"{uid} {number}", uid=uid)
    pool.submit("3 0", uid=3)
    order = []
    begun = pool.take(Begin)
    while begun:
        first = begun.pop(0)
        order.append(first.job.client_uid)
        pool.report(first, Report(errno=errno.ENOENT))
        pool.free(first)
        begun += pool.take(Begin)
    assert sorted(order) == [1] * 4 + [2] * 4 + [3]
    assert order.index(3) <= 5, "it does not wait for all jobs of the others"


def test_a_path_that_takes_too_long_is_answered_and_its_helper_replaced() -> None:
    pool = Pool()
    pool.submit("a", paths=2)
    [begun] = pool.take(Begin)
    pool.report(begun, Report(errno=errno.ENOENT))
    pool.pass_time(STEP_SECONDS - 0.1)
    assert not pool.answers
    pool.pass_time(0.2)
    assert pool.answers["a"].reports == [Report(errno=errno.ENOENT), Report("timed_out")]
    [replaced] = pool.take(Replace)
    assert replaced.slot == begun.slot
    [given_up] = pool.take(GivenUp)
    assert (given_up.reason, given_up.client_uid, given_up.path) == ("timed_out", 1, b"/1")
    # What it says now is not taken for an answer to anything.
    pool.report(begun, OPENED, OPENED, OPENED)
    pool.free(begun)
    pool.submit("b")
    [again] = pool.take(Begin)
    assert again.slot != begun.slot
    pool.pool.started(replaced.slot, replaced.serial, pool.now)


def test_the_other_paths_of_a_request_are_opened_by_another_helper() -> None:
    pool = Pool()
    pool.submit("a", paths=4)
    [first] = pool.take(Begin)
    pool.report(first, OPENED, Report(errno=errno.ENOENT))  # /2 hangs; what was opened is lost
    pool.pass_time(STEP_SECONDS)
    [second] = pool.take(Begin)
    assert second.slot != first.slot
    assert [path.path for path in second.paths] == [b"/0", b"/3"]
    pool.report(second, OPENED, OPENED)
    answer = pool.answers["a"]
    assert answer.number == second.number
    assert [(report.problem, report.errno, report.opened) for report in answer.reports] == [
        (None, 0, True),
        (None, errno.ENOENT, False),
        ("timed_out", 0, False),
        (None, 0, True),
    ]
    assert [report.place for report in answer.reports if report.opened] == [0, 1]


def test_a_request_of_which_two_paths_hang_is_given_up() -> None:
    pool = Pool()
    pool.submit("a", paths=6)
    [begun] = pool.take(Begin)
    pool.report(begun, OPENED)
    pool.pass_time(STEP_SECONDS)
    [begun] = pool.take(Begin)
    pool.report(begun, OPENED, OPENED)
    pool.pass_time(STEP_SECONDS)
    assert pool.answers["a"].reports == [Report("timed_out")] * 6
    assert not pool.take(Begin)


def test_paths_that_are_slow_but_not_stuck_end_with_their_job() -> None:
    pool = Pool()
    pool.submit("a", paths=100)
    [begun] = pool.take(Begin)
    for index in range(100):
        if "a" in pool.answers:
            break
        pool.pool.reported(begun.slot, begun.number, index, Report(errno=errno.ENOENT), pool.now)
        pool.pass_time(STEP_SECONDS - 0.5)
    assert pool.now - 100 < JOB_SECONDS + STEP_SECONDS
    reports = pool.answers["a"].reports
    assert reports[0] == Report(errno=errno.ENOENT)
    assert reports[-1] == Report("timed_out")


def test_a_job_does_not_wait_for_ever_for_a_helper() -> None:
    pool = Pool()
    for uid in (1, 2):
        for number in range(2):
            pool.submit(f"{uid} {number}", uid=uid)
    for _ in range(5):
        for begun in pool.take(Begin):
            pool.report(begun, OPENED)
    pool.submit("late", uid=3)
    pool.take(Release)
    # All helpers are given up, and no other one starts.
    waited = 0.0
    while "late" not in pool.answers:
        pool.pass_time(1)
        waited += 1
    assert waited <= QUEUE_SECONDS
    assert pool.answers["late"].reports == [Report("timed_out")]


def test_too_many_jobs_and_too_many_stuck_processes_are_refused() -> None:
    pool = Pool()
    for number in range(200):
        pool.submit(str(number))
    refused = [name for name, answer in pool.answers.items() if answer.reports == [Report("limit")]]
    assert len(refused) == 200 - HELPERS // 2 - 64
    stuck = Pool()
    given_up = 0
    while given_up < 100:
        stuck.submit(f"stuck {given_up}")
        begun = stuck.take(Begin)
        if not begun:
            break
        stuck.pass_time(STEP_SECONDS)
        for replaced in stuck.take(Replace):
            stuck.pool.started(replaced.slot, replaced.serial, stuck.now)
        given_up += 1
    assert given_up == 8
    stuck.submit("of another", uid=2)
    assert stuck.take(Begin)
    # The kernel tells that one has ended: the first, which had its slot's number.
    stuck.pool.ended(0, 0, stuck.now)
    stuck.submit("again")
    assert "again" not in stuck.answers


def test_what_is_held_for_nobody_is_released_and_a_late_delivery_is_told_so() -> None:
    pool = Pool()
    pool.submit("a")
    [begun] = pool.take(Begin)
    pool.report(begun, OPENED)
    pool.pass_time(STEP_SECONDS)
    assert [effect.number for effect in pool.take(Release)] == [begun.number]
    deliveries: list[Delivery] = []
    assert pool.pool.deliver(begun.number, deliveries.append, pool.now) is None
    pool.collect()
    assert deliveries == [Delivery(errno.ETIMEDOUT, 0)]
    # Closing may hang as well.
    pool.pass_time(STEP_SECONDS)
    assert [effect.slot for effect in pool.take(Replace)] == [begun.slot]


def test_a_delivery_of_which_nothing_is_heard_ends_the_connection() -> None:
    pool = Pool()
    pool.submit("a")
    [begun] = pool.take(Begin)
    pool.report(begun, OPENED)
    deliveries: list[Delivery] = []
    pool.pool.deliver(begun.number, deliveries.append, pool.now)
    pool.pass_time(STEP_SECONDS)
    assert deliveries == [Delivery(errno.ETIMEDOUT, None)]
    assert pool.take(Replace)


def test_what_a_client_that_is_gone_asked_for_is_dropped() -> None:
    pool = Pool()
    gone = object()
    for number in range(3):
        pool.submit(f"gone {number}", owner=gone)
    first, second = pool.take(Begin)
    pool.report(first, OPENED)
    pool.answers.clear()
    pool.pool.cancel(gone, pool.now)
    pool.collect()
    assert [effect.number for effect in pool.take(Release)] == [first.number]
    pool.report(second, OPENED)
    assert [effect.number for effect in pool.take(Release)] == [second.number]
    pool.free(first)
    assert not pool.take(Begin)
    assert not pool.answers


def test_a_helper_that_ended_by_itself_is_replaced_when_it_is_needed() -> None:
    pool = Pool()
    pool.submit("a")
    [begun] = pool.take(Begin)
    pool.pool.ended(begun.slot, begun.slot, pool.now)
    pool.collect()
    assert pool.answers["a"].reports == [Report("helper_ended")]
    for slot in range(HELPERS):
        pool.pool.ended(slot, slot, pool.now)
    assert not pool.take(Replace)
    pool.submit("b")
    [replaced] = pool.take(Replace)
    assert not pool.take(Begin)
    pool.pool.started(replaced.slot, replaced.serial, pool.now)
    pool.collect()
    assert pool.take(Begin)


def test_without_a_starter_everything_is_answered_at_once() -> None:
    pool = Pool()
    for number in range(4):
        pool.submit(f"before {number}")
    pool.pool.all_ended()
    pool.collect()
    pool.submit("after")
    assert {answer.reports[0].problem for answer in pool.answers.values()} == {"helper_ended"}
    assert len(pool.answers) == 5
    assert pool.pool.next_deadline() is None


@given(st.lists(st.tuples(st.sampled_from("srfdxet"), st.integers(0, 3), st.integers(0, 5)), max_size=80))
def test_every_job_is_answered_once_whatever_happens(steps: list[tuple[str, int, int]]) -> None:
    pool = Pool()
    submitted = 0
    begun: list[Begin] = []
    starting: list[Replace] = []
    deliveries: list[Delivery] = []
    asked = 0
    for what, which, number in steps:
        if what == "s":
            pool.submit(str(submitted), uid=which, paths=1 + number)
            submitted += 1
        elif what == "x":
            pool.pass_time(number)
        elif what == "t" and starting:
            replaced = starting.pop(0)
            pool.pool.started(replaced.slot, replaced.serial, pool.now)
        elif what == "e":
            pool.pool.ended(which, number, pool.now)
        elif begun:
            job = begun[which % len(begun)]
            if what == "r":
                pool.report(job, *[OPENED if number % 2 else Report(errno=1)] * len(job.job.paths))
            elif what == "f":
                pool.free(job)
            elif what == "d":
                asked += 1
                pool.pool.deliver(job.number, deliveries.append, pool.now)
        pool.collect()
        begun += pool.take(Begin)
        starting += pool.take(Replace)
    for _ in range(20):
        pool.pass_time(STEP_SECONDS)
    assert len(pool.answers) == submitted
    assert len(deliveries) == asked
    assert pool.pool.next_deadline() is None


# The messages

NUMBERS = st.integers(0, 2**64 - 1)
PATHS = st.lists(st.builds(JobPath, st.integers(0, 2**31 - 1), st.binary(max_size=50), st.booleans()))


@given(NUMBERS, PATHS, st.booleans())
def test_a_job_arrives_as_it_was_sent(number: int, paths: list[JobPath], opens: bool) -> None:  # noqa: FBT001
    order = decode_order(encode_job(number, paths, opens=opens))
    assert (order.what, order.number, order.paths) == (OPEN if opens else LOOK, number, paths)


@given(NUMBERS, st.lists(st.integers(-253, 252), max_size=253), st.binary(max_size=100))
def test_a_delivery_arrives_as_it_was_sent(number: int, places: list[int], frame: bytes) -> None:
    order = decode_order(encode_deliver(number, places, frame))
    assert (order.what, order.number, list(order.places), order.frame) == (DELIVER, number, places, frame)
    assert decode_order(encode_release(number))[:2] == (RELEASE, number)


FACTS = st.builds(
    ObjectFacts,
    NUMBERS,
    NUMBERS,
    st.integers(0, 2**32 - 1),
    NUMBERS,
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
    *[st.integers(-(2**63), 2**63 - 1)] * 3,
)
FILESYSTEMS = st.builds(FilesystemFacts, st.integers(0, 2**32 - 1), NUMBERS)


@given(NUMBERS, st.integers(0, 252), FACTS, FILESYSTEMS, st.booleans(), st.booleans())
def test_a_report_arrives_as_it_was_sent(
    number: int,
    place: int,
    facts: ObjectFacts,
    filesystem: FilesystemFacts,
    opened: bool,  # noqa: FBT001 - likewise
    lost: bool,  # noqa: FBT001 - likewise
) -> None:
    report = Report(facts=facts, filesystem=filesystem, opened=opened, lost_its_name=lost)
    told = decode_told(encode_report(number, place, report))
    assert (told.what, told.number, told.place, told.report) == (REPORT, number, place, report)
    failed = Report(errno=errno.ENOENT)
    assert decode_told(encode_report(number, place, failed)).report == failed
    delivered = decode_told(encode_delivered(number, errno.EPIPE, 7))
    assert delivered[:5] == (DELIVERED, number, 0, errno.EPIPE, 7)
    assert decode_told(encode_free(number))[:2] == (FREE, number)
