"""The compiled policy is read strictly: what is missing, unknown or of another type is named and placed."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fdbroker.policy.rules import (
    Admins,
    Bounds,
    ClientFacts,
    ClientMatch,
    Conditions,
    Owners,
    PolicyError,
    Settings,
    read_policy,
)
from tests.running_broker import policy, rule

if TYPE_CHECKING:
    from collections.abc import Iterator

DOCUMENTATION = Path(__file__).resolve().parents[2] / "docs" / "compiled-policy.md"
Place = tuple[str | int, ...]
Node = Any  # of a JSON document


def example_document() -> dict[str, Any]:
    """Return the JSON of docs/compiled-policy.md, without what the launcher takes out."""
    [text] = re.findall(r"```json\n(.*?)```", DOCUMENTATION.read_text(), re.DOTALL)
    document: dict[str, Any] = json.loads(text)
    del document["daemon"]
    return document


def places(value: object, here: Place = ()) -> Iterator[Place]:
    """Give the place of every node."""
    yield here
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*here, key))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from places(inner, (*here, i))


def at(document: Node, place: Place) -> Node:
    for step in place:
        document = document[step]
    return document


def spoken(place: Place) -> str:
    """Return a place as messages say it: `rules[1].where.size`."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in place)
    return text.removeprefix(".")


ALL_PLACES = list(places(example_document()))
DICTIONARIES = [place for place in ALL_PLACES if isinstance(at(example_document(), place), dict)]
LISTS = [place for place in ALL_PLACES if isinstance(at(example_document(), place), list)]
CLIENT_KEYS = ("clients", "on_behalf_of")
MEMBERS = [place for place in ALL_PLACES if place and isinstance(place[-1], str)]


def may_be_missing(place: Place) -> bool:
    """Say whether docs/compiled-policy.md lets this key be missing, the others being there."""
    parent = at(example_document(), place[:-1])
    if "where" in place[:-1]:
        inside = place[place.index("where") + 1 :]
        return len(inside) == 1 or (inside[0] in {"mode", "size", "links", "age"} and len(parent) > 1)
    return is_of_a_client(place[:-1]) and len(parent) > 1


def is_of_a_client(place: Place) -> bool:
    """Say whether this is an entry of those who are meant, or their list."""
    return any(key in place for key in CLIENT_KEYS) and "where" not in place


def test_example_of_the_documentation_loads_and_means_what_it_says() -> None:
    document = example_document()
    assert len(ALL_PLACES) > 60
    rule_set = read_policy(document)
    [root] = rule_set.roots
    assert (root.name, root.path, root.cross_mounts, root.skip) == ("home", b"/home", False, 6)
    assert root.helpers is False
    never, scan = rule_set.rules
    assert never.deny
    assert never.actions == {"open", "stat", "list", "walk"}
    assert never.where is None
    assert [glob.pattern for glob in never.paths] == [b"*/.ssh/**"]
    assert not scan.deny
    assert scan.clients == (
        ClientMatch(frozenset({990}), None, None),
        ClientMatch(frozenset({1000, 1001}), frozenset({100}), None),
        ClientMatch(None, None, frozenset({"/system.slice/x.service"}), frozenset({b"backup (enforce)"})),
    )
    assert rule_set.names_labels
    assert [glob.pattern for glob in scan.excepts] == [b"*/.cache/**"]
    assert scan.where == Conditions(
        Owners(frozenset({1000}), client=True, on_behalf_of=True),
        frozenset({100}),
        256,
        18,
        Bounds(0, 2147483648),
        Bounds(1, 1),
        Bounds(5 * 10**9, 2592000 * 10**9),
        frozenset({0xEF53, 0x01021994}),
    )
    assert scan.deliver == {"descriptor"}
    assert rule_set.settings == Settings(
        64,
        512,
        deny_when_audit_fails=True,
        read_only_view_required=True,
        admins=Admins(frozenset(), frozenset({998})),
        message_within=10.0,
        identity_strict=False,
    )
    assert never.on_behalf_of == ()
    assert scan.on_behalf_of == (
        ClientMatch(None, frozenset({100}), None),
        ClientMatch(frozenset({1000}), None, frozenset({"/user.slice"})),
    )
    assert rule_set.services == {
        b"clamd": (ClientMatch(frozenset({989}), None, frozenset({"/system.slice/scand.service"})),)
    }
    assert rule_set.cgroups == {
        "/system.slice/x.service",
        "/user.slice",
        "/system.slice/scand.service",
    }


