"""Many opens, by every transport: nothing grows, nothing is left open, nothing is missing in the audit.

Short by default; `make soak` makes it a million, and COUNT= another number.
"""

from __future__ import annotations

import os
import random
import struct
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from fdbroker.wire.client import OpenReply, encode_list, encode_open, encode_stat, encode_walk
from fdbroker.wire.format import Status, WalkKind
from fdbroker.wire.messages import WalkFilter
from tests.broker.speaking import DatagramSpeaker, Speaker, StreamSpeaker, frame, read_audit
from tests.processes import wait_until
from tests.soak.brokers import KINDS, Everywhere, served_everywhere

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.root

COUNT = int(os.environ.get("FDBROKER_SOAK") or 20_000)
STEPS = 10
MAY_GROW = 1024  # KiB from the first step on, when every kind of request was met, to the last


def resident(served: Everywhere) -> int:
    """Return the broker's memory in KiB."""
    return int(served.broker.status()["VmRSS"].split()[0])


class Soak:
    """Asks for many things, and counts the opens among them."""

    def __init__(self, served: Everywhere) -> None:
        self.served = served
        self.opens = 0
        self.given = 0
        self.followed = -1  # the last number that the audit had
        self.recorded: Counter[str] = Counter()
        self._random = random.Random(20_240_602)  # noqa: S311 - reproducible, not secret
        tree = served.tree
        names = [
            "file",
            "file",
            "file",
            "file",
            "directory/inner",
            "empty",
            "missing",
            "link",
            "directory",
            "fifo",
        ]
        self._paths = [*(bytes(tree / name) for name in names), b"/etc/passwd", b"relative", b""]

    def open(self, speaker: Speaker, count: int) -> None:
        """Open some files, good and bad, and read a byte of the first."""
        paths = self._random.choices(self._paths, k=count)
        answer = speaker.ask(encode_open(count, paths))
        assert isinstance(answer.reply, OpenReply)
        with answer.descriptors as descriptors:
            given = sum(result.status == Status.GIVEN for result in answer.reply.results)
            assert len(descriptors) == given
            for number in descriptors.numbers()[:1]:
                assert os.read(number, 1) in {b"c", b"i", b""}
        self.opens += count
        self.given += given

    def ask_otherwise(self, speaker: Speaker) -> None:
        """Ask for something else, be malformed, or go in the middle; the connection is used no more."""
        what = self._random.randrange(6)
        tree = bytes(self.served.tree)
        if what == 0:
            speaker.ask(encode_stat(1, self._paths))
        elif what == 1:
            speaker.ask(encode_list(1, tree))
        elif what == 2:
            speaker.error(frame(2, flags=128))
        elif what == 3:
            speaker.send(encode_open(1, [tree + b"/file"] * 20))
            self.opens += 20
            self.given += 20
            if isinstance(speaker, DatagramSpeaker):
                # Who is gone before the answer gets none, and who has exited is not asked for at all.
                answer = speaker.receive()
                assert answer is not None
                answer.descriptors.close()
            else:
                # It goes with its answer in the queue: once it is there, it was recorded.
                speaker.sock.recv(1, 2)  # MSG_PEEK
        elif isinstance(speaker, DatagramSpeaker):
            speaker.error(b"x")
        elif what == 4:
            speaker.send(encode_walk(1, tree, WalkFilter(WalkKind.REGULAR), credit=9, descriptors=True))
            answer = speaker.receive()
            assert answer is not None
            answer.descriptors.close()
        elif isinstance(speaker, StreamSpeaker):
            speaker.send_raw(struct.pack("<I", 100) + b"half")
        else:
            speaker.sock.send(b"")

    def some(self) -> None:
        """Come by one of the transports, ask for a while, and go."""
        with self.served.call(self._random.choice(KINDS)) as speaker:
            for _ in range(self._random.choice([1, 10, 50])):
                self.open(speaker, self._random.choice([1, 1, 2, 8, 64, 253]))
            self.ask_otherwise(speaker)

    def until(self, opens: int) -> None:
        """Go on until so many files were asked for."""
        while self.opens < opens:
            self.some()

    def check_audit(self) -> None:
        """Check that what was recorded since the last time follows what was there; begin a new file."""
        audit = self.served.broker.audit
        records = read_audit(audit.read_bytes())
        assert [record["seq"] for record in records] == list(
            range(self.followed + 1, self.followed + 1 + len(records))
        )
        self.followed += len(records)
        opens = [record for record in records if record["event"] == "open"]
        self.recorded.update(record["decision"] for record in opens)
        assert "audit_failed" not in {record["event"] for record in records}
        os.truncate(audit, 0)
        assert self.recorded.total() == self.opens
        assert self.recorded["allow"] == self.given


def test_a_broker_that_was_asked_for_many_files_is_as_it_was(
    reachable: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    started = time.monotonic()

    def say(text: str) -> None:
        if COUNT > 100_000:
            with capsys.disabled():
                sys.stdout.write(text + "\n")
                sys.stdout.flush()

    with served_everywhere(reachable) as served:
        idle = served.broker.descriptors()
        soak = Soak(served)
        memory: list[int] = []
        say(f"\n{COUNT:,} opens; memory may grow by {MAY_GROW:,} KiB from the first step to the last")
        for step in range(1, STEPS + 1):
            soak.until(COUNT * step // STEPS)
            wait_until(lambda: served.broker.descriptors() == idle, "the descriptors of before")
            soak.check_audit()
            memory.append(resident(served))
            say(
                f"{100 * step // STEPS:4} %  {soak.opens:9,} opens, {soak.given:9,} given"
                f"  memory {memory[-1]:6,} KiB  descriptors {len(idle)}  audit to {soak.followed:,}"
                f"  {time.monotonic() - started:6.1f} s"
            )
        with served.call(DatagramSpeaker) as speaker:
            speaker.stat(b"/")  # what was sent to senders of datagrams is looked at when one comes
        with served.call(Speaker) as speaker:
            totals = speaker.status()["totals"]
        assert (totals["in_flight"], totals["connections"], totals["audit_failures"]) == (0, 1, 0)
    assert max(memory) - memory[0] <= MAY_GROW, memory
