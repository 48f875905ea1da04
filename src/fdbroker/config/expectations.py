"""Expectations of a policy: who is to be allowed what and who is not, as a table to be kept beside it.

Nothing of it need exist: neither the users, nor the files, nor a broker. Names
of users and groups are what `OfflineNames` makes of them; of a file, only what
is written in the table is known, and to ask more of it is a problem of the
table. So a policy is tested where it is written, before any machine has it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Literal, NamedTuple, Self, cast, get_args

from fdbroker.config.conditions import FILESYSTEMS
from fdbroker.config.errors import Mark, ProblemList, did_you_mean, quoted
from fdbroker.config.explain import (
    ALLOW,
    REASONS,
    Asker,
    Explanation,
    FactNotGivenError,
    Judged,
    Seen,
    explain_judged,
    judge,
    kind_refused,
    with_control_group,
)
from fdbroker.config.identities import Lookups, OfflineLookups, unit_cgroup
from fdbroker.config.names import id_of_number, is_number
from fdbroker.config.reader import Reader
from fdbroker.config.scalars import (
    ScalarError,
    parse_count,
    parse_duration,
    parse_mode,
    parse_path,
    parse_size,
)
from fdbroker.config.schema import Action
from fdbroker.config.structures import UNSET, Meta, Structure, UnsetType, key_named
from fdbroker.config.yaml_tree import List, Node, Text, parse_yaml
from fdbroker.config.yaml_tree import Mapping as YamlMapping
from fdbroker.policy.decide import Policy
from fdbroker.policy.paths import problem_with_path
from fdbroker.policy.rules import ClientFacts, Root, RuleSet, Surroundings

VERSION = 1
_KINDS = {
    "file": stat.S_IFREG,
    "directory": stat.S_IFDIR,
    "symlink": stat.S_IFLNK,
    "fifo": stat.S_IFIFO,
    "socket": stat.S_IFSOCK,
    "device": stat.S_IFCHR,
}
_MISSING = "missing"
_Kind = Literal["file", "directory", "symlink", "fifo", "socket", "device", "missing"]
_Expected = Literal["allowed", "denied"]
_Numbers = dict[str, int | str]


class Who(Structure):
    """Who asks, or is acted for."""

    user: Annotated[int | str, Meta(description="A name or a number.")]
    groups: Annotated[list[int | str] | str | int | UnsetType, Meta(description="All of its groups.")] = UNSET
    unit: str | UnsetType = UNSET
    cgroup: str | UnsetType = UNSET
    label: Annotated[str | UnsetType, Meta(description="Whole; without it none is known.")] = UNSET


class Object(Structure):
    """What lies under the path, as far as rules ask about it."""

    type: _Kind | UnsetType = UNSET
    owner: int | str | UnsetType = UNSET
    group: int | str | UnsetType = UNSET
    mode: str | UnsetType = UNSET
    size: int | str | UnsetType = UNSET
    links: int | UnsetType = UNSET
    age: Annotated[str | UnsetType, Meta(description="How long ago it was modified.")] = UNSET
    filesystem: Annotated[str | UnsetType, Meta(description="As in the condition of this name.")] = UNSET


class Expectation(Structure):
    """One row: who asks for what, and what comes of it."""

    name: str | UnsetType = UNSET
    as_: Annotated[str | int | Who, Meta(description="Who asks.")] = key_named("as")
    on_behalf_of: str | int | Who | UnsetType = UNSET
    action: Action | list[Action] | UnsetType = UNSET
    path: str | list[str]
    object: Object | UnsetType = UNSET
    expect: _Expected
    rule: str | UnsetType = UNSET
    reason: str | UnsetType = UNSET


class Table(Structure):
    """A whole table."""

    version: Literal[1]
    policy: Annotated[str | UnsetType, Meta(description="The policy, from the table's directory.")] = UNSET
    users: Annotated[_Numbers | UnsetType, Meta(description="Numbers of users.")] = UNSET
    groups: Annotated[_Numbers | UnsetType, Meta(description="Numbers of groups.")] = UNSET
    tests: list[Expectation]


class OfflineNames(OfflineLookups):
    """Names as the table numbers them; others are numbers below 0, the same ones in policy and table."""

    def __init__(self, users: Mapping[str, int], groups: Mapping[str, int]) -> None:
        self._users = {"root": 0, **users}
        self._groups = {"root": 0, **groups}

    def user(self, name: str) -> int | None:
        """Return the number that the table has, or one below 0."""
        return self._users[name] if name in self._users else super().user(name)

    def group(self, name: str) -> int | None:
        """Return the number that the table has, or one below 0."""
        return self._groups[name] if name in self._groups else super().group(name)


class DescribedObject:
    """An object of which only what was written is known; the fields of `os.stat_result` by that name."""

    def __init__(self, kind: int, facts: Mapping[str, int]) -> None:
        self._kind = kind
        self._facts = facts

    def _fact(self, key: str) -> int:
        if key not in self._facts:
            raise FactNotGivenError(key)
        return self._facts[key]

    @property
    def st_mode(self) -> int:
        """Type and, if they are asked for, permissions: a type is always known."""
        return _Mode(self._kind | self._facts.get("mode", 0), known="mode" in self._facts)

    @property
    def st_uid(self) -> int:
        """See inode(7)."""
        return self._fact("owner")

    @property
    def st_gid(self) -> int:
        """See inode(7)."""
        return self._fact("group")

    @property
    def st_size(self) -> int:
        """See inode(7)."""
        return self._fact("size")

    @property
    def st_nlink(self) -> int:
        """See inode(7)."""
        return self._fact("links")

    @property
    def st_mtime_ns(self) -> int:
        """See inode(7); in a world in which it is the beginning of 1970."""
        return -self._fact("age") * 1_000_000_000

    @property
    def now_ns(self) -> int:
        """The time at which it is looked at."""
        return 0

    @property
    def filesystem(self) -> int:
        """The magic number of the file system's type."""
        return self._fact("filesystem")


