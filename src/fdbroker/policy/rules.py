"""The compiled policy as values: roots, rules, conditions, and who they are for.

`read_policy` takes the parsed JSON of docs/compiled-policy.md. That text comes
from root and was checked when it was compiled; it is read strictly all the
same, because a key that is silently ignored is a rule that silently does not
hold.
"""

from __future__ import annotations

import json
import stat
from binascii import crc32
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

from fdbroker.policy.globs import Glob, compile_glob
from fdbroker.policy.paths import problem_with_path

if TYPE_CHECKING:
    from collections.abc import Collection, Generator, Mapping

ACTIONS = ("open", "stat", "list", "walk")
DELIVERIES = ("descriptor", "copy")
OPENS = ("loop", "helpers")
IDENTITIES = ("available", "strict")
SYMLINKS = ("refuse", "within-root")
_TOP_LEVEL = frozenset(
    {"version", "roots", "rules", "limits", "audit", "read_only_view", "identity", "admins", "services"}
)
_RULE_KEYS = frozenset(
    {
        "name",
        "effect",
        "actions",
        "root",
        "clients",
        "on_behalf_of",
        "paths",
        "except",
        "where",
        "deliver",
        "symlinks",
    }
)
# Without them a rule or a policy has no such limit.
_RULE_KEYS_IF_WANTED = frozenset({"limits"})
_LIMITS = frozenset({"connections_per_uid", "in_flight_per_connection", "message_within"})
_LIMITS_IF_WANTED = frozenset(
    {
        "in_flight_per_uid",
        "requests_per_second",
        "requests_burst",
        "opens_per_second",
        "opens_burst",
        "idle_timeout",
    }
)
# A rate is a number of nanoseconds for each; a wait for a whole burst is told in 32 bits of milliseconds.
MAX_RATE = 1_000_000
_T = TypeVar("_T")


class PolicyError(ValueError):
    """The compiled policy is not what docs/compiled-policy.md describes; the text says where."""


class FileFacts(Protocol):
    """What conditions ask of an object: the fields of `os.stat_result` by that name."""

    @property
    def st_mode(self) -> int:
        """See inode(7)."""

    @property
    def st_uid(self) -> int:
        """See inode(7)."""

    @property
    def st_gid(self) -> int:
        """See inode(7)."""

    @property
    def st_size(self) -> int:
        """See inode(7)."""

    @property
    def st_nlink(self) -> int:
        """See inode(7)."""

    @property
    def st_mtime_ns(self) -> int:
        """See inode(7); nanoseconds since 1970."""


class Surroundings(NamedTuple):
    """What conditions ask beside the facts of an object: when, and on what file system it was looked at.

    `now_ns`: nanoseconds since 1970, by the clock that gives files their times (CLOCK_REALTIME).
    `filesystem`: the magic number of the type, as statfs(2) has it.
    """

    now_ns: int
    filesystem: int


class ClientFacts(NamedTuple):
    """What the kernel said of a client, as far as rules ask for it.

    `cgroups` holds those control groups *named by the policy* that the client
    is in or below of; who makes this value resolves them. `groups_known` False:
    it may have other groups than `gids`, and the kernel does not say which.
    `label` None: the kernel does not say which label it has.
    """

    uid: int
    gids: frozenset[int]
    cgroups: frozenset[str] = frozenset()
    groups_known: bool = True
    label: bytes | None = None


class Root(NamedTuple):
    """A tree that can be reached. `skip` bytes of a path below it precede the relative part.

    `helpers`: opening something there may take for ever, so other processes do it.
    """

    number: int
    name: str
    path: bytes
    cross_mounts: bool
    skip: int
    helpers: bool = False


class ClientMatch(NamedTuple):
    """One entry of a rule's `clients`; None: not asked. All that is asked must hold."""

    uids: frozenset[int] | None
    gids: frozenset[int] | None
    cgroups: frozenset[str] | None
    labels: frozenset[bytes] | None = None

    def matches(self, client: ClientFacts, *, in_doubt: bool = False) -> bool:
        """Return whether `client` is meant by this entry; `in_doubt`: also where it only may be.

        That is, where all would hold but for groups or the label, which are not known.
        """
        return (
            (self.uids is None or client.uid in self.uids)
            and (
                self.gids is None
                or not self.gids.isdisjoint(client.gids)
                or (in_doubt and not client.groups_known)
            )
            and (self.cgroups is None or not self.cgroups.isdisjoint(client.cgroups))
            and (self.labels is None or client.label in self.labels or (in_doubt and client.label is None))
        )


