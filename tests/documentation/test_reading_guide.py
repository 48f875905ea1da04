"""The guide for reviewers in docs/architecture.md has each file that a broker loads, and none is longer."""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest

from tests.documentation.blocks import ROOT

SOURCES = ROOT / "src" / "fdbroker"
GUIDE = ROOT / "docs" / "architecture.md"
LOADED = ROOT / "tests" / "broker" / "expected_modules.txt"
_ROW = re.compile(r"^\| `([a-z/_]+\.py)` \| (\d+) \| (.+) \|$", re.MULTILINE)
_STEP = 50  # in which lines are said, so that not each change of a file is one of the guide
# Its first file runs as a script, and so is no module.
_SCRIPT = "broker/entry.py"
_IMPORTED = re.compile(r"^from fdbroker\.([a-z_.]+) import (.+)$", re.MULTILINE)
_IMPORTED_LATER = re.compile(r"^ +from fdbroker\.([a-z_.]+) import .*PLC0415", re.MULTILINE)


class Row(NamedTuple):
    """What the guide says of a file."""

    file: str
    most_lines: int
    promise: str


def rows() -> list[Row]:
    return [Row(file, int(lines), promise) for file, lines, promise in _ROW.findall(GUIDE.read_text())]


def loaded() -> set[str]:
    """Return the files of modules that are loaded always; a package's own has nothing in it."""
    names = [line for line in LOADED.read_text().splitlines() if line.startswith("fdbroker.")]
    files = {
        name.removeprefix("fdbroker.").replace(".", "/") + ".py" for name in names if name.count(".") > 1
    }
    return files | {_SCRIPT}


def test_guide_has_each_file_that_a_broker_loads_once() -> None:
    listed = [row.file for row in rows()]
    assert len(set(listed)) == len(listed)
    assert loaded() <= set(listed)


def test_what_is_in_the_guide_beside_that_is_what_some_policy_has_loaded() -> None:
    beside = {row.file for row in rows()} - loaded()
    code = "".join((SOURCES / "broker" / name).read_text() for name in ("main.py", "server.py"))
    begun = {name.replace(".", "/") + ".py" for name in _IMPORTED_LATER.findall(code)}
    needed = set()
    while begun:
        file = begun.pop()
        needed.add(file)
        for package, names in _IMPORTED.findall((SOURCES / file).read_text()):
            modules = [f"{package}.{name}" for name in re.findall(r"\w+", names)] + [package]
            found = {module.replace(".", "/") + ".py" for module in modules}
            begun |= {each for each in found if (SOURCES / each).is_file()} - needed - loaded()
    assert beside == needed - loaded()


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.file)
def test_file_has_no_more_lines_than_the_guide_says_and_not_many_less(row: Row) -> None:
    lines = len((SOURCES / row.file).read_text().splitlines())
    assert row.most_lines % _STEP == 0
    assert row.most_lines - 2 * _STEP < lines <= row.most_lines, (
        f"{row.file} has {lines} lines: read it again, make it shorter, or say so in {GUIDE.name}"
    )
