"""Manual pages in man(7), from Markdown or piece by piece."""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING

from markdown_it import MarkdownIt

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from markdown_it.token import Token

# Columns of a terminal, less the margins of a page: what is wider is not set as a table, nor as one line.
_WIDTH = 66
_BETWEEN_COLUMNS = 3
# Of what is longer, slashes are places where a line may end.
_LONG_WORD = 30
_MARKDOWN = MarkdownIt("commonmark").enable("table")
_SPECIAL = {
    "\\": r"\e",
    "-": r"\-",
    "'": r"\(aq",
    "`": r"\(ga",
    "^": r"\(ha",
    "~": r"\(ti",
    '"': r"\(dq",
}


def plain(text: str) -> str:
    """Return text as it stands in a page, whatever is in it."""
    escaped = "".join(_SPECIAL.get(each, each) for each in text)
    escaped = "".join(each if ord(each) < 127 else rf"\[u{ord(each):04X}]" for each in escaped)  # noqa: PLR2004 - ASCII
    return re.sub(
        r"[^ ]{%d,}" % _LONG_WORD,  # noqa: UP031 - braces are the expression's
        lambda word: re.sub(r"(?<=[^/\\])/(?=[^/])", r"/\:", word[0]),
        escaped,
    )


def literal(text: str) -> str:
    """Return what is typed as it is: bold."""
    return rf"\fB{plain(text)}\fR"


def variable(text: str) -> str:
    """Return what something else is to be put for: italic."""
    return rf"\fI{plain(text)}\fR"


def page_name(page: str) -> str:
    """Return the name of a page, as `fdbroker(1)`, as it is referred to."""
    name, _, section = page.partition("(")
    return rf"{literal(name)}({section}"


def _shown(markup: str) -> str:
    """Return about what a reader sees of it; only its length matters."""
    return re.sub(r"\\(f.|\(..|\[.*?\]|[e&:~-])", lambda found: "" if found[1][0] in "f&:" else "x", markup)


