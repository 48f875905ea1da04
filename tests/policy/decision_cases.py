"""Policies and what is asked of them, drawn so that every outcome comes up, and words for what came up.

Drawn without aim, hardly any rule meets the client, the action and the path: nearly all is denied, whatever
the policy says, and a test that compares denials sees little. `test_every_outcome_has_its_share_of_the_cases`
counts. What can be one choice among values is one: it is faster, and hypothesis, which copies parts of an
example into others, then varies more.
"""

from __future__ import annotations

import fnmatch
import functools
import itertools
import stat
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from hypothesis import strategies as st

from fdbroker.policy.rules import ACTIONS, ClientFacts
from tests.policy import decision_model
from tests.policy.decision_model import Asker, Facts
from tests.running_broker import policy, rule

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# A document or a part of one.
Part = dict[str, Any]
T = TypeVar("T")

UID, GID, OTHER = 1000, 100, 1001
CLIENT = ClientFacts(UID, frozenset({GID}), frozenset({"/here"}))
FILE, DIRECTORY = stat.S_IFREG | 0o640, stat.S_IFDIR | 0o750

# Roots that contain each other, and one beside whose name begins alike.
ROOTS = {"all": "/", "a": "/a", "ab": "/a/b", "abc": "/a/b/c", "ax": "/ax"}
NAMES = ["a", "b", "c", "ax", ".b"]
SPELLED_OUT = ["a", "b", "b/c", "a/**/c", "**/c", "b/**", "**/b/**", "c/b/a"]
WITH_PATTERNS = ["*", "b/*", "*/b", "[a-b]", "?", "a*", "**/a*", "b", "b/c"]


def subsets(values: Sequence[T], least: int = 0, most: int = 3) -> list[list[T]]:
    return [list(some) for size in range(least, most + 1) for some in itertools.combinations(values, size)]