class Bounds(NamedTuple):
    """An inclusive range; None: open on that side."""

    least: int | None
    most: int | None

    def hold(self, value: int) -> bool:
        """Return whether `value` lies within."""
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)


class Owners(NamedTuple):
    """Owners that a condition accepts; `client`: whoever asks; `on_behalf_of`: the client acted for."""

    uids: frozenset[int]
    client: bool
    on_behalf_of: bool

    def include(self, owner: int, client_uid: int, on_behalf_of_uid: int | None) -> bool:
        """Return whether `owner` is one of them. `on_behalf_of_uid` None: nobody is acted for."""
        return (
            owner in self.uids
            or (self.client and owner == client_uid)
            or (self.on_behalf_of and owner == on_behalf_of_uid)
        )


class Conditions(NamedTuple):
    """A rule's `where`: what the opened object must be like. None: not asked."""

    owner: Owners | None
    gids: frozenset[int] | None
    mode_all: int
    mode_none: int
    size: Bounds | None
    links: Bounds | None
    age_ns: Bounds | None = None
    filesystems: frozenset[int] | None = None

    @property
    def asks_surroundings(self) -> bool:
        """Whether something is asked that `Surroundings` has the answer to."""
        return self.age_ns is not None or self.filesystems is not None

    def first_failure(
        self,
        facts: FileFacts,
        client_uid: int,
        on_behalf_of_uid: int | None = None,
        surroundings: Surroundings | None = None,
        *,
        deny: bool,
    ) -> str | None:
        """Return the name of the first condition that does not hold, or None.

        `client_uid` is that of the process that asks, `on_behalf_of_uid` that
        of the client it acts for, None where it acts for nobody. `surroundings`
        may be left out where nothing is asked of them; where something is, an
        allow rule fails then, and a deny rule holds.

        `size`, `links` and `age` are conditions on regular files. Asked of
        anything else they hold in an allow rule and fail in a deny rule, so
        that they neither hide every directory nor forbid it. A file that was
        modified in the future has age 0.
        """
        if self.owner is not None and not self.owner.include(facts.st_uid, client_uid, on_behalf_of_uid):
            return "owner"
        if self.gids is not None and facts.st_gid not in self.gids:
            return "group"
        mode = facts.st_mode
        if mode & self.mode_all != self.mode_all or mode & self.mode_none:
            return "mode"
        if self.filesystems is not None and (
            not deny if surroundings is None else surroundings.filesystem not in self.filesystems
        ):
            return "filesystem"
        if stat.S_ISREG(mode):
            if self.size is not None and not self.size.hold(facts.st_size):
                return "size"
            if self.links is not None and not self.links.hold(facts.st_nlink):
                return "links"
            if self.age_ns is not None and (
                not deny
                if surroundings is None
                else not self.age_ns.hold(max(surroundings.now_ns - facts.st_mtime_ns, 0))
            ):
                return "age"
        elif deny and (self.size is not None or self.links is not None or self.age_ns is not None):
            return "type"
        return None


class Rate(NamedTuple):
    """So many per second, and after a rest `burst` at once. `of`: what; no other rate calls it so."""

    of: str
    per_second: int
    burst: int


class RuleLimits(NamedTuple):
    """What one uid may have by one rule; None: as much as it likes."""

    requests: Rate | None
    opens: Rate | None
    in_flight: int | None


