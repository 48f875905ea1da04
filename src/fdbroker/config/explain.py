"""Why a policy allows something or not: rule by rule, condition by condition, without a broker.

The verdict is that of the broker's own code (fdbroker.policy.decide). The
details beside it come from the same compiled rules, and a property test holds
the two together.

What the broker would meet under the path is looked at by whoever runs this, as
the broker would: below the root, without symbolic links, by O_PATH. Where that
is not permitted, a rule that asks something of the object stays undecided.
"""

from __future__ import annotations

import errno
import json
import os
import pwd
import select
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from fdbroker.broker.helper_pool import STEP_SECONDS
from fdbroker.broker.links import MOST_LINKS, LinkRefusedError, name_behind_link
from fdbroker.broker.roots import (
    HELPED_FILESYSTEMS,
    SERVED_FILESYSTEMS,
    HeldRoot,
    RootError,
    hold_roots,
)
from fdbroker.config.compile import compile_files
from fdbroker.config.compiled import MAX_FILE
from fdbroker.config.errors import ConfigError, Problem
from fdbroker.config.identities import OVERFLOW_ID, Lookups, SystemLookups
from fdbroker.config.names import group_text, id_of_number, is_number, user_text
from fdbroker.config.sources import PolicyFile, directory_of_parts, parts_among, read_policy_files
from fdbroker.kernel import children, process
from fdbroker.kernel.files import filesystem_of, open_path_beneath
from fdbroker.policy.decide import NameDecision, Policy, decide_object
from fdbroker.policy.paths import components_below, problem_with_path
from fdbroker.policy.rules import (
    Bounds,
    ClientFacts,
    ClientMatch,
    Conditions,
    FileFacts,
    PolicyError,
    Root,
    Rule,
    RuleSet,
    Surroundings,
    read_policy,
)
from fdbroker.wire.client import for_broker

ALLOW, DENY, UNKNOWN = "allow", "deny", "unknown"

# As in the broker's audit.
_BY_ERRNO = {
    errno.ENOENT: "not_found",
    errno.ENOTDIR: "not_directory",
    errno.ELOOP: "symlink",
    errno.EXDEV: "crosses_mount",
    errno.ENAMETOOLONG: "path_too_long",
}
# Why something is denied, as in the audit, in words.
REASONS = {
    "deny_rule": "rule {rule} denies it, and a deny rule always wins",
    "no_rule": "no rule allows it, and what is not allowed is denied",
    "outside_roots": "it lies in none of the trees that the policy names (roots)",
    "where_owner": "rule {rule} would allow it, but not with this owner",
    "where_group": "rule {rule} would allow it, but not with this group",
    "where_mode": "rule {rule} would allow it, but not with this mode",
    "where_size": "rule {rule} would allow it, but not of this size",
    "where_links": "rule {rule} would allow it, but not with so many hard links",
    "where_age": "rule {rule} would allow it, but not so long after it was modified, or not so soon",
    "where_filesystem": "rule {rule} would allow it, but not on this type of file system",
    "not_found": "rule {rule} is about it, but there is no such file",
    "not_directory": "rule {rule} is about it, but a component of the path, or what is to be listed, is no"
    " directory",
    "symlink": "rule {rule} is about it, but a component of the path is a symbolic link, and no rule that"
    " allows it follows links (symlinks: within-root): ask for the path that it leads to",
    "link_leaves_root": "rule {rule} is about it, but a component of the path is a symbolic link that is"
    " absolute or leads above its root, and none of those is followed",
    "link_not_normal": "rule {rule} is about it, but a component of the path is a symbolic link with '.',"
    " '..' or '//' behind a name, and none of those is followed",
    "too_many_links": f"rule {{rule}} is about it, but more than {MOST_LINKS} symbolic links lead there",
    "not_followed": "rule {rule} is about it, but its root says 'opens: helpers', and no link is followed"
    " to there",
    "crosses_mount": "rule {rule} is about it, but it is on another mount than its root, which has no"
    " cross_mounts",
    "path_too_long": "the path is longer than any that the broker takes",
    "is_directory": "rule {rule} is about it, but it is a directory, and the broker opens regular files only",
    "not_regular": "rule {rule} is about it, but it is no regular file, and the broker opens nothing else",
    "filesystem": "rule {rule} is about it, but it is on a file system that the broker never serves",
    "timed_out": f"rule {{rule}} is about it, but its file system, or who watches it, did not answer within"
    f" {STEP_SECONDS:g} s, for which a helper of the broker waits",
    "not_listed": "rule {rule} is about it, but its root says 'opens: helpers', and nothing there is listed"
    " or walked",
    "empty": "the path is empty",
    "nul": "the path has a NUL byte",
    "relative": "the path is not absolute",
    "trailing_slash": "the path ends with '/'",
    "empty_component": "the path has an empty component ('//')",
    "dot_component": "the path has a component '.' or '..'",
    "name_too_long": "a component of the path is longer than any name can be",
}
# The broker's view of mounts is its own, and nobody else sees it.
_LATER_MOUNT = (
    "unless its mount was made after the broker was started: that one is writable in the broker's view, and"
    " refused as mount_not_read_only"
)


