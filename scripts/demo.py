#!/usr/bin/python3
"""Show fdbroker at work: a real broker, real files of several users, a scanner who may open none of them.

    make demo        (as root, or: sudo make demo)

Everything happens in a mount namespace of its own: /etc is a copy, /home, /opt, /run and /var/log are empty
at first, all in memory. When the last process ends nothing is left.

Needs build/venv, which `make demo` makes, and nothing but the standard library itself.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import time
import zipfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

CHECKOUT = Path(__file__).resolve().parent.parent
INSIDE = "FDBROKER_DEMO_INSIDE"
PREFIX = Path("/opt/fdbroker")
PATH = f"{PREFIX}/bin:/usr/sbin:/usr/bin:/sbin:/bin"
AUDIT = "/var/log/fdbroker/audit.jsonl"
PIDFILE = "/run/fdbroker/fdbrokerd.pid"
# In two halves, or every scanner would find it here.
EICAR = b"X5O!P%@AP[4\\PZX54(P^)7CC)7}$" + b"EICAR-STANDARD-ANTIVIRUS-TEST-FILE!$H+H*"
PEOPLE = ("alice", "bob", "carol")
PATIENCE = 10.0

POLICY = f"""\
version: 1
roots:
  home: {{path: /home}}
rules:                                  # any matching deny wins; else any matching allow; else denied
  - name: never-keys
    deny: [open, stat, list]
    in: home
    paths: ["*/.ssh/**"]
  - name: scanner-sees-names
    allow: [list, stat]
    client: {{user: scanner}}
    in: home
    paths: ["**"]
  - name: scanner-reads-files-of-one-name
    allow: open
    client: {{user: scanner}}
    in: home
    paths: ["**"]
    where: {{links: {{max: 1}}}}
audit: {{to: {AUDIT}}}
"""


def main() -> int:
    """Set the stage in a new mount namespace, play, clean up; return the exit status."""
    if os.geteuid() != 0:
        sys.stderr.write("demo: it starts a broker, and so needs root: sudo make demo\n")
        return 2
    if INSIDE not in os.environ:
        unshare = ["unshare", "--mount", "--propagation", "private"]
        os.environ[INSIDE] = "1"
        os.execvp("unshare", [*unshare, sys.executable, "-I", str(Path(__file__).resolve())])
    os.umask(0o022)  # as where it is installed; whoever runs this may have another one
    began = time.monotonic()
    set_the_stage()
    os.chdir("/")
    try:
        play()
    finally:
        stop_broker()
    say(f"\nThat took {time.monotonic() - began:.1f} seconds. Nothing of it is left: it was all in memory.")
    return 0


# The stage


def set_the_stage() -> None:
    """Lay a file system in memory over what is written to, and install fdbroker there."""
    run("mount", "-t", "tmpfs", "-o", "mode=755", "demo", "/run")
    stage = Path("/run/.stage")
    for name, place in {"opt": "/opt", "home": "/home", "log": "/var/log", "etc": "/etc"}.items():
        (stage / name).mkdir(parents=True)
        if name == "etc":
            run("cp", "-a", "/etc/.", str(stage / name))
        if name == "opt":
            install(stage / name / "fdbroker")
        # Whatever the checkout is below, it is not needed after this.
        run("mount", "--bind", str(stage / name), place)
    add_users("fdbroker", "scanner", *PEOPLE)
    Path("/etc/fdbroker").mkdir()
    Path("/etc/fdbroker/policy.yaml").write_text(POLICY, "ascii")
    Path(AUDIT).parent.mkdir()
    lay_out()


def install(prefix: Path) -> None:
    """Install the package, and what it needs of build/venv, so that it is root's and readable for all."""
    site = next((CHECKOUT / "build/venv/lib").glob("python3*/site-packages"), None)
    if site is None:
        sys.exit("demo: build/venv is not there: make setup")
    # The interpreter that compiled packages were built for.
    python = os.path.realpath(CHECKOUT / "build/venv/bin/python")
    run(python, "-I", "-m", "venv", "--without-pip", str(prefix))
    target = next((prefix / "lib").glob("python3*/site-packages"))
    shutil.copytree(
        CHECKOUT / "src/fdbroker", target / "fdbroker", ignore=shutil.ignore_patterns("__pycache__")
    )
    found: dict[str, metadata.Distribution] = {}
    available = {canonical(d.metadata["Name"]): d for d in metadata.distributions(path=[str(site)])}
    requirements_of("fdbroker", {"daemon", "cli"}, available, found)
    for distribution in found.values():
        for file in distribution.files or ():
            source = site / file
            if source.is_file() and ".." not in file.parts and source.suffix != ".pyc":
                (target / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target / file)
    for command, module in {
        "fdbroker": "fdbroker.cli.__main__",
        "fdbrokerd": "fdbroker.launcher.command",
    }.items():
        script = prefix / "bin" / command
        script.write_text(
            f"#!{PREFIX}/bin/python -I\nimport sys\nfrom {module} import main\n\nsys.exit(main())\n"
        )
        script.chmod(0o755)
    # The checkout's files may be readable for their owner alone.
    run("chmod", "-R", "a+rX", str(prefix))
    run("chown", "-R", "0:0", str(prefix))


