"""What only the launcher needs of a policy: whom the broker runs as, and which sockets are made."""

from __future__ import annotations

import re
from typing import get_args

from fdbroker.config.clients import ClientReader
from fdbroker.config.compiled import CompiledDaemon, CompiledListener, CompiledService
from fdbroker.config.defaults import (
    ALL_PERMISSIONS,
    DEFAULT_GROUP_OF_CLIENTS,
    DEFAULT_USER,
    DIRECTORY,
    FOR_REQUESTS,
    MAX_SOCKET_PATH,
    MODES,
    NAMES_OF_SYSTEMD,
    PATHS,
    SERVICE_MODE,
)
from fdbroker.config.errors import Mark, closest, did_you_mean, quoted
from fdbroker.config.identities import OVERFLOW_ID, Lookups
from fdbroker.config.reader import Reader
from fdbroker.config.scalars import ScalarError, parse_mode, parse_path
from fdbroker.config.schema import (
    NAME_PATTERN,
    SOCKET_TYPE_DEFAULT,
    Listener,
    ServiceListener,
    SocketType,
)
from fdbroker.config.yaml_tree import Entry, Mapping, Node, Text
from fdbroker.wire.format import MAX_LISTENER_NAME

_NAME = re.compile(NAME_PATTERN)
_ALWAYS_MADE = frozenset({"seqpacket", "control"})


class DaemonReader:
    """Reads `user` and `listeners`.

    A default user or group that is missing on this system is told of when the
    broker is started, not here: a policy may be checked where nothing is installed.
    """

    def __init__(self, reader: Reader, clients: ClientReader, lookups: Lookups) -> None:
        self._reader = reader
        self._clients = clients
        self._lookups = lookups

    def daemon(
        self, user: Node | None, listeners: Node | None, audit: str | None
    ) -> tuple[CompiledDaemon, list[CompiledService]]:
        """Return the launcher's member of the compiled policy, and the services that have a listener."""
        uid, gid = self._account(user) or (None, None)
        made, services = self._listeners(listeners)
        return {"uid": uid, "gid": gid, "listeners": made, "audit": audit}, services

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

    def _listeners(self, node: Node | None) -> tuple[dict[str, CompiledListener], list[CompiledService]]:
        cure = "write some of seqpacket, stream, dgram, control, names of services, or leave listeners out"
        mapping = self._reader.mapping(node, "listeners", cure)
        entries = {} if mapping is None else mapping.entries
        made: dict[str, CompiledListener] = {}
        for name in PATHS:
            entry = entries.get(name)
            if entry is not None or name in _ALWAYS_MADE:
                made[name] = self._listener(None if entry is None else entry.value, name)
        services: list[CompiledService] = []
        for name, entry in entries.items():
            if name not in PATHS and self._is_name_of_a_service(entry):
                made[name], service = self._service_listener(entry, name)
                services.append(service)
        if mapping is not None:
            self._check_paths(made, mapping.mark)
        return made, services

    def _is_name_of_a_service(self, entry: Entry) -> bool:
        """Return whether a listener with another name than those of the broker is meant to be a service's."""
        name = entry.key.value
        meant = closest(name, PATHS)
        of_a_service = isinstance(entry.value, Mapping) and "service" in entry.value.entries
        if meant is not None and not of_a_service:
            reason = f"listeners: unknown key {quoted(name)}"
            self._reader.add(entry.key.mark, reason, f"did you mean {quoted(meant)}?")
            return False
        if not _NAME.fullmatch(name) or name in NAMES_OF_SYSTEMD or len(name) > MAX_LISTENER_NAME:
            why = ": it is what systemd calls a socket without a name" if name in NAMES_OF_SYSTEMD else ""
            why = f": it is longer than {MAX_LISTENER_NAME} bytes" if len(name) > MAX_LISTENER_NAME else why
            cure = "use a-z, 0-9, '_' and '-', beginning with a letter or digit, and no word of systemd's"
            self._reader.add(
                entry.key.mark, f"listeners: name of a service {quoted(name)} is not allowed{why}", cure
            )
            return False
        return True

    def _service_listener(self, entry: Entry, name: str) -> tuple[CompiledListener, CompiledService]:
        what = f"listeners: {name}"
        listener: CompiledListener = {
            "kind": SOCKET_TYPE_DEFAULT,
            "path": f"{DIRECTORY}/{name}",
            "gid": 0,
            "mode": SERVICE_MODE,
        }
        service: CompiledService = {"name": name, "clients": []}
        mapping = self._reader.mapping(entry.value, what, "write {service: {user: NAME}}")
        if mapping is not None:
            found = self._reader.entries(mapping, what, ServiceListener)
            self._read_listener(found, what, listener)
            of_type = self._reader.choice(found.get("type"), f"{what}: type", get_args(SocketType))
            listener["kind"] = of_type or SOCKET_TYPE_DEFAULT
            who = found.get("service")
            if isinstance(who, Text) and who.value == "any":
                self._reader.add(
                    who.mark,
                    f"{what}: service: everybody could take its clients, and act for them",
                    "write who the service is: {user: NAME}, {unit: NAME.service}",
                )
            elif who is not None:
                service["clients"] = self._clients.clients(who, f"{what}: service")
        return listener, service

    def _listener(self, node: Node | None, name: str) -> CompiledListener:
        what = f"listeners: {name}"
        cure = "write some of path, group, mode, or {} for what is usual"
        mapping = self._reader.mapping_or_empty(node, what, cure)
        kind = name if name in FOR_REQUESTS else "seqpacket"
        listener: CompiledListener = {"kind": kind, "path": PATHS[name], "gid": 0, "mode": MODES[name]}
        if mapping is None or not mapping.entries:
            if name in FOR_REQUESTS:
                listener["gid"] = self._lookups.group(DEFAULT_GROUP_OF_CLIENTS)
            return listener
        if "service" in mapping.entries:
            self._reader.add(
                mapping.entries["service"].key.mark,
                f"{what}: its clients are the broker's own, so no service takes them",
                "remove 'service', or give the service's listener a name of its own",
            )
            return listener
        self._read_listener(self._reader.entries(mapping, what, Listener), what, listener)
        return listener

    def _read_listener(self, found: dict[str, Node], what: str, listener: CompiledListener) -> None:
        """Note in `listener` what is written of it."""
        cure = f"write an absolute path, as in {listener['path']}"
        path = self._reader.parsed(found.get("path"), f"{what}: path", _parse_socket_path, cure)
        cure = 'write octal digits, as in "0660"'
        mode = self._reader.parsed(found.get("mode"), f"{what}: mode", _parse_permissions, cure)
        group = self._reader.text(found.get("group"), f"{what}: group", "write the name of one group")
        listener["path"] = listener["path"] if path is None else path
        listener["mode"] = listener["mode"] if mode is None else mode
        listener["gid"] = 0 if group is None else self._clients.gid(group, f"{what}: group")

    def _check_paths(self, made: dict[str, CompiledListener], mark: Mark) -> None:
        name_of: dict[str, str] = {}
        for name, listener in made.items():
            first = name_of.setdefault(listener["path"], name)
            if first != name:
                self._reader.add(
                    mark,
                    f"listeners: {first} and {name} have the path {quoted(listener['path'])}",
                    "give each a path of its own",
                )


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