class RuleCheck(NamedTuple):
    """One thing that a rule asks. `holds` is None where it could not be found out."""

    what: str
    holds: bool | None
    text: str


class RuleReport(NamedTuple):
    """What one rule asks, and which of it holds."""

    name: str
    effect: str
    checks: tuple[RuleCheck, ...]

    @property
    def applies(self) -> bool | None:
        """Whether the rule speaks here; None where the object would have to be seen."""
        return _all(self.checks)

    @property
    def failures(self) -> int:
        """How many of its checks do not hold."""
        return sum(check.holds is False for check in self.checks)


class Verdict(NamedTuple):
    """What comes out: `decision` is allow, deny or unknown; `reason` and `rule` as in the broker's audit."""

    decision: str
    reason: str
    rule: str | None


class Seen(NamedTuple):
    """What lies under the path: `facts`, or a `reason` as in the audit, or a `note` why it was not seen.

    `writable_mount`: it is on another mount than its root, which is writable from here. In the broker's
    view it is read-only if it was there when the broker was started. `leads_to`: the name for which the
    first link stands; `reason` is `symlink` then. `surroundings`: of `facts`.
    """

    facts: FileFacts | None = None
    reason: str | None = None
    note: str = ""
    writable_mount: bool = False
    leads_to: bytes | None = None
    surroundings: Surroundings | None = None


class Explanation(NamedTuple):
    """A whole answer. `seen` is None where the name alone was refused, and so nothing was looked at.

    `on_behalf_of`: whom the client, a service, acts for; None: it asks for itself. `followed`: what is
    answered about the name to which a link leads that is followed; `verdict` is then on both names.
    """

    path: bytes
    action: str
    client: ClientFacts
    on_behalf_of: ClientFacts | None
    root: Root | None
    verdict: Verdict
    seen: Seen | None
    rules: tuple[RuleReport, ...]
    followed: Explanation | None = None

    @property
    def sentence(self) -> str:
        """The verdict in one sentence."""
        if self.followed is not None:
            leads = f"it is a name of {_text(self.followed.path)}, by a symbolic link"
            if self.verdict == self.followed.verdict:
                return f"{self.followed.sentence}; {leads}"
            return f"{self._replace(followed=None).sentence}; {leads}"
        decision, reason, rule = self.verdict
        if decision == ALLOW:
            note = self.seen.note if self.seen else ""
            if note and self.seen and self.seen.facts is None:
                note = f"whether it is there was not seen: {note}"
            return f"allowed: rule {rule} allows it" + (f" ({note})" if note else "")
        if decision == UNKNOWN:
            note = self.seen.note if self.seen else ""
            return f"it depends on the file, which could not be looked at: {note}"
        text = REASONS.get(reason, f"the broker would answer {reason}")
        return f"denied: {text.format(rule=rule)}"


Look = Callable[[Root, bytes, str], Seen]


class LoadedPolicy(NamedTuple):
    """A policy to explain. `notes`: why the broker would not take it from this file; `document`: compiled."""

    rules: RuleSet
    notes: tuple[str, ...]
    document: Mapping[str, Any]