class _Mode(int):
    """A mode of which the permissions may not be known: to ask for a bit of them is an error then."""

    known: bool

    def __new__(cls, value: int, *, known: bool) -> Self:
        made = super().__new__(cls, value)
        made.known = known
        return made

    def __and__(self, mask: int) -> int:
        if not self.known and stat.S_IMODE(mask):
            raise FactNotGivenError("mode")
        return int(self) & mask


class Case(NamedTuple):
    """One request with what is expected of it; `mark` is that of the row. `seen` None: nothing is known."""

    mark: Mark
    title: str
    asker: Asker
    action: str
    path: bytes
    seen: Seen | None
    allowed: bool
    rule: str | None
    reason: str | None


class Outcome(NamedTuple):
    """What came of a case. `problem` is what is not as expected, "" for nothing; `judged` None: no answer."""

    case: Case
    problem: str
    judged: Judged | None

    def explanation(self, rules: RuleSet) -> Explanation | None:
        """Return why it was decided so."""
        case = self.case
        if self.judged is None:
            return None
        return explain_judged(rules, case.asker, case.action, self.judged)


class Tests(NamedTuple):
    """A table that was read. `policy_path` is from the working directory, None if the table names none."""

    file: str
    policy_path: str | None
    names: Lookups
    rows: YamlMapping


def read_table(text: bytes, file: str) -> Tests:
    """Read the head of a table, by which its policy is found and compiled.

    Raises:
        ConfigError: the table is refused; it has every problem of the head.

    """
    problems = ProblemList(file)
    reader = Reader(problems)
    tree = parse_yaml(text, problems)
    mapping = reader.mapping(tree, "the table", "begin with 'version: 1'")
    found = {} if mapping is None else reader.entries(mapping, "", Table)
    version = reader.parsed(found.get("version"), "version", parse_count, "write 'version: 1'")
    if version not in (None, VERSION):
        reader.add(found["version"].mark, f"version {version} of tables is not known", "write 'version: 1'")
    numbers = {key: _numbers(reader, found.get(key), key) for key in ("users", "groups")}
    policy = reader.text(found.get("policy"), "policy", "write the name of the policy file")
    problems.raise_if_any()
    if mapping is None:  # pragma: no cover - nothing is left out without a problem
        raise AssertionError("a table was not read and no problem was noted")
    path = None if policy is None else os.path.join(os.path.dirname(file), policy.value)
    return Tests(file, path, OfflineNames(numbers["users"], numbers["groups"]), mapping)


def read_cases(tests: Tests, rules: RuleSet, names: Lookups) -> list[Case]:
    """Read the rows of a table, for a policy that was compiled with `names`.

    Raises:
        ConfigError: the table is refused; it has every problem that was found.

    """
    problems = ProblemList(tests.file)
    cases = _Rows(Reader(problems), rules, names).cases(tests.rows)
    problems.raise_if_any()
    return cases


def run(cases: Sequence[Case], rules: RuleSet) -> Iterator[Outcome]:
    """Decide each case as the broker does and compare."""
    policy = Policy(rules)
    for case in cases:
        yield _run_one(case, policy)


