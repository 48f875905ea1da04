"""What a security module (AppArmor, SELinux) refused to fdbroker, by the records of the kernel."""

from __future__ import annotations

import contextlib
import os
import re
from typing import TYPE_CHECKING

from fdbroker.cli.checks.check import OK, WEAKER, Check, output_of
from fdbroker.config.names import counted, printable

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fdbroker.cli.checks.check import Running

_AUDIT_LOG = "/var/log/audit/audit.log"
_JOURNALS = ("/run/log/journal", "/var/log/journal")
_LATEST = 1 << 20  # bytes of that log
_SINCE = "-24h"
_REFUSED = re.compile(r'apparmor="DENIED"|avc: +denied')
_PID = re.compile(r"\bpid=(\d+)\b")
_SHOWN = 160  # characters of a record


def denial_checks(running: Running | None) -> list[Check]:
    """Check that no security module refused anything to fdbroker, as root: others do not see the records."""
    if os.geteuid() != 0:
        return []
    name = "denials"
    meaning = "no security module of the kernel keeps fdbroker from what it needs"
    sources = [lines for lines in (_of_the_journal(), _of_the_audit_log(_AUDIT_LOG)) if lines is not None]
    if not sources:
        return [Check(name, OK, f"not looked for: there is no journal here, and no {_AUDIT_LOG}", meaning)]
    found = denials([line for lines in sources for line in lines], running)
    if not found:
        return [Check(name, OK, "none is recorded of the last day", meaning)]
    shown = f"{counted(len(found), 'refusal')} of the last day; the latest: {printable(found[-1][:_SHOWN])}"
    cure = "allow it: in /etc/apparmor.d (then apparmor_parser -r), or by audit2allow for SELinux"
    return [Check(name, WEAKER, shown, meaning, cure)]


def denials(lines: Iterable[str], running: Running | None) -> list[str]:
    """Return those that are about fdbroker: its programs, profiles, domains, or the broker's process."""
    pids = set() if running is None else {str(running.pid)}
    return [
        line.strip()
        for line in lines
        if _REFUSED.search(line) and ("fdbroker" in line or pids.intersection(_PID.findall(line)))
    ]


def _of_the_journal() -> list[str] | None:
    if not any(map(os.path.isdir, _JOURNALS)):
        return None
    command = ["journalctl", "--quiet", "--no-pager", "--output=cat", f"--since={_SINCE}"]
    command += ["_TRANSPORT=kernel", "+", "_TRANSPORT=audit"]
    said = output_of(*command)
    return None if said is None else said.splitlines()


def _of_the_audit_log(path: str) -> list[str] | None:
    """Return the last records of auditd, which keeps them out of the journal."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - _LATEST))
        return file.read().decode(errors="replace").splitlines()
    return None
