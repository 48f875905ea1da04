"""docs/scanning.md names what there is, and its example is the one that is tested."""

from __future__ import annotations

import dataclasses
import importlib
import re
from pathlib import Path

import pytest

from fdbroker.scan.engines.libclamav import KINDS
from fdbroker.scan.plugins import BUILT_IN
from fdbroker.scan.verdict import Reason

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "scanning.md").read_text()


@pytest.mark.parametrize("name", BUILT_IN)
def test_each_option_of_each_engine_is_documented(name: str) -> None:
    module, _, kind = BUILT_IN[name].partition(":")
    options = getattr(importlib.import_module(module), kind).options_type
    [section] = re.findall(rf"^### {name}\n(.*?)(?=^##)", TEXT, re.MULTILINE | re.DOTALL)
    missing = [field.name for field in dataclasses.fields(options) if f"`{field.name}" not in section]
    # `accept: [encrypted]` and the like name it too.
    assert [field for field in missing if f"{field}:" not in section] == []


def test_each_reason_is_documented_and_no_other() -> None:
    [section] = re.findall(r"^## Verdicts\n(.*?)(?=^## )", TEXT, re.MULTILINE | re.DOTALL)
    rows = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == set(Reason)


def test_each_kind_that_can_be_accepted_is_documented() -> None:
    [row] = re.findall(r"^\| `accept` \|(.*)$", TEXT, re.MULTILINE)
    assert set(re.findall(r"`([\w-]+)`", row)) == set(KINDS)
