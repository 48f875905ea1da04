"""The commands in the documents' blocks, with what is shown of their output."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from tests.documentation.blocks import Block

_COMMENT = re.compile(r" {2,}# .*")
_DOCUMENT = re.compile(r"<<'(\w+)'$")


class Command(NamedTuple):
    """A command, with the document that goes to it; the prompt before it; the lines shown as its output."""

    place: str
    prompt: str
    text: str
    shown: list[str]


def commands(block: Block) -> list[Command]:
    """Return the commands of a block; without prompts each line is one, and nothing is output."""
    prompts = ("# ", "$ ") if block.kind == "console" else ("",)
    found: list[Command] = []
    lines = iter(enumerate(block.text.splitlines(), block.line + block.fenced))
    for number, line in lines:
        prompt = next((prompt for prompt in prompts if line.startswith(prompt)), None)
        if prompt is None:
            found[-1].shown.append(line)
            continue
        text = _COMMENT.sub("", line.removeprefix(prompt))
        while text.endswith("\\"):
            text += f"\n{next(lines)[1]}"
        if document := _DOCUMENT.search(text):
            for _, part in lines:
                text += f"\n{part}"
                if part == document[1]:
                    break
        found.append(Command(f"{block.page}:{number}", prompt, text, []))
    return found


def without_numbers(text: str) -> str:
    """Return a line with its times, ids, sizes, versions and widths of columns made equal."""
    text = re.sub(r"\b[A-Z][a-z]{2} +\d{1,2} \d\d:\d\d\b", "DATE", text)  # of ls
    return re.sub(r" +", " ", re.sub(r"\d+", "0", text)).rstrip()