def _run_one(case: Case, policy: Policy) -> Outcome:
    try:
        judged = judge(policy, case.asker, case.action, case.path, _looking(case))
    except FactNotGivenError as error:
        return Outcome(case, f"a rule asks about the file: add 'object: {{{error}: ...}}'", None)
    decision, reason, rule = judged.verdict
    allowed = decision == ALLOW
    if allowed is not case.allowed:
        problem = f"expected to be {_word(allowed=case.allowed)}, and is {_word(allowed=allowed)}"
    elif case.rule is not None and rule != case.rule:
        problem = f"{_word(allowed=allowed)} as expected, but by {_by(rule)}, not by rule {quoted(case.rule)}"
    elif case.reason is not None and reason != case.reason:
        problem = f"{_word(allowed=allowed)} as expected, but because of {reason}, not of {case.reason}"
    else:
        problem = ""
    return Outcome(case, problem, judged)


def _looking(case: Case) -> Callable[[Root, bytes, str], Seen]:
    def look(root: Root, _path: bytes, action: str) -> Seen:
        if root.helpers and action in {"list", "walk"}:
            return Seen(reason="not_listed")
        if case.seen is not None:
            return case.seen
        return _seen(_kind_for(action), {}, action)

    return look


def _kind_for(action: str) -> int:
    """Return what is asked for, where nobody says what it is."""
    return stat.S_IFDIR if action == "list" else stat.S_IFREG


def _seen(kind: int, facts: Mapping[str, int], action: str) -> Seen:
    described = DescribedObject(kind, facts)
    # It has the members of both.
    return Seen(described, kind_refused(kind, action), surroundings=cast("Surroundings", described))


def _by(rule: str | None) -> str:
    return "no rule" if rule is None else f"rule {quoted(rule)}"


def _word(*, allowed: bool) -> str:
    return "allowed" if allowed else "denied"


def _numbers(reader: Reader, node: Node | None, what: str) -> dict[str, int]:
    mapping = reader.mapping(node, what, f"write {what} with their numbers, as in '{{alice: 1000}}'")
    entries = {} if mapping is None else mapping.entries
    found = {
        name: reader.parsed(entry.value, f"{what}: {quoted(name)}", _parse_id, "write its number")
        for name, entry in entries.items()
    }
    return {name: number for name, number in found.items() if number is not None}


def _parse_id(text: str) -> int:
    number = id_of_number(text) if is_number(text) else None
    if number is None:
        raise ScalarError(f"{quoted(text)} is no number of a user or group", "write decimal digits")
    return number


