"""Symbolic links, for rules that follow them: a link is nothing but another name to be asked for.

The kernel follows none for us. The first link on the way of a name is read,
the name that it leads to is put together from texts, and that name is decided
on before anything is looked at there, as if the client had asked for it. So
nothing comes by a link that would not come by its own name, whoever made the
link and whatever is exchanged meanwhile; and no name is touched that the rules
do not allow. (If the kernel went there, a link to `../x/..` would tell whoever
makes links whether there is a directory x, anywhere below the root.)
"""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING

from fdbroker.broker.audit import quoted_path
from fdbroker.broker.judging import Found, find, judge
from fdbroker.broker.outcomes import DENIED, OURS, Outcome, failure, object_refusal
from fdbroker.kernel.errors import renamed
from fdbroker.kernel.files import open_path_beneath
from fdbroker.policy.paths import MAX_PATH_BYTES, problem_with_path

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fdbroker.broker.dispatch import Asker
    from fdbroker.broker.roots import HeldRoot
    from fdbroker.policy.decide import ActionView, NameDecision

# Of one name, one after the other. The kernel's limit is 40; whoever may make links makes us look at each.
MOST_LINKS = 8
# Bytes of all names that the links in one request lead to: what one name may need. Whoever makes links makes
# us look for each, and record it: 253 short names stood for seconds of searching and megabytes of audit.
MOST_BEHIND_LINKS = MOST_LINKS * MAX_PATH_BYTES


class LinkRefusedError(Exception):
    """A link leads nowhere where the broker goes; the text is the reason for the audit."""


class Follower:
    """Finds what links lead to, as one client may have it; bounded for each request."""

    def __init__(self, roots: Sequence[HeldRoot], proc_self_fd: int) -> None:
        self._roots = roots
        self._proc_self_fd = proc_self_fd
        self._bytes_left = MOST_BEHIND_LINKS  # of names, in this request

    def begin_request(self) -> None:
        """Let links lead to as many names as one request may need."""
        self._bytes_left = MOST_BEHIND_LINKS

    def use(
        self,
        action: str,
        decision: NameDecision,
        path: bytes,
        asker: Asker,
        use: Callable[[Found], Outcome],
        *,
        also_last: bool = True,
    ) -> Outcome:
        """Let `use` have what the links of an allowed `path` lead to, if all names on the way allow it.

        `use` decides by the last name, as if that had been asked for; what it is given is closed behind it.
        `also_last`: that is no link either.
        """
        names = [(path, decision)]
        before: list[NameDecision] = []
        try:
            found = self._follow(asker.view.actions[action], names, before, also_last=also_last)
            if isinstance(found, Outcome):
                outcome = found
            else:
                try:
                    outcome = self._judge_names_before(found, before, asker) or use(found)
                finally:
                    os.close(found.held)
        except OSError as error:
            outcome = failure(names[-1][1], error)
        # What one name on the way keeps from the client, the others do not tell.
        result = outcome.result
        fails = outcome.reason != "ok" and result.errno not in OURS
        if fails and not all(said.plain for _, said in names):
            result = DENIED
        told = Outcome(result, outcome.reason, outcome.rule, outcome.facts)
        if len(names) > 1:
            told.record += "," + quoted_path(names[-1][0], key='"resolved":')
        return told

    def _follow(
        self,
        view: ActionView,
        names: list[tuple[bytes, NameDecision]],
        before: list[NameDecision],
        *,
        also_last: bool,
    ) -> Found | Outcome:
        """Go from link to link, and append each name that there is to `names`, with what the rules say of it.

        What they say of a name that is a link is appended to `before`. The caller closes what is found.

        Raises:
            OSError: something is not there, or can't be looked at.

        """
        for _ in range(MOST_LINKS):
            path, decision = names[-1]
            if decision.followed is None:
                return object_refusal(decision, "symlink")
            before.append(decision.followed)
            names[-1] = path, decision.followed
            if not self._bytes_left:
                return object_refusal(decision, "links_too_long")
            try:
                path = name_behind_link(self._roots[decision.root.number], path)  # type: ignore[union-attr]
            except LinkRefusedError as error:
                return object_refusal(decision, str(error))
            if len(path) > self._bytes_left:
                self._bytes_left = 0  # what comes behind this is not even looked for
                return object_refusal(decision, "links_too_long")
            self._bytes_left -= len(path)
            decision = view.decide(path)
            names.append((path, decision))
            if not decision.allowed:
                return Outcome(DENIED, decision.reason, decision.rule)
            root = self._roots[decision.root.number]  # type: ignore[union-attr]  # allowed has a root
            if root.helpers:
                return object_refusal(decision, "not_followed")
            try:
                found = find(decision, root, path)
            except OSError as error:
                if error.errno == errno.ELOOP:
                    continue
                raise
            if not (also_last and stat.S_ISLNK(found.facts.st_mode)):
                return found
            os.close(found.held)
        return object_refusal(names[-1][1], "too_many_links")

    def _judge_names_before(
        self, found: Found, before: Sequence[NameDecision], asker: Asker
    ) -> Outcome | None:
        """Return why a name on the way does not allow what links led to, or None."""
        for decision in before:
            allowed, reason, rule = judge(found, decision, asker, self._proc_self_fd)
            if not allowed:
                return Outcome(DENIED, reason, rule)
        return None


