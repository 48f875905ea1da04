"""Runs within a systemd of its own: the packages are installed, used, upgraded, removed and purged.

    python3 package_inside.py SHARED

SHARED has two directories of packages, `first` and `second`, which is the higher version. What was seen
is left there as JSON. `page` has the commands of a document, to be run where the packages are new. It
runs by the system's interpreter, as what it tests.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

CLIENT = "fdbroker-test-client"
TREE = Path("/srv/fdbroker-test")
# Which its owner can reach: clamdscan looks whether there is such a file.
SCANNED = Path("/srv/fdbroker-test-scanned")
DATABASE = Path("/srv/fdbroker-test-database")
POLICY = Path("/etc/fdbroker/policy.yaml")
SCAND = Path("/etc/fdbroker/scand.yaml")
AUDIT = Path("/var/log/fdbroker/audit.jsonl")
SOCKETS = ("seqpacket", "stream", "control")
SCANNING = ("fdbroker-scan.socket", "fdbroker-clamd.socket", "fdbroker-scand.service")
# What libclamav alone finds, by a signature of its own.
MARKER = "fdbroker-test-" + "marker-77aa"
ALLOWING = f"""\
version: 1
roots:
  test: {{path: {TREE}}}
  scanned: {{path: {SCANNED}}}
rules:
  - name: all
    allow: [open, stat, walk]
    client: {{user: {CLIENT}}}
    in: test
    paths: ["**"]
  - name: own-files
    allow: [open, walk]
    client: {{user: fdbroker-scand}}
    on_behalf_of: any
    in: scanned
    paths: ["**"]
    where: {{owner: on_behalf_of}}
listeners:
  scan: {{service: {{user: fdbroker-scand}}, type: seqpacket}}
  clamd: {{service: {{user: fdbroker-scand}}}}
"""
ENGINES = f"""\
version: 1
engines:
  hashes: {{}}
  libclamav: {{database: {DATABASE}}}
listeners:
  scan: {{protocol: scan}}
  clamd: {{protocol: clamd}}
"""
# One call, told as what came of it.
ASK = """\
import sys, fdbroker
try:
    with fdbroker.connect(timeout=20) as client, client.open(sys.argv[1]) as file:
        print(file.read().decode())
except OSError as error:
    print(type(error).__name__)
"""
# Calls until standard input ends, one client for all of them: how many, the errors, and the longest one.
LOAD = """\
import json, select, sys, time, fdbroker
calls, errors, longest = 0, [], 0.0
with fdbroker.connect(timeout=20) as client:
    print("ready", flush=True)
    while not select.select([sys.stdin], [], [], 0)[0]:
        began = time.monotonic()
        try:
            with client.open(sys.argv[1]) as file:
                assert file.read() == b"content"
        except Exception as error:
            errors.append(repr(error))
        calls += 1
        longest = max(longest, time.monotonic() - began)
print(json.dumps([calls, errors, longest]))
"""
# The same for who has files scanned, in turn the marked one and the other: what was said of each and how
# often, and the longest time without an answer. A connection that ends is made anew.
SCANS = """\
import collections, json, os, select, socket, subprocess, sys, time
from fdbroker.scan.client import connect
how, configuration, *paths = sys.argv[1:]

def by_connections(path):
    with connect("/run/fdbroker/scan", timeout=60) as service:
        return service.scan_path(os.fsencode(path)).verdict.verdict

def by_clamdscan(path):
    command = ["clamdscan", "--no-summary", "--config-file", configuration, path]
    return {0: "clean", 1: "infected"}.get(subprocess.run(command, capture_output=True).returncode, "error")

session = None
def in_a_session(path):
    global session
    if session is None:
        session = socket.socket(socket.AF_UNIX)
        session.settimeout(60)
        session.connect("/run/fdbroker/clamd")
        session.sendall(b"zIDSESSION\\0")
    try:
        session.sendall(b"zSCAN " + os.fsencode(path) + b"\\0")
        reply = b""
        while not reply.endswith(b"\\0"):
            more = session.recv(4096)
            if not more:
                raise ConnectionResetError
            reply += more
    except ConnectionError:
        session.close()
        session = None
        raise
    said = {b"FOUND\\0": "infected", b"OK\\0": "clean"}.get(reply.rpartition(b" ")[2], "error")
    if said == "error":
        session.close()
        session = None
    return said

