"""Token buckets: how much of a rate each uid has left. Pure: who asks says what time it is.

A bucket is one number: the moment at which it will be full again, if nothing
more is taken (the generic cell rate algorithm). A full one is none at all, so
that uids which have rested cost nothing. Times are nanoseconds of a clock that
never goes back; all arithmetic is of integers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fdbroker.policy.rules import Rate

_SECOND = 1_000_000_000
# Who has subordinate uids has 65,536 of them: what they leave behind must have an end.
MOST_BUCKETS = 16_384


class Buckets:
    """What is left of each rate for each uid.

    Over `most` of them those are forgotten that are the first to be full: their uids get what they would
    have had a moment later.
    """

    def __init__(self, most: int = MOST_BUCKETS) -> None:
        self._most = most
        self._full_at: dict[tuple[Rate, int], int] = {}

    def __len__(self) -> int:
        """Return how many are remembered."""
        return len(self._full_at)

    def left(self, rate: Rate, uid: int, now: int) -> int:
        """Return how many a uid may take now: 0 to `rate.burst`."""
        missing = self._full_at.get((rate, uid), now) - now
        return rate.burst if missing <= 0 else rate.burst - -(-missing // _interval(rate))

    def take(self, rate: Rate, uid: int, wanted: int, now: int) -> int:
        """Take up to `wanted`; return how many there were."""
        key = (rate, uid)
        full_at = self._full_at.get(key, now)
        interval = _interval(rate)
        if full_at <= now:
            if full_at == now and len(self._full_at) >= self._most:
                self._forget(now)
            full_at, left = now, rate.burst
        else:
            left = rate.burst - -(-(full_at - now) // interval)
        taken = min(wanted, left)
        if taken > 0:
            self._full_at[key] = full_at + taken * interval
        return taken

    def wait(self, rate: Rate, uid: int, now: int) -> int:
        """Return in how many nanoseconds there is one to be taken; 0: there is one now."""
        missing = self._full_at.get((rate, uid), now) - now
        return max(0, missing - (rate.burst - 1) * _interval(rate))

    def _forget(self, now: int) -> None:
        """Make room: forget those that are full, and if that is not enough the half that will be first."""
        kept = {key: full_at for key, full_at in self._full_at.items() if full_at > now}
        if len(kept) > self._most // 2:
            latest = sorted(kept.items(), key=lambda item: item[1])[-(self._most // 2) :]
            kept = dict(latest)
        self._full_at = kept


def _interval(rate: Rate) -> int:
    """Return after how many nanoseconds there is one more: never sooner than the rate says."""
    return -(-_SECOND // rate.per_second)
