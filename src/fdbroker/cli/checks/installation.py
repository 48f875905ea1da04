"""What is installed: users and groups, Python packages, and the program itself."""

from __future__ import annotations

import grp
import importlib.util
import os
import pwd
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import fdbroker
from fdbroker.cli.checks.check import OK, WEAKER, Check
from fdbroker.config.defaults import ADD_USER
from fdbroker.config.names import group_name, printable, user_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from fdbroker.config import CompiledPolicy

_MODULES_OF_DAEMON = {
    "yaml": "PyYAML",
    "daemon": "python-daemon",
    "systemd": "systemd-python",
}


def account_checks(compiled: CompiledPolicy | None, *, otherwise: str) -> list[Check]:
    """Check the accounts that the policy names, or the usual ones; a broker that runs has what it needs."""
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
    return _account("user", name, lambda: f"uid {pwd.getpwnam(name).pw_uid}", ADD_USER, otherwise, meaning)


def _group(name: str, otherwise: str, meaning: str) -> Check:
    def found() -> str:
        entry = grp.getgrnam(name)
        return f"gid {entry.gr_gid}, members: {', '.join(map(printable, entry.gr_mem)) or 'nobody'}"

    return _account("group", name, found, "groupadd --system", otherwise, meaning)


def _account(kind: str, name: str, look: Callable[[], str], add: str, otherwise: str, meaning: str) -> Check:
    if name.isdigit():
        return Check(f"{kind} {name}", OK, _NUMBER, meaning)
    try:
        return Check(f"{kind} {name}", OK, look(), meaning)
    except KeyError:
        return Check(f"{kind} {name}", otherwise, "does not exist", meaning, f"as root: {add} {name}")


def modules() -> Check:
    """Check that what fdbrokerd imports is installed."""
    meaning = "what fdbrokerd and the policy commands need besides Python itself"
    lacking = [
        name for module, name in _MODULES_OF_DAEMON.items() if importlib.util.find_spec(module) is None
    ]
    if lacking:
        cure = "pip install 'fdbroker[daemon]'"
        return Check("fdbroker[daemon]", WEAKER, f"not installed here: {', '.join(lacking)}", meaning, cure)
    return Check("fdbroker[daemon]", OK, "installed", meaning)


def program() -> Check:
    """Check that everybody can run this command."""
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
