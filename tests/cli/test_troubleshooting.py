"""docs/troubleshooting.md has every message that a user can meet, and none that no longer exists."""

from __future__ import annotations

import bisect
import functools
import itertools
import re
from pathlib import Path

import pytest

from fdbroker.config.explain import REASONS
from fdbroker.scan.verdict import Reason as ScanReason
from fdbroker.wire.format import Reason
from tests.cli.error_messages import NOT_ERRORS, NOT_ERRORS_ALONE, SOURCES, literals, messages

PAGE = (Path(__file__).parents[2] / "docs" / "troubleshooting.md").read_text()
CODES = {
    *(reason.name.lower() for reason in Reason if reason),  # what clients are told
    *(reason.value for reason in ScanReason),
    *REASONS,  # what the audit has
}
# So few letters and digits would be found anywhere.
_FEWEST_LETTERS = 8
_MOST_FOUND = 8  # messages by one text


def quoted() -> set[str]:
    """Return what stands in the first columns of the tables: messages, or parts of them, and reasons."""
    rows = re.findall(r"^\| (.*?) \| ", PAGE, re.MULTILINE)
    return {" ".join(text.split()) for row in rows for text in re.findall(r"`([^`]+)`", row)}


def pattern(text: str) -> re.Pattern[str]:
    """Return what a text with `…` for what is different each time is found by."""
    parts = [re.escape(part.strip()) for part in text.split("…") if part.strip()]
    return re.compile(".*?".join(parts))


PATTERNS = {text: pattern(text) for text in quoted() - CODES}


@functools.cache
def matched() -> dict[str, set[int]]:
    """Return for each pattern which messages it is found in. Together they are searched much faster."""
    texts = [message.text for message in messages()]
    begins = [0, *itertools.accumulate(len(text) + 1 for text in texts)]
    together = "\n".join(texts)
    return {
        quoted: {bisect.bisect(begins, match.start()) - 1 for match in found.finditer(together)}
        for quoted, found in PATTERNS.items()
    }


def test_each_message_is_on_the_page() -> None:
    said = messages()
    known = set().union(*matched().values())
    missing = [message for number, message in enumerate(said) if number not in known]
    assert not missing, "docs/troubleshooting.md lacks:\n" + "\n".join(
        f"{message.place}: {message.text}" for message in missing
    )


def test_each_reason_is_on_the_page() -> None:
    assert not CODES - quoted()


def test_no_message_is_on_the_page_that_no_longer_exists() -> None:
    # A part of one may stand there, and be one of several literals that are put together.
    said = "\n".join(literals())
    gone = [text for text, found in PATTERNS.items() if not found.search(said)]
    assert not gone


def test_what_is_on_the_page_is_long_enough_to_be_found() -> None:
    short = [text for text in PATTERNS if len(re.findall(r"\w", text)) < _FEWEST_LETTERS]
    assert not short


def test_nothing_on_the_page_is_so_general_that_any_message_is_found_by_it() -> None:
    assert not [text for text, numbers in matched().items() if len(numbers) > _MOST_FOUND]


def test_each_row_says_what_to_do_or_why() -> None:
    for line in PAGE.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| `"):
            assert any(cells[1:]), line


@pytest.mark.parametrize("kind", ["files", "texts"])
def test_what_is_no_message_still_exists(kind: str) -> None:
    if kind == "files":
        assert not [name for name in NOT_ERRORS if not (SOURCES / name).exists()]
    else:
        assert not NOT_ERRORS_ALONE - literals()


def test_links_within_the_page_lead_somewhere() -> None:
    headings = {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", PAGE, re.MULTILINE)
    }
    assert not set(re.findall(r"\]\(#([^)]*)\)", PAGE)) - headings
