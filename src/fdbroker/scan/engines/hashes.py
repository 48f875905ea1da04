"""`hashes`: whole files by their digest, from lists of text.

Reads what sha256sum and md5sum write, and ClamAV's `.hdb` and `.hsb`. The EICAR
test file is always in it, so that a configuration can be tried out.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from fdbroker.scan.engine import EngineError, Inside, shown
from fdbroker.scan.reading import chunks, wrong_size
from fdbroker.scan.verdict import LONGEST_NAME, Clean, Error, Reason, Verdict, found

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

# The EICAR test file, alone and with the line ends that editors add.
_EMBEDDED = (
    ("275a021bbfb6489e54d471899f7db9d1663fc695ec2fe2a2c4538aabf651fd0f", "Eicar-Test-Signature"),
    ("131f95c51cc819465fa1797f6ccacf9d494aaaff46fa3eac73ae63ffbdfd8267", "Eicar-Test-Signature"),
    ("8b3f191819931d1f2cef7289239b5f77c00b079847b9c2636e56854d1e5eff71", "Eicar-Test-Signature"),
)

# ClamAV's feature level that is matched here, for entries that say from which or up to which they hold: 1.4.
_LEVEL = 216

_ALGORITHMS = {32: "md5", 40: "sha1", 64: "sha256"}
_HEX = re.compile(rb"[0-9a-fA-F]+")
# What sha256sum writes: a name after two spaces, or after a space and a star.
_PLAIN = re.compile(rb"([0-9a-fA-F]+)(?:[ \t]+\*?(.*))?", re.DOTALL)
_LAST_SIZE = 2**63 - 1
_FIELDS = (3, 4, 5)


@dataclass(frozen=True)
class HashesOptions:
    """`lists`: files with digests, beside the embedded one."""

    lists: tuple[bytes, ...] = ()


class Entry(NamedTuple):
    """One line. `digest`: of MD5, SHA-1 or SHA-256, by its length; `size` in bytes, None: any."""

    digest: bytes
    size: int | None
    name: str


class HashListError(EngineError):
    """A list can't be read; the text has the place and what is wrong there."""