class Rule:
    """One rule; immutable. `where` is None when nothing is asked of the object.

    `on_behalf_of` says for whom a service acts; it is empty in a rule about
    what a client asks for itself. `follows_links`: a name that this rule
    allows may be, or have on its way, a symbolic link.
    """

    __slots__ = (
        "actions",
        "clients",
        "deliver",
        "deny",
        "excepts",
        "follows_links",
        "index",
        "limits",
        "name",
        "on_behalf_of",
        "paths",
        "root",
        "where",
    )

    def __init__(self, index: int, document: Mapping[str, object], roots: Mapping[str, Root]) -> None:
        at = f"rules[{index}]"
        _exact_keys(document, at, _RULE_KEYS, _RULE_KEYS_IF_WANTED)
        self.index = index
        self.name = _get(document, "name", str, at)
        effect = _get(document, "effect", str, at)
        if effect not in {"allow", "deny"}:
            raise PolicyError(f"{at}.effect is {effect!r}, not 'allow' or 'deny'")
        self.deny = effect == "deny"
        self.actions = frozenset(_words(document, "actions", at, ACTIONS))
        root = _get(document, "root", str, at)
        if root not in roots:
            raise PolicyError(f"{at}.root is {root!r}, which is not among the roots")
        self.root = roots[root]
        self.clients = _read_clients(document, "clients", at)
        self.on_behalf_of = _read_clients(document, "on_behalf_of", at)
        self.paths = _read_globs(document, "paths", at)
        self.excepts = _read_globs(document, "except", at)
        self.where = _read_conditions(_get(document, "where", dict, at), f"{at}.where")
        self.deliver = frozenset(_words(document, "deliver", at, DELIVERIES))
        self.limits = _read_rule_limits(document, at, self.name) if "limits" in document else None
        if self.limits is not None and self.deny:
            raise PolicyError(f"{at}.limits: a rule that denies gives nothing to be limited")
        self.follows_links = _one_of(document, "symlinks", at, SYMLINKS) == "within-root"
        if self.follows_links and (self.deny or self.root.helpers):
            raise PolicyError(f"{at}.symlinks is 'within-root', but it denies, or helpers open in its root")
        if not (self.actions and self.clients and self.paths):
            raise PolicyError(f"{at} needs at least one action, one client and one path")
        owner = None if self.where is None else self.where.owner
        if owner is not None and owner.on_behalf_of and not self.on_behalf_of:
            raise PolicyError(f"{at}.where.owner.on_behalf_of is true, and {at}.on_behalf_of is empty")

    def is_for(self, client: ClientFacts, on_behalf_of: ClientFacts | None = None) -> bool:
        """Return whether this rule is about `client` at all: for itself, or as it acts for another.

        What a service may do for itself it may not do for others: an allow
        rule says for whom. A deny rule that does not say so holds in any case;
        and of whom the groups are not known, one about groups holds.
        """
        if not any(entry.matches(client, in_doubt=self.deny) for entry in self.clients):
            return False
        if on_behalf_of is None:
            return not self.on_behalf_of
        if not self.on_behalf_of:
            return self.deny
        return any(entry.matches(on_behalf_of, in_doubt=self.deny) for entry in self.on_behalf_of)


class Admins(NamedTuple):
    """Who may see the whole status, besides uid 0. Nobody but uid 0 may change anything."""

    uids: frozenset[int]
    gids: frozenset[int]

    def include(self, client: ClientFacts) -> bool:
        """Return whether `client` is one of them, by its uid or any of its groups."""
        return client.uid == 0 or client.uid in self.uids or not self.gids.isdisjoint(client.gids)


class Settings(NamedTuple):
    """What the policy file says beside its rules; counts are per connection or uid.

    `identity_strict`: requests are answered at the highest level of identity only.
    `message_within`: seconds in which a hello, or the rest of a message that has begun, must come.
    `requests` and `opens` are rates of one uid; `idle_timeout`: seconds. None: no such limit.
    """

    connections_per_uid: int
    in_flight_per_connection: int
    deny_when_audit_fails: bool
    read_only_view_required: bool
    admins: Admins
    message_within: float
    identity_strict: bool
    in_flight_per_uid: int | None = None
    requests: Rate | None = None
    opens: Rate | None = None
    idle_timeout: float | None = None


class RuleSet(NamedTuple):
    """A whole compiled policy. `cgroups`: every control group that a rule or a service names.

    `names_labels`: whether any of them names a label.
    `services`: by the name of a listener, who may take the clients that come to it.
    `fingerprint`: by which people see whether two policies are the same; it proves nothing.
    """

    roots: tuple[Root, ...]
    rules: tuple[Rule, ...]
    settings: Settings
    cgroups: frozenset[str]
    fingerprint: str
    services: Mapping[bytes, tuple[ClientMatch, ...]]
    names_labels: bool


