"""One walk: everything below a directory, a step at a time, whatever is renamed meanwhile.

A step opens each directory it reads by its whole path from the root, and each
entry by its one name in that directory's descriptor. A directory that is held
goes on resolving wherever somebody moves it; so, before anything is given,
every directory of the step is resolved again and must be the same one,
untouched. If one is not, all that the step found is closed and forgotten, and
the step is made once more with each entry resolved whole from the root: that
is slower, always safe, and gets on in directories that never rest.

Between two steps a walk holds no descriptor, and of each directory on the way
to where it is only the position to go on from. No recursion: a path's length
bounds the depth. Nothing here raises but for bugs; what fails is told by the
end (`Incomplete`).
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Collection
from itertools import repeat
from operator import attrgetter
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from fdbroker.broker.judging import file_stat, name_is_lost
from fdbroker.broker.outcomes import Given, Outcome, failure, object_refusal, refusal
from fdbroker.broker.watchdog import nothing
from fdbroker.kernel.descriptors import close_all
from fdbroker.kernel.errors import SyscallError
from fdbroker.kernel.files import (
    open_path_beneath,
    open_regular_entries,
    parse_directory_chunk,
    read_directory_chunk,
    reopen_for_reading,
)
from fdbroker.policy.decide import decide_object
from fdbroker.policy.globs import compile_glob
from fdbroker.policy.paths import MAX_NAME_BYTES, problem_with_path
from fdbroker.wire.format import (
    ANY_TIME,
    HEADER,
    MAX_PATHS,
    MAX_REPLY,
    RESULT,
    STAT,
    WALK_END,
    WALK_ENTRY,
    WALK_ENTRY_HAS_DESCRIPTOR,
    Incomplete,
    Reason,
    WalkKind,
)
from fdbroker.wire.messages import GIVEN, FileStat, Result, WalkEnd, refused

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from fdbroker.broker.dispatch import Asker
    from fdbroker.broker.roots import HeldRoot
    from fdbroker.policy.decide import NameDecision, ObjectDecision, View
    from fdbroker.policy.globs import Glob, Remainder
    from fdbroker.policy.rules import Rule
    from fdbroker.wire.messages import WalkRequest

BATCH = 250  # entries where the client leaves it to us: a frame has its price, and 253 descriptors at most
_AT_A_TIME = 32  # entries, of which each may wait for a disk, until the watchdog is told that it goes on
MOST_ENTRIES = 1024  # that one step looks at, so that the loop gets to others
MOST_DIRECTORIES = 64  # that one step opens, and so holds
# After which a step opens no other directory, as deep ones take their time; or, in one, tries no other name
# with the client's globs: 16 of them may take some milliseconds for one name.
_SECONDS = 0.01
_LEVELS_READ_AHEAD = 8  # the innermost ones; the others read their directory again from where they were
_SEGMENT = 4096  # bytes of a chunk that are parsed at once
_BYTES = MAX_REPLY - HEADER.size - RESULT.size - WALK_END.size
_ENTRY_HEAD = WALK_ENTRY.size + STAT.size
_PACK_ENTRY = WALK_ENTRY.pack

# What readdir's d_type says, and what st_mode does in its upper four bits.
_REGULAR, _DIRECTORY, _SYMLINK = stat.S_IFREG >> 12, stat.S_IFDIR >> 12, stat.S_IFLNK >> 12
_UNKNOWN = 0
_KIND_OF = {_REGULAR: WalkKind.REGULAR, _DIRECTORY: WalkKind.DIRECTORY, _SYMLINK: WalkKind.SYMLINK}
_BY_ERRNO = {
    errno.ENOENT: Incomplete.CHANGED,
    errno.ENOTDIR: Incomplete.CHANGED,
    errno.ELOOP: Incomplete.CHANGED,
    errno.EXDEV: Incomplete.CROSSES_MOUNT,
    errno.ENAMETOOLONG: Incomplete.TOO_LONG,
}
# Failures of the broker as a whole: they end a walk.
_OURS = {
    errno.EMFILE: Incomplete.LIMIT,
    errno.ENFILE: Incomplete.LIMIT,
    errno.ENOMEM: Incomplete.FAILED,
}
_TOO_LONG = frozenset({"path_too_long", "name_too_long"})
_NO_ENTRIES: Sequence[tuple[bytes, int, int]] = ()


NONE_OPENED: Mapping[Rule, int] = MappingProxyType({})


class Paths(Collection[bytes]):
    """The absolute paths of entries, with the start before them if it is given: made for the audit alone."""

    __slots__ = ("_entries", "_prefix", "_start")

    def __init__(self, entries: Sequence[bytes], prefix: bytes, start: bytes | None = None) -> None:
        """`prefix` is what stands before the paths of the entries."""
        self._entries = entries
        self._prefix = prefix
        self._start = start

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._entries) + (self._start is not None)

    def __iter__(self) -> Iterator[bytes]:
        """Return one after the other."""
        if self._start is not None:
            yield self._start
        for entry in self._entries:
            yield self._prefix + entry[_ENTRY_HEAD:]

    def __contains__(self, path: object) -> bool:
        """Return whether it is one of them."""
        return path in list(self)


NO_PATHS = Paths([], b"")


class Batch(NamedTuple):
    """What one step found.

    `entries` are encoded; `descriptors` are those of the entries that have one, in order, and the
    caller's from now on. `paths` and `outcomes` are what the audit is to say: absolute paths and what
    became of them, one for each entry, and before the first of them one for the start. Without entries and
    without an end there is nothing to send yet. Where rules are limited, `opened_by` counts what they gave,
    and `held_back_by` is the one that gave no more.
    """

    result: Result
    entries: list[bytes]
    paths: Paths
    outcomes: list[Outcome]
    descriptors: list[int]
    end: WalkEnd | None
    opened_by: Mapping[Rule, int] = NONE_OPENED
    held_back_by: Rule | None = None


class _Level:
    """A directory between the start and where the walk is: what is left of it.

    Its path is the first `length` bytes of the walk's. Those `entries` from
    `next` on were parsed, its `chunk`, which came by `read_by`, was from byte `at` on
    not; what comes behind the last entry that was looked at is at `position`.
    """

    __slots__ = (
        "at",
        "chunk",
        "entries",
        "globs",
        "identity",
        "is_read",
        "length",
        "next",
        "position",
        "read_by",
        "root",
    )

    def __init__(self, length: int, root: int, identity: tuple[int, int], globs: tuple[int, ...]) -> None:
        self.length = length
        self.root = root  # its number
        self.identity = identity  # device, inode
        self.globs = globs  # the states of the filter's globs behind this directory's name
        self.is_read = False
        self.position = 0
        self.forget_chunk()

    def forget_chunk(self) -> None:
        """Keep the position alone."""
        self.entries = _NO_ENTRIES
        self.next = self.at = 0
        self.chunk = b""
        self.read_by: _Visit | None = None

    def state(self) -> tuple[object, ...]:
        """Return all that steps change."""
        return _what_steps_change(self)

    def restore(self, state: tuple[object, ...]) -> None:
        """Be again as when `state` was taken."""
        for name, value in zip(_CHANGED_BY_STEPS, state, strict=True):
            setattr(self, name, value)


_CHANGED_BY_STEPS = ("entries", "next", "chunk", "at", "position", "identity", "is_read")
_what_steps_change = attrgetter(*_CHANGED_BY_STEPS)


class _PlainNames(NamedTuple):
    """In a directory: regular files of all names but `exceptions` are opened, and nothing else is asked."""

    exceptions: frozenset[bytes]
    given: Outcome


class _Visit:
    """A directory that a step has open. `touched`: what must be as it was when it was opened."""

    __slots__ = ("asked_for_plain", "descriptor", "path", "plain", "reads", "remainders", "root", "touched")

    def __init__(
        self, descriptor: int, facts: os.stat_result, path: bytes, root: HeldRoot, remainders: list[Remainder]
    ) -> None:
        self.plain: _PlainNames | None = None
        self.asked_for_plain = False
        self.descriptor = descriptor  # O_PATH until it is read
        self.reads = False
        self.path = path
        self.root = root
        self.remainders = remainders  # of the filter's globs
        self.touched = _touched(facts)


class _Step:
    """What one step has found so far, and how the walk was before it."""

    __slots__ = (
        "budget",
        "careful",
        "descriptors",
        "directories",
        "entries",
        "held_back_by",
        "left_out",
        "levels",
        "most_of",
        "opened_by",
        "outcomes",
        "path",
        "room",
        "room_by",
        "size",
        "states",
        "until",
        "visits",
    )

    def __init__(
        self,
        room: int,
        levels: Sequence[_Level],
        path: bytes,
        *,
        careful: bool,
        most_of: Callable[[Rule], int] | None = None,
    ) -> None:
        # How many files a rule may open here, where some rule is limited; how many each of those did.
        self.most_of = most_of
        self.opened_by: dict[Rule, int] = {}
        self.room_by: dict[Rule, int] = {}  # as it was when it was asked for: the kernel may have to be
        self.held_back_by: Rule | None = None
        self.room = room
        self.careful = careful
        self.budget = MOST_ENTRIES
        self.until = time.monotonic() + _SECONDS
        self.size = 0
        self.directories = 0
        self.entries: list[bytes] = []
        self.outcomes: list[Outcome] = []
        self.descriptors: list[int] = []
        self.left_out: dict[Incomplete, int] = {}
        self.visits: dict[_Level, _Visit] = {}
        self.levels = list(levels)
        self.path = path
        self.states: dict[_Level, tuple[object, ...]] = {}

    def has_visited_enough(self) -> bool:
        """Return whether other directories have to wait for the next step."""
        return bool(self.visits) and (len(self.visits) >= MOST_DIRECTORIES or time.monotonic() >= self.until)

    def room_of(self, rule: Rule | None) -> int:
        """Return how many files more a rule may open here; 0: it holds the step back."""
        if self.most_of is None or rule is None or rule.limits is None:
            return self.room
        most = self.room_by.get(rule)
        if most is None:
            most = self.room_by[rule] = self.most_of(rule)
        room = most - self.opened_by.get(rule, 0)
        if room <= 0:
            self.held_back_by = rule
        return max(0, room)

    def is_held_back(self) -> bool:
        """Return whether what comes next is for a later step, when its rule gives more."""
        return self.held_back_by is not None

    def count_opened(self, rule: Rule | None, count: int) -> None:
        """Count what a rule opened here, if it is limited. What it did not open at all is no count of 0."""
        if count and rule is not None and rule.limits is not None:
            self.opened_by[rule] = self.opened_by.get(rule, 0) + count

    def leave_out(self, why: Incomplete) -> None:
        """Count something that is not named."""
        self.left_out[why] = self.left_out.get(why, 0) + 1

    def leave_out_failed(self, error: OSError) -> None:
        """Count something about which a system call failed; raise the error if it is the broker's own."""
        number = error.errno or errno.EIO
        if number in _OURS:
            raise error
        self.leave_out(_BY_ERRNO.get(number, Incomplete.FAILED))

    def close_visits(self) -> None:
        """Close the directories."""
        close_all([visit.descriptor for visit in self.visits.values()])
        self.visits.clear()


