"""What only the launcher needs of a policy: whom the broker runs as, and which sockets are made."""

from __future__ import annotations

from fdbroker.config.clients import ClientReader
from fdbroker.config.compiled import CompiledDaemon, CompiledListener
from fdbroker.config.defaults import (
    ALL_PERMISSIONS,
    DEFAULT_GROUP_OF_CLIENTS,
    DEFAULT_USER,
    MAX_SOCKET_PATH,
    MODES,
    PATHS,
)
from fdbroker.config.errors import Mark, did_you_mean, quoted
from fdbroker.config.identities import OVERFLOW_ID, Lookups
from fdbroker.config.reader import Reader
from fdbroker.config.scalars import ScalarError, parse_mode, parse_path
from fdbroker.config.schema import Listener, Listeners
from fdbroker.config.yaml_tree import Node


class DaemonReader:
    """Reads `user` and `listeners`.

    A default user or group that is missing on this system is told of when the
    broker is started, not here: a policy may be checked where nothing is installed.
    """

    def __init__(self, reader: Reader, clients: ClientReader, lookups: Lookups) -> None:
        self._reader = reader
        self._clients = clients
        self._lookups = lookups

    def daemon(self, user: Node | None, listeners: Node | None, audit: str | None) -> CompiledDaemon:
        """Return the launcher's member of the compiled policy."""
        uid, gid = self._account(user) or (None, None)
        return {"uid": uid, "gid": gid, "listeners": self._listeners(listeners), "audit": audit}

    def _account(self, node: Node | None) -> tuple[int, int] | None:
        if node is None:
            return self._lookups.account(DEFAULT_USER)
        text = self._reader.text(node, "user", f"write the name of a user, as in {DEFAULT_USER}")
        if text is None:
            return None
        account = self._lookups.account(text.value)
        if account is None:
            self._reader.add(
                text.mark,
                f"user: there is no user {quoted(text.value)} on this system",
                lambda: did_you_mean(text.value, self._lookups.user_names(), "create the user"),
            )
        elif 0 in account:
            reason = (
                f"user: {quoted(text.value)} has root's uid or group, and the broker opens no file as root"
            )
            self._reader.add(text.mark, reason, "create a user for it alone")
        elif OVERFLOW_ID in account:
            reason = f"user: {quoted(text.value)} has id {OVERFLOW_ID}, which stands for anybody"
            self._reader.add(text.mark, reason, "create a user for it alone")
        return account

    def _listeners(self, node: Node | None) -> dict[str, CompiledListener]:
        cure = "write some of seqpacket, control, or leave listeners out"
        mapping = self._reader.mapping(node, "listeners", cure)
        found = {} if mapping is None else self._reader.entries(mapping, "listeners", Listeners)
        made = {name: self._listener(found.get(name), name) for name in PATHS}
        if made["seqpacket"]["path"] == made["control"]["path"]:
            self._reader.add(
                Mark(1, 1) if mapping is None else mapping.mark,
                f"listeners: both have the path {quoted(made['control']['path'])}",
                "give each a path of its own",
            )
        return made

    def _listener(self, node: Node | None, name: str) -> CompiledListener:
        what = f"listeners: {name}"
        mapping = self._reader.mapping(node, what, "write some of path, group, mode, or leave it out")
        listener: CompiledListener = {"path": PATHS[name], "gid": 0, "mode": MODES[name]}
        if mapping is None:
            if name == "seqpacket":
                listener["gid"] = self._lookups.group(DEFAULT_GROUP_OF_CLIENTS)
            return listener
        found = self._reader.entries(mapping, what, Listener)
        cure = f"write an absolute path, as in {PATHS[name]}"
        path = self._reader.parsed(found.get("path"), f"{what}: path", _parse_socket_path, cure)
        cure = 'write octal digits, as in "0660"'
        mode = self._reader.parsed(found.get("mode"), f"{what}: mode", _parse_permissions, cure)
        group = self._reader.text(found.get("group"), f"{what}: group", "write the name of one group")
        listener["path"] = listener["path"] if path is None else path
        listener["mode"] = listener["mode"] if mode is None else mode
        listener["gid"] = 0 if group is None else self._clients.gid(group, f"{what}: group")
        return listener


def _parse_socket_path(text: str) -> str:
    path = parse_path(text)
    if path == "/":
        raise ScalarError("'/' is not the name of a socket", "write a path below /run/fdbroker")
    if len(path.encode()) > MAX_SOCKET_PATH:
        raise ScalarError(
            f"{quoted(path)} is longer than {MAX_SOCKET_PATH} bytes, as the path of a socket may be",
            "choose a shorter one",
        )
    return path


def _parse_permissions(text: str) -> int:
    mode = parse_mode(text)
    if mode & ~ALL_PERMISSIONS:
        raise ScalarError(f"{quoted(text)} has more than permissions in it", "write at most 0777")
    return mode
