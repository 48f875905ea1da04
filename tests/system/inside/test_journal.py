"""The audit in the journal: whole, of the broker alone whoever else writes, read as all its readers do."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.audit_records import check_record
from tests.broker.speaking import check_audit, path_of
from tests.processes import wait_until
from tests.system.inside.system import (
    POLICY,
    POLICY_FILE,
    SERVICE,
    cat,
    messages,
    records,
    run,
    show,
    sync_journal,
)

ODD = b'/srv/data/"},\n\xff\x1b[31m{"event":"open","decision":"allow"}'
ASKED = [b"/srv/data/file", ODD, b"/etc/shadow"]
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
# By standard output and by the native protocol, with all fields that anybody can set:
# https://systemd.io/JOURNAL_NATIVE_PROTOCOL/
FORGER = f"""
import json, socket
text = json.dumps({FORGED!r})
print(text, flush=True)
journal = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
journal.connect("/run/systemd/journal/socket")
fields = ["MESSAGE=" + text, "_SYSTEMD_UNIT=fdbroker.service"]
more = ["_TRANSPORT=stdout", "UNIT=fdbroker.service", "SYSLOG_IDENTIFIER=fdbrokerd", "_UID=0",
        "OBJECT_SYSTEMD_UNIT=fdbroker.service"]
for message in (fields + more, fields):
    journal.send(("\\n".join(message) + "\\n").encode())
"""


@pytest.fixture(scope="module")
def invocation() -> str:
    """Have alice ask while mallory forges, and the broker stop; return which start of the unit that was."""
    POLICY_FILE.write_text(POLICY)
    for path in ASKED:
        cat(os.fsdecode(path))
    started = show("InvocationID")
    alone = ["systemd-run", "--quiet", "--wait", "--collect", "--unit=forger", "-p", "User=mallory"]
    run(*alone, "-p", "SyslogIdentifier=fdbrokerd", "/usr/bin/python3", "-I", "-c", FORGER)
    run("systemctl", "stop", SERVICE)
    sync_journal()
    return started


@pytest.mark.usefixtures("invocation")
def test_forged_records_are_in_the_journal_and_are_not_taken_for_the_brokers() -> None:
    shown = run("journalctl", "-o", "json").stdout
    said = [json.loads(line).get("MESSAGE") for line in shown.splitlines()]
    assert said.count(json.dumps(FORGED)) == 3
    assert all(record["run"] != FORGED["run"] for record in records())
    # What it wrote to its standard output is there for who asks for that unit.
    done = run("fdbroker", "audit", "--unit", "forger.service", "--json")
    assert json.loads(done.stdout) == FORGED


def test_the_audit_is_whole_and_nothing_is_in_between(invocation: str) -> None:
    told = records()
    check_audit(told)
    for record in told:
        check_record(record)
    assert [record["event"] for record in told] == ["started", "open", "open", "open", "stopped"]
    assert [path_of(record) for record in told[1:-1]] == ASKED
    assert {record["uid"] for record in told[1:-1]} == {int(run("id", "-u", "alice").stdout)}
    assert told[0]["boot"] == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert [json.loads(line) for line in messages(since=invocation) if line.startswith('{"run"')] == told


@pytest.mark.usefixtures("invocation")
def test_it_is_shown_filtered_and_verified() -> None:
    text = run("fdbroker", "audit", "--journal").stdout
    assert "\x1b" not in text
    assert len(text.splitlines()) == 5
    assert [record["reason"] for record in records("--denied")] == ["not_found", "outside_roots"]
    assert [record["event"] for record in records("-n", "1")] == ["stopped"]
    verified = json.loads(run("fdbroker", "audit", "verify", "--journal", "--json").stdout)
    assert (verified["records"], verified["findings"]) == (5, [])


def test_it_is_followed_and_has_no_file_to_be_moved_to(tmp_path: Path) -> None:
    output = tmp_path / "followed"
    with output.open("wb") as file:
        follow = ["fdbroker", "audit", "--journal", "-f", "-n", "0", "--json"]
        process = subprocess.Popen(follow, stdout=file)
    try:
        wait_until(lambda: not cat("/srv/data/file").returncode and output.stat().st_size, "a record")
    finally:
        process.kill()
        process.wait()
    followed = [json.loads(line) for line in output.read_bytes().splitlines()]
    assert {record["event"] for record in followed} <= {"started", "open"}
    done = run("fdbroker", "audit", "reopen", check=False)
    assert done.returncode == 2
    assert "standard output" in done.stderr
