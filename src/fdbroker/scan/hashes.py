"""Lists of what is known to be bad: SHA-256 of whole files, each with a name."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

# The EICAR test file, alone and with the line ends that editors add.
_EMBEDDED = (
    ("275a021bbfb6489e54d471899f7db9d1663fc695ec2fe2a2c4538aabf651fd0f", "Eicar-Test-Signature"),
    ("131f95c51cc819465fa1797f6ccacf9d494aaaff46fa3eac73ae63ffbdfd8267", "Eicar-Test-Signature"),
    ("8b3f191819931d1f2cef7289239b5f77c00b079847b9c2636e56854d1e5eff71", "Eicar-Test-Signature"),
)

# What sha256sum writes is read as well: the name is the rest of the line.
_LINE = re.compile(rb"([0-9a-fA-F]{64})(?:[ \t]+(.*))?", re.DOTALL)


class HashListError(Exception):
    """A list can't be read; the text has the place and what is wrong there."""


class HashList:
    """Digests with their names. A digest has the first name that was given for it."""

    def __init__(self, entries: Iterable[tuple[bytes, str]]) -> None:
        self._names: list[str] = []
        self._indices: dict[bytes, int] = {}
        for digest, name in entries:
            if digest not in self._indices:
                self._indices[digest] = len(self._names)
                self._names.append(name)

    def __len__(self) -> int:
        """Return how many digests it has."""
        return len(self._names)

    def digests(self) -> bytes:
        """Return all digests, of 32 bytes each, in the order of their indices."""
        return b"".join(self._indices)

    def find(self, digest: bytes) -> int | None:
        """Return the index of a digest, None if it is not in the list."""
        return self._indices.get(digest)

    def name(self, index: int) -> str:
        """Return the name at an index; IndexError if there is none."""
        if index < 0:
            raise IndexError(index)
        return self._names[index]


def load(files: Iterable[bytes] = ()) -> HashList:
    """Return the embedded list, with what the files add to it.

    Raises:
        HashListError: a file can't be read, or a line of it.

    """
    entries = [(bytes.fromhex(digest), name) for digest, name in _EMBEDDED]
    for path in files:
        shown = ascii(path.decode("utf-8", "backslashreplace"))[1:-1]
        try:
            with open(path, "rb") as file:
                text = file.read()
        except OSError as error:
            raise HashListError(f"{shown}: {error.strerror}") from error
        entries += parse(text, shown)
    return HashList(entries)


def parse(text: bytes, source: str) -> list[tuple[bytes, str]]:
    """Return what the text of a list says; `source` is its name in errors.

    Each line is a SHA-256 in 64 hexadecimal digits and, after a space, a name.
    Empty lines and lines that begin with # mean nothing.

    Raises:
        HashListError: `source:line: what is wrong`.

    """
    entries = []
    for number, line in enumerate(text.split(b"\n"), 1):
        stripped = line.strip()
        if not stripped or stripped.startswith(b"#"):
            continue
        match = _LINE.fullmatch(stripped)
        if match is None:
            raise HashListError(
                f"{source}:{number}: not a SHA-256 in 64 hexadecimal digits, with a name after it"
            )
        digest = bytes.fromhex(match[1].decode("ascii"))
        try:
            name = (match[2] or b"").decode("utf-8")
        except UnicodeDecodeError:
            raise HashListError(f"{source}:{number}: the name is not UTF-8") from None
        if not name.isprintable():
            raise HashListError(f"{source}:{number}: the name has characters that can't be printed")
        entries.append((digest, name or f"sha256-{match[1].decode('ascii').lower()[:16]}"))
    return entries