def load_for_explaining(path: str, lookups: Lookups | None = None) -> LoadedPolicy:
    """Read a policy, compiled (`.json`) or not, whoever owns it: nothing is put in force.

    `lookups`: another machine's instead of this one's.

    Raises:
        ConfigError: the file can't be read as a policy.
        OSError: it can't be opened.

    """
    notes: tuple[str, ...] = ()
    try:
        files = read_policy_files(path)
    except ConfigError as error:
        notes = tuple(str(problem) for problem in error.problems)
        directory = directory_of_parts(path)
        names = os.listdir(directory) if directory is not None and os.path.isdir(directory) else ()
        files = [_read(name) for name in [path, *parts_among(directory or "", names)]]
    if not path.endswith(".json"):
        compiled = compile_files(files, SystemLookups() if lookups is None else lookups)
        return LoadedPolicy(read_policy(for_broker(compiled)), notes, compiled)
    try:
        document = json.loads(files[0].text)
        rules = read_policy(for_broker(document) if isinstance(document, dict) else document)
        return LoadedPolicy(rules, notes, document)
    except (ValueError, RecursionError, PolicyError) as error:
        cure = "name a policy file, or what `fdbroker policy compile` wrote"
        raise ConfigError([Problem(path, None, None, f"is no compiled policy: {error}", cure)]) from error


def _read(path: str) -> PolicyFile:
    with open(path, "rb") as file:
        return PolicyFile(path, file.read(MAX_FILE))


def client_of_user(name: str) -> ClientFacts | None:
    """Return what the broker would see of a user, by name or number; None if there is no such user.

    A number that no user has is in no group.
    """
    uid = id_of_number(name) if is_number(name) else None
    if is_number(name) and uid is None:
        return None
    try:
        user = pwd.getpwnam(name) if uid is None else pwd.getpwuid(uid)
    except KeyError:
        return None if uid is None else ClientFacts(uid, frozenset())
    groups = os.getgrouplist(user.pw_name, user.pw_gid)
    return ClientFacts(user.pw_uid, frozenset(groups) - {OVERFLOW_ID})


def client_of_this_process() -> ClientFacts:
    """Return what the broker would see of this process, apart from its control group."""
    return ClientFacts(os.geteuid(), frozenset({os.getegid(), *os.getgroups()}) - {OVERFLOW_ID})


def with_control_group(client: ClientFacts, path: str | None, rules: RuleSet) -> ClientFacts:
    """Return `client` as a member of the control group `path` (None: of none that a rule names)."""
    named = frozenset() if path is None else rules.cgroups
    return client._replace(
        cgroups=frozenset(name for name in named if path == name or f"{path}/".startswith(f"{name}/"))
    )


def control_group_of_this_process() -> str | None:
    """Return the control group that this process is in, None where there is no cgroup2."""
    try:
        with open("/proc/self/cgroup", encoding="utf-8", errors="surrogateescape") as file:
            lines = file.read().splitlines()
    except OSError:
        return None
    return next((line[3:] for line in lines if line.startswith("0::")), None)


class Asker(NamedTuple):
    """Who asks, and for whom: `on_behalf_of` is None where a client asks for itself."""

    client: ClientFacts
    on_behalf_of: ClientFacts | None = None

    @property
    def uids(self) -> tuple[int, int | None]:
        """What conditions on owners are about."""
        return self.client.uid, None if self.on_behalf_of is None else self.on_behalf_of.uid


class FactNotGivenError(Exception):
    """A rule asks something of an object that was described, and not this of it; the text is its key."""


class Judged(NamedTuple):
    """What becomes of a request, without the details."""

    path: bytes
    name: NameDecision
    verdict: Verdict
    seen: Seen | None
    followed: Judged | None = None


def judge(
    policy: Policy, asker: Asker, action: str, path: bytes, look: Look, links: int = MOST_LINKS
) -> Judged:
    """Decide on a request as the broker does. `look` says what lies under a path whose name is allowed.

    `links`: how many may be followed.

    Raises:
        FactNotGivenError: `look` gave an object of which something is asked that nobody said.

    """
    decision = policy.view(*asker).actions[action].decide(path)
    if not decision.allowed or decision.root is None:
        rule = None if decision.rule is None else decision.rule.name
        return Judged(path, decision, Verdict(DENY, decision.reason, rule), None)
    seen = look(decision.root, path, action)
    if seen.writable_mount and policy.rule_set.settings.read_only_view_required:
        seen = seen._replace(note=_LATER_MOUNT)
    verdict = _verdict(decision, seen, asker, action)
    followed = None
    if seen.leads_to is not None and decision.followed is not None and action != "walk":
        if links:
            followed = judge(policy, asker, action, seen.leads_to, look, links - 1)
            verdict = _verdict_of_link(decision.followed, followed, asker)
        else:
            verdict = verdict._replace(reason="too_many_links")
    return Judged(path, decision, verdict, seen, followed)


