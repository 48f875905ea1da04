"""From the text of a policy to the compiled policy: names become numbers, and everything is checked.

Pure apart from `Lookups`. Every problem is noted with its place and reading
goes on, so that the author sees all of them at once; a policy with any problem
is not compiled at all.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypedDict, get_args

from fdbroker.config.clients import ClientReader
from fdbroker.config.compiled import CompiledLimits, CompiledPolicy, CompiledRoot, CompiledRule
from fdbroker.config.conditions import ConditionReader
from fdbroker.config.daemon import DaemonReader
from fdbroker.config.errors import Mark, ProblemList, closest, did_you_mean, listed, quoted
from fdbroker.config.identities import Lookups, SystemLookups
from fdbroker.config.parts import merged
from fdbroker.config.reader import Reader
from fdbroker.config.scalars import parse_boolean, parse_count, parse_duration, parse_path
from fdbroker.config.schema import (
    CONNECTIONS_PER_UID,
    IDENTITY_DEFAULT,
    IDLE_TIMEOUT,
    IN_FLIGHT_PER_CONNECTION,
    IN_FLIGHT_PER_UID,
    MESSAGE_WITHIN,
    NAME_PATTERN,
    OPENS_DEFAULT,
    PER_SECOND,
    READ_ONLY_VIEW_DEFAULT,
    RULE_IN_FLIGHT,
    SYMLINKS_DEFAULT,
    Action,
    Admins,
    Audit,
    Delivery,
    Identity,
    Limits,
    OnFailure,
    Opens,
    Policy,
    ReadOnlyView,
    Root,
    Rule,
    RuleLimits,
    Symlinks,
)
from fdbroker.config.sources import PolicyFile, read_policy_files
from fdbroker.config.structures import keys_of
from fdbroker.config.yaml_tree import Mapping, Node, Text, parse_yaml
from fdbroker.policy.globs import compile_glob

VERSION = 1

_NAME = re.compile(NAME_PATTERN)


class _Limit(NamedTuple):
    parse: Callable[[str], int]
    allowed: range
    cure: str


def _limit_of_count(allowed: range) -> _Limit:
    return _Limit(parse_count, allowed, f"write a number from {allowed[0]} to {allowed[-1]}")


_RATE = _limit_of_count(PER_SECOND)
_LIMITS = {
    "connections_per_uid": _limit_of_count(CONNECTIONS_PER_UID),
    "in_flight_per_connection": _limit_of_count(IN_FLIGHT_PER_CONNECTION),
    "message_within": _Limit(parse_duration, MESSAGE_WITHIN, "write a duration from 1s to 1h"),
    "in_flight_per_uid": _limit_of_count(IN_FLIGHT_PER_UID),
    "requests_per_second": _RATE,
    "requests_burst": _RATE,
    "opens_per_second": _RATE,
    "opens_burst": _RATE,
    "idle_timeout": _Limit(parse_duration, IDLE_TIMEOUT, "write a duration from 1s to 24h"),
    "in_flight": _limit_of_count(RULE_IN_FLIGHT),  # of a rule
}
_ROOTS_CURE = "name at least one, as in 'home: {path: /home}'"
_RULE_CURE = "write a mapping that begins with '- name: ...'"
_GLOBS_CURE = 'write globs relative to the root, as in "*/Mail/**"'


def compile_policy(text: bytes, filename: str, lookups: Lookups) -> CompiledPolicy:
    """Check a policy of one file and return it compiled.

    `filename` is for messages only; nothing is opened by it.

    Raises:
        ConfigError: the policy is refused; it has every problem that was found.

    """
    return compile_files([PolicyFile(filename, text)], lookups)


def compile_files(
    files: Sequence[PolicyFile], lookups: Lookups, *, for_service: bool = False
) -> CompiledPolicy:
    """Check a policy that is in several files, the first of which is its main one; return it compiled.

    `for_service`: fdbrokerd is started by systemd as the broker's user, who can open no file for writing.

    Raises:
        ConfigError: as `compile_policy`.

    """
    problems = ProblemList(files[0].name)
    reader = Reader(problems)
    compiler = _Compiler(reader, lookups, for_service=for_service)
    trees = []
    for file in files:
        problems.begin(file.name)
        tree = parse_yaml(file.text, problems)
        if tree is not None:
            trees.append(compiler.part(tree))
    problems.begin(files[0].name)
    parts = [tree for tree in trees if tree is not None]
    # Of what is not there whole nothing is said that may not be so.
    compiled = compiler.policy(merged(parts, reader)) if len(parts) == len(files) else None
    problems.raise_if_any()
    if compiled is None:  # pragma: no cover - nothing is left out without a problem
        raise AssertionError("a policy was not compiled and no problem was noted")
    return compiled


def load_policy_file(path: str, *, dev: bool = False) -> CompiledPolicy:
    """Read a policy that only root can have written, with its parts, and compile it for this machine.

    `dev` takes a file of the user who runs this as well, in a directory such
    as /tmp: for development only.

    Raises:
        ConfigError: the file can't be trusted or read, or the policy is refused.

    """
    return compile_files(read_policy_files(path, dev=dev), SystemLookups())


class _RuleLimitsIfWanted(TypedDict, total=False):
    """What a compiled rule has more, if it has limits."""

    limits: dict[str, int]


class _Compiler:
    """Reads one policy. Where a value is refused something stands in; the problem is noted."""

    def __init__(self, reader: Reader, lookups: Lookups, *, for_service: bool) -> None:
        self._reader = reader
        self._lookups = lookups
        self._for_service = for_service
        self._clients = ClientReader(reader, lookups)
        self._conditions = ConditionReader(reader, self._clients)
        self._daemon = DaemonReader(reader, self._clients, lookups)
        self._helped: set[str] = set()  # names of roots

    def part(self, tree: Node) -> Mapping | None:
        """Return what is in one file of a policy, if it is for this version."""
        mapping = self._reader.mapping(tree, "the policy", "begin with 'version: 1'")
        return mapping if mapping is not None and self._is_our_version(mapping) else None

    def policy(self, mapping: Mapping) -> CompiledPolicy:
        found = self._reader.entries(mapping, "", Policy)
        root_names, roots = self._roots(found.get("roots"))
        view = self._reader.choice(found.get("read_only_view"), "read_only_view", get_args(ReadOnlyView))
        identity = self._reader.choice(found.get("identity"), "identity", get_args(Identity))
        on_failure, to = self._audit(found.get("audit"))
        daemon, services = self._daemon.daemon(found.get("user"), found.get("listeners"), to)
        return CompiledPolicy(
            version=VERSION,
            roots=roots,
            rules=self._rules(found.get("rules"), root_names),
            limits=self._limits(found.get("limits")),
            audit={"on_failure": on_failure},
            read_only_view=view or READ_ONLY_VIEW_DEFAULT,
            identity=identity or IDENTITY_DEFAULT,
            admins=self._admins(found.get("admins")),
            services=services,
            daemon=daemon,
        )

    def _is_our_version(self, mapping: Mapping) -> bool:
        """Of a policy for another version nothing else is said: it would be wrong."""
        entry = mapping.entries.get("version")
        if entry is None:
            return True
        version = self._reader.parsed(entry.value, "version", parse_count, "write 'version: 1'")
        if version not in (None, VERSION):
            self._reader.add(
                entry.value.mark,
                f"version {version} of the policy format is not known",
                f"write 'version: {VERSION}', or use the fdbroker that this policy is for",
            )
        return version == VERSION

    # ---- roots ----

    def _roots(self, node: Node | None) -> tuple[list[str] | None, list[CompiledRoot]]:
        """Return the names, of bad roots too so that no rule is blamed for naming one, and the roots."""
        mapping = self._reader.mapping(node, "roots", _ROOTS_CURE)
        if mapping is None:
            return None, []
        roots: list[CompiledRoot] = []
        names_by_path: dict[str, tuple[str, Mark]] = {}
        for name, entry in mapping.entries.items():
            self._check_name(entry.key, "root name")
            what = f"root {quoted(name)}"
            root = self._reader.mapping(entry.value, what, "write {path: /DIRECTORY}")
            if root is None:
                continue
            found = self._reader.entries(root, what, Root)
            path = self._root_path(found.get("path"), what, name, names_by_path)
            cure = "write true or false"
            cross = self._reader.parsed(
                found.get("cross_mounts"), f"{what}: cross_mounts", parse_boolean, cure
            )
            opens = self._reader.choice(found.get("opens"), f"{what}: opens", get_args(Opens))
            if opens == "helpers":
                self._helped.add(name)
            roots.append(
                CompiledRoot(name=name, path=path, cross_mounts=bool(cross), opens=opens or OPENS_DEFAULT)
            )
        return list(mapping.entries), roots

    def _root_path(
        self, node: Node | None, what: str, name: str, names_by_path: dict[str, tuple[str, Mark]]
    ) -> str:
        what = f"{what}: path"
        path = self._reader.parsed(node, what, parse_path, "write the absolute path of a directory")
        if node is None or path is None:
            return ""
        first, mark = names_by_path.setdefault(path, (name, node.mark))
        if first != name:
            self._reader.add(
                node.mark,
                f"{what}: {quoted(path)} is that of root {quoted(first)} too, {mark.seen_from(node.mark)}",
                "keep one root for a path",
            )
            return path
        fault = self._lookups.directory(path)
        if fault is not None:
            self._reader.add(node.mark, f"{what}: {fault.reason}", fault.cure)
        return path

    def _check_name(self, text: Text, what: str) -> None:
        if not _NAME.fullmatch(text.value):
            self._reader.add(
                text.mark,
                f"{what} {quoted(text.value)} is not allowed",
                "use a-z, 0-9, '_' and '-', beginning with a letter or digit",
            )

    # ---- rules ----

    def _rules(self, node: Node | None, root_names: list[str] | None) -> list[CompiledRule]:
        rules: list[CompiledRule] = []
        first_use: dict[str, Text] = {}
        items = self._reader.items(node, "rules", "write a list; [] denies everything")
        for number, item in enumerate(items, 1):
            mapping = self._reader.mapping(item, f"rule {number}", _RULE_CURE)
            if mapping is not None:
                rules.append(self._rule(mapping, number, root_names, first_use))
        return rules

    def _rule(
        self, mapping: Mapping, number: int, root_names: list[str] | None, first_use: dict[str, Text]
    ) -> CompiledRule:
        named = mapping.entries.get("name")
        what = f"rule {number}"
        if named is not None and isinstance(named.value, Text) and named.value.value:
            what = f"rule {quoted(named.value.value)}"
        # Who an allow rule is for must be said; a deny rule without it is for everybody.
        found = self._reader.entries(mapping, what, Rule, ["client"] if "allow" in mapping.entries else [])
        effect, actions = self._effect(mapping, what)
        limits = self._rule_limits(found.get("limits"), mapping, what, actions)
        clients, acted_for = (
            self._clients.clients(found[key], f"{what}: {key}") if key in found else None
            for key in ("client", "on_behalf_of")
        )
        return CompiledRule(
            {
                "name": self._rule_name(found.get("name"), what, first_use),
                "effect": effect,
                "actions": actions,
                "root": self._rule_root(found.get("in"), what, root_names),
                "clients": [{"any": True}] if clients is None else clients,
                "on_behalf_of": acted_for or [],
                "paths": self._globs(found.get("paths"), f"{what}: paths"),
                "except": self._globs(found.get("except"), f"{what}: except"),
                "where": self._conditions.where(
                    found.get("where"), f"{what}: where", acts_for="on_behalf_of" in found
                ),
                "deliver": self._deliver(mapping, what, actions),
                "symlinks": self._symlinks(mapping, what, actions),
                **limits,
            }
        )

    def _rule_name(self, node: Node | None, what: str, first_use: dict[str, Text]) -> str:
        text = self._reader.text(node, f"{what}: name", "write a short name; the audit shows it")
        if text is None:
            return ""
        self._check_name(text, "rule name")
        first = first_use.setdefault(text.value, text)
        if first is not text:
            self._reader.add(
                text.mark,
                f"rule name {quoted(text.value)} is given twice, first {first.mark.seen_from(text.mark)}",
                "give each rule a name of its own",
            )
        return text.value

    def _effect(self, mapping: Mapping, what: str) -> tuple[Literal["allow", "deny"], list[str]]:
        allow, deny = mapping.entries.get("allow"), mapping.entries.get("deny")
        if allow is not None and deny is not None:
            later = max(allow.key.mark, deny.key.mark)
            self._reader.add(later, f"{what} has both 'allow' and 'deny'", "make two rules of it")
        elif allow is None and deny is None:
            # An unknown key that looks like one of them has been reported, with that suggestion.
            misspelt = any(closest(key, ("allow", "deny")) for key in mapping.entries)
            if not misspelt:
                cure = "add one of them with a list of actions"
                self._reader.add(mapping.mark, f"{what} has neither 'allow' nor 'deny'", cure)
        words = get_args(Action)
        allowed = self._reader.choices(allow.value, f"{what}: allow", words) if allow is not None else []
        denied = self._reader.choices(deny.value, f"{what}: deny", words) if deny is not None else []
        return ("allow", allowed) if deny is None else ("deny", denied)

    def _rule_root(self, node: Node | None, what: str, root_names: list[str] | None) -> str:
        cure = "write the name of one root; a rule is about one"
        text = self._reader.text(node, f"{what}: in", cure)
        if text is None:
            return ""
        if root_names is not None and text.value not in root_names:
            self._reader.add(
                text.mark,
                f"{what}: in: there is no root {quoted(text.value)}",
                lambda: did_you_mean(text.value, root_names, f"the roots are {listed(root_names)}"),
            )
        return text.value

    def _globs(self, node: Node | None, what: str) -> list[str]:
        patterns = []
        for text in self._reader.texts(node, what, _GLOBS_CURE):
            cure = _GLOBS_CURE
            if text.value.startswith("/"):
                cure = "leave out the path of the root: globs are relative to it"
            elif text.value.endswith("/"):
                cure = f"write {quoted(text.value.rstrip('/') + '/**')} for a directory and all below it"
            try:
                compile_glob(text.value.encode())
            except ValueError as error:
                self._reader.add(text.mark, f"{what}: {quoted(text.value)}: {error}", cure)
            else:
                patterns.append(text.value)
        return patterns

    def _deliver(self, mapping: Mapping, what: str, actions: list[str]) -> list[str]:
        entry = mapping.entries.get("deliver")
        if entry is None:
            return ["descriptor"]
        if "deny" in mapping.entries:
            self._reader.add(
                entry.key.mark,
                f"{what}: a deny rule delivers nothing",
                "remove 'deliver'; what is denied is denied however it would be delivered",
            )
        elif actions and "open" not in actions:
            self._reader.add(
                entry.key.mark, f"{what}: only what is opened is delivered", "remove 'deliver', or allow open"
            )
        return self._reader.choices(entry.value, f"{what}: deliver", get_args(Delivery))

    def _symlinks(self, mapping: Mapping, what: str, actions: list[str]) -> str:
        entry = mapping.entries.get("symlinks")
        if entry is None:
            return SYMLINKS_DEFAULT
        if "deny" in mapping.entries:
            self._reader.add(
                entry.key.mark,
                f"{what}: a deny rule follows no links",
                "remove 'symlinks'; what is denied is denied by whatever link it is asked for",
            )
        elif actions == ["walk"]:
            cure = "remove 'symlinks', or allow open, stat or list"
            self._reader.add(entry.key.mark, f"{what}: walks follow no links", cure)
        choice = self._reader.choice(entry.value, f"{what}: symlinks", get_args(Symlinks))
        named = mapping.entries.get("in")
        root = named.value.value if named is not None and isinstance(named.value, Text) else ""
        if choice == "within-root" and root in self._helped:
            self._reader.add(
                entry.key.mark,
                f"{what}: helpers open in root {quoted(root)}, and they follow no links",
                "remove 'symlinks', or the root's 'opens: helpers'",
            )
        return choice or SYMLINKS_DEFAULT

    # ---- the rest ----

    def _limits(self, node: Node | None) -> CompiledLimits:
        cure = f"write some of {', '.join(keys_of(Limits))}, or leave limits out"
        mapping = self._reader.mapping(node, "limits", cure)
        found = {} if mapping is None else self._reader.entries(mapping, "limits", Limits)
        default = Limits()
        written = self._written_limits(found, "limits")
        compiled = CompiledLimits(
            connections_per_uid=written.pop("connections_per_uid", default.connections_per_uid),
            in_flight_per_connection=written.pop(
                "in_flight_per_connection", default.in_flight_per_connection
            ),
            message_within=float(written.pop("message_within", parse_duration(default.message_within))),
        )
        if "idle_timeout" in written:
            compiled["idle_timeout"] = float(written.pop("idle_timeout"))
        return {**compiled, **written}  # type: ignore[typeddict-item]  # the other keys, all of them counts

    def _rule_limits(
        self, node: Node | None, mapping: Mapping, what: str, actions: list[str]
    ) -> _RuleLimitsIfWanted:
        if node is None:
            return {}
        what = f"{what}: limits"
        if "deny" in mapping.entries:
            cure = "remove 'limits', or put them into the rule that allows"
            self._reader.add(node.mark, f"{what}: a deny rule gives nothing to be limited", cure)
        elif actions and "open" not in actions:
            self._reader.add(node.mark, f"{what}: only opens are limited", "remove 'limits', or allow open")
        cure = f"write some of {', '.join(keys_of(RuleLimits))}, or leave limits out"
        limits = self._reader.mapping(node, what, cure)
        found = {} if limits is None else self._reader.entries(limits, what, RuleLimits)
        if limits is not None and not limits.entries:
            self._reader.add(limits.mark, f"{what} is empty", cure)
        return {"limits": self._written_limits(found, what)}

    def _written_limits(self, found: dict[str, Node], at: str) -> dict[str, int]:
        """Return the limits that the author wrote; a rate has its burst."""
        written = {}
        for key, node in found.items():
            parse, allowed, cure = _LIMITS[key]
            value = self._reader.parsed(node, f"{at}: {key}", parse, cure)
            if isinstance(node, Text) and value is not None and value not in allowed:
                self._reader.add(node.mark, f"{at}: {key}: {node.value} is out of range", cure)
            if value is not None:
                written[key] = value
        for what in "requests", "opens":
            rate, burst = f"{what}_per_second", f"{what}_burst"
            if rate in found:
                written.setdefault(burst, written.get(rate, 1))
            elif burst in found:
                cure = f"write {rate} as well, or remove it"
                self._reader.add(found[burst].mark, f"{at}: {burst} says nothing without {rate}", cure)
        return written

    def _audit(self, node: Node | None) -> tuple[str, str | None]:
        """Return what becomes of what can't be recorded, and the file, None for standard output."""
        mapping = self._reader.mapping(node, "audit", "write {on_failure: deny}, or leave audit out")
        found = {} if mapping is None else self._reader.entries(mapping, "audit", Audit)
        choice = self._reader.choice(found.get("on_failure"), "audit: on_failure", get_args(OnFailure))
        cure = "write the absolute path of a file, or leave it out for standard output"
        node = found.get("to")
        to = self._reader.parsed(node, "audit: to", parse_path, cure)
        if node is not None and to is not None and self._for_service:
            self._reader.add(
                node.mark,
                "audit: to: the broker's service is not root, and can open no file for writing",
                f"leave it out, and have systemd open the file: StandardOutput=append:{to} of the unit",
            )
        return choice or Audit().on_failure, to

    def _admins(self, node: Node | None) -> dict[str, list[int]]:
        mapping = self._reader.mapping(node, "admins", "write {group: NAME}, {user: NAME} or both")
        found = {} if mapping is None else self._reader.entries(mapping, "admins", Admins)
        users = self._clients.names(found.get("user"), "admins: user")
        groups = self._clients.names(found.get("group"), "admins: group")
        return {
            "uids": self._clients.uids(users, "admins: user"),
            "gids": self._clients.gids(groups, "admins: group"),
        }
