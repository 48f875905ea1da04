"""One list of keys: the structures, the JSON Schema, the compiler and the broker agree."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import jsonschema
import pytest
import yaml

from fdbroker.config import compile_policy, dumps, json_schema
from fdbroker.config.schema import (
    NAME_PATTERN,
    Action,
    Admins,
    Audit,
    Client,
    CountRange,
    Delivery,
    Limits,
    Listener,
    Listeners,
    ModeCondition,
    Opens,
    Policy,
    Root,
    Rule,
    ServiceListener,
    SizeRange,
    Where,
)
from fdbroker.config.structures import keys_of
from fdbroker.policy.rules import ACTIONS, DELIVERIES, OPENS, read_policy
from fdbroker.wire.client import for_broker
from tests.config.fake_lookups import FakeLookups

CONFIG = Path(__file__).resolve().parents[2] / "config"
FILES = [CONFIG / "policy.yaml", *sorted((CONFIG / "examples").glob("*.yaml"))]
STRUCTURES = [
    Admins,
    Audit,
    Client,
    CountRange,
    Limits,
    Listener,
    Listeners,
    ModeCondition,
    Policy,
    Root,
    Rule,
    ServiceListener,
    SizeRange,
    Where,
]


def test_there_are_the_default_policy_and_an_example_for_each_recipe() -> None:
    assert [file.name for file in FILES] == [
        "policy.yaml",
        "backup-agent.yaml",
        "indexer.yaml",
        "log-shipper.yaml",
        "malware-scanner.yaml",
        "tls-keys.yaml",
    ]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_what_is_installed_compiles_and_the_broker_reads_it(file: Path) -> None:
    compiled = compile_policy(file.read_bytes(), file.name, FakeLookups())
    assert json.loads(dumps(compiled)) == compiled
    assert len(read_policy(for_broker(compiled)).rules) == len(compiled["rules"])


def test_the_installed_policy_allows_nothing() -> None:
    assert compile_policy((CONFIG / "policy.yaml").read_bytes(), "p", FakeLookups())["rules"] == []


def test_the_commented_parts_of_the_installed_policy_compile_when_they_are_taken_in() -> None:
    text = (CONFIG / "policy.yaml").read_text()
    # Of a service, whose user need not be there.
    text = re.sub(r"^#   clamd: {.*service: {user: fdbroker-scand}}\n", "", text, flags=re.MULTILINE)
    text = re.sub(r"^#  (  |- )", r"  \1", text, flags=re.MULTILINE).replace("rules: []", "")
    text = text.replace("# Any matching deny", "rules:\n# Any matching deny")
    text = re.sub(r"^# (limits|audit|read_only_view|user|listeners|  \w+):", r"\1:", text, flags=re.MULTILINE)
    compiled = compile_policy(text.encode(), "p", FakeLookups())
    assert [rule["name"] for rule in compiled["rules"]] == ["shipper-reads-web-logs"]
    default = compile_policy((CONFIG / "policy.yaml").read_bytes(), "p", FakeLookups())
    for key in ("limits", "audit", "read_only_view", "daemon"):
        assert compiled[key] == default[key]
    assert re.search(r"^listeners:.*\n  seqpacket: {", text, re.MULTILINE)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_an_editor_that_checks_by_the_schema_accepts_what_is_installed(file: Path) -> None:
    jsonschema.validate(yaml.safe_load(file.read_text()), json_schema())


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"version": 2, "roots": {"a": {"path": "/"}}, "rules": []},
        {"version": 1, "roots": {}, "rules": []},
        {"version": 1, "roots": {"A": {"path": "/"}}, "rules": []},
        {"version": 1, "roots": {"a": {"path": "x"}}, "rules": []},
        {"version": 1, "roots": {"a": {"path": "/"}}, "rules": [{}]},
        {"version": 1, "roots": {"a": {"path": "/"}}, "rules": [], "x": 1},
    ],
)
def test_an_editor_that_checks_by_the_schema_refuses_mistakes(document: object) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, json_schema())


def test_the_json_schema_is_json_and_describes_every_key() -> None:
    schema = json.loads(json.dumps(json_schema()))
    assert schema["$schema"].startswith("https://json-schema.org/")
    for structure in STRUCTURES:
        described = schema["$defs"][structure.__name__]
        assert list(described["properties"]) == list(keys_of(structure))
        other = {"$ref": "#/$defs/ServiceListener"} if structure is Listeners else False
        assert described["additionalProperties"] == other
        assert set(described.get("required", [])) == {
            key for key, needed in keys_of(structure).items() if needed
        }


def test_the_json_schema_demands_either_allow_with_a_client_or_deny() -> None:
    rules: dict[str, Any] = json_schema()["$defs"]["Policy"]["properties"]["rules"]
    assert [sorted(branch["required"]) for branch in rules["items"]["oneOf"]] == [
        ["allow", "client"],
        ["deny"],
    ]


def test_the_words_to_choose_from_are_those_of_the_broker() -> None:
    assert get_args(Action) == ACTIONS
    assert get_args(Delivery) == DELIVERIES
    assert get_args(Opens) == OPENS


def test_a_name_with_a_line_break_is_no_name() -> None:
    assert re.compile(NAME_PATTERN).fullmatch("a\n") is None