class Page:
    """A page that is being written. `source`: the program and its version."""

    def __init__(self, name: str, section: int, date: str, source: str, manual: str) -> None:
        heading = " ".join(f'"{plain(each)}"' for each in (name.upper(), str(section)))
        heading += f' {date} "{plain(source)}" "{plain(manual)}"'
        # Words are neither divided nor spread: what is copied out of a page is what was written.
        self._lines = [f".TH {heading}", ".nr HY 0", ".nh", ".ad l"]
        self._has_tables = False

    def text(self) -> str:
        """Return the whole page."""
        preprocessor = ["'\\\" t"] if self._has_tables else []
        return "\n".join([*preprocessor, *self._lines, ""])

    def section(self, title: str) -> None:
        """Begin a section."""
        self._lines.append(f'.SH "{plain(_capitals(title))}"')

    def subsection(self, title: str) -> None:
        """Begin a part of a section."""
        self._lines.append(f'.SS "{plain(title)}"')

    def paragraph(self, markup: str) -> None:
        """Write a paragraph."""
        self._begin_paragraph()
        self.fill(markup)

    def tagged(self, tag: str, *lines: str) -> None:
        """Write a paragraph that is about `tag`."""
        self._lines += [".TP", _protected(tag)]
        for number, markup in enumerate(lines):
            if number:
                self._lines.append(".br")
            self.fill(markup)

    def name(self, name: str, what: str) -> None:
        """Write the section by which pages are found."""
        self.section("Name")
        self._lines.append(rf"{plain(name)} \- {plain(what)}")

    def example(self, text: str) -> None:
        """Write lines as they are."""
        lines = [_protected(plain(line)) for line in text.rstrip("\n").split("\n")]
        self._begin_paragraph()
        self._lines += [".RS 4", ".EX", *lines, ".EE", ".RE"]

    def items(self, items: Iterable[tuple[str, Sequence[Callable[[], None]]]]) -> None:
        """Write a list: of each item its mark and what writes its parts."""
        for mark, parts in items:
            for number, part in enumerate(parts):
                self._lines.append(f'.IP "{mark if not number else ""}" 4')
                part()

    def nested(self, write: Callable[[], None]) -> None:
        """Write something within an item of a list."""
        self._lines.append(".RS 4")
        write()
        self._lines.append(".RE")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Write a table: as one where it fits, else a tagged paragraph for each row."""
        widths = [max(len(_shown(row[column])) for row in (header, *rows)) for column in range(len(header))]
        before_last = sum(widths[:-1]) + _BETWEEN_COLUMNS * (len(widths) - 1)
        if before_last + widths[-1] <= _WIDTH:
            self._table("l" * len(widths), header, rows)
            return
        if len(widths) > 2 and before_last <= _WIDTH // 2:  # noqa: PLR2004 - of two columns paragraphs read better
            last = f"lw({_WIDTH - before_last}n)"
            blocks = [(*cells, f"T{{\n{_protected(text)}\nT}}" if text else "") for *cells, text in rows]
            self._table("l" * (len(widths) - 1) + last, header, blocks)
            return
        for first, *others in rows:
            told = [
                (title, cell) for title, cell in zip(header[1:], others, strict=True) if cell not in {"", " "}
            ]
            headed = [f"{title}: {cell}" for title, cell in told if title]
            if len(_shown("; ".join(headed))) <= _WIDTH:
                headed = ["; ".join(headed)] if headed else []
            self.tagged(first, *headed, *[cell for title, cell in told if not title])

    def _table(self, columns: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        self._has_tables = True
        self._begin_paragraph()
        titles = [rf"\fI{title}\fR" if title else "" for title in header]
        lines = [_protected("\t".join(cells)) for cells in (titles, *rows)]
        self._lines += [".TS", f"{' '.join(re.findall('l(?:w.*)?', columns))}.", *lines, ".TE"]

    def _begin_paragraph(self) -> None:
        if not self._lines[-1].startswith((".SH", ".SS")):
            self._lines.append(".PP")

    def fill(self, markup: str) -> None:
        """Write text whose lines roff makes anew: sentences and some words a line, as it wants them."""
        for sentence in re.split(r"(?<=[.?!]) (?=[A-Z])", re.sub(r"\s+", " ", markup).strip()):
            line = ""
            for word in sentence.split(" "):
                if line and len(line) + len(word) >= _WIDTH + 10:
                    self._lines.append(_protected(line))
                    line = word
                else:
                    line = f"{line} {word}" if line else word
            self._lines.append(_protected(line))


def _protected(line: str) -> str:
    """Return a line that is none of roff's own, whatever it begins with."""
    return rf"\&{line}" if line.startswith((".", "'")) else line


def _capitals(title: str) -> str:
    """Return a title in capitals, but for numbers and names with digits."""
    return re.sub(
        r"[^ ]+",
        lambda word: word[0] if any(map(str.isdigit, word[0])) else word[0].upper(),
        title,
    )


class MarkdownError(Exception):
    """A document has something that can't be put into a page."""