def explain(rules: RuleSet, asker: Asker, action: str, path: bytes, look: Look) -> Explanation:
    """Say what becomes of a request and why. `look` says what lies under a path whose name is allowed.

    Raises:
        FactNotGivenError: as `judge`.

    """
    return explain_judged(rules, asker, action, judge(Policy(rules), asker, action, path, look))


def explain_judged(rules: RuleSet, asker: Asker, action: str, judged: Judged) -> Explanation:
    """Say why a request was decided as it was."""
    path, decision, verdict, seen, behind = judged
    followed = None if behind is None else explain_judged(rules, asker, action, behind)
    serving = _serving(rules, path)
    # What is no path is refused before any rule is read.
    asked = rules.rules if problem_with_path(path) is None else ()
    reports = tuple(_report(rule, asker, action, path, serving, seen or Seen()) for rule in asked)
    return Explanation(path, action, *asker, decision.root, verdict, seen, reports, followed)


def answer_by_name(rules: RuleSet, asker: Asker, action: str, path: bytes) -> dict[str, object]:
    """Return what a broker with these rules answers to who asks it to explain: what the name decides."""
    decision = Policy(rules).view(*asker).actions[action].decide(path)
    rule = decision.rule or (decision.allows[0] if len(decision.allows) == 1 else None)
    return {
        "allowed": decision.allowed,
        "reason": decision.reason,
        "root": None if decision.root is None else decision.root.name,
        "rule": None if rule is None else rule.name,
        "asked_of_object_in_all": sum(allow.where is not None for allow in decision.allows),
        "denies_in_all": len(decision.denies),
    }


def look_as_broker(root: Root, path: bytes, action: str) -> Seen:
    """Look at an object the way the broker does, with the rights of this process; never raises.

    Where helpers look, a child looks first, with a helper's time: who waits for a dead file system can't be
    interrupted.
    """
    if root.helpers and not _is_answered(lambda: _look(root, path, action)):
        return Seen(reason="timed_out")
    return _look(root, path, action)


def _is_answered(look: Callable[[], object]) -> bool:
    """Return whether a child that does this ends in time. Nothing of ours waits for one that does not."""
    child = children.fork_tied()
    if child is None:
        try:
            process.close_range(0)
            look()
        finally:
            os._exit(0)
    ended = select.poll()
    ended.register(child.pidfd, select.POLLIN)
    if ended.poll(1000 * STEP_SECONDS):
        children.reap(child)
        return True
    children.kill(child)
    os.close(child.pidfd)
    return False


def _look(root: Root, path: bytes, action: str) -> Seen:
    held = -1
    try:
        [held_root] = hold_roots([root], read_only_required=False)
    except RootError as error:
        return Seen(note=str(error))
    except OSError as error:
        return Seen(note=f"{os.fsdecode(root.path)}: {error.strerror}")
    try:
        if held_root.helpers and action in {"list", "walk"}:
            return Seen(reason="not_listed")
        held = open_path_beneath(held_root.descriptor, path[root.skip :] or b".", root.cross_mounts)
        facts = os.fstat(held)
        objection = held_root.objection(held)
        writable_mount = _is_on_writable_mount(held_root, path[root.skip :] or b".", held)
        reason = objection or kind_refused(facts.st_mode, action)
        surroundings = held_root.surroundings(held)
        if reason == "symlink":
            return _look_at_link(held_root, path)._replace(facts=facts, surroundings=surroundings)
    except OSError as error:
        if error.errno == errno.ELOOP:
            return _look_at_link(held_root, path)
        reason = _BY_ERRNO.get(error.errno or 0)
        return Seen(reason=reason) if reason else Seen(note=error.strerror or str(error))
    finally:
        for descriptor in (held, held_root.descriptor):
            if descriptor >= 0:
                os.close(descriptor)
    return Seen(facts, reason, writable_mount=writable_mount, surroundings=surroundings)


def _look_at_link(root: HeldRoot, path: bytes) -> Seen:
    try:
        return Seen(reason="symlink", leads_to=name_behind_link(root, path))
    except LinkRefusedError as error:
        return Seen(reason=str(error))
    except OSError as error:
        return Seen(note=error.strerror or str(error))


