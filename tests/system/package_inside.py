"""Runs within a systemd of its own: the packages are installed, used, upgraded, removed and purged.

    python3 package_inside.py SHARED

SHARED has two directories of packages, `first` and `second`, which is the higher version. What was seen
is left there as JSON. `page` has the commands of a document, to be run where the packages are new. It
runs by the system's interpreter, as what it tests.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

CLIENT = "fdbroker-test-client"
TREE = Path("/srv/fdbroker-test")
POLICY = Path("/etc/fdbroker/policy.yaml")
AUDIT = Path("/var/log/fdbroker/audit.jsonl")
SOCKETS = ("seqpacket", "stream", "control")
ALLOWING = f"""\
version: 1
roots:
  test: {{path: {TREE}}}
rules:
  - name: all
    allow: [open, stat, walk]
    client: {{user: {CLIENT}}}
    in: test
    paths: ["**"]
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


def main(shared: Path) -> None:
    """Do it all and write what was seen."""
    # There is one where services are not to be started; here they are.
    Path("/usr/sbin/policy-rc.d").unlink(missing_ok=True)
    # An index of all manual pages of the machine is not what is tried here.
    Path("/var/lib/man-db/auto-update").unlink(missing_ok=True)
    subprocess.run(["useradd", "--system", CLIENT], check=True)
    TREE.mkdir(mode=0o700)
    (TREE / "file").write_text("content")
    seen: dict[str, Any] = {"files_before": _files()}
    first, second = (sorted(map(str, (shared / name).glob("*.deb"))) for name in ("first", "second"))

    apt = ["apt-get", "-y", "-q", "--no-install-recommends", "-o", "Dpkg::Options::=--force-unsafe-io"]
    seen["install"] = _step(*apt, "install", *first)
    subprocess.run(["usermod", "--append", "--groups", "fdbroker-clients", CLIENT], check=True)
    seen["installed"] = {
        "sockets": [_show(f"fdbroker-{name}.socket", "ActiveState", "UnitFileState") for name in SOCKETS],
        "others": [_show(f"fdbroker-{name}.socket", "ActiveState") for name in ("dgram", "clamd", "scan")],
        "service": _show("fdbroker.service", "ActiveState", "UnitFileState"),
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

    POLICY.write_text(ALLOWING)
    # The administrator's audit file, of which the package knows the directory alone.
    AUDIT.write_text("{}\n")
    # Another root: what the broker may reach at all it fixes when it starts.
    seen["restart"] = _status("systemctl", "restart", "fdbroker.service")
    seen["asked_then"] = _ask()
    # What versions of click and rich do differently.
    seen["walk"] = _status(*_become(), "fdbroker", "walk", str(TREE))
    seen["wrong_use"] = [
        _status("fdbroker", *words)[0] for words in ((), ("policy",), ("\x1b",), ("audit", "x"))
    ]

    before = _running()
    with _load() as load:
        seen["upgrade"] = _dpkg("--install", *second)
        after = _running()
    seen["load"] = load
    seen["upgraded"] = {"before": before, "after": after, "policy_is_ours": POLICY.read_text() == ALLOWING}
    seen["asked_after_upgrade"] = _ask()

    # A policy that is broken keeps the one that runs.
    POLICY.write_text("nonsense: 1\n")
    before = _running()
    seen["reinstall"] = _dpkg("--install", *(file for file in second if "/fdbroker_" in file))
    seen["broken"] = {"same": _running() == before, "asked": _ask()}
    POLICY.write_text(ALLOWING)

    seen["remove"] = _dpkg("--remove", "fdbroker", "fdbroker-scand")
    seen["removed"] = {
        "states": [_show(f"fdbroker-{name}.socket", "ActiveState") for name in SOCKETS],
        "service": _show("fdbroker.service", "ActiveState"),
        "kept": [
            POLICY.read_text() == ALLOWING,
            AUDIT.read_text(),
            Path("/etc/fdbroker/scand.yaml").exists(),
        ],
        "left": [path for path in ("/run/fdbroker", "/var/cache/fdbroker") if Path(path).exists()],
        "programs": Path("/usr/bin/fdbroker").exists(),
    }
    POLICY.unlink()
    seen["again"] = _dpkg("--install", *(file for file in second if "/fdbroker_" in file))
    seen["comes_back"] = POLICY.exists()
    seen["purge"] = _dpkg("--purge", "fdbroker", "fdbroker-scand", "python3-fdbroker")
    seen["files_after"] = _files()
    (shared / "seen").write_text(json.dumps(seen))


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


def _files() -> list[str]:
    """Return the names of all files that a package could leave, without what apt and dpkg keep of all."""
    places = ["/etc", "/usr", "/var", "/srv", "/run/fdbroker", "/var/cache/fdbroker"]
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