def read_policy(document: object) -> RuleSet:
    """Read a compiled policy.

    Raises:
        PolicyError: a key is missing or unknown, or a value is of another
            type or out of its range; the text names the place.

    """
    steps = read_policy_in_steps(document)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            rule_set: RuleSet = end.value
            return rule_set


def read_policy_in_steps(document: object) -> Generator[None, None, RuleSet]:
    """Do the same a rule at a time, for who has other things to do in between: many rules take seconds."""
    if not isinstance(document, dict):
        raise PolicyError("the policy is not a JSON object")
    _exact_keys(document, "policy", _TOP_LEVEL)
    if _get(document, "version", int, "policy") != 1:
        raise PolicyError("policy.version is not 1")
    roots: dict[str, Root] = {}
    for i, entry in enumerate(_list(document, "roots", dict, "policy")):
        root = _read_root(entry, i)
        if root.name in roots or any(root.path == other.path for other in roots.values()):
            raise PolicyError(f"roots[{i}] has the name or the path of an earlier root")
        roots[root.name] = root
    rules = []
    for i, entry in enumerate(_list(document, "rules", dict, "policy")):
        rules.append(Rule(i, entry, roots))
        yield
    settings = _read_settings(document)
    services = _read_services(document)
    named = [client for rule in rules for client in (*rule.clients, *rule.on_behalf_of)]
    named += [client for clients in services.values() for client in clients]
    cgroups = frozenset(path for client in named for path in client.cgroups or ())
    # However it was laid out: what is told apart is what it says.
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    fingerprint = f"{crc32(text.encode()):08x}"
    names_labels = any(client.labels is not None for client in named)
    return RuleSet(
        tuple(roots.values()), tuple(rules), settings, cgroups, fingerprint, services, names_labels
    )


def _read_settings(document: Mapping[str, object]) -> Settings:
    limits = _get(document, "limits", dict, "policy")
    _exact_keys(limits, "limits", _LIMITS, _LIMITS_IF_WANTED)
    audit = _get(document, "audit", dict, "policy")
    _exact_keys(audit, "audit", {"on_failure"})
    admins = _get(document, "admins", dict, "policy")
    _exact_keys(admins, "admins", {"uids", "gids"})
    return Settings(
        connections_per_uid=_count(limits, "connections_per_uid", "limits", 1),
        # One full reply must fit, or a request for it could never be answered.
        in_flight_per_connection=_count(limits, "in_flight_per_connection", "limits", 253),
        deny_when_audit_fails=_one_of(audit, "on_failure", "audit", ("deny", "allow")) == "deny",
        read_only_view_required=_one_of(document, "read_only_view", "policy", ("required", "off"))
        == "required",
        admins=Admins(
            uids=frozenset(_list(admins, "uids", int, "admins")),
            gids=frozenset(_list(admins, "gids", int, "admins")),
        ),
        message_within=_seconds(limits, "message_within", "limits", 1.0, 3600.0),
        in_flight_per_uid=(
            _count(limits, "in_flight_per_uid", "limits", 253) if "in_flight_per_uid" in limits else None
        ),
        requests=_read_rate(limits, "requests", "limits", "requests"),
        opens=_read_rate(limits, "opens", "limits", "opens"),
        idle_timeout=(
            _seconds(limits, "idle_timeout", "limits", 1.0, 86400.0) if "idle_timeout" in limits else None
        ),
        identity_strict=_one_of(document, "identity", "policy", IDENTITIES) == "strict",
    )


def _read_root(document: Mapping[str, object], index: int) -> Root:
    at = f"roots[{index}]"
    _exact_keys(document, at, {"name", "path", "cross_mounts", "opens"})
    try:
        path = _get(document, "path", str, at).encode()
    except UnicodeEncodeError:
        raise PolicyError(f"{at}.path has half a surrogate pair, which is no character") from None
    problem = problem_with_path(path)
    if problem is not None:
        raise PolicyError(f"{at}.path: {problem}")
    return Root(
        number=index,
        name=_get(document, "name", str, at),
        path=path,
        cross_mounts=_get(document, "cross_mounts", bool, at),
        skip=1 if path == b"/" else len(path) + 1,
        helpers=_one_of(document, "opens", at, OPENS) == "helpers",
    )


