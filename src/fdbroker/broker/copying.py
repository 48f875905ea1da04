"""Contents of small files in the reply, where a rule delivers copies.

A copy is the file as it was at one moment: it is read whole, and what the kernel
says of it must be the same before and behind that.
"""

from __future__ import annotations

import os
import stat
import struct
from typing import TYPE_CHECKING

from fdbroker.broker.judging import Found, find, judge_file
from fdbroker.broker.outcomes import (
    MOST_KEPT,
    NEEDS_HELPER,
    Outcome,
    failure,
    kind_refused,
    object_refusal,
    refusal,
)
from fdbroker.kernel.descriptors import close_all
from fdbroker.kernel.files import UNTOUCHED, open_regular_entries, reopen_for_reading, stat_record
from fdbroker.wire.format import ANY_TIME, HEADER, MAX_COPY, MAX_REPLY, RESULT, Reason, Status
from fdbroker.wire.messages import GIVEN, copied, refused

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fdbroker.broker.dispatch import Asker
    from fdbroker.broker.links import Follower
    from fdbroker.broker.roots import HeldRoot
    from fdbroker.policy.decide import NameDecision
    from fdbroker.policy.rules import Rule

_MODE_AND_SIZE = struct.Struct("=12xH10xQ")  # of a stat record
_MOST_AT_ONCE = 64  # files that are opened to be copied; of empty ones, more have room in a reply


