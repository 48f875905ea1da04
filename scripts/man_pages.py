"""Write all manual pages: `python3 -m scripts.man_pages DIRECTORY`, in the top directory of the sources.

What a program takes and how it ends comes from its --help; what else there is to say of it, and the formats
of files, from docs/. So the pages can't say anything else than these. It needs fdbroker with its extras
`daemon` and `cli`, which brings markdown-it, and no network. The date is that of SOURCE_DATE_EPOCH, if set.
"""

from __future__ import annotations

import os
import re
import sys
import time
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import fdbroker
from scripts.programs import Command, programs, write_files
from scripts.roff import Converter, Page, elements, literal, page_name, parse, plain, sections, variable

if TYPE_CHECKING:
    from markdown_it.token import Token

DOCS = Path(__file__).resolve().parent.parent / "docs"
# Tables of documents, by their first column, that say again what programs say of themselves.
_SAID_BY_PROGRAMS = frozenset({"option", "exit status"})


class Document(NamedTuple):
    """A page that is a document, or sections of it, by their titles; all if none is named."""

    page: str
    what: str
    file: str
    sections: tuple[str, ...] = ()


class OfCommand(NamedTuple):
    """A page about a program or a command, by the words for it; with further sections of a document."""

    page: str
    words: str
    file: str
    sections: tuple[str, ...] = ()


COMMANDS = (
    OfCommand("fdbroker(1)", "fdbroker", "cli.md", ("What holds for every command",)),
    OfCommand(
        "fdbroker-scan(1)", "fdbroker scan", "scanning.md", ("Verdicts", "Lists", "JSON", "The worker")
    ),
    OfCommand("fdbroker-cat(1)", "fdbroker cat", "cli.md"),
    OfCommand("fdbroker-ls(1)", "fdbroker ls", "cli.md"),
    OfCommand("fdbroker-walk(1)", "fdbroker walk", "cli.md"),
    OfCommand("fdbroker-exec(1)", "fdbroker exec", "cli.md"),
    OfCommand("fdbroker-policy(1)", "fdbroker policy", "policy-tools.md", ("In CI",)),
    OfCommand("fdbroker-reload(1)", "fdbroker reload", "cli.md"),
    OfCommand("fdbroker-status(1)", "fdbroker status", "cli.md"),
    OfCommand("fdbroker-top(1)", "fdbroker top", "cli.md"),
    OfCommand("fdbroker-audit(1)", "fdbroker audit", "cli.md"),
    OfCommand("fdbroker-doctor(1)", "fdbroker doctor", "cli.md"),
    OfCommand("fdbroker-sandbox(1)", "fdbroker sandbox", "cli.md"),
    OfCommand(
        "fdbrokerd(8)",
        "fdbrokerd",
        "fdbrokerd.md",
        (
            "By hand",
            "In the background",
            "By systemd",
            "For one connection",
            "What it is in the end",
            "What it needs",
        ),
    ),
    OfCommand("fdbroker-scand(8)", "fdbroker-scand", "scand.md", ("Between users",)),
)
# Where a document says more of a command than its --help. Of other commands the help is all.
_DESCRIPTIONS = {
    "fdbroker scan": ("scanning.md", ""),
    "fdbroker audit": ("cli.md", "audit"),
    **{
        f"fdbroker {name}": ("cli.md", name.partition(" ")[0])
        for name in ("cat", "ls", "walk", "exec", "reload", "status", "top", "doctor")
    },
    **{f"fdbroker audit {name}": ("cli.md", "audit") for name in ("read", "verify", "reopen", "schema")},
    **{f"fdbroker policy {name}": ("policy-tools.md", name) for name in ("check", "diff", "schema")},
    "fdbroker policy compile": ("cli.md", "policy"),
    "fdbroker policy explain": ("cli.md", "policy"),
    "fdbroker sandbox report": ("cli.md", "sandbox"),
    "fdbrokerd": ("fdbrokerd.md", ""),
    "fdbroker-scand": ("scand.md", ""),
}
DOCUMENTS = (
    Document("fdbroker-policy.yaml(5)", "the policy: who may read which files", "policy.md"),
    Document("fdbroker-policy.json(5)", "the compiled policy, which the broker reads", "compiled-policy.md"),
    Document("fdbroker-audit(5)", "the record of every decision of the broker", "audit.md"),
    Document(
        "fdbroker-expectations(5)", "tables of what is expected of a policy", "policy-tools.md", ("test",)
    ),
    Document(
        "fdbroker-scand.yaml(5)",
        "what the scan service is to do",
        "scand.md",
        ("scand.yaml", "For clients of ClamAV"),
    ),
    Document("fdbroker-protocol(7)", "what the broker and its clients say to each other", "protocol.md"),
    Document("fdbroker-scan-protocol(7)", "how programs ask the scan service", "scan-protocol.md"),
    Document("fdbroker-clamd(7)", "clamd's protocol, as the scan service answers it", "clamd.md"),
    Document("fdbroker-engines(7)", "what scans files", "scanning.md", ("Engines", "An engine of your own")),
    Document("fdbroker-sandbox(7)", "what confines the processes that read hostile files", "sandbox.md"),
    Document("fdbroker-without-systemd(7)", "how s6, runit and others keep it alive", "without-systemd.md"),
    Document("fdbroker-troubleshooting(7)", "what messages mean, and what to do", "troubleshooting.md"),
    Document("fdbroker-metrics(7)", "what the broker counts, and how it is asked", "metrics.md"),
)
# Where the page of a link is not that of its document, or the document is more than one page.
_TARGETS = {
    "policy-tools.md": "fdbroker-policy(1)",
    "policy-tools.md#test": "fdbroker-expectations(5)",
    "scand.md": "fdbroker-scand(8)",
    "scand.md#scandyaml": "fdbroker-scand.yaml(5)",
    "scand.md#for-clients-of-clamav": "fdbroker-scand.yaml(5)",
    "scanning.md": "fdbroker-scan(1)",
    "scanning.md#engines": "fdbroker-engines(7)",
    "scanning.md#an-engine-of-your-own": "fdbroker-engines(7)",
    "cli.md": "fdbroker(1)",
    **{f"cli.md#{each.words.partition(' ')[2]}": each.page for each in COMMANDS if " " in each.words},
    **{each.file: each.page for each in DOCUMENTS if not each.sections},
    "fdbrokerd.md": "fdbrokerd(8)",
}
_FILES = {
    "/etc/fdbroker/policy.yaml": "the policy",
    "/etc/fdbroker/policy.d/*.yaml": "its parts",
    "/etc/fdbroker/scand.yaml": "what the scan service is to do",
    "/run/fdbroker/broker.seqpacket": "the broker's socket",
    "/run/fdbroker/control": "its control socket",
    "/var/log/fdbroker/audit.jsonl": "the audit, by custom",
}
# Of which pages of programs these files are.
_FILES_OF = {
    "fdbroker(1)": tuple(_FILES),
    "fdbrokerd(8)": tuple(name for name in _FILES if "scand" not in name),
    "fdbroker-scand(8)": ("/etc/fdbroker/scand.yaml",),
}


