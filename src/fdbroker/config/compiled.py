"""The compiled policy: what the broker reads, as docs/compiled-policy.md describes it."""

from __future__ import annotations

import json
from binascii import crc32
from collections.abc import Mapping
from typing import NotRequired, TypedDict

from fdbroker.wire.format import MAX_POLICY

# Bytes of a file with one: what a reload can hand over, and the white space that makes it readable.
MAX_FILE = 2 * MAX_POLICY
_WIDTH = 110
# A rule is nested deeper than this, so it is never squeezed into one line.
_MAX_DEPTH_ON_A_LINE = 3


class CompiledRoot(TypedDict):
    """A tree that can be reached."""

    name: str
    path: str
    cross_mounts: bool
    opens: str


class CompiledClient(TypedDict, total=False):
    """One entry of a rule's clients; every key in it must match."""

    any: bool
    uids: list[int]
    gids: list[int]
    cgroups: list[str]
    labels: list[str]


class CompiledOwner(TypedDict):
    """Owners that a condition accepts; `client`: whoever asks; `on_behalf_of`: the client acted for."""

    uids: list[int]
    client: bool
    on_behalf_of: bool


class CompiledGroup(TypedDict):
    """Groups that a condition accepts."""

    gids: list[int]


class CompiledFilesystem(TypedDict):
    """Types of file systems that a condition accepts, by their magic numbers (statfs(2))."""

    types: list[int]


class CompiledWhere(TypedDict, total=False):
    """Conditions on the object: those that the author wrote."""

    owner: CompiledOwner
    group: CompiledGroup
    mode: dict[str, int]
    size: dict[str, int]
    links: dict[str, int]
    age: dict[str, int]
    filesystem: CompiledFilesystem


# By call, since `except` is no name in Python.
CompiledRule = TypedDict(
    "CompiledRule",
    {
        "name": str,
        "effect": str,
        "actions": list[str],
        "root": str,
        "clients": list[CompiledClient],
        "on_behalf_of": list[CompiledClient],
        "paths": list[str],
        "except": list[str],
        "where": CompiledWhere,
        "deliver": list[str],
        "symlinks": str,
        "limits": NotRequired[dict[str, int]],
    },
)


class CompiledListener(TypedDict):
    """A socket that the launcher makes, of kind `seqpacket`, `stream` or `dgram`.

    `gid` None: the default group does not exist on this system.
    """

    kind: str
    path: str
    gid: int | None
    mode: int


class CompiledLimits(TypedDict):
    """Limits on every client, those that the author wrote and those that there are in any case.

    `message_within` and `idle_timeout`: seconds.
    """

    connections_per_uid: int
    in_flight_per_connection: int
    message_within: float
    in_flight_per_uid: NotRequired[int]
    requests_per_second: NotRequired[int]
    requests_burst: NotRequired[int]
    opens_per_second: NotRequired[int]
    opens_burst: NotRequired[int]
    idle_timeout: NotRequired[float]


class CompiledService(TypedDict):
    """A listener whose clients are handed to a service, by its name, and who this service is."""

    name: str
    clients: list[CompiledClient]


class CompiledDaemon(TypedDict):
    """What the launcher takes out for itself.

    `uid` and `gid` None: the file names no user, and the default one does not
    exist on this system. `listeners` by name: `seqpacket`, `stream`, `dgram`,
    `control`, and of services. `audit` None: standard output.
    """

    uid: int | None
    gid: int | None
    listeners: dict[str, CompiledListener]
    audit: str | None


class CompiledPolicy(TypedDict):
    """A whole policy; names have become numbers and defaults are written out."""

    version: int
    roots: list[CompiledRoot]
    rules: list[CompiledRule]
    limits: CompiledLimits
    audit: dict[str, str]
    read_only_view: str
    identity: str
    admins: dict[str, list[int]]
    services: list[CompiledService]
    daemon: CompiledDaemon


def launcher_fingerprint(daemon: Mapping[str, object]) -> str:
    """Return what `launcher_changes` compares: a checksum of each thing that only a restart changes.

    As the policy's fingerprint it shows whether two are the same, and proves nothing.
    """
    return "-".join(f"{crc32(json.dumps(part).encode()):08x}" for part in _launcher_parts(daemon).values())


def launcher_changes(daemon: Mapping[str, object], fingerprint: str) -> list[str]:
    """Return what is another thing here than where the fingerprint was taken, as the policy file calls it."""
    ours, theirs = launcher_fingerprint(daemon).split("-"), fingerprint.split("-")
    compared = zip(_launcher_parts(daemon), ours, theirs, strict=False)  # of another version: what both know
    return [name for name, our, their in compared if our != their]


def _launcher_parts(daemon: Mapping[str, object]) -> dict[str, object]:
    return {
        "user": [daemon.get("uid"), daemon.get("gid")],
        "listeners": daemon.get("listeners"),
        "audit.to": daemon.get("audit"),
    }


def dumps(policy: CompiledPolicy) -> str:
    """Return the policy as JSON that a person can read: short lists on one line, ASCII, a newline at its end.

    ASCII only, so that no character of a name can make the text look
    different from what it says.
    """
    return _format(policy, "") + "\n"


def _format(value: object, indent: str) -> str:
    line = json.dumps(value)
    if _depth(value) <= _MAX_DEPTH_ON_A_LINE and len(indent) + len(line) <= _WIDTH:
        return line
    deeper = indent + "  "
    if isinstance(value, Mapping):
        parts = [f"{json.dumps(key)}: {_format(inner, deeper)}" for key, inner in value.items()]
        first, last = "{", "}"
    elif isinstance(value, list):
        parts = [_format(inner, deeper) for inner in value]
        first, last = "[", "]"
    else:
        return line
    return f"{first}\n{deeper}" + f",\n{deeper}".join(parts) + f"\n{indent}{last}"


def _depth(value: object) -> int:
    if isinstance(value, Mapping):
        return 1 + max(map(_depth, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(_depth, value), default=0)
    return 0