def requirements_of(
    name: str,
    extras: set[str],
    available: dict[str, metadata.Distribution],
    found: dict[str, metadata.Distribution],
) -> None:
    """Put into `found` the distribution `name` with all that it needs."""
    distribution = available.get(canonical(name))
    if distribution is None or canonical(name) in found:
        return
    found[canonical(name)] = distribution
    for requirement in distribution.requires or ():
        what, _, condition = requirement.partition(";")
        extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)", condition)
        if extra is None or extra[1] in extras:
            requirements_of(re.split(r"[\s\[<>=!~(]", what.strip())[0], set(), available, found)


def canonical(name: str) -> str:
    """Return the one spelling of a distribution's name."""
    return re.sub(r"[-_.]+", "-", name).lower()


def add_users(*names: str) -> None:
    """Add system users to the copy of /etc, and the groups that fdbroker uses."""
    taken = {int(line.split(":")[2]) for file in ("passwd", "group") for line in lines_of(f"/etc/{file}")}
    free = (number for number in range(60100, 65000) if number not in taken)
    known = {line.split(":")[0] for line in lines_of("/etc/passwd")} | {
        line.split(":")[0] for line in lines_of("/etc/group")
    }
    with open("/etc/passwd", "a") as passwd, open("/etc/group", "a") as group:
        for name in names:
            if name in known:
                sys.exit(f"demo: this system has a user {name} already, and the demo does not use it")
            number = next(free)
            passwd.write(f"{name}:x:{number}:{number}::/home/{name}:/bin/sh\n")
            group.write(f"{name}:x:{number}:\n")
        group.write(f"fdbroker-clients:x:{next(free)}:scanner\n")


def lines_of(path: str) -> list[str]:
    """Return the lines of a text file."""
    return Path(path).read_text("utf-8", "surrogateescape").splitlines()


