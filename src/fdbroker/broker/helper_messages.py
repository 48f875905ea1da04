"""What the broker and its open helpers tell each other: fixed binary messages, one per datagram.

Both ends are forks of one process, so there are no versions. A message that
is not understood is a bug, and raises.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

from fdbroker.broker.helper_pool import JobPath, ObjectFacts, Report
from fdbroker.kernel.files import FilesystemFacts

if TYPE_CHECKING:
    from collections.abc import Sequence

# To a helper.
OPEN = 1
LOOK = 2
DELIVER = 3
RELEASE = 4
# From a helper.
REPORT = 5
DELIVERED = 6
FREE = 7

# A job has the paths of one frame of a client.
LONGEST_TO_HELPER = 1 << 17
LONGEST_FROM_HELPER = 256

_HEAD = struct.Struct("=BxHQ")  # type, count, number of the job
_PATH = struct.Struct("=iHB")  # the root's descriptor, length, whether to check the name
_TOLD = struct.Struct("=BBHiIQ")  # type, flags, index, errno, bytes sent, number of the job
_FACTS = struct.Struct("=QQIQIIqqIqIQQ")  # mtime and ctime in seconds and nanoseconds
_SECOND = 1_000_000_000
_OPENED, _LOST = 1, 2

_SLOT = struct.Struct("=BBxxI")  # what, slot, serial
START = 8
STARTED = 9
ENDED = 10
LONGEST_TO_STARTER = _SLOT.size


class Order(NamedTuple):
    """What a helper is told. `paths` of OPEN and LOOK; the rest of DELIVER: see `encode_deliver`."""

    what: int
    number: int
    paths: Sequence[JobPath] = ()
    places: Sequence[int] = ()
    frame: bytes = b""


class Told(NamedTuple):
    """What a helper tells: REPORT, DELIVERED with `errno` and `sent`, or FREE.

    REPORT comes with `report`, and the `place` of its path in the job.
    """

    what: int
    number: int
    place: int
    errno: int
    sent: int
    report: Report


def encode_job(number: int, paths: Sequence[JobPath], *, opens: bool) -> bytes:
    """Return the message by which a job begins."""
    parts = [_HEAD.pack(OPEN if opens else LOOK, len(paths), number)]
    for root, path, check_name in paths:
        parts += (_PATH.pack(root, len(path), check_name), path)
    return b"".join(parts)


def encode_deliver(number: int, places: Sequence[int], frame: bytes) -> bytes:
    """Return the message that comes with a socket to send on, and then with descriptors to send.

    `places` are those of what is sent, in order: n for what the helper opened
    for path n of the job, -1 - n for descriptor n of those that come with the message.
    """
    places_text = struct.pack(f"={len(places)}h", *places)
    head = _HEAD.pack(DELIVER, len(places), number)
    return head + places_text + frame


def encode_release(number: int) -> bytes:
    """Return the message to let go of what was opened."""
    return _HEAD.pack(RELEASE, 0, number)


def decode_order(data: bytes) -> Order:
    """Return what a helper is told."""
    what, count, number = _HEAD.unpack_from(data)
    at = _HEAD.size
    if what in {OPEN, LOOK}:
        paths = []
        for _ in range(count):
            root, length, check_name = _PATH.unpack_from(data, at)
            at += _PATH.size
            paths.append(JobPath(root, data[at : at + length], bool(check_name)))
            at += length
        return Order(what, number, paths)
    if what == RELEASE:
        return Order(what, number)
    if what != DELIVER:
        raise ValueError(f"a helper was told {what}, which is nothing")
    places = struct.unpack_from(f"={count}h", data, at)
    at += 2 * count
    return Order(what, number, (), places, data[at:])


def encode_report(number: int, index: int, report: Report) -> bytes:
    """Return what is said of one path."""
    flags = report.opened * _OPENED | report.lost_its_name * _LOST
    head = _TOLD.pack(REPORT, flags, index, report.errno, 0, number)
    if report.facts is None or report.filesystem is None:
        return head
    times = (*divmod(report.facts.st_mtime_ns, _SECOND), *divmod(report.facts.st_ctime_ns, _SECOND))
    return head + _FACTS.pack(*report.facts[:7], *times, *report.filesystem)


def encode_delivered(number: int, error: int, sent: int) -> bytes:
    """Return what is said after a delivery."""
    return _TOLD.pack(DELIVERED, 0, 0, error, sent, number)


def encode_free(number: int) -> bytes:
    """Return what is said when nothing is open any more."""
    return _TOLD.pack(FREE, 0, 0, 0, 0, number)


def decode_told(data: bytes) -> Told:
    """Return what a helper tells.

    Raises:
        ValueError, struct.error: it is not that.

    """
    what, flags, index, error, sent, number = _TOLD.unpack_from(data)
    facts = filesystem = None
    if len(data) > _TOLD.size:
        values = _FACTS.unpack_from(data, _TOLD.size)
        times = (values[7] * _SECOND + values[8], values[9] * _SECOND + values[10])
        facts, filesystem = ObjectFacts(*(values[:7] + times)), FilesystemFacts(*values[11:])
    if what not in {REPORT, DELIVERED, FREE} or (what == REPORT and not error and facts is None):
        raise ValueError(f"a helper told {data[: _TOLD.size]!r}")
    report = Report(
        errno=error,
        facts=facts,
        filesystem=filesystem,
        opened=bool(flags & _OPENED),
        lost_its_name=bool(flags & _LOST),
    )
    return Told(what, number, index, error, sent, report)


def encode_slot(what: int, slot: int, serial: int) -> bytes:
    """Return START to the starter of helpers, or STARTED or ENDED from it."""
    return _SLOT.pack(what, slot, serial)


def decode_slot(data: bytes) -> tuple[int, int, int]:
    """Return the same: what, slot, serial."""
    what, slot, serial = _SLOT.unpack(data)
    return what, slot, serial
