"""What `doctor` looks at: each function tries one thing and says what it found, what it means, what helps.

Where the kernel is asked to confine a process, a child does it and ends: what
was tried is what the broker will do, and not what a version number promises.
"""

from __future__ import annotations

import errno
import grp
import importlib.util
import json
import os
import pwd
import socket
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import fdbroker
from fdbroker import client
from fdbroker.broker.generation import problem_with_identity
from fdbroker.broker.identity import gives_labels, probe_level
from fdbroker.cli.broker import obstacle
from fdbroker.cli.policy_file import changes_for_restart
from fdbroker.client import BrokerError, control
from fdbroker.config.names import counted, group_name, printable, user_name
from fdbroker.kernel import bpf, landlock, namespaces, process, seccomp, sockets
from fdbroker.kernel.errors import SyscallError
from fdbroker.kernel.files import open_path_beneath
from fdbroker.launcher.mounts import ReadOnlyViewError, enter_read_only_view
from fdbroker.launcher.start import find_cgroup2
from fdbroker.wire.client import for_broker

if TYPE_CHECKING:
    from collections.abc import Callable

    from fdbroker.config import CompiledPolicy

OK, WEAKER, BROKEN, MISSING = "ok", "weaker", "broken", "missing"
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_MODULES_OF_DAEMON = {
    "yaml": "PyYAML",
    "msgspec": "msgspec",
    "daemon": "python-daemon",
    "systemd": "systemd-python",
}


class Check(NamedTuple):
    """One answer. `cure` is empty if OK.

    `state` WEAKER: it works, with less protection or convenience. BROKEN: it is there, and wrong.
    """

    name: str
    state: str
    found: str
    meaning: str
    cure: str = ""


class Places(NamedTuple):
    """Where to look. `control` None: nobody said which is that of this broker."""

    socket: str
    control: str | None
    policy: str


def all_checks(places: Places) -> list[Check]:
    """Try everything, in the order in which a broker would meet it."""
    policy, compiled = _policy_file(places.policy)
    broker = _broker(places, compiled)
    return [
        *_kernel(),
        *_accounts(compiled, otherwise=WEAKER if broker[0].state == OK else MISSING),
        _modules(),
        _program(),
        _directory(os.path.dirname(places.socket)),
        policy,
        *_needs(compiled),
        *broker,
    ]


# ---- the kernel ----


def _kernel() -> list[Check]:
    return [_openat2(), _read_only_view(), _landlock(), _seccomp(), *_identity(), _pass_rights(), _cgroup2()]


def _openat2() -> Check:
    meaning = "files are opened below their root and nowhere else, whatever happens to names meanwhile"
    here = os.open("/", os.O_PATH | os.O_CLOEXEC)
    try:
        os.close(open_path_beneath(here, b"."))
    except OSError as error:
        cure = "Linux 5.6 is needed, and no filter that takes it away (as RestrictSUIDSGID= of systemd does)"
        return Check("openat2", MISSING, str(error), meaning, cure)
    finally:
        os.close(here)
    return Check("openat2", OK, "works", meaning)


def _read_only_view() -> Check:
    name = "mount_setattr"
    meaning = "what is handed out can't be made writable again, not even by the file's owner"
    if os.geteuid() == 0:
        failure = _in_child(_enter_read_only_view)
        if not failure:
            return Check(name, OK, "a read-only view of all mounts can be made", meaning)
        return Check(
            name, MISSING, failure, meaning, "start the broker by systemd with ReadOnlyPaths=/ instead"
        )
    try:
        # No attributes: changes nothing.
        namespaces.mount_setattr(b"/", attributes=0)
    except SyscallError as error:
        if error.errno != errno.EPERM:
            cure = (
                "Linux 5.12 is needed to start the broker by hand; by systemd ReadOnlyPaths=/ does the same"
            )
            return Check(name, MISSING, str(error), meaning, cure)
    return Check(name, OK, "the kernel has it (run this as root to see it work)", meaning)


