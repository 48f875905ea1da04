"""Paths of one request: decide on each name, open, decide on the object, reopen. In this order, always.

`Opener` opens and describes; what links lead to, copies and pages of directories are
in files of their own. Every function here answers with an `Outcome` and raises
nothing: an error in the decision path is a denial.
"""

from __future__ import annotations

import errno
import os
from functools import partial
from typing import TYPE_CHECKING

from fdbroker.broker.copying import Copier
from fdbroker.broker.judging import describe, find, judge_file
from fdbroker.broker.links import Follower
from fdbroker.broker.listing import Lister
from fdbroker.broker.outcomes import NEEDS_HELPER, Given, Outcome, failure, refusal
from fdbroker.broker.watchdog import nothing
from fdbroker.kernel.files import open_regular_beneath, reopen_for_reading
from fdbroker.wire.messages import GIVEN

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fdbroker.broker.dispatch import Asker
    from fdbroker.broker.judging import Found
    from fdbroker.broker.listing import Page
    from fdbroker.broker.roots import HeldRoot
    from fdbroker.policy.decide import NameDecision

_AT_A_TIME = 64  # paths; as many as a batch has by default


class Opener:
    """Opens below held roots; knows no client but by the decisions it is given.

    `open`, `open_or_copy`, `describe` and `list` are each what one request asks for.
    """

    def __init__(
        self, roots: Sequence[HeldRoot], proc_self_fd: int, ping: Callable[[], None] = nothing
    ) -> None:
        self.roots = roots = tuple(roots)
        # Each look-up may have to wait for a disk: many of them are a long time, and no reason to be ended.
        self._ping = ping
        self._proc_self_fd = proc_self_fd
        self._given = Given()
        self._follower = Follower(roots, proc_self_fd)
        self._copier = Copier(roots, proc_self_fd, self._follower, ping)
        self._lister = Lister(roots, proc_self_fd, self._follower, ping)

    def open(self, asker: Asker, paths: Sequence[bytes], descriptors: list[int]) -> list[Outcome]:
        """Open regular files for reading, as `asker` may; one outcome per path.

        Appends a descriptor to `descriptors` for each path that is given, in
        order; the caller owns them, also when this raises.
        """
        if len(paths) > _AT_A_TIME:
            return self._open_many(asker, paths, descriptors)
        outcomes = []
        decide, roots, given = asker.view.actions["open"].decide, self.roots, self._given
        proc_self_fd = self._proc_self_fd
        for path in paths:
            decision = decide(path)
            if not decision.allowed:
                outcomes.append(refusal(decision))
                continue
            try:
                root = roots[decision.root.number]  # type: ignore[union-attr]  # allowed has a root
                opened = None
                if decision.plain:
                    directory, skip, cross_mounts, _, helpers, _ = root
                    if not (cross_mounts or helpers):
                        opened = open_regular_beneath(directory, path[skip:] or b".", proc_self_fd)
                if opened is None:
                    outcomes.append(self._open_judged(decision, root, path, asker, descriptors))
                else:
                    descriptors.append(opened)
                    outcomes.append(given[decision.rule])
            except OSError as error:
                if error.errno == errno.ELOOP and decision.followed is not None:
                    outcomes.append(self._open_followed(decision, path, asker, descriptors))
                else:
                    outcomes.append(failure(decision, error))
        return outcomes

    def _open_many(self, asker: Asker, paths: Sequence[bytes], descriptors: list[int]) -> list[Outcome]:
        outcomes = []
        for at in range(0, len(paths), _AT_A_TIME):
            outcomes += Opener.open(self, asker, paths[at : at + _AT_A_TIME], descriptors)
            self._ping()
        return outcomes

    def open_or_copy(
        self, asker: Asker, paths: Sequence[bytes], descriptors: list[int], copies: list[bytes]
    ) -> list[Outcome]:
        """Give the contents of small files where a rule delivers copies, else as `open`.

        Appends each copy to `copies`, in order; no more than a reply has room for.
        """
        if not asker.view.delivers_copies:
            return Opener.open(self, asker, paths, descriptors)
        return self._copier.open_or_copy(asker, paths, descriptors, copies, partial(Opener.open, self))

    def _open_judged(
        self, decision: NameDecision, root: HeldRoot, path: bytes, asker: Asker, descriptors: list[int]
    ) -> Outcome:
        """Open a path about whose object something is to be asked, or to be said."""
        if root.helpers:
            return NEEDS_HELPER
        proc_self_fd = self._proc_self_fd
        found = find(decision, root, path)
        held = found[0]
        try:
            objection, rule = judge_file(found, asker, proc_self_fd)
            if objection is not None:
                if objection.reason == "symlink" and decision.followed is not None:
                    return self._open_followed(decision, path, asker, descriptors)
                return objection
            descriptors.append(reopen_for_reading(proc_self_fd, held))
            return self._given[rule]
        finally:
            os.close(held)

    def _open_followed(
        self, decision: NameDecision, path: bytes, asker: Asker, descriptors: list[int]
    ) -> Outcome:
        def use(found: Found) -> Outcome:
            objection, rule = judge_file(found, asker, self._proc_self_fd)
            if objection is not None:
                return objection
            descriptors.append(reopen_for_reading(self._proc_self_fd, found.held))
            return Outcome(GIVEN, "ok", rule)

        return self._follower.use("open", decision, path, asker, use)

    def describe(self, asker: Asker, paths: Sequence[bytes]) -> list[Outcome]:
        """Describe what is there, as `stat` does; one outcome per path."""
        return [self.stat(asker, path) for path in paths]

    def stat(self, asker: Asker, path: bytes) -> Outcome:
        """Describe what is there, of whatever kind, as `asker` may know it."""
        self._ping()
        decision = asker.view.actions["stat"].decide(path)
        if not decision.allowed:
            return refusal(decision)
        root = self.roots[decision.root.number]  # type: ignore[union-attr]  # allowed has a root
        if root.helpers:
            return NEEDS_HELPER
        try:
            found = find(decision, root, path)
            try:
                return describe(found, asker, self._proc_self_fd)
            finally:
                os.close(found.held)
        except OSError as error:
            if error.errno == errno.ELOOP and decision.followed is not None:
                return self._follower.use(
                    "stat",
                    decision,
                    path,
                    asker,
                    lambda found: describe(found, asker, self._proc_self_fd),
                    also_last=False,
                )
            return failure(decision, error)

    def list(self, asker: Asker, path: bytes, cookie: int, most: int) -> Page:
        """Give one page of a directory; see `Lister.page`."""
        return self._lister.page(asker, path, cookie, most)


class FollowingOpener(Opener):
    """The same where a rule follows links: what these lead to is bounded, anew for each request."""

    def open(self, asker: Asker, paths: Sequence[bytes], descriptors: list[int]) -> list[Outcome]:
        """Open as `Opener.open`."""
        self._follower.begin_request()
        return super().open(asker, paths, descriptors)

    def open_or_copy(
        self, asker: Asker, paths: Sequence[bytes], descriptors: list[int], copies: list[bytes]
    ) -> list[Outcome]:
        """Open or copy as `Opener.open_or_copy`."""
        self._follower.begin_request()
        return super().open_or_copy(asker, paths, descriptors, copies)

    def describe(self, asker: Asker, paths: Sequence[bytes]) -> list[Outcome]:
        """Describe as `Opener.describe`."""
        self._follower.begin_request()
        return super().describe(asker, paths)

    def list(self, asker: Asker, path: bytes, cookie: int, most: int) -> Page:
        """List as `Opener.list`."""
        self._follower.begin_request()
        return super().list(asker, path, cookie, most)