ask = {"connections": by_connections, "clamdscan": by_clamdscan, "session": in_a_session}[how]
seen, longest, number, answered = collections.Counter(), 0.0, 0, time.monotonic()
while True:
    try:
        said = ask(paths[number % 2])
    except ConnectionError as error:
        said = "ended: " + str(getattr(error, "reason", ""))
    else:
        longest = max(longest, time.monotonic() - answered)
        answered = time.monotonic()
    seen[("marked: ", "clean: ")[number % 2] + said] += 1
    number += 1
    if number == 2:
        print("ready", flush=True)
    if select.select([sys.stdin], [], [], 0)[0]:
        break
print(json.dumps([seen, longest]))
"""


def main(shared: Path) -> None:
    """Do it all and write what was seen."""
    # There is one where services are not to be started; here they are.
    Path("/usr/sbin/policy-rc.d").unlink(missing_ok=True)
    # An index of all manual pages of the machine is not what is tried here.
    Path("/var/lib/man-db/auto-update").unlink(missing_ok=True)
    subprocess.run(["useradd", "--system", CLIENT], check=True)
    TREE.mkdir(mode=0o700)
    (TREE / "file").write_text("content")
    _make_files_to_scan()
    seen: dict[str, Any] = {"files_before": _files()}
    first, second = (sorted(map(str, (shared / name).glob("*.deb"))) for name in ("first", "second"))

    apt = ["apt-get", "-y", "-q", "--no-install-recommends", "-o", "Dpkg::Options::=--force-unsafe-io"]
    seen["install"] = _step(*apt, "install", *first)
    subprocess.run(["usermod", "--append", "--groups", "fdbroker-clients", CLIENT], check=True)
    seen["installed"] = {
        "sockets": [_show(f"fdbroker-{name}.socket", "ActiveState", "UnitFileState") for name in SOCKETS],
        "others": [_show(f"fdbroker-{name}.socket", "ActiveState") for name in ("dgram", "clamd", "scan")],
        "service": _show("fdbroker.service", "ActiveState", "UnitFileState"),
        "scanning": [_show(unit, "ActiveState", "UnitFileState") for unit in SCANNING],
        "policy": POLICY.read_text(),
        "checks": [_status("fdbroker", "policy", "check"), _status("fdbroker-scand", "--check")],
        "compiled": len(list(Path("/var/cache/fdbroker/code").iterdir())),
        "manual": [_status("man", "-w", page) for page in ("fdbroker", "fdbrokerd", "fdbroker-policy.yaml")],
    }
    seen["asked_first"] = _ask()

    seen["page"] = [_step("bash", "-c", command) for command in json.loads((shared / "page").read_text())]
    seen["as_before"] = {
        "policy": POLICY.read_text(),
        "sockets": [_show(f"fdbroker-{name}.socket", "ActiveState") for name in SOCKETS],
    }

    # As distributions try it.
    seen["tried"] = {name: _try(name) for name in ("broker", "scan-service", "client-library")}

    POLICY.write_text(ALLOWING)
    SCAND.write_text(ENGINES)
    # The administrator's audit file, of which the package knows the directory alone.
    AUDIT.write_text("{}\n")
    # Another root: what the broker may reach at all it fixes when it starts.
    seen["restart"] = _status("systemctl", "restart", "fdbroker.service")
    seen["asked_then"] = _ask()
    seen["scanning"] = [
        _status("systemctl", "enable", *SCANNING),
        _status("systemctl", "stop", "fdbroker.service"),
        _status("systemctl", "start", *SCANNING),
    ]
    seen["scanned"] = _scan()
    # What versions of click and rich do differently.
    seen["walk"] = _status(*_become(), "fdbroker", "walk", str(TREE))
    seen["wrong_use"] = [
        _status("fdbroker", *words)[0] for words in ((), ("policy",), ("\x1b",), ("audit", "x"))
    ]

    seen |= _upgrade(second)

    seen["remove"] = _dpkg("--remove", "fdbroker", "fdbroker-scand")
    seen["removed"] = {
        "states": [_show(f"fdbroker-{name}.socket", "ActiveState") for name in SOCKETS],
        "service": _show("fdbroker.service", "ActiveState"),
        "scanning": [_show(unit, "ActiveState") for unit in SCANNING],
        "kept": [
            POLICY.read_text() == ALLOWING,
            AUDIT.read_text(),
            SCAND.exists(),
        ],
        "left": [path for path in ("/run/fdbroker", "/var/cache/fdbroker") if Path(path).exists()],
        "programs": Path("/usr/bin/fdbroker").exists(),
    }
    POLICY.unlink()
    seen["again"] = _dpkg("--install", *(file for file in second if "/fdbroker_" in file))
    seen["comes_back"] = POLICY.exists()
    seen["purge"] = _dpkg("--purge", "fdbroker", "fdbroker-scand", "python3-fdbroker")
    seen["files_after"] = _files()
    seen["ours"] = [sorted(path.name for path in place.iterdir()) for place in (TREE, SCANNED, DATABASE)]
    seen["users"] = [
        [
            line.split(":")
            for line in Path("/etc", name).read_text().splitlines()
            if line.startswith("fdbroker")
        ]
        for name in ("passwd", "group")
    ]
    (shared / "seen").write_text(json.dumps(seen))


def _upgrade(second: list[str]) -> dict[str, Any]:
    """Upgrade under load, then once more while policy and configuration are broken; return what was seen."""
    seen: dict[str, Any] = {}
    before, scanner = _running(), _main_process("fdbroker-scand.service")
    with _load() as load, _scans() as scans:
        seen["upgrade"] = _dpkg("--install", *second)
        after = _running()
    seen["load"], seen["scans"] = load, scans
    seen["upgraded"] = {"before": before, "after": after, "policy_is_ours": POLICY.read_text() == ALLOWING}
    seen["scanner"] = {
        "another": _main_process("fdbroker-scand.service") not in {scanner, "0"},
        "state": [_show(unit, "ActiveState", "UnitFileState") for unit in SCANNING],
        "configuration_is_ours": SCAND.read_text() == ENGINES,
        "scanned": _scan(),
    }
    seen["asked_after_upgrade"] = _ask()

    # A policy that is broken keeps the one that runs.
    POLICY.write_text("nonsense: 1\n")
    before = _running()
    seen["reinstall"] = _dpkg("--install", *(file for file in second if "/fdbroker_" in file))
    seen["broken"] = {"same": _running() == before, "asked": _ask()}
    POLICY.write_text(ALLOWING)
    # Likewise a service that could not start again.
    SCAND.write_text("nonsense: 1\n")
    scanner = _main_process("fdbroker-scand.service")
    seen["reinstall_scand"] = _dpkg("--install", *(file for file in second if "/fdbroker-scand_" in file))
    seen["broken_scand"] = {
        "same": _main_process("fdbroker-scand.service") == scanner,
        "scanned": _scan(),
    }
    return seen


def _make_files_to_scan() -> None:
    """Make two files of the client, of which one is infected, and the signature that tells."""
    SCANNED.mkdir(mode=0o755)
    DATABASE.mkdir(mode=0o755)
    (DATABASE / "test.ndb").write_text(f"Test-Marker:0:*:{MARKER.encode().hex()}\n")
    for name, content in (("marked", MARKER), ("clean", "nothing bad")):
        file = SCANNED / name
        file.write_text(content)
        file.chmod(0o600)
        shutil.chown(file, CLIENT)
    Path("/run/clamd.conf").write_text("LocalSocket /run/fdbroker/clamd\n")


def _try(name: str) -> list[Any]:
    """Run one of the tests that the packages bring for distributions."""
    with tempfile.TemporaryDirectory() as directory:
        program = Path(__file__).resolve().parents[2] / "packaging" / "debian" / "tests" / name
        return _step("env", f"AUTOPKGTEST_TMP={directory}", str(program))


def _dpkg(*arguments: str) -> list[Any]:
    return _step("dpkg", "--force-unsafe-io", *arguments)


def _step(*command: str) -> list[Any]:
    done = subprocess.run(
        command,
        env={**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    return [done.returncode, done.stdout + done.stderr]


def _status(*command: str) -> list[Any]:
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    return [done.returncode, done.stderr]


def _show(unit: str, *names: str) -> list[str]:
    options = [f"--property={name}" for name in names]
    done = subprocess.run(
        ["systemctl", "show", "--value", *options, unit], check=True, capture_output=True, text=True
    )
    return done.stdout.split()


def _running() -> list[Any]:
    """Return the broker's process, and since when each socket listens."""
    since = [_show(f"fdbroker-{name}.socket", "ActiveEnterTimestampMonotonic") for name in SOCKETS]
    return [_show("fdbroker.service", "MainPID", "ActiveState"), since]