def _is_on_writable_mount(root: HeldRoot, path: bytes, held: int) -> bool:
    """Return whether an object is on another mount than its root, and that one is writable from here."""
    if not root.cross_mounts or filesystem_of(held).read_only:
        return False
    try:
        os.close(open_path_beneath(root.descriptor, path))
    except OSError as error:
        return error.errno == errno.EXDEV
    return False


_KINDS_NOT_LISTED = frozenset({"symlink", "not_directory"})


def kind_refused(mode: int, action: str) -> str | None:
    """Return why what is there is not of the kind that the action is about, or None."""
    if action == "open" and not stat.S_ISREG(mode):
        if stat.S_ISDIR(mode):
            return "is_directory"
        return "symlink" if stat.S_ISLNK(mode) else "not_regular"
    if action == "list" and not stat.S_ISDIR(mode):
        return "symlink" if stat.S_ISLNK(mode) else "not_directory"
    return None


def _verdict(name: NameDecision, seen: Seen, asker: Asker, action: str) -> Verdict:
    first = (name.rule or name.allows[0]).name
    # Of what is opened its kind is looked at first; of what is listed the conditions, which are about any.
    kind_comes_last = action == "list" and seen.facts is not None and seen.reason in _KINDS_NOT_LISTED
    if seen.reason is not None and not kind_comes_last:
        return Verdict(DENY, seen.reason, first)
    if seen.facts is None:
        return Verdict(ALLOW, "ok", first) if name.plain else Verdict(UNKNOWN, "not_seen", None)
    allowed, reason, rule = decide_object(name, seen.facts, *asker.uids, seen.surroundings)
    if allowed and seen.reason is not None:
        return Verdict(DENY, seen.reason, first)
    return Verdict(ALLOW if allowed else DENY, reason, None if rule is None else rule.name)


def _verdict_of_link(name: NameDecision, leads_to: Judged, asker: Asker) -> Verdict:
    """Return what becomes of a name whose link leads to another: what becomes of that, if both allow it."""
    behind = leads_to
    while behind.followed is not None:
        behind = behind.followed
    seen = behind.seen or Seen()
    if seen.facts is not None and seen.reason != "symlink":
        # What each name asks of what was found comes before what becomes of that.
        allowed, reason, rule = decide_object(name, seen.facts, *asker.uids, seen.surroundings)
        return leads_to.verdict if allowed else Verdict(DENY, reason, None if rule is None else rule.name)
    if leads_to.verdict.decision == DENY or name.plain:
        return leads_to.verdict
    return Verdict(UNKNOWN, "not_seen", None)


def _serving(rules: RuleSet, path: bytes) -> Root | None:
    """Return the deepest root that contains a path."""
    containing = [root for root in rules.roots if components_below(root.path, path) is not None]
    return max(containing, key=lambda root: len(root.path), default=None)


# ---- one rule ----


def _report(
    rule: Rule,
    asker: Asker,
    action: str,
    path: bytes,
    serving: Root | None,
    seen: Seen,
) -> RuleReport:
    effect = DENY if rule.deny else ALLOW
    actions = ", ".join(sorted(rule.actions))
    checks = [
        RuleCheck("action", action in rule.actions, f"is about {actions}"),
        _client_check(rule, asker.client),
        *_on_behalf_of_checks(rule, asker.on_behalf_of),
    ]
    components = components_below(rule.root.path, path)
    checks.append(_root_check(rule, components, serving))
    if components is not None:
        checks += _glob_checks(rule, components)
    if not rule.deny and action == "open" and "descriptor" not in rule.deliver:
        checks.append(RuleCheck("deliver", holds=False, text="hands out no descriptors"))
    if rule.where is not None:
        checks += _condition_checks(rule.where, seen, asker, deny=rule.deny)
    return RuleReport(rule.name, effect, tuple(checks))


def _client_check(rule: Rule, client: ClientFacts) -> RuleCheck:
    holds = any(entry.matches(client, in_doubt=rule.deny) for entry in rule.clients)
    wanted = _clients_text(rule.clients)
    if ClientMatch(None, None, None) in rule.clients:
        return RuleCheck("client", holds, wanted)
    told = f"is about {wanted}; the client is {client_text(client)}"
    if client.label is None and any(entry.labels is not None for entry in rule.clients):
        told += ", whose label is not known"
    return RuleCheck("client", holds, told)