class Walk:
    """One walk, by the rules of `view` for one client; owns no descriptor between two steps.

    Between two steps it may be told to `decide_by` a newer policy. The counts are of what was given so
    far; `left_out` counts by reason what was not.
    """

    def __init__(
        self,
        request: WalkRequest,
        roots: Sequence[HeldRoot],
        view: View,
        client_uid: int,
        proc_self_fd: int,
        ping: Callable[[], None] = nothing,
    ) -> None:
        self.view = view
        self._ping = ping
        self.entries = self.descriptors = self.directories = 0
        self.left_out: dict[Incomplete, int] = {}
        self._request = request
        self._filter = request.filter
        self._roots = tuple(roots)
        # Of who asks, and of the client that it asks for.
        self._uids: tuple[int, int | None] = client_uid, None
        self._proc_self_fd = proc_self_fd
        self._most = min(request.most or BATCH, MAX_PATHS)
        self._opens = request.descriptors
        # The way of the walk: one level for each directory, and the path of the innermost.
        self._levels: list[_Level] = []
        self._path = request.path.rstrip(b"/")
        self._prefix = self._path + b"/"
        self._skip = len(self._prefix)
        self._globs: tuple[Glob, ...] = ()
        self._sought = request.behind.split(b"/") if request.behind else []
        self._start: Outcome | None = None  # None until it was looked at; for the audit
        self._start_is_told = False
        self._given = Given()
        self._end: WalkEnd | None = None
        kinds = request.filter.kinds
        hints = {kind for kind in range(16) if _KIND_OF.get(kind, WalkKind.OTHER) & kinds}
        # What has another type is not even looked at. Directories are entered, whatever is named.
        self._hints = frozenset(hints | {_DIRECTORY, _UNKNOWN})

    def decide_by(self, asker: Asker, roots: Sequence[HeldRoot]) -> None:
        """Decide for `asker` from now on, by a policy with these roots: maybe another one than before."""
        self.view = asker.view
        self._uids = asker.uid, asker.on_behalf_of_uid
        if roots is self._roots:
            return
        number_of = {root: number for number, root in enumerate(roots)}
        here = [number_of.get(self._roots[level.root]) for level in self._levels]
        self._roots = tuple(roots)
        for level, number in zip(self._levels, here, strict=True):
            if number is None:  # it is among the roots no more
                self.stop(Incomplete.REFUSED)
                return
            level.root = number

    def step(self, room: int, most_of: Callable[[Rule], int] | None = None) -> Batch:
        """Go on for a while and return up to `room` entries, and the end if it was reached.

        `most_of`: how many files each rule may open here; None: as many as there are.

        A batch without either says that nothing was found yet. Behind the end there is the end again.
        """
        room = min(room, self._most)
        if self._end is not None or room < 1:
            return Batch(GIVEN, [], NO_PATHS, [], [], self._end)
        try:
            if self._start is None:
                if not self._compile_globs():
                    return Batch(GIVEN, [], NO_PATHS, [], [], None)
                self._start = self._begin()
                if self._start.result is not GIVEN:
                    return self._refuse(self._start)
            if self._sought:
                if not self._seek():
                    return self._refuse(Outcome(refused(Reason.NOT_FOUND), "not_found", self._start.rule))
                return Batch(GIVEN, [], NO_PATHS, [], [], None)
            return self._go_on(room, most_of)
        except OSError as error:
            self.stop(_OURS.get(error.errno or 0, Incomplete.FAILED))
        except MemoryError:
            self.stop(Incomplete.FAILED)
        return self._batch([], [], [])

    def cancel(self) -> WalkEnd:
        """End the walk because its client wants no more; return its end."""
        return self.stop(Incomplete.CANCELLED)

    def stop(self, why: Incomplete) -> WalkEnd:
        """End the walk, if it has not ended, for a reason; return its end. Nothing is left to be closed."""
        if self._end is None:
            self.left_out[why] = self.left_out.get(why, 0) + 1
            self._finish()
        assert self._end is not None  # noqa: S101 - for the type checker
        return self._end

    def _finish(self) -> None:
        kinds = Incomplete(0)
        for why in self.left_out:
            kinds |= why
        self._end = WalkEnd(self.entries, self.descriptors, self.directories, kinds)
        self._levels.clear()

    # the start

    def _compile_globs(self) -> bool:
        """Compile the filter's globs, for a while; return whether `_begin` may be called."""
        if not self.view.actions["walk"].decide(self._request.path).allowed:
            return True
        until = time.monotonic() + _SECONDS
        for pattern in self._filter.globs[len(self._globs) :]:
            if time.monotonic() >= until:
                return False
            try:
                self._globs += (compile_glob(pattern),)
            except ValueError:
                break
        return True

    def _begin(self) -> Outcome:
        """Decide on the start and go there."""
        path = self._request.path
        decision = self.view.actions["walk"].decide(path)
        if not decision.allowed:
            return refusal(decision)
        if len(self._globs) < len(self._filter.globs):  # the next one is none
            return Outcome(refused(Reason.PATH_INVALID), "glob", decision.rule)
        held = -1
        try:
            number = decision.root.number  # type: ignore[union-attr]  # allowed has a root
            root = self._roots[number]
            if root.helpers:
                return object_refusal(decision, "not_listed")
            held = _open_whole(root, path)
            facts = os.fstat(held)
            objection = root.objection(held)
            if objection is not None and objection != "mount_not_read_only":
                return object_refusal(decision, objection)
            allowed, reason, rule = self._decide(decision, root, held, facts)
            if not allowed:
                return Outcome(refused(Reason.DENIED), reason, rule)
            if not stat.S_ISDIR(facts.st_mode):
                return object_refusal(decision, "symlink" if stat.S_ISLNK(facts.st_mode) else "not_directory")
        except OSError as error:
            return failure(decision, error)
        finally:
            if held >= 0:
                os.close(held)
        states = tuple(glob.start for glob in self._globs)
        self._levels.append(_Level(len(self._path), number, _identity(facts), states))
        return Outcome(GIVEN, "ok", rule)

    def _seek(self) -> bool:
        """Look further for the path to go on behind; return False where it is not.

        It is found by reading the directories on the way, and so is the place in each. Names count
        for nothing until they were resolved and allowed.
        """
        if problem_with_path(b"/" + self._request.behind) is not None:
            return False
        step = _Step(0, self._levels, self._path, careful=True)
        try:
            while self._sought and step.budget > 0 and not step.has_visited_enough():
                level = self._levels[-1]
                sought = self._sought[0]
                if not self.view.actions["walk"].decide(self._path + b"/" + sought).allowed:
                    return False
                visit = self._visit(level, step)
                if visit is None or not self._fill(level, visit, step):
                    return False
                for name, _, position in level.entries[level.next :]:
                    level.next += 1
                    level.position = position
                    step.budget -= 1
                    if name == sought:
                        del self._sought[0]
                        if not self._go_to(level, name):
                            return False
                        break
            return True
        finally:
            self.directories += step.directories
            step.close_visits()

    def _go_to(self, level: _Level, name: bytes) -> bool:
        """Go to a name that is on the way to the path to go on behind, or is its end."""
        path = self._path + b"/" + name
        held = -1
        try:
            decision = self.view.actions["walk"].decide(path)
            number = decision.root.number  # type: ignore[union-attr]  # the caller saw that it is allowed
            root = self._roots[number]
            held = _open_whole(root, path)
            facts = os.fstat(held)
            if not stat.S_ISDIR(facts.st_mode):
                return not self._sought and self._decide(decision, root, held, facts).allowed
            if self._objection_to_directory(decision, root, held, facts) is not None:
                return False
        except OSError as error:
            if error.errno in _OURS:
                raise
            return False
        finally:
            if held >= 0:
                os.close(held)
        self._descend(level, name, path, number, facts)
        return True

    # one step

    def _go_on(self, room: int, most_of: Callable[[Rule], int] | None) -> Batch:
        step = _Step(room, self._levels, self._path, careful=False, most_of=most_of)
        if not self._make(step):
            self._levels, self._path = step.levels, step.path
            for level, state in step.states.items():
                level.restore(state)
            step = _Step(room, self._levels, self._path, careful=True, most_of=most_of)
            self._make(step)
        self.entries += len(step.entries)
        self.descriptors += len(step.descriptors)
        self.directories += step.directories
        for why, count in step.left_out.items():
            self.left_out[why] = self.left_out.get(why, 0) + count
        if not self._levels:
            self._finish()
        batch = self._batch(step.entries, step.outcomes, step.descriptors)
        if most_of is not None:
            return batch._replace(opened_by=step.opened_by, held_back_by=step.held_back_by)
        return batch

    def _make(self, step: _Step) -> bool:
        """Make a step; return False, with all that it opened closed, if it has to be made carefully."""
        done = False
        try:
            self._gather(step)
            done = step.careful or self._is_as_it_was(step)
        finally:
            if not done:
                close_all(step.descriptors)
            step.close_visits()
        return done

    def _batch(self, entries: list[bytes], outcomes: list[Outcome], descriptors: list[int]) -> Batch:
        start = None
        if not self._start_is_told and self._start is not None:
            self._start_is_told = True
            start, outcomes = self._request.path, [self._start, *outcomes]
        paths = Paths(entries, self._prefix, start)
        return Batch(GIVEN, entries, paths, outcomes, descriptors, self._end)

    def _refuse(self, outcome: Outcome) -> Batch:
        """End a walk that gave nothing yet."""
        self.directories = 0
        self._finish()
        return Batch(outcome.result, [], Paths([], b"", self._request.path), [outcome], [], self._end)

    def _is_as_it_was(self, step: _Step) -> bool:
        """Return whether each directory of the step is still where it was, and was not touched.

        One that was away in between may have had other names there. Times of Linux 6.13 tell any two
        changes apart if somebody looked in between, and we did; older ones know ticks of the clock.
        """
        for visit in step.visits.values():
            again = -1
            try:
                again = _open_whole(visit.root, visit.path)
                if _touched(os.fstat(again)) != visit.touched:
                    return False
            except OSError as error:
                if error.errno in _OURS:
                    raise
                return False
            finally:
                if again >= 0:
                    os.close(again)
        return True

    def _gather(self, step: _Step) -> None:
        """Find what there is to give, until the step has enough or looked at enough."""
        while self._levels and step.budget > 0:
            level = self._levels[-1]
            if level not in step.visits and step.has_visited_enough():
                return
            visit = self._visit(level, step)
            if visit is None or not self._fill(level, visit, step):
                step.budget -= 1
                self._levels.pop()
                self._path = self._path[: self._levels[-1].length] if self._levels else b""
            elif not self._look(level, visit, step):
                return

    def _visit(self, level: _Level, step: _Step) -> _Visit | None:
        """Return the open directory of the innermost level, or None where the walk can't go on in it."""
        visit = step.visits.get(level)
        if visit is not None:
            return visit
        step.states[level] = level.state()
        path = self._path or b"/"
        decision = self.view.actions["walk"].decide(path)
        if not decision.allowed:
            step.leave_out(Incomplete.REFUSED)
            return None
        held = -1
        try:
            root = self._roots[level.root]
            held = _open_whole(root, path)
            facts = os.fstat(held)
            objection = self._objection_to_directory(decision, root, held, facts)
            if objection is None:
                if _identity(facts) != level.identity:
                    # It goes on where the other one was, or it might never end.
                    step.leave_out(Incomplete.CHANGED)
                    level.identity = _identity(facts)
                visit = self._add_visit(step, level, held, facts, path)
                held = -1
                return visit
            step.leave_out(objection)
        except OSError as error:
            step.leave_out_failed(error)
        finally:
            if held >= 0:
                os.close(held)
        return None

    def _add_visit(self, step: _Step, level: _Level, held: int, facts: os.stat_result, path: bytes) -> _Visit:
        """Add an open directory to the step, which owns `held` from now on."""
        root = self._roots[level.root]
        remainders = [glob.remainder(states) for glob, states in zip(self._globs, level.globs, strict=True)]
        if any(remainder.anything for remainder in remainders):
            remainders = []
        visit = step.visits[level] = _Visit(held, facts, path, root, remainders)
        return visit

    def _decide(
        self, decision: NameDecision, root: HeldRoot, held: int, facts: os.stat_result
    ) -> ObjectDecision:
        around = root.surroundings(held) if decision.asks_surroundings else None
        return decide_object(decision, facts, *self._uids, around)

    def _plain_names(self, level: _Level, visit: _Visit, step: _Step) -> _PlainNames | None:
        """Return for which names in a directory `_take_plain_files` is right, None if for none."""
        if not self._opens or step.careful or visit.root.cross_mounts:
            return None
        named, opened = (self.view.actions[action].decide_most_in(visit.path) for action in ("walk", "open"))
        if (
            named is None
            or opened is None
            or not (named.decision.plain and opened.decision.plain)
            or named.decision.root.number != level.root  # type: ignore[union-attr]  # allowed has a root
            or named.longest_name < MAX_NAME_BYTES
        ):
            return None
        rule = opened.decision.rule
        exceptions = frozenset((*named.exceptions, *opened.exceptions))
        return _PlainNames(exceptions, self._given[rule])

    def _objection_to_directory(
        self, decision: NameDecision, root: HeldRoot, held: int, facts: os.stat_result
    ) -> Incomplete | None:
        """Return why what is held is not walked through, or None."""
        if root.objection(held) == "filesystem":
            return Incomplete.CROSSES_MOUNT
        if not stat.S_ISDIR(facts.st_mode):
            return Incomplete.CHANGED
        if decision.plain or self._decide(decision, root, held, facts).allowed:
            return None
        return Incomplete.REFUSED

    def _fill(self, level: _Level, visit: _Visit, step: _Step) -> bool:
        """See that there are parsed entries; return False at the end of the directory."""
        if level.next < len(level.entries):
            return True
        try:
            while True:
                level.entries, level.at = parse_directory_chunk(level.chunk, level.at, _SEGMENT)
                level.next = 0
                if level.entries:
                    return True
                if not visit.reads:
                    opened = reopen_for_reading(self._proc_self_fd, visit.descriptor)
                    os.close(visit.descriptor)
                    visit.descriptor, visit.reads = opened, True
                if not level.is_read:
                    level.is_read = True
                    step.directories += 1
                # Where the chunk came by this descriptor, it stands behind it. (Setting that again would make
                # some file systems sort the whole directory again.)
                if level.position and level.read_by is not visit:
                    os.lseek(visit.descriptor, level.position, os.SEEK_SET)
                level.read_by = visit
                level.chunk, level.at = read_directory_chunk(visit.descriptor), 0
                if not level.chunk:
                    return False
        except OSError as error:
            step.leave_out_failed(error)
            return False

    def _look(self, level: _Level, visit: _Visit, step: _Step) -> bool:
        """Look at parsed entries until a directory is entered; return False when the step is full."""
        skip, hints, remainders = self._skip, self._hints, visit.remainders
        names, room, prefix = step.entries, step.room, self._path + b"/"
        end = min(len(level.entries), level.next + step.budget)
        until = time.monotonic() + _SECONDS
        while level.next < end:
            if remainders and time.monotonic() >= until:
                return False
            name, hint, position = level.entries[level.next]
            if hint == _REGULAR and _REGULAR in hints:
                if not visit.asked_for_plain:
                    visit.asked_for_plain = True
                    visit.plain = self._plain_names(level, visit, step)
                if visit.plain is not None and self._take_plain_files(
                    level, visit.plain, visit, step, end, until
                ):
                    continue
            if step.held_back_by is not None:
                return False
            path = prefix + name
            if len(names) == room or step.size + _ENTRY_HEAD + len(path) - skip > _BYTES:
                return False
            before = level.position
            level.next += 1
            level.position = position
            step.budget -= 1
            if not step.budget % _AT_A_TIME:
                self._ping()
            if hint not in hints or (
                remainders
                and hint not in {_DIRECTORY, _UNKNOWN}
                and not any(remainder.matches(name) for remainder in remainders)
            ):
                continue
            self._meet(level, visit, name, path, step)
            if step.most_of is not None and step.is_held_back():  # this one is for a later step
                level.next -= 1
                level.position = before
                return False
            if self._levels[-1] is not level:
                return True
        return True

    def _take_plain_files(
        self, level: _Level, plain: _PlainNames, visit: _Visit, step: _Step, end: int, until: float
    ) -> bool:
        """Open the regular files that come next and are plain; return False if there is no such, or no room.

        What a walk does all day, written out.
        """
        exceptions, given = plain
        _, least_size, most_size, newer_than, _ = self._filter
        remainders = visit.remainders
        relative_prefix = (self._path + b"/")[self._skip :]
        names, descriptors, pack = step.entries, step.descriptors, _PACK_ENTRY
        longest = _ENTRY_HEAD + len(relative_prefix) + MAX_NAME_BYTES
        room = min(step.room - len(names), (_BYTES - step.size) // longest, step.room_of(given.rule))
        first = place = level.next
        before = len(names)
        wanted = []
        for name, hint, _ in level.entries[first : min(end, first + min(room, BATCH))]:
            if hint != _REGULAR or name in exceptions:
                break
            if remainders:
                if time.monotonic() >= until:
                    break
                place += 1
                if not any(remainder.matches(name) for remainder in remainders):
                    continue
            wanted.append(name)
        if not remainders:
            place += len(wanted)
        opened, found = open_regular_entries(
            visit.descriptor, wanted, self._proc_self_fd, least_size, most_size, newer_than
        )
        if -1 not in opened:
            # As it mostly is: all are what they seemed to be. The step owns them, before anything may raise.
            descriptors += opened
            heads = {
                length: pack(len(relative_prefix) + length, _REGULAR, WALK_ENTRY_HAS_DESCRIPTOR)
                for length in set(map(len, wanted))
            }
            parts = zip(map(heads.__getitem__, map(len, wanted)), found, repeat(relative_prefix), wanted)
            names += map(b"".join, parts)  # type: ignore[arg-type]  # none of `found` is an error
        else:
            descriptors += [descriptor for descriptor in opened if descriptor >= 0]
            for name, descriptor, record in zip(wanted, opened, found, strict=True):
                if isinstance(record, OSError):
                    step.leave_out_failed(record)
                elif descriptor >= 0:
                    path = relative_prefix + name
                    names.append(pack(len(path), _REGULAR, WALK_ENTRY_HAS_DESCRIPTOR) + record + path)
                elif not stat.S_ISREG(FileStat.decode(record).mode):
                    step.leave_out(Incomplete.CHANGED)  # the directory said otherwise a moment ago
        self._ping()
        step.count_opened(given.rule, len(names) - before)
        step.outcomes += [given] * (len(names) - before)
        step.size += sum(map(len, names[before:]))
        step.budget -= place - first
        if place == first:
            return False
        level.next = place
        level.position = level.entries[place - 1][2]
        return True

    def _meet(self, level: _Level, visit: _Visit, name: bytes, path: bytes, step: _Step) -> None:
        """Look at an entry of any kind, and enter it if it is a directory to be entered."""
        decision = self.view.actions["walk"].decide(path)
        if not decision.allowed:
            step.leave_out(Incomplete.TOO_LONG if decision.reason in _TOO_LONG else Incomplete.REFUSED)
            return
        number = decision.root.number  # type: ignore[union-attr]  # allowed has a root
        root = self._roots[number]
        held = -1
        try:
            # A root within another root is what was opened as a root, and behind it that root's rules hold.
            if step.careful or number != level.root:
                held = _open_whole(root, path)
            else:
                held = open_path_beneath(visit.descriptor, name, root.cross_mounts)
            facts = os.fstat(held)
            if not stat.S_ISDIR(facts.st_mode):
                self._meet_file(decision, visit, root, path, held, facts, step)
                return
            objection = self._objection_to_directory(decision, root, held, facts)
            if objection is None and root.cross_mounts and self._is_above(_identity(facts)):
                objection = Incomplete.CROSSES_MOUNT
            if objection is not None:
                step.leave_out(objection)
                return
            if self._is_wanted(facts, visit, name):
                rule = self._decide(decision, root, held, facts).rule
                self._give(step, path, file_stat(facts), rule)
            below = self._descend(level, name, path, number, facts)
            if not step.has_visited_enough():
                self._add_visit(step, below, held, facts, path)
                held = -1
        except OSError as error:
            step.leave_out_failed(error)
        finally:
            if held >= 0:
                os.close(held)

    def _meet_file(
        self,
        decision: NameDecision,
        visit: _Visit,
        root: HeldRoot,
        path: bytes,
        held: int,
        facts: os.stat_result,
        step: _Step,
    ) -> None:
        """Name what is no directory, if it is wanted and allowed."""
        if not self._is_wanted(facts, visit, path.rpartition(b"/")[2]):
            return
        is_regular = stat.S_ISREG(facts.st_mode)
        opens = self._opens and is_regular
        objection = root.objection(held)
        if objection is not None and (opens or objection != "mount_not_read_only"):
            step.leave_out(Incomplete.CROSSES_MOUNT)
            return
        allowed, _, rule = self._decide(decision, root, held, facts)
        asks_links = decision.asks_links
        if allowed and opens:
            decision = self.view.actions["open"].decide(path)
            allowed = decision.allowed
            asks_links = asks_links or decision.asks_links
            if allowed:
                allowed, _, rule = self._decide(decision, root, held, facts)
        if not allowed:
            step.leave_out(Incomplete.REFUSED)
            return
        if is_regular and asks_links and name_is_lost(root, path, held, self._proc_self_fd):
            step.leave_out(Incomplete.CHANGED)
            return
        if opens and step.most_of is not None and not step.room_of(rule):
            return
        opened = reopen_for_reading(self._proc_self_fd, held) if opens else None
        self._give(step, path, file_stat(facts), rule, opened)

    def _is_wanted(self, facts: os.stat_result, visit: _Visit, name: bytes) -> bool:
        """Return whether the filter names it."""
        kinds, least_size, most_size, newer_than, _ = self._filter
        kind = _KIND_OF.get(facts.st_mode >> 12, WalkKind.OTHER)
        return (
            bool(kinds & kind)
            and (kind is not WalkKind.REGULAR or least_size <= facts.st_size <= most_size)
            and (newer_than == ANY_TIME or facts.st_mtime_ns > newer_than)
            and (not visit.remainders or any(remainder.matches(name) for remainder in visit.remainders))
        )

    def _is_above(self, identity: tuple[int, int]) -> bool:
        """Return whether the walk is in this directory already: a mount may be of what is above it."""
        return any(level.identity == identity for level in self._levels)

    def _give(
        self, step: _Step, path: bytes, facts: FileStat, rule: Rule | None, opened: int | None = None
    ) -> None:
        """Add an entry to the step, which owns `opened` from now on."""
        flags = 0
        if opened is not None:
            step.descriptors.append(opened)
            step.count_opened(rule, 1)
            flags = WALK_ENTRY_HAS_DESCRIPTOR
        relative = path[self._skip :]
        entry = _PACK_ENTRY(len(relative), facts.mode >> 12, flags) + facts.encode() + relative
        step.entries.append(entry)
        step.outcomes.append(self._given[rule])
        step.size += len(entry)

    def _descend(self, level: _Level, name: bytes, path: bytes, number: int, facts: os.stat_result) -> _Level:
        """Go into the directory `name` of the innermost level."""
        states = tuple(glob.step(before, name) for glob, before in zip(self._globs, level.globs, strict=True))
        below = _Level(len(path), number, _identity(facts), states)
        self._levels.append(below)
        self._path = path
        if len(self._levels) > _LEVELS_READ_AHEAD:
            self._levels[-1 - _LEVELS_READ_AHEAD].forget_chunk()
        return below


def _open_whole(root: HeldRoot, path: bytes) -> int:
    if root.helpers:  # what is below may never be answered, so it is not walked
        raise SyscallError(errno.EXDEV, "openat2", path=path)
    return open_path_beneath(root.descriptor, path[root.skip :] or b".", root.cross_mounts)


def _identity(facts: os.stat_result) -> tuple[int, int]:
    return facts.st_dev, facts.st_ino


def _touched(facts: os.stat_result) -> tuple[int, int, int, int]:
    """Return what differs between two directories, and between one before and after a change of its names."""
    return facts.st_dev, facts.st_ino, facts.st_mtime_ns, facts.st_ctime_ns