class References:
    """The words for links of one page; keeps which pages were named."""

    def __init__(self, page: str, file: str) -> None:
        self._page, self._file = page, file
        self.named: set[str] = set()

    def of_link(self, text: str, target: str) -> str:
        """Return what stands in a page for a link."""
        if "://" in target:
            return f"{text} ({plain(target)})"
        file, hash_, anchor = target.partition("#")
        whole = f"{file or self._file}{hash_}{anchor}"
        page = self._page_of(whole)
        if page == self._page or (page is None and not file):
            return text
        shown = literal(f"docs/{os.path.normpath(file)}") if page is None else self._name(page)
        if text in {plain(file), literal(file), plain(whole), ""}:
            return shown
        return f"{text} ({shown})"

    def of_text(self, text: str, command: Command) -> str:
        """Return text of a command's help, with the pages of the documents that it names."""
        markup = plain(text)
        markup = re.sub(
            r"(?<![\w\\/-])(\\-(?:\\-)?[a-z0-9][a-z0-9]*(?:\\-[a-z0-9]+)*)", r"\\fB\1\\fR", markup
        )
        return re.sub(
            r"(see )?docs/([a-z\\-]+\.md)", lambda found: self._of_document(found, command.words[-1]), markup
        )

    def _of_document(self, found: re.Match[str], section: str) -> str:
        see = found[1] or ""
        file = found[2].replace("\\", "")
        page = self._page_of(f"{file}#{section}")
        if page is None:
            return found[0]
        if page == self._page or (see and page == "fdbroker(1)"):  # what docs/cli.md says of it is here
            return f"{see}this page"
        return f"{see}{self._name(page)}"

    def _page_of(self, target: str) -> str | None:
        return _TARGETS.get(target) or _TARGETS.get(target.partition("#")[0])

    def _name(self, page: str) -> str:
        self.named.add(page)
        return page_name(page)