def _read_services(document: Mapping[str, object]) -> dict[bytes, tuple[ClientMatch, ...]]:
    services: dict[bytes, tuple[ClientMatch, ...]] = {}
    for i, entry in enumerate(_list(document, "services", dict, "policy")):
        at = f"services[{i}]"
        _exact_keys(entry, at, {"name", "clients"})
        text = _get(entry, "name", str, at)
        # A name is a file's and a part of messages; the compiler takes fewer.
        if not (text and text.isascii() and text.isprintable()) or text.encode() in services:
            raise PolicyError(f"{at}.name is {text!r}: no name, or that of an earlier service")
        clients = _read_clients(entry, "clients", at)
        if not clients:
            raise PolicyError(f"{at}.clients needs at least one entry")
        services[text.encode()] = clients
    return services


def _read_clients(document: Mapping[str, object], key: str, at: str) -> tuple[ClientMatch, ...]:
    entries = _list(document, key, dict, at)
    return tuple(_read_client(entry, f"{at}.{key}[{i}]") for i, entry in enumerate(entries))


def _read_client(document: Mapping[str, object], at: str) -> ClientMatch:
    # Not by ==, to which 1 is True.
    if document.keys() == {"any"} and document["any"] is True:
        return ClientMatch(None, None, None)
    if not document or not document.keys() <= {"uids", "gids", "cgroups", "labels"}:
        raise PolicyError(f"{at} must be {{'any': true}} or some of uids, gids, cgroups, labels")
    labels = _list(document, "labels", str, at) if "labels" in document else None
    return ClientMatch(
        uids=frozenset(_list(document, "uids", int, at)) if "uids" in document else None,
        gids=frozenset(_list(document, "gids", int, at)) if "gids" in document else None,
        cgroups=frozenset(_list(document, "cgroups", str, at)) if "cgroups" in document else None,
        labels=None
        if labels is None
        else frozenset(label.encode("utf-8", "surrogatepass") for label in labels),
    )


def _read_globs(document: Mapping[str, object], key: str, at: str) -> tuple[Glob, ...]:
    globs = []
    for i, text in enumerate(_list(document, key, str, at)):
        try:
            globs.append(compile_glob(text.encode()))
        except ValueError as error:
            raise PolicyError(f"{at}.{key}[{i}]: {error}") from None
    return tuple(globs)


def _read_conditions(document: Mapping[str, object], at: str) -> Conditions | None:
    if not document:
        return None
    known = {"owner", "group", "mode", "size", "links", "age", "filesystem"}
    if not document.keys() <= known:
        raise PolicyError(f"{at} has keys other than {', '.join(sorted(known))}")
    owner = gids = age = filesystems = None
    mode_all = mode_none = 0
    if "owner" in document:
        entry = _get(document, "owner", dict, at)
        _exact_keys(entry, f"{at}.owner", {"uids", "client", "on_behalf_of"})
        owner = Owners(
            frozenset(_list(entry, "uids", int, f"{at}.owner")),
            _get(entry, "client", bool, f"{at}.owner"),
            _get(entry, "on_behalf_of", bool, f"{at}.owner"),
        )
    if "group" in document:
        entry = _get(document, "group", dict, at)
        _exact_keys(entry, f"{at}.group", {"gids"})
        gids = frozenset(_list(entry, "gids", int, f"{at}.group"))
    if "mode" in document:
        entry = _get(document, "mode", dict, at)
        if not entry or not entry.keys() <= {"all", "none"}:
            raise PolicyError(f"{at}.mode must have all, none or both")
        mode_all = _get(entry, "all", int, f"{at}.mode") if "all" in entry else 0
        mode_none = _get(entry, "none", int, f"{at}.mode") if "none" in entry else 0
    if "age" in document:
        age = Bounds(*(bound and bound * 1_000_000_000 for bound in _bounds(document, "age", at)))
    if "filesystem" in document:
        entry = _get(document, "filesystem", dict, at)
        _exact_keys(entry, f"{at}.filesystem", {"types"})
        filesystems = frozenset(_list(entry, "types", int, f"{at}.filesystem"))
    return Conditions(
        owner=owner,
        gids=gids,
        mode_all=mode_all,
        mode_none=mode_none,
        size=_bounds(document, "size", at) if "size" in document else None,
        links=_bounds(document, "links", at) if "links" in document else None,
        age_ns=age,
        filesystems=filesystems,
    )


