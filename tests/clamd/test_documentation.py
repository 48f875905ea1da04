"""docs/clamd.md and docs/from-clamd.md say what is so."""

from __future__ import annotations

import re
from pathlib import Path

from fdbroker.clamd.import_conf import RULES, Outcome, as_text, as_yaml, import_conf
from fdbroker.clamd.protocol import COMMANDS, LONGEST_COMMAND, Limits
from tests.clamd.talks import TALKS

PROTOCOL = Path("docs/clamd.md").read_text()
MIGRATION = Path("docs/from-clamd.md").read_text()


def blocks(text: str, begin: str) -> list[str]:
    """Return the fenced blocks that begin with this."""
    return [
        block
        for block in re.findall(r"^```\w*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        if block.startswith(begin)
    ]


def told(said: bytes) -> str:
    """Return what was said, as it stands in a table."""
    lines = re.split(rb"[\n\0]", said)
    text = "; ".join(f"`{line.decode()}`" for line in lines if line)
    return text.replace("|", "\\|") or "nothing"


def test_each_difference_from_clamd_is_in_the_table() -> None:
    rows = [
        f"| {talk.name} | {'not always the same' if talk.differs.clamd is None else told(talk.differs.clamd)}"
        f" | {told(talk.differs.ours)} | {talk.differs.why} |"
        for talk in TALKS
        if talk.differs
    ]
    found = PROTOCOL[PROTOCOL.index("| what is said |") :].split("\n\n")[0].splitlines()[2:]
    assert found == rows


def test_each_command_is_described() -> None:
    table = PROTOCOL[PROTOCOL.index("| command |") :].split("\n\n")[0]
    described = {
        name: row for row in table.splitlines()[2:] for name in re.findall(r"`([A-Z]+)", row.split("|")[1])
    }
    assert described.keys() == {name.decode() for name in COMMANDS}
    for name, rule in COMMANDS.items():
        _, _, plain, session, *_ = described[name.decode()].split("|")
        assert (plain.strip() == "yes", session.strip() == "yes") == (rule.plain, rule.session), name


def test_the_limits_are_the_usual_ones() -> None:
    limits = Limits()
    assert f"{LONGEST_COMMAND} bytes" in PROTOCOL
    assert limits.stream_length == 100 << 20
    assert "100 MiB" in PROTOCOL
    assert f"{limits.command_timeout:g} seconds" in PROTOCOL
    assert f"{limits.read_timeout:g} seconds" in PROTOCOL
    assert f"{limits.plain_pause:g} seconds" in PROTOCOL


def test_the_example_of_an_import_is_what_comes_of_it() -> None:
    [conf] = blocks(MIGRATION, "LocalSocket")
    imported = import_conf(conf.encode())
    assert blocks(MIGRATION, "version: 1") == [as_yaml(imported)]
    assert blocks(MIGRATION, "missing:") == [as_text(imported)]


def test_each_outcome_of_an_import_is_explained_and_happens() -> None:
    for outcome in Outcome:
        assert f"| {outcome} |" in MIGRATION
    happening = {rule.outcome for rule in RULES.values()} | {
        rule.off[0] for rule in RULES.values() if rule.off
    }
    assert happening | {Outcome.WRONG} == set(Outcome)
