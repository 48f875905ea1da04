"""Both programs under s6 or runit, in namespaces of their own: what came of what is done with them, as JSON.

    unshare --mount --pid --fork --kill-child --mount-proc python supervised.py s6|runit PACKAGES

Commands are those of docs/without-systemd.md, and the service directories those of packaging/, as they are.
/etc is a copy, and /run, /srv and /var/log are empty at first, all in memory. PACKAGES: directories of Python
packages, with a colon between them.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

CHECKOUT = Path(__file__).resolve().parents[2]
ALICE = "alice"
AUDIT, MESSAGES = Path("/var/log/fdbroker/audit"), Path("/var/log/fdbroker/messages/current")
POLICY = """\
version: 1
roots:
  srv: {path: /srv}
listeners:
  scan: {service: {user: fdbroker-scand}, type: seqpacket}
rules:
  - {name: alices, allow: open, client: {user: alice}, in: srv, paths: "*"}
  - name: scans
    allow: open
    client: {user: fdbroker-scand}
    on_behalf_of: {user: alice}
    in: srv
    paths: "*"
"""
# As long a record as there is: no byte of the path is a letter.
LONG = b"/srv/" + b"/".join([b"\xff" * 200] * 20)
PATIENCE = 60.0
_PROGRAMS = {
    "fdbrokerd": "fdbroker.launcher --dev",
    "fdbroker": "fdbroker.cli",
    "fdbroker-scand": "fdbroker.scan.service",
}


def run(*command: str | bytes, user: str | None = None) -> tuple[int, str]:
    """Run a command; return its status, and all that it wrote."""
    become = ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups"] if user else []
    done = subprocess.run(
        [*become, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, timeout=PATIENCE
    )
    return done.returncode, done.stdout.decode(errors="replace")


def wait_for(condition: Callable[[], Any], what: str) -> Any:  # noqa: ANN401 - whatever the condition gives
    """Ask until there is an answer."""
    end = time.monotonic() + PATIENCE
    pause = 0.02
    while True:
        found = condition()
        if found:
            return found
        if time.monotonic() > end:
            raise SystemExit(f"after {PATIENCE} s still not: {what}")
        time.sleep(pause)
        pause = min(1.3 * pause, 0.2)


def set_the_stage(packages: list[str]) -> None:
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755", "stage", "/run"], check=True)
    for place in ("/etc", "/srv", "/var/log"):
        stage = f"/run/.stage{place}"
        if place == "/etc":
            shutil.copytree("/etc", stage, symlinks=True)
        else:
            os.makedirs(stage)
        subprocess.run(["mount", "--bind", stage, place], check=True)
    modules, programs = Path("/run/modules"), Path("/run/programs")
    programs.mkdir()
    for package in packages:
        shutil.copytree(package, modules / Path(package).name)
    subprocess.run(["chmod", "-R", "a+rX", modules], check=True)
    for name, module in _PROGRAMS.items():
        python = f"PYTHONPATH={modules} exec {os.path.realpath(sys.executable)} -P"
        (programs / name).write_text(f'#!/bin/sh\n{python} -m {module} "$@"\n')
        (programs / name).chmod(0o755)
    os.environ["PATH"] = f"{programs}:/usr/sbin:/usr/bin:/sbin:/bin"
    [users, _] = documented("sh")
    do([*users, f"useradd --groups fdbroker-clients {ALICE}"])
    Path("/etc/fdbroker/policy.yaml").write_text(POLICY)
    Path("/srv/file").write_text("content\n")
    os.chmod("/srv/file", 0o600)


def documented(kind: str, section: str = "") -> list[list[str]]:
    """Return the commands of each block of a kind in the document, or in a section of it."""
    text = (CHECKOUT / "docs" / "without-systemd.md").read_text()
    if section:
        text = text.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    blocks = re.findall(rf"^```{kind}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [[line.removeprefix("# ") for line in block.splitlines()] for block in blocks]


def do(commands: list[str]) -> None:
    """Do what the document says, in the place where it says it."""
    for command in commands:
        status, said = run("sh", "-c", f"cd {CHECKOUT} && {command}")
        assert status == 0, (command, said)


class S6:
    """s6, asked by its own programs."""

    services = Path("/run/service")

    def start(self) -> None:
        self.services.mkdir()
        subprocess.Popen(["s6-svscan", self.services])
        wait_for((self.services / ".s6-svscan/control").exists, "s6-svscan")
        install, wait, *_ = documented("console", "s6")
        do(install)
        for name in ("fdbrokerd", "fdbroker-scand"):
            wait_for((self.services / name / "supervise/status").exists, f"s6 supervises {name}")
        do(wait)

    def reload(self) -> None:
        do(documented("console", "s6")[2])

    def stop(self) -> None:
        do(documented("console", "s6")[3])

    def pid(self, name: str) -> int:
        """Return the process, -1 where none is ready."""
        _, told = run("s6-svstat", "-o", "pid,ready", str(self.services / name))
        pid, ready = told.split()
        return int(pid) if ready == "true" else -1

    def fails_to_start(self, name: str) -> None:
        run("s6-svc", "-u", str(self.services / name))
        wait_for(MESSAGES.read_text, "why it did not start")
        asked = ("s6-svstat", "-o", "up,wantedup", str(self.services / name))
        wait_for(lambda: run(*asked)[1] == "false false\n", f"{name} stays down")


class Runit:
    """runit, likewise."""

    services = Path("/etc/service")

    def start(self) -> None:
        for directory in (self.services, Path("/etc/sv")):
            run("rm", "-rf", str(directory))  # what the machine has, or a link to it
            directory.mkdir()
        do(documented("console", "runit")[0])
        subprocess.Popen(["runsvdir", self.services])
        for name in ("fdbrokerd", "fdbroker-scand"):
            wait_for((self.services / name / "supervise/ok").exists, f"runit supervises {name}")
        self._start, *self._reload = documented("console", "runit")[1]
        do([self._start])

    def reload(self) -> None:
        do(self._reload)

    def stop(self) -> None:
        do(documented("console", "runit")[2])

    def pid(self, name: str) -> int:
        """Return the process, -1 where none is ready."""
        text = (self.services / name / "supervise/pid").read_text()
        check = self.services / name / "check"
        return int(text) if text and (not check.exists() or run(str(check))[0] == 0) else -1

    def fails_to_start(self, name: str) -> None:
        run("sv", "up", str(self.services / name))
        wait_for(MESSAGES.read_text, "why it did not start")
        # Neither "want up" nor "normally up" behind it, but how long, and that of the logger.
        asked = ("sv", "status", str(self.services / name))
        wait_for(lambda: re.match(r"down: [^;]*s, normally up;", run(*asked)[1]), f"{name} stays down")


def read_and_scan() -> dict[str, Any]:
    """Return what alice gets of the file, and what is said of it by the scan service, once it serves."""
    reads = run("fdbroker", "cat", "/srv/file", user=ALICE)
    scans = run("fdbroker", "scan", "--via", "scand", "/srv/file", user=ALICE)
    return {"reads": reads, "scans": scans}


def generation_2() -> bool:
    return bool(json.loads(run("fdbroker", "status", "--json")[1])["generation"] == 2)


def logger_of(services: Path) -> int:
    """Return the process that has the log of the broker."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            works_in = os.readlink(process / "cwd")
            if (process / "comm").read_text() in {"s6-log\n", "svlogd\n"} and works_in in {
                f"{services}/fdbrokerd/log",
                "/var/log/fdbroker",
            }:
                return int(process.name)
    return 0