def _read_rule_limits(document: Mapping[str, object], at: str, name: str) -> RuleLimits:
    limits, at = _get(document, "limits", dict, at), f"{at}.limits"
    rates = {"requests_per_second", "requests_burst", "opens_per_second", "opens_burst"}
    _exact_keys(limits, at, frozenset(), rates | {"in_flight"})
    if not limits:
        raise PolicyError(f"{at} needs at least one limit")
    # No rate of the whole policy has a colon in its name.
    requests, opens = (_read_rate(limits, what, at, f"{what}: {name}") for what in ("requests", "opens"))
    in_flight = _count(limits, "in_flight", at, 1) if "in_flight" in limits else None
    return RuleLimits(requests, opens, in_flight)


def _read_rate(document: Mapping[str, object], what: str, at: str, of: str) -> Rate | None:
    per_second, burst = f"{what}_per_second", f"{what}_burst"
    if per_second not in document and burst not in document:
        return None
    numbers = _count(document, per_second, at, 1), _count(document, burst, at, 1)
    if max(numbers) > MAX_RATE:
        raise PolicyError(f"{at}.{per_second} or {at}.{burst} is more than {MAX_RATE}")
    return Rate(of, *numbers)


def _bounds(document: Mapping[str, object], key: str, at: str) -> Bounds:
    entry = _get(document, key, dict, at)
    if not entry or not entry.keys() <= {"min", "max"}:
        raise PolicyError(f"{at}.{key} must have min, max or both")
    return Bounds(
        least=_get(entry, "min", int, f"{at}.{key}") if "min" in entry else None,
        most=_get(entry, "max", int, f"{at}.{key}") if "max" in entry else None,
    )


def _exact_keys(
    document: Mapping[str, object], at: str, keys: Collection[str], if_wanted: Collection[str] = ()
) -> None:
    odd = sorted((document.keys() ^ set(keys)) - set(if_wanted))
    if odd:
        raise PolicyError(f"{at} has missing or unknown keys: {', '.join(map(str, odd))}")


def _get(document: Mapping[str, object], key: str, kind: type[_T], at: str) -> _T:
    value = document.get(key)
    # bool is an int to isinstance, and a policy in which they mix is wrong.
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise PolicyError(f"{at}.{key} is not of type {kind.__name__}")
    return value


def _list(document: Mapping[str, object], key: str, kind: type[_T], at: str) -> list[_T]:
    values = _get(document, key, list, at)
    for i, value in enumerate(values):
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise PolicyError(f"{at}.{key}[{i}] is not of type {kind.__name__}")
    return values


def _words(document: Mapping[str, object], key: str, at: str, allowed: tuple[str, ...]) -> list[str]:
    words = _list(document, key, str, at)
    for word in words:
        if word not in allowed:
            raise PolicyError(f"{at}.{key} has {word!r}, which is none of {', '.join(allowed)}")
    return words


def _one_of(document: Mapping[str, object], key: str, at: str, allowed: tuple[str, ...]) -> str:
    word = _get(document, key, str, at)
    if word not in allowed:
        raise PolicyError(f"{at}.{key} is {word!r}, which is none of {', '.join(allowed)}")
    return word


def _count(document: Mapping[str, object], key: str, at: str, least: int) -> int:
    value = _get(document, key, int, at)
    if value < least:
        raise PolicyError(f"{at}.{key} is {value}, less than {least}")
    return value


def _seconds(document: Mapping[str, object], key: str, at: str, least: float, most: float) -> float:
    value = _get(document, key, float, at)
    if not least <= value <= most:  # nor is it not a number at all, which JSON here can say
        raise PolicyError(f"{at}.{key} is {value}, not from {least} to {most}")
    return value
