"""Walks driven by the test itself: no broker, no socket, the real file system."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any, NamedTuple

from fdbroker.broker.roots import hold_roots
from fdbroker.broker.walking import Walk
from fdbroker.kernel.descriptors import close_all
from fdbroker.kernel.files import open_proc_self_fd
from fdbroker.policy.decide import Policy
from fdbroker.policy.rules import ClientFacts, read_policy
from fdbroker.wire.client import WalkReply, decode_reply
from fdbroker.wire.format import MAX_REPLY
from fdbroker.wire.messages import GIVEN, WalkFilter, WalkRequest
from fdbroker.wire.replies import encode_walk_reply
from tests.running_broker import CLIENT_UID, policy

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from fdbroker.broker.walking import Batch
    from fdbroker.policy.decide import View
    from fdbroker.wire.messages import Result, WalkEnd, WalkEntry

UID = CLIENT_UID
EVERYTHING = WalkFilter()


class Found(NamedTuple):
    """What a walk gave in all; `contents` of what was opened, by path."""

    result: Result
    entries: list[WalkEntry]
    contents: dict[bytes, bytes]
    records: list[tuple[bytes, str]]
    end: WalkEnd

    @property
    def paths(self) -> list[bytes]:
        """The paths in the order in which they came."""
        return [entry.path for entry in self.entries]


class Ground:
    """A policy, its roots held, and walks there."""

    def __init__(self, document: dict[str, Any]) -> None:
        rules = Policy(read_policy(document))
        self.rules = rules.rule_set
        self.view: View = rules.view(ClientFacts(UID, frozenset()))
        self.roots = hold_roots(self.rules.roots, read_only_required=document["read_only_view"] == "required")
        self.start = self.rules.roots[0].path
        self._proc_self_fd = open_proc_self_fd()

    def close(self) -> None:
        """Let go of the roots."""
        close_all([*(root.descriptor for root in self.roots), self._proc_self_fd])

    def walk(
        self,
        asked: WalkFilter = EVERYTHING,
        *,
        start: bytes | None = None,
        behind: bytes = b"",
        descriptors: bool = False,
        most: int = 0,
    ) -> Walk:
        """Return a walk from `start` (the first root by default) that has not begun."""
        path = self.start if start is None else start
        request = WalkRequest(7, path, behind, asked, descriptors, 1, most)
        return Walk(request, self.roots, self.view, UID, self._proc_self_fd)

    def find(
        self,
        asked: WalkFilter = EVERYTHING,
        *,
        room: int = 64,
        start: bytes | None = None,
        behind: bytes = b"",
        descriptors: bool = False,
        most: int = 0,
    ) -> Found:
        """Walk to the end."""
        walk = self.walk(asked, start=start, behind=behind, descriptors=descriptors, most=most)
        return finish(walk, room)


def take(batch: Batch, contents: dict[bytes, bytes] | None = None) -> WalkReply:
    """Return a batch as its client would read it; put what its descriptors hold into `contents`."""
    frame = encode_walk_reply(7, 1, batch.result, batch.entries, batch.end)
    assert len(frame) <= MAX_REPLY
    reply = decode_reply(frame)
    assert isinstance(reply, WalkReply)
    opened = [entry for entry in reply.entries if entry.descriptor]
    try:
        assert len(opened) == len(batch.descriptors)
        for entry, descriptor in zip(opened, batch.descriptors, strict=True):
            facts = os.fstat(descriptor)
            assert (facts.st_dev, facts.st_ino) == (entry.stat.device, entry.stat.inode)
            assert os.get_blocking(descriptor)
            if contents is not None:
                contents[entry.path] = os.read(descriptor, 4096)
    finally:
        close_all(batch.descriptors)
    return reply


def finish(walk: Walk, room: int = 64) -> Found:
    """Go on to the end."""
    entries: list[WalkEntry] = []
    contents: dict[bytes, bytes] = {}
    records: list[tuple[bytes, str]] = []
    result: Result = GIVEN
    while True:
        batch = walk.step(room)
        records += zip(batch.paths, (outcome.record for outcome in batch.outcomes), strict=True)
        reply = take(batch, contents)
        assert len(reply.entries) <= room
        entries += reply.entries
        result = reply.result
        if reply.end is not None:
            return Found(result, entries, contents, records, reply.end)


@contextlib.contextmanager
def ground(tree: Path, *rules: dict[str, Any], **changes: object) -> Iterator[Ground]:
    """Give a policy for `tree` as its first root, everybody allowed everything by default."""
    made = Ground(policy(tree, *rules) | {"read_only_view": "off"} | changes)
    try:
        yield made
    finally:
        made.close()