def _enter_read_only_view() -> str:
    try:
        enter_read_only_view()
    except ReadOnlyViewError as error:
        return str(error)
    return ""


def _landlock() -> Check:
    meaning = "the kernel holds the broker to the configured trees, and workers to nothing at all"
    answer = _in_child(_enter_landlock)
    try:
        abi, missing = json.loads(answer)
    except ValueError:
        return Check(
            "Landlock", MISSING, answer, meaning, "see which filter or policy of this machine refuses it"
        )
    if abi == 0:
        cure = "Linux 5.13 is needed, with 'landlock' among its security modules (lsm= at boot)"
        return Check("Landlock", MISSING, "the kernel has none", meaning, cure)
    if missing:
        cure = "a newer kernel has it; the broker's other layers do not depend on it"
        return Check("Landlock", WEAKER, f"ABI {abi}, which lacks: {', '.join(missing)}", meaning, cure)
    return Check("Landlock", OK, f"ABI {abi}, complete", meaning)


def _enter_landlock() -> str:
    process.set_no_new_privs()
    report = landlock.restrict_to([])
    return json.dumps([report.abi, report.missing])


def _seccomp() -> Check:
    meaning = "the broker and its workers can make the system calls that they need and no others"
    failure = _in_child(_enter_seccomp)
    if failure:
        cure = "a kernel with CONFIG_SECCOMP_FILTER is needed, and no filter that refuses another one"
        return Check("seccomp", MISSING, failure, meaning, cure)
    return Check("seccomp", OK, "filters can be installed", meaning)


def _enter_seccomp() -> str:
    process.set_no_new_privs()
    seccomp.install(bpf.assemble({}, machine=os.uname().machine, otherwise=bpf.ALLOW))
    return ""


def _identity() -> list[Check]:
    level, why = probe_level()
    alive = "a client that has ended can't be mistaken for another process with its number"
    now = "a client's user and control group are those of now; needed by rules about units and control groups"
    cure = "a newer kernel has it; until then identity is what it was when the client connected"
    first = Check("SO_PEERPIDFD", OK, "works", alive)
    if level < 1:
        first = Check("SO_PEERPIDFD", WEAKER, why, alive, cure)
    second = Check("PIDFD_GET_INFO", OK, "works", now)
    if level < 2:  # noqa: PLR2004 - the levels are numbers
        second = Check("PIDFD_GET_INFO", WEAKER, why, now, cure)
    return [first, second]


def _pass_rights() -> Check:
    meaning = "the kernel itself keeps clients from handing descriptors to the broker"
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with left, right:
        if sockets.refuse_descriptors(left):
            return Check("SO_PASSRIGHTS", OK, "works", meaning)
    cure = "Linux 6.16 has it; until then the broker closes what it is handed, and hangs up"
    return Check("SO_PASSRIGHTS", WEAKER, "the kernel has none", meaning, cure)


def _cgroup2() -> Check:
    meaning = "rules can be about systemd units and control groups"
    mounted = find_cgroup2()
    if mounted is None:
        cure = "mount it, if the policy is to have such rules: mount -t cgroup2 none /sys/fs/cgroup"
        return Check("cgroup2", WEAKER, "is not mounted", meaning, cure)
    return Check("cgroup2", OK, f"is mounted on {printable(mounted)}", meaning)