class Writer:
    """Writes one page."""

    def __init__(self, page: str, file: str, what: str, date: str) -> None:
        name, _, section = page.rstrip(")").partition("(")
        manual = {
            "1": "User commands",
            "5": "File formats",
            "7": "Miscellaneous",
            "8": "System administration",
        }
        source = f"fdbroker {fdbroker.__version__}"
        self._own = page
        self.page = Page(name, int(section), date, source, manual[section])
        self.references = References(page, file)
        self._converter = Converter(self.references.of_link)
        self.page.name(name, what)

    def document(self, file: str, wanted: tuple[str, ...]) -> None:
        """Write sections of a document; if none is named all, of which the first is its beginning."""
        found = _sections_of(file)
        for title in wanted or found:
            tokens = _section(found, file, title)
            if tokens:
                self.page.section("Description" if title == "" or len(found) == 1 else title)
                self._converter.write(self.page, tokens)

    def description(self, command: Command) -> None:
        """Write what a command does: from the document that says more than its help, if there is one."""
        file, title = _DESCRIPTIONS.get(" ".join(command.words), ("", ""))
        if not file:
            self.help_text(command)
            return
        parts = dict(sections(_section(_sections_of(file), file, title), "h3"))
        tokens = parts.get(" ".join(command.words[1:])) or parts[""]
        self._converter.write(self.page, _without_what_help_says(tokens, command))

    def help_text(self, command: Command) -> None:
        """Write the paragraphs of a command's help."""
        for text in command.texts:
            if text.startswith("\b\n"):
                self.page.example(text.removeprefix("\b\n"))
            else:
                self.page.paragraph(self.references.of_text(text, command))

    def usage(self, command: Command) -> None:
        """Write how a command is called."""
        words = re.sub(r"[A-Z][A-Z=]+", lambda word: rf"\fI{word[0]}\fR", plain(command.usage))
        words = re.sub(r"(?<![\w-])\\-(\\-)?[a-z\\-]+", lambda word: rf"\fB{word[0]}\fR", words)
        self.page.paragraph(f"{literal(' '.join(command.words))} {words}")

    def options(self, command: Command, begin: str) -> None:
        """Write the options of a command."""
        getattr(self.page, begin)("Options")
        for option in command.options:
            tag = ", ".join(literal(name) for name in sorted(option.names, key=len))
            if option.value:
                tag += f" {variable(option.value)}"
            self.page.tagged(tag, self.references.of_text(option.help, command))

    def ends(self, command: Command, begin: str) -> None:
        """Write with which statuses a command ends, and examples of it."""
        if command.statuses:
            getattr(self.page, begin)("Exit status")
            if command.statuses_are:
                self.page.paragraph(plain(command.statuses_are))
            for status, meaning in command.statuses:
                self.page.tagged(literal(status), self.references.of_text(meaning, command))
        if command.examples:
            getattr(self.page, begin)("Examples")
            self.page.example("\n".join(command.examples))

    def files(self) -> None:
        """Write which files belong to it."""
        if self._own in _FILES_OF:
            self.page.section("Files")
            for name in _FILES_OF[self._own]:
                self.page.tagged(literal(name), plain(_FILES[name]))

    def see_also(self, *more: str) -> str:
        """Write which pages were named; return the whole page."""
        pages = sorted(
            {*self.references.named, *more} - {self._own}, key=lambda page: page.rstrip(")").split("(")[::-1]
        )
        if pages:
            self.page.section("See also")
            self.page.paragraph(", ".join(map(page_name, pages)))
        return self.page.text()


@cache
def _sections_of(file: str) -> dict[str, list[Token]]:
    return dict(sections(parse((DOCS / file).read_text())))


