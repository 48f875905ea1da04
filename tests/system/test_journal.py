"""The audit in a real journal: `fdbroker audit --journal` reads it, and nobody else writes records of it."""

from __future__ import annotations

import json
import os
import shlex
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tests.audit_records import check_record
from tests.broker.speaking import check_audit, path_of
from tests.running_broker import (
    CLIENT_UID,
    OTHER_UID,
    launcher_command,
    launcher_environment,
    policy,
    reachable_directory,
)
from tests.system.booted import UNITS, run_booted

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.booting

FORGED = {
    "run": "f" * 16,
    "seq": 0,
    "time": "2026-11-24T00:00:00.000Z",
    "event": "open",
    "uid": 0,
    "path": "/forged",
    "decision": "allow",
    "reason": "ok",
    "rule": "all",
}
# By the native protocol, too: https://systemd.io/JOURNAL_NATIVE_PROTOCOL/
FORGER = f"""
import json, socket
text = json.dumps({FORGED!r})
print(text, flush=True)
journal = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
journal.connect("/run/systemd/journal/socket")
fields = ["MESSAGE=" + text, "_SYSTEMD_UNIT=fdbroker.service"]
more = ["_TRANSPORT=stdout", "UNIT=fdbroker.service", "SYSLOG_IDENTIFIER=fdbroker", "_UID=0",
        "OBJECT_SYSTEMD_UNIT=fdbroker.service"]
for message in (fields + more, fields):
    journal.send(("\\n".join(message) + "\\n").encode())
"""


@pytest.fixture(scope="module")
def seen() -> Iterator[dict[str, Any]]:
    with reachable_directory() as shared:
        (shared / "tree").mkdir()
        (shared / "tree/file").write_bytes(b"content")
        (shared / "policy.json").write_text(json.dumps(policy(shared / "tree")))
        (shared / "forger.py").write_text(FORGER)
        units = shared / "files" / UNITS
        units.mkdir(parents=True)
        broker = launcher_command(
            shared / "policy.json",
            f"--socket={shared}/requests",
            "--socket-mode=666",
            f"--control={shared}/control",
        )
        environment = f"Environment=PYTHONPATH={launcher_environment()['PYTHONPATH']}"
        unit = "[Unit]\nDefaultDependencies=no\n[Service]\nType={}\n{}\nExecStart={}\n"
        (units / "fdbroker.service").write_text(unit.format("notify", environment, shlex.join(broker)))
        become = ["setpriv", f"--reuid={OTHER_UID}", "--clear-groups"]
        # The venv may be out of reach for somebody else, what it was made from is not.
        forger = shlex.join(
            ["/usr/bin/env", *become, os.path.realpath(sys.executable), "-I", str(shared / "forger.py")]
        )
        (units / "forger.service").write_text(unit.format("oneshot", environment, forger))
        yield run_booted("journal_inside.py", shared, CLIENT_UID, files=(shared / "files",)) | {
            "shared": str(shared)
        }


def test_records_in_the_journal_are_those_of_the_broker_alone(seen: dict[str, Any]) -> None:
    assert seen["reasons"] == ["ok", "not_found", "denied"]
    records = seen["json"]
    check_audit(records)
    for record in records:
        check_record(record)
    assert [record["event"] for record in records] == ["started", "open", "open", "open"]
    assert {record["uid"] for record in records[1:]} == {CLIENT_UID}


def test_forged_records_are_in_the_journal_and_are_not_taken_for_the_brokers(seen: dict[str, Any]) -> None:
    assert seen["in_the_journal"] == len(seen["json"]) + 3
    assert all(record["run"] != FORGED["run"] for record in seen["json"])
    assert "/forged" not in seen["text"]
    assert seen["forged"] == [FORGED]  # what it wrote to its standard output, where that is asked for


def test_a_path_comes_back_from_the_journal_byte_by_byte(seen: dict[str, Any]) -> None:
    paths = [path_of(record) for record in seen["json"][1:]]
    odd = b'/tree/"},\n\xff\x1b[31m{"event":"open","decision":"allow"}'
    assert paths == [
        b.encode() + rest for b, rest in ((seen["shared"], b"/tree/file"), (seen["shared"], odd))
    ] + [b"/etc/shadow"]
    assert "\x1b" not in seen["text"]
    assert len(seen["text"].splitlines()) == 4


def test_the_journal_is_filtered_verified_and_followed(seen: dict[str, Any]) -> None:
    assert [record["reason"] for record in seen["denied"]] == ["not_found", "outside_roots"]
    assert (seen["verified"]["records"], seen["verified"]["findings"]) == (4, [])
    assert seen["followed"]
    assert {record["event"] for record in seen["followed"]} == {"open"}


def test_an_audit_in_the_journal_has_no_file_to_be_moved_to(seen: dict[str, Any]) -> None:
    status, errors = seen["reopen"]
    assert status == 2
    assert errors


def test_the_end_of_the_broker_is_the_last_record(seen: dict[str, Any]) -> None:
    assert [record["event"] for record in seen["last"]] == ["stopped"]