def _on_behalf_of_checks(rule: Rule, acted_for: ClientFacts | None) -> list[RuleCheck]:
    """Return what a rule asks of the client that is acted for, which may be nothing."""
    wanted = f"is about a service that acts for {_clients_text(rule.on_behalf_of)}"
    if acted_for is None:
        text = f"{wanted}; the client acts for nobody"
        return [RuleCheck("on_behalf_of", holds=False, text=text)] if rule.on_behalf_of else []
    if not rule.on_behalf_of:
        text = "does not say for whom the client may act, so it allows what the client asks for itself alone"
        return [] if rule.deny else [RuleCheck("on_behalf_of", holds=False, text=text)]
    holds = any(entry.matches(acted_for, in_doubt=rule.deny) for entry in rule.on_behalf_of)
    return [RuleCheck("on_behalf_of", holds, f"{wanted}; it acts for {client_text(acted_for)}")]


def _root_check(rule: Rule, components: Sequence[bytes] | None, serving: Root | None) -> RuleCheck:
    where = f"{rule.root.name} ({_text(rule.root.path)})"
    if components is None:
        return RuleCheck("root", holds=False, text=f"is about {where}, and the path is not below it")
    if not rule.deny and rule.root is not serving and serving is not None:
        deeper = f"the path belongs to the deeper root {serving.name} ({_text(serving.path)})"
        return RuleCheck(
            "root", holds=False, text=f"is about {where}, but {deeper}, where only its rules allow"
        )
    relative = _text(b"/".join(components)) or "the root itself"
    return RuleCheck("root", holds=True, text=f"{where}; below it: {relative}")


def _glob_checks(rule: Rule, components: Sequence[bytes]) -> list[RuleCheck]:
    matching = [glob.pattern for glob in rule.paths if glob.matches(components)]
    if matching:
        checks = [RuleCheck("paths", holds=True, text=f"matches {_globs(matching)}")]
    else:
        listed = _globs(glob.pattern for glob in rule.paths)
        checks = [RuleCheck("paths", holds=False, text=f"matches none of {listed}")]
    if rule.excepts:
        matching = [glob.pattern for glob in rule.excepts if glob.matches(components)]
        if matching:
            checks.append(
                RuleCheck("except", holds=False, text=f"matches {_globs(matching)}, which is excepted")
            )
        else:
            listed = _globs(glob.pattern for glob in rule.excepts)
            checks.append(RuleCheck("except", holds=True, text=f"matches none of {listed}"))
    return checks


# Each condition alone: what is left of a rule's `where` if nothing else is asked. So the policy's own
# code says whether it holds.
_SECOND = 1_000_000_000
_NOTHING = Conditions(owner=None, gids=None, mode_all=0, mode_none=0, size=None, links=None)