class Copier:
    """Reads what may be copied."""

    def __init__(
        self, roots: Sequence[HeldRoot], proc_self_fd: int, follower: Follower, ping: Callable[[], None]
    ) -> None:
        self._roots = roots
        self._proc_self_fd = proc_self_fd
        self._follower = follower
        self._ping = ping
        self._copied_as: dict[tuple[Rule | None, int], Outcome] = {}

    def open_or_copy(
        self,
        asker: Asker,
        paths: Sequence[bytes],
        descriptors: list[int],
        copies: list[bytes],
        open_paths: Callable[[Asker, Sequence[bytes], list[int]], list[Outcome]],
    ) -> list[Outcome]:
        """Give the contents of small files where a rule delivers copies, else as `open_paths` does.

        Appends each copy to `copies`, in order; no more than a reply has room for.
        """
        room = MAX_REPLY - HEADER.size - RESULT.size * len(paths)
        may_copy, may_open = (asker.view.actions[action].decide for action in ("copy", "open"))
        decisions = [may_copy(path) for path in paths]
        plain: dict[int, tuple[int, bytes | OSError]] = {}
        outcomes = []
        try:
            self._open_plain(decisions, paths, plain)
            for index, (path, decision) in enumerate(zip(paths, decisions, strict=True)):
                self._ping()
                if not decision.allowed:
                    outcomes += open_paths(asker, [path], descriptors)
                    continue
                if index in plain:
                    outcome = self._copy_plain(decision, *plain[index], room, copies)
                else:
                    outcome = self._copy(decision, asker, path, room, copies)
                if outcome.reason == "symlink" and decision.followed is not None:
                    outcome = self._copy_followed(decision, asker, path, room, copies)
                if outcome.result.status is Status.COPIED:
                    room -= outcome.result.length
                elif outcome.reason != "changed" and may_open(path).allowed:
                    (opened,) = open_paths(asker, [path], descriptors)
                    # Where no descriptor may be had either, it is what kept the copy.
                    if opened.result is GIVEN or outcome.reason not in {"too_large", "reply_full"}:
                        outcome = opened
                elif outcome is NEEDS_HELPER:  # helpers give descriptors, and here only copies may be had
                    outcome = refusal(may_open(path))
                outcomes.append(outcome)
        finally:
            # By one call, mostly: they stand in a row.
            close_all([opened for opened, _ in plain.values() if opened >= 0])
        return outcomes

    def _open_plain(
        self,
        decisions: Sequence[NameDecision],
        paths: Sequence[bytes],
        plain: dict[int, tuple[int, bytes | OSError]],
    ) -> None:
        """Open what may be copied and has nothing asked but its name; to `plain`, by its place in `paths`.

        As many as a reply may have room for, at once. The caller owns the descriptors, whatever is raised.
        """
        places: dict[int, list[int]] = {}
        for place, decision in enumerate(decisions[:_MOST_AT_ONCE]):
            if decision.plain:
                places.setdefault(decision.root.number, []).append(place)  # type: ignore[union-attr]
        for number, chosen in places.items():
            root = self._roots[number]
            if root.cross_mounts or root.helpers:
                continue
            names = [paths[place][root.skip :] or b"." for place in chosen]
            opened, found = open_regular_entries(
                root.descriptor, names, self._proc_self_fd, 0, MAX_COPY, ANY_TIME, given_away=False
            )
            plain |= zip(chosen, zip(opened, found, strict=True), strict=True)

    def _copy_plain(
        self,
        decision: NameDecision,
        opened: int,
        record: bytes | OSError,
        room: int,
        copies: list[bytes],
    ) -> Outcome:
        """Do as `_copy` with what `_open_plain` opened."""
        if isinstance(record, OSError):
            return failure(decision, record)
        mode, size = _MODE_AND_SIZE.unpack_from(record)
        if opened < 0:
            if not stat.S_ISREG(mode):
                return object_refusal(decision, kind_refused(mode))
            return _no_room_for(size, room, decision.rule)
        try:
            if size > room:
                return _no_room_for(size, room, decision.rule)
            data = os.pread(opened, size + 1, 0)
            if len(data) != size or stat_record(opened)[UNTOUCHED] != record[UNTOUCHED]:
                return Outcome(refused(Reason.BUSY), "changed", decision.rule)
            copies.append(data)
            return self._copied(len(data), decision.rule)
        except OSError as error:
            return failure(decision, error)

    def _copied(self, length: int, rule: Rule | None) -> Outcome:
        """Return the outcome for a copy; made once for each length."""
        outcome = self._copied_as.get((rule, length))
        if outcome is None:
            if len(self._copied_as) >= MOST_KEPT:
                self._copied_as.clear()
            outcome = self._copied_as[rule, length] = Outcome(copied(length), "ok", rule)
        return outcome

    def _copy(
        self, decision: NameDecision, asker: Asker, path: bytes, room: int, copies: list[bytes]
    ) -> Outcome:
        root = self._roots[decision.root.number]  # type: ignore[union-attr]  # allowed has a root
        if root.helpers:
            return NEEDS_HELPER
        try:
            found = find(decision, root, path)
            try:
                return self._copy_found(found, asker, room, copies)
            finally:
                os.close(found.held)
        except OSError as error:
            return failure(decision, error)

    def _copy_followed(
        self, decision: NameDecision, asker: Asker, path: bytes, room: int, copies: list[bytes]
    ) -> Outcome:
        return self._follower.use(
            "copy", decision, path, asker, lambda found: self._copy_found(found, asker, room, copies)
        )

    def _copy_found(self, found: Found, asker: Asker, room: int, copies: list[bytes]) -> Outcome:
        """Read a small file whole, as it was at one moment; append it to `copies`."""
        objection, rule = judge_file(found, asker, self._proc_self_fd)
        if objection is not None:
            return objection
        before = found.facts
        if before.st_size > min(room, MAX_COPY):
            return _no_room_for(before.st_size, room, rule)
        opened = reopen_for_reading(self._proc_self_fd, found.held)
        try:
            data = os.pread(opened, before.st_size + 1, 0)
            after = os.fstat(opened)
        finally:
            os.close(opened)
        if len(data) != before.st_size or _versions(before) != _versions(after):
            return Outcome(refused(Reason.BUSY), "changed", rule)
        copies.append(data)
        return self._copied(len(data), rule)


def _no_room_for(size: int, room: int, rule: Rule | None) -> Outcome:
    """Return why a file is not copied that has more than `room` bytes, or than any copy."""
    if size > MAX_COPY:
        return Outcome(refused(Reason.TOO_LARGE), "too_large", rule)
    assert size > room  # noqa: S101 - or it would have been copied
    return Outcome(refused(Reason.LIMIT), "reply_full", rule)


def _versions(facts: os.stat_result) -> tuple[int, int, int]:
    """Return what changes when the contents do."""
    return facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns
