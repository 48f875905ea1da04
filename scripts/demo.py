#!/usr/bin/python3
"""Show fdbroker at work: a real broker, real files of several users, a scanner who may open none of them.

    make demo        (as root, or: sudo make demo)

Everything happens in namespaces of its own. In the mount namespace /etc is a copy, and /home, /opt, /run and
/var/log are empty at first, all in memory. In the pid namespace the first process is this program, which the
kernel ends with whoever started it, and all others with it: nothing is left, however the demo ends.

Needs build/venv, which `make demo` makes, and nothing but the standard library itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import select
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import textwrap
import time
import zipfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

CHECKOUT = Path(__file__).resolve().parent.parent
PREFIX = Path("/opt/fdbroker")
PATH = f"{PREFIX}/bin:/usr/sbin:/usr/bin:/sbin:/bin"
AUDIT = "/var/log/fdbroker/audit.jsonl"
PIDFILE = "/run/fdbroker/fdbrokerd.pid"
# In two halves, or every scanner would find it here.
EICAR = b"X5O!P%@AP[4\\PZX54(P^)7CC)7}$" + b"EICAR-STANDARD-ANTIVIRUS-TEST-FILE!$H+H*"
PDF = b"""\
%PDF-1.1
1 0 obj <</Type /Catalog /Pages 2 0 R>> endobj
2 0 obj <</Type /Pages /Kids [3 0 R] /Count 1>> endobj
3 0 obj <</Type /Page /Parent 2 0 R /MediaBox [0 0 200 200]>> endobj
trailer <</Root 1 0 R>>
%%EOF
"""
# A database of ClamAV with one entry: `digest:size:name`, of the test file.
DATABASE = "/etc/fdbroker/clamav"
SIGNATURE = "44d88612fea8a8f36de82e1278abb02f:68:Eicar-Test-Signature\n"
PEOPLE = ("alice", "bob", "carol")
PATIENCE = 5.0  # for the broker to end, which takes it some milliseconds
# From <sched.h> and <sys/prctl.h>: Python has no names for them before 3.12.
CLONE_NEWNS = 0x0002_0000
CLONE_NEWPID = 0x2000_0000
PR_SET_PDEATHSIG = 1

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
    """Set the stage in new namespaces, play, wait for all to end; return the exit status."""
    if os.geteuid() != 0:
        sys.stderr.write("demo: it starts a broker, and so needs root: sudo make demo\n")
        return 2
    began = time.monotonic()
    try:
        first = fork_into_new_namespaces()
    except PermissionError as error:
        sys.stderr.write(
            f"demo: {error}: this root may make no namespaces, which a broker needs as well;"
            " use a virtual machine, or a container that may (docker run --privileged)\n"
        )
        return 2
    if first == 0:
        os.umask(0o022)  # as where it is installed; whoever runs this may have another one
        set_the_stage()
        os.chdir("/")
        play()
        wait_for_all_others()
        return 0
    status = wait_for(first)
    if status == 0:
        seconds = time.monotonic() - began
        tell(f"""
            That took {seconds:.1f} seconds. All processes of the demo have ended, and its files and users,
            which were in memory, are gone: nothing is left.
            """)
    return status


# Namespaces: whatever happens, nothing outlives this program


def fork_into_new_namespaces() -> int:
    """Fork as os.fork() does; the child is process 1 of a pid namespace and has mounts and /proc of its own.

    The kernel kills the child when this process ends, and with process 1 all
    that are in its namespace, also a daemon that has left its session.
    """
    ourselves = os.pidfd_open(os.getpid())
    system_call("unshare", CLONE_NEWPID)
    child = os.fork()
    if child == 0:
        system_call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL)
        if is_readable(ourselves):
            sys.exit("demo: whoever started it has ended")  # before the kernel was asked to tell
        os.setsid()  # signals of the terminal are for the parent alone, which then ends everything
        system_call("unshare", CLONE_NEWNS)
        run("mount", "--make-rprivate", "/")
        run("mount", "-t", "proc", "-o", "nosuid,nodev,noexec", "proc", "/proc")
    os.close(ourselves)
    return child


def wait_for(first: int) -> int:
    """Wait until process 1 of the namespace has ended, so all that are in it; return its exit status.

    A signal that asks this process to end ends them first, and then this process.
    """
    process = os.pidfd_open(first)
    asked: list[int] = []

    def stop(number: int, _frame: object) -> None:
        asked.append(number)
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(process, signal.SIGKILL)

    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, stop)
    _, status = os.waitpid(first, 0)
    if asked:
        signal.signal(asked[0], signal.SIG_DFL)
        os.kill(os.getpid(), asked[0])
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def wait_for_all_others() -> None:
    """Wait until this process is alone in its pid namespace: whatever lost its parent is its child."""
    end = time.monotonic() + PATIENCE
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    with contextlib.suppress(ChildProcessError):  # there are none
        while True:
            pid, _ = os.waitpid(-1, os.WNOHANG)
            if pid == 0 and signal.sigtimedwait({signal.SIGCHLD}, max(0.0, end - time.monotonic())) is None:
                sys.exit(
                    f"demo: the broker still runs {PATIENCE} s after it was told to end; it is killed now"
                )


def system_call(name: str, *arguments: int) -> None:
    """Call a function of the C library that takes numbers and returns -1 if it fails."""
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*map(ctypes.c_ulong, arguments)) == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def is_readable(descriptor: int) -> bool:
    """Return whether there is something to read; of a process: whether it has ended."""
    return bool(select.select([descriptor], [], [], 0)[0])


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
    Path(DATABASE).mkdir()
    Path(DATABASE, "demo.hdb").write_text(SIGNATURE, "ascii")
    lay_out()


def has_libclamav() -> bool:
    """Return whether ClamAV's library is installed."""
    try:
        ctypes.CDLL("libclamav.so.12")
    except OSError:
        return False
    return True


def install(prefix: Path) -> None:
    """Install the package, and what it needs of build/venv, so that it is root's and readable for all."""
    site = next((CHECKOUT / "build/venv/lib").glob("python3*/site-packages"), None)
    if site is None:
        sys.exit("demo: build/venv is not there: make setup")
    # The interpreter that compiled packages were built for.
    python = os.path.realpath(CHECKOUT / "build/venv/bin/python")
    run(python, "-I", "-m", "venv", "--without-pip", str(prefix))
    target = next((prefix / "lib").glob("python3*/site-packages"))
    # With their times, and so with what is compiled of them: most commands run as who could not keep that.
    # Bytecode that somebody writes just now has another name, and may be gone.
    being_written = shutil.ignore_patterns("*.pyc.*")
    shutil.copytree(CHECKOUT / "src/fdbroker", target / "fdbroker", ignore=being_written)
    found: dict[str, metadata.Distribution] = {}
    available = {canonical(d.metadata["Name"]): d for d in metadata.distributions(path=[str(site)])}
    requirements_of("fdbroker", {"daemon", "cli"}, available, found)
    for distribution in found.values():
        for file in distribution.files or ():
            source = site / file
            if source.is_file() and ".." not in file.parts:
                (target / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target / file)
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
            b"letters/contract.pdf": PDF,
            b".ssh/id_ed25519": b"-----BEGIN OPENSSH PRIVATE KEY-----\n",
        },
        "bob": {
            b"downloads/invoice.pdf.exe": EICAR,
            b"downloads/two\nlines": b"a name with a line break\n",
        },
        "carol": {b"photos/beach.raw": os.urandom(8 << 20)}
        | {b"notes/%03d.txt" % number: b"note %d\n" % number * 100 for number in range(450)},
    }
    for person, files in content.items():
        for name, data in files.items():
            path = b"/home/%s/%s" % (person.encode(), name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "wb") as file:
                file.write(data)
    carol, bob = Path("/home/carol"), Path("/home/bob")
    with zipfile.ZipFile(carol / "notes.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(carol / "notes/000.txt", "000.txt")
    with tarfile.open(carol / "notes.tar.gz", "w:gz") as tar:
        tar.add(carol / "notes", "notes")
    # What a careless opener running as root would fall for.
    (bob / "passwords").symlink_to("/etc/shadow")
    os.link("/home/alice/.ssh/id_ed25519", bob / "harmless.txt")
    os.mkfifo(bob / "fifo")
    with contextlib.suppress(PermissionError):  # in a container that may not
        os.mknod(bob / "disk", stat.S_IFBLK | 0o600, os.makedev(8, 0))
    for person in PEOPLE:
        run("chown", "-Rh", f"{person}:{person}", f"/home/{person}")
        run("chmod", "-R", "u=rwX,go=", f"/home/{person}")
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
    """Run the commands and let their output speak, with a few words between for who has not heard of it."""
    tell("""
        fdbroker lets a program read files that it has no right to open, without making it root.

        Alice, bob and carol keep their files to themselves, and a virus scanner has to read them.
        Usually it would run as root; then a hostile file that makes use of a bug in the scanner gets
        the whole machine. Here the scanner runs as a user who may open none of the files. A small
        service, the broker, opens them for it: those that the policy allows, which is written by root.

        The programs, users and files below are real, and exist in memory only, until the end. Your own
        are not touched. root# or scanner$ before a command is the user who runs it.
        """)
    heading("1. Three users keep their files to themselves")
    shell("root", "ls -ld /home/*; ls -lbAR /home/alice/letters /home/bob; ls -l /home/carol")
    tell("Directories are drwx------ and files -rw-------: for their owner alone.")
    heading("2. The user scanner may read none of them")
    shell(
        "scanner",
        "cat /home/alice/letters/contract.pdf /home/bob/downloads/invoice.pdf.exe /home/carol/notes.zip",
        expect=1,
    )
    heading("3. root writes down who may read what, and starts the broker")
    shell("root", "cat /etc/fdbroker/policy.yaml")
    tell("""
        So: what is in .ssh is for nobody. The scanner may see all other names, and read all other files
        that have one name only. Nobody else may do anything.
        """)
    shell("root", "fdbrokerd --daemon")
    shell(
        "root", f"grep -E '^(Uid|Groups|Cap(Prm|Eff|Bnd)|NoNewPrivs|Seccomp):' /proc/$(cat {PIDFILE})/status"
    )
    tell("""
        This is what the kernel says of the broker. It is not root, but a user of its own (Uid). Of
        root's rights it has one, to read any file (Cap: the bit of CAP_DAC_READ_SEARCH), and it can't
        get another one (NoNewPrivs). A filter in the kernel (Seccomp) allows the few system calls that
        it needs: it can't start a program, make a connection or open a file for writing.
        """)
    heading("4. The scanner scans all files, through the broker")
    if has_libclamav():
        engine = f" --engine libclamav:database={DATABASE}"
        tell("""
            ClamAV's library is installed, so it is the engine. To be quick it has a database of one
            signature, that of the EICAR test file.
            """)
    else:
        engine = ""
        tell("""
            ClamAV's library is not installed, so the built-in engine `hashes` scans: it knows the EICAR
            test file by its digest.
            """)
    shell("scanner", f"fdbroker scan{engine} /home", expect=2)
    tell("""
        For each file the scanner sends the path to the broker. The broker asks the kernel who is asking,
        and the policy whether this user may read this file. If so, it opens the file and passes it on,
        open for reading.

        invoice.pdf.exe is the EICAR test file: harmless, and made for trying scanners out.
        harmless.txt is a second name (a hard link) of alice's private key. The policy gives the scanner
        only files that have one name, so this way to the key is closed too.
        It counts as an error, and the exit status is 2: what was not read is never called clean.
        """)
    heading("5. A closer look at two of the users, and at the process that reads the files")
    shell("scanner", f"fdbroker scan --verbose{engine} /home/alice /home/bob", expect=2)
    tell("""
        The scanner has the files read by a second process, the worker. It runs as the user scanner too,
        and can do nothing but read the open files that it is handed, and answer. The lines above with
        "worker:" say how it was locked in. (ids: only root could have given it another user, so it
        stays scanner.) If a hostile file takes it over, it can open nothing, start nothing, and reach
        nobody but the scanner.

        A link to /etc/shadow, a FIFO and a device are no ordinary files: nobody opens them.
        """)
    heading("6. A key is refused, and the policy says why")
    shell("scanner", "fdbroker cat /home/alice/.ssh/id_ed25519", expect=1)
    shell("root", "fdbroker policy explain --as scanner /home/alice/.ssh/id_ed25519", expect=1)
    heading("7. Every decision is on record")
    shell("root", f"fdbroker audit --path '/home/*/downloads/*' {AUDIT}")
    shell("root", f"fdbroker audit --denied {AUDIT}")
    tell("""
        where_links: the file has more names than the rule wants. deny_rule: a rule forbids it.
        The record itself has a line of JSON for each decision. A file that was given, and the key:
        """)
    shell("root", f"grep -m1 invoice {AUDIT}; grep id_ed25519 {AUDIT} | tail -1")
    heading("8. The end")
    shell("root", f"kill $(cat {PIDFILE})")
    tell("""
        The scanner has read files that it had no right to open, and found the bad one. It was safe:
        the worker, which reads hostile files, can't open any; the broker, which can open files, never
        looks into them; and root's policy decides about each one, on record.
        """)


def tell(text: str) -> None:
    """Write a paragraph between the commands."""
    say("\n" + textwrap.dedent(text).strip())


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
        [*become, "/bin/sh", "-c", command],
        env=environment,
        stdin=subprocess.DEVNULL,
        stderr=sys.stdout,  # a refusal is part of what is shown, also in a file
        check=False,
    ).returncode
    if expect is not None and status != expect:
        sys.exit(f"demo: that ended with {status}, and {expect} was expected")


def heading(text: str) -> None:
    """Begin the next scene."""
    say(f"\n{bold('=== ' + text)}")


def say(text: str) -> None:
    """Write a line for people."""
    try:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    except BrokenPipeError:  # as in: make demo | head
        os._exit(128 + signal.SIGPIPE)


def bold(text: str) -> str:
    """Return the text as it stands out on a terminal."""
    return f"\x1b[1m{text}\x1b[0m" if sys.stdout.isatty() and "NO_COLOR" not in os.environ else text


def run(*command: str) -> None:
    """Run a command that has to succeed and says nothing then."""
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


if __name__ == "__main__":
    sys.exit(main())
