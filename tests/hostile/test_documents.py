"""SECURITY.md and the threat model name tests that pytest collects, for each promise and each attack."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
SECURITY = ROOT / "SECURITY.md"
THREAT_MODEL = ROOT / "docs" / "threat-model.md"
PROMISES = 15
_TEST = re.compile(r"`(tests/[\w/]+\.py::test_\w+)`")
_ATTACK = re.compile(r"^\| ([A-Z])(\d+) \| (.+?) \| (.+) \| (.+?) \|$", re.MULTILINE)
_PROMISE = re.compile(r"^\| (\d*) ?\| (.+) \| (today|planned) \| (.+?) \|$", re.MULTILINE)
APART = "Does not apply"


def named(document: Path) -> list[str]:
    """Return the tests that a document names."""
    return _TEST.findall(document.read_text())


def functions(file: Path) -> list[str]:
    """Return the functions of a source file."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    return [part.name for part in ast.parse(file.read_text()).body if isinstance(part, kinds)]


@pytest.fixture(scope="module")
def collected() -> set[str]:
    """Return what pytest collects of the files that are named, without parameters.

    In short, what it would collect by its rules: functions of these names. To import all files takes long.
    """
    files = sorted({test.partition("::")[0] for test in (*named(SECURITY), *named(THREAT_MODEL))})
    if not os.environ.get("FDBROKER_HOSTILE"):
        return {f"{file}::{name}" for file in files for name in functions(ROOT / file)}
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:xdist", *files],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return {line.partition("[")[0] for line in found.stdout.splitlines() if "::" in line}


@pytest.mark.parametrize("document", [SECURITY, THREAT_MODEL], ids=lambda path: path.name)
def test_each_test_that_is_named_is_there(collected: set[str], document: Path) -> None:
    tests = named(document)
    assert tests
    assert set(tests) <= collected
    # None is written so that it would not be looked for.
    assert document.read_text().count("::test_") == len(tests)


def test_each_promise_of_today_has_tests() -> None:
    promises = _PROMISE.findall(SECURITY.read_text())
    assert [int(number) for number, *_ in promises if number] == list(range(1, PROMISES + 1))
    for _, promise, when, tests in promises:
        assert bool(_TEST.findall(tests)) is (when == "today"), promise


def test_each_attack_has_a_defence_and_tests_or_does_not_apply() -> None:
    attacks = _ATTACK.findall(THREAT_MODEL.read_text())
    rows = [line for line in THREAT_MODEL.read_text().splitlines() if re.match(r"\| [A-Z]\d", line)]
    assert len(attacks) == len(rows) > 70
    for letter in {letter for letter, *_ in attacks}:
        numbers = [int(number) for other, number, *_ in attacks if other == letter]
        assert numbers == list(range(1, len(numbers) + 1))
    for _, _, attack, defence, tests in attacks:
        assert _TEST.findall(tests) or defence.startswith(APART), attack


def test_the_readme_leads_to_both() -> None:
    readme = (ROOT / "README.md").read_text()
    assert "(SECURITY.md)" in readme
    assert "(docs/threat-model.md)" in readme