class HashList:
    """Digests with their names. A digest has the first name that was given for it."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        # One table: behind a digest that holds for one size only stands that size, in eight bytes.
        self._names: dict[bytes, str] = {}
        lengths = set()
        for digest, size, name in entries:
            self._names.setdefault(digest + _tail(size), name)
            lengths.add(len(digest) * 2)
        self.algorithms = tuple(_ALGORITHMS[length] for length in sorted(lengths, reverse=True))

    def __len__(self) -> int:
        """Return how many digests it has."""
        return len(self._names)

    def find(self, digest: bytes, size: int) -> str | None:
        """Return the name of what has this digest and as many bytes, None if it is not in the list."""
        return self._names.get(digest) or self._names.get(digest + _tail(size))


def _tail(size: int | None) -> bytes:
    return b"" if size is None else size.to_bytes(8, "little")


class Hashes(Inside):
    """Compares digests of whole files."""

    name = "hashes"
    options_type = HashesOptions
    options: HashesOptions

    def __init__(self, options: HashesOptions) -> None:
        super().__init__(options)
        self._known: HashList | None = None

    def databases(self) -> Sequence[bytes]:
        """Return the lists."""
        return self.options.lists

    def warm(self) -> None:
        """Read the lists."""
        self._known = load(self.options.lists)
        for algorithm in self._known.algorithms:
            hashlib.new(algorithm, b"", usedforsecurity=False).digest()

    def version(self) -> str:
        """Return how many digests there are."""
        return f"hashes 1, {0 if self._known is None else len(self._known)} digests"

    def scan(self, descriptor: int, size: int, scratch: bytes | None) -> Verdict:  # noqa: ARG002 - it needs none
        """Read the file to its end and look its digests up."""
        known = self._known
        if known is None:
            return Error(Reason.NOT_LOADED, "the lists were not read")
        digests = [hashlib.new(algorithm, usedforsecurity=False) for algorithm in known.algorithms]
        read = 0
        for chunk in chunks(descriptor, size):
            read += len(chunk)
            for digest in digests:
                digest.update(chunk)
        if (wrong := wrong_size(read, size)) is not None:
            return wrong
        names = [name for digest in digests if (name := known.find(digest.digest(), size)) is not None]
        return found(names) if names else Clean()


def load(files: Iterable[bytes] = ()) -> HashList:
    """Return the embedded list, with what the files add to it.

    Raises:
        HashListError: a file can't be read, or a line of it.

    """
    entries = [Entry(bytes.fromhex(digest), None, name) for digest, name in _EMBEDDED]
    for path in files:
        source = shown(path)
        try:
            with open(path, "rb") as file:
                text = file.read()
        except OSError as error:
            raise HashListError(f"{source}: {error.strerror}") from error
        entries += parse(text, source)
    return HashList(entries)


def parse(text: bytes, source: str) -> list[Entry]:
    """Return what the text of a list says; `source` is its name in errors.

    Each line is a digest in hexadecimal digits (MD5, SHA-1 or SHA-256) and, after a space, a name; or, as in
    ClamAV's `.hdb` and `.hsb`, `digest:size:name[:from level[:to level]]` with `*` for any size. Entries
    that are not for the feature level of ClamAV 1.4 are left out, as ClamAV does. Empty lines and lines
    that begin with # mean nothing.

    Raises:
        HashListError: `source:line: what is wrong`.

    """
    entries = []
    for number, line in enumerate(text.split(b"\n"), 1):
        stripped = line.strip()
        if not stripped or stripped.startswith(b"#"):
            continue
        try:
            entry = _clamav(stripped) if b":" in stripped.split(None, 1)[0] else _plain(stripped)
        except ValueError as error:
            raise HashListError(f"{source}:{number}: {error}") from None
        if entry is not None:
            entries.append(entry)
    return entries


def _plain(line: bytes) -> Entry:
    match = _PLAIN.fullmatch(line)
    if match is None:
        raise ValueError("not a digest in hexadecimal digits, with a name after it")
    digest = _digest(match[1])
    fallback = f"{_ALGORITHMS[len(match[1])]}-{match[1].decode('ascii').lower()[:16]}"
    return Entry(digest, None, _name(match[2] or b"") or fallback)


def _clamav(line: bytes) -> Entry | None:
    fields = line.split(b":")
    if len(fields) not in _FIELDS:
        raise ValueError("not digest:size:name, with at most two levels after it")
    digest = _digest(fields[0])
    size = None if fields[1] == b"*" else _number(fields[1], "a size, or *")
    name = _name(fields[2])
    if not name:
        raise ValueError("there is no name")
    levels = [_number(field, "a level") for field in fields[3:] if field]
    if size is None and not levels:
        raise ValueError("an entry for any size (*) needs a level after its name: 73")
    if (levels and levels[0] > _LEVEL) or (len(levels) > 1 and levels[1] < _LEVEL):
        return None
    return Entry(digest, size, name)


def _digest(text: bytes) -> bytes:
    if len(text) not in _ALGORITHMS or not _HEX.fullmatch(text):
        raise ValueError("not an MD5, SHA-1 or SHA-256 in 32, 40 or 64 hexadecimal digits")
    return bytes.fromhex(text.decode("ascii"))


def _number(text: bytes, wanted: str) -> int:
    if not text.isdigit() or int(text) > _LAST_SIZE:
        raise ValueError(f"{text.decode('ascii', 'backslashreplace')!a} is not {wanted}")
    return int(text)


def _name(text: bytes) -> str:
    try:
        name = text.decode("utf-8").strip()
    except UnicodeDecodeError:
        raise ValueError("the name is not UTF-8") from None
    if not name.isprintable() or len(name) > LONGEST_NAME:
        raise ValueError(f"the name has characters that can't be printed, or more than {LONGEST_NAME}")
    return name
