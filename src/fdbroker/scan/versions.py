"""What engines say of their versions, as a worker tells it: one line for each, to be shown."""

from __future__ import annotations

LONGEST_VERSION = 255
LONGEST_VERSIONS = 4096


def one_line(version: str) -> str:
    """Return what can be shown of a version: printable, at most 255 characters."""
    return "".join(one if one.isprintable() else " " for one in version[:LONGEST_VERSION]).strip()


def encode_versions(versions: list[str]) -> bytes:
    """Return the versions as bytes."""
    return "\n".join(map(one_line, versions)).encode("utf-8", "replace")[:LONGEST_VERSIONS]


def decode_versions(data: bytes) -> list[str]:
    """Return the versions again; whatever the bytes are, each can be shown."""
    return [one_line(line) for line in data.decode("utf-8", "replace").split("\n")]
