"""The roots of a running broker: whether they still are what it opened, and read-only where it sees them."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING, NamedTuple

from fdbroker.cli.broker import how_to_restart
from fdbroker.cli.checks.check import BROKEN, OK, WEAKER, Check
from fdbroker.config.names import counted, printable
from fdbroker.launcher.mounts import is_at_or_above, parse_mounts

if TYPE_CHECKING:
    from collections.abc import Container, Iterable

    from fdbroker.cli.checks.check import Running
    from fdbroker.launcher.mounts import Mount

_MOST_NAMED = 3


class Held(NamedTuple):
    """A directory that the broker has open: where it is by now, as its process sees it, in which mount."""

    place: str
    device: int
    inode: int
    mount: int


class Root(NamedTuple):
    """A root of the running broker, as it tells; `now`: what is at its path, None: nothing, or not asked."""

    name: str
    path: str
    cross_mounts: bool
    helpers: bool
    now: os.stat_result | None
    held: Held | None

    def __str__(self) -> str:
        """Return what to call it."""
        return f"root {printable(self.name)} ({printable(self.path)})"


def root_checks(running: Running | None) -> list[Check]:
    """Check them, where the broker's process can be looked at."""
    if running is None:
        return []
    try:
        roots = read_roots(running)
        with open(running.proc("mountinfo"), "rb") as file:
            mounts = parse_mounts(file.read())
    except OSError as error:
        found = f"process {running.pid} can't be looked at: {error.strerror}"
        meaning = "the broker serves what is at the configured paths now"
        return [Check("its roots", WEAKER, found, meaning, "run this as root, where the broker runs")]
    checks = [_replaced(roots)]
    if running.status.get("read_only_view") == "required":
        checks.append(_mount_view(roots, mounts))
    return checks


def read_roots(running: Running) -> list[Root]:
    """Return the roots that a broker has, with what is at their paths now and what it holds of them.

    Raises:
        OSError: this process may not look at it, or it has ended.

    """
    told = running.status.get("roots")
    assert isinstance(told, list)  # noqa: S101 - for the type checker; the protocol says it
    held = _held_directories(running, {row["path"] for row in told if row["opens"] == "helpers"})
    roots = []
    for row in told:
        helpers = row["opens"] == "helpers"
        now = None
        if not helpers:  # who answers for it may not: looking at it could wait for ever
            try:
                now = os.stat(row["path"])
            except OSError:
                now = None
        same = [
            one for one in held if now is not None and (one.device, one.inode) == (now.st_dev, now.st_ino)
        ]
        by_place = [one for one in held if one.place.removesuffix(" (deleted)") == row["path"]]
        kept = next(iter(same or by_place), None)
        roots.append(Root(row["name"], row["path"], row["cross_mounts"], helpers, now, kept))
    return roots


def _held_directories(running: Running, helped: Container[str]) -> list[Held]:
    """Return what a broker has open by O_PATH, its roots among them; of those that are `helped` no inode.

    Whoever answers for these may not, and a file system is not asked for what is said here otherwise.
    """
    found = []
    for name in os.listdir(running.proc("fd")):
        try:
            place = os.readlink(running.proc(f"fd/{name}"))
            with open(running.proc(f"fdinfo/{name}"), encoding="ascii") as file:
                info = dict(line.split(":", 1) for line in file if ":" in line)
            if not int(info["flags"], 8) & os.O_PATH:
                continue
            if place.removesuffix(" (deleted)") in helped:
                found.append(Held(place, 0, 0, int(info["mnt_id"])))
                continue
            status = os.stat(running.proc(f"fd/{name}"))
        except FileNotFoundError:
            continue  # it was closed meanwhile
        if stat.S_ISDIR(status.st_mode):
            found.append(Held(place, status.st_dev, status.st_ino, int(info["mnt_id"])))
    return found


def _replaced(roots: list[Root]) -> Check:
    name, meaning = "its roots", "the broker serves what is at the configured paths now"
    helped = sum(root.helpers for root in roots)
    wrong = [problem for root in roots if not root.helpers and (problem := _what_became_of(root))]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        cure = f"if what is there now is meant, restart the broker: {how_to_restart()}"
        return Check(name, BROKEN, f"{wrong[0]}{more}", meaning, cure)
    note = f"; {counted(helped, 'root')} with 'opens: helpers' not looked at" if helped else ""
    found = f"{counted(len(roots) - helped, 'root')}, the same as when it started{note}"
    return Check(name, OK, found, meaning)


def _what_became_of(root: Root) -> str:
    """Return what is wrong if a root is not any more what the broker opened when it started."""
    if root.now is None:
        return f"{root} is not there any more; the broker has what was there when it started"
    if root.held is not None and (root.held.device, root.held.inode) == (root.now.st_dev, root.now.st_ino):
        return ""
    how = "the one that it has was renamed, or is not to be seen"
    if root.held is not None:
        gone = root.held.place.endswith(" (deleted)")
        how = "the one that it has was removed" if gone else "something was mounted there since"
    return f"{root} is another directory than the broker opened when it started: {how}"


def _mount_view(roots: list[Root], mounts: list[Mount]) -> Check:
    name = "its mounts"
    meaning = "what is handed out can't be made writable again, whatever was mounted since the broker started"
    options = {mount.number: mount.options for mount in mounts}
    held = [root for root in roots if root.held is not None and not root.helpers]
    writable = [
        os.fsencode(root.path)
        for root in held
        if root.held is not None and b"ro" not in options.get(root.held.mount, {b"ro"})
    ]
    if writable:
        found = f"a root is writable in the broker's view: {_names(writable)}"
        cure = f"see who mounted it anew; then restart the broker: {how_to_restart()}"
        return Check(name, BROKEN, found, meaning, cure)
    later, unserved = [], 0
    for root in roots:
        below = [mount for mount in mounts if is_below(os.fsencode(root.path), mount.point)]
        if root.cross_mounts:
            later += [mount.point for mount in below if b"ro" not in mount.options]
        else:
            unserved += len(below)
    if later:
        found = f"mounted since it started, and writable in its view: {_names(later)}; no file there is given"
        return Check(name, WEAKER, found, meaning, f"restart the broker: {how_to_restart()}")
    note = ""
    if unserved:
        note = f"; {counted(unserved, 'mount')} below roots without cross_mounts: nothing there is served"
    return Check(name, OK, f"read-only where it serves{note}", meaning)


def is_below(root: bytes, point: bytes) -> bool:
    """Return whether something is mounted below a root, at another place than the root itself."""
    return point != root and is_at_or_above(root, point)


def _names(points: Iterable[bytes]) -> str:
    different = sorted(set(points))
    shown = ", ".join(map(printable, different[:_MOST_NAMED]))
    return shown if len(different) <= _MOST_NAMED else f"{shown} and {len(different) - _MOST_NAMED} more"
