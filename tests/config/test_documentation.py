"""docs/policy.md shows what is really printed, and its tables say what really matches."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fdbroker.config import ConfigError, compile_policy
from fdbroker.config.schema import (
    Admins,
    Audit,
    Client,
    Limits,
    Listener,
    Listeners,
    Policy,
    Root,
    Rule,
    RuleLimits,
    ServiceListener,
    Where,
)
from fdbroker.config.structures import keys_of
from fdbroker.policy.globs import compile_glob
from tests.config.fake_lookups import FakeLookups

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "policy.md").read_text()
BLOCKS = re.findall(r"```(yaml|text)\n(.*?)```", TEXT, re.DOTALL)


def test_the_first_example_compiles() -> None:
    assert BLOCKS[0][0] == "yaml"
    assert len(compile_policy(BLOCKS[0][1].encode(), "policy.yaml", FakeLookups())["rules"]) == 2


def test_the_example_of_a_service_that_acts_for_others_compiles() -> None:
    rules = compile_policy(BLOCKS[1][1].encode(), "policy.yaml", FakeLookups())["rules"]
    assert [rule["on_behalf_of"] for rule in rules] == [[{"gids": [100]}], [{"any": True}]]


def test_the_example_of_links_compiles() -> None:
    rules = compile_policy(BLOCKS[2][1].encode(), "policy.yaml", FakeLookups())["rules"]
    assert [rule["symlinks"] for rule in rules] == ["within-root", "refuse"]


@pytest.mark.parametrize("number", [3, 5])
def test_the_examples_of_errors_are_what_is_printed(number: int) -> None:
    assert [kind for kind, _ in BLOCKS] == ["yaml", "yaml", "yaml", "yaml", "text", "yaml", "text"]
    with pytest.raises(ConfigError) as caught:
        compile_policy(BLOCKS[number][1].encode(), "policy.yaml", FakeLookups())
    assert BLOCKS[number + 1][1] == f"{caught.value}\n"


@pytest.mark.parametrize(
    "structure",
    [
        Admins,
        Audit,
        Client,
        Limits,
        Listener,
        Listeners,
        Policy,
        Root,
        Rule,
        RuleLimits,
        ServiceListener,
        Where,
    ],
)
def test_every_key_is_described(structure: type) -> None:
    described = set(re.findall(r"`(\w+)`", TEXT))
    assert set(keys_of(structure)) <= described


def rows() -> list[tuple[str, str, bool]]:
    table = TEXT.split("| glob | matches | does not match |\n|---|---|---|\n")[1].split("\n\n")[0]
    found = []
    for line in table.splitlines():
        glob, yes, no = (cell.strip() for cell in line.strip("|").split("|"))
        if "error" not in yes:
            found += [(glob.strip("`"), path, True) for path in re.findall("`(.*?)`", yes)]
            found += [(glob.strip("`"), path, False) for path in re.findall("`(.*?)`", no)]
    return found


@pytest.mark.parametrize(("glob", "path", "matches"), rows())
def test_the_table_of_globs_is_true(glob: str, path: str, matches: bool) -> None:  # noqa: FBT001
    assert compile_glob(glob.encode()).matches(path.encode().split(b"/")) is matches


def test_everything_includes_the_root_itself() -> None:
    assert compile_glob(b"**").matches(())
    assert not compile_glob(b"*").matches(())