def _in_child(probe: Callable[[], str]) -> str:
    """Run something that can't be undone in a child, and return what it returns or what went wrong."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if not pid:  # pragma: no cover - the child writes no report
        try:
            os.write(write_end, probe().encode(errors="backslashreplace"))
        except Exception as error:  # noqa: BLE001 - told by the parent
            os.write(write_end, str(error).encode(errors="backslashreplace"))
        finally:
            os._exit(0)
    os.close(write_end)
    with open(read_end, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(pid, 0)
    if status and not answer:
        return f"the process that tried it ended with {os.waitstatus_to_exitcode(status)}"
    return printable(answer)


# ---- the set-up ----


def _accounts(compiled: CompiledPolicy | None, *, otherwise: str) -> list[Check]:
    """Check those that the policy names, or the usual ones; a broker that runs has what it needs."""
    user, group = "fdbroker", "fdbroker-clients"
    if compiled is not None:
        uid, gid = compiled["daemon"]["uid"], compiled["daemon"]["listeners"]["seqpacket"]["gid"]
        user = user if uid is None else user_name(uid)
        group = group if gid is None else group_name(gid)
    return [
        _user(user, otherwise, "whom the broker runs as, with one capability and nothing else"),
        _group(group, otherwise, "whose members may connect to the broker"),
        _user("fdbroker-worker", WEAKER, "who reads hostile files when root runs fdbroker scan"),
    ]


# A policy may name users and groups by numbers, which need no entry anywhere.
_NUMBER = "a number without a name, as the policy has it"


def _user(name: str, otherwise: str, meaning: str) -> Check:
    if name.isdigit():
        return Check(f"user {name}", OK, _NUMBER, meaning)
    try:
        found = pwd.getpwnam(name)
    except KeyError:
        cure = f"as root: useradd --system --no-create-home --shell /usr/sbin/nologin {name}"
        return Check(f"user {name}", otherwise, "does not exist", meaning, cure)
    return Check(f"user {name}", OK, f"uid {found.pw_uid}", meaning)


def _group(name: str, otherwise: str, meaning: str) -> Check:
    if name.isdigit():
        return Check(f"group {name}", OK, _NUMBER, meaning)
    try:
        found = grp.getgrnam(name)
    except KeyError:
        cure = f"as root: groupadd --system {name}"
        return Check(f"group {name}", otherwise, "does not exist", meaning, cure)
    members = ", ".join(map(printable, found.gr_mem)) or "nobody"
    return Check(f"group {name}", OK, f"gid {found.gr_gid}, members: {members}", meaning)


def _modules() -> Check:
    meaning = "what fdbrokerd and the policy commands need besides Python itself"
    lacking = [
        name for module, name in _MODULES_OF_DAEMON.items() if importlib.util.find_spec(module) is None
    ]
    if lacking:
        cure = "pip install 'fdbroker[daemon]'"
        return Check("fdbroker[daemon]", WEAKER, f"not installed here: {', '.join(lacking)}", meaning, cure)
    return Check("fdbroker[daemon]", OK, "installed", meaning)


def _program() -> Check:
    name, meaning = "program", "clients of the broker can run this command and load its library"
    package = os.path.dirname(fdbroker.__file__)
    enter, read = stat.S_IXOTH, stat.S_IROTH
    needed = [(os.path.realpath(sys.executable), enter)]
    for place in (sys.prefix, package):
        needed += [(str(above), enter) for above in (Path(place), *Path(place).parents)]
    for directory, _, files in os.walk(package):
        needed.append((directory, enter | read))
        needed += [(os.path.join(directory, file), read) for file in files if file.endswith(".py")]
    for path, bits in needed:
        mode = os.stat(path).st_mode
        if mode & bits != bits:
            found = f"is not for everybody: {printable(path)} has mode 0{stat.S_IMODE(mode):03o}"
            cure = f"as root: chmod -R {'o+rX' if bits & enter else 'o+r'} {printable(path)}"
            return Check(name, WEAKER, found, meaning, cure)
    return Check(name, OK, "can be run by everybody", meaning)


def _directory(path: str) -> Check:
    meaning = "nobody but root can put a false broker's socket there"
    shown = printable(path or "/")
    try:
        status = os.lstat(path or "/")
    except OSError as error:
        return Check(
            shown, WEAKER, error.strerror or str(error), meaning, "fdbrokerd makes it when it starts"
        )
    if not stat.S_ISDIR(status.st_mode):
        return Check(
            shown, MISSING, "is no directory", meaning, "remove it; fdbrokerd makes it when it starts"
        )
    if status.st_uid or status.st_mode & _OTHERS_WRITE:
        found = f"belongs to uid {status.st_uid} and has mode 0{stat.S_IMODE(status.st_mode):03o}"
        return Check(shown, MISSING, found, meaning, f"as root: chown root:root {shown} && chmod 755 {shown}")
    return Check(shown, OK, "is root's alone to write", meaning)


def _policy_file(path: str) -> tuple[Check, CompiledPolicy | None]:
    name = printable(path)
    meaning = "says who may read what; only root can have written it"
    try:
        from fdbroker.config import ConfigError, load_policy_file  # noqa: PLC0415 - another extra
    except ModuleNotFoundError as error:
        return Check(name, WEAKER, f"not looked at: {error}", meaning, "pip install 'fdbroker[daemon]'"), None
    try:
        os.stat(path)
    except FileNotFoundError:
        cure = "write one (docs/policy.md; config/examples has some), then: fdbroker policy check"
        return Check(name, MISSING, "does not exist", meaning, cure), None
    except OSError as error:
        return Check(name, WEAKER, f"not looked at: {error.strerror}", meaning, "run this as root"), None
    if not os.access(path, os.R_OK):
        return Check(name, WEAKER, "not looked at: you may not read it", meaning, "run this as root"), None
    try:
        compiled = load_policy_file(path)
    except ConfigError as error:
        more = f" (and {len(error.problems) - 1} more)" if len(error.problems) > 1 else ""
        cure = f"see all with: fdbroker policy check {name}"
        found = f"{str(error.problems[0]).removeprefix(f'{path}:').strip()}{more}"
        return Check(name, BROKEN, found, meaning, cure), None
    roots, rules = counted(len(compiled["roots"]), "root"), counted(len(compiled["rules"]), "rule")
    counts = f"root's, {roots}, {rules}, no problems"
    return Check(name, OK, counts, meaning), compiled


def _needs(compiled: CompiledPolicy | None) -> list[Check]:
    """Check whether the kernel tells what the policy asks of clients, and what limits their rates."""
    labels = gives_labels()
    found = (
        "a security module gives them" if labels else "no security module gives any: no rule can have 'label'"
    )
    checks = [Check("labels", OK, found, "rules can be about the labels of a security module")]
    if compiled is None:
        return checks
    from fdbroker.policy.rules import read_policy  # noqa: PLC0415 - only here

    level, why = probe_level()
    problem = problem_with_identity(read_policy(for_broker(compiled)), level, why, labels=labels)
    if problem is not None:
        meaning = "the kernel tells what the policy asks of clients; otherwise the broker does not start"
        checks.append(
            Check("identity", MISSING, problem, meaning, "change the policy, or take such a kernel")
        )
    limits = compiled["limits"]
    rates = [f"{key} {value}" for key, value in limits.items() if key.endswith("_per_second")]
    found = (
        ", ".join(rates)
        or "none for all of a user's requests (limits: requests_per_second, opens_per_second)"
    )
    return [*checks, Check("limits by rate", OK, found, "one user can ask, and have recorded, only so much")]


# ---- the running broker ----


def _broker(places: Places, compiled: CompiledPolicy | None) -> list[Check]:
    name = "broker"
    meaning = "answers you"
    try:
        with client.connect(os.fsencode(places.socket), timeout=5.0) as connected:
            status = connected.status()
    except BrokerError as error:
        found, cure = obstacle(places.socket, error)
        return [Check(name, MISSING, found, meaning, cure)]
    found = f"answers on {printable(places.socket)}, policy generation {status.get('generation')}"
    checks = [Check(name, OK, found, meaning)]
    control_socket, whole = _control_socket(places, status)
    checks.append(control_socket)
    return [*checks, *_layers(status), *_in_force(whole, compiled, places.policy)]


def _control_socket(places: Places, status: dict[str, object]) -> tuple[Check, dict[str, object]]:
    """Return what the control socket of the broker with this status is worth, and the whole status."""
    name, meaning = "control socket", "reload, status and explain need it"
    if places.control is None:
        found = "not asked: nothing says where this broker has it"
        return Check(name, WEAKER, found, meaning, "name it: --control PATH"), {}
    shown = printable(places.control)
    try:
        with control.connect(os.fsencode(places.control), timeout=5.0) as connection:
            whole = connection.status()
    except BrokerError as error:
        found, cure = obstacle(places.control, error, "--control")
        return Check(name, WEAKER, found, meaning, cure), {}
    # Each start of a broker has its number, if it has an audit.
    if whole.get("audit") != status.get("audit"):
        found = f"{shown} is another broker's than {printable(places.socket)}"
        return Check(name, BROKEN, found, meaning, "name that of the same broker: --control PATH"), {}
    return Check(name, OK, f"answers on {shown}", meaning), whole


def _layers(status: dict[str, object]) -> list[Check]:
    """Return what the broker says of its own protection."""
    view, abi, level = status.get("read_only_view"), status.get("landlock"), status.get("identity_level")
    meaning = "descriptors that it hands out stay read-only"
    checks = [Check("its read-only view", OK, "in force", meaning)]
    if view != "required":
        cure = "remove read_only_view from the policy and restart the broker"
        checks = [Check("its read-only view", WEAKER, f"{printable(str(view))}", meaning, cure)]
    meaning = "it opens nothing outside its roots"
    if abi:
        checks.append(Check("its Landlock domain", OK, f"in force, ABI {printable(str(abi))}", meaning))
    else:
        checks.append(Check("its Landlock domain", MISSING, "not in force", meaning, "see Landlock above"))
    meaning = "it makes no system call but those that it needs"
    if status.get("seccomp") is True:
        checks.append(Check("its seccomp filter", OK, "in force", meaning))
    else:
        checks.append(Check("its seccomp filter", MISSING, "not in force", meaning, "start it by fdbrokerd"))
    meaning = "how sure it is of who asks, from 0 to 2"
    state = OK if level == 2 else WEAKER  # noqa: PLR2004 - the levels are numbers
    cure = "" if state == OK else "see SO_PEERPIDFD and PIDFD_GET_INFO above"
    checks.append(Check("its identity level", state, printable(str(level)), meaning, cure))
    meaning = "every decision is recorded"
    if status.get("audit") == "off":
        cure = "start it with an audit (audit: {to: FILE} in the policy)"
        checks.append(Check("its audit", WEAKER, "off", meaning, cure))
    else:
        checks.append(Check("its audit", OK, f"run {printable(str(status.get('audit')))}", meaning))
    return checks


def _in_force(whole: dict[str, object], compiled: CompiledPolicy | None, path: str) -> list[Check]:
    """Return whether the broker decides by the policy file as it is now, where both can be seen."""
    fingerprint = whole.get("fingerprint")
    if compiled is None or fingerprint is None:
        return []
    from fdbroker.policy.rules import read_policy  # noqa: PLC0415 - only here

    meaning = "what the policy file says is what the broker does"
    changes = ", ".join(changes_for_restart(compiled, whole))
    same = read_policy(for_broker(compiled)).fingerprint == fingerprint
    if same and not changes:
        return [Check("its policy", OK, f"is that of {printable(path)}", meaning)]
    if same:
        found = f"is that of {printable(path)}, but for {changes}, which changed since the broker was started"
    else:
        found = f"is not that of {printable(path)}: the file was changed, or another one was loaded"
    cure = f"restart the broker: no reload changes {changes}" if changes else "as root: fdbroker reload"
    return [Check("its policy", WEAKER, found, meaning, cure)]