def _main_process(unit: str) -> str:
    return _show(unit, "MainPID")[0]


def _become() -> list[str]:
    return ["setpriv", f"--reuid={CLIENT}", f"--regid={CLIENT}", "--init-groups"]


def _client(program: str) -> list[str]:
    return [*_become(), "/usr/bin/python3", "-I", "-c", program, str(TREE / "file")]


def _ask() -> str:
    return subprocess.run(_client(ASK), capture_output=True, encoding="utf-8", check=True).stdout.strip()


@contextmanager
def _load() -> Iterator[list[Any]]:
    """Have two clients call while the body runs; give a list to which is added what each saw."""
    seen: list[Any] = []
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    clients = [subprocess.Popen(_client(LOAD), **pipes) for _ in range(2)]  # type: ignore[call-overload]
    for client in clients:
        assert client.stdout.readline() == b"ready\n"
    yield seen
    seen += [json.loads(client.communicate()[0] or "null") for client in clients]


def _scan() -> str:
    """Return what the service says of the infected file, with the engines that it has."""
    command = [*_become(), "fdbroker", "scan", "--via", "scand", str(SCANNED / "marked")]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    return done.stdout + done.stderr


@contextmanager
def _scans() -> Iterator[dict[str, Any]]:
    """Have files scanned in three ways while the body runs; give a dictionary for what came of each."""
    seen: dict[str, Any] = {}
    words = [*_become(), "/usr/bin/python3", "-I", "-c", SCANS]
    files = [str(SCANNED / "marked"), str(SCANNED / "clean")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    clients = {
        how: subprocess.Popen([*words, how, "/run/clamd.conf", *files], **pipes)  # type: ignore[call-overload]
        for how in ("connections", "clamdscan", "session")
    }
    for client in clients.values():
        assert client.stdout.readline() == b"ready\n"
    yield seen
    seen.update({how: json.loads(client.communicate()[0] or "null") for how, client in clients.items()})


def _files() -> list[str]:
    """Return the names of all files that a package could leave, without what apt and dpkg keep of all."""
    # /etc/systemd/system is a file system of its own here.
    places = ["/etc", "/etc/systemd/system", "/usr", "/var", "/srv", "/run/fdbroker", "/var/cache/fdbroker"]
    # And what runs besides.
    pruned = (
        "/usr/local",
        "/var/cache",
        "/var/lib/PackageKit",
        "/var/lib/apt",
        "/var/lib/dpkg",
        "/var/lib/systemd/linger",
        "/var/log/journal",
        "/var/tmp",
    )
    pruning = [word for place in pruned for word in ("-path", place, "-prune", "-o")]
    done = subprocess.run(
        ["find", *places, "-xdev", *pruning, "-print"], capture_output=True, encoding="utf-8", check=False
    )
    return sorted(done.stdout.splitlines())


main(Path(sys.argv[1]))