class _Rows:
    """Reads the rows. Where a value is refused something stands in; the problem is noted."""

    def __init__(self, reader: Reader, rules: RuleSet, names: Lookups) -> None:
        self._reader = reader
        self._rules = rules
        self._names = names
        self._rule_names = [rule.name for rule in rules.rules]

    def cases(self, table: YamlMapping) -> list[Case]:
        entry = table.entries.get("tests")
        rows = self._reader.items(None if entry is None else entry.value, "tests", "write a list")
        return [case for number, row in enumerate(rows, 1) for case in self._row(row, number)]

    def _row(self, node: Node, number: int) -> list[Case]:
        what = f"test {number}"
        mapping = self._reader.mapping(node, what, "write a mapping that begins with '- as: ...'")
        if mapping is None:
            return []
        named = mapping.entries.get("name")
        if named is not None and isinstance(named.value, Text) and named.value.value:
            what = f"test {quoted(named.value.value)}"
        found = self._reader.entries(mapping, what, Expectation)
        client = self._who(found.get("as"), f"{what}: as")
        acted_for = (
            self._who(found["on_behalf_of"], f"{what}: on_behalf_of") if "on_behalf_of" in found else None
        )
        actions = (
            self._reader.choices(found["action"], f"{what}: action", get_args(Action))
            if "action" in found
            else ["open"]
        )
        paths = [path for path in map(self._path, self._paths(found.get("path"), what)) if path is not None]
        expected = self._reader.choice(found.get("expect"), f"{what}: expect", get_args(_Expected))
        rule = self._one_of(found.get("rule"), f"{what}: rule", self._rule_names)
        reason = self._one_of(found.get("reason"), f"{what}: reason", ["ok", *REASONS])
        title = self._reader.text(found.get("name"), f"{what}: name", "write what is expected")
        describe = self._object(found["object"], f"{what}: object") if "object" in found else None
        asker = Asker(client or ClientFacts(-1, frozenset()), acted_for)
        whole = title is not None and len(paths) * len(actions) == 1
        return [
            Case(
                mapping.mark,
                title.value if whole and title is not None else _title(mapping, action, path, title),
                asker,
                action,
                path,
                None if describe is None else describe(action),
                expected == "allowed",
                rule,
                reason,
            )
            for action in actions
            for path in paths
        ]

    def _paths(self, node: Node | None, what: str) -> list[Text]:
        return self._reader.texts(node, f"{what}: path", "write an absolute path, or a list of some")

    def _path(self, text: Text) -> bytes | None:
        self._reader.parsed(text, "path", parse_path, "write an absolute path")
        return text.value.encode() if problem_with_path(text.value.encode()) is None else None

    def _one_of(self, node: Node | None, what: str, words: Sequence[str]) -> str | None:
        text = self._reader.text(node, what, "write one that there is, or leave it out")
        if text is not None and text.value not in words:
            self._reader.add(
                text.mark,
                f"{what}: {quoted(text.value)} is not known",
                lambda: did_you_mean(text.value, words, "write one that there is, or leave it out"),
            )
        return None if text is None else text.value

    # ---- who ----

    def _who(self, node: Node | None, what: str) -> ClientFacts | None:
        if not isinstance(node, YamlMapping):
            cure = "write a user, or {user: alice, groups: [users]}"
            uid = self._id(self._reader.text(node, what, cure), what, self._names.user)
            return None if uid is None else ClientFacts(uid, frozenset())
        found = self._reader.entries(node, what, Who)
        uid = self._id(
            self._reader.text(found.get("user"), f"{what}: user", "write one"), what, self._names.user
        )
        texts = (
            self._reader.texts(found["groups"], f"{what}: groups", "write names") if "groups" in found else []
        )
        gids = [self._id(text, f"{what}: groups", self._names.group) for text in texts]
        client = ClientFacts(-1 if uid is None else uid, frozenset(gid for gid in gids if gid is not None))
        cure = "write its name, as in x.service"
        group = self._reader.parsed(found.get("unit"), f"{what}: unit", unit_cgroup, cure)
        path = self._reader.parsed(found.get("cgroup"), f"{what}: cgroup", parse_path, "write its whole path")
        if "unit" in found and "cgroup" in found:
            cure = "a process is in one control group: keep one of them"
            self._reader.add(node.mark, f"{what} has both 'unit' and 'cgroup'", cure)
        label = self._reader.text(found.get("label"), f"{what}: label", "write it whole")
        if label is not None:
            client = client._replace(label=label.value.encode())
        return with_control_group(client, group or path, self._rules)

    def _id(self, text: Text | None, what: str, look_up: Callable[[str], int | None]) -> int | None:
        if text is None:
            return None
        if is_number(text.value):
            return self._reader.parsed(text, what, _parse_id, "write a name or a number")
        found = look_up(text.value)
        if found is None:
            cure = "write another name, or a number"
            self._reader.add(text.mark, f"{what}: there is no {quoted(text.value)} on this system", cure)
        return found

    # ---- what ----

    def _object(self, node: Node, what: str) -> Callable[[str], Seen]:
        mapping = self._reader.mapping(node, what, "write what rules ask about, as in {owner: alice}")
        found = {} if mapping is None else self._reader.entries(mapping, what, Object)
        kind = self._reader.choice(found.get("type"), f"{what}: type", get_args(_Kind))
        facts: dict[str, int | None] = {}
        for key, look_up in (("owner", self._names.user), ("group", self._names.group)):
            if key in found:
                text = self._reader.text(found[key], f"{what}: {key}", "write a name or a number")
                facts[key] = self._id(text, f"{what}: {key}", look_up)
        parsers = {"mode": parse_mode, "size": parse_size, "links": parse_count, "age": parse_duration}
        for key, parse in parsers.items():
            facts[key] = self._reader.parsed(found.get(key), f"{what}: {key}", parse, f"write its {key}")
        if kind == _MISSING:
            if len(found) > 1 and mapping is not None:
                cure = "leave the rest out"
                self._reader.add(mapping.mark, f"{what}: of what is missing there is nothing to say", cure)
            return lambda _action: Seen(reason="not_found")
        given = {key: fact for key, fact in facts.items() if fact is not None}
        if "filesystem" in found:
            name = self._one_of(found["filesystem"], f"{what}: filesystem", list(FILESYSTEMS))
            given |= {"filesystem": next(iter(FILESYSTEMS[name]))} if name in FILESYSTEMS else {}
        return lambda action: _seen(_kind_for(action) if kind is None else _KINDS[kind], given, action)


def _title(row: YamlMapping, action: str, path: bytes, title: Text | None) -> str:
    who = []
    for key in ("as", "on_behalf_of"):
        entry = row.entries.get(key)
        if entry is not None:
            who.append(_words(entry.value))
    asked = f"{' for '.join(who)} {action} {os.fsdecode(path)}"
    return asked if title is None else f"{title.value}: {asked}"


def _words(node: Node) -> str:
    if isinstance(node, Text):
        return node.value
    if isinstance(node, List):
        return ", ".join(map(_words, node.items))
    if isinstance(node, YamlMapping):
        first, *others = [_words(entry.value) for entry in node.entries.values()] or ["?"]
        return f"{first} ({', '.join(others)})" if others else first
    return "?"
