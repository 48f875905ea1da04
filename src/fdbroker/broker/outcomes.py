"""What became of one path: what its client is told, and what the audit says.

Every refusal that a path can meet is made here, with the two answers side by side.
Where a rule asks something of the object, "not there" and "refused" are one
answer to the client; the audit has the reason.
"""

from __future__ import annotations

import errno
import stat
from typing import TYPE_CHECKING

from fdbroker.broker.audit import decision_members
from fdbroker.wire.format import Reason
from fdbroker.wire.messages import GIVEN, FileStat, Result, broken, refused

if TYPE_CHECKING:
    from fdbroker.policy.decide import NameDecision
    from fdbroker.policy.rules import Rule

DENIED = refused(Reason.DENIED)
# Nothing but `path_invalid` depends on the path's spelling alone.
_INVALID = {
    "path_too_long": refused(Reason.PATH_INVALID, errno.ENAMETOOLONG),
    "name_too_long": refused(Reason.PATH_INVALID, errno.ENAMETOOLONG),
} | {
    problem: refused(Reason.PATH_INVALID)
    for problem in ("empty", "nul", "relative", "trailing_slash", "empty_component", "dot_component")
}
_BY_ERRNO = {
    errno.ENOENT: ("not_found", refused(Reason.NOT_FOUND)),
    errno.ENOTDIR: ("not_directory", refused(Reason.NOT_DIRECTORY)),
    errno.ELOOP: ("symlink", refused(Reason.SYMLINK)),
    errno.EXDEV: ("crosses_mount", refused(Reason.CROSSES_MOUNT)),
    errno.ENAMETOOLONG: ("path_too_long", _INVALID["path_too_long"]),
    errno.EAGAIN: ("busy", refused(Reason.BUSY)),
    # Only Landlock or another LSM says this to a process with CAP_DAC_READ_SEARCH.
    errno.EACCES: ("kernel_denied", DENIED),
    # So does a fanotify listener that refuses the open.
    errno.EPERM: ("kernel_denied", DENIED),
}
_OF_OBJECT = {
    "filesystem": refused(Reason.FILESYSTEM),
    "mount_not_read_only": refused(Reason.MOUNT_NOT_READ_ONLY),
    "symlink": refused(Reason.SYMLINK),
    "not_directory": refused(Reason.NOT_DIRECTORY),
    "not_regular": refused(Reason.NOT_REGULAR),
    "is_directory": refused(Reason.NOT_REGULAR, errno.EISDIR),
    "lost_its_name": DENIED,
    "moved": refused(Reason.BUSY),
    "link_leaves_root": refused(Reason.SYMLINK),
    "link_not_normal": refused(Reason.SYMLINK),
    "too_many_links": refused(Reason.SYMLINK),
    "links_too_long": refused(Reason.LIMIT),
    # Helpers open and describe single files: to list or to walk means to look at many.
    "not_listed": refused(Reason.FILESYSTEM),
    "not_followed": refused(Reason.FILESYSTEM),
    # Who answers for the file system says what the number of links is, and when a name goes.
    "links_unknown": refused(Reason.FILESYSTEM),
}
# Failures of the broker as a whole. They say nothing of the object.
OURS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
MOST_KEPT = 4096  # outcomes: those by rules of old policies must not pile up


class Outcome:
    """What became of one path; immutable: `result` for the client, `record` for the audit.

    `reason` is `ok` or why not, `rule` what allowed or refused it, `facts` what
    stat found.
    """

    __slots__ = ("facts", "reason", "record", "result", "rule")

    def __init__(
        self, result: Result, reason: str, rule: Rule | None = None, facts: FileStat | None = None
    ) -> None:
        self.result = result
        self.reason = reason
        self.rule = rule
        self.facts = facts
        self.record = decision_members(reason, None if rule is None else rule.name)


NOT_RECORDED = Outcome(refused(Reason.AUDIT), "audit")
TOO_MANY_IN_FLIGHT = Outcome(refused(Reason.LIMIT), "in_flight")
# Never opened in the loop. Where nobody waits for a helper, as with a datagram, this is the answer.
NEEDS_HELPER = Outcome(broken(errno.EIO), "helpers_missing")
# Problems with helpers. They say nothing certain of the object, so they are told whoever asks.
_OF_HELPERS = {
    "timed_out": refused(Reason.TIMED_OUT),
    "limit": refused(Reason.LIMIT),
    "helper_ended": broken(errno.EIO),
}


class Given(dict["Rule | None", Outcome]):
    """The outcome for what a rule gives, by rule: made once for each, not per file."""

    def __missing__(self, rule: Rule | None) -> Outcome:
        """Make it."""
        if len(self) >= MOST_KEPT:
            self.clear()
        outcome = self[rule] = Outcome(GIVEN, "ok", rule)
        return outcome


def refusal(decision: NameDecision) -> Outcome:
    """Return the outcome for a path that is refused by its name."""
    return Outcome(_INVALID.get(decision.reason, DENIED), decision.reason, decision.rule)


def object_refusal(decision: NameDecision, reason: str) -> Outcome:
    """Return the outcome for an object that is not served, whatever the conditions say of it."""
    rule = decision.rule or decision.allows[0]
    return Outcome(_OF_OBJECT[reason] if decision.plain else DENIED, reason, rule)


def failure(decision: NameDecision, error: OSError) -> Outcome:
    """Turn a system call that failed into a denial."""
    number = error.errno or errno.EIO
    rule = decision.rule or decision.allows[0]
    if number in OURS:
        return Outcome(broken(number), errno.errorcode[number], rule)
    reason, result = _BY_ERRNO.get(number, (errno.errorcode.get(number, "unknown"), broken(number)))
    return Outcome(result if decision.plain else DENIED, reason, rule)


def helper_failed(decision: NameDecision, problem: str) -> Outcome:
    """Return the outcome for a path that a helper did not get to, or did not come back from."""
    return Outcome(_OF_HELPERS[problem], problem, decision.rule or decision.allows[0])


def kind_refused(mode: int) -> str:
    """Return why an object of this kind is not opened, which is no regular file."""
    if stat.S_ISDIR(mode):
        return "is_directory"
    return "symlink" if stat.S_ISLNK(mode) else "not_regular"
