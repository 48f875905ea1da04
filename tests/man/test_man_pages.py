"""The manual pages: what programs take and documents say is in them, and nothing is wrong with them."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from typing import TYPE_CHECKING

import pytest

from scripts import man_pages
from scripts.programs import Command, programs, write_files
from scripts.roff import Page, elements, parse, plain, sections

if TYPE_CHECKING:
    from pathlib import Path

DATE = "2026-01-31"


@cache
def pages() -> dict[str, str]:
    """Return all pages; not before a test asks, since every process of the tests imports this."""
    return man_pages.pages(DATE)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("man")
    write_files(pages(), str(path))
    return path


def rendered(path: Path) -> str:
    """Return what a reader sees of a page."""
    done = subprocess.run(
        ["mandoc", "-Tutf8", "-Owidth=200", path], capture_output=True, text=True, check=True
    )
    return re.sub(".\b", "", done.stdout)


def unspaced(text: str) -> str:
    """Return text without what filling changes."""
    return "".join(text.split())


def file_of(page: str) -> str:
    name, _, section = page.rstrip(")").partition("(")
    return f"man{section}/{name}.{section}"


def commands_of_pages() -> dict[str, list[Command]]:
    """Return for each page of programs what it is about."""
    commands = {" ".join(each.words): each for program in programs() for each in program.all_commands()}
    own = {tuple(entry.words.split()) for entry in man_pages.COMMANDS}
    return {
        entry.page: [
            commands[entry.words],
            *(each for each in commands[entry.words].commands if each.words not in own),
        ]
        for entry in man_pages.COMMANDS
    }


def test_each_command_has_a_page_or_a_section_of_one() -> None:
    described = {each.words for commands in commands_of_pages().values() for each in commands}
    assert described == {each.words for program in programs() for each in program.all_commands()}


def test_each_option_argument_and_status_is_in_the_page_of_its_command(directory: Path) -> None:
    compared = 0
    for page, commands in commands_of_pages().items():
        text = rendered(directory / file_of(page))
        for command in commands:
            usage = f"{' '.join(command.words)} {command.usage}"
            if not command.commands:
                assert unspaced(usage) in unspaced(text), (page, usage)
            for option in command.options if not command.commands else ():
                names = ", ".join(sorted(option.names, key=len))
                tag = re.escape(f"{names} {option.value}".rstrip())
                assert re.search(rf"^ +{tag}$|^ +{tag} ", text, re.MULTILINE), (page, tag)
                compared += 1
            for status, _ in command.statuses:
                assert re.search(rf"^ +{status} ", text, re.MULTILINE), (page, status)
    assert compared > 100


def test_code_of_a_document_is_in_its_page_as_it_is(directory: Path) -> None:
    compared = 0
    for entry in man_pages.DOCUMENTS:
        text = unspaced(rendered(directory / file_of(entry.page)))
        found = sections(parse((man_pages.DOCS / entry.file).read_text()))
        for _, tokens in [each for each in found if not entry.sections or each[0] in entry.sections]:
            code = [token.content for token in tokens if token.type in {"fence", "code_block"}]
            for token in tokens:
                code += [each.content for each in token.children or () if each.type == "code_inline"]
            for each in code:
                if each.endswith(".md") or re.match(r"[\w-]+\.md#", each):
                    continue
                assert unspaced(each) in text, (entry.page, each)
                compared += 1
    assert compared > 1000


def test_mandoc_and_groff_have_nothing_to_say(directory: Path) -> None:
    paths = [str(directory / name) for name in sorted(pages())]
    done = subprocess.run(
        ["mandoc", "-Tlint", "-Wwarning", *paths], capture_output=True, text=True, check=False
    )
    assert done.stdout == ""
    # As man(1) has it do, which lintian runs.
    for path in paths:
        done = subprocess.run(
            ["groff", "-mandoc", "-t", "-K", "utf8", "-ww", "-rLL=78n", "-Tutf8", "-Z", path],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        assert done.stderr == "", path


def test_no_line_of_text_is_wider_than_a_terminal_but_for_examples(directory: Path) -> None:
    for name, page in pages().items():
        done = subprocess.run(
            ["mandoc", "-Tutf8", directory / name], capture_output=True, text=True, check=True
        )
        examples = unspaced("".join(re.findall(r"^\.EX\n(.*?)^\.EE", page, re.MULTILINE | re.DOTALL)))
        for line in re.sub(".\b", "", done.stdout).splitlines():
            if len(line) > 80:
                assert unspaced(plain(line.strip())) in examples, (name, line)


def test_each_page_that_is_named_exists() -> None:
    named = {
        f"{name}({section})".replace("\\", "")
        for text in pages().values()
        for name, section in re.findall(r"\\fB(fdbroker[a-z.\\-]*)\\fR\((\d)\)", text)
    }
    assert len(named) > 20
    assert {file_of(page) for page in named} <= pages().keys()


def test_whatever_stands_in_a_text_is_shown_as_it_is(tmp_path: Path) -> None:
    hostile = [
        "".join(map(chr, range(33, 127))),
        ".SH not a macro",
        "'br",
        r"\fBnot bold\fR \\ \n[x] \*(xx",
        "\u00e9\u2026\u20ac",
        "--long-option -s ~user ^caret `tick` 'quotes' \"double\"",
        "a/very/long/path/of/many/components/that/no/line/holds/as/a/whole/if/it/is/narrow",
    ]
    page = Page("x", 1, DATE, "x", "x")
    page.name("x", "y")
    page.section("Description")
    for text in hostile:
        page.paragraph(plain(text))
        page.example(text)
        page.tagged(plain(text), plain(text))
    page.table(["head", ""], [[plain(text[:20]), plain(text[:20])] for text in hostile])
    (tmp_path / "x.1").write_text(page.text())
    shown = unspaced(rendered(tmp_path / "x.1"))
    for text in hostile:
        assert shown.count(unspaced(text)) >= 4


def test_date_is_that_of_the_sources_where_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    assert man_pages.date_of_pages() == "1970-01-02"
    assert f'\n.TH "FDBROKER" "1" {DATE} ' in "\n" + pages()["man1/fdbroker.1"]


def test_a_section_that_a_document_has_not_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = man_pages.DOCUMENTS[0]._replace(sections=("Nowhere",))
    with pytest.raises(SystemExit, match=r"docs/policy.md has no section 'Nowhere'"):
        man_pages.page_of_document(entry, DATE)


def test_parts_of_a_document_are_whole() -> None:
    text = (man_pages.DOCS / "policy.md").read_text()
    tokens = parse(text)
    assert [token for each in elements(tokens) for token in each] == tokens
