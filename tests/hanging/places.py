"""A directory with a local file and a FUSE file system beside it, and policies of both."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from tests.hanging.fuse import FuseServer, fuse_mounted
from tests.running_broker import policy, reachable_directory, rule

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path


class Place:
    """A directory in which `local` has a file, and at `far` a FUSE file system is mounted."""

    def __init__(self, directory: Path, server: FuseServer) -> None:
        self.directory = directory
        self.local = directory / "local"
        self.far = directory / "far"
        self.server = server


@contextlib.contextmanager
def mounted_beside_local(files: Mapping[str, bytes]) -> Iterator[tuple[Path, FuseServer]]:
    """Give what a `Place` is made of."""
    with reachable_directory() as directory:
        for name in ("local", "far"):
            (directory / name).mkdir()
        (directory / "local" / "file").write_bytes(b"local")
        with fuse_mounted(directory / "far", files) as server:
            yield directory, server


def two_roots(local: Path, far: Path, *rules: dict[str, Any], opens: str = "helpers") -> dict[str, Any]:
    """Return a policy: everybody may do everything in both, and helpers open in the second."""
    roots = [
        {"name": "tree", "path": str(local), "cross_mounts": False, "opens": "loop"},
        {"name": "far", "path": str(far), "cross_mounts": False, "opens": opens},
    ]
    return policy(local, rule("local"), *(rules or [rule("far", root="far")]), roots=roots)