def lay_out() -> None:
    """Make the homes: mode 0700, files 0600, each its owner's, with whatever names and kinds people have."""
    content = {
        "alice": {
            b"letters/to the bank.txt": b"Dear Sir or Madam\n" * 40,
            b"letters/caf\xe9 (latin-1).txt": b"a name that is not UTF-8\n",
            b".ssh/id_ed25519": b"-----BEGIN OPENSSH PRIVATE KEY-----\n",
        },
        "bob": {
            b"downloads/invoice.pdf.exe": EICAR,
            b"downloads/two\nlines": b"a name with a line break\n",
        },
        "carol": {b"photos/beach.raw": os.urandom(8 << 20)},
    }
    for person, files in content.items():
        home = Path("/home") / person
        for number in range(150):
            files[b"notes/%03d.txt" % number] = b"note %d of %s\n" % (number, person.encode()) * 100
        for name, data in files.items():
            path = os.fsencode(home) + b"/" + name
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "wb") as file:
                file.write(data)
    carol, bob = Path("/home/carol"), Path("/home/bob")
    with zipfile.ZipFile(carol / "notes.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(carol / "notes/000.txt", "000.txt")
    with tarfile.open(carol / "notes.tar.gz", "w:gz") as tar:
        tar.add(carol / "notes", "notes")
    # What a careless opener running as root would fall for.
    (bob / "not-a-shadow").symlink_to("/etc/shadow")
    os.link("/home/alice/.ssh/id_ed25519", bob / "notes/harmless.txt")
    os.mkfifo(bob / "fifo")
    with contextlib.suppress(PermissionError):  # in a container that may not
        os.mknod(bob / "disk", stat.S_IFBLK | 0o600, os.makedev(8, 0))
    for person in PEOPLE:
        run("chown", "-Rh", f"{person}:{person}", f"/home/{person}")
        run("chmod", "-R", "u=rwX,go=", f"/home/{person}")
        Path(f"/home/{person}").chmod(0o700)
    # Both names are alice's file.
    os.chown("/home/alice/.ssh/id_ed25519", *ids_of("alice"))


def ids_of(name: str) -> tuple[int, int]:
    """Return uid and gid of a user, from the copy of /etc/passwd."""
    for line in lines_of("/etc/passwd"):
        fields = line.split(":")
        if fields[0] == name:
            return int(fields[2]), int(fields[3])
    raise LookupError(name)


# The play


def play() -> None:
    """Run the commands and let their output speak."""
    heading("Three users keep their files to themselves")
    shell("root", "ls -ld /home/*; ls -lbA /home/alice/letters /home/bob | head -15")
    heading("The scanner has no right to any of them")
    shell("scanner", "cat /home/bob/downloads/invoice.pdf.exe", expect=1)
    heading("root writes down who may read what, and starts the broker")
    shell("root", "cat /etc/fdbroker/policy.yaml")
    shell("root", "fdbrokerd --daemon")
    shell(
        "root", f"grep -E '^(Name|Uid|Groups|Cap(Prm|Eff)|NoNewPrivs|Seccomp):' /proc/$(cat {PIDFILE})/status"
    )
    say("uid of fdbroker, one capability (CAP_DAC_READ_SEARCH), no new privileges, a system call filter.")
    heading("Now the scanner can read them, one open descriptor at a time, and nothing else")
    shell("scanner", "fdbroker scan /home", expect=2)
    say(
        "harmless.txt is a hard link to alice's private key: two names, so the rule does not give it away.\n"
        "Exit status 2: not everything could be read, and what was not read is never called clean.\n"
        "The link to /etc/shadow, the FIFO and the disk were never opened."
    )
    heading("Keys are refused, and the policy says why")
    shell("scanner", "fdbroker cat /home/alice/.ssh/id_ed25519", expect=1)
    shell("root", "fdbroker policy explain --as scanner /home/alice/.ssh/id_ed25519", expect=None)
    heading("Every decision is on record")
    shell("root", f"fdbroker audit --denied {AUDIT}", expect=None)
    shell("root", f"grep -m1 invoice {AUDIT}; grep id_ed25519 {AUDIT} | tail -1")
    heading("The end")
    shell("root", f"kill $(cat {PIDFILE})")


def shell(user: str, command: str, expect: int | None = 0) -> None:
    """Show a command and run it as `user`; end the demo if its status is not `expect` (None: any)."""
    prompt = "#" if user == "root" else "$"
    say(f"\n{bold(f'{user}{prompt} {command}')}")
    become: Sequence[str] = ()
    if user != "root":
        become = ("setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups", "--")
    environment = {"PATH": PATH, "LANG": "C.UTF-8"}
    environment |= {name: os.environ[name] for name in ("TERM", "NO_COLOR", "COLUMNS") if name in os.environ}
    status = subprocess.run(
        [*become, "/bin/sh", "-c", command], env=environment, stdin=subprocess.DEVNULL, check=False
    ).returncode
    if expect is not None and status != expect:
        sys.exit(f"demo: that ended with {status}, and {expect} was expected")


def stop_broker() -> None:
    """Stop the broker if it runs, and wait until it has gone."""
    try:
        pid = int(Path(PIDFILE).read_text("ascii"))
        process = os.pidfd_open(pid)
    except (OSError, ValueError):
        return
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(process, signal.SIGTERM)
    with contextlib.suppress(OSError):
        select.select([process], [], [], PATIENCE)
    os.close(process)


def heading(text: str) -> None:
    """Begin the next scene."""
    say(f"\n{bold('=== ' + text)}")


def say(text: str) -> None:
    """Write a line for people."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def bold(text: str) -> str:
    """Return the text as it stands out on a terminal."""
    return f"\x1b[1m{text}\x1b[0m" if sys.stdout.isatty() and "NO_COLOR" not in os.environ else text


def run(*command: str) -> None:
    """Run a command that has to succeed and says nothing then."""
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


if __name__ == "__main__":
    sys.exit(main())