def one_or_several(values: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[Part]:
    """Give some of the keys, or one alone: of several, one may hide what is done with the others."""
    alone = [st.fixed_dictionaries({key: value}) for key, value in values.items()]
    # Few of them: an object that meets many at a time is rare.
    several = st.one_of(
        [st.fixed_dictionaries({key: values[key] for key in some}) for some in subsets(list(values), 2)]
    )
    return st.one_of([several, several, *alone])


# ---- policies ----

identities = one_or_several(
    {
        "uids": st.sampled_from([[UID], [UID, OTHER], [OTHER], []]),
        "gids": st.sampled_from([[GID], [101, GID], [101], []]),
        "cgroups": st.sampled_from([["/here"], ["/there", "/here"], ["/there"], []]),
        "labels": st.sampled_from([["x_t"], ["x_t", "y_t"], ["y_t"], []]),
    }
)
masks = [0, 0o400, 0o002, 0o006, 0o111]
bounds = st.sampled_from(
    [{key: bound} for key in ("max", "min") for bound in range(4)]
    + [{"min": least, "max": most} for least in range(4) for most in range(4)]
)
conditions = one_or_several(
    {
        "owner": st.sampled_from(
            [
                {"uids": uids, "client": client, "on_behalf_of": acted_for}
                for uids in subsets([0, UID, OTHER])
                for client in (True, False)
                for acted_for in (True, False)
            ]
        ),
        "group": st.sampled_from([{"gids": gids} for gids in subsets([0, GID])]),
        "mode": st.sampled_from(
            [{key: mask} for key in ("all", "none") for mask in masks]
            + [{"all": one, "none": other} for one in masks for other in masks]
        ),
        "size": bounds,
        "links": bounds,
        "age": bounds,
        "filesystem": st.sampled_from([{"types": types} for types in subsets([0, 0xEF53])]),
    }
)
nothing: st.SearchStrategy[Part] = st.just({})
anybody: st.SearchStrategy[list[Part]] = st.just([{"any": True}])
somebody: st.SearchStrategy[list[Part]] = st.lists(identities, min_size=1, max_size=2)
itself: st.SearchStrategy[list[Part]] = st.just([])


def documents_of(
    roots: Sequence[str],
    globs: Sequence[str],
    exceptions: Sequence[str],
    where: st.SearchStrategy[Part],
    acted_for: st.SearchStrategy[list[Part]],
) -> st.SearchStrategy[Part]:
    some: st.SearchStrategy[Part] = st.fixed_dictionaries(
        {
            "effect": st.sampled_from(["allow", "deny", "allow"]),
            "actions": st.sampled_from([*[list(ACTIONS)] * 3, ["open"], ["stat", "list"], ["walk", "open"]]),
            "root": st.sampled_from(roots),
            "clients": anybody | somebody,
            "on_behalf_of": acted_for,
            "paths": st.sampled_from(subsets(["**", *globs], 1, 1) * 3 + subsets(["**", *globs], 2, 2)),
            "except": st.sampled_from([[]] * 50 + subsets(exceptions, 1, 2)),
            "where": where,
            "deliver": st.sampled_from([["descriptor"], ["copy"], ["descriptor", "copy"]]),
            "symlinks": st.sampled_from(["refuse", "within-root"]),
        }
    )
    # In half of the policies something is said of every path.
    everywhere: st.SearchStrategy[list[Part]] = st.just([]) | st.tuples(where, acted_for).map(
        lambda drawn: [{"root": name, "where": drawn[0], "on_behalf_of": drawn[1]} for name in roots]
    )
    return st.tuples(st.lists(some, min_size=2, max_size=6), everywhere).map(
        lambda drawn: policy(
            "/",
            roots=[
                {"name": name, "path": ROOTS[name], "cross_mounts": False, "opens": "loop"} for name in roots
            ],
            rules=[meant(rule(f"rule {i}", **changes)) for i, changes in enumerate(drawn[0] + drawn[1])],
        )
    )


def meant(about: Part) -> Part:
    """Return a rule without what it can not speak of: the owner acted for, by nobody; links, to deny."""
    if about["effect"] == "deny":
        about |= {"symlinks": "refuse"}
    owner = about["where"].get("owner")
    if owner is None or about["on_behalf_of"]:
        return about
    return about | {"where": about["where"] | {"owner": owner | {"on_behalf_of": False}}}


# Chosen for a whole policy: one rule with a pattern, or one that asks nothing of the object, hides what is
# done with the other rules.
documents = st.one_of(
    [
        documents_of(*chosen)
        for chosen in itertools.product(
            (["a"], ["a", "ab"], ["ab", "all"], list(ROOTS)),
            (SPELLED_OUT, WITH_PATTERNS),
            (SPELLED_OUT, WITH_PATTERNS),
            (conditions, conditions, conditions | nothing, nothing),
            (*[itself] * 5, somebody, anybody, anybody | itself),
        )
    ]
)

# ---- what is asked ----

clients = st.builds(
    ClientFacts,
    st.sampled_from([UID, OTHER, 7]),
    st.sampled_from([frozenset(gids) for gids in subsets([GID, 101, 7])]),
    st.sampled_from([frozenset(cgroups) for cgroups in subsets(["/here", "/there"])]),
    st.sampled_from([True] * 7 + [False]),
    st.sampled_from([None, b"x_t"]),
)
KINDS = [
    FILE,
    DIRECTORY,
    stat.S_IFLNK | 0o777,
    stat.S_IFIFO,
    *(stat.S_IFREG | mode for mode in (0o666, 0o151, 0)),
]
OWNERS = [0, UID, OTHER]
# An odd number of them: they meet every other value.
TIMES = [decision_model.NOW - seconds * decision_model.SECOND for seconds in (-1, 0, 1, 2, 3, 4, 5)]
objects = st.lists(
    st.sampled_from(
        [
            # Each of the last two by all of the others, which are many enough.
            Facts(*values, TIMES[number % len(TIMES)], (0, 0xEF53)[number % 2])
            for number, values in enumerate(itertools.product(KINDS, OWNERS, [0, GID], range(5), range(1, 5)))
        ]
    ),
    min_size=5,
    max_size=5,
)


def lengthened(path: str, size: int) -> str:
    """Return a path below `path` that has `size` bytes, in names that are not too long."""
    return (path.rstrip("/") + ("/" + "x" * 99) * 50)[:size]


spellings: st.SearchStrategy[Callable[[str], str]] = st.sampled_from(
    [
        *[str] * 30,
        # Beside what a glob matches, or outside the roots.
        lambda path: path.rpartition("/")[0] or "/",
        lambda path: path.rpartition("/")[0] + "/c",
        lambda path: path.rstrip("/") + "/b",
        lambda path: "/ax" + path.rstrip("/"),
        lambda path: "/c" + path.rstrip("/"),
        # No path, most of them; two are just not too long.
        lambda _path: "",
        lambda path: path[1:],
        lambda path: path + "/",
        lambda path: "/" + path,
        lambda path: path.replace("/", "//"),
        lambda path: path + "/.",
        lambda path: path + "/../b",
        lambda path: path.rstrip("/") + "/" + "x" * 255,
        lambda path: path.rstrip("/") + "/" + "x" * 256,
        lambda path: lengthened(path, 4095),
        lambda path: lengthened(path, 4096),
    ]
)


@functools.cache
def matching(glob: str) -> st.SearchStrategy[tuple[str, ...]]:
    """Give the components of paths that a glob matches."""
    few = [*[()] * 5, *itertools.product(NAMES), *itertools.product("abc", repeat=2)]
    choices = [
        few if component == "**" else [(name,) for name in fnmatch.filter(NAMES, component)]
        for component in glob.split("/")
    ]
    return st.sampled_from([tuple(itertools.chain(*chosen)) for chosen in itertools.product(*choices)])


@st.composite
def paths_for(draw: st.DrawFn, rules: Sequence[Part]) -> str:
    """Give a path that some glob of a rule matches, be it an exception; sometimes oddly spelled."""
    globs = [(about["root"], glob) for about in rules for glob in about["paths"] * 2 + about["except"]]
    root, glob = draw(st.sampled_from(globs))
    return draw(spellings)("/".join([ROOTS[root].rstrip("/"), *draw(matching(glob))]) or "/")


@st.composite
def clients_of(draw: st.DrawFn, entries: Sequence[Part]) -> ClientFacts:
    """Give a client that one of the entries means, if it means any."""
    client = draw(clients)
    entry = draw(st.sampled_from(entries))
    return ClientFacts(
        next(iter(entry.get("uids", ())), client.uid),
        client.gids.union(entry.get("gids", ())),
        client.cgroups.union(entry.get("cgroups", ())),
        label=next((label.encode() for label in entry.get("labels", ())), client.label),
    )


@st.composite
def askers_of(draw: st.DrawFn, about: Part) -> Asker:
    """Give who asks as a rule says, and for whom; now and then not as the rule says."""
    client = draw(clients_of(about["clients"]))
    if not about["on_behalf_of"]:
        return Asker(client, draw(st.sampled_from([None] * 15 + [ClientFacts(OTHER, frozenset({GID}))])))
    acted_for = draw(clients_of(about["on_behalf_of"]))
    return Asker(client, draw(st.sampled_from([acted_for] * 7 + [None])))


class Case(NamedTuple):
    """A policy, and what one client asks for one after another."""

    document: Part
    asker: Asker
    action: str
    paths: list[str]


@st.composite
def cases(draw: st.DrawFn, *, copies: bool = False) -> Case:
    """Give a case in which some rule means the client and the action; one that allows, if there is one.

    With `copies` it may be to open a file for its contents alone.
    """
    document = draw(documents)
    rules = document["rules"]
    about = draw(st.sampled_from([each for each in rules if each["effect"] == "allow"] or rules))
    return Case(
        document,
        draw(askers_of(about)),
        draw(
            st.sampled_from([*about["actions"], *(["copy"] if copies and "open" in about["actions"] else [])])
        ),
        draw(st.lists(paths_for([about, *rules]), min_size=4, max_size=8)),
    )


def aimed(case: Case, found: Sequence[Facts]) -> list[Facts]:
    """Return the objects, some of which meet what rules ask for, as far as anything can: hardly any would."""
    asking = [about for about in case.document["rules"] if about["where"]]
    # Refusals first: what they do shows only where they and a rule that allows mean one path.
    asking.sort(key=lambda about: about["effect"] == "allow")
    # Two are left as they are: they fail at one condition or another.
    meeting = [
        meeting_all(about["where"], facts, case.asker)
        for about, facts in zip(asking[: len(found) - 2], found, strict=False)
    ]
    return [*meeting, *found[len(meeting) :]]


def meeting_all(where: Part, facts: Facts, asker: Asker) -> Facts:
    """Return an object like `facts` that meets all conditions, as far as that can be."""
    changed = facts._asdict()
    if "owner" in where:
        acted_for = [asker.on_behalf_of.uid] if asker.on_behalf_of is not None else []
        uids = [
            *where["owner"]["uids"],
            *([asker.client.uid] if where["owner"]["client"] else []),
            *(acted_for if where["owner"]["on_behalf_of"] else []),
        ]
        changed["st_uid"] = next(iter(uids), facts.st_uid)
    if "group" in where:
        changed["st_gid"] = next(iter(where["group"]["gids"]), facts.st_gid)
    if "mode" in where:
        changed["st_mode"] = (facts.st_mode | where["mode"].get("all", 0)) & ~where["mode"].get("none", 0)
    if "filesystem" in where:
        changed["filesystem"] = next(iter(where["filesystem"]["types"]), facts.filesystem)
    if "size" in where:
        changed["st_size"] = within(where["size"], facts.st_size)
    if "links" in where:
        changed["st_nlink"] = within(where["links"], facts.st_nlink)
    if "age" in where:
        age = (decision_model.NOW - facts.st_mtime_ns) // decision_model.SECOND
        changed["st_mtime_ns"] = decision_model.NOW - within(where["age"], age) * decision_model.SECOND
    return Facts(**changed)


def within(bounds: Part, value: int) -> int:
    return max(bounds.get("min", value), min(bounds.get("max", value), value))


# ---- what came up ----


def what_comes_of(case: Case, path: str, found: list[Facts]) -> set[str]:
    """Return the outcomes for a path where one or the other object may be."""
    expected = decision_model.expect(*case[:3], path)
    object_counts = expected.rule is None and expected.allows
    reasons = {
        decision_model.outcome(*case[:3], path, facts).reason
        for facts in (found if object_counts else found[:1])
    }
    by = " by object" if object_counts else " by name"
    return {reason + by if reason in {"ok", "deny_rule"} else reason for reason in reasons}


def without(about: Part, *, spelled_out: bool) -> Part:
    """Return a deny rule without the globs that end in a name, or without those that end in a pattern."""
    if about["effect"] == "allow":
        return about
    unwanted = {
        glob
        for glob in about["paths"]
        if not glob.endswith("**") and (glob.rpartition("/")[2] in NAMES) is spelled_out
    }
    return about | {"paths": [glob for glob in about["paths"] if glob not in unwanted]}


# Changes to a rule, given the root that serves. Where one changes the decision, a test would notice that the
# code passes over what it changes.
CHANGES: dict[str, Callable[[Part, str | None], Part]] = {
    "actions": lambda about, _: about | {"actions": ACTIONS},
    "clients": lambda about, _: about | {"clients": [{"any": True}]},
    "on_behalf_of": lambda about, _: about | {"on_behalf_of": about["on_behalf_of"] and [{"any": True}]},
    "except": lambda about, _: about | {"except": []},
    "deliver": lambda about, _: about | {"deliver": ["descriptor", "copy"]},
    "a deny rule of an outer root": lambda about, serving: (
        about | {"paths": []} if about["effect"] == "deny" and about["root"] != serving else about
    ),
    "a name in a deny rule": lambda about, _: without(about, spelled_out=True),
    "a pattern in a deny rule": lambda about, _: without(about, spelled_out=False),
}


def what_it_turns_on(case: Case, path: str) -> set[str]:
    """Return what the decision on a name turns on, as far as not every decision does."""
    document, asker, action, _ = case
    expected = decision_model.expect(document, asker, action, path)
    turning = set()
    for what, change in CHANGES.items():
        changed = document | {"rules": [change(about, expected.root) for about in document["rules"]]}
        if decision_model.expect(changed, asker, action, path) != expected:
            turning.add(f"turns on {what}")
    if asker.on_behalf_of is not None:
        itself_asks = decision_model.expect(document, Asker(asker.client), action, path)
        turning |= {"turns on being asked for another"} if itself_asks != expected else set()
    outer = document | {
        "roots": [root for root in document["roots"] if root["name"] != expected.root],
        "rules": [about for about in document["rules"] if about["root"] != expected.root],
    }
    if decision_model.expect(outer, asker, action, path).allows:
        turning.add("turns on an inner root")
    if path in {root["path"] for root in document["roots"]}:
        turning.add("root itself")
    return turning
