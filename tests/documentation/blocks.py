"""The blocks of the documents: what stands in them as code, as output, or as a drawing."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[2]
_MARK = re.compile(r"<!-- (\S+) -->\n")


class Block(NamedTuple):
    """A fenced or indented block.

    `page`: the document, relative to the checkout. `line`: where it begins. `kind`: what the fence says it
    is; "" for an indented one, or where it says nothing. `mark`: what a comment directly before it says, or
    "": the file of the checkout in which it is, or the absolute path of the file that the reader makes of it.
    """

    page: str
    line: int
    kind: str
    fenced: bool
    text: str
    mark: str

    @property
    def place(self) -> str:
        """Return where it is, as messages have it."""
        return f"{self.page}:{self.line}"


@cache
def pages() -> tuple[str, ...]:
    """Return all documents for users, relative to the checkout."""
    files = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *ROOT.glob("docs/**/*.md")]
    return tuple(sorted(str(file.relative_to(ROOT)) for file in files if "docs/site/" not in str(file)))


@cache
def blocks(page: str) -> tuple[Block, ...]:
    """Return the blocks of a document in their order."""
    found: list[Block] = []
    mark = ""
    for token in MarkdownIt("commonmark").parse((ROOT / page).read_text()):
        if token.type in {"fence", "code_block"}:
            assert token.map is not None
            fenced = token.type == "fence"
            found.append(Block(page, token.map[0] + 1, token.info, fenced, token.content, mark))
        marked = _MARK.fullmatch(token.content) if token.type == "html_block" else None
        mark = marked[1] if marked else ""
    return tuple(found)


def all_blocks() -> list[Block]:
    """Return the blocks of all documents."""
    return [block for page in pages() for block in blocks(page)]
