"""The JSON Schema, tried with a validator: it takes what the reader takes, and refuses all that it can."""

# ruff: noqa: E501 - values in a row

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from fdbroker.config import ConfigError, compile_policy, json_schema
from fdbroker.config import compile as compile_module
from fdbroker.config.errors import Mark, ProblemList
from fdbroker.config.yaml_tree import Entry, List, Mapping, Text, parse_yaml
from tests.config.fake_lookups import FakeLookups

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fdbroker.config.yaml_tree import Node

HERE = Mark(1, 1, "p")
CONFIG = Path(__file__).resolve().parents[2] / "config"
FILES = [CONFIG / "policy.yaml", *sorted((CONFIG / "examples").glob("*.yaml"))]
VALIDATOR = Draft202012Validator(json_schema())

# Every key that there is.
WHOLE: dict[str, Any] = {
    "version": 1,
    "roots": {
        "home": {"path": "/home", "cross_mounts": True, "opens": "loop"},
        "mail": {"path": "/var/mail", "opens": "helpers"},
    },
    "rules": [
        {
            "name": "a",
            "allow": ["open", "stat"],
            "client": [{"user": ["clamav", 1000], "group": "users"}, {"unit": "a@.service", "label": "x_t"}],
            "on_behalf_of": {"cgroup": ["/a", "/b"]},
            "in": "home",
            "paths": ["**", "a/*"],
            "except": "a/b",
            "where": {
                "owner": ["client", "on_behalf_of", 1000],
                "group": "users",
                "mode": {"all": "0400", "none": "0022"},
                "size": {"min": 1, "max": "2GiB"},
                "links": {"min": 1, "max": 2},
                "age": {"min": "5s", "max": "30d"},
                "filesystem": ["ext4", "xfs"],
            },
            "deliver": ["descriptor", "copy"],
            "symlinks": "within-root",
        },
        {"name": "b", "deny": "open", "in": "mail", "paths": "x"},
        {"name": "c", "allow": "list", "client": "any", "in": "mail", "paths": "x"},
    ],
    "limits": {"connections_per_uid": 64, "in_flight_per_connection": 512, "message_within": "10s"},
    "audit": {"on_failure": "deny", "to": "/var/log/a"},
    "read_only_view": "required",
    "identity": "available",
    "admins": {"user": "root", "group": ["users", 7]},
    "user": "fdbroker",
    "listeners": {
        "seqpacket": {"path": "/run/a", "group": "users", "mode": "0660"},
        "stream": {},
        "dgram": {"path": "/run/d"},
        "control": {"mode": "0666"},
        "clamd": {"path": "/run/c", "service": {"user": "clamav"}},
    },
}


def tree_of(document: object) -> Node:
    """Return the tree that the parser makes of JSON, which is YAML, but for the places: parsing takes longest."""
    if isinstance(document, dict):
        return Mapping(HERE, {key: Entry(Text(HERE, key, False), tree_of(document[key])) for key in document})  # noqa: FBT003
    if isinstance(document, list):
        return List(HERE, list(map(tree_of, document)))
    if isinstance(document, str):
        return Text(HERE, document, plain=False)
    return Text(HERE, json.dumps(document), plain=True)


def without_places(node: Node) -> object:
    if isinstance(node, Mapping):
        return {key: (entry.key.plain, without_places(entry.value)) for key, entry in node.entries.items()}
    return list(map(without_places, node.items)) if isinstance(node, List) else node[1:]