@pytest.mark.parametrize("place", MEMBERS, ids=spoken)
def test_missing_key_is_an_error_that_names_it(place: Place) -> None:
    document = example_document()
    del at(document, place[:-1])[place[-1]]
    if may_be_missing(place):
        read_policy(document)
        return
    with pytest.raises(PolicyError) as caught:
        read_policy(document)
    assert spoken(place[:-1]) in str(caught.value)
    if not is_of_a_client(place[:-1]):  # an empty entry is refused as such
        assert str(place[-1]) in str(caught.value)


@pytest.mark.parametrize("place", DICTIONARIES, ids=lambda place: spoken(place) or "the policy")
def test_unknown_key_is_an_error_that_names_its_place(place: Place) -> None:
    document = example_document()
    at(document, place)["surprise"] = 1
    with pytest.raises(PolicyError) as caught:
        read_policy(document)
    assert spoken(place) in str(caught.value)


WRONG = [None, True, 7, -1.5, "surprise", [], {}, ["surprise"], {"surprise": 1}]


def is_of_its_type(place: Place, value: Node) -> bool:
    """Say whether `value` could stand at this place."""
    if not place:
        return False
    there = at(example_document(), place)
    if type(value) is not type(there):
        return False
    if place in {("roots",), ("roots", 0, "name")}:
        return False  # the rules speak of it
    if isinstance(value, list):
        element = there[0] if there else ""
        # Nothing at all is no action, client or path; elsewhere it is nothing to match.
        if not value:
            acts_for_somebody = place == ("rules", 1, "on_behalf_of")  # and has a condition on who that is
            return place[-1] not in {"actions", "clients", "paths"} and not acts_for_somebody
        return isinstance(element, str) and place[-1] in {"paths", "except", "cgroups", "labels"}
    if isinstance(value, dict):
        return place[-1] == "where" and not value
    if isinstance(value, bool):
        return place[-1] != "any" or value
    if isinstance(value, float):
        return False  # none of them is long enough
    if isinstance(value, int):
        return place not in {("version",), ("limits", "in_flight_per_connection")}
    # A text: which ones are words of a closed list?
    free = {"name", "paths", "except", "cgroups", "labels"}
    return place[-1] in free or (isinstance(place[-1], int) and place[-2] in free)


@pytest.mark.parametrize("place", ALL_PLACES, ids=lambda place: spoken(place) or "the policy")
@pytest.mark.parametrize("value", WRONG, ids=repr)
def test_value_of_another_type_or_meaning_is_an_error_that_names_its_place(place: Place, value: Node) -> None:
    document = example_document()
    if place:
        at(document, place[:-1])[place[-1]] = copy.deepcopy(value)
    else:
        document = copy.deepcopy(value)
    if is_of_its_type(place, value):
        read_policy(document)
        return
    with pytest.raises(PolicyError) as caught:
        read_policy(document)
    message = str(caught.value)
    parent, last = spoken(place[:-1]), str(place[-1]) if place else ""
    sayings = {
        "the place": spoken(place) in message,
        "what it is a key of": parent in message and last in message,
        "a word that is none": f"{parent} has {value!r}" in message,
        "nothing where there must be something": f"{parent} needs at least one" in message and value == [],
        "the client's entry": is_of_a_client(place) and spoken(place[:4]) in message,
        "an owner who is acted for by nobody": "on_behalf_of" in place and "is empty" in message,
        "a rule whose root is gone": place[:1] == ("roots",) and "not among the roots" in message,
    }
    assert any(sayings.values()), message


@pytest.mark.parametrize("place", LISTS, ids=spoken)
@pytest.mark.parametrize("value", [None, 1.5, [], {}, ["a"]], ids=repr)
def test_wrong_element_of_a_list_is_an_error_that_names_its_place(place: Place, value: object) -> None:
    document = example_document()
    elements = at(document, place)
    elements.append(value)
    with pytest.raises(PolicyError) as caught:
        read_policy(document)
    assert f"{spoken(place)}[{len(elements) - 1}]" in str(caught.value)


def broken(**changes: object) -> dict[str, Any]:
    return policy("/r") | changes


def service(**changes: object) -> dict[str, Any]:
    return {"name": "x", "clients": [{"uids": [1]}]} | changes