class Converter:
    """Puts Markdown into pages. `refer` gives the words for a link, of its text and its target."""

    def __init__(self, refer: Callable[[str, str], str]) -> None:
        self._refer = refer

    def write(self, page: Page, tokens: Sequence[Token]) -> None:
        """Write what was parsed by `parse`.

        Raises:
            MarkdownError: there is something in it of which nothing can be made.

        """
        for element in elements(tokens):
            token, inside = element[0], element[1:-1]
            if token.type == "heading_open":
                title = "".join(each.content for each in inside[0].children or ())
                (page.section if token.tag == "h2" else page.subsection)(title)
            elif token.type == "paragraph_open":
                page.paragraph(self._inline(inside[0]))
            elif token.type in {"fence", "code_block"}:
                page.example(token.content)
            elif token.type in {"bullet_list_open", "ordered_list_open"}:
                page.items(self._items(page, inside, numbered=token.type.startswith("ordered")))
            elif token.type == "table_open":
                header, *rows = self._rows(inside)
                page.table(header, rows)
            elif token.type != "html_block":  # a comment, for the tests of documents
                raise MarkdownError(f"line {(token.map or [0])[0] + 1}: {token.type} has no place in a page")

    def _items(
        self, page: Page, tokens: Sequence[Token], *, numbered: bool
    ) -> Iterator[tuple[str, list[Callable[[], None]]]]:
        for number, item in enumerate(elements(tokens), 1):
            yield f"{number}." if numbered else r"\(bu", list(self._parts(page, item[1:-1]))

    def _parts(self, page: Page, tokens: Sequence[Token]) -> Iterator[Callable[[], None]]:
        """Yield what writes the paragraphs of an item, each with what is nested below it."""
        parts: list[tuple[Token, list[Token]]] = []
        for element in elements(tokens):
            if element[0].type == "paragraph_open":
                parts.append((element[1], []))
            elif parts:
                parts[-1][1].extend(element)
            else:
                raise MarkdownError(f"an item that begins with {element[0].type} has no place in a page")
        for first, nested in parts:
            yield functools.partial(self._part, page, first, nested)

    def _part(self, page: Page, first: Token, nested: Sequence[Token]) -> None:
        page.fill(self._inline(first))
        if nested:
            page.nested(lambda: self.write(page, nested))

    def _rows(self, tokens: Sequence[Token]) -> list[list[str]]:
        rows: list[list[str]] = []
        for number, token in enumerate(tokens):
            if token.type == "tr_open":
                rows.append([])
            elif token.type in {"td_open", "th_open"}:
                rows[-1].append(self._inline(tokens[number + 1]))
        return rows

    def _inline(self, token: Token) -> str:
        """Return the markup of a line or a paragraph."""
        children = list(token.children or ())
        markup = ""
        position = 0
        while position < len(children):
            each = children[position]
            if each.type == "text":
                markup += plain(each.content)
            elif each.type in {"softbreak", "hardbreak"}:
                markup += " "
            elif each.type == "code_inline":
                markup += literal(each.content)
            elif each.type == "link_open":
                end = next(n for n in range(position, len(children)) if children[n].type == "link_close")
                inside = type(token)("inline", "", 0)
                inside.children = children[position + 1 : end]
                markup += self._refer(self._inline(inside), str(each.attrs["href"]))
                position = end
            elif each.type in {"strong_open", "em_open"}:
                markup += r"\fB" if each.type == "strong_open" else r"\fI"
            elif each.type in {"strong_close", "em_close"}:
                markup += r"\fR"
            else:
                raise MarkdownError(f"{each.content!r}: {each.type} has no place in a page")
            position += 1
        return markup


def parse(text: str) -> list[Token]:
    """Return the parts of a document."""
    return _MARKDOWN.parse(text)


def elements(tokens: Sequence[Token]) -> Iterator[list[Token]]:
    """Yield each paragraph, list, table, heading and so on of a document, whole."""
    element: list[Token] = []
    depth = 0
    for token in tokens:
        element.append(token)
        depth += token.nesting
        if depth == 0:
            yield element
            element = []


def sections(tokens: Sequence[Token], level: str = "h2") -> list[tuple[str, list[Token]]]:
    """Return title and contents of the sections of a level; first what comes before, without a title."""
    found: list[tuple[str, list[Token]]] = [("", [])]
    for element in elements(tokens):
        if element[0].type == "heading_open" and element[0].tag == level:
            found.append((element[1].content, []))
        elif element[0].type == "heading_open" and element[0].tag < level:
            continue  # the title of the document
        else:
            found[-1][1].extend(element)
    return found
