"""Each block of each document is run, read as what it is, or compared; one that nobody tries is a failure."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import subprocess
import time
from functools import cache
from typing import TYPE_CHECKING, NamedTuple
from xml.etree import ElementTree as ET

import click
import pytest
import yaml

import fdbroker
from fdbroker.clamd.import_conf import RULES
from fdbroker.cli.main import cli
from fdbroker.config import compile_policy
from fdbroker.launcher import options as fdbrokerd
from fdbroker.scan.messages import MessageError, decode_request
from fdbroker.scan.service.configuration import read_configuration
from fdbroker.testing import FakeBroker
from tests.config.fake_lookups import FakeLookups
from tests.documentation.blocks import ROOT, all_blocks, blocks, pages
from tests.documentation.commands import commands
from tests.documentation.sessions import COMPARED_ELSEWHERE, NOT_RUN, SESSIONS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.documentation.blocks import Block
    from tests.documentation.commands import Command


class Claim(NamedTuple):
    """A test elsewhere that looks at blocks of a page: all, those of a kind, or those that begin so."""

    page: str
    test: str
    kind: str | None = None
    begin: str = ""

    def has(self, block: Block) -> bool:
        """Return whether it is about a block."""
        return (
            block.page == self.page
            and self.kind in {None, block.kind}
            and block.text.lstrip().startswith(self.begin)
        )


CLAIMS = [
    Claim("README.md", "tests/test_demo.py", "console", "scanner$"),
    Claim("docs/audit.md", "tests/cli/test_audit_documentation.py", "", '{"run"'),
    Claim("docs/cli.md", "tests/cli/test_top.py", "console", "# fdbroker top"),
    Claim("docs/client.md", "tests/client/test_documentation.py", "python"),
    Claim("docs/compiled-policy.md", "tests/policy/test_read_policy.py", "json"),
    Claim("docs/fdbrokerd.md", "tests/ucspi/test_ucspi.py", "", "unixserver"),
    Claim("docs/fdbrokerd.md", "tests/ucspi/test_ucspi.py", "", "fdbroker --socket"),
    Claim("docs/from-clamd.md", "tests/clamd/test_replacement.py", "", "$ sed"),
    Claim("docs/from-clamd.md", "tests/clamd/test_documentation.py", "", "LocalSocket"),
    Claim("docs/from-clamd.md", "tests/clamd/test_documentation.py", "", "version: 1"),
    Claim("docs/from-clamd.md", "tests/clamd/test_documentation.py", "", "missing:"),
    Claim("docs/from-clamd.md", "tests/clamd/test_clamonacc.py", "", "OnAccessIncludePath"),
    Claim("docs/metrics.md", "tests/cli/test_metrics.py", "yaml", "groups:"),
    Claim("docs/packages.md", "tests/system/test_package.py"),
    Claim("docs/policy.md", "tests/config/test_documentation.py"),
    Claim("docs/policy-tools.md", "tests/config/test_tools_documentation.py", "yaml", "version:"),
    Claim("docs/policy-tools.md", "tests/config/test_tools_documentation.py", "text"),
    Claim("docs/protocol.md", "tests/wire/test_vectors.py"),
    Claim("docs/quick-start.md", "tests/test_quick_start.py", "console"),
    Claim("docs/sandbox.md", "tests/sandbox/test_documentation.py"),
    Claim("docs/scand.md", "tests/system/inside/test_scand.py", "", "systemctl enable"),
    Claim("docs/without-systemd.md", "tests/supervisors/supervised.py"),
]

# Drawings: there is nothing to try.
DRAWINGS = {
    ("README.md", " policy.yaml -->"),
    ("docs/architecture.md", " fdbrokerd, the launcher"),
}

SYNOPSIS = re.compile(
    r"(fdbroker|fdbrokerd|fdbroker-scand) .*(\[|\bPATH\b|\bSCHEMA\b)|fdbroker policy schema$"
)
MAKE = re.compile(r"make [a-z]")


def is_synopsis(block: Block) -> bool:
    """Return whether it says how a command is used, with what stands for its arguments."""
    return not block.kind and SYNOPSIS.match(block.text.splitlines()[0]) is not None


def is_policy(block: Block) -> bool:
    """Return whether it is a policy, or a part of one, without errors that are shown on purpose."""
    return (
        block.kind == "yaml"
        and block.page != "docs/policy.md"
        and re.search("^(rules|roots):", block.text, re.MULTILINE) is not None
    )


def is_scand(block: Block) -> bool:
    """Return whether it is of /etc/fdbroker/scand.yaml."""
    return block.kind == "yaml" and "protocol:" in block.text


def is_run(block: Block) -> bool:
    """Return whether its commands are run on a machine that is thrown away, or said why not."""
    if block.page in SESSIONS and SESSIONS[block.page].has(block):
        return True
    if not block.kind:
        return all(command.text in NOT_RUN for command in commands(block))
    # It names, without output, what is run elsewhere.
    named = shell_commands(block) if block.kind == "console" else []
    return bool(named) and all(not command.shown and command.text in run_somewhere() for command in named)


@cache
def run_somewhere() -> set[str]:
    """Return all commands that are run on a machine that is thrown away."""
    return {
        command.text
        for page, session in SESSIONS.items()
        for block in blocks(page)
        if session.has(block)
        for command in commands(block)
    } - set(NOT_RUN)


# What this file looks at, and by which test.
HERE: dict[str, Callable[[Block], bool]] = {
    "quoted": lambda block: bool(block.mark) and not block.mark.startswith(("/", "example:")),
    "made": lambda block: block.mark.startswith("/") and block.page in SESSIONS,
    "run": is_run,
    "synopsis": is_synopsis,
    "unit": lambda block: block.kind == "ini",
    "policy": is_policy,
    "scand": is_scand,
    "make": lambda block: MAKE.match(block.text.lstrip("# ")) is not None,
    "clamd.conf": lambda block: re.match(r"OnAccess\w+ ", block.text) is not None,
    "systemctl": lambda block: block.text.startswith("systemctl "),
    "drawing": lambda block: any(
        block.page == page and block.text.startswith(begin) for page, begin in DRAWINGS
    ),
    "folders": lambda block: block.text.startswith("src/fdbroker/\n"),
    "python": lambda block: (block.page, block.kind) in {("README.md", "python"), ("docs/cli.md", "python")},
    "bench": lambda block: block.page == "docs/benchmarks.md" and block.kind == "json",
    "log": lambda block: block.page == "docs/scand.md" and " FOUND\n" in block.text,
    "exchange": lambda block: block.page == "docs/scan-protocol.md",
    "editor": lambda block: block.text.startswith("# yaml-language-server"),
}


def found(name: str) -> list[Block]:
    """Return the blocks that a test here looks at: at least one."""
    chosen = [block for block in all_blocks() if HERE[name](block)]
    assert chosen, f"nothing is {name} any more"
    return chosen


def test_each_block_is_looked_at_by_a_test() -> None:
    left = [
        f"{block.place}: {block.text.splitlines()[0]}"
        for block in all_blocks()
        if not any(claim.has(block) for claim in CLAIMS) and not any(test(block) for test in HERE.values())
    ]
    assert not left, "\n".join(["nobody tries these; see tests/documentation/test_blocks.py", *left])


def test_each_page_with_commands_or_code_was_found() -> None:
    assert len(pages()) > 25
    assert len(all_blocks()) > 150


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: f"{claim.page}-{claim.begin or claim.kind}")
def test_a_claim_is_about_a_block_and_its_test_reads_the_page(claim: Claim) -> None:
    assert any(claim.has(block) for block in blocks(claim.page))
    source = (ROOT / claim.test).read_text()
    frames = (ROOT / "tests/wire/frames.py").read_text() if "frames" in source else ""
    assert claim.page.rpartition("/")[2] in source + frames


def test_what_is_not_run_or_compared_elsewhere_is_there() -> None:
    there = {command.text for page in SESSIONS for block in blocks(page) for command in commands_of(block)}
    assert set(NOT_RUN) | set(COMPARED_ELSEWHERE) <= there
    for test in COMPARED_ELSEWHERE.values():
        assert (ROOT / test).exists()


def commands_of(block: Block) -> list[Command]:
    """Return the commands of a block of a kind that has some; else none."""
    if block.kind in {"console", "sh"} or (not block.fenced and not is_synopsis(block)):
        return commands(block)
    return []


def test_what_is_quoted_is_in_the_file() -> None:
    for block in found("quoted"):
        text = (ROOT / block.mark).read_text()
        if block.mark.startswith("config/examples/"):
            assert block.text == text, block.place
        else:
            assert block.text in text, block.place


def test_each_example_of_a_policy_has_its_recipe_and_its_expectations() -> None:
    quoted = {block.mark for block in found("quoted")}
    for example in (ROOT / "config/examples").glob("*.yaml"):
        assert f"config/examples/{example.name}" in quoted
        assert (ROOT / "config/examples/expectations" / example.name).exists()


def test_the_shell_reads_all_commands() -> None:
    """What a shell does not read would be told with the number of its line here."""
    listed = [command for block in all_blocks() for command in shell_commands(block)]
    text = "".join(f": {command.place}\n{command.text}\n" for command in listed)
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def shell_commands(block: Block) -> list[Command]:
    """Return the commands of all blocks that are for a shell, whoever runs them."""
    if block.kind == "console" and not block.text.startswith(("# ", "$ ")):
        return []  # of the demonstration, which has prompts of its own
    return commands_of(block) if block.kind or re.match(r"[a-z./-]+ ", block.text) else []


PROGRAMS = {"fdbroker", "fdbrokerd", "fdbroker-scand"}
# They run the program that is named behind their own arguments.
RUNNERS = {"as_scanner", "runuser", "s6-ipcclient", "s6-ipcserver", "setpriv", "unixclient", "unixserver"}


def calls(text: str) -> list[list[str]]:
    """Return the calls of fdbroker's programs within a line for the shell, each as a list of words."""
    lexer = shlex.shlex(text.partition("\n")[0], posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    lexer.commenters = ""
    made = []
    for ends, words in itertools.groupby(lexer, key=lambda word: set(word) <= set("|&;<>")):
        call = list(words)
        if call[0] in RUNNERS:
            call = list(itertools.dropwhile(lambda word: word.rpartition("/")[2] not in PROGRAMS, call))
        if not ends and call and call[0].rpartition("/")[2] in PROGRAMS:
            made.append([call[0].rpartition("/")[2], *call[1:]])
    return made


def test_programs_know_the_options_that_they_are_given() -> None:
    known = 0
    for block in all_blocks():
        for command in shell_commands(block):
            for name, *arguments in calls(command.text):
                check_call(name, arguments, command.place)
                known += 1
    assert known > 60


def check_call(name: str, arguments: list[str], place: str) -> None:
    """Have a program read its command line, and do nothing."""
    try:
        if name == "fdbroker":
            check_click(cli, arguments)
        elif name == "fdbrokerd":
            fdbrokerd.read_options(arguments)
        else:
            assert set(arguments) <= {"--check", "import-clamd-conf", "/etc/clamav/clamd.conf"}, arguments
    except (click.ClickException, SystemExit) as error:
        pytest.fail(f"{place}: {name} {shlex.join(arguments)}: {error}")


def check_click(command: click.Command, arguments: list[str]) -> None:
    """Parse as click does, group by group, without calling anything."""
    if {"--help", "--version"} & set(arguments):
        return
    context = command.make_context(command.name, list(arguments), resilient_parsing=False)
    if isinstance(command, click.Group):
        rest = [*getattr(context, "_protected_args", ()), *context.args]  # until click 9
        _, inner, rest = command.resolve_command(context, rest)
        assert inner is not None
        check_click(inner, rest)


def test_a_synopsis_names_options_that_there_are() -> None:
    for block in found("synopsis"):
        for line in re.split(r"\n(?=fdbroker)", block.text.strip()):
            name, *words = line.split()
            if name != "fdbroker":
                continue  # tests/launcher/test_script.py compares that of fdbrokerd
            command: click.Command = cli
            while isinstance(command, click.Group) and words:
                inner = command.get_command(click.Context(command), words[0])
                if inner is None:
                    break
                command = inner
                del words[0]
            options = {option for parameter in command.params for option in parameter.opts}
            assert command is not cli, line
            named = set(re.findall(r"(?<![\w-])--?[a-z0-9][a-z0-9-]*", " ".join(words)))
            assert named <= options | {"--socket"}, (block.place, named - options)


def test_units_that_systemctl_is_told_of_are_there() -> None:
    for block in found("systemctl"):
        for command in commands(block):
            program, verb, *units = command.text.split()
            if program == "systemctl":
                assert verb in {"enable", "disable", "reload", "restart", "start", "stop"}, command.place
                assert all((ROOT / "systemd" / unit).exists() for unit in units), command.place
            else:
                assert command.text in NOT_RUN, command.place


def test_options_of_clamav_are_known() -> None:
    for block in found("clamd.conf"):
        for line in block.text.splitlines():
            assert line.partition(" ")[0] in RULES, block.place


def test_make_has_the_targets_that_are_named() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for block in found("make"):
        named = re.findall(r"^(?:# )?make ([a-z-]+)", block.text, re.MULTILINE)
        assert set(named) <= targets, block.place
        programs = re.findall(r"^python3 (\S+)(.*)", block.text, re.MULTILINE)
        for program, options in programs:
            source = (ROOT / program).read_text()
            for option in set(re.findall(r"--[a-z-]+", options.partition("#")[0])) - {"--help"}:
                assert f'"{option}"' in source, block.place


def test_policies_compile() -> None:
    for block in found("policy"):
        head = "" if "version:" in block.text else "version: 1\nroots: {home: {path: /home}}\n"
        compiled = compile_policy((head + block.text).encode(), block.place, Somebody())
        assert compiled["rules"]


class Somebody(FakeLookups):
    """A machine on which there is also the user of the scan service."""

    def user(self, name: str) -> int | None:
        """Return the uid."""
        return 120 if name == "fdbroker-scand" else super().user(name)


def test_configurations_of_the_scan_service_are_read() -> None:
    for block in found("scand"):
        read = read_configuration(b"version: 1\n" + block.text.encode(), block.place, FakeLookups())
        assert read.listeners


def runnable(unit: str) -> str:
    """Return a unit whose programs are there, whatever is installed here."""
    return re.sub(r"^(Exec\w+=[+-]?)\S+.*", r"\1/bin/true", unit, flags=re.MULTILINE)


def test_units_are_what_systemd_takes(tmp_path: Path) -> None:
    units = set()
    for block in found("unit"):
        [name] = re.findall(
            r"^# (?:/etc/systemd/system/)?([\w@./-]+\.(?:service|socket|timer|conf))", block.text
        )
        unit, _, drop_in = name.partition(".d/")
        if drop_in:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / unit).write_text(runnable((ROOT / "systemd" / unit).read_text()))
        (tmp_path / name).write_text(runnable(block.text))
        units.add(tmp_path / unit)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", *units],
        env={"SYSTEMD_UNIT_PATH": f"{tmp_path}:", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_folders_of_the_sources_are_those_that_are_described() -> None:
    [block] = found("folders")
    described = re.findall(r"^  (\w+)/", block.text, re.MULTILINE)
    there = {path.parent.name for path in (ROOT / "src/fdbroker").glob("*/__init__.py")}
    assert len(described) == len(set(described))
    assert set(described) == there


def test_python_of_the_readme_and_of_the_command_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    readme, given = found("python")
    files: dict[str, bytes | fdbroker.Reason | OSError] = {
        "/home/alice/letter.pdf": b"%PDF-1.1",
        "/home/alice/notes.txt": b"a note\n",
    }
    with FakeBroker(files) as fake:
        monkeypatch.setattr(fdbroker, "connect", fake.connect, raising=False)
        exec(compile(readme.text, readme.place, "exec"), {})  # noqa: S102
        monkeypatch.setenv("FDBROKER_FD", str(fake.connect_socket().detach()))
        exec(compile(given.text, given.place, "exec"), {})  # noqa: S102


def test_the_result_of_a_benchmark_is_json_of_a_series() -> None:
    [block] = found("bench")
    for name, members in json.loads(block.text).items():
        assert f'"{name}"' in (ROOT / "benchmarks/series.py").read_text()
        for member in members:
            assert f'"{member}"' in (ROOT / "benchmarks/report.py").read_text()


def test_the_line_of_the_log_is_of_the_form_that_the_service_writes() -> None:
    [block] = found("log")
    source = (ROOT / "src/fdbroker/scan/service/clamd.py").read_text()
    assert "strftime('%a %b %e %H:%M:%S %Y')} -> {line}" in source
    moment, _, _ = block.text.partition(" -> ")
    assert time.strftime("%a %b %e %H:%M:%S %Y", time.strptime(moment, "%a %b %d %H:%M:%S %Y")) == moment


def test_the_exchange_with_the_scan_service_is_of_messages() -> None:
    [block] = found("exchange")
    said = [line.replace("[...]", "[]").strip() for line in block.text.splitlines()[1:]]
    asked = [json.loads(line.removesuffix("->")) for line in said if line.startswith("{")]
    answered = [json.loads(line.removeprefix("<-")) for line in said if line.startswith("<-")]
    assert len(asked) + len(answered) == len(said)
    for message in asked:
        decode_request(json.dumps(message).encode())
    with pytest.raises(MessageError):
        decode_request(json.dumps(answered[0]).encode())
    assert [message["type"] for message in answered] == ["welcome", "results", "end"]


def test_what_editors_are_told_is_a_comment() -> None:
    for block in found("editor"):
        assert yaml.safe_load(block.text) is None


@pytest.mark.parametrize("picture", sorted((ROOT / "docs/pictures").iterdir()), ids=lambda path: path.name)
def test_a_picture_needs_nothing_else_and_is_there_for_all(picture: Path) -> None:
    text = picture.read_text()
    tree = ET.fromstring(text)  # noqa: S314 - our own
    assert [element.tag.rpartition("}")[2] for element in tree][:2] == ["title", "desc"]
    assert "prefers-color-scheme: dark" in text
    assert not re.search(r"href|url\((?!#)|@import|<image|<script", text)
    assert f"](pictures/{picture.name})" in (ROOT / "docs/concepts.md").read_text()
