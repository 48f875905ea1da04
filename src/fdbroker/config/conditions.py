"""What an object must be like: `where`."""

from __future__ import annotations

from collections.abc import Callable

from fdbroker.broker.roots import HELPED_FILESYSTEMS, SERVED_FILESYSTEMS
from fdbroker.config.clients import ClientReader
from fdbroker.config.compiled import CompiledOwner, CompiledWhere
from fdbroker.config.errors import did_you_mean, quoted
from fdbroker.config.reader import Reader
from fdbroker.config.scalars import ScalarError, parse_count, parse_duration, parse_mode, parse_size
from fdbroker.config.schema import AgeRange, CountRange, ModeCondition, SizeRange, Where
from fdbroker.config.yaml_tree import Node

_WHERE_CURE = "write some of owner, group, mode, size, links, age, filesystem, or leave where out"
# Those that the broker may serve; of what it never serves no rule need speak. A mount of cifs shows as
# either, by the version of the protocol.
FILESYSTEMS = {
    name: [magic]
    for magic, names in (SERVED_FILESYSTEMS | HELPED_FILESYSTEMS).items()
    for name in names.split("/")
}
FILESYSTEMS["cifs"] = [*FILESYSTEMS["cifs"], *FILESYSTEMS["smb3"]]
_WORDS_FOR_OWNERS = frozenset({"client", "on_behalf_of"})
_MODE_CURE = 'write {all: "0400"}, {none: "0022"} or both'


class ConditionReader:
    """Reads the conditions of a rule."""

    def __init__(self, reader: Reader, clients: ClientReader) -> None:
        self._reader = reader
        self._clients = clients

    def where(self, node: Node | None, what: str, *, acts_for: bool) -> CompiledWhere:
        """Return the conditions that are written; {} for none. `acts_for`: the rule has `on_behalf_of`."""
        mapping = self._reader.mapping(node, what, _WHERE_CURE)
        if mapping is None:
            return {}
        found = self._reader.entries(mapping, what, Where)
        where: CompiledWhere = {}
        if "owner" in found:
            where["owner"] = self._owner(found["owner"], f"{what}: owner", acts_for=acts_for)
        if "group" in found:
            names = self._clients.names(found["group"], f"{what}: group")
            where["group"] = {"gids": self._clients.gids(names, f"{what}: group")}
        if "mode" in found:
            where["mode"] = self._mode(found["mode"], f"{what}: mode")
        if "size" in found:
            cure = "write {max: 2GiB}, {min: 1} or both"
            where["size"] = self._range(found["size"], f"{what}: size", SizeRange, parse_size, cure)
        if "links" in found:
            cure = "write {max: 1}, {min: 2} or both"
            where["links"] = self._range(found["links"], f"{what}: links", CountRange, _parse_links, cure)
        if "age" in found:
            cure = "write {min: 5s}, {max: 30d} or both"
            where["age"] = self._range(found["age"], f"{what}: age", AgeRange, parse_duration, cure)
        if "filesystem" in found:
            where["filesystem"] = {"types": self._filesystems(found["filesystem"], f"{what}: filesystem")}
        return where

    def _owner(self, node: Node, what: str, *, acts_for: bool) -> CompiledOwner:
        words = set()
        users = []
        for text in self._clients.names(node, what):
            if text.value not in _WORDS_FOR_OWNERS:
                users.append(text)
                continue
            words.add(text.value)
            if text.value == "on_behalf_of" and not acts_for:
                self._reader.add(
                    text.mark,
                    f"{what}: the rule has no 'on_behalf_of', so nobody is acted for",
                    "add 'on_behalf_of: ...' to the rule, or write client, names or numbers",
                )
        return {
            "uids": self._clients.uids(users, what),
            "client": "client" in words,
            "on_behalf_of": "on_behalf_of" in words,
        }

    def _filesystems(self, node: Node, what: str) -> list[int]:
        types: dict[int, None] = {}  # each once, in the order of the author
        for text in self._reader.texts(node, what, "write names of types, as in [ext4, xfs]"):
            found = FILESYSTEMS.get(text.value)
            types |= dict.fromkeys(found or ())
            if found is None:
                self._reader.add(
                    text.mark,
                    f"{what}: {quoted(text.value)} is no type of file system that is ever served",
                    lambda: did_you_mean(text.value, FILESYSTEMS, f"they are {', '.join(FILESYSTEMS)}"),  # noqa: B023 - called at once
                )
        return list(types)

    def _mode(self, node: Node, what: str) -> dict[str, int]:
        mapping = self._reader.mapping(node, what, _MODE_CURE)
        if mapping is None:
            return {}
        found = self._reader.entries(mapping, what, ModeCondition)
        masks = {}
        for key in ("all", "none"):
            mask = self._reader.parsed(found.get(key), f"{what}: {key}", _parse_mask, _MODE_CURE)
            if mask is not None:
                masks[key] = mask
        both = masks.get("all", 0) & masks.get("none", 0)
        if both:
            self._reader.add(
                mapping.mark,
                f"{what}: bits 0{both:03o} must be both set and clear, which nothing can meet",
                "name a bit in one of the two only",
            )
        return masks

    def _range(
        self,
        node: Node,
        what: str,
        structure: type[SizeRange | CountRange | AgeRange],
        parse: Callable[[str], int],
        cure: str,
    ) -> dict[str, int]:
        mapping = self._reader.mapping(node, what, cure)
        if mapping is None:
            return {}
        found = self._reader.entries(mapping, what, structure)
        bounds = {}
        for key in ("min", "max"):
            bound = self._reader.parsed(found.get(key), f"{what}: {key}", parse, cure)
            if bound is not None:
                bounds[key] = bound
        if len(bounds) > 1 and bounds["min"] > bounds["max"]:
            self._reader.add(
                mapping.mark,
                f"{what}: min {bounds['min']} is more than max {bounds['max']}, which nothing can meet",
                "exchange the two",
            )
        return bounds


def _parse_mask(text: str) -> int:
    mask = parse_mode(text)
    if mask == 0:
        raise ScalarError("0 names no bit", "name at least one, or leave the key out")
    return mask


def _parse_links(text: str) -> int:
    count = parse_count(text)
    if count == 0:
        raise ScalarError("0: a file that has a name has at least one link", "write 1 or more")
    return count
