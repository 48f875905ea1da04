"""Whom a rule is about: `client`, and names of users and groups wherever they stand."""

from __future__ import annotations

from collections.abc import Callable

from fdbroker.config.compiled import CompiledClient
from fdbroker.config.errors import did_you_mean, quoted
from fdbroker.config.identities import MAX_ID, OVERFLOW_ID, OVERFLOW_NAMES, Lookups, unit_cgroup
from fdbroker.config.reader import Reader
from fdbroker.config.scalars import ScalarError, parse_count, parse_path
from fdbroker.config.schema import Client
from fdbroker.config.yaml_tree import List, Node, Text

_CLIENT_CURE = "write any, or a mapping with some of user, group, unit, cgroup, label"
_IDS_CURE = "write names or numbers"


class ClientReader:
    """Reads who is meant, and turns names into numbers."""

    def __init__(self, reader: Reader, lookups: Lookups) -> None:
        self._reader = reader
        self._lookups = lookups

    def clients(self, node: Node, what: str) -> list[CompiledClient]:
        """Return the entries of a rule's `client`: the word any, a mapping, or a list of mappings."""
        if isinstance(node, Text) and node.value == "any":
            return [{"any": True}]
        if isinstance(node, Text) and node.value:
            cure = did_you_mean(node.value, ["any"], f"write any, or {{user: {node.value}}} if that is meant")
            self._reader.add(node.mark, f"{what}: {quoted(node.value)} is neither any nor a mapping", cure)
            return []
        if not isinstance(node, List):
            return [self._client(node, what)]
        if not node.items:
            self._reader.add(node.mark, f"{what}: the list is empty", _CLIENT_CURE)
        return [self._client(item, f"{what}: entry {number}") for number, item in enumerate(node.items, 1)]

    def uids(self, texts: list[Text], what: str) -> list[int]:
        """Return the uids of users by name or number, each once."""
        return self._ids(texts, what, "user", self._lookups.user)

    def gids(self, texts: list[Text], what: str) -> list[int]:
        """Return the gids of groups by name or number, each once."""
        return self._ids(texts, what, "group", self._lookups.group)

    def gid(self, text: Text, what: str) -> int | None:
        """Return the gid of one group by name or number."""
        return self._id(text, what, "group", self._lookups.group)

    def names(self, node: Node | None, what: str) -> list[Text]:
        """Return the names or numbers of a list, or a single one."""
        return self._reader.texts(node, what, _IDS_CURE)

    def _client(self, node: Node, what: str) -> CompiledClient:
        mapping = self._reader.mapping(node, what, _CLIENT_CURE)
        if mapping is None:
            return {}
        found = self._reader.entries(mapping, what, Client)
        client: CompiledClient = {}
        if "user" in found:
            client["uids"] = self.uids(self.names(found["user"], f"{what}: user"), f"{what}: user")
        if "group" in found:
            client["gids"] = self.gids(self.names(found["group"], f"{what}: group"), f"{what}: group")
        if "unit" in found:
            client["cgroups"] = self._cgroups(
                found["unit"], f"{what}: unit", unit_cgroup, "write NAME.service"
            )
        if "cgroup" in found:
            client["cgroups"] = self._cgroups(
                found["cgroup"], f"{what}: cgroup", _cgroup_path, "write its full path, as in /user.slice"
            )
        if "label" in found:
            cure = "write it whole, as in system_u:system_r:backup_t:s0, or 'backup (enforce)'"
            texts = self._reader.texts(found["label"], f"{what}: label", cure)
            client["labels"] = [text.value for text in texts]
        if "unit" in found and "cgroup" in found:
            # Both would have to hold, and a list of control groups can't say that.
            self._reader.add(
                mapping.entries["cgroup"].key.mark,
                f"{what} has both 'unit' and 'cgroup'",
                "a unit is one control group: keep one of them, or make two entries of a list",
            )
        return client

    def _cgroups(self, node: Node, what: str, convert: Callable[[str], str], cure: str) -> list[str]:
        paths = [
            self._reader.parsed(text, what, convert, cure) for text in self._reader.texts(node, what, cure)
        ]
        return [path for path in paths if path is not None]

    def _ids(
        self, texts: list[Text], what: str, kind: str, look_up: Callable[[str], int | None]
    ) -> list[int]:
        # A dict keeps the order and drops a number that two names have.
        ids = dict.fromkeys(self._id(text, what, kind, look_up) for text in texts)
        return [number for number in ids if number is not None]

    def _id(self, text: Text, what: str, kind: str, look_up: Callable[[str], int | None]) -> int | None:
        name = text.value
        if name.isascii() and name.isdigit():
            number = self._reader.parsed(text, what, _parse_id, _IDS_CURE)
        elif name in OVERFLOW_NAMES:
            number = OVERFLOW_ID
        else:
            number = look_up(name)
            if number is None:
                known = self._lookups.group_names if kind == "group" else self._lookups.user_names
                self._reader.add(
                    text.mark,
                    f"{what}: there is no {kind} {quoted(name)} on this system",
                    lambda: did_you_mean(name, known(), f"create the {kind}, or write its number"),
                )
        if number == OVERFLOW_ID:
            self._reader.add(
                text.mark,
                f"{what}: {quoted(name)} is not allowed: every id that a user namespace "
                f"does not map shows as {OVERFLOW_ID}",
                f"use a {kind} of its own",
            )
        return number


def _parse_id(text: str) -> int:
    number = parse_count(text)
    if number > MAX_ID:
        raise ScalarError(f"{number} is larger than any id", f"write at most {MAX_ID}")
    return number


def _cgroup_path(text: str) -> str:
    if text == "/":
        raise ScalarError(
            "every process is in or below the control group '/'", "write 'client: any' if that is meant"
        )
    path = parse_path(text)
    mount = "/sys/fs/cgroup"
    if path.startswith(f"{mount}/"):
        raise ScalarError(
            f"{quoted(text)} is its path in the file system", f"write {quoted(path.removeprefix(mount))}"
        )
    return path