def play(supervisor: S6 | Runit, results: dict[str, Any]) -> None:
    supervisor.start()
    results["first"] = read_and_scan()
    with open("/etc/fdbroker/policy.yaml", "a", encoding="ascii") as policy:
        policy.write("limits: {connections_per_uid: 65}\n")
    supervisor.reload()
    wait_for(generation_2, "the new policy")

    before = supervisor.pid("fdbrokerd")
    os.kill(before, signal.SIGKILL)
    wait_for(lambda: supervisor.pid("fdbrokerd") not in {before, -1}, "another broker")
    logger = logger_of(supervisor.services)
    os.kill(logger, signal.SIGKILL)
    results["long"] = run("fdbroker", "cat", LONG, user=ALICE)[0]
    results["after"] = read_and_scan()
    wait_for(lambda: logger_of(supervisor.services) not in {0, logger}, "another logger")

    supervisor.stop()
    results["stopped"] = run("fdbroker", "cat", "/srv/file", user=ALICE)
    wait_for(lambda: '"event":"stopped"' in (AUDIT / "current").read_text(), "the last record")
    # A logger that was killed leaves its file under a name of its own.
    files = [*sorted(AUDIT.glob("@*")), AUDIT / "current"]
    results["verified"] = run("fdbroker", "audit", "verify", "--json", *map(str, files))
    do(documented("sh")[1])
    results["records"] = [json.loads(line) for file in files for line in file.read_text().splitlines()]

    Path("/etc/fdbroker/policy.yaml").write_text("version: 2\n")
    supervisor.fails_to_start("fdbrokerd")
    results["messages"] = MESSAGES.read_text()
    results["scand says"] = Path("/var/log/fdbroker/scand/current").read_text()
    results["modes"] = [oct(path.stat().st_mode & 0o7777) for path in (AUDIT, MESSAGES.parent)]


def main() -> None:
    which, packages = sys.argv[1:]
    set_the_stage(packages.split(":"))
    results: dict[str, Any] = {}
    with open("/run/supervisor", "w", encoding="utf-8") as said:
        answers = os.dup(1)
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    try:
        play(S6() if which == "s6" else Runit(), results)
    except BaseException as error:  # noqa: BLE001 - shown with what there is
        results["error"] = repr(error)
    for path in ("/run/supervisor", str(MESSAGES), "/var/log/fdbroker/scand/current"):
        if os.path.exists(path):
            results[path] = Path(path).read_text(errors="replace")
    with open(answers, "w", encoding="utf-8") as output:
        json.dump(results, output)


if __name__ == "__main__":
    main()
