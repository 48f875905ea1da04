"""One path: decide on the name, open, decide on the object, reopen. In this order, always.

Every function here answers with an `Outcome` and raises nothing: an error in
the decision path is a denial. Where a rule asks something of the object, "not
there" and "refused" are one answer to the client; the audit has the reason.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
import time
from typing import TYPE_CHECKING, NamedTuple

from fdbroker.broker.audit import decision_members, quoted_path
from fdbroker.broker.links import MOST_LINKS, LinkRefusedError, name_behind_link
from fdbroker.broker.roots import HELPED_FILESYSTEMS
from fdbroker.broker.watchdog import nothing
from fdbroker.kernel.descriptors import close_all
from fdbroker.kernel.files import (
    UNTOUCHED,
    DirectoryEntry,
    has_lost_its_name,
    open_path_beneath,
    open_regular_beneath,
    open_regular_entries,
    read_directory,
    reopen_for_reading,
    stat_record,
    wait_for_changes_of_names,
)
from fdbroker.policy.decide import NameDecision, decide_object
from fdbroker.policy.paths import MAX_PATH_BYTES
from fdbroker.policy.rules import Surroundings
from fdbroker.wire.format import ANY_TIME, HEADER, MAX_COPY, MAX_REPLY, RESULT, Reason, Status
from fdbroker.wire.messages import GIVEN, FileStat, ListEntry, Result, broken, copied, refused
from fdbroker.wire.replies import encode_list_entry

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fdbroker.broker.dispatch import Asker
    from fdbroker.broker.helper_pool import ObjectFacts as ReportedFacts
    from fdbroker.broker.helper_pool import Report
    from fdbroker.broker.roots import HeldRoot
    from fdbroker.policy.decide import ActionView
    from fdbroker.policy.rules import Rule

_DENIED = refused(Reason.DENIED)
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
    errno.EACCES: ("kernel_denied", _DENIED),
    # So does a fanotify listener that refuses the open.
    errno.EPERM: ("kernel_denied", _DENIED),
}
_OF_OBJECT = {
    "filesystem": refused(Reason.FILESYSTEM),
    "mount_not_read_only": refused(Reason.MOUNT_NOT_READ_ONLY),
    "symlink": refused(Reason.SYMLINK),
    "not_directory": refused(Reason.NOT_DIRECTORY),
    "not_regular": refused(Reason.NOT_REGULAR),
    "is_directory": refused(Reason.NOT_REGULAR, errno.EISDIR),
    "lost_its_name": _DENIED,
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
_OURS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
_MODE_AND_SIZE = struct.Struct("=12xH10xQ")  # of a stat record
_PAGE = 256
_AT_A_TIME = 64  # paths; as many as a batch has by default
_LIST_TRIES = 4
# Bytes of all names that the links in one request lead to: what one name may need. Whoever makes links makes
# us look for each, and record it: 253 short names stood for seconds of searching and megabytes of audit.
MOST_BEHIND_LINKS = MOST_LINKS * MAX_PATH_BYTES
_MOST_AT_ONCE = 64  # files that are opened to be copied; of empty ones, more have room in a reply
_MAX_GIVEN = 4096  # rules of old policies must not pile up
_LIST_HEAD = 12 + 8 + 8  # header, result, cookie


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
        if len(self) >= _MAX_GIVEN:
            self.clear()
        outcome = self[rule] = Outcome(GIVEN, "ok", rule)
        return outcome


class Page(NamedTuple):
    """One page of a directory, its entries encoded."""

    outcome: Outcome
    entries: Sequence[bytes] = ()
    cookie: int = 0
    last: bool = True


class _Listing(NamedTuple):
    """What is asked of a directory."""

    asker: Asker
    root: HeldRoot
    path: bytes
    most: int


class _Found(NamedTuple):
    """What links led to. `held`: O_PATH, to be closed by who gets it; `path`: its name, free of links.

    `decision` is what the rules say of that name, `before` what they say of those that led there.
    """

    held: int
    facts: os.stat_result
    root: HeldRoot
    path: bytes
    decision: NameDecision
    before: Sequence[NameDecision]


class Opener:
    """Opens below held roots; knows no client but by the decisions it is given.

    `open`, `open_or_copy`, `describe` and `list` are each what one request asks for.
    """

    def __init__(
        self, roots: Sequence[HeldRoot], proc_self_fd: int, ping: Callable[[], None] = nothing
    ) -> None:
        self.roots = tuple(roots)
        # Each look-up may have to wait for a disk: many of them are a long time, and no reason to be ended.
        self._ping = ping
        self._proc_self_fd = proc_self_fd
        self._given = Given()
        self._copies: dict[tuple[Rule | None, int], Outcome] = {}
        self._left_behind_links = MOST_BEHIND_LINKS  # bytes, of this request

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
                    outcomes += Opener.open(self, asker, [path], descriptors)
                    continue
                root = self.roots[decision.root.number]  # type: ignore[union-attr]  # allowed has a root
                if index in plain:
                    outcome = self._copy_plain(decision, *plain[index], room, copies)
                else:
                    outcome = self._copy(decision, root, asker, path, room, copies)
                if outcome.reason == "symlink" and decision.followed is not None:
                    outcome = self._copy_followed(decision, asker, path, room, copies)
                if outcome.result.status is Status.COPIED:
                    room -= outcome.result.length
                elif outcome.reason != "changed" and may_open(path).allowed:
                    (opened,) = Opener.open(self, asker, [path], descriptors)
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
            root = self.roots[number]
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
                return object_refusal(decision, _kind_refused(mode))
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
        outcome = self._copies.get((rule, length))
        if outcome is None:
            if len(self._copies) >= _MAX_GIVEN:
                self._copies.clear()
            outcome = self._copies[rule, length] = Outcome(copied(length), "ok", rule)
        return outcome

    def _copy(
        self,
        decision: NameDecision,
        root: HeldRoot,
        asker: Asker,
        path: bytes,
        room: int,
        copies: list[bytes],
    ) -> Outcome:
        held = -1
        try:
            if root.helpers:
                return NEEDS_HELPER
            held = open_path_beneath(root.descriptor, path[root.skip :] or b".", root.cross_mounts)
            return self._copy_held(
                _Found(held, os.fstat(held), root, path, decision, ()), asker, room, copies
            )
        except OSError as error:
            return failure(decision, error)
        finally:
            if held >= 0:
                os.close(held)

    def _copy_followed(
        self, decision: NameDecision, asker: Asker, path: bytes, room: int, copies: list[bytes]
    ) -> Outcome:
        return self._use_followed(
            "copy", decision, path, asker, lambda found: self._copy_held(found, asker, room, copies)
        )

    def _copy_held(self, found: _Found, asker: Asker, room: int, copies: list[bytes]) -> Outcome:
        """Read a small file whole, as it was at one moment; append it to `copies`."""
        held, before, root, path, decision, _ = found
        opened = -1
        try:
            objection, rule = self._judge_file(decision, root, path, held, before, asker)
            if objection is not None:
                return objection
            if before.st_size > min(room, MAX_COPY):
                return _no_room_for(before.st_size, room, rule)
            opened = reopen_for_reading(self._proc_self_fd, held)
            data = os.pread(opened, before.st_size + 1, 0)
            after = os.fstat(opened)
            if len(data) != before.st_size or _versions(before) != _versions(after):
                return Outcome(refused(Reason.BUSY), "changed", rule)
            copies.append(data)
            return self._copied(len(data), rule)
        finally:
            if opened >= 0:
                os.close(opened)

    def _open_judged(
        self, decision: NameDecision, root: HeldRoot, path: bytes, asker: Asker, descriptors: list[int]
    ) -> Outcome:
        """Open a path about whose object something is to be asked, or to be said."""
        if root.helpers:
            return NEEDS_HELPER
        held = open_path_beneath(root.descriptor, path[root.skip :] or b".", root.cross_mounts)
        try:
            objection, rule = self._judge_file(decision, root, path, held, os.fstat(held), asker)
            if objection is not None:
                if objection.reason == "symlink" and decision.followed is not None:
                    return self._open_followed(decision, path, asker, descriptors)
                return objection
            descriptors.append(reopen_for_reading(self._proc_self_fd, held))
            return self._given[rule]
        finally:
            os.close(held)

    def _open_followed(
        self, decision: NameDecision, path: bytes, asker: Asker, descriptors: list[int]
    ) -> Outcome:
        def use(found: _Found) -> Outcome:
            held, facts, root, name, behind, _ = found
            objection, rule = self._judge_file(behind, root, name, held, facts, asker)
            if objection is not None:
                return objection
            descriptors.append(reopen_for_reading(self._proc_self_fd, held))
            return Outcome(GIVEN, "ok", rule)

        return self._use_followed("open", decision, path, asker, use)

    def _use_followed(
        self,
        action: str,
        decision: NameDecision,
        path: bytes,
        asker: Asker,
        use: Callable[[_Found], Outcome],
        *,
        also_last: bool = True,
    ) -> Outcome:
        """Let `use` have what the links of an allowed `path` lead to, if all names on the way allow it.

        `use` decides by the last name, as if that had been asked for. `also_last`: that is no link either.
        """
        names = [(path, decision)]
        try:
            found = self._follow(asker.view.actions[action], names, also_last=also_last)
            if isinstance(found, Outcome):
                outcome = found
            else:
                try:
                    outcome = self._judge_names_before(found, asker) or use(found)
                finally:
                    os.close(found.held)
        except OSError as error:
            outcome = failure(names[-1][1], error)
        # What one name on the way keeps from the client, the others do not tell.
        result = outcome.result
        fails = outcome.reason != "ok" and result.errno not in _OURS
        if fails and not all(said.plain for _, said in names):
            result = _DENIED
        told = Outcome(result, outcome.reason, outcome.rule, outcome.facts)
        if len(names) > 1:
            told.record += "," + quoted_path(names[-1][0], key='"resolved":')
        return told

    def _follow(
        self, view: ActionView, names: list[tuple[bytes, NameDecision]], *, also_last: bool
    ) -> _Found | Outcome:
        """Go from link to link, and append each name that there is to `names`, with what the rules say of it.

        Raises:
            OSError: something is not there, or can't be looked at.

        """
        before: list[NameDecision] = []
        for _ in range(MOST_LINKS):
            path, decision = names[-1]
            if decision.followed is None:
                return object_refusal(decision, "symlink")
            before.append(decision.followed)
            names[-1] = path, decision.followed
            if not self._left_behind_links:
                return object_refusal(decision, "links_too_long")
            try:
                path = name_behind_link(self.roots[decision.root.number], path)  # type: ignore[union-attr]
            except LinkRefusedError as error:
                return object_refusal(decision, str(error))
            if len(path) > self._left_behind_links:
                self._left_behind_links = 0  # what comes behind this is not even looked for
                return object_refusal(decision, "links_too_long")
            self._left_behind_links -= len(path)
            decision = view.decide(path)
            names.append((path, decision))
            if not decision.allowed:
                return Outcome(_DENIED, decision.reason, decision.rule)
            root = self.roots[decision.root.number]  # type: ignore[union-attr]  # allowed has a root
            if root.helpers:
                return object_refusal(decision, "not_followed")
            try:
                held = open_path_beneath(root.descriptor, path[root.skip :] or b".", root.cross_mounts)
            except OSError as error:
                if error.errno == errno.ELOOP:
                    continue
                raise
            try:
                facts = os.fstat(held)
                if not (also_last and stat.S_ISLNK(facts.st_mode)):
                    found, held = _Found(held, facts, root, path, decision, before), -1
                    return found
            finally:
                if held >= 0:
                    os.close(held)
        return object_refusal(names[-1][1], "too_many_links")

    def _judge_names_before(self, found: _Found, asker: Asker) -> Outcome | None:
        """Return why a name on the way does not allow what links led to, or None."""
        for decision in found.before:
            allowed, reason, rule = decide_object(
                decision,
                found.facts,
                asker.uid,
                asker.on_behalf_of_uid,
                found.root.surroundings(found.held) if decision.asks_surroundings else None,
            )
            if not allowed:
                return Outcome(_DENIED, reason, rule)
            if (
                decision.asks_links
                and stat.S_ISREG(found.facts.st_mode)
                and name_is_lost(found.root, found.path, found.held, self._proc_self_fd)
            ):
                return object_refusal(decision, "lost_its_name")
        return None

    def _judge_file(
        self,
        decision: NameDecision,
        root: HeldRoot,
        path: bytes,
        held: int,
        facts: os.stat_result,
        asker: Asker,
    ) -> tuple[Outcome | None, Rule | None]:
        """Return why the object is not opened, or None; and the rule that says so."""
        objection = root.objection(held)
        if objection is not None or not stat.S_ISREG(facts.st_mode):
            return object_refusal(decision, objection or _kind_refused(facts.st_mode)), None
        around = root.surroundings(held) if decision.asks_surroundings else None
        allowed, reason, rule = decide_object(decision, facts, asker.uid, asker.on_behalf_of_uid, around)
        if not allowed:
            return Outcome(_DENIED, reason, rule), rule
        if decision.asks_links and name_is_lost(root, path, held, self._proc_self_fd):
            return object_refusal(decision, "lost_its_name"), rule
        return None, rule

    def describe(self, asker: Asker, paths: Sequence[bytes]) -> list[Outcome]:
        """Describe what is there, as `stat` does; one outcome per path."""
        return [self.stat(asker, path) for path in paths]

    def stat(self, asker: Asker, path: bytes) -> Outcome:
        """Describe what is there, of whatever kind, as `asker` may know it."""
        self._ping()
        decision = asker.view.actions["stat"].decide(path)
        if not decision.allowed:
            return refusal(decision)
        held = -1
        try:
            root = self.roots[decision.root.number]  # type: ignore[union-attr]  # allowed has a root
            if root.helpers:
                return NEEDS_HELPER
            held = open_path_beneath(root.descriptor, path[root.skip :] or b".", root.cross_mounts)
            return self._judge(decision, root, path, held, asker)
        except OSError as error:
            if error.errno == errno.ELOOP and decision.followed is not None:
                return self._use_followed(
                    "stat",
                    decision,
                    path,
                    asker,
                    lambda found: self._judge(found.decision, found.root, found.path, found.held, asker),
                    also_last=False,
                )
            return failure(decision, error)
        finally:
            if held >= 0:
                os.close(held)

    def list(self, asker: Asker, path: bytes, cookie: int, most: int) -> Page:
        """Give one page of a directory, as the actions `list` and `stat` allow to `asker`.

        A page reads one chunk of the directory, so that a directory of a
        million names that a client may not see costs no more than its pages.
        After the page was read the directory is resolved again and must be
        the same one, untouched: a held directory goes on resolving wherever
        it is moved, and one that was away in between may have held other
        names there. A directory in which much happens is tried a few times.
        """
        decision = asker.view.actions["list"].decide(path)
        if not decision.allowed:
            return Page(refusal(decision))
        page = self._page_at_rest(asker, decision, path, cookie, most)
        if page.outcome.reason != "symlink" or decision.followed is None:
            return page
        # As if the name that links led to had been asked for; that this is the object which was judged is
        # seen by its number.
        pages: list[Page] = []

        def use(found: _Found) -> Outcome:
            page = self._page_at_rest(asker, found.decision, found.path, cookie, most)
            outcome = page.outcome
            if outcome.facts is not None and (outcome.facts.device, outcome.facts.inode) != (
                found.facts.st_dev,
                found.facts.st_ino,
            ):
                return object_refusal(found.decision, "moved")
            pages.append(page)
            return outcome

        outcome = self._use_followed("list", decision, path, asker, use)
        return pages[0]._replace(outcome=outcome) if pages else Page(outcome)

    def _page_at_rest(
        self, asker: Asker, decision: NameDecision, path: bytes, cookie: int, most: int
    ) -> Page:
        for _ in range(_LIST_TRIES):
            page = self._page(asker, decision, path, cookie, most)
            if page is not None:
                return page
        return Page(object_refusal(decision, "moved"))

    def _page(self, asker: Asker, decision: NameDecision, path: bytes, cookie: int, most: int) -> Page | None:
        """Give the page, or None where the directory was touched meanwhile."""
        held = opened = again = -1
        try:
            root = self.roots[decision.root.number]  # type: ignore[union-attr]  # allowed has a root
            if root.helpers:
                return Page(object_refusal(decision, "not_listed"))
            below = path[root.skip :] or b"."
            held = open_path_beneath(root.descriptor, below, root.cross_mounts)
            if decision.followed is not None and stat.S_ISLNK(os.fstat(held).st_mode):
                # What is asked of the object is asked of what the link leads to.
                return Page(object_refusal(decision, "symlink"))
            outcome = self._judge(decision, root, path, held, asker)
            if outcome.facts is None:
                return Page(outcome)
            if not stat.S_ISDIR(outcome.facts.mode):
                kind = "symlink" if stat.S_ISLNK(outcome.facts.mode) else "not_directory"
                return Page(object_refusal(decision, kind))
            opened = reopen_for_reading(self._proc_self_fd, held)
            try:
                os.lseek(opened, cookie, os.SEEK_SET)
            except (OverflowError, OSError):
                return Page(Outcome(refused(Reason.PATH_INVALID), "cookie", outcome.rule))
            chunk = read_directory(opened)
            asked = _Listing(asker, root, path, most or _PAGE)
            entries, cookie = self._entries(asked, held, chunk, cookie)
            # Where the whole chunk was used, a look behind it saves the client a page without entries.
            last = not chunk or (cookie == chunk[-1].next and not read_directory(opened))
            again = open_path_beneath(root.descriptor, below, root.cross_mounts)
            now = file_stat(os.fstat(again))
            if (now.device, now.inode) != (outcome.facts.device, outcome.facts.inode):
                return Page(object_refusal(decision, "moved"))
            # Times of Linux 6.13 tell any two changes apart if somebody looked in between, and we did; older
            # ones know ticks of the clock.
            if (now.mtime_ns, now.ctime_ns) != (outcome.facts.mtime_ns, outcome.facts.ctime_ns):
                return None
            # Behind the last page there is nothing, and the position would tell of names that were left out.
            return Page(outcome, entries, 0 if last else cookie, last=last)
        except OSError as error:
            return Page(failure(decision, error))
        finally:
            for descriptor in (held, opened, again):
                if descriptor >= 0:
                    os.close(descriptor)

    def _entries(
        self, asked: _Listing, held: int, names: Sequence[DirectoryEntry], cookie: int
    ) -> tuple[Sequence[bytes], int]:
        """Return up to `asked.most` encoded entries that fit into a reply, and the cookie behind them.

        What is left out does not count, so that pages do not tell how much it is.
        """
        encoded: list[bytes] = []
        size = _LIST_HEAD
        for entry in names:
            self._ping()
            shown = self._entry(asked, held, entry)
            if shown is not None:
                data = encode_list_entry(shown)
                size += len(data)
                if size > MAX_REPLY or len(encoded) == asked.most:
                    break
                encoded.append(data)
            cookie = entry.next
        return encoded, cookie

    def _entry(self, asked: _Listing, directory: int, entry: DirectoryEntry) -> ListEntry | None:
        """Return what the client may see of one name, None if not even that."""
        asker, root, parent, _ = asked
        view = asker.view
        path = parent.rstrip(b"/") + b"/" + entry.name
        may_list = view.actions["list"].decide(path)
        if not may_list.allowed:
            return None
        may_stat = view.actions["stat"].decide(path)
        if may_list.plain and not may_stat.allowed:
            return ListEntry(entry.name, entry.kind, None)
        held = -1
        try:
            held = open_path_beneath(directory, entry.name)
            facts = os.fstat(held)
            around = None
            if may_list.asks_surroundings or may_stat.asks_surroundings:
                around = root.surroundings(held)
            asks_links = may_list.asks_links or may_stat.asks_links
            if (
                asks_links
                and stat.S_ISREG(facts.st_mode)
                and name_is_lost(root, path, held, self._proc_self_fd)
            ):
                return None
        except OSError as error:
            if error.errno in _OURS:  # or a page without this name would pass for a complete one
                raise
            # A mount point is named, but what is mounted there is not looked at.
            seen = error.errno == errno.EXDEV and may_list.plain
            return ListEntry(entry.name, entry.kind, None) if seen else None
        finally:
            if held >= 0:
                os.close(held)
        if (
            not may_list.plain
            and not decide_object(may_list, facts, asker.uid, asker.on_behalf_of_uid, around).allowed
        ):
            return None
        kind = entry.kind or stat.S_IFMT(facts.st_mode) >> 12
        shown = may_stat.plain or (
            may_stat.allowed
            and decide_object(may_stat, facts, asker.uid, asker.on_behalf_of_uid, around).allowed
        )
        return ListEntry(entry.name, kind, file_stat(facts) if shown else None)

    def _judge(self, decision: NameDecision, root: HeldRoot, path: bytes, held: int, asker: Asker) -> Outcome:
        """Decide on an object of any kind and describe it."""
        facts = os.fstat(held)
        objection = root.objection(held)
        if objection is not None and objection != "mount_not_read_only":
            return object_refusal(decision, objection)
        around = root.surroundings(held) if decision.asks_surroundings else None
        allowed, reason, rule = decide_object(decision, facts, asker.uid, asker.on_behalf_of_uid, around)
        if not allowed:
            return Outcome(_DENIED, reason, rule)
        if (
            decision.asks_links
            and stat.S_ISREG(facts.st_mode)
            and name_is_lost(root, path, held, self._proc_self_fd)
        ):
            return object_refusal(decision, "lost_its_name")
        return Outcome(GIVEN, "ok", rule, file_stat(facts))

    def judge_report(self, asker: Asker, action: str, path: bytes, report: Report) -> Outcome:
        """Decide on an object that a helper has looked at, for `action`: `open` or `stat`.

        For `open` the outcome is `ok` only where the helper has it open.
        """
        decision = asker.view.actions[action].decide(path)
        if not decision.allowed:
            return refusal(decision)
        if report.problem is not None:
            return _helper_failed(decision, report.problem)
        facts, filesystem = report.facts, report.filesystem
        if facts is None or filesystem is None:
            return failure(decision, OSError(report.errno, os.strerror(report.errno)))
        opens, regular = action == "open", stat.S_ISREG(facts.st_mode)
        root = self.roots[decision.root.number]  # type: ignore[union-attr]  # allowed has a root
        objection = root.objection_to(filesystem)
        if objection is not None and (opens or objection != "mount_not_read_only"):
            return object_refusal(decision, objection)
        if opens and not regular:
            return object_refusal(decision, _kind_refused(facts.st_mode))
        around = Surroundings(time.time_ns(), filesystem.type)
        allowed, reason, rule = decide_object(decision, facts, asker.uid, asker.on_behalf_of_uid, around)
        if not allowed:
            return Outcome(_DENIED, reason, rule)
        if decision.asks_links and regular:
            # Another machine, or a program, says how many there are, and may take names away unseen.
            if filesystem.type in HELPED_FILESYSTEMS:
                return object_refusal(decision, "links_unknown")
            if report.lost_its_name:
                return object_refusal(decision, "lost_its_name")
        if opens and not report.opened:
            return _helper_failed(decision, "helper_ended")
        return Outcome(GIVEN, "ok", rule) if opens else Outcome(GIVEN, "ok", rule, file_stat(facts))


class FollowingOpener(Opener):
    """The same where a rule follows links: what these lead to is bounded, anew for each request."""

    def open(self, asker: Asker, paths: Sequence[bytes], descriptors: list[int]) -> list[Outcome]:
        """Open as `Opener.open`."""
        self._left_behind_links = MOST_BEHIND_LINKS
        return super().open(asker, paths, descriptors)

    def open_or_copy(
        self, asker: Asker, paths: Sequence[bytes], descriptors: list[int], copies: list[bytes]
    ) -> list[Outcome]:
        """Open or copy as `Opener.open_or_copy`."""
        self._left_behind_links = MOST_BEHIND_LINKS
        return super().open_or_copy(asker, paths, descriptors, copies)

    def describe(self, asker: Asker, paths: Sequence[bytes]) -> list[Outcome]:
        """Describe as `Opener.describe`."""
        self._left_behind_links = MOST_BEHIND_LINKS
        return super().describe(asker, paths)

    def list(self, asker: Asker, path: bytes, cookie: int, most: int) -> Page:
        """List as `Opener.list`."""
        self._left_behind_links = MOST_BEHIND_LINKS
        return super().list(asker, path, cookie, most)


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


def refusal(decision: NameDecision) -> Outcome:
    """Return the outcome for a path that is refused by its name."""
    return Outcome(_INVALID.get(decision.reason, _DENIED), decision.reason, decision.rule)


def object_refusal(decision: NameDecision, reason: str) -> Outcome:
    """Return the outcome for an object that is not served, whatever the conditions say of it."""
    rule = decision.rule or decision.allows[0]
    return Outcome(_OF_OBJECT[reason] if decision.plain else _DENIED, reason, rule)


def failure(decision: NameDecision, error: OSError) -> Outcome:
    """Turn a system call that failed into a denial."""
    number = error.errno or errno.EIO
    rule = decision.rule or decision.allows[0]
    if number in _OURS:
        return Outcome(broken(number), errno.errorcode[number], rule)
    reason, result = _BY_ERRNO.get(number, (errno.errorcode.get(number, "unknown"), broken(number)))
    return Outcome(result if decision.plain else _DENIED, reason, rule)


def _no_room_for(size: int, room: int, rule: Rule | None) -> Outcome:
    """Return why a file is not copied that has more than `room` bytes, or than any copy."""
    if size > MAX_COPY:
        return Outcome(refused(Reason.TOO_LARGE), "too_large", rule)
    assert size > room  # noqa: S101 - or it would have been copied
    return Outcome(refused(Reason.LIMIT), "reply_full", rule)


def _versions(facts: os.stat_result) -> tuple[int, int, int]:
    """Return what changes when the contents do."""
    return facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns


def _helper_failed(decision: NameDecision, problem: str) -> Outcome:
    return Outcome(_OF_HELPERS[problem], problem, decision.rule or decision.allows[0])


def _kind_refused(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "is_directory"
    return "symlink" if stat.S_ISLNK(mode) else "not_regular"


def file_stat(facts: os.stat_result | ReportedFacts) -> FileStat:
    """Return the stat record."""
    return FileStat(
        device=facts.st_dev,
        inode=facts.st_ino,
        mode=facts.st_mode,
        links=facts.st_nlink,
        uid=facts.st_uid,
        gid=facts.st_gid,
        size=facts.st_size,
        mtime_ns=facts.st_mtime_ns,
        ctime_ns=facts.st_ctime_ns,
    )