def root(**changes: object) -> list[dict[str, Any]]:
    return [{"name": "tree", "path": "/r", "cross_mounts": False, "opens": "loop"} | changes]


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ([], "not a JSON object"),
        ("text", "not a JSON object"),
        (broken(version=2), "version is not 1"),
        (broken(version=True), "version"),
        (broken(version="1"), "version"),
        (broken(roots=root(path="relative")), "roots[0].path: relative"),
        (broken(roots=root(path="")), "roots[0].path: empty"),
        (broken(roots=root(path="/r/")), "roots[0].path: trailing_slash"),
        (broken(roots=root(path="/r/../s")), "roots[0].path: dot_component"),
        (broken(roots=root(path="//r")), "roots[0].path: empty_component"),
        (broken(roots=root(path="/\0")), "roots[0].path: nul"),
        (broken(roots=root(path="/" + "n" * 256)), "roots[0].path: name_too_long"),
        (broken(roots=root(path="/\ud800")), "roots[0].path"),
        (broken(roots=root(opens="threads")), "roots[0].opens is 'threads', which is none of loop, helpers"),
        (broken(roots=root() + root(path="/s")), "roots[1] has the name or the path"),
        (broken(roots=root() + root(name="other")), "roots[1] has the name or the path"),
        (broken(rules=[rule("x", root="nowhere")]), "rules[0].root is 'nowhere'"),
        (broken(rules=[rule("x", effect="Allow")]), "rules[0].effect is 'Allow'"),
        (broken(rules=[rule("x", actions=["read"])]), "rules[0].actions has 'read'"),
        (broken(rules=[rule("x", deliver=["socket"])]), "rules[0].deliver has 'socket'"),
        (broken(rules=[rule("x", paths=["a", "/b"])]), "rules[0].paths[1]: the glob starts with '/'"),
        (broken(rules=[rule("x", paths=["\ud800"])]), "rules[0].paths[0]"),
        (broken(rules=[rule("x"), rule("y") | {"except": ["["]}]), "rules[1].except[0]"),
        (broken(rules=[rule("x", clients=[{"any": False}])]), "rules[0].clients[0]"),
        (broken(rules=[rule("x", clients=[{"any": 1, "uids": [0]}])]), "rules[0].clients[0]"),
        (broken(rules=[rule("x", clients=[{}])]), "rules[0].clients[0]"),
        (broken(rules=[rule("x", clients=[{"uids": [True]}])]), "rules[0].clients[0].uids[0]"),
        (broken(rules=[rule("x", on_behalf_of=[{}])]), "rules[0].on_behalf_of[0]"),
        (broken(rules=[rule("x", on_behalf_of=None)]), "rules[0].on_behalf_of is not of type list"),
        (
            broken(
                rules=[
                    rule("x", where={"owner": {"uids": [], "client": False, "on_behalf_of": True}}),
                ]
            ),
            "rules[0].where.owner.on_behalf_of is true, and rules[0].on_behalf_of is empty",
        ),
        (broken(rules=[rule("x", where={"mode": {}})]), "rules[0].where.mode"),
        (broken(rules=[rule("x", where={"size": {}})]), "rules[0].where.size"),
        (broken(rules=[rule("x", where={"colour": {"max": 1}})]), "rules[0].where"),
        (broken(rules=[rule("x", where={"age": {}})]), "rules[0].where.age must have min, max or both"),
        (
            broken(rules=[rule("x", where={"filesystem": [1]})]),
            "rules[0].where.filesystem is not of type dict",
        ),
        (
            broken(
                limits={"connections_per_uid": 0, "in_flight_per_connection": 512, "message_within": 10.0}
            ),
            "connections_per_uid is 0",
        ),
        (
            broken(
                limits={"connections_per_uid": 1, "in_flight_per_connection": 252, "message_within": 10.0}
            ),
            "in_flight_per_connection is 252, less than 253",
        ),
        *[
            (
                policy("/r", limits={"message_within": seconds}),
                f"limits.message_within is {seconds}, not from 1.0 to 3600.0",
            )
            for seconds in (0.5, -1.0, 3600.5, float("nan"), float("inf"))
        ],
        (policy("/r", limits={"requests_per_second": 5}), "limits.requests_burst is not of type int"),
        (policy("/r", limits={"opens_burst": 5}), "limits.opens_per_second is not of type int"),
        (
            policy("/r", limits={"opens_per_second": 0, "opens_burst": 1}),
            "limits.opens_per_second is 0, less than 1",
        ),
        (
            policy("/r", limits={"opens_per_second": 1, "opens_burst": 1_000_001}),
            "limits.opens_per_second or limits.opens_burst is more than 1000000",
        ),
        (policy("/r", limits={"in_flight_per_uid": 252}), "limits.in_flight_per_uid is 252, less than 253"),
        (policy("/r", limits={"idle_timeout": 0.5}), "limits.idle_timeout is 0.5, not from 1.0 to 86400.0"),
        (policy("/r", limits={"idle": 5.0}), "limits has missing or unknown keys: idle"),
        (broken(rules=[rule("x", limits={})]), "rules[0].limits needs at least one limit"),
        (broken(rules=[rule("x", limits={"in_flight": 0})]), "rules[0].limits.in_flight is 0, less than 1"),
        (broken(rules=[rule("x", limits={"opens_burst": 1})]), "rules[0].limits.opens_per_second is not of"),
        (broken(rules=[rule("x", limits={"requests": 1})]), "rules[0].limits has missing or unknown keys"),
        (
            broken(rules=[rule("x", effect="deny", limits={"in_flight": 1})]),
            "rules[0].limits: a rule that denies gives nothing to be limited",
        ),
        (policy("/r", limits={"message_within": 10}), "limits.message_within is not of type float"),
        (broken(audit={"on_failure": "ignore"}), "audit.on_failure is 'ignore'"),
        (broken(read_only_view="optional"), "read_only_view is 'optional'"),
        (broken(identity="lax"), "policy.identity is 'lax'"),
        (broken(services=[service()] * 2), "services[1].name is 'x': no name, or that of an earlier service"),
        (broken(services=[service(name="")]), "services[0].name is ''"),
        (broken(services=[service(name="\u00e9")]), "services[0].name is '\u00e9'"),
        (broken(services=[service(name="a\n")]), "services[0].name is 'a\\n'"),
        (broken(services=[service(clients=[])]), "services[0].clients needs at least one entry"),
        (broken(services=[service(clients=[{}])]), "services[0].clients[0]"),
    ],
)
def test_policy_that_can_not_be_meant_is_refused_with_its_place(document: object, said: str) -> None:
    with pytest.raises(PolicyError) as caught:
        read_policy(document)
    assert said in str(caught.value)


