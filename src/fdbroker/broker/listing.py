"""One page of a directory: what the actions `list` and `stat` allow of each name."""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING, NamedTuple

from fdbroker.broker.judging import describe, file_stat, find, name_is_lost
from fdbroker.broker.outcomes import OURS, Outcome, failure, object_refusal, refusal
from fdbroker.kernel.files import DirectoryEntry, open_path_beneath, read_directory, reopen_for_reading
from fdbroker.policy.decide import decide_object
from fdbroker.wire.format import COOKIE, HEADER, MAX_REPLY, RESULT, Reason
from fdbroker.wire.messages import ListEntry, refused
from fdbroker.wire.replies import encode_list_entry

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fdbroker.broker.dispatch import Asker
    from fdbroker.broker.judging import Found
    from fdbroker.broker.links import Follower
    from fdbroker.broker.roots import HeldRoot
    from fdbroker.policy.decide import NameDecision

_PAGE = 256
_TRIES = 4
_HEAD = HEADER.size + RESULT.size + COOKIE.size


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


class Lister:
    """Reads pages of directories below held roots."""

    def __init__(
        self, roots: Sequence[HeldRoot], proc_self_fd: int, follower: Follower, ping: Callable[[], None]
    ) -> None:
        self._roots = roots
        self._proc_self_fd = proc_self_fd
        self._follower = follower
        self._ping = ping

    def page(self, asker: Asker, path: bytes, cookie: int, most: int) -> Page:
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

        def use(found: Found) -> Outcome:
            page = self._page_at_rest(asker, found.decision, found.path, cookie, most)
            outcome = page.outcome
            if outcome.facts is not None and (outcome.facts.device, outcome.facts.inode) != (
                found.facts.st_dev,
                found.facts.st_ino,
            ):
                return object_refusal(found.decision, "moved")
            pages.append(page)
            return outcome

        outcome = self._follower.use("list", decision, path, asker, use)
        return pages[0]._replace(outcome=outcome) if pages else Page(outcome)

    def _page_at_rest(
        self, asker: Asker, decision: NameDecision, path: bytes, cookie: int, most: int
    ) -> Page:
        for _ in range(_TRIES):
            page = self._page(asker, decision, path, cookie, most)
            if page is not None:
                return page
        return Page(object_refusal(decision, "moved"))

    def _page(self, asker: Asker, decision: NameDecision, path: bytes, cookie: int, most: int) -> Page | None:
        """Give the page, or None where the directory was touched meanwhile."""
        root = self._roots[decision.root.number]  # type: ignore[union-attr]  # allowed has a root
        if root.helpers:
            return Page(object_refusal(decision, "not_listed"))
        try:
            found = find(decision, root, path)
            try:
                return self._page_of(found, asker, cookie, most)
            finally:
                os.close(found.held)
        except OSError as error:
            return Page(failure(decision, error))

    def _page_of(self, found: Found, asker: Asker, cookie: int, most: int) -> Page | None:
        held, facts, root, path, decision = found
        if decision.followed is not None and stat.S_ISLNK(facts.st_mode):
            # What is asked of the object is asked of what the link leads to.
            return Page(object_refusal(decision, "symlink"))
        outcome = describe(found, asker, self._proc_self_fd)
        if outcome.facts is None:
            return Page(outcome)
        if not stat.S_ISDIR(facts.st_mode):
            kind = "symlink" if stat.S_ISLNK(facts.st_mode) else "not_directory"
            return Page(object_refusal(decision, kind))
        opened = reopen_for_reading(self._proc_self_fd, held)
        try:
            try:
                os.lseek(opened, cookie, os.SEEK_SET)
            except (OverflowError, OSError):
                return Page(Outcome(refused(Reason.PATH_INVALID), "cookie", outcome.rule))
            chunk = read_directory(opened)
            asked = _Listing(asker, root, path, most or _PAGE)
            entries, cookie = self._entries(asked, held, chunk, cookie)
            # Where the whole chunk was used, a look behind it saves the client a page without entries.
            last = not chunk or (cookie == chunk[-1].next and not read_directory(opened))
        finally:
            os.close(opened)
        again = find(decision, root, path)
        os.close(again.held)
        now = again.facts
        if (now.st_dev, now.st_ino) != (facts.st_dev, facts.st_ino):
            return Page(object_refusal(decision, "moved"))
        # Times of Linux 6.13 tell any two changes apart if somebody looked in between, and we did; older
        # ones know ticks of the clock.
        if (now.st_mtime_ns, now.st_ctime_ns) != (facts.st_mtime_ns, facts.st_ctime_ns):
            return None
        # Behind the last page there is nothing, and the position would tell of names that were left out.
        return Page(outcome, entries, 0 if last else cookie, last=last)

    def _entries(
        self, asked: _Listing, held: int, names: Sequence[DirectoryEntry], cookie: int
    ) -> tuple[Sequence[bytes], int]:
        """Return up to `asked.most` encoded entries that fit into a reply, and the cookie behind them.

        What is left out does not count, so that pages do not tell how much it is.
        """
        encoded: list[bytes] = []
        size = _HEAD
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
            if error.errno in OURS:  # or a page without this name would pass for a complete one
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