def _section(found: dict[str, list[Token]], file: str, title: str) -> list[Token]:
    """Return what is in a section, less a list of the document's own sections."""
    if title not in found:
        raise SystemExit(f"man_pages: docs/{file} has no section {title!r}; correct scripts/man_pages.py")
    return [token for each in elements(found[title]) if not _is_contents(each) for token in each]


def _is_contents(tokens: list[Token]) -> bool:
    return tokens[0].type == "bullet_list_open" and all(
        any(
            child.type == "link_open" and str(child.attrs["href"]).startswith("#")
            for child in each.children or ()
        )
        for each in tokens
        if each.type == "inline"
    )


def _without_what_help_says(tokens: list[Token], command: Command) -> list[Token]:
    """Return what a document says of a command, less its usage, options and statuses."""
    kept: list[list[Token]] = []
    goes_on = False
    for each in elements(tokens):
        first = each[0]
        if first.type == "code_block" and first.content.startswith(" ".join(command.words)):
            goes_on = True
            continue
        if first.type == "table_open" and each[3].type == "th_open" and each[4].content in _SAID_BY_PROGRAMS:
            if kept and kept[-1][0].type == "paragraph_open" and kept[-1][1].content.endswith(":"):
                kept.pop()  # it was about the table
            continue
        children = each[1].children if goes_on and first.type == "paragraph_open" else None
        if children and children[0].type == "text":
            # A sentence that began with the usage.
            begin = children[0].content
            first_words = children[0].copy(content=begin[:1].upper() + begin[1:])
            each[1] = each[1].copy(children=[first_words, *children[1:]])
        goes_on = False
        kept.append(each)
    return [token for each in kept for token in each]


def page_of_command(entry: OfCommand, command: Command, date: str) -> str:
    """Return the page of a command, with all that are below it and have no page of their own."""
    own_pages = {each.words for each in COMMANDS}
    below = [each for each in command.commands if " ".join(each.words) not in own_pages]
    elsewhere = [each for each in COMMANDS if each.words in {" ".join(one.words) for one in command.commands}]
    summary = command.summary[:1].lower() + command.summary[1:]
    writer = Writer(entry.page, entry.file, summary, date)
    writer.page.section("Synopsis")
    if not below or command.words == ("fdbroker-scand",):
        writer.usage(command)
    for each in below:
        writer.usage(each)
    writer.page.section("Description")
    writer.description(command)
    if not below or len(command.options) > 1:
        writer.options(command, "section")
    if elsewhere:
        writer.page.section("Commands")
        summaries = {each.words: each.summary for each in command.commands}
        for other in elsewhere:
            writer.page.tagged(page_name(other.page), plain(summaries[tuple(other.words.split())]))
    writer.ends(command, "section")
    for each in below:
        writer.page.section(" ".join(each.words[1:]))
        writer.description(each)
        writer.options(each, "subsection")
        writer.ends(each, "subsection")
    if entry.sections:
        writer.document(entry.file, entry.sections)
    writer.files()
    return writer.see_also("fdbroker(1)", "fdbrokerd(8)", *(each.page for each in elsewhere))


def page_of_document(entry: Document, date: str) -> str:
    """Return the page that a document is, or a part of it."""
    writer = Writer(entry.page, entry.file, entry.what, date)
    writer.document(entry.file, entry.sections)
    return writer.see_also("fdbroker(1)")


def pages(date: str) -> dict[str, str]:
    """Return all pages by the names of their files below a directory of pages: `man1/fdbroker.1`."""
    commands = {" ".join(each.words): each for program in programs() for each in program.all_commands()}
    written = {entry.page: page_of_command(entry, commands[entry.words], date) for entry in COMMANDS}
    written |= {entry.page: page_of_document(entry, date) for entry in DOCUMENTS}
    return {
        f"man{section}/{name}.{section}": text
        for page, text in written.items()
        for name, _, section in [page.rstrip(")").partition("(")]
    }


def date_of_pages() -> str:
    """Return the date of SOURCE_DATE_EPOCH, or of today."""
    return time.strftime("%Y-%m-%d", time.gmtime(int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))))


if __name__ == "__main__":
    if len(sys.argv) != 2:  # noqa: PLR2004 - the program and its argument
        sys.exit("usage: python3 -m scripts.man_pages DIRECTORY")
    write_files(pages(date_of_pages()), sys.argv[1])