def _condition_checks(where: Conditions, seen: Seen, asker: Asker, *, deny: bool) -> list[RuleCheck]:
    alone: list[tuple[str, Conditions, str]] = []
    if where.owner is not None:
        owners = [user_text(uid) for uid in sorted(where.owner.uids)]
        owners += ["the client itself"] if where.owner.client else []
        owners += ["the client that is acted for"] if where.owner.on_behalf_of else []
        alone.append(("owner", _NOTHING._replace(owner=where.owner), f"must be {_either(owners)}"))
    if where.gids is not None:
        groups = _either(group_text(gid) for gid in sorted(where.gids))
        alone.append(("group", _NOTHING._replace(gids=where.gids), f"must be {groups}"))
    # A compiled policy may ask for a mode and no bit of it. Then, too, the object has to be seen.
    no_bit = where == _NOTHING
    if where.mode_all or where.mode_none or no_bit:
        wanted = [f"have {where.mode_all:#06o}"] if where.mode_all or no_bit else []
        wanted += [f"have nothing of {where.mode_none:#06o}"] if where.mode_none else []
        wanted_text = f"must {' and '.join(wanted)}".replace("0o", "")
        only_mode = _NOTHING._replace(mode_all=where.mode_all, mode_none=where.mode_none)
        alone.append(("mode", only_mode, wanted_text))
    if where.size is not None:
        alone.append(("size", _NOTHING._replace(size=where.size), _bounds_text(where.size, " bytes")))
    if where.links is not None:
        alone.append(("links", _NOTHING._replace(links=where.links), _bounds_text(where.links, "")))
    if where.age_ns is not None:
        seconds = Bounds(*(bound and bound // _SECOND for bound in where.age_ns))
        alone.append(("age", _NOTHING._replace(age_ns=where.age_ns), _bounds_text(seconds, " seconds")))
    if where.filesystems is not None:
        types = _either(filesystem_text(magic) for magic in sorted(where.filesystems))
        only_types = _NOTHING._replace(filesystems=where.filesystems)
        alone.append(("filesystem", only_types, f"must be {types}"))
    checks = []
    for what, condition, text in alone:
        if seen.facts is None or (condition.asks_surroundings and seen.surroundings is None):
            checks.append(RuleCheck(what, holds=None, text=text))
            continue
        try:
            failure = condition.first_failure(seen.facts, *asker.uids, seen.surroundings, deny=deny)
            value = _value_text(what, seen.facts, seen.surroundings)
            checks.append(RuleCheck(what, holds=failure is None, text=f"{text}; {value}"))
        except FactNotGivenError:
            checks.append(RuleCheck(what, holds=None, text=text))
    return checks


def _value_text(what: str, facts: FileFacts, surroundings: Surroundings | None) -> str:
    if what in {"size", "links", "age"} and not stat.S_ISREG(facts.st_mode):
        return "is asked of regular files only, and this is none"
    if surroundings is not None and what == "age":
        age = (surroundings.now_ns - facts.st_mtime_ns) // _SECOND
        return f"is {age}" if age >= 0 else "was modified in the future, so it is 0"
    if surroundings is not None and what == "filesystem":
        return f"is {filesystem_text(surroundings.filesystem)}"
    # Each alone: of an object that was described the others may not be known.
    if what == "owner":
        return f"is {user_text(facts.st_uid)}"
    if what == "group":
        return f"is {group_text(facts.st_gid)}"
    if what == "mode":
        return f"is {mode_text(facts.st_mode)}"
    return f"is {facts.st_size if what == 'size' else facts.st_nlink}"


def _clients_text(entries: Sequence[ClientMatch]) -> str:
    return "; or ".join(entry_text(entry) for entry in entries)


def entry_text(entry: ClientMatch) -> str:
    """Return whom an entry of a rule's clients means, in words."""
    parts = []
    if entry.uids is not None:
        parts.append(f"user {_either(user_text(uid) for uid in sorted(entry.uids))}")
    if entry.gids is not None:
        parts.append(f"group {_either(group_text(gid) for gid in sorted(entry.gids))}")
    if entry.cgroups is not None:
        parts.append(f"control group {_either(sorted(entry.cgroups))}")
    if entry.labels is not None:
        parts.append(f"label {_either(_text(label) for label in sorted(entry.labels))}")
    return " and ".join(parts) or "everybody"


def client_text(client: ClientFacts) -> str:
    """Return who a client is, in words."""
    parts = [f"user {user_text(client.uid)}"]
    if client.gids:
        parts.append(f"groups {', '.join(group_text(gid) for gid in sorted(client.gids))}")
    if client.cgroups:
        parts.append(f"control groups {', '.join(sorted(client.cgroups))}")
    if client.label is not None:
        parts.append(f"label {_text(client.label)}")
    return ", ".join(parts)


def filesystem_text(magic: int) -> str:
    """Return the name of a type of file system; of one that is never served its number."""
    return (SERVED_FILESYSTEMS | HELPED_FILESYSTEMS).get(magic, f"{magic:#x}")


def mode_text(mode: int) -> str:
    """Return permission bits as the policy writes them."""
    return f"0{mode & 0o7777:03o}"  # not S_IMODE: it would not ask whether the mode is known


def _bounds_text(bounds: Bounds, unit: str) -> str:
    parts = [f"at least {bounds.least}"] if bounds.least is not None else []
    parts += [f"at most {bounds.most}"] if bounds.most is not None else []
    return f"must be {' and '.join(parts)}{unit}"


def _globs(patterns: Iterable[bytes]) -> str:
    return ", ".join(_text(pattern) for pattern in patterns)


def _either(words: Iterable[str]) -> str:
    return " or ".join(words) or "nobody"


def _text(path: bytes) -> str:
    return os.fsdecode(path)


def _all(checks: Iterable[RuleCheck]) -> bool | None:
    answers = [check.holds for check in checks]
    if False in answers:
        return False
    return None if None in answers else True
