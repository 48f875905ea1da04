"""Who may hold an open of the broker: listeners of fanotify(7) that are asked for permission (clamonacc).

A mark is on a mount, a file system, or one file or directory. A mark on a mount
of this machine does not reach the broker's: those are copies of its own.
"""

from __future__ import annotations

import contextlib
import os
import re
from typing import TYPE_CHECKING, NamedTuple

from fdbroker.cli.checks.check import OK, WEAKER, Check
from fdbroker.cli.checks.roots import read_roots
from fdbroker.config.names import printable, user_name
from fdbroker.kernel.process_state import read_process_state

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fdbroker.cli.checks.check import Running
    from fdbroker.cli.checks.roots import Root

# linux/fanotify.h: FAN_OPEN_PERM, FAN_ACCESS_PERM, FAN_OPEN_EXEC_PERM, FAN_PRE_ACCESS
_ASKED_FOR_PERMISSION = 0x10000 | 0x20000 | 0x40000 | 0x100000
_FIELD = re.compile(r"(\w+):([0-9a-f]+)")
_DEFAULT_CLAMD_CONF = "/etc/clamav/clamd.conf"


class Listener(NamedTuple):
    """A process that is asked before files are opened; marks by mounts, file systems, and what is single."""

    pid: int
    program: str
    mounts: frozenset[int]
    filesystems: frozenset[int]
    singles: frozenset[int]  # file systems on which single files or directories are marked


def on_access_checks(running: Running | None) -> list[Check]:
    """Check that no root is under one without saying `opens: helpers`. Whoever is not root sees none."""
    if running is None or os.geteuid() != 0:
        return []
    name = "on-access scanners"
    meaning = "no other program can hold the broker's loop by not answering whether a file may be opened"
    listeners = list(permission_listeners())
    if not listeners:
        return [Check(name, OK, "no program is asked before files are opened", meaning)]
    wrong = [problem for listener in listeners for problem in _problems(listener, running)]
    if not wrong:
        shown = ", ".join(f"{printable(one.program)} (process {one.pid})" for one in listeners)
        return [
            Check(
                name, OK, f"{shown}: not asked for files of a root, or of those with opens: helpers", meaning
            )
        ]
    return [Check(name, WEAKER, found, meaning, cure) for found, cure in wrong]


def permission_listeners() -> Iterator[Listener]:
    """Yield the processes that hold permission events; those of other users are seen by root alone."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        marks: list[str] = []
        with contextlib.suppress(OSError):  # it has ended, or is nobody's to look at
            for name in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    if os.readlink(f"/proc/{pid}/fd/{name}") == "anon_inode:[fanotify]":
                        with open(f"/proc/{pid}/fdinfo/{name}", encoding="ascii") as file:
                            marks += file
            listener = _listener(int(pid), marks)
            if listener is not None:
                yield listener


def _listener(pid: int, lines: list[str]) -> Listener | None:
    """Return what marks it has, as proc_pid_fdinfo(5) shows them; None: it is asked for nothing."""
    marks = []
    for line in lines:
        if line.startswith("fanotify "):
            fields = {key: int(value, 16) for key, value in _FIELD.findall(line)}
            if fields.get("mask", 0) & _ASKED_FOR_PERMISSION:
                marks.append(fields)
    if not marks:
        return None
    with open(f"/proc/{pid}/comm", encoding="utf-8", errors="surrogateescape") as file:
        program = file.read().rstrip("\n")
    return Listener(
        pid,
        program,
        frozenset(mark["mnt_id"] for mark in marks if "mnt_id" in mark),
        frozenset(mark["sdev"] for mark in marks if "sdev" in mark and "ino" not in mark),
        frozenset(mark["sdev"] for mark in marks if "ino" in mark),
    )


def _problems(listener: Listener, running: Running) -> Iterator[tuple[str, str]]:
    who = f"{printable(listener.program)} (process {listener.pid})"
    try:
        roots = read_roots(running)
    except OSError:
        return  # told by the check of the roots
    certain = [root for root in roots if _is_asked(root, listener)]
    perhaps = [root for root in roots if root not in certain and _may_be_asked(root, listener)]
    if not certain and not perhaps:
        return
    for concerned, how in (
        (certain, "is asked"),
        (perhaps, "may be asked (it marks files or directories on the same file system)"),
    ):
        names = ", ".join(printable(root.name) for root in concerned if not root.helpers)
        if names:
            cure = f"say 'opens: helpers' of {names} in the policy and restart the broker"
            yield f"{who} {how} before the broker opens a file of the root {names}", cure
    yield from _exclusion(listener, who, running)


def _is_asked(root: Root, listener: Listener) -> bool:
    return root.held is not None and (
        root.held.mount in listener.mounts or _as_the_kernel_has_it(root.held.device) in listener.filesystems
    )


def _may_be_asked(root: Root, listener: Listener) -> bool:
    return root.held is not None and _as_the_kernel_has_it(root.held.device) in listener.singles


def _as_the_kernel_has_it(device: int) -> int:
    """Return a device as fdinfo shows it: 20 bits of minor."""
    return os.major(device) << 20 | os.minor(device)


def _exclusion(listener: Listener, who: str, running: Running) -> Iterator[tuple[str, str]]:
    """Say if clamonacc scans what the broker opens: to answer, it may have to ask the broker."""
    if listener.program != "clamonacc":
        return
    uid = read_process_state(running.pid).uids[1]
    user = user_name(uid)
    path = _configuration_of(listener.pid)
    excluded, uids = excluded_users(path)
    if user in excluded or uid in uids:
        return
    found = f"{who} scans what the broker's user {printable(user)} opens, which every client asks for"
    yield found, f"OnAccessExcludeUname {printable(user)} in {printable(path)}, and restart clamonacc"


def _configuration_of(pid: int) -> str:
    with open(f"/proc/{pid}/cmdline", "rb") as file:
        words = [os.fsdecode(word) for word in file.read().split(b"\0")]
    for option, following in zip(words, [*words[1:], ""], strict=True):
        if option.startswith("--config-file="):
            return option.partition("=")[2]
        if option in {"-c", "--config-file"}:
            return following
    return _DEFAULT_CLAMD_CONF


def excluded_users(path: str) -> tuple[set[str], set[int]]:
    """Return whose opens clamonacc lets pass by its configuration, by names and by numbers; clamd.conf(5)."""
    names, uids = set(), set()
    with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            key, _, value = line.strip().partition(" ")
            if key == "OnAccessExcludeUname":
                names.add(value.strip())
            elif key == "OnAccessExcludeUID" and value.strip().isdigit():
                uids.add(int(value))
    return names, uids
