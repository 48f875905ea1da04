"""The scan service, where the policy has a listener for it: whether it answers, its engines and workers."""

from __future__ import annotations

import datetime as dt
import os
import pwd
import re
import socket
from typing import TYPE_CHECKING

import fdbroker
from fdbroker.cli.checks.check import MISSING, OK, WEAKER, Check
from fdbroker.config.names import group_name, printable
from fdbroker.sandbox import Confinement, Layer, SandboxError
from fdbroker.sandbox.machine import report_of
from fdbroker.scan.client import DEFAULT_SOCKET, ScanServiceError, ServiceTimeoutError, connect

if TYPE_CHECKING:
    from fdbroker.config import CompiledPolicy

CLAMD = "clamd"  # the listener for clients of ClamAV, by its usual name
_START = "systemctl start fdbroker-scand, or fdbroker-scand as its user (docs/scand.md); its log says more"
_CLAMAV = re.compile(r"ClamAV [^/]*/[^/]*/([^,]*)")
_OLD = 7  # days
_GREETED_WITHIN = 3.0  # seconds
_ANSWERED_WITHIN = 10.0


def scan_checks(compiled: CompiledPolicy | None) -> list[Check]:
    """Check it, and that its user may connect to the broker."""
    if compiled is None:
        return []
    listeners = compiled["daemon"]["listeners"]
    listener, for_clamav = listeners.get(os.path.basename(DEFAULT_SOCKET)), listeners.get(CLAMD)
    checks = _membership(compiled)
    if listener is not None:
        checks += _service(listener["path"])
    if for_clamav is not None:
        checks.append(_clamd(for_clamav["path"]))
    return [] if listener is for_clamav is None else [*checks, _workers()]


def _service(path: str) -> list[Check]:
    name, meaning = "scan service", "users have their files scanned: fdbroker scan"
    shown = printable(path)
    try:
        with connect(path, timeout=_ANSWERED_WITHIN, greeted_within=_GREETED_WITHIN) as service:
            status, version = service.status(), service.welcome.service
    except ServiceTimeoutError:
        found = f"{shown}: the broker keeps clients for it, and it does not take them: it does not run"
        return [Check(name, WEAKER, found, meaning, _START)]
    except ScanServiceError as error:
        return [Check(name, WEAKER, f"{shown}: {printable(str(error.strerror))}", meaning, _START)]
    engines = status.get("engines")
    rows = engines if isinstance(engines, list) else []
    # It has hostile files read, and may be anybody's by now.
    versions = [str(row.get("version")) for row in rows if isinstance(row, dict)]
    found = f"answers on {shown}, with {', '.join(map(printable, versions)) or 'no engine'}"
    checks = [Check(name, OK, found, meaning)]
    ours = f"fdbroker-scand {fdbroker.__version__}"
    if version != ours:
        found = f"is {printable(version)}; installed here is {ours}"
        cure = "systemctl restart fdbroker-scand"
        checks.append(Check("scan service version", WEAKER, found, "what was mended is mended in it", cure))
    days = max((age for version in versions if (age := days_of_database(version)) is not None), default=0)
    if days > _OLD:
        cure = "see that freshclam runs: systemctl status clamav-freshclam"
        found = f"of {days} days ago"
        checks.append(Check("scan databases", WEAKER, found, "it finds what is known by now", cure))
    if status.get("outdated"):
        found = "have changed, and could not be loaded anew"
        cure = "its log says why; then systemctl reload fdbroker-scand"
        checks.append(Check("scan databases", WEAKER, found, "it finds what the latest database knows", cure))
    return checks


def _clamd(path: str) -> Check:
    """Check that somebody answers clients of ClamAV. clamdscan has no time-out and waits for ever else."""
    name, meaning = "clamd listener", "clients of ClamAV have their files scanned"
    shown = printable(path)
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(_GREETED_WITHIN)
            sock.connect(path)
            sock.sendall(b"zPING\0")
            answers = sock.recv(5) == b"PONG\0"
    except TimeoutError:
        found = f"{shown}: clients wait, and the scan service does not take them: it does not run"
        return Check(name, WEAKER, found, meaning, _START)
    except OSError as error:
        return Check(name, WEAKER, f"{shown}: {error.strerror}", meaning, _START)
    if not answers:
        found = f"{shown}: whoever answers there does not as clamd does"
        return Check(name, WEAKER, found, meaning, "listeners in /etc/fdbroker/scand.yaml: protocol: clamd")
    return Check(name, OK, f"answers on {shown}", meaning)


def days_of_database(version: str) -> int | None:
    """Return how old the database is that ClamAV's version names; None: it names none."""
    found = _CLAMAV.match(version)
    if found is None:
        return None
    try:
        made = dt.datetime.strptime(found[1].strip(), "%a %b %d %H:%M:%S %Y").replace(tzinfo=dt.UTC)
    except ValueError:
        return None
    return (dt.datetime.now(dt.UTC) - made).days


def _membership(compiled: CompiledPolicy) -> list[Check]:
    """Check that the service's user may connect to the broker's socket, by the group that this has."""
    listener = compiled["daemon"]["listeners"].get("seqpacket")
    if listener is None or listener["gid"] is None or listener["mode"] & 0o002:
        return []
    gid = listener["gid"]
    group, meaning = group_name(gid), "the scan service can ask the broker for files"
    users = {
        user_id
        for service in compiled["services"]
        for client in service["clients"]
        for user_id in client.get("uids", [])
    }
    for uid in sorted(users):
        try:
            entry = pwd.getpwuid(uid)
        except KeyError:
            continue
        if uid and gid not in os.getgrouplist(entry.pw_name, entry.pw_gid):
            user = printable(entry.pw_name)
            cure = f"as root: usermod -aG {group} {user}; then restart the service"
            return [Check(f"group of {user}", WEAKER, f"{user} is not in the group {group}", meaning, cure)]
    return []


def _workers() -> Check:
    """Check by a worker that does nothing how far workers of the user that runs this are confined."""
    name, meaning = "scan workers", "who reads hostile files can do nothing with what it reads"
    cure = "see them, with what helps: fdbroker sandbox report"
    confinement = Confinement()
    try:
        report = report_of(confinement)
    except (SandboxError, OSError) as error:
        return Check(name, MISSING, f"none could be started: {printable(str(error))}", meaning, cure)
    lacking = [state.layer for state in report.states if not state.enforced and state.layer is not Layer.IDS]
    if lacking:
        strict = confinement.must_hold().intersection(lacking)
        found = f"lack {', '.join(layer.value for layer in lacking)}, as user {os.geteuid()}"
        return Check(name, MISSING if strict else WEAKER, found, meaning, cure)
    return Check(name, OK, "have every layer of confinement", meaning)