def name_behind_link(root: HeldRoot, path: bytes) -> bytes:
    """Return the name that `path`, in which there is a link, stands for by its first link.

    Raises:
        LinkRefusedError: `link_leaves_root`: the link is absolute or goes above the root;
            `link_not_normal`: it has `.` or `..` behind a name, or its name is too long;
            `moved`: there is no link any more.
        SyscallError: as `open_path_beneath`.

    """
    components = path[root.skip :].split(b"/")
    # How many components there are before the first link is behind them: any more, and openat2 says ELOOP.
    without, with_one = 0, len(components)
    while with_one - without > 1:
        middle = (without + with_one) // 2
        if _read_link(root, components[:middle]) is None:
            without = middle
        else:
            with_one = middle
    target = _read_link(root, components[:with_one])
    if not target:  # in the middle now, or no link
        raise LinkRefusedError("moved")
    below = _join(components[:without], target, components[with_one:])
    name = path[: root.skip] + below if below else path[: root.skip].rstrip(b"/") or b"/"
    if problem_with_path(name) is not None:
        raise LinkRefusedError("link_not_normal")
    return name


def _read_link(root: HeldRoot, components: Sequence[bytes]) -> bytes | None:
    """Return what the last of `components` links to, None if it is no link; b"" if one before it is."""
    try:
        held = open_path_beneath(root.descriptor, b"/".join(components), root.cross_mounts)
    except OSError as error:
        if error.errno == errno.ELOOP:
            return b""
        raise
    try:
        if not stat.S_ISLNK(os.fstat(held).st_mode):
            return None
        # Of the link that is held, whatever has its name by now; Linux 2.6.39. No link is empty.
        return os.readlink(b"", dir_fd=held)
    except OSError as error:
        raise renamed(error, "readlinkat", directory=held, path=b"") from None
    finally:
        os.close(held)


def _join(directory: Sequence[bytes], target: bytes, rest: Sequence[bytes]) -> bytes:
    """Return what `target`, of a link in `directory`, stands for, with `rest` behind it; below the root.

    There is no link in `directory`, so that `..` is what stands before its last component. Behind a name in
    the target it would be another thing if that name is a link, and so is left to be refused.
    """
    if target.startswith(b"/"):
        raise LinkRefusedError("link_leaves_root")
    here, names = list(directory), target.rstrip(b"/").split(b"/")
    while names and names[0] in (b".", b".."):
        if names.pop(0) == b"..":
            if not here:
                raise LinkRefusedError("link_leaves_root")
            here.pop()
    return b"/".join([*here, *names, *rest])