@pytest.mark.parametrize(("opens", "helpers"), [("loop", False), ("helpers", True)])
def test_root_says_who_opens_its_files(opens: str, helpers: bool) -> None:  # noqa: FBT001
    [read] = read_policy(broken(roots=root(opens=opens))).roots
    assert read.helpers is helpers


def test_any_true_is_not_any_one() -> None:
    """1 == True to Python, not to the documentation."""
    with pytest.raises(PolicyError):
        read_policy(broken(rules=[rule("x", clients=[{"any": 1}])]))


def test_least_limits_are_taken() -> None:
    settings = read_policy(
        broken(limits={"connections_per_uid": 1, "in_flight_per_connection": 253, "message_within": 10.0})
    ).settings
    assert settings[:2] == (1, 253)


@pytest.mark.parametrize(
    ("uid", "gids", "included"),
    [(0, {0}, True), (5, {1}, True), (6, {1, 7}, True), (6, {1, 5}, False), (7, set(), False)],
)
def test_admins_are_uid_0_and_who_is_named_by_uid_or_by_any_group(
    uid: int,
    gids: set[int],
    included: bool,  # noqa: FBT001
) -> None:
    admins = Admins(frozenset({5}), frozenset({7}))
    assert admins.include(ClientFacts(uid, frozenset(gids))) is included


def test_fingerprint_is_of_what_the_policy_says_and_not_of_how_it_is_laid_out() -> None:
    document = example_document()
    assert read_policy(document).fingerprint == read_policy(dict(reversed(document.items()))).fingerprint
    seen = set()
    for place in ALL_PLACES:
        changed = example_document()
        there = at(changed, place)
        if isinstance(there, int) and not isinstance(there, bool) and place != ("version",):
            at(changed, place[:-1])[place[-1]] = there + 1
            seen.add(read_policy(changed).fingerprint)
    assert len(seen) > 10
    assert read_policy(document).fingerprint not in seen


def test_settings_that_weaken_are_read_as_such() -> None:
    settings = read_policy(broken(audit={"on_failure": "allow"}, read_only_view="off")).settings
    assert not settings.deny_when_audit_fails
    assert not settings.read_only_view_required