def accepted_by_reader(document: object) -> str:
    """Return "" if the reader takes it, else what it says."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compile_module, "parse_yaml", lambda _text, _problems: tree_of(document))
        try:
            compile_policy(b"", "p", FakeLookups())
        except ConfigError as error:
            return str(error)
    return ""


def test_tree_that_is_made_here_is_that_of_the_parser() -> None:
    for document in (WHOLE, *VALUES):
        parsed = parse_yaml(json.dumps(document).encode(), ProblemList("p"))
        assert parsed is not None
        assert without_places(tree_of(document)) == without_places(parsed)


def test_schema_is_one() -> None:
    Draft202012Validator.check_schema(json_schema())


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_what_is_installed_is_valid(file: Path) -> None:
    assert list(VALIDATOR.iter_errors(yaml.safe_load(file.read_text()))) == []


def test_policy_with_every_key_is_taken_by_both() -> None:
    assert accepted_by_reader(WHOLE) == ""
    assert list(VALIDATOR.iter_errors(WHOLE)) == []


def places(node: Any, at: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:  # noqa: ANN401 - JSON
    """Give the places of a document; of what is in a list, one of each kind."""
    yield at
    if isinstance(node, dict):
        for key, value in node.items():
            yield from places(value, (*at, key))
    if isinstance(node, list):
        for number, value in enumerate(node):
            if isinstance(value, dict) or not number or type(value) is not type(node[number - 1]):
                yield from places(value, (*at, number))


def found(document: Any, at: tuple[str | int, ...]) -> Any:  # noqa: ANN401 - JSON
    for key in at:
        document = document[key]
    return document


def around(document: Any, at: tuple[str | int, ...]) -> Any:  # noqa: ANN401 - JSON
    """Return of a document the change at a place, and what that can be about: the rest takes most of the time."""
    if not isinstance(document, dict) or not at or at[0] == "version":
        return document
    kept = {key: value for key, value in document.items() if key in {"version", "roots", at[0]}}
    if at[0] != "rules":
        kept["rules"] = WHOLE["rules"][-1:]
    elif len(at) > 1:
        kept["rules"] = [part_of_rule(document["rules"][at[1]], at[2:])]
        kept["roots"] = {"home": {"path": "/h"}, "mail": {"path": "/m", "opens": "helpers"}}
    return kept


def part_of_rule(about: Any, at: tuple[str | int, ...]) -> Any:  # noqa: ANN401 - JSON
    """Return of a rule what there has to be, and the change at a place in it."""
    if not isinstance(about, dict) or not at:
        return about
    kept = {key: value for key, value in about.items() if key in {*NEEDED_OF_A_RULE, at[0]}}
    if "client" in kept and at[0] != "client":
        kept["client"] = "any"
    if at[0] == "where" and isinstance(about["where"], dict) and len(at) > 1:
        kept["where"] = {key: value for key, value in about["where"].items() if key == at[1]}
        if at[1] == "owner":
            kept["on_behalf_of"] = "any"
    return kept


NEEDED_OF_A_RULE = {"name", "allow", "deny", "client", "in", "paths"}


def changed(at: tuple[str | int, ...], value: object) -> Any:  # noqa: ANN401 - JSON
    document = copy.deepcopy(WHOLE)
    if not at:
        return value
    found(document, at[:-1])[at[-1]] = value
    return document


VALUES: list[Any] = [
    "", "x", "/", "/a/", "/a//b", "/a/../b", "a/", "a//b", "../a", "no", "on", True, None, 0, -1, 7, 10**9, 1.5, "0777", "640",
    "22:30", "1_000", "2G", "5m", "any", "client", [], {}, ["x", "x"], [[]], {"x": 1}, ["open", "open"], {"any": True}, [True],
]  # fmt: skip


def mutations() -> Iterator[tuple[str, tuple[str | int, ...], Any]]:
    """Give every document that differs from WHOLE in one place: a value, a key less, a key more."""
    for at in places(WHOLE):
        for value in VALUES:
            yield f"becomes {json.dumps(value)}", at, changed(at, value)
        node = found(WHOLE, at)
        if isinstance(node, dict):
            yield "a key more", at, changed(at, {**node, "unknown-key!": "x"})
            for key in node:
                yield (
                    f"no {key}",
                    at,
                    changed(at, {name: value for name, value in node.items() if name != key}),
                )
        if isinstance(node, list):
            yield "the first twice", at, changed(at, [*node, node[0]])


# What the schema can't say, by what the reader does say of it.
BEYOND = (
    "there is no",  # users, groups, roots of this name
    "No such file or directory",
    "is that of root",
    "given twice, first in line",  # a name of a rule; items of a list are told apart by the schema
    "is not the name of a service or scope",
    "every process is in or below the control group '/'",
    "is larger than any",
    "is more than max",
    "is out of range",  # of durations
    "the rule has no 'on_behalf_of'",
    "must be both set and clear",
    "only what is opened is delivered",
    "0 names no bit",
    "is no type of file system that is ever served",
    "helpers open in root",
    "walks follow no links",
    "is no template and no unit",
    "is not allowed: every id that a user namespace",
    "is longer than",
    "is not a file mode",  # of numbers: what an editor makes of a plain 0640 is its YAML's affair
)


@pytest.mark.unmeasured
def test_reader_and_schema_refuse_the_same_as_far_as_a_schema_can_say() -> None:
    wrong = []
    refused = 0
    for what, at, document in mutations():
        seen = around(document, at)
        said = accepted_by_reader(seen)
        valid = VALIDATOR.is_valid(seen)
        refused += not valid
        # To YAML in an editor a plain true or 7 is no text; to the reader everything is one.
        value = found(document, at)
        text = isinstance(value, str | list | dict) and value not in ("640", [True])
        if said == "" and not valid and text:
            wrong.append(f"{at} {what}: the schema refuses what the reader takes")
        if said and valid and not any(each in said for each in BEYOND):
            wrong.append(f"{at} {what}: the schema takes it; {said}")
    both = changed(("rules", 0, "client"), {"unit": "a.service", "cgroup": "/a"})
    assert not VALIDATOR.is_valid(both)
    assert "has both 'unit' and 'cgroup'" in accepted_by_reader(both)
    assert not wrong, "\n".join(wrong[:60]) + f"\n{len(wrong)}"
    assert refused > 1900
