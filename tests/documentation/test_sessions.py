"""The commands of documents, as written and in order, do what is said, on a machine that is thrown away."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

import pytest

from tests.documentation.blocks import blocks
from tests.documentation.commands import commands, without_numbers
from tests.documentation.sessions import COMPARED_ELSEWHERE, NOT_RUN, SESSIONS
from tests.documentation.stage import installed, play

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.documentation.commands import Command

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def prefix() -> Iterator[Path]:
    with installed() as made:
        yield made


def files_to_make(page: str) -> str:
    """Return a script that makes the files which a page has its reader make."""
    made = []
    for block in blocks(page):
        if block.mark.startswith("/"):
            name = shlex.quote(block.mark)
            made.append(f"cat > {name} <<'END OF BLOCK'\n{block.text}END OF BLOCK")
            if block.text.startswith("#!"):
                made.append(f"chmod 755 {name}")
    return "\n".join(made)


def to_run(page: str) -> list[Command]:
    """Return what is run of a page."""
    return [
        command
        for block in blocks(page)
        if SESSIONS[page].has(block)
        for command in commands(block)
        if command.text not in NOT_RUN
    ]


def as_its_user(command: Command) -> str:
    """Return what root's shell is given: behind the prompt `$` it is alice who asks."""
    if command.prompt == "$ " and command.text != "echo $?":
        return f"runuser -u alice -- bash -c {shlex.quote(command.text)}"
    return command.text


@pytest.mark.parametrize("page", SESSIONS)
def test_commands_of_a_page_do_what_is_shown(page: str, prefix: Path) -> None:
    listed = to_run(page)
    assert listed
    preparation = "\n".join([SESSIONS[page].preparation, files_to_make(page)])
    for at, (command, ran) in enumerate(
        zip(listed, play(prefix, preparation, [as_its_user(each) for each in listed]), strict=True)
    ):
        printed = [without_numbers(line) for line in ran.output]
        shown = [] if command.text in COMPARED_ELSEWHERE else command.shown
        for line in shown:
            assert without_numbers(line) in printed, (command.place, line, ran)
        told = " ".join(shown)
        asks_for_the_status = at + 1 < len(listed) and listed[at + 1].text == "echo $?"
        refused = any(word in told for word in ("enied", "incomplete", "infected: ", " no more"))
        assert asks_for_the_status or (ran.status != 0) == refused, (command.place, ran)
