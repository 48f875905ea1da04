"""docs/policy-tools.md shows what is really printed, and names every kind of finding and key of tables."""

from __future__ import annotations

import re
from pathlib import Path

from fdbroker.config import compile_policy
from fdbroker.config.expectations import Expectation, Object, Table
from fdbroker.config.findings import KINDS, find
from fdbroker.config.places import Places
from fdbroker.config.structures import keys_of
from fdbroker.policy.rules import read_policy
from fdbroker.wire.client import for_broker
from tests.config.fake_lookups import FakeLookups

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "policy-tools.md").read_text()
BLOCKS = re.findall(r"```(yaml|text)\n(.*?)```", TEXT, re.DOTALL)


def test_warnings_are_those_of_the_policy_that_is_shown() -> None:
    (kind, policy), (other, warnings) = BLOCKS[:2]
    assert (kind, other) == ("yaml", "text")
    rules = read_policy(for_broker(compile_policy(policy.encode(), "policy.yaml", FakeLookups())))
    places = Places("policy.yaml")
    places.add(policy.encode(), "policy.yaml")
    assert "".join(f"{finding}\n" for finding in find(rules, places, None)) == warnings


def test_every_kind_is_described_in_its_order() -> None:
    assert re.findall(
        r"^\| `([a-z-]+)`", TEXT.partition("| kind |")[2].partition("\n\n")[0], re.MULTILINE
    ) == list(KINDS)


def test_every_key_of_a_table_is_described() -> None:
    for structure, heading in ((Table, "| key of the table |"), (Expectation, "| key of a test |")):
        table = TEXT.partition(heading)[2].partition("\n\n")[0]
        described = re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| ([^|]+)\|", table, re.MULTILINE)))
        assert described == list(keys_of(structure))
    assert all(f"`{key}`" in TEXT for key in keys_of(Object))


def test_test_that_is_shown_is_one_of_the_examples() -> None:
    example = (ROOT / "config" / "examples" / "expectations" / "malware-scanner.yaml").read_text()
    shown = BLOCKS[2][1].partition("tests:\n")[2]
    assert shown in example
