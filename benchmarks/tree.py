"""The files that are opened: small, many, and none of them readable by the client."""

from __future__ import annotations

import hashlib
import os
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

DIRECTORIES = 40
FILES_PER_DIRECTORY = 50
# Their mean is 4 KiB; every fifth file, and one more, has exactly that size.
SIZES = (1024, 2048, 4096, 4096, 9216)
EXACT_SIZE = 4096
LARGE_SIZE = 1 << 20
_LARGE_FILES = 16
OWNER = 23455
_NUMBER = struct.Struct("<Q")
# For walks: from 1 to 16 KiB, 4.3 KiB on average.
WALKED_DIRECTORIES = 400
WALKED_SIZES = (1024, 1024, 2048, 2048, 4096, 4096, 4096, 8192, 16384, 1024)


@dataclass(frozen=True)
class Tree:
    """A tree on the disk and the lists of its paths, as the clients read them."""

    root: Path
    files: int
    everything: Path
    """A list of all files."""
    exact: Path
    """A list of those of exactly 4 KiB."""
    forbidden: Path
    """A list of one file that exists, and that the policy denies to everybody."""
    checksum: int
    """What `bench_client --read` says when it is given every file once, in order."""


def make_tree(directory: Path) -> Tree:
    """Create the tree and the lists in `directory`, which everybody must be able to enter."""
    root = directory / "tree"
    root.mkdir(mode=0o755)
    everything: list[Path] = []
    exact: list[Path] = []
    checksum = 0
    for number in range(DIRECTORIES):
        folder = root / f"user{number:02}"
        folder.mkdir(mode=0o700)
        for place in range(FILES_PER_DIRECTORY):
            path = folder / f"document-{place:03}.txt"
            everything.append(path)
            # Not from 0, so that a file of zeros is no right answer.
            content = len(everything) * 0x9E3779B97F4A7C15 % 2**64
            size = SIZES[place % len(SIZES)]
            _write(path, _NUMBER.pack(content) * (size // _NUMBER.size))
            checksum = (checksum + len(everything) * content) % 2**64
            if size == EXACT_SIZE:
                exact.append(path)
        os.chown(folder, OWNER, OWNER)
    secret = root / "user00" / ".ssh" / "id_ed25519"
    secret.parent.mkdir(mode=0o700)
    _write(secret, b"not a key\n")
    os.chown(secret.parent, OWNER, OWNER)
    return Tree(
        root=root,
        files=len(everything),
        everything=_write_list(directory / "everything", everything),
        exact=_write_list(directory / "exact", exact),
        forbidden=_write_list(directory / "forbidden", [secret]),
        checksum=checksum,
    )


@dataclass(frozen=True)
class WalkedTree:
    """A tree that is walked as a whole."""

    root: Path
    files: int
    checksum: int
    """What `bench_client --read --walk` says when it is given every file once, in any order."""
    hashes: frozenset[bytes]
    """The lines of sha256sum."""


def make_walked_tree(directory: Path) -> WalkedTree:
    """Create the tree in `directory`, which everybody must be able to enter."""
    root = directory / "walked"
    root.mkdir(mode=0o755)
    hashes = set()
    checksum = 0
    for number in range(WALKED_DIRECTORIES):
        folder = root / f"user{number:03}"
        folder.mkdir(mode=0o700)
        for place in range(FILES_PER_DIRECTORY):
            path = folder / f"document-{place:03}.txt"
            content = (len(hashes) + 1) * 0x9E3779B97F4A7C15 % 2**64
            data = _NUMBER.pack(content) * (WALKED_SIZES[place % len(WALKED_SIZES)] // _NUMBER.size)
            _write(path, data)
            checksum = (checksum + content) % 2**64
            hashes.add(b"%s  %s" % (hashlib.sha256(data).hexdigest().encode(), os.fsencode(path)))
        os.chown(folder, OWNER, OWNER)
    return WalkedTree(root, len(hashes), checksum, frozenset(hashes))


def make_large_files(directory: Path) -> tuple[Path, Path]:
    """Create some files of 1 MiB in `directory`; return where they are, and the list of their paths."""
    root = directory / "large"
    root.mkdir(mode=0o700)
    paths = [root / f"film-{number:02}" for number in range(_LARGE_FILES)]
    for number, path in enumerate(paths, 1):
        _write(path, bytes([number]) * LARGE_SIZE)
    os.chown(root, OWNER, OWNER)
    return root, _write_list(directory / "large-files", paths)


def read_list(path: Path) -> list[bytes]:
    """Return the paths of a list."""
    return path.read_bytes().split(b"\0")[:-1]


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    path.chmod(0o600)
    os.chown(path, OWNER, OWNER)


def _write_list(path: Path, paths: Iterable[Path]) -> Path:
    path.write_bytes(b"".join(os.fsencode(entry) + b"\0" for entry in paths))
    path.chmod(0o644)
    return path
