"""Token buckets, against a model that counts tokens in fractions."""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdbroker.broker.buckets import Buckets
from fdbroker.policy.rules import Rate

SECOND = 1_000_000_000
UIDS = range(3)
rates = st.builds(
    Rate, st.sampled_from(["requests", "opens"]), st.integers(1, 1_000_000), st.integers(1, 300)
)
# Short waits and long ones, all of them in nanoseconds.
waits = st.integers(0, 3) | st.integers(0, SECOND // 10) | st.integers(0, 100 * SECOND)


class Take(NamedTuple):
    uid: int
    wanted: int
    after: int


takes = st.lists(st.builds(Take, st.sampled_from(UIDS), st.integers(0, 400), waits), max_size=40)


class Model:
    """As many tokens as a bucket holds, one more after each interval."""

    def __init__(self, rate: Rate) -> None:
        self.interval = -(-SECOND // rate.per_second)
        self.burst = rate.burst
        self.tokens = Fraction(rate.burst)
        self.at = 0

    def take(self, wanted: int, now: int) -> int:
        self.tokens = min(Fraction(self.burst), self.tokens + Fraction(now - self.at, self.interval))
        self.at = now
        taken = min(wanted, int(self.tokens))
        self.tokens -= taken
        return taken


@given(rates, takes)
def test_a_bucket_gives_what_a_count_of_tokens_gives(rate: Rate, asked: list[Take]) -> None:
    buckets, models, now = Buckets(), {uid: Model(rate) for uid in UIDS}, 5
    for uid, wanted, after in asked:
        now += after
        left = buckets.left(rate, uid, now)
        assert 0 <= left <= rate.burst
        taken = buckets.take(rate, uid, wanted, now)
        assert taken == models[uid].take(wanted, now) == min(wanted, left)
        assert buckets.left(rate, uid, now) == left - taken


@given(rates, takes)
def test_never_more_is_given_than_the_burst_and_the_rate_allow(rate: Rate, asked: list[Take]) -> None:
    buckets, now, given_so_far = Buckets(), 0, 0
    for _, wanted, after in asked:
        now += after
        given_so_far += buckets.take(rate, 0, wanted, now)
        assert given_so_far <= rate.burst + now * rate.per_second / SECOND


@given(rates, takes)
def test_what_is_to_be_waited_for_is_there_then_and_not_before(rate: Rate, asked: list[Take]) -> None:
    buckets, now = Buckets(), 0
    for _, wanted, after in asked:
        now += after
        buckets.take(rate, 0, wanted, now)
        wait = buckets.wait(rate, 0, now)
        assert (wait == 0) is (buckets.left(rate, 0, now) > 0)
        assert buckets.left(rate, 0, now + wait) >= 1
        if wait:
            assert buckets.left(rate, 0, now + wait - 1) == 0


def test_what_is_refused_costs_nothing() -> None:
    buckets, rate = Buckets(), Rate("opens", 10, 5)
    assert buckets.take(rate, 1, 8, 0) == 5
    for _ in range(100):
        assert buckets.take(rate, 1, 8, 0) == 0
    assert buckets.take(rate, 1, 8, SECOND // 10) == 1


@pytest.mark.parametrize("other", [Rate("requests", 10, 5), Rate("opens", 11, 5), Rate("opens", 10, 6)])
def test_another_rate_has_other_buckets_and_the_same_one_keeps_them(other: Rate) -> None:
    """So a policy that is loaded anew finds them as full as they were."""
    buckets = Buckets()
    assert buckets.take(Rate("opens", 10, 5), 1, 5, 0) == 5
    assert buckets.left(Rate("opens", 10, 5), 1, 0) == 0
    assert buckets.left(other, 1, 0) == other.burst
    assert buckets.left(Rate("opens", 10, 5), 2, 0) == 5


def test_full_buckets_are_forgotten_first() -> None:
    buckets, rate = Buckets(most=100), Rate("opens", 1, 100)
    for uid in range(50):
        buckets.take(rate, uid, 1, 0)  # full after a second
    for uid in range(50, 100):
        buckets.take(rate, uid, 100, 0)
    buckets.take(rate, 100, 100, 2 * SECOND)
    assert len(buckets) == 51
    assert all(buckets.left(rate, uid, 2 * SECOND) == 2 for uid in range(50, 100))


@given(st.integers(2, 50), st.lists(st.tuples(st.integers(0, 10_000), st.integers(1, 9)), max_size=400))
def test_there_is_an_end_to_what_many_uids_leave_behind(most: int, asked: list[tuple[int, int]]) -> None:
    buckets, rate = Buckets(most), Rate("opens", 1, 10)
    for now, (uid, wanted) in enumerate(asked):
        buckets.take(rate, uid, wanted, now)
        assert len(buckets) <= most


def test_who_has_taken_most_is_remembered_however_many_others_come() -> None:
    buckets, rate = Buckets(most=64), Rate("opens", 1, 1000)
    assert buckets.take(rate, 0, 1000, 0) == 1000
    for uid in range(1, 70_000):
        buckets.take(rate, uid, 1, uid)
        assert buckets.left(rate, 0, uid) == 0
