"""The object behind a name that was allowed: may it be had, and what is there?

Each question is asked of a descriptor that is held by O_PATH, so that whatever is
exchanged meanwhile, the answer is about the object that is given. No file is
opened here.
"""

from __future__ import annotations

import os
import stat
import time
from typing import TYPE_CHECKING, NamedTuple

from fdbroker.broker.outcomes import (
    DENIED,
    Outcome,
    failure,
    helper_failed,
    kind_refused,
    object_refusal,
    refusal,
)
from fdbroker.broker.roots import HELPED_FILESYSTEMS
from fdbroker.kernel.files import (
    has_lost_its_name,
    open_path_beneath,
    reopen_for_reading,
    wait_for_changes_of_names,
)
from fdbroker.policy.decide import ObjectDecision, decide_object
from fdbroker.policy.rules import Surroundings
from fdbroker.wire.messages import GIVEN, FileStat

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fdbroker.broker.dispatch import Asker
    from fdbroker.broker.helper_pool import ObjectFacts as ReportedFacts
    from fdbroker.broker.helper_pool import Report
    from fdbroker.broker.roots import HeldRoot
    from fdbroker.policy.decide import NameDecision
    from fdbroker.policy.rules import Rule

_new = tuple.__new__  # what a NamedTuple does itself, by a function in Python


class Found(NamedTuple):
    """An object by its name: what was opened by O_PATH and looked at. `held` stays its owner's.

    `decision` is what the rules say of `path`, below `root`, by which it was found.
    """

    held: int
    facts: os.stat_result
    root: HeldRoot
    path: bytes
    decision: NameDecision


def find(decision: NameDecision, root: HeldRoot, path: bytes) -> Found:
    """Open a name that was allowed by O_PATH and look at what it is; the caller closes it.

    Raises:
        OSError: it is not there, or can't be looked at.

    """
    directory, skip, cross_mounts, _, _, _ = root
    held = open_path_beneath(directory, path[skip:] or b".", cross_mounts)
    try:
        return _new(Found, (held, os.fstat(held), root, path, decision))
    except BaseException:
        os.close(held)
        raise


def judge(found: Found, decision: NameDecision, asker: Asker, proc_self_fd: int) -> ObjectDecision:
    """Decide on an object by a name that was allowed: the one by which it was found, or one that led there.

    Where the number of its links is asked for, that was counted before, and the name has to be there still.

    Raises:
        OSError: something can't be looked at.

    """
    held, facts, root, path, _ = found
    around = root.surroundings(held) if decision.asks_surroundings else None
    judged = decide_object(decision, facts, asker.uid, asker.on_behalf_of_uid, around)
    if (
        decision.asks_links
        and judged.allowed
        and stat.S_ISREG(facts.st_mode)
        and name_is_lost(root, path, held, proc_self_fd)
    ):
        return ObjectDecision(allowed=False, reason="lost_its_name", rule=decision.rule or decision.allows[0])
    return judged


def judge_file(found: Found, asker: Asker, proc_self_fd: int) -> tuple[Outcome | None, Rule | None]:
    """Return why an object is not opened, or None; and the rule that says so.

    Raises:
        OSError: as `judge`.

    """
    held, facts, root, _, decision = found
    objection, mode = root.objection(held) if root.cross_mounts else None, facts.st_mode
    if objection is not None or not stat.S_ISREG(mode):
        return object_refusal(decision, objection or kind_refused(mode)), None
    allowed, reason, rule = judge(found, decision, asker, proc_self_fd)
    return None if allowed else Outcome(DENIED, reason, rule), rule


def describe(found: Found, asker: Asker, proc_self_fd: int) -> Outcome:
    """Decide on an object of any kind and describe it.

    Raises:
        OSError: as `judge`.

    """
    held, facts, root, _, decision = found
    objection = root.objection(held) if root.cross_mounts else None
    if objection is not None and objection != "mount_not_read_only":
        return object_refusal(decision, objection)
    allowed, reason, rule = judge(found, decision, asker, proc_self_fd)
    if not allowed:
        return Outcome(DENIED, reason, rule)
    return Outcome(GIVEN, "ok", rule, file_stat(facts))


def judge_report(
    asker: Asker, action: str, path: bytes, report: Report, roots: Sequence[HeldRoot]
) -> Outcome:
    """Decide on an object that a helper has looked at, for `action`: `open` or `stat`.

    For `open` the outcome is `ok` only where the helper has it open.
    """
    decision = asker.view.actions[action].decide(path)
    if not decision.allowed:
        return refusal(decision)
    if report.problem is not None:
        return helper_failed(decision, report.problem)
    facts, filesystem = report.facts, report.filesystem
    if facts is None or filesystem is None:
        return failure(decision, OSError(report.errno, os.strerror(report.errno)))
    opens, regular = action == "open", stat.S_ISREG(facts.st_mode)
    root = roots[decision.root.number]  # type: ignore[union-attr]  # allowed has a root
    objection = root.objection_to(filesystem)
    if objection is not None and (opens or objection != "mount_not_read_only"):
        return object_refusal(decision, objection)
    if opens and not regular:
        return object_refusal(decision, kind_refused(facts.st_mode))
    around = Surroundings(time.time_ns(), filesystem.type)
    allowed, reason, rule = decide_object(decision, facts, asker.uid, asker.on_behalf_of_uid, around)
    if not allowed:
        return Outcome(DENIED, reason, rule)
    if decision.asks_links and regular:
        # Another machine, or a program, says how many there are, and may take names away unseen.
        if filesystem.type in HELPED_FILESYSTEMS:
            return object_refusal(decision, "links_unknown")
        if report.lost_its_name:
            return object_refusal(decision, "lost_its_name")
    if opens and not report.opened:
        return helper_failed(decision, "helper_ended")
    return Outcome(GIVEN, "ok", rule) if opens else Outcome(GIVEN, "ok", rule, file_stat(facts))


def name_is_lost(root: HeldRoot, path: bytes, held: int, proc_self_fd: int) -> bool:
    """Return whether `path` is no name any more of the object whose links were counted before.

    Raises:
        SyscallError: the directory of that name is not there, or can't be read.

    """
    parent = opened = -1
    try:
        below = path[root.skip :].rpartition(b"/")[0] or b"."
        parent = open_path_beneath(root.descriptor, below, root.cross_mounts)
        opened = reopen_for_reading(proc_self_fd, parent)
        wait_for_changes_of_names(opened)
        return has_lost_its_name(proc_self_fd, held, path)
    finally:
        for descriptor in (parent, opened):
            if descriptor >= 0:
                os.close(descriptor)


def file_stat(facts: os.stat_result | ReportedFacts) -> FileStat:
    """Return the stat record."""
    return FileStat(
        facts.st_dev,
        facts.st_ino,
        facts.st_mode,
        facts.st_nlink,
        facts.st_uid,
        facts.st_gid,
        facts.st_size,
        facts.st_mtime_ns,
        facts.st_ctime_ns,
    )
