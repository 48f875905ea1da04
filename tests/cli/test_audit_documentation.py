"""docs/audit.md names each event with its members, as the schema has them."""

from __future__ import annotations

import re
from pathlib import Path

from fdbroker.cli.audit_schema import EVENTS, MEMBERS

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "audit.md").read_text()
SHORT = {
    "CLIENT": "socket connection? pid uid gid identity",
    "FOR": "for_number? for_pid? for_uid? for_gid?",
    "PATH": "path path_hex? path_length?",
    "RESOLVED": "resolved? resolved_hex?",
    "PATH?": "path? path_hex? path_length?",
}


def test_each_event_is_told_with_its_members_and_what_it_is() -> None:
    rows = re.findall(r"^\| `([a-z_]+)` \| (.*?) \| (.*?) \|$", TEXT, re.MULTILINE)
    told = {
        name: (" ".join(SHORT.get(word, word) for word in members.split() if word != "-"), text)
        for name, members, text in rows
    }
    assert told == {name: (event.members, event.text) for name, event in EVENTS.items()}


def test_each_member_is_told() -> None:
    rows = re.findall(r"^\| `([a-z_]+)` \| ([^|]*) \|$", TEXT, re.MULTILINE)
    assert rows == [(name, member["description"]) for name, member in MEMBERS.items()]


def test_the_example_is_a_record() -> None:
    import json  # noqa: PLC0415 - here alone

    from tests.audit_records import check_record  # noqa: PLC0415 - likewise

    [example] = re.findall(r'^    (\{"run".*)$', TEXT, re.MULTILINE)
    check_record(json.loads(example))
