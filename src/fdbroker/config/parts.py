"""A policy in several files: their trees become one, and what two of them say is a problem with both places.

The order of the files has no meaning but for messages: rules have none, and nothing overrides anything. A
setting that a later file changed would be one that who reads the first file takes for what holds.
"""

from __future__ import annotations

from collections.abc import Sequence

from fdbroker.config.errors import quoted
from fdbroker.config.reader import Reader
from fdbroker.config.yaml_tree import Entry, List, Mapping

# What is put together key by key, and what each key of it is.
_BY_KEY = {
    "roots": "root",
    "listeners": "listener",
    "limits": "limits:",
    "audit": "audit:",
    "admins": "admins:",
}


def merged(files: Sequence[Mapping], reader: Reader) -> Mapping:
    """Return the mapping of a whole policy, from those of its files, of which there is one or more.

    Problems are noted by `reader`; where there are any, the first of what is given twice stands.
    """
    whole = Mapping(files[0].mark, dict(files[0].entries))
    for file in files[1:]:
        if "version" not in file.entries:
            reader.add(
                file.mark, "key 'version' is missing", "add 'version: 1': each file of a policy says it"
            )
        for key, entry in file.entries.items():
            first = whole.entries.get(key)
            whole.entries[key] = entry if first is None else _both(key, first, entry, reader)
    return whole


def _both(key: str, first: Entry, entry: Entry, reader: Reader) -> Entry:
    """Return what two files say of a key of the policy."""
    if key == "version":
        return first
    if key == "rules" and isinstance(first.value, List) and isinstance(entry.value, List):
        return Entry(first.key, List(first.value.mark, first.value.items + entry.value.items))
    if key in _BY_KEY and isinstance(first.value, Mapping) and isinstance(entry.value, Mapping):
        entries = dict(first.value.entries)
        for name, inner in entry.value.entries.items():
            earlier = entries.setdefault(name, inner)
            if earlier is not inner:
                _note(f"{_BY_KEY[key]} {quoted(name)}", earlier, inner, reader)
        return Entry(first.key, Mapping(first.value.mark, entries))
    if key in _BY_KEY or key == "rules":
        # One of them is not of its kind: the reader of the whole says so, if it gets to see that one.
        good = List if key == "rules" else Mapping
        return entry if isinstance(first.value, good) else first
    _note(f"key {quoted(key)}", first, entry, reader)
    return first


def _note(what: str, first: Entry, entry: Entry, reader: Reader) -> None:
    place = first.key.mark.seen_from(entry.key.mark)
    reader.add(entry.key.mark, f"{what} is given twice, first {place}", "keep one of the two")
